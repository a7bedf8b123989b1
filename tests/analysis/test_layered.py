"""Rollout and attention flow: worked by hand, from their definitions, on a real model; then what is refused."""

from fractions import Fraction

import networkx as nx
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowgraph import (
    GraphError,
    InvalidInputError,
    MemoryLimitError,
    RegionError,
    TooLargeError,
    attention_flow,
    attention_rollout,
    capture,
    certify,
    layered_graph,
    max_flow,
    prune,
    solve,
)
from tests.fixtures.models import family, padded, sequences
from tests.reference import layered as reference

BACKENDS = ("numba", "scatter", "dense", "reference")
UNITS = 64
"""Weights are whole 64ths, so that every product and sum below is exact in float64."""

# Two layers, two tokens, causal. Mixed with the residual, A_1 = [[1, 0], [1/4, 3/4]] and A_2 = [[1, 0], [3/8, 5/8]].
CAUSAL = torch.tensor([[[1.0, 0.0], [1 / 2, 1 / 2]], [[1.0, 0.0], [3 / 4, 1 / 4]]])
# Two layers, three tokens, each reads all three.
BOTH_WAYS = torch.tensor(
    [
        [[1 / 2, 1 / 4, 1 / 4], [0, 0, 1], [1 / 2, 0, 1 / 2]],
        [[0, 1 / 2, 1 / 2], [1 / 4, 1 / 2, 1 / 4], [1, 0, 0]],
    ]
)
# Three layers, two tokens, in which paths share edges.
SHARED = torch.tensor([[[0.0, 1], [1, 0]], [[1, 0], [1, 0]], [[1, 0], [1 / 2, 1 / 2]]])


def random_attention(layers: int, tokens: int, seed: int = 0, causal: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, tokens, tokens, generator=generator, dtype=torch.float64)
    if causal:
        logits = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return logits.softmax(-1)


def product_of(attention: Tensor, residual: float = 0.5) -> Tensor:
    """The reference in floats: matrices multiplied."""
    identity = torch.eye(attention.shape[1], dtype=torch.float64)
    total = identity
    for layer in attention.double():
        total = ((1 - residual) * layer + residual * identity) @ total
    return total


@st.composite
def attentions(draw: st.DrawFn, most_inner_nodes: int = 6) -> list[list[list[int]]]:
    """Rows of whole units that sum to ``UNITS``, some of them sharp, some with zeros, not necessarily causal."""
    tokens = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 1 + most_inner_nodes // tokens if tokens > 1 else 3))
    cuts = st.lists(st.integers(0, UNITS), min_size=tokens - 1, max_size=tokens - 1).map(sorted)
    row = cuts.map(lambda cut: [b - a for a, b in zip([0, *cut], [*cut, UNITS], strict=True)])
    layer = st.lists(row, min_size=tokens, max_size=tokens)
    return draw(st.lists(layer, min_size=layers, max_size=layers))


def in_fractions(units: list[list[list[int]]], residual: Fraction) -> list[reference.Matrix]:
    return reference.mixed([[[Fraction(w, UNITS) for w in row] for row in layer] for layer in units], residual)


def floats(matrix: reference.Matrix) -> list[list[float]]:
    return [[float(x) for x in row] for row in matrix]


# Worked by hand -----------------------------------------------------------------------------------------


def test_the_graph_of_two_layers_and_two_tokens():
    graph = layered_graph(CAUSAL, question=[0], answer=[1])
    # Node = layer * 2 + token. Layer 1: 0->2 of 1, 0->3 of 1/4, 1->3 of 3/4; layer 2: 2->4 of 1, 2->5 of 3/8, 3->5.
    assert graph.edge_index.tolist() == [[0, 0, 1, 2, 2, 3], [2, 3, 3, 4, 5, 5]]
    assert graph.capacity.tolist() == [1, 1 / 4, 3 / 4, 1, 3 / 8, 5 / 8]
    assert graph.num_nodes == 6
    assert graph.question_mask.nonzero().flatten().tolist() == [0]
    assert graph.reasoning_mask.nonzero().flatten().tolist() == [2, 3]
    assert graph.answer_mask.nonzero().flatten().tolist() == [5]
    assert graph.rules == "layered, layers=2, tokens=2, residual=0.5"
    assert graph.validate()


