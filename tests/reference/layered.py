"""Rollout and flow over layers from their definitions, in fractions: paths listed, cuts listed, nothing clever."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise, product
from math import prod

Matrix = Sequence[Sequence[Fraction]]


def mixed(attention: Sequence[Matrix], residual: Fraction) -> list[Matrix]:
    """``(1 - r) W + r I`` of every layer."""
    return [
        [[(1 - residual) * w + (residual if s == t else 0) for s, w in enumerate(row)] for t, row in enumerate(layer)]
        for layer in attention
    ]


def rollout_of_matrices(layers: Sequence[Matrix]) -> Matrix:
    """``A_L ... A_2 A_1``: equation 1 of arXiv 2005.00928."""
    total, tokens = layers[0], range(len(layers[0]))
    for layer in layers[1:]:
        total = [[sum((layer[t][k] * total[k][s] for k in tokens), Fraction(0)) for s in tokens] for t in tokens]
    return total


def rollout_of_paths(layers: Sequence[Matrix]) -> Matrix:
    """For every pair, the sum over all paths of the product of their weights."""
    tokens = range(len(layers[0]))
    return [
        [sum((prod(path, start=Fraction(1)) for path in paths(layers, s, t)), Fraction(0)) for s in tokens]
        for t in tokens
    ]


def paths(layers: Sequence[Matrix], source: int, target: int) -> list[list[Fraction]]:
    """The weights along every path from an input token to an output token."""
    between = product(range(len(layers[0])), repeat=len(layers) - 1)
    return [
        [layer[t][s] for layer, (s, t) in zip(layers, pairwise([source, *middle, target]), strict=True)]
        for middle in between
    ]


def flow_of_cuts(layers: Sequence[Matrix]) -> Matrix:
    """For every pair, the capacity of the smallest cut: max flow = min cut, each cut tried."""
    tokens = range(len(layers[0]))
    return [[_smallest_cut(layers, s, t) for s in tokens] for t in tokens]


def _smallest_cut(layers: Sequence[Matrix], source: int, target: int) -> Fraction:
    # Only nodes between the first and the last layer are free: nothing enters another input, or leaves another output.
    free = [(level, token) for level in range(1, len(layers)) for token in range(len(layers[0]))]
    sides = (
        {(0, source), *chosen, *((len(layers), t) for t in range(len(layers[0])) if t != target)}
        for size in range(len(free) + 1)
        for chosen in combinations(free, size)
    )
    return min(
        sum(
            (
                weight
                for level, layer in enumerate(layers)
                for t, row in enumerate(layer)
                for s, weight in enumerate(row)
                if (level, s) in side and (level + 1, t) not in side
            ),
            Fraction(0),
        )
        for side in sides
    )
