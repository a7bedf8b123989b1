"""Three ways to store C: dense matrices, the edges of a PyG graph, or rows that are computed on demand.

All three yield the same blocks of rows (:class:`~flowgraph.propagation.block_substitution.BlockOperator`), so one
solver serves them. Weights keep their own dtype in memory and are converted to float64 block by block: each float32
number is a float64 number as well, so the conversion is exact, and the copy stays small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch_geometric.utils import segment

from flowgraph.propagation.block_substitution import BLOCK
from flowgraph.propagation.row_sources import RowSource
from flowgraph.propagation.topology import EdgeBlocks, Topology

_STREAMED_BLOCK_NUMBERS = 2**21
"""Streamed blocks hold about this many numbers of each sequence: 16 MiB in float64."""
_MIN_STREAMED_ROWS = 32

# Dense rows --------------------------------------------------------------------------------------------------


class DenseRows:
    """Rows ``[start, stop)`` of dense matrices, columns ``[0, stop)``.

    Attributes:
        weights: ``[graphs, block, stop]`` the rows in their own dtype.
        inner: ``[graphs, block, block]`` float64, the strictly lower triangle of the last columns.
    """

    def __init__(
        self,
        weights: Float[Tensor, "graphs block stop"],
        float64_weights: Float64[Tensor, "graphs block stop"],
    ) -> None:
        num_rows, stop = weights.shape[-2:]
        start = stop - num_rows
        self.weights = weights
        self.inner: Float64[Tensor, "graphs block block"] = float64_weights[..., start:].tril(-1)
        self._start = start
        self._before = float64_weights[..., :start]

    def pull(self, x: Tensor) -> Tensor:
        return (self._before @ x[:, : self._start, None]).squeeze(-1)

    def push(self, y: Tensor, out: Tensor) -> None:
        out[:, : self._start] += (y[:, None, :] @ self._before).squeeze(1)


class _Float64Buffer:
    """Float64 copies of blocks of rows, one at a time in the same memory.

    Allocating fresh memory for each block would take more time than the conversion.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._buffer: Tensor | None = None

    def rows(self, weights: Float[Tensor, "graphs block stop"]) -> DenseRows:
        """Pair the rows with their float64 copy, which is valid until the next call."""
        if weights.dtype == torch.float64:
            return DenseRows(weights, weights)

        graphs, block, stop = weights.shape
        if self._buffer is None or self._buffer.shape[1] < block:
            shape = (graphs, block, self.num_tokens)
            self._buffer = torch.empty(shape, dtype=torch.float64, device=weights.device)
        float64_weights = self._buffer[:, :block, :stop]
        float64_weights.copy_(weights)
        return DenseRows(weights, float64_weights)


class DenseOperator:
    """C as dense matrices, read in place; the diagonal and everything above it are ignored.

    Args:
        matrix: ``[graphs, tokens, tokens]``, ``matrix[b, t, s]`` the weight of the edge s -> t.
        block: tokens per block.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "graphs tokens tokens"],
        block: int = BLOCK,
    ) -> None:
        self.matrix = matrix
        self.block = block
        self.num_tokens = matrix.shape[-1]
        self._buffer = _Float64Buffer(self.num_tokens)

    def rows(self, start: int, stop: int) -> DenseRows:
        """Read the rows as a view; their float64 copy is valid until the next call."""
        return self._buffer.rows(self.matrix[:, start:stop, :stop])


class StreamedOperator:
    """C whose rows are computed on demand and dropped after use: memory O(graphs x block x T).

    Args:
        source: the rows. Long texts are read in smaller blocks, so that the memory of a block stays bounded.
    """

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.num_tokens = source.num_tokens
        fitting_rows = _STREAMED_BLOCK_NUMBERS // max(self.num_tokens, 1)
        self.block = max(_MIN_STREAMED_ROWS, min(BLOCK, fitting_rows))
        self._buffer = _Float64Buffer(self.num_tokens)

    def rows(self, start: int, stop: int) -> DenseRows:
        """Compute the rows; their float64 copy is valid until the next call."""
        return self._buffer.rows(self.source.block(start, stop))


# Edges -------------------------------------------------------------------------------------------------------


class SparseOperator:
    """C as the edges of a PyG graph or batch: one gather and one scatter per block.

    Args:
        topology: the structure of the graph or batch; its edge blocks serve every solve on it.
        weight: ``[E]`` in the order of the graph.
    """

    def __init__(self, topology: Topology, weight: Float[Tensor, " edges"]) -> None:
        self.blocks: EdgeBlocks = topology.blocks
        self.num_graphs = topology.num_graphs
        self.num_tokens = self.blocks.num_tokens
        self.block = self.blocks.block
        self.weight = weight
        if self.blocks.order is not None:
            self.weight = weight[self.blocks.order]

    def rows(self, start: int, stop: int) -> _SparseRows:
        """Read the rows of one block; ``start`` is a multiple of the block size."""
        blocks = self.blocks
        number = start // self.block
        edges = slice(blocks.ends[number], blocks.ends[number + 1])
        cells = slice(blocks.inner_ends[number], blocks.inner_ends[number + 1])

        # First edge of each row, counted from the first edge of the block.
        rows_per_block = self.num_graphs * self.block
        first_row = number * rows_per_block
        row_ptr = blocks.row_ptr[first_row : first_row + rows_per_block + 1] - edges.start

        # The triangular system of the block, as a dense matrix.
        inner = torch.zeros(
            self.num_graphs,
            self.block,
            self.block,
            dtype=torch.float64,
            device=self.weight.device,
        )
        inner_weight = self.weight[blocks.inner_edge[cells]]
        inner.view(-1)[blocks.inner_cell[cells]] = inner_weight.double()

        return _SparseRows(
            source=blocks.source[edges],
            row=blocks.row[edges],
            row_ptr=row_ptr,
            weight=self.weight[edges].double(),
            inner=inner,
        )


@dataclass
class _SparseRows:
    """The edges into one block of tokens, with the indices of :class:`~.topology.EdgeBlocks`."""

    source: Int64[Tensor, " edges"]
    row: Int64[Tensor, " edges"]
    row_ptr: Int64[Tensor, " rows_plus_1"]
    weight: Float64[Tensor, " edges"]
    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Tensor) -> Tensor:
        received = self.weight * x.view(-1).index_select(0, self.source)
        # A scatter over sorted rows.
        return segment(received, self.row_ptr, reduce="sum").view(self.inner.shape[:2])

    def push(self, y: Tensor, out: Tensor) -> None:
        accumulated = self.weight * y.reshape(-1).index_select(0, self.row)
        out.view(-1).scatter_add_(0, self.source, accumulated)
