"""One run over the lines of a corpus: encode a window of them, batch it by length, trace what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.capture import capture, check_fits
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.attention.modules import base_model
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.corpus.requests import Line, Request
from flowgraph.corpus.run_folder import CorpusFolder
from flowgraph.corpus.tables import figures
from flowgraph.errors import InfeasibleFlowError, InvalidInputError, MemoryLimitError, NumericalRangeError
from flowgraph.flow.solve import Absorption, SourceRule, check_options
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.propagation.interface import Backend
from flowgraph.text.chat import check_prompt, ends_with_response
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regex, Regions
from flowgraph.text.selectors import Selector
from flowgraph.tracing.flow_trace import FlowTrace, load_trace
from flowgraph.tracing.generation import check_max_new_tokens, generate_response
from flowgraph.tracing.inputs import regions_of_text
from flowgraph.tracing.provenance import provenance_of
from flowgraph.tracing.trace import assemble, require_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_ONE_LINE = (InvalidInputError, InfeasibleFlowError, MemoryLimitError, NumericalRangeError)
"""What ends a line and not the run."""


@dataclass(frozen=True)
class CorpusProgress:
    """Where a run stands.

    Attributes:
        stage: what is being done.
        done, failed, total: lines traced (earlier runs included), lines given up, all lines.
        now: lines traced by this run.
        tokens: their tokens.
        seconds: since this run began to trace.
    """

    stage: str
    done: int
    failed: int
    total: int
    now: int
    tokens: int
    seconds: float

    @property
    def traces_per_second(self) -> float:
        return self.now / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None before the first trace."""
        left = self.total - self.done - self.failed
        return left / self.traces_per_second if self.now else None


