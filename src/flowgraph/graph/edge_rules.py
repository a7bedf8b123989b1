r"""EdgeRules: how attention rows become edge capacities (which row belongs to a token, and what is excluded).

Attention row t holds what the query at position t reads. In a causal LM token k is *produced* by the query at
position k - 1, so two rules are possible (:class:`EdgeRules`): **emission** gives a generated token the row
that produced it, **literal** gives every token its own row. Two more rules concern the first token (an attention sink
that holds mass without information) and self-attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.propagation.block_substitution import token_blocks
from flowgraph.propagation.row_sources import RowSource

RowRule = Literal["emission", "emission_all", "literal"]
SelfRule = Literal["drop", "renormalize"]
FirstTokenRule = Literal["exclude", "keep"]
Normalization = Literal["attention", "renormalize", "leak", "none"]
Preset = Literal["default", "paper"]

_ROW_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROW_SUM_TOLERANCE_HALF = 3e-2
"""Half precision: in bfloat16 the rounding of a thousand weights adds up."""


@dataclass(frozen=True)
class EdgeRules:
    """The choices that turn attention rows into edges (method, sections 3 and 3.1).

    Attributes:
        rows: ``"emission"``: a generated token takes the row of the position that produced it (row k - 1),
            prompt tokens keep their own; ``"emission_all"``: every token takes row k - 1; ``"literal"``: every
            token takes its own row k.
        self_attention: treatment of the diagonal where a token keeps its own row: ``"drop"`` it, or drop it
            and ``"renormalize"`` the rest of the row. (In a shifted row the diagonal is the
            edge k - 1 -> k, like any other.)
        first_token: ``"exclude"``: the edges out of the first token are dropped and rows are renormalised to sum 1,
            which also removes a learned sink; ``"keep"``: attention as it is.
        normalization: what the rows are, and how they are scaled after the first token is excluded. ``"attention"``:
            they sum to at most 1, and are renormalised where the first token is excluded; ``"renormalize"``: any
            non-negative weights, scaled to sum 1; ``"leak"``: any non-negative weights; a row keeps its own sum and all
            are divided by the largest, so a row that reads nothing sharply passes on little; ``"none"``: as they are.
            Rows of :func:`flowgraph.capture` state their own.
    """

    rows: RowRule = "emission"
    self_attention: SelfRule = "drop"
    first_token: FirstTokenRule = "exclude"
    normalization: Normalization = "attention"

    def __post_init__(self) -> None:
        """Refuse a value outside its fixed set."""
        _require_one_of("rows", self.rows, get_args(RowRule))
        _require_one_of("self_attention", self.self_attention, get_args(SelfRule))
        _require_one_of("first_token", self.first_token, get_args(FirstTokenRule))
        _require_one_of("normalization", self.normalization, get_args(Normalization))

    @classmethod
    def preset(cls, name: str, **changes: str | None) -> EdgeRules:
        """Build a named set of choices.

        Args:
            name: ``"default"``, or ``"paper"`` for the choices of arXiv 2606.10646.
            changes: attributes to replace; those that are None are ignored.

        Raises:
            InvalidInputError: unknown preset or value.

        Example:
            >>> str(EdgeRules.preset("paper", first_token="exclude"))
            'rows=literal, self_attention=drop, first_token=exclude'
        """
        if name not in get_args(Preset):
            allowed = ", ".join(map(repr, get_args(Preset)))
            raise InvalidInputError(f"preset: must be one of {allowed}, got {name!r}; single choices go into EdgeRules")
        if name == "paper":
            base = cls(rows="literal", self_attention="drop", first_token="keep")
        else:
            base = cls()
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(base, **given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"rows={self.rows}, self_attention={self.self_attention}, first_token={self.first_token}"
        if self.normalization != "attention":
            text += f", normalization={self.normalization}"
        return text


@dataclass(frozen=True)
class EdgeRows:
    """The capacities of each sequence of a batch as a :class:`RowSource`: attention rows with the rules applied.

    Shapes: B sequences, T tokens.

    Attributes:
        attention: attention rows.
        rules: which row belongs to a token, and what is excluded.
        generated: ``[B, T]`` tokens that the model produced.
        first: ``[B]`` position of the first token of each sequence (0 unless padded on the left).
        scale: ``[B]`` divisor of all rows of a sequence; None where rows are not scaled together.
    """

    attention: RowSource
    rules: EdgeRules
    generated: Bool[Tensor, "graphs tokens"]
    first: Int64[Tensor, " graphs"]
    scale: Float[Tensor, " graphs"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.attention.num_tokens

    @property
    def device(self) -> torch.device:
        return self.attention.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Compute the capacities into the tokens ``[start, stop)``: ``c(s, k)`` for every s < stop, zero unless s < k.

        Raises:
            GraphError: the attention holds NaN, negative or non-causal weights, or rows that sum to more than 1.
        """
        # Under emission rows, the first token of the block may take the row before the block.
        first_row = max(start - 1, 0)
        weights = self.attention.block(first_row, stop)
        is_attention = self.rules.normalization == "attention"
        sums = check_rows(weights, first_row, at_most_one=is_attention)
        if self.rules.first_token == "exclude":
            weights = self._without_first(weights)
            sums = weights.sum(-1)
        if self.rules.normalization == "renormalize" or (is_attention and self.rules.first_token == "exclude"):
            smallest_normal = torch.finfo(weights.dtype).tiny
            weights = weights / sums.clamp_min(smallest_normal)[..., None]
            sums = (sums > 0).to(sums.dtype)

        # The row of each token: its own, or the one before.
        token = torch.arange(start, stop, device=self.device)
        shift = self._takes_previous_row(token).long()
        row = token - shift - first_row
        weights = weights.gather(1, row[..., None].expand(-1, -1, stop))

        # Drop the diagonal, which is empty in a shifted row; "renormalize" gives its mass to the rest of the row.
        is_diagonal = torch.arange(stop, device=self.device)[None] == token[:, None]
        if self.rules.self_attention == "renormalize":
            total = sums.gather(1, row)[..., None]
            rest = weights.masked_fill(is_diagonal, 0).sum(-1, keepdim=True)
            smallest_normal = torch.finfo(rest.dtype).tiny
            weights = weights * torch.where(rest > 0, total / rest.clamp_min(smallest_normal), 0)
        weights = weights.masked_fill(is_diagonal, 0)
        return weights if self.scale is None else weights / self.scale[:, None, None]

    def scaled_for(self, answer: Bool[Tensor, "graphs tokens"]) -> EdgeRows:
        """Return the rows with the divisor that the rules ask for: itself, or the largest row sum under ``"leak"``.

        Only tokens up to the last answer token count: later rows cannot reach the answer.

        Cost: one read of the rows under ``"leak"``.
        """
        if self.rules.normalization != "leak":
            return self
        # Tokens that have an answer token at or after them.
        before_end = answer.to(self.device).flip(-1).cumsum(-1).flip(-1) > 0
        largest_of_blocks = []
        for block in token_blocks(self.num_tokens):
            sums = self.block(block.start, block.stop).sum(-1)
            counted = torch.where(before_end[:, block], sums, 0.0)
            largest_of_blocks.append(counted.amax(-1))
        largest = torch.stack(largest_of_blocks).amax(0)
        return replace(self, scale=torch.where(largest > 0, largest, 1.0))

    def _without_first(self, weights: Float[Tensor, "graphs rows stop"]) -> Float[Tensor, "graphs rows stop"]:
        """Drop the edges out of the first token."""
        _, num_rows, stop = weights.shape
        # A sequence that starts after this block has no first token in it; its rows are all zero.
        first = self.first.clamp_max(stop - 1)
        column = first[:, None, None].expand(-1, num_rows, 1)
        return weights.scatter(2, column, 0.0)

    def _takes_previous_row(self, token: Int64[Tensor, " block"]) -> Bool[Tensor, "graphs block"]:
        """Find the tokens k that take row k - 1; the first token has no row before it."""
        has_previous = token[None] > self.first[:, None]
        if self.rules.rows == "literal":
            return torch.zeros_like(has_previous)
        if self.rules.rows == "emission_all":
            return has_previous
        return has_previous & self.generated[:, token]


