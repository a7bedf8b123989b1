"""Compute the policy gradients of many weightings of the same responses from few backward passes.

The policy gradient is linear in the factor that multiplies each token's log-probability. Gradients of several
weightings are therefore combinations of a few gradients, which are the only ones that need a backward pass.

Letters of the shapes: B sequences, R response columns, P parameters of the policy adapter.
"""

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

_COLUMNS_PER_BLOCK = 1 << 16
"""Gradients are multiplied in float64 this many parameters at a time, so that no float64 copy of all is made."""


def token_factors(experience: Experience, config: PPOConfig) -> Float[Tensor, "batch response"]:
    """Differentiate the plain policy loss by each token's log-probability, with the sign of an ascent direction.

    The ratio is 1, where nothing is clipped. The loss of a token is then :math:`-A_t` times its share in the
    aggregated loss.

    Args:
        experience: advantages and loss mask ``[B, R]``.
        config: how token losses are aggregated.

    Returns:
        ``[B, R]`` float32; exactly 0 (never -0.0) on tokens outside the loss mask.
    """
    mask = experience.loss_mask

    # The share of each token in the loss is the derivative of the aggregated loss by the token's own loss. The
    # aggregated loss is linear, so the derivative at 0 is that at any point.
    token_loss = torch.zeros(mask.shape, requires_grad=True, dtype=torch.float32)
    with torch.enable_grad():
        total = aggregate(
            token_loss,
            mask,
            config.aggregation,
            num_tokens=float(mask.sum()),
            num_sequences=float(mask.any(1).sum()),
            max_tokens=config.max_response_tokens,
        )
        (share,) = torch.autograd.grad(total, token_loss)

    factors = torch.where(mask, -experience.advantages * share, 0.0)
    # Adding 0 turns -0.0 into 0.0: fields are compared as bytes.
    return factors + 0.0


def decompose_weights(
    base: Float[Tensor, "batch response"],
    weights: Sequence[Float[Tensor, "batch response"]],
    selected: Sequence[Bool[Tensor, "batch response"]],
) -> tuple[list[Float[Tensor, "batch response"]], Float64[Tensor, "parts fields"]]:
    r"""Find the fewest fields of token factors whose gradients make up the gradients of all arms.

    A field is a tensor ``[B, R]`` of token factors c with the gradient :math:`\sum_t c_t \nabla \log \pi(y_t)`. For
    the uniform field b, the weights w and the selected tokens S of an arm, three gradients are wanted: of
    :math:`b w`, of :math:`b 1_S` and of :math:`b (1 - 1_S)`.

    Two facts save backward passes. The third is the difference of b and the second. Where w is the constant x on S
    and y elsewhere, :math:`b w = y b + (x - y) b 1_S`, so the first is a combination, too. Equal fields share a pass.

    Args:
        base: b, ``[B, R]``, not 0 everywhere.
        weights: w of each arm, ``[B, R]``.
        selected: S of each arm, ``[B, R]``.

    Returns:
        The fields, b first; and the coefficients ``[3 * arms, fields]``: rows of the weighted gradients of all arms,
        then rows of their selected tokens, then rows of the other tokens.

    Cost: O(B R) for each arm.
    """
    fields = _DistinctFields()
    fields.add(base)
    has_factor = base != 0

    # Sparse rows of coefficients, by the number of the field; b is field 0.
    weighted_rows: list[dict[int, float]] = []
    selected_rows: list[dict[int, float]] = []
    other_rows: list[dict[int, float]] = []
    for weight, chosen in zip(weights, selected, strict=True):
        # b 1_S, and b (1 - 1_S) = b - b 1_S.
        on_selected = fields.add(torch.where(chosen, base, 0.0))
        selected_rows.append(on_selected)
        other_rows.append(_add_scaled({0: 1.0}, on_selected, -1.0))

        # Only tokens with a factor count: the weight of any other token is multiplied by 0.
        inside = _common_value(weight[has_factor & chosen])
        outside = _common_value(weight[has_factor & ~chosen])
        if inside is None or outside is None:
            # The weights vary, so b w needs a backward pass of its own (+ 0.0 as in token_factors).
            weighted_rows.append(fields.add(base * weight + 0.0))
        else:
            # y b + (x - y) b 1_S
            weighted_rows.append(_add_scaled({0: outside}, on_selected, inside - outside))

    # The rows as a dense matrix, now that the number of fields is known.
    rows = [*weighted_rows, *selected_rows, *other_rows]
    coefficients = torch.zeros(len(rows), len(fields.tensors), dtype=torch.float64)
    for row, terms in enumerate(rows):
        for number, factor in terms.items():
            coefficients[row, number] = factor
    return fields.tensors, coefficients


