"""``Flow``: the conserved, answer-targeted flow on a graph or on each graph of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import InfeasibleFlowError, InvalidInputError
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import topology_of


@dataclass(frozen=True, eq=False)
class Flow:
    r"""The unit flow from question to answer on one graph, or on each graph of a batch.

    Node vectors have one entry per node of ``graph``, float64; graph vectors one entry per graph.

    Attributes:
        graph: the graph that was solved.
        h: backward potential :math:`h = b + N^\top h`, the total influence of a token that reaches the answer,
            in units of ``2**exponent``.
        g: forward influence :math:`g = q + N g`, influence arriving per unit of potential, in units of
            ``2**-exponent``.
        exponent: int64, 0 everywhere unless some potential leaves ``2**-150 .. 2**150``, in this graph or another of
            its batch; then the true potential is ``h * 2**exponent``: see :meth:`potentials`, :meth:`log2_potential`.
        throughput: :math:`f = g \cdot h`, share of the unit flow that passes through the token, in [0, 1].
        source: share of the unit flow that enters at each token (sums to 1 where feasible).
        demand: b, weight of the edge from each token to the virtual sink.
        absorbing: tokens that no edge leaves (the answer, when it absorbs).
        damping: factor per hop.
        source_rule, absorption, backend: what was asked for, after defaults were filled in.
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

    @cached_property
    def feasible(self) -> Bool[Tensor, " graphs"]:
        """Per graph, whether any source token reaches the demand; where not, g on the routes and f are zero."""
        return topology_of(self.graph).total(self.source.detach()) > 0

    @cached_property
    def alpha(self) -> Float64[Tensor, " graphs"]:
        r"""Per graph, the largest scaling of this flow that fits the capacities.

        :math:`\alpha = \min N[t, s] / F(s, t) = 1 / \max g[s] h[t]` over the edges with flow: a lower bound of the max
        flow on N. Infinite where no edge carries flow. Cost: one read of the edges, on first use.
        """
        topology, weight, edge_flow = topology_of(self.graph), self.weight, self.edge_flow
        start, end = self.graph.edge_index
        congestion = self.in_units(torch.where(weight > 0, self.g[start] * self.h[end], 0.0))
        plain, used = (congestion > 0) & torch.isfinite(congestion), edge_flow > 0
        room = torch.where(used, weight / torch.where(used, edge_flow, 1.0), torch.inf)  # of capacities below 1e-308
        room = torch.where(plain, 1 / torch.where(plain, congestion, 1.0), room)
        unlimited = room.new_full((topology.num_graphs,), torch.inf)
        return unlimited.scatter_reduce(0, topology.graph_of_node[start], room, "amin")

    @property
    def weight(self) -> Float64[Tensor, " edges"]:
        """N on the edges: capacity times damping, zero where the source absorbs."""
        is_active_edge = ~self.absorbing[self.graph.edge_index[0]]
        return self.graph.capacity.double() * is_active_edge * self.damping

    @property
    def edge_flow(self) -> Float64[Tensor, " edges"]:
        r"""Flow on each edge, :math:`F(s, t) = g[s] \, N[t, s] \, h[t]`, in the order of ``graph.edge_index``."""
        source, target = self.graph.edge_index
        return self.g[source] * self.in_units(self.weight) * self.h[target]

    @property
    def absorbed(self) -> Float64[Tensor, " nodes"]:
        """Share of the unit flow that leaves to the virtual sink at each token, ``g * b``; sums to 1 where feasible."""
        return self.g * scaled(self.demand, -self.exponent)

    @property
    def potentials(self) -> tuple[Float64[Tensor, " nodes"], Float64[Tensor, " nodes"]]:
        """h and g as plain numbers: 0 or infinity where float64 cannot hold them (see ``exponent``)."""
        return scaled(self.h, self.exponent), scaled(self.g, -self.exponent)

    @property
    def log2_potential(self) -> Float64[Tensor, " nodes"]:
        """Binary logarithm of the true potential; minus infinity where the demand cannot be reached."""
        return log2_potential(self.h, self.exponent)

    def in_units(self, per_edge: Float64[Tensor, " edges"]) -> Float64[Tensor, " edges"]:
        """Weights of edges in the units of h and g: ``* 2**(exponent[target] - exponent[source])``."""
        if not bool(self.exponent.any()):
            return per_edge
        source, target = self.graph.edge_index
        return scaled(per_edge, self.exponent[target] - self.exponent[source])

    def __repr__(self) -> str:
        feasible = (
            f"{int(self.feasible.sum())}/{self.feasible.numel()} feasible"
            if self.feasible.numel() > 1
            else ("feasible" if bool(self.feasible) else "not feasible: the answer is unreachable")
        )
        return (
            f"Flow({self.graph.num_nodes} tokens, {self.graph.num_edges} edges, {feasible}, source={self.source_rule}, "
            f"absorption={self.absorption}, damping={self.damping:g}, backend={self.backend})"
        )


def log2_potential(h: Tensor, exponent: Tensor) -> Tensor:
    """``log2(h * 2**exponent)``; minus infinity, with a gradient of zero, where h is 0."""
    return torch.where(h > 0, torch.where(h > 0, h, 1.0).log2() + exponent, -torch.inf)


def require_single_feasible(flow: Flow) -> None:
    """Refuse what has no routes to speak of.

    Raises:
        InvalidInputError: the flow of a batch.
        InfeasibleFlowError: no flow.
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
