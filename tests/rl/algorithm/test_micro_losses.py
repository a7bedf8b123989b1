"""The loss of a micro-batch against the formulas written out token by token, every term and every option."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl import Credit, CreditConfig, Experience, LoraConfig, PPOConfig, Responses, Sample, TokenScores
from rl.policy.actor_critic import ActorCritic, TokenOutput
from rl.training.update import make_optimizer, micro_losses
from tests.fixtures.policies import tiny_policy

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
COUNTED = MASK & torch.tensor([[True], [True], [False]])  # the last response was cut off and does not count
EVERYTHING = PPOConfig(
    max_response_tokens=5, clip=0.2, clip_high=0.3, dual_clip=2.0, value_clip=0.2, value_coefficient=0.1, kl_in="loss",
    entropy_coefficient=0.03, credit=CreditConfig(rule="uniform"),
)  # fmt: skip
BETA = 0.07


def drawn(seed: int) -> tuple[Experience, TokenOutput]:
    """Numbers far enough apart that every clip acts on some token and leaves another alone."""
    random = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(MASK.shape, generator=random)

    old, values = -normal(1.0).abs(), normal(0.5)
    prompt = torch.ones(3, 1, dtype=torch.bool)
    responses = Responses(
        samples=tuple(Sample(index, "p", "a") for index in range(3)), completions=("",) * 3,
        input_ids=torch.zeros(3, 6, dtype=torch.int64), attention_mask=torch.cat([prompt, MASK], 1), prompt_length=1,
        response_mask=MASK, truncated=torch.tensor([False, False, True]), groups=torch.arange(3),
        rewards=torch.zeros(3), question=torch.zeros(3, 6).bool(), answer=torch.zeros(3, 6).bool(),
    )  # fmt: skip
    scores = TokenScores(old, normal(1.0).abs(), old + normal(0.7), values, torch.zeros(3))
    ones = torch.ones(MASK.shape)
    experience = Experience(
        responses=responses, scores=scores, credit=Credit(ones, MASK, ones), advantages=normal(1.0),
        returns=values + normal(1.0), loss_mask=COUNTED, policy_weights=1 + normal(1.0).abs(),
    )  # fmt: skip
    leaves = (old + normal(0.8), normal(1.0).abs(), values + normal(0.4))
    return experience, TokenOutput(*(leaf.requires_grad_(True) for leaf in leaves))


def by_hand(experience: Experience, output: TokenOutput, config: PPOConfig) -> tuple[float, set[str]]:
    """The loss in plain floats, and which clips acted."""
    assert output.values is not None
    assert experience.scores.values is not None
    assert experience.scores.ref_logprobs is not None
    assert experience.returns is not None
    total, acted = 0.0, set()
    for row, column in COUNTED.nonzero().tolist():

        def at(tensor: Tensor, place: tuple[int, int] = (row, column)) -> float:
            return float(tensor.detach()[place])

        new, old, advantage = at(output.logprobs), at(experience.scores.logprobs), at(experience.advantages)
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - config.clip), 1 + (config.clip_high or config.clip))
        loss = max(-advantage * ratio, -advantage * clipped)
        acted |= {f"clip {'above' if ratio > clipped else 'below'}"} if loss != -advantage * ratio else set()
        if config.dual_clip is not None and advantage < 0 and loss > -config.dual_clip * advantage:
            loss, acted = -config.dual_clip * advantage, acted | {"dual"}
        loss *= at(experience.policy_weights)
        value, before, target = at(output.values), at(experience.scores.values), at(experience.returns)
        errors = [(value - target) ** 2]
        if config.value_clip is not None:
            errors.append((min(max(value, before - config.value_clip), before + config.value_clip) - target) ** 2)
        acted |= {"value"} if max(errors) != errors[0] else set()
        loss += config.value_coefficient * 0.5 * max(errors)
        if config.kl_in == "loss":
            log_ratio = new - at(experience.scores.ref_logprobs)
            value = math.exp(-log_ratio) - 1 + log_ratio if config.kl_estimator == "k3" else log_ratio**2 / 2
            loss += BETA * ratio * value
        total += loss - config.entropy_coefficient * at(output.entropy)
    return total, acted


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"clip_high": None}, {"dual_clip": None}, {"value_clip": None}, {"kl_in": "reward"},
        {"kl_estimator": "k2"},
        {"entropy_coefficient": 0.0}, {"value_coefficient": 0.9}, {"clip": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_is_its_formula(changes: dict):
    config, acted = replace(EVERYTHING, **changes), set()
    for seed in range(6):
        experience, output = drawn(seed)
        loss, _ = micro_losses(output, experience, config, kl_weight=BETA, num_tokens=11, num_sequences=2)
        expected, clips = by_hand(experience, output, config)
        assert float(loss.detach()) == pytest.approx(expected / 11, rel=1e-5), seed
        acted |= clips
    off = {"dual": config.dual_clip is None, "value": config.value_clip is None}
    assert acted == {"clip above", "clip below", "dual", "value"} - {name for name in off if off[name]}


def test_what_a_model_says_of_padding_reaches_no_gradient():
    """Infinities there would become NaN on the way back, whatever the mask says on the way forth."""
    experience, output = drawn(0)
    assert output.values is not None
    plain = torch.autograd.grad(
        micro_losses(output, experience, EVERYTHING, kl_weight=BETA, num_tokens=8, num_sequences=2)[0],
        [output.logprobs, output.values],
    )
    wild = [torch.where(COUNTED, tensor.detach(), bad).requires_grad_(True)
            for tensor, bad in ((output.logprobs, float("nan")), (output.values, float("inf")))]  # fmt: skip
    loss, seen = micro_losses(
        TokenOutput(wild[0], output.entropy, wild[1]), experience, EVERYTHING, kl_weight=BETA, num_tokens=8,
        num_sequences=2,
    )  # fmt: skip
    for gradient, expected in zip(torch.autograd.grad(loss, wild), plain, strict=True):
        assert torch.equal(gradient, expected)
        assert not gradient[~COUNTED].any()
    assert torch.isfinite(seen["ratio"]).all()


def test_the_optimiser_is_the_documented_one():
    """A larger epsilon than Adam's own 1e-8: weights with hardly any gradient should hardly move."""
    policy = ActorCritic(tiny_policy(), LoraConfig(rank=2), critic=True)
    optimizer = make_optimizer(policy, PPOConfig(learning_rate=3e-4, value_learning_rate=2e-3))
    assert [(group["lr"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (3e-4, 1e-5, 0), (2e-3, 1e-5, 0),
    ]  # fmt: skip
    groups = [{id(weight) for weight in group["params"]} for group in optimizer.param_groups]
    wanted = [
        {id(weight) for weight in found.values()} for found in (policy.policy_parameters(), policy.value_parameters())
    ]
    assert groups == wanted
