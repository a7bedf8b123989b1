"""Compositions against their papers' formulas, their residuals and certificates, and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, Data

import flowgraph as fg
from flowgraph import (
    ComposedScores,
    FlowGraph,
    GraphError,
    InvalidInputError,
    NumericalRangeError,
    RegionError,
    SignedGraph,
    capture,
    certify,
    compose,
    composed_scores,
    composition,
    composition_names,
    solve,
)
from tests.fixtures.models import build, family, padded, sequences
from tests.reference import compositions as reference
from tests.strategies import FlowGraph as DrawnGraph
from tests.strategies import flow_graphs

NAMES = ["cage", "flowtracer", "hops", "katz", "one_hop", "rollout", "vtrace"]


def example() -> FlowGraph:
    """A prompt of two tokens, two reasoning tokens, two answer tokens, with an edge between these."""
    weights = torch.tensor(
        [
            [0.0, 0, 0, 0, 0, 0],
            [0.8, 0, 0, 0, 0, 0],
            [0.3, 0.6, 0, 0, 0, 0],
            [0.1, 0.2, 0.5, 0, 0, 0],
            [0.2, 0.0, 0.3, 0.4, 0, 0],
            [0.0, 0.3, 0.1, 0.1, 0.5, 0],
        ],
        dtype=torch.float64,
    )
    return FlowGraph.from_dense(weights, question=[0, 1], answer=[4, 5])


def dense(graph: FlowGraph) -> np.ndarray:
    matrix = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    matrix[graph.edge_index[1], graph.edge_index[0]] = graph.capacity.double()
    return matrix.numpy()


def by_formula(name: str, graph: FlowGraph, **options: Any) -> np.ndarray:
    """The score of the paper's own formula, from the dense matrix."""
    C = dense(graph)
    answer = graph.answer_mask.double().numpy()
    question = graph.question_mask.double().numpy()
    generated = (graph.answer_mask | graph.reasoning_mask).numpy()
    prompt = np.cumsum(generated) == 0
    if name == "flowtracer":
        return reference.flowtracer(C, question, answer)
    if name == "cage":
        return reference.cage(C, prompt.astype(float), answer)
    if name == "vtrace":
        return reference.vtrace(C, answer, options.get("damping", 0.5))
    if name == "hops":
        return reference.hops(C, answer, options.get("k", 2), options.get("normalize", True))
    if name == "one_hop":
        return reference.one_hop(C, answer)
    if name == "katz":
        return reference.katz(C, options.get("damping", 0.5))
    assert name == "rollout"
    return reference.rollout([C] * options.get("layers", 6), answer, options.get("residual", 0.5))


def close(found: Tensor, wanted: np.ndarray) -> bool:
    return bool(np.allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12))


def test_every_composition_is_listed():
    assert set(NAMES) <= set(composition_names())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_papers_formula(name: str):
    assert close(compose(example(), name), by_formula(name, example()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vtrace", {"damping": 1.0}),
        ("vtrace", {"damping": 0.125}),
        ("hops", {"k": 1}),
        ("hops", {"k": 3, "normalize": False}),
        ("hops", {"k": 10**9}),
        ("katz", {"damping": 1.0}),
        ("rollout", {"layers": 1, "residual": 0.0}),
        ("rollout", {"layers": 3, "residual": 1.0}),
    ],
)
def test_it_is_its_papers_formula_with_options(name: str, options: dict):
    in_formula = options | ({"k": 6} if options.get("k") == 10**9 else {})
    assert close(compose(example(), name, **options), by_formula(name, example(), **in_formula))


@given(drawn=flow_graphs(max_nodes=9, min_nodes=2), name=st.sampled_from(NAMES))
@settings(max_examples=120, deadline=None)
def test_formulas_hold_on_generated_graphs(drawn: DrawnGraph, name: str):
    pairs = [(s, t) for s, t, _ in drawn.edges]
    graph = FlowGraph.from_edges(
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
        torch.tensor([float(weight) for _, _, weight in drawn.edges], dtype=torch.float64),
        num_nodes=drawn.num_nodes,
        question=torch.tensor(drawn.question),
        answer=torch.tensor(drawn.answer),
    )
    found = composed_scores(graph, name)
    assert close(found.scores, by_formula(name, graph))
    if found.residual is not None:
        assert found.residual < 1e-12
    if found.flow is not None and bool(found.flow.feasible):
        assert certify(found.flow, level="fast").ok


