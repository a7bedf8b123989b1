"""Measure how far two aligned flows agree: throughput, hubs, edges and routes over pairs of units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.analysis.routes import widest_routes
from flowgraph.analysis.statistics import spearman
from flowgraph.comparison.alignment import Group
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.steps.contraction import Contraction, contract

_MAX_HUBS = 10
_MAX_ROUTES = 10
_TIE_DECIMALS = 12
"""Throughputs that are equal to this many decimals are tied; later digits are rounding."""
_SHARED_RATIO = 0.5
"""A route is shared when the narrower of its two widths is at least this part of the wider."""


@loadable
@dataclass(frozen=True)
class RoutePair:
    """One of the widest routes of either trace, looked up in both.

    Attributes:
        pairs: its units, as indices into ``Comparison.pairs``.
        first: its width in the first flow, the least flow on it (where it enters, on its edges, where it is absorbed):
            the share of the flow that could take exactly this route. 0 where a unit or an edge has no partner. Routes
            overlap, so widths do not add up.
        second: the same in the second flow.
        text: of each unit, where it is known: a :class:`flowgraph.Comparison` has it. It takes no part in comparisons.
    """

    pairs: tuple[int, ...]
    first: float
    second: float
    text: tuple[str, ...] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        if self.text is None:
            stops = [str(pair) for pair in self.pairs]
        else:
            stops = [f"{pair} {text!r}" for pair, text in zip(self.pairs, self.text, strict=True)]
        return f"RoutePair({' -> '.join(stops)}, first={self.first:.4g}, second={self.second:.4g})"

    @property
    def shared(self) -> bool:
        """Whether the narrower width is at least half of the wider."""
        narrower = min(self.first, self.second)
        wider = max(self.first, self.second)
        return narrower >= _SHARED_RATIO * wider


def flow_of_groups(flow: Flow, groups: Sequence[Group]) -> Flow:
    """Contract a flow to groups of tokens, as a flow of its own.

    Args:
        flow: a feasible flow on T tokens.
        groups: token ranges that cover the T tokens in order.

    Returns:
        The flow between the groups; ``flow`` itself when every group is one token.

    Cost: one sort of the edges.
    """
    if len(groups) == flow.throughput.numel():
        return flow
    sizes = torch.tensor([stop - start for start, stop in groups])
    group_of_token = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    return _as_flow(contract(flow, group_of_token))


def _as_flow(contracted: Contraction) -> Flow:
    r"""Give edges the capacity :math:`P(s \to t) = F(s, t) / f(s)`: then h is 1 where flow passes, and g is f."""
    # Tokens without throughput have F = 0 on all edges, so any divisor gives P = 0 there.
    throughput = contracted.throughput
    is_visited = throughput > 0
    divisor = torch.where(is_visited, throughput, 1.0)
    source_of_edge = contracted.edge_index[0]
    graph = FlowGraph(
        edge_index=contracted.edge_index,
        capacity=contracted.edge_flow / divisor[source_of_edge],
        num_nodes=throughput.numel(),
    )
    return Flow(
        graph=graph,
        h=is_visited.double(),
        g=throughput,
        exponent=torch.zeros_like(throughput, dtype=torch.int64),
        throughput=throughput,
        source=contracted.source,
        demand=contracted.absorbed / divisor,
        absorbing=torch.zeros_like(is_visited),
        damping=1.0,
        source_rule="vector",
        absorption="pass_through",
        backend="contracted",
    )


def on_pairs(values: Float64[Tensor, " units"], side: Int64[Tensor, " pairs"]) -> Float64[Tensor, " pairs"]:
    """Spread one number per unit over the pairs; 0 where the pair has no unit of this trace.

    Args:
        values: ``[U]``, one number per unit.
        side: ``[P]``, the unit of each pair in this trace, or -1.
    """
    has_unit = side >= 0
    unit = side.clamp_min(0)
    return torch.where(has_unit, values.cpu()[unit], 0.0)


def pair_of_unit(side: Int64[Tensor, " pairs"], num_units: int) -> np.ndarray:
    """Invert one column of the pairs: the pair that each unit is in.

    Args:
        side: ``[P]``, the unit of each pair in this trace, or -1.
        num_units: U.

    Returns:
        ``[U]`` int64.
    """
    unit_of_pair = side.numpy()
    pairs_with_unit = np.flatnonzero(unit_of_pair >= 0)
    pair_of = np.empty(num_units, dtype=np.int64)
    pair_of[unit_of_pair[pairs_with_unit]] = pairs_with_unit
    return pair_of


def total_variation(throughput: Float64[Tensor, "pairs 2"]) -> float:
    r"""Compute :math:`\frac12 \sum |p_1 - p_2|` of the two columns, each scaled to sum 1.

    Returns:
        A number in [0, 1].
    """
    shares = throughput / throughput.sum(0)
    distance = (shares[:, 0] - shares[:, 1]).abs().sum()
    # Rounding of the shares may exceed the bound by an ulp.
    return min(float(distance) / 2, 1.0)


def rank_correlation(throughput: Float64[Tensor, "matched 2"]) -> float | None:
    """Compute Spearman's rank correlation of the two columns; values equal to 12 decimals are tied.

    Returns:
        A number in [-1, 1]; None where :func:`flowgraph.analysis.statistics.spearman` is not defined: for fewer than
        three pairs (two can only give 1 or -1), or where one column is constant.
    """
    # Two exact methods may differ in the last digits; without rounding this would break ties at random.
    rounded = throughput.round(decimals=_TIE_DECIMALS)
    first, second = rounded.T.numpy()
    correlation = spearman(first, second)
    if math.isnan(correlation):
        return None
    return correlation


def hub_overlap(
    flows: Sequence[Flow],
    is_reasoning: Sequence[Bool[Tensor, " _"]],
    pair_of: Sequence[np.ndarray],
) -> tuple[float | None, int]:
    """Compare the ten reasoning units with most throughput of each flow.

    Args:
        flows: the two flows between units.
        is_reasoning: for each flow a mask over its units.
        pair_of: for each flow the pair that each unit is in.

    Returns:
        The number of common hubs over the length of the longer list (None where both are empty), and that length.
    """
    hubs_of_side: list[set[int]] = []
    for flow, reasoning, pair_of_side in zip(flows, is_reasoning, pair_of, strict=True):
        # Units of other regions get the score 0, and only positive scores count.
        score = torch.where(reasoning, flow.throughput.cpu(), 0.0)
        num_hubs = min(_MAX_HUBS, int((score > 0).sum()))
        hubs = torch.argsort(score, descending=True, stable=True)[:num_hubs]
        hubs_of_side.append(set(pair_of_side[hubs.numpy()].tolist()))

    first, second = hubs_of_side
    longest = max(len(first), len(second))
    if longest == 0:
        return None, 0
    return len(first & second) / longest, longest


def edge_overlap(
    flows: Sequence[Flow],
    pair_of: Sequence[np.ndarray],
    pairs: Int64[Tensor, "pairs 2"],
) -> tuple[float, tuple[float, float]]:
    r"""Compute :math:`2 \sum \min(F_1, F_2) / (\sum F_1 + \sum F_2)`; the minimum is over edges with matched ends.

    Args:
        flows: the two flows between units.
        pair_of: for each flow the pair that each unit is in.
        pairs: ``[P, 2]``, the units of each pair, or -1.

    Returns:
        The overlap, in [0, 1], as a minimum is at most the mean (1 when neither flow makes a hop); and the sum of the
        edge flows of each flow, its mean number of hops.

    Source: the dissimilarity of Bray and Curtis (Ecological Monographs 27, 1957), as a similarity.
    """
    is_matched = (pairs >= 0).all(1).numpy()
    num_pairs = len(is_matched)
    keys = []
    amounts = []
    hops = []
    for flow, pair_of_side in zip(flows, pair_of, strict=True):
        edge_flow = flow.edge_flow.cpu().numpy()
        edge_index = flow.graph.edge_index.cpu().numpy()
        source = pair_of_side[edge_index[0]]
        target = pair_of_side[edge_index[1]]

        # One integer per edge, the same in both flows where both ends are partners.
        both_matched = is_matched[source] & is_matched[target]
        key = source * num_pairs + target
        keys.append(key[both_matched])
        amounts.append(edge_flow[both_matched])
        hops.append(float(edge_flow.sum()))

    # The edges that both flows have; their common flow is the smaller of the two.
    _, in_first, in_second = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    smaller = np.minimum(amounts[0][in_first], amounts[1][in_second])
    common = float(smaller.sum())

    # Two flows without any hop agree; rounding must not exceed 1.
    total = hops[0] + hops[1]
    overlap = 1.0
    if total > 0:
        overlap = min(2 * common / total, 1.0)
    return overlap, (hops[0], hops[1])


def route_pairs(
    flows: Sequence[Flow],
    pair_of: Sequence[np.ndarray],
    pairs: Int64[Tensor, "pairs 2"],
) -> tuple[RoutePair, ...]:
    """Find the ten widest routes of each flow, and how wide the same route is in the other.

    Args:
        flows: the two flows between units.
        pair_of: for each flow the pair that each unit is in.
        pairs: ``[P, 2]``, the units of each pair, or -1.

    Returns:
        Up to twenty routes, widest first.

    Cost: ten searches for a widest route in each flow.
    """
    # The routes of both as pairs; a dict keeps one of each, in order.
    paths: dict[tuple[int, ...], None] = {}
    for flow, pair_of_side in zip(flows, pair_of, strict=True):
        for route in widest_routes(flow, _MAX_ROUTES):
            path = pair_of_side[list(route.tokens)].tolist()
            paths[tuple(path)] = None

    first_widths, second_widths = (_RouteWidths(flow) for flow in flows)
    first_unit, second_unit = pairs.T.tolist()

    # The same route in each flow, by the units of its pairs.
    found = []
    for path in paths:
        in_first = first_widths.width([first_unit[pair] for pair in path])
        in_second = second_widths.width([second_unit[pair] for pair in path])
        found.append(RoutePair(path, in_first, in_second))
    return tuple(sorted(found, key=_widest_first))


def _widest_first(route: RoutePair) -> tuple[float, tuple[int, ...]]:
    """Sort key of a route: wider first, ties by position in the text."""
    return -max(route.first, route.second), route.pairs


class _RouteWidths:
    """The widths of routes in one flow; edges are found by their position in the (target, source) order."""

    def __init__(self, flow: Flow) -> None:
        self.num_units = flow.throughput.numel()
        source, target = flow.graph.edge_index.cpu().numpy()
        self.edge_keys = target * self.num_units + source
        self.edge_flow = flow.edge_flow.cpu().numpy()
        self.entering = flow.source.cpu().numpy()
        self.absorbed = flow.absorbed.cpu().numpy()

    def width(self, units: Sequence[int]) -> float:
        """Return the least flow on a route; 0 where a unit is -1 or an edge is missing."""
        if min(units) < 0:
            return 0.0
        ends = np.array(units, dtype=np.int64)
        wanted = ends[1:] * self.num_units + ends[:-1]

        # A key that is missing has the same position to the left and to the right of it.
        edges = np.searchsorted(self.edge_keys, wanted, side="left")
        stops = np.searchsorted(self.edge_keys, wanted, side="right")
        if (edges == stops).any():
            return 0.0

        # The flow that enters at the first unit and leaves at the last limits a route as its edges do.
        entering = self.entering[ends[0]]
        absorbed = self.absorbed[ends[-1]]
        return float(min(entering, absorbed, *self.edge_flow[edges]))