def row_sum_tolerance(dtype: torch.dtype) -> float:
    """Return by how much the sum of a row of attention may differ from 1 through rounding."""
    return _ROW_SUM_TOLERANCE.get(dtype, _ROW_SUM_TOLERANCE_HALF)


def check_rows(
    weights: Float[Tensor, "graphs block stop"], start: int, *, at_most_one: bool = True
) -> Float[Tensor, "graphs block"]:
    """Check rows of causal attention; a row may sum to less than 1 (padding, learned sinks).

    Args:
        weights: rows of the tokens from ``start`` on, columns from token 0 on.
        start: token of the first row.
        at_most_one: also refuse rows that sum to more than 1, as attention never does.

    Returns:
        The row sums.

    Raises:
        GraphError: NaN or infinite, negative or non-causal weights, or a row that sums to more than 1.
    """
    # Both are NaN if any weight is NaN.
    low, high = torch.aminmax(weights)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        row = int((~torch.isfinite(weights)).any(-1).nonzero()[0][-1])
        raise GraphError(
            f"attention: must be finite, got NaN or infinity in row {start + row}; "
            "run the model in float32 or bfloat16 and check its output for NaN"
        )

    if bool(low < 0):
        _, row, column = (weights < 0).nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be non-negative, got {low.item():g} at [{start + row}, {column}]; "
            "pass softmax weights, not logits"
        )
    # Row t of the block is token start + t, so its columns from start + t + 1 on are later tokens.
    future = weights[..., start:].triu(1)
    if bool(future.any()):
        _, row, column = future.nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be causal (zero above the diagonal), got {future[future != 0][0].item():g} at "
            f"[{start + row}, {start + column}]; row t is the reader t, and it reads tokens 0..t"
        )
    sums = weights.sum(-1)
    above_one = sums > 1 + row_sum_tolerance(weights.dtype)
    if at_most_one and bool(above_one.any()):
        sequence, row = above_one.nonzero()[0].tolist()
        raise GraphError(
            f"attention: a row must sum to at most 1, got {sums[sequence, row].item():g} in row {start + row}; "
            "average over heads and layers, do not sum them (or build with FlowGraph.from_dense)"
        )
    return sums


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value outside its fixed set."""
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise InvalidInputError(f"{name}: must be one of {listed}, got {value!r}; see EdgeRules")
