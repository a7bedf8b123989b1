"""``AttentionRows``: aggregated attention rows of a batch, computed a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

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
    """One layer that returns its attention weights and no queries: its heads are aggregated immediately.

    Attributes:
        matrix: the aggregated rows, T x T for each sequence.
    """

    matrix: Float[Tensor, "batch tokens tokens"]

    @classmethod
    def of(
        cls,
        aggregator: HeadAggregator,
        weights: Float[Tensor, "batch heads tokens tokens"],
        readable: Bool[Tensor, "batch tokens"],
    ) -> WeightedLayer:
        """Aggregate the heads of returned weights; ``readable`` is False on padding."""
        weights = weights.float()
        all_rows = iter([(0, weights)])
        # The choice of heads reads all rows, which are one block here.
        chosen = aggregator.choose(all_rows, readable, num_heads=weights.shape[1])
        return cls(aggregator.join(weights, chosen, None))

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.matrix.device

    def select(self, items: slice | Tensor) -> WeightedLayer:
        """Return the layer of some sequences of the batch."""
        return WeightedLayer(self.matrix[items])

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Return the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        return self.matrix[:, start:stop, :stop]


@dataclass(frozen=True)
class RecomputedLayer:
    """One layer whose rows are recomputed from queries and keys each time a block is read.

    Attributes:
        record: queries, keys and mask.
        aggregator: how the heads are joined.
        chosen: the heads of each sequence that are averaged; None for all heads.
    """

    record: LayerRecord
    aggregator: HeadAggregator
    chosen: Int[Tensor, "batch kept"] | None

    @classmethod
    def of(
        cls, record: LayerRecord, aggregator: HeadAggregator, readable: Bool[Tensor, "batch tokens"]
    ) -> RecomputedLayer:
        """Choose the heads of each sequence; ``readable`` is False on padding."""
        with torch.no_grad():
            chosen = aggregator.choose(_all_weights(record), readable, record.num_heads)
        return cls(record, aggregator, chosen)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.record.shape

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.record.device

    def select(self, items: slice | Tensor) -> RecomputedLayer:
        """Return the layer of some sequences of the batch."""
        chosen = None if self.chosen is None else self.chosen[items]
        return RecomputedLayer(self.record.select(items), self.aggregator, chosen)

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Recompute the part that each head has in the same rows; the parts of all heads sum to :meth:`block`.

        Raises:
            InvalidInputError: heads that are joined by their maximum.
        """
        return self.aggregator.split(self.record.weights(start, stop), self.chosen, self.record.value_norm)

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Recompute the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        batch_size, _ = self.record.shape
        rows = torch.zeros(batch_size, stop - start, stop, device=self.record.device, dtype=torch.float32)
        # The weights of all heads are large, so a block is computed in steps of a few rows.
        step = _rows_per_step(self.record, stop)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            weights = self.record.weights(first, last)
            joined = self.aggregator.join(weights, self.chosen, self.record.value_norm)
            rows[:, first - start : last - start, :last] = joined
        return rows


def _all_weights(record: LayerRecord) -> Iterator[tuple[int, Tensor]]:
    """Compute all rows of a layer in order, heads apart, as (first row, block)."""
    _, num_tokens = record.shape
    step = _rows_per_step(record, num_tokens)
    for start in range(0, num_tokens, step):
        yield start, record.weights(start, min(start + step, num_tokens))


