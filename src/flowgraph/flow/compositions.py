r"""Compositions: how the edges of a graph become one score per token, each a few lines over the one solver.

C[t, s] is the capacity of the edge s -> t, b the demand (by default 1 on answer tokens), N = C without the edges out of
the tokens that absorb, and M the matrix C with each row divided by its sum.

| name | score of a token | paper |
|---|---|---|
| ``flowtracer`` | throughput :math:`f = g \cdot h` of the conserved flow | Dong et al. 2026, arXiv 2606.10646 |
| ``cage`` | :math:`b^\top (I - A)^{-1}`, A = M without the rows of prompt tokens | Walker & Ewetz 2025, 2512.15663 |
| ``vtrace`` | share of all walks into the answer that pass through, :math:`d \, C / \max C` a hop | Yuan et al. 2026 |
| ``hops`` | :math:`\sum_{j \le k} (M^\top)^j b` | FlashTrace, Pan et al. 2026, 2602.01914, made linear |
| ``one_hop`` | :math:`N^\top b`: what the answer reads directly | |
| ``katz`` | :math:`\sum_{j \ge 1} d^j (C^\top)^j 1` | Katz 1953 |
| ``rollout`` | rows of :math:`A_L \cdots A_1`, :math:`A_l = (1 - r) M_l + r I` | Abnar & Zuidema 2020, 2005.00928 |

:func:`compose` runs one by name; :func:`composition` registers another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch_geometric.data import Data

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError
from flowgraph.flow.composed_graph import (
    LayerRows,
    composable,
    edge_weight,
    graph_of_rows,
    negative_weight,
    refuse_regions,
)
from flowgraph.flow.composition_registry import (
    ComposedScores,
    Composition,
    composition,
    find_composition,
    registered_names,
)
from flowgraph.flow.flow import Flow
from flowgraph.flow.solve import solve
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.graph.signed_graph import SignedGraph
from flowgraph.masks import MaskLike, as_mask
from flowgraph.propagation.block_substitution import token_blocks
from flowgraph.propagation.checks import token_vector
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.operators import StreamedOperator
from flowgraph.propagation.ratios import masked_ratio
from flowgraph.propagation.row_sources import RowSource
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import topology_of

Vector = Float64[Tensor, " nodes"]
EdgeVector = Float64[Tensor, " edges"]

PAPER_LAYERS = 6
"""Layers of the model in the rollout paper; the default where a graph has its layers joined."""


def compose(
    weights: FlowGraph | Data | RowSource | Float[Tensor, "*batch tokens tokens"],
    name: str,
    *,
    question: MaskLike | None = None,
    answer: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    generated: MaskLike | None = None,
    preset: str | None = "default",
    rules: EdgeRules | None = None,
    **options: Any,
) -> Vector:
    r"""Compose edges into one score per token, by a named composition.

    Args:
        weights: a :class:`FlowGraph`, or a PyG ``Batch`` of many; a :class:`SignedGraph` (``one_hop`` alone takes
            negative weights); or the rows of one sequence: captured ones, or a matrix ``[T, T]``.
        name: one of :func:`flowgraph.composition_names`: ``"flowtracer"``, ``"cage"``, ``"vtrace"``, ``"hops"``,
            ``"one_hop"``, ``"katz"``, ``"rollout"`` or a registered one.
        question: with rows: where flow enters (mask, indices or slice). A graph has its own regions.
        answer: with rows: the tokens that are explained.
        reasoning: with rows: generated tokens before the answer.
        generated: tokens that the model produced: under emission rows they take the row before, and ``cage`` gives
            edges to them alone. Default: see :meth:`FlowGraph.from_rows`, and for ``cage`` every token from the first
            reasoning or answer token on.
        preset: with rows: how they become edges, ``"default"`` or ``"paper"``. None: they are capacities already.
        rules: with rows: the same choices one by one.
        **options: those of the composition:

            ============== ===========================================================================
            ``flowtracer`` ``source``, ``demand``, ``absorption``, ``damping``, ``backend``: see :func:`solve`
            ``cage``       ``demand`` b; ``prompt``, mask of tokens without incoming edges; ``normalize`` rows to sum 1
            ``vtrace``     ``demand``; ``damping`` d in (0, 1], .5
            ``hops``       ``k`` >= 1, 2: edges of the longest walk; ``demand``; ``normalize`` rows to sum 1
            ``one_hop``    ``demand``
            ``katz``       ``damping`` d in (0, 1], .5; ``demand`` in the place of 1
            ``rollout``    ``residual`` r in [0, 1], .5; ``layers``, 6, where a graph has them joined; ``demand``
            ============== ===========================================================================

    Returns:
        ``[N]`` float64 scores. Derivatives propagate to ``graph.capacity`` or ``graph.weight`` where they require them.

    Raises:
        InvalidInputError: an unknown name or option, a value outside its range, negative capacities.
        GraphError, RegionError: rows or regions that make no graph; capacities that are NaN or infinite.
        NumericalRangeError: a score that float64 cannot hold.

    Cost: two reads of the edges; ``vtrace`` four, ``hops`` k, ``rollout`` one a layer. Rows become a graph with all
    edges first.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> graph = FlowGraph.from_dense(weights, question=[0], answer=[3])
        >>> compose(graph, "cage").tolist()
        [1.0, 0.5, 0.5, 1.0]
        >>> compose(graph, "one_hop").tolist()
        [0.0, 0.5, 0.5, 0.0]
    """
    composed = composed_scores(
        weights,
        name,
        question=question,
        answer=answer,
        reasoning=reasoning,
        generated=generated,
        preset=preset,
        rules=rules,
        **options,
    )
    return composed.scores


def composed_scores(
    weights: FlowGraph | Data | RowSource | Float[Tensor, "*batch tokens tokens"],
    name: str,
    *,
    question: MaskLike | None = None,
    answer: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    generated: MaskLike | None = None,
    preset: str | None = "default",
    rules: EdgeRules | None = None,
    **options: Any,
) -> ComposedScores:
    """Compose edges into scores as :func:`compose` does, and return them with their residual and flow.

    Args:
        weights: see :func:`compose`, also for the arguments below.
        name: the composition.
        question: with rows: where flow enters.
        answer: with rows: the tokens that are explained.
        reasoning: with rows: generated tokens before the answer.
        generated: tokens that the model produced.
        preset: with rows: how they become edges.
        rules: with rows: the same choices one by one.
        **options: those of the composition.

    Returns:
        The scores, the residual of the equation that was solved, and the flow that :func:`flowgraph.certify` checks.

    Raises:
        InvalidInputError, GraphError, RegionError, NumericalRangeError: as :func:`compose`.
    """
    chosen = find_composition(name)
    complete = chosen.complete(options)
    layer_rows = None
    if isinstance(weights, Data):
        graph = composable(chosen, weights)
        other_preset = None if preset == "default" else preset
        refuse_regions(question=question, answer=answer, reasoning=reasoning, rules=rules, preset=other_preset)
    else:
        graph = graph_of_rows(
            chosen,
            weights,
            question=question,
            answer=answer,
            reasoning=reasoning,
            generated=generated,
            preset=preset,
            rules=rules,
        )
        # The edges of signed rows state no rule, so their layers stay joined.
        if isinstance(graph, FlowGraph):
            layer_rows = LayerRows.of(weights, graph, generated)
    return run_composition(chosen, graph, complete, generated=generated, layer_rows=layer_rows)


def run_composition(
    chosen: Composition,
    graph: Data,
    options: Mapping[str, Any],
    *,
    generated: MaskLike | None = None,
    layer_rows: LayerRows | None = None,
) -> ComposedScores:
    """Run a composition on a graph, with the checks that all of them share.

    Args:
        chosen: the composition.
        graph: the edges and regions: a FlowGraph, or for a signed composition a SignedGraph.
        options: all of its options, checked.
        generated: tokens that the model produced; None: those from the first reasoning or answer token on.
        layer_rows: the rows of each layer, where they are known apart.

    Raises:
        InvalidInputError, GraphError, NumericalRangeError: as :func:`compose`.
    """
    _check_capacities(chosen, graph)
    # The option that says which tokens are the prompt follows from those that were generated.
    arguments = dict(options)
    if generated is not None and "prompt" in arguments and arguments["prompt"] is None:
        arguments["prompt"] = ~as_mask(generated, int(graph.num_nodes or 0), "generated", graph["answer_mask"].device)
    if chosen.reads_layers:
        arguments["layer_rows"] = layer_rows
    result = chosen.function(graph, **arguments)
    if isinstance(result, Tensor):
        result = ComposedScores(result.double())
    _check_scores(chosen, result, graph)
    return replace(result, name=chosen.name, options=dict(options))


def composition_names() -> list[str]:
    """List the names of all registered compositions."""
    return registered_names()


# Checks of options -------------------------------------------------------------------------------------------


def check_damping(name: str, value: Any) -> None:
    """Refuse a damping outside (0, 1]."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) <= 1:
        raise InvalidInputError(f"{name}: must lie in (0, 1], got {value!r}; 1 is undamped, 0.5 is usual")


