"""Truths of the tasks: measured effects or gold labels of units, and the figures that compare scores with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from flowgraph.evaluation import metrics
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import Metric
from flowgraph.evaluation.subject import Subject

MIN_UNITS = 4
"""Fewest units of a ranking: three units have only six possible orders."""
SMALLEST_EFFECT = 1e-4
"""Nats; differences below it come from the rounding of float32 passes in batches of different size."""

SPEARMAN = Metric("spearman", "rank correlation of scores and measured effects", chance=0.0)
PARTIAL = Metric("partial_spearman", "rank correlation with position and length held constant", chance=0.0)
PARTIAL_DISTANCE = Metric("partial_spearman", "rank correlation with distance and size held constant", chance=0.0)
SHARE_OF_3 = Metric("share_of_3_best", "share of all positive effects that lies in the 3 units of highest score")
AUROC_OF_2 = Metric("auroc_of_2_largest", "separation of the 2 largest effects from the others", chance=0.5)
PER_READER = Metric("spearman_per_reader", "mean rank correlation over the sources of each reader", chance=0.0)
PRECISION = Metric("precision_at_10", "share of gold among the tenth of highest score")
AUROC = Metric("auroc", "separation of gold from the others", chance=0.5)
AVERAGE_PRECISION = Metric("average_precision", "mean precision over gold, going down the scores")


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """Measured effects of units of tokens on the answer.

    Attributes:
        units: token positions of each unit.
        effects: ``[units]``, drop of the answer's log-probability in nats when no later token may read the unit.
        min_units: fewer decide nothing.
        kind: what was measured, for the record.
    """

    units: Sequence[Sequence[int]]
    effects: Float64[np.ndarray, " units"]
    min_units: int = MIN_UNITS
    kind: str = "knock-out"

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing."""
        return reason_against(self.effects, self.min_units)

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Compare the summed scores of the units with their effects."""
        scores = explanation.of_units(self.units).double().cpu().numpy()
        effects = self.effects
        # Controls of the partial correlation: late and long units have larger effects, for any content.
        position = [float(np.mean(unit)) for unit in self.units]
        length = [float(len(unit)) for unit in self.units]
        controls = [position, length]
        return {
            SHARE_OF_3.name: metrics.share_of_best(scores, effects, k=3),
            AUROC_OF_2.name: metrics.auroc_of_largest(scores, effects, k=2),
            SPEARMAN.name: metrics.rank_correlation(scores, effects),
            PARTIAL.name: metrics.partial_rank_correlation(scores, effects, controls),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "units": [list(unit) for unit in self.units],
            "effects": self.effects.tolist(),
            "minimum": self.min_units,
            "unusable": self.unusable,
        }

    @classmethod
    def restored(cls, subject: Subject, values: Mapping[str, Any]) -> UnitEffects:
        """Build the truth again from what :meth:`to_dict` gave; ``subject`` is not needed."""
        effects = np.array(values["effects"], dtype=np.float64)
        return cls(values["units"], effects, min_units=values["minimum"], kind=values["kind"])


@dataclass(frozen=True, eq=False)
class PairEffects:
    """Measured effects of what one unit reads from another.

    Attributes:
        units: token positions of each unit.
        pairs: (reader, source) of each measured pair, as indices of units.
        effects: ``[pairs]``, in nats; higher is a stronger dependence.
        min_pairs: fewer decide nothing.
        kind: what was measured, for the record.
    """

    units: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int]]
    effects: Float64[np.ndarray, " pairs"]
    min_pairs: int = MIN_UNITS
    kind: str = "edge knock-out"

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing."""
        return reason_against(self.effects, self.min_pairs, "pairs of units")

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Compare the summed edge scores between units with the effects."""
        between = explanation.between_units(self.units).double().cpu().numpy()
        effects = self.effects
        found = []
        # Controls of the partial correlation: near and large pairs have larger effects.
        distance = []
        size = []
        for reader, source in self.pairs:
            found.append(between[reader, source])
            distance.append(float(reader - source))
            num_cells = len(self.units[reader]) * len(self.units[source])
            size.append(float(num_cells))
        scores = np.array(found)
        controls = [distance, size]
        return {
            SPEARMAN.name: metrics.rank_correlation(scores, effects),
            PARTIAL_DISTANCE.name: metrics.partial_rank_correlation(scores, effects, controls),
            AUROC_OF_2.name: metrics.auroc_of_largest(scores, effects, k=2),
            PER_READER.name: self._per_reader(scores),
        }

    def _per_reader(self, scores: Float64[np.ndarray, " pairs"]) -> float:
        """Average the rank correlation over readers, which differ in how strongly they depend on anything."""
        readers = np.array([reader for reader, _ in self.pairs])
        defined = []
        for reader in np.unique(readers):
            of_reader = readers == reader
            correlation = metrics.rank_correlation(scores[of_reader], self.effects[of_reader])
            # A reader with fewer than three sources has no correlation.
            if not np.isnan(correlation):
                defined.append(correlation)
        if not defined:
            return float("nan")
        return float(np.mean(defined))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "units": [list(unit) for unit in self.units],
            "pairs": [list(pair) for pair in self.pairs],
            "effects": self.effects.tolist(),
            "minimum": self.min_pairs,
            "unusable": self.unusable,
        }

    @classmethod
    def restored(cls, subject: Subject, values: Mapping[str, Any]) -> PairEffects:
        """Build the truth again from what :meth:`to_dict` gave; ``subject`` is not needed."""
        pairs = [(reader, source) for reader, source in values["pairs"]]
        effects = np.array(values["effects"], dtype=np.float64)
        return cls(values["units"], pairs, effects, min_pairs=values["minimum"], kind=values["kind"])


@dataclass(frozen=True, eq=False)
class GoldUnits:
    """Units that are known to be evidence, among units that are not.

    Attributes:
        units: token positions of each candidate unit; single tokens are units of length 1.
        gold: ``[units]``, True for evidence.
        kind: where the labels come from.
    """

    units: Sequence[Sequence[int]]
    gold: Bool[np.ndarray, " units"]
    kind: str = "gold"

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing."""
        return reason_against_gold(self.gold)

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Compare the mean score of each unit's tokens with the labels."""
        # The mean, not the sum: a long unit holds more tokens than a short one.
        sums = explanation.of_units(self.units).double().cpu().numpy()
        length = np.array([len(unit) for unit in self.units])
        return gold_figures(sums / length, self.gold)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "units": [list(unit) for unit in self.units],
            "gold": self.gold.tolist(),
            "unusable": self.unusable,
        }


