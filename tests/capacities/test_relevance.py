"""Conserved relevance: the law on every family, equality with the reference, the chain, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import CaptureError, InvalidInputError, MemoryLimitError, RelevanceRows, capture, relevance_flow
from flowgraph.attention.modules import first_block, text_decoder
from flowgraph.capacities.relevance import relevance_bytes
from tests.attention.test_capture_families import FUSED, HANDS_OUT_WEIGHTS
from tests.fixtures.models import FAMILIES, build, family, padded, sequences
from tests.reference.relevance import llama_relevance

NO_INTERFACE = HANDS_OUT_WEIGHTS | FUSED
MIX_WITHOUT_ATTENTION = {"qwen3_next", "qwen3_5", "granite_hybrid", "jamba", "zamba2", "minimax"}
NO_RULE = {"longcat_flash", "inkling"}
CONSERVING = sorted(set(FAMILIES) - NO_INTERFACE - MIX_WITHOUT_ATTENTION - NO_RULE)


def last_token(mask: Tensor) -> Tensor:
    """Mark the last token of each text."""
    later = mask.flip(-1).cumsum(-1).flip(-1)
    return (mask == 1) & (later == 1)


def with_biases(name: str) -> torch.nn.Module:
    """Build a family whose biases are not zero."""
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")
@pytest.mark.parametrize("name", CONSERVING)
def test_relevance_is_conserved_at_every_token(name: str):
    ids, mask = padded("right")
    generated = (mask.cumsum(-1) > 6) & (mask == 1)
    rows = capture(
        with_biases(name), ids, mask, capacity="relevance", answer=last_token(mask), generated=generated,
        target="logprob", hops=3,
    )  # fmt: skip
    assert rows.residual < 5e-6
    for item in range(2):
        assert sum(rows.shares(item).values()) == pytest.approx(1, abs=1e-4)
    assert not bool(rows.dense().triu().any())


@pytest.mark.parametrize("name", sorted(NO_INTERFACE))
def test_attention_outside_the_interface_is_refused(name: str):
    ids, mask = padded("right")
    with pytest.raises(CaptureError, match="model: its attention must go through transformers' AttentionInterface"):
        capture(family(name), ids, mask, capacity="relevance", answer=last_token(mask))


@pytest.mark.parametrize("name", sorted(MIX_WITHOUT_ATTENTION))
def test_layers_that_mix_tokens_without_attention_are_refused(name: str):
    ids, mask = padded("right")
    with pytest.raises(CaptureError, match="model: every layer must mix tokens by softmax attention, got none in"):
        capture(family(name), ids, mask, capacity="relevance", answer=last_token(mask))


@pytest.mark.parametrize("name", sorted(NO_RULE))
def test_a_part_without_a_rule_is_found_by_the_residual_and_named(name: str):
    ids, mask = padded("right")
    with pytest.raises(
        CaptureError, match=r"must be conserved at every token, got a residual of .* from model\.layers"
    ):
        capture(family(name), ids, mask, capacity="relevance", answer=last_token(mask))


class Squared(torch.nn.Module):
    """An activation of the network's own that looks like a plain module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.1 * x.square()


