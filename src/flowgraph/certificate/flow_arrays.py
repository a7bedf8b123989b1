"""FlowArrays: one flow as float64 arrays, with its matrix N rebuilt from the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.flow.flow import LEAST_FLOW, Flow
from flowgraph.maxflow.problem import source_tokens

EPS = float(np.finfo(np.float64).eps)
"""Machine epsilon of float64: a rounded sum or product has a relative error of at most EPS / 2."""

NEGLIGIBLE_FLOW = LEAST_FLOW
"""A share of the unit flow below this counts as zero: its factors may leave the range of float64."""


@dataclass(frozen=True, eq=False)
class FlowArrays:
    """One flow on the CPU: the numbers it claims, and N rebuilt from the graph and the named options.

    Shapes: T tokens, E edges in the order of ``graph.edge_index``. The flow stores h and g with a scale exponent e per
    token: the true potential is ``h * 2**e``, the true influence ``g * 2**-e``.

    Attributes:
        flow: the flow itself.
        feasible: whether the flow claims to exist.
        alpha: the claimed largest scaling of the flow that fits the capacities.
        tail: ``[E]`` int64, the earlier token s of each edge.
        head: ``[E]`` int64, the later token t of each edge.
        h: ``[T]`` float64, claimed potential, in units of ``2**e``.
        g: ``[T]`` float64, claimed influence, in units of ``2**-e``.
        f: ``[T]`` float64, claimed throughput, share of the unit flow.
        source: ``[T]`` float64, claimed src, share of the unit that enters at each token.
        demand: ``[T]`` float64, b, weight of the edge from each token to the virtual sink.
        absorbed: ``[T]`` float64, claimed share of the unit that leaves at each token, g b.
        edge_flow: ``[E]`` float64, claimed F(s, t), share of the unit flow.
        scale_exponent: ``[T]`` int64, e.
        capacity: ``[E]`` float64, c(s, t) of the graph.
        weight: ``[E]`` float64, N[t, s]: capacity times damping, 0 out of a token that absorbs.
        edge_exponent: ``[E]`` int64, ``e[t] - e[s]``: N in the units of h and g is ``N * 2**edge_exponent``.
        scaled_weight: ``[E]`` float64, N in the units of h and g.
        scaled_demand: ``[T]`` float64, b in the units of h.
        is_question: ``[T]`` bool, the graph's question tokens.
        absorbing: ``[T]`` bool, answer tokens where the named absorption is ``"absorb"``.
        is_source: ``[T]`` bool, tokens at which flow may enter.
        is_sink: ``[T]`` bool, tokens with positive demand.
        reaches_sink: ``[T]`` bool, tokens from which the demand can be reached, by a search of the topology.
        local_bound: relative rounding error of an identity at one token.
        total_bound: rounding error of an identity over all tokens, in shares of the unit flow.
    """

    flow: Flow
    feasible: bool
    alpha: float
    tail: Int64[np.ndarray, " edges"]
    head: Int64[np.ndarray, " edges"]
    h: Float64[np.ndarray, " tokens"]
    g: Float64[np.ndarray, " tokens"]
    f: Float64[np.ndarray, " tokens"]
    source: Float64[np.ndarray, " tokens"]
    demand: Float64[np.ndarray, " tokens"]
    absorbed: Float64[np.ndarray, " tokens"]
    edge_flow: Float64[np.ndarray, " edges"]
    scale_exponent: Int64[np.ndarray, " tokens"]
    capacity: Float64[np.ndarray, " edges"]
    weight: Float64[np.ndarray, " edges"]
    edge_exponent: Int64[np.ndarray, " edges"]
    scaled_weight: Float64[np.ndarray, " edges"]
    scaled_demand: Float64[np.ndarray, " tokens"]
    is_question: Bool[np.ndarray, " tokens"]
    absorbing: Bool[np.ndarray, " tokens"]
    is_source: Bool[np.ndarray, " tokens"]
    is_sink: Bool[np.ndarray, " tokens"]
    reaches_sink: Bool[np.ndarray, " tokens"]
    local_bound: float
    total_bound: float

    @classmethod
    def from_flow(cls, flow: Flow) -> FlowArrays:
        """Copy the numbers of a flow on one graph, and rebuild N and reachability without the solver.

        Args:
            flow: of one graph, which must be valid.

        Returns:
            The record of one certificate.

        Cost: a few reads of the edges, and one search of the topology.
        """
        graph = flow.graph

        # What the flow claims.
        h = _float64(flow.h)
        throughput = _float64(flow.throughput)
        demand = _float64(flow.demand)
        scale_exponent = flow.exponent.cpu().numpy()

        # N from the graph and the named options; the flow's own mask of absorbing tokens is checked against this one.
        tail, head = graph.edge_index.cpu().numpy()
        absorbing = graph.answer_mask.cpu().numpy() & (flow.absorption == "absorb")
        capacity = _float64(graph.capacity)
        weight = capacity * ~absorbing[tail] * flow.damping

        # The same system in the units of h and g. Powers of two round nothing inside the range of float64.
        edge_exponent = scale_exponent[head] - scale_exponent[tail]
        scaled_weight = np.ldexp(weight, edge_exponent)
        scaled_demand = np.ldexp(demand, -scale_exponent)

        # Rounding bounds, as derived in flowgraph.certificate.checks.
        most_edges_at_a_token = max(np.bincount(tail, minlength=1).max(), np.bincount(head, minlength=1).max())
        local_bound = float(most_edges_at_a_token + 32) * EPS
        total_bound = 2 * local_bound * float(throughput.sum()) + throughput.size * EPS

        is_sink = demand > 0
        return cls(
            flow=flow,
            feasible=bool(flow.feasible),
            alpha=float(flow.alpha),
            tail=tail,
            head=head,
            h=h,
            g=_float64(flow.g),
            f=throughput,
            source=_float64(flow.source),
            demand=demand,
            absorbed=_float64(flow.absorbed),
            edge_flow=_float64(flow.edge_flow),
            scale_exponent=scale_exponent,
            capacity=capacity,
            weight=weight,
            edge_exponent=edge_exponent,
            scaled_weight=scaled_weight,
            scaled_demand=scaled_demand,
            is_question=graph.question_mask.cpu().numpy(),
            absorbing=absorbing,
            is_source=source_tokens(flow).cpu().numpy(),
            is_sink=is_sink,
            reaches_sink=_reaches_sink(tail, head, weight > 0, is_sink),
            local_bound=local_bound,
            total_bound=total_bound,
        )

    def reached_from_source(self) -> Bool[np.ndarray, " tokens"]:
        """Search forwards from the source tokens; a token reached by a share too small for float64 still counts."""
        reached = self.is_source.copy()
        is_active_edge = self.weight > 0
        first_edge = np.searchsorted(self.head, np.arange(self.f.size + 1))

        # Edges are sorted by target, so a token is settled before an edge out of it is read.
        for token in range(reached.size):
            incoming = slice(first_edge[token], first_edge[token + 1])
            arrives = reached[self.tail[incoming]] & is_active_edge[incoming]
            reached[token] |= bool(arrives.any())
        return reached

    def inflow(self, per_edge: Float64[np.ndarray, " edges"]) -> Float64[np.ndarray, " tokens"]:
        """Sum a number per edge over the edges into each token."""
        return _sum_at(self.head, per_edge, self.f.size)

    def outflow(self, per_edge: Float64[np.ndarray, " edges"]) -> Float64[np.ndarray, " tokens"]:
        """Sum a number per edge over the edges out of each token."""
        return _sum_at(self.tail, per_edge, self.f.size)

    def outflow_of_set(self, side: Bool[np.ndarray, " tokens"], per_edge: Float64[np.ndarray, " edges"]) -> float:
        """Sum a number per edge over the edges from a set of tokens to the other tokens."""
        leaves_set = side[self.tail] & ~side[self.head]
        return float(per_edge[leaves_set].sum())


def _sum_at(
    token: Int64[np.ndarray, " edges"],
    per_edge: Float64[np.ndarray, " edges"],
    num_tokens: int,
) -> Float64[np.ndarray, " tokens"]:
    """Sum a number per edge at one end of each edge."""
    # bincount returns integers where there is no edge.
    return np.bincount(token, per_edge, num_tokens).astype(np.float64, copy=False)


def _float64(vector: Tensor) -> np.ndarray:
    """Copy a tensor to the CPU in float64, without derivatives."""
    return vector.detach().double().cpu().numpy()


def _reaches_sink(
    tail: Int64[np.ndarray, " edges"],
    head: Int64[np.ndarray, " edges"],
    is_active_edge: Bool[np.ndarray, " edges"],
    is_sink: Bool[np.ndarray, " tokens"],
) -> Bool[np.ndarray, " tokens"]:
    """Search backwards from the sinks, last token first, so a token is settled before the edges into it are read."""
    reaches = is_sink.copy()
    first_edge = np.searchsorted(head, np.arange(reaches.size + 1))
    for token in reversed(range(reaches.size)):
        if reaches[token]:
            incoming = slice(first_edge[token], first_edge[token + 1])
            predecessors = tail[incoming][is_active_edge[incoming]]
            reaches[predecessors] = True
    return reaches
