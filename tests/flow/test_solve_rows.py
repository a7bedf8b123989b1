"""Padded batches solved from rows: the numbers of one graph per sequence, shared prompts read once."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import (
    AttentionRows,
    EdgeRules,
    Flow,
    FlowGraph,
    GraphError,
    InvalidInputError,
    MissingExtraError,
    RegionError,
    RowFlow,
    capture,
    solve,
    solve_rows,
)
from flowgraph.attention.attention_rows import SharedPrefixes
from flowgraph.attention.layer_record import LayerRecord
from tests.fixtures.models import VOCABULARY, family

LENGTHS = (24, 9, 17, 24)
RULES = [
    EdgeRules(*choice)
    for choice in itertools.product(
        ("emission", "emission_all", "literal"), ("drop", "renormalize"), ("exclude", "keep")
    )
]


@pytest.fixture(params=["one matrix", "streamed"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the capacities are written into a matrix first, as they are when it is small."""
    if request.param == "streamed":
        monkeypatch.setattr("flowgraph.flow.solve_rows._DENSE_BYTES", 0)
    return request.param


def texts(lengths: tuple[int, ...] = LENGTHS, shared: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, VOCABULARY, (shared,), generator=generator)
    draw = (torch.randint(3, VOCABULARY, (length - shared,), generator=generator) for length in lengths)
    return [torch.cat([prompt, rest]) for rest in draw]


def padded(rows: list[Tensor], side: str, filler: int = 0) -> Tensor:
    """One row per sequence."""
    out = torch.full((len(rows), max(map(len, rows))), filler, dtype=rows[0].dtype)
    for row, text in zip(out, rows, strict=True):
        row[slice(len(text)) if side == "right" else slice(-len(text), None)] = text
    return out


def region(lengths: tuple[int, ...], of: Callable[[int], slice]) -> list[Tensor]:
    masks = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for mask in masks:
        mask[of(len(mask))] = True
    return masks


def captured(side: str, rows: list[Tensor], name: str = "llama", **choices: Any) -> AttentionRows:
    lengths = [torch.ones(len(text), dtype=torch.long) for text in rows]
    return capture(family(name), padded(rows, side, filler=0), padded(lengths, side), layers="all", **choices)


def assert_same(flow: RowFlow, item: int, inside: Tensor, alone: Flow) -> None:
    # Rows of a batch and rows of a part of it are float32 products of other shapes.
    for name in ("h", "g", "source", "throughput"):
        got, wanted = getattr(flow, name)[item][inside], getattr(alone, name)
        assert torch.allclose(got, wanted, rtol=2e-4, atol=1e-6), name
    assert not flow.throughput[item][~inside].any()
    assert not flow.source[item][~inside].any()
    assert bool(flow.feasible[item]) == bool(alone.feasible)


# The numbers of one graph per sequence ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_padded_batch_is_its_sequences(side: str, preset: str, held: str):
    rows = captured(side, texts())
    question, answer = region(LENGTHS, lambda size: slice(1, 5)), region(LENGTHS, lambda size: slice(size - 2, size))
    inside = padded(region(LENGTHS, lambda size: slice(0, size)), side)
    masks = {"question": padded(question, side), "answer": padded(answer, side)}
    options: Any
    for options in ({}, {"source": "potential", "damping": 0.5}, {"absorption": "pass_through"}):
        flow = solve_rows(rows, **masks, preset=preset, **options)
        assert (flow.backend == "streamed") == (held == "streamed")
        for item in range(len(LENGTHS)):
            graph = FlowGraph.from_rows(
                rows.sequence(item), question=question[item], answer=answer[item], preset=preset
            )
            assert_same(flow, item, inside[item], solve(graph, **options))


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_rule(rules: EdgeRules, side: str, held: str):
    """With regions of several pieces and generated tokens that are not simply the rest."""
    rows = captured(side, texts(), "gpt_oss")  # heads may attend to no token: row sums below one
    question = [mask.index_fill(0, torch.tensor([0]), True) for mask in region(LENGTHS, lambda size: slice(2, 4))]
    answer = region(LENGTHS, lambda size: slice(size - 3, size - 1))
    generated = region(LENGTHS, lambda size: slice(5, None, 2))
    inside = padded(region(LENGTHS, lambda size: slice(0, size)), side)
    masks = {"question": padded(question, side), "answer": padded(answer, side), "generated": padded(generated, side)}
    flow = solve_rows(rows, **masks, rules=rules)
    for item in range(len(LENGTHS)):
        graph = FlowGraph.from_rows(
            rows.sequence(item), question=question[item], answer=answer[item], generated=generated[item], rules=rules
        )
        assert_same(flow, item, inside[item], solve(graph))


