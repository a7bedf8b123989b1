"""SignedGraph: the invariants of its edges, and its two parts."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch

from flowgraph import GraphError, RegionError, SignedGraph

EDGES = torch.tensor([[1, 0, 0], [2, 2, 1]])
WEIGHT = torch.tensor([1.5, -0.5, 1.0])


def signed(edges: torch.Tensor = EDGES, weight: torch.Tensor = WEIGHT, **regions) -> SignedGraph:
    return SignedGraph.from_edges(edges, weight, num_nodes=3, **{"question": [0], "answer": [2], **regions})


def test_edges_are_sorted_and_zeros_dropped():
    graph = signed(torch.tensor([[1, 0, 0, 1], [2, 2, 1, 2]])[:, :3], torch.tensor([1.5, 0.0, 1.0]))
    assert graph.edge_index.tolist() == [[0, 1], [1, 2]]
    assert graph.weight.tolist() == [1.0, 1.5]
    assert graph.reasoning_mask.tolist() == [False, True, False]


def test_the_parts_hold_all_edges():
    graph = signed()
    assert graph.positive().capacity.tolist() == [1.0, 1.5]
    assert graph.negative().edge_index.tolist() == [[0], [2]]
    assert graph.negative().capacity.tolist() == [0.5]


def test_a_batch_shifts_the_tokens():
    batch = Batch.from_data_list([signed(), signed()])
    assert batch.edge_index[:, 3:].tolist() == [[3, 3, 4], [4, 5, 5]]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("edges", "weight", "message"),
    [
        (EDGES.flip(0), WEIGHT, "edge_index: an edge must run from an earlier to a later token, got 1 -> 0"),
        (EDGES[:, [0, 0]], WEIGHT[:2], "edge_index: an edge may appear once, got 1 -> 2 twice"),
        (EDGES + 1, WEIGHT, r"edge_index: must lie in 0\.\.2, got 1\.\.3"),
        (EDGES, torch.tensor([1.0, torch.nan, 1.0]), "weight: must be finite, got nan on the edge 0 -> 2"),
        (EDGES, WEIGHT[:2], r"weight: must be one floating point number per edge \(3\), got torch.float32 of shape"),
        (EDGES.float(), WEIGHT, r"edge_index: must be int64 of shape \[2, edges\], got torch.float32"),
    ],
)
def test_bad_edges(edges: torch.Tensor, weight: torch.Tensor, message: str):
    with pytest.raises(GraphError, match=message):
        signed(edges, weight)


def test_bad_regions():
    with pytest.raises(RegionError, match="question: must hold at least one token, got none"):
        signed(question=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RegionError, match="regions must be disjoint, got token 2 in both"):
        signed(question=[0, 2])
