"""backbone and prune: smaller graphs chosen by flow, with the exact loss that this causes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.flow.solve import solve
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import topology_of

_NEGLIGIBLE = 1e-12
"""Relative rounding error by which the share of a backbone may miss ``keep``."""


@loadable
@dataclass(frozen=True, eq=False)
class Backbone:
    """The fewest edges, strongest first, whose own routes carry a stated share of the flow.

    Attributes:
        flow: the flow it is a part of.
        edge_mask: ``[E]`` bool over ``flow.graph.edge_index``.
        keep: the requested share.
        share: the share of the unit flow whose *entire* route lies on kept edges; at least ``keep``.
    """

    flow: Flow
    edge_mask: Bool[Tensor, " edges"]
    keep: float
    share: float

    @property
    def num_edges(self) -> int:
        """Number of kept edges."""
        return int(self.edge_mask.sum())

    def subgraph(self) -> FlowGraph:
        """Build a :class:`FlowGraph` of the kept edges over the same tokens, with the loss recorded on it.

        Cost: one solve.
        """
        return _subgraph(self.flow, self.edge_mask, self.share)

    def __repr__(self) -> str:
        return f"Backbone({self.num_edges} of {self.flow.graph.num_edges} edges carry {self.share:.1%} of the flow)"


def backbone(flow: Flow, keep: float = 0.9) -> Backbone:
    r"""Find the smallest set of strongest edges whose own routes carry the share ``keep`` of the flow.

    Edges are taken in the order of their flow F (ties by position). The share of a set K is exact: it is the
    probability that a route drawn from the flow, moving by :math:`P(s \to t)`, stays in K. In the g-form,
    with the potential of the complete graph, :math:`g_K = q + N_K g_K` and the share is
    :math:`\langle g_K, b \rangle`.

    Args:
        flow: a feasible flow on one graph.
        keep: share in (0, 1].

    Returns:
        A :class:`Backbone`.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: ``keep`` outside (0, 1], or a batch.

    Cost: log2(E) sweeps over the kept edges. Source: method, section 2, step 4.

    Example:
        >>> from flowgraph import solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> backbone(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])), 0.6)
        Backbone(2 of 4 edges carry 66.7% of the flow)
    """
    if not 0 < keep <= 1:
        raise InvalidInputError(f"keep: must lie in (0, 1], got {keep!r}; 0.9 keeps the routes of 90 % of the flow")
    require_single_feasible(flow)
    strongest = _strongest_edges(flow)

    # Binary search for the smallest number of edges that reaches the share; the share grows with the set. Invariant:
    # the ``high`` strongest edges reach it, and fewer than ``low`` do not.
    enough = keep * (1 - _NEGLIGIBLE)
    low = 0
    high = strongest.numel()
    share_of_high = float(flow.absorbed.sum())
    while low < high:
        middle = (low + high) // 2
        share = kept_share(flow, strongest[:middle])
        if share >= enough:
            high = middle
            share_of_high = share
        else:
            low = middle + 1

    edge_mask = _as_mask(flow, strongest[:high])
    return Backbone(flow=flow, edge_mask=edge_mask, keep=keep, share=min(share_of_high, 1.0))


def prune(flow: Flow, *, max_edges: int | None = None, keep: float | None = None) -> FlowGraph:
    """Keep the edges with most flow, and measure what that costs against the exact solution.

    Pruning by *attention* was measured to change which tokens matter (Spearman .86 to .93 with the exact throughput);
    the same number of edges chosen by *flow* keeps it (.99; method, section 5). Edges without flow are never kept.

    Args:
        flow: a feasible flow on one graph.
        max_edges: keep this many, ties by position; or
        keep: keep the fewest whose own routes carry this share of the flow (see :func:`backbone`).

    Returns:
        A graph over the same tokens. ``kept_attention`` and ``kept_flow`` are the shares it holds, and
        ``throughput_error`` the largest change of a token's throughput, each including what earlier pruning lost.

    Raises:
        InvalidInputError: neither or both of the two limits, or one outside its range.
        InfeasibleFlowError: there is no flow to choose by.

    Cost: one sort of the edges and two solves. Source: method, section 5.

    Example:
        >>> from flowgraph import solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> graph = prune(flow, max_edges=2)
        >>> graph.num_edges, round(graph.kept_flow.item(), 4), round(graph.throughput_error.item(), 4)
        (2, 0.6667, 0.3333)
    """
    if (max_edges is None) == (keep is None):
        raise InvalidInputError(
            f"max_edges, keep: exactly one must be given, got {max_edges!r} and {keep!r}; keep=0.99 is a careful start"
        )
    if keep is not None:
        return backbone(flow, keep).subgraph()
    if isinstance(max_edges, bool) or not isinstance(max_edges, int) or max_edges < 1:
        raise InvalidInputError(
            f"max_edges: must be a positive number, got {max_edges!r}; 64 per token keeps most of the flow"
        )
    require_single_feasible(flow)

    # The strongest edges, and the share of the flow whose own routes they carry.
    kept = _strongest_edges(flow)[:max_edges]
    edge_mask = _as_mask(flow, kept)
    share = min(kept_share(flow, edge_mask), 1.0)
    return _subgraph(flow, edge_mask, share)


def kept_share(flow: Flow, edges: Tensor) -> float:
    r"""Compute the share of the unit flow whose entire route uses only the given edges, exactly.

    .. math:: g_K = q + N_K g_K, \qquad \text{share} = \langle g_K, b \rangle

    Args:
        flow: a feasible flow on one graph; its potential is that of all edges.
        edges: K, indices or mask over ``flow.graph.edge_index``.

    Returns:
        The share, up to rounding in [0, 1].

    Cost: one influence sweep over the edges.
    """
    flow.require_unchanged()

    # N_K: the capacities of the kept edges; absorption and damping are factors of each token.
    is_kept = torch.zeros(flow.graph.num_edges, dtype=torch.float64, device=flow.h.device)
    is_kept[edges] = 1.0
    capacity = flow.in_units(flow.graph.capacity.double())
    kept_capacity = capacity * is_kept
    propagation_factor = (~flow.absorbing).double() * flow.damping
    sweeps = EdgeSweeps(topology_of(flow.graph), propagation_factor, "auto")

    # g_K = q + N_K g_K, with q = src / h (0 where nothing enters), and its product with b.
    q = torch.where(flow.source > 0, flow.source / flow.h, 0.0)
    influence = sweeps.influence(kept_capacity, q)
    demand = scaled(flow.demand, -flow.exponent)
    absorbed = influence * demand
    return float(absorbed.sum())


def _strongest_edges(flow: Flow) -> Int64[Tensor, " edges_with_flow"]:
    """List the edges with flow, strongest first, ties by position."""
    edge_flow = flow.edge_flow
    strongest_first = torch.argsort(edge_flow, descending=True, stable=True)
    num_with_flow = int((edge_flow > 0).sum())
    return strongest_first[:num_with_flow]


def _as_mask(flow: Flow, edges: Int64[Tensor, " kept"]) -> Bool[Tensor, " edges"]:
    """Turn indices of edges into a mask."""
    edge_mask = torch.zeros(flow.graph.num_edges, dtype=torch.bool, device=edges.device)
    edge_mask[edges] = True
    return edge_mask


def _subgraph(flow: Flow, edge_mask: Bool[Tensor, " edges"], share: float) -> FlowGraph:
    """Build the graph of the kept edges, solve it anew, and record what the pruning lost."""
    original = flow.graph
    graph = FlowGraph.from_edges(
        original.edge_index[:, edge_mask],
        original.capacity[edge_mask],
        num_nodes=int(original.num_nodes or 0),
        question=original.question_mask,
        answer=original.answer_mask,
        reasoning=original.reasoning_mask,
        rules=original.rules,
    )

    # The throughput that users of the pruned graph will see, with the options of the flow.
    source = flow.source if flow.source_rule == "vector" else flow.source_rule
    pruned = solve(
        graph,
        source=source,  # type: ignore[arg-type]
        demand=flow.demand,
        absorption=flow.absorption,  # type: ignore[arg-type]
        damping=flow.damping,
    )
    throughput_error = (pruned.throughput - flow.throughput).abs().max()

    # Shares multiply and errors add up over successive prunings.
    total_capacity = original.capacity.sum(dtype=torch.float64)
    kept_capacity = graph.capacity.sum(dtype=torch.float64)
    graph.kept_attention = original.kept_attention * (kept_capacity / total_capacity)
    graph.kept_flow = original.kept_flow * share
    graph.throughput_error = original.throughput_error + throughput_error
    return graph
