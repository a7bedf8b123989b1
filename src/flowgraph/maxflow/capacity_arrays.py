"""CapacityArrays: edges and capacities of one max-flow problem, with exact sums over cuts and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int64

FULL_TOLERANCE = 1e-12
"""An edge counts as full, or as unused, up to this share of its capacity."""


@dataclass(frozen=True, eq=False)
class CapacityArrays:
    """The edges of one graph with the capacities of one max-flow problem.

    Shapes: T tokens, E edges in the order of ``graph.edge_index``, sorted by head.

    Attributes:
        num_tokens: T.
        tail: ``[E]`` int64, the earlier token of each edge.
        head: ``[E]`` int64, the later token of each edge.
        capacity: ``[E]`` float64, at least 0.
        full_tolerance: share of its capacity by which an edge may miss being full or unused.
        by_tail: ``[E]`` int64, the edges sorted by tail.
        first_in: ``[T + 1]``, the edges into token v are ``first_in[v] : first_in[v + 1]``.
        first_out: ``[T + 1]``, the edges out of token v are ``first_out[v] : first_out[v + 1]`` of ``by_tail``.
    """

    num_tokens: int
    tail: Int64[np.ndarray, " edges"]
    head: Int64[np.ndarray, " edges"]
    capacity: Float64[np.ndarray, " edges"]
    full_tolerance: float
    by_tail: Int64[np.ndarray, " edges"]
    first_in: list[int]
    first_out: list[int]

    @classmethod
    def from_edges(
        cls,
        num_tokens: int,
        edge_index: Int64[np.ndarray, "2 edges"],
        capacity: Float64[np.ndarray, " edges"],
    ) -> CapacityArrays:
        """Index the edges of a graph by their tokens."""
        tail, head = edge_index
        by_tail = np.argsort(tail, kind="stable")
        boundaries = np.arange(num_tokens + 1)
        return cls(
            num_tokens=num_tokens,
            tail=tail,
            head=head,
            capacity=capacity,
            full_tolerance=FULL_TOLERANCE,
            by_tail=by_tail,
            first_in=np.searchsorted(head, boundaries).tolist(),
            first_out=np.searchsorted(tail[by_tail], boundaries).tolist(),
        )

    def with_capacity(
        self, capacity: Float64[np.ndarray, " edges"], *, full_tolerance: float = FULL_TOLERANCE
    ) -> CapacityArrays:
        """Replace the capacities of the same edges."""
        return replace(self, capacity=capacity, full_tolerance=full_tolerance)

    def cut_edges(self, side: Bool[np.ndarray, " tokens"]) -> Int64[np.ndarray, " cut"]:
        """List the edges of positive capacity from a set of tokens to the other tokens."""
        crosses = side[self.tail] & ~side[self.head]
        return np.flatnonzero(crosses & (self.capacity > 0))

    def cut_capacity(self, side: Bool[np.ndarray, " tokens"]) -> float:
        """Sum the capacities of the edges out of a set of tokens, rounded up where float64 cannot hold the sum.

        A sum beyond the range of float64 is infinite.
        """
        terms = self.capacity[self.cut_edges(side)].tolist()
        try:
            nearest = math.fsum(terms)
        except OverflowError:
            return math.inf
        remainder = math.fsum([*terms, -nearest])
        if remainder > 0:
            return math.nextafter(nearest, math.inf)
        return nearest

    def widest_route(
        self,
        sources: Bool[np.ndarray, " tokens"],
        sinks: Bool[np.ndarray, " tokens"],
    ) -> float:
        r"""Compute the largest capacity that every edge of some route has: 0 where no route exists.

        .. math:: w[t] = \max_{s \to t} \min(w[s], c(s, t)), \quad w = \infty \text{ at the sources}

        Cost: one pass over the edges, a token at a time.
        """
        width = np.where(sources, np.inf, 0.0)
        # Edges are sorted by head, and every head is later than its tail: w[s] is final when an edge out of s is read.
        for v in np.unique(self.head):
            incoming = slice(self.first_in[v], self.first_in[v + 1])
            arriving = np.minimum(width[self.tail[incoming]], self.capacity[incoming])
            width[v] = max(width[v], arriving.max())
        return float(width[sinks].max(initial=0.0))

    def excess(self, flow: Float64[np.ndarray, " edges"]) -> Float64[np.ndarray, " tokens"]:
        """Compute inflow - outflow of every token, each sum correctly rounded."""
        inflow = flow.tolist()
        outflow = (-flow[self.by_tail]).tolist()
        excess = []
        for v in range(self.num_tokens):
            into_v = inflow[self.first_in[v] : self.first_in[v + 1]]
            out_of_v = outflow[self.first_out[v] : self.first_out[v + 1]]
            excess.append(math.fsum(into_v + out_of_v))
        return np.array(excess)

    def residual_reach(
        self,
        flow: Float64[np.ndarray, " edges"],
        start: Bool[np.ndarray, " tokens"],
        *,
        backwards: bool = False,
    ) -> Bool[np.ndarray, " tokens"]:
        """Search the residual graph from the start tokens; with ``backwards``, for the tokens that reach them."""
        # An edge that is not full can take more flow; an edge that is used can give flow back, against its direction.
        negligible = self.full_tolerance * self.capacity
        not_full = self.capacity - flow > negligible
        is_used = flow > negligible
        tails = np.concatenate([self.tail[not_full], self.head[is_used]])
        heads = np.concatenate([self.head[not_full], self.tail[is_used]])
        if backwards:
            tails, heads = heads, tails

        # Residual edges sorted by tail: those out of v are successors[first[v] : first[v + 1]].
        order = np.argsort(tails, kind="stable")
        first = np.searchsorted(tails[order], np.arange(self.num_tokens + 1))
        successors = heads[order]

        # Breadth-first search, a set of tokens at a time.
        reached = start.copy()
        frontier = np.flatnonzero(start)
        while frontier.size:
            found = np.concatenate([successors[first[v] : first[v + 1]] for v in frontier])
            frontier = np.unique(found[~reached[found]])
            reached[frontier] = True
        return reached
