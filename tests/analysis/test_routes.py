"""Widest routes, decomposition, hubs and checkpoints against exhaustive enumeration."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from torch_geometric.data import Batch

from flowgraph import (
    Flow,
    FlowGraph,
    InfeasibleFlowError,
    InvalidInputError,
    checkpoints,
    decompose,
    hubs,
    solve,
    widest_routes,
)
from tests.fixtures.convert import to_graph
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

some = settings(max_examples=40, deadline=None)


def solved(case: Case) -> Flow:
    flow = solve(to_graph(case.num_nodes, case.edges, case.question, case.answer))
    assume(bool(flow.feasible))
    return flow


def exact(case: Case):
    edges = reference.effective_edges(case.edges, case.answer)
    return edges, reference.solve(case.num_nodes, edges, case.question, case.answer)


@given(case=flow_graphs(max_nodes=8, min_nodes=2))
@some
def test_the_decomposition_adds_up_to_the_flow(case: Case):
    flow = solved(case)
    routes = decompose(flow, share=1.0)
    assert sum(route.flow for route in routes) == pytest.approx(1, abs=1e-9)
    assert all(a.flow >= b.flow - 1e-12 for a, b in pairwise(routes))
    rebuilt = dict.fromkeys(zip(*flow.graph.edge_index.tolist(), strict=True), 0.0)
    for route in routes:
        assert bool(flow.source[route.tokens[0]] > 0)
        assert bool(flow.absorbed[route.tokens[-1]] > 0)
        for pair in pairwise(route.tokens):
            rebuilt[pair] += route.flow
    assert list(rebuilt.values()) == pytest.approx(flow.edge_flow.tolist(), abs=1e-9)


@given(case=flow_graphs(max_nodes=7, min_nodes=2))
@some
def test_the_first_route_is_the_widest(case: Case):
    flow = solved(case)
    edges, solution = exact(case)
    widest, _ = reference.widest_path(
        case.num_nodes, edges, solution.edge_flow, solution.source, reference.absorbed(solution.g, case.answer)
    )
    assert widest_routes(flow, 1)[0].flow == pytest.approx(float(widest), rel=1e-9)


def diamond_graph() -> FlowGraph:
    weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
    return FlowGraph.from_dense(weights, question=[0], answer=[3])


def diamond() -> Flow:
    return solve(diamond_graph())


def test_a_diamond_worked_by_hand():
    """Two routes, 2/3 through token 1 and 1/3 through token 2."""
    flow = diamond()
    assert [(route.tokens, round(route.flow, 12)) for route in widest_routes(flow, 5)] == [
        ((0, 1, 3), round(2 / 3, 12)),
        ((0, 2, 3), round(1 / 3, 12)),
    ]


def test_hubs_and_checkpoints_worked_by_hand():
    flow = diamond()
    assert [(role.token, round(role.throughput, 4)) for role in hubs(flow)] == [(1, 0.6667), (2, 0.3333)]
    assert checkpoints(flow) == []  # each middle token relays a single predecessor
    gathering = checkpoints(flow, region="all")
    assert [role.token for role in gathering] == [3]
    two_thirds = (2 / 3) ** (-2 / 3) * (1 / 3) ** (-1 / 3)  # exp of the entropy of (2/3, 1/3)
    assert gathering[0].inflows == pytest.approx(two_thirds)
    assert [role.token for role in hubs(flow, 2, region="all")] == [0, 3]


@pytest.mark.unchecked
def test_bad_requests():
    flow = diamond()
    with pytest.raises(InvalidInputError, match=r"share: must lie in \(0, 1\], got 1.5"):
        decompose(flow, share=1.5)
    with pytest.raises(InvalidInputError, match=r"k: must be at least 1, got 0"):
        widest_routes(flow, 0)
    with pytest.raises(InvalidInputError, match=r"k: must be at least 1, got 0"):
        hubs(flow, 0)
    with pytest.raises(InvalidInputError, match=r"region: must be 'reasoning' or 'all', got 'answer'"):
        checkpoints(flow, region="answer")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"flow: must be the flow of one graph, got a batch of 2"):
        hubs(solve(Batch.from_data_list([diamond_graph()] * 2)))
    cut = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible, got none: no question token reaches"):
        hubs(solve(cut))


def test_results_print_the_text_of_their_tokens_where_it_is_known():
    from flowgraph.analysis.routes import with_text

    graph = FlowGraph.from_edges(torch.tensor([[0, 1], [1, 2]]), torch.ones(2), num_nodes=3, question=[0], answer=[2])
    (route,) = widest_routes(solve(graph), 1)
    (role,) = hubs(solve(graph), 1)
    tokens = ("Tom", " has\x1b", " 7")
    assert repr(route) == "Route(0 -> 1 -> 2, flow=1)"
    assert repr(with_text(route, tokens)) == r"Route(0 'Tom' -> 1 ' has\x1b' -> 2 ' 7', flow=1)"
    assert repr(role) == "TokenRole(1, throughput=1, inflows=1, outflows=1, score=1)"
    assert repr(with_text(role, tokens)) == r"TokenRole(1 ' has\x1b', throughput=1, inflows=1, outflows=1, score=1)"
    # The text is for the reader: results are equal, and hash alike, with and without it.
    assert with_text(route, tokens) == route
    assert hash(with_text(role, tokens)) == hash(role)
