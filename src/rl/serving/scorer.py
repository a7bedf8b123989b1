"""Score the requests of a batch with one model; the weights of a request do not depend on the others.

Letters of the shapes: B sequences of a request, P prompt columns, R response columns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from flowgraph import FlowgraphError, HeadSelector, context_length, encode
from rl.config import CreditConfig
from rl.credit.ratings import Ratings, weigh_tokens
from rl.credit.registry import applied, find_rule
from rl.credit.weights import top_share
from rl.errors import ConfigError
from rl.integrations.engine_credit import (
    EngineSequence,
    ending_ids,
    known_ids,
    number_groups,
    pad_sequences,
    padding_id,
    prompt_of,
    rate_responses,
)
from rl.integrations.tensors import FindAnswer, read_responses, usable_rule
from rl.policy.loading import check_device, load_model
from rl.records import CharSpan, Credit, Responses, join_records
from rl.seeds import generator
from rl.serving.adapters import AdapterVersion, PolicyVersions
from rl.serving.limits import ServiceLimits
from rl.tasks.answers import find_answer
from rl.tasks.registry import make_task

_NAMED_SELECTORS = ("global", "local", "receiver")
"""Heads that are chosen for each sequence by what they attend to."""
_ROUNDING_STEPS = 8192
"""Scores that differ by less than this number of rounding steps may change places when they are computed again."""


@dataclass(frozen=True)
class ModelFacts:
    """What the service needs to know of the model to check requests.

    Attributes:
        name: name or folder.
        tokenizer: of the model.
        vocabulary_size: number of valid ids.
        context: most tokens of a sequence; None: no limit.
        dtype: of the weights, such as ``"float32"``.
    """

    name: str
    tokenizer: Any
    vocabulary_size: int
    context: int | None
    dtype: str


@dataclass(frozen=True)
class ScoringJob:
    """The sequences of one request, which a rule may compare with each other.

    Attributes:
        sequences: B sequences without padding.
        answers: for each the characters of the response that state its answer; None: search for it.
        credit: rule, shape and scope.
        temperature: of the rollout.
        seed: of rules that draw random numbers; the draws of a request depend on nothing else.
        adapter: version of the policy; None: the model without an adapter.
    """

    sequences: tuple[EngineSequence, ...]
    answers: tuple[CharSpan | None, ...]
    credit: CreditConfig
    temperature: float
    seed: int
    adapter: AdapterVersion | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in self.sequences]

    @property
    def pass_key(self) -> str:
        """Text that is equal for jobs that can share a forward pass."""
        version = "" if self.adapter is None else self.adapter.digest
        return json.dumps([version, self.temperature, asdict(self.credit)], sort_keys=True, default=str)


@dataclass(frozen=True)
class SequenceCredit:
    """The credit of one response.

    Attributes:
        weights: one for each response token.
        found: how its answer was found: ``"given"``, ``"stated"`` or ``"none"``.
        answer: characters of the response that state it; None without an answer.
        unanchored: whether all weights are 1 because of ``CreditConfig.fallback``; None where the rule has no tie.
    """

    weights: list[float]
    found: str
    answer: CharSpan | None
    unanchored: bool | None


@dataclass(frozen=True)
class ScoringOutcome:
    """The credit of a job, or the error that its client gets.

    Attributes:
        sequences: credit of each sequence; empty with an error.
        error: class of the error; "" without one.
        message: of the error.
        alone: sequences that were scored again by themselves.
    """

    sequences: tuple[SequenceCredit, ...] = ()
    error: str = ""
    message: str = ""
    alone: int = 0

    @classmethod
    def of_error(cls, error: Exception) -> ScoringOutcome:
        """Keep the class and the message of an error, which may have to leave the process."""
        return cls(error=type(error).__name__, message=str(error))


class Scorer:
    """Compute credit with one model in this process; calls from several threads follow each other.

    Weights of a request are equal in every batch, to a few 1e-6 of a weight in float32: padding and the size of a
    batch change scores by rounding. A selection (the top share, a fallback) whose border lies within that rounding is
    computed again without a batch, and so is every rule that selects heads.

    Args:
        model: name or folder, or a shipped model.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: as torch names it; None: the CPU.
        limits: ``max_batch_tokens`` and ``kept_adapters``.
        task: name of a task, or a task, whose ``find_answer`` finds the answers; None: stated answers
            (:func:`rl.tasks.answers.find_answer`).

    Raises:
        ConfigError: an unknown dtype or device.
        PolicyError: the model cannot be loaded.
        TaskError: an unknown task.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        limits: ServiceLimits,
        task: Any = None,
    ) -> None:
        self._find_answer = find_answer if task is None else make_task(task).find_answer
        # The device is that of this process; a service may be described in another one.
        check_device(device)
        network, self._tokenizer = load_model(model, dtype)
        if device is not None:
            # The stubs of transformers describe another signature.
            moved: Any = network
            moved.to(device)
        self._limits = limits
        self._policies = PolicyVersions(network.eval().requires_grad_(False), limits.kept_adapters)
        self._end_ids = ending_ids(network, self._tokenizer)
        self._dtype = network.dtype
        self.facts = ModelFacts(
            name=model,
            tokenizer=self._tokenizer,
            vocabulary_size=known_ids(network, self._tokenizer),
            context=context_length(network),
            dtype=str(network.dtype).removeprefix("torch."),
        )
        self._lock = threading.Lock()

    def check_rules(self, rules: Sequence[CreditConfig]) -> None:
        """Score one short sequence with every rule, so that a model that a rule cannot read is refused at the start.

        Raises:
            CaptureError: the architecture cannot be captured.
            ConfigError, CreditError: as :func:`rl.integrations.tensors.usable_rule`.
        """
        word, index = self._visible_token()
        encoded = encode(self._tokenizer, word, [index], warn=False)
        prompt_ids = encoded.input_ids[: encoded.prompt_length].tolist()
        sequence = EngineSequence(prompt_ids, [index, index, self._end_ids[0]], prompt=word)
        for credit in rules:
            usable_rule(credit)
            responses = read_responses(
                pad_sequences([sequence], padding_id(self._tokenizer)),
                [prompt_of(sequence, self._tokenizer)],
                self._tokenizer,
                find_answer=self._find_answer,
                groups=number_groups([sequence]),
                end_ids=self._end_ids,
            )
            rate_responses(responses, self._policies.base, credit, [generator(0, "check")], temperature=1.0)

    def _visible_token(self) -> tuple[str, int]:
        """Return the text and the id of the first token that is text."""
        special = self._tokenizer.all_special_ids
        for index in range(self.facts.vocabulary_size):
            word = str(self._tokenizer.decode([index]))
            if index not in special and word.strip().isalnum():
                return word, index
        raise ConfigError(f"model: must have a tokenizer with letters, got none in {self.facts.name!r}; use its own")

    def load(self, adapter: AdapterVersion) -> None:
        """Load an adapter before requests name it.

        Raises:
            CheckpointError: it cannot be loaded, or does not fit the model.
        """
        with self._lock, self._policies.active(adapter):
            pass

    def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        """Compute the credit of some requests; an error concerns its own request alone.

        Cost: one forward pass for each micro-batch of ``max_batch_tokens`` tokens.
        """
        outcomes: dict[int, ScoringOutcome] = {}
        with self._lock:
            for numbers in _grouped(jobs):
                of_group = [jobs[number] for number in numbers]
                try:
                    with self._policies.active(of_group[0].adapter) as model:
                        found = self._score_group(of_group, model)
                except FlowgraphError as error:
                    # The adapter cannot be loaded, so none of these requests can be served.
                    found = [ScoringOutcome.of_error(error)] * len(numbers)
                outcomes.update(zip(numbers, found, strict=True))
        return [outcomes[number] for number in range(len(jobs))]

    def _score_group(self, jobs: Sequence[ScoringJob], model: Any) -> list[ScoringOutcome]:
        """Score jobs that share adapter, settings and temperature."""
        outcomes: dict[int, ScoringOutcome] = {}
        read: dict[int, _ReadJob] = {}
        for number, job in enumerate(jobs):
            try:
                read[number] = self._read(job)
            except FlowgraphError as error:
                outcomes[number] = ScoringOutcome.of_error(error)

        try:
            ratings = self._rate_together(list(read.values()), model)
        except FlowgraphError:
            # One of the requests is at fault; each is rated by itself, so that the error reaches that one alone.
            ratings = [None] * len(read)
        for (number, item), rated in zip(read.items(), ratings, strict=True):
            try:
                outcomes[number] = self._weigh(item, rated, model)
            except FlowgraphError as error:
                outcomes[number] = ScoringOutcome.of_error(error)
        return [outcomes[number] for number in range(len(jobs))]

    def _read(self, job: ScoringJob) -> _ReadJob:
        """Find question and answer among the tokens of a request."""
        # Every response is read once, in order, so that answers belong to their places.
        answers = _AnswersInOrder(job.answers, self._find_answer)
        responses = read_responses(
            pad_sequences(job.sequences, padding_id(self._tokenizer)),
            [prompt_of(sequence, self._tokenizer) for sequence in job.sequences],
            self._tokenizer,
            find_answer=answers,
            groups=number_groups(job.sequences),
            rewards=torch.tensor([float(sequence.reward) for sequence in job.sequences], dtype=torch.float32),
            end_ids=self._end_ids,
        )
        # An answer that was given and cannot be used is an error, not a response without an answer.
        has_answer = responses.answer.any(1).tolist()
        for row, span in enumerate(job.answers):
            size = len(responses.completions[row])
            if span is not None and span[1] > size:
                raise ConfigError(
                    f"sequences[{row}].answer: must lie within the response of {size} characters, got {list(span)}; "
                    "count characters of the response without its end token"
                )
            if span is not None and not has_answer[row]:
                raise ConfigError(
                    f"sequences[{row}].answer: must hold a visible character of the final part of the response, after "
                    f"any thinking, got {list(span)}; leave it out where the response states no answer"
                )
        spans = [span if has else None for span, has in zip(answers.found, has_answer, strict=True)]
        return _ReadJob(job=job, responses=responses, spans=spans)

    def _rate_together(self, items: Sequence[_ReadJob], model: Any) -> list[Ratings | None]:
        """Rate the sequences of several requests in micro-batches of similar length; None: rate the request alone."""
        if not items or (len(items) == 1 and items[0].responses.num_sequences == 1):
            return [None] * len(items)
        # These rules read one request as a whole, or one sequence as it is.
        credit = items[0].job.credit
        if find_rule(applied(credit).rule).whole_batch or selects_heads(credit):
            return [None] * len(items)

        # Every sequence as (request, row, tokens), the shortest first.
        rows: list[tuple[int, int, int]] = []
        for number, item in enumerate(items):
            rows += [(number, row, length) for row, length in enumerate(item.job.lengths)]
        rows.sort(key=lambda entry: entry[2])

        # Rows of all requests share the passes, and return to their own requests.
        found: dict[tuple[int, int], Ratings] = {}
        for part in _micro_batches(rows, items, self._limits.max_batch_tokens):
            ratings = self._rate(part, items, model)
            for place, (number, row) in enumerate(part):
                found[number, row] = _row_of(ratings, place)
        return [
            _joined([found[number, row] for row in range(item.responses.num_sequences)], item.responses.response_length)
            for number, item in enumerate(items)
        ]

    def _rate_alone(self, item: _ReadJob, model: Any) -> Ratings:
        """Rate the sequences of a request without a batch; a rule that reads all of them gets them together."""
        num_rows = item.responses.num_sequences
        if find_rule(applied(item.job.credit).rule).whole_batch:
            return self._rate([(0, row) for row in range(num_rows)], [item], model)
        parts = [self._rate([(0, row)], [item], model) for row in range(num_rows)]
        return _joined(parts, item.responses.response_length)

    def _rate(self, part: Sequence[tuple[int, int]], items: Sequence[_ReadJob], model: Any) -> Ratings:
        """Rate some sequences, given by request and row, in one forward pass."""
        batch = []
        random = []
        for number, row in part:
            item = items[number]
            batch.append(_without_padding(item.responses.select([row])))
            # A fresh generator for each pass: a sequence that is rated twice draws the same numbers.
            random.append(generator(item.job.seed, "credit", row))
        job = items[part[0][0]].job
        responses = _padded_together(batch, padding_id(self._tokenizer))
        return rate_responses(responses, model, job.credit, random, temperature=job.temperature)

    def _weigh(self, item: _ReadJob, rated: Ratings | None, model: Any) -> ScoringOutcome:
        """Turn the ratings of a request into weights; selections at their border are made without a batch."""
        credit = item.job.credit
        # In 16 bits almost every selection is at its border, and is made without a batch.
        tolerance = _ROUNDING_STEPS * torch.finfo(self._dtype).eps
        is_alone = rated is None or at_border(rated, credit, tolerance)
        ratings = self._rate_alone(item, model) if is_alone or rated is None else rated
        weighed = weigh_tokens(ratings, credit, random=generator(item.job.seed, "credit positions"))
        return ScoringOutcome(
            sequences=tuple(_credit_of(item, weighed, row) for row in range(item.responses.num_sequences)),
            alone=item.responses.num_sequences if is_alone else 0,
        )