def attention(tokens: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    logits = 2 * torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    future = torch.ones(tokens, tokens).triu(1).bool()
    return logits.masked_fill(future, -torch.inf).softmax(-1).to(dtype)


def ends(tokens: int, batch: int = 1) -> dict[str, Tensor]:
    position = torch.arange(tokens).expand(batch, -1)
    return {"question": (position > 0) & (position < tokens // 3), "answer": position >= tokens - 2}


@pytest.mark.parametrize("tokens", [127, 128, 129, 300])
@pytest.mark.parametrize("rules", [EdgeRules(), EdgeRules("literal", "renormalize", "keep")], ids=str)
def test_matrices_across_blocks_with_vectors_of_ones_own(tokens: int, rules: EdgeRules, held: str):
    rows, masks = attention(tokens, 2), ends(tokens, 2)
    vector = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    source, demand = vector * (vector > 0.5), vector.flip(-1) * (vector.flip(-1) > 0.7)
    flow = solve_rows(rows, **masks, rules=rules, source=source, demand=demand)
    assert (flow.source_rule, flow.absorption) == ("vector", "pass_through")
    for item in range(2):
        graph = FlowGraph.from_rows(
            rows[item], question=masks["question"][item], answer=masks["answer"][item], rules=rules, max_edges="all"
        )
        alone = solve(graph, source=source[item], demand=demand[item])
        for name in ("h", "g", "source", "throughput", "demand"):
            assert torch.allclose(getattr(flow, name)[item], getattr(alone, name), rtol=1e-5, atol=0), name


def test_rows_in_double_precision_keep_it(held: str):
    rows, masks = attention(200, dtype=torch.float64), ends(200)
    alone = solve(FlowGraph.from_rows(rows[0], question=masks["question"][0], answer=masks["answer"][0]))
    assert torch.allclose(solve_rows(rows, **masks).throughput[0], alone.throughput, rtol=1e-12, atol=0)


def test_one_matrix_without_a_batch():
    rows, masks = attention(40), ends(40)
    batched = solve_rows(rows, **masks)
    alone = solve_rows(rows[0], question=masks["question"][0], answer=masks["answer"][0])
    assert torch.equal(alone.throughput, batched.throughput)
    assert alone.throughput.shape == (1, 40)


def test_vectors_without_a_batch():
    masks = ends(40)
    source = masks["question"][0].double()
    flow = solve_rows(attention(40)[0], question=masks["question"][0], answer=masks["answer"][0], source=source)
    assert flow.throughput.shape == (1, 40)


# Shared prompts ---------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(sequences, start, stop) of every block of softmax weights that is computed."""
    calls, weights = [], LayerRecord.weights

    def counted(record: LayerRecord, start: int, stop: int) -> Tensor:
        calls.append((record.shape[0], start, stop))
        return weights(record, start, stop)

    monkeypatch.setattr(LayerRecord, "weights", counted)
    return calls


PROMPT = 40
RESPONSES = (60, 50, 60, 55)


def shared_masks(side: str) -> dict[str, Tensor]:
    question, answer = (
        region(RESPONSES, lambda size: slice(1, 6)),
        region(RESPONSES, lambda size: slice(size - 2, size)),
    )
    return {"question": padded(question, side), "answer": padded(answer, side)}


def unshared(rows: AttentionRows) -> AttentionRows:
    rows._prefixes = None
    return rows


def test_rows_of_a_shared_prompt_are_computed_once(
    computed: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
):
    rows = captured("right", texts(RESPONSES, shared=PROMPT))
    assert not computed
    apart = unshared(captured("right", texts(RESPONSES, shared=PROMPT)))
    for start, stop in ((0, 1), (0, PROMPT), (3, PROMPT), (5, 9)):
        computed.clear()
        block = rows.block(start, stop)
        assert [calls[0] for calls in computed] == [1] * 3  # one sequence in each of three layers
        assert torch.allclose(block, apart.block(start, stop), rtol=1e-5, atol=1e-7)
    computed.clear()
    whole = rows.block(0, PROMPT + 1)
    assert {calls[0] for calls in computed} == {4}
    assert torch.allclose(whole, apart.block(0, PROMPT + 1), rtol=1e-5, atol=1e-7)

    monkeypatch.setattr(
        "flowgraph.flow.solve_rows._DENSE_BYTES", 0
    )  # through the solver, in blocks that end with the prompt
    monkeypatch.setattr("flowgraph.propagation.operators.BLOCK", PROMPT)
    computed.clear()
    flow = solve_rows(rows, **shared_masks("right"))
    assert {(size, stop) for size, _, stop in computed} == {(1, PROMPT), (4, 60)}
    wanted = solve_rows(apart, **shared_masks("right"))
    assert torch.allclose(flow.throughput, wanted.throughput, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_sharing_changes_no_number(side: str, preset: str, held: str):
    """On the left, padding of different length stands before the prompt: only equal lengths share."""
    rows = captured(side, texts(RESPONSES, shared=PROMPT))
    apart = unshared(captured(side, texts(RESPONSES, shared=PROMPT)))
    assert torch.allclose(rows.dense(), apart.dense(), rtol=1e-5, atol=1e-7)
    together, alone = (solve_rows(given, **shared_masks(side), preset=preset) for given in (rows, apart))
    assert torch.allclose(together.throughput, alone.throughput, rtol=1e-4, atol=1e-7)
    assert torch.allclose(together.h, alone.h, rtol=1e-4, atol=1e-7)


def test_what_stands_in_padding_is_of_no_account(computed: list[tuple[int, int, int]]):
    """One text three times with other ids behind and before it, and once a token shorter."""
    [text] = texts((10,))
    for side in ("right", "left"):
        ids = torch.stack([padded([text, torch.zeros(14).long()], side, filler)[0] for filler in (0, 7, 98, 7)])
        mask = padded([torch.ones(10).long(), torch.zeros(14).long()], side)[:1].repeat(4, 1)
        mask[3, 9 if side == "right" else 4] = 0
        rows = capture(family("llama"), ids, mask, layers=[0])
        computed.clear()
        dense = rows.dense()
        assert [calls[0] for calls in computed] == [2]
        assert torch.equal(dense[0], dense[1])
        assert torch.equal(dense[0], dense[2])
        inside = [mask[item].bool() for item in (0, 3)]
        for item, where in zip((0, 3), inside, strict=True):
            sequence = rows.sequence(item)
            alone = sequence.block(0, sequence.num_tokens)[0]
            assert torch.allclose(dense[item][where][:, where], alone, rtol=1e-5, atol=1e-7)


def test_prefixes_by_hand():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9], [1, 6, 7, 8], [5, 6, 7, 0]])
    readable = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    prefixes = SharedPrefixes(ids, readable)

    def kinds(stop: int) -> list[set[int]]:
        different, kind = prefixes.before(stop)
        groups = [set((kind == number).nonzero().flatten().tolist()) for number in range(len(different))]
        assert all(item in group for item, group in zip(different, groups, strict=True))
        return sorted(groups, key=min)

    assert kinds(1) == kinds(2) == [{0, 1, 3}, {2}]
    assert kinds(3) == [{0, 3}, {1}, {2}]
    assert kinds(4) == [{0}, {1}, {2}, {3}]


def test_heads_chosen_text_by_text_share_nothing(computed: list[tuple[int, int, int]]):
    rows = captured("right", texts(RESPONSES, shared=PROMPT), heads="global")
    computed.clear()
    rows.block(0, PROMPT)
    assert {calls[0] for calls in computed} == {4}


# Sequences without a flow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["question", "answer"])
def test_a_sequence_without_a_region_has_no_flow(missing: str, held: str):
    rows, masks = attention(30, 3), ends(30, 3)
    whole = solve_rows(rows, **masks)
    masks[missing] = masks[missing].clone()
    masks[missing][1] = False
    flow = solve_rows(rows, **masks)
    assert flow.feasible.tolist() == [True, False, True]
    assert not flow.throughput[1].any()
    assert bool(torch.isfinite(flow.h).all() & torch.isfinite(flow.g).all())
    assert torch.equal(flow.throughput[[0, 2]], whole.throughput[[0, 2]])
    assert "3 x 30 tokens, 2/3 feasible" in repr(flow)
    assert bool(torch.isinf(flow.log2_potential[1]).all()) == (missing == "answer")


# Without numba ----------------------------------------------------------------------------------------------


def test_without_numba_auto_still_works_and_equals(monkeypatch: pytest.MonkeyPatch):
    rows, masks = attention(150, 2), ends(150, 2)
    capacities = rows.tril(-1)
    graph = FlowGraph.from_rows(rows[0], question=masks["question"][0], answer=masks["answer"][0])

    def solved() -> tuple[RowFlow, RowFlow, Flow]:
        return solve_rows(rows, **masks), solve_rows(capacities, **masks, preset=None), solve(graph)

    compiled = solved()
    assert [flow.backend for flow in compiled] == ["numba"] * 3
    monkeypatch.setattr("flowgraph.propagation.numba_backend.find_spec", lambda name: None)
    plain = solved()
    assert [flow.backend for flow in plain] == ["dense", "dense", "scatter"]
    for one, other in zip(compiled, plain, strict=True):
        assert torch.allclose(one.throughput, other.throughput, rtol=1e-12, atol=0)
        assert torch.allclose(one.h, other.h, rtol=1e-12, atol=0)
    missing = (
        r"backend: 'numba' needs the package numba, .* pip install 'flowgraph-llm\[numba\]', or use backend='auto'"
    )
    for call in (
        lambda: solve_rows(rows, **masks, backend="numba"),
        lambda: solve_rows(capacities, **masks, preset=None, backend="numba"),
        lambda: solve(graph, backend="numba"),
    ):
        with pytest.raises(MissingExtraError, match=missing):
            call()


# Bad input --------------------------------------------------------------------------------------------------


def broken(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = attention(20, 2, dtype=dtype).tril(-1)
    rows[1, 7, 3] = value
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf"), (-0.5, "-0.5")]
)
def test_capacities_that_are_none(value: float, shown: str, dtype: torch.dtype):
    with pytest.raises(GraphError, match=rf"capacity: must be finite and non-negative, got {shown} at \[1, 7, 3\]"):
        solve_rows(broken(value, dtype), **ends(20, 2), preset=None)


@pytest.mark.parametrize(("value", "rule"), [(torch.nan, "finite"), (-0.5, "non-negative"), (3.0, "at most 1")])
def test_attention_that_is_none(value: float, rule: str, held: str):
    with pytest.raises(GraphError, match=f"attention: .*{rule}"):
        solve_rows(broken(value), **ends(20, 2))


def in_both(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**masks, "question": masks["question"] | (torch.arange(20) == 18)}


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "question": m["question"][:, :19]}, r"question: must be a bool mask of shape \(2, 20\)"),
        (lambda m: {**m, "answer": m["answer"][:1]}, r"answer: must be a bool mask of shape \(2, 20\)"),
        (lambda m: {**m, "answer": m["answer"].long()}, r"answer: must be a bool mask .*, got torch.int64 of shape"),
        (lambda m: {**m, "answer": m["answer"][0]}, r"answer: .* got torch.bool of shape \(1, 20\); build it over"),
        (lambda m: {**m, "generated": torch.ones(2, 20)}, r"generated: must be a bool mask .*, got torch.float32"),
        (in_both, r"question, answer: regions must be disjoint, got token 18 of sequence 0 in both; remove it"),
    ],
)
@pytest.mark.parametrize("preset", ["default", None])
def test_bad_regions(change: Callable[[dict[str, Tensor]], dict[str, Any]], message: str, preset: str | None):
    with pytest.raises(RegionError, match=message):
        solve_rows(attention(20, 2), **change(ends(20, 2)), preset=preset)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "mine"}, r"preset: must be one of 'default', 'paper', got 'mine'"),
        ({"backend": "cuda"}, r"backend: must be one of .*, got 'cuda'; see solve"),
        ({"backend": "scatter"}, r"backend: dense rows are solved by 'dense' or 'numba', got 'scatter'; 'auto' takes"),
        ({"backend": "reference", "preset": None}, r"backend: dense rows are solved by .*, got 'reference'"),
        ({"source": "random"}, r"source: must be one of 'uniform', 'potential', got 'random'"),
        ({"source": torch.ones(2, 19)}, r"source: must have one entry per token \(2, 20\), got shape \(2, 19\)"),
        ({"demand": -torch.ones(2, 20)}, r"demand: must be finite and non-negative, got -1"),
        ({"damping": 1.5}, r"damping: must lie in \(0, 1\], got 1.5"),
        ({"absorption": "leak"}, r"absorption: must be one of 'absorb', 'pass_through', got 'leak'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        solve_rows(attention(20, 2), **ends(20, 2), **options)


@pytest.mark.parametrize("backend", ["scatter", "reference"])
def test_backends_that_take_no_rows_are_refused_for_long_texts_too(backend: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.flow.solve_rows._DENSE_BYTES", 0)
    with pytest.raises(InvalidInputError, match="backend"):
        solve_rows(attention(20, 2), **ends(20, 2), backend=backend)


def test_captured_rows_are_no_capacities():
    rows = captured("right", texts())
    masks = ends(24, 4)
    with pytest.raises(
        InvalidInputError, match=r"preset: must be named for attention rows, got None, .*rows.dense\(\)"
    ):
        solve_rows(rows, **masks, preset=None)
    assert solve_rows(rows.dense(), **masks, preset=None).feasible.tolist() == [True, False, False, True]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(2, 20, 19), r"rows: must be a square matrix \[tokens, tokens\] or a batch of them, got shape"),
        (torch.ones(2, 20, 20).long(), r"rows: must be floating point, got torch.int64"),
    ],
)
def test_matrices_that_are_no_rows(rows: Tensor, message: str):
    for preset in ("default", None):
        with pytest.raises((GraphError, RegionError), match=message):
            solve_rows(rows, **ends(rows.shape[-1], 2), preset=preset)