@dataclass(frozen=True)
class Choices:
    """The options of a run that decide a result, checked once before anything runs."""

    layers: LayerRule
    heads: str | Sequence[int] | HeadSelector
    edge_weight: str
    preset: str
    rules: EdgeRules
    question: str | Selector | None
    answer: str | Selector | None
    plain: bool
    system: str | None
    source: SourceRule
    absorption: Absorption | None
    damping: float
    max_edges: int | str
    backend: Backend
    max_new_tokens: int
    keep: float

    def check(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse, before anything runs, what would fail on every line."""
        check_options(self.backend, self.source, self.absorption, self.damping)
        edges_kept(self.max_edges, 2)
        AttentionRecorder(model, layers=self.layers, heads=self.heads, edge_weight=self.edge_weight)
        for pattern in (self.question, self.answer):
            if isinstance(pattern, str):
                Regex(pattern)
        check_max_new_tokens(self.max_new_tokens)
        if not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise InvalidInputError(f"keep: must lie in (0, 1], got {self.keep!r}; 0.9 keeps the routes of 90 %")
        if self.system and (self.plain or not getattr(tokenizer, "chat_template", None)):
            raise InvalidInputError(
                f"system: needs a chat template, got {self.system!r:.80} without; write it into the prompts"
            )

    def settings(self) -> dict[str, str]:
        """The options by name, in words."""
        return {name: str(value) for name, value in vars(self).items() if name != "rules"} | asdict(self.rules)


@dataclass(frozen=True)
class Prepared:
    """One line, ready for a forward pass."""

    line: Line
    encoded: EncodedText
    regions: Regions


class Run:
    """One run over the file: counts, and the work on one window of lines."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: CorpusFolder,
        choices: Choices,
        batch_tokens: int,
        html: bool,
        total: int,
        progress: Callable[[CorpusProgress], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.folder, self.choices = model, tokenizer, folder, choices
        self.inner, self.batch_tokens, self.html, self.total = base_model(model), batch_tokens, html, total
        self.done = self.now = self.tokens = 0
        self.failed: dict[int, str] = {}
        self.began = time.perf_counter()
        self._progress = progress

    def progress(self, stage: str) -> None:
        if self._progress is not None:
            seconds = time.perf_counter() - self.began
            failed = len(self.failed)
            self._progress(CorpusProgress(stage, self.done, failed, self.total, self.now, self.tokens, seconds))

    def trace_window(self, lines: list[Line], requests: Callable[[], Iterator[tuple[Line, Request]]]) -> None:
        """Trace what is left of some lines, batched by length."""
        left = {line.number for line in lines if self.folder.record(line) is None}
        for line in lines:
            if line.number not in left:
                self.done += 1
                if self.html and not self.folder.page_path(line).is_file():
                    load_trace(self.folder.trace_path(line)).to_html(
                        self.folder.page_path(line), keep=self.choices.keep
                    )
        if not left:
            return
        self.progress("reading the lines")
        # Finished lines too: they belong to the batches, and a batch in other company rounds differently.
        prepared = [item for line, request in requests() if (item := self._prepare(line, request)) is not None]
        for batch in batches(prepared, self.batch_tokens):
            if any(item.line.number in left for item in batch):
                self._trace_batch(batch, left)

    def _prepare(self, line: Line, request: Request) -> Prepared | None:
        """Encode a line and find its regions; a line that cannot be traced is noted."""
        choices = self.choices
        try:
            prompt = _as_chat(self.tokenizer, request.prompt, choices)
            response = request.response if request.response is not None else self._generated(line, prompt)
            encoded, regions = regions_of_text(
                self.model, self.tokenizer, prompt, response, request.question or choices.question,
                request.answer or choices.answer, None, choices.max_new_tokens, self.progress,
            )  # fmt: skip
            ids = encoded.input_ids[None]
            check_fits(self.inner, ids, torch.ones_like(ids))
            require_room(self.inner, ids.numel(), choices.layers, choices.max_edges)
        except _OF_ONE_LINE as error:
            self.give_up(line, error)
            return None
        return Prepared(line, encoded, regions)

    def _generated(self, line: Line, prompt: str | list[dict[str, Any]]) -> list[int] | None:
        """The response of a line that has none, generated once and kept."""
        if ends_with_response(prompt):
            return None
        ids = self.folder.response(line)
        if ids is None:
            report = partial(_on_line, self.progress, line)
            ids = generate_response(self.model, self.tokenizer, prompt, self.choices.max_new_tokens, report)
            self.folder.keep_response(line, ids)
        return ids

    def _trace_batch(self, batch: list[Prepared], left: set[int]) -> None:
        began = time.perf_counter()
        attention = self._capture(batch)
        tokens = sum(item.encoded.num_tokens for item in batch)
        per_token = (time.perf_counter() - began) / tokens
        for place, item in enumerate(batch):
            if item.line.number not in left:
                continue
            began = time.perf_counter()
            try:
                trace = self._assemble(attention, place, item)
                record = figures(trace, self.choices.keep)
            except _OF_ONE_LINE as error:
                self.give_up(item.line, error)
                continue
            self._write(trace, item.line)
            seconds = per_token * trace.num_tokens + time.perf_counter() - began
            self.folder.finish(item.line, {**record, "seconds": round(seconds, 6), "batch": len(batch)})
            self.done, self.now, self.tokens = self.done + 1, self.now + 1, self.tokens + trace.num_tokens
            self.progress("tracing")

    def _capture(self, batch: list[Prepared]) -> AttentionRows:
        """One forward pass of some lines, padded on the right, which every model takes."""
        longest = max(item.encoded.num_tokens for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # what padding holds is masked
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, : item.encoded.num_tokens] = item.encoded.input_ids
            mask[row, : item.encoded.num_tokens] = 1
        choices = self.choices
        try:
            edges = edges_kept(choices.max_edges, longest)
            require_room(self.inner, ids.numel(), choices.layers, max(edges, 1))
            return capture(
                self.model, ids, mask, layers=choices.layers, heads=choices.heads, edge_weight=choices.edge_weight
            )
        except (MemoryLimitError, torch.OutOfMemoryError) as error:
            raise MemoryLimitError(
                f"batch_tokens: a batch must fit the memory, got {ids.numel()} tokens that do not "
                f"({str(error).splitlines()[0]}); run again with a smaller batch_tokens, and it goes on from here"
            ) from error

    def _assemble(self, attention: AttentionRows, place: int, item: Prepared) -> FlowTrace:
        """The trace of one sequence of a batch."""
        choices = self.choices
        provenance = provenance_of(
            self.inner, self.tokenizer, item.regions, attention.layers, choices.heads, choices.edge_weight,
            choices.preset, choices.rules,
        )  # fmt: skip
        return assemble(
            attention.sequence(place), item.encoded, item.regions, rules=choices.rules, max_edges=choices.max_edges,
            backend=choices.backend, source=choices.source, absorption=choices.absorption, damping=choices.damping,
            provenance={**provenance, "line": item.line.number, "id": item.line.id},
        )  # fmt: skip

    def _write(self, trace: FlowTrace, line: Line) -> None:
        trace.save(self.folder.trace_path(line))
        if self.html:
            trace.to_html(self.folder.page_path(line), keep=self.choices.keep)

    def give_up(self, line: Line, error: Exception | str) -> None:
        """Note and report a line that cannot be traced."""
        self.failed[line.number] = " ".join(str(error).split())
        self.progress(f"line {line.number} skipped: {self.failed[line.number]}")


def batches(prepared: Sequence[Prepared], batch_tokens: int) -> Iterator[list[Prepared]]:
    """Lines of similar length together, as many as the budget holds with their padding; shortest first."""
    batch: list[Prepared] = []
    for item in sorted(prepared, key=lambda item: (item.encoded.num_tokens, item.line.number)):
        if batch and item.encoded.num_tokens * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _on_line(progress: Callable[[str], None], line: Line, stage: str) -> None:
    progress(f"line {line.number}: {stage}")


def _as_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]], choices: Choices
) -> str | list[dict[str, Any]]:
    """A text prompt as a user's message, where the tokenizer has a chat template and nobody said plain."""
    check_prompt(prompt)
    if not isinstance(prompt, str) or choices.plain or not getattr(tokenizer, "chat_template", None):
        return prompt
    before = [{"role": "system", "content": choices.system}] if choices.system else []
    return [*before, {"role": "user", "content": prompt}]