@dataclass(frozen=True, eq=False)
class _ReadJob:
    """A request whose regions are known.

    Attributes:
        job: as it was submitted.
        responses: ``[B, P + R]``, its sequences.
        spans: characters of each answer, in the response; None without one.
    """

    job: ScoringJob
    responses: Responses
    spans: list[CharSpan | None]


class _AnswersInOrder:
    """Find the answers of the responses of a request, which are read in order: those given, and the stated ones.

    Args:
        given: for each response the characters of its answer, or None.
        finder: finds the answer of a response.

    Attributes:
        found: the answers so far.
    """

    def __init__(self, given: Sequence[CharSpan | None], finder: FindAnswer) -> None:
        self._given = given
        self._finder = finder
        self.found: list[CharSpan | None] = []

    def __call__(self, completion: str) -> CharSpan | None:
        span = self._given[len(self.found)]
        if span is None:
            span = self._finder(completion)
        elif span[1] > len(completion):
            # The caller refuses it with the number of the sequence.
            span = None
        self.found.append(span)
        return span


def selects_heads(credit: CreditConfig) -> bool:
    """Tell whether a rule chooses heads for each sequence: rounding may choose another head."""
    inner = applied(credit)
    for need in find_rule(inner.rule).needs_for(inner.options).values():
        heads = credit.heads if need.heads is None else need.heads
        if isinstance(heads, HeadSelector) or heads in _NAMED_SELECTORS:
            return True
    return False


