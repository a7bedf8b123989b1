"""The solver against the reference, over generated graphs, and its behaviour on the edges of the input space."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from flowgraph import FlowGraph, GraphError, InvalidInputError, certify, certify_each, solve
from tests.fixtures.convert import close, to_graph
from tests.fixtures.graphs import WORKED_GRAPHS, WorkedGraph
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

BACKENDS = ("dense", "scatter", "numba", "reference")
some = settings(max_examples=60, deadline=None)


def expected(case: Case, absorption: str = "absorb", damping: float = 1.0, source: str = "uniform", demand=None):
    edges = reference.effective_edges(case.edges, case.answer, absorption, damping)
    demand = case.answer if demand is None else demand
    h = reference.potential(case.num_nodes, edges, demand)
    injected = reference.source_distribution(source, case.question, h)
    g = reference.influence(case.num_nodes, edges, injected, h)
    return edges, h, g, injected


def test_torch_scatter_is_used_when_it_was_asked_for():
    from torch_geometric import typing

    if os.environ.get("FLOWGRAPH_EXPECT_SCATTER"):
        assert typing.WITH_TORCH_SCATTER
    else:
        pytest.skip("run by make test-scatter")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("worked", WORKED_GRAPHS, ids=lambda worked: worked.name)
def test_hand_worked_graphs(worked: WorkedGraph, backend: str):
    graph = to_graph(worked.num_nodes, worked.edges, worked.question, worked.answer)
    flow = solve(graph, backend=backend, absorption=worked.absorption)
    assert close(flow.h, worked.h)
    assert close(flow.g, worked.g)
    assert close(flow.throughput, worked.throughput)
    pairs = zip(*graph.edge_index.tolist(), strict=True)
    assert close(flow.edge_flow, [worked.edge_flow.get(pair, 0) for pair in pairs])
    assert close(flow.alpha, [worked.alpha])


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    case=flow_graphs(max_nodes=10, min_nodes=2),
    absorption=st.sampled_from(["absorb", "pass_through"]),
    damping=st.sampled_from([1.0, 0.5, 0.3]),
    source=st.sampled_from(["uniform", "potential"]),
)
@some
def test_every_backend_agrees_with_exact_arithmetic(
    backend: str, case: Case, absorption: str, damping: float, source: str
):
    edges, h, g, injected = expected(case, absorption, damping, source)
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
    flow = solve(graph, backend=backend, absorption=absorption, damping=damping, source=source)
    assert close(flow.h, h)
    assert close(flow.g, g)
    assert close(flow.source, injected)
    assert close(flow.throughput, reference.throughput(g, h))
    assert bool(flow.feasible) == (sum(injected) > 0)
    by_pair = dict(zip([(s, t) for s, t, _ in edges], reference.edge_flow(edges, g, h), strict=True))
    pairs = zip(*graph.edge_index.tolist(), strict=True)
    assert close(flow.edge_flow, [by_pair.get(pair, 0) for pair in pairs])
    assert close(flow.absorbed, reference.absorbed(g, case.answer))
    best = reference.alpha(edges, g, h)
    assert close(flow.alpha, [best]) if best is not None else bool(torch.isinf(flow.alpha))


@given(case=flow_graphs(max_nodes=9, min_nodes=2), data=st.data())
@some
def test_a_demand_and_a_source_of_ones_own(case: Case, data: st.DataObject):
    size = case.num_nodes
    demand = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    source = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    _, h, g, injected = expected(case, "pass_through", source=source, demand=demand)
    graph = to_graph(size, case.edges, case.question, case.answer)
    flow = solve(graph, source=torch.tensor(source).double(), demand=torch.tensor(demand).double())
    assert flow.absorption == "pass_through"
    assert close(flow.source, injected)
    assert close(flow.throughput, reference.throughput(g, h))
    assert flow.absorbed.sum().item() == pytest.approx(float(sum(injected)), rel=1e-12)


def large_graph(kind: str, tokens: int, seed: int) -> FlowGraph:
    """A graph of several blocks; too many edges to draw one by one as fractions."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, tokens, generator=random, dtype=torch.float64).tril(-1)
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    if kind == "band":
        weights *= gap <= 40
    elif kind == "chain":
        weights *= gap == 1
    elif kind == "sparse":
        weights *= torch.rand(tokens, tokens, generator=random) < 0.03
    weights /= weights.sum(-1, keepdim=True).clamp_min(1e-3)
    return FlowGraph.from_dense(weights, question=range(1, tokens // 3), answer=[tokens - 2, tokens - 1])


@pytest.mark.parametrize("backend", ["dense", "scatter", "numba"])
@pytest.mark.parametrize("kind", ["dense", "band", "chain", "sparse"])
@given(tokens=st.sampled_from([127, 128, 129, 255, 256, 257, 300]), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_block_boundaries(backend: str, kind: str, tokens: int, seed: int):
    """More than one block of 128: the same numbers as one token at a time."""
    graph = large_graph(kind, tokens, seed)
    fast, slow = solve(graph, backend=backend), solve(graph, backend="reference")
    assert close(fast.h, slow.h.tolist())
    assert close(fast.throughput, slow.throughput.tolist())
    assert close(fast.g, slow.g.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@given(cases=st.lists(flow_graphs(max_nodes=12, min_nodes=2), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_its_graphs_one_by_one(backend: str, cases: list[Case]):
    graphs = [to_graph(c.num_nodes, c.edges, c.question, c.answer) for c in cases]
    batch = Batch.from_data_list(graphs)
    together = solve(batch, backend=backend)
    for number, graph in enumerate(graphs):
        alone, mine = solve(graph, backend=backend), batch.batch == number
        assert close(together.throughput[mine], alone.throughput.tolist())
        assert close(together.h[mine], alone.h.tolist())
        assert bool(together.feasible[number]) == bool(alone.feasible)
        assert close(together.alpha[number : number + 1], alone.alpha.tolist()) or bool(torch.isinf(alone.alpha))


@given(case=flow_graphs(max_nodes=10, min_nodes=2), scale=st.sampled_from([0.25, 2.0, 1024.0]))
@some
def test_scaling_capacities_of_one_token_s_readers_leaves_throughput(case: Case, scale: float):
    """Scaling everything a token sends cancels in P; scaling all of the answer's rows scales h alone."""
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
    scaled = graph.clone()
    scaled.capacity = torch.where(graph.answer_mask[graph.edge_index[1]], graph.capacity * scale, graph.capacity)
    before, after = solve(graph), solve(scaled)
    assert torch.allclose(after.throughput, before.throughput, rtol=1e-12, atol=0) or not bool(
        graph.answer_mask.sum() == 1
    )


def test_float32_weights_keep_float64_accuracy():
    torch.manual_seed(0)
    weights = torch.rand(400, 400).tril(-1)
    weights /= weights.sum(-1, keepdim=True).clamp_min(1e-6)
    narrow = solve(FlowGraph.from_dense(weights, question=range(1, 50), answer=[399]))
    wide = solve(FlowGraph.from_dense(weights.double(), question=range(1, 50), answer=[399]))
    assert narrow.graph.capacity.dtype == torch.float32
    assert narrow.throughput.dtype == torch.float64
    assert torch.allclose(narrow.throughput, wide.throughput, rtol=1e-12, atol=0)


def test_an_unreachable_answer_is_a_flag_and_zeros():
    graph = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=4, question=[0], answer=[3])
    flow = solve(graph)
    assert not bool(flow.feasible)
    assert flow.throughput.eq(0).all()
    assert torch.isinf(flow.alpha).all()
    assert "not feasible" in repr(flow)


def test_feasible_and_infeasible_graphs_side_by_side():
    good = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=2, question=[0], answer=[1])
    bad = FlowGraph.from_edges(torch.empty(2, 0).long(), torch.empty(0), num_nodes=2, question=[0], answer=[1])
    for backend in BACKENDS:
        flow = solve(Batch.from_data_list([bad, good, bad]), backend=backend)
        assert flow.feasible.tolist() == [False, True, False]
        assert flow.throughput.tolist() == [0, 0, 1, 1, 0, 0]


def test_a_data_loader_batch_solves():
    graph = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=2, question=[0], answer=[1])
    for batch in DataLoader([graph] * 3, batch_size=3):
        assert solve(batch).feasible.tolist() == [True] * 3


def chain(weights: list[float]) -> FlowGraph:
    size = len(weights) + 1
    pairs = torch.stack([torch.arange(size - 1), torch.arange(1, size)])
    capacity = torch.tensor(weights, dtype=torch.float64)
    return FlowGraph.from_edges(pairs, capacity, num_nodes=size, question=[0], answer=[size - 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "weights", [[1e-7] * 59, [1e200] * 9, [1e-200] * 4 + [1e200] * 40, [1e-300, 1e-20, 1e290] * 12]
)
def test_chains_that_leave_the_range_of_float64_are_solved_and_certified(backend: str, weights: list[float]):
    flow = solve(chain(weights), backend=backend)
    assert flow.exponent.any()
    assert flow.throughput.tolist() == pytest.approx([1.0] * len(flow.throughput), rel=1e-13)
    wanted = [sum(math.log2(w) for w in weights[s:]) for s in range(len(weights) + 1)]
    assert flow.log2_potential.tolist() == pytest.approx(wanted, abs=1e-9)
    assert flow.alpha.item() == pytest.approx(min(weights), rel=1e-12)
    assert certify(flow).ok, certify(flow)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strong_sink_beside_weak_evidence_is_solved_in_balanced_units(backend: str):
    """Every token reads the first with all but 1e-7 of its mass: the evidence moves along a chain of rests."""
    size = 80
    weights = torch.zeros(size, size, dtype=torch.float64)
    weights[1:, 0] = 1 - 1e-7
    weights[1:].diagonal().copy_(torch.full((size - 1,), 1e-7))
    graph = FlowGraph.from_dense(weights, question=[1, 2], answer=[size - 1])
    flow = solve(graph, backend=backend, source="potential")
    assert flow.source[2].item() == pytest.approx(1 / (1 + 1e-7), rel=1e-12)
    assert flow.throughput[3:].tolist() == pytest.approx([1.0] * (size - 3), rel=1e-12)
    assert certify(flow, num_through=0).ok


def test_an_influence_beyond_the_range_is_balanced_too():
    """h fits float64, 1 / h does not: the source stands behind a link of 1e-320."""
    flow = solve(chain([1e-160, 1e-150, 1.0]))
    assert certify(flow).ok
    steep = solve(chain([1e-300, 1e300, 1e-300]), source=torch.tensor([1.0, 0, 1, 0]))
    assert certify(steep).ok


def test_a_batch_in_which_one_graph_leaves_the_range():
    ordinary, weak = chain([0.5, 0.25]), chain([1e-200] * 4)
    flow = solve(Batch.from_data_list([ordinary, weak, ordinary]))
    assert flow.feasible.tolist() == [True] * 3
    assert [c.ok for c in certify_each(flow)] == [True] * 3
    assert torch.allclose(flow.throughput, torch.ones(11, dtype=torch.float64), rtol=1e-13)


GRAPH = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=2, question=[0], answer=[1])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, r"backend: must be one of 'auto', 'dense', 'scatter', 'numba', 'reference', got 'cuda'"),
        ({"source": "random"}, r"source: must be one of 'uniform', 'potential', got 'random'"),
        ({"absorption": "leak"}, r"absorption: must be one of 'absorb', 'pass_through', got 'leak'"),
        ({"damping": 0.0}, r"damping: must lie in \(0, 1\], got 0.0; 1 is undamped"),
        ({"damping": "0.5"}, r"damping: must lie in \(0, 1\], got .0.5."),
        ({"damping": float("nan")}, r"damping: must lie in"),
        ({"source": torch.ones(3)}, r"source: must have one entry per token \(2,\), got shape \(3,\)"),
        ({"demand": -torch.ones(2)}, r"demand: must be finite and non-negative, got -1"),
        ({"demand": torch.tensor([0.0, torch.nan])}, r"demand: must be finite"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        solve(GRAPH, **options)


@pytest.mark.unchecked
def test_only_flow_graphs_are_solved():
    with pytest.raises(GraphError, match=r"graph: must be a FlowGraph or a Batch of them, got list"):
        solve([GRAPH])  # type: ignore[arg-type]
