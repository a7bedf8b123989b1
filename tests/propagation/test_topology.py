"""What a graph keeps of its shape between solves: reused while the edges stand, never used once they changed."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from flowgraph import FlowGraph, GraphError, solve
from flowgraph.propagation.topology import CACHE, Topology, topology_of
from tests.fixtures.networks import GRAPH_ENGINES, network

every_backend = pytest.mark.parametrize("backend", GRAPH_ENGINES)


def graph(tokens: int = 90, seed: int = 0) -> FlowGraph:
    """With tensors of its own."""
    return network("sparse", tokens, seed).graph().clone()


def batch() -> Batch:
    return Batch.from_data_list([graph(90), graph(40, 1), graph(5, 2)])


def cached(holder: Any) -> Any:
    return vars(holder).get(CACHE)


def fresh(holder: Any) -> Any:
    """The same graph or batch built anew from copies of its tensors."""
    if isinstance(holder, Batch):
        return Batch.from_data_list([part_of(holder, number) for number in range(holder.num_graphs)])
    tensors = {key: value.clone() if isinstance(value, Tensor) else value for key, value in holder.to_dict().items()}
    return FlowGraph(**tensors)


def part_of(whole: Batch, number: int) -> FlowGraph:
    """By hand: PyG separates a batch by the counts it was joined with, whatever became of its edges."""
    first, end = whole.ptr[number : number + 2].tolist()
    inside = (whole.edge_index[1] >= first) & (whole.edge_index[1] < end)
    masks = {name: whole[name][first:end].clone() for name in ("question_mask", "reasoning_mask", "answer_mask")}
    edges = whole.edge_index[:, inside] - first
    return FlowGraph(edge_index=edges, capacity=whole.capacity[inside], num_nodes=end - first, **masks)


def assert_solved_as_new(holder: Any, backend: str) -> None:
    got, wanted = solve(holder, backend=backend), solve(fresh(holder), backend=backend)
    assert torch.equal(got.h, wanted.h)
    assert torch.equal(got.g, wanted.g)
    assert torch.equal(got.edge_flow, wanted.edge_flow)
    assert torch.equal(got.alpha, wanted.alpha)
    assert torch.equal(got.feasible, wanted.feasible)


# Reuse ------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("make", [graph, batch])
def test_a_second_solve_makes_nothing_anew(make: Callable[[], Any], backend: str, monkeypatch: pytest.MonkeyPatch):
    holder = make()
    solve(holder, backend=backend)
    first, parts = cached(holder), dict(vars(cached(holder)))
    monkeypatch.setattr("flowgraph.propagation.topology.Topology.__init__", None)  # a second one would raise
    flow = solve(holder, backend=backend, damping=0.5, absorption="pass_through", source="potential")
    assert flow.alpha.numel() == flow.feasible.numel()
    assert cached(holder) is first
    assert all(vars(first)[name] is value for name, value in parts.items())


@every_backend
@pytest.mark.parametrize("make", [graph, batch])
def test_other_weights_and_regions_keep_it_and_change_the_result(make: Callable[[], Any], backend: str):
    holder = make()
    before = solve(holder, backend=backend)
    known = cached(holder)
    holder.capacity = holder.capacity.flip(0)
    assert not torch.allclose(solve(holder, backend=backend).throughput, before.throughput)
    assert_solved_as_new(holder, backend)
    holder.capacity[::2] *= 0.25
    assert_solved_as_new(holder, backend)
    holder.capacity = holder.capacity.float()
    assert_solved_as_new(holder, backend)
    holder.answer_mask = holder.answer_mask.roll(-1) & ~holder.question_mask
    holder.question_mask[0] = False
    assert_solved_as_new(holder, backend)
    assert cached(holder) is known


@every_backend
def test_an_edge_switched_off_is_no_edge(backend: str):
    """As an ablation does it: the capacity becomes zero, the edge stays in the list."""
    position = torch.arange(3)
    g = FlowGraph.from_edges(
        torch.tensor([[0, 0, 1], [1, 2, 2]]),
        torch.tensor([0.5, 0.25, 0.5]),
        num_nodes=3,
        question=position == 0,
        answer=position == 2,
    )
    solve(g, backend=backend)
    g.capacity[1] = 0
    without = g.clone()
    without.edge_index, without.capacity = g.edge_index[:, g.capacity > 0], g.capacity[g.capacity > 0]
    got, wanted = solve(g, backend=backend), solve(without, backend=backend)
    assert torch.allclose(got.throughput, wanted.throughput, rtol=1e-13, atol=0)
    assert torch.allclose(got.alpha, wanted.alpha, rtol=1e-13, atol=0)


# Change -----------------------------------------------------------------------------------------------------


def replaced_edges(g: Any) -> Any:
    keep = torch.arange(g.num_edges) % 3 > 0
    g.edge_index, g.capacity = g.edge_index[:, keep], g.capacity[keep]
    return g


def equal_tensor(g: Any) -> Any:
    g.edge_index = g.edge_index.clone()
    return g


def moved_source(g: Any) -> Any:
    """One edge of the first token out of which there are two comes from another token now."""
    source, target = g.edge_index
    free = (source[1:] > source[:-1] + 1) & (target[1:] == target[:-1])
    g.edge_index[0, int(free.nonzero()[-1]) + 1] -= 1
    return g


def moved_source_without_grad(g: Any) -> Any:
    with torch.no_grad():
        return moved_source(g)


def row_written(g: Any) -> Any:
    """The same through a view of one row."""
    row = g.edge_index[0]
    row.copy_(torch.where(row > 3, row, 0))
    first = torch.ones(g.num_edges, dtype=torch.bool)
    first[1:] = (g.edge_index[:, 1:] != g.edge_index[:, :-1]).any(0)
    g.edge_index, g.capacity = g.edge_index[:, first], g.capacity[first]
    return g


def updated(g: Any) -> Any:
    g.update({"edge_index": g.edge_index[:, 5:], "capacity": g.capacity[5:]})
    return g


def item_set(g: Any) -> Any:
    g["edge_index"], g["capacity"] = g.edge_index[:, :-4], g.capacity[:-4]
    return g


def transposed_storage(g: Any) -> Any:
    g.edge_index = g.edge_index.T.contiguous().T
    return g


def on_the_same_device(g: Any) -> Any:
    return g.to("cpu")


def cloned(g: Any) -> Any:
    return moved_source(g.clone())


def shallow_copied(g: Any) -> Any:
    return replaced_edges(copy.copy(g))


def with_gradient(g: Any) -> Any:
    g.capacity = g.capacity.requires_grad_().sigmoid().detach()
    return g


CHANGES = [
    replaced_edges,
    equal_tensor,
    moved_source,
    moved_source_without_grad,
    row_written,
    updated,
    item_set,
    transposed_storage,
    on_the_same_device,
    cloned,
    shallow_copied,
    with_gradient,
]
change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@change
@every_backend
@pytest.mark.parametrize("make", [graph, batch])
def test_no_plan_outlives_its_edges(make: Callable[[], Any], backend: str, change: Callable[[Any], Any]):
    holder = make()
    solve(holder, backend=backend)
    assert_solved_as_new(change(holder), backend)


@every_backend
def test_a_copy_and_its_original_go_their_own_ways(backend: str):
    original = graph()
    before = solve(original, backend=backend).throughput
    shallow, deep = copy.copy(original), copy.deepcopy(original)
    assert_solved_as_new(replaced_edges(shallow), backend)
    assert_solved_as_new(moved_source(deep), backend)
    assert torch.equal(solve(original, backend=backend).throughput, before)
    moved_source(original)
    assert_solved_as_new(original, backend)


@every_backend
def test_parts_of_a_graph(backend: str):
    """PyG's own operations return graphs of other sizes."""
    whole = graph()
    solve(whole, backend=backend)
    assert_solved_as_new(whole.subgraph(torch.arange(30, 90)), backend)
    assert_solved_as_new(whole.edge_subgraph(torch.arange(whole.num_edges) % 2 == 0), backend)
    shuffled = whole.clone()
    order = torch.randperm(whole.num_edges, generator=torch.Generator().manual_seed(0))
    shuffled.edge_index, shuffled.capacity = whole.edge_index[:, order], whole.capacity[order]
    back = shuffled.sort(sort_by_row=False)
    assert_solved_as_new(back, backend)
    assert torch.equal(solve(back, backend=backend).h, solve(whole, backend=backend).h)


