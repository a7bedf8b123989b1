"""Max flow: exact fractions, a second library, graphs worked by hand; then what it refuses and what it re-checks."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph import (
    FlowGraph,
    GraphError,
    InvalidInputError,
    MaxFlow,
    NumericalRangeError,
    TooLargeError,
    dominators,
    max_flow,
    max_flow_bracket,
    max_flow_through,
    max_flow_without,
    solve,
)
from flowgraph.maxflow.problem import MaxFlowProblem
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
    assert cut <= Fraction(best.cut_capacity) <= cut * (1 + Fraction(ONE_ULP))
    assert float(value) == pytest.approx(best.value, rel=4 * ONE_ULP)
    assert Fraction(best.cut_capacity) - Fraction(best.error) <= value - defect  # V is at least that, exactly
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


@pytest.mark.unchecked
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


@pytest.mark.unchecked
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
    network = MaxFlowProblem(built(DIAMOND))
    network._solver = lambda arcs, sources, sinks: (np.array(flow), np.array(side, dtype=bool))
    # Where the solver is not exact, its refused answer is replaced by that of integers.
    assert network.between(network.sources, network.sinks).value == 0.5
    network._is_exact = True
    with pytest.raises(NumericalRangeError, match=f"failure of .*{reason}"):
        network.between(network.sources, network.sinks)


# Capacities of any size side by side: the tolerance is a share of the cut, not of the sum of capacities ------


def beside_wide_edges(wide: float) -> FlowGraph:
    """Three routes of 1, 3 and 0.5 between edges of any width: V = 4, over 1 -> 3 and 2 -> 3."""
    pairs = torch.tensor([[0, 0, 1, 2, 1, 3], [1, 2, 3, 3, 2, 4]])
    capacity = torch.tensor([wide, wide, 1.0, 3.0, 0.5, wide], dtype=torch.float64)
    return FlowGraph.from_edges(pairs, capacity, num_nodes=5, question=[0], answer=[4])


@pytest.mark.parametrize("backend", ["igraph", "networkx"])
@pytest.mark.parametrize("wide", [1e6, 1e15, 1e17, 2.0**63, 1e300, 1e308])
def test_wide_edges_beside_a_narrow_cut(wide: float, backend: str):
    graph = beside_wide_edges(wide)
    best = max_flow(graph, backend=backend)  # type: ignore[arg-type]
    assert (best.value, best.cut_capacity, best.error) == (4.0, 4.0, 0.0)
    assert best.source_side.tolist() == [True, True, True, False, False]
    assert sorted(graph.capacity[best.cut_edges].tolist()) == [1.0, 3.0]
    assert_proved(best, graph)
    assert max_flow_bracket(graph) == (4.0, 4.0)
    assert max_flow_through(graph, 2) == 3.0
    assert max_flow_without(graph, 2) == 1.0


@pytest.mark.parametrize("narrow", [1e-14, 1e-300])
def test_a_cut_far_below_the_other_capacities(narrow: float):
    """Three sources of .1, nine edges of 1, three edges of 1e-14: V is the sum of the last three."""
    tails = [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4, 5, 6]
    heads = [1, 2, 3] + [4, 5, 6] * 3 + [7] * 3
    capacity = torch.tensor([0.1] * 3 + [1.0] * 9 + [narrow] * 3, dtype=torch.float64)
    graph = FlowGraph.from_edges(torch.tensor([tails, heads]), capacity, num_nodes=8, question=[0], answer=[7])
    best = max_flow(graph)
    assert best.value == pytest.approx(3 * narrow, rel=1e-14)
    assert best.error <= 1e-12 * best.cut_capacity
    assert_proved(best, graph)


def test_a_max_flow_beyond_float64_is_refused():
    graph = FlowGraph.from_edges(
        torch.tensor([[0, 1], [2, 2]]),
        torch.tensor([1.5e308, 1.5e308], dtype=torch.float64),
        num_nodes=3,
        question=[0, 1],
        answer=[2],
    )
    with pytest.raises(NumericalRangeError, match=r"V must be in the range of float64 .*; rescale the capacities"):
        max_flow(graph)


def test_edges_off_the_routes_carry_nothing():
    """A dead end, and a token that nothing reaches, beside one route."""
    pairs = torch.tensor([[0, 0, 2, 1], [1, 3, 4, 4]])
    capacity = torch.tensor([0.5, 1e9, 1e9, 0.25], dtype=torch.float64)
    graph = FlowGraph.from_edges(pairs, capacity, num_nodes=5, question=[0], answer=[4])
    best = max_flow(graph)
    carried = dict(zip(map(tuple, graph.edge_index.T.tolist()), best.edge_flow.tolist(), strict=True))
    assert carried == {(0, 1): 0.25, (0, 3): 0.0, (1, 4): 0.25, (2, 4): 0.0}
    assert best.value == 0.25


def test_max_flow_is_frozen():
    best = max_flow(built(DIAMOND))
    with pytest.raises(dataclasses.FrozenInstanceError):
        best.value = 1.0  # type: ignore[misc]


# Both ends of the min cuts, brackets, what a token is worth ------------------------------------------------


def all_cuts(case: Case) -> list[tuple[Fraction, tuple[bool, ...]]]:
    """Every separating cut of a small graph: capacity and source side."""
    edges = [(s, t, c) for s, t, c in case.edges if not case.answer[s]]
    cuts = []
    for bits in range(2**case.num_nodes):
        side = tuple(bool(bits >> v & 1) for v in range(case.num_nodes))
        if all(side[v] for v in where(case.question)) and not any(side[v] for v in where(case.answer)):
            cuts.append((sum((c for s, t, c in edges if side[s] and not side[t]), Fraction(0)), side))
    return cuts


@given(case=flow_graphs(max_nodes=8, min_nodes=2))
@some
def test_the_min_cuts_nearest_to_either_end(case: Case):
    """Min cuts form a lattice: the intersection of all source sides is one, and so is their union."""
    best = max_flow(built(case))
    smallest = min(capacity for capacity, _ in all_cuts(case))
    sides = [side for capacity, side in all_cuts(case) if capacity == smallest]
    assert best.source_side.tolist() == [all(side[v] for side in sides) for v in range(case.num_nodes)]
    assert best.sink_side.tolist() == [not any(side[v] for side in sides) for v in range(case.num_nodes)]
    assert best.unique_cut == (len(sides) == 1)


@given(case=flow_graphs(max_nodes=9, min_nodes=2))
@some
def test_the_bracket_contains_the_exact_value(case: Case):
    edges = reference.effective_edges(case.edges, case.answer)
    exact = reference.max_flow_value(case.num_nodes, edges, where(case.question), where(case.answer))
    low, high = max_flow_bracket(built(case))
    assert Fraction(low) <= exact <= Fraction(high)
    assert high - low <= 1e-12 * max(float(exact), 1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_the_bracket_of_capacities_of_any_size(scale: float):
    graph = random_graph(40, seed=1)
    graph.capacity = graph.capacity * scale
    low, high = max_flow_bracket(graph)
    value = max_flow(graph).value
    assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
    assert high - low <= 1e-9 * value


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_networkx_agrees_at_capacities_of_any_size(scale: float):
    graph = random_graph(12, seed=3)
    graph.capacity = graph.capacity * scale
    assert max_flow(graph, backend="networkx").value == pytest.approx(max_flow(graph).value, rel=1e-12)


def test_the_bracket_of_nothing():
    assert max_flow_bracket(FlowGraph.from_dense(torch.zeros(3, 3), question=[0], answer=[2])) == (0.0, 0.0)


@given(case=flow_graphs(max_nodes=8, min_nodes=3), data=st.data())
@some
def test_a_token_taken_out(case: Case, data: st.DataObject):
    inner = [v for v in range(case.num_nodes) if not case.question[v] and not case.answer[v]]
    if not inner:
        return
    token = data.draw(st.sampled_from(inner))
    left = [(s, t, c) for s, t, c in reference.effective_edges(case.edges, case.answer) if token not in (s, t)]
    exact = reference.max_flow_value(case.num_nodes, left, where(case.question), where(case.answer))
    graph = built(case)
    assert max_flow_without(graph, token) == pytest.approx(float(exact), rel=1e-12)
    drop = max_flow(graph).value - max_flow_without(graph, token)
    assert -1e-12 <= drop <= max_flow_through(graph, token) + 1e-12


@given(case=flow_graphs(max_nodes=9, min_nodes=2), absorption=st.sampled_from(["absorb", "pass_through"]))
@some
def test_dominators_are_the_tokens_whose_loss_cuts_the_answer_off(case: Case, absorption: str):
    edges = reference.effective_edges(case.edges, case.answer, absorption)
    graph = built(case)

    def reachable(without: int | None) -> bool:
        seen = {v for v in where(case.question) if v != without}
        for s, t, _ in edges:
            if s in seen and t != without:
                seen.add(t)
        return any(v in seen for v in where(case.answer))

    exists = reachable(None)
    wanted = [exists and not reachable(v) for v in range(case.num_nodes)]
    assert dominators(graph, absorption=absorption).tolist() == wanted
    if exists and absorption == "absorb":  # every route passes them, whatever the capacities
        through = solve(graph).throughput[torch.tensor(wanted)]
        assert torch.allclose(through, torch.ones_like(through), rtol=1e-12)


@pytest.mark.parametrize("token", [-1, 0, 3, 4])
def test_only_a_token_in_between_can_be_taken_out(token: int):
    with pytest.raises(InvalidInputError, match=r"token: must lie in 0\.\.3 and be neither source nor sink, got"):
        max_flow_without(built(DIAMOND), token)
