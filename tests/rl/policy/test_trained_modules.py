"""Adapters that train more than LoRA matrices: the modules and tokens that PEFT trains are trained, saved and resumed.

They stand for peft#2589 and peft#2898.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

from rl import ActorCritic, CreditConfig, LoraConfig, PolicyError, PPOConfig, PPOTrainer
from rl.policy.actor_critic import ModelInput
from tests.fixtures.policies import Digits, alphabet, tiny_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

IDS = torch.tensor([[3, 30, 39, 5, 8, 12, 31, 1]])
INPUTS = ModelInput(IDS, torch.ones_like(IDS), torch.arange(8)[None])

KINDS: dict[str, dict[str, Any]] = {
    "output layer": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 12, 30]},
    "tokens of both layers": {"trainable_token_indices": {"embed_tokens": [3, 12], "lm_head": [30]}},
    "magnitudes": {"use_dora": True},
    "layer's own rank": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
}
TIED: dict[str, dict[str, Any]] = {
    "tied tokens": {"trainable_token_indices": [3, 12, 30]},
    "tied output layer": {"modules_to_save": ["lm_head"]},
}


def adapted(kind: str, *, seed: int = 0) -> PeftModel:
    """A model with an adapter of the kind, whose weights were trained a little."""
    tied = kind in TIED
    settings = {**KINDS, **TIED}[kind]
    model = tiny_policy("gpt2" if tied else "llama", seed=seed)
    targets = ["c_attn"] if tied else ["q_proj"]
    torch.manual_seed(7)
    config = PeftLoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=tied, **settings)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return peft


def config(advantage: Any = "gae", steps: int = 2) -> PPOConfig:
    return PPOConfig(
        steps=steps, num_prompts=3, group_size=2, max_response_tokens=8, advantage=advantage, learning_rate=3e-3,
        kl_coefficient=0.05, lora=LoraConfig(rank=2), credit=CreditConfig(rule="uniform"), save_every=1,
        entropy_coefficient=0.1,
    )  # fmt: skip


def run(kind: str, settings: PPOConfig, output: Path | None = None, **options: Any) -> PPOTrainer:
    return PPOTrainer(
        adapted(kind), alphabet(), task=Digits(), config=settings, output=output, progress=False, **options
    )


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.policy.state_dict().items()}


ALL = [*KINDS, *TIED]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_everything_that_peft_trains_moves_and_nothing_else(kind: str, advantage: str):
    expected = {name for name, parameter in adapted(kind).named_parameters() if parameter.requires_grad}
    trainer = run(kind, config(advantage))
    assert {name.removeprefix("peft.") for name in trainer.policy.policy_parameters()} == expected
    before = weights(trainer)
    row = trainer.step()
    assert row["kl_reference"] == pytest.approx(0.0, abs=1e-5), "the reference is a copy"
    after = weights(trainer)
    moved = {name.removeprefix("peft.") for name in before if not torch.equal(before[name], after[name])}
    policy_moved = {name for name in moved if name in expected}
    assert policy_moved == expected
    # Every other change is the critic's.
    others = {name for name in moved - expected if ".value." not in name and not name.startswith("value_head")}
    # Tied tokens have two names for one tensor.
    assert not {name for name in others if "trainable_tokens_delta" not in name}


@pytest.mark.parametrize("kind", ALL)
def test_the_reference_is_the_adapter_as_given_and_stays(kind: str):
    model = adapted(kind)
    with torch.no_grad():
        expected = model(IDS).logits.log_softmax(-1)[:, 3:-1].gather(-1, IDS[:, 4:, None])[..., 0]
    policy = ActorCritic(model, LoraConfig(rank=2), critic=True)
    own, _ = policy.policy_pass(INPUTS, IDS[:, 4:], 1.0)
    torch.testing.assert_close(own, expected, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        for parameter in policy.policy_parameters().values():
            parameter.add_(0.1)
    torch.testing.assert_close(policy.reference_pass(INPUTS, IDS[:, 4:], 1.0), expected, atol=2e-6, rtol=1e-5)
    moved, _ = policy.policy_pass(INPUTS, IDS[:, 4:], 1.0)
    assert (moved - own).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ALL)
def test_the_critic_reads_the_base(kind: str):
    policy = ActorCritic(adapted(kind), LoraConfig(rank=2), critic=True)
    assert policy.value_head is not None
    torch.nn.init.ones_(policy.value_head.weight)
    before = policy.value_pass(INPUTS, 4)
    assert before is not None
    with torch.no_grad():
        for parameter in policy.policy_parameters().values():
            parameter.add_(0.3)
    assert torch.equal(policy.value_pass(INPUTS, 4), before)


@pytest.mark.parametrize("kind", ALL)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path):
    complete = run(kind, config(), tmp_path / "complete")
    complete.train()
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(tmp_path / "complete" / "checkpoint-000001", cut / "checkpoint-000001")
    resumed = run(kind, config(), cut, resume=True)
    assert resumed.position.step == 1
    resumed.train()
    one, two = weights(complete), weights(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ALL)
def test_plain_peft_loads_the_saved_policy(kind: str, tmp_path: Path):
    trainer = run(kind, config("rloo"), tmp_path / "run")
    trainer.train()
    base = tiny_policy("gpt2" if kind in TIED else "llama")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "checkpoint-000002" / "policy"))
    loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, trainer.policy.causal_lm(IDS).logits, atol=2e-5, rtol=1e-5)


def test_a_trainable_weight_outside_the_adapter_is_refused_by_name():
    model = get_peft_model(tiny_policy(), PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = copy.deepcopy(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        PolicyError,
        match=r"model: a PEFT model must train nothing but its adapter, got base_model.model.model.norm.weight with "
        r"requires_grad=True \(1 such weights\); name their modules in modules_to_save",
    ):
        ActorCritic(model, LoraConfig(rank=2), critic=True)
    ActorCritic(before, LoraConfig(rank=2), critic=True)


def experts() -> PeftModel:
    """A mixture of experts with an adapter on the experts' weights, which are parameters and not layers."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=45, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
            initializer_range=0.3, eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    config = PeftLoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_experts_are_trained_without_a_critic_and_refused_with_one(tmp_path: Path):
    settings = replace(config("rloo"), kl_coefficient=0.05)
    trainer = PPOTrainer(experts(), alphabet(), task=Digits(), config=settings, progress=False, output=tmp_path)
    names = [name for name in trainer.policy.policy_parameters() if "experts" in name]
    assert len(names) == 4
    before = weights(trainer)
    row = trainer.step()
    assert row["kl_reference"] == pytest.approx(0.0, abs=1e-5)
    trainer.step()
    assert all(not torch.equal(before[name], trainer.policy.state_dict()[name]) for name in names)
    with pytest.raises(PolicyError, match=r"model: an adapter beside a critic must have modules .*gate_up_proj"):
        ActorCritic(experts(), LoraConfig(rank=2), critic=True)


