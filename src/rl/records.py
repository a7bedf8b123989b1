"""Frozen records, one for each stage of a rollout.

Letters of the shapes: B sequences of a batch, P prompt columns, R response columns.

Prompts are padded on the left and responses on the right, so column P holds the first response token of every
sequence. A tensor ``[B, R]`` describes the token *at* each response column; the logits of that token are those of the
column before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Messages = list[dict[str, str]]
"""Chat messages, each with ``role`` and ``content``."""

CharSpan = tuple[int, int]
"""First character of a span, and the one after its last."""


@dataclass(frozen=True)
class Sample:
    """One problem of a task.

    Attributes:
        index: number of the problem; the same task, split and number give the same problem.
        prompt: plain text, or chat messages for the model's template.
        answer: the reference answer, as text.
        metadata: JSON values that the task's reward and oracle need.
        opening: what the rendered prompt wrote of the response, such as ``"<think>"``; "" where that opens no thinking.
            It is known, and set, when a response is judged.
    """

    index: int
    prompt: str | Messages
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    opening: str = ""


@dataclass(frozen=True, eq=False)
class Responses:
    """A batch of prompts with the policy's responses, their regions and rewards.

    Attributes:
        samples: the B problems; the G responses to one prompt repeat it.
        completions: the B response texts, without the end token; other special tokens are part of the text.
        input_ids: ``[B, P + R]`` int64, token ids of prompt and response.
        attention_mask: ``[B, P + R]`` bool, False on the padding of both sides.
        prompt_length: P, padding included, in tokens.
        response_mask: ``[B, R]`` bool, the tokens that the policy chose, an end token included.
        truncated: ``[B]`` bool, the response reached the token limit before an end token.
        groups: ``[B]`` int64, responses to one prompt share a number.
        rewards: ``[B]`` float32, reward of each response.
        question: ``[B, P + R]`` bool, prompt tokens where flow enters.
        answer: ``[B, P + R]`` bool, response tokens that state the answer; all False where no answer was found.
        oracle: ``[B, R]`` bool, tokens known to be decisive; None for tasks without this knowledge.
        detours: ``[B, R]`` bool, tokens of the same kind of work as the decisive ones on which the answer does not
            depend; None for tasks without this knowledge.
        sampled_logprobs: ``[B, R]`` float32, log-probability in nats with which generation drew each token, 0 on
            padding; None where it is not known.
        reward_parts: ``[B, K]`` float32, rewards of each of several reward functions before its weight, NaN where it
            does not apply; None for a single reward.
        reward_names: of these K functions.
    """

    samples: tuple[Sample, ...]
    completions: tuple[str, ...]
    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    prompt_length: int
    response_mask: Bool[Tensor, "batch response"]
    truncated: Bool[Tensor, " batch"]
    groups: Int64[Tensor, " batch"]
    rewards: Float[Tensor, " batch"]
    question: Bool[Tensor, "batch tokens"]
    answer: Bool[Tensor, "batch tokens"]
    oracle: Bool[Tensor, "batch response"] | None = None
    detours: Bool[Tensor, "batch response"] | None = None
    sampled_logprobs: Float[Tensor, "batch response"] | None = None
    reward_parts: Float[Tensor, "batch functions"] | None = None
    reward_names: list[str] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """Return B."""
        return self.input_ids.shape[0]

    @property
    def response_length(self) -> int:
        """Return R, padding included."""
        return self.response_mask.shape[1]

    @property
    def generated(self) -> Bool[Tensor, "batch tokens"]:
        """Return the response mask over all columns, ``[B, P + R]``."""
        prompt = self.response_mask.new_zeros(self.num_sequences, self.prompt_length)
        return torch.cat([prompt, self.response_mask], 1)

    @property
    def answer_in_response(self) -> Bool[Tensor, "batch response"]:
        """Return the answer mask over the response columns, ``[B, R]``."""
        return self.answer[:, self.prompt_length :]

    def select(self, rows: Sequence[int]) -> Self:
        """Return some of the sequences, with all columns."""
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the models compute for the response tokens of the policy that wrote them; 0 on padding.

    Attributes:
        logprobs: ``[B, R]`` float32, log-probability of each token in nats, at the rollout's temperature.
        entropy: ``[B, R]`` float32, entropy in nats of the distribution that the token was drawn from.
        ref_logprobs: ``[B, R]`` float32, the same log-probability under the reference; None without a KL penalty.
        values: ``[B, R]`` float32, the critic's value before the token, in units of reward; None without a critic.
        final_values: ``[B]`` float32, the critic's value after the last column, in units of reward; truncated
            responses are bootstrapped from it.
    """

    logprobs: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"] | None = None
    values: Float[Tensor, "batch response"] | None = None
    final_values: Float[Tensor, " batch"] | None = None

    def select(self, rows: Sequence[int]) -> Self:
        """Return some of the sequences, with all columns."""
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class Credit:
    """The credit that a rule assigns to every response token.

    Attributes:
        scores: ``[B, R]`` float32, scores in the unit of the rule; 0 on tokens without a score.
        scored: ``[B, R]`` bool, tokens that compete (the scope; by default the reasoning tokens).
        weights: ``[B, R]`` float32, the scores in the chosen shape, dimensionless; 1 outside ``scored``.
        tie: ``[B]`` float32, how strongly the answer is tied to the tokens before it: the mean over these tokens of the
            unnormalised reach h, at least 0; 0 without an answer, None where the rule measures none.
        unanchored: ``[B]`` bool, responses whose weights are 1 because their tie is too weak, or because they have no
            answer (``CreditConfig.fallback``); None where the rule measures no tie.
    """

    scores: Float[Tensor, "batch response"]
    scored: Bool[Tensor, "batch response"]
    weights: Float[Tensor, "batch response"]
    tie: Float[Tensor, " batch"] | None = None
    unanchored: Bool[Tensor, " batch"] | None = None

    def select(self, rows: Sequence[int]) -> Self:
        """Return some of the sequences, with all columns."""
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class Experience:
    """All that an update learns from, detached and on the CPU; an interrupted update continues from it.

    Attributes:
        responses: the rollout.
        scores: log-probabilities, entropies and values of its tokens.
        credit: credit of its tokens.
        advantages: ``[B, R]`` float32, whitened where configured, *before* the credit weights.
        returns: ``[B, R]`` float32, targets of the critic, in units of reward; None without a critic.
        loss_mask: ``[B, R]`` bool, tokens that enter the losses; truncated responses may be excluded.
        policy_weights: ``[B, R]`` float32, factor of each token's policy loss.
    """

    responses: Responses
    scores: TokenScores
    credit: Credit
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"] | None
    loss_mask: Bool[Tensor, "batch response"]
    policy_weights: Float[Tensor, "batch response"]

    def select(self, rows: Sequence[int]) -> Self:
        """Return some of the sequences, with all columns."""
        return select(self, rows)


