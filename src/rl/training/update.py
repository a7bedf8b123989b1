"""One optimiser update: losses over a minibatch, summed over micro-batches and processes as if it were one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl.algorithm.losses import aggregate, kl_estimate, policy_loss, value_loss
from rl.config import PPOConfig
from rl.errors import DivergedError
from rl.policy.actor_critic import ActorCritic, ModelInput, TokenOutput
from rl.records import Experience
from rl.seeds import generator
from rl.training.metrics import Averages


def learning_rates(config: PPOConfig) -> tuple[float, float]:
    """Of the policy's adapter, and of the critic; before any schedule."""
    value = config.value_learning_rate
    return config.learning_rate, config.learning_rate if value is None else value


def make_optimizer(policy: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    """Adam over the policy's weights and, with a critic, over those of the critic as a second group."""
    groups = [
        {"params": list(parameters.values()), "lr": rate}
        for parameters, rate in zip(
            (policy.policy_parameters(), policy.value_parameters()), learning_rates(config), strict=True
        )
        if parameters
    ]
    return torch.optim.Adam(groups, eps=1e-5)


def minibatch_order(config: PPOConfig, step: int, epoch: int) -> list[Int64[Tensor, " sequences"]]:
    """Numbers of the sequences of each update, over all processes; a function of the seed and the place."""
    total = config.num_prompts * config.group_size
    order = torch.randperm(total, generator=generator(config.seed, "minibatches", step, epoch))
    return list(order.chunk(config.num_minibatches))


def micro_losses(
    output: TokenOutput,
    part: Experience,
    config: PPOConfig,
    *,
    kl_weight: float,
    num_tokens: float,
    num_sequences: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, "batch response"]]]:
    """The loss of one micro-batch with the whole minibatch's denominators, and what is logged per token.

    ``loss = policy + value_coefficient * value + kl_weight * k3 - entropy_coefficient * entropy``; only the first
    is multiplied with the credit weights.
    """
    device = output.logprobs.device
    mask = part.loss_mask.to(device)

    def total(per_token: Tensor) -> Tensor:
        return aggregate(
            per_token, mask, config.aggregation, num_tokens=num_tokens, num_sequences=num_sequences,
            max_tokens=config.max_response_tokens,
        )  # fmt: skip

    old = part.scores.logprobs.to(device)
    logprobs = torch.where(mask, output.logprobs, 0.0)  # whatever a model says of padding stays there
    policy = policy_loss(
        logprobs, old, part.advantages.to(device), clip=config.clip, clip_high=config.clip_high,
        dual_clip=config.dual_clip, weights=part.policy_weights.to(device),
    )  # fmt: skip
    loss = total(policy.per_token)
    seen = {
        "policy_loss": policy.per_token,
        "clip_share": policy.clipped.float(),
        "entropy": output.entropy,
        "kl_old": kl_estimate(logprobs, old, "k3"),
        "ratio": policy.ratio,
    }
    if output.values is not None and part.returns is not None and part.scores.values is not None:
        returns = part.returns.to(device)
        values = torch.where(mask, output.values, 0.0)
        per_token = value_loss(values, part.scores.values.to(device), returns, clip=config.value_clip)
        loss = loss + config.value_coefficient * total(per_token)
        seen["value_loss"] = per_token
    if config.kl_in == "loss" and part.scores.ref_logprobs is not None and kl_weight > 0:
        per_token = kl_estimate(logprobs, part.scores.ref_logprobs.to(device), "k3")
        loss = loss + kl_weight * total(per_token)
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * total(output.entropy)
    return loss, {name: value.detach() for name, value in seen.items()}


class Updater:
    """Gradient steps on an experience.

    Args:
        wrapped: the policy as accelerate prepared it (or the policy itself).
        policy: the same, not wrapped.
        optimizer: over policy weights and critic weights, in two groups.
        accelerator: of the run.
        config: of the run.
    """

    def __init__(
        self, wrapped: nn.Module, policy: ActorCritic, optimizer: Any, accelerator: Any, config: PPOConfig
    ) -> None:
        self.wrapped, self.policy, self.optimizer = wrapped, policy, optimizer
        self.accelerator, self.config = accelerator, config

    def update(
        self, experience: Experience, rows: Sequence[int], *, kl_weight: float, averages: Averages,
        ratios: Tensor | None = None, output: TokenOutput | None = None,
    ) -> bool:  # fmt: skip
        """One optimiser step on the given sequences of this process; False where no token of any process counts.

        Args:
            experience: of this process.
            rows: sequences of the minibatch that are this process's; may be none.
            kl_weight: beta of a KL term in the loss.
            averages: filled with what is logged.
            ratios: ``[B, R]``, filled with the importance ratios seen.
            output: of a forward pass over these very rows with the present weights, where one was made already.

        Raises:
            DivergedError: the gradient is not finite.
        """
        config, world = self.config, self.accelerator.num_processes
        mask = experience.loss_mask[list(rows)]
        counts = torch.tensor([mask.sum(), mask.any(1).sum()], dtype=torch.float32, device=self.policy.device)
        num_tokens, num_sequences = self.accelerator.reduce(counts, "sum").tolist()
        if not num_tokens:
            return False
        parts = self._micro_batches(rows)
        self.optimizer.zero_grad()
        for number, chosen in enumerate(parts):
            part = experience.select(chosen or [0])
            last = number == len(parts) - 1
            with _syncing(self.accelerator, self.wrapped, last):
                inputs = ModelInput.of(part.responses, self.policy.device)
                tokens = inputs.input_ids[:, part.responses.prompt_length :]
                made = TokenOutput(*self.wrapped(inputs, tokens, config.temperature)) if output is None else output
                loss, seen = micro_losses(
                    made, part, config, kl_weight=kl_weight, num_tokens=num_tokens, num_sequences=num_sequences
                )
                # Wrappers average gradients over processes; the denominators are those of all of them already. A
                # process without a sequence in this minibatch runs along with a weight of 0.
                self.accelerator.backward(loss * (world if chosen else 0.0))
            if chosen:
                self._log(seen, part, averages)
                if ratios is not None:
                    ratios[list(chosen)] = seen["ratio"].float().cpu()
        self._step(averages)
        return True

    def _micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """At least one, so that every process takes part in every synchronisation."""
        size = self.config.micro_batch_size
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)] or [[]]

    def _log(self, seen: dict[str, Tensor], part: Experience, averages: Averages) -> None:
        mask = part.loss_mask
        for name, value in seen.items():
            averages.add(name, value.float().cpu().masked_fill(~mask, 0.0).sum(), mask.sum())

    def _step(self, averages: Averages) -> None:
        for name, group in zip(("policy_grad_norm", "value_grad_norm"), self.optimizer.param_groups, strict=False):
            norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise DivergedError(
                    f"learning_rate: must keep the gradient finite, got {name}={float(norm)} with "
                    f"learning_rate={group['lr']:g}; lower it, or clip_high and the credit's strength, and resume from "
                    "the last checkpoint"
                )
            averages.add(name, float(norm), 1)
        self.optimizer.step()


def _syncing(accelerator: Any, wrapped: nn.Module, last: bool) -> Any:
    """Gradients are exchanged once for each update, with its last micro-batch."""
    return nullcontext() if last else accelerator.no_sync(wrapped)
