"""The dominant multi-hop routes: widest routes, flow decomposition, hubs and aggregation checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch_geometric.utils import scatter

from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow, require_single_feasible

RoleRegion = Literal["reasoning", "all"]
_NEGLIGIBLE = 1e-12
"""Residual flow below which a route is rounding, not flow (the unit flow is 1)."""

_STARTS_HERE = -1
"""In place of an edge: the widest route into the token starts at it."""


@loadable
@dataclass(frozen=True)
class Route:
    """One path from question to answer and the flow it carries.

    Routes of one call are disjoint in flow: their amounts add up to the flow that they represent.

    Attributes:
        tokens: the path, in token order.
        flow: share of the unit flow.
        text: text of each token, where it is known: ``trace.routes()`` sets it. It takes no part in comparisons.
    """

    tokens: tuple[int, ...]
    flow: float
    text: tuple[str, ...] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        stops = _named(self.tokens, self.text)
        return f"Route({' -> '.join(stops)}, flow={self.flow:.4g})"


@loadable
@dataclass(frozen=True)
class TokenRole:
    """The part of one token in the flow.

    Attributes:
        token: index.
        throughput: share of the unit flow that passes through it.
        inflows: effective number of edges by which its flow arrives, ``exp(entropy of the shares)``: 1 when one edge
            carries all, n when n carry equal parts.
        outflows: the same for the edges by which its flow continues.
        score: the number by which the list is ranked.
        text: of the token, where it is known: ``trace.hubs()`` and ``trace.checkpoints()`` set it. It takes no part in
            comparisons.
    """

    token: int
    throughput: float
    inflows: float
    outflows: float
    score: float
    text: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        (name,) = _named([self.token], None if self.text is None else [self.text])
        return (
            f"TokenRole({name}, throughput={self.throughput:.4g}, inflows={self.inflows:.4g}, "
            f"outflows={self.outflows:.4g}, score={self.score:.4g})"
        )


_Result = TypeVar("_Result", Route, TokenRole)


def with_text(result: _Result, tokens: Sequence[str]) -> _Result:
    """Return a route or a role with the text of its tokens.

    Args:
        result: a route or a role of a flow.
        tokens: the text of each token of that flow.
    """
    if isinstance(result, Route):
        return replace(result, text=tuple(tokens[token] for token in result.tokens))
    return replace(result, text=tokens[result.token])


def _named(tokens: Sequence[int], text: Sequence[str] | None) -> list[str]:
    """Name tokens by index and, where it is known, by text: 96 ' 7'."""
    if text is None:
        return [str(token) for token in tokens]
    return [f"{token} {shown!r}" for token, shown in zip(tokens, text, strict=True)]


def widest_routes(flow: Flow, k: int = 10) -> list[Route]:
    """Find the ``k`` widest routes: the first k of :func:`decompose`.

    Args:
        flow: a feasible flow on one graph.
        k: how many, at least 1.

    Returns:
        Routes, widest first; fewer than k where the flow has fewer.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: ``k`` below 1, or a batch.

    Cost: one pass over the edges per route.
    """
    if k < 1:
        raise InvalidInputError(f"k: must be at least 1, got {k!r}; ask for the number of routes you want to see")
    return decompose(flow, share=1.0, max_routes=k)


def decompose(flow: Flow, share: float = 0.9, max_routes: int = 1000) -> list[Route]:
    """Split the flow into routes, widest first: flow decomposition by successive widest paths.

    The widest route maximises the least flow on it (where it enters, its edges, where it is absorbed). That amount is
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
    routes = []
    carried = 0.0
    for route in _successive_widest(flow):
        routes.append(route)
        carried += route.flow
        if carried >= share - _NEGLIGIBLE or len(routes) >= max_routes:
            break
    return routes


def hubs(flow: Flow, k: int = 10, region: RoleRegion = "reasoning") -> list[TokenRole]:
    """Find the routing hubs: the tokens with the highest throughput.

    Args:
        flow: a feasible flow on one graph.
        k: how many, at least 1.
        region: ``"reasoning"`` (default) or ``"all"`` tokens, question and answer included.

    Returns:
        Tokens with flow, highest throughput first; fewer than k where there are fewer.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: ``k`` below 1, another region, or a batch.

    Cost: a few reads of the edges.
    """
    return _ranked(flow, flow.throughput, k, region)


def checkpoints(flow: Flow, k: int = 10, region: RoleRegion = "reasoning") -> list[TokenRole]:
    r"""Find the aggregation checkpoints: tokens with high throughput that arrives from many places.

    Ranked by :math:`f[t] \cdot H_{\mathrm{in}}(t)`, throughput times the entropy of the inflow shares
    :math:`F(s, t) / \sum_s F(s, t)`: the token's term in the entropy of a route read backwards from the answer.
    A token that relays a single predecessor scores 0, for any throughput.

    Args:
        flow: a feasible flow on one graph.
        k: how many, at least 1.
        region: ``"reasoning"`` (default) or ``"all"`` tokens, question and answer included.

    Returns:
        Tokens with a positive score, highest first; fewer than k where there are fewer.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: ``k`` below 1, another region, or a batch.

    Cost: a few reads of the edges.
    """
    inflow_entropy = _flow_entropy(flow, flow.graph.edge_index[1])
    return _ranked(flow, flow.throughput * inflow_entropy, k, region)