@every_backend
def test_parts_of_a_batch(backend: str):
    whole = batch()
    together = solve(whole, backend=backend)
    for number, part in enumerate(whole.to_data_list()):
        assert cached(part) is None
        alone = solve(part, backend=backend)
        assert torch.allclose(alone.h, together.h[whole.batch == number], rtol=1e-13, atol=0)
    some = Batch.from_data_list(whole[torch.tensor([2, 0])])
    assert_solved_as_new(some, backend)
    assert some.num_graphs == topology_of(some).num_graphs == 2


def test_loaders_and_batches_of_solved_graphs():
    graphs = [graph(30, seed) for seed in range(4)]
    alone = torch.cat([solve(g).throughput for g in graphs])
    for loaded in DataLoader(graphs, batch_size=4):
        assert cached(loaded) is None
        assert torch.allclose(solve(loaded).throughput, alone, rtol=1e-13, atol=0)


@every_backend
def test_tokens_added_after_a_solve(backend: str):
    """A token appended, as a decoding loop might, before any edge reaches it."""
    g = graph()
    solve(g, backend=backend)
    g.num_nodes = 91
    for name in ("question_mask", "reasoning_mask", "answer_mask"):
        g[name] = torch.nn.functional.pad(g[name], (0, 1))
    assert_solved_as_new(g, backend)


