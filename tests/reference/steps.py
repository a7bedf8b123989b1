"""Flow between steps the slow way: loops over the edges, or over every route of the graph."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tests.reference.flow import Edges, Route, Vector, exact, total


class Steps(NamedTuple):
    """Flow per (source step, target step) that have any; the rest per step."""

    edges: dict[tuple[int, int], Fraction]
    within: list[Fraction]
    throughput: list[Fraction]
    source: list[Fraction]
    absorbed: list[Fraction]


def contract(edges: Edges, flows: Vector, source: Vector, absorbed: Vector, step: Sequence[int]) -> Steps:
    """Sum what stands between, inside, before and behind the steps."""
    count = step[-1] + 1
    between: dict[tuple[int, int], Fraction] = {}
    within = [Fraction(0)] * count
    for (s, t, _), flow in zip(edges, exact(flows), strict=True):
        if step[s] == step[t]:
            within[step[s]] += flow
        elif flow > 0:
            between[step[s], step[t]] = between.get((step[s], step[t]), Fraction(0)) + flow
    entering = [total([exact(source)[v] for v in range(len(step)) if step[v] == k]) for k in range(count)]
    leaving = [total([exact(absorbed)[v] for v in range(len(step)) if step[v] == k]) for k in range(count)]
    throughput = [entering[k] + total([f for (_, t), f in between.items() if t == k]) for k in range(count)]
    return Steps(between, within, throughput, entering, leaving)


def visits(every: Sequence[Route], step: Sequence[int]) -> list[Fraction]:
    """Probability that a route has a token in the step."""
    return [
        total([route.share for route in every if any(step[v] == k for v in route.nodes)]) for k in range(step[-1] + 1)
    ]


def moves(route: Route, step: Sequence[int]) -> list[int]:
    """The steps that a route passes, one entry a stay."""
    order = [step[v] for v in route.nodes]
    return [k for position, k in enumerate(order) if position == 0 or order[position - 1] != k]
