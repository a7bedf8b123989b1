"""``trace_corpus``: many prompts and responses from one file, in batches, into one folder that can be resumed.

What decides a batch is the input alone, never what is already done: a run that was killed makes the same batches
again and so the same numbers, to the last bit on the same machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.corpus.requests import CorpusFields, read_requests, scan
from flowgraph.corpus.run import Choices, CorpusProgress, Run
from flowgraph.corpus.run_folder import CorpusFolder, claimed, fingerprint
from flowgraph.corpus.tables import table_format, write_results
from flowgraph.errors import InvalidInputError
from flowgraph.files import PathLike
from flowgraph.flow.solve import Absorption, SourceRule
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.propagation.interface import Backend
from flowgraph.text.selectors import Selector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
"""Lines that are encoded and sorted by length together."""


@dataclass(frozen=True)
class CorpusSummary:
    """What a run left behind.

    Attributes:
        out: its folder.
        traced: lines traced, earlier runs included.
        now: those of this run.
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
        """The page to open."""
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
    layers: LayerRule = "middle",
    heads: str | Sequence[int] | HeadSelector = "mean",
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
    keep: float = 0.9,
    batch_tokens: int = 512,
    html: bool = False,
    format: str = "auto",
    restart: bool = False,
    progress: Callable[[CorpusProgress], None] | None = None,
) -> CorpusSummary:
    """Trace every line of a JSONL file: a trace each, a table of tokens, a table of traces, an index page.

    Run it again after a kill and it goes on where it was: what is done is what lies in ``out``, each file written
    whole or not at all. A line that cannot be traced is reported and skipped, and tried again by the next run.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        path: one JSON object a line, with a prompt or chat messages, and optionally a response, an id, and literal
            texts of question and answer.
        out: folder for the results; a new one, or that of an earlier run with the same input and options.
        fields: the keys of a line; see :class:`flowgraph.CorpusFields`.
        question: for lines that name none: ``"user"``, ``"prompt"``, a regular expression or a selector.
        answer: for lines that name none: a regular expression or a selector. Default: found.
        plain: text prompts go to the model as they are, not as a user's message in the chat template.
        system: a system message in front of text prompts.
        layers: this and all that follow down to ``max_new_tokens`` are those of :func:`flowgraph.trace`.
        heads: how the heads are joined.
        edge_weight: ``"attention"`` or ``"value_norm"``.
        preset: ``"default"`` or ``"paper"``.
        rows: overrides the preset, as do the next two.
        self_attention: ``"drop"`` or ``"renormalize"``.
        first_token: ``"exclude"`` or ``"keep"``.
        source: ``"uniform"`` or ``"potential"``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.
        max_edges: ``"auto"``, ``"all"`` or a number.
        backend: of the solver.
        max_new_tokens: limit of a generated response.
        keep: share of the flow whose routes make the backbone.
        batch_tokens: most tokens, padding included, of one forward pass; a longer line runs alone.
        html: also write a page for each trace.
        format: of the tables: ``"parquet"`` (needs pyarrow), ``"csv"``, or ``"auto"``: Parquet where pyarrow is.
        restart: throw away what an earlier run left in ``out``.
        progress: called after every step.

    Returns:
        What was traced, and what could not be.

    Raises:
        InvalidInputError: an option outside its range, a file without lines, a folder of another run.
        MissingExtraError: Parquet without pyarrow.
        CaptureError: the architecture cannot be captured correctly.
        MemoryLimitError: a batch would not fit.
        OutputError: a path cannot be written; everything finished so far stays.

    Cost: as many times :func:`flowgraph.trace`, less what batching saves.
    """
    tables = table_format(format)
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InvalidInputError(f"batch_tokens: must be a positive number, got {batch_tokens!r}; 512 is the default")
    rules = EdgeRules.preset(preset, rows=rows, self_attention=self_attention, first_token=first_token)
    choices = Choices(
        layers, heads, edge_weight, preset, rules, question, answer, plain, system, source, absorption, damping,
        max_edges, backend, max_new_tokens, keep,
    )  # fmt: skip
    choices.check(model, tokenizer)
    names = CorpusFields() if fields is None else fields
    if not isinstance(names, CorpusFields):
        raise InvalidInputError(f"fields: must be a CorpusFields, got {fields!r:.80}; e.g. CorpusFields(prompt='q')")
    lines = scan(path, names)
    with claimed(Path(out)):
        settings = {**fingerprint(model, tokenizer), **choices.settings(), "fields": asdict(names)}
        folder = CorpusFolder(Path(out), settings, lines, restart=restart)
        run = Run(model, tokenizer, folder, choices, batch_tokens, html, len(lines), progress)
        windows = [lines[start : start + WINDOW] for start in range(0, len(lines), WINDOW)]
        for window in windows:
            good = [line for line in window if line.error is None]
            for line in window:
                if line.error is not None:
                    run.give_up(line, line.error)
            run.trace_window(good, partial(read_requests, path, good, names))
        run.progress("writing the tables")
        write_results(folder, windows, run.failed, tables, {"input": Path(path).name, **settings})
    errors = tuple(sorted(run.failed.items()))
    return CorpusSummary(Path(out), run.done, run.now, run.tokens, time.perf_counter() - run.began, errors)


def trace_file(*args: Any, **options: Any) -> CorpusSummary:
    """Call :func:`trace_corpus` under its old name, with a warning; removed in the next release."""
    warnings.warn(
        "trace_file: is deprecated, got a call by the old name; call trace_corpus", DeprecationWarning, stacklevel=2
    )
    return trace_corpus(*args, **options)
