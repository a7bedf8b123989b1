"""The metrics of the evaluation from their definitions: one comparison, one pair, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

Numbers = Sequence[float]


def ranking(scores: Numbers) -> list[int]:
    """Take the best of the units that are left, again and again; of equal ones the first."""
    left = list(range(len(scores)))
    order = []
    while left:
        best = left[0]
        for unit in left:
            if scores[unit] > scores[best]:
                best = unit
        order.append(best)
        left.remove(best)
    return order


def share_of_best(scores: Numbers, effects: Numbers, k: int) -> float:
    total = sum(effect for effect in effects if effect > 0)
    if total == 0:
        return math.nan
    found = sum(effects[unit] for unit in ranking(scores)[:k] if effects[unit] > 0)
    return found / total


def auroc(scores: Numbers, gold: Sequence[bool]) -> float:
    """Count the pairs of a gold unit and another one that are in the right order."""
    won = 0.0
    pairs = 0
    for i, is_gold in enumerate(gold):
        for j, other_is_gold in enumerate(gold):
            if is_gold and not other_is_gold:
                pairs += 1
                won += 1.0 if scores[i] > scores[j] else 0.0
                won += 0.5 if scores[i] == scores[j] else 0.0
    return won / pairs if pairs else math.nan


def auroc_of_largest(scores: Numbers, effects: Numbers, k: int) -> float:
    largest = ranking(effects)[:k]
    return auroc(scores, [unit in largest and effects[unit] > 0 for unit in range(len(effects))])


def mean_ranks(values: Numbers) -> list[float]:
    """Count, for each value, how many are below, and half of the others that are equal."""
    ranks = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        ranks.append(below + (equal + 1) / 2)
    return ranks


def pearson(x: Numbers, y: Numbers) -> float:
    mean_x = sum(x) / len(x)
    mean_y = sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    square_x = sum((a - mean_x) ** 2 for a in x)
    square_y = sum((b - mean_y) ** 2 for b in y)
    return products / math.sqrt(square_x * square_y)


def rank_correlation(scores: Numbers, effects: Numbers) -> float:
    if len(scores) < 3 or len(set(scores)) == 1 or len(set(effects)) == 1:
        return math.nan
    return pearson(mean_ranks(scores), mean_ranks(effects))


def partial_rank_correlation(scores: Numbers, effects: Numbers, controls: Sequence[Numbers]) -> float:
    """Remove one control after another by the recursion of partial correlations (Yule 1907)."""
    ranked = [mean_ranks(values) for values in (scores, effects, *controls)]

    def partial(i: int, j: int, given: tuple[int, ...]) -> float:
        if not given:
            return pearson(ranked[i], ranked[j])
        k, rest = given[0], given[1:]
        r_ij = partial(i, j, rest)
        r_ik = partial(i, k, rest)
        r_jk = partial(j, k, rest)
        return (r_ij - r_ik * r_jk) / math.sqrt((1 - r_ik**2) * (1 - r_jk**2))

    return partial(0, 1, tuple(range(2, len(ranked))))


def average_precision(scores: Numbers, gold: Sequence[bool]) -> float:
    """Average, over gold units, the precision of all units whose score is at least as high."""
    precisions = []
    for unit, is_gold in enumerate(gold):
        if is_gold:
            chosen = [other for other in range(len(gold)) if scores[other] >= scores[unit]]
            precisions.append(sum(gold[other] for other in chosen) / len(chosen))
    return sum(precisions) / len(precisions) if precisions else math.nan


def precision_at(scores: Numbers, gold: Sequence[bool], num_chosen: int) -> float:
    if not any(gold):
        return math.nan
    return sum(gold[unit] for unit in ranking(scores)[:num_chosen]) / num_chosen


def groups(scores: Numbers, num_steps: int) -> list[list[int]]:
    """Deal the ranking out to steps, the first ones one unit larger where it does not divide evenly."""
    order = ranking(scores)
    num_units = len(order)
    num_groups = min(num_steps, num_units)
    result = []
    start = 0
    for step in range(num_groups):
        size = num_units // num_groups + (1 if step < num_units % num_groups else 0)
        result.append(order[start : start + size])
        start += size
    return result


def deletion_curve(scores: Numbers, value: Callable[[set[int]], float], num_steps: int) -> list[float]:
    kept = set(range(len(scores)))
    curve = [value(kept)]
    for group in groups(scores, num_steps):
        kept = kept - set(group)
        curve.append(value(kept))
    return curve


def insertion_curve(scores: Numbers, value: Callable[[set[int]], float], num_steps: int) -> list[float]:
    kept: set[int] = set()
    curve = [value(kept)]
    for group in groups(scores, num_steps):
        kept = kept | set(group)
        curve.append(value(kept))
    return curve


def area_under(curve: Numbers) -> float:
    width = 1 / (len(curve) - 1)
    return sum(width * (left + right) / 2 for left, right in pairwise(curve))


def response_of_deletion(curve: Numbers) -> list[float] | None:
    """Give the lowest share so far at each step; None where nothing can be lost."""
    full, empty = curve[0], curve[-1]
    if full <= empty:
        return None
    lowest = 1.0
    response = []
    for height in curve:
        share = (height - empty) / (full - empty)
        lowest = min(lowest, max(0.0, min(1.0, share)))
        response.append(lowest)
    return response


def response_of_insertion(curve: Numbers) -> list[float] | None:
    empty, full = curve[0], curve[-1]
    if full <= empty:
        return None
    highest = 0.0
    response = []
    for height in curve:
        share = (height - empty) / (full - empty)
        highest = max(highest, max(0.0, min(1.0, share)))
        response.append(highest)
    return response


def mas_of_deletion(scores: Numbers, curve: Numbers) -> float:
    response = response_of_deletion(curve)
    total = sum(score for score in scores if score > 0)
    if response is None or total == 0:
        return math.nan
    left = total
    heights = [response[0]]
    for share, group in zip(response[1:], groups(scores, len(curve) - 1), strict=True):
        left -= sum(scores[unit] for unit in group if scores[unit] > 0)
        heights.append(min(1.0, share + abs(share - left / total)))
    return area_under(heights)


def mas_of_insertion(scores: Numbers, curve: Numbers) -> float:
    response = response_of_insertion(curve)
    total = sum(score for score in scores if score > 0)
    if response is None or total == 0:
        return math.nan
    restored = 0.0
    heights = [response[0]]
    for share, group in zip(response[1:], groups(scores, len(curve) - 1), strict=True):
        restored += sum(scores[unit] for unit in group if scores[unit] > 0)
        heights.append(max(0.0, share - abs(share - restored / total)))
    return area_under(heights)
