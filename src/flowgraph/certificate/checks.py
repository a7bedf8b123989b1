"""The statements that hold for every conserved flow (method, section 4), each with the bound it must meet.

Nothing here calls the solver's sweeps. N is rebuilt from the graph and the named options, reachability is a
search of the topology, and sums are taken edge by edge in numpy.

Bounds. All terms are non-negative, so a sum of n products, in any order, has a relative error of at most
``(n + 2) * eps / 2``. A **local** identity compares two such sums over the edges at one token, the solver's and
ours: they differ by at most ``local = (n + 32) * eps``, n the largest number of edges at one token, the 32 for
the handful of other roundings. A **whole** identity adds the local defects of all tokens, each weighted by what
passes there (f, once in and once out): at most ``whole = 2 * local * sum(f) + N * eps``, N tokens. These are worst
cases: rounding errors mostly cancel, and a solved flow stays far below them. Numbers below ``2**-800`` of
the unit flow, where float64 runs out, count as zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowgraph.certificate.flow_arrays import EPS, NOTHING, FlowArrays
from flowgraph.maxflow.problem import TOLERANCE, MaxFlowProblem

_PREFIX_CUTS, _RANDOM_CUTS = 8, 16
_STATEMENTS = {
    "graph": "edges run forward in token order; regions are disjoint",
    "absorbing": "no edge leaves a token that absorbs, every edge leaves the others",
    "reachability": "h > 0 exactly where the demand can be reached",
    "feasible": "a flow exists exactly when a source token reaches the demand",
    "out-mass": "P hands on exactly 1 from every token that reaches the demand",
    "zero flow": "no route: source, g, throughput and edge flow are 0, alpha is infinite",
    "source": "one unit enters, as its rule says",
    "influence": "g = q + N g at every token",
    "inflow": "source + inflow = throughput at every token",
    "outflow": "throughput = outflow + absorbed at every token",
    "absorbed": "the demand absorbs exactly 1",
    "range": "0 <= throughput <= 1",
    "path length": "sum of edge flows = sum of throughput - 1, the mean route",
    "inner products": "<q, h> = <g, b>",
    "cuts": "net flow out of any set = its source - what it absorbs; 1 if it separates",
    "congestion": "F(s, t) / N[t, s] = g[s] h[t] on every edge",
    "alpha": "alpha F fits the capacity of every edge and fills one",
    "smallest cut": "alpha, and V, are at most the capacity of every cut tested",
    "max flow": "V is a feasible flow and a cut of the same size; V > 0 exactly with a flow",
    "alpha <= V": "the scaled flow fits, so it is no larger than the max flow",
    "support": "a max flow uses only edges that carry flow",
    "through": "alpha f[v] is at most what could pass through v",
    "rational h": "h is the exact potential, up to rounding",
    "rational g": "g is the exact influence, up to rounding",
    "rational throughput": "throughput is exact, up to rounding",
    "rational alpha": "alpha is exact, up to rounding",
    "rational alpha <= V": "the exact alpha is at most the exact max flow, without tolerance",
    "rational V": "V is the exact max flow, up to rounding",
}
"""Every check, in the words of the table."""


@dataclass(frozen=True)
class Check:
    """One statement about a flow, with the number that decides it.

    Attributes:
        name: short and stable.
        statement: what must hold, in plain words.
        residual: how far it is from holding (relative, or a count where the bound is 0).
        bound: what rounding can explain.
        ok: ``residual <= bound``.
        detail: the numbers behind it.
    """

    name: str
    statement: str
    residual: float
    bound: float
    ok: bool
    detail: str


def check(name: str, residual: float, bound: float, detail: str = "") -> Check:
    """The verdict on one statement; NaN never passes."""
    residual, bound = float(residual) + 0.0, float(bound)  # + 0.0 turns -0 into 0
    return Check(name, _STATEMENTS[name], residual, bound, residual <= bound, detail)


def _difference(got: NDArray, wanted: NDArray) -> float:
    """Largest difference relative to the larger of the two: 0 for nothing, 1 for something against nothing."""
    scale = np.maximum(np.maximum(np.abs(got), np.abs(wanted)), NOTHING)
    return float(np.max(np.abs(got - wanted) / scale, initial=0.0))


def structure(arrays: FlowArrays) -> list[Check]:
    """What holds with and without a flow (items 1 and 2): who absorbs, who reaches the demand, and P."""
    h, absorbing, reaches = arrays.h, arrays.absorbing, arrays.reaches
    wrong_mask = (arrays.flow.absorbing.cpu().numpy() != absorbing).sum()
    possible = bool((arrays.is_source & reaches).any())
    handed_on = arrays.unit_demand + arrays.out_of(arrays.balanced * h[arrays.head])
    return [
        check("absorbing", wrong_mask, 0, f"{arrays.flow.absorption}: {absorbing.sum()} of {h.size} tokens"),
        check("reachability", ((h > 0) != reaches).sum(), 0, f"{reaches.sum()} of {h.size} tokens"),
        check("feasible", arrays.feasible != possible, 0),
        check("out-mass", _difference(handed_on, h), arrays.local),
    ]


def conservation(arrays: FlowArrays) -> list[Check]:
    """Items 2, 3 and 6: the unit enters, is conserved at every token, and leaves."""
    h, g, f, F, source = arrays.h, arrays.g, arrays.f, arrays.edge_flow, arrays.source
    q = np.divide(source, h, out=np.zeros_like(h), where=source != 0)
    misplaced = max(_difference(source, _named_source(arrays)), abs(float(source.sum()) - 1))
    received = q + arrays.into(arrays.balanced * g[arrays.tail])
    arriving, leaving, length = float(np.sum(q * h)), float(arrays.absorbed.sum()), float(F.sum())
    outside = max(float(f.max()) - 1, -float(f.min()))
    local, whole = arrays.local, arrays.whole
    entry = f"{arrays.flow.source_rule}, {(source > 0).sum()} tokens"
    return [
        check("source", misplaced, (f.size + 32) * EPS, entry),
        check("influence", _difference(g, received), local),
        check("inflow", _difference(source + arrays.into(F), f), local),
        check("outflow", _difference(arrays.out_of(F) + arrays.absorbed, f), local),
        check("absorbed", abs(leaving - 1), whole, f"{(arrays.absorbed > 0).sum()} tokens"),
        check("range", max(outside, 0.0), whole, f"{f.min():.3g} to {f.max():.6g}"),
        check("path length", abs(length - float(f.sum()) + 1), whole, f"{length:.4g} edges"),
        check("inner products", abs(arriving - leaving), whole, f"{arriving:.6g} and {leaving:.6g}"),
    ]


def _named_source(arrays: FlowArrays) -> NDArray:
    """The distribution that the rule names; of a vector only its support and its sum can be checked."""
    unit = arrays.flow.exponent.cpu().numpy()
    asked = arrays.question & arrays.reaches
    potential = np.where(asked, np.ldexp(arrays.h, np.minimum(unit - unit[asked].max(initial=unit.min()), 0)), 0.0)
    rules = {"uniform": arrays.question, "potential": potential}
    weights = rules.get(arrays.flow.source_rule, arrays.source)
    share = np.where(arrays.reaches, np.maximum(weights, 0.0), 0.0)
    return share / share.sum()


def nothing_flows(arrays: FlowArrays) -> Check:
    """Without a route every number of the flow is exactly zero and any scaling fits."""
    largest = np.abs(np.concatenate([arrays.g, arrays.f, arrays.source, arrays.edge_flow])).max()
    return check("zero flow", largest if math.isinf(arrays.alpha) else 1.0, 0)


def separating_cuts(arrays: FlowArrays, rng: np.random.Generator) -> list[NDArray]:
    """Source sides of cuts: the two trivial ones, the narrowest prefixes of the text, random ones."""
    is_source, is_sink, position = arrays.is_source, arrays.is_sink, np.arange(arrays.f.size)
    if (is_source & is_sink).any() or not is_source.any() or not is_sink.any():
        return []
    sides = [is_source, ~is_sink]
    narrow = np.cumsum(arrays.out_of(arrays.weight) - arrays.into(arrays.weight))  # [k]: out of the first k + 1 tokens
    between = np.arange(position[is_source].max(), position[is_sink].min())
    sides += [position <= k for k in between[np.argsort(narrow[between], kind="stable")[:_PREFIX_CUTS]]]
    sides += [(rng.random(position.size) < rng.random()) & ~is_sink | is_source for _ in range(_RANDOM_CUTS)]
    return sides


def net_flow_across_cuts(arrays: FlowArrays, sides: list[NDArray], rng: np.random.Generator) -> Check:
    """Item 4, on every prefix of the text, on the separating cuts, and on random sets of tokens."""
    F, balance = arrays.edge_flow, arrays.source - arrays.absorbed
    prefixes = np.cumsum(arrays.out_of(F) - arrays.into(F)) - np.cumsum(balance)
    worst = [float(np.abs(prefixes).max())]
    anywhere = [rng.random(balance.size) < rng.random() for _ in range(_RANDOM_CUTS)]
    for side, wanted in [*((side, 1.0) for side in sides), *((side, float(balance[side].sum())) for side in anywhere)]:
        worst.append(abs(arrays.out_of_side(side, F) - arrays.out_of_side(~side, F) - wanted))
    running = balance.size * EPS * (float(arrays.f.sum()) + 1)  # two running sums over the tokens
    tested = f"{balance.size} prefixes, {len(sides)} separating and {len(anywhere)} random sets"
    return check("cuts", float(np.max(worst)), arrays.whole + running, tested)


def scaling(arrays: FlowArrays) -> list[Check]:
    """Item 5: congestion is rank one, and alpha fills the fullest edge."""
    rank_one = arrays.g[arrays.tail] * arrays.balanced * arrays.h[arrays.head]
    congestion = np.ldexp(arrays.g[arrays.tail] * arrays.h[arrays.head], arrays.unit_change)
    congestion = np.where(arrays.weight > 0, congestion, 0.0)
    plain = (congestion > 0) & np.isfinite(congestion)
    room = np.divide(arrays.weight, rank_one, out=np.full_like(rank_one, np.inf), where=rank_one > 0)
    room = np.divide(1.0, congestion, out=room, where=plain)
    residual, full = float(not math.isinf(arrays.alpha)), "no edge carries flow"
    if np.isfinite(room).any():
        at = room.argmin()
        residual, full = abs(arrays.alpha / room[at] - 1), f"{arrays.tail[at]} -> {arrays.head[at]} is full first"
    return [
        check(
            "congestion",
            _difference(arrays.edge_flow, rank_one),
            4 * EPS,
        ),
        check("alpha", residual, 4 * EPS, full),
    ]


def smallest_cut(arrays: FlowArrays, sides: list[NDArray], largest: float) -> Check:
    """Item 5: nothing that fits the capacities exceeds a cut."""
    smallest = min(arrays.out_of_side(side, arrays.weight) for side in sides)
    detail = f"the smallest of {len(sides)} is {smallest:.6g}"
    return check("smallest cut", _overshoot(largest, smallest), arrays.whole, detail)


def _overshoot(small: float, large: float) -> float:
    """By what share a number that must be the smaller is the larger; infinite against nothing."""
    return max(float(np.float64(small) / large) - 1, 0.0)


def against_max_flow(
    arrays: FlowArrays, network: MaxFlowProblem, sides: list[NDArray], num_through: int, notes: list[str]
) -> tuple[float, list[Check]]:
    """Items 1, 5, 7 and 8 against the exact max flow."""
    best = network.between(network.sources, network.sinks)
    value = best.cut_capacity
    exists = value > 0
    scale = value if exists else 1.0
    cut = f"V = {value:.6g}, {best.cut_edges.numel()} edges cut"
    width = best.error / scale if exists == arrays.feasible else 1.0
    checks = [check("max flow", width, TOLERANCE * network.total / scale, cut)]
    if not (exists and arrays.feasible):
        return value, checks
    used = best.edge_flow.cpu().numpy()
    carries = arrays.reached_from_source()[arrays.tail] & arrays.reaches[arrays.head] & (arrays.weight > 0)
    stray = float(used[~carries].sum()) / scale
    noise = (best.error + EPS * network.total * max(1, int((used > 0).sum()))) / scale  # each push may round
    checks += [
        check("alpha <= V", _overshoot(arrays.alpha, value), arrays.whole, f"alpha is {arrays.alpha / value:.4g} of V"),
        smallest_cut(arrays, sides, max(arrays.alpha, value - best.error)),
        check("support", stray, noise, f"{(used > 0).sum()} of {carries.sum()} edges"),
    ]
    inner = np.flatnonzero(~(arrays.is_source | arrays.is_sink) & (arrays.f > 0))
    tokens = inner[np.argsort(-arrays.f[inner], kind="stable")[:num_through]].tolist()
    if tokens:
        ratios = [arrays.alpha * float(arrays.f[v]) / np.float64(network.through(v)) for v in tokens]
        worst = float(np.max(ratios))
        checks.append(
            check("through", max(worst - 1, 0.0), arrays.whole, f"at most {worst:.3g} of it, {len(tokens)} tokens")
        )
    else:
        notes.append("through: not computed; num_through is 0, or no token between source and demand carries flow")
    return value, checks
