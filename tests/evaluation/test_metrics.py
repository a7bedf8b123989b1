"""The metrics against slow twins, published libraries, and values worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowgraph import InvalidInputError
from flowgraph.evaluation import metrics
from tests.reference import evaluation_metrics as reference

LIBRARIES = json.loads((Path(__file__).parents[1] / "fixtures" / "evaluation_libraries.json").read_text())
some = settings(max_examples=60, deadline=None)

# Few levels make ties; halves and quarters are exact.
TIED = st.integers(-4, 4).map(lambda value: value / 4)
SPREAD = st.floats(-3, 3, allow_subnormal=False).map(lambda value: round(value, 6))


@st.composite
def pairs(draw: st.DrawFn, least: int = 1) -> tuple[list[float], list[float]]:
    """Scores and effects of the same units, with or without ties."""
    num_units = draw(st.integers(least, 9))
    numbers = draw(st.sampled_from([TIED, SPREAD]))
    column = st.lists(numbers, min_size=num_units, max_size=num_units)
    return draw(column), draw(column)


@st.composite
def marked(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    """Scores and a gold mask of the same units."""
    scores, effects = draw(pairs())
    return scores, [effect > 0 for effect in effects]


def same(value: float) -> Any:
    return pytest.approx(value, abs=1e-9, nan_ok=True)


# Twins ------------------------------------------------------------------------------------------------


@given(pair=pairs(), k=st.integers(1, 10))
@some
def test_shares_and_areas_of_effects(pair: tuple[list[float], list[float]], k: int):
    scores, effects = pair
    assert metrics.share_of_best(scores, effects, k) == same(reference.share_of_best(scores, effects, k))
    assert metrics.auroc_of_largest(scores, effects, k) == same(reference.auroc_of_largest(scores, effects, k))
    assert metrics.rank_correlation(scores, effects) == same(reference.rank_correlation(scores, effects))


@given(case=marked(), share=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
@some
def test_gold_masks(case: tuple[list[float], list[bool]], share: float):
    scores, gold = case
    num_chosen = max(1, math.ceil(share * len(scores) - 1e-12))
    precision = reference.precision_at(scores, gold, num_chosen)
    assert metrics.auroc(scores, gold) == same(reference.auroc(scores, gold))
    assert metrics.average_precision(scores, gold) == same(reference.average_precision(scores, gold))
    assert metrics.precision_at(scores, gold, share) == same(precision)
    recall = precision * num_chosen / sum(gold) if any(gold) else math.nan
    assert metrics.recall_at(scores, gold, share) == same(recall)


@given(pair=pairs(least=5), data=st.data())
@some
def test_partial_rank_correlation(pair: tuple[list[float], list[float]], data: st.DataObject):
    scores, effects = pair
    num_controls = data.draw(st.integers(0, 2))
    column = st.lists(SPREAD, min_size=len(scores), max_size=len(scores))
    controls = [data.draw(column) for _ in range(num_controls)]
    # The recursion divides by 1 - r^2, so every pair of columns must be far from one line.
    columns = [reference.mean_ranks(values) for values in (scores, effects, *controls)]
    assume(all(np.ptp(column) > 0 for column in columns))
    assume(np.linalg.eigvalsh(np.corrcoef(columns))[0] > 1e-6)
    assert len(scores) >= 3 + num_controls
    expected = reference.partial_rank_correlation(scores, effects, controls)
    assert metrics.partial_rank_correlation(scores, effects, controls) == pytest.approx(expected, abs=1e-6)


@given(pair=pairs(), num_steps=st.integers(1, 10))
@some
def test_curves_and_their_areas(pair: tuple[list[float], list[float]], num_steps: int):
    scores, costs = pair

    def value(kept: set[int]) -> float:
        return math.fsum(costs[unit] for unit in kept) + len(kept) ** 2 / 8

    def values(kept: np.ndarray) -> list[float]:
        return [value(set(np.flatnonzero(row).tolist())) for row in kept]

    deletion = metrics.deletion_curve(scores, values, num_steps)
    insertion = metrics.insertion_curve(scores, values, num_steps)
    assert deletion.tolist() == pytest.approx(reference.deletion_curve(scores, value, num_steps))
    assert insertion.tolist() == pytest.approx(reference.insertion_curve(scores, value, num_steps))
    assert metrics.area_under(deletion) == same(reference.area_under(deletion))

    # The loss of everything is either far from 0 or none, so that both sides agree on which it is.
    assume(abs(deletion[0] - deletion[-1]) > 1e-6)
    of_deletion = reference.response_of_deletion(deletion)
    of_insertion = reference.response_of_insertion(insertion)
    rise_of_deletion = reference.area_under(of_deletion) if of_deletion else math.nan
    rise_of_insertion = reference.area_under(of_insertion) if of_insertion else math.nan
    assert metrics.rise(deletion) == same(rise_of_deletion)
    assert metrics.rise(insertion, "insertion") == same(rise_of_insertion)
    assert metrics.mas(scores, deletion) == same(reference.mas_of_deletion(scores, deletion))
    assert metrics.mas(scores, insertion, "insertion") == same(reference.mas_of_insertion(scores, insertion))


# Published libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LIBRARIES["sklearn"]["cases"], ids=str)
def test_areas_agree_with_scikit_learn(case: dict[str, Any]):
    assert metrics.auroc(case["scores"], case["gold"]) == pytest.approx(case["auroc"], abs=1e-12)
    precision = metrics.average_precision(case["scores"], case["gold"])
    assert precision == pytest.approx(case["average_precision"], abs=1e-12)


def removal_cost(case: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Value of the answer in the cases of FlashTrace: linear and quadratic in what is removed."""
    cost = np.array(case["cost"])
    return lambda kept: -(~kept @ cost) - case["curvature"] * (~kept).sum(axis=1) ** 2


