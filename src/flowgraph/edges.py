r"""From attention rows to edge capacities: which row belongs to a token, and what is left out.

Attention row t says what the query at position t reads. In a causal LM token k is *produced* by the query at
position k - 1, so two readings are possible (:class:`EdgeRules`): **emission** gives a generated token the row
that produced it, **literal** gives every token its own row. Everything else here is bookkeeping on blocks of
rows: the first token (an attention sink that holds mass without information) and self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.memory import require_memory
from flowgraph.propagation.operators import BatchLayout, RowSource, SparseOperator, StreamedOperator
from flowgraph.propagation.sweeps import influence, potential

RowRule = Literal["emission", "emission_all", "literal"]
SelfRule = Literal["drop", "renormalize"]
FirstTokenRule = Literal["exclude", "keep"]
Preset = Literal["default", "paper"]

BLOCK = 128
AUTO_ALL_TOKENS = 2048
"""Up to here a trace keeps every edge (2 million of them); beyond it, the edges with most flow."""
AUTO_EDGES_PER_TOKEN = 64
_ROW_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 3e-2  # a bfloat16 row of a thousand rounded weights
BYTES_PER_EDGE = 60  # edge_index and capacity, twice while they are joined, and one sort key


@dataclass(frozen=True)
class EdgeRules:
    """The choices that turn attention rows into edges (method, sections 3 and 3.1).

    Attributes:
        rows: ``"emission"``: a generated token takes the row of the position that emitted it (row k - 1),
            prompt tokens keep their own; ``"emission_all"``: every token takes row k - 1; ``"literal"``: every
            token takes its own row k.
        self_attention: what becomes of the diagonal where a token keeps its own row: ``"drop"`` it, or drop it
            and ``"renormalize"`` the rest of the row. (In a shifted row it is the
            edge k - 1 -> k, like any other.)
        first_token: ``"exclude"``: no edge leaves the first token and rows are renormalised to sum 1, which
            also removes a learned sink; ``"keep"``: as the attention has it.
    """

    rows: RowRule = "emission"
    self_attention: SelfRule = "drop"
    first_token: FirstTokenRule = "exclude"

    def __post_init__(self) -> None:
        """Refuse a value outside its fixed set."""
        for name, kind in (("rows", RowRule), ("self_attention", SelfRule), ("first_token", FirstTokenRule)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(repr, get_args(kind)))
                raise InvalidInputError(f"{name}: must be one of {allowed}, got {getattr(self, name)!r}; see EdgeRules")

    @classmethod
    def preset(cls, name: str, **changes: str | None) -> EdgeRules:
        """``"default"``, or ``"paper"`` for the choices of arXiv 2606.10646; ``changes`` that are None are ignored.

        Raises:
            InvalidInputError: unknown preset or value.
        """
        if name not in get_args(Preset):
            allowed = ", ".join(map(repr, get_args(Preset)))
            raise InvalidInputError(f"preset: must be one of {allowed}, got {name!r}; single choices go into EdgeRules")
        base = cls() if name == "default" else cls(rows="literal", self_attention="drop", first_token="keep")
        return replace(base, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"rows={self.rows}, self_attention={self.self_attention}, first_token={self.first_token}"


@dataclass(frozen=True)
class MatrixRows:
    """A whole attention matrix in the shape of :class:`RowSource`."""

    matrix: Float[Tensor, "tokens tokens"]

    @property
    def num_tokens(self) -> int:
        return self.matrix.shape[0]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def block(self, start: int, stop: int) -> Float[Tensor, "block tokens"]:
        return self.matrix[start:stop]


def as_row_source(rows: RowSource | Tensor) -> RowSource:
    """Accept a matrix wherever streamed rows are accepted.

    Raises:
        GraphError: the tensor is not a square floating point matrix.
    """
    if not isinstance(rows, Tensor):
        return rows
    if rows.ndim != 2 or rows.shape[0] != rows.shape[1]:
        raise GraphError(
            f"rows: must be a square matrix [tokens, tokens], got shape {tuple(rows.shape)}; "
            "aggregate heads and layers first, and pass one sequence at a time"
        )
    if not rows.is_floating_point():
        raise GraphError(f"rows: must be floating point, got {rows.dtype}; call .float() on them")
    return MatrixRows(rows)


@dataclass(frozen=True)
class EdgeRows:
    """The capacity matrix N of one sequence as a :class:`RowSource`: attention rows seen through the rules."""

    attention: RowSource
    rules: EdgeRules
    generated: Bool[Tensor, " tokens"]

    @property
    def num_tokens(self) -> int:
        return self.attention.num_tokens

    @property
    def device(self) -> torch.device:
        return self.attention.device

    def block(self, start: int, stop: int) -> Float[Tensor, "block tokens"]:
        """Capacities into the tokens ``[start, stop)``: ``E[k, s]`` for every s, zero unless s < k.

        Raises:
            GraphError: the attention holds NaN, negative or non-causal weights, or rows that sum to more than 1.
        """
        first = max(start - 1, 0)
        weights = self.attention.block(first, stop)
        position = torch.arange(first, stop, device=self.device)
        check_attention_rows(weights, position)
        if self.rules.first_token == "exclude":
            weights = weights.clone()
            weights[:, 0] = 0
            weights /= weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        token = torch.arange(start, stop, device=self.device)
        shifted = self._takes_previous_row(token)
        weights = weights[token - shifted.long() - first]
        columns = torch.arange(self.num_tokens, device=self.device)
        own = columns[None] == token[:, None]  # in a shifted row this column is causally empty already
        if self.rules.self_attention == "renormalize":
            total = weights.sum(-1, keepdim=True)
            rest = weights.masked_fill(own, 0).sum(-1, keepdim=True)
            weights = weights * torch.where(rest > 0, total / rest.clamp_min(torch.finfo(rest.dtype).tiny), 0)
        return weights.masked_fill(own, 0)

    def _takes_previous_row(self, token: Int64[Tensor, " block"]) -> Bool[Tensor, " block"]:
        if self.rules.rows == "literal":
            return torch.zeros_like(token, dtype=torch.bool)
        emitted = (
            self.generated.to(token.device)[token] if self.rules.rows == "emission" else torch.ones_like(token).bool()
        )
        return emitted & (token > 0)


def check_attention_rows(weights: Float[Tensor, "block tokens"], position: Int64[Tensor, " block"]) -> None:
    """Attention as a causal LM must have it; a row may sum to less than 1 (padding, learned sinks).

    Raises:
        GraphError: NaN or infinite, negative, non-causal, or more than a whole row.
    """
    if not bool(torch.isfinite(weights).all()):
        row = int((~torch.isfinite(weights)).any(-1).nonzero()[0])
        raise GraphError(
            f"attention: must be finite, got NaN or infinity in row {int(position[row])}; "
            "run the model in float32 or bfloat16 and check its output for NaN"
        )
    if bool((weights < 0).any()):
        row, column = (weights < 0).nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be non-negative, got {weights[row, column].item():g} at "
            f"[{int(position[row])}, {column}]; pass softmax weights, not logits"
        )
    future = torch.arange(weights.shape[1], device=weights.device)[None] > position[:, None]
    if bool((weights.masked_fill(~future, 0) != 0).any()):
        row, column = (weights.masked_fill(~future, 0) != 0).nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be causal (zero above the diagonal), got {weights[row, column].item():g} at "
            f"[{int(position[row])}, {column}]; row t is the reader t, and it reads tokens 0..t"
        )
    sums = weights.sum(-1, dtype=torch.float64)
    tolerance = _ROW_SUM_TOLERANCE.get(weights.dtype, _HALF_TOLERANCE)
    if bool((sums > 1 + tolerance).any()):
        row = int((sums > 1 + tolerance).nonzero()[0])
        raise GraphError(
            f"attention: a row must sum to at most 1, got {sums[row].item():g} in row {int(position[row])}; "
            "average over heads and layers, do not sum them (or build with FlowGraph.from_dense)"
        )


@dataclass(frozen=True)
class CollectedEdges:
    """Edges in (target, source) order, with the shares of attention mass and of flow that they hold."""

    edge_index: Int64[Tensor, "2 edges"]
    capacity: Float[Tensor, " edges"]
    kept_attention: float
    kept_flow: float


def collect_edges(
    rows: RowSource | Tensor,
    rules: EdgeRules,
    generated: Bool[Tensor, " tokens"],
    question: Bool[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
    *,
    max_edges: int | str = "auto",
) -> CollectedEdges:
    """Read the rows block by block and keep all edges, or the ``max_edges`` of them with most flow.

    Raises:
        GraphError: the rows are not causal attention.
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
        MemoryLimitError: the edges would not fit.

    Cost: one read of the rows, or four with a limit; memory O(block x T + edges).
    """
    source = as_row_source(rows)
    num_tokens, device = source.num_tokens, source.device
    edge_rows = EdgeRows(source, rules, generated)
    kept = edges_kept(max_edges, num_tokens)
    require_memory(
        BYTES_PER_EDGE * kept + 40 * BLOCK * num_tokens,
        f"edges of {num_tokens} tokens",
        "pass max_edges=, which keeps the edges with most flow",
        device,
    )
    if kept == num_tokens * (num_tokens - 1) // 2:
        edge_index, capacity, _ = _gather(edge_rows, lambda start, weights: weights)
        return CollectedEdges(edge_index, capacity, kept_attention=1.0, kept_flow=1.0)
    return _strongest_by_flow(edge_rows, question.to(device), answer.to(device), kept)


def edges_kept(max_edges: int | str, num_tokens: int) -> int:
    """The most edges that a graph of this many tokens will hold.

    Raises:
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
    """
    possible = num_tokens * (num_tokens - 1) // 2
    if max_edges == "all" or (max_edges == "auto" and num_tokens <= AUTO_ALL_TOKENS):
        return possible
    if max_edges == "auto":
        return min(AUTO_EDGES_PER_TOKEN * num_tokens, possible)
    if isinstance(max_edges, bool) or not isinstance(max_edges, int) or max_edges < 1:
        raise InvalidInputError(
            f"max_edges: must be 'auto', 'all' or a positive number, got {max_edges!r}; 64 per token keeps most flow"
        )
    return min(max_edges, possible)


def _gather(edge_rows: EdgeRows, importance, limit: int | None = None) -> tuple[Tensor, Tensor, float]:
    """Stream the rows and keep the edges of positive importance, the ``limit`` most important if given.

    Returns edge_index and capacity in (target, source) order, and the total capacity seen.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # key = target * T + source, capacity, importance
    num_tokens, total = edge_rows.num_tokens, 0.0
    for start in range(0, num_tokens, BLOCK):
        weights = edge_rows.block(start, min(start + BLOCK, num_tokens))
        total += float(weights.sum(dtype=torch.float64))
        scores = importance(start, weights)
        target, source = (scores > 0).nonzero(as_tuple=True)
        kept.append(((target + start) * num_tokens + source, weights[target, source], scores[target, source]))
        if limit is not None and sum(key.numel() for key, _, _ in kept) > 2 * limit:
            kept = [_top(kept, limit)]
    if limit is not None:
        kept = [_top(kept, limit)]
    key, capacity = torch.cat([k for k, _, _ in kept]), torch.cat([c for _, c, _ in kept])
    if limit is not None:
        order = torch.argsort(key)
        key, capacity = key[order], capacity[order]
    return torch.stack([key % num_tokens, key // num_tokens]), capacity, total


def _top(parts: list[tuple[Tensor, Tensor, Tensor]], limit: int) -> tuple[Tensor, Tensor, Tensor]:
    key, capacity, score = (torch.cat(column) for column in zip(*parts, strict=True))
    best = torch.topk(score, min(limit, score.numel())).indices
    return key[best], capacity[best], score[best]


def _strongest_by_flow(edge_rows: EdgeRows, question: Tensor, answer: Tensor, limit: int) -> CollectedEdges:
    """Solve exactly on the streamed rows, then keep the edges with most flow.

    The kept share of the flow is exact too: with the potential of the *unpruned* graph, influence pushed along
    kept edges alone arrives in proportion to the routes that lie wholly inside them.
    """
    operator = StreamedOperator(edge_rows, answer)
    h = potential(operator, answer.double()[None])
    sources = question & (h[0] > 0)
    inflow = torch.where(sources, 1 / (h[0] * max(int(sources.sum()), 1)), 0.0)
    g = influence(operator, inflow[None])

    def flow(start: int, weights: Tensor) -> Float64[Tensor, "block tokens"]:
        return weights.double() * (g[0] * ~answer)[None] * h[0, start : start + weights.shape[0], None]

    edge_index, capacity, total = _gather(edge_rows, flow, limit)
    ptr = torch.tensor([0, edge_rows.num_tokens], device=h.device)
    arrived = influence(SparseOperator(edge_index, capacity, BatchLayout(ptr), answer), inflow[None])[0, answer].sum()
    kept_attention = float(capacity.sum(dtype=torch.float64)) / total if total else 1.0
    return CollectedEdges(edge_index, capacity, kept_attention=kept_attention, kept_flow=min(float(arrived), 1.0))
