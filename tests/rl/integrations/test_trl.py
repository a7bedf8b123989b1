"""The adapter to TRL against TRL itself, and our group advantages and losses against its GRPO.

Where the definitions coincide (TRL 1.16; one accumulation window, one process), and where they do not:

| TRL | here | |
|---|---|---|
| ``scale_rewards="group"`` / ``"none"`` | ``scale_group_std=True`` / ``False`` | equal; ``"batch"``: none |
| ``loss_type="dapo"`` | ``token_mean`` | equal |
| ``"bnpo"`` | ``token_mean`` | equal; over several micro-batches TRL takes the mean of their means |
| ``"grpo"`` | ``seq_mean`` | equal; masked responses count in TRL's mean over responses, and not in ours |
| ``"dr_grpo"`` | ``dr_grpo`` | equal; masked responses as above |
| ``"cispo"``, ``"sapo"``, ``"vespo"``, ``"luspo"`` | | no counterpart |
| ``epsilon``, ``epsilon_high`` | ``clip``, ``clip_high`` | equal |
| ``delta`` | ``dual_clip`` | equal where ``delta`` exceeds ``1 + epsilon_high`` |
| ``beta``, ``use_bias_correction_kl=True`` | ``kl_in="loss"`` | equal; ``False`` is a bare k3, which has none here |
| ``entropy_coef`` | ``entropy_coefficient`` | equal with ``token_mean``: TRL's is a token mean under every loss type |
| ``importance_sampling_level="token"`` | always | equal; ``"sequence"`` has no counterpart |

Left-padded prompts: TRL passes no positions, which rotary models do not notice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora

from flowgraph import MissingExtraError
from rl.algorithm.advantages import group_advantages, spread
from rl.config import CreditConfig, LoraConfig, PPOConfig
from rl.credit.scope import after_answer
from rl.credit.scoring import score_rollout
from rl.errors import ConfigError, CreditError
from rl.integrations.trl import flow_grpo_trainer
from rl.policy.actor_critic import ActorCritic, ModelInput
from rl.policy.sampling import Generated, evaluating
from rl.records import Credit, Experience, Responses, TokenScores
from rl.rollouts.rollout import judge
from rl.training.experience import build_experience
from rl.training.update import micro_losses
from tests.fixtures.policies import Digits, alphabet, tiny_policy

REASON = "TRL is an optional package: pip install trl"
pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)

pytestmark = [
    # PEFT asks transformers by an old name when TRL wraps the model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

DIGITS = Digits()
GROUP = 4
STRONG = CreditConfig(rule="flow", strength=3.0)


def even(completions: list[str], **columns: Any) -> list[float]:
    return [DIGITS.reward(DIGITS.sample("train", 0), text) for text in completions]


def make(
    tmp_path, credit: CreditConfig | str | None = None, *, dropout: float = 0.0, peft: bool = True, **settings: Any
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        "per_device_train_batch_size": 8, "num_generations": GROUP, "max_completion_length": 10, "bf16": False,
        "use_cpu": True, "report_to": "none", "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "activation_checkpointing": False, **settings,
    }  # fmt: skip
    prompts = datasets.Dataset.from_dict({"prompt": [*DIGITS.prompts, "c=3;c?"]})
    arguments: dict[str, Any] = {
        "model": tiny_policy(),
        "reward_funcs": even,
        "args": GRPOConfig(output_dir=str(tmp_path), **settings),
        "train_dataset": prompts,
        "processing_class": alphabet(),
    }
    if peft:
        lora = PeftLora(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
        arguments["peft_config"] = lora
    if credit is None:
        return GRPOTrainer(**arguments)
    return flow_grpo_trainer()(**arguments, credit=credit, find_answer=DIGITS.find_answer)


def rollout(trainer) -> dict[str, Any]:
    """What a training step would learn from; the random state is the same whatever came before."""
    trainer.model.train()
    torch.manual_seed(5)
    return trainer._generate_and_score_completions([{"prompt": p} for p in DIGITS.prompts[:2] for _ in range(GROUP)])


def trained(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("loss_type", "credit"), [("dapo", CreditConfig(rule="flow", strength=1.0)), ("grpo", "uniform")]
)
def test_weights_of_one_leave_the_run_as_it_is_to_the_last_bit(tmp_path, loss_type, credit):
    settings = {"loss_type": loss_type, "dropout": 0.1, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    losses, weights = trained(make(tmp_path, **settings))
    ours, our_weights = trained(make(tmp_path, credit, **settings))
    assert ours == losses
    assert any(losses)
    for name, weight in weights.items():
        assert torch.equal(our_weights[name], weight), name


def test_credit_changes_the_run(tmp_path):
    losses, weights = trained(make(tmp_path))
    _, our_weights = trained(make(tmp_path, STRONG))
    assert any(losses)
    assert not all(torch.equal(our_weights[name], weight) for name, weight in weights.items())


def as_responses(trainer, output) -> Responses:
    mask, prompt = output["completion_mask"].bool(), output["prompt_ids"]
    generated = Generated(
        torch.cat([prompt, output["completion_ids"]], 1), torch.cat([output["prompt_mask"].bool(), mask], 1),
        prompt.shape[1], mask, torch.zeros(len(mask), dtype=torch.bool),
    )  # fmt: skip
    samples = [DIGITS.sample("train", number // GROUP) for number in range(len(mask))]
    return judge(DIGITS, trainer.processing_class, samples, generated)


@pytest.mark.parametrize("rule", ["flow", "flow_entropy", "max_attention", "entropy"])
def test_credited_advantages_are_those_of_our_own_trainer(tmp_path, rule):
    credit = CreditConfig(rule=rule, shape="soft", mean_one=True, sign="asymmetric")
    stock, trainer = rollout(make(tmp_path, temperature=0.8)), make(tmp_path, credit, temperature=0.8)
    output = rollout(trainer)
    assert torch.equal(output["completion_ids"], stock["completion_ids"])
    assert output["advantages"].shape == output["completion_ids"].shape
    policy = ActorCritic(tiny_policy(), LoraConfig(), critic=False)  # a new adapter changes nothing yet
    responses, mask = as_responses(trainer, output), output["completion_mask"].bool()
    scored = score_rollout(
        policy, responses, credit, temperature=0.8, micro_batch_size=3, seed=0, step=0, reference=False
    )
    config = replace(CONFIG, credit=credit, scale_group_std=True)
    experience = build_experience(responses, scored.scores, scored.credit, config, kl_weight=0.0)
    wanted = experience.advantages * experience.policy_weights
    torch.testing.assert_close(output["advantages"][mask], wanted[mask], rtol=1e-4, atol=1e-5)
    plain = stock["advantages"][:, None].expand(mask.shape)
    assert not torch.allclose(wanted[mask], plain[mask], atol=1e-2)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("rule", ["flow_sharp", "reach_sharp"])
def test_sharp_credit_with_a_fallback_is_that_of_our_own_trainer(tmp_path, rule, size):
    """The fallback compares all sequences of the process, whatever the size of TRL's passes."""
    credit = replace(CreditConfig.recommended(), rule=rule, fallback=0.9)
    trainer = make(tmp_path, credit)
    trainer.args.per_device_train_batch_size = size
    stock, output = rollout(make(tmp_path)), rollout(trainer)
    policy = ActorCritic(tiny_policy(), LoraConfig(), critic=False)
    responses, mask = as_responses(trainer, output), output["completion_mask"].bool()
    scored = score_rollout(
        policy, responses, credit, temperature=1.0, micro_batch_size=3, seed=0, step=0, reference=False
    )
    assert scored.credit.unanchored is not None
    assert 0 < int(scored.credit.unanchored.sum()) < len(mask)
    logged = trainer._metrics["train"]
    assert logged["credit/unanchored_share"] == [pytest.approx(float(scored.credit.unanchored.float().mean()))]
    assert 0 < logged["credit/weight_gini"][0] < 1
    assert 0 < logged["credit/effective_token_ratio"][0] < 1
    wanted = stock["advantages"][:, None] * scored.credit.weights
    torch.testing.assert_close(output["advantages"][mask], wanted[mask], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[mask], stock["advantages"][:, None].expand(mask.shape)[mask], atol=1e-2)


