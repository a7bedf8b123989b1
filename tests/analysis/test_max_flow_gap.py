"""The gap report: a diamond worked by hand, its parts against their definitions, a corpus."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from scipy.stats import spearmanr
from torch_geometric.data import Batch

from flowgraph import (
    FlowGraph,
    GapReport,
    InfeasibleFlowError,
    InvalidInputError,
    TooLargeError,
    backbone,
    gap_report,
    gap_table,
    max_flow,
    max_flow_through,
    solve,
)
from flowgraph.analysis.statistics import spearman
from tests.fixtures.convert import to_graph
from tests.fixtures.graphs import DIAMOND
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs


def diamond() -> FlowGraph:
    return to_graph(DIAMOND.num_nodes, DIAMOND.edges, DIAMOND.question, DIAMOND.answer)


def test_the_diamond_worked_by_hand():
    """V = 1/2 behind token 1 and before token 2 (tests/fixtures/graphs.py); alpha = 5/12 fills the edge 0 -> 2.

    f is 2/5 through token 1 and 3/5 through token 2, so both edges of the cut, 0 -> 2 and 1 -> 3, carry all of it.
    """
    report = gap_report(solve(diamond()))
    assert report.alpha == pytest.approx(5 / 12)
    assert report.value == 0.5
    assert report.ratio == pytest.approx(5 / 6)
    assert (report.cut_edges, report.unique_cut, report.trivial) == (2, True, False)
    assert report.flow_across_cut == pytest.approx(1)
    assert report.cut_in_backbone == 1
    assert report.compared == 2
    assert math.isnan(report.rank_correlation)  # not defined for two tokens
    assert report.to_dict()["rank_correlation"] is None
    json.dumps(report.to_dict(), allow_nan=False)


@given(case=flow_graphs(max_nodes=9, min_nodes=4))
@settings(max_examples=40, deadline=None)
def test_every_number_is_what_its_name_says(case: Case):
    flow = solve(to_graph(case.num_nodes, case.edges, case.question, case.answer))
    assume(bool(flow.feasible))
    report, best = gap_report(flow, keep=0.7), max_flow(flow)
    assert report.value == best.value
    assert report.ratio == pytest.approx(float(flow.alpha) / best.value)
    assert report.ratio <= 1 + 1e-9
    assert report.flow_across_cut >= 1 - 1e-9  # net flow is 1, and nothing negative crosses
    in_backbone = backbone(flow, 0.7).edge_mask
    assert report.cut_in_backbone == pytest.approx(in_backbone[best.cut_edges].double().mean().item())
    inner = [
        v for v in range(case.num_nodes) if flow.throughput[v] > 0 and not flow.source[v] > 0 and not case.answer[v]
    ]
    assert report.compared == len(inner)
    f, most = flow.throughput[inner].tolist(), [max_flow_through(flow, v) for v in inner]
    if len(inner) > 2 and len(set(f)) > 1 and len(set(most)) > 1:
        assert report.rank_correlation == pytest.approx(spearmanr(f, most).statistic, abs=1e-12)
    else:
        assert math.isnan(report.rank_correlation)


def test_a_trivial_cut_is_called_so():
    chain = torch.tensor([[0.0, 0, 0], [0.25, 0, 0], [0, 0.5, 0]])
    assert gap_report(solve(FlowGraph.from_dense(chain, question=[0], answer=[2]))).trivial
    assert gap_report(solve(FlowGraph.from_dense(chain.flip(0, 1).T.contiguous(), question=[0], answer=[2]))).trivial


def test_rank_correlation_against_scipy():
    random = np.random.default_rng(0)
    for size in (3, 10, 50):
        one, other = random.integers(0, 8, size), random.normal(size=size)
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_a_corpus():
    reports = [gap_report(solve(diamond())) for _ in range(3)]
    table = gap_table(reports)
    assert table["ratio"] == pytest.approx((5 / 6,) * 3)
    assert table["unique_cut"] == (1.0, 1.0, 1.0)
    assert all(math.isnan(x) for x in table["rank_correlation"])
    assert set(table) == set(GapReport.__dataclass_fields__)


def test_bad_requests():
    with pytest.raises(InvalidInputError, match="reports: must hold at least one, got none"):
        gap_table([])
    with pytest.raises(InvalidInputError, match="num_compared: must be at least 0, got -1"):
        gap_report(solve(diamond()), num_compared=-1)
    with pytest.raises(TooLargeError, match="pass max_edges=4"):
        gap_report(solve(diamond()), max_edges=3)
    with pytest.raises(InvalidInputError, match="got a batch of 2"):
        gap_report(solve(Batch.from_data_list([diamond()] * 2)))
    cut = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match="must be feasible"):
        gap_report(solve(cut))


@pytest.mark.parametrize("wide", [1.0, 1e6, 2.0**63, 1e300])
def test_wide_edges_change_no_ratio(wide: float):
    """Two routes of 1 and 3 behind edges of any width: alpha = 22/12, V = 4 once the edges are wide."""
    pairs = torch.tensor([[0, 0, 1, 2, 1, 3], [1, 2, 3, 3, 2, 4]])
    capacity = torch.tensor([wide, wide, 1.0, 3.0, 0.5, wide], dtype=torch.float64)
    report = gap_report(solve(FlowGraph.from_edges(pairs, capacity, num_nodes=5, question=[0], answer=[4])))
    if wide > 1:
        assert report.value == 4.0
        assert report.ratio == pytest.approx(11 / 24)
    assert 0 < report.ratio <= 1
