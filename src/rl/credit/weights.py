"""From the scores of a credit rule to what the training uses: weights of tokens, or rewards on tokens.

Shapes: B responses, R response columns. ``scored`` marks the tokens that compete; scores elsewhere are ignored.
Results are detached and in the dtype of the scores.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.algorithm.advantages import last_tokens, token_rewards
from rl.algorithm.tensor_checks import require_alike, require_floats, require_mask, require_run
from rl.config import CreditConfig, Normalize, Sign
from rl.credit.registry import applied, find_rule
from rl.errors import ConfigError, CreditError
from rl.records import Credit


def top_share(
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    share: float,
    *,
    largest: bool = True,
) -> Bool[Tensor, "batch response"]:
    r"""Select the :math:`\lceil q n \rceil` tokens of highest (or lowest) score among the n scored ones of a response.

    The number of tokens is exact: a tie goes to the earlier token. ``share`` is read as the decimal that it was written
    as, so 0.07 of 100 tokens are 7, although the product of the two floats lies above 7.

    Args:
        scores: ``[B, R]``, any finite numbers.
        scored: ``[B, R]``, tokens that compete.
        share: q, in (0, 1].
        largest: the highest scores, or the lowest.

    Returns:
        ``[B, R]`` bool, the selected tokens.

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
    num_columns = scored.shape[1]

    # ceil(q n) for every possible n. The share and its product with n are each rounded by at most half an epsilon, so
    # a product is lowered by more than these two errors before it is rounded up.
    possible_n = torch.arange(num_columns + 1, dtype=torch.float64)
    products = share * possible_n * (1 - 4 * torch.finfo(torch.float64).eps)
    sizes = torch.ceil(products).long().to(scored.device)

    # Rank r is selected if r < ceil(q n); a stable sort breaks ties by position.
    num_selected = sizes[scored.sum(1)][:, None]
    is_selected_rank = torch.arange(num_columns, device=scored.device) < num_selected
    worst = -math.inf if largest else math.inf
    competing = scores.masked_fill(~scored, worst)
    order = torch.argsort(competing, dim=1, descending=largest, stable=True)
    return torch.zeros_like(scored).scatter(1, order, is_selected_rank)


def shape_weights(
    scores: Float[Tensor, "batch response"], scored: Bool[Tensor, "batch response"], credit: CreditConfig
) -> Float[Tensor, "batch response"]:
    """Turn scores into weights by the shape that the settings name (see :class:`rl.config.CreditConfig`).

    The weight is 1 outside ``scored``, and in all of a response without a positive score: without an answer or a flow
    there is no information about its tokens.

    Args:
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete.
        credit: ``shape``, and its ``share``, ``strength``, ``floor`` and ``ceiling``.

    Returns:
        ``[B, R]``, not negative.

    Raises:
        ConfigError: wrong shapes.
        CreditError: a negative score, or one that is not finite.
    """
    scores = _checked(scores, scored)
    ones = torch.ones_like(scores)
    if credit.shape == "soft":
        # w = clip(s / mean(s), floor, ceiling), with the mean over the scored tokens.
        relative = _relative(scores)
        num_scored = scored.sum(1, keepdim=True).clamp_min(1)
        mean = relative.sum(1, keepdim=True) / num_scored
        shaped = (relative / mean).clamp(credit.floor, credit.ceiling)
    elif credit.shape == "raw":
        shaped = scores
    elif credit.shape == "only_top":
        chosen = top_share(scores, scored, credit.share)
        shaped = torch.where(chosen, ones, 0.0)
    else:
        chosen = top_share(scores, scored, credit.share, largest=credit.shape != "bottom_q")
        shaped = torch.where(chosen, credit.strength * ones, ones)

    has_positive_score = (scores > 0).any(1, keepdim=True)
    return torch.where(scored & has_positive_score, shaped, ones)