def test_residuals_and_flows():
    for name in NAMES:
        found = composed_scores(example(), name)
        assert isinstance(found, ComposedScores)
        assert found.name == name
        solves = name not in ("hops", "one_hop")
        assert (found.residual is not None) == solves
        assert (found.flow is not None) == (solves and name != "rollout")
        assert ("no equation" in repr(found)) != solves
    assert composed_scores(example(), "katz", damping=0.25).options == {"damping": 0.25, "demand": None}


def test_hops_end_at_the_potential():
    graph = example()
    assert torch.allclose(compose(graph, "hops", k=5, normalize=False), solve(graph).potentials[0], rtol=1e-14)
    more = [float(compose(graph, "hops", k=k)[0]) for k in (1, 2, 3, 4)]
    assert more == sorted(more)
    one = compose(graph, "hops", k=1, normalize=False) - graph.answer_mask.double()
    assert torch.allclose(one, compose(graph, "one_hop"), rtol=1e-14)


def test_cage_without_normalisation_is_the_potential_and_takes_a_prompt():
    graph = example()
    nothing = torch.zeros(6, dtype=torch.bool)
    free = compose(graph, "cage", normalize=False, prompt=nothing)
    flow = solve(graph, demand=graph.answer_mask.double())
    assert torch.allclose(free, flow.potentials[0], rtol=1e-14)
    C = dense(graph)
    prompt = np.array([1.0, 1, 1, 0, 0, 0])
    assert close(
        compose(graph, "cage", prompt=[0, 1, 2]), reference.cage(C, prompt, graph.answer_mask.double().numpy())
    )
    # Rows of the answer divide one unit each among the prompt tokens.
    assert float(compose(graph, "cage")[:2].sum()) == pytest.approx(2.0)


def test_a_batch_is_composed_graph_by_graph():
    small = FlowGraph.from_dense(torch.tensor([[0.0, 0], [0.25, 0]]), question=[0], answer=[1])
    batch = Batch.from_data_list([example(), small, example()])
    for name in NAMES:
        apart = torch.cat([compose(example(), name), compose(small, name), compose(example(), name)])
        assert torch.allclose(compose(batch, name), apart, rtol=1e-12), name


def test_derivatives_reach_the_capacities():
    for name in NAMES:
        graph = example()
        graph.capacity = graph.capacity.requires_grad_()
        compose(graph, name)[2].backward()
        assert graph.capacity.grad is not None
        assert bool(graph.capacity.grad.any()), name


def test_potentials_outside_the_range_of_float64_still_rank():
    """The weight of all walks exceeds 1e308; the shares of walks do not."""
    tokens = 2400
    index = torch.arange(1, tokens)
    edges = torch.cat([torch.stack([index - 1, index]), torch.stack([index[1:] - 2, index[1:]])], 1)
    graph = FlowGraph.from_edges(edges, torch.ones(edges.shape[1]), num_nodes=tokens, question=[0], answer=[tokens - 1])
    shares = compose(graph, "vtrace", damping=1.0)
    assert bool(((shares >= 0) & (shares <= 1 + 1e-12)).all())
    assert float(shares[-1]) == pytest.approx(1.0)
    with pytest.raises(
        NumericalRangeError, match="weights: the scores of composition 'katz' must fit float64, got inf"
    ):
        compose(graph, "katz", damping=1.0)


# Rows of a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "capacity", ["attention", "value_norm", "sharp", "sharp_max", "centred", "vtrace", "vtrace_share"]
)
def test_it_is_offered_for_every_non_negative_capacity(capacity: str, name: str):
    text = sequences()[0]
    rows = capture(family("llama"), text, capacity=capacity)
    masks: dict[str, Any] = {"question": slice(1, 8), "answer": [len(text) - 1]}
    graph = FlowGraph.from_rows(rows.sequence(), **masks)
    found = compose(rows, name, **masks)
    if name == "rollout":
        layers = [layer.double().numpy() for layer in rows.layer_rows()]
        targets = np.eye(len(text))[len(text) - 2]
        assert close(found, reference.rollout(layers, targets))
    else:
        wanted = by_formula(name, graph)
        assert np.allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-9 * wanted.max())


