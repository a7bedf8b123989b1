"""Backbone, widest routes, hubs and checkpoints against exhaustive enumeration."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph.errors import InfeasibleFlowError, InvalidInputError
from flowgraph.flow import Flow
from flowgraph.graph import FlowGraph
from flowgraph.routes import backbone, checkpoints, decompose, hubs, kept_share, widest_routes
from flowgraph.solving import solve
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


@given(case=flow_graphs(max_nodes=7, min_nodes=2), keep=st.sampled_from([0.1, 0.37, 0.77, 0.93]))
@some
def test_the_backbone_is_the_smallest_that_carries_its_share(case: Case, keep: float):
    flow = solved(case)
    edges, solution = exact(case)
    chosen, share = reference.smallest_backbone(case.num_nodes, edges, solution.source, case.answer, Fraction(keep))
    bone = backbone(flow, keep)
    assert bone.share >= keep * (1 - 1e-9)
    strengths = sorted(solution.edge_flow, reverse=True)
    boundary = strengths[len(chosen) - 1 : len(chosen) + 1]
    if len(boundary) < 2 or abs(boundary[0] - boundary[1]) > Fraction(1, 10**9):  # float ties break anywhere
        assert abs(bone.share - float(share)) < 1e-9
        assert bone.num_edges == len(chosen)


@given(case=flow_graphs(max_nodes=7, min_nodes=2), data=st.data())
@some
def test_kept_share_is_the_probability_of_staying_inside(case: Case, data: st.DataObject):
    flow = solved(case)
    edges, solution = exact(case)
    kept = data.draw(st.sets(st.sampled_from(range(len(edges))))) if edges else set()
    share = reference.kept_share(case.num_nodes, edges, solution.source, case.answer, kept)
    pairs = {(s, t) for k, (s, t, _) in enumerate(edges) if k in kept}
    mask = torch.tensor([pair in pairs for pair in zip(*flow.graph.edge_index.tolist(), strict=True)], dtype=torch.bool)
    assert kept_share(flow, mask) == pytest.approx(float(share), abs=1e-12)
    assert kept_share(flow, mask.nonzero().flatten().flip(0)) == pytest.approx(float(share), abs=1e-12)


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
        assert bool(flow.absorbed()[route.tokens[-1]] > 0)
        for pair in pairwise(route.tokens):
            rebuilt[pair] += route.flow
    assert list(rebuilt.values()) == pytest.approx(flow.edge_flow().tolist(), abs=1e-9)


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
    """Two routes, 2/3 through token 1 and 1/3 through token 2; keeping 60 % takes the first alone."""
    flow = diamond()
    assert [(route.tokens, round(route.flow, 12)) for route in widest_routes(flow, 5)] == [
        ((0, 1, 3), round(2 / 3, 12)),
        ((0, 2, 3), round(1 / 3, 12)),
    ]
    bone = backbone(flow, 0.6)
    assert bone.share == pytest.approx(2 / 3)
    assert flow.graph.edge_index[:, bone.edge_mask].tolist() == [[0, 1], [1, 3]]
    assert repr(bone) == "Backbone(2 of 4 edges carry 66.7% of the flow)"
    assert backbone(flow, 0.7).num_edges == 4
    assert backbone(flow, 1.0).share == 1
    part = bone.subgraph()
    assert part.num_nodes == 4
    assert part.num_edges == 2
    assert part.kept_flow.item() == pytest.approx(2 / 3)
    assert part.kept_attention.item() == pytest.approx(1 / 1.75)


def test_hubs_and_checkpoints_worked_by_hand():
    flow = diamond()
    assert [(role.token, round(role.throughput, 4)) for role in hubs(flow)] == [(1, 0.6667), (2, 0.3333)]
    assert checkpoints(flow) == []  # each middle token relays a single predecessor
    gathering = checkpoints(flow, region="all")
    assert [role.token for role in gathering] == [3]
    two_thirds = (2 / 3) ** (-2 / 3) * (1 / 3) ** (-1 / 3)  # exp of the entropy of (2/3, 1/3)
    assert gathering[0].inflows == pytest.approx(two_thirds)
    assert [role.token for role in hubs(flow, 2, region="all")] == [0, 3]


def test_bad_requests():
    flow = diamond()
    with pytest.raises(InvalidInputError, match=r"keep: must lie in \(0, 1\], got 0"):
        backbone(flow, 0)
    with pytest.raises(InvalidInputError, match=r"share: must lie in \(0, 1\], got 1.5"):
        decompose(flow, share=1.5)
    with pytest.raises(InvalidInputError, match=r"k: must be at least 1, got 0"):
        widest_routes(flow, 0)
    with pytest.raises(InvalidInputError, match=r"k: must be at least 1, got 0"):
        hubs(flow, 0)
    with pytest.raises(InvalidInputError, match=r"region: must be 'reasoning' or 'all', got 'answer'"):
        checkpoints(flow, region="answer")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"flow: must be the flow of one graph, got a batch of 2"):
        backbone(solve(Batch.from_data_list([diamond_graph()] * 2)))
    cut = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible, got none: no question token reaches"):
        hubs(solve(cut))
