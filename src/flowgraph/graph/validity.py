"""Validity of a graph where it is used: checked once for each version of its tensors, and remembered on the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch_geometric.data import Batch, Data

from flowgraph.errors import GraphError, RegionError

REGIONS = ("question", "reasoning", "answer")

_MASKS = tuple(f"{name}_mask" for name in REGIONS)
_EDGES = ("edge_index", "capacity")
_CHECKED = "_flowgraph_checked"
"""Instance attribute that holds the version that was checked. PyG does not batch or move it, unlike stored tensors."""


class GraphVersion:
    """The tensors of a graph at one moment: which objects they are, and how often each was edited in place.

    Attributes:
        tensors: the tensors by name.
        versions: their version counters; None for a tensor made in inference mode, which has none.
        num_nodes: tokens of the graph or batch.
    """

    def __init__(self, graph: Data) -> None:
        self.tensors: dict[str, Any] = dict.fromkeys((*_EDGES, *_MASKS, "ptr"))
        for name in self.tensors:
            if name in graph:
                self.tensors[name] = graph[name]
        self.versions = {name: _version(tensor) for name, tensor in self.tensors.items()}
        self.num_nodes = graph.num_nodes

    def __reduce__(self) -> tuple[type, tuple]:
        """Copy and pickle as None: a copied graph has tensors and version counters of its own."""
        return type(None), ()

    def is_same(self, other: GraphVersion) -> bool:
        """Tell whether no tensor was replaced or edited in place; False where a version counter is missing."""
        if self.num_nodes != other.num_nodes:
            return False
        for name, tensor in self.tensors.items():
            if other.tensors[name] is not tensor or other.versions[name] != self.versions[name]:
                return False
            if isinstance(tensor, Tensor) and self.versions[name] is None:
                return False
        return True

    def has_edges_of(self, other: GraphVersion) -> bool:
        """Tell whether edges and capacities are unchanged, also where equal tensors replaced them."""
        for name in _EDGES:
            before = self.tensors[name]
            after = other.tensors[name]
            if before is after and self.versions[name] == other.versions[name]:
                continue
            # A tensor that was edited in place no longer shows what it was.
            if before is after or _version(before) != self.versions[name]:
                return False
            if before.device != after.device or not torch.equal(before, after):
                return False
        return True


def require_usable(graph: Data, *, anew: bool = False) -> None:
    """Refuse a graph or batch on which no sweep, max flow or export would be right.

    A graph is checked when it is made, but PyG edits it in place (``sort``, transforms), and so may the caller. The
    structure is checked once for each version of the tensors; the range of the capacities is checked each time, because
    an edit through numpy or ``.data`` has no version.

    Args:
        graph: a ``FlowGraph``, or a batch of them. Empty or overlapping regions are no error here.
        anew: check the structure even where no tensor has another version.

    Raises:
        GraphError: edges that are missing, outside the graph or their graph of the batch, backwards, twice, or in
            another order than by (target, source); capacities of another shape, NaN, infinite or negative.
        RegionError: a region that is no mask over the tokens.

    Cost: one read of the capacities; a few reads of the edges on first use.
    """
    version = GraphVersion(graph)
    checked = vars(graph).get(_CHECKED)
    if not anew and checked is not None and checked.is_same(version):
        check_capacities(graph["edge_index"], graph["capacity"])
        return

    _require_tensors(version.tensors)
    num_nodes = int(graph.num_nodes or 0)
    check_shapes(graph["edge_index"], graph["capacity"], num_nodes)
    check_capacities(graph["edge_index"], graph["capacity"])
    check_edges(graph["edge_index"], num_nodes)
    if isinstance(graph, Batch):
        _check_batch(graph["edge_index"], version.tensors["ptr"], num_nodes)
    check_masks(version.tensors, num_nodes)
    # The setattr of PyG would store the version among the tensors that it batches and moves between devices.
    object.__setattr__(graph, _CHECKED, version)


def _version(tensor: Any) -> int | None:
    """Return how often a tensor was edited in place; None where that is not counted."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return tensor._version


