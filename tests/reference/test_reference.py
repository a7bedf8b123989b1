"""The reference against itself (sweeps and route lists), against graphs worked by hand, against networkx."""

import struct
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import networkx as nx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.fixtures.graphs import DIAMOND, PYRAMID, WORKED_GRAPHS, WorkedGraph
from tests.reference import flow
from tests.reference.edges import edges_from_attention
from tests.strategies import KINDS, FlowGraph, attention_matrices, flow_graphs

Fr = Fraction
few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Solved(NamedTuple):
    """A generated graph after `effective_edges`, its demand, and what the sweeps say."""

    graph: FlowGraph
    edges: list[flow.Edge]
    demand: list[Fraction]
    solution: flow.Solution

    @property
    def sources(self) -> list[int]:
        return [v for v, w in enumerate(self.solution.source) if w > 0]

    @property
    def sinks(self) -> list[int]:
        return [v for v, b in enumerate(self.demand) if b > 0]

    @property
    def listed(self) -> tuple:
        return self.graph.num_nodes, self.edges, self.solution.source, self.demand


def weights_on(tokens: list[bool]) -> st.SearchStrategy[list[Fraction]]:
    """Any weights 0..4 on the tokens of a mask, 0 elsewhere."""
    weight = st.integers(0, 8).map(lambda n: Fr(n, 2))
    return st.tuples(*(weight if inside else st.just(Fr(0)) for inside in tokens)).map(list)


@st.composite
def solved(draw: st.DrawFn, max_nodes: int = 7, anywhere: bool = True) -> Solved:
    """Every kind of graph, absorption, damping, source and demand.

    With `anywhere`, source vector and demand may be on any token, also both on one; without, they stay on
    question tokens and on the tokens after the last of them, as max flow needs.
    """
    graph = draw(flow_graphs(max_nodes=max_nodes, min_nodes=1 if anywhere else 2))
    tokens = range(graph.num_nodes)
    absorption = draw(st.sampled_from(["absorb", "pass_through"]))
    edges = flow.effective_edges(graph.edges, graph.answer, absorption, draw(st.sampled_from([1, 0.5])))
    last_asked = max(v for v in tokens if graph.question[v])
    may_demand = [anywhere or v > last_asked for v in tokens]
    may_source = [anywhere or asked for asked in graph.question]
    demand = draw(st.just([Fr(a) for a in graph.answer]) | weights_on(may_demand))
    source = draw(st.sampled_from(["uniform", "potential"]) | weights_on(may_source))
    return Solved(graph, edges, demand, flow.solve(graph.num_nodes, edges, graph.question, demand, source))


def flowing(max_nodes: int = 7, anywhere: bool = True) -> st.SearchStrategy[Solved]:
    return solved(max_nodes, anywhere).filter(lambda case: bool(case.sources))


def solve_worked(worked: WorkedGraph) -> tuple[list[flow.Edge], flow.Solution]:
    edges = flow.effective_edges(worked.edges, worked.answer, worked.absorption)
    return edges, flow.solve(worked.num_nodes, edges, worked.question, worked.answer)


def by_pair(edges: list[flow.Edge], values: list[Fraction]) -> dict[tuple[int, int], Fraction]:
    return {(s, t): value for (s, t, _), value in zip(edges, values, strict=True)}


# Worked by hand ----------------------------------------------------------------------------------------

worked_by_hand = pytest.mark.parametrize("worked", WORKED_GRAPHS, ids=lambda worked: worked.name)


@worked_by_hand
def test_hand_worked_numbers(worked: WorkedGraph):
    edges, solution = solve_worked(worked)
    assert solution.h == worked.h
    assert solution.g == worked.g
    assert solution.throughput == worked.throughput
    assert by_pair(edges, solution.edge_flow) == worked.edge_flow
    assert flow.alpha(edges, solution.g, solution.h) == worked.alpha