def test_two_causal_layers():
    # Rollout of token 1 from 0: 3/8 * 1 (through token 0) + 5/8 * 1/4 (through 1) = 17/32; from 1: 5/8 * 3/4 = 15/32.
    assert attention_rollout(CAUSAL).tolist() == [[1, 0], [17 / 32, 15 / 32]]
    # Flow: the same two routes carry min(1, 3/8) + min(1/4, 5/8) = 5/8 from 0; min(3/4, 5/8) = 5/8 from 1.
    assert attention_flow(CAUSAL).tolist() == [[1, 0], [5 / 8, 5 / 8]]


def test_two_layers_that_look_both_ways():
    # Mixed, in eighths: A_1 = [[6, 1, 1], [0, 4, 4], [2, 0, 6]], A_2 = [[4, 2, 2], [1, 6, 1], [4, 0, 4]].
    # Rollout, in 64ths, row 0: 4*[6,1,1] + 2*[0,4,4] + 2*[2,0,6] = [28, 12, 24];
    # row 1: [6,1,1] + 6*[0,4,4] + [2,0,6] = [8, 25, 31]; row 2: 4*[6,1,1] + 4*[2,0,6] = [32, 4, 28].
    assert (64 * attention_rollout(BOTH_WAYS)).tolist() == [[28, 12, 24], [8, 25, 31], [32, 4, 28]]
    # With two layers routes share no edge, so the flow from s to t is the sum over k of min(A_2[t, k], A_1[k, s]).
    # In eighths, row 0, from 0: min(4,6) + min(2,0) + min(2,2) = 6; from 1: 1 + 2 + 0 = 3; from 2: 1 + 2 + 2 = 5.
    # Row 1: 1 + 0 + 1 = 2; 1 + 4 + 0 = 5; 1 + 4 + 1 = 6. Row 2: 4 + 0 + 2 = 6; 1 + 0 + 0 = 1; 1 + 0 + 4 = 5.
    assert (8 * attention_flow(BOTH_WAYS)).tolist() == [[6, 3, 5], [2, 5, 6], [6, 1, 5]]


def test_paths_that_share_an_edge_share_its_capacity():
    # Mixed: A_1 = [[1/2, 1/2], [1/2, 1/2]], A_2 = [[1, 0], [1/2, 1/2]], A_3 = [[1, 0], [1/4, 3/4]].
    # Into token 1 from 0 there are three paths, whose smallest weights are 1/4, 1/2 and 1/2; their sum, 5/4, is more
    # than token 1 reads at all. What fits: 1/4 + 1/4 by way of (1, 0), 1/2 by way of (1, 1), which makes 1.
    assert [min(path) for path in reference.paths(reference.mixed(SHARED.tolist(), Fraction(1, 2)), 0, 1)] == [
        *(1 / 4, 1 / 2),
        *(0, 1 / 2),
    ]
    assert attention_flow(SHARED).tolist() == [[1 / 2, 1 / 2], [1, 1]]
    # Rollout: all rows of A_1 are equal, and means of equal rows are that row.
    assert attention_rollout(SHARED).tolist() == [[1 / 2, 1 / 2], [1 / 2, 1 / 2]]


def test_one_layer_is_the_mixed_attention_itself():
    mixed = [[3 / 4, 1 / 8, 1 / 8], [0, 1 / 2, 1 / 2], [1 / 4, 0, 3 / 4]]
    assert attention_rollout(BOTH_WAYS[:1]).tolist() == mixed
    assert attention_flow(BOTH_WAYS[:1]).tolist() == mixed
    assert not layered_graph(BOTH_WAYS[:1], question=[0], answer=[1]).reasoning_mask.any()


