"""Figures that compare scores with a truth: ranks of measured effects, gold masks, and curves of deletion.

Every function is pure: it takes one-dimensional sequences, arrays or tensors, computes in float64 and returns a float
or an array. Units are whatever is scored: tokens, words, lines or edges. A figure that is not defined is NaN.

Where a fixed number of units is chosen by score, the earlier of two equal scores comes first. AUROC, average precision
and rank correlation treat equal scores as equal instead, so that the order of the units does not change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowgraph.analysis.statistics import spearman
from flowgraph.errors import InvalidInputError

Values = Sequence[float] | NDArray | Tensor
"""One number per unit."""
Mask = Sequence[bool] | NDArray | Tensor
"""One truth value per unit."""
ValueOfKept = Callable[[NDArray[np.bool_]], Values]
"""``[steps, units]``, True: the unit is kept, to the value of the model's answer at each step."""

ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of units at which ERASER removes or keeps the units of highest score."""

_MIN_PAIRS = 3
# Residuals below this share of a variable's spread are rounding: nothing is left beside the controls.
_COLLINEAR = 1e-9
# Products such as .07 * 100 lie a rounding error above a whole number.
_ROUNDING_DIGITS = 9


# Measured effects ----------------------------------------------------------------------------------------------------


def share_of_best(scores: Values, effects: Values, k: int = 3) -> float:
    r"""Compute the share of all positive effects that lies in the k units of highest score.

    .. math:: \frac{\sum_{u \in \mathrm{top}_k(s)} \max(e_u, 0)}{\sum_u \max(e_u, 0)}

    Args:
        scores: s, ``[units]``; the earlier of two equal scores is chosen first.
        effects: e, ``[units]``: what removing a unit does to the answer; a positive effect supports the answer.
        k: number of units that are chosen; all where there are fewer.

    Returns:
        A share in [0, 1], 1 is best; a random order gives ``k / units`` on average. NaN where no effect is positive.

    Raises:
        InvalidInputError: lengths differ, numbers that are not finite, or k below 1.

    Example:
        >>> share_of_best([3, 1, 2], effects=[6, 3, -1], k=1)
        0.6666666666666666
    """
    ranked, measured = _paired("scores", scores, "effects", effects)
    _check_count("k", k)
    positive = np.maximum(measured, 0)
    if not positive.any():
        return math.nan
    # Divided by the largest first, so that a sum of large effects cannot overflow.
    positive = positive / positive.max()
    chosen = _order(ranked)[:k]
    share = float(positive[chosen].sum() / positive.sum())
    # Summation orders differ between the two sums, so the ratio can exceed 1 by a rounding error.
    return min(1.0, share)


def auroc_of_largest(scores: Values, effects: Values, k: int = 2) -> float:
    """Compute how well scores separate the k units of largest positive effect from the others.

    The formula is that of :func:`auroc`; gold are the k largest effects, of equal effects the earlier ones. Units
    without a positive effect are never gold, so fewer than k units may be.

    Args:
        scores: ``[units]``.
        effects: ``[units]``: what removing a unit does to the answer.
        k: number of gold units.

    Returns:
        A probability in [0, 1], chance .5. NaN where no effect is positive, or where every unit is gold.

    Raises:
        InvalidInputError: lengths differ, numbers that are not finite, or k below 1.

    Example:
        >>> auroc_of_largest([3, 1, 2, 0], effects=[.9, .1, .2, .8], k=2)
        0.5
    """
    ranked, measured = _paired("scores", scores, "effects", effects)
    _check_count("k", k)
    largest = _order(measured)[:k]
    is_largest = np.zeros(measured.size, dtype=bool)
    is_largest[largest] = True
    is_gold = is_largest & (measured > 0)
    return auroc(ranked, is_gold)


def rank_correlation(scores: Values, effects: Values) -> float:
    """Compute Spearman's rank correlation of scores and effects; equal values share their mean rank.

    Args:
        scores: ``[units]``.
        effects: ``[units]``, signed.

    Returns:
        A number in [-1, 1], chance 0. NaN for fewer than three units, or where one side is constant.

    Raises:
        InvalidInputError: lengths differ, or numbers that are not finite.

    Example:
        >>> round(rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]), 3)
        0.8
    """
    ranked, measured = _paired("scores", scores, "effects", effects)
    return spearman(ranked, measured)


def partial_rank_correlation(scores: Values, effects: Values, controls: Sequence[Values]) -> float:
    r"""Compute Spearman's correlation of scores and effects with the ranks of controls held constant.

    With r the mean ranks and X = [1, r(control 1), r(control 2), ...]:

    .. math:: \rho = \mathrm{corr}(r_s - X X^{+} r_s,\; r_e - X X^{+} r_e)

    that is, Pearson's correlation of what least squares leaves of both ranks. It asks whether scores order the effects
    better than the controls (position, length) explain.

    Args:
        scores: s, ``[units]``.
        effects: e, ``[units]``, signed.
        controls: C sequences of ``[units]``; constant ones change nothing.

    Returns:
        A number in [-1, 1], chance 0; without controls :func:`rank_correlation`. NaN where scores or effects are an
        exact function of the controls, or for fewer than three units beyond the number of controls that differ.

    Raises:
        InvalidInputError: lengths differ, or numbers that are not finite.

    Source: Conover, Practical Nonparametric Statistics, 3rd edition, section 5.4.

    Example:
        >>> position = [0, 1, 2, 3, 4, 5]
        >>> round(partial_rank_correlation([0, 2, 1, 3, 5, 4], [1, 2, 0, 3, 5, 4], [position]), 3)
        0.879
    """
    # Imported here so that `import flowgraph` stays quick.
    from scipy import stats

    ranked, measured = _paired("scores", scores, "effects", effects)
    num_units = measured.size

    # X: the centred ranks of the controls that vary. Centring takes the place of the column of ones.
    columns = []
    for number, control in enumerate(controls):
        checked, _ = _paired(f"controls[{number}]", control, "effects", measured)
        ranks = stats.rankdata(checked)
        if np.ptp(ranks) > 0:
            columns.append(_centred(ranks))
    predictors = np.zeros((num_units, 0))
    num_predictors = 0
    if columns:
        predictors = np.stack(columns, axis=1)
        num_predictors = int(np.linalg.matrix_rank(predictors))
    if num_units < _MIN_PAIRS + num_predictors:
        return math.nan

    # What the controls leave of the ranks of both sides, at length 1: r - X X^+ r.
    remainders = []
    for values in (ranked, measured):
        ranks = _centred(stats.rankdata(values))
        spread = np.linalg.norm(ranks)
        coefficients = np.linalg.lstsq(predictors, ranks)[0]
        remainder = ranks - predictors @ coefficients
        length = np.linalg.norm(remainder)
        if length <= _COLLINEAR * spread:
            return math.nan
        remainders.append(remainder / length)

    # Rounding can put the correlation just outside of [-1, 1].
    correlation = remainders[0] @ remainders[1]
    return float(np.clip(correlation, -1, 1))


# Gold masks ----------------------------------------------------------------------------------------------------------


def auroc(scores: Values, gold: Mask) -> float:
    r"""Compute the probability that a gold unit has a higher score than another unit; equal scores count half.

    .. math:: \frac{1}{n_+ n_-} \sum_{i \in +} \sum_{j \in -} [s_i > s_j] + \tfrac12 [s_i = s_j]

    Args:
        scores: s, ``[units]``.
        gold: ``[units]``, True for gold units.

    Returns:
        A probability in [0, 1], chance .5. NaN where no unit or every unit is gold.

    Raises:
        InvalidInputError: lengths differ, scores are not finite, or gold is not a mask.

    Cost: one sort.

    Source: Hanley and McNeil, Radiology 143, 1982 (the area equals the Mann-Whitney statistic).

    Example:
        >>> auroc([.9, .5, .5, .1], [True, False, True, False])
        0.875
    """
    # Imported here so that `import flowgraph` stays quick.
    from scipy import stats

    ranked, is_gold = _with_gold(scores, gold)
    num_gold = int(is_gold.sum())
    num_other = ranked.size - num_gold
    if num_gold == 0 or num_other == 0:
        return math.nan
    # Ranks count the units below plus half of the equal ones; those among gold units themselves are subtracted.
    ranks = stats.rankdata(ranked)
    rank_sum = ranks[is_gold].sum()
    num_pairs_won = rank_sum - num_gold * (num_gold + 1) / 2
    num_pairs = num_gold * num_other
    return float(num_pairs_won / num_pairs)


def average_precision(scores: Values, gold: Mask) -> float:
    r"""Compute the mean precision over gold units, going down the scores; equal scores are passed together.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    over the distinct scores n in descending order, with precision P and recall R of the units at or above the score.

    Args:
        scores: ``[units]``.
        gold: ``[units]``, True for gold units.

    Returns:
        A number in (0, 1], 1 is best; constant scores give the share of gold units. NaN where no unit is gold.

    Raises:
        InvalidInputError: lengths differ, scores are not finite, or gold is not a mask.

    Source: the step-wise sum without interpolation, as scikit-learn's ``average_precision_score``.

    Example:
        >>> average_precision([.9, .8, .7], [True, False, True])
        0.8333333333333333
    """
    ranked, is_gold = _with_gold(scores, gold)
    num_gold = int(is_gold.sum())
    if num_gold == 0:
        return math.nan
    order = _order(ranked)
    descending = ranked[order]
    # Precision and recall are read where a group of equal scores ends.
    last_of_group = np.append(np.diff(descending) != 0, True)
    num_found = np.cumsum(is_gold[order])[last_of_group]
    num_chosen = np.flatnonzero(last_of_group) + 1

    # (R_n - R_{n-1}) P_n, with the number of gold units taken out of the sum.
    newly_found = np.diff(num_found, prepend=0)
    terms = newly_found * num_found / num_chosen
    return float(terms.sum() / num_gold)


def precision_at(scores: Values, gold: Mask, share: float = 0.1) -> float:
    r"""Compute the share of gold units among those of highest score.

    .. math:: |\mathrm{top}_n(s) \cap \mathrm{gold}| / n, \qquad n = \lceil \mathrm{share} \cdot \mathrm{units} \rceil

    Args:
        scores: s, ``[units]``; the earlier of two equal scores is chosen first.
        gold: ``[units]``, True for gold units.
        share: of the units that are chosen, in (0, 1]; at least one unit is.

    Returns:
        A share in [0, 1]; at most ``gold / n`` where fewer units are gold than chosen; a random order gives the share
        of gold units on average. NaN where no unit is gold.

    Raises:
        InvalidInputError: lengths differ, scores are not finite, gold is not a mask, or a share outside (0, 1].

    Example:
        >>> precision_at([.9, .8, .7, .6], [True, False, True, False], share=.5)
        0.5
    """
    ranked, is_gold = _with_gold(scores, gold)
    num_chosen = _count_of_share("share", share, ranked.size)
    if not is_gold.any():
        return math.nan
    chosen = _order(ranked)[:num_chosen]
    return float(is_gold[chosen].mean())


def recall_at(scores: Values, gold: Mask, share: float = 0.1) -> float:
    r"""Compute the share of all gold units that is among the units of highest score.

    .. math:: |\mathrm{top}_n(s) \cap \mathrm{gold}| / |\mathrm{gold}|

    with n as in :func:`precision_at`.

    Args:
        scores: s, ``[units]``; the earlier of two equal scores is chosen first.
        gold: ``[units]``, True for gold units.
        share: of the units that are chosen, in (0, 1]; at least one unit is.

    Returns:
        A share in [0, 1]; a random order gives ``n / units`` on average. NaN where no unit is gold.

    Raises:
        InvalidInputError: as :func:`precision_at`.

    Example:
        >>> recall_at([.9, .8, .7, .6], [True, True, True, False], share=.5)
        0.6666666666666666
    """
    ranked, is_gold = _with_gold(scores, gold)
    num_chosen = _count_of_share("share", share, ranked.size)
    if not is_gold.any():
        return math.nan
    chosen = _order(ranked)[:num_chosen]
    return float(is_gold[chosen].sum() / is_gold.sum())


# Curves of deletion and insertion ------------------------------------------------------------------------------------


def deletion_masks(scores: Values, num_steps: int = 20) -> NDArray[np.bool_]:
    """List which units are kept when those of highest score are removed in groups of equal size.

    Args:
        scores: ``[units]``; the earlier of two equal scores is removed first.
        num_steps: number of groups; one unit a group where there are fewer units. The first groups are one unit
            larger where the units do not divide evenly.

    Returns:
        ``[steps + 1, units]``: row 0 keeps every unit, the last row none. The masks of an insertion are the complement.

    Raises:
        InvalidInputError: no unit, scores that are not finite, or fewer than one step.

    Example:
        >>> deletion_masks([1, 3, 2], num_steps=2).astype(int).tolist()
        [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    """
    ranked = _vector("scores", scores)
    _check_count("num_steps", num_steps)
    if ranked.size == 0:
        raise InvalidInputError("scores: must hold at least one unit, got none; leave out texts without units")
    num_units = ranked.size
    groups = np.array_split(_order(ranked), min(num_steps, num_units))
    # A unit is removed at the step of its group, and stays removed.
    kept = np.ones((len(groups) + 1, num_units), dtype=bool)
    for step, group in enumerate(groups, start=1):
        kept[step:, group] = False
    return kept


def deletion_curve(scores: Values, value_of_kept: ValueOfKept, num_steps: int = 20) -> NDArray[np.float64]:
    """Measure the answer while the units of highest score are removed first.

    Args:
        scores: ``[units]``.
        value_of_kept: measures the answer (log-probability or probability) for masks ``[steps + 1, units]`` of kept
            units; called once.
        num_steps: see :func:`deletion_masks`.

    Returns:
        ``[steps + 1]``: from all units to none. A faithful explanation makes it fall early.

    Raises:
        InvalidInputError: as :func:`deletion_masks`, or values that are not one finite number per mask.

    Source: RISE, Petsiuk et al. 2018, arXiv 1806.07421, section 4.2.

    Example:
        >>> curve = deletion_curve([2, 1], lambda kept: kept @ [.75, .25])
        >>> curve.tolist()
        [1.0, 0.25, 0.0]
    """
    return _measured(deletion_masks(scores, num_steps), value_of_kept)


def insertion_curve(scores: Values, value_of_kept: ValueOfKept, num_steps: int = 20) -> NDArray[np.float64]:
    """Measure the answer while the units of highest score are restored first.

    Args:
        scores: ``[units]``.
        value_of_kept: as in :func:`deletion_curve`.
        num_steps: see :func:`deletion_masks`.

    Returns:
        ``[steps + 1]``: from no unit to all. A faithful explanation makes it rise early.

    Raises:
        InvalidInputError: as :func:`deletion_curve`.

    Source: RISE, Petsiuk et al. 2018, arXiv 1806.07421, section 4.2.

    Example:
        >>> curve = insertion_curve([2, 1], lambda kept: kept @ [.75, .25])
        >>> curve.tolist()
        [0.0, 0.75, 1.0]
    """
    return _measured(~deletion_masks(scores, num_steps), value_of_kept)


def area_under(curve: Values) -> float:
    r"""Compute the mean height of a curve over equal steps, by trapezoids.

    .. math:: \frac{1}{n} \sum_{i=1}^{n} \frac{y_{i-1} + y_i}{2}

    Args:
        curve: y, ``[steps + 1]``.

    Returns:
        The area in the unit of the curve: for a deletion lower is better, for an insertion higher is better. NaN for
        fewer than two points.

    Raises:
        InvalidInputError: numbers that are not finite.

    Source: RISE, Petsiuk et al. 2018, arXiv 1806.07421, section 4.2.

    Example:
        >>> area_under([1, .25, 0])
        0.375
    """
    heights = _vector("curve", curve)
    if heights.size < 2:
        return math.nan
    sums_of_neighbours = heights[:-1] + heights[1:]
    return float(sums_of_neighbours.mean() / 2)


def response_curve(curve: Values, kind: Literal["deletion", "insertion"] = "deletion") -> NDArray[np.float64]:
    r"""Rescale a curve to the share of the answer's value that is left, from 1 to 0 (insertion: from 0 to 1).

    With b the value without any unit and v the value with all of them, for a deletion:

    .. math:: r_i = \min_{j \le i} \mathrm{clip}\!\left(\frac{y_j - b}{v - b}, 0, 1\right)

    and the running maximum for an insertion: an answer once lost stays lost, and once restored stays restored.

    Args:
        curve: y, ``[steps + 1]``, of :func:`deletion_curve` or :func:`insertion_curve`.
        kind: which of the two.

    Returns:
        ``[steps + 1]``, monotone. NaN everywhere where removing all units does not lower the value (v <= b): there is
        no support to distribute.

    Raises:
        InvalidInputError: numbers that are not finite, fewer than two points, or another kind.

    Source: MAS, Walker et al. 2024 (Attribution Quality Metrics with Magnitude Alignment, IJCAI 2024).

    Example:
        >>> response_curve([4., 1., 2., 0.]).tolist()
        [1.0, 0.25, 0.25, 0.0]
    """
    heights = _vector("curve", curve)
    _check_kind(kind)
    if heights.size < 2:
        raise InvalidInputError(f"curve: must hold two points or more, got {heights.size}; measure both ends")
    # The same reading for both kinds: an insertion is read from its end.
    falling = heights if kind == "deletion" else heights[::-1]
    full = falling[0]
    empty = falling[-1]
    if full <= empty:
        return np.full(heights.size, np.nan)
    shares = np.clip((heights - empty) / (full - empty), 0, 1)
    # The running extreme makes the curve monotone.
    if kind == "deletion":
        return np.minimum.accumulate(shares)
    return np.maximum.accumulate(shares)


def magnitude_curve(scores: Values, num_steps: int = 20) -> NDArray[np.float64]:
    r"""Compute the share of all positive score that is still kept at each step of a deletion.

    .. math:: d_i = \sum_{u \text{ kept at } i} \max(s_u, 0) \Big/ \sum_u \max(s_u, 0)

    Args:
        scores: s, ``[units]``; negative scores have no magnitude to align with.
        num_steps: see :func:`deletion_masks`.

    Returns:
        ``[steps + 1]``, from 1 to 0. NaN everywhere where no score is positive.

    Raises:
        InvalidInputError: as :func:`deletion_masks`.

    Source: MAS (density response), Walker et al. 2024.

    Example:
        >>> magnitude_curve([3, 1]).tolist()
        [1.0, 0.25, 0.0]
    """
    ranked = _vector("scores", scores)
    positive = np.maximum(ranked, 0)
    kept = deletion_masks(ranked, num_steps)
    if not positive.any():
        return np.full(len(kept), np.nan)
    # Divided by the largest first, so that a sum of large scores cannot overflow.
    positive = positive / positive.max()
    return kept @ positive / positive.sum()


def rise(curve: Values, kind: Literal["deletion", "insertion"] = "deletion") -> float:
    """Compute the area under the rescaled curve of :func:`response_curve`.

    Args:
        curve: ``[steps + 1]``, of :func:`deletion_curve` or :func:`insertion_curve`.
        kind: which of the two.

    Returns:
        A number in [0, 1]: for a deletion lower is better, for an insertion higher is better. NaN where removing all
        units does not lower the value.

    Raises:
        InvalidInputError: as :func:`response_curve`.

    Source: RISE, Petsiuk et al. 2018, arXiv 1806.07421; rescaled as in MAS, so that items are comparable.

    Example:
        >>> rise([4., 1., 0.])
        0.375
    """
    response = response_curve(curve, kind)
    if np.isnan(response).any():
        return math.nan
    return area_under(response)


def mas(
    scores: Values,
    curve: Values,
    kind: Literal["deletion", "insertion"] = "deletion",
) -> float:
    r"""Compute the area under a curve that is penalised where it departs from the magnitudes of the scores.

    With r the response (:func:`response_curve`) and d the magnitudes (:func:`magnitude_curve`; for an insertion 1 - d):

    .. math:: \text{deletion: } \mathrm{area}(\min(1, r + |r - d|)), \quad
              \text{insertion: } \mathrm{area}(\max(0, r - |r - d|))

    An explanation with the right order and wrong magnitudes has a worse value than under :func:`rise`.

    Args:
        scores: s, ``[units]``: those that the curve was measured with.
        curve: ``[steps + 1]``: its number of steps determines the groups of units (:func:`deletion_masks`).
        kind: of the curve.

    Returns:
        A number in [0, 1]: for a deletion lower is better, for an insertion higher is better. NaN where removing all
        units does not lower the value, or where no score is positive.

    Raises:
        InvalidInputError: numbers that are not finite, or a curve of more steps than there are units.

    Source: MAS, Walker et al. 2024 (Attribution Quality Metrics with Magnitude Alignment, IJCAI 2024).

    Example:
        >>> mas([3, 1], [4., 1., 0.])
        0.375
        >>> mas([1, 1], [4., 1., 0.])
        0.5
    """
    ranked = _vector("scores", scores)
    heights = _vector("curve", curve)
    num_steps = heights.size - 1
    if not 1 <= num_steps <= ranked.size:
        raise InvalidInputError(
            f"curve: must hold between 2 and {ranked.size + 1} points for {ranked.size} scores, got {heights.size}; "
            "measure it with the same scores"
        )
    response = response_curve(heights, kind)
    magnitude = magnitude_curve(ranked, num_steps)
    if np.isnan(response).any() or np.isnan(magnitude).any():
        return math.nan

    # The penalty makes either curve worse: higher for a deletion, lower for an insertion.
    if kind == "deletion":
        penalty = np.abs(response - magnitude)
        return area_under(np.minimum(1, response + penalty))
    penalty = np.abs(response - (1 - magnitude))
    return area_under(np.maximum(0, response - penalty))


# Removal and retention at fixed shares -------------------------------------------------------------------------------


def masks_at(scores: Values, shares: Sequence[float] = ERASER_SHARES) -> NDArray[np.bool_]:
    """List which units are among those of highest score at each share.

    Args:
        scores: ``[units]``; the earlier of two equal scores is chosen first.
        shares: each in (0, 1]; at least one unit is chosen.

    Returns:
        ``[shares, units]``, True for chosen units: kept for :func:`sufficiency`; :func:`comprehensiveness` keeps the
        complement.

    Raises:
        InvalidInputError: scores that are not finite, or a share outside (0, 1].

    Example:
        >>> masks_at([1, 3, 2], shares=[.5]).astype(int).tolist()
        [[0, 1, 1]]
    """
    ranked = _vector("scores", scores)
    order = _order(ranked)
    chosen = np.zeros((len(shares), ranked.size), dtype=bool)
    for number, share in enumerate(shares):
        num_chosen = _count_of_share(f"shares[{number}]", share, ranked.size)
        chosen[number, order[:num_chosen]] = True
    return chosen


def comprehensiveness(full: float, values: Values) -> float:
    r"""Compute how much the answer loses on average when the units of highest score are removed.

    .. math:: \frac{1}{K} \sum_k \left( m(x) - m(x \setminus r_k) \right)

    Args:
        full: m(x), the value of the answer (probability or log-probability) with every unit.
        values: ``[K]``: the value without the units r_k of highest score, at K shares (see :func:`masks_at`).

    Returns:
        A number in the unit of the values; higher is better, and values below 0 mean that removal helped the answer.
        NaN without values.

    Raises:
        InvalidInputError: numbers that are not finite.

    Source: ERASER, DeYoung et al. 2020, arXiv 1911.03429, section 4.1 (AOPC). The paper's sum starts with an empty
    removal, whose term is 0: pass ``full`` as one of the values for its denominator.

    Example:
        >>> comprehensiveness(1.0, [.5, .25])
        0.625
    """
    return _mean_loss(full, values)


def sufficiency(full: float, values: Values) -> float:
    r"""Compute how much the answer loses on average when only the units of highest score are kept.

    .. math:: \frac{1}{K} \sum_k \left( m(x) - m(r_k) \right)

    Args:
        full: m(x), the value of the answer (probability or log-probability) with every unit.
        values: ``[K]``: the value with the units r_k of highest score alone, at K shares (see :func:`masks_at`).

    Returns:
        A number in the unit of the values; lower is better. NaN without values.

    Raises:
        InvalidInputError: numbers that are not finite.

    Source: ERASER, DeYoung et al. 2020, arXiv 1911.03429, section 4.1 (AOPC).

    Example:
        >>> sufficiency(1.0, [.5, .75])
        0.375
    """
    return _mean_loss(full, values)


# Shared steps --------------------------------------------------------------------------------------------------------


def _order(scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """List units from the highest score to the lowest; of equal scores the earlier first."""
    return np.argsort(-scores, kind="stable")


def _centred(values: NDArray) -> NDArray[np.float64]:
    """Subtract the mean."""
    return values - values.mean()


def _mean_loss(full: float, values: Values) -> float:
    """Average ``full - values``; NaN without values."""
    measured = _vector("values", values)
    if not math.isfinite(full):
        raise InvalidInputError(f"full: must be finite, got {full}; measure the answer with every unit")
    if measured.size == 0:
        return math.nan
    return float((full - measured).mean())


def _measured(kept: NDArray[np.bool_], value_of_kept: ValueOfKept) -> NDArray[np.float64]:
    """Measure the answer for every mask, and check that there is one value for each."""
    values = _vector("value_of_kept", value_of_kept(kept))
    if values.size != len(kept):
        raise InvalidInputError(
            f"value_of_kept: must return {len(kept)} values, one for each mask, got {values.size}; measure every row"
        )
    return values


def _vector(argument: str, values: Values) -> NDArray[np.float64]:
    """Read numbers as one float64 vector, and check that they are finite."""
    # numpy reads no tensor that requires a gradient or lies on another device.
    if isinstance(values, Tensor):
        array = values.detach().cpu().double().numpy()
    else:
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise InvalidInputError(
                f"{argument}: must be a sequence of numbers, got {type(values).__name__} with other entries; pass one "
                "number for each unit"
            ) from None
    if array.ndim != 1:
        raise InvalidInputError(
            f"{argument}: must have one dimension, got shape {tuple(array.shape)}; pass one number for each unit"
        )
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InvalidInputError(
            f"{argument}: must be finite, got {array[position]} at position {position}; leave such units out"
        )
    return array


def _paired(
    name: str, values: Values, other_name: str, others: Values
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read two vectors of the same length."""
    one = _vector(name, values)
    other = _vector(other_name, others)
    if one.size != other.size:
        raise InvalidInputError(
            f"{name}: must have one entry for each of the {other.size} {other_name}, got {one.size}; pass the same "
            "units in both"
        )
    return one, other


def _with_gold(scores: Values, gold: Mask) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Read scores and a mask of the same length."""
    ranked, marks = _paired("scores", scores, "gold", gold)
    is_mark = np.isin(marks, (0, 1))
    if not is_mark.all():
        raise InvalidInputError(
            f"gold: must be a mask of True and False, got {float(marks[~is_mark][0])}; for measured "
            "effects use rank_correlation or auroc_of_largest"
        )
    return ranked, marks.astype(bool)


def _count_of_share(argument: str, share: float, num_units: int) -> int:
    """Return how many units a share chooses: rounded up, at least one."""
    if not 0 < share <= 1:
        raise InvalidInputError(f"{argument}: must lie in (0, 1], got {share}; pass a share of the units")
    exact = round(share * num_units, _ROUNDING_DIGITS)
    return max(1, math.ceil(exact))


def _check_count(argument: str, count: int) -> None:
    """Check that a count is a positive integer.

    Raises:
        InvalidInputError: another count.
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < 1:
        raise InvalidInputError(f"{argument}: must be a positive integer, got {count!r}; pass 1 or more")


def _check_kind(kind: str) -> None:
    """Check the kind of a curve.

    Raises:
        InvalidInputError: another kind.
    """
    if kind not in ("deletion", "insertion"):
        raise InvalidInputError(f"kind: must be 'deletion' or 'insertion', got {kind!r}; name the kind of the curve")
