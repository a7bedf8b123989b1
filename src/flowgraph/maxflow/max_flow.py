r"""max_flow and its relatives: exact max flow and min cut, a certificate for a flow and never a score.

igraph computes, and every answer is re-checked. No number of the solver is trusted: the edge flow is clipped to the
capacities, its conservation and the capacity of the cut are summed again with ``math.fsum``, and by weak duality

.. math:: \text{value} - \sum_v |\text{excess}(v)| \;\le\; V \;\le\; \text{capacity of the cut},

for any answer of the solver. The width of that interval is :attr:`MaxFlow.error`.

Before solving, an upper bound U of V is found (the cut of the edges no wider than the widest route), every capacity is
limited to 2 U, and one power of two brings U near 1. This changes neither V nor the min cuts. Without it, a capacity
of 2**63 would take all digits from a cut of 4. An answer that misses the cut by more than 1e-12 of it (or 2**-50 per
edge, if that is more) is replaced by that of exact integers.

Source: method, section 4. V between question and answer is nearly the trivial cut on attention graphs, and the
node flows of a max flow are not unique; use :func:`flowgraph.solve` to score tokens.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from flowgraph.flow.flow import Flow
from flowgraph.flow.solve import Absorption
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.maxflow.problem import MAX_EDGES, Backend, MaxFlowProblem
from flowgraph.maxflow.verification import MaxFlow

_NO_LIMIT = 2**62


def max_flow(
    graph: FlowGraph | Flow,
    *,
    source: Tensor | None = None,
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float | None = None,
    backend: Backend = "igraph",
    max_edges: int = MAX_EDGES,
) -> MaxFlow:
    r"""Compute the most that the edges carry from source tokens to sink tokens, with a min cut.

    .. math::
        V = \max_x \sum_{s \in Q} x_{out}(s) - x_{in}(s), \quad 0 \le x(s,t) \le N[t,s], \quad
        x_{in}(v) = x_{out}(v) \text{ elsewhere},

    from the tokens Q with positive source to the tokens with positive demand b; N as in :func:`flowgraph.solve`.

    Args:
        graph: one :class:`FlowGraph`, or the :class:`Flow` solved on one; a Flow brings its own source,
            demand, absorption and damping, so none of them may be given beside it.
        source: ``[N]`` mask or non-negative vector, of which the support counts; default: the question.
        demand: the same for the sinks; default: the answer.
        absorption: ``"absorb"``, no edge leaves an answer token (default with the default demand), or
            ``"pass_through"`` (default with a ``demand``).
        damping: factor on every capacity, in (0, 1]; default 1.
        backend: ``"igraph"``, or ``"networkx"`` as a cross-check (80 to 240 times slower in the solver itself).
        max_edges: refuse larger graphs.

    Returns:
        A :class:`MaxFlow`; value 0 and an empty cut where the sinks are unreachable.

    Raises:
        GraphError: neither a FlowGraph nor a Flow.
        InvalidInputError: a Batch; a token that is both source and sink (its flow is unlimited); a vector of the
            wrong length or range; an option beside a Flow, or outside its set.
        TooLargeError: more than ``max_edges`` edges.
        NumericalRangeError: V is beyond the range of float64, or the solver's answer failed the re-check.

    Cost: push-relabel, about 0.3 / 1.2 / 2.5 s at 500 / 1,000 / 1,400 dense tokens (2 shared cores).
    Source: method, section 4; igraph ``Graph.maxflow``.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> best = max_flow(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> best.value, best.source_side.tolist(), best.cut_edges.tolist()
        (0.5, [True, True, False, False], [1, 2])
    """
    problem = MaxFlowProblem(
        graph,
        source=source,
        demand=demand,
        absorption=absorption,
        damping=damping,
        backend=backend,
        max_edges=max_edges,
    )
    return problem.between(problem.sources, problem.sinks)


def max_flow_through(graph: FlowGraph | Flow, token: int, **options: Any) -> float:
    r"""Compute the most that could pass through one token: the smaller of its max flows from and to the terminals.

    .. math:: M[v] = \min(\text{maxflow}(Q, v), \text{maxflow}(v, \text{sinks})),

    where the first is unlimited when v is itself a source, and the second when v is a sink. Scaled to fit the
    capacities, the conserved flow stays below it: :math:`\alpha f[v] \le M[v]`.

    Args:
        graph: see :func:`max_flow`.
        token: v.
        options: those of :func:`max_flow`.

    Returns:
        M[v] as the capacity of a verified cut, so never below the exact M[v].

    Raises:
        InvalidInputError: token outside the graph; and as :func:`max_flow`.

    Cost: two max flows. Source: method, section 4, item 8.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> max_flow_through(FlowGraph.from_dense(weights, question=[0], answer=[3]), 2)
        0.25
    """
    return MaxFlowProblem(graph, **options).through(token)


def max_flow_without(graph: FlowGraph | Flow, token: int, **options: Any) -> float:
    r"""Compute V without one token: :math:`V - V_{-v}` is what no other token can replace.

    Args:
        graph: see :func:`max_flow`.
        token: v; neither a source nor a sink.
        options: those of :func:`max_flow`.

    Returns:
        The max flow value of the graph without the edges into and out of v, as the capacity of a verified cut.

    Raises:
        InvalidInputError: v outside the graph, or a terminal (without it the problem is another one).

    Cost: one max flow. Source: method, section 4; unlike the flow through a token in one max flow, it is unique.
    """
    return MaxFlowProblem(graph, **options).without(token)


def max_flow_bracket(graph: FlowGraph | Flow, **options: Any) -> tuple[float, float]:
    r"""Compute an interval that is proved to contain V, by integer arithmetic.

    .. math:: V_{\lfloor c \rfloor} \le V \le V_{\lceil c \rceil}

    All capacities c are scaled by one power of two and rounded down, then up, to integers. On integers below
    :math:`2^{53}` every sum and difference of the solver is exact, so both values are exact.

    Args:
        graph: see :func:`max_flow`.
        options: those of :func:`max_flow`.

    Returns:
        (low, high), at most ``edges * total / 2**49`` apart, with the total of the capacities limited to twice a cut.

    Raises:
        NumericalRangeError: the solver's value differs from its cut on integers.

    Cost: two max flows. Source: method, section 4.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> max_flow_bracket(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        (0.5, 0.5)
    """
    return MaxFlowProblem(graph, **options).bracket()


def dominators(graph: FlowGraph | Flow, **options: Any) -> Bool[Tensor, " tokens"]:
    """Find the tokens that every route from question to answer passes: without any one of them no route is left.

    Sources and sinks count where there is only one of them. A dominator has throughput 1 for any capacities.

    Args:
        graph: see :func:`max_flow`.
        options: those of :func:`max_flow`; ``max_edges`` has no default here.

    Returns:
        ``[N]`` bool; all False where no route exists.

    Cost: one dominator tree (Lengauer and Tarjan, by igraph), near linear in the edges.

    Example:
        >>> import torch
        >>> chain = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0.25, 0]])
        >>> dominators(FlowGraph.from_dense(chain, question=[0], answer=[2])).tolist()
        [True, True, True]
    """
    options.setdefault("max_edges", _NO_LIMIT)
    return MaxFlowProblem(graph, **options).dominators()