def test_one_token_reads_itself():
    alone = torch.ones(3, 1, 1)
    assert attention_rollout(alone).tolist() == attention_flow(alone).tolist() == [[1]]
    assert layered_graph(alone, question=[0], answer=[0]).edge_index.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_the_residual_share():
    # r = 1: nothing is read, every token stays itself. r = 0: attention alone; in quarters, row 2 of the product is
    # row 0 of the first layer, [2, 1, 1]; row 0 is (row 1 + row 2) / 2 = [1, 0, 3].
    identity = torch.eye(3).tolist()
    assert attention_rollout(BOTH_WAYS, residual=1).tolist() == identity
    assert attention_flow(BOTH_WAYS, residual=1).tolist() == identity
    rows = attention_rollout(BOTH_WAYS, residual=0)
    assert (4 * rows[[0, 2]]).tolist() == [[1, 0, 3], [2, 1, 1]]
    assert layered_graph(BOTH_WAYS, question=[0], answer=[2], residual=0).num_edges == 6 + 6  # zeros are no edges


# From the definitions -----------------------------------------------------------------------------------


@settings(max_examples=80)
@given(attentions(), st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(1)]))
def test_rollout_is_the_product_and_the_sum_over_paths(units: list[list[list[int]]], residual: Fraction):
    layers = in_fractions(units, residual)
    exact = reference.rollout_of_matrices(layers)
    assert exact == reference.rollout_of_paths(layers)
    attention = torch.tensor(units, dtype=torch.float64) / UNITS
    found = attention_rollout(attention, residual=float(residual))
    assert found.tolist() == floats(exact)