def test_weights_above_the_diagonal():
    """Attention that looks ahead is no attention of a causal model; of capacities the triangle is taken."""
    rows, masks = attention(20, 2), ends(20, 2)
    with pytest.raises(GraphError, match=r"attention: must be causal .* at \[0, 1\]"):
        solve_rows(rows + torch.ones(20, 20).triu(1), **masks)
    unread = torch.ones(20, 20, dtype=torch.bool).triu()
    chain = 1e-30 * rows.double() * torch.ones(20, 20).tril(-1).triu(-1)  # its potential leaves the range of float64
    for capacities, backend in itertools.product((rows.tril(-1), chain), ("dense", "numba")):
        wanted = solve_rows(capacities, **masks, preset=None, backend=backend)
        assert bool(wanted.exponent.any()) == (capacities is chain)
        for other in (torch.nan, torch.inf, -1.0, 1.0):
            got = solve_rows(capacities.masked_fill(unread, other), **masks, preset=None, backend=backend)
            assert torch.equal(got.throughput, wanted.throughput)
            assert torch.equal(got.h, wanted.h)


def test_an_empty_batch():
    nothing = torch.zeros(0, 4, dtype=torch.bool)
    with pytest.raises(GraphError, match="rows: must hold at least one sequence of at least one token, got 0 of 4"):
        solve_rows(torch.zeros(0, 4, 4), question=nothing, answer=nothing, preset=None)
