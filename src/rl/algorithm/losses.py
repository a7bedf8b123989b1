"""The losses of PPO, token by token, and their mean over a batch that arrives in pieces.

B responses, R response columns, V vocabulary entries. The functions that give one loss per token know no mask:
:func:`aggregate` drops what stands on padding, whatever it is. Log-probabilities that may not be finite there want
``torch.where(mask, logprobs, 0)`` first: the chain rule multiplies the 0 that comes back by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl.algorithm.tensor_checks import require_alike, require_floats, require_mask
from rl.config import Aggregation
from rl.errors import ConfigError

KLKind = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut off here, before exp: a token the policy has all but given up on would overflow otherwise."""


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The clipped loss of each token, and what is worth logging about it.

    Attributes:
        per_token: ``[B, R]``, to be minimised; carries the gradient.
        ratio: ``[B, R]``, probability now over probability then; detached.
        clipped: ``[B, R]`` bool, the token was clipped and has no gradient.
    """

    per_token: Float[Tensor, "batch response"]
    ratio: Float[Tensor, "batch response"]
    clipped: Bool[Tensor, "batch response"]


def token_logprobs(
    logits: Float[Tensor, "batch response vocab"], tokens: Int64[Tensor, "batch response"], temperature: float
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    r"""Log-probability of each token, and entropy in nats of the distribution it was drawn from.

    With :math:`p = \mathrm{softmax}(z / \tau)`: :math:`\log p_y` and :math:`-\sum_v p_v \log p_v`. Computed in float32
    at least. Differentiable (once); a token whose gradient is 0 hands exactly 0 back, even where its logits are not
    finite. Logits of -inf (entries that were ruled out) are allowed.

    Args:
        logits: ``[B, R, V]``, of the position before each token.
        tokens: ``[B, R]``, indices into the vocabulary, on padding too.
        temperature: tau, that of the sampling.

    Raises:
        ConfigError: wrong shapes, an index outside the vocabulary, or a temperature that is not positive.

    Cost: a few copies of the logits of *one* response; nothing but the logits is kept for the backward pass, which
    makes their gradient, of the same size and dtype.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ConfigError(
            f"tokens: must be an int64 tensor of shape (responses, tokens), got {got}; convert with .long()"
        )
    vocabulary = logits.shape[-1] if isinstance(logits, Tensor) and logits.ndim else 0
    require_floats("logits", logits, (*tokens.shape, vocabulary))
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ConfigError(
            f"tokens: must lie in the vocabulary of {vocabulary}, got {int(tokens.min())} to {int(tokens.max())}; "
            "put any valid index on padding"
        )
    _require_above("temperature", temperature, 0, "use the temperature of the sampling, for example 1.0")
    return _TokenLogprobs.apply(logits, tokens, temperature)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    """One response at a time, and again in the backward pass, so that no second [B, R, V] tensor is ever kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs = torch.empty(tokens.shape, dtype=wide, device=logits.device)
        entropy = torch.empty_like(logprobs)
        for row in range(len(tokens)):
            log_p = torch.log_softmax(logits[row].to(wide) / temperature, -1)
            logprobs[row] = log_p.gather(-1, tokens[row, :, None]).squeeze(-1)
            entropy[row] = torch.special.entr(log_p.exp_()).sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprobs: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        """d log p_y / dz_v = ([v = y] - p_v) / tau and dH / dz_v = -p_v (log p_v + H) / tau."""
        logits, tokens, entropy = ctx.saved_tensors
        if by_logprobs is None:
            by_logprobs = torch.zeros_like(entropy)
        idle = by_logprobs == 0 if by_entropy is None else (by_logprobs == 0) & (by_entropy == 0)
        gradient = torch.empty_like(logits)
        for row in range(len(tokens)):
            p = torch.softmax(logits[row].to(entropy.dtype) / ctx.temperature, -1)
            outer = by_logprobs[row, :, None]
            inner = (p * -outer).scatter_add_(-1, tokens[row, :, None], outer)
            if by_entropy is not None:
                inner += by_entropy[row, :, None] * (torch.special.entr(p) - p * entropy[row, :, None])
            gradient[row] = inner.div_(ctx.temperature).masked_fill_(idle[row, :, None], 0.0)
        return gradient, None, None


def kl_estimate(
    logprobs: Float[Tensor, "batch response"], ref_logprobs: Float[Tensor, "batch response"], kind: KLKind
) -> Float[Tensor, "batch response"]:
    r"""One-sample estimates of KL(policy, reference) at each token drawn from the policy.

    With :math:`d = \log \pi - \log \pi_{ref}` in [-20, 20]: k1 = :math:`d` (unbiased, may be negative), k2 =
    :math:`d^2 / 2` (biased, its gradient is that of the KL), k3 = :math:`e^{-d} - 1 + d` (unbiased, not negative).

    Args:
        logprobs: ``[B, R]``, under the policy.
        ref_logprobs: ``[B, R]``, under the reference.
        kind: which estimate.

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
    r"""The clipped surrogate of PPO, each token times its credit weight.

    :math:`L_t = w_t \max(-A_t \rho_t, -A_t\, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon_{high}))` with
    :math:`\rho_t = \pi(y_t) / \pi_{old}(y_t)`; dual clip bounds it by :math:`-c\, w_t A_t` where :math:`A_t < 0`. The
    weight comes last, so weight 1 is the plain loss to the last bit, and no weight changes who is clipped.

    Args:
        logprobs: ``[B, R]``, under the policy; the gradient goes there alone.
        old_logprobs: ``[B, R]``, under the policy that wrote the tokens.
        advantages: ``[B, R]``.
        clip: epsilon.
        clip_high: epsilon above 1; None: the same.
        dual_clip: c, above 1; None: not bounded.
        weights: ``[B, R]``, credit; None: 1.

    Raises:
        ConfigError: wrong shapes, or a range that is not one.

    Source: arXiv 1707.06347, eq. 7; dual clip, arXiv 1912.09729; a higher upper clip, arXiv 2503.14476.
    """
    high = clip if clip_high is None else clip_high
    _require_above("clip", clip, 0, "0.2 is the default")
    _require_above("clip_high", high, 0, "0.28 is usual; leave it out for the value of clip")
    require_alike(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free, bound = -advantages * ratio, -advantages * ratio.detach().clamp(1 - clip, 1 + high)
    clipped = bound > free
    per_token = torch.where(clipped, bound, free)
    if dual_clip is not None:
        _require_above("dual_clip", dual_clip, 1, "3 is usual; leave it out to turn it off")
        ceiling = -advantages * dual_clip
        dual = (advantages < 0) & (per_token > ceiling)
        per_token, clipped = torch.where(dual, ceiling, per_token), clipped | dual
    if weights is not None:
        require_floats("weights", weights, logprobs.shape)
        per_token = per_token * weights.detach()
    return PolicyLoss(per_token, ratio.detach(), clipped)


def value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    *,
    clip: float | None = None,
) -> Float[Tensor, "batch response"]:
    r"""Half the squared error of the critic, the larger of plain and clipped.

    :math:`\frac12 \max((V - G)^2, (\mathrm{clip}(V, V_{old} - \epsilon, V_{old} + \epsilon) - G)^2)`: a prediction
    that has moved far *towards* its target stops; one that moves away is still pulled back.

    Args:
        values: ``[B, R]``, the critic now; the gradient goes there alone.
        old_values: ``[B, R]``, the critic at the rollout.
        returns: ``[B, R]``, targets.
        clip: epsilon; None: not clipped.

    Raises:
        ConfigError: wrong shapes, or a clip that is not positive.
    """
    require_alike(values=values, old_values=old_values, returns=returns)
    plain = (values - returns.detach()).square()
    if clip is None:
        return 0.5 * plain
    _require_above("clip", clip, 0, "0.2 is the default; leave it out to turn it off")
    near = old_values.detach() + (values - old_values.detach()).clamp(-clip, clip)
    bound = (near - returns.detach()).square()
    return 0.5 * torch.where(bound > plain, bound, plain)