@worked_by_hand
def test_hand_worked_numbers_by_paths(worked: WorkedGraph):
    edges, solution = solve_worked(worked)
    listed = (worked.num_nodes, edges, solution.source, worked.answer)
    assert flow.potential_by_paths(worked.num_nodes, edges, worked.answer) == worked.h
    assert flow.throughput_by_paths(*listed) == worked.throughput
    assert by_pair(edges, flow.edge_flow_by_paths(*listed)) == worked.edge_flow


@worked_by_hand
def test_hand_worked_max_flow(worked: WorkedGraph):
    edges, solution = solve_worked(worked)
    sources = [v for v, w in enumerate(solution.source) if w > 0]
    sinks = [v for v, inside in enumerate(worked.answer) if inside]
    assert flow.max_flow_value(worked.num_nodes, edges, sources, sinks) == worked.max_flow


def test_diamond_routes_backbone_and_decomposition():
    listed = (4, DIAMOND.edges, [1, 0, 0, 0], DIAMOND.answer)
    flows = list(DIAMOND.edge_flow.values())
    assert flow.routes(*listed) == [
        flow.Route((0, 1, 3), (0, 2), Fr(2, 5)),
        flow.Route((0, 2, 3), (1, 3), Fr(3, 5)),
    ]
    assert flow.kept_share(*listed, kept=[0, 1, 2]) == Fr(2, 5)
    assert flow.kept_share(*listed, kept=[0, 3]) == 0
    assert flow.smallest_backbone(*listed, keep=Fr(3, 5)) == ([1, 3], Fr(3, 5))
    assert flow.smallest_backbone(*listed, keep=Fr(61, 100)) == ([1, 3, 0, 2], 1)
    assert flow.widest_path_decomposition(4, DIAMOND.edges, flows, [1, 0, 0, 0], DIAMOND.answer) == [
        ([0, 2, 3], Fr(3, 5)),
        ([0, 1, 3], Fr(2, 5)),
    ]


def test_pyramid_backbone_grows_edge_by_edge():
    third = Fr(1, 3)
    listed = (6, PYRAMID.edges, [third, third, third, 0, 0, 0], PYRAMID.answer)
    # by flow: 3->5 (5/9), 4->5 (4/9), 0->3 (1/3), 2->4 (1/3), 1->3 (2/9), 1->4 (1/9)
    assert flow.smallest_backbone(*listed, keep=Fr(1, 10)) == ([4, 5, 0], third)
    assert flow.smallest_backbone(*listed, keep=Fr(1, 2)) == ([4, 5, 0, 3], Fr(2, 3))
    assert flow.smallest_backbone(*listed, keep=1) == ([4, 5, 0, 3, 1, 2], 1)


def test_one_token_that_is_source_and_demand():
    solution = flow.solve(1, [], [True], [True])
    assert solution == ([1], [1], [1], [1], [], [1])
    assert flow.alpha([], solution.g, solution.h) is None
    assert flow.smallest_backbone(1, [], [1], [1], keep=1) == ([], 1)
    assert flow.widest_path_decomposition(1, [], [], [1], [1]) == [([0], 1)]


def test_nothing_flows_when_the_answer_is_out_of_reach():
    edges = [(0, 1, Fr(1)), (2, 3, Fr(1))]
    question, answer = [True, True, False, False], [False, False, False, True]
    solution = flow.solve(4, edges, question, answer)
    assert solution.h == [0, 0, 1, 1]
    assert solution.throughput == [0, 0, 0, 0]
    assert flow.smallest_backbone(4, edges, solution.source, answer, keep=1) == ([], 0)
    assert flow.widest_path_decomposition(4, edges, [0, 0], solution.source, solution.absorbed) == []
    assert flow.max_flow_value(4, edges, [0, 1], [3]) == 0


