"""From the scores of a credit rule to what the training uses: weights of tokens, or rewards on tokens.

B responses, R response columns. ``scored`` says which tokens competed; scores elsewhere are ignored. Results are
detached and in the dtype of the scores.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.algorithm.advantages import last_tokens, token_rewards
from rl.algorithm.tensor_checks import require_alike, require_floats, require_mask, require_run
from rl.config import CreditConfig, Sign
from rl.errors import ConfigError, CreditError
from rl.records import Credit


def top_share(
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    share: float,
    *,
    largest: bool = True,
) -> Bool[Tensor, "batch response"]:
    r"""The :math:`\lceil q n \rceil` tokens of highest (or lowest) score among the n scored ones of each response.

    Exactly so many: ties go to the earlier token. ``share`` is read as the decimal that it was written as, so 0.07 of
    100 tokens are 7, although the product of the two floats lies above 7.

    Args:
        scores: ``[B, R]``, any finite numbers.
        scored: ``[B, R]``, tokens that compete.
        share: q, in (0, 1].
        largest: the highest scores, or the lowest.

    Raises:
        ConfigError: wrong shapes, or a share outside its range.
        CreditError: a score that is not finite.

    Cost: one sort of the batch.

    Example:
        >>> scores = torch.tensor([[0.2, 0.9, 0.2, 0.1]])
        >>> top_share(scores, torch.ones(1, 4, dtype=torch.bool), 0.5).tolist()
        [[True, True, False, False]]
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share: must lie in (0, 1], got {share!r}; 0.4 is the paper's")
    scores = _checked(scores, scored, signed=True)
    columns = torch.arange(scored.shape[1] + 1, dtype=torch.float64)
    # The share and its product with n are each rounded by at most half an epsilon; what is left decides.
    sizes = torch.ceil(share * columns * (1 - 4 * torch.finfo(torch.float64).eps)).long().to(scored.device)
    chosen = torch.arange(scored.shape[1], device=scored.device) < sizes[scored.sum(1)][:, None]
    ranked = scores.masked_fill(~scored, -math.inf if largest else math.inf)
    order = torch.argsort(ranked, dim=1, descending=largest, stable=True)
    return torch.zeros_like(scored).scatter(1, order, chosen)


def shape_weights(
    scores: Float[Tensor, "batch response"], scored: Bool[Tensor, "batch response"], credit: CreditConfig
) -> Float[Tensor, "batch response"]:
    """The scores in the shape that the settings name (see :class:`rl.config.CreditConfig`).

    1 outside ``scored``, and on the whole of a response without a positive score: no answer, no flow, no opinion.

    Args:
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete.
        credit: ``shape``, and its ``share``, ``strength``, ``floor`` and ``ceiling``.

    Raises:
        ConfigError: wrong shapes.
        CreditError: a negative score, or one that is not finite.
    """
    scores = _checked(scores, scored)
    one = torch.ones_like(scores)
    if credit.shape == "soft":
        mean = _relative(scores).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp_min(1)
        shaped = (_relative(scores) / mean).clamp(credit.floor, credit.ceiling)
    elif credit.shape == "raw":
        shaped = scores
    else:
        chosen = top_share(scores, scored, credit.share, largest=credit.shape != "bottom_q")
        inside, outside = (1.0, 0.0) if credit.shape == "only_top" else (credit.strength, 1.0)
        shaped = torch.where(chosen, inside * one, outside * one)
    acts = scored & (scores > 0).any(1, keepdim=True)
    return torch.where(acts, shaped, one)


def signed_weights(
    weights: Float[Tensor, "batch response"], advantages: Float[Tensor, "batch response"], sign: Sign
) -> Float[Tensor, "batch response"]:
    r"""The weights as the sign of each token's advantage lets them act.

    ``"all"``: w. ``"non_negative"``: w where :math:`A \ge 0`, 1 elsewhere. ``"asymmetric"``: w where :math:`A \ge 0`,
    :math:`1/w` elsewhere, so that what is encouraged more is also discouraged less; a weight of 0 stays 0.

    Args:
        weights: ``[B, R]``, not negative.
        advantages: ``[B, R]``.
        sign: which tokens are weighted.

    Raises:
        ConfigError: wrong shapes, or an unknown sign.
        CreditError: a negative weight.
    """
    require_alike(weights=weights, advantages=advantages)
    weights = weights.detach()
    if bool((weights < 0).any()):
        raise CreditError(f"weights: must be at least 0, got {float(weights.min())}; use the shapes of CreditConfig")
    if sign not in get_args(Sign):
        raise ConfigError(
            f"sign: must be one of {', '.join(map(repr, get_args(Sign)))}, got {sign!r}; choose one of them"
        )
    if sign == "all":
        return weights
    if sign == "non_negative":
        return torch.where(advantages < 0, torch.ones_like(weights), weights)
    # The inverse of a number below the normal range would be infinite.
    inverse = torch.where(weights < torch.finfo(weights.dtype).tiny, weights, weights.reciprocal())
    return torch.where(advantages < 0, inverse, weights)


