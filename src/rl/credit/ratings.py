"""From the scores of a rule to the credit of a batch: rate the tokens of each micro-batch, then weigh them together.

Weights may depend on the complete batch: the fallback compares each response with the others. A batch is therefore
*rated* in micro-batches, while the attention of each is at hand, and *weighed* once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowgraph import AttentionRows
from rl.config import CreditConfig
from rl.credit.policy_passes import PolicyPasses
from rl.credit.registry import POSITION_MATCHED, CreditInput, applied, find_rule, score_with_tie
from rl.credit.scope import before_answer, tokens_in_scope
from rl.credit.weights import shape_weights
from rl.errors import CreditError
from rl.records import Credit, Responses, TokenScores


@dataclass(frozen=True, eq=False)
class Ratings:
    """The scores of a rule on some responses, before they become weights.

    Attributes:
        scores: ``[B, R]`` float32, 0 outside ``scored``.
        scored: ``[B, R]`` bool, tokens that compete.
        tie: ``[B]`` float32, mean unnormalised reach of the tokens before the answer; None where it is not measured.
        has_tie: ``[B]`` bool, responses with an answer and a token before it.
    """

    scores: Float[Tensor, "batch response"]
    scored: Bool[Tensor, "batch response"]
    tie: Float[Tensor, " batch"] | None
    has_tie: Bool[Tensor, " batch"]


MeanOverBatch = Callable[[Float[Tensor, " chosen"]], float]
"""Mean of some numbers of this process over the batch of all processes; 0 where there are none."""


def local_mean(values: Float[Tensor, " chosen"]) -> float:
    """Compute the mean over one process; 0 for no numbers."""
    if values.numel() == 0:
        return 0.0
    return float(values.double().mean())


def check_credit(credit: CreditConfig) -> None:
    """Check settings that relate a rule to the registry, before anything runs.

    Raises:
        CreditError: no such rule, an option that it does not have, a fallback for a rule that measures no ties, or
            weights that are to be normalised and, permuted, may all be 0 in a response.
    """
    # Reading the needs checks the options of the rule.
    inner = applied(credit)
    rule = find_rule(inner.rule)
    rule.needs_for(inner.options)

    # A permutation between responses can give one of them nothing but zeros, which no divisor normalises.
    has_no_floor = credit.shape == "soft" and credit.floor == 0
    can_be_zero = credit.shape in ("only_top", "raw") or has_no_floor
    if credit.rule == POSITION_MATCHED and credit.normalization != "none" and can_be_zero:
        raise CreditError(
            f"credit.normalize: must be 'none' with the control {POSITION_MATCHED!r} in the shape {credit.shape!r}, "
            f"got {credit.normalization!r}; permuted weights can all be 0 in a response, so leave normalize and "
            "mean_one out, or use soft weights with a floor"
        )
    if credit.fallback > 0 and not rule.ties:
        raise CreditError(
            f"credit.fallback: must be 0 with rule {rule.name!r}, which measures no reach, got {credit.fallback:g}; "
            "use a rule of the flow or of reach, such as 'reach_sharp'"
        )


def rate_tokens(
    responses: Responses,
    scores: TokenScores,
    credit: CreditConfig,
    *,
    rows: Mapping[str, AttentionRows] | None = None,
    random: Sequence[torch.Generator] = (),
    gradient: Callable[[], Float[Tensor, "batch response"]] | None = None,
    passes: PolicyPasses | None = None,
) -> Ratings:
    """Run a credit rule on some responses; only rules that read gradients need a model.

    Args:
        responses: all tensors on one device.
        scores: log-probabilities and entropies of the policy that wrote them, 0 on padding.
        credit: rule and scope.
        rows: attention by the names that the rule's needs list.
        random: a generator for each response, for rules that draw.
        gradient: see :class:`rl.credit.registry.CreditInput`.
        passes: see :class:`rl.credit.registry.CreditInput`.

    Raises:
        CreditError: the attention of a rule is missing, or its scores are invalid.
    """
    # A rule receives only what it registered for, so that a rule that reads more fails in its first test.
    credit = applied(credit)
    rule = find_rule(credit.rule)
    scored = tokens_in_scope(responses, credit.scope)
    batch = CreditInput(
        responses=responses,
        scores=scores,
        scored=scored,
        rows=rows or {},
        random=random,
        gradient=gradient if rule.gradient else None,
        passes=passes if rule.own_pass else None,
        options={**credit.options, "rows": credit.rows},
    )
    found, tie = score_with_tie(rule, batch)
    return Ratings(scores=found, scored=scored, tie=tie, has_tie=before_answer(responses).any(1))


def weigh_tokens(
    ratings: Ratings,
    credit: CreditConfig,
    *,
    mean_over_batch: MeanOverBatch = local_mean,
    random: torch.Generator | None = None,
) -> Credit:
    r"""Turn the ratings of a complete batch into weights.

    With ``credit.fallback`` :math:`\beta > 0`, a response keeps weights of 1 where its tie
    :math:`\tau_i = \operatorname{mean}_{t < answer} h_t` is below :math:`\beta` times the mean of the batch's ties, and
    where it has no answer: nothing connects its tokens to the answer, so their scores are noise.

    Args:
        ratings: of all responses of this process.
        credit: rule, shape and fallback.
        mean_over_batch: the mean over all processes; by default that of this process.
        random: on the CPU, for the control ``"position_matched"``.

    Returns:
        Scores, scope and weights ``[B, R]``.

    Raises:
        CreditError: a rule that scores in weights gave a response only weights of 0; a missing generator.
    """
    permutes = credit.rule == POSITION_MATCHED
    credit = applied(credit)
    rule = find_rule(credit.rule)
    shaping = credit
    if rule.weighs:
        # The scores of a rule that weighs are weights already.
        shaping = replace(credit, shape="raw")
        _refuse_vanishing(rule.name, ratings)
    weights = shape_weights(ratings.scores, ratings.scored, shaping)

    # Responses whose answer hardly depends on their tokens keep weights of 1.
    unanchored = None
    if ratings.tie is not None:
        unanchored = _unanchored(ratings.tie, ratings.has_tie, credit.fallback, mean_over_batch)
        weights = torch.where(unanchored[:, None], 1.0, weights)

    # The control permutes after the weighing, so that each weight is one that the rule gave at this position.
    scores = ratings.scores
    if permutes:
        order = _position_matched(ratings.scored, random)
        scores = _permuted(scores, order)
        weights = _permuted(weights, order)
    return Credit(scores=scores, scored=ratings.scored, weights=weights, tie=ratings.tie, unanchored=unanchored)


def credit_tokens(
    responses: Responses,
    scores: TokenScores,
    credit: CreditConfig,
    *,
    rows: Mapping[str, AttentionRows] | None = None,
    random: Sequence[torch.Generator] = (),
    gradient: Callable[[], Float[Tensor, "batch response"]] | None = None,
) -> Credit:
    """Rate and weigh a complete batch in one call; arguments and errors as :func:`rate_tokens`.

    The control ``"position_matched"`` draws from the first of the generators.
    """
    check_credit(credit)
    ratings = rate_tokens(responses, scores, credit, rows=rows, random=random, gradient=gradient)
    return weigh_tokens(ratings, credit, random=random[0] if random else None)


def _position_matched(
    scored: Bool[Tensor, "batch response"], random: torch.Generator | None
) -> tuple[Int64[Tensor, "batch response"], Int64[Tensor, "batch response"]]:
    """Draw, for each column, where the entries of the scored tokens come from and where they go to.

    Returns:
        The numbers of the responses in random order and in their own order, the scored ones first in both. Unscored
        entries stay in place.
    """
    if random is None:
        raise CreditError(
            "random: must be given for the rule 'position_matched', got none; pass a torch.Generator for each response"
        )
    # Drawn column by column, so that padding on the right changes no draw.
    num_responses, num_columns = scored.shape
    keys = torch.rand(num_columns, num_responses, generator=random, dtype=torch.float32).T.to(scored.device)
    # Unscored entries follow in their own order: a stable sort keeps equal keys in place.
    random_keys = torch.where(scored, keys, 2.0)
    fixed_keys = (~scored).long()
    origin = torch.argsort(random_keys, dim=0, stable=True)
    target = torch.argsort(fixed_keys, dim=0, stable=True)
    return origin, target


def _permuted(values: Float[Tensor, "batch response"], order: tuple[Tensor, Tensor]) -> Float[Tensor, "batch response"]:
    """Move the entries of each column as :func:`_position_matched` drew it."""
    origin, target = order
    drawn = values.gather(0, origin)
    return torch.empty_like(values).scatter_(0, target, drawn)


def _unanchored(
    tie: Float[Tensor, " batch"], has_tie: Bool[Tensor, " batch"], fallback: float, mean_over_batch: MeanOverBatch
) -> Bool[Tensor, " batch"]:
    """Mark the responses whose tie is below ``fallback`` times the batch's mean; none without a fallback."""
    if fallback == 0:
        return torch.zeros_like(has_tie)
    # Responses without an answer have no tie, and would only lower the mean.
    mean = mean_over_batch(tie[has_tie])
    return ~has_tie | (tie < fallback * mean)


def _refuse_vanishing(name: str, ratings: Ratings) -> None:
    """Reject weights that are all 0 in a response: it would leave the loss, or silently get weights of 1."""
    competes = ratings.scored.any(1)
    vanishes = competes & ~(ratings.scores > 0).any(1)
    if bool(vanishes.any()):
        row = int(vanishes.nonzero()[0])
        raise CreditError(
            f"credit: rule {name!r} scores in weights, which must not all be 0 in a response, got only 0 in response "
            f"{row}; return 1 where the rule does not apply"
        )
