"""Structure of a graph or batch that does not depend on its weights: computed once, cached on the graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int32, Int64
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.utils import scatter

from flowgraph.errors import GraphError

SPARSE_BLOCK = 64
"""Tokens per block of a sparse sweep: half the dense size, because the triangular part is stored densely."""
CACHE = "_flowgraph_topology"
"""Instance attribute that holds the topology of a graph. PyG does not batch or move it, unlike stored tensors."""


class Topology:
    """The structure of one graph, or of all graphs of a PyG ``Batch``.

    Args:
        edge_index: ``[2, E]`` over the nodes of the batch, sorted by (target, source).
        ptr: ``[graphs + 1]`` first node of each graph.

    Attributes:
        num_graphs: graphs in the batch.
        num_nodes: nodes in the batch.
        num_tokens: nodes of the longest graph.
    """

    def __init__(
        self,
        edge_index: Int64[Tensor, "2 edges"],
        ptr: Int64[Tensor, " graphs_plus_1"],
    ) -> None:
        self.edge_index = edge_index
        self.ptr = ptr
        self.device = edge_index.device

        sizes = ptr.diff()
        self.num_graphs = sizes.numel()
        self.num_nodes = int(ptr[-1])
        self.num_tokens = int(sizes.max()) if self.num_graphs else 0

        # Tensors made in inference mode have no version counter.
        self._version = None if edge_index.is_inference() else edge_index._version

    def describes(self, edge_index: Tensor, ptr: Tensor | None, num_nodes: int) -> bool:
        """Tell whether these are the tensors of this topology, without an edit in place since.

        Tensors made in inference mode have no version counter, so a topology never describes them.
        """
        if edge_index is not self.edge_index or edge_index.is_inference():
            return False
        if ptr is not None and ptr is not self.ptr:
            return False
        return num_nodes == self.num_nodes and edge_index._version == self._version

    def __reduce__(self) -> tuple[type, tuple]:
        """Copy and pickle as None.

        A copied graph has new tensors with version counters of their own, and a topology is cheap to recompute.
        """
        return type(None), ()

    @cached_property
    def graph_of_node(self) -> Int64[Tensor, " nodes"]:
        """Index of the graph that each node belongs to."""
        graphs = torch.arange(self.num_graphs, device=self.device)
        return torch.repeat_interleave(graphs, self.ptr.diff(), output_size=self.num_nodes)

    @cached_property
    def position(self) -> Int64[Tensor, " nodes"]:
        """Position of each node in its own graph."""
        return torch.arange(self.num_nodes, device=self.device) - self.ptr[self.graph_of_node]

    @cached_property
    def row_ptr(self) -> Int64[Tensor, " nodes_plus_1"]:
        """First edge into each node: edges are sorted by target, so the edges into a node are one slice."""
        nodes = torch.arange(self.num_nodes + 1, device=self.device)
        return torch.searchsorted(self.edge_index[1].contiguous(), nodes)

    @cached_property
    def source_int32(self) -> Int32[Tensor, " edges"]:
        """Sources of the edges as int32, which halves the memory that a compiled sweep reads.

        Raises:
            GraphError: the batch has more nodes than int32 can number.
        """
        if self.num_nodes > torch.iinfo(torch.int32).max:
            raise GraphError(
                f"graph: a compiled sweep numbers at most 2**31 - 1 nodes in one batch, got {self.num_nodes}; "
                "split the batch, or use backend='scatter'"
            )
        return self.edge_index[0].to(torch.int32)

    @cached_property
    def has_outgoing(self) -> Bool[Tensor, " nodes"]:
        """Whether each node has any outgoing edge."""
        outgoing = torch.zeros(self.num_nodes, dtype=torch.bool, device=self.device)
        outgoing[self.edge_index[0]] = True
        return outgoing

    def pad(self, x: Tensor, num_tokens: int) -> Float64[Tensor, "graphs tokens"]:
        """Arrange a node vector ``[N]`` as ``[graphs, num_tokens]`` float64, 0 where a graph is shorter."""
        padded = torch.zeros(
            self.num_graphs,
            num_tokens,
            dtype=torch.float64,
            device=x.device,
        )
        padded[self.graph_of_node, self.position] = x.double()
        return padded

    def unpad(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, " nodes"]:
        """Undo :meth:`pad`."""
        return x[self.graph_of_node, self.position]

    def total(self, x: Float64[Tensor, " nodes"]) -> Float64[Tensor, " graphs"]:
        """Sum a node vector over each graph."""
        if self.num_graphs == 1:
            return x.sum()[None]
        return scatter(x, self.graph_of_node, dim_size=self.num_graphs, reduce="sum")

    def maximum(self, x: Tensor) -> Tensor:
        """Return the maximum of a node vector over each graph."""
        return scatter(x, self.graph_of_node, dim_size=self.num_graphs, reduce="max")

    def broadcast(self, x: Tensor) -> Tensor:
        """Expand one value per graph to each of its nodes."""
        return x[self.graph_of_node]

    @cached_property
    def blocks(self) -> EdgeBlocks:
        """The edges in the order in which a blocked sweep reads them."""
        return EdgeBlocks.of(self)


@dataclass(frozen=True, eq=False)
class EdgeBlocks:
    """Edges grouped by the block of their target, over all graphs of a batch side by side.

    A blocked sweep works on padded vectors ``[graphs, num_tokens]``. The edges of one block are one slice. A stable
    sort brings a batch into this order; a single graph is in this order already. Edges with both ends in one block
    form the triangular system of the block, so they are listed a second time, as cells of its matrix.

    Attributes:
        block: tokens per block.
        num_tokens: tokens of the longest graph, rounded up to a multiple of ``block``.
        order: ``[E]`` position in the graph of each edge in block order; None if both orders are the same.
        source: ``[E]`` flat index at which a value is read: ``graph * num_tokens + source``.
        row: ``[E]`` flat index in the block at which it is added: ``graph * block + target - start``.
        row_ptr: first edge of each row, rows in the order (block, graph, target).
        ends: boundaries of the edge slices of the blocks.
        inner_edge: positions in block order of the edges inside a block.
        inner_cell: flat indices of these edges in ``[graphs, block, block]``.
        inner_ends: boundaries of the slices of the blocks in ``inner_edge`` and ``inner_cell``.
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
        """Group the edges of a graph or batch. Cost: O(E), and one sort of E for a batch."""
        block = max(1, min(SPARSE_BLOCK, topology.num_tokens))
        num_blocks = -(-topology.num_tokens // block)
        num_tokens = num_blocks * block

        # Block order: by the block of the target first. Edges of one graph are sorted by target already.
        source_node, target_node = topology.edge_index
        block_of_edge = topology.position[target_node] // block
        order = None
        if topology.num_graphs > 1:
            order = torch.argsort(block_of_edge, stable=True)
            source_node = source_node[order]
            target_node = target_node[order]
            block_of_edge = block_of_edge[order]

        # Indices of each edge in the padded vectors.
        graph = topology.graph_of_node[target_node]
        source = topology.position[source_node]
        target_in_block = topology.position[target_node] % block
        row = graph * block + target_in_block

        # Rows in the order (block, graph, target): the edges of a row are one slice, as segment sums need.
        rows_per_block = topology.num_graphs * block
        row_of_edge = block_of_edge * rows_per_block + row
        all_rows = torch.arange(num_blocks * rows_per_block + 1, device=topology.device)

        # Edges inside a block are the cells of its triangular system.
        inside = (source >= block_of_edge * block).nonzero().flatten()
        inner_cell = row[inside] * block + source[inside] % block

        block_limits = torch.arange(num_blocks + 1, device=topology.device)
        return cls(
            block=block,
            num_tokens=num_tokens,
            order=order,
            source=graph * num_tokens + source,
            row=row,
            row_ptr=torch.searchsorted(row_of_edge, all_rows),
            ends=torch.searchsorted(block_of_edge, block_limits).tolist(),
            inner_edge=inside,
            inner_cell=inner_cell,
            inner_ends=torch.searchsorted(block_of_edge[inside], block_limits).tolist(),
        )


def topology_of(graph: Data) -> Topology:
    """Return the topology of a graph or batch: computed on first use, cached on it until its edges change."""
    edge_index: Tensor = graph["edge_index"]
    ptr = graph["ptr"] if isinstance(graph, Batch) else None
    num_nodes = int(graph.num_nodes or 0)

    cached = vars(graph).get(CACHE)
    if cached is not None and cached.describes(edge_index, ptr, num_nodes):
        return cached

    if ptr is None:
        ptr = torch.tensor([0, num_nodes], device=edge_index.device)
    topology = Topology(edge_index, ptr)
    # The setattr of PyG would store the topology among the tensors that it batches and moves between devices.
    object.__setattr__(graph, CACHE, topology)
    return topology