@pytest.mark.parametrize("case", LIBRARIES["flashtrace"]["cases"], ids=lambda case: case["kind"])
def test_curves_agree_with_flashtrace(case: dict[str, Any]):
    scores = case["scores"]
    curve = metrics.deletion_curve(scores, removal_cost(case), case["steps"])
    gold = [unit in case["gold"] for unit in range(len(scores))]
    if min(scores) >= 0:
        for share, recall in case["recall"].items():
            assert metrics.recall_at(scores, gold, float(share)) == pytest.approx(recall)
    if case["kind"] == "rising":
        # Removing everything makes the answer more probable. FlashTrace divides by the absolute difference and
        # clips, which gives 0, its best value; there is no support to lose, so the figure is undefined here.
        assert curve[-1] > curve[0]
        assert case["rise"] == 0
        assert math.isnan(metrics.rise(curve))
        assert math.isnan(metrics.mas(scores, curve))
        return
    assert metrics.rise(curve) == pytest.approx(case["rise"], abs=1e-9)
    if case["kind"] == "signed":
        # FlashTrace sums signed scores, so the share that is left leaves [0, 1], and every step
        # is punished for it; here only positive scores have a magnitude.
        total = sum(scores)
        left = metrics.deletion_masks(scores, case["steps"]) @ np.array(scores) / total
        assert left.min() < 0 or left.max() > 1
        assert metrics.mas(scores, curve) < case["mas"]
        return
    assert metrics.mas(scores, curve) == pytest.approx(case["mas"], abs=1e-9)


@pytest.mark.parametrize("case", LIBRARIES["interpreto"]["cases"], ids=lambda case: str(len(case["scores"])))
@pytest.mark.parametrize("kind", ["deletion", "insertion"])
def test_areas_agree_with_interpreto(case: dict[str, Any], kind: str):
    cost = np.array(case["cost"])
    measure = metrics.deletion_curve if kind == "deletion" else metrics.insertion_curve
    removed: list[list[int]] = []

    def value(kept: np.ndarray) -> np.ndarray:
        removed.append((~kept).sum(axis=1).tolist())
        return np.exp(-(~kept @ cost))

    area = metrics.area_under(measure(case["scores"], value, case["steps"]))
    expected = case[kind]
    if removed[0] != expected["num_removed"]:
        # Where units do not divide evenly, interpreto rounds the cumulated count down (2, 4, 7 of 7 in three steps),
        # and the groups here differ by one unit at most, the larger ones first (3, 5, 7).
        assert len(case["scores"]) % case["steps"] != 0
        assert max(abs(ours - theirs) for ours, theirs in zip(removed[0], expected["num_removed"], strict=True)) == 1
        return
    assert area == pytest.approx(expected["auc"], abs=1e-6)  # computed in float32 there


