"""The certificate: true flows pass, every corruption is named, and the notes list what was not checked."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import Certificate, Flow, FlowGraph, InvalidInputError, TooLargeError, certify, certify_each, solve
from tests.fixtures.convert import to_graph
from tests.fixtures.graphs import DIAMOND, RELAY_PASS_THROUGH, WORKED_GRAPHS, WorkedGraph
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

some = settings(max_examples=60, deadline=None)
BEFORE_MAX_FLOW = {
    "graph", "absorbing", "reachability", "feasible", "out-mass", "source", "influence", "inflow", "outflow",
    "absorbed", "range", "path length", "inner products", "cuts", "congestion", "alpha", "smallest cut",
}  # fmt: skip
AGAINST_MAX_FLOW = {"max flow", "alpha <= V", "support", "through"}


def built(case: Case | WorkedGraph) -> FlowGraph:
    return to_graph(case.num_nodes, case.edges, case.question, case.answer)


def attention_graph(num_tokens: int = 40, seed: int = 0) -> FlowGraph:
    rows = np.tril(np.exp(2 * np.random.default_rng(seed).normal(size=(num_tokens, num_tokens))))
    rows /= rows.sum(1, keepdims=True)
    fifth = num_tokens // 5
    weights = torch.from_numpy(rows).float()
    return FlowGraph.from_dense(weights, question=slice(1, fifth), answer=slice(num_tokens - fifth, num_tokens))


def names(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks}


def failed(certificate: Certificate) -> set[str]:
    assert certificate.ok == (not certificate.failed)
    return {check.name for check in certificate.failed}


# True flows ----------------------------------------------------------------------------------------------


def test_the_certificate_of_the_diamond():
    certificate = certify(solve(built(DIAMOND)))
    assert certificate.ok
    # 0->2 is the fullest edge: g0 h2 = 16/5 * 3/4 = 12/5. Both ways are limited to 1/4: V = 1/4 + 1/4.
    assert certificate.alpha == pytest.approx(5 / 12, rel=1e-15)
    assert certificate.max_flow_value == 0.5
    assert certificate.gap == pytest.approx(5 / 6, rel=1e-15)
    details = {check.name: check.detail for check in certificate.checks}
    assert details["alpha"] == "0 -> 2 is full first"
    assert details["path length"] == "2 edges"  # both routes have two
    assert details["max flow"] == "V = 0.5, 2 edges cut"
    assert details["reachability"] == "4 of 4 tokens"
    # Through 2, M = 1/4 and alpha f = 5/12 * 3/5 = 1/4: it could not carry more.
    assert details["through"] == "at most 1 of it, 2 tokens"
    # Out of {0}: 1/2 + 1/4. Into {3}: 1/4 + 3/4. Behind 1 and before 2: 1/4 + 1/4, found at random.
    assert details["smallest cut"] == "the smallest of 21 is 0.5"
    assert names(certificate) == BEFORE_MAX_FLOW | AGAINST_MAX_FLOW
    assert certificate.notes == ()


@pytest.mark.parametrize("worked", WORKED_GRAPHS, ids=lambda worked: worked.name)
def test_hand_worked_graphs(worked: WorkedGraph):
    certificate = certify(solve(built(worked), absorption=worked.absorption))
    assert certificate.ok, str(certificate)
    assert certificate.alpha == pytest.approx(float(worked.alpha), rel=1e-14)
    assert certificate.max_flow_value == pytest.approx(float(worked.max_flow), rel=1e-14)
    assert certificate.gap == pytest.approx(float(worked.alpha / worked.max_flow), rel=1e-14)


@given(
    case=flow_graphs(max_nodes=9, min_nodes=2),
    absorption=st.sampled_from(["absorb", "pass_through"]),
    damping=st.sampled_from([1.0, 0.5, 0.3]),
    source=st.sampled_from(["uniform", "potential"]),
    backend=st.sampled_from(["dense", "scatter", "reference"]),
)
@some
def test_every_solved_flow_is_certified(case: Case, absorption: str, damping: float, source: str, backend: str):
    flow = solve(built(case), absorption=absorption, damping=damping, source=source, backend=backend)
    certificate = certify(flow)
    assert certificate.ok, str(certificate)
    edges = reference.effective_edges(case.edges, case.answer, absorption, damping)
    asked, answered = ([v for v, inside in enumerate(mask) if inside] for mask in (case.question, case.answer))
    exact = reference.max_flow_value(case.num_nodes, edges, asked, answered)
    assert certificate.max_flow_value == pytest.approx(float(exact), rel=1e-13)
    assert (exact > 0) == bool(flow.feasible)


@given(case=flow_graphs(max_nodes=8, min_nodes=2), data=st.data())
@some
def test_custom_source_and_demand_are_certified(case: Case, data: st.DataObject):
    vector = st.lists(
        st.sampled_from([0.0, 0.25, 1.0, 3.0, 1e-6, 1e6]), min_size=case.num_nodes, max_size=case.num_nodes
    )
    source, demand = (torch.tensor(data.draw(vector), dtype=torch.float64) for _ in range(2))
    absorption = data.draw(st.sampled_from([None, "absorb", "pass_through"]))
    flow = solve(built(case), source=source, demand=demand, absorption=absorption)
    certificate = certify(flow)
    assert certificate.ok, str(certificate)
    both = bool(((flow.source > 0) & (flow.demand > 0)).any())
    assert (certificate.max_flow_value is None) == both
    assert any("both source and demand" in note for note in certificate.notes) == both


@pytest.mark.parametrize("options", [{}, {"absorption": "pass_through"}, {"source": "potential"}, {"damping": 0.7}])
@pytest.mark.parametrize("num_tokens", [20, 150])
def test_attention_graphs_are_far_inside_the_bounds(num_tokens: int, options: dict):
    certificate = certify(solve(attention_graph(num_tokens), **options))
    assert certificate.ok, str(certificate)
    summed = {"out-mass", "influence", "inflow", "outflow", "absorbed", "path length", "inner products", "cuts"}
    for check in certificate.checks:
        assert check.bound <= 1e-10
        if check.name in summed:
            assert check.residual <= check.bound / 5, check
    assert 0 < (certificate.gap or 0) <= 1


def test_a_graph_pruned_by_flow_is_certified():
    rows = torch.from_numpy(np.tril(np.random.default_rng(0).random((60, 60)))).float()
    rows = rows / rows.sum(1, keepdim=True)
    graph = FlowGraph.from_rows(rows, question=slice(1, 10), answer=slice(50, 60), max_edges=300)
    assert certify(solve(graph)).ok


def test_long_chains_stay_inside_the_bounds():
    size = 600
    pairs = torch.stack([torch.arange(size - 1), torch.arange(1, size)])
    graph = FlowGraph.from_edges(
        pairs, torch.full((size - 1,), 0.37, dtype=torch.float64), num_nodes=size, question=[0], answer=[size - 1]
    )
    certificate = certify(solve(graph))
    assert certificate.ok, str(certificate)
    assert certificate.gap == pytest.approx(1, rel=1e-12)


def test_routes_below_the_range_of_float64_count_as_nothing():
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[1, 0], weights[2, 1], weights[3, 2], weights[3, 0] = 1e-160, 1e-160, 1.0, 0.5
    certificate = certify(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
    assert certificate.ok, str(certificate)


# No flow -------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable() -> FlowGraph:
    weights = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]])
    return FlowGraph.from_dense(weights, question=[0], answer=[3])


@pytest.mark.parametrize("source", ["uniform", "potential", torch.tensor([1.0, 1.0, 0, 0])])
def test_an_infeasible_flow_is_certified_as_such(unreachable: FlowGraph, source: str | Tensor):
    certificate = certify(solve(unreachable, source=source))  # type: ignore[arg-type]
    assert certificate.ok
    assert names(certificate) == {
        "graph", "absorbing", "reachability", "feasible", "out-mass", "zero flow", "max flow",
    }  # fmt: skip
    assert certificate.max_flow_value == 0
    assert certificate.gap is None
    assert certificate.alpha == float("inf")
    assert "no source token reaches the demand" in certificate.notes[0]


@pytest.mark.parametrize("name", ["g", "throughput", "source", "alpha", "feasible"])
def test_an_infeasible_flow_must_be_zero(unreachable: FlowGraph, name: str):
    flow = solve(unreachable)
    certificate = certify(changed(flow, name, at(0, 0.5 if name != "feasible" else True)))
    assert failed(certificate) & {"zero flow", "feasible", "source"}


def test_a_flow_that_claims_to_be_infeasible():
    flow = solve(built(DIAMOND))
    certificate = certify(changed(flow, "feasible", torch.zeros_like))
    assert failed(certificate) == {"feasible", "zero flow", "max flow"}


# Corrupted flows -----------------------------------------------------------------------------------------


class Dropped(Flow):
    """Reports nothing on its fullest edge."""

    @property
    def edge_flow(self) -> Tensor:
        flow = super().edge_flow
        flow[flow.argmax()] = 0.0
        return flow


class Leaky(Flow):
    """Loses one per mille on one edge."""

    @property
    def edge_flow(self) -> Tensor:
        flow = super().edge_flow
        flow[flow.argmax()] *= 0.999
        return flow


def changed(flow: Flow, name: str, change: Callable[[Tensor], Tensor]) -> Flow:
    value = change(getattr(flow, name).clone())
    if name in {field.name for field in dataclasses.fields(flow)}:
        return dataclasses.replace(flow, **{name: value})
    copy = dataclasses.replace(flow)
    copy.__dict__[name] = value  # computed on first use and remembered there
    return copy


def at(token: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(vector: Tensor) -> Tensor:
        vector[token] = value
        return vector

    return change


def as_class(flow: Flow, kind: type[Flow]) -> Flow:
    return kind(**{field.name: getattr(flow, field.name) for field in dataclasses.fields(flow)})


def with_graph(flow: Flow, **tensors: Tensor) -> Flow:
    graph = flow.graph.clone()
    for name, value in tensors.items():
        graph[name] = value
    return dataclasses.replace(flow, graph=graph)


def without_edge(flow: Flow) -> Flow:
    keep = torch.arange(flow.graph.num_edges) != int(flow.edge_flow.argmax())
    return with_graph(flow, edge_index=flow.graph.edge_index[:, keep], capacity=flow.graph.capacity[keep])


MUTATIONS: dict[str, tuple[Callable[[Flow], Flow], set[str]]] = {
    "h of one token off": (lambda flow: changed(flow, "h", lambda h: at(20, 1.1 * float(h[20]))(h)), {"out-mass"}),
    "h of one token zero": (lambda flow: changed(flow, "h", at(20, 0.0)), {"reachability", "out-mass"}),
    "h positive out of reach": (
        lambda flow: changed(solve(flow.graph, demand=1.0 * (torch.arange(40) == 35)), "h", at(36, 0.1)),
        {"reachability", "out-mass"},
    ),
    "h not a number": (lambda flow: changed(flow, "h", at(20, float("nan"))), {"out-mass", "congestion"}),
    "g of one token off": (lambda flow: changed(flow, "g", lambda g: at(20, 1.1 * float(g[20]))(g)), {"influence"}),
    "g infinite": (lambda flow: changed(flow, "g", at(20, float("inf"))), {"influence", "outflow"}),
    "g scaled": (
        lambda flow: changed(flow, "g", lambda g: 1.01 * g),
        {"influence", "absorbed", "inner products", "outflow"},
    ),
    "g and f scaled": (
        lambda flow: changed(changed(flow, "g", lambda g: 1.01 * g), "throughput", lambda f: 1.01 * f),
        {"influence", "inflow", "absorbed", "cuts"},
    ),
    "throughput of one token off": (lambda flow: changed(flow, "throughput", at(20, 0.5)), {"inflow", "outflow"}),
    "throughput above one": (lambda flow: changed(flow, "throughput", at(20, 1.5)), {"range", "inflow"}),
    "throughput below zero": (lambda flow: changed(flow, "throughput", at(20, -0.1)), {"range", "inflow"}),
    "source moved": (lambda flow: changed(flow, "source", lambda q: q.roll(1)), {"source", "inflow"}),
    "source scaled": (lambda flow: changed(flow, "source", lambda q: 0.9 * q), {"source", "cuts", "inner products"}),
    "source lost": (lambda flow: changed(flow, "source", torch.zeros_like), {"feasible", "zero flow"}),
    "demand of one token off": (lambda flow: changed(flow, "demand", at(35, 0.5)), {"out-mass", "absorbed"}),
    "demand lost": (lambda flow: changed(flow, "demand", torch.zeros_like), {"reachability", "feasible", "max flow"}),
    "source and demand swapped": (
        lambda flow: dataclasses.replace(flow, source=flow.demand / flow.demand.sum(), demand=flow.source),
        {"source", "out-mass", "reachability"},
    ),
    "alpha of another flow": (
        lambda flow: changed(flow, "alpha", lambda _: solve(flow.graph, absorption="pass_through").alpha),
        {"alpha"},
    ),
    "alpha too large": (
        lambda flow: changed(flow, "alpha", lambda a: 100 * a),
        {"alpha", "alpha <= V", "smallest cut", "through"},
    ),
    "alpha too small": (lambda flow: changed(flow, "alpha", lambda a: 0.5 * a), {"alpha"}),
    "alpha zero": (lambda flow: changed(flow, "alpha", torch.zeros_like), {"alpha"}),
    "alpha not a number": (lambda flow: changed(flow, "alpha", lambda a: a * torch.nan), {"alpha", "alpha <= V"}),
    "nothing absorbs": (
        lambda flow: changed(flow, "absorbing", torch.zeros_like),
        {"absorbing", "congestion", "outflow"},
    ),
    "everything absorbs": (
        lambda flow: changed(flow, "absorbing", torch.ones_like),
        {"absorbing", "congestion", "inflow"},
    ),
    "absorption misnamed": (
        lambda flow: dataclasses.replace(flow, absorption="pass_through"),
        {"absorbing", "out-mass"},
    ),
    "damping misnamed": (lambda flow: dataclasses.replace(flow, damping=0.9), {"out-mass", "influence"}),
    "rule misnamed": (lambda flow: dataclasses.replace(flow, source_rule="potential"), {"source"}),
    "an edge's flow dropped": (
        lambda flow: as_class(flow, Dropped),
        {"inflow", "outflow", "congestion", "path length"},
    ),
    "an edge's flow leaks": (lambda flow: as_class(flow, Leaky), {"inflow", "outflow", "congestion", "cuts"}),
    "an edge dropped": (without_edge, {"out-mass", "influence", "inflow", "outflow"}),
    "a capacity changed": (
        lambda flow: with_graph(flow, capacity=at(305, 0.5)(flow.graph.capacity.clone())),
        {"out-mass", "influence"},
    ),
    "source and target swapped": (lambda flow: with_graph(flow, edge_index=flow.graph.edge_index.flip(0)), {"graph"}),
    "edges out of order": (
        lambda flow: with_graph(flow, edge_index=flow.graph.edge_index.flip(1), capacity=flow.graph.capacity.flip(0)),
        {"graph"},
    ),
    "another graph's size": (lambda flow: dataclasses.replace(flow, graph=attention_graph(41)), {"graph"}),
    "another graph": (
        lambda flow: dataclasses.replace(flow, graph=attention_graph(40, seed=1)),
        {"out-mass", "influence"},
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_corrupted_flow_is_named(name: str):
    corrupt, caught_by = MUTATIONS[name]
    certificate = certify(corrupt(solve(attention_graph())))
    assert caught_by <= failed(certificate), str(certificate)
    assert "✗" in str(certificate)
    json.dumps(certificate.to_dict(), allow_nan=False)


@given(
    case=flow_graphs(max_nodes=9, min_nodes=2),
    name=st.sampled_from(["h", "g", "throughput", "source", "demand", "alpha"]),
    data=st.data(),
)
@some
def test_no_stored_number_can_change_unseen(case: Case, name: str, data: st.DataObject):
    flow = solve(built(case))
    positive = getattr(flow, name).isfinite() & (getattr(flow, name) > 0)
    if not positive.any():
        return
    index = data.draw(st.sampled_from(positive.nonzero().flatten().tolist()))
    factor = data.draw(st.sampled_from([1 + 1e-12, 1 - 1e-12, 2.0, 0.0]))
    corrupted = changed(flow, name, lambda vector: at(index, factor * float(vector[index]))(vector))
    assert not certify(corrupted).ok


# What is asked for and what is said ------------------------------------------------------------------------


def test_without_the_max_flow():
    flow = solve(built(DIAMOND))
    certificate = certify(flow, level="fast")
    assert certificate.ok
    assert names(certificate) == BEFORE_MAX_FLOW
    assert certificate.max_flow_value is certificate.gap is None
    assert "level='fast'" in certificate.notes[0]


def test_above_the_size_limit():
    flow = solve(built(DIAMOND))
    certificate = certify(flow, max_edges=3)
    assert names(certificate) == BEFORE_MAX_FLOW
    assert certificate.notes == (
        "max flow: not computed; 4 edges are above max_edges = 3; pass max_edges=4 to compute it",
    )
    with pytest.raises(TooLargeError, match="pass max_edges=4"):
        certify(flow, level="exact", max_edges=3)
    assert certify(flow, level="exact", max_edges=4).max_flow_value == 0.5


def test_through_can_be_left_out_and_is_absent_without_inner_tokens():
    without = certify(solve(built(DIAMOND)), num_through=0)
    direct = certify(solve(FlowGraph.from_dense(torch.tensor([[0.0, 0], [0.5, 0]]), question=[0], answer=[1])))
    for certificate in (without, direct):
        assert certificate.ok
        assert "through" not in names(certificate)
        assert certificate.notes[0].startswith("through: not computed")


def test_the_seed_chooses_the_random_cuts():
    flow = solve(attention_graph())
    assert certify(flow, seed=3) == certify(flow, seed=3)
    assert certify(flow, seed=4).ok


def test_a_batch_is_certified_graph_by_graph():
    graphs = [attention_graph(12), attention_graph(30, seed=2), attention_graph(20, seed=3)]
    flow = solve(Batch.from_data_list(graphs))
    with pytest.raises(InvalidInputError, match=r"one graph, got a flow over a Batch of 3; use certify_each\(flow\)"):
        certify(flow)
    together = certify_each(flow, num_through=2)
    assert all(certificate.ok for certificate in together)
    for one, graph in zip(together, graphs, strict=True):
        assert one.alpha == pytest.approx(certify(solve(graph)).alpha, rel=1e-13)
    crossed = changed(flow, "g", at(15, 0.0))
    assert [certificate.ok for certificate in certify_each(crossed)] == [True, False, True]
    assert len(certify_each(solve(graphs[0]))) == 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"level": "maybe"}, "level: must be one of 'auto', 'fast', 'exact', 'rational', got 'maybe'"),
        ({"num_through": -1}, "num_through: must be at least 0, got -1"),
    ],
)
def test_options_outside_their_range(options: dict, pattern: str):
    with pytest.raises(InvalidInputError, match=pattern):
        certify(solve(built(DIAMOND)), **options)


def test_as_text():
    lines = str(certify(solve(built(DIAMOND)))).splitlines()
    assert lines[:2] == ["Certificate: all 21 checks hold", "  alpha = 0.416667, max flow V = 0.5, alpha / V = 0.8333"]
    assert all(line.startswith("  ✓ ") for line in lines[2:])
    assert len({line.index("<=") for line in lines[2:] if "alpha <= V" not in line}) == 1
    broken = str(certify(changed(solve(built(DIAMOND)), "throughput", at(1, 0.5)), level="fast"))
    assert broken.startswith("Certificate: 3 of 17 checks FAIL: inflow, outflow, path length\n")
    assert "  ✗ inflow " in broken
    assert broken.splitlines()[-1].startswith("  note: max flow: not computed")


def test_as_json():
    flow = solve(built(DIAMOND))
    record = json.loads(json.dumps(certify(flow).to_dict(), allow_nan=False))
    assert record["ok"] is True
    assert record["max_flow_value"] == 0.5
    assert record["checks"][0] == {
        "name": "graph",
        "statement": "edges run forward in token order; regions are disjoint",
        "residual": 0.0,
        "bound": 0.0,
        "ok": True,
        "detail": "",
    }
    weights = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    silent = solve(FlowGraph.from_dense(weights, question=[0], answer=[1]), source=torch.tensor([0.0, 1.0]))
    assert certify(silent).to_dict()["alpha"] is None  # all of it enters at the answer, no edge carries flow


def test_records_are_frozen():
    certificate = certify(solve(built(RELAY_PASS_THROUGH)))
    for record, name in ((certificate, "alpha"), (certificate.checks[0], "ok")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)
