"""One base, three parts: what each adapter sees, what is trained, and what padding must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from rl import ActorCritic, LoraConfig, PolicyError
from rl.policy.actor_critic import ModelInput
from tests.fixtures.policies import FAMILIES, tiny_policy

LORA = LoraConfig(rank=4)


def actor(family: str = "llama", *, critic: bool = True, seed: int = 0) -> ActorCritic:
    return ActorCritic(tiny_policy(family), LORA, critic=critic, seed=seed)


def disturbed(policy: ActorCritic) -> ActorCritic:
    """Every trained weight off its start, so that adapters matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (policy.policy_parameters() | policy.value_parameters()).values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def inputs(ids: Tensor, mask: Tensor) -> ModelInput:
    return ModelInput(ids, mask.long(), (mask.long().cumsum(1) - 1).clamp(min=0))


IDS = torch.tensor([[3, 30, 39, 5, 8, 12, 31, 1]])
FULL = torch.ones_like(IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_change_nothing(family: str):
    policy = disturbed(actor(family))
    alone = policy(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    padded = torch.nn.functional.pad(IDS, (3, 2))
    mask = torch.nn.functional.pad(FULL, (3, 2))
    among = policy(inputs(padded, mask), padded[:, 7:], 1.0)
    for one, other in zip(alone, among, strict=True):
        torch.testing.assert_close(other[:, :4], one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_over_the_response_is_the_whole_models(family: str):
    """Log-probabilities against a plain forward pass of the same model."""
    policy = disturbed(actor(family))
    with torch.no_grad():
        logits = policy.causal_lm(IDS).logits.log_softmax(-1)
        logprobs, entropy, values = policy(inputs(IDS, FULL), IDS[:, 3:], 1.0)
    expected = logits[:, 2:-1].gather(-1, IDS[:, 3:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logits.exp() * logits).sum(-1)[:, 2:-1], atol=1e-5, rtol=1e-5)
    assert values is not None
    assert values.shape == logprobs.shape


def test_at_step_0_the_policy_is_the_reference_is_the_base():
    base = copy.deepcopy(tiny_policy())
    policy = actor()
    with torch.no_grad():
        own, _ = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
        plain = base(IDS).logits.log_softmax(-1)[:, 3:-1].gather(-1, IDS[:, 4:, None])[..., 0]
    assert torch.equal(own, policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0))
    torch.testing.assert_close(own, plain, atol=1e-6, rtol=1e-6)


def test_the_reference_stays_where_it_was_when_the_policy_moves():
    policy = actor()
    before = policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    disturbed(policy)
    moved, _ = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    assert torch.equal(policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0), before)
    assert (moved - before).abs().max() > 0.01


def test_a_trained_adapter_keeps_a_frozen_copy_as_reference():
    trained = get_peft_model(tiny_policy(), PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = trained(IDS).logits.log_softmax(-1)[:, 3:-1].gather(-1, IDS[:, 4:, None])[..., 0]
    policy = ActorCritic(trained, LORA, critic=True)
    before = policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    torch.testing.assert_close(before, plain, atol=1e-6, rtol=1e-6)
    disturbed(policy)
    assert torch.equal(policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0), before)
    assert not any("reference" in name for name in policy.policy_parameters() | policy.value_parameters())


def test_only_adapters_and_value_head_are_trained_and_both_get_a_gradient():
    policy = actor()
    logprobs, _, values = policy(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    assert values is not None
    (logprobs.sum() + (values - 1).square().sum()).backward()
    trained = policy.policy_parameters() | policy.value_parameters()
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        assert (parameter.grad is not None) == (name in trained), name
    assert set(policy.value_parameters()) >= {"value_head.weight", "value_head.bias"}
    grads = {name: p.grad for name, p in policy.policy_parameters().items() if "lora_B" in name}
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_values_are_zero_at_first_and_do_not_see_the_policys_adapter():
    policy = actor()
    assert torch.equal(policy.value_pass(inputs(IDS, FULL), 4), torch.zeros(1, 5))
    disturbed(policy)
    before = policy.value_pass(inputs(IDS, FULL), 4)
    assert before is not None
    for parameter in policy.policy_parameters().values():
        parameter.data.zero_()
    assert torch.equal(policy.value_pass(inputs(IDS, FULL), 4), before)
    assert before.abs().max() > 0.01


def test_the_seed_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch):
    model = tiny_policy()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
    ActorCritic(model, LORA, critic=True, seed=5)


def test_the_seed_decides_the_first_weights_and_leaves_the_global_generator_alone():
    one, same, other = actor(seed=3), actor(seed=3), actor(seed=4)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    model = tiny_policy()
    torch.manual_seed(11)
    ActorCritic(model, LORA, critic=True, seed=5)
    assert torch.equal(torch.rand(1), expected)
    for name, parameter in one.policy_parameters().items():
        assert torch.equal(parameter, same.policy_parameters()[name])
    assert any(not torch.equal(p, other.policy_parameters()[n]) for n, p in one.policy_parameters().items())


def test_dropout_stays_off():
    config = PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    policy = ActorCritic(get_peft_model(tiny_policy(), config), LORA, critic=False)
    policy.train()
    assert not policy.training
    disturbed(policy)
    one, other = (policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)[0] for _ in range(2))
    assert torch.equal(one, other)


