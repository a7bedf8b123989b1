"""The dominant multi-hop routes: widest routes, flow decomposition, hubs and aggregation checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch_geometric.utils import scatter

from flowgraph.errors import InvalidInputError
from flowgraph.flow.flow import Flow, require_single_feasible

RoleRegion = Literal["reasoning", "all"]
_NEGLIGIBLE = 1e-12
"""Residual flow below which a route is rounding, not flow (the whole flow is 1)."""


@dataclass(frozen=True)
class Route:
    """One path from question to answer and the flow it carries; routes of one call are disjoint in flow."""

    tokens: tuple[int, ...]
    flow: float


@dataclass(frozen=True)
class TokenRole:
    """Where one token stands in the flow.

    Attributes:
        token: index.
        throughput: share of the unit flow that passes through it.
        inflows, outflows: effective number of edges that its flow arrives and leaves by,
            ``exp(entropy of the shares)``: 1 when one edge carries all, n when n carry equal parts.
        score: what the list is ranked by.
    """

    token: int
    throughput: float
    inflows: float
    outflows: float
    score: float


def widest_routes(flow: Flow, k: int = 10) -> list[Route]:
    """The ``k`` widest routes: the first k of :func:`decompose`."""
    if k < 1:
        raise InvalidInputError(f"k: must be at least 1, got {k!r}; ask for the number of routes you want to see")
    return decompose(flow, share=1.0, max_routes=k)


def decompose(flow: Flow, share: float = 0.9, max_routes: int = 1000) -> list[Route]:
    """Split the flow into routes, widest first: flow decomposition by successive widest paths.

    The widest route maximises the least flow on it (where it enters, its edges, where it leaves). That amount is
    taken away everywhere along it and the next widest route is found in what is left, so the amounts add up
    to the flow they represent.

    Args:
        flow: a feasible flow on one graph.
        share: stop when the routes carry this share of the flow.
        max_routes: stop after this many.

    Returns:
        Routes, widest first (amounts never increase).

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: ``share`` outside (0, 1], or a batch.

    Cost: one pass over the edges per route.
    """
    if not 0 < share <= 1:
        raise InvalidInputError(f"share: must lie in (0, 1], got {share!r}; 0.9 splits 90 % of the flow")
    require_single_feasible(flow)
    routes, carried = [], 0.0
    for route in _peel(flow):
        routes.append(route)
        carried += route.flow
        if carried >= share - _NEGLIGIBLE or len(routes) >= max_routes:
            break
    return routes


def _peel(flow: Flow) -> Iterator[Route]:
    """Widest route after widest route, each taken out of the residual flow."""
    edge_flow = flow.edge_flow
    kept = edge_flow > _NEGLIGIBLE
    residual = edge_flow[kept].cpu().numpy()
    source = flow.graph.edge_index[0, kept].cpu().numpy()
    target = flow.graph.edge_index[1, kept].cpu().numpy()
    entering, leaving = flow.source.cpu().numpy().copy(), flow.absorbed.cpu().numpy().copy()
    first_edge = np.searchsorted(target, np.arange(entering.size + 1))
    while True:
        width, via = _widest(residual, source, first_edge, entering)
        last = int(np.argmax(np.minimum(width, leaving)))
        amount = min(width[last], leaving[last])
        if amount <= _NEGLIGIBLE:
            return
        tokens, edges = [last], []
        while via[tokens[-1]] >= 0:
            edges.append(via[tokens[-1]])
            tokens.append(int(source[edges[-1]]))
        residual[edges] -= amount
        entering[tokens[-1]] -= amount
        leaving[last] -= amount
        yield Route(tuple(reversed(tokens)), float(amount))


def _widest(
    residual: np.ndarray, source: np.ndarray, first_edge: np.ndarray, entering: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bottleneck of the widest route into each token, and the edge it arrives by (-1: it starts there)."""
    width, via = entering.copy(), np.full(entering.size, -1)
    for token in np.flatnonzero(np.diff(first_edge)):
        edges = slice(first_edge[token], first_edge[token + 1])
        reach = np.minimum(residual[edges], width[source[edges]])
        best = int(reach.argmax())
        if reach[best] > width[token]:
            width[token], via[token] = reach[best], first_edge[token] + best
    return width, via


def hubs(flow: Flow, k: int = 10, region: RoleRegion = "reasoning") -> list[TokenRole]:
    """Routing hubs: the tokens with the highest throughput.

    Args:
        flow: a feasible flow on one graph.
        k: how many.
        region: ``"reasoning"`` (default) or ``"all"`` tokens, question and answer included.
    """
    return _ranked(flow, flow.throughput, k, region)


def checkpoints(flow: Flow, k: int = 10, region: RoleRegion = "reasoning") -> list[TokenRole]:
    r"""Aggregation checkpoints: high throughput that arrives from many places.

    Ranked by :math:`f[t] \cdot H_{\mathrm{in}}(t)`, throughput times the entropy of its inflow shares
    :math:`F(s, t) / \sum_s F(s, t)`: the token's term in the entropy of a route read backwards from the answer.
    A token that relays a single predecessor scores 0, however much passes through it. Arguments as :func:`hubs`.
    """
    into, _ = _flow_entropies(flow)
    return _ranked(flow, flow.throughput * into, k, region)


def _ranked(flow: Flow, score: Float64[Tensor, " tokens"], k: int, region: str) -> list[TokenRole]:
    require_single_feasible(flow)
    if region not in ("reasoning", "all"):
        raise InvalidInputError(
            f"region: must be 'reasoning' or 'all', got {region!r}; 'all' includes question and answer"
        )
    if k < 1:
        raise InvalidInputError(f"k: must be at least 1, got {k!r}; ask for the number of tokens you want to see")
    eligible = score > 0 if region == "all" else flow.graph.reasoning_mask & (score > 0)
    order = torch.argsort(torch.where(eligible, score, -1.0), descending=True, stable=True)
    into, out_of = (entropy.exp() for entropy in _flow_entropies(flow))
    return [
        TokenRole(t, float(flow.throughput[t]), float(into[t]), float(out_of[t]), float(score[t]))
        for t in order[: min(k, int(eligible.sum()))].tolist()
    ]


def _flow_entropies(flow: Flow) -> tuple[Float64[Tensor, " tokens"], Float64[Tensor, " tokens"]]:
    """Entropy in nats of each token's inflow shares and outflow shares."""
    edge_flow = flow.edge_flow
    source, target = flow.graph.edge_index
    entropies = []
    for end in (target, source):
        total = scatter(edge_flow, end, dim_size=flow.throughput.numel(), reduce="sum")
        share = torch.where(edge_flow > 0, edge_flow / total[end], 0.0)
        entropies.append(scatter(torch.special.entr(share), end, dim_size=flow.throughput.numel(), reduce="sum"))
    return entropies[0], entropies[1]
