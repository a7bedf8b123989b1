"""Capacities of one forward pass against their formulas, on eager attention weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flowgraph
from flowgraph import CaptureError, EdgeRules, FlowGraph, InvalidInputError, capture, certify, solve, solve_rows
from tests.fixtures.models import build, family, padded, sequences

FAMILIES = ["llama", "gpt2", "qwen3_sliding", "gemma2", "mixtral", "gpt_oss"]


def eager_weights(name: str, text: Tensor) -> Tensor:
    """[layers, heads, T, T] of the eager pass."""
    with torch.no_grad():
        output = build(name, "eager")(input_ids=text[None], output_attentions=True)
    return torch.stack([layer[0] for layer in output.attentions]).float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", ["pre", "post", "max"])
def test_sharpened_rows_are_powers_of_attention(name: str, place: str):
    text = sequences()[0]
    rows = capture(build(name, "eager"), text, capacity="sharpened", power=3, place=place, layers="1-").dense()[0]
    weights = eager_weights(name, text)[1:]
    wanted = {
        "pre": weights.pow(3).mean(1).mean(0),
        "post": weights.mean(1).pow(3).mean(0),
        "max": weights.amax(1).amax(0).pow(3),
    }[place]
    assert torch.allclose(rows, wanted, rtol=1e-4, atol=1e-6)


def test_named_settings_are_the_sharpened_capacity():
    text = sequences()[0]
    model = family("llama")
    sharp = capture(model, text, capacity="sharp").dense()
    assert torch.equal(sharp, capture(model, text, capacity="sharpened", power=2, place="pre").dense())
    sharp_max = capture(model, text, capacity="sharp_max").dense()
    by_hand = capture(model, text, capacity="sharpened", power=4, place="max", layers="1-").dense()
    assert torch.equal(sharp_max, by_hand)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_centred_rows_lose_what_every_reader_gives(name: str):
    text = sequences()[0]
    rows = capture(build(name, "eager"), text, capacity="centred", layers="all").dense()[0]
    wanted = torch.zeros_like(rows)
    for weights in eager_weights(name, text).mean(1):
        for s in range(len(text)):
            received = weights[s:, s].mean()
            wanted[:, s] += (weights[:, s] - received).clamp_min(0)
    assert torch.allclose(rows, wanted / 3, rtol=1e-4, atol=1e-6)


def llama_vtrace(model: torch.nn.Module, text: Tensor) -> Tensor:
    """[layers, T, T], relu(sum_h A <W_O (v_s - mean v), D_t>) / norm(D_t), with loops over heads."""
    outputs, inputs = [], []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: outputs.append(o[0][0])))
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[0]), with_kwargs=True
            )
        )
    with torch.no_grad():
        attentions = model(input_ids=text[None], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    found = []
    for layer, weights, hidden, out in zip(model.model.layers, attentions, inputs, outputs, strict=True):
        attention = layer.self_attn
        heads, dim = weights.shape[1], attention.head_dim
        values = attention.v_proj(hidden).reshape(len(text), -1, dim)
        total = torch.zeros(len(text), len(text))
        for head in range(heads):
            shared = head * values.shape[1] // heads
            centred = values[:, shared] - values[:, shared].mean(0)
            moved = centred @ attention.o_proj.weight[:, head * dim : (head + 1) * dim].T
            total += weights[0, head] * (out @ moved.T)
        found.append(total.clamp_min(0) / out.norm(dim=-1, keepdim=True))
    return torch.stack(found).detach()


def test_vtrace_is_its_formula():
    text = sequences()[0]
    model = build("llama", "eager")
    wanted = llama_vtrace(model, text)
    assert torch.allclose(capture(model, text, capacity="vtrace").dense()[0], wanted.mean(0), rtol=1e-3, atol=1e-6)
    shares = wanted / wanted.sum(-1, keepdim=True).clamp_min(1e-30)
    rows = capture(model, text, capacity="vtrace_share", power=2).dense()[0]
    assert torch.allclose(rows, shares.square().mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("capacity", ["sharp", "sharp_max", "centred", "vtrace", "vtrace_share"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, capacity: str, side: str):
    model = family(name)
    ids, mask = padded(side)
    both = capture(model, ids, mask, capacity=capacity)
    for item, text in enumerate(sequences()):
        alone = capture(model, text, capacity=capacity)
        kept = mask[item].nonzero().flatten()
        assert torch.allclose(both.dense()[item][kept][:, kept], alone.dense()[0], rtol=1e-3, atol=1e-5)
        assert torch.allclose(both.sequence(item).block(3, 9), alone.sequence().block(3, 9), rtol=1e-3, atol=1e-5)


def test_the_first_layers_are_left_out_by_name():
    text = sequences()[0]
    assert capture(family("llama"), text, capacity="sharp").layers == (1, 2)
    assert capture(family("llama"), text, capacity="sharp_max").layers == (1, 2)
    assert capture(family("llama"), text, capacity="vtrace").layers == (0, 1, 2)


def test_a_capacity_of_ones_own():
    @flowgraph.capacity("recency of a test", defaults={"decay": 0.5})
    def recency(batch: flowgraph.CapacityInput) -> Tensor:
        "Weigh each earlier token by its distance."
        position = torch.arange(batch.input_ids.shape[1])
        distance = (position[:, None] - position[None]).float()
        return (batch.options["decay"] ** distance).tril(-1).expand(len(batch.input_ids), -1, -1)

    rows = capture(family("llama"), sequences()[0], capacity="recency of a test", decay=0.25)
    assert rows.dense()[0, 3].tolist()[:4] == [0.25**3, 0.25**2, 0.25, 0]
    assert "recency of a test" in flowgraph.capacity_names()
    with pytest.raises(InvalidInputError, match="capacity: needs a docstring whose first line describes it"):
        flowgraph.capacity("another")(lambda batch: batch)


TEXT = sequences()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "sharper"}, "capacity: must be one of attention, centred, .*, got 'sharper'"),
        ({"capacity": "sharpened", "power": 0}, r"power: must lie in \[1, 64\], got 0"),
        ({"capacity": "sharpened", "power": -2}, r"power: must lie in \[1, 64\], got -2"),
        ({"capacity": "sharpened", "power": float("nan")}, r"power: must lie in \[1, 64\], got nan"),
        ({"capacity": "sharpened", "place": "both"}, "place: must be 'pre', 'post' or 'max', got 'both'"),
        ({"capacity": "vtrace", "power": 2}, "power: does not apply to capacity='vtrace', got 2; its options are lay"),
        ({"power": 2}, "power: does not apply to capacity='attention', got 2"),
    ],
)
def test_bad_input(options: dict, message: str):
    with pytest.raises(InvalidInputError, match=message):
        capture(family("llama"), TEXT, **options)


def test_attention_that_bypasses_the_interface_is_refused():
    with pytest.raises(CaptureError, match="model: its attention must go through transformers' AttentionInterface"):
        capture(family("bloom"), TEXT, capacity="vtrace")


def leaked(capacity: Tensor, first: int, answer: int) -> Tensor:
    """Drop the first token and the diagonal, divide by the largest row sum up to the answer."""
    kept = capacity.tril(-1).clone()
    kept[:, first] = 0
    return kept / kept[: answer + 1].sum(-1).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("capacity", ["sharp", "vtrace_share", "centred", "vtrace"])
def test_leaking_rows_keep_their_own_sums(name: str, capacity: str):
    text = sequences()[0]
    rows = capture(family(name), text, capacity=capacity)
    masks = {"question": slice(1, 4), "answer": [len(text) - 2]}
    graph = FlowGraph.from_rows(rows.sequence(), **masks, rules=EdgeRules(rows="literal", normalization="leak"))
    wanted = leaked(rows.dense()[0], 0, len(text) - 2)
    dense = torch.zeros_like(wanted)
    dense[graph.edge_index[1], graph.edge_index[0]] = graph.capacity
    assert torch.allclose(dense, wanted, rtol=1e-5, atol=1e-9)
    assert "normalization=leak" in graph.rules
    by_default = FlowGraph.from_rows(rows.sequence(), **masks)
    assert by_default.rules == "rows=emission, self_attention=drop, first_token=exclude, normalization=leak"


def test_renormalised_rows_sum_to_one():
    text = sequences()[0]
    rows = capture(family("llama"), text, capacity="sharp_max")
    graph = FlowGraph.from_rows(rows.sequence(), question=slice(1, 4), answer=[len(text) - 1])
    sums = torch.zeros(len(text)).index_add(0, graph.edge_index[1], graph.capacity)
    generated = torch.arange(len(text)) > 4
    assert torch.allclose(sums[generated], torch.ones(int(generated.sum())), atol=1e-5)


@pytest.mark.parametrize("capacity", ["sharp", "sharp_max", "vtrace", "vtrace_share", "centred"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_flows_are_certified_and_the_same_from_rows(capacity: str, side: str):
    ids, mask = padded(side)
    rows = capture(family("llama"), ids, mask, capacity=capacity)
    position = mask.cumsum(-1) * mask
    question = (position >= 2) & (position <= 4)
    answer = (mask == 1) & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    batch = solve_rows(rows, question=question, answer=answer)
    for item in range(2):
        kept = mask[item].nonzero().flatten()
        graph = FlowGraph.from_rows(rows.sequence(item), question=question[item][kept], answer=answer[item][kept])
        flow = solve(graph)
        assert certify(flow).ok
        assert torch.allclose(batch.throughput[item][kept], flow.throughput, rtol=1e-4, atol=1e-7)
