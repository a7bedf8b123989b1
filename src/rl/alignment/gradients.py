"""Many policy gradients of the same responses for the price of few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from rl.algorithm.losses import aggregate
from rl.config import PPOConfig
from rl.errors import DivergedError
from rl.policy.actor_critic import ActorCritic, ModelInput
from rl.records import Experience, Responses

_COLUMNS = 1 << 16
"""Gradients are multiplied in float64 this many parameters at a time."""


def token_factors(experience: Experience, config: PPOConfig) -> Float[Tensor, "batch response"]:
    """Derivative of the plain policy loss by each token's log-probability, at ratio 1, where nothing is clipped."""
    mask = experience.loss_mask
    loss = torch.zeros(mask.shape, requires_grad=True)
    with torch.enable_grad():
        total = aggregate(
            loss, mask, config.aggregation, num_tokens=float(mask.sum()), num_sequences=float(mask.any(1).sum()),
            max_tokens=config.max_response_tokens,
        )  # fmt: skip
        (share,) = torch.autograd.grad(total, loss)
    return torch.where(mask, -experience.advantages * share, 0.0) + 0.0  # no negative zeros: fields compare as bytes


def decompose_weights(
    base: Float[Tensor, "batch response"],
    weights: Sequence[Float[Tensor, "batch response"]],
    selected: Sequence[Bool[Tensor, "batch response"]],
) -> tuple[list[Float[Tensor, "batch response"]], Float64[Tensor, "parts atoms"]]:
    """The fewest fields whose gradients make up those of all arms, of their selected tokens and of the others.

    A gradient is linear in what the log-probabilities are multiplied with. Weights that are x on the selected tokens
    and y on the others need no backward pass of their own, and equal fields share one.

    Args:
        base: factors of the uniform gradient.
        weights: of each arm.
        selected: of each arm.

    Returns:
        The fields, uniform first; and the rows of coefficients, all arms' weighted gradients first, then those of
        their selected tokens, then those of the others.
    """
    atoms: dict[bytes, tuple[int, Tensor]] = {}

    def place(tensor: Tensor) -> dict[int, float]:
        if not bool(tensor.any()):
            return {}
        return {atoms.setdefault(tensor.numpy().tobytes(), (len(atoms), tensor))[0]: 1.0}

    place(base)
    live, whole, part, rest = base != 0, [], [], []
    for weight, chosen in zip(weights, selected, strict=True):
        inside = place(torch.where(chosen, base, 0.0))
        part.append(inside)
        rest.append(_sum({0: 1.0}, inside, -1.0))
        x, y = _constant(weight[live & chosen]), _constant(weight[live & ~chosen])
        whole.append(place(base * weight + 0.0) if x is None or y is None else _sum({0: y}, inside, x - y))
    rows = [*whole, *part, *rest]
    coefficients = torch.zeros(len(rows), len(atoms), dtype=torch.float64)
    for row, terms in enumerate(rows):
        for atom, factor in terms.items():
            coefficients[row, atom] = factor
    return [tensor for _, tensor in atoms.values()], coefficients


def policy_gradients(
    policy: ActorCritic, responses: Responses, factors: Sequence[Float[Tensor, "batch response"]], config: PPOConfig
) -> Float[Tensor, "fields parameters"]:
    r"""Gradients :math:`\sum_t c_t \nabla \log \pi(y_t)` for several fields of factors c, by one forward pass.

    Args:
        policy: differentiated by the weights of its policy adapter, in their order.
        responses: the tokens.
        factors: c, ``[B, R]`` each, 0 on padding.
        config: temperature and micro-batches.

    Raises:
        DivergedError: a gradient is not finite.
    """
    parameters = list(policy.policy_parameters().values())
    total = torch.zeros(len(factors), sum(weight.numel() for weight in parameters))
    for start in range(0, responses.num_sequences, config.micro_batch_size):
        rows = slice(start, min(start + config.micro_batch_size, responses.num_sequences))
        inputs = ModelInput.of(responses.select(range(rows.start, rows.stop)), policy.device)
        with torch.enable_grad():
            tokens = inputs.input_ids[:, responses.prompt_length :]
            logprobs, _ = policy.policy_pass(inputs, tokens, config.temperature)
        for number, factor in enumerate(factors):
            found = torch.autograd.grad(
                logprobs, parameters, factor[rows].to(logprobs), retain_graph=number + 1 < len(factors)
            )
            total[number] += torch.cat([gradient.flatten().float() for gradient in found]).cpu()
    if not bool(torch.isfinite(total).all()):
        raise DivergedError(
            "model: its policy gradient must be finite, got one that is not; load it with dtype float32, or an earlier "
            "checkpoint"
        )
    return total


def inner_products(
    one: Float[Tensor, "first parameters"], other: Float[Tensor, "second parameters"]
) -> Float64[Tensor, "first second"]:
    """All inner products of two lists of vectors, summed in float64."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for start in range(0, one.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += one[:, columns].double() @ other[:, columns].double().T
    return total


def _constant(values: Tensor) -> float | None:
    """The one value of all of them; 0 of none, None where they differ."""
    if not values.numel():
        return 0.0
    return float(values[0]) if bool((values == values[0]).all()) else None


def _sum(one: Mapping[int, float], other: Mapping[int, float], factor: float) -> dict[int, float]:
    """``one + factor * other`` of sparse rows."""
    return {atom: one.get(atom, 0.0) + factor * other.get(atom, 0.0) for atom in {**one, **other}}
