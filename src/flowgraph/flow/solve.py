"""``solve``: the conserved, answer-targeted flow on a ``FlowGraph`` or a batch of them, exact and differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.graph.signed_graph import refuse_signed
from flowgraph.graph.validity import require_usable
from flowgraph.masks import as_tensor
from flowgraph.propagation.checks import token_vector
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.topology import topology_of

SourceRule = Literal["uniform", "potential"]
Vector = Tensor | np.ndarray | Sequence[float]
"""One number for each token."""
Absorption = Literal["absorb", "pass_through"]


def solve(
    graph: FlowGraph | Batch,
    *,
    backend: Backend = "auto",
    source: SourceRule | Vector = "uniform",
    demand: Vector | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
) -> Flow:
    r"""Solve the conserved flow from question to answer exactly.

    .. math::
        h = b + N^\top h, \quad q = \mathrm{source}/h, \quad g = q + N g, \quad f = g \cdot h,

    with N the capacities, damped, and 0 on the edges out of an absorbing token. This is equivalent to the re-weighted
    transition :math:`P(s \to t) = A[t,s] h[t] / h[s]` of the paper. P is never formed, so errors of h cancel in
    :math:`g \cdot h`.

    Args:
        graph: one :class:`FlowGraph`, or a PyG ``Batch`` of many, each solved independently.
        backend: ``"scatter"``, block substitution over PyG scatter (canonical, any device); ``"numba"``, the same
            sums compiled, in threads over the graphs of a batch (CPU; extra ``numba``); ``"dense"``, block
            substitution over a dense matrix; ``"reference"``, one token at a time in Python; ``"auto"``, compiled
            where it runs, else scatter.
        source: where the unit enters: ``"uniform"`` over the question tokens that reach the answer (paper),
            ``"potential"`` in proportion to h over question tokens, or a non-negative vector ``[N]``, normalised
            per graph over the tokens that reach the demand.
        demand: b, a non-negative vector ``[N]``; default: 1 on answer tokens.
        absorption: ``"absorb"``, answer tokens have no outgoing edges (default with the default demand), or
            ``"pass_through"``, all edges stay (default with a custom demand).
        damping: factor per hop in (0, 1].

    Returns:
        A :class:`Flow`. A graph whose answer is unreachable is not an error: its ``feasible`` is False and its flow is
        zero. Derivatives of any order propagate to ``graph.capacity``, ``source`` and ``demand`` where these require
        them: the adjoint of each sweep is the other sweep.

    Raises:
        InvalidInputError: an option outside its set, a vector of the wrong length, negative or not finite, a
            backend that does not run on the graph's device.
        MissingExtraError: a backend whose package is not installed.
        GraphError: not a FlowGraph, or one that is invalid since it was made: edges in another order, backwards or
            twice, a capacity that is NaN, infinite or negative.

    Cost: two reads of the edges. The structure of the edges is checked and computed once per graph and cached on it,
    until a tensor is replaced or edited in place; the range of the capacities is checked each time.
    Source: arXiv 2606.10646 (answer conditioning and local conservation), in the g-form.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> [round(x, 4) for x in flow.throughput.tolist()]
        [1.0, 0.6667, 0.3333, 1.0]
    """
    refuse_signed(graph, "the conserved flow")
    if not isinstance(graph, FlowGraph):
        raise GraphError(
            f"graph: must be a FlowGraph or a Batch of them, got {type(graph).__name__}; see FlowGraph.from_dense "
            "(a FlowTrace has its graph as trace.graph, solved as trace.flow)"
        )
    check_options(backend, source, absorption, damping)
    require_usable(graph)

    # D: the damping, or 0 where an answer token absorbs.
    absorption = absorption_rule(absorption, demand)
    absorbing = graph.answer_mask & (absorption == "absorb")
    propagation_factor = (~absorbing).double() * damping

    # The demand b, and the source: a checked vector, or the name of a rule that needs h first.
    nodes = graph.answer_mask.shape
    device = graph.capacity.device
    if demand is None:
        b = graph.answer_mask.double()
    else:
        b = token_vector(demand, nodes, device, "demand")
    if not isinstance(source, str):
        source = token_vector(source, nodes, device, "source")

    # h, g and src; the throughput f = g h follows.
    sweeps = EdgeSweeps(topology_of(graph), propagation_factor, backend)
    solved = conserve(
        sweeps,
        graph.capacity,
        demand=b,
        question=graph.question_mask,
        source=source,
    )
    return Flow(
        graph=graph,
        h=solved.h,
        g=solved.g,
        exponent=solved.exponent,
        throughput=solved.g * solved.h,
        source=solved.source,
        demand=b,
        absorbing=absorbing,
        damping=float(damping),
        source_rule=source if isinstance(source, str) else "vector",
        absorption=absorption,
        backend=sweeps.backend,
    )


def absorption_rule(absorption: Absorption | None, demand: Vector | None) -> Absorption:
    """Return the rule that applies: by default the answer absorbs, and a custom demand lets all edges pass."""
    if absorption is not None:
        return absorption
    return "absorb" if demand is None else "pass_through"


def check_options(
    backend: str,
    source: str | Vector | None,
    absorption: str | None,
    damping: float,
) -> None:
    """Refuse an option of :func:`solve` that lies outside its set.

    Raises:
        InvalidInputError: the option, its allowed values, and the value got.
    """
    _check_choice("backend", backend, get_args(Backend))
    if isinstance(source, Tensor | np.ndarray | Sequence) and not isinstance(source, str):
        as_tensor(source, "source", "pass a vector over the tokens, 'uniform' or 'potential'")
    else:
        _check_choice("source", source, get_args(SourceRule))
    if absorption is not None:
        _check_choice("absorption", absorption, get_args(Absorption))
    if not isinstance(damping, (int, float)) or not 0 < damping <= 1:
        raise InvalidInputError(f"damping: must lie in (0, 1], got {damping!r}; 1 is undamped")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value outside a fixed set."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise InvalidInputError(f"{name}: must be one of {choices}, got {value!r}; see solve")