def test_annealing_follows_the_steps_of_trl(tmp_path):
    trainer = make(tmp_path, replace(STRONG, anneal=0.5), max_steps=4)
    trainer.state.max_steps = 4
    stock = rollout(make(tmp_path))
    mask = stock["completion_mask"].bool()
    plain = stock["advantages"][:, None].expand(mask.shape)[mask]
    live = plain.abs() > 1e-3
    largest = []
    for step in range(3):
        trainer.state.global_step = step
        largest.append(float((rollout(trainer)["advantages"][mask][live] / plain[live]).max()))
    assert largest == pytest.approx([3.0, 2.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("rule", ["flow", "entropy", "random"])
def test_advantages_after_the_answer_stay_those_of_trl(tmp_path, rule):
    stock = rollout(make(tmp_path))
    trainer = make(tmp_path, CreditConfig(rule=rule, shape="soft", scope="response", mean_one=True))
    output = rollout(trainer)
    plain = stock["advantages"][:, None].expand(output["advantages"].shape)
    after = after_answer(as_responses(trainer, output))
    assert after.any()
    assert torch.equal(output["advantages"][after], plain[after])
    assert not torch.equal(output["advantages"], plain)


def test_rules_that_draw_draw_for_each_sequence(tmp_path):
    output = rollout(make(tmp_path, CreditConfig(rule="random", strength=2.0, scope="response")))
    raised = output["advantages"].abs() > 1.5 * output["advantages"].abs().amin(1, keepdim=True)
    live = output["advantages"].abs().amax(1) > 0
    assert len({tuple(row) for row in raised[live].tolist()}) > 1


def test_truncated_sequences_that_trl_masks_keep_weight_one(tmp_path):
    trainer = make(tmp_path, STRONG, mask_truncated_completions=True, max_completion_length=30)
    output = rollout(trainer)
    masked = ~output["completion_mask"].bool().any(1)
    assert masked.any()
    rows = output["advantages"][masked]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_the_default_precision_of_trl_serves(tmp_path):
    """Half-precision autocast, and gradient checkpointing on: TRL's own defaults."""
    trainer = make(tmp_path, STRONG, bf16=True, activation_checkpointing=True)
    output = rollout(trainer)
    assert bool(torch.isfinite(output["advantages"]).all())
    assert "credit/weight_mean" in trainer._metrics["train"]
    assert trainer._metrics["train"]["credit/weight_mean"][0] > 1


def test_an_evaluation_stays_as_it_is(tmp_path):
    trainer = make(tmp_path, STRONG)
    trainer.model.eval()
    output = trainer._generate_and_score_completions([{"prompt": DIGITS.prompts[0]}] * GROUP)
    assert output["advantages"].shape == (GROUP,)


def test_chat_templates_with_options_are_refused_rather_than_misread(tmp_path):
    trainer = make(tmp_path, STRONG)
    original = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: original([f"{prompt}a" for prompt in prompts])
    with pytest.raises(ConfigError, match=r"prompts: must be the text of the ids of sequence 0, got \d+ ids where"):
        rollout(trainer)


def test_tokens_of_tools_are_refused(tmp_path):
    trainer = make(tmp_path, STRONG)
    original = trainer._generate

    def with_environment(prompts):
        ids, completions, _, *rest = original(prompts)
        return ids, completions, [[0] + [1] * (len(row) - 1) for row in completions], *rest

    trainer._generate = with_environment
    with pytest.raises(ConfigError, match="response_mask: must be the attention mask of the response"):
        rollout(trainer)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"credit.entry: must be 'advantage' in another trainer.*got 'potential'"):
        make(tmp_path, CreditConfig(entry="potential"))
    with pytest.raises(CreditError, match="got 'gradient', which needs a backward pass"):
        make(tmp_path, "gradient")
    with pytest.raises(CreditError, match="got 'oracle', which needs a task"):
        make(tmp_path, "oracle")
    with pytest.raises(CreditError, match="credit: must name a registered rule, got 'none'"):
        make(tmp_path, "none")
    with pytest.raises(ConfigError, match=r"base: must be a subclass of trl.GRPOTrainer, got <class 'int'>"):
        flow_grpo_trainer(int)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tools", [print], "tools: must be no tools"),
        ("_is_vlm", True, "processing_class: must be a tokenizer"),
    ],
)
def test_trainers_of_another_kind_are_refused(tmp_path, name, value, text):
    from trl import GRPOTrainer

    class Other(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            setattr(self, name, value)

    stock = make(tmp_path)
    with pytest.raises(ConfigError, match=text):
        flow_grpo_trainer(Other)(
            model=tiny_policy(), reward_funcs=even, args=stock.args, train_dataset=stock.train_dataset,
            processing_class=alphabet(),
        )  # fmt: skip


def test_a_trl_that_is_missing_or_old_is_named(monkeypatch):
    import sys

    import trl

    monkeypatch.setattr(trl, "__version__", "0.29.0")
    with pytest.raises(MissingExtraError, match=r"trl: must be 1.16 or newer, got 0.29.0; pip install -U trl"):
        flow_grpo_trainer()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"trl: must be installed for this trainer.*pip install trl"):
        flow_grpo_trainer()


