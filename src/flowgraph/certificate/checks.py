r"""The statements that hold for every conserved flow (method, section 4), each with the bound it must meet.

The solver's sweeps are not used here. N is rebuilt from the graph and the named options, reachability is a search of
the topology, and sums are taken edge by edge in numpy.

Symbols: T tokens, h potential, g influence, f throughput, F flow on the edges, b demand, ``q = src / h``,
``P(s -> t) = N[t, s] h[t] / h[s]``. An item is an item of section 4.

Bounds. All terms are non-negative, so a sum of n products, in any order, has a relative error of at most
``(n + 2) * eps / 2``.

- A **local** identity compares two such sums over the edges at one token, the solver's and the one computed here. They
  differ by at most ``local_bound = (n + 32) * eps``: n is the largest number of edges at one token, and 32 covers the
  other roundings.
- An identity over **all** tokens adds the local errors of all tokens, each weighted by the flow through the token (f,
  once in and once out): at most ``total_bound = 2 * local_bound * sum(f) + T * eps``.

These are worst cases: rounding errors mostly cancel, and a solved flow stays far below them. Numbers below
``NEGLIGIBLE_FLOW = 2**-800`` of the unit flow, where float64 reaches the end of its range, count as zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from flowgraph.certificate.flow_arrays import EPS, NEGLIGIBLE_FLOW, FlowArrays
from flowgraph.files import loadable
from flowgraph.maxflow.problem import MaxFlowProblem
from flowgraph.maxflow.verification import relative_tolerance

TokenSet = Bool[np.ndarray, " tokens"]
"""A set of tokens, as a mask; as a cut, the side of the sources."""

_NUM_PREFIX_CUTS = 8
_NUM_RANDOM_CUTS = 16

_LEAST_COMPARED = 2.0**-700
"""Least throughput of a token whose M[v] is computed: alpha leaves out edges of negligible flow, up to 2**-800 each."""

_LEAST_INFLUENCE = 2.0**-900
"""A positive influence below this may have lost digits: products with it reach the end of the range of float64."""

_STATEMENTS = {
    "graph": "edges run forward in token order; regions are disjoint",
    "absorbing": "no edge leaves a token that absorbs, every edge leaves the others",
    "reachability": "h > 0 exactly where the demand can be reached",
    "feasible": "a flow exists exactly when a source token reaches the demand",
    "out-mass": "the transitions P out of every token that reaches the demand sum to 1",
    "zero flow": "no route: source, g, throughput and edge flow are 0, alpha is infinite",
    "source": "one unit enters, distributed by the named rule",
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
    "demand": "the demand enters at the answer and sums to 1",
    "balance": "what reaches a token = what it takes + what stays at its embedding and in biases",
    "ends": "question + context + forced tokens + remainder + biases = 1",
    "prefix cuts": "what crosses a cut = what enters after it - what ends after it",
}
"""Every check, in the words of the table."""


@loadable
@dataclass(frozen=True)
class Check:
    """One statement about a flow, with the number that decides it.

    Attributes:
        name: short and stable.
        statement: what must hold, in plain words.
        residual: how far it is from holding (relative, or a count where the bound is 0).
        bound: the largest residual that rounding can explain.
        ok: ``residual <= bound``.
        detail: the numbers behind it.
    """

    name: str
    statement: str
    residual: float
    bound: float
    ok: bool
    detail: str


def check(name: str, residual: SupportsFloat, bound: float, detail: str = "") -> Check:
    """Compare a residual with its bound; NaN never passes."""
    residual = float(residual) + 0.0  # adding 0 turns -0 into 0
    bound = float(bound)
    return Check(
        name=name,
        statement=_STATEMENTS[name],
        residual=residual,
        bound=bound,
        ok=residual <= bound,
        detail=detail,
    )


def structure(arrays: FlowArrays) -> list[Check]:
    """Check what holds with and without a flow (items 1 and 2): absorption, reachability, and the out-mass of P."""
    h = arrays.h
    num_tokens = h.size

    # The flow's mask of absorbing tokens is the one that its named absorption gives.
    claimed_absorbing = arrays.flow.absorbing.cpu().numpy()
    num_wrong_absorbing = (claimed_absorbing != arrays.absorbing).sum()
    absorption = f"{arrays.flow.absorption}: {arrays.absorbing.sum()} of {num_tokens} tokens"

    # h[s] > 0 exactly where the demand is reachable from s.
    num_wrong_reach = ((h > 0) != arrays.reaches_sink).sum()
    reach = f"{arrays.reaches_sink.sum()} of {num_tokens} tokens"

    # A flow exists exactly when some source token reaches the demand.
    route_exists = bool((arrays.is_source & arrays.reaches_sink).any())

    # sum_t P(s -> t) = 1, with the virtual sink as a target, times h[s]: b[s] + sum_t N[t, s] h[t] = h[s].
    out_mass = arrays.scaled_demand + arrays.outflow(arrays.scaled_weight * h[arrays.head])

    return [
        check("absorbing", num_wrong_absorbing, 0, absorption),
        check("reachability", num_wrong_reach, 0, reach),
        check("feasible", arrays.feasible != route_exists, 0),
        check("out-mass", _largest_difference(out_mass, h), arrays.local_bound),
    ]


def conservation(arrays: FlowArrays) -> list[Check]:
    """Check that the unit enters, is conserved at every token, and leaves (items 2, 3 and 6)."""
    h = arrays.h
    g = arrays.g
    f = arrays.f
    F = arrays.edge_flow
    source = arrays.source
    absorbed = arrays.absorbed
    local_bound = arrays.local_bound
    total_bound = arrays.total_bound

    # src is the distribution that the named rule gives, and sums to 1.
    off_rule = _largest_difference(source, _source_by_rule(arrays))
    off_unit = abs(float(source.sum()) - 1)
    entry = f"{arrays.flow.source_rule}, {(source > 0).sum()} tokens"

    # g = q + N g, with q = src / h. Off the flow, a g whose terms have lost digits is compared with nothing.
    q = np.divide(source, h, out=np.zeros_like(h), where=source != 0)
    influence = q + arrays.inflow(arrays.scaled_weight * g[arrays.tail])
    is_faint = (g > 0) & (g < _LEAST_INFLUENCE)
    has_faint_term = arrays.inflow((is_faint[arrays.tail] & (arrays.weight > 0)).astype(np.float64)) > 0
    is_exact = (f >= NEGLIGIBLE_FLOW) | ~(has_faint_term | is_faint)

    # src[t] + sum_s F(s, t) = f[t] = sum_u F(t, u) + g[t] b[t].
    arriving = source + arrays.inflow(F)
    leaving = arrays.outflow(F) + absorbed

    # sum_t g[t] b[t] = 1.
    total_absorbed = float(absorbed.sum())

    # 0 <= f <= 1.
    outside = max(float(f.max()) - 1, -float(f.min()))

    # sum(F) = sum(f) - 1: the flow of all edges is the mean number of edges on a route.
    path_length = float(F.sum())
    off_length = abs(path_length - float(f.sum()) + 1)

    # <q, h> = <g, b>: one end of both sweeps against the other.
    total_entering = float(np.sum(q * h))

    return [
        check("source", max(off_rule, off_unit), (f.size + 32) * EPS, entry),
        check("influence", _largest_difference(g[is_exact], influence[is_exact]), local_bound),
        check("inflow", _largest_difference(arriving, f), local_bound),
        check("outflow", _largest_difference(leaving, f), local_bound),
        check("absorbed", abs(total_absorbed - 1), total_bound, f"{(absorbed > 0).sum()} tokens"),
        check("range", max(outside, 0.0), total_bound, f"{f.min():.3g} to {f.max():.6g}"),
        check("path length", off_length, total_bound, f"{path_length:.4g} edges"),
        check(
            "inner products",
            abs(total_entering - total_absorbed),
            total_bound,
            f"{total_entering:.6g} and {total_absorbed:.6g}",
        ),
    ]


def zero_flow(arrays: FlowArrays) -> Check:
    """Check that without a route every number of the flow is exactly 0 and alpha is infinite."""
    numbers = np.concatenate([arrays.g, arrays.f, arrays.source, arrays.edge_flow])
    residual = np.abs(numbers).max()
    if not math.isinf(arrays.alpha):
        residual = 1.0
    return check("zero flow", residual, 0)


def separating_cuts(arrays: FlowArrays, rng: np.random.Generator) -> list[TokenSet]:
    """Choose cuts between sources and sinks: the two trivial ones, the narrowest prefixes of the text, random ones.

    Returns:
        The source side of each cut; none where a token is both source and sink, or where one kind is missing.
    """
    is_source = arrays.is_source
    is_sink = arrays.is_sink
    if not is_source.any() or not is_sink.any():
        return []
    if (is_source & is_sink).any():
        return []

    # Trivial cuts: around the sources, and around the sinks.
    sides = [is_source, ~is_sink]

    # Prefixes between the last source and the first sink. An edge inside a prefix adds and subtracts its capacity, so
    # the running sum at k is the capacity out of the first k + 1 tokens.
    position = np.arange(arrays.f.size)
    net_capacity = arrays.outflow(arrays.weight) - arrays.inflow(arrays.weight)
    prefix_capacity = np.cumsum(net_capacity)
    ends = np.arange(position[is_source].max(), position[is_sink].min())
    narrowest_first = ends[np.argsort(prefix_capacity[ends], kind="stable")]
    for end in narrowest_first[:_NUM_PREFIX_CUTS]:
        sides.append(position <= end)

    # Random sets of random density that hold every source and no sink.
    for _ in range(_NUM_RANDOM_CUTS):
        sides.append(_random_set(position.size, rng) & ~is_sink | is_source)
    return sides


def net_flow_across_cuts(arrays: FlowArrays, sides: list[TokenSet], rng: np.random.Generator) -> Check:
    """Check the net flow (item 4) out of every prefix of the text, the separating cuts, and random sets of tokens."""
    F = arrays.edge_flow
    balance = arrays.source - arrays.absorbed
    num_tokens = balance.size

    # Prefixes {0..k}: net outflow = sum over the prefix of src - g b. One running sum gives all of them.
    net_outflow = np.cumsum(arrays.outflow(F) - arrays.inflow(F))
    expected = np.cumsum(balance)
    residuals = [float(np.abs(net_outflow - expected).max())]

    # Separating cuts: the net outflow is the unit.
    for side in sides:
        residuals.append(abs(_net_outflow(arrays, side) - 1.0))

    # Any other set: the net outflow is what enters in it minus what it absorbs.
    random_sets = [_random_set(num_tokens, rng) for _ in range(_NUM_RANDOM_CUTS)]
    for side in random_sets:
        expected = float(balance[side].sum())
        residuals.append(abs(_net_outflow(arrays, side) - expected))

    # The two running sums over the tokens round once more per token.
    running_sums = num_tokens * EPS * (float(arrays.f.sum()) + 1)
    tested = f"{num_tokens} prefixes, {len(sides)} separating and {len(random_sets)} random sets"
    return check("cuts", float(np.max(residuals)), arrays.total_bound + running_sums, tested)


def scaling(arrays: FlowArrays) -> list[Check]:
    """Check that congestion is rank one and that alpha F fills the fullest edge (item 5)."""
    g_tail = arrays.g[arrays.tail]
    h_head = arrays.h[arrays.head]

    # F(s, t) = g[s] N[t, s] h[t].
    rank_one_flow = g_tail * arrays.scaled_weight * h_head

    # F(s, t) / N[t, s] = g[s] h[t], here in the units of the unscaled N.
    congestion = np.ldexp(g_tail * h_head, arrays.edge_exponent)
    congestion = np.where(arrays.weight > 0, congestion, 0.0)

    # The scaling that fills an edge is 1 / congestion. Where congestion leaves the range of float64, N / F replaces it.
    in_range = (congestion > 0) & np.isfinite(congestion)
    unlimited = np.full_like(rank_one_flow, np.inf)
    filling_scale = np.divide(arrays.weight, rank_one_flow, out=unlimited, where=rank_one_flow > 0)
    filling_scale = np.divide(1.0, congestion, out=filling_scale, where=in_range)

    # alpha = min over the edges with flow, negligible flow aside; without any, alpha is infinite.
    filling_scale = np.where(rank_one_flow >= NEGLIGIBLE_FLOW, filling_scale, np.inf)
    if np.isfinite(filling_scale).any():
        fullest = filling_scale.argmin()
        residual = abs(arrays.alpha / filling_scale[fullest] - 1)
        detail = f"{arrays.tail[fullest]} -> {arrays.head[fullest]} is full first"
    else:
        residual = float(not math.isinf(arrays.alpha))
        detail = "no edge carries flow"

    return [
        check("congestion", _largest_difference(arrays.edge_flow, rank_one_flow), 4 * EPS),
        check("alpha", residual, 4 * EPS, detail),
    ]


def smallest_cut(arrays: FlowArrays, sides: list[TokenSet], flow_value: float) -> Check:
    """Check that the value of a flow that fits the capacities is at most the capacity of every tested cut (item 5)."""
    smallest = min(arrays.outflow_of_set(side, arrays.weight) for side in sides)
    detail = f"the smallest of {len(sides)} is {smallest:.6g}"
    return check("smallest cut", _excess_share(flow_value, smallest), arrays.total_bound, detail)


def against_max_flow(
    arrays: FlowArrays, problem: MaxFlowProblem, sides: list[TokenSet], num_through: int, notes: list[str]
) -> tuple[float, list[Check]]:
    """Check the flow against the exact max flow (items 1, 5, 7 and 8).

    Args:
        arrays: the flow.
        problem: the max-flow problem between the flow's own source and demand tokens.
        sides: separating cuts, as source sides.
        num_through: for how many tokens M[v] is computed.
        notes: what was not checked is added here.

    Returns:
        V as the capacity of a verified cut, and the checks.
    """
    best = problem.between(problem.sources, problem.sinks)
    V = best.cut_capacity
    route_exists = V > 0

    # Duality: V lies in [cut - error, cut]. V > 0 exactly with a flow (item 1).
    scale = V if route_exists else 1.0
    width = best.error / scale
    if route_exists != arrays.feasible:
        width = 1.0
    detail = f"V = {V:.6g}, {best.cut_edges.numel()} edges cut"
    checks = [check("max flow", width, relative_tolerance(arrays.weight.size), detail)]
    if not (route_exists and arrays.feasible):
        return V, checks

    # alpha <= V <= every cut.
    share = f"alpha is {arrays.alpha / V:.4g} of V"
    checks.append(check("alpha <= V", _excess_share(arrays.alpha, V), arrays.total_bound, share))
    checks.append(smallest_cut(arrays, sides, max(arrays.alpha, V - best.error)))

    # The support of a max flow lies inside the support of f (item 7). The solver sees the edges on routes only, so its
    # flow is 0 on all others.
    used = best.edge_flow.cpu().numpy()
    num_used = int((used > 0).sum())
    on_a_route = arrays.reached_from_source()[arrays.tail] & arrays.reaches_sink[arrays.head]
    carries_flow = on_a_route & (arrays.weight > 0)
    outside_support = float(used[~carries_flow].sum()) / scale
    checks.append(check("support", outside_support, 0, f"{num_used} of {carries_flow.sum()} edges"))

    # alpha f[v] <= M[v] (item 8), for the tokens with most throughput between the terminals.
    inner = np.flatnonzero(~(arrays.is_source | arrays.is_sink) & (arrays.f >= _LEAST_COMPARED))
    largest_first = inner[np.argsort(-arrays.f[inner], kind="stable")]
    tokens = largest_first[:num_through].tolist()
    if tokens:
        ratios = []
        for v in tokens:
            scaled_flow = arrays.alpha * float(arrays.f[v])
            ratios.append(scaled_flow / np.float64(problem.through(v)))
        largest = float(np.max(ratios))
        detail = f"at most {largest:.3g} of it, {len(tokens)} tokens"
        checks.append(check("through", max(largest - 1, 0.0), arrays.total_bound, detail))
    else:
        notes.append("through: not computed; num_through is 0, or no token between source and demand carries flow")
    return V, checks


def _largest_difference(got: NDArray, wanted: NDArray) -> float:
    """Compute the largest difference relative to the larger number: 0 for equal ones, 1 where only one is 0."""
    scale = np.maximum(np.maximum(np.abs(got), np.abs(wanted)), NEGLIGIBLE_FLOW)
    return float(np.max(np.abs(got - wanted) / scale, initial=0.0))


def _excess_share(small: float, large: float) -> float:
    """Compute by what share ``small`` exceeds ``large``, 0 where it does not; infinite where ``large`` is 0."""
    return max(float(np.float64(small) / large) - 1, 0.0)


def _source_by_rule(arrays: FlowArrays) -> NDArray:
    """Compute src from its rule; of a vector given by the caller only support and sum can be checked."""
    rule = arrays.flow.source_rule
    if rule == "uniform":
        weights = arrays.is_question
    elif rule == "potential":
        weights = _question_potential(arrays)
    else:
        weights = arrays.source

    share = np.where(arrays.reaches_sink, np.maximum(weights, 0.0), 0.0)
    return share / share.sum()


def _question_potential(arrays: FlowArrays) -> NDArray:
    """Compute h 2**e of the question tokens, relative to their largest 2**e so that it cannot overflow."""
    e = arrays.scale_exponent
    counted = arrays.is_question & arrays.reaches_sink
    largest = e[counted].max(initial=e.min())
    potential = np.ldexp(arrays.h, np.minimum(e - largest, 0))
    return np.where(counted, potential, 0.0)


def _random_set(num_tokens: int, rng: np.random.Generator) -> TokenSet:
    """Draw a set of tokens of random density."""
    uniform = rng.random(num_tokens)
    density = rng.random()
    return uniform < density


def _net_outflow(arrays: FlowArrays, side: TokenSet) -> float:
    """Compute the flow out of a set of tokens minus the flow into it."""
    return arrays.outflow_of_set(side, arrays.edge_flow) - arrays.outflow_of_set(~side, arrays.edge_flow)
