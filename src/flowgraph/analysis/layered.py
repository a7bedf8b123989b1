r"""Attention rollout and attention flow over layers and tokens (Abnar & Zuidema 2020, arXiv 2005.00928).

The nodes are the embeddings: token t at layer l. Layer 0 holds the inputs, layer L the outputs of the last of L layers.
Layer l of the model, counted from 1, mixes the embeddings by

.. math:: A_l = (1 - r) W_l + r I ,

with :math:`W_l[t, s]` the attention of token t to token s, heads joined, and r the share of the residual connection.
A layer adds the attended embeddings to its input, :math:`V_{l+1} = V_l + W V_l`, and the paper gives both halves the
same weight (its "A = 0.5 W_att + 0.5 I"). An edge runs from the token that is read to the token that reads it,
:math:`(l - 1, s) \to (l, t)` of capacity :math:`A_l[t, s]`. Every edge runs to the next layer, so the graph has no
cycle even where attention is bidirectional, as in an encoder.

The paper draws edges downwards, from the reader to the token it reads. This changes no product along a path and no max
flow. Every function here takes rows as readers, like the paper's text and its authors' code
(github.com/samiraabnar/attention_flow): ``[t, s]`` is how much of token t's output comes from input token s.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError, RegionError, TooLargeError
from flowgraph.flow.solve import check_options
from flowgraph.graph.edge_rules import row_sum_tolerance
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.masks import MaskLike, as_mask
from flowgraph.maxflow.problem import MaxFlowProblem
from flowgraph.memory import require_memory
from flowgraph.propagation import gradients
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.topology import topology_of

MAX_EDGES = 20_000_000
"""Default size limit of :func:`attention_flow`, edges of all its max flows together: 10 to 20 seconds."""
_SECONDS_PER_EDGE = 1e-6
_BYTES_PER_WEIGHT = 16
_BYTES_PER_EDGE = 85
"""Peak memory while a graph is built."""


def layered_graph(
    attention: Float[Tensor, "layers tokens tokens"],
    *,
    question: MaskLike,
    answer: MaskLike,
    residual: float = 0.5,
) -> FlowGraph:
    r"""Build the graph of all embeddings of a model: one node for each token at each layer, layer 0 the inputs.

    .. math:: c((l - 1, s) \to (l, t)) = (1 - r) W_l[t, s] + r \, [s = t], \qquad l = 1 \ldots L

    Node number = layer * tokens + token, so any vector over the nodes is a table after ``.view(layers + 1, tokens)``.
    The result is a :class:`FlowGraph` like any other: it can be solved, certified, pruned and exported. Attention
    within a layer need not be causal.

    Args:
        attention: W, ``[layers, tokens, tokens]``, heads joined: ``attention[l, t, s]`` is the share of token t's
            reading in layer l (counted from 0) that goes to token s; rows sum to 1. From a causal LM:
            ``capture(model, ids, layers="all").layer_rows()``; from any model that returns its attentions:
            ``torch.stack(outputs.attentions)[:, 0].mean(1)``.
        question: mask, indices or slice of the tokens at which flow enters at layer 0.
        answer: the same for the tokens at which it is absorbed at the last layer.
        residual: r in [0, 1], share of the residual connection; 1/2 is the paper's, 0 is attention alone.

    Returns:
        A graph of (layers + 1) * tokens nodes, float64 capacities, every node between the first and the last layer
        in its ``reasoning_mask``. Derivatives flow back to ``attention``.

    Raises:
        GraphError: another shape, integers, NaN, negative weights, a row that does not sum to 1.
        InvalidInputError: residual outside [0, 1].
        RegionError: a region that is empty or names a token outside.
        MemoryLimitError: the graph would not fit.

    Cost: a few reads of the attention; at most layers * tokens ** 2 edges.
    Source: arXiv 2005.00928, section 3, "residual connections".

    Example:
        >>> import torch
        >>> attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.75, 0.25]]])
        >>> graph = layered_graph(attention, question=[0], answer=[1])
        >>> graph.edge_index.tolist()
        [[0, 0, 1, 2, 2, 3], [2, 3, 3, 4, 5, 5]]
        >>> graph.capacity.tolist()
        [1.0, 0.25, 0.75, 1.0, 0.375, 0.625]
    """
    _check(attention, residual)
    num_layers, num_tokens = attention.shape[:2]
    device = attention.device
    # The residual connection adds at most one edge per token and layer.
    most_edges = int(attention.count_nonzero()) + num_layers * num_tokens
    require_memory(
        _BYTES_PER_WEIGHT * attention.numel() + _BYTES_PER_EDGE * most_edges,
        f"a graph of {num_layers} layers x {num_tokens} tokens",
        "take fewer layers or fewer tokens",
        device,
    )

    # Regions over [layer, token]: question at the first layer, answer at the last, reasoning between.
    question_nodes = torch.zeros(num_layers + 1, num_tokens, dtype=torch.bool, device=device)
    question_nodes[0] = _tokens(question, num_tokens, "question").to(device)
    answer_nodes = torch.zeros_like(question_nodes)
    answer_nodes[-1] = _tokens(answer, num_tokens, "answer").to(device)
    reasoning_nodes = torch.zeros_like(question_nodes)
    reasoning_nodes[1:-1] = True

    # A_l = (1 - r) W_l + r I.
    capacity = (1 - residual) * attention.double()
    capacity.diagonal(dim1=1, dim2=2).add_(residual)

    # Edge (l - 1, s) -> (l, t); nonzero lists them in the order of a FlowGraph, by target and then by source.
    layer, t, s = capacity.nonzero(as_tuple=True)
    source = layer * num_tokens + s
    target = (layer + 1) * num_tokens + t
    return FlowGraph.from_edges(
        torch.stack([source, target]),
        capacity[layer, t, s],
        num_nodes=(num_layers + 1) * num_tokens,
        question=question_nodes.flatten(),
        reasoning=reasoning_nodes.flatten(),
        answer=answer_nodes.flatten(),
        rules=f"layered, layers={num_layers}, tokens={num_tokens}, residual={residual:g}",
    )


def attention_rollout(
    attention: Float[Tensor, "layers tokens tokens"],
    *,
    targets: MaskLike | None = None,
    residual: float = 0.5,
    backend: Backend = "auto",
) -> Float64[Tensor, "targets tokens"]:
    r"""Compute attention rollout: how much of each output token comes from each input token, over all paths.

    .. math::
        \tilde A[t, s] = \sum_{s = v_0, v_1, \ldots, v_L = t} \; \prod_{l=1}^{L} A_l[v_l, v_{l-1}]
        = (A_L A_{L-1} \cdots A_1)[t, s]

    One potential sweep, as in :func:`flowgraph.solve`, for each target: with a demand of 1 at (L, t) alone, the
    potential of (0, s) is the sum over paths. No matrix is multiplied. All sums are of non-negative terms, so the
    relative error of every entry is a few roundings per layer.

    Args:
        attention: W, see :func:`layered_graph`. Rollout up to an earlier layer: pass the layers up to it.
        targets: the output tokens (mask, indices or slice); default: all.
        residual: r, see :func:`layered_graph`.
        backend: how the sweeps are run, see :func:`flowgraph.solve`.

    Returns:
        One row for each target in token order, over the input tokens; rows sum to 1. Derivatives flow back to
        ``attention``. The authors' code gives the same up to rounding: it divides (W + I) by its row sums, which are 2
        where the rows of W sum to 1.

    Raises:
        GraphError, InvalidInputError, RegionError, MemoryLimitError: as :func:`layered_graph`.

    Cost: one read of the graph's edges for each target, layers * tokens ** 3 for all.
    Source: arXiv 2005.00928, section 3, equation 1 with j = 0.

    Example:
        >>> import torch
        >>> attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.75, 0.25]]])
        >>> attention_rollout(attention).tolist()  # 17/32 = 3/8 * 1 + 5/8 * 1/4
        [[1.0, 0.0], [0.53125, 0.46875]]
    """
    check_options(backend, "uniform", None, 1.0)
    graph, target_tokens, _ = _graph_between(attention, targets, None, residual)
    num_tokens = target_tokens.numel()

    # No node absorbs: the last layer has no edges to remove.
    propagation_factor = torch.ones_like(graph.answer_mask, dtype=torch.float64)
    sweeps = EdgeSweeps(topology_of(graph), propagation_factor, backend)

    # h = b + N^T h with b the indicator of (L, t): h at layer 0 is the row of t.
    rows = []
    for node in graph.answer_mask.nonzero().flatten().tolist():
        demand = torch.zeros_like(propagation_factor)
        demand[node] = 1.0
        potential = gradients.potential(sweeps, graph.capacity, demand)
        rows.append(potential[:num_tokens])
    return torch.stack(rows)


def attention_flow(
    attention: Float[Tensor, "layers tokens tokens"],
    *,
    targets: MaskLike | None = None,
    sources: MaskLike | None = None,
    residual: float = 0.5,
    max_edges: int = MAX_EDGES,
) -> Float64[Tensor, "targets sources"]:
    r"""Compute attention flow: the max flow from each input token to each output token, capacities :math:`A_l[t, s]`.

    .. math:: F[t, s] = \text{maxflow}((0, s) \to (L, t))

    One max flow by igraph for each pair, re-checked as in :func:`flowgraph.max_flow`. In rollout a path counts by the
    product of its weights. Here a path carries its smallest weight, and paths that share an edge share its capacity.

    Args:
        attention: W, see :func:`layered_graph`. Flow into an earlier layer: pass the layers up to it.
        targets: the output tokens (mask, indices or slice); default: all.
        sources: the same for the input tokens.
        residual: r, see :func:`layered_graph`.
        max_edges: the most edges in all, those of the graph counted once for each max flow.

    Returns:
        One row for each target and one column for each source, in token order, without derivatives; each number is the
        capacity of a verified min cut, so never below the exact max flow. As in the paper's text, entries are max flow
        values: between 0 and 1, and a row need not sum to 1. The authors' code divides each row by its sum:
        ``flow / flow.sum(1, keepdim=True)`` over all sources.

    Raises:
        TooLargeError: more than ``max_edges``.
        NumericalRangeError: the solver's answer failed the re-check.
        GraphError, InvalidInputError, RegionError, MemoryLimitError: as :func:`layered_graph`.

    Cost: tokens ** 2 max flows over layers * tokens ** 2 edges: layers * tokens ** 4, 0.4 to 1 microsecond
    each (measured, one core).
    Source: arXiv 2005.00928, section 3, "attention flow".

    Example:
        >>> import torch
        >>> attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.75, 0.25]]])
        >>> attention_flow(attention).tolist()  # into token 1 from 0: min(1, 3/8) + min(1/4, 5/8)
        [[1.0, 0.0], [0.625, 0.625]]
    """
    with torch.no_grad():
        graph, target_tokens, source_tokens = _graph_between(attention, targets, sources, residual)
    num_pairs = int(target_tokens.sum()) * int(source_tokens.sum())
    _require_small(graph.num_edges, num_pairs, max_edges)

    # One problem, set up once: the capacities are the same for every pair of terminals.
    problem = MaxFlowProblem(graph, max_edges=max_edges)
    nodes = np.arange(problem.num_tokens)
    rows = []
    for end in np.flatnonzero(problem.sinks):
        row = []
        for start in np.flatnonzero(problem.sources):
            best = problem.between(nodes == start, nodes == end)
            row.append(best.cut_capacity)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64, device=attention.device)


def _graph_between(
    attention: Tensor, targets: MaskLike | None, sources: MaskLike | None, residual: float
) -> tuple[FlowGraph, Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Build the graph from source to target tokens, all of them by default; return target and source masks, too."""
    _check(attention, residual)
    num_tokens = attention.shape[1]
    if targets is None:
        targets = slice(None)
    if sources is None:
        sources = slice(None)
    target_tokens = _tokens(targets, num_tokens, "targets")
    source_tokens = _tokens(sources, num_tokens, "sources")
    graph = layered_graph(attention, question=source_tokens, answer=target_tokens, residual=residual)
    return graph, target_tokens, source_tokens