@pytest.mark.parametrize("backend", ["scatter", "numba"])
def test_edges_edited_in_inference_mode(backend: str):
    with torch.inference_mode():
        g = graph()
        solve(g, backend=backend)
        assert_solved_as_new(moved_source(g), backend)


# Copies and files -------------------------------------------------------------------------------------------


def saved(holder: Any) -> Any:
    file = io.BytesIO()
    torch.save(holder, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(holder: Any) -> Any:
    return pickle.loads(pickle.dumps(holder))  # noqa: S301


@pytest.mark.parametrize(
    ("make", "travel"),
    [
        (graph, pickled),
        (graph, saved),
        (graph, copy.deepcopy),
        (batch, pickled),
        (batch, saved),
        (batch, copy.deepcopy),
    ],
)
def test_it_stays_behind(make: Callable[[], Any], travel: Callable[[Any], Any]):
    holder = make()
    flow = solve(holder, backend="scatter")
    arrived = travel(holder)
    kept = cached(arrived)
    assert torch.equal(solve(arrived, backend="scatter").throughput, flow.throughput)
    assert kept is None


@pytest.mark.parametrize("travel", [pickled, copy.copy, copy.deepcopy])
def test_the_original_keeps_it(travel: Callable[[Any], Any]):
    original = graph()
    solve(original)
    known = cached(original)
    travel(original)
    assert cached(original) is known


@pytest.mark.parametrize(
    ("make", "travel"),
    [(graph, copy.deepcopy), (batch, copy.deepcopy), (batch, pickled)],
)
@pytest.mark.parametrize("backend", ["scatter", "numba"])
def test_a_copy_edited_as_often_as_its_original_had_been(
    make: Callable[[], Any], travel: Callable[[Any], Any], backend: str
):
    """Tensors count their edits, and a copy of a tensor counts anew: the numbers meet again."""
    original = moved_source(make())
    original.edge_index.add_(0)
    solve(original, backend=backend)
    twin = moved_source(travel(original))
    while twin.edge_index._version < original.edge_index._version:
        twin.edge_index.add_(0)
    assert_solved_as_new(twin, backend)


def test_it_is_no_part_of_the_graph():
    """Neither among the tensors that PyG moves and batches, nor in what is printed, compared or exported."""
    g = graph()
    before = (g.keys(), repr(g), g.to_dict().keys(), g.is_coalesced(), len(g))
    solve(g)
    assert before == (g.keys(), repr(g), g.to_dict().keys(), g.is_coalesced(), len(g))
    assert g.validate()


def test_more_nodes_than_int32_can_number():
    topology = Topology(torch.tensor([[0], [1]]), torch.tensor([0, 2]))
    topology.num_nodes = 2**31
    with pytest.raises(GraphError, match=r"at most 2\*\*31 - 1 nodes in one batch, got 2147483648; split the batch"):
        _ = topology.source_int32
