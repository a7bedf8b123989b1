"""What is known of a graph or batch before its weights: computed once, kept on the graph, used by every solve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.utils import scatter

from flowgraph.errors import GraphError

SPARSE_BLOCK = 64
"""Tokens per block of a sparse sweep: half the dense size, as the triangular part is held dense."""
CACHE = "_flowgraph_topology"
"""Where a graph keeps its topology: in the instance, not among the tensors that PyG batches and moves."""


class Topology:
    """The shape of one graph, or of all graphs of a PyG ``Batch``.

    Args:
        edge_index: ``[2, E]`` over the nodes of the whole batch, sorted by (target, source).
        ptr: ``[graphs + 1]`` first node of each graph.

    Attributes:
        num_graphs, num_nodes: counts over the batch.
        num_tokens: nodes of the longest graph.
    """

    def __init__(self, edge_index: Int64[Tensor, "2 edges"], ptr: Int64[Tensor, " graphs_plus_1"]) -> None:
        self.edge_index, self.ptr, self.device = edge_index, ptr, edge_index.device
        sizes = ptr.diff()
        self.num_graphs, self.num_nodes = sizes.numel(), int(ptr[-1])
        self.num_tokens = int(sizes.max()) if sizes.numel() else 0
        self._version = None if edge_index.is_inference() else edge_index._version

    def describes(self, edge_index: Tensor, ptr: Tensor | None, num_nodes: int) -> bool:
        """Whether these are the tensors it was made from, unchanged since (an edit in place counts).

        Tensors made in inference mode keep no count of their edits, so they are never known to be unchanged.
        """
        if edge_index is not self.edge_index or num_nodes != self.num_nodes or edge_index.is_inference():
            return False
        return (ptr is None or ptr is self.ptr) and edge_index._version == self._version

    def __reduce__(self) -> tuple[type, tuple]:
        """Copies and pickles of a graph hold None instead: their tensors count edits anew, and it is quickly made."""
        return type(None), ()

    @cached_property
    def graph_of_node(self) -> Int64[Tensor, " nodes"]:
        """Number of the graph that each node belongs to."""
        numbers = torch.arange(self.num_graphs, device=self.device)
        return torch.repeat_interleave(numbers, self.ptr.diff(), output_size=self.num_nodes)

    @cached_property
    def local(self) -> Int64[Tensor, " nodes"]:
        """Position of each node in its own graph."""
        return torch.arange(self.num_nodes, device=self.device) - self.ptr[self.graph_of_node]

    @cached_property
    def row_ptr(self) -> Int64[Tensor, " nodes_plus_1"]:
        """First edge into each node: edges are sorted by target, so the edges into a node are one slice."""
        nodes = torch.arange(self.num_nodes + 1, device=self.device)
        return torch.searchsorted(self.edge_index[1].contiguous(), nodes)

    @cached_property
    def source32(self) -> Int32[Tensor, " edges"]:
        """Sources as int32: half of what a compiled sweep would have to read."""
        if self.num_nodes > torch.iinfo(torch.int32).max:
            raise GraphError(
                f"graph: a compiled sweep numbers at most 2**31 - 1 nodes in one batch, got {self.num_nodes}; "
                "split the batch, or use backend='scatter'"
            )
        return self.edge_index[0].to(torch.int32)

    @cached_property
    def has_outgoing(self) -> Tensor:
        """``[N]`` bool: whether any edge leaves the node."""
        outgoing = torch.zeros(self.num_nodes, dtype=torch.bool, device=self.device)
        outgoing[self.edge_index[0]] = True
        return outgoing

    def pad(self, x: Tensor, num_tokens: int) -> Float64[Tensor, "graphs tokens"]:
        """Node vector ``[N]`` -> ``[graphs, num_tokens]`` float64, zero where a graph is shorter."""
        padded = torch.zeros(self.num_graphs, num_tokens, dtype=torch.float64, device=x.device)
        padded[self.graph_of_node, self.local] = x.double()
        return padded

    def unpad(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, " nodes"]:
        """The inverse of :meth:`pad`."""
        return x[self.graph_of_node, self.local]

    def total(self, x: Float64[Tensor, " nodes"]) -> Float64[Tensor, " graphs"]:
        """Sum over the nodes of each graph."""
        if self.num_graphs == 1:
            return x.sum()[None]
        return scatter(x, self.graph_of_node, dim_size=self.num_graphs, reduce="sum")

    def largest(self, x: Tensor) -> Tensor:
        """Maximum over the nodes of each graph."""
        return scatter(x, self.graph_of_node, dim_size=self.num_graphs, reduce="max")

    def spread(self, x: Tensor) -> Tensor:
        """One value per graph to each of its nodes."""
        return x[self.graph_of_node]

    @cached_property
    def blocks(self) -> EdgeBlocks:
        """The edges in the order in which a blocked sweep reads them."""
        return EdgeBlocks.of(self)


@dataclass(frozen=True, eq=False)
class EdgeBlocks:
    """Edges in blocks of targets, all graphs of a batch side by side as ``[graphs, tokens]``, padded.

    The edges of one block are one slice. One stable sort brings a batch into that order; a single graph stands
    in it already. Edges with both ends in one block make up its triangular system and are listed once more as cells.

    Attributes:
        block: tokens per block.
        num_tokens: tokens of the longest graph, rounded up to whole blocks.
        order: ``[E]`` position in the graph of each edge in block order; None when they stand so already.
        source: ``[E]`` where a value is read: ``graph * num_tokens + source``.
        row: ``[E]`` where it is added up within the block: ``graph * block + target - start``.
        row_ptr: first edge of each row, rows in the order (block, graph, target).
        ends: edge slice boundaries of the blocks.
        inner_edge: positions in block order of the edges inside a block.
        inner_cell: their cells in ``[graphs, block, block]``.
        inner_ends: slice boundaries of the blocks in the two.
    """

    block: int
    num_tokens: int
    order: Int64[Tensor, " edges"] | None
    source: Int64[Tensor, " edges"]
    row: Int64[Tensor, " edges"]
    row_ptr: Int64[Tensor, " rows_plus_1"]
    ends: list[int]
    inner_edge: Int64[Tensor, " inner"]
    inner_cell: Int64[Tensor, " inner"]
    inner_ends: list[int]

    @classmethod
    def of(cls, topology: Topology) -> EdgeBlocks:
        block = max(1, min(SPARSE_BLOCK, topology.num_tokens))
        num_blocks = -(-topology.num_tokens // block)
        (start, end), order = topology.edge_index, None
        at = topology.local[end] // block
        if topology.num_graphs > 1:
            order = torch.argsort(at, stable=True)
            start, end, at = start[order], end[order], at[order]
        graph = topology.graph_of_node[end]
        source, target = topology.local[start], topology.local[end] % block
        limits = torch.arange(num_blocks + 1, device=topology.device)
        inside = (source >= at * block).nonzero().flatten()
        row, rows_per_block = graph * block + target, topology.num_graphs * block
        return cls(
            block=block,
            num_tokens=num_blocks * block,
            order=order,
            source=graph * (num_blocks * block) + source,
            row=row,
            row_ptr=torch.searchsorted(
                at * rows_per_block + row, torch.arange(num_blocks * rows_per_block + 1, device=at.device)
            ),
            ends=torch.searchsorted(at, limits).tolist(),
            inner_edge=inside,
            inner_cell=row[inside] * block + source[inside] % block,
            inner_ends=torch.searchsorted(at[inside], limits).tolist(),
        )


def topology_of(graph: Data) -> Topology:
    """The topology of a graph or batch, made on first use and kept on it until its edges change."""
    edge_index: Tensor = graph["edge_index"]
    ptr = graph["ptr"] if isinstance(graph, Batch) else None
    known, num_nodes = vars(graph).get(CACHE), int(graph.num_nodes or 0)
    if known is None or not known.describes(edge_index, ptr, num_nodes):
        if ptr is None:
            ptr = torch.tensor([0, num_nodes], device=edge_index.device)
        known = Topology(edge_index, ptr)
        object.__setattr__(graph, CACHE, known)  # PyG's own setattr would batch it and move it between devices
    return known