def test_effective_edges_damp_every_hop_and_absorb_at_the_answer():
    edges, answer = [(0, 1, Fr(1, 2)), (1, 2, Fr(1, 3))], [False, True, True]
    assert flow.effective_edges(edges, answer, "absorb", 0.5) == [(0, 1, Fr(1, 4))]
    assert flow.effective_edges(edges, answer, "pass_through") == edges


def test_a_vector_as_source_loses_what_cannot_reach_the_answer():
    assert flow.source_distribution([1, 2, 3], [True, False, False], [Fr(1), Fr(0), Fr(1)]) == [
        Fr(1, 4),
        0,
        Fr(3, 4),
    ]
    assert flow.source_distribution("uniform", [True, True, False], [Fr(1), Fr(0), Fr(1)]) == [1, 0, 0]
    assert flow.source_distribution("potential", [True, True, False], [Fr(1), Fr(3), Fr(9)]) == [
        Fr(1, 4),
        Fr(3, 4),
        0,
    ]


def test_widest_paths_of_equal_width_are_taken_in_token_order():
    edges = [(0, 1, Fr(1)), (0, 2, Fr(1)), (1, 3, Fr(1)), (2, 3, Fr(1)), (3, 4, Fr(1)), (3, 5, Fr(1))]
    half = Fr(1, 2)
    absorbed = [0, 0, 0, 0, half, half]
    assert flow.widest_path_decomposition(6, edges, [half] * 6, [1, 0, 0, 0, 0, 0], absorbed) == [
        ([0, 1, 3, 4], half),
        ([0, 2, 3, 5], half),
    ]


def test_max_flow_takes_back_an_edge_of_an_earlier_path():
    """The shortest path 0-1-4-7 blocks both others; only by undoing 1 -> 4 is the value 2."""
    pairs = [(0, 1), (1, 4), (4, 7), (0, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7)]
    value, flows, _ = flow.max_flow(8, [(s, t, Fr(1)) for s, t in pairs], [0], [7])
    assert value == 2
    assert flows == [1, 0, 1, 1, 1, 1, 1, 1, 1]


def test_choices_outside_the_set_are_refused():
    with pytest.raises(ValueError, match="absorption must be"):
        flow.effective_edges([], [], "stop")
    with pytest.raises(ValueError, match="source must be"):
        flow.source_distribution("even", [True], [1])
    with pytest.raises(ValueError, match="non-negative"):
        flow.source_distribution([-1], [True], [1])
    with pytest.raises(ValueError, match="rows must be"):
        edges_from_attention([], [], rows="mixed")


# Two derivations, one answer ----------------------------------------------------------------------------


@settings(few, max_examples=200)
@given(solved())
def test_sweeps_and_route_list_agree_exactly(case: Solved):
    assert case.solution.h == flow.potential_by_paths(case.graph.num_nodes, case.edges, case.demand)
    assert case.solution.throughput == flow.throughput_by_paths(*case.listed)
    assert case.solution.edge_flow == flow.edge_flow_by_paths(*case.listed)


@few
@given(solved())
def test_h_is_positive_exactly_where_the_answer_is_reachable(case: Solved):
    reaches = flow.reachable(case.graph.num_nodes, case.edges, case.demand)
    assert [h > 0 for h in case.solution.h] == reaches


@few
@given(solved())
def test_floats_are_taken_at_their_exact_value(case: Solved):
    """The capacities are exact in float32, so the same graph in floats gives the same fractions."""
    floats = [(s, t, float(c)) for s, t, c in case.edges]
    demand, source = [float(b) for b in case.demand], case.solution.source
    again = flow.solve(case.graph.num_nodes, floats, case.graph.question, demand, source)
    assert again == case.solution


