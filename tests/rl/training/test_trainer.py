"""The loop as equivalences: what must not change the result does not, to the bit where that can be had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl import (
    ActorCritic,
    CheckpointError,
    ConfigError,
    CreditConfig,
    CreditError,
    CreditInput,
    DivergedError,
    Experience,
    JsonlTask,
    LoraConfig,
    PolicyError,
    PPOConfig,
    PPOTrainer,
    RewardError,
    TaskError,
    credit_rule,
    load_chain_model,
)
from rl.credit import registry
from rl.policy.actor_critic import TokenOutput
from rl.training.experience import build_experience
from rl.training.update import micro_losses
from tests.fixtures.policies import FAMILIES, Digits, UnmarkedDigits, alphabet, tiny_policy

SETTINGS = PPOConfig(
    steps=3, num_prompts=3, group_size=2, max_response_tokens=10, num_minibatches=2, epochs=2, learning_rate=3e-3,
    micro_batch_size=8, lora=LoraConfig(rank=4), credit=CreditConfig(rule="uniform"),
)  # fmt: skip


def constant(batch: CreditInput) -> Tensor:
    """The same number everywhere."""
    return torch.full(batch.scored.shape, float(batch.options["value"]))


def first(batch: CreditInput) -> Tensor:
    """1 on the first token, 0 on the others."""
    scores = torch.zeros(batch.scored.shape)
    scores[:, 0] = 1.0
    return scores


@pytest.fixture(autouse=True, scope="module")
def own_rules():
    """Known to this module alone: others run every rule that there is."""
    before = dict(registry._RULES)
    credit_rule("test_constant")(constant)
    credit_rule("test_first")(first)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def trainer(config: PPOConfig = SETTINGS, *, family: str = "llama", **options) -> PPOTrainer:
    model = tiny_policy(family)
    return PPOTrainer(model, alphabet(), config=config, progress=False, **({"task": Digits()} | options))


def trained(config: PPOConfig = SETTINGS, **options) -> dict[str, Tensor]:
    run = trainer(config, **options)
    run.train()
    return weights(run)


def weights(run: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def gradients(
    config: PPOConfig, *, family: str = "llama", experience: Experience | None = None, **options
) -> dict[str, Tensor]:
    """The policy gradient of the first minibatch, before clipping."""
    run = trainer(replace(config, max_grad_norm=1e9, num_minibatches=1), family=family, **options)
    run.optimizer.step = lambda: None  # type: ignore[method-assign]
    experience = run.collect() if experience is None else experience
    from rl.training.update import Averages

    rows = range(experience.responses.num_sequences)
    run.updater.update(experience, list(rows), kl_weight=0.0, averages=Averages())
    return {name: p.grad.clone() for name, p in run.policy.policy_parameters().items() if p.grad is not None}


def credit(**options) -> PPOConfig:
    return replace(SETTINGS, credit=CreditConfig(**options))


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
@pytest.mark.parametrize("shape", ["top_q", "bottom_q"])
def test_weights_of_1_are_plain_ppo_to_the_last_bit(advantage: str, shape: str):
    plain = replace(SETTINGS, advantage=advantage)
    flow = replace(plain, credit=CreditConfig(rule="flow", shape=shape, strength=1.0))
    assert same(trained(plain), trained(flow))


def test_credit_changes_what_is_learned():
    """The counterpart of the test above: it would pass if credit were ignored."""
    assert not same(trained(SETTINGS), trained(credit(rule="flow", strength=1.5)))


def test_a_constant_weight_scales_the_policy_gradient():
    task = UnmarkedDigits()
    plain = gradients(SETTINGS, task=task)
    doubled = gradients(credit(rule="test_constant", shape="raw", options={"value": 2.0}), task=task)
    assert any(value.abs().max() > 1e-4 for value in plain.values())
    for name, value in plain.items():
        assert torch.equal(2.0 * value, doubled[name]), name


def test_a_weight_of_0_removes_a_tokens_gradient():
    """Only the first token counts: the same gradient as of responses whose other tokens left the loss."""
    task = UnmarkedDigits()
    chosen = gradients(credit(rule="test_first", shape="raw"), task=task)
    experience = trainer(SETTINGS, task=task).collect()
    only = experience.loss_mask.clone()
    only[:, 1:] = False
    # the denominator of the whole mask is kept by weighing instead of masking on the other side
    scale = float(experience.loss_mask.sum() / only.sum())
    masked = gradients(SETTINGS, experience=replace(experience, loss_mask=only), task=task)
    for name, value in chosen.items():
        torch.testing.assert_close(value * scale, masked[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "dr_grpo"])
def test_micro_batches_change_nothing(family: str, aggregation: str):
    config = replace(credit(rule="flow"), aggregation=aggregation, num_prompts=4)
    whole = gradients(replace(config, micro_batch_size=8), family=family)
    single = gradients(replace(config, micro_batch_size=1), family=family)
    for name, value in whole.items():
        torch.testing.assert_close(single[name], value, atol=2e-6, rtol=2e-4)


def test_rules_that_draw_do_the_same_however_the_batch_is_cut():
    for rule in ("random", "shuffled_flow"):
        parts = [trainer(replace(credit(rule=rule), micro_batch_size=size)).collect().credit for size in (1, 4, 8)]
        assert torch.equal(parts[0].scores > 0, parts[2].scores > 0), rule
        torch.testing.assert_close(parts[0].scores, parts[2].scores, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(parts[1].scores, parts[2].scores, atol=1e-6, rtol=1e-4)


def test_generating_in_parts_and_stepping_by_hand_change_nothing():
    config = replace(credit(rule="flow"), merge_for_generation=False)
    parts = trainer(replace(config, generation_batch_size=2))
    for _ in range(config.steps):
        row = parts.step()
    assert row["step"] == config.steps
    assert same(weights(parts), trained(config))


ONE_UPDATE = replace(SETTINGS, num_minibatches=1, epochs=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        replace(ONE_UPDATE, advantage="group", entropy_coefficient=0.01),
        replace(ONE_UPDATE, kl_coefficient=0.05, kl_in="loss", truncated="bootstrap"),
        replace(ONE_UPDATE, advantage="rloo", credit=CreditConfig(rule="flow", shape="soft", scope="response")),
    ],
    ids=["entropy bonus", "critic and reference", "flow"],
)
def test_learning_from_the_scoring_pass_is_learning_from_one_of_its_own(
    config: PPOConfig, family: str, monkeypatch: pytest.MonkeyPatch
):
    passes: list[int] = []
    forward = ActorCritic.forward
    monkeypatch.setattr(ActorCritic, "forward", lambda *arguments: (passes.append(1), forward(*arguments))[1])
    one = trainer(config, family=family)
    rows = one.train()
    assert not passes
    monkeypatch.setattr(PPOTrainer, "_learns_in_one_pass", False)
    two = trainer(config, family=family)
    others = two.train()
    assert len(passes) == config.steps
    assert same(weights(one), weights(two))
    for row, other in zip(rows, others, strict=True):
        assert {k: v for k, v in row.items() if "second" not in k and "credit_overhead" not in k} == {
            k: v for k, v in other.items() if "second" not in k and "credit_overhead" not in k
        }


def bytes_kept(run: PPOTrainer) -> int:
    """The bytes that autograd keeps during a run."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.train()
    return sum(kept)


