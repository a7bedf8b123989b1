"""Gradient capacities: equal to autograd on eager weights, on every family, and what breaks the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowgraph import CaptureError, InvalidInputError, capture, certify, trace
from flowgraph.capacities import forward
from flowgraph.capacities.gradient import GradientRows
from tests.capacities.test_relevance import CONSERVING, last_token
from tests.fixtures.models import build, family, padded, sequences
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny
from tests.reference.gradient import edge_gradients

TEXT = sequences()[0]
LAST = torch.arange(len(TEXT)) == len(TEXT) - 1


# The last two mix tokens in some layers without attention, or have no linear rule: a plain derivative needs neither.
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen3_sliding", "gemma2", "mixtral", "gpt_oss", "qwen3_next", "longcat_flash"]
)
@pytest.mark.parametrize("target", ["margin", "logprob"])
def test_streamed_rows_equal_autograd(name: str, target: str, monkeypatch: pytest.MonkeyPatch):
    answer = [len(TEXT) - 3, len(TEXT) - 1]
    exact = edge_gradients(build(name, "eager"), TEXT, answer, target, monkeypatch)
    mask = torch.zeros(len(TEXT), dtype=torch.bool)
    mask[answer] = True
    net = exact.sum((0, 1)).tril(-1)
    positive = exact.sum(1).clamp_min(0).sum(0)
    tolerance = 2e-5 * float(exact.abs().sum((0, 1)).max())
    # Small blocks: the rows are streamed in many steps.
    monkeypatch.setattr(forward, "MAX_BLOCK", 5)
    rows = capture(build(name), TEXT, capacity="gradient", answer=mask, target=target)
    assert torch.allclose(rows.dense()[0], net, rtol=1e-4, atol=tolerance)
    assert torch.allclose(rows.block(3, 9)[0], net[3:9, :9], rtol=1e-4, atol=tolerance)
    rows = capture(build(name), TEXT, capacity="gradient_positive", answer=mask, target=target)
    assert torch.allclose(rows.dense()[0], positive, rtol=1e-4, atol=tolerance)
    assert torch.allclose(rows.demand[0], positive.sum(-1), rtol=1e-4, atol=10 * tolerance)


def test_some_layers():
    both = capture(family("llama"), TEXT, capacity="gradient", answer=LAST, layers=[0, 1, 2])
    apart = [capture(family("llama"), TEXT, capacity="gradient", answer=LAST, layers=[i]).dense() for i in range(3)]
    assert torch.allclose(both.dense(), sum(apart), rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
    assert both.layers == (0, 1, 2)


@pytest.mark.parametrize("name", CONSERVING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_family_loses_the_gradient_and_padding_changes_nothing(name: str, side: str):
    ids, mask = padded(side)
    try:
        both = capture(family(name), ids, mask, capacity="gradient", answer=last_token(mask), target="logprob")
    except CaptureError as error:
        if side == "right" or "attention_mask: must pad on the right" not in str(error):
            raise
        return
    assert isinstance(both, GradientRows)
    for item, text in enumerate(sequences()):
        answer = torch.arange(len(text)) == len(text) - 1
        alone = capture(family(name), text, capacity="gradient", answer=answer, target="logprob")
        kept = mask[item].nonzero().flatten()
        size = float(alone.dense().abs().max())
        assert size > 0
        assert torch.allclose(both.dense()[item][kept][:, kept], alone.dense()[0], rtol=1e-3, atol=1e-4 * size)
        assert float(both.value[item]) == pytest.approx(float(alone.value[0]), rel=1e-4, abs=1e-5)


def test_cutting_an_edge_a_little_changes_the_answer_as_the_gradient_says(monkeypatch: pytest.MonkeyPatch):
    """A finite difference through the model, on the strongest edge."""
    model = build("llama", "eager", dtype=torch.float64)
    rows = capture(model, TEXT, capacity="gradient", answer=LAST, target="logprob").dense()[0]
    reader, read = divmod(int(rows.abs().argmax()), len(TEXT))
    import transformers.models.llama.modeling_llama as module

    original = module.eager_attention_forward
    step = 1e-2

    def score(change: float) -> float:
        def attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            _, weights = original(layer, query, key, value, mask, **options)
            weights = weights.clone()
            weights[..., reader, read] *= 1 + change
            values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
            return (weights @ values).transpose(1, 2).contiguous(), weights

        with monkeypatch.context() as context, torch.no_grad():
            context.setattr(module, "eager_attention_forward", attention)
            logits = model(input_ids=TEXT[None], use_cache=False).logits[0, -2]
        return float(logits.log_softmax(-1)[TEXT[-1]])

    assert (score(step) - score(-step)) / (2 * step) == pytest.approx(float(rows[reader, read]), rel=2e-3)


def test_the_model_is_left_as_it_was():
    model = build("mixtral").train()
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    capture(model, TEXT, capacity="gradient", answer=LAST)
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("capacity", ["gradient", "gradient_positive"])
def test_gradients_may_be_off_around_the_call_and_in_the_weights(capacity: str):
    model = build("llama")
    expected = capture(model, TEXT, capacity=capacity, answer=LAST).dense()
    with torch.no_grad():
        assert torch.equal(capture(model, TEXT, capacity=capacity, answer=LAST).dense(), expected)
    with torch.inference_mode():
        assert torch.equal(capture(model, TEXT.clone(), capacity=capacity, answer=LAST).dense(), expected)
    model.requires_grad_(False)
    assert torch.allclose(capture(model, TEXT, capacity=capacity, answer=LAST).dense(), expected, rtol=1e-5)


# What breaks the gradient ------------------------------------------------------------------------------------


class ForwardOnly(torch.autograd.Function):
    """A kernel whose result cannot be differentiated: calling its backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


