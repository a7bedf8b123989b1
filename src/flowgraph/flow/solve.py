"""``solve``: the conserved, answer-targeted flow on a ``FlowGraph`` or a batch of them, exact and differentiable."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.topology import topology_of

SourceRule = Literal["uniform", "potential"]
Absorption = Literal["absorb", "pass_through"]


def solve(
    graph: FlowGraph | Batch,
    *,
    backend: Backend = "auto",
    source: SourceRule | Tensor = "uniform",
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
) -> Flow:
    r"""Solve the conserved flow from question to answer exactly.

    .. math::
        h = b + N^\top h, \quad q = \mathrm{source}/h, \quad g = q + N g, \quad f = g \cdot h,

    with N the capacities (damped, nothing leaving an absorbing token). Equivalent to the re-weighted
    transition :math:`P(s \to t) = A[t,s] h[t] / h[s]` of the paper, which is never formed: errors of h cancel in
    :math:`g \cdot h`.

    Args:
        graph: one :class:`FlowGraph`, or a PyG ``Batch`` of many (one call, no cross-talk).
        backend: ``"scatter"``, blocked substitution over PyG scatter (canonical, any device); ``"numba"``, the same
            sums compiled, in threads over the graphs of a batch (CPU; extra ``numba``); ``"dense"``, blocked
            substitution over a dense matrix; ``"reference"``, one token at a time in Python; ``"auto"``, compiled
            where it runs, else scatter.
        source: where the unit enters: ``"uniform"`` over the question tokens that reach the answer (paper),
            ``"potential"`` in proportion to h over question tokens, or a non-negative vector ``[N]``, normalised
            per graph over the tokens that reach the demand.
        demand: b, a non-negative vector ``[N]``; default: 1 on answer tokens.
        absorption: ``"absorb"``, nothing leaves an answer token (default with the default demand), or
            ``"pass_through"``, all edges stay (default with a demand of your own).
        damping: factor per hop in (0, 1].

    Returns:
        A :class:`Flow`. A graph whose answer is unreachable is not an error: ``feasible`` is False there and
        the flow is zero. Derivatives of any order flow back to ``graph.capacity``, ``source`` and ``demand`` where they
        require them: the adjoint of each sweep is the other sweep.

    Raises:
        InvalidInputError: an option outside its set, a vector of the wrong length, negative or not finite, a
            backend that does not run on the graph's device.
        MissingExtraError: a backend whose package is not installed.
        GraphError: not a FlowGraph.

    Cost: two reads of the edges. What depends on the edges' positions alone is computed once per graph and kept on it.
    Source: arXiv 2606.10646 (answer conditioning and local conservation), in the g-form.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> [round(x, 4) for x in flow.throughput.tolist()]
        [1.0, 0.6667, 0.3333, 1.0]
    """
    if not isinstance(graph, FlowGraph):
        raise GraphError(
            f"graph: must be a FlowGraph or a Batch of them, got {type(graph).__name__}; see FlowGraph.from_dense "
            "(a FlowTrace has its graph as trace.graph, solved as trace.flow)"
        )
    check_options(backend, source, absorption, damping)
    if absorption is None:
        absorption = "absorb" if demand is None else "pass_through"
    absorbing = graph.answer_mask & (absorption == "absorb")
    nodes, device = graph.answer_mask.shape, graph.capacity.device
    b = graph.answer_mask.double() if demand is None else token_vector(demand, nodes, device, "demand")
    entry = source if isinstance(source, str) else token_vector(source, nodes, device, "source")
    sweeps = EdgeSweeps(topology_of(graph), (~absorbing).double() * damping, backend)
    solved = conserve(sweeps, graph.capacity, demand=b, question=graph.question_mask, source=entry)
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


def check_options(backend: str, source: str | Tensor, absorption: str | None, damping: float) -> None:
    """Refuse an option of :func:`solve` that lies outside its set.

    Raises:
        InvalidInputError: which one, and what it may be.
    """
    choices = [("backend", backend, get_args(Backend))]
    if not isinstance(source, Tensor):
        choices.append(("source", source, get_args(SourceRule)))
    if absorption is not None:
        choices.append(("absorption", absorption, get_args(Absorption)))
    for name, value, allowed in choices:
        if value not in allowed:
            raise InvalidInputError(f"{name}: must be one of {', '.join(map(repr, allowed))}, got {value!r}; see solve")
    if not isinstance(damping, (int, float)) or not 0 < damping <= 1:
        raise InvalidInputError(f"damping: must lie in (0, 1], got {damping!r}; 1 is undamped")


def token_vector(vector: Tensor, shape: torch.Size, device: torch.device, name: str) -> Float64[Tensor, ...]:
    """A source or demand of one's own, in float64.

    Raises:
        InvalidInputError: another shape than the tokens', negative or not finite.
    """
    vector = torch.as_tensor(vector, device=device).double()
    if vector.shape != shape:
        raise InvalidInputError(
            f"{name}: must have one entry per token {tuple(shape)}, got shape {tuple(vector.shape)}; "
            "pass a vector over the tokens"
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
        raise InvalidInputError(
            f"{name}: must be finite and non-negative, got {vector.min().item():g} as its least; clamp it first"
        )
    return vector
