"""Rewards per token, GAE, group baselines and whitening against plain loops and cases worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rl import ConfigError, gae, group_advantages, rloo_advantages
from rl.algorithm.advantages import last_tokens, spread, token_rewards, whiten
from tests.reference import rl_math as reference

some = settings(max_examples=60, deadline=None)
GARBAGE = (math.nan, math.inf, -math.inf, 1e38)
number = st.floats(-50, 50, width=32)
every_length = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def padded(rows: list[list[float]], columns: int, filler: float) -> Tensor:
    """Rows on the left, the filler on padding."""
    return torch.tensor([row + [filler] * (columns - len(row)) for row in rows]).reshape(len(rows), columns)


def mask_of(lengths: list[int], columns: int) -> Tensor:
    return torch.arange(columns)[None, :] < torch.tensor(lengths)[:, None]


def draw_rows(data: st.DataObject, lengths: list[int]) -> list[list[float]]:
    return [data.draw(st.lists(number, min_size=n, max_size=n)) for n in lengths]


@given(lengths=every_length, extra=st.integers(0, 2), data=st.data())
@some
def test_token_rewards_and_gae_equal_their_definitions(lengths: list[int], extra: int, data: st.DataObject):
    columns, filler = max(lengths) + extra, data.draw(st.sampled_from(GARBAGE))
    mask = mask_of(lengths, columns)
    verdicts = data.draw(st.lists(number, min_size=len(lengths), max_size=len(lengths)))
    kl, values = draw_rows(data, lengths), draw_rows(data, lengths)
    beta, discount, gae_lambda = (data.draw(st.floats(0, 1)) for _ in range(3))
    ends = data.draw(st.lists(number, min_size=len(lengths), max_size=len(lengths)))

    rewards = token_rewards(torch.tensor(verdicts), mask, kl=padded(kl, columns, filler), kl_weight=beta)
    expected = [reference.token_rewards(r, row, beta) for r, row in zip(verdicts, kl, strict=True)]
    assert rewards.dtype == torch.float32
    assert_close(rewards, padded(expected, columns, 0.0))

    dirty = torch.where(mask, rewards, filler)
    advantages, returns = gae(
        dirty, padded(values, columns, filler), mask,
        discount=discount, gae_lambda=gae_lambda, bootstrap=torch.tensor(ends),
    )  # fmt: skip
    pairs = [
        reference.gae(row, value, discount, gae_lambda, end)
        for row, value, end in zip(expected, values, ends, strict=True)
    ]
    assert advantages.dtype == returns.dtype == torch.float32
    assert_close(advantages, padded([a for a, _ in pairs], columns, 0.0), rtol=1e-5, atol=1e-4)
    assert_close(returns, padded([r for _, r in pairs], columns, 0.0), rtol=1e-5, atol=1e-4)
    assert bool((advantages[~mask] == 0).all())
    assert bool((returns[~mask] == 0).all())


def test_gae_worked_by_hand():
    """Two tokens, then one: delta = (0.5 * 4 - 2, 1 - 4) = (0, -3), A_0 = 0 + 0.25 * -3."""
    mask = torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[2.0, 4.0], [1.0, math.nan]])
    rewards = token_rewards(torch.tensor([1.0, 5.0]), mask)
    assert rewards.tolist() == [[0.0, 1.0], [5.0, 0.0]]
    advantages, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.75, -3.0], [4.0, 0.0]]
    assert returns.tolist() == [[1.25, 1.0], [5.0, 0.0]]
    advantages, _ = gae(rewards, values, mask, discount=0.5, gae_lambda=0.5, bootstrap=torch.tensor([0.0, 2.0]))
    assert advantages.tolist() == [[-0.75, -3.0], [5.0, 0.0]]


def test_lambda_one_gives_the_reward_to_go_and_lambda_zero_one_step():
    mask = torch.ones(1, 4, dtype=torch.bool)
    rewards, values = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[7.0, -1, 2, 5]])
    _, returns = gae(rewards, values, mask, discount=1.0, gae_lambda=1.0)
    assert returns.tolist() == [[10.0, 9.0, 7.0, 4.0]]
    advantages, _ = gae(rewards, values, mask, discount=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[1 - 1 - 7.0, 2 + 2 + 1.0, 3 + 5 - 2.0, 4 - 5.0]]


def test_results_are_detached():
    mask = torch.ones(2, 2, dtype=torch.bool)
    values = torch.randn(2, 2, requires_grad=True)
    rewards = torch.randn(2, requires_grad=True)
    results = [token_rewards(rewards, mask, kl=values, kl_weight=1.0), spread(rewards, mask), whiten(values, mask)]
    results += gae(values, values, mask, discount=1.0, gae_lambda=1.0, bootstrap=rewards)
    groups = torch.zeros(2, dtype=torch.int64)
    results += [group_advantages(rewards, groups, scale_std=True), rloo_advantages(rewards, groups)]
    assert not any(result.requires_grad for result in results)


def test_last_tokens():
    mask = mask_of([0, 1, 3], 3)
    assert last_tokens(mask).int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    empty = mask_of([0, 0], 0)
    assert last_tokens(empty).shape == (2, 0)
    assert token_rewards(torch.ones(2), empty).shape == (2, 0)
    assert gae(torch.ones(2, 0), torch.ones(2, 0), empty, discount=1.0, gae_lambda=1.0)[0].shape == (2, 0)


@st.composite
def grouped_rewards(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Groups of 2 to 4, their members mixed, their numbers far apart."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    groups = draw(st.permutations([1000 * k - 7 for k, size in enumerate(sizes) for _ in range(size)]))
    kind = st.sampled_from([0.0, 1.0]) if draw(st.booleans()) else number
    return draw(st.lists(kind, min_size=len(groups), max_size=len(groups))), list(groups)


@given(case=grouped_rewards(), scale_std=st.booleans(), epsilon=st.sampled_from([1e-4, 0.5]))
@some
def test_group_and_rloo_advantages_equal_their_definitions(
    case: tuple[list[float], list[int]], scale_std: bool, epsilon: float
):
    rewards, groups = case
    got = group_advantages(torch.tensor(rewards), torch.tensor(groups), scale_std=scale_std, epsilon=epsilon)
    expected = reference.group_advantages(rewards, groups, scale_std, epsilon)
    assert got.dtype == torch.float32
    assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    got = rloo_advantages(torch.tensor(rewards), torch.tensor(groups))
    assert_close(got, torch.tensor(reference.rloo_advantages(rewards, groups)), rtol=1e-5, atol=1e-5)


def test_group_advantages_are_those_of_trl():
    """TRL 1.16 divides by ``nanstd(rewards.view(-1, G), dim=1) + 1e-4``."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = torch.randn(5, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    groups = torch.arange(5).repeat_interleave(4)
    assert_close(group_advantages(rewards.flatten(), groups, scale_std=True), expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e30, -7.7e-12])
