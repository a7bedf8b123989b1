"""Backbone and pruning against exhaustive enumeration, and the losses they record against solves of their own."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph import Flow, FlowGraph, InfeasibleFlowError, InvalidInputError, backbone, prune, solve
from flowgraph.analysis.backbone import kept_share
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
    smallest = backbone(flow, keep)
    assert smallest.share >= keep * (1 - 1e-9)
    strengths = sorted(solution.edge_flow, reverse=True)
    boundary = strengths[len(chosen) - 1 : len(chosen) + 1]
    if len(boundary) < 2 or abs(boundary[0] - boundary[1]) > Fraction(1, 10**9):  # float ties break anywhere
        assert abs(smallest.share - float(share)) < 1e-9
        assert smallest.num_edges == len(chosen)


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


def diamond_graph() -> FlowGraph:
    weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
    return FlowGraph.from_dense(weights, question=[0], answer=[3])


def test_a_backbone_worked_by_hand():
    """Two routes, 2/3 through token 1 and 1/3 through token 2; keeping 60 % takes the first alone."""
    flow = solve(diamond_graph())
    smallest = backbone(flow, 0.6)
    assert smallest.share == pytest.approx(2 / 3)
    assert flow.graph.edge_index[:, smallest.edge_mask].tolist() == [[0, 1], [1, 3]]
    assert repr(smallest) == "Backbone(2 of 4 edges carry 66.7% of the flow)"
    assert backbone(flow, 0.7).num_edges == 4
    assert backbone(flow, 1.0).share == 1
    part = smallest.subgraph()
    assert part.num_nodes == 4
    assert part.num_edges == 2
    assert part.kept_flow.item() == pytest.approx(2 / 3)
    assert part.kept_attention.item() == pytest.approx(1 / 1.75)
    assert part.throughput_error.item() == pytest.approx(1 / 3)  # all of the flow now takes the one route


@given(case=flow_graphs(max_nodes=9, min_nodes=3), data=st.data())
@some
def test_pruning_keeps_the_strongest_edges_and_records_what_it_lost(case: Case, data: st.DataObject):
    flow = solved(case)
    limit = data.draw(st.integers(1, flow.graph.num_edges)) if flow.graph.num_edges else 1
    graph = prune(flow, max_edges=limit)
    strength = flow.edge_flow
    assert graph.num_edges == min(limit, int((strength > 0).sum()))
    pairs = set(zip(*graph.edge_index.tolist(), strict=True))
    kept = torch.tensor([pair in pairs for pair in zip(*flow.graph.edge_index.tolist(), strict=True)], dtype=torch.bool)
    assert not kept.any() or not (~kept).any() or strength[kept].min() >= strength[~kept].max()
    assert graph.kept_flow.item() == pytest.approx(kept_share(flow, kept), abs=1e-12)
    change = (solve(graph).throughput - flow.throughput).abs().max().item()
    assert graph.throughput_error.item() == pytest.approx(change, abs=1e-12)


def test_pruning_twice_adds_up_the_losses():
    torch.manual_seed(0)
    weights = torch.rand(30, 30).tril(-1)
    weights /= weights.sum(-1, keepdim=True).clamp_min(1e-6)
    whole = solve(FlowGraph.from_dense(weights, question=range(1, 8), answer=[29]))
    once = prune(whole, max_edges=120)
    twice = prune(solve(once), max_edges=60)
    direct = (solve(twice).throughput - whole.throughput).abs().max()
    assert direct <= twice.throughput_error.item() + 1e-12
    assert twice.kept_flow.item() < once.kept_flow.item() < 1
    assert twice.kept_attention.item() == pytest.approx((twice.capacity.sum() / whole.graph.capacity.sum()).item())


def test_pruning_follows_the_options_of_the_flow():
    flow = solve(diamond_graph(), source=torch.tensor([1.0, 0, 1, 0]), damping=0.5, absorption="pass_through")
    again = solve(prune(flow, keep=1.0), source=flow.source, damping=0.5, absorption="pass_through")
    torch.testing.assert_close(again.throughput, flow.throughput)
    assert prune(flow, keep=1.0).throughput_error.item() < 1e-12


@pytest.mark.unchecked
def test_bad_requests():
    flow = solve(diamond_graph())
    with pytest.raises(InvalidInputError, match=r"keep: must lie in \(0, 1\], got 0"):
        backbone(flow, 0)
    for both in ({}, {"max_edges": 2, "keep": 0.5}):
        with pytest.raises(InvalidInputError, match=r"max_edges, keep: exactly one must be given, got"):
            prune(flow, **both)
    for value in (0, -1, 2.5, True):
        with pytest.raises(InvalidInputError, match=r"max_edges: must be a positive number, got"):
            prune(flow, max_edges=value)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"flow: must be the flow of one graph, got a batch of 2"):
        prune(solve(Batch.from_data_list([diamond_graph()] * 2)), max_edges=1)
    cut = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible, got none: no question token reaches"):
        prune(solve(cut), max_edges=1)