def signed_weights(
    weights: Float[Tensor, "batch response"], advantages: Float[Tensor, "batch response"], sign: Sign
) -> Float[Tensor, "batch response"]:
    r"""Restrict or invert the weights by the sign of each token's advantage.

    ``"all"``: w. ``"non_negative"``: w where :math:`A \ge 0`, 1 elsewhere. ``"asymmetric"``: w where :math:`A \ge 0`,
    :math:`1/w` elsewhere, so that a token that is encouraged more is also discouraged less; a weight of 0 stays 0.
    ``"negative"``: w where :math:`A < 0`, 1 elsewhere. ``"rule"``: as ``"all"``; :func:`loss_weights` puts the sign of
    the rule in its place.

    Args:
        weights: ``[B, R]``, not negative.
        advantages: ``[B, R]``.
        sign: the tokens on which weights act.

    Returns:
        ``[B, R]``, detached.

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

    is_negative = advantages < 0
    if sign in ("all", "rule"):
        return weights
    if sign == "negative":
        return torch.where(is_negative, weights, torch.ones_like(weights))
    if sign == "non_negative":
        return torch.where(is_negative, torch.ones_like(weights), weights)
    # The inverse of a number below the normal range would be infinite, so such a weight stays.
    is_tiny = weights < torch.finfo(weights.dtype).tiny
    inverse = torch.where(is_tiny, weights, weights.reciprocal())
    return torch.where(is_negative, inverse, weights)


def mean_one(
    weights: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Divide the weights of each response by their mean over ``mask``, so that a rule does not change the step size.

    Args:
        weights: ``[B, R]``, not negative.
        mask: ``[B, R]``, tokens of the mean; a response whose weights are all 0 keeps them.

    Returns:
        ``[B, R]``, 0 outside ``mask``.

    Raises:
        ConfigError: wrong shapes.
        CreditError: a negative weight, or one that is not finite.
    """
    checked = _checked(weights, mask, names=("weights", "mask"))
    relative = _relative(checked)
    num_tokens = mask.sum(1, keepdim=True).clamp_min(1)
    mean = relative.sum(1, keepdim=True) / num_tokens
    divisor = torch.where(mean > 0, mean, torch.ones_like(mean))
    return relative / divisor