def _check_share(name: str, value: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) <= 1:
        raise InvalidInputError(f"{name}: must lie in [0, 1], got {value!r}; 0.5 weighs attention and residual alike")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidInputError(
            f"{name}: must be an integer of at least 1, got {value!r}; 1 is what is read directly, 2 adds one hop"
        )


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}: must be True or False, got {value!r}; True divides each row by its sum")


# The compositions --------------------------------------------------------------------------------------------


@composition(
    "flowtracer",
    defaults={"source": "uniform", "demand": None, "absorption": None, "damping": 1.0, "backend": "auto"},
    checks={"damping": check_damping},
)
def flowtracer(
    graph: FlowGraph,
    *,
    source: Any,
    demand: Tensor | None,
    absorption: Any,
    damping: float,
    backend: Backend,
) -> ComposedScores:
    """Throughput of the conserved flow from question to answer (arXiv 2606.10646)."""
    # h = b + N^T h, g = q + N g, f = g h.
    flow = solve(graph, source=source, demand=demand, absorption=absorption, damping=damping, backend=backend)
    return ComposedScores(flow.throughput, _residual(flow), flow)


@composition(
    "cage",
    defaults={"demand": None, "prompt": None, "normalize": True},
    checks={"normalize": _check_flag},
)
def cage(graph: FlowGraph, *, demand: Tensor | None, prompt: MaskLike | None, normalize: bool) -> ComposedScores:
    """Rows of (I - A)^-1 at the answer, A row-stochastic over generated tokens (arXiv 2512.15663)."""
    # Prompt tokens were read, not generated: their rows are empty.
    is_prompt = _prompt_tokens(graph, prompt)
    rows = _stochastic(graph) if normalize else graph.capacity.double()
    rows = torch.where(is_prompt[graph.edge_index[1]], 0.0, rows)

    # h = b + A^T h, where answer tokens keep the edges among themselves.
    flow = _solved(graph, rows, _demand(graph, demand))
    return ComposedScores(flow.potentials[0], _residual(flow), flow)


