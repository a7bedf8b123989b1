r"""How far the conserved flow lies from the max flow: a report about a graph, not a score of its tokens.

The conserved flow F moves by shares, a max flow by whatever fills the edges; both are certified against the same
capacities, and :math:`\alpha F` is one feasible flow of many. So :math:`\alpha \le V`, and nothing bounds
:math:`\alpha / V` from below. A small ratio says that one narrow edge carries much of the flow, no more; and V itself
is nearly the trivial cut on attention graphs. (Method, section 4: a max flow is a certificate and not a score.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowgraph.analysis.backbone import backbone
from flowgraph.analysis.statistics import spearman
from flowgraph.errors import InvalidInputError
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.maxflow.problem import MAX_EDGES, MaxFlowProblem


@dataclass(frozen=True)
class GapReport:
    """One flow beside the max flow of its graph.

    Attributes:
        num_tokens, num_edges: size of the graph.
        alpha: largest scaling of the flow that fits the capacities.
        value: V, the max flow from the flow's source tokens to its demand tokens.
        ratio: ``alpha / V``, in (0, 1].
        cut_edges: edges of the min cut nearest to the sources.
        unique_cut: whether it is the only min cut.
        cut_in_backbone: share of those edges that belong to the backbone.
        flow_across_cut: share of the unit flow on those edges (more than 1 where routes cross the cut back and forth).
        trivial: whether the cut merely isolates the sources, or the sinks.
        rank_correlation: Spearman's, between throughput f[v] and M[v], the most that could pass through v, over the
            tokens compared; NaN for fewer than three of them or if all are level.
        compared: how many tokens that is: those with most throughput, terminals aside.
    """

    num_tokens: int
    num_edges: int
    alpha: float
    value: float
    ratio: float
    cut_edges: int
    unique_cut: bool
    cut_in_backbone: float
    flow_across_cut: float
    trivial: bool
    rank_correlation: float
    compared: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def gap_report(flow: Flow, *, keep: float = 0.9, num_compared: int = 32, max_edges: int = MAX_EDGES) -> GapReport:
    """Compare one flow with the exact max flow of its graph.

    Args:
        flow: feasible, on one graph, no token both source and demand.
        keep: share of the flow that the backbone carries.
        num_compared: for how many tokens M[v] is computed, at two max flows each; 0 leaves the correlation out.
        max_edges: refuse larger graphs.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch, a token that is source and demand, or ``num_compared`` below 0.
        TooLargeError: more than ``max_edges`` edges.

    Cost: ``1 + 2 num_compared`` max flows.

    Example:
        >>> import torch
        >>> from flowgraph.graph.flow_graph import FlowGraph
        >>> from flowgraph.flow.solve import solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> report = gap_report(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
        >>> round(report.ratio, 4), report.cut_edges, report.unique_cut, report.trivial
        (0.8333, 2, True, False)
    """
    if num_compared < 0:
        raise InvalidInputError(f"num_compared: must be at least 0, got {num_compared}; 0 leaves the comparison out")
    require_single_feasible(flow)
    network = MaxFlowProblem(flow, max_edges=max_edges)
    best = network.between(network.sources, network.sinks)
    edge_flow = flow.edge_flow.cpu()
    bone = backbone(flow, keep).edge_mask.cpu()
    cut = best.cut_edges.cpu()
    inside = best.source_side.cpu().numpy()
    f = flow.throughput.cpu().numpy()
    inner = np.flatnonzero(~(network.sources | network.sinks) & (f > 0))
    tokens = inner[np.argsort(-f[inner], kind="stable")[:num_compared]]
    through = np.array([network.through(int(v)) for v in tokens])
    return GapReport(
        num_tokens=f.size,
        num_edges=edge_flow.numel(),
        alpha=float(flow.alpha),
        value=best.value,
        ratio=float(flow.alpha) / best.value,
        cut_edges=cut.numel(),
        unique_cut=best.unique_cut,
        cut_in_backbone=float(bone[cut].double().mean()),
        flow_across_cut=float(edge_flow[cut].sum()),
        trivial=bool((inside == network.sources).all() or (inside == ~network.sinks).all()),
        rank_correlation=spearman(f[tokens], through),
        compared=tokens.size,
    )


def gap_table(reports: Iterable[GapReport]) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of every number over a corpus of reports; NaN is left out.

    Raises:
        InvalidInputError: no report at all.
    """
    rows = [asdict(report) for report in reports]
    if not rows:
        raise InvalidInputError("reports: must hold at least one, got none; trace something first")
    table = {}
    for name in rows[0]:
        numbers = np.array([float(row[name]) for row in rows])
        numbers = numbers[np.isfinite(numbers)]
        quartiles = np.quantile(numbers, [0.25, 0.5, 0.75]) if numbers.size else np.full(3, np.nan)
        table[name] = tuple(float(x) for x in quartiles)
    return table
