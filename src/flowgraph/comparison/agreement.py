"""How far two flows agree, number by number: throughput, hubs, edges and routes over pairs of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.analysis.routes import widest_routes
from flowgraph.comparison.alignment import Group
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.steps.contraction import Contraction, contract

_NUM_HUBS = 10
_NUM_ROUTES = 10
_DECIMALS = 12
"""Throughputs that agree so far are tied: beyond it is rounding."""
_SHARED = 0.5
"""A route is shared when the narrower of its two widths is at least this part of the wider."""


@dataclass(frozen=True)
class RoutePair:
    """One of the widest routes of either trace, looked up in both.

    Attributes:
        pairs: its units, as indices into ``Comparison.pairs``.
        first, second: its width in each flow, the least flow on it (where it enters, its edges, where it leaves):
            the share of the flow that could take exactly this route. 0 where some unit or edge has no partner. Routes
            overlap, so widths do not add up.
    """

    pairs: tuple[int, ...]
    first: float
    second: float

    @property
    def shared(self) -> bool:
        """Whether the narrower width is at least half of the wider."""
        return min(self.first, self.second) >= _SHARED * max(self.first, self.second)


def flow_of_groups(flow: Flow, groups: Sequence[Group]) -> Flow:
    """The flow between groups of tokens as a flow of its own; the same flow when every group is one token."""
    if len(groups) == flow.throughput.numel():
        return flow
    group_of = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([b - a for a, b in groups]))
    return _as_flow(contract(flow, group_of))


def _as_flow(joined: Contraction) -> Flow:
    r"""Edges of capacity :math:`P(s \to t) = F(s, t) / f(s)`: then h is 1 wherever flow passes, and g is f."""
    visited = joined.throughput > 0
    h, g = visited.double(), joined.throughput
    safe = torch.where(visited, g, 1.0)
    graph = FlowGraph(
        edge_index=joined.edge_index, capacity=joined.edge_flow / safe[joined.edge_index[0]], num_nodes=g.numel()
    )
    return Flow(
        graph=graph,
        h=h,
        g=g,
        exponent=torch.zeros_like(g, dtype=torch.int64),
        throughput=g,
        source=joined.source,
        demand=joined.absorbed / safe,
        absorbing=torch.zeros_like(visited),
        damping=1.0,
        source_rule="vector",
        absorption="pass_through",
        backend="contracted",
    )


def on_pairs(values: Float64[Tensor, " units"], side: Int64[Tensor, " pairs"]) -> Float64[Tensor, " pairs"]:
    """A number per unit as a number per pair; 0 where the pair has no unit of this trace."""
    return torch.where(side >= 0, values.cpu()[side.clamp_min(0)], 0.0)


def pair_of_unit(side: Int64[Tensor, " pairs"], num_units: int) -> np.ndarray:
    """The pair that each unit is in."""
    pair_of = np.empty(num_units, dtype=np.int64)
    there = (side >= 0).numpy()
    pair_of[side.numpy()[there]] = np.flatnonzero(there)
    return pair_of


def total_variation(throughput: Float64[Tensor, "pairs 2"]) -> float:
    r""":math:`\frac12 \sum |p_1 - p_2|` of the two columns, each scaled to sum 1."""
    shares = throughput / throughput.sum(0)
    return min(float((shares[:, 0] - shares[:, 1]).abs().sum()) / 2, 1.0)


def rank_correlation(throughput: Float64[Tensor, "matched 2"]) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank."""
    centred = []
    for column in throughput.T:
        _, where, counts = torch.unique(column.round(decimals=_DECIMALS), return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0).double() - (counts - 1) / 2)[where]
        centred.append(rank - rank.mean() if rank.numel() else rank)
    scale = float(centred[0].norm() * centred[1].norm())
    return max(-1.0, min(1.0, float(centred[0] @ centred[1]) / scale)) if scale > 0 else None


def hub_overlap(
    flows: Sequence[Flow], thinking: Sequence[Bool[Tensor, " units"]], pair_of: Sequence[np.ndarray]
) -> tuple[float | None, int]:
    """Shared part of the strongest reasoning units of each flow, and how many the longer list has."""
    found = []
    for side in (0, 1):
        score = torch.where(thinking[side], flows[side].throughput.cpu(), 0.0)
        order = torch.argsort(score, descending=True, stable=True)[: min(_NUM_HUBS, int((score > 0).sum()))]
        found.append(set(pair_of[side][order.numpy()].tolist()))
    most = max(len(found[0]), len(found[1]))
    return (len(found[0] & found[1]) / most if most else None), most


def edge_overlap(
    flows: Sequence[Flow], pair_of: Sequence[np.ndarray], pairs: Int64[Tensor, "pairs 2"]
) -> tuple[float, tuple[float, float]]:
    r""":math:`2 \sum \min(F_1, F_2) / (\sum F_1 + \sum F_2)` over edges with both ends matched, and the two sums.

    In [0, 1], as a minimum is at most the mean; 1 when neither flow makes a hop. The measure is that of Bray and Curtis
    (Ecological Monographs 27, 1957), as a similarity.
    """
    matched = (pairs >= 0).all(1).numpy()
    keys, amounts, hops = [], [], []
    for side in (0, 1):
        edge_flow = flows[side].edge_flow.cpu().numpy()
        source, target = (pair_of[side][end] for end in flows[side].graph.edge_index.cpu().numpy())
        both = matched[source] & matched[target]
        keys.append(source[both] * len(matched) + target[both])
        amounts.append(edge_flow[both])
        hops.append(float(edge_flow.sum()))
    _, one, other = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    common = float(np.minimum(amounts[0][one], amounts[1][other]).sum())
    total = sum(hops)
    return (min(2 * common / total, 1.0) if total > 0 else 1.0), (hops[0], hops[1])


def route_pairs(
    flows: Sequence[Flow], pair_of: Sequence[np.ndarray], pairs: Int64[Tensor, "pairs 2"]
) -> tuple[RoutePair, ...]:
    """The ten widest routes of each flow, and how wide the same route is in the other."""
    paths: dict[tuple[int, ...], None] = {}
    for side in (0, 1):
        for route in widest_routes(flows[side], _NUM_ROUTES):
            paths[tuple(pair_of[side][list(route.tokens)].tolist())] = None
    widths = [_Widths(flow) for flow in flows]
    sides = pairs.T.tolist()
    found = [
        RoutePair(path, *(widths[side].of([sides[side][pair] for pair in path]) for side in (0, 1))) for path in paths
    ]
    return tuple(sorted(found, key=lambda route: (-max(route.first, route.second), route.pairs)))


class _Widths:
    """How much of one flow could take a given route; edges are found by their place in the (target, source) order."""

    def __init__(self, flow: Flow) -> None:
        self.size = flow.throughput.numel()
        source, target = flow.graph.edge_index.cpu().numpy()
        self.keys, self.edge_flow = target * self.size + source, flow.edge_flow.cpu().numpy()
        self.entering, self.leaving = flow.source.cpu().numpy(), flow.absorbed.cpu().numpy()

    def of(self, units: Sequence[int]) -> float:
        if min(units) < 0:
            return 0.0
        wanted = np.array(units[1:]) * self.size + np.array(units[:-1])
        at = np.searchsorted(self.keys, wanted).clip(max=max(len(self.keys) - 1, 0))
        if len(wanted) and not (len(self.keys) and bool((self.keys[at] == wanted).all())):
            return 0.0
        return float(min([self.entering[units[0]], self.leaving[units[-1]], *self.edge_flow[at]]))
