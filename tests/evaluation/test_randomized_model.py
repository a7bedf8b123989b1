"""Randomized copies: other weights of the same distribution, the original untouched, ties kept, every family."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from flowgraph import CaptureError, InvalidInputError
from flowgraph.evaluation.randomized_model import randomized_copy
from tests.fixtures.models import FAMILIES, build
from tests.fixtures.tiny import tiny_model

SOME_FAMILIES = ["llama", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "qwen3_moe", "gemma3", "jamba", "deepseek_v2"]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_names(one: nn.Module, other: nn.Module) -> set[str]:
    after = dict(other.named_parameters())
    return {name for name, before in one.named_parameters() if not torch.equal(before, after[name])}


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_every_matrix_of_every_layer_changes_and_keeps_its_values(family: str):
    model = build(family)
    before = weights_of(model)
    randomized = randomized_copy(model, seed=3)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    changed = changed_names(model, randomized)
    # Every matrix inside a numbered layer that is no constant.
    varied = {name for name, weight in before.items() if weight.ndim > 1 and weight.unique().numel() > 1}
    in_layers = {name for name in varied if any(part.isdigit() for part in name.split("."))}
    assert in_layers <= changed
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in changed)
    for name, after in randomized.named_parameters():
        assert torch.equal(after.flatten().sort().values, before[name].flatten().sort().values)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, randomized(ids).logits)


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    model = tiny_model()
    one = randomized_copy(model, seed=1)
    assert changed_names(one, randomized_copy(model, seed=1)) == set()
    torch.manual_seed(99)
    assert changed_names(one, randomized_copy(model, 1)) == set()
    assert changed_names(one, randomized_copy(model, seed=2)) == changed_names(model, one)


def test_chosen_layers_change_alone_and_as_in_a_cascade():
    model = tiny_model()
    last = randomized_copy(model, layers=[2])
    changed = changed_names(model, last)
    assert changed
    assert all(name.startswith("model.layers.2.") for name in changed)
    last_two = dict(randomized_copy(model, layers="1-").named_parameters())
    for name, weight in last.named_parameters():
        if name.startswith("model.layers.2."):
            assert torch.equal(weight, last_two[name])


def test_tied_weights_stay_tied():
    config = copy.deepcopy(tiny_model().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = type(tiny_model())(config).eval()
    randomized = randomized_copy(model, embeddings=True)
    assert randomized.lm_head.weight is randomized.model.embed_tokens.weight
    assert randomized.lm_head.weight is not model.lm_head.weight
    assert not torch.equal(randomized.lm_head.weight, model.lm_head.weight)
    values = model.lm_head.weight.flatten().sort().values
    assert torch.equal(randomized.lm_head.weight.flatten().sort().values, values)
    # Without embeddings the tied weight stays what it was.
    assert torch.equal(randomized_copy(model).lm_head.weight, model.lm_head.weight)


def test_mode_device_and_gradients():
    model = copy.deepcopy(tiny_model()).train()
    model(torch.arange(5)[None]).logits.sum().backward()
    randomized = randomized_copy(model, layers=[0])
    assert randomized.training
    assert all(parameter.grad is None for parameter in randomized.parameters())
    assert model.lm_head.weight.grad is not None
    randomized(torch.arange(5)[None]).logits.sum().backward()
    half = randomized_copy(copy.deepcopy(tiny_model()).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_adapters_are_randomized_with_their_layer():
    base = copy.deepcopy(tiny_model())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    changed = changed_names(model, randomized_copy(model, layers=[1]))
    assert any("lora_A" in name for name in changed)
    assert all(".layers.1." in name for name in changed)


def test_families_share_the_list_of_layers():
    # The list of layers is found where experts have lists of their own.
    assert set(SOME_FAMILIES) <= set(FAMILIES)
    changed = changed_names(build("qwen3_moe"), randomized_copy(build("qwen3_moe"), layers=[0]))
    assert any("expert" in name for name in changed)
    assert all(".layers.0." in name for name in changed)


@pytest.mark.unchecked
def test_what_cannot_be_randomized_is_refused():
    model = copy.deepcopy(tiny_model())
    with pytest.raises(InvalidInputError, match=r"seed: must be an integer, got 1\.5"):
        randomized_copy(model, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"layers: must lie in 0\.\.2"):
        randomized_copy(model, layers=[7])
    with pytest.raises(CaptureError, match="model: must be a Hugging Face PreTrainedModel, got Linear"):
        randomized_copy(nn.Linear(2, 2))
    quantized = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = quantized
    with pytest.raises(InvalidInputError, match=r"model: must have floating-point weights .*, got torch\.uint8 in "):
        randomized_copy(model)
    randomized_copy(model, layers=[0])
    with pytest.raises(InvalidInputError, match=r"model: must hold its weights, got .* on the meta device"):
        randomized_copy(copy.deepcopy(tiny_model()).to("meta"))