def annealed(weights: Float[Tensor, "batch response"], anneal: float, progress: float) -> Tensor:
    r"""Move the weights towards 1: :math:`1 + (w - 1) \max(0, 1 - progress / anneal)`; unchanged with ``anneal`` 0.

    Args:
        weights: ``[B, R]``.
        anneal: share of the run after which all weights are 1; 0: off.
        progress: share of the run that is done, in [0, 1].

    Raises:
        ConfigError: a progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress: must lie in [0, 1], got {progress!r}; it is the share of the run that is done")
    if anneal == 0:
        return weights
    remaining = max(0.0, 1 - progress / anneal)
    return 1 + (weights - 1) * remaining


def normalized(
    weights: Float[Tensor, "batch response"], scored: Bool[Tensor, "batch response"], normalize: Normalize
) -> Float[Tensor, "batch response"]:
    r"""Divide the weights of the scored tokens of each response, so that a rule does not change the step size.

    ``"mean"``: by :math:`\operatorname{mean}(w)`; ``"sum_of_squares"``: by :math:`\sqrt{\operatorname{mean}(w^2)}`;
    ``"none"``: unchanged.

    Args:
        weights: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete; the others keep their weights.
        normalize: the divisor.

    Raises:
        ConfigError: wrong shapes.
        CreditError: a negative weight, one that is not finite, or a response whose weights are all 0.
    """
    if normalize == "none":
        return weights
    competing = _checked(weights, scored, names=("weights", "scored"))
    vanishes = scored.any(1) & ~(competing > 0).any(1)
    if bool(vanishes.any()):
        row = int(vanishes.nonzero()[0])
        raise CreditError(
            f"weights: must have one above 0 among the scored tokens of every response to be normalised, got none in "
            f"response {row}; use normalize='none', or a floor above 0"
        )
    if normalize == "mean":
        return torch.where(scored, mean_one(competing, scored), weights)

    # Relative weights keep the squares of very large and very small ones in range.
    relative = _relative(competing)
    num_scored = scored.sum(1, keepdim=True).clamp_min(1)
    mean_square = relative.square().sum(1, keepdim=True) / num_scored
    scale = torch.where(mean_square > 0, mean_square.sqrt(), torch.ones_like(mean_square))
    return torch.where(scored, relative / scale, weights)


def loss_weights(
    credit: Credit,
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    settings: CreditConfig,
    *,
    progress: float = 0.0,
) -> Float[Tensor, "batch response"]:
    """Combine credit weights and advantages into the factor of each token's policy loss.

    The sign rule is applied first, then annealing, then the normalisation of the tokens that competed. The other tokens
    keep weight 1, so with ``normalize="mean"`` the mean over the response is 1 as well.

    Args:
        credit: of the batch.
        advantages: ``[B, R]``, whitened where the run whitens.
        mask: ``[B, R]``, action tokens.
        settings: ``sign``, ``anneal``, ``normalize`` and ``mean_one``.
        progress: share of the run that is done, in [0, 1]; ``anneal`` reads it.

    Returns:
        ``[B, R]``, on the device and in the dtype of the advantages.

    Raises:
        ConfigError: wrong shapes, an unknown sign, or a progress outside its range.
        CreditError: a negative weight, or a response without a positive one that is to be normalised.
    """
    unsigned = credit.weights.to(advantages.device, advantages.dtype)
    sign = settings.sign
    if sign == "rule":
        sign = find_rule(applied(settings).rule).sign
    weights = signed_weights(unsigned, advantages, sign)
    weights = annealed(weights, settings.anneal, progress)
    if settings.normalization == "none":
        return weights
    scored = credit.scored.to(advantages.device)
    divided = normalized(weights, scored, settings.normalization)
    return divided.masked_fill(~mask, 0.0)


def gini(weights: Float[Tensor, " tokens"]) -> float:
    r"""Compute the Gini coefficient of weights, the unevenness with which they fall on tokens.

    :math:`\sum_{i,j} |w_i - w_j| / (2 n \sum_i w_i)`: 0 where all are equal, towards 1 where one token has everything.

    Args:
        weights: n weights, not negative; 0 for no tokens, or only weights of 0.

    Cost: one sort.

    Example:
        >>> gini(torch.tensor([1.0, 1.0])), gini(torch.tensor([0.0, 2.0]))
        (0.0, 0.5)
    """
    ordered = weights.detach().double().sort().values
    total = float(ordered.sum())
    count = ordered.numel()
    if count == 0 or total == 0:
        return 0.0
    # In ascending order, the i-th weight is the larger one in 2i - n - 1 more pairs than the smaller one.
    rank = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    excess_of_pairs = 2 * rank - count - 1
    differences = float((excess_of_pairs * ordered).sum())
    # Rounding can put the coefficient of equal weights just below 0.
    return max(0.0, differences / (count * total))


def effective_token_ratio(weights: Float[Tensor, " tokens"]) -> float:
    r"""Compute the effective number of tokens as a share of all, :math:`(\sum w)^2 / (n \sum w^2)`.

    It is 1 for equal weights, and 1 / n where one token has everything.

    Args:
        weights: n weights, not negative; 1 for no tokens, or only weights of 0.

    Example:
        >>> effective_token_ratio(torch.tensor([0.0, 2.0]))
        0.5
    """
    wide = weights.detach().double()
    squares = float(wide.square().sum())
    if squares == 0:
        return 1.0
    return float(wide.sum()) ** 2 / (wide.numel() * squares)


def redistribute(
    rewards: Float[Tensor, " batch"],
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, "batch response"]:
    r"""Spread the outcome reward over the scored tokens in proportion to their scores.

    :math:`r_t = R\, s_t / \sum_u s_u`, which sums to R up to rounding. A response without a positive score keeps its
    reward on the last action token. Tokens after the last scored one, such as the end token, receive no reward; the
    entry points ``"advantage"`` and ``"potential"`` leave the outcome where it is.

    Args:
        rewards: ``[B]``, the outcome reward of each response.
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete; action tokens only.
        mask: ``[B, R]``, action tokens.

    Returns:
        ``[B, R]``, 0 on padding.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, scored padding, or rewards that are not finite.
        CreditError: a negative score, or one that is not finite.
    """
    outcome = token_rewards(rewards, mask)
    shares = _shares(scores, scored, mask)
    spread_out = (shares * rewards.detach()[:, None]).to(outcome.dtype)
    has_share = (shares > 0).any(1, keepdim=True)
    return torch.where(has_share, spread_out, outcome)


def potential_rewards(
    scores: Float[Tensor, "batch response"],
    scored: Bool[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    scale: float,
    discount: float,
) -> Float[Tensor, "batch response"]:
    r"""Compute potential-based shaping rewards from the cumulative score; they leave the optimal policy unchanged.

    :math:`F_t = \gamma \Phi_{t+1} - \Phi_t` with :math:`\Phi_t = c \sum_{u<t} s_u / \sum_u s_u`, and 0 after the last
    action token. With :math:`\gamma = 1` each response sums to 0, so its return at the first token is unchanged. 0 in
    a response without a positive score, and on padding.

    Args:
        scores: ``[B, R]``, not negative.
        scored: ``[B, R]``, tokens that compete; action tokens only.
        mask: ``[B, R]``, action tokens.
        scale: c, height of the potential.
        discount: gamma, that of the advantages.

    Returns:
        ``[B, R]``, to be added to the token rewards.

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

    # Phi_{t+1} includes the token at t; after the last action token the potential is 0.
    cumulative = scale * _shares(scores, scored, mask).cumsum(1)
    has_successor = mask & ~last_tokens(mask)
    next_potential = torch.where(has_successor, cumulative, 0.0)
    # Phi_t is Phi_{t+1} of the column before, and 0 at the first token.
    first_potential = torch.zeros_like(next_potential[:, :1])
    potential = torch.cat([first_potential, next_potential[:, :-1]], 1)
    return discount * next_potential - potential


