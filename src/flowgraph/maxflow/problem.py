"""One max flow problem: igraph or networkx solve it, and what they say is proved before it is believed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import igraph
import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError, TooLargeError
from flowgraph.flow.flow import Flow
from flowgraph.flow.solve import Absorption
from flowgraph.graph.flow_graph import FlowGraph

Backend = Literal["igraph", "networkx"]
MAX_EDGES = 1_000_000
"""Default size limit: dense graphs of 1,400 tokens, about three seconds."""
_SECONDS_PER_EDGE = {"igraph": 2.5e-6, "networkx": 5e-5}
_BYTES_PER_EDGE = {"igraph": 200, "networkx": 1500}
TOLERANCE = 1e-12
"""What the re-check forgives, as a share of the sum of capacities; igraph was measured at 1e-15 and below."""

_FULL = 1e-12
"""An edge is full, or unused, up to this share of its capacity."""

_Solver = Callable[[NDArray, NDArray, NDArray], tuple[NDArray, NDArray]]


@dataclass(frozen=True, eq=False)
class MaxFlow:
    """A max flow and a min cut of one graph, each re-checked and each proving the other.

    Attributes:
        value: V, what leaves the source tokens (net), in units of capacity.
        error: the exact V lies in ``[cut_capacity - error, cut_capacity]``; proved, not estimated.
        edge_flow: ``[E]`` flow per edge in the order of ``graph.edge_index``, ``0 <= edge_flow <= capacity``. One
            max flow of many: other solvers may route it differently.
        source_side: ``[N]`` bool; every source token is in it, no sink token is: the min cut nearest to the sources,
            what they can still reach where edges have room left.
        sink_side: the same from the other end: the min cut nearest to the sinks is the one around this set.
        cut_edges: indices of the edges that leave ``source_side`` (into ``graph.edge_index``).
        cut_capacity: sum of their capacities, equal to ``value`` up to ``error``.
    """

    value: float
    error: float
    edge_flow: Float64[Tensor, " edges"]
    source_side: Bool[Tensor, " tokens"]
    sink_side: Bool[Tensor, " tokens"]
    cut_edges: Int64[Tensor, " cut"]
    cut_capacity: float

    @property
    def unique_cut(self) -> bool:
        """Whether there is only one min cut: the nearest to the sources is the nearest to the sinks."""
        return bool((self.source_side != self.sink_side).all())

    def __repr__(self) -> str:
        return f"MaxFlow(value={self.value:.6g}, error={self.error:.1g}, cut_edges={self.cut_edges.numel()})"


class MaxFlowProblem:
    """The capacities of one graph and its terminals, set up once for several max flows; options of :func:`max_flow`."""

    def __init__(
        self,
        graph: FlowGraph | Flow,
        *,
        source: Tensor | None = None,
        demand: Tensor | None = None,
        absorption: Absorption | None = None,
        damping: float | None = None,
        backend: Backend = "igraph",
        max_edges: int = MAX_EDGES,
    ) -> None:
        if backend not in get_args(Backend):
            raise InvalidInputError(f"backend: must be 'igraph' or 'networkx', got {backend!r}; igraph is the faster")
        self.graph = graph.graph if isinstance(graph, Flow) else graph
        _check_graph(self.graph, max_edges, backend)
        if isinstance(graph, Flow):
            _refuse_beside_flow(source=source, demand=demand, absorption=absorption, damping=damping)
            weight, sources, sinks = graph.weight, source_tokens(graph), graph.demand > 0
        else:
            weight, sources, sinks = _problem(graph, source, demand, absorption, 1.0 if damping is None else damping)
        self.num_tokens = int(self.graph.num_nodes or 0)
        self.tail, self.head = self.graph.edge_index.cpu().numpy()
        self.capacity = weight.cpu().numpy()
        self.sources, self.sinks = sources.cpu().numpy(), sinks.cpu().numpy()
        self.total, self.full = math.fsum(self.capacity), _FULL
        tokens = np.arange(self.num_tokens + 1)
        self.by_tail = np.argsort(self.tail, kind="stable")
        self.first_in: list[int] = np.searchsorted(self.head, tokens).tolist()
        self.first_out: list[int] = np.searchsorted(self.tail[self.by_tail], tokens).tolist()
        both = self.sources & self.sinks
        if both.any():
            raise InvalidInputError(
                f"source, demand: a max flow needs disjoint terminals, got token {int(both.argmax())} in both, through "
                "which any amount could pass; set one of the two to zero there"
            )
        self._solver: _Solver = _igraph_solver(self) if backend == "igraph" else _networkx_solver(self)

    def between(self, sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> MaxFlow:
        """Verified max flow and min cut between two disjoint token masks.

        The terminal arcs get twice the sum of all capacities, which no flow can fill: infinities break solvers, and
        a sum + 1 is the sum itself from 2**53 on.
        """
        unlimited = 2.0 * self.total or 1.0
        arcs = np.concatenate([self.capacity, unlimited * sources, unlimited * sinks])
        flow, side = self._solver(arcs, sources, sinks)
        return _verified(self, sources, sinks, flow, side)

    def through(self, token: int) -> float:
        """M[token], see :func:`max_flow_through`."""
        if not 0 <= token < self.num_tokens:
            raise InvalidInputError(
                f"token: must lie in 0..{self.num_tokens - 1}, got {token}; count tokens from the start"
            )
        here = np.arange(self.num_tokens) == token
        reach = math.inf if self.sources[token] else self.between(self.sources, here).cut_capacity
        onward = math.inf if self.sinks[token] else self.between(here, self.sinks).cut_capacity
        return min(reach, onward)

    def without(self, token: int) -> float:
        """V without one token, see :func:`flowgraph.max_flow_without`."""
        if not 0 <= token < self.num_tokens or self.sources[token] or self.sinks[token]:
            raise InvalidInputError(
                f"token: must lie in 0..{self.num_tokens - 1} and be neither source nor sink, got {token}; "
                "take a token in between"
            )
        elsewhere = (self.tail != token) & (self.head != token)
        return self._with(self.capacity * elsewhere).between(self.sources, self.sinks).cut_capacity

    def bracket(self) -> tuple[float, float]:
        """An interval that contains V for certain, see :func:`flowgraph.max_flow_bracket`."""
        if self.total == 0:
            return 0.0, 0.0
        # The solver adds up to twice the sum of all capacities, which rounding up raises by one for each edge.
        shift = 50 - math.frexp(self.total)[1]
        low, high = (
            self._with(rounded(np.ldexp(self.capacity, shift)), full=0.0).between(self.sources, self.sinks)
            for rounded in (np.floor, np.ceil)
        )
        if low.value != low.cut_capacity or high.value != high.cut_capacity:
            raise NumericalRangeError(
                "max flow: on integers a flow must equal its cut to the last bit, got "
                f"{low.value!r} and {low.cut_capacity!r}, {high.value!r} and {high.cut_capacity!r}; please report it"
            )
        return math.ldexp(low.value, -shift), math.ldexp(high.value, -shift)

    def dominators(self) -> Bool[Tensor, " tokens"]:
        """Tokens on every route, see :func:`flowgraph.dominators`."""
        size, live = self.num_tokens, self.capacity > 0
        ends = [
            (self.tail[live], self.head[live]),
            (np.full(self.sources.sum(), size), np.flatnonzero(self.sources)),
            (np.flatnonzero(self.sinks), np.full(self.sinks.sum(), size + 1)),
        ]
        edges = np.column_stack([np.concatenate(part) for part in zip(*ends, strict=True)])
        above = igraph.Graph(n=size + 2, edges=edges, directed=True).dominator(size)
        on_every_route, node = np.zeros(size + 2, dtype=bool), above[size + 1]
        while node >= 0:
            on_every_route[node], node = True, above[node]
        return torch.from_numpy(on_every_route[:size]).to(self.graph.edge_index.device)

    def _with(self, capacity: NDArray, full: float | None = None) -> MaxFlowProblem:
        other = copy.copy(self)
        other.capacity, other.total = capacity, math.fsum(capacity)
        other.full = self.full if full is None else full
        return other


def _check_graph(graph: FlowGraph, max_edges: int, backend: str) -> None:
    if not isinstance(graph, FlowGraph):
        raise GraphError(f"graph: must be a FlowGraph or a Flow, got {type(graph).__name__}; see FlowGraph.from_dense")
    if isinstance(graph, Batch):
        raise InvalidInputError(
            f"graph: max flow takes one graph at a time, got a Batch of {graph.num_graphs}; call it for each graph in "
            "batch.to_data_list()"
        )
    if graph.num_edges > max_edges:
        seconds, size = graph.num_edges * _SECONDS_PER_EDGE[backend], graph.num_edges * _BYTES_PER_EDGE[backend] / 1e6
        raise TooLargeError(
            f"graph: an exact max flow takes at most max_edges = {max_edges:,} edges, got {graph.num_edges:,} (roughly "
            f"{seconds:.1f} s and {size:.0f} MB with {backend}); pass max_edges={graph.num_edges} to run it, or prune "
            "by flow first"
        )


def _refuse_beside_flow(**options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InvalidInputError(
            f"{', '.join(given)}: a Flow brings its own, got {'one' if len(given) == 1 else 'them'} beside a Flow; "
            "pass flow.graph to choose freely"
        )


def source_tokens(flow: Flow) -> Bool[Tensor, " tokens"]:
    """Where the unit enters; an infeasible flow has no such token, so the question stands in for it."""
    support = flow.source > 0
    return support if bool(support.any()) or flow.source_rule == "vector" else flow.graph.question_mask


def _problem(
    graph: FlowGraph, source: Tensor | None, demand: Tensor | None, absorption: str | None, damping: float
) -> tuple[Float64[Tensor, " edges"], Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Capacities and terminals of a graph with the defaults of ``solve``."""
    if not 0 < damping <= 1:
        raise InvalidInputError(f"damping: must lie in (0, 1], got {damping!r}; 1 is undamped")
    if absorption is None:
        absorption = "absorb" if demand is None else "pass_through"
    if absorption not in get_args(Absorption):
        raise InvalidInputError(f"absorption: must be 'absorb' or 'pass_through', got {absorption!r}; see solve")
    absorbing = graph.answer_mask & (absorption == "absorb")
    sources = graph.question_mask if source is None else _support(source, graph, "source")
    sinks = graph.answer_mask if demand is None else _support(demand, graph, "demand")
    return graph.capacity.double() * ~absorbing[graph.edge_index[0]] * damping, sources, sinks


