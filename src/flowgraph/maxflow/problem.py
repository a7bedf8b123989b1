"""MaxFlowProblem: the capacities and terminals of one graph, and the max flows and min cuts on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import igraph
import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError, TooLargeError
from flowgraph.flow.flow import Flow
from flowgraph.flow.solve import Absorption
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.graph.signed_graph import refuse_signed
from flowgraph.graph.validity import require_usable
from flowgraph.masks import as_tensor
from flowgraph.maxflow.capacity_arrays import CapacityArrays
from flowgraph.maxflow.solvers import igraph_solver, networkx_solver
from flowgraph.maxflow.verification import MaxFlow, verified_max_flow

Backend = Literal["igraph", "networkx"]
MAX_EDGES = 1_000_000
"""Default size limit: dense graphs of 1,400 tokens, about three seconds."""
_LEAST_POSITIVE = math.ulp(0.0)
_SECONDS_PER_EDGE = {"igraph": 2.5e-6, "networkx": 5e-5}
_BYTES_PER_EDGE = {"igraph": 200, "networkx": 1500}


class MaxFlowProblem:
    """The capacities of one graph and its terminals, set up once for several max flows.

    Arguments, and the exceptions of the constructor, are those of :func:`flowgraph.max_flow`.

    Attributes:
        graph: the graph.
        num_tokens: T.
        sources: ``[T]`` bool, tokens at which flow may enter.
        sinks: ``[T]`` bool, tokens at which it may leave; disjoint from ``sources``.
        arrays: edges and capacities N.
    """

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

        # Capacities N, and terminals: those of the flow, or those of the graph with the defaults of solve.
        if isinstance(graph, Flow):
            _refuse_beside_flow(source=source, demand=demand, absorption=absorption, damping=damping)
            weight = graph.weight
            sources = source_tokens(graph)
            sinks = graph.demand > 0
        else:
            weight = _edge_weights(graph, demand, absorption, damping)
            sources = graph.question_mask if source is None else _support(source, graph, "source")
            sinks = graph.answer_mask if demand is None else _support(demand, graph, "demand")

        # The arrays that the solvers read, on the CPU.
        self.num_tokens = int(self.graph.num_nodes or 0)
        self.sources = sources.cpu().numpy()
        self.sinks = sinks.cpu().numpy()
        edge_index = self.graph.edge_index.cpu().numpy()
        self.arrays = CapacityArrays.from_edges(self.num_tokens, edge_index, weight.cpu().numpy())

        # A token that is source and sink would carry an unlimited flow.
        both = self.sources & self.sinks
        if both.any():
            raise InvalidInputError(
                f"source, demand: a max flow needs disjoint terminals, got token {int(both.argmax())} in both, through "
                "which any amount could pass; set one of the two to zero there"
            )
        # networkx solves in integers, without rounding.
        self._is_exact = backend == "networkx"
        if backend == "igraph":
            self._solver = igraph_solver(self.arrays)
        else:
            self._solver = networkx_solver(self.arrays)

    def between(self, sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> MaxFlow:
        """Compute the verified max flow and min cut between two disjoint token masks.

        Raises:
            NumericalRangeError: the solver's answer failed its re-check.
        """
        return self._max_flow(self.arrays, sources, sinks)

    def through(self, token: int) -> float:
        """Compute M[token], see :func:`flowgraph.max_flow_through`."""
        if not 0 <= token < self.num_tokens:
            raise InvalidInputError(
                f"token: must lie in 0..{self.num_tokens - 1}, got {token}; count tokens from the start"
            )
        # M[v] = min(maxflow(Q, v), maxflow(v, sinks)); from a source to itself, nothing limits the flow.
        is_token = np.arange(self.num_tokens) == token
        arriving = math.inf
        if not self.sources[token]:
            arriving = self.between(self.sources, is_token).cut_capacity
        leaving = math.inf
        if not self.sinks[token]:
            leaving = self.between(is_token, self.sinks).cut_capacity
        return min(arriving, leaving)

    def without(self, token: int) -> float:
        """Compute V without one token, see :func:`flowgraph.max_flow_without`."""
        if not 0 <= token < self.num_tokens or self.sources[token] or self.sinks[token]:
            raise InvalidInputError(
                f"token: must lie in 0..{self.num_tokens - 1} and be neither source nor sink, got {token}; "
                "take a token in between"
            )
        elsewhere = (self.arrays.tail != token) & (self.arrays.head != token)
        remaining = self.arrays.with_capacity(self.arrays.capacity * elsewhere)
        return self._max_flow(remaining, self.sources, self.sinks).cut_capacity

    def bracket(self) -> tuple[float, float]:
        """Compute an interval that contains V, see :func:`flowgraph.max_flow_bracket`."""
        bounded = _BoundedProblem.of(self.arrays, self.sources, self.sinks)
        if bounded is None:
            return 0.0, 0.0

        # One power of two scales the sum of the bounded capacities to 2**50. The terminal arcs are at most twice that
        # sum, and rounding up adds at most 1 per edge, so every integer that the solver meets stays below 2**53.
        total = math.fsum(bounded.arrays.capacity)
        shift = 50 - math.frexp(total)[1]
        scaled = np.ldexp(bounded.arrays.capacity, shift)
        low = self._integer_max_flow(np.floor(scaled))
        high = self._integer_max_flow(np.ceil(scaled))

        if low.value != low.cut_capacity or high.value != high.cut_capacity:
            raise NumericalRangeError(
                "max flow: on integers a flow must equal its cut to the last bit, got "
                f"{low.value!r} and {low.cut_capacity!r}, {high.value!r} and {high.cut_capacity!r}; please report it"
            )
        unit = bounded.exponent - shift
        return _in_range(low.value, unit), _in_range(high.value, unit)

    def dominators(self) -> Bool[Tensor, " tokens"]:
        """Find the tokens on every route, see :func:`flowgraph.dominators`."""
        virtual_source = self.num_tokens
        virtual_sink = self.num_tokens + 1
        source_tokens = np.flatnonzero(self.sources)
        sink_tokens = np.flatnonzero(self.sinks)
        is_active_edge = self.arrays.capacity > 0

        # The edges of positive capacity, one virtual source before the sources, one virtual sink after the sinks.
        active_edges = np.column_stack([self.arrays.tail[is_active_edge], self.arrays.head[is_active_edge]])
        source_arcs = np.column_stack([np.full_like(source_tokens, virtual_source), source_tokens])
        sink_arcs = np.column_stack([sink_tokens, np.full_like(sink_tokens, virtual_sink)])
        edges = np.concatenate([active_edges, source_arcs, sink_arcs])
        graph = igraph.Graph(n=self.num_tokens + 2, edges=edges, directed=True)

        # Every route to the sink passes its immediate dominator, that token's own one, and so on up to the source.
        immediate_dominator = graph.dominator(virtual_source)
        on_every_route = np.zeros(self.num_tokens + 2, dtype=bool)
        node = immediate_dominator[virtual_sink]
        while node >= 0:
            on_every_route[node] = True
            node = immediate_dominator[node]
        return torch.from_numpy(on_every_route[: self.num_tokens]).to(self.graph.edge_index.device)

    def _integer_max_flow(self, capacity: NDArray[np.float64]) -> MaxFlow:
        """Solve with integer capacities, on which an edge is full exactly or not full."""
        integers = self.arrays.with_capacity(capacity, full_tolerance=0.0)
        # Terminal arcs of twice the sum of all capacities, which no flow can fill.
        unlimited = 2.0 * math.fsum(capacity) or 1.0
        arcs = np.concatenate([capacity, unlimited * self.sources, unlimited * self.sinks])
        flow, side = self._solver(arcs, self.sources, self.sinks)
        return verified_max_flow(integers, self.sources, self.sinks, flow, side, self.graph.edge_index.device)

    def _max_flow(self, arrays: CapacityArrays, sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> MaxFlow:
        """Solve with the given capacities of the graph's edges, and verify the answer."""
        device = self.graph.edge_index.device
        bounded = _BoundedProblem.of(arrays, sources, sinks)
        if bounded is None:
            # No route: the flow is 0, and the tokens that the sources reach are the side of an empty cut.
            no_flow = np.zeros_like(arrays.capacity)
            side = arrays.residual_reach(no_flow, sources)
            return verified_max_flow(arrays, sources, sinks, no_flow, side, device)

        arcs = bounded.arcs(sources, sinks)
        flow, side = self._solver(arcs, sources, sinks)
        try:
            best = verified_max_flow(bounded.arrays, sources, sinks, flow, bounded.cut_side(side), device)
        except NumericalRangeError:
            if self._is_exact:
                raise
            # A solver in float64 may round more than the re-check accepts; integers do not round.
            flow, side = networkx_solver(self.arrays)(arcs, sources, sinks)
            best = verified_max_flow(bounded.arrays, sources, sinks, flow, bounded.cut_side(side), device)
        return bounded.unscaled(best, arrays.capacity)