def test_rollout_of_captured_layers_is_that_of_the_layers_page():
    text = sequences()[0]
    rows = capture(build("llama", "eager"), text, layers="all")
    by_sweeps = fg.attention_rollout(rows.layer_rows(), targets=[len(text) - 1])[0]
    literal = compose(rows, "rollout", question=slice(1, 4), answer=[len(text) - 1], preset="paper")
    assert torch.allclose(literal, by_sweeps, rtol=1e-5, atol=1e-9)
    # Under emission rows the answer was given the row before.
    before = fg.attention_rollout(rows.layer_rows(), targets=[len(text) - 2])[0]
    emission = compose(rows, "rollout", question=slice(1, 4), answer=[len(text) - 1])
    assert torch.allclose(emission, before, rtol=1e-5, atol=1e-9)


def test_rows_of_a_padded_text():
    ids, mask = padded("right")
    text = sequences()[1]
    rows = capture(family("llama"), ids[1:], mask[1:])
    alone = capture(family("llama"), text)
    for name in NAMES:
        found = compose(rows, name, question=slice(1, 4), answer=[len(text) - 1])
        wanted = compose(alone, name, question=slice(1, 4), answer=[len(text) - 1])
        if name == "katz":
            continue  # padding is counted as an end of walks
        assert torch.allclose(found[: len(text)], wanted, rtol=1e-4, atol=1e-7), name


def test_a_matrix_of_capacities_or_of_attention():
    graph = example()
    matrix = torch.from_numpy(dense(graph))
    as_it_is = compose(matrix, "cage", question=[0, 1], answer=[4, 5], preset=None)
    assert torch.equal(as_it_is, compose(graph, "cage"))
    attention = torch.softmax(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).tril(), -1).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    by_rules = FlowGraph.from_rows(attention, question=[1], answer=[5])
    assert torch.equal(compose(attention, "hops", question=[1], answer=[5]), compose(by_rules, "hops"))


def test_the_prompt_of_cage_is_what_was_not_generated():
    text = sequences()[0]
    rows = capture(family("llama"), text)
    generated = torch.arange(len(text)) >= 10
    masks: dict[str, Any] = {"question": slice(1, 4), "answer": [len(text) - 1], "generated": generated}
    graph = FlowGraph.from_rows(rows.sequence(), **masks)
    prompt = (~generated).double().numpy()
    wanted = reference.cage(dense(graph), prompt, graph.answer_mask.double().numpy())
    assert np.allclose(compose(rows, "cage", **masks).numpy(), wanted, rtol=1e-6)
    assert torch.equal(compose(graph, "cage", generated=generated), compose(rows, "cage", **masks))


# A composition of one's own, and bad input ------------------------------------------------------------------


def test_a_composition_of_ones_own():
    @composition("degree of a test", defaults={"power": 1.0})
    def degree(graph: FlowGraph, *, power: float) -> Tensor:
        "Sum what each token is read by."
        weights = graph.capacity.double() ** power
        return torch.zeros(graph.num_nodes, dtype=torch.float64).index_add(0, graph.edge_index[0], weights)

    assert float(compose(example(), "degree of a test")[3]) == pytest.approx(0.5)
    assert float(compose(example(), "degree of a test", power=2.0)[3]) == pytest.approx(0.17)
    assert "degree of a test" in composition_names()
    # Numbers of numpy are numbers.
    assert torch.equal(compose(example(), "hops", k=np.int64(2)), compose(example(), "hops"))
    assert torch.equal(compose(example(), "katz", damping=np.float32(0.5)), compose(example(), "katz"))
    with pytest.raises(InvalidInputError, match="composition: needs a docstring whose first line describes it"):
        composition("another")(lambda graph: graph.capacity)
    with pytest.raises(InvalidInputError, match=r"name: must be a new name, got .cage., which flowgraph\.flow"):
        composition("cage")(degree)

    @composition("single precision of a test")
    def single(graph: FlowGraph) -> Tensor:
        "Return float32 scores."
        return torch.ones(graph.num_nodes)

    assert compose(example(), "single precision of a test").dtype == torch.float64

    @composition("list of a test")
    def listed(graph: FlowGraph) -> Any:
        "Return a list."
        return [1.0] * int(graph.num_nodes or 0)

    with pytest.raises(InvalidInputError, match="composition: 'list of a test' must return a tensor, got list"):
        compose(example(), "list of a test")

    @composition("wrong shape of a test")
    def wrong(graph: FlowGraph) -> Tensor:
        "Return the capacities."
        return graph.capacity

    with pytest.raises(
        InvalidInputError, match=r"composition: 'wrong shape of a test' must return one score per token"
    ):
        compose(example(), "wrong shape of a test")