def at_border(ratings: Ratings, credit: CreditConfig, tolerance: float) -> bool:
    """Tell whether a selection depends on a difference that rounding can make.

    Args:
        ratings: of the sequences of one request.
        credit: the shape selects a share of the tokens, the fallback selects responses.
        tolerance: relative difference of two scores that counts as rounding.
    """
    # The fallback compares each tie with a share of their mean.
    if ratings.tie is not None and credit.fallback > 0:
        ties = ratings.tie[ratings.has_tie].double()
        if ties.numel() > 0:
            bound = credit.fallback * ties.mean()
            if bool(((ties - bound).abs() <= tolerance * bound).any()):
                return True
    if find_rule(applied(credit).rule).weighs or credit.shape not in ("top_q", "bottom_q", "only_top"):
        return False

    # The gap between the last selected and the first rejected score, relative to the highest of the response.
    largest = credit.shape != "bottom_q"
    chosen = top_share(ratings.scores, ratings.scored, credit.share, largest=largest)
    rejected = ratings.scored & ~chosen
    sign = 1.0 if largest else -1.0
    scores = sign * ratings.scores.double()
    last_chosen = scores.masked_fill(~chosen, torch.inf).amin(1)
    first_rejected = scores.masked_fill(~rejected, -torch.inf).amax(1)
    highest = ratings.scores.double().amax(1)
    # A response without a positive score keeps weights of 1, whatever is selected.
    is_close = last_chosen - first_rejected <= tolerance * highest
    return bool((is_close & (highest > 0)).any())


