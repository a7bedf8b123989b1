"""SignedGraph: a DAG over tokens whose edges may weigh less than zero, held as a PyG Data object."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch_geometric.data import Data

from flowgraph.errors import GraphError
from flowgraph.files import loadable, restored
from flowgraph.graph.flow_graph import FlowGraph, check_regions
from flowgraph.graph.validity import check_edges
from flowgraph.masks import MaskLike, as_mask, between


@loadable
class SignedGraph(Data):
    """A DAG over tokens with signed weights; an edge ``s -> t`` (``s < t``) is what token t takes from token s.

    A negative weight argues against the answer. The conserved flow of :func:`flowgraph.solve` and the max flow need
    weights that are not negative: :meth:`positive` and :meth:`negative` are the two parts as graphs of that kind.

    Attributes:
        edge_index: ``[2, E]`` int64; row 0 = source (the earlier token), row 1 = target; sorted by (target, source).
        weight: ``[E]`` float, finite, not 0.
        question_mask: ``[N]`` bool. The three masks are disjoint; a token may be in none of them.
        reasoning_mask: ``[N]`` bool, the generated tokens before the answer.
        answer_mask: ``[N]`` bool.

    Example:
        >>> import torch
        >>> pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
        >>> graph = SignedGraph.from_edges(pairs, torch.tensor([1.0, -0.5, 1.5]), num_nodes=3, question=[0], answer=[2])
        >>> graph.negative().edge_index.tolist(), graph.negative().capacity.tolist()
        ([[0], [2]], [0.5])
    """

    edge_index: Int64[Tensor, "2 edges"]
    weight: Float[Tensor, " edges"]
    question_mask: Bool[Tensor, " tokens"]
    reasoning_mask: Bool[Tensor, " tokens"]
    answer_mask: Bool[Tensor, " tokens"]

    @classmethod
    def from_edges(
        cls,
        edge_index: Int64[Tensor, "2 edges"],
        weight: Float[Tensor, " edges"],
        *,
        num_nodes: int,
        question: MaskLike,
        answer: MaskLike,
        reasoning: MaskLike | None = None,
    ) -> Self:
        """Build from an edge list in any order; edges of weight zero are dropped.

        Args:
            edge_index: ``[2, E]``, source before target.
            weight: ``[E]``, finite.
            num_nodes: number of tokens, isolated ones included.
            question: mask, indices or slice of the question's tokens.
            answer: the same for the answer's tokens.
            reasoning: the same for the tokens between; default: every token after the last question token and before
                the first answer token.

        Raises:
            GraphError: an edge backwards in time, twice, or outside; a weight that is not finite.
            RegionError: a region that is empty, overlaps another or lies outside.

        Cost: one sort of the E edges.
        """
        _check_weights(edge_index, weight)
        is_edge = weight != 0
        edge_index = edge_index[:, is_edge]
        weight = weight[is_edge]

        # Sort by (target, source), as in a FlowGraph.
        order = torch.argsort(edge_index[1] * num_nodes + edge_index[0])
        question_mask = as_mask(question, num_nodes, "question", edge_index.device)
        answer_mask = as_mask(answer, num_nodes, "answer", edge_index.device)
        if reasoning is None:
            reasoning_mask = between(question_mask, answer_mask)
        else:
            reasoning_mask = as_mask(reasoning, num_nodes, "reasoning", edge_index.device)
        graph = cls(
            edge_index=edge_index[:, order].contiguous(),
            weight=weight[order],
            question_mask=question_mask,
            reasoning_mask=reasoning_mask,
            answer_mask=answer_mask,
            num_nodes=num_nodes,
        )
        graph.validate()
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as its named values, which ``torch.load`` reads without running code of the file."""
        return restored, (SignedGraph.__module__, SignedGraph.__qualname__, self.to_dict())

    @classmethod
    def _restored(cls, values: dict[str, Any]) -> Self:
        """Build a graph from its named values."""
        return cls(**values)

    def positive(self) -> FlowGraph:
        """Return the edges of positive weight as a graph whose capacities are these weights."""
        return self._part(self.weight.clamp_min(0))

    def negative(self) -> FlowGraph:
        """Return the edges of negative weight as a graph whose capacities are the absolute weights."""
        return self._part((-self.weight).clamp_min(0))

    def _part(self, capacity: Float[Tensor, " edges"]) -> FlowGraph:
        return FlowGraph.from_edges(
            self.edge_index,
            capacity,
            num_nodes=int(self.num_nodes or 0),
            question=self.question_mask,
            reasoning=self.reasoning_mask,
            answer=self.answer_mask,
        )

    def validate(self) -> None:
        """Check every invariant of the class.

        Raises:
            GraphError: order, duplicates or causality of the edges; weights that are not finite.
            RegionError: masks that are empty, overlapping or of the wrong length.

        Cost: a few reads of the edges.
        """
        _check_weights(self.edge_index, self.weight)
        check_edges(self.edge_index, int(self.num_nodes or 0))
        check_regions(self)

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Return by how much batching shifts an attribute: node ids by the number of nodes, the rest as PyG does."""
        if key == "edge_index":
            return self.num_nodes
        return super().__inc__(key, value, *args, **kwargs)


def _check_weights(edge_index: Tensor, weight: Tensor) -> None:
    """Refuse weights that are not one finite number per edge."""
    if edge_index.dtype != torch.int64 or edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise GraphError(
            f"edge_index: must be int64 of shape [2, edges], got {edge_index.dtype} of shape "
            f"{tuple(edge_index.shape)}; stack sources over targets and call .long()"
        )
    if weight.shape != edge_index.shape[1:] or not weight.is_floating_point():
        raise GraphError(
            f"weight: must be one floating point number per edge ({edge_index.shape[1]}), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}; pass one weight per column of edge_index"
        )
    not_finite = ~torch.isfinite(weight)
    if bool(not_finite.any()):
        at = int(not_finite.nonzero()[0])
        raise GraphError(
            f"weight: must be finite, got {weight[at].item()} on the edge {edge_index[0, at].item()} -> "
            f"{edge_index[1, at].item()}; check the relevance for NaN or overflow"
        )


def refuse_signed(value: object, use: str) -> None:
    """Refuse a signed graph where weights must not be negative.

    Args:
        value: what was given as a graph.
        use: what needs weights that are not negative.

    Raises:
        GraphError: ``value`` is a :class:`SignedGraph`.
    """
    if isinstance(value, SignedGraph):
        raise GraphError(
            f"graph: must have weights that are not negative for {use}, got a SignedGraph; use graph.positive() or "
            "graph.negative()"
        )