def _support(vector: Tensor, graph: FlowGraph, name: str) -> Bool[Tensor, " tokens"]:
    vector = torch.as_tensor(vector, device=graph.capacity.device).double()
    if vector.shape != (graph.num_nodes,):
        raise InvalidInputError(
            f"{name}: must have one entry per token ({graph.num_nodes}), got shape {tuple(vector.shape)}; "
            "pass a mask or a vector [N]"
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
        raise InvalidInputError(
            f"{name}: must be finite and non-negative, got {vector.min().item():g} as its least; clamp it first"
        )
    return vector > 0


def _igraph_solver(network: MaxFlowProblem) -> _Solver:
    size = network.num_tokens
    tokens = np.arange(size)
    tails = np.concatenate([network.tail, np.full(size, size), tokens])
    heads = np.concatenate([network.head, tokens, np.full(size, size + 1)])
    peer = igraph.Graph(n=size + 2, edges=np.column_stack([tails, heads]), directed=True)

    def solver(arcs: NDArray, sources: NDArray, sinks: NDArray) -> tuple[NDArray, NDArray]:
        best = peer.maxflow(size, size + 1, capacity=arcs.tolist())
        side = np.zeros(size + 2, dtype=bool)
        side[best.partition[0]] = True
        return np.array(best.flow[: network.capacity.size], dtype=np.float64), side[:size]

    return solver


def _networkx_solver(network: MaxFlowProblem) -> _Solver:
    import networkx as nx
    from networkx.algorithms.flow import preflow_push

    size = network.num_tokens
    edges = list(zip(network.tail.tolist(), network.head.tolist(), strict=True))

    def solver(arcs: NDArray, sources: NDArray, sinks: NDArray) -> tuple[NDArray, NDArray]:
        peer = nx.DiGraph()
        peer.add_nodes_from(range(size + 2))
        ends = [*edges, *((size, v) for v in range(size)), *((v, size + 1) for v in range(size))]
        # On floats networkx can lose track of which edges are full; whole numbers of 900 bits round nothing.
        shift = 900 - math.frexp(arcs.max(initial=0.0))[1]
        capacities = zip(ends, (int(c) for c in np.ldexp(arcs, shift)), strict=True)
        peer.add_edges_from((s, t, {"capacity": c}) for (s, t), c in capacities if c > 0)
        residual = preflow_push(peer, size, size + 1)
        flow = [math.ldexp(residual[s][t]["flow"], -shift) if residual.has_edge(s, t) else 0.0 for s, t in edges]
        full = [(s, t) for s, t, arc in residual.edges(data=True) if arc["flow"] == arc["capacity"]]
        residual.remove_edges_from(full)
        side = np.ones(size + 2, dtype=bool)
        side[[size + 1, *nx.ancestors(residual, size + 1)]] = False
        return np.array(flow, dtype=np.float64), side[:size]

    return solver


def _verified(network: MaxFlowProblem, sources: NDArray, sinks: NDArray, flow: NDArray, side: NDArray) -> MaxFlow:
    """Re-check feasibility, conservation and duality; what comes back holds whatever the solver did."""
    clipped = np.clip(flow, 0.0, network.capacity)
    allowed = TOLERANCE * network.total
    excess = _excess(network, clipped)
    leaving = [*clipped[sources[network.tail]], *-clipped[sources[network.head]]]
    value, unbalanced = math.fsum(leaving), math.fsum(np.abs(excess[~sources & ~sinks]))
    source_side = _reachable(network, clipped, sources)
    sink_side = _reachable(network, clipped, sinks, backwards=True)
    best = min(_cut(network, cut)[0] for cut in (side, source_side, ~sink_side))
    # Where rounding blurs which edges are full, an extreme cut may be larger than the solver's; then that one counts.
    if not _separates(source_side, sources, sinks) or _cut(network, source_side)[0] > best * (1 + network.full):
        source_side = side
    if not _separates(~sink_side, sources, sinks) or _cut(network, ~sink_side)[0] > best * (1 + network.full):
        sink_side = ~side
    cut_capacity, crossing = _cut(network, source_side)
    # Rounded up, all of it: what is proved must not hang on half a unit in the last place.
    error = max(0.0, math.fsum([cut_capacity, unbalanced * (1 + 2**-50), *(-x for x in leaving)]))
    error = math.nextafter(error, math.inf) if error > 0 else 0.0
    failures = {
        "flow within the capacities": float(np.abs(clipped - flow).max(initial=0.0)) <= allowed,
        "a cut between sources and sinks": _separates(side, sources, sinks),
        "conservation and value = cut capacity": max(error, _cut(network, side)[0] - cut_capacity) <= allowed,
    }
    broken = [name for name, holds in failures.items() if not holds]
    if broken:
        raise NumericalRangeError(
            f"max flow: the solver's answer must pass its re-check, got a failure of {', '.join(broken)} (V in "
            f"[{cut_capacity - error:.17g}, {cut_capacity:.17g}]); rescale the capacities or try backend='networkx'"
        )
    device = network.graph.edge_index.device
    return MaxFlow(
        value=value,
        error=error,
        edge_flow=torch.from_numpy(clipped).to(device),
        source_side=torch.from_numpy(source_side).to(device),
        sink_side=torch.from_numpy(sink_side).to(device),
        cut_edges=torch.from_numpy(crossing).to(device),
        cut_capacity=cut_capacity,
    )


def _cut(network: MaxFlowProblem, side: NDArray) -> tuple[float, NDArray]:
    """Capacity of the edges that leave a set of tokens, rounded up if at all, and which they are."""
    crossing = np.flatnonzero(side[network.tail] & ~side[network.head] & (network.capacity > 0))
    terms = network.capacity[crossing].tolist()
    total = math.fsum(terms)
    return math.nextafter(total, math.inf) if math.fsum([*terms, -total]) > 0 else total, crossing


def _separates(side: NDArray, sources: NDArray, sinks: NDArray) -> bool:
    return bool(side[sources].all() and not side[sinks].any())


def _reachable(network: MaxFlowProblem, flow: NDArray, start: NDArray, *, backwards: bool = False) -> NDArray:
    """Tokens that more flow could still be sent to (or from): a search of the residual graph."""
    least = network.full * network.capacity
    room, used = network.capacity - flow > least, flow > least
    tails = np.concatenate([network.tail[room], network.head[used]])
    heads = np.concatenate([network.head[room], network.tail[used]])
    if backwards:
        tails, heads = heads, tails
    order = np.argsort(tails, kind="stable")
    first, onward = np.searchsorted(tails[order], np.arange(network.num_tokens + 1)), heads[order]
    reached, frontier = start.copy(), np.flatnonzero(start)
    while frontier.size:
        found = np.concatenate([onward[first[v] : first[v + 1]] for v in frontier])
        frontier = np.unique(found[~reached[found]])
        reached[frontier] = True
    return reached


def _excess(network: MaxFlowProblem, flow: NDArray) -> NDArray:
    """Inflow - outflow of every token, each correctly rounded."""
    arriving, leaving = flow.tolist(), (-flow[network.by_tail]).tolist()
    into, out = network.first_in, network.first_out
    return np.array(
        [math.fsum(arriving[into[v] : into[v + 1]] + leaving[out[v] : out[v + 1]]) for v in range(network.num_tokens)]
    )