@composition("vtrace", defaults={"demand": None, "damping": 0.5}, checks={"damping": check_damping})
def vtrace(graph: FlowGraph, *, demand: Tensor | None, damping: float) -> ComposedScores:
    """Share of all walks into the answer that pass through a token, damped per hop (Yuan et al. 2026)."""
    # W = C / max C, of each graph.
    topology = topology_of(graph)
    capacity = graph.capacity.double()
    graph_of_edge = topology.graph_of_node[graph.edge_index[1]]
    largest = capacity.new_zeros(topology.num_graphs).scatter_reduce(0, graph_of_edge, capacity, "amax")
    share_of_largest = masked_ratio(capacity > 0, capacity, largest[graph_of_edge])

    # Walks start at every token, in proportion to what of it reaches the answer: src = h / sum h, so q = 1 / sum h.
    b = _demand(graph, demand)
    reached = _solved(graph, share_of_largest, b, damping=damping)
    largest_exponent = topology.broadcast(topology.maximum(reached.exponent))
    start = scaled(reached.h, reached.exponent - largest_exponent)
    flow = _solved(graph, share_of_largest, b, damping=damping, source=start)
    return ComposedScores(flow.throughput, _residual(flow), flow)


@composition(
    "hops",
    defaults={"k": 2, "demand": None, "normalize": True},
    checks={"k": _check_count, "normalize": _check_flag},
)
def hops(graph: FlowGraph, *, k: int, demand: Tensor | None, normalize: bool) -> Vector:
    """First k + 1 terms of h on row-stochastic rows: walks of at most k edges; its limit is h (FlashTrace, linear)."""
    rows = _stochastic(graph) if normalize else graph.capacity.double()
    weight = _without_absorbing(graph, rows, demand)
    term = _demand(graph, demand)
    total = term
    for _ in range(k):
        term = _step(graph, weight, term)
        # No walk of a DAG is longer than its number of tokens: once a term is 0, all later ones are.
        if not bool(term.detach().any()):
            break
        total = total + term
    return total