@few
@given(flow_graphs(), st.sampled_from(["absorb", "pass_through"]))
def test_h_is_at_most_the_number_of_answer_tokens_if_rows_sum_to_at_most_one(graph: FlowGraph, absorption: str):
    reads = [sum(c for _, head, c in graph.edges if head == t) for t in range(graph.num_nodes)]
    assume(max(reads) <= 1)
    edges = flow.effective_edges(graph.edges, graph.answer, absorption)
    assert max(flow.potential(graph.num_nodes, edges, graph.answer)) <= sum(graph.answer)


# The certificate ---------------------------------------------------------------------------------------


@few
@given(flowing())
def test_local_conservation(case: Solved):
    """Inflow + source = throughput = outflow + absorption, at every token, and 1 is absorbed in all."""
    solution = case.solution
    for v in range(case.graph.num_nodes):
        inflow = sum(F for (_, t, _), F in zip(case.edges, solution.edge_flow, strict=True) if t == v)
        outflow = sum(F for (s, _, _), F in zip(case.edges, solution.edge_flow, strict=True) if s == v)
        assert solution.source[v] + inflow == solution.throughput[v] == outflow + solution.absorbed[v]
    assert sum(solution.source) == sum(solution.absorbed) == 1


@few
@given(solved())
def test_out_mass_of_the_transition_is_one(case: Solved):
    h = case.solution.h
    P = flow.transition(case.edges, h)
    for v in range(case.graph.num_nodes):
        out_mass = sum(p for (s, _, _), p in zip(case.edges, P, strict=True) if s == v)
        assert h[v] == out_mass == 0 or out_mass + case.demand[v] / h[v] == 1


@few
@given(flowing())
def test_throughput_is_a_share_and_its_sum_the_mean_path_length(case: Solved):
    f = case.solution.throughput
    assert all(0 <= f_v <= 1 for f_v in f)
    assert sum(f) - 1 == sum(case.solution.edge_flow) == flow.mean_path_length(*case.listed)


@few
@given(flowing())
def test_forward_and_backward_sweep_meet(case: Solved):
    """<q, h> = <g, b> = 1."""
    h, g, source = case.solution.h, case.solution.g, case.solution.source
    q = [w / h_v if h_v > 0 else 0 for w, h_v in zip(source, h, strict=True)]
    assert sum(q_v * h_v for q_v, h_v in zip(q, h, strict=True)) == 1
    assert sum(g_v * b_v for g_v, b_v in zip(g, case.demand, strict=True)) == 1


@few
@given(flowing(), st.data())
def test_net_flow_over_any_cut_is_what_entered_less_what_left(case: Solved, data: st.DataObject):
    inside = data.draw(st.sets(st.integers(0, case.graph.num_nodes - 1)))
    crossing = 0
    for (s, t, _), F in zip(case.edges, case.solution.edge_flow, strict=True):
        crossing += F * ((s in inside) - (t in inside))
    assert crossing == sum(case.solution.source[v] - case.solution.absorbed[v] for v in inside)


@few
@given(flowing(anywhere=False))
def test_prefix_cuts_between_question_and_answer_carry_one(case: Solved):
    for cut in range(max(case.sources) + 1, min(case.sinks) + 1):
        over = [i for i, (s, t, _) in enumerate(case.edges) if s < cut <= t]
        assert sum(case.solution.edge_flow[i] for i in over) == 1


@few
@given(flowing(anywhere=False))
def test_alpha_is_feasible_largest_and_below_max_flow_and_every_cut(case: Solved):
    scale = flow.alpha(case.edges, case.solution.g, case.solution.h)
    assert scale is not None
    room = [c - scale * F for (_, _, c), F in zip(case.edges, case.solution.edge_flow, strict=True) if F > 0]
    assert min(room) == 0
    value = flow.max_flow_value(case.graph.num_nodes, case.edges, case.sources, case.sinks)
    assert scale <= value
    for cut in range(max(case.sources) + 1, min(case.sinks) + 1):
        assert value <= sum(c for s, t, c in case.edges if s < cut <= t)