def test_a_class_is_made_once_and_named_after_its_base():
    from trl import GRPOTrainer

    assert flow_grpo_trainer() is flow_grpo_trainer(GRPOTrainer)
    assert flow_grpo_trainer().__name__ == "FlowGRPOTrainer"


def test_every_module_gets_its_own_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model.training
    assert [module.training for module in model] == [True, False]


# Our losses against TRL's, on one batch.

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, -1.0, 0.25, 1.0])


def fixed_batch(*texts: str) -> dict[str, Any]:
    """Four responses of different lengths to each prompt, and what other policies say of their tokens."""
    tokenizer, random = alphabet(), torch.Generator().manual_seed(3)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in texts for _ in range(GROUP)]
    P, R = max(map(len, prompts)), 9
    ids = torch.zeros(8, P, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, P - len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([9, 4, 7, 1, 5, 9, 3, 6])
    mask = torch.arange(R) < lengths[:, None]
    completions = torch.randint(3, len(tokenizer), (8, R), generator=random).masked_fill(~mask, 0)
    noise = {name: 0.3 * torch.randn(8, R, generator=random) for name in ("old", "ref")}
    weights = 0.5 + torch.rand(8, R, generator=random)
    return {"prompt_ids": ids, "prompt_mask": (ids > 0).long(), "completion_ids": completions, "mask": mask,
            "noise": noise, "weights": weights}  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Without padding on the left, where TRL's positions are not ours and rotations round otherwise."""
    return fixed_batch("b=7;b?", "c=3;c?")


TEMPERATURE = 0.7
CONFIG = PPOConfig(advantage="group", num_prompts=2, group_size=GROUP, max_response_tokens=10, temperature=TEMPERATURE)


def both_losses(tmp_path, batch, config: PPOConfig, *, weighted: bool = True, masked: int | None = None, **settings):
    """Loss and gradients of TRL and of ours on the same weights and the same batch."""
    settings = {"temperature": TEMPERATURE, **settings}
    trainer = make(tmp_path, **settings)
    random = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=random)
    mask = batch["mask"].clone()
    if masked is not None:
        mask[masked] = False
    advantages = group_advantages(REWARDS, torch.arange(8) // GROUP, scale_std=True)
    weights = batch["weights"] if weighted else torch.ones_like(batch["weights"])
    inputs = {
        "prompt_ids": batch["prompt_ids"], "prompt_mask": batch["prompt_mask"],
        "completion_ids": batch["completion_ids"], "completion_mask": mask.long(), "num_items_in_batch": mask.sum(),
        "advantages": advantages[:, None] * weights if weighted else advantages,
    }  # fmt: skip
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    whole = torch.cat([batch["prompt_mask"].bool(), mask], 1)
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole.long(), mask.shape[1])
    old, ref = ((now + batch["noise"][name]).masked_fill(~mask, 0.0) for name in ("old", "ref"))
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref}
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, inputs)
    their_gradient = gradient(trainer.model, theirs)

    responses = Responses(
        samples=tuple(DIGITS.sample("train", row // GROUP) for row in range(8)), completions=("",) * 8, input_ids=ids,
        attention_mask=whole, prompt_length=batch["prompt_ids"].shape[1], response_mask=mask,
        truncated=~mask.any(1), groups=torch.arange(8) // GROUP, rewards=REWARDS,
        question=torch.zeros_like(whole), answer=torch.zeros_like(whole),
    )  # fmt: skip
    experience = Experience(
        responses=responses, scores=TokenScores(old, torch.zeros_like(old), ref_logprobs=ref),
        credit=Credit(weights, mask, weights), advantages=spread(advantages, mask), returns=None, loss_mask=mask,
        policy_weights=weights,
    )  # fmt: skip
    policy = ActorCritic(trainer.model, LoraConfig(), critic=False)
    output = policy(ModelInput.of(responses, policy.device), batch["completion_ids"], config.temperature)
    ours, seen = micro_losses(
        output, experience, config, kl_weight=config.kl_weight, num_tokens=float(mask.sum()),
        num_sequences=float(mask.any(1).sum()),
    )  # fmt: skip
    assert 0.1 < float(seen["clip_share"][mask].mean()) < 0.9
    return theirs.item(), their_gradient, ours.item(), gradient(policy, ours)


def gradient(model, loss) -> torch.Tensor:
    parameters = [p for name, p in model.named_parameters() if "lora_" in name and ".reference." not in name]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def assert_equal(found, tolerance: float = 5e-6) -> None:
    theirs, their_gradient, ours, our_gradient = found
    assert ours == pytest.approx(theirs, rel=tolerance, abs=0.1 * tolerance)
    assert float(our_gradient.norm()) > 1e-3
    assert float((our_gradient - their_gradient).norm() / their_gradient.norm()) < tolerance


SAME = {
    "dapo": ("token_mean", {"loss_type": "dapo"}, {}),
    "bnpo": ("token_mean", {"loss_type": "bnpo"}, {}),
    "grpo": ("seq_mean", {"loss_type": "grpo"}, {}),
    "dr_grpo": ("dr_grpo", {"loss_type": "dr_grpo"}, {}),
    "clip_high": ("token_mean", {"epsilon": 0.1, "epsilon_high": 0.28}, {"clip": 0.1, "clip_high": 0.28}),
    "dual_clip": ("token_mean", {"delta": 1.4}, {"dual_clip": 1.4}),
    "kl": ("seq_mean", {"loss_type": "grpo", "beta": 0.5, "use_bias_correction_kl": True},
           {"kl_coefficient": 0.5, "kl_in": "loss"}),
    "entropy": ("token_mean", {"entropy_coef": 0.1}, {"entropy_coefficient": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", SAME)
def test_loss_and_gradient_are_trls(tmp_path, batch, case, weighted):
    aggregation, theirs, ours = SAME[case]
    config = replace(CONFIG, aggregation=aggregation, **ours)
    assert_equal(both_losses(tmp_path, batch, config, weighted=weighted, **theirs))


def test_left_padding_changes_roundings_alone(tmp_path):
    padded = fixed_batch("a=1;b=2;a?", "b=7;b?")
    assert_equal(both_losses(tmp_path, padded, CONFIG), tolerance=2e-5)


DIFFERENT = {
    "kl_without_correction": (
        "token_mean",
        {"beta": 0.5, "use_bias_correction_kl": False},
        {"kl_coefficient": 0.5, "kl_in": "loss"},
    ),
    "entropy_under_seq_mean": ("seq_mean", {"loss_type": "grpo", "entropy_coef": 0.1}, {"entropy_coefficient": 0.1}),
    "cispo": ("token_mean", {"loss_type": "cispo", "epsilon_high": 5.0}, {}),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_definitions_that_differ_give_other_losses(tmp_path, batch, case):
    """The lines of the table without a counterpart: a later version of TRL that comes to agree should be noticed."""
    aggregation, theirs, ours = DIFFERENT[case]
    _, their_gradient, _, our_gradient = both_losses(
        tmp_path, batch, replace(CONFIG, aggregation=aggregation, **ours), **theirs
    )
    assert float((our_gradient - their_gradient).norm() / their_gradient.norm()) > 1e-3


def test_masked_responses_count_in_trls_mean_over_responses_alone(tmp_path, batch):
    token_means = both_losses(tmp_path, batch, CONFIG, masked=2)
    assert_equal(token_means)
    theirs, their_gradient, ours, our_gradient = both_losses(
        tmp_path, batch, replace(CONFIG, aggregation="seq_mean"), masked=2, loss_type="grpo"
    )
    assert_equal((theirs * 8 / 7, their_gradient * 8 / 7, ours, our_gradient))


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_trls(tmp_path, scale):
    trainer = make(tmp_path, scale_rewards=scale)
    rewards: list[torch.Tensor] = []
    original = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *arguments: rewards.append(original(*arguments)) or rewards[0]
    output = rollout(trainer)
    ours = group_advantages(rewards[0].squeeze(1), torch.arange(8) // GROUP, scale_std=scale == "group")
    assert bool(ours.any())
    torch.testing.assert_close(ours, output["advantages"], rtol=1e-6, atol=1e-7)
