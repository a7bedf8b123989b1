"""``AttentionRows``: aggregated attention rows of a batch, computed a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from flowgraph.attention.head_aggregation import HeadAggregator
from flowgraph.attention.layer_record import LayerRecord
from flowgraph.attention.layers_and_heads import HeadSelector
from flowgraph.errors import InvalidInputError
from flowgraph.memory import require_memory

BLOCK = 128
_SCRATCH_BYTES = 2**25
"""Softmax weights of all heads held at once; small blocks stay in cache and were the fastest measured."""


@dataclass(frozen=True)
class WeightedLayer:
    """One layer of an architecture that hands out its weights itself: aggregated at once, T x T per sequence."""

    matrix: Float[Tensor, "batch tokens tokens"]

    @classmethod
    def of(
        cls,
        aggregator: HeadAggregator,
        weights: Float[Tensor, "batch heads tokens tokens"],
        readable: Bool[Tensor, "batch tokens"],
    ) -> WeightedLayer:
        weights = weights.float()
        chosen = aggregator.choose(iter([(0, weights)]), readable, weights.shape[1])
        return cls(aggregator.join(weights, chosen, None))

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def select(self, items: slice | Tensor) -> WeightedLayer:
        return WeightedLayer(self.matrix[items])

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        return self.matrix[:, start:stop, :stop]


@dataclass(frozen=True)
class RecomputedLayer:
    """One layer whose rows are recomputed from q and k whenever they are asked for."""

    record: LayerRecord
    aggregator: HeadAggregator
    chosen: Int[Tensor, "batch kept"] | None

    @classmethod
    def of(
        cls, record: LayerRecord, aggregator: HeadAggregator, readable: Bool[Tensor, "batch tokens"]
    ) -> RecomputedLayer:
        with torch.no_grad():
            return cls(record, aggregator, aggregator.choose(_all_weights(record), readable, record.num_heads))

    def select(self, items: slice | Tensor) -> RecomputedLayer:
        chosen = None if self.chosen is None else self.chosen[items]
        return RecomputedLayer(self.record.select(items), self.aggregator, chosen)

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        out = torch.zeros(self.record.shape[0], stop - start, stop, device=self.record.device)
        step = _step(self.record, stop)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            weights = self.record.weights(first, last)
            joined = self.aggregator.join(weights, self.chosen, self.record.value_norm)
            out[:, first - start : last - start, :last] = joined
        return out


def _all_weights(record: LayerRecord) -> Iterator[tuple[int, Tensor]]:
    tokens = record.shape[1]
    step = _step(record, tokens)
    for start in range(0, tokens, step):
        yield start, record.weights(start, min(start + step, tokens))


def _step(record: LayerRecord, stop: int) -> int:
    return max(1, min(BLOCK, _SCRATCH_BYTES // (4 * record.shape[0] * record.num_heads * stop)))


Layer = WeightedLayer | RecomputedLayer


def _mean_block(
    layers: Sequence[Layer], start: int, stop: int, device: torch.device
) -> Float[Tensor, "batch block stop"]:
    with torch.no_grad():
        total = layers[0].block(start, stop).to(device, copy=True)
        for layer in layers[1:]:
            total += layer.block(start, stop).to(device)
    return total / len(layers)


class AttentionRows:
    """Attention of a batch, averaged over the chosen layers, heads joined; rows are readers.

    Nothing of size T x T is held, except for architectures that hand out their weights and no queries: a block is
    recomputed from the layers' queries and keys each time it is asked for, so read a block once per use. Rows of
    padding are zero. Sequences that agree up to the end of a block (many responses of one prompt) have the same rows
    there: with ``input_ids`` they are computed once and handed to each.

    Attributes:
        num_tokens, batch_size: shape of the padded batch.
        layers: indices of the layers averaged.
        attention_mask: ``[batch, tokens]`` bool, False on padding.
        device: where rows are added up: the device of the first chosen layer.
    """

    def __init__(
        self,
        records: Sequence[LayerRecord | WeightedLayer],
        layers: Sequence[int],
        aggregator: HeadAggregator,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> None:
        (self.batch_size, self.num_tokens), self.device = records[0].shape, records[0].device
        if attention_mask is None:
            attention_mask = torch.ones(self.batch_size, self.num_tokens, dtype=torch.int64)
        if tuple(attention_mask.shape) != (self.batch_size, self.num_tokens):
            raise InvalidInputError(
                f"attention_mask: must have shape ({self.batch_size}, {self.num_tokens}) like input_ids, "
                f"got {tuple(attention_mask.shape)}; pass the mask of the forward pass"
            )
        self.attention_mask = attention_mask.to(self.device).bool()
        self.layers = tuple(layers)
        self._layers: list[Layer] = [
            record
            if isinstance(record, WeightedLayer)
            else RecomputedLayer.of(record, aggregator, self.attention_mask.to(record.device))
            for record in records
        ]
        # Heads chosen per sequence depend on all of it, so nothing can be shared then.
        self._prefixes = None
        if input_ids is not None and self.batch_size > 1 and not isinstance(aggregator.heads, HeadSelector):
            self._prefixes = SharedPrefixes(input_ids, self.attention_mask)
        self._shared: tuple[list[int], list[Layer]] = ([], [])

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Rows of the queries ``[start, stop)``, float32, over the keys ``[0, stop)``: causality leaves no others.

        Cost: heads x layers x block x stop x dim, for each sequence that differs from the others before ``stop``.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise InvalidInputError(
                f"start, stop: must satisfy 0 <= start < stop <= {self.num_tokens} tokens, got {start} and {stop}; "
                "use .blocks() to read them all"
            )
        layers, copies = self._layers_for(stop)
        rows = _mean_block(layers, start, stop, self.device)
        if copies is not None:
            rows = rows[copies]
        return rows.mul_(self.attention_mask[:, start:stop, None])

    def _layers_for(self, stop: int) -> tuple[Sequence[Layer], Tensor | None]:
        """The layers of the sequences that differ before ``stop``, and which of them each sequence is like."""
        if self._prefixes is None:
            return self._layers, None
        different, copies = self._prefixes.before(stop)
        if len(different) == self.batch_size:
            return self._layers, None
        if self._shared[0] != different:
            items = slice(different[0], different[0] + 1) if len(different) == 1 else torch.tensor(different)
            self._shared = (different, [layer.select(items) for layer in self._layers])
        return self._shared[1], copies.to(self.device)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Float[Tensor, "batch block stop"]]]:
        """All rows in order, as (first row, block)."""
        for start in range(0, self.num_tokens, size):
            yield start, self.block(start, min(start + size, self.num_tokens))

    def dense(self) -> Float[Tensor, "batch tokens tokens"]:
        """All rows at once.

        Raises:
            MemoryLimitError: ``4 * batch * tokens ** 2`` bytes would not fit.
        """
        what = f"dense rows of {self.batch_size} x {self.num_tokens} tokens"
        needed = 4 * self.batch_size * self.num_tokens**2
        require_memory(needed, what, "read them with .blocks() instead", self.device)
        matrix = torch.zeros(self.batch_size, self.num_tokens, self.num_tokens, device=self.device)
        for start, rows in self.blocks():
            matrix[:, start : start + rows.shape[1], : rows.shape[2]] = rows
        return matrix

    def sequence(self, item: int = 0) -> SequenceRows:
        """The rows of one sequence of the batch, padding removed.

        Raises:
            InvalidInputError: no such sequence.
        """
        if not 0 <= item < self.batch_size:
            raise InvalidInputError(
                f"item: must lie in 0..{self.batch_size - 1}, got {item}; the batch has {self.batch_size} sequences"
            )
        layers = [layer.select(slice(item, item + 1)) for layer in self._layers]
        return SequenceRows(layers, self.attention_mask[item].nonzero().flatten(), self.device)

    def layer_rows(self, item: int = 0) -> Float[Tensor, "layers tokens tokens"]:
        """The rows of one sequence, padding removed, for each chosen layer apart, in the order of ``layers``.

        Their mean over layers is ``sequence(item)``. From ``capture(..., layers="all")`` it is what
        :func:`flowgraph.attention_rollout` takes.

        Raises:
            InvalidInputError: no such sequence.
            MemoryLimitError: ``4 * layers * tokens ** 2`` bytes would not fit.

        Cost: as much as reading every row once.
        """
        rows = self.sequence(item)
        layers, tokens = len(rows.layers), rows.num_tokens
        what = f"rows of {layers} layers x {tokens} tokens"
        require_memory(4 * layers * tokens**2, what, "capture fewer layers at a time", self.device)
        out = torch.zeros(layers, tokens, tokens, device=self.device)
        for layer, of_layer in zip(rows.layers, out, strict=True):
            alone = SequenceRows([layer], rows.positions, rows.device)
            for start in range(0, tokens, BLOCK):
                stop = min(start + BLOCK, tokens)
                of_layer[start:stop, :stop] = alone.block(start, stop)[0]
        return out

    def __repr__(self) -> str:
        return f"AttentionRows({self.batch_size} x {self.num_tokens} tokens, layers {list(self.layers)})"


@dataclass(frozen=True)
class SequenceRows:
    """One sequence of a batch as a :class:`~flowgraph.propagation.row_sources.RowSource`."""

    layers: Sequence[Layer]
    positions: Int[Tensor, " tokens"]
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    def block(self, start: int, stop: int) -> Float[Tensor, "1 block stop"]:
        """Rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        first, last = int(self.positions[start]), int(self.positions[stop - 1]) + 1
        block = _mean_block(self.layers, first, last, self.device)
        return block[:, self.positions[start:stop] - first][:, :, self.positions[:stop]]


class SharedPrefixes:
    """Which sequences of a batch are the same up to a position: they stand together once sorted."""

    def __init__(self, input_ids: Int[Tensor, "batch tokens"], readable: Bool[Tensor, "batch tokens"]) -> None:
        ids = torch.where(readable.cpu(), input_ids.cpu().long(), -1)  # what padding holds is of no account
        rows = ids.tolist()
        self.order = sorted(range(len(rows)), key=rows.__getitem__)
        ordered = ids[self.order]
        differ = ordered[1:] != ordered[:-1]
        first_difference = torch.where(differ.any(-1), differ.long().argmax(-1), ids.shape[1])
        self.agree = torch.cat([torch.zeros(1, dtype=torch.int64), first_difference])
        """Tokens that a sequence shares with the one sorted before it."""

    def before(self, stop: int) -> tuple[list[int], Int[Tensor, " batch"]]:
        """One sequence of each kind, and for every sequence the number of its kind."""
        new = self.agree < stop
        new[0] = True
        kind = torch.empty(len(self.order), dtype=torch.int64)
        kind[self.order] = new.cumsum(0) - 1
        return [self.order[at] for at in new.nonzero().flatten().tolist()], kind
