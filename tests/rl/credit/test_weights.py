"""Shapes, signs and entry points of credit against plain loops, and the sums that they promise to keep."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rl import ConfigError, CreditConfig, CreditError, shape_weights, top_share
from rl.credit.weights import mean_one, potential_rewards, redistribute, signed_weights
from tests.reference import rl_math as reference

some = settings(max_examples=60, deadline=None)
GARBAGE = (math.nan, math.inf, -math.inf, 1e38)
SHARES = ("0.01", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.9", "0.99", "1")


@st.composite
def credited(draw: st.DrawFn, signed: bool = False) -> tuple[list[list[float]], list[list[int]], float]:
    """Scores of responses of any length, many tied, some without flow; who competes; what stands elsewhere."""
    lengths = draw(st.lists(st.integers(0, 8), min_size=1, max_size=4))
    least = -9 if signed else 0
    kinds = [st.just(0.0), st.integers(least, 2).map(float), st.floats(0, 9, width=32, allow_subnormal=False)]
    rows = [draw(st.lists(draw(st.sampled_from(kinds)), min_size=n, max_size=n)) for n in lengths]
    scored = [[t for t in range(n) if draw(st.integers(0, 3))] for n in lengths]
    return rows, scored, draw(st.sampled_from(GARBAGE))


def tensors(case: tuple[list[list[float]], list[list[int]], float], extra: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with garbage wherever nobody competes, scored, mask."""
    rows, scored, filler = case
    columns = max(map(len, rows)) + extra
    competing = torch.tensor([[t in chosen for t in range(columns)] for chosen in scored])
    scores = padded(rows, columns).masked_fill(~competing, filler)
    return scores, competing, torch.arange(columns)[None, :] < torch.tensor([[len(row)] for row in rows])


def padded(rows: list[list[float]], columns: int, filler: float = 0.0) -> Tensor:
    return torch.tensor([row + [filler] * (columns - len(row)) for row in rows]).reshape(len(rows), columns)


def config(**changes: object) -> CreditConfig:
    return replace(CreditConfig(), **changes)  # type: ignore[arg-type]


# Which tokens -------------------------------------------------------------------------------------------


@given(case=credited(signed=True), share=st.sampled_from(SHARES), largest=st.booleans())
@some
def test_top_share_equals_its_definition(case: tuple, share: str, largest: bool):
    scores, scored, _ = tensors(case)
    chosen = top_share(scores, scored, float(share), largest=largest)
    for row, (values, positions) in enumerate(zip(case[0], case[1], strict=True)):
        expected = reference.top_share(values, positions, share, largest)
        assert set(chosen[row].nonzero().flatten().tolist()) == expected


def test_top_share_counts_as_on_paper():
    """The product of the floats lies above the whole number for 0.07 of 100 and many others."""
    columns = 400
    scored = torch.arange(columns)[None, :] < torch.arange(columns + 1)[:, None]
    scores = torch.zeros(columns + 1, columns)
    assert math.ceil(0.07 * 100) == 8
    for percent in (1, 7, 10, 14, 28, 40, 55, 70, 99, 100):
        share = Fraction(percent, 100)
        counts = torch.tensor([math.ceil(share * n) for n in range(columns + 1)])
        chosen = top_share(scores, scored, percent / 100)
        assert torch.equal(chosen, torch.arange(columns)[None, :] < counts[:, None])  # all tied: the earliest
    assert top_share(scores, scored, 1e-12).sum(1).tolist() == [0] + [1] * columns


def test_top_share_worked_by_hand():
    scores = torch.tensor([[1.0, 3, 3, 2, 3], [9.0, 0, 0, 0, 7]])
    scored = torch.tensor([[True, True, True, True, True], [False, True, True, True, False]])
    assert top_share(scores, scored, 0.4).int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert top_share(scores, scored, 0.4, largest=False).int().tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert top_share(scores[:, :0], scored[:, :0], 0.4).shape == (2, 0)


# Weights ------------------------------------------------------------------------------------------------