def test_the_module_that_breaks_the_law_is_named():
    model = build("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.o_proj = Squared(attention.get_submodule("o_proj"))
    ids, mask = padded("right")
    with pytest.raises(CaptureError, match=r"from model\.layers\.1\.self_attn\.o_proj \(Squared\), which loses"):
        capture(model, ids, mask, capacity="relevance", answer=last_token(mask))


@pytest.mark.parametrize("answer", [[9], [5, 9]])
def test_llama_equals_the_reference(answer: list[int]):
    model = build("llama", dtype=torch.float64)
    ids = sequences()[0][:10]
    mask = torch.zeros(10, dtype=torch.bool)
    mask[answer] = True
    rows = capture(model, ids, capacity="relevance", answer=mask, target="margin")
    exact = llama_relevance(model, ids, answer)
    assert torch.allclose(rows.dense()[0].double(), exact.edges.tril(-1), rtol=1e-4, atol=1e-6)
    assert torch.allclose(rows.demand[0].double(), exact.demand, rtol=1e-4, atol=1e-6)
    assert torch.allclose(rows.absorbed[0].double(), exact.absorbed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_sliding", "mixtral"])
def test_a_padded_batch_gives_each_sequence_its_own_relevance(name: str, side: str):
    ids, mask = padded(side)
    model = family(name)
    both = capture(model, ids, mask, capacity="relevance", answer=last_token(mask))
    for item, text in enumerate(sequences()):
        answer = torch.zeros(len(text), dtype=torch.bool)
        answer[-1] = True
        alone = capture(model, text, capacity="relevance", answer=answer)
        kept = mask[item].nonzero().flatten()
        assert torch.allclose(both.dense()[item][kept][:, kept], alone.dense()[0], rtol=1e-3, atol=1e-6)
        assert torch.allclose(both.absorbed[item][kept], alone.absorbed[0], rtol=1e-3, atol=1e-6)


def test_eager_and_fused_attention_agree():
    text = sequences()[0]
    answer = torch.zeros(len(text), dtype=torch.bool)
    answer[-1] = True
    fused = capture(build("llama", "sdpa"), text, capacity="relevance", answer=answer)
    eager = capture(build("llama", "eager"), text, capacity="relevance", answer=answer)
    assert torch.allclose(fused.dense(), eager.dense(), rtol=1e-4, atol=1e-7)


def test_the_chain_passes_generated_relevance_to_the_prompt():
    text = sequences()[0]
    answer = torch.zeros(len(text), dtype=torch.bool)
    answer[-1] = True
    generated = torch.arange(len(text)) >= 8
    model = build("qwen3_sliding")
    plain = capture(model, text, capacity="relevance", answer=answer, target="logprob")
    chain = capture(model, text, capacity="relevance", answer=answer, generated=generated, target="logprob", hops=6)
    held = plain.absorbed[0][generated].abs().sum()
    rest = chain.absorbed[0][generated & ~chain.forced[0]].abs().sum()
    assert rest < held / 4
    # What arrives at row k - 1 over the emission arc is what token k passed on.
    assert torch.allclose(chain.throughput.sum(), chain.demand.sum() + chain.emitted.sum() + chain.dense().sum())


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model = build("mixtral").train()
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    ids, mask = padded("right")
    capture(model, ids, mask, capacity="relevance", answer=last_token(mask))
    with pytest.raises(InvalidInputError):
        capture(model, ids, mask, capacity="relevance", answer=last_token(mask), target="nothing")
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_may_be_off_around_the_call():
    text = sequences()[0]
    answer = torch.zeros(len(text), dtype=torch.bool)
    answer[-1] = True
    model = family("llama")
    expected = capture(model, text, capacity="relevance", answer=answer).dense()
    with torch.no_grad():
        assert torch.equal(capture(model, text, capacity="relevance", answer=answer).dense(), expected)
    with torch.inference_mode():
        again = capture(model, text.clone(), capacity="relevance", answer=answer).dense()
    assert torch.equal(again, expected)


def test_contrast_with_another_token():
    text = sequences()[0]
    answer = torch.zeros(len(text), dtype=torch.bool)
    answer[-1] = True
    other = text.clone()
    other[-1] = (int(text[-1]) + 1) % 90
    model = family("llama")
    one = capture(model, text, capacity="relevance", answer=answer, target=other)
    back = capture(model, other, capacity="relevance", answer=answer, target=text)
    # The contrast of X with Y is minus that of Y with X; the text before the answer is the same.
    assert torch.allclose(one.dense(), -back.dense(), rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_sliding", "mixtral"])
def test_streamed_rows_equal_the_matrix(name: str, side: str):
    ids, mask = padded(side)
    options = {"answer": last_token(mask), "generated": (mask.cumsum(-1) > 6) & (mask == 1), "hops": 2}
    dense = capture(build(name), ids, mask, capacity="relevance", target="logprob", **options)
    rows = capture(build(name), ids, mask, capacity="relevance", target="logprob", streamed=True, **options)
    assert rows.matrix is None
    scale = float(dense.dense().abs().max())
    assert torch.allclose(rows.dense(), dense.dense(), atol=1e-6 * scale)
    assert torch.allclose(rows.block(5, 9), dense.dense()[:, 5:9, :9], atol=1e-6 * scale)
    assert torch.allclose(rows.throughput, dense.throughput, atol=1e-5 * scale)
    assert rows.residual == pytest.approx(dense.residual, abs=1e-6)
    one = rows.sequence(1)
    assert torch.allclose(one.dense()[0], dense.dense()[1], atol=1e-6 * scale)
    assert torch.allclose(one.throughput[0], dense.throughput[1], atol=1e-5 * scale)

    # The strongest edges of a flow, and what the others carry.
    for item in range(2):
        regions = {"question": slice(1, 4), "answer": [int(mask[item].sum()) - 1], "item": item}
        for max_edges in (30, "all"):
            whole = relevance_flow(dense, max_edges=max_edges, **regions)
            part = relevance_flow(rows, max_edges=max_edges, **regions)
            assert torch.equal(part.graph.edge_index, whole.graph.edge_index)
            for field in ("throughput", "pruned_in", "pruned_out", "edge_flow"):
                assert torch.allclose(getattr(part, field), getattr(whole, field), rtol=1e-5, atol=1e-6)
            assert torch.allclose(part.throughput, part.leaving, atol=1e-4)


def test_streaming_needs_no_matrix(monkeypatch: pytest.MonkeyPatch):
    model = build("llama")
    tokens = 50_000
    tape = relevance_bytes(model, 1, tokens, streamed=True)
    assert relevance_bytes(model, 1, tokens, streamed=False) - tape == 4 * tokens**2
    # The streamed estimate grows with the tokens, not with their square.
    assert relevance_bytes(model, 1, 2 * tokens, streamed=True) < 2 * tape

    text = sequences()[0]
    answer = torch.arange(len(text)) == len(text) - 1
    free = (relevance_bytes(model, 1, len(text), streamed=True) + 4) / 0.9
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: free)
    rows = capture(model, text, capacity="relevance", answer=answer, streamed=True)
    assert rows.block(3, 5).shape == (1, 2, 5)
    with pytest.raises(MemoryLimitError, match=r"relevance of 1 x 24 tokens: .*streamed=True"):
        capture(model, text, capacity="relevance", answer=answer)
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match=r"matrix of 1 x 24 tokens: .*read block\(start, stop\) instead"):
        rows.dense()


@pytest.mark.unchecked
def test_bad_streams_and_sequences():
    text = sequences()[0]
    answer = torch.arange(len(text)) == len(text) - 1
    with pytest.raises(InvalidInputError, match="streamed: must be True or False, got 1"):
        capture(build("llama"), text, capacity="relevance", answer=answer, streamed=1)
    rows = capture(build("llama"), text, capacity="relevance", answer=answer)
    with pytest.raises(InvalidInputError, match=r"item: must lie in 0\.\.0, got 1; it counts the sequences"):
        rows.sequence(1)


def with_demand(total: float) -> RelevanceRows:
    """Rows of three tokens, the last of which answers with this demand."""
    zeros = torch.zeros(1, 3)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    return RelevanceRows(
        matrix=torch.tensor([[[0.0, 0, 0], [2.0, 0, 0], [0, 0, 0]]]),
        demand=torch.tensor([[0.0, total, 0.0]]),
        absorbed=torch.tensor([[2.0, total - 2, 0.0]]),
        emitted=zeros,
        bias=zeros,
        forced=nothing,
        generated=nothing,
        attention_mask=~nothing,
        residual=0.0,
        bound=1e-3,
        hops=0,
        target="margin",
        layers=(0,),
    )


class Raising(torch.autograd.Function):
    """The identity, whose backward pass raises the error that was put into ``error``."""

    error: Exception = RuntimeError()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise Raising.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NotImplementedError(), CaptureError, r"model: its backward pass failed \(NotImplementedError\); conserved"),
        (RuntimeError("no kernel\nin fifty lines"), CaptureError, r"backward pass failed \(no kernel\); conserved"),
        (torch.OutOfMemoryError("60 GiB"), torch.OutOfMemoryError, "60 GiB"),
    ],
)
def test_a_failed_backward_pass_is_named_and_a_full_memory_is_not_blamed_on_the_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
):
    """An error without a text was an IndexError, and a full memory was reported as a missing kernel."""
    model = build("llama")
    projection = model.model.layers[1].mlp.down_proj
    forward = projection.forward
    monkeypatch.setattr(projection, "forward", lambda x: Raising.apply(forward(x)))
    monkeypatch.setattr(Raising, "error", error)
    ids, mask = padded("right")
    with pytest.raises(kind, match=message):
        capture(model, ids, mask, capacity="relevance", answer=last_token(mask), target="logprob")


