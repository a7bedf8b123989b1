"""A flow as float64 arrays, its matrix rebuilt from the graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowgraph.flow.flow import Flow
from flowgraph.maxflow.problem import source_tokens

EPS = float(np.finfo(np.float64).eps)


NOTHING = 2.0**-800


class FlowArrays:
    """One flow on the CPU in float64: what it claims, and N rebuilt from the graph and the named options."""

    def __init__(self, flow: Flow) -> None:
        graph = flow.graph
        self.flow, self.feasible, self.alpha = flow, bool(flow.feasible), float(flow.alpha)
        self.tail, self.head = graph.edge_index.cpu().numpy()
        self.h, self.g, self.f, self.source, self.demand = (
            vector.detach().double().cpu().numpy()
            for vector in (flow.h, flow.g, flow.throughput, flow.source, flow.demand)
        )
        self.absorbed = flow.absorbed.detach().cpu().numpy()
        self.edge_flow = flow.edge_flow.detach().cpu().numpy()
        self.absorbing = graph.answer_mask.cpu().numpy() & (flow.absorption == "absorb")
        self.capacity = graph.capacity.detach().double().cpu().numpy()
        self.weight = self.capacity * ~self.absorbing[self.tail] * flow.damping
        # h and g count in powers of two; the same system in those units has these weights and this demand.
        unit = flow.exponent.cpu().numpy()
        self.unit_change = unit[self.head] - unit[self.tail]
        self.balanced, self.unit_demand = np.ldexp(self.weight, self.unit_change), np.ldexp(self.demand, -unit)
        self.question = graph.question_mask.cpu().numpy()
        self.is_source, self.is_sink = source_tokens(flow).cpu().numpy(), self.demand > 0
        self.reaches = self._reaches_demand()
        degree = max(np.bincount(ends, minlength=1).max() for ends in (self.tail, self.head))
        self.local = float(degree + 32) * EPS
        self.whole = 2 * self.local * float(self.f.sum()) + self.f.size * EPS

    def _reaches_demand(self) -> NDArray[np.bool_]:
        """A search of the topology: last token first, so a token is settled before the edges into it are read."""
        reaches = self.is_sink.copy()
        ends = np.searchsorted(self.head, np.arange(reaches.size + 1))
        live = self.weight > 0
        for token in reversed(range(reaches.size)):
            if reaches[token]:
                into = slice(ends[token], ends[token + 1])
                reaches[self.tail[into][live[into]]] = True
        return reaches

    def reached_from_source(self) -> NDArray[np.bool_]:
        """The same search forwards: a share too small for float64 is a share all the same."""
        reached, ends = self.is_source.copy(), np.searchsorted(self.head, np.arange(self.f.size + 1))
        live = self.weight > 0
        for token in range(reached.size):
            into = slice(ends[token], ends[token + 1])
            reached[token] |= bool((reached[self.tail[into]] & live[into]).any())
        return reached

    def into(self, per_edge: NDArray) -> NDArray:
        """Sum over the edges into each token."""
        return np.bincount(self.head, per_edge, self.f.size)

    def out_of(self, per_edge: NDArray) -> NDArray:
        """Sum over the edges out of each token."""
        return np.bincount(self.tail, per_edge, self.f.size)

    def out_of_side(self, side: NDArray, per_edge: NDArray) -> float:
        """Sum over the edges that leave a set of tokens."""
        return float(per_edge[side[self.tail] & ~side[self.head]].sum())