@settings(max_examples=80)
@given(attentions(), st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(1)]))
def test_flow_is_the_smallest_of_all_cuts(units: list[list[list[int]]], residual: Fraction):
    exact = reference.flow_of_cuts(in_fractions(units, residual))
    attention = torch.tensor(units, dtype=torch.float64) / UNITS
    assert attention_flow(attention, residual=float(residual)).tolist() == floats(exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layers", "tokens", "causal"), [(6, 40, False), (12, 9, True), (2, 70, True)])
def test_rollout_is_the_product_of_larger_matrices(layers: int, tokens: int, causal: bool, backend: str):
    attention = random_attention(layers, tokens, causal=causal)
    targets = slice(tokens - 8, tokens)
    rows = attention_rollout(attention, targets=targets, residual=0.3, backend=backend)
    assert torch.allclose(rows, product_of(attention, 0.3)[targets], rtol=1e-13, atol=0)
    assert torch.allclose(rows.sum(1), torch.ones(8, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_flow_is_that_of_networkx_in_the_direction_of_the_paper(causal: bool):
    layers, tokens = 4, 5
    attention = random_attention(layers, tokens, seed=3, causal=causal)
    downwards = nx.DiGraph()
    for level, layer in enumerate(0.5 * attention + 0.5 * torch.eye(tokens), start=1):
        for t in range(tokens):
            for s in range(tokens):
                downwards.add_edge((level, t), (level - 1, s), capacity=layer[t, s].item())
    expected = [[nx.maximum_flow_value(downwards, (layers, t), (0, s)) for s in range(tokens)] for t in range(tokens)]
    found = attention_flow(attention)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_the_mix_of_the_authors_code_is_the_same():
    """Theirs adds the identity and divides by the row sums, as the text says in words; the formula halves both."""
    attention = random_attention(3, 4)
    total = torch.eye(4, dtype=torch.float64)
    for layer in attention + torch.eye(4):
        total = layer / layer.sum(-1, keepdim=True) @ total
    assert torch.allclose(attention_rollout(attention), total, rtol=1e-14)


def test_some_targets_and_sources():
    attention = random_attention(3, 5)
    everything = attention_flow(attention)
    assert torch.equal(attention_flow(attention, targets=[4, 1], sources=slice(0, 2)), everything[[1, 4], :2])
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(attention_rollout(attention, targets=mask), attention_rollout(attention)[mask])


def test_earlier_layers_are_their_own_rollout():
    attention = random_attention(5, 4)
    up_to_third = layered_graph(attention[:3], question=[0], answer=[0])
    whole = layered_graph(attention, question=[0], answer=[0])
    assert torch.equal(up_to_third.capacity, whole.capacity[: up_to_third.num_edges])
    assert torch.allclose(attention_rollout(attention[:3]), product_of(attention[:3]), rtol=1e-14)


# A graph like any other ---------------------------------------------------------------------------------


def test_the_conserved_flow_over_layers():
    attention = random_attention(4, 6)
    graph = layered_graph(attention, question=slice(0, 3), answer=[5])
    flow = solve(graph)
    assert certify(flow).ok
    assert torch.allclose(flow.h[:6], attention_rollout(attention, targets=[5])[0], rtol=1e-15)
    # One unit climbs from layer to layer: every layer carries all of it.
    assert torch.allclose(flow.throughput.view(5, 6).sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-12)
    best = max_flow(graph).value
    assert flow.alpha.item() <= best * (1 + 1e-12)
    assert best >= attention_flow(attention, targets=[5], sources=slice(0, 3)).max().item() * (1 - 1e-12)
    assert certify(solve(prune(flow, keep=0.9))).ok


def test_what_a_token_cannot_read_is_no_error():
    flow = solve(layered_graph(CAUSAL, question=[1], answer=[0]))
    assert not flow.feasible
    assert attention_flow(CAUSAL, targets=[0], sources=[1]).item() == 0


def test_derivatives_reach_the_attention():
    logits = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for backend in ("scatter", "auto"):
        assert torch.autograd.gradcheck(lambda x, b=backend: attention_rollout(x.softmax(-1), backend=b), (logits,))
    assert not attention_flow(logits.softmax(-1)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_mixed_in_float64(dtype: torch.dtype):
    attention = random_attention(2, 4).to(dtype)
    rows = attention_rollout(attention, residual=0.3)
    assert rows.dtype == torch.float64
    assert torch.allclose(rows, product_of(attention, 0.3), rtol=1e-14, atol=0)


# A model ------------------------------------------------------------------------------------------------


def by_layer(text: Tensor, name: str = "llama") -> Tensor:
    """Joined attention of each layer from the eager model, and nothing of ours."""
    with torch.no_grad():
        attentions = family(name, "eager")(input_ids=text[None], output_attentions=True, use_cache=False).attentions
    return torch.stack(attentions)[:, 0].mean(1)


@pytest.mark.parametrize("name", ["llama", "bloom", "qwen3_sliding"])
def test_every_layer_of_one_capture(name: str):
    text = sequences()[0]
    rows = capture(family(name), text, layers="all")
    layers = rows.layer_rows()
    expected = by_layer(text, name)
    assert torch.allclose(layers, expected, atol=1e-5)
    assert torch.allclose(layers.mean(0), rows.dense()[0], atol=1e-6)
    assert torch.allclose(attention_rollout(layers), product_of(expected), atol=1e-5)
    some = attention_flow(layers, targets=[len(text) - 1], sources=[0, 1])
    assert torch.allclose(some, attention_flow(expected, targets=[len(text) - 1], sources=[0, 1]), atol=1e-5)


def test_a_learned_sink_has_to_be_divided_out():
    layers = capture(family("gpt_oss"), sequences()[0], layers="all").layer_rows()
    with pytest.raises(GraphError, match=r"every row must sum to 1, got 0\.\d+ at .*a learned sink"):
        attention_rollout(layers)
    divided = layers / layers.sum(-1, keepdim=True)
    assert torch.allclose(attention_rollout(divided), product_of(divided), rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_of_a_padded_sequence(side: str):
    rows = capture(family("llama"), *padded(side), layers=[2, 0])
    assert rows.layers == (0, 2)
    for item, text in enumerate(sequences()):
        assert torch.allclose(rows.layer_rows(item), by_layer(text)[[0, 2]], atol=1e-5)


def test_layers_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch):
    rows = capture(family("llama"), sequences()[0], layers="all")
    at_once = rows.layer_rows()
    monkeypatch.setattr("flowgraph.attention.attention_rows.BLOCK", 7)
    assert torch.allclose(rows.layer_rows(), at_once, atol=1e-6)


def test_layers_that_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    rows = capture(family("llama"), sequences()[0], layers="all")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(MemoryLimitError, match=r"rows of 3 layers x 24 tokens: would need .*capture fewer layers"):
        rows.layer_rows()


def test_graphs_that_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    # 3 * 24 * 24 weights of 16 bytes and, none of them being zero, as many edges and 72 more of 85 bytes: 180,648.
    attention = random_attention(3, 24)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 200_000})())
    with pytest.raises(MemoryLimitError, match=r"a graph of 3 layers x 24 tokens: would need .*take fewer layers"):
        attention_rollout(attention)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 201_000})())
    assert attention_rollout(attention).shape == (24, 24)