@composition("one_hop", defaults={"demand": None}, signed=True)
def one_hop(graph: FlowGraph | SignedGraph, *, demand: Tensor | None) -> Vector:
    """What the answer's rows read directly from each token: the second term of h."""
    weight = _without_absorbing(graph, edge_weight(graph).double(), demand)
    return _step(graph, weight, _demand(graph, demand))


@composition("katz", defaults={"damping": 0.5, "demand": None}, checks={"damping": check_damping})
def katz(graph: FlowGraph, *, damping: float, demand: Tensor | None) -> ComposedScores:
    """Katz index: damped walks from a token to any other, whatever the answer (Katz 1953)."""
    everywhere = torch.ones_like(graph.answer_mask, dtype=torch.float64)
    ends = everywhere if demand is None else _demand(graph, demand)

    # x = sum over j >= 1 of (d C^T)^j 1 solves x = d C^T 1 + d C^T x: a potential with the demand d C^T 1.
    first = damping * _step(graph, graph.capacity.double(), ends)
    flow = _solved(graph, graph.capacity.double(), first, damping=damping)
    return ComposedScores(flow.potentials[0], _residual(flow), flow)


@composition(
    "rollout",
    defaults={"residual": 0.5, "layers": PAPER_LAYERS, "demand": None},
    checks={"residual": _check_share, "layers": _check_count},
    reads_layers=True,
)
def rollout(
    graph: FlowGraph,
    *,
    residual: float,
    layers: int,
    demand: Tensor | None,
    layer_rows: LayerRows | None,
) -> ComposedScores:
    """Attention rollout: what the answer's positions hold of each input after all layers (arXiv 2005.00928)."""
    b = _demand(graph, demand)
    # x_(l-1) = r x_l + (1 - r) M_l^T x_l, the last layer first: a potential sweep over the layers' graph.
    x = b
    if layer_rows is None:
        rows = _stochastic(graph)
        has_row = _row_sums(graph) > 0
        for _ in range(layers):
            # A token that reads nothing keeps itself.
            read = _step(graph, rows, x) + torch.where(has_row, 0.0, x)
            x = residual * x + (1 - residual) * read
    else:
        # The demand stands at the position whose row the token was given.
        x = torch.zeros_like(b).index_add(0, layer_rows.row_of_token, b)
        for rows_of_layer in reversed(layer_rows.rows):
            x = residual * x + (1 - residual) * _read_by(rows_of_layer, x)

    # Rows sum to 1, so what the answer holds is divided without loss.
    total = b.detach().sum()
    lost = (x.detach().sum() - total).abs() / total.clamp_min(torch.finfo(torch.float64).tiny)
    return ComposedScores(x, float(lost))


# What they are made of ---------------------------------------------------------------------------------------


def _demand(graph: FlowGraph | SignedGraph, demand: Tensor | None) -> Vector:
    """Return b: a checked vector, by default 1 on answer tokens."""
    if demand is None:
        return graph.answer_mask.double()
    return token_vector(demand, graph.answer_mask.shape, graph.answer_mask.device, "demand")


def _row_sums(graph: FlowGraph) -> Vector:
    """Sum the capacities into each token."""
    capacity = graph.capacity.double()
    return capacity.new_zeros(graph.answer_mask.shape).index_add(0, graph.edge_index[1], capacity)


def _stochastic(graph: FlowGraph) -> EdgeVector:
    """Divide each capacity by the sum of those into the same token: M."""
    capacity = graph.capacity.double()
    return masked_ratio(capacity > 0, capacity, _row_sums(graph)[graph.edge_index[1]])


def _without_absorbing(graph: FlowGraph | SignedGraph, weight: EdgeVector, demand: Tensor | None) -> EdgeVector:
    """Drop the edges out of answer tokens, which absorb with the default demand, as in :func:`solve`."""
    if demand is not None:
        return weight
    return torch.where(graph.answer_mask[graph.edge_index[0]], 0.0, weight)