@given(
    case=credited(),
    shape=st.sampled_from(["top_q", "bottom_q", "only_top", "soft", "raw"]),
    share=st.sampled_from(SHARES),
    strength=st.sampled_from([0.5, 1.5, 3.0]),
)
@some
def test_shapes_equal_their_definitions(case: tuple, shape: str, share: str, strength: float):
    scores, scored, mask = tensors(case)
    weights = shape_weights(scores, scored, config(shape=shape, share=float(share), strength=strength))
    rows = [
        reference.shape_weights(values, positions, shape, share, strength, 0.25, 4.0)
        for values, positions in zip(case[0], case[1], strict=True)
    ]
    assert weights.dtype == torch.float32
    assert_close(weights, padded(rows, weights.shape[1], 1.0), rtol=1e-5, atol=1e-6)
    assert bool((weights[~(scored & mask)] == 1).all())


def test_shapes_worked_by_hand():
    scores = torch.tensor([[0.0, 8, 1, 3, 77], [0.0, 0, 0, 0, 77]])
    scored = torch.tensor([[True, True, True, True, False]] * 2)
    expected = {
        "top_q": [1.0, 1.5, 1.0, 1.5, 1.0],
        "bottom_q": [1.5, 1.0, 1.5, 1.0, 1.0],
        "only_top": [0.0, 1.0, 0.0, 1.0, 1.0],
        "raw": [0.0, 8.0, 1.0, 3.0, 1.0],
    }
    for shape, weights in expected.items():
        assert shape_weights(scores, scored, config(shape=shape)).tolist() == [weights, [1.0] * 5], shape
    # The mean is 3: 8 / 3 is cut off at 2, 1 / 3 and 0 at 0.5.
    soft = shape_weights(scores, scored, config(shape="soft", floor=0.5, ceiling=2.0))
    assert soft.tolist() == [[0.5, 2.0, 0.5, 1.0, 1.0], [1.0] * 5]


def test_no_columns_give_no_weights():
    nobody, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    for shape in ("top_q", "soft", "raw"):
        assert shape_weights(nobody, mask, config(shape=shape)).shape == (2, 0)
    assert mean_one(nobody, mask).shape == (2, 0)
    assert redistribute(torch.ones(2), nobody, mask, mask).shape == (2, 0)
    assert potential_rewards(nobody, mask, mask, scale=1.0, discount=1.0).shape == (2, 0)


@pytest.mark.parametrize("size", [1e-37, 1.0, 3e38])
def test_soft_weights_and_shares_know_no_scale(size: float):
    scores, every = torch.tensor([[1.0, 0.5, 0.25, 0.25, 0.5]]), torch.ones(1, 5, dtype=torch.bool)
    weights = shape_weights(scores * size, every, config(shape="soft"))
    assert_close(weights, torch.tensor([[2.0, 1.0, 0.5, 0.5, 1.0]]))
    assert_close(redistribute(torch.tensor([2.5]), scores * size, every, every), scores)


def test_signs_worked_by_hand():
    weights, advantages = torch.tensor([[2.0, 2, 0, 1, 1e-45, 2]]), torch.tensor([[0.5, -0.5, -1, -1, -1, 0]])
    assert signed_weights(weights, advantages, "all").tolist() == weights.tolist()
    assert signed_weights(weights, advantages, "non_negative").tolist() == [[2.0, 1, 1, 1, 1, 2]]
    asymmetric = signed_weights(weights, advantages, "asymmetric")
    assert asymmetric[0, :4].tolist() == [2.0, 0.5, 0.0, 1.0]
    assert asymmetric[0, 4:].tolist() == [weights[0, 4].item(), 2.0]  # too small for an inverse


@given(data=st.data(), sign=st.sampled_from(["all", "non_negative", "asymmetric"]))
@some
def test_signs_equal_their_definitions(data: st.DataObject, sign: str):
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 4.0]), min_size=6, max_size=6))
    advantages = data.draw(st.lists(st.sampled_from([-2.0, -1e-30, -0.0, 0.0, 3.0]), min_size=6, max_size=6))
    got = signed_weights(torch.tensor([weights]), torch.tensor([advantages]), sign)
    expected = [reference.signed_weight(w, a, sign) for w, a in zip(weights, advantages, strict=True)]
    assert got.dtype == torch.float32
    assert_close(got, torch.tensor([expected]))


