"""``Flow``: the conserved, answer-targeted flow on a graph or on each graph of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InfeasibleFlowError, InvalidInputError
from flowgraph.files import loadable
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.graph.validity import GraphVersion
from flowgraph.propagation.ratios import masked_ratio
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import topology_of

NEGLIGIBLE_FLOW = 1e-12
"""Shares of the unit flow below this, and differences of shares below this, are rounding."""

LEAST_FLOW = 2.0**-800
"""A share of the unit flow below this counts as no flow: its factors may leave the range of float64."""


@loadable
@dataclass(frozen=True, eq=False)
class Flow:
    r"""The unit flow from question to answer on one graph, or on each graph of a batch.

    Node vectors have one entry per node of ``graph``, in float64. Graph vectors have one entry per graph.

    Every quantity that takes no argument is a property. ``alpha`` and ``feasible`` are computed once and cached.
    ``weight``, ``edge_flow``, ``absorbed``, ``potentials`` and ``log2_potential`` are computed at each access, in
    O(E) or O(T): store the result where you need it more than once.

    Attributes:
        graph: the graph that was solved.
        h: backward potential :math:`h = b + N^\top h`, the total influence of a token that reaches the answer. It is
            scaled: the true potential is ``h * 2**exponent``, see :attr:`potentials` and :attr:`log2_potential`.
        g: forward influence :math:`g = q + N g`, the influence that arrives per unit of potential. It is scaled: the
            true influence is ``g * 2**-exponent``.
        exponent: int64 scale exponents. 0 everywhere, unless some potential of this graph, or of another graph of its
            batch, leaves ``2**-150 .. 2**150``.
        throughput: :math:`f = g \cdot h`, share of the unit flow that passes through the token, in [0, 1].
        source: share of the unit flow that enters at each token. Sums to 1 where feasible.
        demand: b, weight of the edge from each token to the virtual sink.
        absorbing: tokens without outgoing edges (the answer, when it absorbs).
        damping: factor per hop.
        source_rule: ``"uniform"``, ``"potential"`` or ``"vector"``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        backend: the backend that solved it.
    """

    graph: FlowGraph
    h: Float64[Tensor, " nodes"]
    g: Float64[Tensor, " nodes"]
    exponent: Int64[Tensor, " nodes"]
    throughput: Float64[Tensor, " nodes"]
    source: Float64[Tensor, " nodes"]
    demand: Float64[Tensor, " nodes"]
    absorbing: Bool[Tensor, " nodes"]
    damping: float
    source_rule: str
    absorption: str
    backend: str

    def __post_init__(self) -> None:
        # The version of the graph that these numbers belong to. It is no field: a copy with another graph has its own.
        object.__setattr__(self, "_solved_version", GraphVersion(self.graph))

    def require_unchanged(self) -> None:
        """Refuse to combine this flow with a graph whose edges or capacities changed after it was solved.

        Raises:
            GraphError: the edges or capacities are others now.
        """
        solved: GraphVersion | None = getattr(self, "_solved_version", None)
        if solved is not None and not solved.has_edges_of(GraphVersion(self.graph)):
            raise GraphError(
                "flow: must be that of its graph as it is, got edges or capacities that changed after the solve; "
                "call solve(flow.graph) again"
            )

    @cached_property
    def feasible(self) -> Bool[Tensor, " graphs"]:
        """Per graph, whether any source token reaches the demand; if not, the throughput is zero. Cached."""
        return topology_of(self.graph).total(self.source.detach()) > 0

    @cached_property
    def alpha(self) -> Float64[Tensor, " graphs"]:
        r"""Per graph, the largest scaling of this flow that fits the capacities. Cached.

        .. math:: \alpha = \min_{F(s, t) > 0} \frac{N[t, s]}{F(s, t)} = \frac{1}{\max g[s] \, h[t]}

        over the edges that carry at least ``LEAST_FLOW = 2**-800`` of the unit: a lower bound of the max flow on N.
        Infinite where no edge does, and where float64 cannot hold it (above 1.8e308).
        Cost: one read of the edges.
        """
        source, target = self.graph.edge_index
        weight = self.weight
        edge_flow = self.edge_flow

        # The congestion of an edge, F / N = g[s] h[t], does not depend on its capacity.
        congestion = self.in_units(torch.where(weight > 0, self.g[source] * self.h[target], 0.0))

        # The scaling that saturates an edge, 1 / congestion. For capacities below 1e-308 the congestion can leave the
        # range of float64 although the flow is positive. N / F is used there.
        in_range = (congestion > 0) & torch.isfinite(congestion)
        from_flow = masked_ratio(edge_flow > 0, weight, edge_flow, otherwise=torch.inf)
        saturating = masked_ratio(in_range, 1, congestion, otherwise=from_flow)

        # A flow that float64 cannot resolve has no congestion that it can resolve.
        saturating = torch.where(edge_flow >= LEAST_FLOW, saturating, torch.inf)

        # alpha: the minimum over the edges of each graph, infinite where no edge carries flow.
        topology = topology_of(self.graph)
        unlimited = saturating.new_full((topology.num_graphs,), torch.inf)
        return unlimited.scatter_reduce(0, topology.graph_of_node[source], saturating, "amin")

    @property
    def weight(self) -> Float64[Tensor, " edges"]:
        """N on the edges: capacity times damping, and 0 where the source absorbs. Cost: O(E) at each access.

        Raises:
            GraphError: the edges or capacities changed after the solve.
        """
        self.require_unchanged()
        is_active_edge = ~self.absorbing[self.graph.edge_index[0]]
        return self.graph.capacity.double() * is_active_edge * self.damping

    @property
    def edge_flow(self) -> Float64[Tensor, " edges"]:
        r"""Flow on each edge, :math:`F(s, t) = g[s] \, N[t, s] \, h[t]`, in the order of ``graph.edge_index``.

        Cost: O(E) at each access.
        """
        source, target = self.graph.edge_index
        return self.g[source] * self.in_units(self.weight) * self.h[target]

    @property
    def absorbed(self) -> Float64[Tensor, " nodes"]:
        """Share of the unit flow that enters the virtual sink at each token, ``g * b``; sums to 1 where feasible.

        Cost: O(T) at each access.
        """
        return self.g * scaled(self.demand, -self.exponent)

    @property
    def potentials(self) -> tuple[Float64[Tensor, " nodes"], Float64[Tensor, " nodes"]]:
        """The true h and g, without scaling: 0 or infinity where float64 cannot hold them.

        Cost: O(T) at each access.
        """
        return scaled(self.h, self.exponent), scaled(self.g, -self.exponent)

    @property
    def log2_potential(self) -> Float64[Tensor, " nodes"]:
        """Binary logarithm of the true potential; minus infinity where the demand is unreachable.

        Cost: O(T) at each access.
        """
        return log2_potential(self.h, self.exponent)

    def in_units(self, per_edge: Float64[Tensor, " edges"]) -> Float64[Tensor, " edges"]:
        """Scale a value per edge to the scaled h and g: ``per_edge * 2**(exponent[target] - exponent[source])``."""
        if not bool(self.exponent.any()):
            return per_edge
        source, target = self.graph.edge_index
        return scaled(per_edge, self.exponent[target] - self.exponent[source])

    def __repr__(self) -> str:
        # A batch is summarised by a count.
        num_graphs = self.feasible.numel()
        if num_graphs > 1:
            feasible = f"{int(self.feasible.sum())}/{num_graphs} feasible"
        elif bool(self.feasible):
            feasible = "feasible"
        else:
            feasible = "not feasible: the answer is unreachable"
        return (
            f"Flow({self.graph.num_nodes} tokens, {self.graph.num_edges} edges, {feasible}, "
            f"source={self.source_rule}, absorption={self.absorption}, damping={self.damping:g}, "
            f"backend={self.backend})"
        )


def log2_potential(h: Tensor, exponent: Tensor) -> Tensor:
    """Return ``log2(h * 2**exponent)``; minus infinity, with a gradient of zero, where h is 0."""
    # The inner where keeps the gradient finite: log2(0) has an infinite one.
    reaches = h > 0
    log2_h = torch.where(reaches, h, 1.0).log2()
    return torch.where(reaches, log2_h + exponent, -torch.inf)


def require_single_feasible(flow: Flow) -> None:
    """Refuse a flow that has no routes, or more than one graph.

    Raises:
        InvalidInputError: the flow of a batch.
        InfeasibleFlowError: no question token reaches the answer.
    """
    if isinstance(flow.graph, Batch):
        raise InvalidInputError(
            f"flow: must be the flow of one graph, got a batch of {flow.feasible.numel()}; "
            "solve(batch.get_example(i)) gives one"
        )
    if not bool(flow.feasible):
        raise InfeasibleFlowError(
            "flow: must be feasible, got none: no question token reaches the answer; check the regions, and whether "
            "pruning or excluded tokens cut them apart"
        )