@pytest.mark.parametrize("kind", ["output layer", "tokens", "tied tokens"])
def test_a_saved_adapter_is_trained_further_also_when_loaded_for_inference(kind: str, tmp_path: Path):
    adapted(kind).save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = tiny_policy("gpt2" if kind in TIED else "llama")
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainer = PPOTrainer(loaded, alphabet(), task=Digits(), config=config(), progress=False)
    before = weights(trainer)
    trainer.train()
    after = trainer.policy.state_dict()
    names = [name for name in trainer.policy.policy_parameters() if "lora_" not in name]
    assert names
    assert all(not torch.equal(before[name], after[name]) for name in names)


def test_layers_with_the_name_of_the_critics_adapter_are_refused_beside_a_critic():
    """PEFT would leave them out of the saved policy without a word."""

    def bert() -> BertLMHeadModel:
        return BertLMHeadModel(
            BertConfig(vocab_size=45, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                       is_decoder=True)
        )  # fmt: skip

    with pytest.raises(PolicyError, match=r"lora.targets: must be layers called otherwise than 'value' .*self.value"):
        ActorCritic(bert(), LoraConfig(rank=2), critic=True)
    ActorCritic(bert(), LoraConfig(rank=2, targets=["query", "key"]), critic=True)
    alone = ActorCritic(bert(), LoraConfig(rank=2), critic=False)
    saved = get_peft_model_state_dict(alone.peft, adapter_name=alone.policy_name, save_embedding_layers=False)
    assert len(saved) == len(alone.policy_parameters())