@dataclass(frozen=True, eq=False)
class GoldPairs:
    """Pairs of units of which the later one is known to follow from the earlier one, among pairs of which it does not.

    Attributes:
        units: token positions of each unit.
        pairs: (reader, source), as indices of units.
        gold: ``[pairs]``, True for a premise.
        kind: where the labels come from.
    """

    units: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int]]
    gold: Bool[np.ndarray, " pairs"]
    kind: str = "gold"

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing."""
        return reason_against_gold(self.gold)

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Compare the mean edge score between units with the labels."""
        between = explanation.between_units(self.units).double().cpu().numpy()
        scores = []
        for reader, source in self.pairs:
            # The mean, not the sum: a long unit holds more edges than a short one.
            num_cells = len(self.units[reader]) * len(self.units[source])
            scores.append(between[reader, source] / num_cells)
        return gold_figures(np.array(scores), self.gold)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "units": [list(unit) for unit in self.units],
            "pairs": [list(pair) for pair in self.pairs],
            "gold": self.gold.tolist(),
            "unusable": self.unusable,
        }


def gold_figures(scores: Float64[np.ndarray, " units"], gold: Bool[np.ndarray, " units"]) -> dict[str, float]:
    """Compute the figures of gold labels."""
    return {
        PRECISION.name: metrics.precision_at(scores, gold, share=0.1),
        AUROC.name: metrics.auroc(scores, gold),
        AVERAGE_PRECISION.name: metrics.average_precision(scores, gold),
    }


def reason_against(effects: Float64[np.ndarray, " units"], minimum: int, what: str = "units") -> str | None:
    """Return why measured effects decide nothing; None if they do."""
    # Too few units come first: the other reasons need at least one effect.
    if len(effects) < minimum:
        return f"{len(effects)} {what}, fewer than the {minimum} that a ranking needs"
    if np.abs(effects).max() < SMALLEST_EFFECT:
        return f"all effects are 0: none changes the answer by {SMALLEST_EFFECT} nats"
    if np.ptp(effects) < SMALLEST_EFFECT:
        return f"all effects are equal: they differ by less than {SMALLEST_EFFECT} nats"
    return None


def reason_against_gold(gold: Bool[np.ndarray, " units"]) -> str | None:
    """Return why labels decide nothing; None if they do."""
    num_gold = int(gold.sum())
    if num_gold == 0:
        return "no unit is gold"
    if num_gold == len(gold):
        return "every unit is gold"
    return None
