"""Measure a model with a policy adapter, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rl.config import PPOConfig
from rl.policy.actor_critic import ActorCritic


@contextmanager
def policy_on(model: nn.Module, config: PPOConfig) -> Iterator[ActorCritic]:
    """Yield the model as a policy; remove the added adapters afterwards, and restore trainable weights and modes."""
    was_trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    was_training = {name: module.training for name, module in model.named_modules()}
    policy = ActorCritic(
        model,
        config.lora,
        critic=False,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    try:
        yield policy
    finally:
        # Without a reference adapter the policy's adapter was new; otherwise only the reference was added.
        if policy.reference_name is None:
            policy.peft.unload()
        else:
            policy.peft.delete_adapter(policy.reference_name)
        for name, weight in model.named_parameters():
            weight.requires_grad_(was_trainable[name])
        for name, module in model.named_modules():
            module.training = was_training[name]
