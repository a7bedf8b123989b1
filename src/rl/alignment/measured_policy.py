"""Measure a model with a policy adapter, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn

from flowgraph import context_length
from rl.config import PPOConfig
from rl.policy.actor_critic import ActorCritic

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def default_sampling(model: nn.Module, *, group_size: int = PPOConfig.group_size) -> PPOConfig:
    """Return how rollouts are sampled where the caller gives no settings.

    Args:
        model: a causal LM. In a short context, the response takes at most half of it, so that a prompt fits.
        group_size: responses to each problem.
    """
    most = PPOConfig.max_response_tokens
    # A PEFT model passes the reading of its settings on to the model that it wraps.
    context = context_length(cast("PreTrainedModel", model))
    if context is not None:
        most = min(most, max(1, context // 2))
    return PPOConfig(advantage="group", group_size=group_size, max_response_tokens=most)


@contextmanager
def policy_on(model: nn.Module, config: PPOConfig) -> Iterator[ActorCritic]:
    """Yield the model as a policy; remove the added adapters afterwards, and restore trainable weights and modes."""
    # Adding an adapter freezes weights and changes modes, so the state is read first.
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