@few
@given(flowing(max_nodes=6, anywhere=False))
def test_scaled_throughput_is_below_max_flow_through_the_token(case: Solved):
    n = case.graph.num_nodes
    scale = flow.alpha(case.edges, case.solution.g, case.solution.h)
    assert scale is not None
    for v in range(n):
        through = flow.max_flow_through(n, case.edges, case.sources, case.sinks, v)
        assert scale * case.solution.throughput[v] <= through


# Max flow ----------------------------------------------------------------------------------------------


@few
@given(solved(anywhere=False))
def test_max_flow_is_a_flow_that_fills_the_smallest_cut(case: Solved):
    n, edges = case.graph.num_nodes, case.edges
    value, flows, _ = flow.max_flow(n, edges, case.sources, case.sinks)
    assert all(0 <= F <= c for (_, _, c), F in zip(edges, flows, strict=True))
    for v in set(range(n)) - set(case.sources) - set(case.sinks):
        inflow = sum(F for (_, t, _), F in zip(edges, flows, strict=True) if t == v)
        assert inflow == sum(F for (s, _, _), F in zip(edges, flows, strict=True) if s == v)
    side, cut = flow.min_cut(n, edges, case.sources, case.sinks)
    assert sum(edges[i][2] for i in cut) == value
    assert all(side[v] for v in case.sources)
    assert not any(side[v] for v in case.sinks if value > 0)


@few
@given(solved(anywhere=False))
def test_max_flow_and_flow_exist_together_and_on_the_same_edges(case: Solved):
    value, flows, _ = flow.max_flow(case.graph.num_nodes, case.edges, case.sources, case.sinks)
    assert (value > 0) == bool(case.sources)
    assert all(ours > 0 for ours, F in zip(case.solution.edge_flow, flows, strict=True) if F > 0)


@few
@given(solved(max_nodes=10, anywhere=False))
def test_max_flow_equals_networkx(case: Solved):
    graph = nx.DiGraph()
    graph.add_edges_from((s, t, {"capacity": float(c)}) for s, t, c in case.edges)
    graph.add_edges_from(("source", v) for v in case.sources)
    graph.add_edges_from((v, "sink") for v in case.sinks)
    graph.add_nodes_from(["source", "sink"])
    ours = flow.max_flow_value(case.graph.num_nodes, case.edges, case.sources, case.sinks)
    assert float(ours) == pytest.approx(nx.maximum_flow_value(graph, "source", "sink"), rel=1e-9, abs=1e-12)


# Backbone ----------------------------------------------------------------------------------------------


@few
@given(flowing(), st.data())
def test_kept_share_by_routes_equals_a_sweep_over_the_kept_edges(case: Solved, data: st.DataObject):
    """sum_s src[s]·h_kept[s]/h[s], with h_kept the potential on the kept edges alone."""
    kept = data.draw(st.sets(st.sampled_from(range(len(case.edges))))) if case.edges else set()
    h_kept = flow.potential(case.graph.num_nodes, [case.edges[i] for i in sorted(kept)], case.demand)
    swept = sum(case.solution.source[s] * h_kept[s] / case.solution.h[s] for s in case.sources)
    assert flow.kept_share(*case.listed, kept=kept) == swept


@few
@given(flowing(), st.sampled_from([Fr(1, 10), Fr(1, 2), Fr(9, 10), Fr(1)]))
def test_smallest_backbone_keeps_enough_and_one_edge_less_does_not(case: Solved, keep: Fraction):
    backbone, share = flow.smallest_backbone(*case.listed, keep=keep)
    flows = case.solution.edge_flow
    assert backbone == sorted(range(len(flows)), key=lambda e: (-flows[e], e))[: len(backbone)]
    assert share == flow.kept_share(*case.listed, kept=backbone) >= keep
    assert not backbone or flow.kept_share(*case.listed, kept=backbone[:-1]) < keep