def _grouped(jobs: Sequence[ScoringJob]) -> list[list[int]]:
    """List the numbers of the jobs that can share a forward pass."""
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.pass_key, []).append(number)
    return list(groups.values())


def _micro_batches(
    rows: Sequence[tuple[int, int, int]], items: Sequence[_ReadJob], max_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Split sequences, the shortest first, so that a part has at most ``max_tokens`` tokens with its padding."""
    part: list[tuple[int, int]] = []
    longest_prompt = 0
    longest_response = 0
    for number, row, _ in rows:
        sequence = items[number].job.sequences[row]
        # Prompts and responses are padded separately, so that both longest ones count.
        prompt = max(longest_prompt, len(sequence.prompt_ids))
        response = max(longest_response, len(sequence.response_ids))
        if part and (prompt + response) * (len(part) + 1) > max_tokens:
            yield part
            part = []
            prompt = len(sequence.prompt_ids)
            response = len(sequence.response_ids)
        part.append((number, row))
        longest_prompt = prompt
        longest_response = response
    if part:
        yield part


def _without_padding(responses: Responses) -> Responses:
    """Remove the padding of a single sequence."""
    first = int(responses.attention_mask[0].long().argmax())
    size = int(responses.response_mask[0].sum())
    columns = slice(first, responses.prompt_length + size)
    return replace(
        responses,
        input_ids=responses.input_ids[:, columns],
        attention_mask=responses.attention_mask[:, columns],
        question=responses.question[:, columns],
        answer=responses.answer[:, columns],
        response_mask=responses.response_mask[:, :size],
        prompt_length=responses.prompt_length - first,
    )


def _padded_together(parts: Sequence[Responses], pad_id: int) -> Responses:
    """Join single sequences of different lengths: prompts are padded on the left, responses on the right."""
    prompt_length = max(part.prompt_length for part in parts)
    response_length = max(part.response_length for part in parts)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "attention_mask", "question", "answer")}
    response_masks: list[Tensor] = []
    for part in parts:
        # Every prompt ends in the same column.
        left = prompt_length - part.prompt_length
        right = response_length - part.response_length
        for name, tensors in columns.items():
            value = pad_id if name == "input_ids" else False
            tensors.append(pad(getattr(part, name), (left, right), value=value))
        response_masks.append(pad(part.response_mask, (0, right), value=False))
    return Responses(
        samples=tuple(part.samples[0] for part in parts),
        completions=tuple(part.completions[0] for part in parts),
        input_ids=torch.cat(columns["input_ids"]),
        attention_mask=torch.cat(columns["attention_mask"]),
        prompt_length=prompt_length,
        response_mask=torch.cat(response_masks),
        truncated=torch.cat([part.truncated for part in parts]),
        groups=torch.cat([part.groups for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        question=torch.cat(columns["question"]),
        answer=torch.cat(columns["answer"]),
    )


def _row_of(ratings: Ratings, row: int) -> Ratings:
    """Return the ratings of one sequence of a batch."""
    values: dict[str, Any] = {}
    for item in fields(ratings):
        value = getattr(ratings, item.name)
        values[item.name] = None if value is None else value[row : row + 1]
    return Ratings(**values)


def _joined(parts: Sequence[Ratings], width: int) -> Ratings:
    """Join the ratings of the sequences of a request, in ``width`` columns."""
    fitted = []
    for part in parts:
        scores = _fitted(part.scores, width)
        scored = _fitted(part.scored, width)
        fitted.append(replace(part, scores=scores, scored=scored))
    return join_records(fitted)


def _fitted(values: Tensor, width: int) -> Tensor:
    """Cut or pad columns on the right; what is cut is padding."""
    values = values[:, :width]
    return pad(values, (0, width - values.shape[1]), value=0)


def _credit_of(item: _ReadJob, credit: Credit, row: int) -> SequenceCredit:
    """Return the weights of one response, and how its answer was found."""
    size = len(item.job.sequences[row].response_ids)
    weights: Float[Tensor, " response"] = credit.weights[row, :size]
    span = item.spans[row]
    found = "none"
    if span is not None:
        found = "stated" if item.job.answers[row] is None else "given"
    return SequenceCredit(
        weights=weights.tolist(),
        found=found,
        answer=span,
        unanchored=None if credit.unanchored is None else bool(credit.unanchored[row]),
    )
