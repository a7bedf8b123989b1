"""Compute PPO losses per token, and their mean over a batch that is processed in micro-batches.

Shapes: B responses, R response columns, V vocabulary entries. The per-token losses take no mask; :func:`aggregate`
ignores padded positions, whatever their value. Set non-finite log-probabilities on padding to 0 before calling a loss
(``torch.where(mask, logprobs, 0)``): a zero gradient times infinity is NaN in the backward pass.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl.algorithm.tensor_checks import require_alike, require_floats, require_indices, require_mask
from rl.config import Aggregation, KLEstimator, shown
from rl.errors import ConfigError

KLKind = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Bound on the log-ratio before exp, in nats: exp overflows for a token whose probability has become almost 0."""


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The clipped loss of each token, with figures to log.

    Attributes:
        per_token: ``[B, R]``, to be minimised; carries the gradient.
        ratio: ``[B, R]``, probability under the policy over that under the old policy; detached.
        clipped: ``[B, R]`` bool, the token is clipped and has no gradient.
    """

    per_token: Float[Tensor, "batch response"]
    ratio: Float[Tensor, "batch response"]
    clipped: Bool[Tensor, "batch response"]


# Log-probabilities --------------------------------------------------------------------------------------


def token_logprobs(
    logits: Float[Tensor, "batch response vocab"], tokens: Int64[Tensor, "batch response"], temperature: float
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    r"""Compute the log-probability of each token, and the entropy of the distribution it was drawn from.

    With :math:`p = \mathrm{softmax}(z / \tau)`: :math:`\log p_y` and :math:`-\sum_v p_v \log p_v`. Computed in float32
    at least. Differentiable once; a token whose incoming gradient is 0 propagates exactly 0, even where its logits
    are not finite. Logits of -inf (excluded entries) are valid.

    Args:
        logits: ``[B, R, V]``, of the position before each token.
        tokens: ``[B, R]``, indices into the vocabulary, on padding too.
        temperature: tau, that of the sampling.

    Returns:
        Log-probabilities ``[B, R]`` and entropies ``[B, R]``, both in nats.

    Raises:
        ConfigError: wrong shapes, an index outside the vocabulary, or a temperature that is not positive.

    Cost: a few copies of the logits of *one* response. Only the logits are kept for the backward pass, which
    makes their gradient, of the same size and dtype.

    Example:
        >>> logprobs, entropy = token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]]), 1.0)
        >>> round(logprobs.exp().item(), 4), round(entropy.exp().item(), 4)
        (0.25, 4.0)
    """
    require_indices("tokens", tokens, "(responses, tokens)", 2, "convert with .long()")
    vocabulary = 0
    if isinstance(logits, Tensor) and logits.ndim:
        vocabulary = logits.shape[-1]
    require_floats("logits", logits, (*tokens.shape, vocabulary))
    if tokens.numel():
        least = int(tokens.min())
        greatest = int(tokens.max())
        if least < 0 or greatest >= vocabulary:
            raise ConfigError(
                f"tokens: must lie in the vocabulary of {vocabulary}, got {least} to {greatest}; "
                "put any valid index on padding"
            )
    _require_above("temperature", temperature, 0, "use the temperature of the sampling, for example 1.0")
    return _TokenLogprobs.apply(logits, tokens, temperature)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability and entropy, one response at a time in both passes, so that only the logits are ``[B, R, V]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute log p_y and H = -sum_v p_v log p_v."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs = torch.empty(tokens.shape, dtype=dtype, device=logits.device)
        entropy = torch.empty_like(logprobs)
        for row in range(len(tokens)):
            # log p_y
            scaled_logits = logits[row].to(dtype) / temperature
            log_p = torch.log_softmax(scaled_logits, -1)
            chosen = tokens[row, :, None]
            logprobs[row] = log_p.gather(-1, chosen).squeeze(-1)
            # entr(p) = -p log p with entr(0) = 0, so an excluded entry adds 0 instead of NaN.
            p = log_p.exp_()
            entropy[row] = torch.special.entr(p).sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprobs: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        """Apply d log p_y / dz_v = ([v = y] - p_v) / tau and dH / dz_v = -p_v (log p_v + H) / tau."""
        logits, tokens, entropy = ctx.saved_tensors
        if by_logprobs is None:
            by_logprobs = torch.zeros_like(entropy)

        # Tokens with no incoming gradient get an exact 0 below, for any logits.
        is_idle = by_logprobs == 0
        if by_entropy is not None:
            is_idle = is_idle & (by_entropy == 0)

        gradient = torch.empty_like(logits)
        for row in range(len(tokens)):
            # [v = y] - p_v, times the incoming gradient of log p_y.
            scaled_logits = logits[row].to(entropy.dtype) / ctx.temperature
            p = torch.softmax(scaled_logits, -1)
            incoming = by_logprobs[row, :, None]
            chosen = tokens[row, :, None]
            row_gradient = (p * -incoming).scatter_add_(-1, chosen, incoming)
            # -p_v (log p_v + H) = entr(p_v) - p_v H, times the incoming gradient of H.
            if by_entropy is not None:
                entropy_slope = torch.special.entr(p) - p * entropy[row, :, None]
                row_gradient += by_entropy[row, :, None] * entropy_slope
            row_gradient = row_gradient.div_(ctx.temperature)
            gradient[row] = row_gradient.masked_fill_(is_idle[row, :, None], 0.0)
        return gradient, None, None


# Losses per token ---------------------------------------------------------------------------------------


def kl_estimate(
    logprobs: Float[Tensor, "batch response"], ref_logprobs: Float[Tensor, "batch response"], kind: KLKind
) -> Float[Tensor, "batch response"]:
    r"""Estimate KL(policy, reference) at each token drawn from the policy, from this one sample.

    With :math:`d = \log \pi - \log \pi_{ref}` in [-20, 20]: k1 = :math:`d` (unbiased, may be negative), k2 =
    :math:`d^2 / 2` (biased), k3 = :math:`e^{-d} - 1 + d` (unbiased, not negative).

    These are values. As a loss only k2 has the gradient of the KL, and only on tokens of the present policy; use
    :func:`kl_loss` there.

    Args:
        logprobs: ``[B, R]``, under the policy, in nats; carries the gradient.
        ref_logprobs: ``[B, R]``, under the reference, in nats; detached.
        kind: which estimate.

    Returns:
        ``[B, R]``, in nats.

    Raises:
        ConfigError: wrong shapes, or an unknown kind.

    Source: Schulman, "Approximating KL Divergence", 2020.
    """
    require_alike(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _require_kind(kind, get_args(KLKind))
    log_ratio = (logprobs - ref_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def kl_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    kind: KLEstimator = "k3",
) -> Float[Tensor, "batch response"]:
    r"""Compute a loss at each token whose expected gradient is that of KL(policy, reference).

    The gradient of :math:`\mathrm{KL} = \sum_y \pi(y) d(y)`, with :math:`d = \log \pi - \log \pi_{ref}`, is
    :math:`E_{\pi_{old}}[\rho\, d\, \nabla \log \pi]` with :math:`\rho = \pi / \pi_{old}`: the tokens were drawn
    from the old policy. Both kinds have exactly this gradient at each token:

    - ``"k3"``: :math:`\rho (e^{-d} - 1 + d)`, differentiated through :math:`\rho` too. Its expectation is the KL.
    - ``"k2"``: :math:`\rho\, d^2 / 2` with :math:`\rho` held constant. Its expectation is not the KL.

    A bare k3, without :math:`\rho`, has the gradient :math:`(1 - e^{-d}) \nabla \log \pi`, which is that of
    KL(reference, policy) on tokens of the policy: it pushes without bound where the reference is the likelier one, and
    with a force of at most 1 where the policy has moved away.

    The gradient of a token is that of the KL of its own distribution, given its prefix; the effect of a token on the
    KL of later tokens is not part of it (that is what a KL in the reward adds).

    Args:
        logprobs: ``[B, R]``, under the policy, in nats; only this argument receives a gradient.
        old_logprobs: ``[B, R]``, under the policy that wrote the tokens, in nats.
        ref_logprobs: ``[B, R]``, under the reference, in nats.
        kind: which value the loss has; the gradient is the same.

    Returns:
        ``[B, R]``, in nats. Exponents are clamped to 20; the force :math:`\rho\, d` keeps its d.

    Raises:
        ConfigError: wrong shapes, or an unknown kind.

    Source: Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv 2506.09477; k3 with
    the importance ratio, DeepSeek-V3.2, arXiv 2512.02556, section 3.1.
    """
    require_alike(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    _require_kind(kind, get_args(KLEstimator))

    # The value rho k(d), without a gradient.
    held = logprobs.detach()
    log_ratio = held - old_logprobs.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    value = ratio * kl_estimate(held, ref_logprobs, kind)

    # rho d is the derivative by log pi, of either kind. The last term is 0 and carries the gradient.
    d = held - ref_logprobs.detach()
    force = ratio * d
    return value + force * (logprobs - held)


def policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Float[Tensor, "batch response"] | None = None,
) -> PolicyLoss:
    r"""Compute the clipped surrogate loss of PPO at each token, times the token's credit weight.

    :math:`L_t = w_t \max(-A_t \rho_t, -A_t\, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon_{high}))` with
    :math:`\rho_t = \pi(y_t) / \pi_{old}(y_t)`; dual clip bounds it by :math:`-c\, w_t A_t` where :math:`A_t < 0`. The
    weight is applied last: with weight 1 the loss is bit-identical to plain PPO, and weights never change which
    tokens are clipped.

    Args:
        logprobs: ``[B, R]``, under the policy, in nats; only this argument receives a gradient.
        old_logprobs: ``[B, R]``, under the policy that wrote the tokens, in nats.
        advantages: ``[B, R]``.
        clip: epsilon.
        clip_high: epsilon above 1; None: ``clip``.
        dual_clip: c, above 1; None: no bound.
        weights: ``[B, R]``, credit; None: 1.

    Returns:
        The loss, the ratio and the clipped tokens, see :class:`PolicyLoss`.

    Raises:
        ConfigError: wrong shapes, or a clip range that is not positive.

    Source: PPO, Schulman et al., arXiv 1707.06347, eq. 7; dual clip, arXiv 1912.09729; a separate upper clip,
    DAPO, arXiv 2503.14476, section 3.1.
    """
    if clip_high is None:
        clip_high = clip
    _require_above("clip", clip, 0, "0.2 is the default")
    _require_above("clip_high", clip_high, 0, "0.28 is usual; leave it out for the value of clip")
    require_alike(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)

    # rho_t, and the larger (pessimistic) of the two losses -A rho and -A clip(rho).
    advantages = advantages.detach()
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.detach().clamp(1 - clip, 1 + clip_high)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * clipped_ratio
    is_clipped = clipped_loss > unclipped_loss
    per_token = torch.where(is_clipped, clipped_loss, unclipped_loss)

    # A negative advantage with a large ratio has no bound above; dual clip adds -c A.
    if dual_clip is not None:
        _require_above("dual_clip", dual_clip, 1, "3 is usual; leave it out to turn it off")
        ceiling = -advantages * dual_clip
        exceeds_ceiling = (advantages < 0) & (per_token > ceiling)
        per_token = torch.where(exceeds_ceiling, ceiling, per_token)
        is_clipped = is_clipped | exceeds_ceiling

    if weights is not None:
        require_floats("weights", weights, logprobs.shape)
        per_token = per_token * weights.detach()
    return PolicyLoss(per_token, ratio.detach(), is_clipped)


def truncated_importance(
    logprobs: Float[Tensor, "batch response"], sampled_logprobs: Float[Tensor, "batch response"], cap: float
) -> Float[Tensor, "batch response"]:
    r"""Compute the weight that corrects for tokens drawn from another distribution than the one that is scored.

    :math:`\min(\pi_{old}(y_t) / \pi_{sampled}(y_t), C)`; the cap bounds the variance and leaves a bias where it acts.

    Args:
        logprobs: ``[B, R]``, of the pass that scored the rollout, in nats.
        sampled_logprobs: ``[B, R]``, with which generation drew the tokens, in nats.
        cap: C, at least 1.

    Returns:
        ``[B, R]``, detached, in (0, C].

    Raises:
        ConfigError: wrong shapes, or a cap below 1.

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; the truncation,
    Ionides, "Truncated importance sampling", 2008.

    Example:
        >>> logprobs, sampled = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -4.0]])
        >>> truncated_importance(logprobs, sampled, 2.0)
        tensor([[1., 2.]])
    """
    require_alike(logprobs=logprobs, sampled_logprobs=sampled_logprobs)
    if not 1 <= cap < math.inf:
        raise ConfigError(f"cap: must be finite and at least 1, got {cap!r}; 2 is usual")
    log_ratio = (logprobs - sampled_logprobs).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio.clamp(max=cap)


def value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    *,
    clip: float | None = None,
) -> Float[Tensor, "batch response"]:
    r"""Compute half the squared error of the critic at each token, the larger of plain and clipped.

    :math:`\frac12 \max((V - G)^2, (\mathrm{clip}(V, V_{old} - \epsilon, V_{old} + \epsilon) - G)^2)`: the gradient is 0
    for a value that has moved more than epsilon *towards* its target, and the plain one for a value that moved away.

    Args:
        values: ``[B, R]``, of the critic, in units of reward; only this argument receives a gradient.
        old_values: ``[B, R]``, of the critic at the rollout.
        returns: ``[B, R]``, targets.
        clip: epsilon, in units of reward; None: not clipped.

    Returns:
        ``[B, R]``, in squared units of reward.

    Raises:
        ConfigError: wrong shapes, or a clip that is not positive.

    Source: the ppo2 implementation of OpenAI baselines; not in the PPO paper.
    """
    require_alike(values=values, old_values=old_values, returns=returns)
    returns = returns.detach()
    plain_loss = (values - returns).square()
    if clip is None:
        return 0.5 * plain_loss
    _require_above("clip", clip, 0, "0.2 is the default; leave it out to turn it off")

    # The larger of the two losses, so that the clip never lowers the loss of a value that moved away.
    old_values = old_values.detach()
    change = (values - old_values).clamp(-clip, clip)
    clipped_values = old_values + change
    clipped_loss = (clipped_values - returns).square()
    larger_loss = torch.where(clipped_loss > plain_loss, clipped_loss, plain_loss)
    return 0.5 * larger_loss


# The mean over a batch ----------------------------------------------------------------------------------


def aggregate(
    per_token: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    kind: Aggregation,
    *,
    num_tokens: float,
    num_sequences: float,
    max_tokens: float,
) -> Float[Tensor, ""]:
    r"""Sum the losses of all tokens and divide by the count of the accumulated batch.

    ``token_mean``: :math:`\sum_{b,t} L / \mathrm{num\_tokens}`; ``seq_mean``: the mean over the tokens of each
    response, summed over responses, over ``num_sequences``; ``dr_grpo``: :math:`\sum_{b,t} L / (\mathrm{num\_sequences}
    \cdot \mathrm{max\_tokens})`.

    The counts are those of the accumulated batch, over all micro-batches and processes, so the results of the
    micro-batches sum to that of the batch. A token outside the mask contributes exactly 0 to value and gradient, even
    if its loss is NaN.

    Args:
        per_token: ``[B, R]``, losses.
        mask: ``[B, R]``, tokens that count.
        kind: which mean.
        num_tokens: tokens of the accumulated batch that count.
        num_sequences: responses of the accumulated batch.
        max_tokens: token limit of a response (``dr_grpo``).

    Returns:
        A scalar; 0 if the count is 0.

    Raises:
        ConfigError: wrong shapes, an unknown kind, or a negative count.

    Source: ``token_mean``, DAPO, arXiv 2503.14476, section 3.3; ``seq_mean``, GRPO, arXiv 2402.03300, eq. 3;
    ``dr_grpo``, Dr. GRPO, arXiv 2503.20783, section 3.2.
    """
    require_mask("mask", mask)
    require_floats("per_token", per_token, mask.shape)
    _require_kind(kind, get_args(Aggregation))
    counts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "max_tokens": max_tokens}
    for name, value in counts.items():
        if not 0 <= value <= sys.float_info.max:
            raise ConfigError(f"{name}: must be at least 0, got {shown(value)}; count the accumulated batch")

    if kind == "token_mean":
        count = num_tokens
    elif kind == "seq_mean":
        count = num_sequences
    else:
        count = num_sequences * max_tokens
    if count == 0:
        # The sum over an empty mask is 0 and still has a gradient, which backward() needs.
        mask = torch.zeros_like(mask)
        count = 1

    # Selected, not multiplied: a loss of NaN outside the mask adds exactly 0.
    masked_loss = torch.where(mask, per_token, 0.0)
    if kind == "seq_mean":
        response_lengths = mask.sum(1).clamp_min(1)
        masked_loss = masked_loss.sum(1) / response_lengths
    return masked_loss.sum() / count


def _require_kind(kind: str, kinds: tuple[str, ...]) -> None:
    """Require one of the names."""
    if kind not in kinds:
        raise ConfigError(f"kind: must be one of {', '.join(map(repr, kinds))}, got {kind!r}; choose one of them")


def _require_above(name: str, value: float, least: float, remedy: str) -> None:
    """Require a finite number greater than ``least``."""
    # An integer beyond every float is less than infinity, and overflows later.
    if not least < value <= sys.float_info.max:
        raise ConfigError(f"{name}: must be finite and above {least}, got {shown(value)}; {remedy}")