@given(case=credited())
@some
def test_mean_one_equals_its_definition(case: tuple):
    rows, _, filler = case
    _, _, mask = tensors(case)
    weights = mean_one(padded(rows, mask.shape[1], filler), mask)
    assert weights.dtype == torch.float32
    assert_close(weights, padded([reference.mean_one(row) for row in rows], mask.shape[1]), rtol=1e-5, atol=1e-6)
    assert bool((weights[~mask] == 0).all())


def test_mean_one_leaves_ones_and_zeros_alone_and_survives_large_weights():
    weights, mask = torch.tensor([[1.0, 1, 1], [0.0, 0, 5], [3e38, 0, 3e38]]), torch.ones(3, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert_close(mean_one(weights, mask), torch.tensor([[1.0, 1, 1], [0, 0, 0], [1.5, 0, 1.5]]))
    assert torch.equal(mean_one(torch.ones(2, 7), torch.ones(2, 7, dtype=torch.bool)), torch.ones(2, 7))


# Rewards ------------------------------------------------------------------------------------------------


@given(case=credited(), data=st.data())
@some
def test_redistribution_equals_its_definition_and_keeps_the_sum(case: tuple, data: st.DataObject):
    rows, positions, _ = case
    scores, scored, mask = tensors(case)
    verdicts = data.draw(st.lists(st.floats(-9, 9, width=32), min_size=len(rows), max_size=len(rows)))
    got = redistribute(torch.tensor(verdicts), scores, scored, mask)
    expected = [reference.redistribute(*three) for three in zip(verdicts, rows, positions, strict=True)]
    assert got.dtype == torch.float32
    assert_close(got, padded(expected, mask.shape[1]), rtol=1e-5, atol=1e-6)
    assert_close(got.sum(1), torch.tensor(verdicts) * mask.any(1), rtol=1e-5, atol=1e-5)
    assert bool((got[~mask] == 0).all())


@given(case=credited(), scale=st.sampled_from([0.0, 1.0, 2.5]), discount=st.sampled_from([0.0, 0.9, 1.0]))
@some
def test_potential_rewards_equal_their_definition_and_sum_to_zero(case: tuple, scale: float, discount: float):
    rows, positions, _ = case
    scores, scored, mask = tensors(case)
    got = potential_rewards(scores, scored, mask, scale=scale, discount=discount)
    expected = [
        reference.potential_rewards(values, chosen, scale, discount)
        for values, chosen in zip(rows, positions, strict=True)
    ]
    assert got.dtype == torch.float32
    assert_close(got, padded(expected, mask.shape[1]), rtol=1e-5, atol=1e-6)
    assert bool((got[~mask] == 0).all())
    # What the tokens collect on the way, discounted, is what the potential was worth at the start: nothing.
    assert_close((got * discount ** torch.arange(mask.shape[1])).sum(1), torch.zeros(len(rows)), rtol=0, atol=1e-5)


def test_rewards_worked_by_hand():
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    scored = torch.tensor([[True, True, False, False], [True, True, False, False], [False] * 4])
    scores = torch.tensor([[1.0, 3, 50, 50], [0.0, 0, 50, 50], [50.0] * 4])
    spread_out = redistribute(torch.tensor([2.0, -1.0, 5.0]), scores, scored, mask)
    assert spread_out.tolist() == [[0.5, 1.5, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0] * 4]
    shaping = potential_rewards(scores, scored, mask, scale=4.0, discount=0.5)
    # Phi = 0, 1, 4 and 0 after the last token: 0.5 - 0, 2 - 1, 0 - 4.
    assert shaping.tolist() == [[0.5, 1.0, -4.0, 0.0], [0.0] * 4, [0.0] * 4]


def test_results_are_detached_and_keep_float64():
    scores = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    verdicts = torch.rand(2, dtype=torch.float64, requires_grad=True)
    every = torch.ones(2, 3, dtype=torch.bool)
    results = [shape_weights(scores, every, config(shape=shape)) for shape in ("top_q", "only_top", "soft", "raw")]
    results += [signed_weights(scores, scores - 0.5, sign) for sign in ("all", "non_negative", "asymmetric")]
    results += [mean_one(scores, every), redistribute(verdicts, scores, every, every)]
    results += [potential_rewards(scores, every, every, scale=1.0, discount=1.0)]
    for result in results:
        assert not result.requires_grad
        assert result.dtype == torch.float64


@pytest.mark.unchecked
def test_bad_input():
    scores, every = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    nan = torch.tensor([[1.0, 1, 1], [1.0, math.nan, 1]])
    minus = torch.tensor([[1.0, 1, -2], [1.0, 1, 1]])
    part = torch.tensor([[True, True, False]] * 2)
    spread_out = {"scale": 1.0, "discount": 1.0}
    for call, error, text in (
        (lambda: top_share(scores, every, 0.0), ConfigError, r"share: must lie in \(0, 1\], got 0.0; 0.4 is"),
        (lambda: top_share(scores, every, 1.01), ConfigError, r"share: must lie in \(0, 1\], got 1.01; "),
        (lambda: top_share(scores, every, math.nan), ConfigError, r"share: must lie in \(0, 1\], got nan; "),
        (lambda: top_share(scores, every[:1], 0.4), ConfigError, r"scores: must be a float .*\(1, 3\), got"),
        (lambda: top_share(scores, every.float(), 0.4), ConfigError, r"scored: must be a bool tensor .*float32"),
        (lambda: top_share(scores.long(), every, 0.4), ConfigError, r"scores: must be a float .*got torch.int64"),
        (lambda: top_share(nan, every, 0.4), CreditError,
         r"scores: must be finite wherever scored is True, got nan for token 1 of response 1; leave"),
        (lambda: shape_weights(nan, every, config()), CreditError, r"scores: must be finite and at least 0 .*nan"),
        (lambda: shape_weights(minus, every, config()), CreditError, r"got -2.0 for token 2 of response 0; leave"),
        (lambda: shape_weights(scores * math.inf, every, config()), CreditError, r"got inf for token 0"),
        (lambda: signed_weights(scores, scores[:1], "all"), ConfigError, r"advantages: must be a float tensor"),
        (lambda: signed_weights(scores, scores, "positive"), ConfigError, r"sign: must be one of .*'positive'"),
        (lambda: signed_weights(minus, scores, "all"), CreditError, r"weights: must be at least 0, got -2.0; use"),
        (lambda: mean_one(scores, every[:, :1]), ConfigError, r"weights: must be a float .*\(2, 1\), got"),
        (lambda: mean_one(nan, every), CreditError, r"weights: must be finite .*wherever mask is True, got nan"),
        (lambda: redistribute(torch.ones(3), scores, every, every), ConfigError, r"rewards: must be a float .*got"),
        (lambda: redistribute(torch.ones(2), scores, every, part), ConfigError,
         r"scored: must lie within mask, got padding in response 0; use scored & mask"),
        (lambda: redistribute(torch.ones(2), nan, every, every), CreditError, r"scores: must be finite .*got nan"),
        (lambda: redistribute(torch.ones(2), scores, every, ~part), ConfigError, r"mask: must be True on one run"),
        (lambda: potential_rewards(scores, every, every[:, :2], **spread_out), ConfigError, r"scores: .*\(2, 2\), got"),
        (lambda: potential_rewards(minus, every, every, **spread_out), CreditError, r"scores: must be .*got -2.0"),
        (lambda: potential_rewards(scores, every, part, **spread_out), ConfigError, r"scored: must lie within mask"),
        (lambda: potential_rewards(scores, every, every, scale=-1.0, discount=1.0), ConfigError,
         r"scale: must be finite and at least 0, got -1.0; 1 is the default"),
        (lambda: potential_rewards(scores, every, every, scale=1.0, discount=1.5), ConfigError,
         r"discount: must lie in \[0, 1\], got 1.5; use that of the advantages"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()