def _tokens(region: MaskLike, num_tokens: int, name: str) -> Bool[Tensor, " tokens"]:
    """Read a region as a mask over tokens; messages name the argument of the public function."""
    device = region.device if isinstance(region, Tensor) else "cpu"
    mask = as_mask(region, num_tokens, name, device)
    if not bool(mask.any()):
        raise RegionError(f"{name}: must hold at least one token, got none; name tokens in 0..{num_tokens - 1}")
    return mask


def _require_small(num_edges: int, num_pairs: int, max_edges: int) -> None:
    """Reject max flows that would read too many edges in all."""
    work = num_edges * num_pairs
    if work > max_edges:
        raise TooLargeError(
            f"attention: {num_pairs:,} max flows over {num_edges:,} edges each must stay within max_edges = "
            f"{max_edges:,} in all, got {work:,} (roughly {work * _SECONDS_PER_EDGE:.0f} s); pass max_edges={work} to "
            "run them, or choose targets and sources"
        )


def _check(attention: Tensor, residual: float) -> None:
    """Check that the residual share lies in [0, 1], and that attention is layers of rows that sum to 1."""
    if not 0 <= residual <= 1:
        raise InvalidInputError(
            f"residual: must lie in [0, 1], got {residual!r}; 0.5 gives attention and residual the same weight"
        )
    if not isinstance(attention, Tensor) or attention.ndim != 3 or attention.shape[1] != attention.shape[2]:
        got = f"shape {tuple(attention.shape)}" if isinstance(attention, Tensor) else type(attention).__name__
        raise GraphError(
            f"attention: must be a tensor [layers, tokens, tokens], got {got}; join the heads of one sequence first, "
            "e.g. torch.stack(outputs.attentions)[:, 0].mean(1)"
        )
    if attention.numel() == 0:
        raise GraphError(
            f"attention: must hold at least one layer and one token, got shape {tuple(attention.shape)}; "
            "choose layers and tokens"
        )
    if not attention.is_floating_point():
        raise GraphError(f"attention: must be floating point, got {attention.dtype}; call .float() on it")
    bad = ~torch.isfinite(attention) | (attention < 0)
    if bool(bad.any()):
        layer, t, s = bad.nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be finite and non-negative, got {attention[layer, t, s].item()} at [{layer}, {t}, {s}]; "
            "check the attention for NaN or overflow"
        )

    # Each row distributes one unit of reading: padding and learned sinks would lose a part of it.
    sums = attention.detach().sum(-1, dtype=torch.float64)
    wrong = (sums - 1).abs() > row_sum_tolerance(attention.dtype)
    if bool(wrong.any()):
        layer, t = wrong.nonzero()[0].tolist()
        raise GraphError(
            f"attention: every row must sum to 1, got {sums[layer, t].item():g} at [{layer}, {t}]; rows are readers; "
            "leave padding out, and divide rows by their sum where heads attend to a learned sink"
        )
