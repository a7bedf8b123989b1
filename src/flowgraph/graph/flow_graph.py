"""FlowGraph: the attention-induced DAG over tokens, held as a PyG Data object."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.storage import GlobalStorage
from torch_geometric.utils import coalesce

from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.errors import GraphError, RegionError
from flowgraph.files import loadable, restored
from flowgraph.graph.edge_collection import collect_edges
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.graph.validity import (
    REGIONS,
    check_capacities,
    check_masks,
    check_shapes,
    require_usable,
    sort_key,
)
from flowgraph.masks import MaskLike, as_mask, as_tensor, between
from flowgraph.propagation.row_sources import RowSource


@loadable
class FlowGraph(Data):
    """A DAG over tokens; an edge ``s -> t`` (``s < t``) is information moving from token s to token t.

    Attributes:
        edge_index: ``[2, E]`` int64; row 0 = source (the earlier token), row 1 = target (the later one).
            Sorted by (target, source), so the edges into one token, or into a block of tokens, are one slice.
        capacity: ``[E]`` float > 0; ``c(s, t)`` = share of token t's reading that is taken from token s.
        question_mask: ``[N]`` bool, where flow may enter. The three masks are disjoint; a token may be in none of them.
        reasoning_mask: ``[N]`` bool, the generated tokens before the answer.
        answer_mask: ``[N]`` bool, where flow is absorbed.
        kept_attention: ``[1]`` float, share of the edge mass before pruning that the graph still holds.
        kept_flow: ``[1]`` float, share of the unpruned unit flow whose entire route was kept by pruning.
        throughput_error: ``[1]`` float, largest change of any token's throughput that pruning caused, against the
            exact solution before it.
        rules: one line that names the choices that turned attention into edges ("" for edges given as they are).

    Token order is a topological order, so the graph cannot contain a cycle. Every tensor follows PyG's
    naming, so ``Batch``, ``DataLoader``, ``.to(device)`` and ``torch_geometric.utils.to_networkx`` work on it.

    Build one with :meth:`from_edges`, :meth:`from_dense` or :meth:`from_rows`; the bare constructor exists
    because PyG calls it without arguments.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
        >>> FlowGraph.from_dense(weights, question=[0], answer=[2]).edge_index.tolist()
        [[0, 0, 1], [1, 2, 2]]
    """

    edge_index: Int64[Tensor, "2 edges"]
    capacity: Float[Tensor, " edges"]
    question_mask: Bool[Tensor, " tokens"]
    reasoning_mask: Bool[Tensor, " tokens"]
    answer_mask: Bool[Tensor, " tokens"]
    kept_attention: Float[Tensor, 1]
    kept_flow: Float[Tensor, 1]
    throughput_error: Float[Tensor, 1]
    rules: str

    @classmethod
    def from_edges(
        cls,
        edge_index: Int[Tensor, "2 edges"] | Int[np.ndarray, "2 edges"] | Sequence[Sequence[int]],
        capacity: Float[Tensor, " edges"] | Float[np.ndarray, " edges"] | Sequence[float],
        *,
        num_nodes: int,
        question: MaskLike,
        answer: MaskLike,
        reasoning: MaskLike | None = None,
        rules: str = "",
    ) -> Self:
        """Build from an edge list in any order; edges of zero capacity are dropped.

        Args:
            edge_index: ``[2, E]``, source before target; a tensor, an array or two lists.
            capacity: ``[E]``, finite and non-negative.
            num_nodes: number of tokens, isolated ones included.
            question: mask, indices or slice of the tokens where flow enters.
            answer: the same for the tokens where flow is absorbed.
            reasoning: the same for the tokens between; default: every token after the last question token and
                before the first answer token.
            rules: one line of provenance, kept on the graph.

        Returns:
            A valid graph; its edges are sorted by (target, source).

        Raises:
            GraphError: an edge backwards in time, twice, or outside; NaN, infinite or negative capacity.
            RegionError: a region that is empty, overlaps another or lies outside.

        Cost: one sort of the E edges when they do not come sorted.

        Example:
            >>> pairs = torch.tensor([[1, 0], [2, 1]])
            >>> graph = FlowGraph.from_edges(pairs, torch.tensor([0.5, 1.0]), num_nodes=3, question=[0], answer=[2])
            >>> graph.edge_index.tolist(), graph.capacity.tolist()
            ([[0, 1], [1, 2]], [1.0, 0.5])
        """
        # Arrays and lists are read as tensors; those hold no reason for another integer type.
        if not isinstance(edge_index, Tensor):
            edge_index = as_tensor(edge_index, "edge_index", "pass [sources, targets]", error=GraphError)
            edge_index = edge_index if edge_index.is_floating_point() else edge_index.long()
        capacity = as_tensor(capacity, "capacity", "pass one weight per edge", error=GraphError, is_precise=True)
        check_shapes(edge_index, capacity, num_nodes)
        check_capacities(edge_index, capacity)
        is_edge = capacity != 0
        edge_index = edge_index[:, is_edge]
        capacity = capacity[is_edge]

        # Sort by (target, source), unless the edges come sorted.
        key = sort_key(edge_index, num_nodes)
        if bool((key[1:] < key[:-1]).any()):
            order = torch.argsort(key)
            edge_index = edge_index[:, order]
            capacity = capacity[order]
        graph = cls._assemble(edge_index.contiguous(), capacity, num_nodes, question, reasoning, answer, rules)
        graph.validate()
        return graph

    @classmethod
    def from_dense(
        cls,
        capacity: Float[Tensor, "tokens tokens"] | Float[np.ndarray, "tokens tokens"] | Sequence[Sequence[float]],
        *,
        question: MaskLike,
        answer: MaskLike,
        reasoning: MaskLike | None = None,
    ) -> Self:
        """Build from a matrix of capacities, taken as they are: ``capacity[t, s]`` is the edge ``s -> t``.

        The diagonal is ignored (a token is not its own predecessor); a non-zero entry above it is an error.

        Args:
            capacity: ``[T, T]``, finite and non-negative.
            question: see :meth:`from_edges`.
            answer: see :meth:`from_edges`.
            reasoning: see :meth:`from_edges`.

        Raises:
            GraphError: not square, NaN, infinite, negative, or non-zero above the diagonal.
            RegionError: see :meth:`from_edges`.

        Cost: a few reads of the matrix.
        """
        capacity = as_tensor(capacity, "capacity", "pass a matrix [tokens, tokens]", error=GraphError, is_precise=True)
        if capacity.ndim != 2 or capacity.shape[0] != capacity.shape[1]:
            raise GraphError(
                f"capacity: must be a square matrix [tokens, tokens], got shape {tuple(capacity.shape)}; "
                "pass one graph at a time and join them with torch_geometric.data.Batch"
            )
        if not capacity.is_floating_point():
            raise GraphError(f"capacity: must be floating point, got {capacity.dtype}; call .float() on it")
        not_finite = ~torch.isfinite(capacity)
        if bool(not_finite.any()):
            t, s = not_finite.nonzero()[0].tolist()
            raise GraphError(
                f"capacity: must be finite and non-negative, got {capacity[t, s].item()} at [{t}, {s}]; "
                "check the attention for NaN or overflow"
            )
        above_diagonal = capacity.triu(1) != 0
        if bool(above_diagonal.any()):
            t, s = above_diagonal.nonzero()[0].tolist()
            raise GraphError(
                f"capacity: must be causal (zero above the diagonal), got {capacity[t, s].item():g} at [{t}, {s}], "
                f"an edge from token {s} back to token {t}; rows are readers: capacity[t, s] with s < t"
            )

        # nonzero lists the entries [t, s] below the diagonal by row: sorted by target, then source.
        below = capacity.tril(-1)
        target, source = below.nonzero(as_tuple=True)
        return cls.from_edges(
            torch.stack([source, target]),
            below[target, source],
            num_nodes=capacity.shape[0],
            question=question,
            answer=answer,
            reasoning=reasoning,
        )

    @classmethod
    def from_rows(
        cls,
        rows: (
            RowSource | Float[Tensor, "tokens tokens"] | Float[np.ndarray, "tokens tokens"] | Sequence[Sequence[float]]
        ),
        *,
        question: MaskLike,
        answer: MaskLike,
        reasoning: MaskLike | None = None,
        generated: MaskLike | None = None,
        preset: str = "default",
        rules: EdgeRules | None = None,
        max_edges: int | str = "auto",
    ) -> Self:
        """Turn attention rows into the DAG, by the choices of the method.

        Args:
            rows: attention, row t = what token t reads: a matrix, or captured rows of one sequence (see
                :func:`flowgraph.capture`), read block by block. The complete matrix is in memory only where all edges
                of the graph are.
            question: where flow enters (mask, indices or slice).
            answer: where flow is absorbed.
            reasoning: generated tokens before the answer; see :meth:`from_edges` for the default.
            generated: tokens that the model produced; under emission rows they take the row of the
                position that produced them. Default: every token after the last question token.
            preset: ``"default"`` (emission rows, first token excluded) or ``"paper"`` (literal rows, first
                token kept, self-attention dropped).
            rules: the same choices one by one; overrides ``preset``.
            max_edges: ``"all"``, a number, or ``"auto"``: all up to 2,048 tokens, else 64 per token. A limit
                keeps the edges with most *flow*, found by an exact solve over the streamed rows, and
                records ``kept_attention``, ``kept_flow`` and ``throughput_error``.

        Raises:
            GraphError: NaN, negative, non-causal rows, or rows that sum to more than 1.
            RegionError: see :meth:`from_edges`.

        Cost: one read of the rows, or two with a limit; memory O(block x T + E).
        """
        if isinstance(rows, RelevanceRows):
            raise GraphError(
                f"rows: must not be negative, got {rows}, which are signed; use flowgraph.relevance_flow(rows, ...), "
                "whose graph has a positive and a negative part"
            )
        if isinstance(rows, np.ndarray | Sequence):
            rows = _row_matrix(rows)
        num_nodes = rows.shape[-1] if isinstance(rows, Tensor) else rows.num_tokens
        question_mask = as_mask(question, num_nodes, "question")
        answer_mask = as_mask(answer, num_nodes, "answer")
        if generated is None:
            generated_mask = _after_last(question_mask)
        else:
            generated_mask = as_mask(generated, num_nodes, "generated")
        if rules is None:
            rules = EdgeRules.preset(preset, normalization=getattr(rows, "normalization", None))

        # A limit on the edges is applied while the rows are read; the graph records what it lost.
        edges = collect_edges(rows, rules, generated_mask, question_mask, answer_mask, max_edges=max_edges)
        graph = cls._assemble(edges.edge_index, edges.capacity, num_nodes, question, reasoning, answer, str(rules))
        graph.kept_attention = graph.kept_attention * edges.kept_attention
        graph.kept_flow = graph.kept_flow * edges.kept_flow
        graph.throughput_error = graph.throughput_error + edges.throughput_error
        graph.validate()
        return graph

    @classmethod
    def _assemble(
        cls,
        edge_index: Tensor,
        capacity: Tensor,
        num_nodes: int,
        question: MaskLike,
        reasoning: MaskLike | None,
        answer: MaskLike,
        rules: str,
    ) -> Self:
        """Build the object from sorted edges, with regions as masks; nothing is pruned yet."""
        # Regions may be masks, indices or slices; the graph holds masks on the device of its edges.
        device = edge_index.device
        question_mask = as_mask(question, num_nodes, "question", device)
        answer_mask = as_mask(answer, num_nodes, "answer", device)
        if reasoning is None:
            reasoning_mask = between(question_mask, answer_mask)
        else:
            reasoning_mask = as_mask(reasoning, num_nodes, "reasoning", device)
        return cls(
            edge_index=edge_index,
            capacity=capacity,
            question_mask=question_mask,
            reasoning_mask=reasoning_mask,
            answer_mask=answer_mask,
            kept_attention=torch.ones(1, dtype=torch.float64, device=device),
            kept_flow=torch.ones(1, dtype=torch.float64, device=device),
            throughput_error=torch.zeros(1, dtype=torch.float64, device=device),
            rules=rules,
            num_nodes=num_nodes,
        )

    def validate(self, raise_on_error: bool = True) -> bool:
        """Check every invariant of the class.

        Args:
            raise_on_error: raise for an invalid graph, instead of returning False.

        Returns:
            Whether the graph is valid.

        Raises:
            GraphError: order, duplicates, causality, range or finiteness of the edges, or a missing tensor.
            RegionError: masks that are empty, overlapping or of the wrong length.

        Cost: a few reads of the edges.
        """
        try:
            require_usable(self, anew=True)
            check_regions(self)
        except (GraphError, RegionError):
            if raise_on_error:
                raise
            return False
        return True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # PyG makes the storage itself and has no argument for its class; its own setattr would store a value.
        object.__setattr__(self._store, "__class__", _FlowGraphStorage)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as its named values, which ``torch.load`` reads without running code of the file."""
        if type(self) is not FlowGraph:
            return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]
        return restored, (FlowGraph.__module__, FlowGraph.__qualname__, self.to_dict())

    @classmethod
    def _restored(cls, values: dict[str, Any]) -> Self:
        """Build a graph from its named values."""
        return cls(**values)

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Return by how much batching shifts an attribute: node ids by the number of nodes, the rest as PyG does."""
        if key == "edge_index":
            return self.num_nodes
        return super().__inc__(key, value, *args, **kwargs)


class _FlowGraphStorage(GlobalStorage):
    """PyG's storage, told that the capacity belongs to the edges.

    PyG decides by lengths what belongs to nodes and what to edges. In a graph with as many edges as tokens it would
    take the capacity for an attribute of nodes, and sort or select edges without their capacities.
    """

    def is_node_attr(self, key: str) -> bool:
        return key != "capacity" and super().is_node_attr(key)

    def is_edge_attr(self, key: str) -> bool:
        return key == "capacity" or super().is_edge_attr(key)

    def coalesce(self, reduce: str = "sum") -> Self:
        """Merge repeated edges, their capacities joined by ``reduce``, in the order of a FlowGraph.

        PyG's own merges ``edge_attr`` alone and would leave the capacities behind.
        """
        self["edge_index"], self["capacity"] = coalesce(
            self["edge_index"], self["capacity"], num_nodes=self.num_nodes, reduce=reduce, sort_by_row=False
        )
        return self


def _row_matrix(rows: Any) -> Float[Tensor, "tokens tokens"]:
    """Read a matrix of rows given as an array or lists."""
    remedy = "pass a matrix [tokens, tokens] of one sequence, or rows of flowgraph.capture(...).sequence(0)"
    matrix = as_tensor(rows, "rows", remedy, error=GraphError, is_precise=True)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise GraphError(
            f"rows: must be a square matrix of floats, got {matrix.dtype} of shape {tuple(matrix.shape)}; {remedy}"
        )
    return matrix


def _after_last(mask: Bool[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
    """Mark every token after the last one of a region; none for an empty region, which is refused later."""
    if not mask.any():
        return mask
    last = int(mask.nonzero().max())
    return torch.arange(mask.numel()) > last


def check_regions(graph: Data) -> None:
    """Refuse regions that are no masks over the tokens, overlap, or are empty where one token is needed."""
    check_masks({f"{name}_mask": graph[f"{name}_mask"] for name in REGIONS}, int(graph.num_nodes or 0))
    masks = {name: graph[f"{name}_mask"] for name in REGIONS}
    for name in ("question", "answer"):
        if not bool(masks[name].any()):
            raise RegionError(f"{name}: must hold at least one token, got none; select the tokens of the {name}")

    # The regions are disjoint, pair by pair.
    for one, other in (("question", "answer"), ("question", "reasoning"), ("reasoning", "answer")):
        both = masks[one] & masks[other]
        if bool(both.any()):
            raise RegionError(
                f"{one}, {other}: regions must be disjoint, got token {int(both.nonzero()[0])} in both; "
                "remove it from one of them"
            )
