"""``AttentionRows``: aggregated attention rows of a batch, computed a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgraph.attention.records import LayerRecord
from flowgraph.attention.selection import HeadSelector
from flowgraph.errors import InvalidInputError
from flowgraph.memory import require_memory

BLOCK = 128
_SCRATCH_BYTES = 2**26
"""Softmax weights of all heads held at once; small blocks stay in cache and were the fastest measured."""


class HeadAggregator:
    """``[batch, heads, block, stop]`` weights of one layer -> ``[batch, block, stop]``, heads joined by the rule."""

    def __init__(self, heads: str | Sequence[int] | HeadSelector, edge_weight: str = "attention") -> None:
        self.heads, self.edge_weight = heads, edge_weight

    def chosen(self, weights: Iterator[tuple[int, Tensor]], readable: Bool[Tensor, "batch tokens"], num_heads: int) -> Tensor | None:
        """Indices of the heads to average, or None for all; a selector reads the layer once to decide."""
        if isinstance(self.heads, HeadSelector):
            return self.heads.choose(_head_statistic(weights, self.heads.statistic, readable, num_heads))
        return None if isinstance(self.heads, str) else torch.tensor(list(self.heads))

    def join(self, weights: Tensor, chosen: Tensor | None, value_norm: Tensor | None) -> Float[Tensor, "batch block stop"]:
        """Mean (or max) over heads; a row keeps the sum that plain attention gives it."""
        if chosen is not None:
            weights = weights[:, chosen.to(weights.device)]
            value_norm = None if value_norm is None else value_norm[:, chosen.to(value_norm.device)]
        if self.heads != "max" and self.edge_weight == "attention":
            return weights.mean(1)
        total = weights.sum(-1).mean(1)
        if self.edge_weight == "value_norm" and value_norm is not None:
            weights = weights * value_norm[:, :, None, : weights.shape[-1]]
        joined = weights.amax(1) if self.heads == "max" else weights.mean(1)
        return joined * (total / joined.sum(-1).clamp_min(torch.finfo(joined.dtype).tiny))[..., None]


def _head_statistic(
    weights: Iterator[tuple[int, Tensor]], statistic: str, readable: Bool[Tensor, "batch tokens"], num_heads: int
) -> Float[Tensor, " heads"]:
    """Mean attention distance, or kurtosis of received attention, of each head over the batch."""
    batch, tokens = readable.shape
    distance = torch.zeros(num_heads, dtype=torch.float64)
    received = torch.zeros(batch, num_heads, tokens, dtype=torch.float64)
    for start, block in weights:
        stop = start + block.shape[2]
        block = (block * readable[:, None, start:stop, None].to(block.device)).double().cpu()
        gap = torch.arange(start, stop)[:, None] - torch.arange(block.shape[-1])[None]
        distance += torch.einsum("bhts,ts->h", block, gap.double())
        received[:, :, : block.shape[-1]] += block.sum(2)
    if statistic == "distance":
        return distance / readable.sum()
    spread = received - received.mean(-1, keepdim=True)
    variance = spread.square().mean(-1)
    return (spread.pow(4).mean(-1) / variance.square().clamp_min(torch.finfo(torch.float64).tiny) - 3).mean(0)


class EagerLayer:
    """One layer of an eager-only architecture: its weights exist already, so they are aggregated at once."""

    def __init__(self, aggregator: HeadAggregator, weights: Float[Tensor, "batch heads tokens tokens"]) -> None:
        # Fully masked rows of padding attend uniformly, future included: only the causal part is attention.
        weights = weights.float().tril()
        readable = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool)
        chosen = aggregator.chosen(iter([(0, weights)]), readable, weights.shape[1])
        self.matrix: Float[Tensor, "batch tokens tokens"] = aggregator.join(weights, chosen, None)
        self.shape = (weights.shape[0], weights.shape[2])
        self.device = weights.device

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        return self.matrix[:, start:stop, :stop]


@dataclass
class _RecomputedLayer:
    """One layer whose rows are recomputed from q and k whenever they are asked for."""

    record: LayerRecord
    aggregator: HeadAggregator
    readable: Bool[Tensor, "batch tokens"]
    _chosen: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._chosen = self.aggregator.chosen(self._weights(), self.readable, self.record.num_heads)

    def _step(self, stop: int) -> int:
        batch, heads = self.record.query.shape[:2]
        return max(1, min(BLOCK, _SCRATCH_BYTES // (4 * batch * heads * stop)))

    def _weights(self) -> Iterator[tuple[int, Tensor]]:
        tokens = self.record.query.shape[2]
        step = self._step(tokens)
        for start in range(0, tokens, step):
            yield start, self.record.weights(start, min(start + step, tokens))

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        out = self.record.query.new_zeros(self.record.query.shape[0], stop - start, stop, dtype=torch.float32)
        step = self._step(stop)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            weights = self.record.weights(first, last)
            out[:, first - start : last - start, :last] = self.aggregator.join(weights, self._chosen, self.record.value_norm)
        return out


class AttentionRows:
    """Attention of a batch, averaged over the chosen layers, heads joined; rows are readers.

    Nothing of size T x T is held: a block is recomputed from the layers' queries and keys each time it is asked
    for, so read a block once per use. Rows of padding are zero.

    Attributes:
        num_tokens, batch_size: shape of the padded batch.
        layers: indices of the layers averaged.
        attention_mask: ``[batch, tokens]`` bool, False on padding.
    """

    def __init__(
        self,
        records: Sequence[LayerRecord | EagerLayer],
        layers: Sequence[int],
        aggregator: HeadAggregator,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
    ) -> None:
        first = records[0]
        if isinstance(first, EagerLayer):
            (self.batch_size, self.num_tokens), self.device = first.shape, first.device
        else:
            self.batch_size, self.num_tokens, self.device = first.query.shape[0], first.query.shape[2], first.query.device
        if attention_mask is None:
            attention_mask = torch.ones(self.batch_size, self.num_tokens, dtype=torch.bool)
        if tuple(attention_mask.shape) != (self.batch_size, self.num_tokens):
            raise InvalidInputError(
                f"attention_mask: must have shape ({self.batch_size}, {self.num_tokens}) like input_ids, got {tuple(attention_mask.shape)}; "
                "pass the mask of the forward pass"
            )
        self.attention_mask = attention_mask.bool().to(self.device)
        self.layers = tuple(layers)
        self._layers = [
            record if isinstance(record, EagerLayer) else _RecomputedLayer(record, aggregator, self.attention_mask)
            for record in records
        ]

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block tokens"]:
        """Rows of the queries ``[start, stop)``, float32, over all keys. Cost: heads x layers x block x stop x dim."""
        rows = torch.zeros(self.batch_size, stop - start, self.num_tokens, device=self.device)
        with torch.no_grad():
            for layer in self._layers:
                rows[..., :stop] += layer.block(start, stop).to(self.device)
        rows /= len(self._layers)
        return rows * self.attention_mask[:, start:stop, None]

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Float[Tensor, "batch block tokens"]]]:
        """All rows in order, as (first row, block)."""
        for start in range(0, self.num_tokens, size):
            yield start, self.block(start, min(start + size, self.num_tokens))

    def dense(self) -> Float[Tensor, "batch tokens tokens"]:
        """All rows at once.

        Raises:
            MemoryLimitError: ``4 * batch * tokens ** 2`` bytes would not fit.
        """
        needed = 4 * self.batch_size * self.num_tokens**2
        require_memory(needed, f"dense rows of {self.batch_size} x {self.num_tokens} tokens", "read them with .blocks() instead", self.device)
        matrix = torch.empty(self.batch_size, self.num_tokens, self.num_tokens, device=self.device)
        for start, rows in self.blocks():
            matrix[:, start : start + rows.shape[1]] = rows
        return matrix

    def sequence(self, item: int = 0) -> SequenceRows:
        """The rows of one sequence of the batch, padding removed."""
        return SequenceRows(self, item, self.attention_mask[item].nonzero().flatten())

    def __repr__(self) -> str:
        return f"AttentionRows({self.batch_size} x {self.num_tokens} tokens, layers {self.layers[0]}..{self.layers[-1]} ({len(self.layers)}))"


@dataclass(frozen=True)
class SequenceRows:
    """One sequence of a batch as a :class:`~flowgraph.propagation.operators.RowSource`."""

    rows: AttentionRows
    item: int
    positions: Int[Tensor, " tokens"]

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def block(self, start: int, stop: int) -> Float[Tensor, "block tokens"]:
        first, last = int(self.positions[start]), int(self.positions[stop - 1]) + 1
        block = self.rows.block(first, last)[self.item]
        return block[self.positions[start:stop] - first][:, self.positions]
