"""Exact fractions beside the solver: hand-worked graphs, generated ones, and faults smaller than any tolerance."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgraph import FlowGraph, TooLargeError, certify, solve
from flowgraph.certificate.flow_arrays import FlowArrays
from flowgraph.certificate.rational import rational_flow
from tests.fixtures.convert import random_attention, to_graph
from tests.fixtures.graphs import WORKED_GRAPHS, WorkedGraph
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

RATIONAL = {"rational h", "rational g", "rational throughput", "rational alpha", "rational alpha <= V", "rational V"}


@pytest.mark.parametrize("worked", WORKED_GRAPHS, ids=lambda worked: worked.name)
def test_hand_worked_graphs(worked: WorkedGraph):
    graph = to_graph(worked.num_nodes, worked.edges, worked.question, worked.answer)
    exact = rational_flow(FlowArrays.from_flow(solve(graph, absorption=worked.absorption)))
    assert [float(x) for x in exact.h] == pytest.approx([float(x) for x in worked.h], rel=1e-15)  # a third is rounded
    assert [float(x) for x in exact.throughput] == pytest.approx([float(x) for x in worked.throughput], rel=1e-15)
    assert float(exact.alpha or 0) == pytest.approx(float(worked.alpha), rel=1e-15)
    assert float(exact.max_flow_value or 0) == pytest.approx(float(worked.max_flow), rel=1e-15)
    if worked.name == "diamond":
        assert (exact.h, exact.alpha, exact.max_flow_value) == (list(worked.h), worked.alpha, worked.max_flow)


@given(
    case=flow_graphs(max_nodes=9, min_nodes=2),
    absorption=st.sampled_from(["absorb", "pass_through"]),
    damping=st.sampled_from([1.0, 0.5]),
    source=st.sampled_from(["uniform", "potential"]),
)
@settings(max_examples=60, deadline=None)
def test_the_certificate_holds_in_fractions(case: Case, absorption: str, damping: float, source: str):
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
    flow = solve(graph, absorption=absorption, damping=damping, source=source)
    certificate = certify(flow, level="rational")
    assert certificate.ok, str(certificate)
    edges = reference.effective_edges(case.edges, case.answer, absorption, Fraction(damping))
    h = reference.potential(case.num_nodes, edges, case.answer)
    assert rational_flow(FlowArrays.from_flow(flow)).h == h
    names = {check.name for check in certificate.checks}
    assert {"rational h", "rational g", "rational throughput"} <= names
    assert names >= RATIONAL or not bool(flow.feasible) or torch.isinf(flow.alpha)


def test_it_sees_what_no_other_check_can():
    """All capacities of a flow scaled by 1 + 1e-13: every identity still holds to its bound, the numbers do not."""
    graph = FlowGraph.from_dense(random_attention(12).double(), question=[1, 2], answer=[11])
    flow = solve(graph)
    off = graph.clone()
    off.capacity = graph.capacity * (1 + 2e-12)
    claimed = dataclasses.replace(flow, graph=off)
    caught = {check.name for check in certify(claimed, level="rational").failed}
    assert "rational h" in caught


def test_potentials_beyond_float64():
    size = 60
    pairs = torch.stack([torch.arange(size - 1), torch.arange(1, size)])
    graph = FlowGraph.from_edges(pairs, torch.full((size - 1,), 1e-7), num_nodes=size, question=[0], answer=[size - 1])
    certificate = certify(solve(graph), level="rational")
    assert certificate.ok, str(certificate)
    exact = rational_flow(FlowArrays.from_flow(solve(graph)))
    assert exact.h[0] == Fraction(float(graph.capacity[0])) ** (size - 1)
    assert exact.alpha == exact.max_flow_value == Fraction(float(graph.capacity[0]))


def test_too_large_says_what_to_do():
    graph = FlowGraph.from_dense(random_attention(12), question=[1], answer=[11])
    with pytest.raises(
        TooLargeError, match=r"level: exact fractions take at most max_edges = 10 edges, got 66 .*pass max"
    ):
        certify(solve(graph), level="rational", max_edges=10)
