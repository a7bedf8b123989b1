"""Three ways to hold C: a dense matrix, the edges of a PyG graph, or rows recomputed on demand.

All three present the same blocks of rows (:class:`~flowgraph.propagation.block_substitution.BlockOperator`), so there is
one solver. Weights keep their own dtype in memory and are widened to float64 block by block: a float32 weight
is an exact float64 number, so nothing is lost and the copy stays small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch_geometric.utils import segment

from flowgraph.propagation.block_substitution import BLOCK
from flowgraph.propagation.row_sources import RowSource
from flowgraph.propagation.topology import Topology


class DenseRows:
    """Rows ``[start, stop)`` of dense matrices, columns ``[0, stop)``, in their own precision and in float64."""

    def __init__(self, weights: Float[Tensor, "graphs block stop"], wide: Float64[Tensor, "graphs block stop"]) -> None:
        self.weights, start = weights, weights.shape[-1] - weights.shape[-2]
        self._before = wide[..., :start]
        self.inner: Float64[Tensor, "graphs block block"] = wide[..., start:].tril(-1)

    def pull(self, x: Tensor) -> Tensor:
        return (self._before @ x[:, : self._before.shape[-1], None]).squeeze(-1)

    def push(self, y: Tensor, out: Tensor) -> None:
        out[:, : self._before.shape[-1]] += (y[:, None, :] @ self._before).squeeze(1)


_BLOCK_NUMBERS, _FEWEST_ROWS = 2**21, 32
"""Streamed blocks hold about this many numbers of each sequence: 16 MiB in float64."""


class _Widening:
    """Blocks of rows in float64, one at a time in the same memory: fresh pages cost more than the conversion."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self._scratch = num_tokens, torch.empty(0)

    def rows(self, weights: Float[Tensor, "graphs block stop"]) -> DenseRows:
        if weights.dtype == torch.float64:
            return DenseRows(weights, weights)
        graphs, block, stop = weights.shape
        if self._scratch.shape[1:2] < (block,):
            shape = (graphs, block, self.num_tokens)
            self._scratch = torch.empty(shape, dtype=torch.float64, device=weights.device)
        return DenseRows(weights, self._scratch[:, :block, :stop].copy_(weights))


class DenseOperator:
    """C as a dense batch ``[graphs, tokens, tokens]``, read in place; the diagonal and what lies above are ignored."""

    def __init__(self, matrix: Float[Tensor, "graphs tokens tokens"], block: int = BLOCK) -> None:
        self.matrix, self.block, self.num_tokens = matrix, block, matrix.shape[-1]
        self._widening = _Widening(self.num_tokens)

    def rows(self, start: int, stop: int) -> DenseRows:
        """The rows as a view; their float64 copy is valid until the next ones are read."""
        return self._widening.rows(self.matrix[:, start:stop, :stop])


class StreamedOperator:
    """C whose rows are produced on demand and dropped after use: memory O(graphs x block x T), the block bounded."""

    def __init__(self, source: RowSource) -> None:
        self.source, self.num_tokens = source, source.num_tokens
        self.block = max(_FEWEST_ROWS, min(BLOCK, _BLOCK_NUMBERS // max(self.num_tokens, 1)))
        self._widening = _Widening(self.num_tokens)

    def rows(self, start: int, stop: int) -> DenseRows:
        """The rows; their float64 copy is valid until the next ones are read."""
        return self._widening.rows(self.source.block(start, stop))


class SparseOperator:
    """C as the edges of a PyG graph or batch: one gather and one scatter per block.

    Args:
        topology: the shape of the graph or batch; its edge blocks serve every solve on it.
        weight: ``[E]`` in the order of the graph.
    """

    def __init__(self, topology: Topology, weight: Float[Tensor, " edges"]) -> None:
        self.blocks = topology.blocks
        self.num_graphs, self.num_tokens, self.block = topology.num_graphs, self.blocks.num_tokens, self.blocks.block
        self.weight = weight if self.blocks.order is None else weight[self.blocks.order]

    def rows(self, start: int, stop: int) -> _SparseRows:
        at, blocks, rows = start // self.block, self.blocks, self.num_graphs * self.block
        edges = slice(blocks.ends[at], blocks.ends[at + 1])
        cells = slice(blocks.inner_ends[at], blocks.inner_ends[at + 1])
        inside = self.weight[blocks.inner_edge[cells]]
        return _SparseRows(
            source=blocks.source[edges],
            row=blocks.row[edges],
            ptr=blocks.row_ptr[at * rows : (at + 1) * rows + 1] - edges.start,
            weight=self.weight[edges].double(),
            inner=_filled((self.num_graphs, self.block, self.block), blocks.inner_cell[cells], inside),
        )


def _filled(shape: tuple[int, ...], cell: Tensor, weight: Tensor) -> Float64[Tensor, ...]:
    matrix = torch.zeros(shape, dtype=torch.float64, device=weight.device)
    matrix.view(-1)[cell] = weight.double()
    return matrix


@dataclass
class _SparseRows:
    source: Int64[Tensor, " edges"]
    row: Int64[Tensor, " edges"]
    ptr: Int64[Tensor, " rows_plus_1"]
    weight: Float64[Tensor, " edges"]
    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Tensor) -> Tensor:
        received = self.weight * x.view(-1).index_select(0, self.source)
        return segment(received, self.ptr, reduce="sum").view(self.inner.shape[:2])  # a scatter over sorted rows

    def push(self, y: Tensor, out: Tensor) -> None:
        accumulated = self.weight * y.reshape(-1).index_select(0, self.row)
        out.view(-1).scatter_add_(0, self.source, accumulated)