def _successive_widest(flow: Flow) -> Iterator[Route]:
    """Yield widest route after widest route, each taken out of the residual flow."""
    # The edges with flow, by target: those into token t are first_edge[t] to first_edge[t + 1] (exclusive).
    edge_flow = flow.edge_flow
    kept = edge_flow > _NEGLIGIBLE
    residual = edge_flow[kept].cpu().numpy()
    source = flow.graph.edge_index[0, kept].cpu().numpy()
    target = flow.graph.edge_index[1, kept].cpu().numpy()
    entering = flow.source.cpu().numpy().copy()
    absorbed = flow.absorbed.cpu().numpy().copy()
    first_edge = np.searchsorted(target, np.arange(entering.size + 1))

    # The flow that is left is conserved after every route, so there is a route as long as any flow is left.
    while True:
        # The widest complete route ends where the route into a token and the token's absorption both allow most.
        width, arrives_by = _widest_into(residual, source, entering, first_edge)
        route_widths = np.minimum(width, absorbed)
        last = int(np.argmax(route_widths))
        amount = route_widths[last]
        if amount <= _NEGLIGIBLE:
            return

        # Follow its edges back to the token where it enters.
        tokens = [last]
        edges = []
        while arrives_by[tokens[-1]] != _STARTS_HERE:
            edge = arrives_by[tokens[-1]]
            edges.append(edge)
            tokens.append(int(source[edge]))
        first = tokens[-1]

        # A path visits each edge once, so one subtraction for each is enough.
        residual[edges] -= amount
        entering[first] -= amount
        absorbed[last] -= amount
        yield Route(tuple(reversed(tokens)), float(amount))


def _widest_into(
    residual: Float64[np.ndarray, " kept"],
    source: Int64[np.ndarray, " kept"],
    entering: Float64[np.ndarray, " tokens"],
    first_edge: Int64[np.ndarray, " tokens+1"],
) -> tuple[Float64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]:
    """Compute the least flow on the widest route into each token, and the last edge of that route."""
    # width[t] = max(src[t], max_s min(width[s], F(s, t))), in token order: the width of every source is final before
    # it is read.
    width = entering.copy()
    arrives_by = np.full(entering.size, _STARTS_HERE)
    num_incoming = np.diff(first_edge)
    for token in np.flatnonzero(num_incoming):
        incoming = slice(first_edge[token], first_edge[token + 1])
        width_of_source = width[source[incoming]]
        through_edge = np.minimum(residual[incoming], width_of_source)
        best = int(through_edge.argmax())
        if through_edge[best] > width[token]:
            width[token] = through_edge[best]
            arrives_by[token] = first_edge[token] + best
    return width, arrives_by


def _ranked(flow: Flow, score: Float64[Tensor, " tokens"], k: int, region: str) -> list[TokenRole]:
    """List the k tokens of a region with the highest positive score; ties by position."""
    require_single_feasible(flow)
    if region not in get_args(RoleRegion):
        raise InvalidInputError(
            f"region: must be 'reasoning' or 'all', got {region!r}; 'all' includes question and answer"
        )
    if k < 1:
        raise InvalidInputError(f"k: must be at least 1, got {k!r}; ask for the number of tokens you want to see")

    eligible = score > 0
    if region == "reasoning":
        eligible = eligible & flow.graph.reasoning_mask
    # Scores are at least 0, so -1 sorts the other tokens last.
    ranked = torch.where(eligible, score, -1.0)
    highest_first = torch.argsort(ranked, descending=True, stable=True)
    num_listed = min(k, int(eligible.sum()))

    # exp(entropy): the effective number of edges.
    source, target = flow.graph.edge_index
    inflows = _flow_entropy(flow, target).exp()
    outflows = _flow_entropy(flow, source).exp()
    roles = []
    for token in highest_first[:num_listed].tolist():
        role = TokenRole(
            token=token,
            throughput=float(flow.throughput[token]),
            inflows=float(inflows[token]),
            outflows=float(outflows[token]),
            score=float(score[token]),
        )
        roles.append(role)
    return roles


def _flow_entropy(flow: Flow, end: Int64[Tensor, " edges"]) -> Float64[Tensor, " tokens"]:
    """Compute the entropy in nats of the shares of flow on the edges at one end: targets for inflow, else outflow."""
    edge_flow = flow.edge_flow
    num_tokens = flow.throughput.numel()
    total = scatter(edge_flow, end, dim_size=num_tokens, reduce="sum")
    share = torch.where(edge_flow > 0, edge_flow / total[end], 0.0)
    # entr(p) = -p log p, with entr(0) = 0.
    terms = torch.special.entr(share)
    return scatter(terms, end, dim_size=num_tokens, reduce="sum")