def policy_gradients(
    policy: ActorCritic, responses: Responses, factors: Sequence[Float[Tensor, "batch response"]], config: PPOConfig
) -> Float[Tensor, "fields parameters"]:
    r"""Compute the gradients :math:`\sum_t c_t \nabla \log \pi(y_t)` of several fields c from one forward pass.

    Args:
        policy: differentiated by the weights of its policy adapter, in their order.
        responses: the tokens.
        factors: c, ``[B, R]`` each, 0 on padding.
        config: temperature and micro-batches.

    Returns:
        ``[len(factors), P]`` float32, on the CPU.

    Raises:
        DivergedError: a gradient is not finite.

    Cost: one forward pass, and a backward pass for each field.
    """
    parameters = list(policy.policy_parameters().values())
    num_parameters = sum(weight.numel() for weight in parameters)
    total = torch.zeros(len(factors), num_parameters, dtype=torch.float32)

    for start in range(0, responses.num_sequences, config.micro_batch_size):
        stop = min(start + config.micro_batch_size, responses.num_sequences)
        inputs = ModelInput.of(responses.select(range(start, stop)), policy.device)
        with torch.enable_grad():
            tokens = inputs.input_ids[:, responses.prompt_length :]
            logprobs, _ = policy.policy_pass(inputs, tokens, config.temperature)

        # All fields are differentiated through the same graph, which the last of them frees.
        for number, factor in enumerate(factors):
            is_last = number + 1 == len(factors)
            of_part = factor[start:stop].to(logprobs)
            gradients = torch.autograd.grad(logprobs, parameters, of_part, retain_graph=not is_last)
            flat = [gradient.flatten().float() for gradient in gradients]
            total[number] += torch.cat(flat).cpu()

    if not bool(torch.isfinite(total).all()):
        raise DivergedError(
            "model: its policy gradient must be finite, got one that is not; load it with dtype float32, or an earlier "
            "checkpoint"
        )
    return total


def inner_products(
    one: Float[Tensor, "first parameters"], other: Float[Tensor, "second parameters"]
) -> Float64[Tensor, "first second"]:
    """Compute all inner products of two lists of vectors, summed in float64.

    Args:
        one: ``[m, P]``.
        other: ``[n, P]``.

    Returns:
        ``[m, n]``.
    """
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for start in range(0, one.shape[1], _COLUMNS_PER_BLOCK):
        columns = slice(start, start + _COLUMNS_PER_BLOCK)
        of_one = one[:, columns].double()
        of_other = other[:, columns].double()
        total += of_one @ of_other.T
    return total


class _DistinctFields:
    """The distinct fields of token factors, in the order of their first appearance.

    Attributes:
        tensors: the fields, ``[B, R]`` each.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._number_of: dict[bytes, int] = {}

    def add(self, field: Tensor) -> dict[int, float]:
        """Return the field as a sparse row of coefficients: 1 at its number, empty for a field of zeros."""
        # The gradient of a field of zeros is 0, without a backward pass.
        if not bool(field.any()):
            return {}
        # Equal fields are found by their bytes.
        content = field.numpy().tobytes()
        if content not in self._number_of:
            self._number_of[content] = len(self.tensors)
            self.tensors.append(field)
        number = self._number_of[content]
        return {number: 1.0}


def _common_value(values: Tensor) -> float | None:
    """Return the value that all entries share: 0 for no entries, None where they differ."""
    if values.numel() == 0:
        return 0.0
    if not bool((values == values[0]).all()):
        return None
    return float(values[0])


def _add_scaled(one: Mapping[int, float], other: Mapping[int, float], factor: float) -> dict[int, float]:
    """Compute ``one + factor * other`` of two sparse rows."""
    total = dict(one)
    for number, value in other.items():
        total[number] = total.get(number, 0.0) + factor * value
    return total