def aggregate(
    per_token: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    kind: Aggregation,
    *,
    num_tokens: float,
    num_sequences: float,
    max_tokens: float,
) -> Float[Tensor, ""]:
    r"""One number from the losses of all tokens.

    ``token_mean``: :math:`\sum_{b,t} L / \mathrm{num\_tokens}`; ``seq_mean``: the mean over the tokens of each
    response, summed over responses, over ``num_sequences``; ``dr_grpo``: :math:`\sum_{b,t} L / (\mathrm{num\_sequences}
    \cdot \mathrm{max\_tokens})`.

    The counts are those of the whole accumulated batch, over all micro-batches and processes, so the sum of the parts
    is the whole. A token outside the mask contributes exactly 0 to value and gradient, even NaN.

    Args:
        per_token: ``[B, R]``.
        mask: ``[B, R]``, tokens that count.
        kind: which mean.
        num_tokens: tokens of the whole batch that count.
        num_sequences: responses of the whole batch.
        max_tokens: longest response allowed (``dr_grpo``).

    Raises:
        ConfigError: wrong shapes, an unknown kind, or a negative count. A count of 0 gives 0.

    Source: ``token_mean``, arXiv 2503.14476; ``seq_mean``, arXiv 2402.03300; ``dr_grpo``, arXiv 2503.20783.
    """
    require_mask("mask", mask)
    require_floats("per_token", per_token, mask.shape)
    _require_kind(kind, get_args(Aggregation))
    counts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "max_tokens": max_tokens}
    for name, value in counts.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: must be at least 0, got {value!r}; count the whole accumulated batch")
    count = {"token_mean": num_tokens, "seq_mean": num_sequences, "dr_grpo": num_sequences * max_tokens}[kind]
    if count == 0:
        mask, count = torch.zeros_like(mask), 1  # 0, and still with a gradient, so that backward() has a graph
    kept = torch.where(mask, per_token, 0.0)
    if kind == "seq_mean":
        kept = kept.sum(1) / mask.sum(1).clamp_min(1)
    return kept.sum() / count


def _require_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ConfigError(f"kind: must be one of {', '.join(map(repr, kinds))}, got {kind!r}; choose one of them")


def _require_above(name: str, value: float, least: float, remedy: str) -> None:
    if not least < value < math.inf:
        raise ConfigError(f"{name}: must be finite and above {least}, got {value!r}; {remedy}")
