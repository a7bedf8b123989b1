r"""Exact max flow and min cut: a certificate for a flow, never a score.

igraph computes, this module re-checks. No number of the solver is trusted: the edge flow is clipped to the
capacities, its conservation and the capacity of the cut are summed again with ``math.fsum``, and by weak duality

.. math:: \text{value} - \sum_v |\text{excess}(v)| \;\le\; V \;\le\; \text{capacity of the cut},

whatever the solver did. The width of that interval is :attr:`MaxFlow.error`.

Source: method, section 4. V between question and answer is nearly the trivial cut on attention graphs, and the
node flows of a max flow are not unique; use :func:`flowgraph.solve` to score tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import igraph
import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError, TooLargeError
from flowgraph.flow import Flow
from flowgraph.graph import FlowGraph
from flowgraph.solving import Absorption

Backend = Literal["igraph", "networkx"]
MAX_EDGES = 1_000_000
"""Default size limit: dense graphs of 1,400 tokens, about three seconds."""
_SECONDS_PER_EDGE = {"igraph": 2.5e-6, "networkx": 5e-5}
_BYTES_PER_EDGE = {"igraph": 200, "networkx": 1500}
TOLERANCE = 1e-12
"""What the re-check forgives, as a share of the sum of capacities; igraph was measured at 1e-15 and below."""

_Solver = Callable[[NDArray, NDArray, NDArray], tuple[NDArray, NDArray]]


@dataclass(frozen=True, eq=False)
class MaxFlow:
    """A max flow and a min cut of one graph, each re-checked and each proving the other.

    Attributes:
        value: V, what leaves the source tokens (net), in units of capacity.
        error: the exact V lies in ``[cut_capacity - error, cut_capacity]``; proved, not estimated.
        edge_flow: ``[E]`` flow per edge in the order of ``graph.edge_index``, ``0 <= edge_flow <= capacity``. One
            max flow of many: other solvers may route it differently.
        source_side: ``[N]`` bool; every source token is in it, no sink token is.
        cut_edges: indices of the edges that leave ``source_side`` (into ``graph.edge_index``).
        cut_capacity: sum of their capacities, equal to ``value`` up to ``error``.
    """

    value: float
    error: float
    edge_flow: Float64[Tensor, " edges"]
    source_side: Bool[Tensor, " tokens"]
    cut_edges: Int64[Tensor, " cut"]
    cut_capacity: float

    def __repr__(self) -> str:
        return f"MaxFlow(value={self.value:.6g}, error={self.error:.1g}, cut_edges={self.cut_edges.numel()})"


def max_flow(
    graph: FlowGraph | Flow,
    *,
    source: Tensor | None = None,
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float | None = None,
    backend: Backend = "igraph",
    max_edges: int = MAX_EDGES,
) -> MaxFlow:
    r"""The most that the edges carry from source tokens to sink tokens, with a min cut.

    .. math::
        V = \max_x \sum_{s \in Q} x_{out}(s) - x_{in}(s), \quad 0 \le x(s,t) \le N[t,s], \quad
        x_{in}(v) = x_{out}(v) \text{ elsewhere},

    from the tokens Q with positive source to the tokens with positive demand b; N as in :func:`flowgraph.solve`.

    Args:
        graph: one :class:`FlowGraph`, or the :class:`Flow` solved on one; a Flow brings its own source,
            demand, absorption and damping, so none may be given beside it.
        source: ``[N]`` mask or non-negative vector, of which the support counts; default: the question.
        demand: the same for the sinks; default: the answer.
        absorption: ``"absorb"``, no edge leaves an answer token (default with the default demand), or
            ``"pass_through"`` (default with a demand of your own).
        damping: factor on every capacity, in (0, 1]; default 1.
        backend: ``"igraph"``, or ``"networkx"`` as a cross-check (80 to 240 times slower in the solver itself).
        max_edges: refuse larger graphs.

    Returns:
        A :class:`MaxFlow`; value 0 and an empty cut where the sinks are unreachable.

    Raises:
        InvalidInputError: a Batch; a token that is both source and sink (nothing limits it); a vector of the
            wrong length or range; an option beside a Flow, or outside its set.
        TooLargeError: more than ``max_edges`` edges.
        NumericalRangeError: the solver's answer failed the re-check.

    Cost: push-relabel, about 0.3 / 1.2 / 2.5 s at 500 / 1,000 / 1,400 dense tokens (2 shared cores).
    Source: method, section 4; igraph ``Graph.maxflow``.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> best = max_flow(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> best.value, best.source_side.tolist(), best.cut_edges.tolist()
        (0.5, [True, True, False, False], [1, 2])
    """
    network = Network(
        graph,
        source=source,
        demand=demand,
        absorption=absorption,
        damping=damping,
        backend=backend,
        max_edges=max_edges,
    )
    return network.between(network.sources, network.sinks)


def max_flow_through(graph: FlowGraph | Flow, token: int, **options: Any) -> float:
    r"""The most that could pass through one token: the smaller of what can reach it and what can go on from it.

    .. math:: M[v] = \min(\text{maxflow}(Q, v), \text{maxflow}(v, \text{sinks})),

    where a leg is unlimited when v is itself a source (a sink). Scaled to fit the capacities, the conserved
    flow stays below it: :math:`\alpha f[v] \le M[v]`.

    Args:
        graph: see :func:`max_flow`.
        token: v.
        options: those of :func:`max_flow`.

    Returns:
        M[v] as the capacity of a verified cut, so never below the exact M[v].

    Raises:
        InvalidInputError: token outside the graph; and as :func:`max_flow`.

    Cost: two max flows. Source: method, section 4, item 8.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> max_flow_through(FlowGraph.from_dense(weights, question=[0], answer=[3]), 2)
        0.25
    """
    return Network(graph, **options).through(token)


class Network:
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
            weight, sources, sinks = graph.weight(), source_tokens(graph), graph.demand > 0
        else:
            weight, sources, sinks = _problem(graph, source, demand, absorption, 1.0 if damping is None else damping)
        self.num_tokens = int(self.graph.num_nodes or 0)
        self.tail, self.head = self.graph.edge_index.cpu().numpy()
        self.capacity = weight.cpu().numpy()
        self.sources, self.sinks = sources.cpu().numpy(), sinks.cpu().numpy()
        self.total = math.fsum(self.capacity)
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


def _igraph_solver(network: Network) -> _Solver:
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


def _networkx_solver(network: Network) -> _Solver:
    import networkx as nx
    from networkx.algorithms.flow import preflow_push

    size = network.num_tokens
    edges = list(zip(network.tail.tolist(), network.head.tolist(), strict=True))

    def solver(arcs: NDArray, sources: NDArray, sinks: NDArray) -> tuple[NDArray, NDArray]:
        peer = nx.DiGraph()
        peer.add_nodes_from(range(size + 2))
        ends = [*edges, *((size, v) for v in range(size)), *((v, size + 1) for v in range(size))]
        capacities = zip(ends, arcs.tolist(), strict=True)
        peer.add_edges_from((s, t, {"capacity": c}) for (s, t), c in capacities if c > 0)
        residual = preflow_push(peer, size, size + 1)
        flow = [residual[s][t]["flow"] if residual.has_edge(s, t) else 0.0 for s, t in edges]
        full = [(s, t) for s, t, arc in residual.edges(data=True) if arc["flow"] == arc["capacity"]]
        residual.remove_edges_from(full)
        side = np.ones(size + 2, dtype=bool)
        side[[size + 1, *nx.ancestors(residual, size + 1)]] = False
        return np.array(flow, dtype=np.float64), side[:size]

    return solver


def _verified(network: Network, sources: NDArray, sinks: NDArray, flow: NDArray, side: NDArray) -> MaxFlow:
    """Re-check feasibility, conservation and duality; what comes back holds whatever the solver did."""
    clipped = np.clip(flow, 0.0, network.capacity)
    allowed = TOLERANCE * network.total
    excess = _excess(network, clipped)
    value = math.fsum(-excess[sources])
    crossing = np.flatnonzero(side[network.tail] & ~side[network.head] & (network.capacity > 0))
    cut_capacity = math.fsum(network.capacity[crossing])
    error = max(0.0, cut_capacity - value + math.fsum(np.abs(excess[~sources & ~sinks])))
    failures = {
        "flow within the capacities": float(np.abs(clipped - flow).max(initial=0.0)) <= allowed,
        "a cut between sources and sinks": bool(side[sources].all() and not side[sinks].any()),
        "conservation and value = cut capacity": error <= allowed,
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
        source_side=torch.from_numpy(side).to(device),
        cut_edges=torch.from_numpy(crossing).to(device),
        cut_capacity=cut_capacity,
    )


def _excess(network: Network, flow: NDArray) -> NDArray:
    """Inflow - outflow of every token, each correctly rounded."""
    arriving, leaving = flow.tolist(), (-flow[network.by_tail]).tolist()
    into, out = network.first_in, network.first_out
    return np.array(
        [math.fsum(arriving[into[v] : into[v + 1]] + leaving[out[v] : out[v + 1]]) for v in range(network.num_tokens)]
    )