@few
@given(flowing())
def test_widest_path_decomposition_rebuilds_the_flow(case: Solved):
    n, edges, solution = case.graph.num_nodes, case.edges, case.solution
    paths = flow.widest_path_decomposition(n, edges, solution.edge_flow, solution.source, solution.absorbed)
    amounts = [amount for _, amount in paths]
    assert sum(amounts) == 1
    assert amounts == sorted(amounts, reverse=True)
    assert len(paths) <= len(edges) + 2 * n
    for v in range(n):
        assert sum(amount for nodes, amount in paths if nodes[0] == v) == solution.source[v]
        assert sum(amount for nodes, amount in paths if nodes[-1] == v) == solution.absorbed[v]
    for (s, t, _), F in zip(edges, solution.edge_flow, strict=True):
        assert sum(a for nodes, a in paths if (s, t) in pairwise(nodes)) == F


@few
@given(flowing())
def test_first_path_of_the_decomposition_is_the_widest_of_all_routes(case: Solved):
    solution = case.solution
    width, _ = flow.widest_path(
        case.graph.num_nodes, case.edges, solution.edge_flow, solution.source, solution.absorbed
    )
    bottlenecks = [
        min(solution.source[r.nodes[0]], solution.absorbed[r.nodes[-1]], *flows)
        for r in flow.routes(*case.listed)
        for flows in [[solution.edge_flow[e] for e in r.edges]]
    ]
    assert width == max(bottlenecks)


# From attention to edges --------------------------------------------------------------------------------

# A prompt of two tokens, then two generated ones.
A = [
    [Fr(1), Fr(0), Fr(0), Fr(0)],
    [Fr(3, 4), Fr(1, 4), Fr(0), Fr(0)],
    [Fr(1, 2), Fr(1, 8), Fr(3, 8), Fr(0)],
    [Fr(1, 2), Fr(0), Fr(1, 4), Fr(1, 4)],
]
GENERATED = [False, False, True, True]


@pytest.mark.parametrize(
    ("rows", "self_attention", "first_token", "expected"),
    [
        (
            "literal",
            "drop",
            "keep",
            {(0, 1): Fr(3, 4), (0, 2): Fr(1, 2), (1, 2): Fr(1, 8), (0, 3): Fr(1, 2), (2, 3): Fr(1, 4)},
        ),
        (
            "literal",  # row 1: 3/4 of 3/4; row 2: (1/2, 1/8) / (5/8); row 3: (1/2, 1/4) / (3/4)
            "renormalize",
            "keep",
            {(0, 1): Fr(1), (0, 2): Fr(4, 5), (1, 2): Fr(1, 5), (0, 3): Fr(2, 3), (2, 3): Fr(1, 3)},
        ),
        # without column 0: row 1 = (., 1), row 2 = (., 1/4, 3/4), row 3 = (., 0, 1/2, 1/2)
        ("literal", "drop", "exclude", {(1, 2): Fr(1, 4), (2, 3): Fr(1, 2)}),
        ("literal", "renormalize", "exclude", {(1, 2): Fr(1), (2, 3): Fr(1)}),
        # token 1 has its own row, token 2 row 1, token 3 row 2
        (
            "emission",
            "drop",
            "keep",
            {
                (0, 1): Fr(3, 4),
                (0, 2): Fr(3, 4),
                (1, 2): Fr(1, 4),
                (0, 3): Fr(1, 2),
                (1, 3): Fr(1, 8),
                (2, 3): Fr(3, 8),
            },
        ),
        ("emission", "drop", "exclude", {(1, 2): Fr(1), (1, 3): Fr(1, 4), (2, 3): Fr(3, 4)}),
        # token 1 has row 0, all of it on token 0
        (
            "emission_all",
            "drop",
            "keep",
            {
                (0, 1): Fr(1),
                (0, 2): Fr(3, 4),
                (1, 2): Fr(1, 4),
                (0, 3): Fr(1, 2),
                (1, 3): Fr(1, 8),
                (2, 3): Fr(3, 8),
            },
        ),
        ("emission_all", "drop", "exclude", {(1, 2): Fr(1), (1, 3): Fr(1, 4), (2, 3): Fr(3, 4)}),
    ],
)
def test_edges_worked_by_hand(rows: str, self_attention: str, first_token: str, expected: dict):
    assert edges_from_attention(A, GENERATED, rows, self_attention, first_token) == expected


