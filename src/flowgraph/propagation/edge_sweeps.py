"""The two sweeps over the edges of a graph or batch, by a named backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.propagation import block_substitution, numba_backend, reference
from flowgraph.propagation.interface import Backend, IncomingEdges, in_order
from flowgraph.propagation.operators import DenseOperator, SparseOperator
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import Topology


class EdgeSweeps:
    """Sweeps over the edges of a graph or batch.

    Args:
        topology: the structure of the graph or batch.
        propagation_factor: ``[N]`` the diagonal of D.
        backend: ``"scatter"``, ``"numba"``, ``"dense"``, ``"reference"``, or ``"auto"``: compiled where it runs, else
            scatter.

    Raises:
        MissingExtraError: the package of the backend is not installed.
        InvalidInputError: the backend does not run on the device of the graph.
    """

    def __init__(
        self,
        topology: Topology,
        propagation_factor: Float64[Tensor, " nodes"],
        backend: Backend = "auto",
    ) -> None:
        self.topology = topology
        self.propagation_factor = propagation_factor
        self.backend = choose_backend(topology) if backend == "auto" else backend
        if self.backend == "numba":
            numba_backend.require(topology.device)
        # The operator of the last weights: both sweeps of a solve use it.
        self._operator_weight: Tensor | None = None
        self._operator: SparseOperator | None = None

    @property
    def can_propagate(self) -> Bool[Tensor, " nodes"]:
        return (self.propagation_factor > 0) & self.topology.has_outgoing

    def total(self, x: Tensor) -> Float64[Tensor, " graphs"]:
        return self.topology.total(x)

    def maximum(self, x: Tensor) -> Tensor:
        return self.topology.maximum(x)

    def broadcast(self, x: Tensor) -> Tensor:
        return self.topology.broadcast(x)

    def potential(self, weight: Tensor, demand: Tensor) -> Tensor:
        factor = self.propagation_factor
        if self.backend == "reference":
            return reference.potential(self.topology.edge_index, weight, factor, demand)
        if self.backend == "numba":
            return numba_backend.edge_potential(self.topology, weight, factor, demand)
        return self._solve_in_blocks(block_substitution.potential, weight, demand)

    def influence(self, weight: Tensor, inflow: Tensor) -> Tensor:
        factor = self.propagation_factor
        if self.backend == "reference":
            return reference.influence(self.topology.edge_index, weight, factor, inflow)
        if self.backend == "numba":
            return numba_backend.edge_influence(self.topology, weight, factor, inflow)
        return self._solve_in_blocks(block_substitution.influence, weight, inflow)

    def _solve_in_blocks(
        self,
        sweep: Callable[..., Tensor],
        weight: Tensor,
        x: Tensor,
    ) -> Tensor:
        """Run a sweep of :mod:`.block_substitution` on padded vectors ``[graphs, tokens]``."""
        topology = self.topology
        if self.backend == "dense":
            operator = DenseOperator(_matrices(topology, weight))
        else:
            operator = self._sparse_operator(weight)

        # The operators take vectors of one length per graph; padding has D = 0 and x = 0, so it adds nothing.
        factor = topology.pad(self.propagation_factor, operator.num_tokens)
        padded = topology.pad(x, operator.num_tokens)
        solution = sweep(operator, factor, padded)
        return topology.unpad(solution)

    def _sparse_operator(self, weight: Tensor) -> SparseOperator:
        """Return the weights in block order, sorted once per solve."""
        if self._operator is None or self._operator_weight is not weight:
            self._operator = SparseOperator(self.topology, weight)
            self._operator_weight = weight
        return self._operator

    def outer(self, at_target: Tensor, at_source: Tensor) -> Tensor:
        source, target = self.topology.edge_index
        propagated = self.propagation_factor * at_source
        return at_target[target] * propagated[source]

    def incoming_edges(self, weight: Tensor, *, last_first: bool) -> Iterator[IncomingEdges]:
        source = self.topology.edge_index[0].cpu().numpy()
        weights = weight.detach().double().cpu().numpy()
        row_ptr = self.topology.row_ptr.tolist()
        for node in in_order(range(self.topology.num_nodes), last_first):
            edges = slice(row_ptr[node], row_ptr[node + 1])
            yield node, source[edges], weights[edges]

    def balanced(self, weight: Tensor, scale_exponent: Tensor) -> Tensor:
        source, target = self.topology.edge_index
        is_active_edge = (self.propagation_factor > 0)[source]
        return scaled(weight * is_active_edge, scale_exponent[target] - scale_exponent[source])

    def has_edge(self, weight: Tensor, *, source: Tensor, target: Tensor) -> bool:
        source_node, target_node = self.topology.edge_index
        edges = source[source_node] & target[target_node] & (weight > 0)
        return bool(edges.any())


def choose_backend(topology: Topology) -> Backend:
    """Choose compiled code where it runs, else scatter. Dense matrices first have to be filled, so they are slower."""
    return "numba" if numba_backend.runs_on(topology.device) else "scatter"


def _matrices(topology: Topology, weight: Tensor) -> Float[Tensor, "graphs tokens tokens"]:
    """Write the edges into one matrix per graph."""
    source, target = topology.edge_index
    size = topology.num_tokens
    matrix = weight.new_zeros(topology.num_graphs, size, size)
    graph = topology.graph_of_node[target]
    matrix[graph, topology.position[target], topology.position[source]] = weight
    return matrix
