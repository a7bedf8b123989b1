"""The graph that a composition runs on: from a graph, a signed graph, captured rows or a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch_geometric.data import Batch, Data

from flowgraph.attention.attention_rows import AttentionRows, SequenceRows
from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.flow.composition_registry import Composition
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.graph.signed_graph import SignedGraph
from flowgraph.masks import MaskLike, as_mask
from flowgraph.propagation.row_sources import RowSource, as_row_source


@dataclass(frozen=True)
class _NonNegativeRows:
    """Rows that are checked as they are read: a composition of walks needs weights that are not negative.

    Attributes:
        source: the rows.
        composition: name of the composition, for the message.
        normalization: how the rows become capacities.
    """

    source: RowSource
    composition: str
    normalization: str | None

    @property
    def num_tokens(self) -> int:
        return self.source.num_tokens

    @property
    def device(self) -> torch.device:
        return self.source.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Return the rows ``[start, stop)``, columns ``[0, stop)``."""
        rows = self.source.block(start, stop)
        negative = rows < 0
        if bool(negative.any()):
            sequence, row, column = negative.nonzero()[0].tolist()
            value = float(rows[sequence, row, column])
            raise InvalidInputError(negative_weight(self.composition, value, column, start + row))
        return rows


def negative_weight(name: str, value: float, source: int, target: int) -> str:
    """Write the message for a negative capacity."""
    return (
        f"weights: must not be negative for composition {name!r}, got {value:.3g} on the edge {source} -> {target}; "
        "use a non-negative capacity such as 'vtrace_share' or 'gradient_positive', composition 'one_hop', which takes "
        "any sign, or for relevance rows.throughput and trace.relevance(model), which need no composition"
    )


def composable(chosen: Composition, graph: Data) -> Data:
    """Return a graph, or a batch of graphs, as a composition reads it.

    Args:
        chosen: the composition.
        graph: a FlowGraph, which is returned as it is; or a graph with signed weights.

    Returns:
        A :class:`FlowGraph`; a :class:`SignedGraph` where a weight is negative, which the composition must allow.

    Raises:
        GraphError: a graph without weights or regions.
        InvalidInputError: a negative weight that the composition does not allow.
    """
    # A FlowGraph holds its capacities already.
    if "capacity" in graph:
        return graph
    needed = ("edge_index", "weight", "question_mask", "reasoning_mask", "answer_mask")
    missing = [name for name in needed if name not in graph]
    if missing:
        raise GraphError(
            f"weights: must be a FlowGraph or a signed graph, got {type(graph).__name__} without {', '.join(missing)}; "
            "build one with FlowGraph.from_edges"
        )
    # Negative weights: refused where walks are multiplied, kept as a signed graph elsewhere.
    negative = graph["weight"].detach() < 0
    if bool(negative.any()):
        if not chosen.signed:
            at = int(negative.nonzero()[0])
            source, target = graph["edge_index"][:, at].tolist()
            raise InvalidInputError(negative_weight(chosen.name, float(graph["weight"][at]), source, target))
        if isinstance(graph, (SignedGraph, Batch)):
            return graph
        return _signed(graph)

    # A batch stays a batch, because compositions scale each graph by itself.
    if isinstance(graph, Batch):
        parts: list[Any] = list(graph.to_data_list())
        batch: Any = Batch.from_data_list([_non_negative(part) for part in parts])
        return batch
    return _non_negative(graph)


def _signed(graph: Data) -> SignedGraph:
    """Return the weights and regions of a graph as a SignedGraph."""
    return SignedGraph(
        edge_index=graph["edge_index"],
        weight=graph["weight"],
        question_mask=graph["question_mask"],
        reasoning_mask=graph["reasoning_mask"],
        answer_mask=graph["answer_mask"],
        num_nodes=graph.num_nodes,
    )


def _non_negative(graph: Data) -> FlowGraph:
    """Return a graph of weights that are not negative as one whose capacities they are."""
    return FlowGraph(
        edge_index=graph["edge_index"],
        capacity=graph["weight"],
        question_mask=graph["question_mask"],
        reasoning_mask=graph["reasoning_mask"],
        answer_mask=graph["answer_mask"],
        num_nodes=graph.num_nodes,
    )


def edge_weight(graph: Data) -> Float[Tensor, " edges"]:
    """Return what the edges of a composed graph weigh: the capacities of a FlowGraph, or signed weights."""
    return graph["capacity"] if "capacity" in graph else graph["weight"]


def refuse_regions(**given: Any) -> None:
    """Refuse regions and rules beside a graph, which has its own."""
    for name, value in given.items():
        if value is not None:
            raise InvalidInputError(
                f"{name}: goes with rows only, got a value beside a graph; a graph has its own regions and edges"
            )