def test_a_row_that_is_not_stochastic_keeps_its_sum_unless_the_first_token_is_excluded():
    contributions = [[Fr(2), Fr(0), Fr(0)], [Fr(1), Fr(3), Fr(0)], [Fr(2), Fr(1), Fr(3)]]
    assert edges_from_attention(contributions, [False] * 3, "literal", "renormalize", "keep") == {
        (0, 1): Fr(4),
        (0, 2): Fr(4),
        (1, 2): Fr(2),
    }
    assert edges_from_attention(contributions, [False] * 3, "literal", "drop") == {(1, 2): Fr(1, 4)}


@few
@given(attention_matrices(), st.data())
def test_what_a_token_reads_sums_as_the_rows_say(attention: list[list[Fraction]], data: st.DataObject):
    """Emission rows keep all mass, renormalised rows too, dropped self-attention is the mass they lose."""
    n = len(attention)
    generated = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))

    def mass(k: int, *choices: str) -> Fraction:
        edges = edges_from_attention(attention, generated, *choices)
        return sum((c for (_, t), c in edges.items() if t == k), Fr(0))

    for k in range(1, n):
        assert mass(k, "emission_all", "drop", "keep") == 1
        assert mass(k, "literal", "drop", "keep") == 1 - attention[k][k]
        assert mass(k, "literal", "renormalize", "keep") == (attention[k][k] < 1)
        assert mass(k, "emission_all", "drop", "exclude") == (attention[k - 1][0] < 1)
        same_as = "emission_all" if generated[k] else "literal"
        assert mass(k, "emission", "drop", "exclude") == mass(k, same_as, "drop", "exclude")


@few
@given(attention_matrices(), st.sampled_from(["emission", "emission_all", "literal"]))
def test_edges_run_forward_and_never_from_an_excluded_first_token(attention: list[list[Fraction]], rows: str):
    edges = edges_from_attention(attention, [True] * len(attention), rows)
    assert all(0 < s < t and c > 0 for (s, t), c in edges.items())


# The strategies ----------------------------------------------------------------------------------------


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@few
@given(flow_graphs(max_nodes=12))
def test_generated_graphs_are_graphs_with_regions(graph: FlowGraph):
    n = graph.num_nodes
    assert len(graph.question) == len(graph.answer) == n
    assert all(0 <= s < t < n and 0 < c <= 4 and c == float32(float(c)) for s, t, c in graph.edges)
    pairs = [(t, s) for s, t, _ in graph.edges]
    assert pairs == sorted(set(pairs))
    asked = [v for v in range(n) if graph.question[v]]
    answered = [v for v in range(n) if graph.answer[v]]
    assert asked
    assert answered
    assert max(asked) < min(answered) or n == 1
    if graph.kind == "sink":
        assert all(c >= Fr(3, 4) for s, _, c in graph.edges if s == 0)


@few
@given(attention_matrices(max_tokens=12))
def test_generated_attention_is_causal_and_row_stochastic(attention: list[list[Fraction]]):
    for t, row in enumerate(attention):
        assert len(row) == len(attention)
        assert sum(row) == 1
        assert not any(row[t + 1 :])
        assert all(weight >= 0 and weight == float32(float(weight)) for weight in row)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_generated(kind: str):
    @settings(few, max_examples=5)
    @given(flow_graphs(kinds=[kind]))
    def check(graph: FlowGraph):
        assert graph.kind == kind

    runner: Callable[[], None] = check
    runner()
