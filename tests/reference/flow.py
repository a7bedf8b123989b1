"""Answer-targeted flow over exact fractions: the sweeps, the routes, the decomposition, the max flow.

A graph is `num_nodes` and a list of edges `(source, target, capacity)` with source < target. Floats are
taken at their exact value, so a result here has no rounding at all. Token vectors (demand, source, h, g,
f) have one entry per token, edge vectors one entry per edge. Everything is written for reading; the
functions that list every route are exponential in the number of tokens.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

Number = Fraction | float
Edge = tuple[int, int, Fraction]
Edges = Sequence[tuple[int, int, Number]]
Vector = Sequence[Number]

ZERO = Fraction(0)


def exact(values: Vector) -> list[Fraction]:
    """Every value (float, int, bool or fraction) as the fraction it exactly is."""
    return [Fraction(value) for value in values]


def total(values: Sequence[Fraction]) -> Fraction:
    return sum(values, ZERO)


# The two sweeps ----------------------------------------------------------------------------------------


def effective_edges(
    edges: Edges, answer: Sequence[bool], absorption: str = "absorb", damping: Number = 1
) -> list[Edge]:
    """N: capacities times damping; under "absorb" without the edges that leave an answer token."""
    if absorption not in ("absorb", "pass_through"):
        raise ValueError(f"absorption must be 'absorb' or 'pass_through', got {absorption!r}")
    absorbs = absorption == "absorb"
    return [(s, t, Fraction(damping) * Fraction(c)) for s, t, c in edges if not (absorbs and answer[s])]


def potential(num_nodes: int, edges: Edges, demand: Vector) -> list[Fraction]:
    """h[s] = b[s] + sum_t c(s,t)·h[t], from the last token down."""
    h = exact(demand)
    for s in reversed(range(num_nodes)):
        h[s] += total([Fraction(c) * h[t] for tail, t, c in edges if tail == s])
    return h


def reachable(num_nodes: int, edges: Edges, demand: Vector) -> list[bool]:
    """Which tokens have a route of edges with positive capacity to a token with positive demand."""
    reaches = [b > 0 for b in demand]
    for s in reversed(range(num_nodes)):
        reaches[s] = reaches[s] or any(reaches[t] for tail, t, c in edges if tail == s and c > 0)
    return reaches


def source_distribution(kind: str | Vector, question: Sequence[bool], h: Vector) -> list[Fraction]:
    """src, sum 1, zero where h is zero; all zero when nothing that could be a source reaches the answer.

    "uniform" is the same share for every question token with h > 0, "potential" a share proportional to
    h[s] over question tokens, and a vector is taken as it is (`question` is then not read).
    """
    if kind == "uniform":
        weights = exact(question)
    elif kind == "potential":
        weights = [Fraction(h_s) if asked else ZERO for asked, h_s in zip(question, h, strict=True)]
    elif isinstance(kind, str):
        raise ValueError(f"source must be 'uniform', 'potential' or a vector, got {kind!r}")
    else:
        weights = exact(kind)
    if min(weights, default=ZERO) < 0:
        raise ValueError(f"source must be non-negative, got {min(weights)}")
    weights = [w if h_s > 0 else ZERO for w, h_s in zip(weights, h, strict=True)]
    whole = total(weights)
    return [w / whole for w in weights] if whole > 0 else weights


def influence(num_nodes: int, edges: Edges, source: Vector, h: Vector) -> list[Fraction]:
    """g[t] = q[t] + sum_s c(s,t)·g[s] with q = src/h (0 where h is 0), from the first token up."""
    g = [Fraction(w) / Fraction(h_s) if h_s > 0 else ZERO for w, h_s in zip(source, h, strict=True)]
    for t in range(num_nodes):
        g[t] += total([Fraction(c) * g[s] for s, head, c in edges if head == t])
    return g


def throughput(g: Vector, h: Vector) -> list[Fraction]:
    """f[t] = g[t]·h[t]."""
    return [Fraction(g_t) * Fraction(h_t) for g_t, h_t in zip(g, h, strict=True)]


def edge_flow(edges: Edges, g: Vector, h: Vector) -> list[Fraction]:
    """F(s,t) = g[s]·c(s,t)·h[t]."""
    return [Fraction(g[s]) * Fraction(c) * Fraction(h[t]) for s, t, c in edges]


def absorbed(g: Vector, demand: Vector) -> list[Fraction]:
    """The flow that leaves for the virtual sink at each token: g[t]·b[t]."""
    return [Fraction(g_t) * Fraction(b_t) for g_t, b_t in zip(g, demand, strict=True)]


def alpha(edges: Edges, g: Vector, h: Vector) -> Fraction | None:
    """1/max g[s]·h[t] over edges with capacity and flow; None (unbounded) when no edge carries flow."""
    congestion = [Fraction(g[s]) * Fraction(h[t]) for s, t, c in edges if c > 0 and g[s] > 0 and h[t] > 0]
    return 1 / max(congestion) if congestion else None


def transition(edges: Edges, h: Vector) -> list[Fraction]:
    """P(s->t) = c(s,t)·h[t]/h[s] per edge, 0 where h[s] is 0; out-mass plus b[s]/h[s] is 1."""
    return [Fraction(c) * Fraction(h[t]) / Fraction(h[s]) if h[s] > 0 else ZERO for s, t, c in edges]


class Solution(NamedTuple):
    """Everything the two sweeps say about one graph: one entry per token, `edge_flow` one per edge."""

    h: list[Fraction]
    source: list[Fraction]
    g: list[Fraction]
    throughput: list[Fraction]
    edge_flow: list[Fraction]
    absorbed: list[Fraction]


def solve(
    num_nodes: int, edges: Edges, question: Sequence[bool], demand: Vector, source: str | Vector = "uniform"
) -> Solution:
    """Both sweeps on edges that are already effective (see `effective_edges`)."""
    h = potential(num_nodes, edges, demand)
    src = source_distribution(source, question, h)
    g = influence(num_nodes, edges, src, h)
    return Solution(h, src, g, throughput(g, h), edge_flow(edges, g, h), absorbed(g, demand))


# The same numbers from the list of all routes, without either sweep --------------------------


class Route(NamedTuple):
    """One way from the virtual source to the virtual sink and the share of the unit flow that takes it."""

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    share: Fraction


def paths_from(start: int, edges: Edges) -> Iterator[tuple[int, ...]]:
    """Every path of edges with positive capacity that begins at `start`, as edge indices; () first."""
    yield ()
    for index, (s, t, c) in enumerate(edges):
        if s == start and c > 0:
            for rest in paths_from(t, edges):
                yield (index, *rest)


def product(edge_values: Vector, path: Sequence[int]) -> Fraction:
    result = Fraction(1)
    for index in path:
        result *= Fraction(edge_values[index])
    return result


def last_token(start: int, path: Sequence[int], edges: Edges) -> int:
    return edges[path[-1]][1] if path else start


def potential_by_paths(num_nodes: int, edges: Edges, demand: Vector) -> list[Fraction]:
    """h[s] = sum over the paths from s of (product of capacities)·b[last token]."""
    capacities = [c for _, _, c in edges]
    return [
        total([product(capacities, p) * Fraction(demand[last_token(s, p, edges)]) for p in paths_from(s, edges)])
        for s in range(num_nodes)
    ]


def routes(num_nodes: int, edges: Edges, source: Vector, demand: Vector) -> list[Route]:
    """All routes; share = src[first]·(product of P along the path)·b[last]/h[last]."""
    h = potential_by_paths(num_nodes, edges, demand)
    P = transition(edges, h)
    found = []
    for start in range(num_nodes):
        for path in paths_from(start, edges) if source[start] > 0 else ():
            last = last_token(start, path, edges)
            if demand[last] > 0:
                share = Fraction(source[start]) * product(P, path) * Fraction(demand[last]) / h[last]
                found.append(Route((start, *(edges[index][1] for index in path)), path, share))
    return found


def throughput_by_paths(num_nodes: int, edges: Edges, source: Vector, demand: Vector) -> list[Fraction]:
    """f[v] = total share of the routes through v."""
    every = routes(num_nodes, edges, source, demand)
    return [total([route.share for route in every if v in route.nodes]) for v in range(num_nodes)]


def edge_flow_by_paths(num_nodes: int, edges: Edges, source: Vector, demand: Vector) -> list[Fraction]:
    """F(e) = total share of the routes over e."""
    every = routes(num_nodes, edges, source, demand)
    return [total([route.share for route in every if e in route.edges]) for e in range(len(edges))]


def mean_path_length(num_nodes: int, edges: Edges, source: Vector, demand: Vector) -> Fraction:
    """Mean number of edges of a route, weighted by share."""
    return total([len(route.edges) * route.share for route in routes(num_nodes, edges, source, demand)])


# The backbone ------------------------------------------------------------------------------------------


def share_within(every: Sequence[Route], kept: Collection[int]) -> Fraction:
    return total([route.share for route in every if set(route.edges) <= set(kept)])


def kept_share(num_nodes: int, edges: Edges, source: Vector, demand: Vector, kept: Collection[int]) -> Fraction:
    """Share of the unit flow whose whole route uses only edges with an index in `kept`.

    The shares are those of the whole graph: nothing is renormalised over the kept edges. A route of one
    token uses no edge and is always kept.
    """
    return share_within(routes(num_nodes, edges, source, demand), kept)


def smallest_backbone(
    num_nodes: int, edges: Edges, source: Vector, demand: Vector, keep: Number
) -> tuple[list[int], Fraction]:
    """The fewest edges, taken by decreasing flow (ties by index), with kept share >= keep; and that share.

    All edges that carry flow, and the share 0, when nothing flows at all.
    """
    every = routes(num_nodes, edges, source, demand)
    flows = edge_flow_by_paths(num_nodes, edges, source, demand)
    carrying = [e for e in sorted(range(len(edges)), key=lambda e: (-flows[e], e)) if flows[e] > 0]
    for count in range(len(carrying)):
        if share_within(every, carrying[:count]) >= Fraction(keep):
            return carrying[:count], share_within(every, carrying[:count])
    return carrying, share_within(every, carrying)


def widest_path(
    num_nodes: int, edges: Edges, flows: Vector, source: Vector, absorbed: Vector
) -> tuple[Fraction, list[int]]:
    """Bottleneck and nodes of a path that maximises min(source, edge flows, absorption at its end).

    Among equals: begin at a token before entering it by an edge, the earlier edge, the earlier end.
    """
    width = exact(source)
    parent: list[int | None] = [None] * num_nodes
    for t in range(num_nodes):
        for index, (s, head, _) in enumerate(edges):
            through = min(width[s], Fraction(flows[index]))
            if head == t and through > width[t]:
                width[t], parent[t] = through, s
    ends = [min(width[t], Fraction(absorbed[t])) for t in range(num_nodes)]
    end = max(range(num_nodes), key=lambda t: (ends[t], -t))
    nodes = [end]
    while (before := parent[nodes[0]]) is not None:
        nodes.insert(0, before)
    return ends[end], nodes


def widest_path_decomposition(
    num_nodes: int, edges: Edges, flows: Vector, source: Vector, absorbed: Vector
) -> list[tuple[list[int], Fraction]]:
    """The flow as (path nodes, amount): take the widest path, subtract it, until nothing is left.

    At most one edge per pair of tokens. The paths are not unique where widths tie; the amounts never
    increase and sum to the sum of `source`.
    """
    left, entering, leaving = exact(flows), exact(source), exact(absorbed)
    index_of = {(s, t): index for index, (s, t, _) in enumerate(edges)}
    paths = []
    while num_nodes:
        amount, nodes = widest_path(num_nodes, edges, left, entering, leaving)
        if amount == 0:
            break
        paths.append((nodes, amount))
        entering[nodes[0]] -= amount
        leaving[nodes[-1]] -= amount
        for pair in pairwise(nodes):
            left[index_of[pair]] -= amount
    return paths


# Max flow: a certificate, not a score --------------------------------------------------------------------


class MaxFlow(NamedTuple):
    """The value, one flow per edge that reaches it, and the source side of a smallest cut (per token)."""

    value: Fraction
    edge_flow: list[Fraction]
    source_side: list[bool]


def arcs_with_terminals(num_nodes: int, edges: Edges, sources: Sequence[int], sinks: Sequence[int]) -> list[Edge]:
    """Edges, then super source -> sources, then sinks -> super sink; capacity sum + 1 stands for no limit."""
    unlimited = total(exact([c for _, _, c in edges])) + 1
    super_source, super_sink = num_nodes, num_nodes + 1
    return [
        *((s, t, Fraction(c)) for s, t, c in edges),
        *((super_source, v, unlimited) for v in sources),
        *((v, super_sink, unlimited) for v in sinks),
    ]


def shortest_augmenting_path(start: int, arcs: Sequence[Edge], flow: Sequence[Fraction]) -> dict[int, tuple]:
    """Breadth-first search of the residual graph: token -> (arc index, +1 or -1, token before)."""
    found: dict[int, tuple] = {start: ()}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for index, (s, t, c) in enumerate(arcs):
            if s == here and t not in found and flow[index] < c:
                found[t] = (index, 1, here)
                queue.append(t)
            if t == here and s not in found and flow[index] > 0:
                found[s] = (index, -1, here)
                queue.append(s)
    return found


def max_flow(num_nodes: int, edges: Edges, sources: Sequence[int], sinks: Sequence[int]) -> MaxFlow:
    """Edmonds-Karp: augment along shortest residual paths until the super sink is cut off."""
    arcs = arcs_with_terminals(num_nodes, edges, sources, sinks)
    flow = [ZERO] * len(arcs)
    super_source, super_sink = num_nodes, num_nodes + 1
    while super_sink in (found := shortest_augmenting_path(super_source, arcs, flow)):
        steps, here = [], super_sink
        while here != super_source:
            index, sign, here = found[here]
            steps.append((index, sign))
        amount = min(arcs[i][2] - flow[i] if sign > 0 else flow[i] for i, sign in steps)
        for index, sign in steps:
            flow[index] += sign * amount
    value = total([flow[i] for i, (s, _, _) in enumerate(arcs) if s == super_source])
    return MaxFlow(value, flow[: len(edges)], [v in found for v in range(num_nodes)])


def max_flow_value(num_nodes: int, edges: Edges, sources: Sequence[int], sinks: Sequence[int]) -> Fraction:
    """V: the most that edges of these capacities carry from sources to sinks.

    A token that is both is an unlimited route; its V is a stand-in above the sum of all capacities.
    """
    return max_flow(num_nodes, edges, sources, sinks).value


def min_cut(num_nodes: int, edges: Edges, sources: Sequence[int], sinks: Sequence[int]) -> tuple[list[bool], list[int]]:
    """Source side per token and the indices of the edges that leave it; their capacities sum to V."""
    side = max_flow(num_nodes, edges, sources, sinks).source_side
    return side, [index for index, (s, t, c) in enumerate(edges) if side[s] and not side[t] and c > 0]


def max_flow_through(num_nodes: int, edges: Edges, sources: Sequence[int], sinks: Sequence[int], v: int) -> Fraction:
    """M[v] = min(maxflow(sources, v), maxflow(v, sinks))."""
    return min(max_flow_value(num_nodes, edges, sources, [v]), max_flow_value(num_nodes, edges, [v], sinks))
