"""Recompute a flow in exact fractions, and compare every number of it with its exact value.

Capacities, source and demand are taken as the exact binary fractions that they are in memory, damping included.
Nothing is rounded, so a comparison with these numbers measures the rounding of the solver and nothing else.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction

import networkx as nx
import numpy as np
from networkx.algorithms.flow import shortest_augmenting_path
from numpy.typing import NDArray

from flowgraph.certificate.checks import Check, check
from flowgraph.certificate.flow_arrays import NEGLIGIBLE_FLOW, FlowArrays
from flowgraph.errors import TooLargeError

RATIONAL_EDGES = 5_000
"""Default size limit: dense graphs of 100 tokens, some seconds; numerators grow by 53 bits with every hop."""

_ZERO = Fraction(0)
_LARGEST = Fraction(sys.float_info.max) * (1 - Fraction(2) ** -20)
"""Near the largest float64: rounding may carry a number from here to infinity."""
_LEAST_FLOW = Fraction(NEGLIGIBLE_FLOW)

Fractions = list[Fraction]
WeightedEdge = tuple[int, int, Fraction]
"""Tail s, head t, and N[t, s]."""


@dataclass(frozen=True)
class RationalFlow:
    """The conserved flow of one graph in exact fractions.

    Attributes:
        h: potential of each token.
        g: influence of each token.
        throughput: f = g h of each token.
        source: src, share of the unit that enters at each token.
        alpha: the largest scaling that fits the capacities; None where no edge carries flow.
        alpha_flow: F on the edge that ``alpha`` fills; 0 where no edge carries flow.
        max_flow_value: V; None where a token is both source and sink.
    """

    h: Fractions
    g: Fractions
    throughput: Fractions
    source: Fractions
    alpha: Fraction | None
    alpha_flow: Fraction
    max_flow_value: Fraction | None


def rational_flow(arrays: FlowArrays, *, max_edges: int = RATIONAL_EDGES) -> RationalFlow:
    """Compute both sweeps, edge by edge, and the max flow by augmenting paths, in exact fractions.

    Args:
        arrays: the flow, of which only the graph, the options and the source vector are read.
        max_edges: refuse larger graphs.

    Returns:
        The exact flow.

    Raises:
        TooLargeError: more than ``max_edges`` edges.

    Cost: two passes over the edges and one max flow, on fractions that grow by 53 bits with every hop.
    """
    require_rational_size(arrays.weight.size, max_edges)
    edges = _weighted_edges(arrays)

    # Backward sweep: h = b + N^T h. Edges are sorted by target, so in reverse order h[t] is final when it is read.
    h = [Fraction(float(demand)) for demand in arrays.demand]
    for s, t, weight in reversed(edges):
        h[s] += weight * h[t]

    # Forward sweep: g = q + N g, with q = src / h.
    source = _source_by_rule(arrays, h)
    g = [_divided(share, potential) for share, potential in zip(source, h, strict=True)]
    for s, t, weight in edges:
        g[t] += weight * g[s]

    throughput = [influence * potential for influence, potential in zip(g, h, strict=True)]

    # alpha = 1 / max g[s] h[t]. Among edges of equal congestion the one with most flow stands for all of them.
    congestion = _ZERO
    alpha_flow = _ZERO
    for s, t, weight in edges:
        edge = (g[s] * h[t], g[s] * weight * h[t])
        congestion, alpha_flow = max((congestion, alpha_flow), edge)
    alpha = 1 / congestion if congestion else None

    return RationalFlow(
        h=h,
        g=g,
        throughput=throughput,
        source=source,
        alpha=alpha,
        alpha_flow=alpha_flow,
        max_flow_value=_max_flow_value(arrays, edges),
    )


def require_rational_size(num_edges: int, max_edges: int) -> None:
    """Refuse a graph that would take too long in fractions.

    Raises:
        TooLargeError: more than ``max_edges`` edges.
    """
    if num_edges > max_edges:
        raise TooLargeError(
            f"level: exact fractions take at most max_edges = {max_edges:,} edges, got {num_edges:,} (their "
            f"numerators grow with every hop: minutes and more); pass max_edges={num_edges} to run it, prune "
            "by flow first, or use level='exact'"
        )


def against_fractions(
    arrays: FlowArrays, max_flow_value: float | None, *, max_edges: int = RATIONAL_EDGES
) -> list[Check]:
    """Check every number of the flow against its exact value, and alpha <= V without any tolerance.

    A number is the result of at most one rounding error per edge on its longest route. So each component is off by at
    most the number of tokens times the local bound of :mod:`flowgraph.certificate.checks`.

    Args:
        arrays: the flow.
        max_flow_value: V in float64; None where it was not computed.
        max_edges: refuse larger graphs.

    Returns:
        The checks that could be made: alpha needs an edge with flow, V disjoint terminals.

    Raises:
        TooLargeError: more than ``max_edges`` edges.
    """
    exact = rational_flow(arrays, max_edges=max_edges)
    bound = arrays.f.size * arrays.local_bound

    # h and throughput, component by component. A throughput that both sides call negligible counts as equal.
    carries_flow = [throughput >= _LEAST_FLOW for throughput in exact.throughput]
    is_negligible = (arrays.f < NEGLIGIBLE_FLOW) & ~np.array(carries_flow)
    throughput = np.where(is_negligible, 0.0, arrays.f)
    exact_throughput = _keep_where(carries_flow, exact.throughput)
    unscaled = np.zeros_like(arrays.scale_exponent)

    # g: influence at a token without flow is no part of the flow.
    g = np.where(carries_flow, arrays.g, 0.0)
    exact_g = _keep_where(carries_flow, exact.g)

    checks = [
        check("rational h", _largest_deviation(arrays.h, arrays.scale_exponent, exact.h), bound),
        check("rational g", _largest_deviation(g, -arrays.scale_exponent, exact_g), bound),
        check("rational throughput", _largest_deviation(throughput, unscaled, exact_throughput), bound),
    ]

    if exact.alpha is not None:
        checks += _check_alpha(arrays, exact, exact.alpha, bound)

    # V of the max-flow solver.
    if exact.max_flow_value is not None and max_flow_value is not None:
        deviation = _relative_deviation(max_flow_value, 0, exact.max_flow_value)
        checks.append(check("rational V", deviation, arrays.total_bound, f"V = {_as_text(exact.max_flow_value)}"))
    return checks


def _check_alpha(arrays: FlowArrays, exact: RationalFlow, exact_alpha: Fraction, bound: float) -> list[Check]:
    """Check alpha against its exact value, and alpha <= V on the exact values."""
    # Where the edge that alpha fills carries a negligible flow, float64 cannot represent alpha; nothing is compared.
    is_negligible = exact.alpha_flow < _LEAST_FLOW
    # An alpha beyond the range of float64 is infinite.
    if is_negligible or (exact_alpha > _LARGEST and math.isinf(arrays.alpha)):
        deviation = 0.0
    else:
        deviation = _relative_deviation(arrays.alpha, 0, exact_alpha)
    checks = [check("rational alpha", deviation, bound, _as_text(exact_alpha))]

    # V counts the tokens at which float64 lets flow enter. If shares below its range are missing there, the exact alpha
    # belongs to a larger set of sources, and an excess over V proves nothing.
    if is_negligible or exact.max_flow_value is None:
        return checks
    same_sources = [share > 0 for share in exact.source] == arrays.is_source.tolist()
    excess = max(exact_alpha - exact.max_flow_value, _ZERO)
    if same_sources or excess == 0:
        checks.append(check("rational alpha <= V", float(excess > 0), 0, "compared as fractions"))
    return checks


def _weighted_edges(arrays: FlowArrays) -> list[WeightedEdge]:
    """List the edges of positive weight, sorted by target; N is the capacity times the damping, nothing rounded."""
    damping = Fraction(arrays.flow.damping)
    edges = []
    for s, t, capacity in zip(arrays.tail.tolist(), arrays.head.tolist(), arrays.capacity.tolist(), strict=True):
        if capacity > 0 and not arrays.absorbing[s]:
            edges.append((s, t, Fraction(capacity) * damping))
    return edges


def _source_by_rule(arrays: FlowArrays, h: Fractions) -> Fractions:
    """Compute src from its rule; a vector given by the caller is normalised again, exactly."""
    is_question = [Fraction(int(inside)) for inside in arrays.is_question]
    rule = arrays.flow.source_rule
    if rule == "uniform":
        weights = is_question
    elif rule == "potential":
        weights = [inside * potential for inside, potential in zip(is_question, h, strict=True)]
    else:
        weights = [Fraction(float(share)) for share in arrays.source]

    # Flow enters only where the demand can be reached: h > 0.
    weights = _keep_where([potential != 0 for potential in h], weights)
    total = sum(weights, _ZERO)
    return [_divided(weight, total) for weight in weights]


def _max_flow_value(arrays: FlowArrays, edges: list[WeightedEdge]) -> Fraction | None:
    """Compute V in fractions; None where a token is both source and sink, which makes it unlimited."""
    if (arrays.is_source & arrays.is_sink).any():
        return None
    graph = nx.DiGraph()
    graph.add_nodes_from(["source", "sink"])
    for s, t, weight in edges:
        graph.add_edge(s, t, capacity=weight)

    # Arcs of the virtual source and sink that no flow can fill.
    unlimited = 2 * sum((weight for _, _, weight in edges), Fraction(1))
    for v in np.flatnonzero(arrays.is_source).tolist():
        graph.add_edge("source", v, capacity=unlimited)
    for v in np.flatnonzero(arrays.is_sink).tolist():
        graph.add_edge(v, "sink", capacity=unlimited)
    residual = shortest_augmenting_path(graph, "source", "sink")
    return Fraction(residual.graph["flow_value"])


def _divided(numerator: Fraction, denominator: Fraction) -> Fraction:
    """Divide, with 0 where the denominator is 0."""
    if denominator == 0:
        return _ZERO
    return numerator / denominator


def _keep_where(keep: list[bool], numbers: Fractions) -> Fractions:
    """Replace the numbers that are not kept by 0."""
    return [number if kept else _ZERO for number, kept in zip(numbers, keep, strict=True)]


def _largest_deviation(got: NDArray, scale_exponent: NDArray, exact: Fractions) -> float:
    """Compute the largest relative difference; infinite where exactly one of two numbers is 0."""
    deviations = [
        _relative_deviation(number, exponent, wanted)
        for number, exponent, wanted in zip(got.tolist(), scale_exponent.tolist(), exact, strict=True)
    ]
    return max(deviations, default=0.0)


def _relative_deviation(got: float, scale_exponent: int, exact: Fraction) -> float:
    """Compute the relative difference of ``got * 2**scale_exponent``; infinite for NaN, infinity, and above 2."""
    if not math.isfinite(got):
        return math.inf
    if exact == 0:
        return 0.0 if got == 0 else math.inf
    deviation = abs(Fraction(got) * Fraction(2) ** scale_exponent / exact - 1)
    return float(deviation) if deviation < 2 else math.inf


def _as_text(number: Fraction) -> str:
    """Write a fraction exactly where it is short, else as the nearest float."""
    if max(number.numerator, number.denominator) < 10**9:
        return str(number)
    if number < 2**1000:
        return f"{float(number):.17g}"
    return "more than 2**1000"