def test_switching_adapters_comes_back_after_an_exception():
    policy = disturbed(actor())
    before, _ = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    with pytest.raises(RuntimeError, match="stop"), policy.adapter("value"):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), policy.adapter(None):
        raise RuntimeError("stop")
    after, _ = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    assert torch.equal(before, after)
    assert all(p.requires_grad for p in (policy.policy_parameters() | policy.value_parameters()).values())


def test_lora_targets_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(PolicyError, match=r"lora.targets: must name linear layers of the model, got 'c_attn'.*q_proj"):
        ActorCritic(tiny_policy(), LoraConfig(targets=["q_proj", "c_attn"]), critic=True)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("q_proj", {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ("q_proj, layers.1.mlp.up_proj", {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj",
                                          "layers.1.mlp.up_proj"}),
        (r".*\.(q|k)_proj", {f"layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qk"}),
        (r"model\.layers\.[1-9]\.self_attn\..*_proj", {f"layers.1.self_attn.{p}_proj" for p in "qkvo"}),
        ("lm_head", {"lm_head"}),
        (".*", {f"layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"}
         | {f"layers.{n}.mlp.{p}_proj" for n in (0, 1) for p in ("gate", "up", "down")} | {"lm_head"}),
    ],
)  # fmt: skip
def test_lora_targets_are_a_name_several_or_a_pattern(targets: str, layers: set[str]):
    """peft#1206: PEFT takes a text for a pattern, and a pattern that meets other modules for an error."""
    policy = ActorCritic(tiny_policy(), LoraConfig(rank=2, targets=targets), critic=True)
    for names in (policy.policy_parameters(), policy.value_parameters()):
        adapted = {name.split(".lora_")[0].removeprefix("peft.base_model.model.") for name in names if "lora_" in name}
        assert {name.removeprefix("model.") for name in adapted} == layers


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("c_attn", r"lora.targets: must name linear layers of the model, got 'c_attn'; LlamaForCausalLM has down_proj"),
        ("q_proj,c_attn", "must name linear layers of the model, got 'q_proj,c_attn'"),
        ("model", "must name linear layers of the model, got 'model'"),
        ("(q_proj", r"lora.targets: must be 'all-linear', names of layers or a regular expression, got '\(q_proj' \("),
        (["all-linear"], "must name linear layers of the model, got 'all-linear'"),
    ],
)
def test_text_that_names_no_linear_layer_is_refused(targets: str | list[str], message: str):
    with pytest.raises(PolicyError, match=message):
        ActorCritic(tiny_policy(), LoraConfig(rank=2, targets=targets), critic=True)


def test_a_peft_model_without_lora_is_refused():
    from peft import IA3Config

    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(PolicyError, match="model: a PEFT model must have one active LoRA adapter, got 'default'"):
        ActorCritic(get_peft_model(tiny_policy(), config), LORA, critic=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_for_generation_changes_neither_the_samples_nor_the_base(family: str):
    policy = disturbed(actor(family))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with torch.no_grad():
        plain = policy.causal_lm(IDS).logits
        with policy.merged():
            merged = policy.causal_lm(IDS).logits
            assert not torch.equal(merged, plain), "it does something"
        after = policy.causal_lm(IDS).logits
    torch.testing.assert_close(merged, plain, atol=2e-5, rtol=1e-5)
    assert torch.equal(after, plain)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())


def test_merging_comes_back_after_an_exception_and_leaves_dora_alone():
    policy = disturbed(actor())
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), policy.merged():
        raise RuntimeError("stop")
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    dora = ActorCritic(get_peft_model(tiny_policy(), config), LORA, critic=False)
    with torch.no_grad():
        plain = dora.causal_lm(IDS).logits
        with dora.merged():
            assert torch.equal(dora.causal_lm(IDS).logits, plain)


def test_the_reference_copies_adapters_of_embeddings_too():
    config = PeftLoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    trained = get_peft_model(tiny_policy(), config)
    draws = torch.Generator().manual_seed(2)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=draws)
    policy = ActorCritic(trained, LORA, critic=True)
    own, _ = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    assert torch.equal(policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0), own)
    assert any("lora_embedding_A" in name for name in policy.policy_parameters())