Record = TypeVar("Record")


def select(record: Record, rows: Sequence[int]) -> Record:
    """Return some sequences of a record.

    Tensors and tuples are indexed by their first dimension; records inside the record are selected likewise; other
    fields stay as they are.

    Args:
        record: one of the records of this module.
        rows: numbers of the sequences, in the order of the result.

    Raises:
        IndexError: a number that is not in the batch.
    """
    index = torch.as_tensor(list(rows), dtype=torch.int64)
    selected: dict[str, Any] = {}
    for item in fields(record):  # type: ignore[arg-type]
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            selected[item.name] = value[index.to(value.device)]
        elif isinstance(value, tuple):
            selected[item.name] = tuple(value[row] for row in index.tolist())
        elif hasattr(value, "select"):
            selected[item.name] = value.select(rows)
    return replace(record, **selected)  # type: ignore[type-var]


def to_device(record: Record, device: torch.device) -> Record:
    """Return a record whose tensors are on another device."""
    moved = {}
    for item in fields(record):  # type: ignore[arg-type]
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device)
    return replace(record, **moved)  # type: ignore[type-var]


def join_records(parts: list[Record]) -> Record:
    """Concatenate records of the same columns, in order; a field that is None stays None."""
    joined = {}
    for item in fields(parts[0]):  # type: ignore[arg-type]
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = None if values[0] is None else torch.cat(values)
    return type(parts[0])(**joined)
