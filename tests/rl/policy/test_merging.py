"""A merged model is the adapter model, also after it was saved and loaded by plain transformers.

Stands for transformers#45127 and peft PR#2972.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rl import LoraConfig, PolicyError
from rl.policy.actor_critic import ActorCritic
from rl.policy.merging import merge_adapter
from rl.training.checkpoint import save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

IDS = torch.tensor([[3, 30, 39, 5, 8, 12, 31, 1]])


def base(family: str, *, tied: bool) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=45, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
                       tie_word_embeddings=tied)
        ).eval()  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=45, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def disturbed(model: PeftModel) -> PeftModel:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}
ATTENTION = {"llama": "q_proj", "gpt2": "c_attn"}

# Settings of the adapter, and whether the merged model of a tied base is tied again.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "attention alone": ({}, True),
    "output layer": ({"target_modules": ["lm_head"]}, False),
    "output layer and attention": ({"target_modules": ["lm_head", "ATTENTION"]}, False),
    "embeddings": ({"target_modules": ["EMBEDDINGS"]}, False),
    "both": ({"target_modules": ["lm_head", "EMBEDDINGS"]}, False),
    "output layer trained as a whole": ({"modules_to_save": ["lm_head"]}, False),
    "embeddings trained as a whole": ({"modules_to_save": ["EMBEDDINGS"]}, False),
    "tokens": ({"trainable_token_indices": {"EMBEDDINGS": [3, 12]}}, True),
    "one tensor trained as a whole": ({"modules_to_save": ["EMBEDDINGS"], "ensure_weight_tying": True}, True),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_gives_the_adapter_models_logits(kind: str, tied: bool, family: str, tmp_path: Path):
    settings, is_tied_again = KINDS[kind]
    names = {"EMBEDDINGS": EMBEDDINGS[family], "ATTENTION": ATTENTION[family]}
    settings = copy.deepcopy(settings)
    if "ensure_weight_tying" in settings and (family == "gpt2" or not tied):
        pytest.skip("PEFT ties layers called embed_tokens, where the base does")
    for setting, value in settings.items():
        if isinstance(value, list):
            settings[setting] = [names.get(name, name) for name in value]
        elif isinstance(value, dict):
            settings[setting] = {names.get(name, name): tokens for name, tokens in value.items()}
    config = PeftLoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": [ATTENTION[family]], **settings})
    model = disturbed(get_peft_model(base(family, tied=tied), config))
    with torch.no_grad():
        plain = base(family, tied=tied)(IDS).logits
        expected = model(IDS).logits
    assert (expected - plain).abs().max() > 0.05, "the adapter does something"

    merged = merge_adapter(model)
    embeddings: Any = merged.get_input_embeddings()
    output: Any = merged.get_output_embeddings()
    is_tied = embeddings.weight is output.weight
    assert is_tied == (tied and is_tied_again)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=2e-5, rtol=1e-5)
    assert loaded.config.tie_word_embeddings == is_tied


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trained_policy_on_a_tied_output_layer_survives_the_merge(family: str, tmp_path: Path):
    policy = ActorCritic(
        base(family, tied=True), LoraConfig(rank=4, targets=["lm_head", ATTENTION[family]]), critic=True
    )
    with torch.no_grad():
        for parameter in policy.policy_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        expected = policy.causal_lm(IDS).logits
    save_adapter(policy, policy.policy_name, tmp_path / "policy")
    loaded = PeftModel.from_pretrained(base(family, tied=True), str(tmp_path / "policy"))
    merge_adapter(loaded).save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_an_adapter_on_a_weight_of_two_layers_is_refused():
    model = base("llama", tied=False)
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    assert isinstance(layers[0].self_attn.q_proj, nn.Linear)
    adapted = get_peft_model(model, PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PolicyError, match=r"adapter: must be on weights that one layer uses, got .*layers.0.*q_proj"):
        merge_adapter(adapted)


def test_a_quantised_base_is_refused():
    model = base("llama", tied=False)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    adapted = get_peft_model(model, PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PolicyError, match="model: must be in its own dtype for a merge, got bitsandbytes 4bit weights"):
        merge_adapter(adapted)
