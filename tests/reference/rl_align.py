"""Gradient alignment in plain loops: one forward and one backward pass per arm and batch, statistics by deletion."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rl.algorithm.losses import policy_loss, token_logprobs

Vector = list[float]


def loss_gradient(policy, responses, advantages: Tensor, weights: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Gradient of the token mean of the clipped loss at the old policy, sequence by sequence, through ``backward``."""
    parameters = list(policy.policy_parameters().values())
    for parameter in parameters:
        parameter.grad = None
    total = torch.zeros(())
    for row in range(responses.num_sequences):
        real = responses.attention_mask[row]
        ids = responses.input_ids[row][real][None]
        length = int(responses.response_mask[row].sum())
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[:, -length - 1 : -1]
        logprobs, _ = token_logprobs(logits, ids[:, -length:], temperature)
        at = slice(0, length)
        found = policy_loss(
            logprobs, logprobs.detach(), advantages[row : row + 1, at], clip=0.2, weights=weights[row : row + 1, at]
        )
        total = total + (found.per_token * mask[row : row + 1, at]).sum()
    (total / mask.sum()).backward()
    gradient = torch.cat([parameter.grad.flatten().clone() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradient.double()


def mean_cosine(arm: Sequence[Vector], uniform: Sequence[Vector]) -> float:
    """Mean over batches of the cosine with the mean of the others' uniform gradients."""
    found = []
    for b, gradient in enumerate(arm):
        others = [u for c, u in enumerate(uniform) if c != b]
        truth = [math.fsum(column) / len(others) for column in zip(*others, strict=True)]
        length = math.hypot(*gradient) * math.hypot(*truth)
        found.append(_dot(gradient, truth) / length if length else 0.0)
    return math.fsum(found) / len(found)


def multiplier(arm: Sequence[Vector], uniform: Sequence[Vector]) -> float:
    ratio = mean_cosine(arm, uniform) / mean_cosine(uniform, uniform)
    return math.copysign(ratio**2, ratio)


def signal_share(part: Sequence[Vector], uniform: Sequence[Vector]) -> float:
    def along(gradients: Sequence[Vector]) -> float:
        return math.fsum(_dot(g, u) for b, g in enumerate(gradients) for c, u in enumerate(uniform) if c != b)

    return along(part) / along(uniform)


def jackknife(statistic: Callable[..., float], *lists: Sequence[Vector]) -> tuple[float, float, float]:
    """Value, corrected value and error of a statistic of lists that lose the same entry together."""
    n, value = len(lists[0]), statistic(*lists)
    deleted = [statistic(*([x for i, x in enumerate(one) if i != d] for one in lists)) for d in range(n)]
    mean = math.fsum(deleted) / n
    error = math.sqrt((n - 1) / n * math.fsum((x - mean) ** 2 for x in deleted))
    return value, n * value - (n - 1) * mean, error


def holm(p_values: Sequence[float]) -> Vector:
    """By definition: the adjusted value is the largest of those of all smaller ones."""
    m, order = len(p_values), sorted(p_values)
    return [min(1.0, max((m - k) * q for k, q in enumerate(order[: order.index(p) + 1]))) for p in p_values]


def _dot(one: Vector, other: Vector) -> float:
    return math.fsum(x * y for x, y in zip(one, other, strict=True))
