"""Max flow: exact fractions, a second library, graphs worked by hand; then what it refuses and what it re-checks."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError, TooLargeError
from flowgraph.graph import FlowGraph
from flowgraph.maxflow import MaxFlow, Network, max_flow, max_flow_through
from flowgraph.solving import solve
from tests.fixtures.convert import to_graph
from tests.fixtures.graphs import DIAMOND, RELAY_PASS_THROUGH, WORKED_GRAPHS, WorkedGraph
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

some = settings(max_examples=60, deadline=None)
ONE_ULP = 2.0**-52


def built(case: Case | WorkedGraph) -> FlowGraph:
    return to_graph(case.num_nodes, case.edges, case.question, case.answer)


def where(mask: list[bool]) -> list[int]:
    return [v for v, inside in enumerate(mask) if inside]


def random_graph(num_tokens: int, seed: int, fill: float = 0.5) -> FlowGraph:
    random = np.random.default_rng(seed)
    rows = np.tril(np.exp(2 * random.normal(size=(num_tokens, num_tokens))), -1)
    rows *= random.random(rows.shape) < fill
    rows /= np.maximum(rows.sum(1, keepdims=True), 1e-9)
    third = num_tokens // 3
    return FlowGraph.from_dense(torch.from_numpy(rows), question=slice(0, third), answer=slice(2 * third, num_tokens))


def assert_proved(best: MaxFlow, graph: FlowGraph, absorption: str = "absorb") -> None:
    """Feasible, conserving, and as large as its own cut, in exact arithmetic."""
    flow = [Fraction(x) for x in best.edge_flow.tolist()]
    side, answer, question = best.source_side.tolist(), graph.answer_mask.tolist(), graph.question_mask.tolist()
    excess, cut = [Fraction(0)] * len(side), Fraction(0)
    edges = zip(*graph.edge_index.tolist(), graph.capacity.tolist(), flow, strict=True)
    for index, (s, t, c, x) in enumerate(edges):
        live = not (absorption == "absorb" and answer[s])
        assert 0 <= x <= (Fraction(c) if live else 0)
        excess[s] -= x
        excess[t] += x
        crosses = side[s] and not side[t] and live
        assert crosses == (index in best.cut_edges.tolist())
        cut += Fraction(c) if crosses else 0
    defect = sum(abs(e) for e, q, a in zip(excess, question, answer, strict=True) if not q and not a)
    value = -sum(e for e, q in zip(excess, question, strict=True) if q)
    assert float(cut) == best.cut_capacity
    assert float(value) == pytest.approx(best.value, rel=4 * ONE_ULP)
    assert 0 <= float(cut - value + defect) <= best.error + 4 * ONE_ULP * best.cut_capacity
    assert all(side[v] for v in where(question))
    assert not any(side[v] for v in where(answer))


# Against hand, fractions and networkx -------------------------------------------------------------------


def test_the_cut_of_the_diamond():
    best = max_flow(built(DIAMOND))
    # Edges by (target, source): 0->1 of 1/2, 0->2 of 1/4, 1->3 of 1/4, 2->3 of 3/4. Token 1 is narrow on its way
    # out, token 2 on its way in, so the cut runs behind 1 and before 2.
    assert best.value == best.cut_capacity == 0.5
    assert best.edge_flow.tolist() == [0.25, 0.25, 0.25, 0.25]
    assert best.source_side.tolist() == [True, True, False, False]
    assert best.cut_edges.tolist() == [1, 2]
    assert best.error == 0
    assert repr(best) == "MaxFlow(value=0.5, error=0, cut_edges=2)"


@pytest.mark.parametrize("backend", ["igraph", "networkx"])
@pytest.mark.parametrize("worked", WORKED_GRAPHS, ids=lambda worked: worked.name)
def test_hand_worked_graphs(worked: WorkedGraph, backend: str):
    graph = built(worked)
    best = max_flow(graph, absorption=worked.absorption, backend=backend)
    assert best.value == pytest.approx(float(worked.max_flow), rel=1e-15)
    assert_proved(best, graph, worked.absorption)
    assert max_flow(solve(graph, absorption=worked.absorption)).value == best.value


@pytest.mark.parametrize("backend", ["igraph", "networkx"])
@given(case=flow_graphs(max_nodes=9, min_nodes=2), absorption=st.sampled_from(["absorb", "pass_through"]))
@some
def test_agrees_with_edmonds_karp_over_fractions(backend: str, case: Case, absorption: str):
    edges = reference.effective_edges(case.edges, case.answer, absorption)
    exact = reference.max_flow(case.num_nodes, edges, where(case.question), where(case.answer))
    graph = built(case)
    best = max_flow(graph, absorption=absorption, backend=backend)
    assert_proved(best, graph, absorption)
    assert best.value == pytest.approx(float(exact.value), rel=1e-13)
    assert best.cut_capacity >= float(exact.value) * (1 - ONE_ULP)
    assert best.cut_capacity - best.error <= float(exact.value) * (1 + ONE_ULP)


@given(case=flow_graphs(max_nodes=8, min_nodes=3), data=st.data())
@some
def test_custom_terminals_agree_with_fractions(case: Case, data: st.DataObject):
    kinds = data.draw(st.lists(st.sampled_from("sdn"), min_size=case.num_nodes, max_size=case.num_nodes))
    source = torch.tensor([0.5 * (kind == "s") for kind in kinds])
    demand = torch.tensor([2.0 * (kind == "d") for kind in kinds])
    sources, sinks = where([kind == "s" for kind in kinds]), where([kind == "d" for kind in kinds])
    exact = reference.max_flow_value(case.num_nodes, case.edges, sources, sinks)
    best = max_flow(built(case), source=source, demand=demand)
    assert best.value == pytest.approx(float(exact), rel=1e-13)
    if sources and sinks:
        flow = solve(built(case), source=source, demand=demand)
        assert max_flow(flow).value == pytest.approx(float(exact), rel=1e-13)


@given(case=flow_graphs(max_nodes=8, min_nodes=2), data=st.data())
@some
def test_through_agrees_with_fractions(case: Case, data: st.DataObject):
    token = data.draw(st.integers(0, case.num_nodes - 1))
    edges = reference.effective_edges(case.edges, case.answer)
    sources, sinks = where(case.question), where(case.answer)
    exact = reference.max_flow_through(case.num_nodes, edges, sources, sinks, token)
    assert max_flow_through(built(case), token) == pytest.approx(float(exact), rel=1e-13)


@pytest.mark.parametrize("seed", range(6))
def test_two_libraries_agree_on_random_graphs(seed: int):
    graph = random_graph(40, seed, fill=[0.1, 0.5, 1.0][seed % 3])
    best, peer = max_flow(graph), max_flow(graph, backend="networkx")
    assert_proved(best, graph)
    assert_proved(peer, graph)
    assert best.value == pytest.approx(peer.value, rel=1e-14)


@pytest.mark.parametrize("fill", [0.05, 0.3, 1.0])
def test_the_proved_interval_is_narrow_at_size(fill: float):
    best = max_flow(random_graph(200, 1, fill))
    assert best.value > 1
    assert best.error <= 1e-13 * best.value


# Invariances ---------------------------------------------------------------------------------------------


@given(case=flow_graphs(max_nodes=8, min_nodes=2), power=st.integers(-200, 200))
@some
def test_scaling_every_capacity_scales_the_value(case: Case, power: int):
    graph = built(case)
    scaled = graph.clone()
    scaled.capacity = graph.capacity * 2.0**power
    best, other = max_flow(graph), max_flow(scaled)
    assert other.value == best.value * 2.0**power
    assert other.source_side.tolist() == best.source_side.tolist()


def test_damping_scales_the_value_in_double_precision():
    graph = random_graph(30, 0)
    assert max_flow(graph, damping=0.3).value == pytest.approx(0.3 * max_flow(graph).value, rel=1e-14)
    assert max_flow(solve(graph, damping=0.3)).value == max_flow(graph, damping=0.3).value


def test_float32_capacities_are_taken_as_they_are():
    graph = built(DIAMOND)
    half = to_graph(DIAMOND.num_nodes, DIAMOND.edges, DIAMOND.question, DIAMOND.answer, dtype=torch.float32)
    assert max_flow(half).value == max_flow(graph).value
    assert max_flow(half).edge_flow.dtype == torch.float64


def test_widely_spread_capacities():
    weights = torch.zeros(5, 5, dtype=torch.float64)
    weights[1, 0], weights[2, 0], weights[3, 1], weights[3, 2], weights[4, 3] = 1e-9, 0.7, 0.3, 1e-12, 0.9
    best = max_flow(FlowGraph.from_dense(weights, question=[0], answer=[4]))
    assert best.value == pytest.approx(1e-9 + 1e-12, rel=1e-6)
    assert best.cut_capacity == 1e-9 + 1e-12
    assert best.error <= 1e-15


def test_pass_through_and_absorb_differ_where_answer_tokens_are_read():
    graph = built(RELAY_PASS_THROUGH)
    alone = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert max_flow(graph, demand=alone, absorption="absorb").value == 0.25
    assert max_flow(graph, demand=alone, absorption="pass_through").value == 0.5
    assert max_flow(graph, demand=alone).value == 0.5


def test_unreachable_answer_is_a_value_of_zero():
    weights = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]])
    graph = FlowGraph.from_dense(weights, question=[0], answer=[3])
    for problem in (graph, solve(graph), solve(graph, source=torch.tensor([1.0, 0, 0, 0]))):
        for backend in ("igraph", "networkx"):
            best = max_flow(problem, backend=backend)
            assert best.value == best.cut_capacity == best.error == 0
            assert best.cut_edges.tolist() == []
            assert not best.edge_flow.any()


def test_a_graph_without_edges():
    best = max_flow(FlowGraph.from_dense(torch.zeros(3, 3), question=[0], answer=[2]))
    assert best.value == 0
    assert best.edge_flow.shape == (0,)


def test_through_an_end_is_the_other_leg_alone():
    graph = built(DIAMOND)
    assert max_flow_through(graph, 0) == max_flow_through(graph, 3) == 0.5
    assert max_flow_through(graph, 1) == max_flow_through(graph, 2) == 0.25
    assert max_flow_through(solve(graph), 1, backend="networkx") == 0.25


# Refusals ------------------------------------------------------------------------------------------------


def refused(pattern: str, kind: type[Exception] = InvalidInputError):
    return pytest.raises(kind, match=pattern)


def test_a_batch_is_refused_with_the_remedy():
    batch = Batch.from_data_list([built(DIAMOND), built(DIAMOND)])
    with refused(r"one graph at a time, got a Batch of 2; .*batch.to_data_list\(\)"):
        max_flow(batch)
    with refused(r"batch.to_data_list\(\)"):
        max_flow(solve(batch))
    assert [max_flow(graph).value for graph in batch.to_data_list()] == [0.5, 0.5]


def test_a_token_that_is_source_and_sink_is_refused():
    everywhere = torch.ones(4)
    with refused(r"source, demand: .*got token 0 in both"):
        max_flow(built(DIAMOND), demand=everywhere)
    with refused("got token 3 in both"):
        max_flow(built(DIAMOND), source=everywhere)


def test_size_limit_names_size_estimate_and_override():
    graph = built(DIAMOND)
    with refused(
        r"at most max_edges = 3 edges, got 4 \(roughly .* s and .* MB with igraph\); pass max_edges=4", TooLargeError
    ):
        max_flow(graph, max_edges=3)
    assert max_flow(graph, max_edges=4).value == 0.5


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"source": torch.ones(3)}, r"source: must have one entry per token \(4\), got shape \(3,\)"),
        ({"demand": torch.tensor([0.0, 0, 0, -1])}, "demand: must be finite and non-negative, got -1"),
        ({"demand": torch.tensor([0.0, 0, 0, torch.inf])}, "demand: must be finite"),
        ({"absorption": "leak"}, "absorption: must be 'absorb' or 'pass_through', got 'leak'"),
        ({"damping": 0.0}, r"damping: must lie in \(0, 1\], got 0.0"),
        ({"damping": 1.5}, "damping: must lie"),
        ({"backend": "scipy"}, "backend: must be 'igraph' or 'networkx', got 'scipy'"),
    ],
)
def test_options_outside_their_range(options: dict, pattern: str):
    with refused(pattern):
        max_flow(built(DIAMOND), **options)


def test_a_flow_brings_its_own_options():
    flow = solve(built(DIAMOND))
    with refused("damping: a Flow brings its own, got one beside a Flow; pass flow.graph"):
        max_flow(flow, damping=1.0)
    with refused("source, demand: a Flow brings its own, got them"):
        max_flow(flow, source=torch.ones(4), demand=torch.ones(4))


def test_what_is_no_graph():
    with refused("graph: must be a FlowGraph or a Flow, got Tensor", GraphError):
        max_flow(torch.ones(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 4])
def test_token_outside(token: int):
    with refused(rf"token: must lie in 0..3, got {token}"):
        max_flow_through(built(DIAMOND), token)


# The re-check --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "side", "reason"),
    [
        ([0.25, 0.25, 0.25, 0.0], [1, 1, 0, 0], "conservation"),
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0], "conservation and value = cut capacity"),
        ([0.25, 0.3, 0.25, 0.3], [1, 1, 0, 0], "flow within the capacities"),
        ([-0.25, 0.25, 0.25, 0.25], [1, 1, 0, 0], "flow within the capacities"),
        ([0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1], "a cut between sources and sinks"),
        ([0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], "a cut between sources and sinks"),
        ([0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], "value = cut capacity"),
    ],
)
def test_a_solver_that_lies_is_caught(flow: list[float], side: list[int], reason: str):
    network = Network(built(DIAMOND))
    network._solver = lambda arcs, sources, sinks: (np.array(flow), np.array(side, dtype=bool))
    with pytest.raises(NumericalRangeError, match=f"failure of .*{reason}"):
        network.between(network.sources, network.sinks)


def test_max_flow_is_frozen():
    best = max_flow(built(DIAMOND))
    with pytest.raises(dataclasses.FrozenInstanceError):
        best.value = 1.0  # type: ignore[misc]
