"""Records: sequences are chosen alike in every field, and the regions over all columns agree with those of a part."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import Tensor

from rl import Credit, Experience, Responses, Sample, TokenScores

B, P, R = 4, 3, 5


def responses(*, oracle: bool = True) -> Responses:
    """Four responses of lengths 5, 2, 1 and 0 to two problems; every number says where it stands."""
    lengths = torch.tensor([5, 2, 1, 0])
    mask = torch.arange(R) < lengths[:, None]
    samples = [Sample(index, f"prompt {index}", "a") for index in (7, 7, 9, 9)]
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    answer = torch.zeros(B, P + R, dtype=torch.bool)
    answer[0, P + 3], answer[1, P + 1] = True, True
    return Responses(
        samples=tuple(samples), completions=("0", "1", "2", "3"),
        input_ids=torch.arange(B * (P + R)).view(B, P + R), attention_mask=torch.cat([prompt, mask], 1),
        prompt_length=P, response_mask=mask, truncated=lengths == 5, groups=torch.tensor([7, 7, 9, 9]),
        rewards=torch.tensor([0.0, 1.0, 2.0, 3.0]), question=torch.cat([prompt, torch.zeros_like(mask)], 1),
        answer=answer, oracle=mask.clone() if oracle else None,
    )  # fmt: skip


def numbers(scale: float = 1.0) -> Tensor:
    return scale * torch.arange(float(B * R)).view(B, R)


def experience() -> Experience:
    rollout = responses()
    scores = TokenScores(numbers(), numbers(2.0), None, numbers(3.0), torch.arange(4.0))
    credit = Credit(numbers(4.0), rollout.response_mask, numbers(5.0))
    return Experience(rollout, scores, credit, numbers(6.0), None, rollout.response_mask, numbers(7.0))


def test_generated_is_the_response_mask_over_all_columns():
    rollout = responses()
    assert rollout.num_sequences == B
    assert rollout.response_length == R
    assert rollout.generated.shape == rollout.input_ids.shape
    assert not rollout.generated[:, :P].any()
    assert torch.equal(rollout.generated[:, P:], rollout.response_mask)
    assert not (rollout.generated & ~rollout.attention_mask).any()
    assert not (rollout.generated & rollout.question).any()


def test_answer_in_response_has_the_columns_of_the_response():
    rollout = responses()
    assert rollout.answer_in_response.nonzero().tolist() == [[0, 3], [1, 1]]
    assert not (rollout.answer_in_response & ~rollout.response_mask).any()


@pytest.mark.parametrize("rows", [[2], [3, 0], [1, 1, 1], range(1, 3), (0, 1, 2, 3), []])
def test_select_takes_the_same_sequences_of_every_field(rows):
    whole = experience()
    part = whole.select(rows)
    order = list(rows)
    assert part.responses.samples == tuple(whole.responses.samples[row] for row in order)
    assert part.responses.completions == tuple(str(row) for row in order)
    assert part.responses.prompt_length == P
    pairs = [(whole, part), (whole.responses, part.responses), (whole.scores, part.scores), (whole.credit, part.credit)]
    for before, after in pairs:
        for item in fields(before):
            value = getattr(before, item.name)
            if isinstance(value, Tensor):
                expected = torch.stack([value[row] for row in order]) if order else value[:0]
                assert torch.equal(getattr(after, item.name), expected), item.name
                assert getattr(after, item.name).dtype == value.dtype
    assert part.returns is None
    assert part.scores.ref_logprobs is None


def test_a_selection_is_a_copy():
    whole = experience()
    part = whole.select([0, 1])
    part.advantages.fill_(-1.0)
    part.responses.rewards.fill_(-1.0)
    assert whole.advantages.min() == 0.0
    assert whole.responses.rewards.min() == 0.0


def test_selecting_twice_is_selecting_once():
    whole = experience()
    twice, once = whole.select([3, 1, 0]).select([2, 0]), whole.select([0, 3])
    assert torch.equal(twice.responses.input_ids, once.responses.input_ids)
    assert torch.equal(twice.policy_weights, once.policy_weights)
    assert twice.responses.completions == once.responses.completions == ("0", "3")


def test_a_missing_oracle_stays_missing():
    assert responses(oracle=False).select([1]).oracle is None


def test_a_sequence_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        experience().select([4])


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        responses().prompt_length = 2  # type: ignore[misc]
    assert replace(responses(), prompt_length=2).prompt_length == 2