@pytest.mark.parametrize("case", LIBRARIES["magnitude_aligned_scoring"]["cases"], ids=lambda case: str(case["steps"]))
def test_magnitudes_agree_with_the_authors_code(case: dict[str, Any]):
    cost = np.array(case["cost"])

    def value(kept: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-5 - kept @ cost))

    for kind, measure in (("deletion", metrics.deletion_curve), ("insertion", metrics.insertion_curve)):
        curve = measure(case["scores"], value, case["steps"])
        assert metrics.rise(curve, kind) == pytest.approx(case[kind]["rise"], abs=1e-6)
        assert metrics.mas(case["scores"], curve, kind) == pytest.approx(case[kind]["mas"], abs=1e-6)


# Worked by hand ---------------------------------------------------------------------------------------


def test_the_first_of_equal_scores_is_chosen():
    assert metrics.share_of_best([1, 1, 1], [3, 1, 0], k=1) == 0.75
    assert metrics.share_of_best([1, 1, 1], [0, 1, 3], k=1) == 0
    assert metrics.precision_at([5, 5], [False, True], share=0.5) == 0
    assert metrics.auroc([5, 5], [False, True]) == 0.5
    assert metrics.average_precision([5, 5, 5, 5], [False, True, False, False]) == 0.25


def test_harmful_units_neither_add_nor_subtract():
    assert metrics.share_of_best([3, 2, 1], [4, -8, 4], k=2) == 0.5
    assert metrics.auroc_of_largest([3, 2, 1], [4, -1, -2], k=2) == 1
    assert metrics.share_of_best([1, 2], [1e308, 1e308], k=1) == 0.5


def test_a_control_takes_what_it_explains():
    position = list(range(8))
    effects = [0, 1, 2, 4, 3, 5, 6, 7]
    assert metrics.rank_correlation(position, effects) == pytest.approx(0.976, abs=1e-3)
    assert math.isnan(metrics.partial_rank_correlation(position, effects, [position]))
    assert math.isnan(metrics.partial_rank_correlation([2 * place + 1 for place in position], effects, [position]))
    # A constant control and a repeated one explain nothing more.
    scores = [1, 0, 2, 4, 3, 6, 5, 7]
    alone = metrics.partial_rank_correlation(scores, effects, [position])
    assert metrics.partial_rank_correlation(scores, effects, [position, [5] * 8, position]) == pytest.approx(alone)
    assert metrics.partial_rank_correlation(scores, effects, []) == pytest.approx(
        metrics.rank_correlation(scores, effects)
    )


def test_undefined_figures_are_nan():
    undefined = [
        metrics.share_of_best([1, 2], [0, -1]),
        metrics.auroc_of_largest([1, 2], [0, -1]),
        metrics.auroc_of_largest([1, 2], [1, 2], k=2),
        metrics.rank_correlation([1, 2], [1, 2]),
        metrics.rank_correlation([1, 1, 1], [1, 2, 3]),
        metrics.partial_rank_correlation([1, 2, 3], [1, 3, 2], [[3, 1, 2]]),
        metrics.partial_rank_correlation([1, 1, 1, 1], [1, 3, 2, 4], [[3, 1, 2, 4]]),
        metrics.auroc([1, 2], [True, True]),
        metrics.auroc([1, 2], [False, False]),
        metrics.average_precision([1, 2], [False, False]),
        metrics.precision_at([1, 2], [False, False]),
        metrics.recall_at([1, 2], [False, False]),
        metrics.area_under([1]),
        metrics.rise([1, 2, 1]),
        metrics.mas([-1, 0], [1, 0.5, 0]),
        metrics.comprehensiveness(1, []),
        metrics.sufficiency(1, []),
        metrics.share_of_best([], []),
        metrics.auroc([], []),
    ]
    assert all(math.isnan(value) for value in undefined)