def mean_one(
    weights: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """The weights of each response over their mean, so that no rule is a larger step in disguise; 0 on padding.

    Args:
        weights: ``[B, R]``, not negative.
        mask: ``[B, R]``, action tokens; a response whose weights are all 0 keeps them.

    Raises:
        ConfigError: wrong shapes.
        CreditError: a negative weight, or one that is not finite.
    """
    kept = _relative(_checked(weights, mask, names=("weights", "mask")))
    mean = kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return kept / torch.where(mean > 0, mean, torch.ones_like(mean))


def loss_weights(
    credit: Credit,
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    settings: CreditConfig,
) -> Float[Tensor, "batch response"]:
    """Combine credit weights and advantages into the factor of each token's policy loss.

    The sign rule is applied first. With ``mean_one`` the weights of the tokens that competed are then divided by their
    mean; the other tokens keep weight 1, so the mean over the response is 1 as well.

    Args:
        credit: of the batch.
        advantages: ``[B, R]``, whitened where the run whitens.
        mask: ``[B, R]``, action tokens.
        settings: ``sign`` and ``mean_one``.

    Returns:
        ``[B, R]``, on the device and in the dtype of the advantages.

    Raises:
        ConfigError: wrong shapes, or an unknown sign.
        CreditError: a negative weight.
    """
    given = credit.weights.to(advantages.device, advantages.dtype)
    weights = signed_weights(given, advantages, settings.sign)
    if not settings.mean_one:
        return weights
    scored = credit.scored.to(advantages.device)
    normalised = torch.where(scored, mean_one(weights, scored), weights)
    return normalised.masked_fill(~mask, 0.0)


def redistribute(
    rewards: Float[Tensor, " batch"],
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, "batch response"]:
    r"""The verdict spread over the scored tokens in proportion to their scores.

    :math:`r_t = R\, s_t / \sum_u s_u`, which sums to R up to rounding. A response without a positive score keeps its
    verdict on the last action token. Tokens after the last scored one, such as the end token, receive no reward: the
    entry points ``"advantage"`` and ``"potential"`` keep their outcome.

    Args:
        rewards: ``[B]``, one verdict per response.
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete; action tokens only.
        mask: ``[B, R]``, action tokens.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, scored padding, or rewards that are not finite.
        CreditError: a negative score, or one that is not finite.
    """
    outcome = token_rewards(rewards, mask)
    shares = _shares(scores, scored, mask)
    spread_out = (shares * rewards.detach()[:, None]).to(outcome.dtype)
    return torch.where((shares > 0).any(1, keepdim=True), spread_out, outcome)


def potential_rewards(
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    scale: float,
    discount: float,
) -> Float[Tensor, "batch response"]:
    r"""Potential-based shaping: rewards for score collected, which leave the optimal policy unchanged.

    :math:`F_t = \gamma \Phi_{t+1} - \Phi_t` with :math:`\Phi_t = c \sum_{u<t} s_u / \sum_u s_u`, and 0 after the last
    action token. With :math:`\gamma = 1` each response sums to 0, so its return at the first token is unchanged. 0 in
    a response without a positive score, and on padding.

    Args:
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete; action tokens only.
        mask: ``[B, R]``, action tokens.
        scale: c, height of the potential.
        discount: gamma, that of the advantages.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, scored padding, or a setting outside its range.
        CreditError: a negative score, or one that is not finite.

    Source: Ng, Harada & Russell, ICML 1999.

    Example:
        >>> every = torch.ones(1, 3, dtype=torch.bool)
        >>> potential_rewards(torch.tensor([[1.0, 3, 4]]), every, every, scale=8.0, discount=1.0).tolist()
        [[1.0, 3.0, -4.0]]
    """
    require_run(mask)
    if not 0 <= scale < math.inf:
        raise ConfigError(f"scale: must be finite and at least 0, got {scale!r}; 1 is the default")
    if not 0 <= discount <= 1:
        raise ConfigError(f"discount: must lie in [0, 1], got {discount!r}; use that of the advantages")
    collected = scale * _shares(scores, scored, mask).cumsum(1)
    after = torch.where(mask & ~last_tokens(mask), collected, 0.0)
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    return discount * after - before


def _shares(scores: Tensor, scored: Tensor, mask: Tensor) -> Tensor:
    """Each token's part of the total score of its response; 0 throughout where there is none."""
    scores = _relative(_checked(scores, scored))
    require_floats("scores", scores, mask.shape)  # and with it that of scored
    if bool((scored & ~mask).any()):
        row = int((scored & ~mask).any(1).nonzero()[0])
        raise ConfigError(f"scored: must lie within mask, got padding in response {row}; use scored & mask")
    total = scores.sum(1, keepdim=True)
    return scores / torch.where(total > 0, total, torch.ones_like(total))


def _relative(scores: Tensor) -> Tensor:
    """Over the highest of the response: sums of the largest and the smallest floats stay in range."""
    if scores.shape[1] == 0:
        return scores
    highest = scores.amax(1, keepdim=True)
    return scores / torch.where(highest > 0, highest, torch.ones_like(highest))


def _checked(
    scores: Tensor, scored: Tensor, *, signed: bool = False, names: tuple[str, str] = ("scores", "scored")
) -> Tensor:
    """The scores, detached, 0 outside ``scored``; finite, and not negative unless ``signed``."""
    require_mask(names[1], scored)
    require_floats(names[0], scores, scored.shape)
    scores = torch.where(scored, scores.detach(), 0.0)
    wrong = ~torch.isfinite(scores) | ((scores < 0) & (not signed))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        rule = "be finite" if signed else "be finite and at least 0"
        raise CreditError(
            f"{names[0]}: must {rule} wherever {names[1]} is True, got {float(scores[row, column])} for token {column} "
            f"of response {row}; leave that token out, or map to a non-negative range (exp, abs, clamp)"
        )
    return scores
