"""The same flow once more in exact fractions: what float64 was supposed to compute.

Capacities, source and demand are taken as the exact binary fractions that they are in memory, damping included; nothing
is rounded anywhere, so a comparison with these numbers measures the solver's rounding and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import networkx as nx
import numpy as np
from networkx.algorithms.flow import shortest_augmenting_path
from numpy.typing import NDArray

from flowgraph.certificate.checks import Check, check
from flowgraph.certificate.flow_arrays import NOTHING, FlowArrays
from flowgraph.errors import TooLargeError

RATIONAL_EDGES = 5_000
"""Default size limit: dense graphs of 100 tokens, some seconds; numerators grow by 53 bits with every hop."""

Numbers = list[Fraction]


@dataclass(frozen=True)
class RationalFlow:
    """h, g, throughput per token, alpha, the flow on the edge that alpha fills, the source, and V, as exact fractions.

    alpha is None where no edge carries flow, V where a token is source and sink.
    """

    h: Numbers
    g: Numbers
    throughput: Numbers
    alpha: Fraction | None
    alpha_flow: Fraction
    shares: Numbers
    max_flow_value: Fraction | None


def rational_flow(arrays: FlowArrays, *, max_edges: int = RATIONAL_EDGES) -> RationalFlow:
    """Both sweeps, edge by edge, and the max flow by augmenting paths, all in fractions.

    Raises:
        TooLargeError: more than ``max_edges`` edges.
    """
    require_rational_size(arrays.weight.size, max_edges)
    damping = Fraction(arrays.flow.damping)
    edges = [
        (int(s), int(t), Fraction(float(c)) * damping)
        for s, t, c in zip(arrays.tail, arrays.head, arrays.capacity, strict=True)
        if c > 0 and not arrays.absorbing[s]
    ]
    h = [Fraction(float(b)) for b in arrays.demand]
    for s, t, weight in reversed(edges):  # sorted by target: h[t] is final here
        h[s] += weight * h[t]
    shares = _named_shares(arrays, h)
    g = [share / potential if potential else Fraction(0) for share, potential in zip(shares, h, strict=True)]
    for s, t, weight in edges:
        g[t] += weight * g[s]
    worst, through = max(((g[s] * h[t], g[s] * weight * h[t]) for s, t, weight in edges), default=(Fraction(0),) * 2)
    throughput = [x * y for x, y in zip(g, h, strict=True)]
    return RationalFlow(h, g, throughput, 1 / worst if worst else None, through, shares, _max_flow(arrays, edges))


def require_rational_size(num_edges: int, max_edges: int) -> None:
    """Refuse what would take too long in fractions.

    Raises:
        TooLargeError: with the size, and what to do.
    """
    if num_edges > max_edges:
        raise TooLargeError(
            f"level: exact fractions take at most max_edges = {max_edges:,} edges, got {num_edges:,} (their "
            f"numerators grow with every hop: minutes and more); pass max_edges={num_edges} to run it, prune "
            "by flow first, or use level='exact'"
        )


def _named_shares(arrays: FlowArrays, h: Numbers) -> Numbers:
    """The unit, spread as the rule says, exactly; a vector of one's own is normalised again, exactly."""
    uniform = [Fraction(int(asked)) for asked in arrays.question]
    rules = {"uniform": uniform, "potential": [x * y for x, y in zip(uniform, h, strict=True)]}
    weights = rules.get(arrays.flow.source_rule, [Fraction(float(x)) for x in arrays.source])
    weights = [w if potential else Fraction(0) for w, potential in zip(weights, h, strict=True)]
    total = sum(weights, Fraction(0))
    return [w / total if total else w for w in weights]


