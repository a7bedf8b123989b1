"""``trace_corpus``: trace many prompts and responses from one file, in batches, into one folder that can be resumed.

Batches depend on the input alone, not on what is already finished. A run that was killed makes the same batches
again, so its numbers are bit-identical on the same machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.corpus.corpus_options import CorpusOptions
from flowgraph.corpus.corpus_ray import CorpusRay, ray_choice
from flowgraph.corpus.ray_run import trace_on_ray
from flowgraph.corpus.requests import CorpusFields, Line, read_requests, scan
from flowgraph.corpus.run import CorpusProgress, Run
from flowgraph.corpus.run_folder import CorpusFolder, claimed, fingerprint
from flowgraph.corpus.tables import table_format, write_results
from flowgraph.errors import InvalidInputError
from flowgraph.files import PathLike
from flowgraph.flow.solve import Absorption, SourceRule
from flowgraph.propagation.interface import Backend
from flowgraph.text.selectors import Selector
from flowgraph.tracing.presets import chosen_capacity
from flowgraph.tracing.trace_options import TraceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
"""Number of lines that are encoded and sorted by length together."""
_SHOWN_LINES = 8
"""Line numbers that a warning lists."""


@dataclass(frozen=True)
class CorpusSummary:
    """The outcome of a run.

    Attributes:
        out: its folder.
        traced: lines traced, earlier runs included.
        now: lines traced by this run.
        tokens: tokens of this run's traces.
        seconds: duration of this run.
        errors: line number and message of every line that could not be traced.
    """

    out: Path
    traced: int
    now: int
    tokens: int
    seconds: float
    errors: tuple[tuple[int, str], ...]

    @property
    def index(self) -> Path:
        """The page that lists all traces."""
        return self.out / "index.html"


def trace_corpus(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: PathLike,
    out: PathLike,
    *,
    fields: CorpusFields | None = None,
    question: str | Selector | None = None,
    answer: str | Selector | None = None,
    plain: bool = False,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    capacity: str | None = None,
    capacity_options: Mapping[str, Any] | None = None,
    layers: LayerRule | None = None,
    heads: str | Sequence[int] | HeadSelector | None = None,
    edge_weight: str = "attention",
    preset: str = "default",
    rows: str | None = None,
    self_attention: str | None = None,
    first_token: str | None = None,
    source: SourceRule = "uniform",
    absorption: Absorption | None = None,
    damping: float = 1.0,
    max_edges: int | str = "auto",
    backend: Backend = "auto",
    max_new_tokens: int = 256,
    composition: str | None = None,
    composition_options: Mapping[str, Any] | None = None,
    keep: float = 0.9,
    batch_tokens: int = 512,
    html: bool = False,
    format: str = "auto",
    restart: bool = False,
    progress: Callable[[CorpusProgress], None] | None = None,
    ray: CorpusRay | str | None = None,
) -> CorpusSummary:
    """Trace every line of a JSONL file: a trace each, a table of tokens, a table of traces, an index page.

    After a kill, the same call continues the run: the files in ``out``, each written atomically, are its state. A
    line that cannot be traced is reported and skipped, and tried again by the next run.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        path: one JSON object a line, with a prompt or chat messages, and optionally a response, an id, and literal
            texts of question and answer.
        out: folder for the results; a new one, or that of an earlier run with the same input and options.
        fields: the keys of a line; see :class:`flowgraph.CorpusFields`.
        question: for lines that name none: ``"user"``, ``"prompt"``, text, a regular expression or a selector.
        answer: for lines that name none: text, a regular expression or a selector. Default: found.
        plain: text prompts go to the model as they are, not as a user's message in the chat template.
        system: a system message in front of text prompts.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``; a line may override them.
        capacity: what an edge weighs, as for :func:`flowgraph.trace`. Default: that of the preset. Lines of
            ``"relevance"`` run one by one, and their tables hold signed scores and the shares in which the demand ends.
        capacity_options: options of the capacity by name.
        layers: this argument and those down to ``max_new_tokens`` are those of :func:`flowgraph.trace`, and are
            explained in :class:`flowgraph.tracing.trace_options.TraceOptions`.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a selector.
        edge_weight: ``"attention"`` or ``"value_norm"``.
        preset: ``"default"``, ``"paper"``, ``"evidence"`` or ``"steps"``: names capacity and edge rules for a question;
            see :class:`flowgraph.tracing.trace_options.TraceOptions`.
        rows: ``"emission"``, ``"emission_all"`` or ``"literal"``; overrides the preset.
        self_attention: ``"drop"`` or ``"renormalize"``; overrides the preset.
        first_token: ``"exclude"`` or ``"keep"``; overrides the preset.
        source: ``"uniform"`` or ``"potential"``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.
        max_edges: ``"auto"``, ``"all"`` or a number.
        backend: of the solver.
        max_new_tokens: limit of a generated response.
        composition: how edges become the scores of the tokens, as for :func:`flowgraph.trace`.
        composition_options: its options by name.
        keep: share of the flow whose routes make the backbone.
        batch_tokens: most tokens, padding included, of one forward pass; a longer line runs alone.
        html: also write a page for each trace.
        format: of the tables: ``"parquet"`` (needs pyarrow), ``"csv"``, or ``"auto"``: Parquet where pyarrow is.
        restart: remove what an earlier run left in ``out``.
        progress: called after every step.
        ray: trace on the workers of a Ray cluster: its address, ``"local"`` to start Ray on this machine, or a
            :class:`flowgraph.CorpusRay`. The results are the same files. None: one process, without Ray.

    Returns:
        What was traced, and what could not be.

    Raises:
        InvalidInputError: an option outside its range, a file without lines, a folder of another run.
        MissingExtraError: Parquet without pyarrow, or ``ray`` without Ray Data.
        CaptureError: the architecture cannot be captured correctly.
        MemoryLimitError: a batch would not fit.
        OutputError: a path cannot be written; everything finished so far stays.
        ClusterError: the workers of ``ray`` could not be started, or broke off; everything finished so far stays.

    Warns:
        UserWarning: in some lines no answer is stated, and the end of an unfinished response, or all of a long one,
            was taken; in some the answer is not what the model prefers (``"relevance"``).

    Cost: as many times :func:`flowgraph.trace`, less what batching saves.
    """
    # Check every option before anything is read or written.
    tables = table_format(format)
    choice = ray_choice(ray)
    options = CorpusOptions(
        trace=TraceOptions(
            capacity=chosen_capacity(capacity, preset),
            capacity_options=capacity_options,
            layers=layers,
            heads=heads,
            edge_weight=edge_weight,
            preset=preset,
            rows=rows,
            self_attention=self_attention,
            first_token=first_token,
            source=source,
            absorption=absorption,
            damping=damping,
            max_edges=max_edges,
            backend=backend,
            max_new_tokens=max_new_tokens,
            composition=composition,
            composition_options=composition_options,
        ),
        question=question,
        answer=answer,
        plain=plain,
        system=system,
        chat_template_kwargs=chat_template_kwargs,
        keep=keep,
        batch_tokens=batch_tokens,
        html=html,
    )
    options.check(model, tokenizer)
    names = CorpusFields() if fields is None else fields
    if not isinstance(names, CorpusFields):
        raise InvalidInputError(f"fields: must be a CorpusFields, got {fields!r:.80}; e.g. CorpusFields(prompt='q')")
    lines = scan(path, names)

    # Two runs must not write one folder at once.
    with claimed(Path(out)):
        # What decides a result: model, tokenizer, options and fields.
        settings = {**fingerprint(model, tokenizer), **options.settings(), "fields": asdict(names)}
        folder = CorpusFolder(Path(out), settings, lines, restart=restart)
        run = Run(model, tokenizer, folder, options, len(lines), progress)
        # Windows of a fixed size bound the memory, and make the same batches after a kill.
        windows = [lines[start : start + WINDOW] for start in range(0, len(lines), WINDOW)]
        if choice is None:
            for window in windows:
                _trace_window(run, window, path, names)
        else:
            trace_on_ray(run, windows, Path(path), names, settings, choice)
        run.progress("writing the tables")
        write_results(
            folder, windows, run.failed, tables, {"input": Path(path).name, **settings}, signed=options.trace.is_signed
        )
    if run.guessed:
        shown = ", ".join(map(str, sorted(run.guessed)[:_SHOWN_LINES]))
        warnings.warn(
            f"answer: should be stated in every response, got {len(run.guessed)} of {run.now} where the end of an "
            f"unfinished response, or all of a long one, was taken (lines {shown}; column answer_by): name it in the "
            "field answer, pass answer=, or raise max_new_tokens",
            stacklevel=2,
        )
    if run.disfavoured:
        shown = ", ".join(map(str, sorted(run.disfavoured)[:_SHOWN_LINES]))
        warnings.warn(
            f"answer: should be what the model prefers, got {len(run.disfavoured)} of {run.now} with a negative demand "
            f"(lines {shown}; column demand), whose shares are those of the case against it; "
            "pass a contrast in capacity_options to compare with another answer",
            stacklevel=2,
        )
    if run.truncated:
        warnings.warn(
            f"max_new_tokens: every response should end by itself, got {run.truncated} of {run.now} cut off, so their "
            "answers may be missing; see the column truncated, and raise max_new_tokens (in a new folder)",
            stacklevel=2,
        )
    return CorpusSummary(
        out=Path(out),
        traced=run.done,
        now=run.now,
        tokens=run.tokens,
        seconds=time.perf_counter() - run.began,
        errors=tuple(sorted(run.failed.items())),
    )


def _trace_window(run: Run, window: list[Line], path: PathLike, names: CorpusFields) -> None:
    """Report the invalid lines of a window and trace the valid ones."""
    valid = []
    for line in window:
        if line.error is None:
            valid.append(line)
        else:
            run.skip(line, line.error)
    run.trace_window(valid, lambda: read_requests(path, valid, names))


def trace_file(*args: Any, **options: Any) -> CorpusSummary:
    """Call :func:`trace_corpus` under its old name, with a warning; removed in the next release."""
    warnings.warn(
        "trace_file: is deprecated, got a call by the old name; call trace_corpus", DeprecationWarning, stacklevel=2
    )
    return trace_corpus(*args, **options)
