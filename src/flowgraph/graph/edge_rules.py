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
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.propagation.row_sources import RowSource

RowRule = Literal["emission", "emission_all", "literal"]
SelfRule = Literal["drop", "renormalize"]
FirstTokenRule = Literal["exclude", "keep"]
Preset = Literal["default", "paper"]


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
class EdgeRows:
    """The capacities C of each sequence of a batch as a :class:`RowSource`: attention rows seen through the rules.

    Attributes:
        attention: attention rows.
        rules: which row belongs to a token, and what is left out.
        generated: ``[B, T]`` tokens that the model produced.
        first: ``[B]`` position of the first token of each sequence (0 unless padded on the left).
    """

    attention: RowSource
    rules: EdgeRules
    generated: Bool[Tensor, "graphs tokens"]
    first: Int64[Tensor, " graphs"]

    @property
    def num_tokens(self) -> int:
        return self.attention.num_tokens

    @property
    def device(self) -> torch.device:
        return self.attention.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Capacities into the tokens ``[start, stop)``: ``E[k, s]`` for every s < stop, zero unless s < k.

        Raises:
            GraphError: the attention holds NaN, negative or non-causal weights, or rows that sum to more than 1.
        """
        earlier = max(start - 1, 0)
        weights = self.attention.block(earlier, stop)
        sums = check_attention_rows(weights, earlier)
        if self.rules.first_token == "exclude":
            weights, sums = self._without_first(weights, sums)
        token = torch.arange(start, stop, device=self.device)
        row = token - self._takes_previous_row(token).long() - earlier
        weights = weights.gather(1, row[..., None].expand(-1, -1, stop))
        own = torch.arange(stop, device=self.device)[None] == token[:, None]  # in a shifted row it is empty already
        if self.rules.self_attention == "renormalize":
            total = sums.gather(1, row)[..., None]
            rest = weights.masked_fill(own, 0).sum(-1, keepdim=True)
            weights = weights * torch.where(rest > 0, total / rest.clamp_min(torch.finfo(rest.dtype).tiny), 0)
        return weights.masked_fill(own, 0)

    def _without_first(self, weights: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """No edge leaves the first token, and what is left of a row sums to 1."""
        at = self.first.clamp_max(weights.shape[-1] - 1)[:, None, None].expand(-1, weights.shape[1], 1)
        weights = weights.scatter(2, at, 0.0)
        sums = weights.sum(-1)
        weights /= sums.clamp_min(torch.finfo(weights.dtype).tiny)[..., None]
        return weights, (sums > 0).to(sums.dtype)

    def _takes_previous_row(self, token: Int64[Tensor, " block"]) -> Bool[Tensor, "graphs block"]:
        later = token[None] > self.first[:, None]
        if self.rules.rows == "literal":
            return torch.zeros_like(later)
        return later if self.rules.rows == "emission_all" else later & self.generated[:, token]


def row_sum_tolerance(dtype: torch.dtype) -> float:
    """How far the sum of a row of attention may be from 1 by rounding; in bfloat16 a thousand weights add up."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 3e-2)


def check_attention_rows(weights: Float[Tensor, "graphs block stop"], start: int) -> Float[Tensor, "graphs block"]:
    """Attention as a causal LM must have it; a row may sum to less than 1 (padding, learned sinks).

    Returns:
        The row sums.

    Raises:
        GraphError: NaN or infinite, negative, non-causal, or more than a whole row.
    """
    low, high = torch.aminmax(weights)  # both are NaN if any weight is
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
    future = weights[..., start:].triu(1)
    if bool(future.any()):
        _, row, column = future.nonzero()[0].tolist()
        raise GraphError(
            f"attention: must be causal (zero above the diagonal), got {future[future != 0][0].item():g} at "
            f"[{start + row}, {start + column}]; row t is the reader t, and it reads tokens 0..t"
        )
    sums = weights.sum(-1)
    tolerance = row_sum_tolerance(weights.dtype)
    if bool((sums > 1 + tolerance).any()):
        over = (sums > 1 + tolerance).nonzero()[0]
        raise GraphError(
            f"attention: a row must sum to at most 1, got {sums[tuple(over)].item():g} in row {start + int(over[-1])}; "
            "average over heads and layers, do not sum them (or build with FlowGraph.from_dense)"
        )
    return sums
