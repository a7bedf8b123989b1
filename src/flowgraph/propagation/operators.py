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


class BatchLayout:
    """Where the nodes of a batch stand as ``[graphs, tokens]``, padded to the longest graph.

    Args:
        ptr: ``[graphs + 1]`` first node of each graph, as in a PyG ``Batch``.
    """

    def __init__(self, ptr: Int64[Tensor, " graphs_plus_1"]) -> None:
        sizes = ptr.diff()
        self.num_graphs, self.num_tokens, self.device = sizes.numel(), int(sizes.max()), ptr.device
        self.graph_of_node = torch.repeat_interleave(torch.arange(self.num_graphs, device=self.device), sizes)
        self.local = torch.arange(self.graph_of_node.numel(), device=self.device) - ptr[self.graph_of_node]

    def pad(self, x: Tensor) -> Float64[Tensor, "graphs tokens"]:
        """Node vector ``[N]`` -> ``[graphs, tokens]``, zero where a graph is shorter."""
        padded = torch.zeros(self.num_graphs, self.num_tokens, dtype=torch.float64, device=x.device)
        padded[self.graph_of_node, self.local] = x.double()
        return padded

    def unpad(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, " nodes"]:
        """The inverse of :meth:`pad`."""
        return x[self.graph_of_node, self.local]


@dataclass
class _SparseBlockRows:
    source: Int64[Tensor, " edges"]
    row: Int64[Tensor, " edges"]
    weight: Float64[Tensor, " edges"]
    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Tensor) -> Tensor:
        received = self.weight * x.view(-1)[self.source]
        graphs, block = self.inner.shape[:2]
        return scatter(received, self.row, dim_size=graphs * block, reduce="sum").view(graphs, block)

    def push(self, y: Tensor, out: Tensor) -> None:
        handed_back = self.weight * y.reshape(-1)[self.row]
        out += scatter(handed_back, self.source, dim_size=out.numel(), reduce="sum").view_as(out)


@dataclass
class _EdgePlan:
    """Edges in block order, each block a slice: where a value is read, where it is written, by what weight."""

    read: Int64[Tensor, " edges"]
    write: Int64[Tensor, " edges"]
    weight: Float[Tensor, " edges"]
    boundaries: list[int]

    def of_block(self, at: int) -> tuple[Tensor, Tensor, Tensor]:
        edges = slice(self.boundaries[at], self.boundaries[at + 1])
        return self.read[edges], self.write[edges], self.weight[edges]


class SparseOperator:
    """N as the edges of a PyG graph or batch: one gather and one scatter per block.

    Tokens of every graph are laid out as ``[graphs, tokens]`` (padded to the longest), so one block serves all
    graphs at once. Edges sorted by (graph, target, source) make the block of one graph a slice; for a batch one
    stable sort by block puts them in the same order. Edges inside a block form its triangular system; all
    others are pulled or pushed. That plan is made once and serves both sweeps.

    Args:
        edge_index: ``[2, E]`` over the nodes of the whole batch.
        weight: ``[E]``.
        layout: where the nodes stand.
        absorbing: ``[N]`` tokens that nothing leaves.
        damping: factor per hop.
        block: tokens per block.
    """

    def __init__(
        self,
        edge_index: Int64[Tensor, "2 edges"],
        weight: Float[Tensor, " edges"],
        layout: BatchLayout,
        absorbing: Bool[Tensor, " nodes"],
        damping: float = 1.0,
        block: int = BLOCK,
    ) -> None:
        self.num_graphs, self.num_tokens, self.device = layout.num_graphs, layout.num_tokens, layout.device
        self.block, self.damping = min(block, self.num_tokens), damping
        leaves = ~absorbing[edge_index[0]]
        if not bool(leaves.all()):
            edge_index, weight = edge_index[:, leaves], weight[leaves]
        block_of_edge = layout.local[edge_index[1]] // self.block
        if self.num_graphs > 1:
            order = torch.argsort(block_of_edge, stable=True)
            edge_index, weight, block_of_edge = edge_index[:, order], weight[order], block_of_edge[order]
        self._outer, self._inner = self._plans(layout, edge_index, weight, block_of_edge)

    def _plans(
        self, layout: BatchLayout, edge_index: Tensor, weight: Tensor, block_of_edge: Tensor
    ) -> tuple[_EdgePlan, _EdgePlan]:
        graph = layout.graph_of_node[edge_index[1]]
        source, target = layout.local[edge_index[0]], layout.local[edge_index[1]]
        start = block_of_edge * self.block
        width = (self.num_tokens - start).clamp_max(self.block)  # the last block may be narrower
        row = graph * width + target - start
        inside = source >= start
        blocks = torch.arange(-(-self.num_tokens // self.block) + 1, device=self.device)

        def plan(chosen: Tensor, read: Tensor, write: Tensor) -> _EdgePlan:
            boundaries: list[int] = torch.searchsorted(block_of_edge[chosen], blocks).tolist()
            return _EdgePlan(read[chosen], write[chosen], weight[chosen], boundaries)

        outer = plan(~inside, graph * self.num_tokens + source, row)
        inner = plan(inside, row, row * width + source - start)
        return outer, inner

    def rows(self, start: int, stop: int) -> _SparseBlockRows:
        at, width = start // self.block, stop - start
        source, row, weight = self._outer.of_block(at)
        _, cell, inside = self._inner.of_block(at)
        inner = torch.zeros(self.num_graphs * width * width, dtype=torch.float64, device=self.device)
        inner[cell] = inside.double() * self.damping
        return _SparseBlockRows(source, row, weight.double() * self.damping, inner.view(self.num_graphs, width, width))
