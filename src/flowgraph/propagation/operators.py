"""Three ways to hold N: a dense matrix, the edges of a PyG graph, or rows recomputed on demand.

All three present the same blocks of rows (:class:`~flowgraph.propagation.sweeps.BlockOperator`), so there is
one solver. Weights keep their own dtype in memory and are widened to float64 block by block: a float32 weight
is an exact float64 number, so nothing is lost and the copy stays small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch_geometric.utils import scatter

from flowgraph.propagation.sweeps import BLOCK


class RowSource(Protocol):
    """Rows of one causal matrix, computed or fetched on demand."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def block(self, start: int, stop: int) -> Float[Tensor, "block tokens"]:
        """Rows ``[start, stop)``, full width."""
        ...


@dataclass
class _DenseBlockRows:
    before: Float[Tensor, "graphs block start"]
    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Tensor) -> Tensor:
        start = self.before.shape[-1]
        return (self.before.double() @ x[:, :start, None]).squeeze(-1)

    def push(self, y: Tensor, out: Tensor) -> None:
        start = self.before.shape[-1]
        out[:, :start] += (y[:, None, :] @ self.before.double()).squeeze(1)


class DenseOperator:
    """N as a dense batch ``[graphs, tokens, tokens]``, read in place; absorbing columns are masked per block."""

    def __init__(
        self,
        matrix: Float[Tensor, "graphs tokens tokens"],
        absorbing: Bool[Tensor, "graphs tokens"],
        damping: float = 1.0,
        block: int = BLOCK,
    ) -> None:
        self.matrix, self.leaves, self.block = matrix, (~absorbing).double() * damping, block
        self.num_graphs, self.num_tokens = matrix.shape[:2]
        self.device = matrix.device

    def rows(self, start: int, stop: int) -> _DenseBlockRows:
        return _masked(self.matrix[:, start:stop, :stop], self.leaves[:, :stop], start)


class StreamedOperator:
    """N of one sequence whose rows are produced on demand and dropped after use: memory O(block x T)."""

    num_graphs = 1

    def __init__(self, source: RowSource, absorbing: Bool[Tensor, " tokens"], damping: float = 1.0, block: int = BLOCK):
        self.source, self.leaves, self.block = source, ((~absorbing).double() * damping)[None], block
        self.num_tokens, self.device = source.num_tokens, source.device

    def rows(self, start: int, stop: int) -> _DenseBlockRows:
        return _masked(self.source.block(start, stop)[None, :, :stop], self.leaves[:, :stop], start)


def _masked(rows: Tensor, leaves: Tensor, start: int) -> _DenseBlockRows:
    wide = rows.double() * leaves[:, None, :]
    return _DenseBlockRows(before=wide[..., :start], inner=wide[..., start:].tril(-1))


@dataclass
class _SparseBlockRows:
    source: Int64[Tensor, " edges"]
    target: Int64[Tensor, " edges"]
    weight: Float64[Tensor, " edges"]
    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Tensor) -> Tensor:
        graphs, block = self.inner.shape[:2]
        received = self.weight * x.view(-1)[self.source]
        return scatter(received, self.target, dim_size=graphs * block, reduce="sum").view(graphs, block)

    def push(self, y: Tensor, out: Tensor) -> None:
        handed_back = self.weight * y.reshape(-1)[self.target]
        out += scatter(handed_back, self.source, dim_size=out.numel(), reduce="sum").view_as(out)


class SparseOperator:
    """N as the edges of a PyG graph or batch: one gather and one scatter per block.

    Tokens of every graph are laid out as ``[graphs, tokens]`` (padded to the longest), so one block serves all
    graphs at once. Edges sorted by (graph, target, source) make the block of one graph a slice; for a batch one
    stable sort by block puts them in the same order.

    Args:
        edge_index: ``[2, E]`` over the nodes of the whole batch.
        weight: ``[E]``.
        ptr: ``[graphs + 1]`` first node of each graph, as in a PyG ``Batch``.
        absorbing: ``[N]`` tokens that nothing leaves.
        damping: factor per hop.
        block: tokens per block.
    """

    def __init__(
        self,
        edge_index: Int64[Tensor, "2 edges"],
        weight: Float[Tensor, " edges"],
        ptr: Int64[Tensor, " graphs_plus_1"],
        absorbing: Bool[Tensor, " nodes"],
        damping: float = 1.0,
        block: int = BLOCK,
    ) -> None:
        sizes = ptr.diff()
        self.num_graphs, self.num_tokens = sizes.numel(), int(sizes.max())
        self.block, self.damping, self.device = min(block, self.num_tokens), damping, weight.device
        self.graph_of_node = torch.repeat_interleave(torch.arange(self.num_graphs, device=weight.device), sizes)
        self.local = torch.arange(absorbing.numel(), device=weight.device) - ptr[self.graph_of_node]
        keep = ~absorbing[edge_index[0]]
        edge_index, weight = edge_index[:, keep], weight[keep]
        block_of_edge = self.local[edge_index[1]] // self.block
        if self.num_graphs > 1:
            order = torch.argsort(block_of_edge, stable=True)
            edge_index, weight, block_of_edge = edge_index[:, order], weight[order], block_of_edge[order]
        self.edge_index, self.weight = edge_index, weight
        num_blocks = -(-self.num_tokens // self.block)
        boundaries = torch.searchsorted(block_of_edge, torch.arange(num_blocks + 1, device=weight.device))
        self.boundaries: list[int] = boundaries.tolist()

    def rows(self, start: int, stop: int) -> _SparseBlockRows:
        at = start // self.block
        edges = slice(self.boundaries[at], self.boundaries[at + 1])
        source, target = self.edge_index[:, edges]
        weight = self.weight[edges].double() * self.damping
        width = stop - start
        row = self.graph_of_node[target] * width + self.local[target] - start
        column = self.local[source] - start
        inside = column >= 0
        inner = weight.new_zeros(self.num_graphs * width * width)
        inner[row[inside] * width + column[inside]] = weight[inside]
        outside = ~inside
        flat_source = self.graph_of_node[source[outside]] * self.num_tokens + self.local[source[outside]]
        return _SparseBlockRows(
            source=flat_source,
            target=row[outside],
            weight=weight[outside],
            inner=inner.view(self.num_graphs, width, width),
        )

    def pad(self, x: Tensor) -> Float64[Tensor, "graphs tokens"]:
        """Node vector ``[N]`` -> ``[graphs, tokens]``, zero where a graph is shorter."""
        padded = torch.zeros(self.num_graphs, self.num_tokens, dtype=torch.float64, device=x.device)
        padded[self.graph_of_node, self.local] = x.double()
        return padded

    def unpad(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, " nodes"]:
        """The inverse of :meth:`pad`."""
        return x[self.graph_of_node, self.local]