def _shares(scores: Tensor, scored: Tensor, mask: Tensor) -> Tensor:
    """Compute each token's share of the total score of its response; 0 in a response whose total is 0."""
    scores = _relative(_checked(scores, scored))
    # This checks the shape of ``scored`` too, which is that of the scores.
    require_floats("scores", scores, mask.shape)
    scored_padding = scored & ~mask
    if bool(scored_padding.any()):
        row = int(scored_padding.any(1).nonzero()[0])
        raise ConfigError(f"scored: must lie within mask, got padding in response {row}; use scored & mask")

    total = scores.sum(1, keepdim=True)
    divisor = torch.where(total > 0, total, torch.ones_like(total))
    return scores / divisor


def _relative(scores: Tensor) -> Tensor:
    """Divide by the highest score of each response, so that sums of very large or very small floats stay in range."""
    if scores.shape[1] == 0:
        return scores
    highest = scores.amax(1, keepdim=True)
    divisor = torch.where(highest > 0, highest, torch.ones_like(highest))
    return scores / divisor


def _checked(
    scores: Tensor, scored: Tensor, *, signed: bool = False, names: tuple[str, str] = ("scores", "scored")
) -> Tensor:
    """Return the scores, detached and 0 outside ``scored``, after checking them; negative ones need ``signed``."""
    scores_name, scored_name = names
    require_mask(scored_name, scored)
    require_floats(scores_name, scores, scored.shape)
    scores = torch.where(scored, scores.detach(), 0.0)

    invalid = ~torch.isfinite(scores)
    rule = "be finite"
    if not signed:
        invalid = invalid | (scores < 0)
        rule = "be finite and at least 0"
    if bool(invalid.any()):
        row, column = invalid.nonzero()[0].tolist()
        raise CreditError(
            f"{scores_name}: must {rule} wherever {scored_name} is True, got {float(scores[row, column])} for token "
            f"{column} of response {row}; leave that token out, or map to a non-negative range (exp, abs, clamp)"
        )
    return scores