@dataclass(frozen=True, eq=False)
class _BoundedProblem:
    """A max-flow problem with capacities near its min cut, so that no sum loses the digits of the cut.

    With U the capacity of any cut, ``V <= U``, and an edge of more than ``2 U`` is in no min cut and never full. So
    ``min(c, 2 U)`` has the same max flows and the same min cuts as c. One power of two brings U near 1.

    Attributes:
        arrays: the edges with capacities ``min(c, 2 U) * 2**-exponent``.
        reached: ``[T]`` bool, the tokens that some source reaches.
        reaches: ``[T]`` bool, the tokens that reach some sink.
        bound: ``U * 2**-exponent``, in [0.5, 1).
        exponent: binary exponent of U.
    """

    arrays: CapacityArrays
    reached: NDArray[np.bool_]
    reaches: NDArray[np.bool_]
    bound: float
    exponent: int

    @classmethod
    def of(
        cls,
        arrays: CapacityArrays,
        sources: NDArray[np.bool_],
        sinks: NDArray[np.bool_],
    ) -> _BoundedProblem | None:
        """Bound and scale the capacities; None where no route exists.

        Raises:
            NumericalRangeError: every cut that was tried is beyond the range of float64.
        """
        # w, the width of the widest route: w <= V. The edges wider than w connect no source to a sink, so what they
        # reach is a cut of edges of at most w: V <= U <= w * number of its edges. The trivial cuts may be smaller.
        width = arrays.widest_route(sources, sinks)
        if width == 0:
            return None
        wider = arrays.with_capacity(np.where(arrays.capacity > width, arrays.capacity, 0.0))
        beyond = wider.residual_reach(np.zeros_like(wider.capacity), sources)
        bound = min(arrays.cut_capacity(side) for side in (beyond, sources, ~sinks))
        if not math.isfinite(bound):
            raise NumericalRangeError(
                "max flow: V must be in the range of float64 (up to 1.8e308), got cuts beyond it; rescale the "
                "capacities, for instance divide them by their maximum"
            )

        fraction, exponent = math.frexp(bound)
        limited = np.ldexp(np.minimum(arrays.capacity, 2.0 * bound), -exponent)
        # Far below the cut a capacity may scale to 0; the least positive number keeps it an edge, and a cut's bound.
        limited = np.where(arrays.capacity > 0, np.maximum(limited, _LEAST_POSITIVE), 0.0)
        unused = np.zeros_like(limited)
        return cls(
            arrays=arrays.with_capacity(limited),
            reached=arrays.residual_reach(unused, sources),
            reaches=arrays.residual_reach(unused, sinks, backwards=True),
            bound=fraction,
            exponent=exponent,
        )

    def arcs(self, sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """List the capacities of a solver's arcs: the edges on routes, then terminal arcs that no flow can fill."""
        unlimited = 4.0 * self.bound
        is_on_a_route = self.reached[self.arrays.tail] & self.reaches[self.arrays.head]
        capacity = np.where(is_on_a_route, self.arrays.capacity, 0.0)
        arcs = np.concatenate([capacity, unlimited * sources, unlimited * sinks])
        return arcs.astype(np.float64, copy=False)

    def cut_side(self, side: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Place the tokens off the routes, on which a solver's cut says nothing, so that no edge at them is cut."""
        return side & self.reached | ~self.reaches

    def unscaled(self, best: MaxFlow, capacity: NDArray[np.float64]) -> MaxFlow:
        """Return a verified answer in the units of the given capacities."""
        # A capacity below the range was raised to the least positive number: its flow may exceed the capacity itself.
        edge_flow = np.ldexp(best.edge_flow.cpu().numpy(), self.exponent)
        feasible_flow = np.minimum(edge_flow, capacity)
        return replace(
            best,
            value=_in_range(best.value, self.exponent),
            error=_in_range(best.error, self.exponent),
            edge_flow=torch.from_numpy(feasible_flow).to(best.edge_flow.device),
            cut_capacity=_in_range(best.cut_capacity, self.exponent),
        )


def _in_range(number: float, exponent: int) -> float:
    """Return ``number * 2**exponent``.

    Raises:
        NumericalRangeError: float64 cannot hold it.
    """
    try:
        return math.ldexp(number, exponent)
    except OverflowError as error:
        raise NumericalRangeError(
            f"max flow: V must be in the range of float64 (up to 1.8e308), got {number:g} * 2**{exponent}; rescale the "
            "capacities, for instance divide them by their maximum"
        ) from error


def source_tokens(flow: Flow) -> Bool[Tensor, " tokens"]:
    """Find where the unit enters; for an infeasible flow, which has no such token, take the question.

    Args:
        flow: of one graph.

    Returns:
        ``[N]`` bool: the support of the flow's source. It is the question where that support is empty, unless the
        caller gave the source as a vector.
    """
    support = flow.source > 0
    if bool(support.any()) or flow.source_rule == "vector":
        return support
    return flow.graph.question_mask


def _check_graph(graph: FlowGraph, max_edges: int, backend: str) -> None:
    """Refuse what is not one graph of at most ``max_edges`` edges."""
    refuse_signed(graph, "a max flow")
    if not isinstance(graph, FlowGraph):
        raise GraphError(f"graph: must be a FlowGraph or a Flow, got {type(graph).__name__}; see FlowGraph.from_dense")
    if isinstance(graph, Batch):
        raise InvalidInputError(
            f"graph: max flow takes one graph at a time, got a Batch of {graph.num_graphs}; call it for each graph in "
            "batch.to_data_list()"
        )
    require_usable(graph)
    if graph.num_edges > max_edges:
        # The message estimates time and memory, so that the caller can decide.
        seconds = graph.num_edges * _SECONDS_PER_EDGE[backend]
        megabytes = graph.num_edges * _BYTES_PER_EDGE[backend] / 1e6
        raise TooLargeError(
            f"graph: an exact max flow takes at most max_edges = {max_edges:,} edges, got {graph.num_edges:,} (roughly "
            f"{seconds:.1f} s and {megabytes:.0f} MB with {backend}); pass max_edges={graph.num_edges} to run it, or "
            "prune by flow first"
        )


def _refuse_beside_flow(**options: object) -> None:
    """Refuse options of the graph where a flow already fixes them."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        count = "one" if len(given) == 1 else "them"
        raise InvalidInputError(
            f"{', '.join(given)}: a Flow brings its own, got {count} beside a Flow; pass flow.graph to choose freely"
        )


def _edge_weights(
    graph: FlowGraph, demand: Tensor | None, absorption: str | None, damping: float | None
) -> Float64[Tensor, " edges"]:
    """Compute N on the edges of a graph with the defaults of ``solve``."""
    # The defaults of solve: undamped, and absorbing unless the demand is the caller's own.
    if damping is None:
        damping = 1.0
    if not 0 < damping <= 1:
        raise InvalidInputError(f"damping: must lie in (0, 1], got {damping!r}; 1 is undamped")
    if absorption is None:
        absorption = "absorb" if demand is None else "pass_through"
    if absorption not in get_args(Absorption):
        raise InvalidInputError(f"absorption: must be 'absorb' or 'pass_through', got {absorption!r}; see solve")

    # N: the capacities, damped, and 0 on edges out of an absorbing token.
    absorbing = graph.answer_mask & (absorption == "absorb")
    is_active_edge = ~absorbing[graph.edge_index[0]]
    return graph.capacity.double() * is_active_edge * damping


def _support(vector: Tensor, graph: FlowGraph, name: str) -> Bool[Tensor, " tokens"]:
    """Find the tokens where a source or demand vector is positive, after checking it."""
    vector = as_tensor(vector, name, "pass a mask or a vector [N]", device=graph.capacity.device).double()
    if vector.shape != (graph.num_nodes,):
        raise InvalidInputError(
            f"{name}: must have one entry per token ({graph.num_nodes}), got shape {tuple(vector.shape)}; "
            "pass a mask or a vector [N]"
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
        raise InvalidInputError(
            f"{name}: must be finite and non-negative, got {vector.min().item():g} as its least; clamp it first"
        )
    # Every positive entry marks a terminal; its amount does not limit the flow.
    return vector > 0
