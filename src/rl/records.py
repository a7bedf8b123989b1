"""One frozen record for each stage of a rollout. B sequences of a batch, P prompt columns, R response columns.

Prompts are padded on the left and responses on the right, so column P is the first response token of every
sequence, and a tensor ``[B, R]`` says something about the token *at* that response column (its log-probability is
read from the logits one column earlier).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Messages = list[dict[str, str]]
CharSpan = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One problem of a task.

    Attributes:
        index: its number in the task's stream; the same task, split and number give the same problem.
        prompt: plain text, or chat messages for the model's template.
        answer: the reference answer, as text.
        metadata: whatever the task's reward and oracle need; must be JSON.
    """

    index: int
    prompt: str | Messages
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Responses:
    """What the policy wrote to a batch of prompts, and what the task says of it.

    Attributes:
        samples: the B problems; the G responses of one prompt repeat it.
        completions: the B response texts without special tokens.
        input_ids: ``[B, P + R]`` int64.
        attention_mask: ``[B, P + R]`` bool, False on padding on both sides.
        prompt_length: P, padding included.
        response_mask: ``[B, R]`` bool, the tokens that the policy chose, an end token included.
        truncated: ``[B]`` bool, the response ran out of tokens before it ended.
        groups: ``[B]`` int64, responses of one prompt share a number.
        rewards: ``[B]`` float32, the task's verdict.
        question: ``[B, P + R]`` bool, prompt tokens where flow enters.
        answer: ``[B, P + R]`` bool, response tokens that state the answer; none where none was found.
        oracle: ``[B, R]`` bool, tokens known to be decisive, of tasks that know; else None.
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

    @property
    def num_sequences(self) -> int:
        return self.input_ids.shape[0]

    @property
    def response_length(self) -> int:
        """R, padding included."""
        return self.response_mask.shape[1]

    @property
    def generated(self) -> Bool[Tensor, "batch tokens"]:
        """``[B, P + R]``, the response mask over all columns."""
        prompt = self.response_mask.new_zeros(self.num_sequences, self.prompt_length)
        return torch.cat([prompt, self.response_mask], 1)

    @property
    def answer_in_response(self) -> Bool[Tensor, "batch response"]:
        return self.answer[:, self.prompt_length :]

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the sequences, all columns kept."""
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the models say about the response tokens, under the policy that wrote them; 0 on padding.

    Attributes:
        logprobs: ``[B, R]`` float32, log-probability of each token at the rollout's temperature.
        entropy: ``[B, R]`` float32, entropy in nats of the distribution that the token was drawn from.
        ref_logprobs: ``[B, R]`` float32, the same token under the reference; None where no KL is asked for.
        values: ``[B, R]`` float32, the critic's value before the token is chosen; None without a critic.
        final_values: ``[B]`` float32, its value after the last column, for responses that were cut off there.
    """

    logprobs: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"] | None = None
    values: Float[Tensor, "batch response"] | None = None
    final_values: Float[Tensor, " batch"] | None = None

    def select(self, rows: Sequence[int]) -> Self:
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class Credit:
    """The verdict of a credit rule on every response token.

    Attributes:
        scores: ``[B, R]`` float32, the rule's own numbers, 0 where it says nothing.
        scored: ``[B, R]`` bool, the tokens that competed (the scope: by default reasoning tokens).
        weights: ``[B, R]`` float32, the scores in the chosen shape; 1 outside ``scored``.
    """

    scores: Float[Tensor, "batch response"]
    scored: Bool[Tensor, "batch response"]
    weights: Float[Tensor, "batch response"]

    def select(self, rows: Sequence[int]) -> Self:
        return select(self, rows)


@dataclass(frozen=True, eq=False)
class Experience:
    """What an update learns from; detached, on the CPU, complete: with it a killed update can go on.

    Attributes:
        responses, scores, credit: the stages before.
        advantages: ``[B, R]`` float32, whitened where asked for, *before* the credit weights.
        returns: ``[B, R]`` float32, targets of the critic; None without one.
        loss_mask: ``[B, R]`` bool, tokens that enter the losses (responses cut off may be left out).
        policy_weights: ``[B, R]`` float32, what each token's policy loss is multiplied with.
    """

    responses: Responses
    scores: TokenScores
    credit: Credit
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"] | None
    loss_mask: Bool[Tensor, "batch response"]
    policy_weights: Float[Tensor, "batch response"]

    def select(self, rows: Sequence[int]) -> Self:
        return select(self, rows)


def select(record: Any, rows: Sequence[int]) -> Any:
    """The given sequences of a record: tensors and tuples by their first dimension, records within it likewise."""
    index = torch.as_tensor(list(rows), dtype=torch.int64)
    chosen: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            chosen[item.name] = value[index.to(value.device)]
        elif isinstance(value, tuple):
            chosen[item.name] = tuple(value[row] for row in index.tolist())
        elif hasattr(value, "select"):
            chosen[item.name] = value.select(rows)
    return replace(record, **chosen)


Record = TypeVar("Record")


def to_device(record: Record, device: torch.device) -> Record:
    """A record with its tensors on another device."""
    moved = {
        item.name: value.to(device)
        for item in fields(record)  # type: ignore[arg-type]
        if isinstance(value := getattr(record, item.name), Tensor)
    }
    return replace(record, **moved)  # type: ignore[type-var]


def join_records(parts: list[Record]) -> Record:
    """Records of the same columns as one, sequences in order; a field that is None stays None."""
    joined = {}
    for item in fields(parts[0]):  # type: ignore[arg-type]
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = None if values[0] is None else torch.cat(values)
    return type(parts[0])(**joined)
