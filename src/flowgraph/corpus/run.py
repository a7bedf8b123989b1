"""One run over the lines of a corpus: encode a window of lines, batch it by length, trace what is not yet traced."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.capture import check_fits
from flowgraph.attention.modules import base_model
from flowgraph.corpus.corpus_options import CorpusOptions
from flowgraph.corpus.requests import Line
from flowgraph.corpus.run_folder import CorpusFolder
from flowgraph.corpus.tables import figures, relevance_figures
from flowgraph.errors import (
    CaptureError,
    InfeasibleFlowError,
    InvalidInputError,
    MemoryLimitError,
    NumericalRangeError,
    first_line,
)
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.text.chat import check_prompt, ends_with_response
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regions, last_resort
from flowgraph.text.rendered_chat import recognise_rendered
from flowgraph.tracing.flow_trace import FlowTrace, load_trace
from flowgraph.tracing.generation import generate_response
from flowgraph.tracing.inputs import TextRequest, regions_of_text
from flowgraph.tracing.provenance import provenance_of, response_record
from flowgraph.tracing.relevance_trace import RelevanceTrace, load_relevance
from flowgraph.tracing.trace import assemble, assemble_relevance, require_trace_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
Requests = Callable[[], Iterator[tuple[Line, TextRequest]]]

_LINE_ERRORS = (InvalidInputError, InfeasibleFlowError, MemoryLimitError, NumericalRangeError)
"""Errors that concern one line: it is reported and skipped, and the run continues."""


@dataclass(frozen=True)
class CorpusProgress:
    """The state of a run.

    Attributes:
        stage: what is being done.
        done: lines traced, earlier runs included.
        failed: lines that could not be traced.
        total: all lines.
        now: lines traced by this run.
        tokens: tokens of this run's traces.
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
        """Traces of this run per second; 0 before any time has passed."""
        if self.seconds <= 0:
            return 0.0
        return self.now / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of this run's traces per second; 0 before any time has passed."""
        if self.seconds <= 0:
            return 0.0
        return self.tokens / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the remaining time; None before the first trace."""
        if not self.now:
            return None
        left = self.total - self.done - self.failed
        return left / self.traces_per_second


@dataclass(frozen=True)
class Prepared:
    """One line, ready for a forward pass.

    Attributes:
        line: the line.
        encoded: its prompt and response as tokens.
        regions: its question, reasoning and answer.
        was_generated: whether the run generated its response.
    """

    line: Line
    encoded: EncodedText
    regions: Regions
    was_generated: bool = False


@dataclass(frozen=True)
class FinishedLine:
    """What a run counts of a line that it has traced.

    Attributes:
        number: of the line.
        tokens: of its trace.
        is_truncated: whether its generated response was cut off.
        is_guessed: whether its answer was found by the last resort.
        is_disfavoured: whether its answer is not what the model prefers (relevance).
    """

    number: int
    tokens: int
    is_truncated: bool
    is_guessed: bool
    is_disfavoured: bool


class Run:
    """One run over the file: the counts, and the work on one window of lines at a time.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        folder: where results are written, and earlier ones found.
        options: the choices of the run.
        total: number of lines of the file.
        progress: called after every step.

    Attributes:
        done: lines traced, earlier runs included.
        now: lines traced by this run.
        tokens: tokens of this run's traces.
        truncated: lines of this run whose generated response was cut off.
        failed: message of every line that could not be traced, by its number.
        disfavoured: numbers of the lines of this run whose answer is not what the model prefers (relevance).
        guessed: numbers of the lines of this run whose answer was found by the last resort.
        began: clock reading at the start.
        checks_memory: whether a line must fit the memory of this process. The process that plans a run on a cluster
            traces nothing itself.
    """

    checks_memory = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: CorpusFolder,
        options: CorpusOptions,
        total: int,
        progress: Callable[[CorpusProgress], None] | None,
    ) -> None:
        self.model = model
        self.inner = base_model(model)
        self.tokenizer = tokenizer
        self.folder = folder
        self.options = options
        self.total = total
        # Counts, reported after every step.
        self.done = 0
        self.now = 0
        self.tokens = 0
        self.truncated = 0
        self.failed: dict[int, str] = {}
        self.guessed: list[int] = []
        self.disfavoured: list[int] = []
        self.began = time.perf_counter()
        self._progress = progress

    def progress(self, stage: str) -> None:
        """Report the state of the run."""
        if self._progress is None:
            return
        state = CorpusProgress(
            stage,
            done=self.done,
            failed=len(self.failed),
            total=self.total,
            now=self.now,
            tokens=self.tokens,
            seconds=time.perf_counter() - self.began,
        )
        self._progress(state)

    def skip(self, line: Line, error: Exception | str) -> None:
        """Record and report a line that cannot be traced."""
        # Messages may have several lines; tables and logs show one.
        message = " ".join(str(error).split())
        self.failed[line.number] = message
        self.progress(f"line {line.number} skipped: {message}")

    def trace_window(self, lines: list[Line], requests: Requests) -> None:
        """Trace the unfinished lines of a window, batched by length.

        Args:
            lines: the valid lines of the window, finished ones included.
            requests: reads their texts.

        Raises:
            MemoryLimitError: a batch does not fit.
            OutputError: a result cannot be written.
        """
        unfinished = self.count_finished(lines)
        if not unfinished:
            return
        for batch in self.plan_window(requests, unfinished):
            self.trace_batch(batch, unfinished)

    def count_finished(self, lines: list[Line]) -> set[int]:
        """Count the finished lines of a window, write the pages that they lack, and return the numbers of the others.

        Raises:
            OutputError: a page cannot be written.
        """
        unfinished = {line.number for line in lines if self.folder.record(line) is None}
        for line in lines:
            if line.number not in unfinished:
                self.done += 1
                self._write_missing_page(line)
        return unfinished

    def plan_window(self, requests: Requests, unfinished: set[int]) -> list[list[Prepared]]:
        """Encode the lines of a window and batch them by length; lines that cannot be traced are reported.

        Args:
            requests: reads the texts of the valid lines of the window, finished ones included.
            unfinished: numbers of the lines to trace.

        Returns:
            The batches with an unfinished line. They depend on the input alone.
        """
        # Finished lines are prepared too. They belong to the batches: with other sequences beside it, a line is
        # rounded differently, and a resumed run must give the same numbers as one that was never interrupted.
        self.progress("reading the lines")
        prepared = []
        for line, request in requests():
            item = self.prepare(line, request)
            if item is not None:
                prepared.append(item)
        # A backward pass holds the activations of its forward pass, so each line of a relevance runs alone.
        batch_tokens = 1 if self.options.trace.is_signed else self.options.batch_tokens
        planned = batches(prepared, batch_tokens)
        return [batch for batch in planned if any(item.line.number in unfinished for item in batch)]

    def trace_batch(self, batch: list[Prepared], unfinished: set[int]) -> None:
        """Trace and write the unfinished lines of a batch.

        Args:
            batch: all lines that share a forward pass, finished ones included.
            unfinished: numbers of the lines to trace.

        Raises:
            MemoryLimitError: the batch does not fit.
            OutputError: a result cannot be written.
        """
        if not self.options.trace.is_signed:
            self._trace_batch(batch, unfinished)
            return
        for item in batch:
            if item.line.number in unfinished:
                self._trace_relevance(item)

    def announce(self, work: str, lines: Sequence[Line]) -> None:
        """Name the next piece of work and its lines before it begins; a worker of a cluster overrides this."""

    def _write_missing_page(self, line: Line) -> None:
        """Write the page of a finished line where an earlier run wrote none."""
        page = self.folder.page_path(line)
        if self.options.html and not page.is_file():
            path = self.folder.trace_path(line)
            trace = load_relevance(path) if self.options.trace.is_signed else load_trace(path)
            self._write_page(trace, line)

    def lacks_response(self, line: Line, request: TextRequest) -> bool:
        """Return whether the response of a line has to be generated first; no for an invalid prompt."""
        if request.response is not None or self.folder.response(line) is not None:
            return False
        try:
            prompt = _as_chat(self.tokenizer, request.prompt, self.options)
        except InvalidInputError:
            return False
        return not ends_with_response(prompt)

    def generate(self, line: Line, request: TextRequest) -> None:
        """Generate the response of a line that states none, and keep it; a line where that fails is reported."""
        try:
            self._complete(line, request)
        except _LINE_ERRORS as error:
            self.skip(line, error)

    def _complete(self, line: Line, request: TextRequest) -> TextRequest:
        """Add to a request what the run decides: the prompt as the model reads it, the response, the regions."""
        options = self.options
        # The prompt as the model reads it, and the response, generated where the line has none.
        prompt = _as_chat(self.tokenizer, request.prompt, options)
        arguments = {**(options.chat_template_kwargs or {}), **(request.chat_template_kwargs or {})}
        if isinstance(prompt, str) and not request.chat_template_kwargs:
            # The run's arguments are for the lines that a template renders.
            arguments = {}
        response = request.response
        is_generated = False
        if response is None:
            response = self._generated(line, prompt, arguments)
            is_generated = response is not None
        # What a line states about itself comes before the options of the run.
        return TextRequest(
            prompt,
            response,
            question=request.question or options.question,
            answer=request.answer or options.answer,
            is_generated=is_generated,
            chat_template_kwargs=arguments,
        )

    def prepare(self, line: Line, request: TextRequest) -> Prepared | None:
        """Encode a line and find its regions; None for a line that cannot be traced, which is reported."""
        options = self.options
        try:
            complete = self._complete(line, request)
            max_new_tokens = options.trace.max_new_tokens
            encoded, regions = regions_of_text(self.inner, self.tokenizer, complete, max_new_tokens, self.progress)

            # A line that fits neither context nor memory must not end a batch of others.
            ids = encoded.input_ids[None]
            check_fits(self.inner, ids, torch.ones_like(ids))
            if self.checks_memory:
                require_trace_memory(self.inner, ids.numel(), options.trace.chosen_layers, options.trace.max_edges)
        except _LINE_ERRORS as error:
            self.skip(line, error)
            return None
        return Prepared(line, encoded, regions, complete.is_generated)

    def _generated(self, line: Line, prompt: Prompt, arguments: dict[str, Any]) -> list[int] | None:
        """Return the response of a line that states none, generated once and kept; None where the chat ends with it."""
        if ends_with_response(prompt):
            return None
        kept = self.folder.response(line)
        if kept is not None:
            return kept

        def report(stage: str) -> None:
            self.progress(f"line {line.number}: {stage}")

        self.announce("the generation of its response", [line])
        max_new_tokens = self.options.trace.max_new_tokens
        ids = generate_response(self.inner, self.tokenizer, prompt, max_new_tokens, report, arguments)
        self.folder.keep_response(line, ids)
        return ids

    def _trace_batch(self, batch: list[Prepared], unfinished: set[int]) -> None:
        """Read the attention of a batch in one pass, and trace and write its unfinished lines."""
        began = time.perf_counter()
        self.announce("the forward pass", [item.line for item in batch if item.line.number in unfinished])
        # The rows of the batch are recomputed from its queries and keys, sequence by sequence.
        attention = self._capture(batch)
        num_tokens = sum(item.encoded.num_tokens for item in batch)
        seconds_per_token = (time.perf_counter() - began) / num_tokens

        for place, item in enumerate(batch):
            if item.line.number not in unfinished:
                continue
            began = time.perf_counter()
            self.announce("its graph", [item.line])
            try:
                # An error in one line must not end the others of its batch.
                trace = self._assemble(attention, place, item)
                record = figures(trace, self.options.keep)
            except _LINE_ERRORS as error:
                self.skip(item.line, error)
                continue
            # A line's time is its own work and its share of the batch's pass.
            began -= seconds_per_token * trace.num_tokens
            self._finish(item, trace, record, began, len(batch))

    def _trace_relevance(self, item: Prepared) -> None:
        """Compute and write the relevance of one line."""
        began = time.perf_counter()
        self.announce("its relevance", [item.line])
        try:
            with warnings.catch_warnings():
                # One warning at the end of the run counts these lines.
                warnings.filterwarnings("ignore", "answer: should be what the model prefers", UserWarning)
                found = assemble_relevance(
                    self.model,
                    self.tokenizer,
                    item.encoded,
                    item.regions,
                    self.options.trace,
                    self._response_facts(item),
                )
            provenance = {**found.provenance, "line": item.line.number, "id": item.line.id}
            trace = replace(found, provenance=provenance)
            record = relevance_figures(trace)
        except (*_LINE_ERRORS, CaptureError) as error:
            self.skip(item.line, error)
            return
        except torch.OutOfMemoryError as error:
            self.skip(item.line, f"memory: must hold the passes of one line, got {first_line(error)}")
            return
        self._finish(item, trace, record, began, 1)

    def _finish(
        self,
        item: Prepared,
        trace: FlowTrace | RelevanceTrace,
        record: dict[str, Any],
        began: float,
        batch_size: int,
    ) -> None:
        """Write the trace of a line, and then its record, which marks the line as finished; count it."""
        trace.save(self.folder.trace_path(item.line))
        if self.options.html:
            self._write_page(trace, item.line)
        seconds = time.perf_counter() - began
        self.folder.finish(item.line, {**record, "seconds": round(seconds, 6), "batch": batch_size})
        self.count(finished_line(item, record))

    def count(self, finished: FinishedLine) -> None:
        """Count a line that this run has traced, and report it."""
        self.done += 1
        self.now += 1
        self.tokens += finished.tokens
        self.truncated += finished.is_truncated
        if finished.is_guessed:
            self.guessed.append(finished.number)
        if finished.is_disfavoured:
            self.disfavoured.append(finished.number)
        self.progress("tracing")

    def _capture(self, batch: list[Prepared]) -> AttentionRows:
        """Run one forward pass over some lines, padded on the right, which every model supports."""
        longest = max(item.encoded.num_tokens for item in batch)
        # The mask hides the padding, so any id may fill it.
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, item in enumerate(batch):
            ids[row, : item.encoded.num_tokens] = item.encoded.input_ids
            mask[row, : item.encoded.num_tokens] = 1
            answer[row, : item.encoded.num_tokens] = item.regions.answer

        options = self.options.trace
        try:
            # Queries and keys of the batch are held at once, but the edges of one sequence at a time.
            edges = edges_kept(options.max_edges, longest)
            require_trace_memory(self.inner, ids.numel(), options.chosen_layers, max(edges, 1))
            return options.capture(self.model, ids, mask, answer)
        except (MemoryLimitError, torch.OutOfMemoryError) as error:
            reason = first_line(error)
            raise MemoryLimitError(
                f"batch_tokens: a batch must fit the memory, got {ids.numel()} tokens that do not ({reason}); "
                "run again with a smaller batch_tokens, and it continues from here"
            ) from error

    def _assemble(self, attention: AttentionRows, place: int, item: Prepared) -> FlowTrace:
        """Trace one sequence of a batch."""
        options = self.options.trace
        response_facts = self._response_facts(item)
        provenance = provenance_of(
            self.inner, self.tokenizer, item.regions, attention.layers, options, response_facts, item.encoded
        )
        provenance["line"] = item.line.number
        provenance["id"] = item.line.id
        return assemble(attention.sequence(place), item.encoded, item.regions, options, provenance)

    def _response_facts(self, item: Prepared) -> dict[str, Any]:
        """Describe how the response of a line was made."""
        return response_record(
            self.inner,
            self.tokenizer,
            item.encoded.input_ids[item.encoded.prompt_length :],
            was_generated=item.was_generated,
            max_new_tokens=self.options.trace.max_new_tokens,
        )

    def _write_page(self, trace: FlowTrace | RelevanceTrace, line: Line) -> None:
        """Write the page of a trace."""
        page = self.folder.page_path(line)
        if isinstance(trace, RelevanceTrace):
            trace.to_html(page)
        else:
            trace.to_html(page, keep=self.options.keep)


def finished_line(item: Prepared, record: Mapping[str, Any]) -> FinishedLine:
    """Read what is counted of a line from its record."""
    row = record["trace"]
    demand = row.get("demand")
    # A log-probability is negative by itself.
    is_disfavoured = demand is not None and demand < 0 and row["target"] != "logprob"
    return FinishedLine(
        item.line.number,
        tokens=row["tokens"],
        is_truncated=bool(row["truncated"]),
        is_guessed=bool(last_resort(item.regions.answer_by, item.encoded)),
        is_disfavoured=is_disfavoured,
    )


def batches(prepared: Sequence[Prepared], batch_tokens: int) -> Iterator[list[Prepared]]:
    """Group lines of similar length, shortest first.

    Args:
        prepared: the lines of a window, in any order.
        batch_tokens: most tokens of a batch, padding included; a longer line makes a batch of its own.
    """
    by_length = sorted(prepared, key=lambda item: (item.encoded.num_tokens, item.line.number))
    batch: list[Prepared] = []
    for item in by_length:
        # The item is the longest so far, so every other line would be padded to its length.
        padded_tokens = item.encoded.num_tokens * (len(batch) + 1)
        if batch and padded_tokens > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _as_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, options: CorpusOptions) -> Prompt:
    """Make a text prompt into a user's message, where the tokenizer has a chat template and ``plain`` is not set.

    A prompt that the template has rendered before stays as it is.
    """
    check_prompt(prompt)
    if not isinstance(prompt, str) or options.plain or not getattr(tokenizer, "chat_template", None):
        return prompt
    if recognise_rendered(tokenizer, prompt) is not None:
        if options.system:
            raise InvalidInputError(
                f"system: must be None for a prompt that is rendered already, got {options.system!r:.80}; "
                "pass messages instead"
            )
        return prompt
    messages = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    messages.append({"role": "user", "content": prompt})
    return messages