# What is refused ----------------------------------------------------------------------------------------


def spoiled(value: float) -> Tensor:
    attention = BOTH_WAYS.clone()
    attention[1, 2, 0] = value
    return attention


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (BOTH_WAYS[0], r"attention: must be a tensor \[layers, tokens, tokens\], got shape \(3, 3\); join the heads"),
        (BOTH_WAYS[:, :2], r"attention: must be a tensor .*, got shape \(2, 2, 3\)"),
        (BOTH_WAYS[None], r"attention: must be a tensor .*, got shape \(1, 2, 3, 3\); join the heads of one sequence"),
        (tuple(BOTH_WAYS), "attention: must be a tensor .*, got tuple; .*torch.stack"),
        (BOTH_WAYS[:0], r"attention: must hold at least one layer and one token, got shape \(0, 3, 3\)"),
        (BOTH_WAYS[:, :0, :0], r"attention: must hold at least one layer and one token, got shape \(2, 0, 0\)"),
        (torch.eye(2, dtype=torch.int64)[None], "attention: must be floating point, got torch.int64; call .float()"),
        (spoiled(torch.nan), r"attention: must be finite and non-negative, got nan at \[1, 2, 0\]"),
        (spoiled(torch.inf), r"attention: must be finite and non-negative, got inf at \[1, 2, 0\]"),
        (spoiled(-0.5), r"attention: must be finite and non-negative, got -0.5 at \[1, 2, 0\]"),
        (spoiled(0.75), r"attention: every row must sum to 1, got 0.75 at \[1, 2\]; .*leave padding out"),
        (BOTH_WAYS * 1.01, r"attention: every row must sum to 1, got 1.01 at \[0, 0\]"),
    ],
)
def test_what_is_no_attention(attention: Tensor, message: str):
    for refused in (attention_rollout, attention_flow, lambda x: layered_graph(x, question=[0], answer=[0])):
        with pytest.raises(GraphError, match=message):
            refused(attention)


@pytest.mark.parametrize("residual", [-0.1, 1.5, float("nan")])
def test_residuals_outside_their_range(residual: float):
    with pytest.raises(InvalidInputError, match=rf"residual: must lie in \[0, 1\], got {residual}; 0.5 gives"):
        attention_rollout(BOTH_WAYS, residual=residual)


def test_tokens_that_are_not_there():
    with pytest.raises(RegionError, match=r"targets: token indices must lie in 0..2, got 3; "):
        attention_rollout(BOTH_WAYS, targets=[3])
    with pytest.raises(RegionError, match=r"sources: token indices must lie in 0..2, got -1; "):
        attention_flow(BOTH_WAYS, sources=[-1])
    with pytest.raises(RegionError, match=r"targets: a mask must have one entry per token \(3\), got 2"):
        attention_flow(BOTH_WAYS, targets=[True, False])
    with pytest.raises(RegionError, match=r"sources: must hold at least one token, got none; name tokens in 0..2"):
        attention_flow(BOTH_WAYS, sources=[])
    with pytest.raises(RegionError, match=r"question: token indices must lie in 0..2, got 8"):
        layered_graph(BOTH_WAYS, question=[8], answer=[0])
    with pytest.raises(RegionError, match=r"answer: must hold at least one token, got none"):
        layered_graph(BOTH_WAYS, question=[0], answer=slice(3, 3))


@pytest.mark.unchecked
def test_unknown_backends():
    with pytest.raises(InvalidInputError, match=r"backend: must be one of .*, got 'cuda'"):
        attention_rollout(BOTH_WAYS, backend="cuda")


def test_flow_between_too_many_pairs():
    # Nine pairs over 7 + 8 edges.
    with pytest.raises(
        TooLargeError,
        match=r"attention: 9 max flows over 15 edges each must stay within max_edges = 134 in all, got 135 "
        r"\(roughly 0 s\); pass max_edges=135 to run them, or choose targets and sources",
    ):
        attention_flow(BOTH_WAYS, max_edges=134)
    assert attention_flow(BOTH_WAYS, max_edges=135).shape == (3, 3)
    assert attention_flow(BOTH_WAYS, targets=[2], max_edges=45).shape == (1, 3)
    assert issubclass(TooLargeError, ValueError)
