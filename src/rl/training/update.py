"""One optimiser update: losses over a minibatch, summed over micro-batches and processes as over one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl.algorithm.losses import aggregate, kl_estimate, kl_loss, policy_loss, value_loss
from rl.config import PPOConfig
from rl.errors import DivergedError
from rl.policy.actor_critic import ActorCritic, ModelInput, TokenOutput
from rl.records import Experience
from rl.seeds import generator
from rl.training.metrics import Averages


def learning_rates(config: PPOConfig) -> tuple[float, float]:
    """Return the learning rates of the policy's adapter and of the critic, before any schedule."""
    if config.value_learning_rate is None:
        return config.learning_rate, config.learning_rate
    return config.learning_rate, config.value_learning_rate


def make_optimizer(policy: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    """Make AdamW over the policy's weights and, with a critic, over those of the critic as a second group.

    Without weight decay it is Adam.
    """
    policy_rate, value_rate = learning_rates(config)
    policy_parameters = list(policy.policy_parameters().values())
    value_parameters = list(policy.value_parameters().values())
    groups = [{"params": policy_parameters, "lr": policy_rate}]
    if value_parameters:
        groups.append({"params": value_parameters, "lr": value_rate})
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def minibatch_order(config: PPOConfig, step: int, epoch: int) -> list[Int64[Tensor, " sequences"]]:
    """Draw the sequences of each update, numbered over all processes.

    The order is a function of the seed, the step and the epoch, so a resumed run draws it again.
    """
    num_sequences = config.num_prompts * config.group_size
    random = generator(config.seed, "minibatches", step, epoch)
    order = torch.randperm(num_sequences, generator=random)
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
    """Compute the loss of one micro-batch with the denominators of its minibatch, and the metrics of each token.

    ``loss = policy + value_coefficient * value + kl_weight * kl - entropy_coefficient * entropy``; only the first
    is multiplied with the credit weights.

    Args:
        output: of the forward pass, ``[B, R]`` each.
        part: the experience of the same sequences.
        config: of the run.
        kl_weight: beta of a KL term in the loss.
        num_tokens: tokens in the loss, of the minibatch in all processes.
        num_sequences: responses with such a token.

    Returns:
        The loss, and detached metrics ``[B, R]`` by name.
    """
    device = output.logprobs.device
    mask = part.loss_mask.to(device)

    def total(per_token: Tensor) -> Tensor:
        return aggregate(
            per_token,
            mask,
            config.aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            max_tokens=config.max_response_tokens,
        )

    # Policy term. Log-probabilities on padding may be infinite, and would make the gradient NaN.
    old_logprobs = part.scores.logprobs.to(device)
    logprobs = torch.where(mask, output.logprobs, 0.0)
    policy = policy_loss(
        logprobs,
        old_logprobs,
        part.advantages.to(device),
        clip=config.clip,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        weights=part.policy_weights.to(device),
    )
    loss = total(policy.per_token)
    metrics = {
        "policy_loss": policy.per_token,
        "clip_share": policy.clipped.float(),
        "entropy": output.entropy,
        "kl_old": kl_estimate(logprobs, old_logprobs, "k3"),
        "ratio": policy.ratio,
    }

    # Value term, with a critic.
    if output.values is not None and part.returns is not None and part.scores.values is not None:
        values = torch.where(mask, output.values, 0.0)
        old_values = part.scores.values.to(device)
        returns = part.returns.to(device)
        value_per_token = value_loss(values, old_values, returns, clip=config.value_clip)
        loss = loss + config.value_coefficient * total(value_per_token)
        metrics["value_loss"] = value_per_token

    # KL term, where the KL belongs to the loss; its gradient is that of the KL also after earlier updates.
    if config.kl_in == "loss" and part.scores.ref_logprobs is not None and kl_weight > 0:
        ref_logprobs = part.scores.ref_logprobs.to(device)
        kl_per_token = kl_loss(logprobs, old_logprobs, ref_logprobs, config.kl_estimator)
        loss = loss + kl_weight * total(kl_per_token)

    # Entropy bonus.
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * total(output.entropy)
    return loss, {name: value.detach() for name, value in metrics.items()}


class Updater:
    """Gradient steps on an experience.

    Args:
        wrapped: the policy as accelerate prepared it (or the policy itself).
        policy: the same, not wrapped.
        optimizer: over policy weights and critic weights, in two groups.
        accelerator: of the run.
        config: of the run.

    Attributes:
        wrapped: the policy as accelerate prepared it.
        policy: the same, not wrapped.
        optimizer: of the run.
        accelerator: of the run.
        config: of the run.
    """

    def __init__(
        self, wrapped: nn.Module, policy: ActorCritic, optimizer: Any, accelerator: Any, config: PPOConfig
    ) -> None:
        self.wrapped = wrapped
        self.policy = policy
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.config = config

    def update(
        self,
        experience: Experience,
        rows: Sequence[int],
        *,
        kl_weight: float,
        averages: Averages,
        ratios: Float[Tensor, "batch response"] | None = None,
        output: TokenOutput | None = None,
    ) -> bool:
        """Make one optimiser step on the given sequences of this process.

        Args:
            experience: of this process.
            rows: the minibatch's sequences in this process; may be empty.
            kl_weight: beta of a KL term in the loss.
            averages: the metrics are added to it.
            ratios: ``[B, R]``; the importance ratios of the given sequences are written to it.
            output: of a forward pass over the same rows with the present weights, if there is one already.

        Returns:
            False without a step, if the losses of no process have a token.

        Raises:
            DivergedError: the gradient is not finite.
        """
        num_tokens, num_sequences = self._counts(experience, rows)
        if not num_tokens:
            return False

        parts = self._micro_batches(rows)
        self.optimizer.zero_grad()
        for number, chosen in enumerate(parts):
            # A process without a sequence in this minibatch runs along with a weight of 0, because every process must
            # take part in the exchange of gradients. Wrappers average gradients over processes, and the denominators
            # are those of all processes already, so the average is turned back into a sum.
            part = experience.select(chosen or [0])
            weight = self.accelerator.num_processes if chosen else 0.0
            is_last = number == len(parts) - 1
            with self._gradient_exchange(is_last):
                part_output = self._forward(part) if output is None else output
                loss, metrics = micro_losses(
                    part_output,
                    part,
                    self.config,
                    kl_weight=kl_weight,
                    num_tokens=num_tokens,
                    num_sequences=num_sequences,
                )
                self.accelerator.backward(loss * weight)
            if chosen:
                _add_metrics(averages, metrics, part)
                if ratios is not None:
                    ratios[list(chosen)] = metrics["ratio"].float().cpu()
        self._step(averages)
        return True

    def _counts(self, experience: Experience, rows: Sequence[int]) -> tuple[float, float]:
        """Count the tokens in the loss and the responses with such a token, over all processes."""
        mask = experience.loss_mask[list(rows)]
        own_counts = torch.tensor([mask.sum(), mask.any(1).sum()], dtype=torch.float32, device=self.policy.device)
        num_tokens, num_sequences = self.accelerator.reduce(own_counts, "sum").tolist()
        return num_tokens, num_sequences

    def _micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Split the rows; there is at least one part, so that every process takes part in every synchronisation."""
        size = self.config.micro_batch_size
        parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        return parts or [[]]

    def _gradient_exchange(self, is_last: bool) -> AbstractContextManager[Any]:
        """Let processes exchange gradients once for each update, with its last micro-batch."""
        if is_last:
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def _forward(self, part: Experience) -> TokenOutput:
        """Run the wrapped policy over the response tokens of some sequences."""
        inputs = ModelInput.of(part.responses, self.policy.device)
        tokens = inputs.input_ids[:, part.responses.prompt_length :]
        return TokenOutput(*self.wrapped(inputs, tokens, self.config.temperature))

    def _step(self, averages: Averages) -> None:
        """Clip the gradients of policy and critic separately, check them, and step."""
        # Without a critic there is only the first group.
        names = ("policy_grad_norm", "value_grad_norm")
        for name, group in zip(names, self.optimizer.param_groups, strict=False):
            norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise DivergedError(
                    f"learning_rate: must keep the gradient finite, got {name}={float(norm)} with "
                    f"learning_rate={group['lr']:g}; lower it, or clip_high and the credit's strength, and resume from "
                    "the last checkpoint"
                )
            averages.add(name, float(norm), 1)
        self.optimizer.step()


def _add_metrics(averages: Averages, metrics: dict[str, Tensor], part: Experience) -> None:
    """Add the metrics of a micro-batch over the tokens in its loss."""
    # Metrics on padding may be NaN: they are selected out, not multiplied by 0.
    mask = part.loss_mask
    num_tokens = mask.sum()
    for name, value in metrics.items():
        in_loss = value.float().cpu().masked_fill(~mask, 0.0)
        averages.add(name, in_loss.sum(), num_tokens)