def graph_of_rows(
    chosen: Composition,
    rows: Any,
    *,
    question: MaskLike | None,
    answer: MaskLike | None,
    reasoning: MaskLike | None,
    generated: MaskLike | None,
    preset: str | None,
    rules: EdgeRules | None,
) -> FlowGraph | SignedGraph:
    """Build the graph of one sequence, with all edges; of signed rows, where the composition allows them, signed."""
    is_rows = isinstance(rows, Tensor) or (hasattr(rows, "block") and hasattr(rows, "num_tokens"))
    if not is_rows:
        raise GraphError(
            f"weights: must be a FlowGraph, captured rows or a matrix, got {type(rows).__name__}; a FlowTrace has its "
            "graph as trace.graph"
        )
    for name, region in (("question", question), ("answer", answer)):
        if region is None:
            raise InvalidInputError(
                f"{name}: must be given with rows, got none; pass a mask or indices, or a FlowGraph, which has its own"
            )
    assert question is not None
    assert answer is not None

    # Signed rows become a signed graph, where the composition allows negative weights.
    if chosen.signed and _is_signed(rows):
        signed_rules = rules
        if rules is None and preset is not None:
            signed_rules = EdgeRules.preset(preset)
        return _graph_of_signed_rows(
            rows,
            question=question,
            answer=answer,
            reasoning=reasoning,
            generated=generated,
            rules=signed_rules,
        )

    # Without rules, the rows are capacities already; with rules, they are attention that becomes capacities.
    checked = _NonNegativeRows(as_row_source(rows), chosen.name, getattr(rows, "normalization", None))
    if rules is None and preset is None:
        if not isinstance(rows, Tensor):
            raise InvalidInputError(
                "preset: must be named for captured rows, got None, which is for a matrix of capacities; use 'default' "
                "or 'paper'"
            )
        # Reading all rows once checks their sign.
        checked.block(0, checked.num_tokens)
        return FlowGraph.from_dense(rows, question=question, answer=answer, reasoning=reasoning)
    return FlowGraph.from_rows(
        checked,
        question=question,
        answer=answer,
        reasoning=reasoning,
        generated=generated,
        preset=preset or "default",
        rules=rules,
        max_edges="all",
    )


def _is_signed(rows: Any) -> bool:
    """Tell whether rows may be negative, so that no edge rule normalises them."""
    if isinstance(rows, Tensor):
        return bool((rows < 0).any())
    return isinstance(rows, RelevanceRows) or getattr(rows, "normalization", None) == "none"


def _graph_of_signed_rows(
    rows: Any,
    *,
    question: MaskLike,
    answer: MaskLike,
    reasoning: MaskLike | None,
    generated: MaskLike | None,
    rules: EdgeRules | None,
) -> SignedGraph:
    """Build the edges of signed rows: each token takes the row that the rules give it, and nothing is normalised.

    Without rules, the rows are capacities already.
    """
    matrix = rows if isinstance(rows, Tensor) else rows.dense()
    # Shape, dtype and causality are checked as for any rows.
    source_of_rows = as_row_source(matrix)
    matrix = source_of_rows.block(0, source_of_rows.num_tokens)
    if matrix.shape[0] != 1:
        raise GraphError(
            f"rows: must be those of one sequence, got a batch of {matrix.shape[0]}; compose one sequence at a time"
        )
    num_tokens = matrix.shape[1]
    weights = matrix[0]
    if rules is not None:
        # Each token takes its own row or the one before; the first token loses its outgoing edges, if excluded.
        question_mask = as_mask(question, num_tokens, "question", matrix.device)
        weights = weights[_row_of_token(rules.rows, question_mask, generated)]
        if rules.first_token == "exclude":
            first_column = torch.zeros(1, dtype=torch.int64, device=matrix.device)
            weights = weights.index_fill(1, first_column, 0.0)

    # One edge s -> t per non-zero weight below the diagonal.
    target, source = weights.tril(-1).nonzero(as_tuple=True)
    return SignedGraph.from_edges(
        torch.stack([source, target]),
        weights[target, source],
        num_nodes=num_tokens,
        question=question,
        answer=answer,
        reasoning=reasoning,
    )


def _row_of_token(rule: str, question: Bool[Tensor, " tokens"], generated: MaskLike | None) -> Int64[Tensor, " tokens"]:
    """Return the position whose row each token takes: its own, or the one before; see :class:`flowgraph.EdgeRules`."""
    token = torch.arange(question.numel(), device=question.device)
    # Emission rows: a generated token takes the row before it, which produced it. Token 0 has none before it.
    if rule == "literal":
        return token
    if rule == "emission_all":
        takes_previous = token > 0
    elif generated is not None:
        is_generated = as_mask(generated, question.numel(), "generated", question.device)
        takes_previous = is_generated & (token > 0)
    else:
        takes_previous = token > question.nonzero().max()
    return token - takes_previous.long()


@dataclass(frozen=True)
class LayerRows:
    """The rows of each layer of one sequence, before any edge rule.

    Attributes:
        rows: one source a layer, the first layer first.
        row_of_token: ``[T]`` the position whose row each token was given: its own, or the one before.
    """

    rows: Sequence[RowSource]
    row_of_token: Int64[Tensor, " tokens"]

    @classmethod
    def of(cls, rows: Any, graph: FlowGraph, generated: MaskLike | None) -> LayerRows | None:
        """Take the layers of captured rows apart; None for rows that are joined already.

        Args:
            rows: captured rows of one sequence.
            graph: the graph that was built from them; its rules say which row a token was given.
            generated: tokens that the model produced; None: all after the last question token.
        """
        if not isinstance(rows, (AttentionRows, SequenceRows)):
            return None
        token = torch.arange(rows.num_tokens, device=graph.capacity.device)
        if isinstance(rows, AttentionRows):
            # Padding keeps its positions, as in the graph; no token reads it.
            rows = replace(rows.sequence(0), positions=token.to(rows.device))
        # The graph states its rules as "rows=emission, ...".
        rule = graph.rules.removeprefix("rows=").split(",")[0]
        row_of_token = _row_of_token(rule, graph.question_mask, generated)
        layers = [SequenceRows([layer], rows.positions, rows.device) for layer in rows.layers]
        return cls(layers, row_of_token)