def _require_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse a graph in which a tensor is missing or is something else."""
    for name in (*_EDGES, *_MASKS):
        if not isinstance(tensors[name], Tensor):
            raise GraphError(
                f"{name}: must be a tensor of the graph, got {type(tensors[name]).__name__}; build the graph with "
                "FlowGraph.from_edges, and keep its attributes (a PyG transform may have removed this one)"
            )


def check_shapes(edge_index: Tensor, capacity: Tensor, num_nodes: int) -> None:
    """Refuse edges and capacities of another shape, dtype or device.

    Raises:
        GraphError: any of these.
    """
    if edge_index.dtype != torch.int64 or edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise GraphError(
            f"edge_index: must be int64 of shape [2, edges], got {edge_index.dtype} of shape "
            f"{tuple(edge_index.shape)}; stack sources over targets and call .long()"
        )
    if capacity.shape != edge_index.shape[1:] or not capacity.is_floating_point():
        raise GraphError(
            f"capacity: must be one floating point number per edge ({edge_index.shape[1]}), got {capacity.dtype} "
            f"of shape {tuple(capacity.shape)}; pass one weight per column of edge_index"
        )
    if edge_index.device != capacity.device:
        raise GraphError(
            f"capacity: must be on the device of edge_index ({edge_index.device}), got {capacity.device}; call .to()"
        )
    if num_nodes < 1:
        raise GraphError(f"num_nodes: must be at least 1, got {num_nodes}; a trace needs tokens")


def check_capacities(edge_index: Tensor, capacity: Tensor) -> None:
    """Refuse capacities that are NaN, infinite or negative. Cost: one read of them.

    Raises:
        GraphError: any of these, with the first such edge.
    """
    if capacity.numel() == 0:
        return
    # Both ends of the range are NaN if any capacity is.
    least, largest = torch.aminmax(capacity.detach())
    if bool((least >= 0) & (largest < torch.inf)):
        return
    bad = ~torch.isfinite(capacity) | (capacity < 0)
    at = int(bad.nonzero()[0])
    raise GraphError(
        f"capacity: must be finite and non-negative, got {capacity[at].item()} on the edge "
        f"{edge_index[0, at].item()} -> {edge_index[1, at].item()}; check the attention for NaN or overflow"
    )


def check_edges(edge_index: Int64[Tensor, "2 edges"], num_nodes: int) -> None:
    """Refuse edges outside the graph, backwards, twice, or in another order than by (target, source).

    Raises:
        GraphError: any of these, with the first such edge.
    """
    if edge_index.numel() == 0:
        return
    source, target = edge_index
    if int(edge_index.min()) < 0 or int(edge_index.max()) >= num_nodes:
        raise GraphError(
            f"edge_index: must lie in 0..{num_nodes - 1}, got {int(edge_index.min())}..{int(edge_index.max())}; "
            "pass num_nodes = number of tokens"
        )

    # Token order is a topological order: s < t on every edge.
    backwards = source >= target
    if bool(backwards.any()):
        at = int(backwards.nonzero()[0])
        raise GraphError(
            f"edge_index: an edge must run from an earlier to a later token, got {int(source[at])} -> "
            f"{int(target[at])}; row 0 is the source, row 1 the target"
        )

    # Sorted without duplicates: the keys increase.
    key = sort_key(edge_index, num_nodes)
    repeats = key[1:] == key[:-1]
    if bool(repeats.any()):
        at = int(repeats.nonzero()[0])
        raise GraphError(
            f"edge_index: an edge may appear once, got {int(source[at])} -> {int(target[at])} twice; "
            "sum the capacities first (torch_geometric.utils.coalesce)"
        )
    if bool((key[1:] < key[:-1]).any()):
        raise GraphError(
            "edge_index: must be sorted by (target, source), got another order; build with FlowGraph.from_edges, "
            "or sort with torch_geometric's data.sort(sort_by_row=False)"
        )


def sort_key(edge_index: Int64[Tensor, "2 edges"], num_nodes: int) -> Int64[Tensor, " edges"]:
    """Compute one integer per edge whose order is that of (target, source)."""
    source, target = edge_index
    return target * num_nodes + source


def check_masks(masks: Mapping[str, Tensor], num_nodes: int) -> None:
    """Refuse regions that are no masks over the tokens.

    Args:
        masks: by the names of the graph's attributes.
        num_nodes: tokens.

    Raises:
        RegionError: another dtype or shape.
    """
    for name in REGIONS:
        mask = masks[f"{name}_mask"]
        if mask.dtype != torch.bool or mask.shape != (num_nodes,):
            raise RegionError(
                f"{name}: must be a bool mask over {num_nodes} tokens, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}; build the graph with FlowGraph.from_edges"
            )


def _check_batch(edge_index: Int64[Tensor, "2 edges"], ptr: Any, num_nodes: int) -> None:
    """Refuse a batch whose boundaries do not fit, or with an edge from one of its graphs to another."""
    if (
        not isinstance(ptr, Tensor)
        or ptr.numel() == 0
        or int(ptr[0]) != 0
        or int(ptr[-1]) != num_nodes
        or bool((ptr.diff() < 0).any())
    ):
        got = ptr.tolist() if isinstance(ptr, Tensor) else ptr
        raise GraphError(
            f"ptr: must list the first node of each graph of the batch, from 0 to {num_nodes}, got {got!s:.80}; "
            "build the batch with torch_geometric.data.Batch.from_data_list"
        )
    graph_of_end = torch.searchsorted(ptr, edge_index.contiguous(), right=True) - 1
    between_graphs = graph_of_end[0] != graph_of_end[1]
    if bool(between_graphs.any()):
        at = int(between_graphs.nonzero()[0])
        source, target = edge_index[:, at].tolist()
        one, other = graph_of_end[:, at].tolist()
        raise GraphError(
            f"edge_index: an edge must stay in its graph of the batch, got {source} -> {target} from graph {one} to "
            f"graph {other}; build the batch with torch_geometric.data.Batch.from_data_list"
        )