def _max_flow(arrays: FlowArrays, edges: list[tuple[int, int, Fraction]]) -> Fraction | None:
    """V in fractions; None where a token is source and sink."""
    if (arrays.is_source & arrays.is_sink).any():
        return None
    network = nx.DiGraph()
    network.add_nodes_from(["from", "to"])
    unlimited = 2 * sum((c for _, _, c in edges), Fraction(1))
    network.add_edges_from((s, t, {"capacity": c}) for s, t, c in edges)
    network.add_edges_from(("from", int(v), {"capacity": unlimited}) for v in np.flatnonzero(arrays.is_source))
    network.add_edges_from((int(v), "to", {"capacity": unlimited}) for v in np.flatnonzero(arrays.is_sink))
    return Fraction(shortest_augmenting_path(network, "from", "to").graph["flow_value"])


def against_fractions(arrays: FlowArrays, value: float | None, *, max_edges: int = RATIONAL_EDGES) -> list[Check]:
    """Every number of the flow against its exact value; alpha <= V without any tolerance.

    A number is the result of at most one rounding error per edge on its longest route, so componentwise it is off by
    at most tokens times the local bound of :mod:`flowgraph.certificate.checks`.
    """
    exact = rational_flow(arrays, max_edges=max_edges)
    bound = arrays.f.size * arrays.local
    unit = arrays.flow.exponent.cpu().numpy()
    carries = [x >= Fraction(NOTHING) for x in exact.throughput]
    f = np.where((arrays.f < NOTHING) & ~np.array(carries), 0.0, arrays.f)
    checks = [
        check("rational h", _deviation(arrays.h, unit, exact.h), bound),
        # Influence that carries nothing is no part of the flow.
        check("rational g", _deviation(np.where(carries, arrays.g, 0.0), -unit, _where(carries, exact.g)), bound),
        check("rational throughput", _deviation(f, np.zeros_like(unit), _where(carries, exact.throughput)), bound),
    ]
    if exact.alpha is not None:
        same = all((x > 0) == bool(e) for x, e in zip(exact.shares, arrays.is_source, strict=True))
        counts_as_none = exact.alpha_flow < Fraction(NOTHING)  # then what float64 makes of alpha says nothing
        off = 0.0 if counts_as_none else _relative(arrays.alpha, 0, exact.alpha)
        checks.append(check("rational alpha", off, bound, _short(exact.alpha)))
        # V is that of the tokens where float64 lets flow enter; shares below its range are no part of it.
        if exact.max_flow_value is not None and not counts_as_none and (exact.alpha <= exact.max_flow_value or same):
            over = max(exact.alpha - exact.max_flow_value, Fraction(0))
            checks.append(check("rational alpha <= V", float(over > 0), 0, "compared as fractions"))
    if exact.max_flow_value is not None and value is not None:
        off = _relative(value, 0, exact.max_flow_value) if value or exact.max_flow_value else 0.0
        checks.append(check("rational V", off, arrays.whole, f"V = {_short(exact.max_flow_value)}"))
    return checks


def _where(keep: list[bool], numbers: Numbers) -> Numbers:
    return [x if inside else Fraction(0) for x, inside in zip(numbers, keep, strict=True)]


def _deviation(got: NDArray, unit: NDArray, wanted: Numbers) -> float:
    """Largest relative difference; infinite for something that should be nothing, or the reverse."""
    return max((_relative(x, k, y) for x, k, y in zip(got.tolist(), unit.tolist(), wanted, strict=True)), default=0.0)


def _relative(got: float, unit: int, wanted: Fraction) -> float:
    """Of ``got * 2**unit``; NaN and infinity are as wrong as can be."""
    if not math.isfinite(got):
        return math.inf
    if wanted == 0:
        return 0.0 if got == 0 else math.inf
    difference = abs(Fraction(got) * Fraction(2) ** unit / wanted - 1)
    return float(difference) if difference < 2 else math.inf


def _short(number: Fraction) -> str:
    if max(number.numerator, number.denominator) < 10**9:
        return str(number)
    return f"{float(number):.17g}" if number < 2**1000 else "more than 2**1000"
