"""A graph is checked where it is used: after an edit by PyG or the caller, every backend is right or refuses."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch_geometric import transforms
from torch_geometric.data import Batch

from flowgraph import (
    Flow,
    FlowGraph,
    GraphError,
    RegionError,
    backbone,
    certify,
    checkpoints,
    contract,
    dominators,
    gap_report,
    hubs,
    max_flow,
    prune,
    solve,
    to_igraph,
    to_networkx,
    to_pyg,
    widest_routes,
    write_edges,
)
from flowgraph.graph.validity import require_usable

BACKENDS = ("auto", "numba", "scatter", "dense", "reference")


def random_graph(num_tokens: int = 40, seed: int = 0) -> FlowGraph:
    rows = torch.rand(num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows.tril(-1)
    rows = rows / rows.sum(1, keepdim=True).clamp_min(1e-9)
    return FlowGraph.from_dense(rows, question=[0, 1], answer=[num_tokens - 1])


def chain_with_a_shortcut() -> FlowGraph:
    """Four edges over four tokens: as many edges as tokens. Half the flow takes the shortcut 0 -> 3."""
    pairs = torch.tensor([[0, 1, 0, 2], [1, 2, 3, 3]])
    capacity = torch.tensor([1.0, 0.25, 0.5, 2.0], dtype=torch.float64)
    return FlowGraph.from_edges(pairs, capacity, num_nodes=4, question=[0], answer=[3])


RIGHT = [1.0, 0.5, 0.5, 1.0]
"""Throughput of :func:`chain_with_a_shortcut`, by hand: 1 * .25 * 2 = .5 beside .5."""


def throughput(graph: FlowGraph, backend: str = "reference") -> Tensor:
    return solve(graph, backend=backend).throughput  # type: ignore[arg-type]


# Order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [random_graph, chain_with_a_shortcut])
def test_sorted_by_row_is_refused_and_the_remedy_is_right(make: Callable[[], FlowGraph], backend: str):
    graph = make()
    right = throughput(graph)
    by_row = graph.clone().sort()
    with pytest.raises(GraphError, match=r"edge_index: must be sorted by \(target, source\).*sort_by_row=False"):
        solve(by_row, backend=backend)  # type: ignore[arg-type]
    # The capacities move with their edges, also where PyG could take them for an attribute of nodes.
    assert torch.allclose(throughput(by_row.sort(sort_by_row=False), backend), right, rtol=1e-14)
    # The graph that was sorted is a copy; this one is as before.
    assert torch.allclose(throughput(graph, backend), right, rtol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [random_graph, chain_with_a_shortcut])
def test_coalesce_keeps_the_flow(make: Callable[[], FlowGraph], backend: str):
    graph = make()
    assert torch.allclose(throughput(graph.clone().coalesce(), backend), throughput(graph), rtol=1e-14)


def test_coalesce_adds_the_capacities_of_repeated_edges():
    graph = chain_with_a_shortcut()
    doubled = graph.clone()
    doubled.edge_index = graph.edge_index.repeat_interleave(2, dim=1)
    doubled.capacity = (graph.capacity / 2).repeat_interleave(2)
    with pytest.raises(GraphError, match="an edge may appear once"):
        solve(doubled)
    merged = doubled.coalesce()
    assert torch.equal(merged.edge_index, graph.edge_index)
    assert throughput(merged).tolist() == RIGHT


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_that_add_edges_are_refused(backend: str):
    with pytest.raises(GraphError, match="an edge must run from an earlier to a later token, got 1 -> 0"):
        solve(transforms.ToUndirected()(random_graph()), backend=backend)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="capacity: must be one floating point number per edge"):
        solve(transforms.AddSelfLoops()(random_graph()), backend=backend)  # type: ignore[arg-type]


def test_validate_finds_what_no_version_counter_sees():
    graph = random_graph()
    assert graph.validate()
    graph.edge_index.numpy()[0, 3] = 39
    with pytest.raises(GraphError, match="an edge must run from an earlier to a later token"):
        graph.validate()
    assert not graph.validate(raise_on_error=False)


def test_reversed_edges_are_refused():
    graph = random_graph()
    solve(graph)
    graph.edge_index = graph.edge_index.flip(0)
    with pytest.raises(GraphError, match="an edge must run from an earlier to a later token"):
        solve(graph)


def test_a_subgraph_with_as_many_edges_as_tokens_keeps_its_capacities():
    graph = chain_with_a_shortcut()
    part = graph.edge_subgraph(torch.tensor([True, True, False, True]))
    assert part.capacity.tolist() == [1.0, 0.25, 2.0]
    assert throughput(part).tolist() == [1.0, 1.0, 1.0, 1.0]


# Capacities ------------------------------------------------------------------------------------------------


def in_place(graph: FlowGraph, value: float) -> None:
    graph.capacity[2] = value


def replaced(graph: FlowGraph, value: float) -> None:
    capacity = graph.capacity.clone()
    capacity[2] = value
    graph.capacity = capacity


def through_data(graph: FlowGraph, value: float) -> None:
    """An edit that no version counter sees."""
    graph.capacity.data[2] = value


def through_numpy(graph: FlowGraph, value: float) -> None:
    graph.capacity.numpy()[2] = value


EDITS = (in_place, replaced, through_data, through_numpy)
USES: tuple[Callable[[FlowGraph], object], ...] = (
    max_flow,
    dominators,
    to_networkx,
    to_igraph,
    to_pyg,
    *(lambda graph, backend=backend: solve(graph, backend=backend) for backend in BACKENDS),
)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_capacity_out_of_range_is_refused_by_every_use(edit: Callable[[FlowGraph, float], None], value: float):
    graph = random_graph()
    solve(graph)
    edit(graph, value)
    for use in USES:
        with pytest.raises(GraphError, match=r"capacity: must be finite and non-negative, got (-0\.5|nan|inf) on the"):
            use(graph)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
def test_another_valid_capacity_is_used(edit: Callable[[FlowGraph, float], None], backend: str):
    graph = chain_with_a_shortcut()
    solve(graph, backend=backend)  # type: ignore[arg-type]
    edit(graph, 1.5)
    assert throughput(graph, backend).tolist() == pytest.approx([1.0, 0.25, 0.25, 1.0])


def test_a_capacity_set_to_zero_is_no_edge():
    graph = chain_with_a_shortcut()
    graph.capacity[2] = 0.0
    for backend in BACKENDS:
        assert throughput(graph, backend).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert max_flow(graph).value == 0.25


# Structure -------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named():
    graph = chain_with_a_shortcut()
    del graph.capacity
    with pytest.raises(GraphError, match="capacity: must be a tensor of the graph, got NoneType"):
        solve(graph)
    graph = chain_with_a_shortcut()
    del graph.edge_index
    with pytest.raises(GraphError, match="edge_index: must be a tensor of the graph, got NoneType"):
        solve(graph)
    graph = chain_with_a_shortcut()
    graph.answer_mask = torch.tensor([0.0, 0.0, 0.0, 1.0])
    with pytest.raises(RegionError, match=r"answer: must be a bool mask over 4 tokens, got torch\.float32"):
        solve(graph)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_checked_as_its_graphs(backend: str):
    graph = chain_with_a_shortcut()
    batch = Batch.from_data_list([graph, graph])
    assert throughput(batch, backend).tolist() == RIGHT * 2

    with pytest.raises(GraphError, match=r"must be sorted by \(target, source\)"):
        solve(batch.sort(), backend=backend)  # type: ignore[arg-type]
    crossing = batch.clone()
    crossing.edge_index[0, 4] = 3
    with pytest.raises(
        GraphError, match="an edge must stay in its graph of the batch, got 3 -> 5 from graph 0 to graph 1"
    ):
        solve(crossing, backend=backend)  # type: ignore[arg-type]
    broken = batch.clone()
    broken.capacity[6] = float("nan")
    with pytest.raises(GraphError, match="got nan on the edge 4 -> 7"):
        solve(broken, backend=backend)  # type: ignore[arg-type]
    shifted = batch.clone()
    shifted.ptr = torch.tensor([0, 4, 9])
    with pytest.raises(GraphError, match="ptr: must list the first node of each graph of the batch, from 0 to 8"):
        solve(shifted, backend=backend)  # type: ignore[arg-type]


# A flow and its graph --------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS[:2])
@pytest.mark.parametrize(
    "use",
    [
        backbone,
        widest_routes,
        hubs,
        checkpoints,
        gap_report,
        to_networkx,
        lambda flow: prune(flow, max_edges=3),
        lambda flow: contract(flow, torch.arange(4)),
        lambda flow: flow.alpha,
        lambda flow: flow.edge_flow,
    ],
)
def test_a_flow_is_not_combined_with_other_capacities(
    edit: Callable[[FlowGraph, float], None], use: Callable[[Flow], object]
):
    flow = solve(chain_with_a_shortcut())
    edit(flow.graph, 1.5)
    with pytest.raises(GraphError, match=r"flow: must be that of its graph as it is.*solve\(flow.graph\) again"):
        use(flow)
    certificate = certify(flow)
    assert [check.name for check in certificate.failed] == ["graph"]
    assert "changed after the solve" in certificate.failed[0].detail
    use(solve(flow.graph))


def test_equal_tensors_in_place_of_the_old_ones_are_no_change():
    flow = solve(chain_with_a_shortcut())
    flow.graph.capacity = flow.graph.capacity.clone()
    flow.graph.edge_index = flow.graph.edge_index.clone()
    assert flow.edge_flow.tolist() == [0.5, 0.5, 0.5, 0.5]


def test_nothing_is_written_of_an_edited_graph(tmp_path):
    flow = solve(chain_with_a_shortcut())
    flow.graph.capacity[2] = -1.0
    for exported in (flow, flow.graph):
        with pytest.raises(GraphError):
            write_edges(exported, tmp_path / "edges.csv")
    assert list(tmp_path.iterdir()) == []


def test_copies_are_checked_on_their_own():
    graph = chain_with_a_shortcut()
    flow = solve(graph)
    for copied in (copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):  # noqa: S301
        assert copied.edge_flow.tolist() == [0.5, 0.5, 0.5, 0.5]
    twin = copy.deepcopy(graph)
    twin.capacity[0] = float("nan")
    with pytest.raises(GraphError):
        solve(twin)
    assert throughput(graph).tolist() == RIGHT


def test_inference_mode_has_no_versions_and_is_checked_each_time():
    with torch.inference_mode():
        graph = chain_with_a_shortcut()
        assert solve(graph).edge_flow.tolist() == [0.5, 0.5, 0.5, 0.5]
        graph.edge_index[0, 0] = 1
        with pytest.raises(GraphError, match="an edge must run from an earlier to a later token, got 1 -> 1"):
            require_usable(graph)