@pytest.mark.parametrize("name", ["model", "layers"])
def test_an_adapter_may_be_called_like_a_part_of_the_model(name: str):
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = ActorCritic(get_peft_model(tiny_policy(), config, adapter_name=name), LORA, critic=True)
    trained = policy.policy_parameters() | policy.value_parameters()
    assert trained
    assert not any(".reference." in parameter for parameter in trained)
    assert {parameter.split(".")[-2] for parameter in policy.policy_parameters()} == {name}


@pytest.mark.parametrize(
    ("name", "bias", "got"), [("value", "none", "called 'value'"), ("reference", "none", "'reference'"),
                              ("default", "lora_only", "bias='lora_only'")],
)  # fmt: skip
def test_adapters_that_leave_no_room_for_a_reference_are_refused(name: str, bias: str, got: str):
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias=bias)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=f"model: its adapters must be called otherwise .*{got}"):
        ActorCritic(get_peft_model(tiny_policy(), config, adapter_name=name), LORA, critic=True)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_only_what_merging_leaves_the_same_policy_is_merged():
    """16 bits would round the update away, and the output layer of GPT-2 is its table of embeddings."""
    narrow = disturbed(ActorCritic(tiny_policy().bfloat16(), LORA, critic=False))
    tied = disturbed(ActorCritic(tiny_policy("gpt2"), LoraConfig(rank=4, targets=["lm_head", "c_attn"]), critic=False))
    for policy in (narrow, tied):
        before = policy.causal_lm(IDS).logits
        with policy.merged():
            assert torch.equal(policy.causal_lm(IDS).logits, before)
    usual = disturbed(actor())
    weight = dict(usual.named_parameters())["peft.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    original = weight.clone()
    with usual.merged():
        assert not torch.equal(weight, original)


def test_all_passes_have_one_precision_and_values_keep_float32():
    policy = disturbed(actor())
    exact = policy(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    policy.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped = policy(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    alone = policy.policy_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)[0]
    assert torch.equal(alone, wrapped.logprobs)
    assert not torch.equal(alone, exact.logprobs)
    values = policy.value_pass(inputs(IDS, FULL), 4)
    assert values is not None
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float()), "the head itself was computed in 16 bits"


# Training mode and gradient checkpointing --------------------------------------------------------------------


def passes(policy: ActorCritic) -> list[Tensor]:
    """Everything that the policy computes of one text."""
    logprobs, entropy, values = policy(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    assert values is not None
    reference = policy.reference_pass(inputs(IDS, FULL), IDS[:, 4:], 1.0)
    return [logprobs, entropy, values, reference]


def test_passes_are_without_dropout_whatever_the_user_set_and_the_mode_is_restored():
    policy = disturbed(actor("gpt2"))
    expected = passes(policy)
    policy.causal_lm.train()
    policy.causal_lm.get_submodule("transformer.h.1").eval()
    modes = [module.training for module in policy.modules()]
    assert any(modes)
    for found, other in zip(passes(policy), expected, strict=True):
        assert torch.equal(found, other)
    assert [module.training for module in policy.modules()] == modes


def gradients_and_bytes(policy: ActorCritic) -> tuple[dict[str, Tensor], int]:
    """The gradients of policy and critic from one backward pass, and the bytes that autograd kept for it."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    ids = torch.randint(3, 40, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy, values = policy(inputs(ids, torch.ones_like(ids)), ids[:, 4:], 1.0)
    assert values is not None
    (logprobs.sum() + 0.1 * entropy.sum() + (values - 1).square().sum()).backward()
    trained = policy.policy_parameters() | policy.value_parameters()
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}, sum(kept)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["setting", "before", "after", "in training mode"])
def test_gradient_checkpointing_keeps_fewer_bytes_and_gives_the_same_gradients(family: str, how: str):
    """trl#3089. The critic's pass is recomputed under the critic's adapter, though the policy's is active by then."""
    plain, kept = gradients_and_bytes(disturbed(actor(family)))
    model = tiny_policy(family)
    if how == "before":
        model.gradient_checkpointing_enable()
    policy = disturbed(ActorCritic(model, LORA, critic=True, gradient_checkpointing=how == "setting"))
    if how in ("after", "in training mode"):
        policy.causal_lm.gradient_checkpointing_enable()
    if how == "in training mode":
        policy.causal_lm.train()
    found, fewer = gradients_and_bytes(policy)
    assert fewer < kept / 2
    assert found.keys() == plain.keys()
    assert any("value" in name for name in found)
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
    assert not any("forward" in vars(module) for module in policy.causal_lm.modules()), "nothing is left behind"


def test_layers_that_cannot_be_recomputed_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.policy.recomputation.recomputable_layers", lambda model: [])
    with pytest.raises(PolicyError, match=r"gradient_checkpointing: must have layers .*, got LlamaForCausalLM without"):
        ActorCritic(tiny_policy(), LORA, critic=False, gradient_checkpointing=True)
