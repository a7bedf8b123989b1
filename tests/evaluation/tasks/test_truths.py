"""The truths: a perfect explanation scores best, the reversed one worst, a random one at chance."""

import json
import math

import numpy as np
import pytest
import torch

from flowgraph import Explanation, InvalidInputError
from flowgraph.evaluation.records import Truth
from flowgraph.evaluation.tasks.truths import GoldPairs, GoldUnits, PairEffects, UnitEffects

# Eight units of different length over twenty tokens.
UNITS = [[0], [1, 2], [3, 4, 5], [6], [7, 8], [9, 10, 11], [12, 13], [14]]
EFFECTS = np.array([0.1, 3.0, 0.4, -0.5, 2.0, 0.2, 0.0, 1.0])
PAIRS = [(reader, source) for reader in range(5) for source in range(reader)]
PAIR_EFFECTS = np.array([0.3, 2.0, 0.1, 0.0, 0.7, 1.5, 0.2, 0.9, 0.05, 0.4])


def spread(values: np.ndarray) -> Explanation:
    """Give each unit its value, divided over its tokens."""
    tokens = torch.zeros(20, dtype=torch.float64)
    for unit, value in zip(UNITS, values, strict=True):
        tokens[unit] = float(value) / len(unit)
    return Explanation(tokens=tokens)


def spread_edges(values: np.ndarray) -> Explanation:
    edges = torch.zeros(20, 20, dtype=torch.float64)
    for (reader, source), value in zip(PAIRS, values, strict=True):
        num_cells = len(UNITS[reader]) * len(UNITS[source])
        for row in UNITS[reader]:
            edges[row, UNITS[source]] = float(value) / num_cells
    return Explanation(edges=edges)


def random_explanation(seed: int) -> Explanation:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(20, generator=generator, dtype=torch.float64)
    edges = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    return Explanation(tokens=tokens, edges=edges)