def test_a_share_of_units_is_rounded_up_without_rounding_errors():
    gold = [True] * 100
    # .07 * 100 is 7.000000000000001 in floating point.
    assert metrics.masks_at(range(100), [0.07]).sum() == 7
    assert metrics.recall_at(range(100), gold, 0.07) == 0.07
    assert metrics.masks_at([1, 2, 3], [0.01, 0.5, 1.0]).sum(axis=1).tolist() == [1, 2, 3]


def test_removal_at_shares_measures_both_ways():
    scores = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.3])
    weights = np.array([0, 0.5, 0.25, 0.125, 0.125])
    chosen = metrics.masks_at(scores, [0.2, 0.4])
    assert metrics.comprehensiveness(1, ~chosen @ weights) == pytest.approx((0.5 + 0.75) / 2)
    assert metrics.sufficiency(1, chosen @ weights) == pytest.approx((0.5 + 0.25) / 2)


def test_an_explanation_that_is_the_value_itself_has_no_penalty():
    weights = [0.5, 0.25, 0.125, 0.125]
    deletion = metrics.deletion_curve(weights, lambda kept: kept @ weights)
    insertion = metrics.insertion_curve(weights, lambda kept: kept @ weights)
    assert metrics.mas(weights, deletion) == pytest.approx(metrics.rise(deletion))
    assert metrics.mas(weights, insertion, "insertion") == pytest.approx(metrics.rise(insertion, "insertion"))
    flat = [0.4, 0.3, 0.2, 0.1]
    assert metrics.mas(flat, deletion) > metrics.rise(deletion)
    assert metrics.mas(flat, insertion, "insertion") < metrics.rise(insertion, "insertion")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_dtype_are_read(dtype: torch.dtype):
    scores = torch.tensor([0.5, 2, 1], dtype=dtype, requires_grad=True)
    assert metrics.share_of_best(scores, torch.tensor([0, 3, 1], dtype=torch.int64), k=1) == 0.75
    assert metrics.auroc(scores, torch.tensor([False, True, False])) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc([1, 2], [True]), "scores: must have one entry for each of the 1 gold, got 2"),
        (lambda: metrics.auroc([1, 2], [0.5, 1]), "gold: must be a mask of True and False, got 0.5"),
        (lambda: metrics.auroc([1, math.nan], [True, False]), "scores: must be finite, got nan at position 1"),
        (lambda: metrics.rank_correlation([[1, 2]], [1, 2]), r"scores: must have one dimension, got shape \(1, 2\)"),
        (lambda: metrics.rank_correlation(["a"], [1]), "scores: must be a sequence of numbers, got list"),
        (lambda: metrics.share_of_best([1], [1], k=0), "k: must be a positive integer, got 0"),
        (lambda: metrics.share_of_best([1], [math.inf]), "effects: must be finite, got inf at position 0"),
        (lambda: metrics.precision_at([1], [True], share=0), r"share: must lie in \(0, 1\], got 0"),
        (lambda: metrics.masks_at([1], [0.1, 2]), r"shares\[1\]: must lie in \(0, 1\], got 2"),
        (lambda: metrics.partial_rank_correlation([1, 2], [1, 2], [[1]]), r"controls\[0\]: must have one entry"),
        (lambda: metrics.deletion_curve([1, 2], lambda kept: [1]), "value_of_kept: must return 3 values, one for"),
        (lambda: metrics.deletion_masks([], 3), "scores: must hold at least one unit, got none"),
        (lambda: metrics.mas([1, 2], [1, 0.5, 0.2, 0]), "curve: must hold between 2 and 3 points for 2 scores, got 4"),
        (lambda: metrics.rise([1]), "curve: must hold two points or more, got 1"),
        (lambda: metrics.rise([1, 0], "removal"), "kind: must be 'deletion' or 'insertion', got 'removal'"),
        (lambda: metrics.comprehensiveness(math.nan, [1]), "full: must be finite, got nan"),
    ],
)
@pytest.mark.unchecked
def test_bad_input_is_refused(call: Callable[[], Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        call()