def test_equal_rewards_give_exact_zeros(value: float, dtype: torch.dtype):
    rewards, groups = torch.full((7,), value, dtype=dtype), torch.zeros(7, dtype=torch.int64)
    for scale_std in (True, False):
        assert group_advantages(rewards, groups, scale_std=scale_std).tolist() == [0.0] * 7
    assert rloo_advantages(rewards, groups).tolist() == [0.0] * 7


def test_group_advantages_worked_by_hand():
    """(1, 0, 0, 1): mean 1/2, std sqrt(1 / 3); left out: 1 - 1/3 and 0 - 2/3."""
    rewards, groups = torch.tensor([1.0, 0, 0, 1]), torch.tensor([4, 4, 4, 4])
    assert group_advantages(rewards, groups, scale_std=False).tolist() == [0.5, -0.5, -0.5, 0.5]
    scaled = group_advantages(rewards, groups, scale_std=True)
    assert_close(scaled[0].item(), 0.5 / (math.sqrt(1 / 3) + 1e-4), rtol=1e-6, atol=0)
    assert_close(rloo_advantages(rewards, groups), torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))


def test_spread():
    assert spread(torch.tensor([2.0, -1.0]), mask_of([2, 0], 3)).tolist() == [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


@given(lengths=every_length, data=st.data())
@some
def test_whitening_equals_its_definition(lengths: list[int], data: st.DataObject):
    rows = draw_rows(data, lengths)
    numbers = [x for row in rows for x in row]
    columns, mask = max(lengths) + 1, mask_of(lengths, max(lengths) + 1)
    white = whiten(padded(rows, columns, data.draw(st.sampled_from(GARBAGE))), mask)
    assert white.dtype == torch.float32
    assert bool((white[~mask] == 0).all())
    if len(numbers) >= 2 and max(numbers) - min(numbers) > 1e-3:
        assert_close(white, padded(reference.whiten(rows), columns, 0.0), rtol=1e-5, atol=1e-5)
        assert abs(white[mask].double().mean().item()) < 1e-6
        assert abs(white[mask].double().var().item() - 1) < 1e-5


def test_whitening_without_variance_only_removes_the_mean():
    for value in (0.1, -3e20, 1e-30):
        assert whiten(torch.full((2, 3), value), mask_of([3, 1], 3)).tolist() == [[0.0] * 3] * 2
    assert whiten(torch.tensor([[5.0, 9.0]]), mask_of([1], 2)).tolist() == [[0.0, 0.0]]
    assert whiten(torch.tensor([[5.0, 9.0]]), mask_of([0], 2)).tolist() == [[0.0, 0.0]]
    # A difference in the last bit is rounding, not signal: it keeps its size.
    nearly = torch.tensor([[1000.0, 1000.0, 1000.0]])
    nearly[0, 2] = nearly[0, 2].nextafter(torch.tensor(2000.0))
    assert 0 < whiten(nearly, mask_of([3], 3)).abs().max().item() < 1e-4
    # The same small spread around zero is signal.
    assert_close(whiten(nearly - 1000, mask_of([3], 3)).var().item(), 1.0)


@pytest.mark.unchecked
def test_bad_input():
    mask, groups = mask_of([2, 1], 2), torch.tensor([3, 3])
    rewards, flat = torch.ones(2), torch.ones(2, 2)
    usual = {"discount": 1.0, "gae_lambda": 1.0}
    holes = torch.tensor([[True, True], [False, True]])
    for call, text in (
        (lambda: token_rewards(torch.ones(3), mask), r"rewards: must be a float tensor of shape \(2,\), got .*\(3,\)"),
        (lambda: token_rewards([1.0, 0.0], mask), r"rewards: must be a float tensor of shape \(2,\), got list; "),
        (lambda: token_rewards(torch.ones(2).long(), mask), r"rewards: must be a float tensor .*got torch.int64"),
        (lambda: token_rewards(rewards, mask.int()), r"mask: must be a bool tensor .*got torch.int32 .*\.bool\(\)"),
        (lambda: token_rewards(rewards, holes), r"mask: must be True on one run .*got a gap in response 1; pad"),
        (lambda: token_rewards(rewards * math.nan, mask), r"rewards: must be finite .*got nan at \[0\]; look"),
        (lambda: token_rewards(rewards, mask, kl=flat * math.inf), r"kl: must be finite .*got inf at \[0, 0\]; "),
        (lambda: token_rewards(rewards, mask, kl=flat, kl_weight=-1.0), r"kl_weight: must be at least 0, got -1.0; "),
        (lambda: token_rewards(rewards, mask, kl=flat[:1]), r"kl: must be a float tensor of shape \(2, 2\), got"),
        (lambda: gae(rewards, flat, mask, **usual), r"rewards: must be a float tensor of shape \(2, 2\), got"),
        (lambda: gae(flat, flat, holes, **usual), r"mask: must be True on one run"),
        (lambda: gae(flat, flat * math.nan, mask, **usual), r"values: must be finite .*got nan at \[0, 0\]"),
        (lambda: gae(flat, flat, mask, discount=1.1, gae_lambda=1.0), r"discount: must lie in \[0, 1\], got 1.1; "),
        (lambda: gae(flat, flat, mask, discount=1.0, gae_lambda=math.nan), r"gae_lambda: must lie in .*got nan; "),
        (lambda: gae(flat, flat, mask, bootstrap=flat, **usual), r"bootstrap: must be a float .*shape \(2,\)"),
        (lambda: group_advantages(rewards, torch.tensor([3, 8]), scale_std=True),
         r"groups: must hold at least 2 responses each, got 1 in group 3; use group_size >= 2"),
        (lambda: rloo_advantages(rewards, torch.tensor([3, 8])), r"groups: must hold at least 2 .*use group_size >= 2"),
        (lambda: rloo_advantages(rewards, groups.float()), r"groups: must be an int64 tensor .*got torch.float32"),
        (lambda: rloo_advantages(torch.ones(3), groups), r"rewards: must be a float tensor of shape \(2,\), got"),
        (lambda: rloo_advantages(rewards * math.inf, groups), r"rewards: must be finite .*got inf at \[0\]"),
        (lambda: group_advantages(rewards, groups, scale_std=True, epsilon=0.0), r"epsilon: must be positive, got 0.0"),
        (lambda: spread(flat, mask), r"per_sequence: must be a float tensor of shape \(2,\), got"),
        (lambda: whiten(rewards, mask), r"values: must be a float tensor of shape \(2, 2\), got"),
        (lambda: whiten(flat * math.nan, mask), r"values: must be finite .*got nan at \[0, 0\]"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            call()