class Detaching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.detach())


class Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ForwardOnly.apply(x)  # type: ignore[no-any-return]


def without_gradient(mode: Any) -> Any:
    """A Llama whose second block's MLP runs under no_grad or inference_mode."""
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = mode()(mlp.forward)
    return model


@pytest.mark.parametrize("capacity", ["gradient", "gradient_positive"])
def test_a_module_that_breaks_the_gradient_is_named(capacity: str):
    for mode in (torch.no_grad, torch.inference_mode):
        with pytest.raises(
            CaptureError,
            match=r"model: every module must pass a gradient on, got none from model\.layers\.1\.mlp \(LlamaMLP\)",
        ):
            capture(without_gradient(mode), TEXT, capacity=capacity, answer=LAST)
    detaching = build("llama")
    detaching.model.layers[2].mlp.act_fn = Detaching()
    with pytest.raises(CaptureError, match=r"got none from model\.layers\.2\.mlp\.act_fn \(Detaching\): it runs under"):
        capture(detaching, TEXT, capacity=capacity, answer=LAST)
    forward_only = build("llama")
    forward_only.model.layers[1].mlp.act_fn = Kernel()
    with pytest.raises(
        CaptureError,
        match=r"model: every kernel must have a backward pass, got an error in model\.layers\.1\.mlp\.act_fn \(Kern",
    ):
        capture(forward_only, TEXT, capacity=capacity, answer=LAST)


def test_a_complete_pass_without_gradients_is_named():
    for mode in (torch.no_grad, torch.inference_mode):
        model = build("llama")
        model.forward = mode()(model.forward)
        with pytest.raises(CaptureError, match=r"got none from model\.layers\.0 \(LlamaDecoderLayer\)"):
            capture(model, TEXT, capacity="gradient", answer=LAST)
    with torch.inference_mode():
        made = build("llama")
    with pytest.raises(
        CaptureError,
        match=r"model: its weights must be ordinary tensors, got some made under torch\.inference_mode in model\.",
    ):
        capture(made, TEXT, capacity="gradient", answer=LAST)


def test_an_attention_that_breaks_the_gradient_is_named():
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = torch.no_grad()(attention.forward)
    with pytest.raises(CaptureError, match=r"got none from model\.layers\.1\.self_attn \(LlamaAttention\)"):
        capture(model, TEXT, capacity="gradient", answer=LAST)
    with pytest.raises(CaptureError, match="model: its attention must go through transformers' AttentionInterface"):
        capture(family("bloom"), TEXT, capacity="gradient", answer=LAST)


@pytest.mark.unchecked
@pytest.mark.parametrize("capacity", ["gradient", "gradient_positive"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "answer: must be given with capacity='gradient"),
        ({"answer": torch.zeros_like(LAST)}, "answer: must mark at least one token of every sequence, got none"),
        ({"answer": TEXT[0] == TEXT}, "answer, generated: must be predicted by an earlier token"),
        ({"answer": LAST[:-1]}, r"answer: must have the shape of input_ids \(1, \d+\), got \(1, \d+\)"),
        ({"answer": LAST, "target": "logit"}, "target: must be 'margin', 'logprob' or token ids, got 'logit'"),
        ({"answer": LAST, "target": TEXT + 1000}, r"target: must lie in 0\.\.\d+, got"),
        ({"answer": LAST, "layers": [7]}, r"layers: must lie in 0\.\.2, got 7\.\.7"),
        ({"answer": LAST, "hops": 2}, "hops: does not apply to capacity='gradient.*', got 2; its options are answer"),
    ],
)
def test_bad_input(capacity: str, options: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        capture(family("llama"), TEXT, capacity=capacity, **options)


def test_a_trace_over_the_positive_gradient():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, capacity="gradient_positive")
    assert found.provenance["normalization"] == "leak"
    assert certify(found.flow).ok
    assert torch.equal(found.scores, found.potential)
    rows = capture(model, found.token_ids, capacity="gradient_positive", answer=found.answer).dense()[0]
    # Under emission rows a generated token takes the row before it, its diagonal included.
    edges = {
        (s, t): c for (s, t), c in zip(found.graph.edge_index.T.tolist(), found.graph.capacity.tolist(), strict=True)
    }
    answer = int(found.answer.nonzero()[0])
    scale = edges[answer - 1, answer] / float(rows[answer - 1, answer - 1])
    for s in range(1, answer):
        assert edges.get((s, answer), 0.0) == pytest.approx(scale * float(rows[answer - 1, s]), rel=1e-4)
    with pytest.raises(InvalidInputError, match=r"capacity: must .*have edges that are not negative, got 'gradient'"):
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="gradient")
