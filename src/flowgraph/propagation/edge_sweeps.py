"""What every way of running the two sweeps offers, and the ways over the edges of a graph or batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.propagation import block_substitution as sweeps
from flowgraph.propagation import numba_backend as compiled
from flowgraph.propagation import reference
from flowgraph.propagation.interface import Backend, in_token_order
from flowgraph.propagation.operators import DenseOperator, SparseOperator
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import Topology


class EdgeSweeps:
    """Sweeps over the edges of a graph or batch, by a named backend.

    Raises:
        MissingExtraError: the backend's package is not installed.
        InvalidInputError: a backend that does not run where the graph is.
    """

    def __init__(
        self, topology: Topology, propagation_factor: Float64[Tensor, " nodes"], backend: Backend = "auto"
    ) -> None:
        self.topology, self.propagation_factor = topology, propagation_factor
        self.backend = choose_backend(topology) if backend == "auto" else backend
        if self.backend == "numba":
            compiled.require(topology.device)
        self._operator: tuple[Tensor, SparseOperator] | None = None
        self.total, self.largest, self.spread = topology.total, topology.largest, topology.spread

    @property
    def can_propagate(self) -> Bool[Tensor, " nodes"]:
        return (self.propagation_factor > 0) & self.topology.has_outgoing

    def potential(self, weight: Tensor, demand: Tensor) -> Tensor:
        return self._run("potential", weight, demand)

    def influence(self, weight: Tensor, inflow: Tensor) -> Tensor:
        return self._run("influence", weight, inflow)

    def outer(self, at_target: Tensor, at_source: Tensor) -> Tensor:
        source, target = self.topology.edge_index
        return at_target[target] * (self.propagation_factor * at_source)[source]

    def weights_into(self, weight: Tensor, *, last_first: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        source = self.topology.edge_index[0].cpu().numpy()
        weights = weight.detach().double().cpu().numpy()
        first = self.topology.row_ptr.tolist()
        for node in in_token_order(self.topology.num_nodes, last_first):
            into = slice(first[node], first[node + 1])
            yield node, source[into], weights[into]

    def balanced(self, weight: Tensor, exponent: Tensor) -> Tensor:
        source, target = self.topology.edge_index
        return scaled(weight * (self.propagation_factor > 0)[source], exponent[target] - exponent[source])

    def any_weight(self, weight: Tensor, target: Tensor, source: Tensor) -> bool:
        start, end = self.topology.edge_index
        return bool((source[start] & target[end] & (weight > 0)).any())

    def _run(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        topology, propagation_factor = self.topology, self.propagation_factor
        if self.backend == "reference":
            return getattr(reference, name)(topology.edge_index, weight, propagation_factor, x)
        if self.backend == "numba":
            return compiled.over_edges(name, topology, weight, propagation_factor, x)
        if self.backend == "dense":
            operator = DenseOperator(_matrices(topology, weight))
        else:
            operator = self._sparse(weight)
        tokens = operator.num_tokens
        solved = getattr(sweeps, name)(operator, topology.pad(propagation_factor, tokens), topology.pad(x, tokens))
        return topology.unpad(solved)

    def _sparse(self, weight: Tensor) -> SparseOperator:
        """The weights in block order; both sweeps of a solve share them."""
        if self._operator is None or self._operator[0] is not weight:
            self._operator = (weight, SparseOperator(self.topology, weight))
        return self._operator[1]


def choose_backend(topology: Topology) -> Backend:
    """Compiled code where it runs, else scatter: dense tiles first have to be written, and never won that back."""
    return "numba" if topology.device.type == "cpu" and compiled.available() else "scatter"


def _matrices(topology: Topology, weight: Tensor) -> Float[Tensor, "graphs tokens tokens"]:
    size = topology.num_tokens
    source, target = topology.edge_index
    matrix = weight.new_zeros(topology.num_graphs, size, size)
    matrix[topology.graph_of_node[target], topology.local[target], topology.local[source]] = weight
    return matrix