def mean_of_random(truth: Truth, count: int = 300) -> dict[str, float]:
    rows = [truth.score(random_explanation(seed)) for seed in range(count)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def test_unit_effects_rank_the_perfect_the_reversed_and_the_random_explanation():
    truth = UnitEffects(UNITS, EFFECTS)
    assert isinstance(truth, Truth)
    assert truth.unusable is None
    best = truth.score(spread(EFFECTS))
    assert best["spearman"] == pytest.approx(1)
    assert best["partial_spearman"] == pytest.approx(1)
    assert best["auroc_of_2_largest"] == 1
    # The three largest of the positive effects .1, 3, .4, 2, .2 and 1.
    assert best["share_of_3_best"] == pytest.approx(6 / 6.7)

    worst = truth.score(spread(-EFFECTS))
    assert worst["spearman"] == pytest.approx(-1)
    assert worst["auroc_of_2_largest"] == 0
    assert worst["share_of_3_best"] == pytest.approx(0.1 / 6.7)


def test_unit_effects_of_random_scores_are_at_chance():
    # Units of one length: a sum over more tokens varies more, which is what the partial correlation is for.
    truth = UnitEffects([[token] for token in range(8)], EFFECTS)
    chance = mean_of_random(truth)
    assert chance["spearman"] == pytest.approx(0, abs=0.07)
    assert chance["auroc_of_2_largest"] == pytest.approx(0.5, abs=0.05)
    assert chance["share_of_3_best"] == pytest.approx(3 / 8, abs=0.05)


def test_the_partial_correlation_removes_what_position_explains():
    units = [[token] for token in range(12)]
    generator = np.random.default_rng(0)
    effects = np.arange(12.0) + 4 * generator.random(12)
    position = Explanation(tokens=torch.arange(20, dtype=torch.float64))
    figures = UnitEffects(units, effects).score(position)
    assert figures["spearman"] > 0.8
    assert math.isnan(figures["partial_spearman"])


def test_pair_effects_rank_the_perfect_the_reversed_and_the_random_explanation():
    truth = PairEffects(UNITS[:5], PAIRS, PAIR_EFFECTS)
    assert isinstance(truth, Truth)
    best = truth.score(spread_edges(PAIR_EFFECTS))
    assert best["spearman"] == pytest.approx(1)
    assert best["spearman_per_reader"] == pytest.approx(1)
    assert best["auroc_of_2_largest"] == 1
    worst = truth.score(spread_edges(-PAIR_EFFECTS))
    assert worst["spearman"] == pytest.approx(-1)
    assert worst["spearman_per_reader"] == pytest.approx(-1)
    chance = mean_of_random(PairEffects([[token] for token in range(5)], PAIRS, PAIR_EFFECTS))
    assert chance["spearman"] == pytest.approx(0, abs=0.07)
    assert chance["auroc_of_2_largest"] == pytest.approx(0.5, abs=0.05)


def test_gold_units_and_gold_pairs_separate_gold_from_the_others():
    gold = EFFECTS > 0.9
    truth = GoldUnits(UNITS, gold)
    assert truth.score(spread(EFFECTS)) == {"precision_at_10": 1, "auroc": 1, "average_precision": 1}
    assert truth.score(spread(-EFFECTS))["auroc"] == 0
    assert truth.score(spread(-EFFECTS))["precision_at_10"] == 0
    pairs = GoldPairs(UNITS[:5], PAIRS, PAIR_EFFECTS > 0.6)
    assert pairs.score(spread_edges(PAIR_EFFECTS * [len(UNITS[r]) * len(UNITS[s]) for r, s in PAIRS]))["auroc"] == 1
    single = GoldUnits([[token] for token in range(8)], gold)
    assert mean_of_random(single)["auroc"] == pytest.approx(0.5, abs=0.05)
    assert mean_of_random(single)["precision_at_10"] == pytest.approx(gold.mean(), abs=0.07)


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (UnitEffects(UNITS, np.zeros(8)), "all effects are 0"),
        (UnitEffects(UNITS, np.full(8, 2.0)), "all effects are equal"),
        (UnitEffects(UNITS[:3], EFFECTS[:3]), "3 units, fewer than the 4"),
        (UnitEffects([], np.zeros(0)), "0 units, fewer than the 4"),
        (PairEffects(UNITS, [], np.zeros(0)), "0 pairs of units, fewer than the 4"),
        (PairEffects(UNITS[:5], PAIRS, np.zeros(10)), "all effects are 0"),
        (GoldUnits(UNITS, np.zeros(8, dtype=bool)), "no unit is gold"),
        (GoldUnits(UNITS, np.ones(8, dtype=bool)), "every unit is gold"),
        (GoldPairs(UNITS, [], np.zeros(0, dtype=bool)), "no unit is gold"),
    ],
)
def test_items_that_decide_nothing_say_why(truth: Truth, reason: str):
    assert reason in (truth.unusable or "")


def test_truths_are_json_and_name_their_units():
    for truth in (
        UnitEffects(UNITS, EFFECTS),
        PairEffects(UNITS[:5], PAIRS, PAIR_EFFECTS),
        GoldUnits(UNITS, EFFECTS > 0),
        GoldPairs(UNITS[:5], PAIRS, PAIR_EFFECTS > 0.6),
    ):
        written = json.loads(json.dumps(truth.to_dict()))
        assert written["units"] == [list(unit) for unit in truth.units]
        assert written["unusable"] is None


@pytest.mark.unchecked
def test_measured_truths_are_restored_from_their_values():
    explanation = random_explanation(0)
    for truth in (UnitEffects(UNITS, EFFECTS, min_units=6), PairEffects(UNITS[:5], PAIRS, PAIR_EFFECTS)):
        values = json.loads(json.dumps(truth.to_dict()))
        again = type(truth).restored(None, values)
        assert again.to_dict() == truth.to_dict()
        assert again.score(explanation) == truth.score(explanation)
    few = UnitEffects(UNITS[:5], EFFECTS[:5], min_units=6)
    assert UnitEffects.restored(None, few.to_dict()).unusable == few.unusable


def test_a_task_that_reads_edges_refuses_token_scores_and_the_other_way_round():
    with pytest.raises(InvalidInputError, match="must hold edge scores"):
        PairEffects(UNITS[:5], PAIRS, PAIR_EFFECTS).score(spread(EFFECTS))
    with pytest.raises(InvalidInputError, match="must hold token scores"):
        UnitEffects(UNITS, EFFECTS).score(spread_edges(PAIR_EFFECTS))