def _rows_per_step(record: LayerRecord, stop: int) -> int:
    """Count the rows whose float32 weights over ``stop`` keys fit the scratch memory, at least one."""
    batch_size, _ = record.shape
    bytes_per_row = 4 * batch_size * record.num_heads * stop
    return max(1, min(BLOCK, _SCRATCH_BYTES // bytes_per_row))


@runtime_checkable
class Layer(Protocol):
    """The rows of one layer of a batch, heads joined."""

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        ...

    def select(self, items: slice | Tensor) -> Layer:
        """Return the layer of some sequences of the batch."""
        ...

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Return the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        ...


@runtime_checkable
class SplittableLayer(Layer, Protocol):
    """A layer that sums over its heads, and can compute the part of each."""

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Return the parts of the heads in the rows ``[start, stop)``; their sum over heads is ``block``."""
        ...


Reduction = Literal["mean", "max", "sum"]


def _joined_block(
    layers: Sequence[Layer], start: int, stop: int, device: torch.device, reduction: Reduction
) -> Float[Tensor, "batch block stop"]:
    """Join a block of rows over layers, which may lie on several devices."""
    with torch.no_grad():
        # The first block may be a view of stored rows, so it is copied before others are added.
        total = layers[0].block(start, stop).to(device, copy=True)
        for layer in layers[1:]:
            block = layer.block(start, stop).to(device)
            if reduction == "max":
                torch.maximum(total, block, out=total)
            else:
                total += block
    return total / len(layers) if reduction == "mean" else total


class AttentionRows:
    """Attention of a batch, averaged over the chosen layers, with heads joined: ``rows[b, t, s]``, t reads s.

    No T x T matrix is held, except for architectures that return their weights and no queries. A block is
    recomputed from the layers' queries and keys each time it is read, so read a block once per use. Rows of
    padding are zero. Sequences that agree up to the end of a block (many responses to one prompt) have the same rows
    there: with ``input_ids``, these rows are computed once for all of them.

    Attributes:
        num_tokens, batch_size: shape of the padded batch.
        layers: indices of the layers averaged.
        attention_mask: ``[batch, tokens]`` bool, False on padding.
        device: where rows are added up: the device of the first chosen layer.
        normalization: how the rows become capacities, see :class:`flowgraph.EdgeRules`.
    """

    normalization = "attention"

    def __init__(
        self,
        records: Sequence[LayerRecord | WeightedLayer],
        layers: Sequence[int],
        aggregator: HeadAggregator,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> None:
        self._set_shape(records[0], layers, attention_mask, "mean")
        self._layers: list[Layer] = []
        for record in records:
            if isinstance(record, WeightedLayer):
                self._layers.append(record)
            else:
                readable = self.attention_mask.to(record.device)
                self._layers.append(RecomputedLayer.of(record, aggregator, readable))

        # Heads selected by a statistic depend on the complete sequence, so equal prefixes have different rows.
        selects_heads = isinstance(aggregator.heads, HeadSelector)
        self._share_prefixes(None if selects_heads else input_ids)

    @classmethod
    def of_layers(
        cls,
        layers: Sequence[Layer],
        indices: Sequence[int],
        attention_mask: Shaped[Tensor, "batch tokens"] | None,
        input_ids: Int[Tensor, "batch tokens"] | None,
        *,
        reduction: Reduction = "mean",
    ) -> AttentionRows:
        """Join layers whose heads are joined already.

        Args:
            layers: the rows of each layer.
            indices: index of each layer in the model.
            attention_mask: 1 on tokens, 0 on padding; None for no padding.
            input_ids: the ids, where rows depend on earlier tokens only; equal prefixes are then computed once.
            reduction: ``"mean"``, ``"max"`` or ``"sum"`` over layers.
        """
        # The constructor aggregates heads; joined layers skip it and set its fields directly.
        rows = cls.__new__(cls)
        rows._set_shape(layers[0], indices, attention_mask, reduction)
        rows._layers = list(layers)
        rows._share_prefixes(input_ids)
        return rows

    def _set_shape(
        self,
        first: Layer | LayerRecord,
        indices: Sequence[int],
        attention_mask: Shaped[Tensor, "batch tokens"] | None,
        reduction: Reduction,
    ) -> None:
        """Set the fields that do not depend on how the layers are stored."""
        self.batch_size, self.num_tokens = first.shape
        self.device = first.device
        self._reduction: Reduction = reduction
        if attention_mask is None:
            attention_mask = torch.ones(self.batch_size, self.num_tokens, dtype=torch.int64)
        if tuple(attention_mask.shape) != (self.batch_size, self.num_tokens):
            raise InvalidInputError(
                f"attention_mask: must have shape ({self.batch_size}, {self.num_tokens}) like input_ids, "
                f"got {tuple(attention_mask.shape)}; pass the mask of the forward pass"
            )
        self.attention_mask = attention_mask.to(self.device).bool()
        self.layers = tuple(indices)

    def _share_prefixes(self, input_ids: Int[Tensor, "batch tokens"] | None) -> None:
        """Prepare to compute the rows of equal prefixes once; None where rows depend on later tokens."""
        self._prefixes: SharedPrefixes | None = None
        if input_ids is not None and self.batch_size > 1:
            self._prefixes = SharedPrefixes(input_ids, self.attention_mask)
        # The distinct sequences of the latest block and their layers, kept because the next block often has the same.
        self._distinct: list[int] = []
        self._distinct_layers: list[Layer] = []

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Compute the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``; later keys are not read.

        Returns:
            float32 rows.

        Raises:
            InvalidInputError: rows outside the batch.

        Cost: heads x layers x block x stop x dim, for each sequence that differs from the others before ``stop``.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise InvalidInputError(
                f"start, stop: must satisfy 0 <= start < stop <= {self.num_tokens} tokens, got {start} and {stop}; "
                "use .blocks() to read them all"
            )
        # Sequences that begin with the same tokens have the same rows there, so each distinct one is computed once.
        layers, distinct_of = self._layers_for(stop)
        rows = _joined_block(layers, start, stop, self.device, self._reduction)
        if distinct_of is not None:
            rows = rows[distinct_of]
        # Padding reads nothing.
        return rows.mul_(self.attention_mask[:, start:stop, None])

    def _layers_for(self, stop: int) -> tuple[Sequence[Layer], Tensor | None]:
        """Return the layers of the distinct sequences before ``stop``, and which of these each sequence equals.

        The second is None where all sequences are computed.
        """
        if self._prefixes is None:
            return self._layers, None
        distinct, distinct_of = self._prefixes.before(stop)
        if len(distinct) == self.batch_size:
            return self._layers, None
        if self._distinct != distinct:
            # A slice gives views; several sequences have to be copied.
            items: slice | Tensor = torch.tensor(distinct)
            if len(distinct) == 1:
                items = slice(distinct[0], distinct[0] + 1)
            self._distinct = distinct
            self._distinct_layers = [layer.select(items) for layer in self._layers]
        return self._distinct_layers, distinct_of.to(self.device)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Float[Tensor, "batch block stop"]]]:
        """Yield all rows in order, as (first row, block)."""
        for start in range(0, self.num_tokens, size):
            yield start, self.block(start, min(start + size, self.num_tokens))

    def dense(self) -> Float[Tensor, "batch tokens tokens"]:
        """Compute all rows at once.

        Raises:
            MemoryLimitError: ``4 * batch * tokens ** 2`` bytes would not fit.

        Cost: as much as reading every row once.
        """
        what = f"dense rows of {self.batch_size} x {self.num_tokens} tokens"
        needed = 4 * self.batch_size * self.num_tokens**2
        require_memory(needed, what, "read them with .blocks() instead", self.device)
        matrix = torch.zeros(self.batch_size, self.num_tokens, self.num_tokens, device=self.device, dtype=torch.float32)
        for start, rows in self.blocks():
            stop = start + rows.shape[1]
            matrix[:, start:stop, :stop] = rows
        return matrix

    def sequence(self, item: int = 0) -> SequenceRows:
        """Return the rows of one sequence of the batch, without its padding.

        Raises:
            InvalidInputError: no such sequence.
        """
        if not 0 <= item < self.batch_size:
            raise InvalidInputError(
                f"item: must lie in 0..{self.batch_size - 1}, got {item}; the batch has {self.batch_size} sequences"
            )
        layers = [layer.select(slice(item, item + 1)) for layer in self._layers]
        positions = self.attention_mask[item].nonzero().flatten()
        return SequenceRows(layers, positions, self.device, self._reduction, self.normalization)

    def layer_rows(self, item: int = 0) -> Float[Tensor, "layers tokens tokens"]:
        """Compute the rows of one sequence for each chosen layer separately, without its padding.

        Their mean over layers is ``sequence(item)``. From ``capture(..., layers="all")`` it is the argument of
        :func:`flowgraph.attention_rollout`.

        Returns:
            float32 rows, with layers in the order of ``layers``.

        Raises:
            InvalidInputError: no such sequence.
            MemoryLimitError: ``4 * layers * tokens ** 2`` bytes would not fit.

        Cost: as much as reading every row once.
        """
        # Memory is checked before anything is computed.
        sequence = self.sequence(item)
        num_layers = len(sequence.layers)
        num_tokens = sequence.num_tokens
        what = f"rows of {num_layers} layers x {num_tokens} tokens"
        require_memory(4 * num_layers * num_tokens**2, what, "capture fewer layers at a time", self.device)
        matrices = torch.zeros(num_layers, num_tokens, num_tokens, device=self.device, dtype=torch.float32)
        for layer, matrix in zip(sequence.layers, matrices, strict=True):
            of_layer = SequenceRows([layer], sequence.positions, sequence.device)
            for start in range(0, num_tokens, BLOCK):
                stop = min(start + BLOCK, num_tokens)
                matrix[start:stop, :stop] = of_layer.block(start, stop)[0]
        return matrices

    def __repr__(self) -> str:
        """Show the size of the batch and the layers."""
        return f"AttentionRows({self.batch_size} x {self.num_tokens} tokens, layers {list(self.layers)})"


@dataclass(frozen=True)
class SequenceRows:
    """One sequence of a batch as a :class:`~flowgraph.propagation.row_sources.RowSource`.

    Attributes:
        layers: the layers of this sequence alone, padding included.
        positions: position of each token in the padded batch.
        device: where rows are added up.
        reduction: how layers are joined.
        normalization: how the rows become capacities, see :class:`flowgraph.EdgeRules`.
    """

    layers: Sequence[Layer]
    positions: Int[Tensor, " tokens"]
    device: torch.device
    reduction: Reduction = "mean"
    normalization: str = "attention"

    @property
    def num_tokens(self) -> int:
        """T, without padding."""
        return self.positions.numel()

    def block(self, start: int, stop: int) -> Float[Tensor, "1 block stop"]:
        """Compute the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        # Read the block of the padded batch that holds these rows, then drop padding from its rows and columns.
        first = int(self.positions[start])
        last = int(self.positions[stop - 1]) + 1
        padded = _joined_block(self.layers, first, last, self.device, self.reduction)
        rows = padded[:, self.positions[start:stop] - first]
        return rows[:, :, self.positions[:stop]]

    def by_layer(self, row: int, column: int) -> Float[Tensor, " layers"]:
        """Split the weight of one cell into the parts of the layers, which sum to it.

        Args:
            row: the token that reads.
            column: the token that is read, at most ``row``.

        Raises:
            InvalidInputError: layers that are joined by their maximum.

        Cost: one row of each layer.
        """
        share = self._share_of_layer()
        position = int(self.positions[row])
        read = int(self.positions[column])
        parts = [float(layer.block(position, position + 1)[0, 0, read]) * share for layer in self.layers]
        return torch.tensor(parts, dtype=torch.float64)

    def by_head(self, row: int, column: int) -> Float[Tensor, "layers heads"]:
        """Split the weight of one cell into the parts of layers and heads, which sum to it.

        Layers with fewer heads than others are padded by zeros.

        Args:
            row: the token that reads.
            column: the token that is read, at most ``row``.

        Raises:
            InvalidInputError: layers or heads that are not summed, such as a maximum or a power of the joined heads.

        Cost: one row of each layer and head.
        """
        share = self._share_of_layer()
        position = int(self.positions[row])
        read = int(self.positions[column])
        parts = []
        for layer in self.layers:
            if not isinstance(layer, SplittableLayer):
                raise InvalidInputError(
                    f"heads: must be summed to be told apart, got rows of {type(layer).__name__}, whose heads were "
                    "joined before; use by_layer, or a capacity that sums over heads: 'sharp', 'vtrace', 'attention'"
                )
            with torch.no_grad():
                heads_of_cell = layer.head_block(position, position + 1)[0, :, 0, read]
            parts.append(heads_of_cell.double().cpu() * share)

        most_heads = max(part.numel() for part in parts)
        split = torch.zeros(len(parts), most_heads, dtype=torch.float64)
        for index, part in enumerate(parts):
            split[index, : part.numel()] = part
        return split

    def _share_of_layer(self) -> float:
        """Return the factor of each layer's rows in the joined ones."""
        if self.reduction == "max":
            raise InvalidInputError(
                "layers: must be summed to be told apart, got their maximum; use a capacity that sums over layers, "
                "such as 'sharp', 'vtrace' or 'attention'"
            )
        return 1 / len(self.layers) if self.reduction == "mean" else 1.0


class SharedPrefixes:
    """The groups of sequences of a batch that are equal up to a position.

    Sorted sequences that share a prefix are neighbours, so it is enough to compare each with the one before it.

    Attributes:
        order: the sequences, sorted by their ids.
        num_shared: tokens that each sequence of this order shares with the one before it; 0 for the first.
    """

    def __init__(self, input_ids: Int[Tensor, "batch tokens"], readable: Bool[Tensor, "batch tokens"]) -> None:
        # The ids of padding do not matter: they are all made equal.
        ids = torch.where(readable.cpu(), input_ids.cpu().long(), -1)
        sequences = ids.tolist()
        # Equal beginnings are neighbours in lexicographic order.
        self.order = sorted(range(len(sequences)), key=lambda item: sequences[item])

        # argmax finds the first difference, and 0 where there is none.
        sorted_ids = ids[self.order]
        num_tokens = ids.shape[1]
        differs = sorted_ids[1:] != sorted_ids[:-1]
        first_difference = differs.long().argmax(-1)
        first_difference = torch.where(differs.any(-1), first_difference, num_tokens)
        shared_by_first = torch.zeros(1, dtype=torch.int64)
        self.num_shared = torch.cat([shared_by_first, first_difference])

    def before(self, stop: int) -> tuple[list[int], Int[Tensor, " batch"]]:
        """Group the sequences that are equal in their first ``stop`` tokens.

        Returns:
            One sequence of each group, and the number of the group that each sequence belongs to.
        """
        # A group starts where the first difference from the sequence before it lies inside the first tokens.
        starts_group = self.num_shared < stop
        starts_group[0] = True
        group = torch.empty(len(self.order), dtype=torch.int64)
        group[self.order] = starts_group.cumsum(0) - 1
        first_places = starts_group.nonzero().flatten().tolist()
        representatives = [self.order[place] for place in first_places]
        return representatives, group
