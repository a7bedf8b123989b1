"""Every setting is checked at construction; messages state the rule, the value and the remedy."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from rl import ConfigError, CreditConfig, LoraConfig, PPOConfig
from rl.algorithm.schedules import adapted_kl_weight, check_schedule, learning_rate_factor
from rl.config import differences
from rl.seeds import derive, generator

NAN, INF = float("nan"), float("inf")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"share: must lie in \(0, 1\], got 0.0; 0.4 is the paper's"),
        ({"share": 1.001}, r"share: must lie in \(0, 1\], got 1.001"),
        ({"share": NAN}, "share: must be finite, got nan; see"),
        ({"strength": 0}, "strength: must be positive, got 0.0; 1.5 is the paper's"),
        ({"strength": INF}, "strength: must be finite, got inf"),
        ({"strength": True}, "strength: must be float, got True"),
        ({"strength": "2"}, "strength: must be float, got '2'"),
        ({"floor": -0.1}, r"floor: must lie in \[0, 1\], got -0.1; 0.25"),
        ({"floor": 1.1}, r"floor: must lie in \[0, 1\], got 1.1"),
        ({"ceiling": 0.9}, "ceiling: must be at least 1, got 0.9; 4"),
        ({"ceiling": NAN}, "ceiling: must be finite, got nan"),
        ({"potential_scale": -1.0}, "potential_scale: must be at least 0, got -1.0; 1 is the default"),
        ({"shape": "top"}, "shape: must be one of 'top_q', 'bottom_q', 'only_top', 'soft', 'raw', got 'top'; choose"),
        ({"shape": ["top_q"]}, r"shape: must be one of .*, got \['top_q'\]"),
        ({"entry": "loss"}, "entry: must be one of 'advantage', 'reward', 'potential', got 'loss'"),
        (
            {"sign": "positive"},
            "sign: must be one of 'all', 'non_negative', 'negative', 'asymmetric', 'rule', got 'positive'",
        ),
        ({"scope": "answer"}, "scope: must be one of 'reasoning', 'response', got 'answer'"),
        ({"rows": "emitted"}, "rows: must be one of 'emission', 'literal', got 'emitted'"),
        ({"rule": 3}, "rule: must be str, got 3"),
        ({"rule": None}, "rule: must be str, got None"),
        ({"mean_one": 1}, "mean_one: must be bool, got 1"),
        ({"options": [1]}, r"options: must be dict, got \[1\]"),
    ],
)
def test_credit_rules(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CreditConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        PPOConfig.from_dict({"credit": settings})


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank: must be at least 1, got 0; 16 is the default"),
        ({"rank": 8.0}, "rank: must be int, got 8.0"),
        ({"rank": True}, "rank: must be int, got True"),
        ({"alpha": 0.0}, "lora.alpha: must be positive, got 0.0; twice the rank"),
        ({"alpha": INF}, "alpha: must be finite, got inf"),
        ({"targets": ""}, "lora.targets: must name at least one layer, got ''; use 'all-linear'"),
        ({"targets": []}, r"lora.targets: must name at least one layer, got \[\]"),
        ({"targets": 3}, "targets: must be str or list, got 3"),
    ],
)
def test_lora_rules(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


AT_LEAST_1 = ("steps", "num_prompts", "group_size", "max_prompt_tokens", "max_response_tokens", "epochs",
              "num_minibatches", "micro_batch_size", "keep_checkpoints", "evaluation_problems",
              "evaluation_samples")  # fmt: skip
POSITIVE = ("temperature", "learning_rate", "adam_epsilon", "max_grad_norm", "clip")
POSITIVE_OR_NONE = ("clip_high", "value_clip", "kl_target", "value_learning_rate")
NOT_NEGATIVE = ("kl_coefficient", "value_coefficient", "entropy_coefficient", "missing_eos_penalty")


@pytest.mark.unchecked
@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: 0}, f"{name}: must be at least 1, got 0; see PPOConfig") for name in AT_LEAST_1),
        *(({name: 2.0}, f"{name}: must be int, got 2.0") for name in AT_LEAST_1),
        *(({name: True}, f"{name}: must be int, got True") for name in AT_LEAST_1),
        *(({name: 0}, f"{name}: must be positive, got 0.0; ") for name in POSITIVE),
        *(({name: 0}, f"{name}: must be positive, got 0.0; leave it out") for name in POSITIVE_OR_NONE),
        *(({name: -0.1}, f"{name}: must be at least 0, got -0.1; 0 turns it off") for name in NOT_NEGATIVE),
        *(({name: NAN}, f"{name}: must be finite, got nan") for name in POSITIVE + POSITIVE_OR_NONE + NOT_NEGATIVE),
        *(({name: INF}, f"{name}: must be finite, got inf") for name in ("temperature", "clip", *NOT_NEGATIVE)),
        *(({name: value}, rf"{name}: must lie in \[0, 1\], got {value}; 1 and 0.95")
          for name in ("discount", "gae_lambda") for value in (-0.1, 1.5)),
        *(({name: -1}, f"{name}: must be at least 0, got -1")
          for name in ("warmup_steps", "save_every", "report_every")),
        ({"max_grad_norm": -INF}, "max_grad_norm: must be finite, got -inf"),
        ({"save_every_updates": 0}, "save_every_updates: must be positive, got 0"),
        ({"dual_clip": 1}, "dual_clip: must be above 1, got 1.0; 3 is usual"),
        ({"seed": 2**63}, "seed: must be an integer of 64 bits, got 9223372036854775808; 0 is the default"),
        ({"seed": -(2**63) - 1}, "seed: must be an integer of 64 bits"),
        ({"seed": 0.5}, "seed: must be int, got 0.5"),
        ({"whiten": "no"}, "whiten: must be bool, got 'no'"),
        ({"kl_coefficient": "0.1"}, "kl_coefficient: must be float or nothing, got '0.1'"),
        ({"advantage": "grpo"}, "advantage: must be one of 'gae', 'group', 'rloo', got 'grpo'; choose one"),
        ({"aggregation": "mean"}, "aggregation: must be one of 'token_mean', 'seq_mean', 'dr_grpo', got 'mean'"),
        ({"kl_in": "both"}, "kl_in: must be one of 'reward', 'loss', got 'both'"),
        ({"kl_estimator": "k1"}, "kl_estimator: must be one of 'k3', 'k2', got 'k1'; choose one"),
        ({"truncated": "drop"}, "truncated: must be one of 'keep', 'mask', 'bootstrap', got 'drop'"),
        ({"lr_schedule": "step"}, "lr_schedule: must be one of 'constant', 'linear', 'cosine', 'cosine_with_restarts'"),
        ({"lr_schedule": "linear", "lr_schedule_options": {"min_lr": 1e-6}},
         "lr_schedule_options: must be empty with lr_schedule='linear', which has none, got {'min_lr': 1e-06}; leave"),
        ({"learning_rate": 10**400}, "learning_rate: must be finite, got an integer of 1329 bits; see"),
        ({"learning_rate": 10**5000}, "learning_rate: must be finite, got an integer of 16610 bits; see"),
        ({"kl_coefficient": -(10**400)}, "kl_coefficient: must be finite, got an integer of 1329 bits"),
        ({"credit": {"strength": 10**400}}, "strength: must be finite, got an integer of 1329 bits"),
        ({"lora": {"alpha": 10**400}}, "lora.alpha: must be finite, got an integer of 1329 bits"),
        ({"steps": 10**400}, "steps: must be an integer of 64 bits, got an integer of 1329 bits; see"),
        ({"lora": {"rank": 2**63}}, "lora.rank: must be an integer of 64 bits, got 9223372036854775808; see"),
        ({"steps": -(10**5000)}, "steps: must be at least 1, got an integer of 16610 bits"),
        ({"seed": 10**5000}, "seed: must be an integer of 64 bits, got an integer of 16610 bits; 0 is the default"),
        ({"adam_beta1": 1}, r"adam_beta1: must lie in \[0, 1\), got 1.0; 0.9 is the default"),
        ({"adam_beta2": -0.1}, r"adam_beta2: must lie in \[0, 1\), got -0.1; 0.999 is the default"),
        ({"adam_epsilon": 0}, "adam_epsilon: must be positive, got 0.0; 1e-5 is the default"),
        ({"weight_decay": -1}, "weight_decay: must be at least 0, got -1.0; 0 turns it off"),
        ({"evaluate_every": -1}, "evaluate_every: must be at least 0, got -1; 0 turns it off"),
        ({"evaluation_temperature": -1}, "evaluation_temperature: must be at least 0, got -1.0; 0 is greedy"),
        ({"evaluation_samples": 2}, "evaluation_samples: must be 1 with evaluation_temperature=0: .* got 2; set"),
        ({"patience": 3}, "patience: must come with evaluations, which it counts, got 3; set evaluate_every=10"),
        ({"patience": 0, "evaluate_every": 1}, "patience: must be positive, got 0"),
        ({"num_minibatches": 3}, "num_minibatches: must divide the 32 responses of a step, got 3; change num_prompts"),
        ({"advantage": "group", "group_size": 1}, "group_size: must be at least 2 for advantage='group', which"),
        ({"advantage": "rloo", "group_size": 1}, "group_size: must be at least 2 for advantage='rloo'"),
        ({"advantage": "rloo", "credit": {"entry": "reward"}}, "credit.entry: must be 'advantage' with advantage='r"),
        ({"advantage": "group", "credit": {"entry": "potential"}}, "credit.entry: .* got 'potential'; use entry='adv"),
        ({"advantage": "group", "truncated": "bootstrap"}, "truncated: must be 'keep' or 'mask' with advantage='g"),
        ({"advantage": "group", "kl_target": 0.1}, "kl_target: must come with a positive kl_coefficient .* got 0.1"),
        ({"kl_coefficient": 0, "kl_target": 0.1}, "kl_target: must come with a positive kl_coefficient"),
        ({"credit": 3}, "credit: must be CreditConfig, got 3"),
        ({"lora": "all-linear"}, "lora: must be LoraConfig, got 'all-linear'"),
        ({"step": 3}, "step: must be a setting of PPOConfig, got an unknown name; there are steps, num_prompts"),
        ({3: 3}, "3: must be a setting of PPOConfig"),
        ({"credit": {"gamma": 2}}, "credit.gamma: must be a setting of CreditConfig, got an unknown name; there"),
        ({"lora": {"r": 2}}, "lora.r: must be a setting of LoraConfig, got an unknown name; there are rank"),
    ],
)  # fmt: skip
def test_rules_of_a_run(settings: dict[Any, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        PPOConfig.from_dict(settings)


def test_the_edges_that_are_allowed():
    config = PPOConfig(
        steps=1, num_prompts=1, group_size=1, num_minibatches=1, discount=0, gae_lambda=1, clip_high=1e-9,
        value_clip=None, max_grad_norm=INF, seed=-(2**63), kl_coefficient=0, save_every=0, warmup_steps=5,
        credit=CreditConfig(share=1, floor=0, ceiling=INF, potential_scale=0),
    )  # fmt: skip
    assert isinstance(config.discount, float)
    assert config.credit.ceiling == INF


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, 0.05),
        ({"advantage": "group"}, 0.0),
        ({"kl_coefficient": 0}, 0.0),
        ({"advantage": "rloo", "kl_coefficient": 0.3}, 0.3),
    ],
)
def test_beta_has_a_default_with_a_critic_only(settings: dict[str, Any], weight: float):
    config = PPOConfig(**settings)
    assert config.kl_weight == weight
    assert config.has_critic == (settings.get("advantage", "gae") == "gae")


def test_settings_survive_plain_values_and_json():
    config = PPOConfig(
        advantage="rloo", clip_high=0.28, kl_coefficient=0.01, kl_target=3, seed=7, value_clip=None,
        credit=CreditConfig(rule="fai", shape="soft", options={"window": 10, "deep": {"a": [1, 2]}}),
        lora=LoraConfig(rank=2, targets=["q_proj", "v_proj"]),
    )  # fmt: skip
    plain = config.to_dict()
    assert PPOConfig.from_dict(plain) == config
    assert PPOConfig.from_dict(json.loads(json.dumps(plain))) == config
    plain["credit"]["options"]["deep"]["a"].append(3)
    assert config.credit.options["deep"]["a"] == [1, 2]


def test_a_dictionary_of_settings_is_not_changed():
    settings = {"credit": {"rule": "entropy"}, "lora": {"rank": 2}}
    PPOConfig.from_dict(settings)
    assert settings == {"credit": {"rule": "entropy"}, "lora": {"rank": 2}}


def test_credit_may_be_the_name_of_a_rule():
    assert PPOConfig.from_dict({"credit": "entropy"}) == PPOConfig(credit=CreditConfig(rule="entropy"))


def test_whole_numbers_serve_as_floats_and_compare_alike():
    assert PPOConfig.from_dict({"temperature": 1, "kl_coefficient": 1}) == PPOConfig(
        temperature=1.0, kl_coefficient=1.0
    )


def test_differences_are_listed_by_their_full_names():
    one = PPOConfig(steps=3, credit=CreditConfig(options={"window": 10})).to_dict()
    other = PPOConfig(steps=3, seed=2, lora=LoraConfig(rank=4), credit=CreditConfig(rule="random")).to_dict()
    assert differences(one, one) == []
    assert differences(one, other) == [
        "credit.options.window: 10 -> '(none)'", "credit.rule: 'flow' -> 'random'", "lora.rank: 16 -> 4",
        "seed: 0 -> 2",
    ]  # fmt: skip
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a: {'b': 1} -> 1"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_then_falls_to_nothing_it_can_reach(schedule: Any):
    config = PPOConfig(steps=40, warmup_steps=4, lr_schedule=schedule)
    factors = [learning_rate_factor(config, step) for step in range(config.steps)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(before >= after for before, after in pairwise(factors[4:]))
    assert all(0 < factor <= 1 for factor in factors)
    if schedule == "cosine":
        assert factors[22] == pytest.approx(0.5)
    if schedule == "linear":
        assert factors[22] == pytest.approx(0.5)
        assert factors[-1] == pytest.approx(1 / 36)


def test_a_warm_up_longer_than_the_run_never_ends():
    config = PPOConfig(steps=3, warmup_steps=10, lr_schedule="cosine")
    assert [learning_rate_factor(config, step) for step in range(3)] == [0.1, 0.2, 0.3]


OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-6},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 6},
}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_schedules_of_transformers_are_what_its_scheduler_steps_through(name: Any):
    options = OF_TRANSFORMERS[name]
    config = PPOConfig(steps=20, warmup_steps=4, lr_schedule=name, lr_schedule_options=options, learning_rate=1e-3)
    check_schedule(config)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, 4, 20, options)
    rates = []
    for step in range(20):
        assert 1e-3 * learning_rate_factor(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert len(set(rates)) > 3


def test_every_name_of_transformers_is_a_schedule():
    names = {kind.value for kind in SchedulerType}
    for name in sorted(names):
        options = {**OF_TRANSFORMERS, "greedy": {"min_lr": 1e-6, "max_lr": 1e-3}}.get(name, {})
        check_schedule(PPOConfig(lr_schedule=name, lr_schedule_options=options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "options"), [
    ("reduce_lr_on_plateau", {"patience": 1, "factor": 0.5}),
    ("greedy", {"min_lr": 1e-6, "max_lr": 1e-2, "patience": 1, "factor": 0.5}),
])  # fmt: skip
def test_reacting_schedules_follow_a_reward_that_is_to_grow(name: Any, options: dict[str, Any]):
    config = PPOConfig(lr_schedule=name, lr_schedule_options=options, learning_rate=1e-3, warmup_steps=2)
    assert learning_rate_factor(config, 0) == 0.5, "warm-up"
    assert learning_rate_factor(config, 5) == 1.0
    assert learning_rate_factor(config, 5, [0.5] * 6) < 1.0
    risen = learning_rate_factor(config, 5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert risen > 1.0 if name == "greedy" else risen == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "cosine_with_min_lr"}, r"lr_schedule_options: must be those of 'cosine_with_min_lr' .*got {}"),
        ({"lr_schedule": "polynomial", "lr_schedule_options": {"powr": 2}}, "must be those of 'polynomial' .*powr"),
        ({"lr_schedule": "polynomial", "learning_rate": 1e-9}, "must be those of 'polynomial' in transformers"),
        ({"lr_schedule": "polynomial", "lr_schedule_options": {"power": "2"}}, "must be those of 'polynomial'"),
        ({"lr_schedule": "warmup_stable_decay"}, "must be those of 'warmup_stable_decay'"),
        ({"lr_schedule": "greedy"}, "min_lr and max_lr must enclose learning_rate=0.0001, got 0.001 and 1; set both"),
    ],
)
def test_options_that_a_schedule_does_not_take_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_schedule(PPOConfig(**settings))


def test_beta_moves_towards_its_target_by_a_bounded_step():
    assert adapted_kl_weight(0.1, 6.0, 6.0, 64) == 0.1
    assert adapted_kl_weight(0.1, 6.6, 6.0, 10_000) == pytest.approx(0.11)
    assert adapted_kl_weight(0.1, 600.0, 6.0, 10_000) == pytest.approx(0.12)
    assert adapted_kl_weight(0.1, -5.0, 6.0, 10_000) == pytest.approx(0.08)


def test_seeds_depend_on_every_part_of_the_place():
    places = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, "a", 1, 0), (0, "a", 10), (0, "b", 1)]
    seeds = [derive(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert all(math.log2(seed) > 40 for seed in seeds)
    draws = [generator(3, "sampling", 1).initial_seed(), generator(3, "sampling", 1).initial_seed()]
    assert draws[0] == draws[1] == derive(3, "sampling", 1)