def test_shares_of_a_tie_are_refused_and_of_a_forced_answer_told():
    assert with_demand(4).shares()["prompt"] == 1
    with pytest.raises(InvalidInputError, match=r"answer: must have a demand to take shares of, got 0 .*rivals tie"):
        with_demand(0).shares()
    with pytest.warns(UserWarning, match="answer: should be what the model prefers, got a demand of -4"):
        assert with_demand(-4).shares()["prompt"] == 1


def test_the_first_block_is_that_of_the_layers_and_not_of_many_experts():
    decoder = text_decoder(build("mixtral"))
    block = decoder.get_submodule("layers.0")
    block.get_submodule("mlp").spare = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(20))
    assert first_block(decoder) is block
    for name in ("gpt2", "gpt_neox", "opt"):
        layers = [module for module in text_decoder(family(name)).modules() if isinstance(module, torch.nn.ModuleList)]
        assert first_block(text_decoder(family(name))) is layers[0][0]


def test_half_precision_is_conserved_within_its_bound():
    ids, mask = padded("right")
    rows = capture(build("llama", dtype=torch.bfloat16), ids, mask, capacity="relevance", answer=last_token(mask))
    assert rows.residual < 0.1


TEXT = sequences()[0]
LAST = torch.arange(len(TEXT)) == len(TEXT) - 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "answer: must be given with capacity='relevance'"),
        ({"answer": LAST, "target": "logit"}, "target: must be 'margin', 'logprob' or token ids, got 'logit'"),
        ({"answer": LAST, "target": TEXT + 1000}, r"target: must lie in 0\.\.\d+, got"),
        ({"answer": torch.zeros_like(LAST)}, "answer: must mark at least one token of every sequence, got none"),
        ({"answer": TEXT[0] == TEXT}, "answer, generated: must be predicted by an earlier token, got the first token"),
        ({"answer": LAST[:-1]}, r"answer: must have the shape of input_ids \(1, \d+\), got \(1, \d+\)"),
        ({"answer": LAST, "hops": -1}, "hops: must be at least 0, got -1"),
        ({"answer": LAST, "hops": 2}, "generated: must be given with hops, got none"),
        ({"answer": LAST, "heads": "max"}, "heads: does not apply to capacity='relevance', got 'max'"),
    ],
)
def test_bad_input(options: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        capture(family("llama"), TEXT, capacity="relevance", **options)
