r"""gap_report: how far the conserved flow lies from the max flow; a report about a graph, not a score of its tokens.

The conserved flow F moves by shares, a max flow fills edges in any order. Both are certified against the same
capacities, and :math:`\alpha F` is one feasible flow of many. So :math:`\alpha \le V`, and nothing bounds
:math:`\alpha / V` from below. A small ratio means that one narrow edge carries much of the flow, no more; and V itself
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
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.maxflow.problem import MAX_EDGES, MaxFlowProblem

_QUARTILES = (0.25, 0.5, 0.75)


@loadable
@dataclass(frozen=True)
class GapReport:
    """One flow beside the max flow of its graph.

    Attributes:
        num_tokens: T, tokens of the graph.
        num_edges: E, edges of the graph.
        alpha: largest scaling of the flow that fits the capacities.
        value: V, the max flow from the flow's source tokens to its demand tokens.
        ratio: ``alpha / V``, in (0, 1].
        cut_edges: number of edges of the min cut nearest to the sources.
        unique_cut: whether it is the only min cut.
        cut_in_backbone: share of those edges that belong to the backbone.
        flow_across_cut: share of the unit flow on those edges (more than 1 where routes cross the cut back and forth).
        trivial: whether the cut merely isolates the sources, or the sinks.
        rank_correlation: Spearman's, between throughput f[v] and M[v], the most that could pass through v, over the
            tokens compared; NaN for fewer than three of them or if all are level.
        compared: number of tokens compared: those with most throughput, terminals aside.
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
        """Return plain JSON values; NaN becomes None."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        return values


def gap_report(flow: Flow, *, keep: float = 0.9, num_compared: int = 32, max_edges: int = MAX_EDGES) -> GapReport:
    """Compare one flow with the exact max flow of its graph.

    Args:
        flow: feasible, on one graph, no token both source and demand.
        keep: share of the flow that the backbone carries.
        num_compared: for how many tokens M[v] is computed, at two max flows each; 0 omits the correlation.
        max_edges: larger graphs raise an error.

    Returns:
        A :class:`GapReport`.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch, a token that is source and demand, or ``num_compared`` below 0.
        TooLargeError: more than ``max_edges`` edges.
        NumericalRangeError: V is beyond the range of float64, or the max-flow solver failed its re-check.

    Cost: ``1 + 2 num_compared`` max flows. Source: method, section 4, items 5 and 8.

    Example:
        >>> import torch
        >>> from flowgraph import FlowGraph, solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> report = gap_report(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
        >>> round(report.ratio, 4), report.cut_edges, report.unique_cut, report.trivial
        (0.8333, 2, True, False)
    """
    if num_compared < 0:
        raise InvalidInputError(f"num_compared: must be at least 0, got {num_compared}; 0 omits the comparison")
    require_single_feasible(flow)

    # V, the max flow between the flow's own terminals.
    problem = MaxFlowProblem(flow, max_edges=max_edges)
    best = problem.between(problem.sources, problem.sinks)

    # Its min cut, beside the flow and its backbone. A cut is trivial where one side holds the terminals alone.
    edge_flow = flow.edge_flow.cpu()
    in_backbone = backbone(flow, keep).edge_mask.cpu()
    cut_edges = best.cut_edges.cpu()
    source_side = best.source_side.cpu().numpy()
    isolates_sources = bool((source_side == problem.sources).all())
    isolates_sinks = bool((source_side == ~problem.sinks).all())

    # Throughput f[v] against M[v], for the tokens with most throughput between the terminals.
    f = flow.throughput.cpu().numpy()
    is_terminal = problem.sources | problem.sinks
    inner = np.flatnonzero(~is_terminal & (f > 0))
    order = np.argsort(-f[inner], kind="stable")
    largest_first = inner[order]
    tokens = largest_first[:num_compared]
    through = np.array([problem.through(int(v)) for v in tokens])

    # alpha <= V holds exactly; alpha may exceed the rounded V by its own rounding. The cut is never below V.
    alpha = float(flow.alpha)
    ratio = min(alpha / best.cut_capacity, 1.0)

    return GapReport(
        num_tokens=f.size,
        num_edges=edge_flow.numel(),
        alpha=alpha,
        value=best.value,
        ratio=ratio,
        cut_edges=cut_edges.numel(),
        unique_cut=best.unique_cut,
        cut_in_backbone=float(in_backbone[cut_edges].double().mean()),
        flow_across_cut=float(edge_flow[cut_edges].sum()),
        trivial=isolates_sources or isolates_sinks,
        rank_correlation=spearman(f[tokens], through),
        compared=tokens.size,
    )


def gap_table(reports: Iterable[GapReport]) -> dict[str, tuple[float, float, float]]:
    """Compute lower quartile, median and upper quartile of every number over a corpus of reports.

    Args:
        reports: at least one.

    Returns:
        The three quartiles by field of :class:`GapReport`. NaN and infinity are ignored; a field without any finite
        number has quartiles of NaN.

    Raises:
        InvalidInputError: no report.
    """
    rows = [asdict(report) for report in reports]
    if not rows:
        raise InvalidInputError("reports: must hold at least one, got none; trace something first")

    # Booleans count as 0 and 1, so that their quartiles are defined too.
    table = {}
    for name in rows[0]:
        numbers = np.array([float(row[name]) for row in rows])
        finite = numbers[np.isfinite(numbers)]
        quartiles = np.full(3, np.nan)
        if finite.size:
            quartiles = np.quantile(finite, _QUARTILES)
        table[name] = tuple(quartiles.tolist())
    return table
