"""Every setting and every record arrives where it counts: the seams between the rooms, one by one."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rl import (
    ActorCritic,
    AttentionNeed,
    ConfigError,
    CreditConfig,
    Experience,
    LoraConfig,
    PolicyError,
    PPOConfig,
    PPOTrainer,
    Responses,
    Sample,
)
from rl.algorithm.schedules import adapted_kl_weight, learning_rate_factor
from rl.credit.scoring import credit_generators, embedding_gradient, recorder_for
from rl.policy.actor_critic import ModelInput
from rl.rollouts.rollout import PromptEncoder
from rl.rollouts.rollout_file import load_rollout
from rl.tasks.rewards import load_function
from rl.training.checkpoint import save_adapter
from rl.training.metrics import Averages
from rl.training.update import minibatch_order
from tests.fixtures.policies import Digits, alphabet, tiny_policy

SETTINGS = PPOConfig(
    steps=2, num_prompts=3, group_size=2, max_response_tokens=8, learning_rate=3e-3, lora=LoraConfig(rank=2),
    credit=CreditConfig(rule="uniform"),
)  # fmt: skip


def trainer(config: PPOConfig = SETTINGS, **options) -> PPOTrainer:
    return PPOTrainer(tiny_policy(), alphabet(), **{"task": Digits(), "config": config, "progress": False, **options})


def stirred(run: PPOTrainer) -> PPOTrainer:
    """A policy that is not the reference, and a critic that says something."""
    random = torch.Generator().manual_seed(3)
    for weight in (run.policy.policy_parameters() | run.policy.value_parameters()).values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=random)
    return run


@contextmanager
def no_step(run: PPOTrainer) -> Iterator[None]:
    """Updates leave their clipped gradients and change nothing."""
    before = run.optimizer.step
    run.optimizer.step = lambda: None  # type: ignore[method-assign]
    yield
    run.optimizer.step = before  # type: ignore[method-assign]


def grads(run: PPOTrainer) -> tuple[Tensor, Tensor]:
    """Of policy and critic."""
    parts = run.policy.policy_parameters(), run.policy.value_parameters()
    return tuple(torch.cat([p.grad.flatten() for p in part.values() if p.grad is not None]) for part in parts)  # type: ignore[return-value]


# The update ------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_apart_at_max_grad_norm():
    run = stirred(trainer(replace(SETTINGS, max_grad_norm=1e-3)))
    experience, averages = run.collect(), Averages()
    with no_step(run):
        run.updater.update(experience, list(range(6)), kl_weight=0.0, averages=averages)
    assert [float(part.norm()) for part in grads(run)] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    norms = averages.means()
    assert min(norms["policy_grad_norm"], norms["value_grad_norm"]) > 2e-3, "what is logged is the norm before"


def test_ratios_are_those_of_the_updated_sequences_in_their_place():
    run = stirred(trainer())
    experience = run.collect()
    new = experience.scores.logprobs
    shifted = replace(experience, scores=replace(experience.scores, logprobs=new - 0.1 * torch.arange(1, 7)[:, None]))
    ratios = torch.full_like(new, 7.0)
    with no_step(run):
        run.updater.update(shifted, [1, 4], kl_weight=0.0, averages=Averages(), ratios=ratios)
    for row, mask in enumerate(experience.responses.response_mask):
        expected = math.exp(0.1 * (row + 1)) if row in (1, 4) else 7.0
        torch.testing.assert_close(ratios[row, mask], torch.full((int(mask.sum()),), expected), rtol=1e-4, atol=1e-4)


def test_a_response_without_any_token_in_the_loss_is_no_response_of_the_mean():
    run = stirred(trainer(replace(SETTINGS, aggregation="seq_mean", max_grad_norm=1e9)))
    experience = run.collect()
    loss_mask = experience.loss_mask.clone()
    loss_mask[[0, 3]] = False
    found = []
    for part, rows in ((replace(experience, loss_mask=loss_mask), range(6)), (experience, [1, 2, 4, 5])):
        with no_step(run):
            run.updater.update(part, list(rows), kl_weight=0.0, averages=Averages())
        found.append(torch.cat(grads(run)))
    assert float(found[0].norm()) > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_minibatches_are_cut_anew_in_each_epoch_step_and_seed():
    config = replace(SETTINGS, num_prompts=10, num_minibatches=4)
    cuts = [minibatch_order(replace(config, seed=seed), step, epoch)
            for seed, step, epoch in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]  # fmt: skip
    for cut in cuts:
        assert [len(part) for part in cut] == [5, 5, 5, 5]
        assert torch.cat(cut).sort().values.tolist() == list(range(20))
    assert len({tuple(torch.cat(cut).tolist()) for cut in cuts}) == 4
    assert [part.tolist() for part in minibatch_order(config, 0, 0)] == [part.tolist() for part in cuts[0]]


# The trainer -----------------------------------------------------------------------------------------------


def test_the_learning_rates_follow_the_schedule():
    config = replace(SETTINGS, steps=5, warmup_steps=2, lr_schedule="linear", value_learning_rate=1e-2)
    run, seen = trainer(config), []
    for step in range(5):
        row = run.step()
        seen.append([group["lr"] for group in run.optimizer.param_groups])
        factor = learning_rate_factor(config, step)
        assert seen[-1] == pytest.approx([3e-3 * factor, 1e-2 * factor])
        assert row["learning_rate"] == seen[-1][0]
    assert len({rates[0] for rates in seen}) > 2


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_kl_is_measured_with_and_without_a_critic(advantage: str):
    run = stirred(trainer(replace(SETTINGS, advantage=advantage, kl_coefficient=0.05)))
    assert abs(run.step()["kl_reference"]) > 1e-3
    assert "kl_reference" not in trainer(replace(SETTINGS, advantage=advantage, kl_coefficient=0.0)).step()


def test_beta_adapts_by_the_number_of_responses_and_is_what_the_next_rollout_pays():
    run = stirred(trainer(replace(SETTINGS, kl_coefficient=0.1, kl_target=1e-3, whiten=False)))
    row = run.step()
    assert run.position.kl_weight == pytest.approx(adapted_kl_weight(0.1, row["kl_reference"], 1e-3, 6), rel=1e-12)
    assert run.position.kl_weight != row["kl_weight"] == 0.1
    paid: dict[float, Experience] = {}
    for beta in (0.0, 2.0):
        run.position.kl_weight = beta
        paid[beta] = run.collect()
    scores, mask = paid[0.0].scores, paid[0.0].responses.response_mask
    assert scores.ref_logprobs is not None
    kl = torch.where(mask, scores.logprobs - scores.ref_logprobs, 0.0)
    decay = SETTINGS.gae_lambda ** torch.arange(mask.shape[1])
    for row, length in enumerate(mask.sum(1).tolist()):
        # Rewards enter advantages linearly: at the first token each later one fades by lambda.
        owed = float((kl[row, :length] * decay[:length]).sum())
        difference = float(paid[0.0].advantages[row, 0] - paid[2.0].advantages[row, 0])
        assert difference == pytest.approx(2 * owed, rel=1e-4, abs=1e-5), row


def test_prompts_of_a_finite_task_are_checked_wherever_the_run_stands():
    run = trainer(replace(SETTINGS, max_prompt_tokens=12), task=Digits(prompts=("b=7;b?", "a=1;b=2;a?", "x" * 13)))
    run.position.step = 1  # on to the second round through the problems
    with pytest.raises(PolicyError, match=r"every problem must have at most 12 tokens .* got 1 of 3 that are longer"):
        run.train()


def test_a_resumed_step_reports_the_ratios_of_the_updates_before_it_was_cut(tmp_path: Path):
    config = replace(SETTINGS, steps=1, num_minibatches=3, save_every_updates=1, keep_checkpoints=9, report_every=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer(config, output=whole).train()
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-000000-002", cut / "checkpoint-000000-002")
    trainer(config, output=cut, resume=True).train()
    one, two = (load_rollout(folder / "rollouts" / "step-000001.safetensors").ratio for folder in (whole, cut))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    rows = torch.cat(minibatch_order(config, 0, 0)[:2])
    assert (one[rows] - 1).abs().max() > 1e-4, "nothing to lose"


@pytest.mark.parametrize(("precision", "merges"), [("no", True), ("bf16", False)])
def test_weights_are_merged_for_generation_only_in_full_precision(precision: str, merges: bool):
    run = trainer()
    run.accelerator = SimpleNamespace(mixed_precision=precision)
    assert run._merges == merges
    run.config = replace(run.config, merge_for_generation=False)
    assert not run._merges


def test_writing_an_adapter_leaves_it_as_it_was(tmp_path: Path):
    policy = ActorCritic(tiny_policy(), LoraConfig(rank=2), critic=False)
    save_adapter(policy, policy.policy_name, tmp_path)
    assert policy.peft.peft_config[policy.policy_name].inference_mode is False
    assert '"inference_mode": true' in (tmp_path / "adapter_config.json").read_text()


# Rollout and scoring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_prompt_tokens", "limit"), [(99, 99), (100, 100), (101, 100), (500, 100)])
def test_a_prompt_may_be_as_long_as_the_context_allows_and_no_longer(max_prompt_tokens: int, limit: int):
    encoder = PromptEncoder(alphabet(), tiny_policy(context=128), max_prompt_tokens, 28)
    assert len(encoder.ids(Sample(0, "a" * limit, ""))) == limit
    with pytest.raises(PolicyError, match=rf"must have at most {limit} tokens .*, got {limit + 1}"):
        encoder.ids(Sample(0, "a" * (limit + 1), ""))


def test_each_response_draws_its_own_credit_wherever_the_batch_is_cut():
    responses = trainer().collect().responses

    def draws(part: Responses, seed: int = 5, step: int = 2) -> list[float]:
        return [float(torch.rand((), generator=stream)) for stream in credit_generators(part, seed, step)]

    whole = draws(responses)
    assert responses.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(whole)) == 6, "responses to one prompt draw apart"
    assert draws(responses.select([2, 3])) == whole[2:4]
    assert not set(draws(responses, step=3)) & set(whole)
    assert not set(draws(responses, seed=6)) & set(whole)


def test_a_rule_reads_the_heads_and_layers_that_it_asks_for():
    policy = ActorCritic(tiny_policy(layers=3), LoraConfig(rank=2), critic=False)
    tokens = torch.tensor([[3, 30, 39, 5, 8, 12]])
    mask = torch.ones_like(tokens)

    def read(need: AttentionNeed, **credit) -> Tensor:
        with recorder_for(policy, need, CreditConfig(rule="uniform", **credit)) as recorder, torch.no_grad():
            policy.causal_lm(input_ids=tokens, attention_mask=mask)
        return recorder.rows(mask, tokens).dense()

    own = read(AttentionNeed(layers="0-0", heads="max"), layers="all", heads="mean")
    assert torch.equal(own, read(AttentionNeed(), layers="0-0", heads="max"))
    assert not torch.equal(own, read(AttentionNeed(layers="0-0"), heads="mean"))
    assert not torch.equal(own, read(AttentionNeed(heads="max"), layers="all"))


def test_the_embedding_gradient_of_a_response_knows_no_padding():
    run = stirred(trainer(replace(SETTINGS, max_response_tokens=16)))
    responses = run.collect().responses
    short = responses.response_mask.clone()
    short[:, 6:] = False
    short[::2, 4:] = False
    kept = torch.cat([responses.attention_mask[:, : responses.prompt_length], short], 1)
    padded = replace(responses, response_mask=short, attention_mask=kept & responses.attention_mask)
    found = embedding_gradient(run.policy, padded, 1.0)
    for row in range(responses.num_sequences):
        length, left = int(short[row].sum()), int((~padded.attention_mask[row, : padded.prompt_length]).sum())
        end = padded.prompt_length + length
        alone = replace(
            padded.select([row]), input_ids=padded.input_ids[row : row + 1, left:end],
            prompt_length=padded.prompt_length - left,
            attention_mask=padded.attention_mask[row : row + 1, left:end], response_mask=short[row : row + 1, :length],
            question=padded.question[row : row + 1, left:end], answer=padded.answer[row : row + 1, left:end],
            oracle=None, sampled_logprobs=None,
        )  # fmt: skip
        expected = embedding_gradient(run.policy, alone, 1.0)[0]
        assert expected[:-1].min() > 0
        torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5)
        assert not found[row, length:].any()


def test_values_stay_in_float32_under_an_autocast_around_everything():
    policy = stirred(trainer()).policy
    tokens = torch.tensor([[3, 30, 39, 5, 8, 12]])
    inputs = ModelInput(tokens, torch.ones_like(tokens), torch.arange(6)[None])
    assert policy.value_head is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = policy.value_pass(inputs, 3)
        with policy.adapter("value"):
            states = policy.causal_lm.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[:, -4:]
    assert values is not None
    assert values.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(values, policy.value_head(states.float())[..., 0], rtol=1e-6, atol=1e-6)


def test_a_reward_file_that_fails_leaves_no_module_behind(tmp_path: Path):
    (tmp_path / "half.py").write_text("started = True\nraise ValueError('no')\n")
    with pytest.raises(ConfigError, match="reward: must name code that can be imported"):
        load_function(f"{tmp_path / 'half.py'}:reward")
    assert not [name for name in sys.modules if name.startswith("_reward_half")]