def _step(graph: FlowGraph | SignedGraph, weight: EdgeVector, x: Vector) -> Vector:
    """Multiply by the transpose: sum over the readers t of each token s of ``weight[t, s] * x[t]``."""
    source, target = graph.edge_index
    return torch.zeros_like(x).index_add(0, source, weight * x[target])


def _solved(
    graph: FlowGraph, weight: EdgeVector, demand: Vector, *, damping: float = 1.0, source: Any = "uniform"
) -> Flow:
    """Solve with other capacities on the same edges; all of them stay, also those out of answer tokens."""
    # A shallow copy shares the edges, and so the structure that is cached for them.
    reweighted = copy.copy(graph)
    reweighted.capacity = weight
    return solve(reweighted, demand=demand, source=source, damping=damping, absorption="pass_through")


def _residual(flow: Flow) -> float:
    """Return the largest difference of both sides of ``h = b + N^T h``, relative to h."""
    graph = flow.graph
    h = flow.h.detach()
    weight = flow.in_units(flow.weight.detach())
    expected = scaled(flow.demand.detach(), -flow.exponent) + _step(graph, weight, h)
    return float(masked_ratio(h > 0, (h - expected).abs(), h).amax())


def _prompt_tokens(graph: FlowGraph, prompt: MaskLike | None) -> Bool[Tensor, " nodes"]:
    """Mark the tokens that were read and not generated: by default those before the reasoning and the answer."""
    if prompt is not None:
        return as_mask(prompt, int(graph.num_nodes or 0), "prompt", graph.capacity.device)
    topology = topology_of(graph)
    is_generated = graph.reasoning_mask | graph.answer_mask
    # The first generated token of each graph; none would leave every token in the prompt.
    position = torch.where(is_generated, topology.position, topology.num_tokens)
    first = -topology.maximum(-position)
    return topology.position < topology.broadcast(first)


def _check_capacities(chosen: Composition, graph: Data) -> None:
    """Refuse capacities that are NaN or infinite, and negative ones where walks are multiplied."""
    capacity = edge_weight(graph).detach()
    source, target = graph["edge_index"]
    not_finite = ~torch.isfinite(capacity)
    if bool(not_finite.any()):
        # The message names the first such edge.
        at = int(not_finite.nonzero()[0])
        raise GraphError(
            f"capacity: must be finite, got {float(capacity[at])} on the edge {int(source[at])} -> {int(target[at])}; "
            "check the attention for NaN or overflow"
        )
    negative = capacity < 0
    if not chosen.signed and bool(negative.any()):
        at = int(negative.nonzero()[0])
        raise InvalidInputError(negative_weight(chosen.name, float(capacity[at]), int(source[at]), int(target[at])))


def _check_scores(chosen: Composition, result: Any, graph: Data) -> None:
    """Refuse scores of another shape, and scores that float64 cannot hold."""
    if not isinstance(result, ComposedScores):
        raise InvalidInputError(
            f"composition: {chosen.name!r} must return a tensor, got {type(result).__name__}; check its function"
        )
    scores = result.scores
    wanted = tuple(graph["answer_mask"].shape)
    if scores.shape != wanted:
        raise InvalidInputError(
            f"composition: {chosen.name!r} must return one score per token {wanted}, got shape "
            f"{tuple(scores.shape)}; check its function"
        )
    is_finite = torch.isfinite(scores.detach())
    if not bool(is_finite.all()):
        token = int((~is_finite).nonzero()[0])
        raise NumericalRangeError(
            f"weights: the scores of composition {chosen.name!r} must fit float64, got {float(scores[token])} at token "
            f"{token}; divide the capacities by their largest row sum, or use 'flowtracer'"
        )


def _read_by(rows: RowSource, x: Vector) -> Vector:
    """Multiply by the transpose of a layer's rows, each divided by its sum; a row of zeros keeps its token."""
    read = torch.zeros_like(x)
    for block in token_blocks(rows.num_tokens, StreamedOperator(rows).block):
        weights = rows.block(block.start, block.stop)[0].double().to(x.device)
        total = weights.sum(-1)

        # read[s] += x[t] A[t, s] / sum_s A[t, s] for each reader t of the block.
        share = masked_ratio(total > 0, x[block], total)
        read[: block.stop] += share @ weights

        # A reader without weights passes x[t] on to itself, so that the sum of x is kept.
        kept = torch.where(total > 0, 0.0, x[block])
        read[block] += kept
    return read