NAN = math.nan


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("page_rank", {}, "composition: must be one of .*cage.*, got 'page_rank'; register your own"),
        (None, {}, "composition: must be one of .*, got None"),
        ("hops", {"k": 0}, "k: must be an integer of at least 1, got 0; 1 is what is read directly"),
        ("hops", {"k": -3}, "k: must be an integer of at least 1, got -3"),
        ("hops", {"k": 1.5}, "k: must be an integer of at least 1, got 1.5"),
        ("hops", {"k": True}, "k: must be an integer of at least 1, got True"),
        ("hops", {"k": NAN}, "k: must be an integer of at least 1, got nan"),
        ("hops", {"normalize": 1}, "normalize: must be True or False, got 1"),
        ("katz", {"damping": 0}, r"damping: must lie in \(0, 1\], got 0"),
        ("katz", {"damping": 1.5}, r"damping: must lie in \(0, 1\], got 1.5"),
        ("vtrace", {"damping": NAN}, r"damping: must lie in \(0, 1\], got nan"),
        ("vtrace", {"damping": "half"}, r"damping: must lie in \(0, 1\], got 'half'"),
        ("flowtracer", {"damping": -0.5}, r"damping: must lie in \(0, 1\], got -0.5"),
        ("flowtracer", {"source": "first"}, "source: must be one of 'uniform', 'potential', got 'first'"),
        ("rollout", {"residual": 1.01}, r"residual: must lie in \[0, 1\], got 1.01"),
        ("rollout", {"residual": NAN}, r"residual: must lie in \[0, 1\], got nan"),
        ("rollout", {"layers": 0}, "layers: must be an integer of at least 1, got 0"),
        ("cage", {"damping": 0.5}, "damping: does not apply to composition 'cage', got 0.5; its options are demand, n"),
        ("cage", {"demand": torch.ones(3)}, r"demand: must have one entry per token \(6,\), got shape \(3,\)"),
        ("katz", {"demand": -torch.ones(6)}, "demand: must be finite and non-negative, got -1"),
        ("one_hop", {"demand": torch.full((6,), NAN)}, "demand: must be finite and non-negative, got nan"),
        ("cage", {"prompt": [9]}, r"prompt: token indices must lie in 0\.\.5, got 9"),
        ("cage", {"answer": [5]}, "answer: goes with rows only, got a value beside a graph"),
        ("cage", {"preset": "paper"}, "preset: goes with rows only, got a value beside a graph"),
    ],
)
def test_bad_options(name: Any, options: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        compose(example(), name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_negative_capacities(name: str):
    graph = example()
    graph.capacity = graph.capacity.clone()
    graph.capacity[2] = -0.25
    source, target = graph.edge_index[:, 2].tolist()
    matrix = torch.from_numpy(dense(graph))
    if name == "one_hop":
        # A sum over single edges is right with any sign.
        wanted_scores = reference.one_hop(dense(graph), graph.answer_mask.double().numpy())
        assert close(compose(graph, name), wanted_scores)
        assert close(compose(matrix, name, question=[0, 1], answer=[4, 5], preset=None), wanted_scores)
        with pytest.raises(GraphError, match="rows: must be those of one sequence, got a batch of 2"):
            compose(matrix.expand(2, 6, 6), name, question=[0, 1], answer=[4, 5])
        with pytest.raises(GraphError, match="attention: must be causal"):
            compose(matrix.T, name, question=[0, 1], answer=[4, 5])
        return
    wanted = (
        rf"weights: must not be negative for composition '{name}', got -0.25 on the edge {source} -> {target}; use a"
    )
    with pytest.raises(InvalidInputError, match=wanted):
        compose(graph, name)
    for preset in ("default", None):
        with pytest.raises(
            InvalidInputError, match=f"weights: must not be negative for composition '{name}', got -0.25"
        ):
            compose(matrix, name, question=[0, 1], answer=[4, 5], preset=preset)


def signed(graph: FlowGraph) -> Data:
    """The same edges with their weights as a graph of signed weights."""
    masks = {name: graph[name] for name in ("question_mask", "reasoning_mask", "answer_mask")}
    return Data(edge_index=graph.edge_index, weight=graph.capacity, num_nodes=graph.num_nodes, **masks)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_signed_weights(name: str):
    graph = example()
    assert torch.equal(compose(signed(graph), name), compose(graph, name))
    graph.capacity = graph.capacity.clone()
    graph.capacity[3] = -1.0
    if name == "one_hop":
        assert torch.equal(compose(signed(graph), name), compose(graph, name))
        return
    with pytest.raises(InvalidInputError, match=f"weights: must not be negative for composition '{name}', got -1"):
        compose(signed(graph), name)


def test_signed_rows_of_a_model():
    text = sequences()[0]
    answer = torch.arange(len(text)) == len(text) - 1
    rows = capture(family("llama"), text, capacity="relevance", answer=answer, target="logprob")
    with pytest.raises(
        InvalidInputError, match=r"weights: must not be negative for composition 'cage'.*rows.throughput"
    ):
        compose(rows, "cage", question=slice(1, 4), answer=answer)


@pytest.mark.parametrize("capacity", ["relevance", "gradient"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_one_hop_reads_signed_rows(capacity: str, preset: str):
    text = sequences()[0]
    tokens = len(text)
    answer = torch.arange(tokens) >= tokens - 2
    rows = capture(family("llama"), text, capacity=capacity, answer=answer, target="logprob")
    found = compose(rows, "one_hop", question=slice(1, 4), answer=answer, preset=preset)
    # Under emission rows an answer token was read by the position before it; the first token is left out.
    matrix = rows.dense()[0].double()
    shift = 1 if preset == "default" else 0
    wanted = matrix[tokens - 2 - shift] + matrix[tokens - 1 - shift]
    wanted[tokens - 2 :] = 0
    wanted[0] = wanted[0] * (1 - shift)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)
    assert bool((found < 0).any())


@pytest.mark.parametrize("capacity", ["relevance", "gradient"])
def test_signed_rows_become_a_signed_graph(capacity: str):
    received = []

    @composition(f"largest weight of {capacity}", signed=True)
    def largest_weight(graph: FlowGraph | SignedGraph) -> Tensor:
        """Score every token by the largest absolute weight."""
        received.append(graph)
        weight = graph.weight if isinstance(graph, SignedGraph) else graph.capacity
        return weight.abs().max().double().expand(graph.answer_mask.shape[0])

    text = sequences()[0]
    answer = torch.arange(len(text)) >= len(text) - 2
    rows = capture(family("llama"), text, capacity=capacity, answer=answer, target="logprob")
    scores = compose(rows, f"largest weight of {capacity}", question=slice(1, 4), answer=answer, preset=None)
    assert isinstance(received[0], SignedGraph)
    received[0].validate()
    assert bool((received[0].weight < 0).any())
    assert float(scores[0]) == float(rows.dense().abs().max())
    # Derivatives reach signed weights as they reach capacities.
    graph = example()
    weight = torch.where(torch.arange(graph.num_edges) == 3, -1.0, graph.capacity).requires_grad_()
    one_hop = compose(signed(graph).update({"weight": weight}), "one_hop")
    one_hop.sum().backward()
    is_read = graph.answer_mask[graph.edge_index[1]] & ~graph.answer_mask[graph.edge_index[0]]
    assert torch.equal(weight.grad, is_read.to(weight.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_signed_graphs_is_scaled_graph_by_graph(name: str):
    graphs = [example(), example()]
    graphs[1].capacity = 8 * graphs[1].capacity
    as_signed = []
    for graph in graphs:
        masks = {region: graph[f"{region}_mask"] for region in ("question", "reasoning", "answer")}
        as_signed.append(SignedGraph.from_edges(graph.edge_index, graph.capacity, num_nodes=graph.num_nodes, **masks))
    wanted = compose(Batch.from_data_list(graphs), name)
    assert torch.allclose(compose(Batch.from_data_list(as_signed), name), wanted, rtol=1e-12)


@pytest.mark.unchecked
def test_bad_weights():
    graph = example()
    graph.capacity = graph.capacity.clone()
    graph.capacity[0] = NAN
    with pytest.raises(GraphError, match="capacity: must be finite, got nan on the edge 0 -> 1"):
        compose(graph, "cage")
    with pytest.raises(GraphError, match="weights: must be a FlowGraph, captured rows or a matrix, got str"):
        compose("graph", "cage")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="weights: must be a FlowGraph or a signed graph, got Data without weight, qu"):
        compose(Data(edge_index=graph.edge_index), "cage")
    with pytest.raises(InvalidInputError, match="question: must be given with rows, got none"):
        compose(torch.eye(3), "cage", answer=[2])
    with pytest.raises(GraphError, match="rows: must be those of one sequence, got a batch of 2"):
        compose(torch.eye(3).expand(2, 3, 3), "cage", question=[1], answer=[2])
    with pytest.raises(RegionError, match="answer: must hold at least one token"):
        compose(torch.eye(3), "cage", question=[1], answer=[])