@pytest.mark.parametrize("rule", ["flow", "gradient", "fai"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_gradient_checkpointing_keeps_fewer_bytes_and_learns_the_same(rule: str, one_pass: bool):
    """trl#3089. Credit rules record attention in the pass that is recomputed later, or differentiate through it."""
    config = replace(ONE_UPDATE if one_pass else SETTINGS, steps=2, credit=CreditConfig(rule=rule))
    plain = trainer(config)
    saving = trainer(replace(config, gradient_checkpointing=True))
    kept = bytes_kept(plain)
    assert bytes_kept(saving) < kept / 2
    assert same(weights(plain), weights(saving))
    for row, other in zip(plain.history, saving.history, strict=True):
        for name in ("weight_mean", "raised_share", "policy_loss", "policy_grad_norm", "value_grad_norm"):
            assert row[name] == other[name], name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_mode_set_by_the_user_changes_nothing_and_stays(family: str):
    """trl#744: dropout in rollouts, scoring or updates would make old and new probabilities differ by chance."""
    untouched = trainer(SETTINGS, family=family)
    untouched.train()
    run = trainer(SETTINGS, family=family)
    run.step()
    run.policy.causal_lm.train()
    while run.position.step < SETTINGS.steps:
        row = run.step()
        assert run.policy.causal_lm.training
    assert same(weights(run), weights(untouched))
    assert row["kl_old"] == untouched.history[-1]["kl_old"]


def test_a_pass_over_other_responses_is_not_learned_from():
    config = replace(ONE_UPDATE, advantage="group")
    run = trainer(config)
    first = run.collect()
    run.position.step = 1
    run.collect()  # its pass is the one that is kept
    run.position.step = 0
    run.learn(first)
    expected = trainer(config)
    expected.learn(expected.collect())
    assert same(weights(run), weights(expected))


def test_step_0_has_no_kl_and_a_ratio_of_1():
    row = trainer(replace(SETTINGS, epochs=1, num_minibatches=1, steps=1, kl_coefficient=0.1)).train()[0]
    assert row["kl_reference"] == 0.0
    assert row["kl_old"] == 0.0
    assert row["ratio"] == 1.0
    assert row["clip_share"] == 0.0


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_only_adapter_and_value_weights_move(advantage: str):
    run = trainer(replace(SETTINGS, advantage=advantage))
    before, moving = weights(run), run.policy.policy_parameters() | run.policy.value_parameters()
    run.train()
    after = weights(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(moving)
    assert any("lora_B.policy" in name for name in moved)
    assert ("value_head.weight" in moved) == (advantage == "gae")


def test_two_runs_are_the_same_and_another_seed_is_not():
    assert same(trained(), trained())
    assert not same(trained(), trained(replace(SETTINGS, seed=1)))


@pytest.mark.parametrize("entry", ["reward", "potential"])
def test_the_other_entry_points_move_the_reward_and_keep_its_sum(entry: str):
    config = replace(credit(rule="flow", entry=entry), kl_coefficient=0.0, whiten=False, gae_lambda=1.0)
    shaped, plain = trainer(config).collect(), trainer(replace(config, credit=CreditConfig(rule="uniform"))).collect()
    assert shaped.returns is not None
    assert plain.returns is not None
    # values are 0 at the start, so with lambda 1 the first return is the sum of all rewards
    torch.testing.assert_close(shaped.returns[:, 0], plain.returns[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shaped.returns, plain.returns)
    assert torch.equal(shaped.policy_weights, torch.ones_like(shaped.policy_weights))


def test_learning_raises_the_reward():
    config = replace(
        SETTINGS, steps=30, num_prompts=6, group_size=4, advantage="group", learning_rate=1e-2, epochs=1,
        num_minibatches=1, credit=CreditConfig(rule="flow"),
    )  # fmt: skip
    rows = trainer(config).train()
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


def test_masked_truncated_responses_leave_the_losses_and_nothing_is_learned_where_all_were_cut_off():
    config = replace(SETTINGS, truncated="mask", advantage="group")
    run = trainer(config)
    experience = run.collect()
    cut = experience.responses.truncated
    assert cut.any()
    assert not experience.loss_mask[cut].any()
    assert experience.loss_mask[~cut].any()
    before = weights(run)
    all_cut = replace(experience.responses, truncated=torch.ones_like(cut))
    run.learn(build_experience(all_cut, experience.scores, experience.credit, config, kl_weight=0.0))
    assert same(before, weights(run))


def test_bootstrapping_uses_the_value_after_the_last_token():
    config = replace(SETTINGS, truncated="bootstrap", whiten=False, gae_lambda=1.0, kl_coefficient=0.0)
    run = trainer(config)
    assert run.policy.value_head is not None
    run.policy.value_head.bias.data.fill_(0.5)
    experience = run.collect()
    cut = experience.responses.truncated
    assert cut.any()
    assert experience.returns is not None
    expected = experience.responses.rewards + 0.5 * cut.float()
    torch.testing.assert_close(experience.returns[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_missing_end_costs_its_penalty_and_the_log_keeps_the_tasks_verdict():
    config = replace(SETTINGS, missing_eos_penalty=0.25, whiten=False, gae_lambda=1.0, kl_coefficient=0.0)
    experience = trainer(config).collect()
    assert experience.returns is not None
    expected = experience.responses.rewards - 0.25 * experience.responses.truncated.float()
    torch.testing.assert_close(experience.returns[:, 0], expected)
    assert set(experience.responses.rewards.tolist()) <= {0.0, 1.0}


def test_zero_variance_groups_are_counted_and_teach_nothing():
    class Same(Digits):
        def reward(self, sample, completion):
            return 1.0

    run = PPOTrainer(tiny_policy(), alphabet(), task=Same(), progress=False,
                     config=replace(SETTINGS, advantage="group", steps=1))  # fmt: skip
    before = weights(run)
    assert run.train()[0]["zero_variance_share"] == 1.0
    assert same(before, weights(run))


def test_credit_costs_are_logged():
    row = trainer(credit(rule="flow")).train()[0]
    assert 0 < row["credit_overhead_percent"] < 100
    assert row["seconds"] >= row["generation_seconds"] + row["update_seconds"]


class Broken(Digits):
    """A task that fails in a way of one's choice."""

    verdict: object = None

    def reward(self, sample, completion):
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (ValueError("no"), r"reward.*ValueError.*no"),
        (float("nan"), r"finite.*nan"),
        ("1", r"number.*'1'"),
        (None, r"number.*None"),
    ],
)
def test_a_broken_reward_says_what_it_returned(verdict: object, message: str):
    task = Broken()
    object.__setattr__(task, "verdict", verdict)
    run = PPOTrainer(tiny_policy(), alphabet(), task=task, config=SETTINGS, progress=False)
    with pytest.raises(RewardError, match=message):
        run.train()


def test_a_diverged_run_says_so_before_it_writes_nan():
    run = trainer(replace(SETTINGS, advantage="group"))
    experience = run.collect()
    broken = replace(experience, advantages=experience.advantages * float("inf"))
    before = weights(run)
    with pytest.raises(DivergedError, match="learning_rate: must keep the gradient finite, got policy_grad_norm=nan"):
        run.learn(broken)
    assert same(before, weights(run))


def test_prompts_over_budget_and_contexts_too_short_are_refused():
    with pytest.raises(
        PolicyError, match=r"prompt: sample 0 must have at most 5 tokens \(max_prompt_tokens=5\), got 10"
    ):
        trainer(replace(SETTINGS, max_prompt_tokens=5)).collect()
    model = tiny_policy(context=12)
    run = PPOTrainer(model, alphabet(), task=Digits(), config=SETTINGS, progress=False)
    with pytest.raises(PolicyError, match="the model's context of 12 minus max_response_tokens=10"):
        run.collect()
    with pytest.raises(PolicyError, match="max_response_tokens: must leave room for a prompt, got 10"):
        PPOTrainer(tiny_policy(context=10), alphabet(), task=Digits(), config=SETTINGS, progress=False)


def test_a_long_prompt_is_found_before_the_first_step_not_at_its_turn(tmp_path):
    task = Digits(prompts=(*Digits().prompts, *["a=1;" * 20] * 6))
    run = PPOTrainer(
        tiny_policy(), alphabet(), task=task, config=replace(SETTINGS, max_prompt_tokens=20), progress=False,
        output=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(
        PolicyError,
        match=r"every problem must have at most 20 tokens .*, got 6 of 9 that are longer, up to 80 "
        r"\(numbers 3, 4, 5, 6, 7, \.\.\.\)",
    ):
        run.train()
    assert not run.history
    short = replace(SETTINGS, max_prompt_tokens=20, steps=1)  # whose problems the run never reaches
    PPOTrainer(tiny_policy(), alphabet(), task=task, config=short, progress=False).train()


def test_names_that_do_not_exist_are_refused_before_any_work():
    with pytest.raises(CreditError, match="credit: must name a registered rule, got 'flwo'; there are atpo"):
        trainer(credit(rule="flwo"))
    with pytest.raises(TaskError, match="countdwon"):
        PPOTrainer(tiny_policy(), alphabet(), task="countdwon", config=SETTINGS)
    with pytest.raises(ConfigError, match="trackers: must be among tensorboard, wandb, trackio, got 'excel'"):
        trainer(trackers=["excel"])


def test_an_output_folder_with_a_run_in_it_is_not_overwritten(tmp_path):
    trainer(replace(SETTINGS, steps=1), output=tmp_path).train()
    with pytest.raises(CheckpointError, match=r"output: must be a new folder, got .* pass resume=True"):
        trainer(output=tmp_path)


def test_under_mixed_precision_rollout_and_update_are_one_function():
    """The wrapper computes updates in bfloat16; scoring past it in float32 made the first ratio another number."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        mixed = Accelerator(cpu=True, mixed_precision="bf16")
        config = replace(SETTINGS, epochs=1, num_minibatches=1, steps=1, kl_coefficient=0.1)
        row = trainer(config, accelerator=mixed).train()[0]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert row["ratio"] == 1.0
    assert row["kl_old"] == 0.0
    assert row["kl_reference"] == 0.0


@pytest.mark.parametrize("minibatches", [1, 2])
def test_recomputed_layers_have_the_precision_of_their_forward_pass(minibatches: int):
    """The backward pass runs outside of the autocast under which a layer was computed first."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    config = replace(SETTINGS, epochs=1, num_minibatches=minibatches, steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        mixed = Accelerator(cpu=True, mixed_precision="bf16")
        plain = trained(config, accelerator=mixed)
        saving = trained(replace(config, gradient_checkpointing=True), accelerator=mixed)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert same(plain, saving)
    assert not same(plain, trained(config)), "the precision matters"


def test_values_on_padding_reach_no_gradient_even_nan():
    run = trainer(replace(SETTINGS, num_minibatches=1))
    experience = run.collect()
    mask = experience.loss_mask
    assert not mask.all()
    values = torch.where(mask, 0.1, torch.nan).requires_grad_(True)
    output = TokenOutput(experience.scores.logprobs, experience.scores.entropy, values)
    loss, _ = micro_losses(output, experience, SETTINGS, kl_weight=0.0, num_tokens=9.0, num_sequences=6.0)
    loss.backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert not values.grad[~mask].any()
    assert values.grad[mask].any()


def test_rewards_that_compare_a_group_reach_the_gradient(tmp_path):
    """Judged one by one, a rank inside the group is 1 for all and teaches nothing (trl#3896, trl#4707)."""
    calls = []

    def shortest_first(samples, completions):
        calls.append([sample.index for sample in samples])
        order = sorted(completions, key=len)
        return [1 - order.index(text) / (len(order) - 1) for text in completions]

    lines = [json.dumps({"prompt": f"a={number};b=a+1;b?", "answer": str(number + 1)}) for number in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    task = JsonlTask(tmp_path / "p.jsonl", reward=shortest_first)
    row = trainer(replace(SETTINGS, steps=1, advantage="group"), task=task).train()[0]
    assert calls == [[0, 0, 1, 1, 2, 2]]
    assert row["policy_grad_norm"] > 0
    assert row["zero_variance_share"] < 1


def test_the_difference_between_sampling_and_scoring_is_logged():
    """In float32 it is rounding; in bfloat16 the cached steps of generation and the full pass disagree."""
    exact = trainer(replace(SETTINGS, steps=1)).train()[0]
    assert exact["sampling_gap"] < 1e-5
    assert exact["sampling_ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert exact["sampling_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    model, tokenizer = load_chain_model()
    config = replace(SETTINGS, steps=1, max_response_tokens=32)
    run = PPOTrainer(model.to(torch.bfloat16), tokenizer, task="chain", config=config, progress=False)
    experience = run.collect()
    run.learn(experience)
    run._finish(experience)
    row = run.history[0]
    sampled = experience.responses.sampled_logprobs
    assert sampled is not None
    gap = (experience.scores.logprobs - sampled)[experience.responses.response_mask]
    assert row["sampling_gap"] == pytest.approx(float(gap.abs().mean()), rel=1e-5)
    # How far the two passes disagree depends on the kernels of the version of torch.
    assert row["sampling_gap"] > 0
    assert row["sampling_ratio_min"] == pytest.approx(float(gap.min().exp()), rel=1e-5)
    assert row["sampling_ratio_max"] == pytest.approx(float(gap.max().exp()), rel=1e-5)


def test_stop_strings_and_the_correction_reach_the_rollout():
    run = trainer(replace(SETTINGS, stop_strings="1", sampling_correction=1.0, max_response_tokens=40))
    experience = run.collect()
    responses = experience.responses
    assert all("1" not in text[:-1] for text in responses.completions)
    ends = [text.endswith("1") for text in responses.completions]
    assert any(ends)
    assert not (responses.truncated & torch.tensor(ends)).any()
    assert float(experience.policy_weights.max()) <= 1.0


def test_each_of_several_rewards_is_logged_and_survives_a_resume_inside_a_step(tmp_path):
    def even(samples, completions):
        return [2.0 if sample.index % 2 == 0 else None for sample in samples]

    def length(samples, completions):
        return [float(len(text)) for text in completions]

    lines = [json.dumps({"prompt": f"a={number};a?", "answer": str(number)}) for number in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    task = JsonlTask(tmp_path / "p.jsonl", reward=[even, length], reward_weights=[1, 0.5], eval_every=0)
    config = replace(SETTINGS, steps=1, save_every_updates=1, keep_checkpoints=9)
    row = trainer(config, task=task, output=tmp_path / "run").train()[0]
    assert row["reward/even"] == 2.0
    assert row["reward"] == pytest.approx(2.0 * 2 / 3 + 0.5 * row["reward/length"])
    for path in (tmp_path / "run").glob("checkpoint-000001*"):
        shutil.rmtree(path)
    again = trainer(config, task=task, output=tmp_path / "run", resume=True)
    assert again.position.updates
    resumed = again.train()[0]
    assert {name: resumed[name] for name in row if name.startswith("reward")} == {
        name: row[name] for name in row if name.startswith("reward")
    }
