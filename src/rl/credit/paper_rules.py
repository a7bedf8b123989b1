"""Credit rules of 2025 and 2026 beside the flow: formula, source, sign policy and cost.

Most of them score in *weights*, so that no shape applies. Each names the sign of the advantages that its paper weighs
(``CreditConfig.sign="rule"``). "Our reading" marks what a paper leaves open, or what we could not look up in it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows
from rl.credit.flow_rules import convention_of
from rl.credit.policy_rules import generators_of
from rl.credit.registry import AttentionNeed, CreditInput, credit_rule, options_of, passes_of, recorded
from rl.credit.scope import before_answer
from rl.errors import CreditError
from rl.records import Responses

_LEAST_SPREAD = 1e-12
"""Standard deviations below this share of the largest value are rounding, and all weights are 1."""
_BLOCK = 128
"""Number of attention rows that are read at once."""


@credit_rule("relevance", own_pass="a backward pass")
def relevance(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by the conserved relevance of the response's own answer that later tokens draw from it.

    .. math:: \max\Big(0, \operatorname{sign}(D) \sum_{t > s} N[t, s]\Big)

    N is the signed flow from the answer to the embeddings that one linearised backward pass of the policy makes, D the
    answer's demand (see :class:`flowgraph.RelevanceRows`). Demand that enters at the position before the answer does
    not count. Ours; sign: all. 0 without an answer.

    Options: ``hops`` (0), emission hops, each one more backward pass.

    Raises:
        CreditError: an option outside its range, or no passes of the policy.
        CaptureError: a model whose relevance is not conserved.

    Cost: about three forward passes, and a matrix of tokens x tokens for each response.
    """
    hops = _whole_option(batch, "hops", 0)
    return passes_of(batch).received_relevance(target="margin", hops=hops).clamp_min(0.0)


@credit_rule("vtrace", own_pass="a forward pass")
def vtrace(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score a token by VTRACE: its share of all damped walks into the answer, over value-aware edges.

    Yuan et al. 2026; edges and score as ``capture(capacity="vtrace")`` and ``compose("vtrace")`` of flowgraph, on the
    rows of the run's convention. As credit: the default shape, the top 40 % times 1.5; sign: all. 0 without an answer.

    Options: ``damping`` (0.5).

    Raises:
        CreditError: an option outside its range, or no passes of the policy.

    Cost: about 1.4 forward passes, and two solves for each response.
    """
    options = options_of(batch, damping=0.5)
    if options["damping"] == 0:
        raise CreditError("options: damping must be above 0, got 0; 0.5 is the default")
    return passes_of(batch).vtrace(convention_of(batch), damping=float(options["damping"]))


@credit_rule("grail", weighs=True, sign="negative", own_pass="a backward pass")
def grail(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Weigh a token by the gradient-activation saliency of the answer, in wrong responses.

    .. math:: w_t = \operatorname{clip}(1 + \lambda z_t, 0.5, 5), \quad
        z = \text{z-score of } |\langle \partial L / \partial x_t, x_t \rangle|

    L is the log-likelihood of the response's own answer, x the input embeddings. arXiv 2606.04889; sign: wrong
    responses only, which is here: negative advantages. Our reading: the z-score over the tokens that compete in the
    response. Weight 1 without an answer.

    Options: ``strength`` (0.5), lambda.

    Raises:
        CreditError: an option outside its range, or no passes of the policy.

    Cost: one forward and one backward pass.
    """
    options = options_of(batch, strength=0.5)
    saliency = passes_of(batch).answer_saliency()
    z = _z_scores(saliency, batch.scored)
    return (1 + options["strength"] * z).clamp(0.5, 5.0)


@credit_rule("oar_gradient", weighs=True, own_pass="a backward pass")
def oar_gradient(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Weigh a token by how much the answer's distribution moves with it: low ones shrink, high ones grow, sum kept.

    .. math:: m_t = \text{min-max of } \log(1 + |\langle \partial KL / \partial x_t, x_t \rangle|), \quad
        w_t \propto \begin{cases} \max(m_t / q, 0.1) & m_t < q \\ 1 + \beta (m_t - q) / (1 - q) & m_t \ge q \end{cases}

    KL is the divergence of the answer's mean-logit distribution from itself under noise on the embeddings before the
    answer, q the 0.4 quantile of m; the weights of a response sum to its number of tokens. OAR-G, arXiv 2601.07408;
    sign: all. Our reading: beta = 2. Weight 1 without an answer.

    Options: ``threshold`` (0.4), ``boost`` (2), ``noise`` (0.001).

    Raises:
        CreditError: an option outside its range, no passes of the policy, or no generators.

    Cost: two forward passes and one backward pass.
    """
    options = options_of(batch, threshold=0.4, boost=2, noise=0.001)
    passes = passes_of(batch)
    before = before_answer(batch.responses)
    noise = float(options["noise"])
    sensitivity = passes.outcome_sensitivity(before, generators_of(batch), noise).double()

    is_weighed = batch.scored & before
    weights = torch.ones_like(sensitivity)
    for row, values, chosen in zip(weights, sensitivity, is_weighed, strict=True):
        if not bool(chosen.any()):
            continue
        # m: the min-max of the logarithms; all 0 where they do not vary.
        score = torch.log1p(values[chosen])
        least = score.min()
        spread = score.max() - least
        importance = (score - least) / torch.where(spread > 0, spread, 1.0)

        # The two branches of the formula, with q the limit between them.
        limit = torch.quantile(importance, options["threshold"])
        suppressed = (importance / limit.clamp_min(1e-8)).clamp_min(0.1)
        above_limit = importance - limit
        boosted = 1 + options["boost"] * above_limit / (1 - limit).clamp_min(1e-8)
        shaped = torch.where(importance < limit, suppressed, boosted)

        # The weights sum to the number of tokens, so the step size of the response is kept.
        row[chosen] = shaped * chosen.sum() / shaped.sum()
    return weights.float()


@credit_rule("delta", weighs=True, own_pass="a forward pass", whole_batch=True)
def delta(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Weigh a token by how clearly its gradient belongs to the right responses or to the wrong ones.

    .. math:: v_t = (1 - p_t) h_t, \quad m_t = \|v_t - c_{other}\|^2 - \|v_t - c_{own}\|^2, \quad
        w_t = \operatorname{clip}(2 \sigma(m_t / s), 1 - r, 1 + r)

    h is the last hidden state that the token was drawn from, c the mean of v over the tokens of responses with positive
    and with negative advantage, weighted by its size; own and other by the sign of the token's response. DelTA, arXiv
    2605.21467; sign: all. Our reading: the soft assignment, with s the root mean square of m over the batch, and
    advantages that are rewards minus their group's mean. Weight 1 where the advantage is 0, or one side is empty.

    Options: ``range`` (0.2), r.

    Raises:
        CreditError: an option outside its range, or no passes of the policy.

    Cost: one forward pass; ``4 * responses * tokens * hidden`` bytes.
    """
    options = options_of(batch, range=0.2)
    scored = batch.scored
    advantages = outcome_advantages(batch.responses)

    # v_t = (1 - p_t) h_t
    probability = batch.scores.logprobs.to(scored.device).exp()
    hidden = passes_of(batch).hidden_states()
    vectors = (1 - probability)[..., None] * hidden

    # A token takes the side of its response. One empty side leaves nothing to compare with.
    ones = torch.ones(scored.shape, dtype=torch.float32, device=scored.device)
    importance = advantages.abs()[:, None] * scored
    is_positive = (advantages > 0)[:, None] & scored
    is_negative = (advantages < 0)[:, None] & scored
    if not bool(is_positive.any()) or not bool(is_negative.any()):
        return ones

    # m_t: how much nearer, in squared distance, a token lies to the mean of its own side than to the other.
    positive_mean = _weighted_mean(vectors, importance * is_positive)
    negative_mean = _weighted_mean(vectors, importance * is_negative)
    to_positive = (vectors - positive_mean).square().sum(-1)
    to_negative = (vectors - negative_mean).square().sum(-1)
    margin = (to_negative - to_positive) * advantages.sign()[:, None]

    # s is the root mean square of m over the batch; with s = 0 both sides have the same mean.
    has_side = is_positive | is_negative
    scale = margin[has_side].square().mean().sqrt()
    if float(scale) == 0:
        return ones
    least = 1 - options["range"]
    most = 1 + options["range"]
    weights = (2 * torch.sigmoid(margin / scale)).clamp(least, most)
    return torch.where(has_side, weights, ones)


@credit_rule("taco", weighs=True, sign="non_negative")
def taco(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Shrink the weight of a token that is less likely than is typical of its distribution, in right responses.

    .. math:: r_t = -\log p_t - H_t + \log \alpha, \quad w_t = 1 - \lambda (1 - e^{-\max(r_t, 0)})

    H is the entropy of the distribution that the token was drawn from, so r is positive where its probability is below
    :math:`\alpha e^{-H}`. arXiv 2607.07976; sign: positive advantages only. Our reading: alpha and lambda.

    Options: ``alpha`` (0.1), ``strength`` (0.5), lambda.

    Raises:
        CreditError: an option outside its range.

    Cost: none beyond log-probabilities and entropies.
    """
    options = options_of(batch, alpha=0.1, strength=0.5)
    alpha = torch.tensor(float(options["alpha"]), dtype=torch.float64)
    if float(alpha) == 0:
        raise CreditError("options: alpha must be above 0, got 0; 0.1 is the default")
    # r_t, and the share exp(-max(r_t, 0)) that is left of the weight at full strength.
    scores = batch.scores
    excess = -scores.logprobs - scores.entropy + float(alpha.log())
    kept = torch.exp(-excess.clamp_min(0.0))
    weights = 1 - options["strength"] * (1 - kept)
    return torch.where(batch.scored, weights.to(batch.scored.device), 1.0)


@credit_rule("attention_entropy", needs={"attention": AttentionNeed()})
def attention_entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by how concentrated its attention is: one minus the normalised entropy of its row.

    .. math:: 1 + \sum_{s \le t} A[t, s] \log A[t, s] / \log n_t

    n is the number of tokens that it may read. arXiv 2605.07660 calls tokens of low attention entropy anchors and
    weighs them softly (``shape="soft"``); sign: all. Our reading: the mean of heads and layers of the run, the token's
    own row, and a preference for anchors that does not move in the course of the run.

    Cost: one read of the response rows.
    """
    options_of(batch)
    rows = recorded(batch, "attention")
    concentration = torch.zeros(batch.scored.shape, dtype=torch.float32, device=rows.device)
    # n_t, the number of tokens that t may read: its position, counted from 1 without padding.
    readable = rows.attention_mask.long().cumsum(1)
    origin = batch.responses.prompt_length
    for start in range(origin, rows.num_tokens, _BLOCK):
        stop = min(start + _BLOCK, rows.num_tokens)
        columns = slice(start - origin, stop - origin)
        concentration[:, columns] = _concentration(rows, readable, start, stop)
    mask = batch.responses.response_mask.to(rows.device)
    return torch.where(mask, concentration, 0.0).to(batch.scored.device)


@credit_rule("lora_influence", weighs=True, own_pass="a backward pass", whole_batch=True)
def lora_influence(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Weigh a token by how far its gradient in the adapter's weights points along the batch's mean policy gradient.

    .. math:: z_t = \langle \nabla_\theta \log p_t, \bar g \rangle, \quad
        w_t = \operatorname{clip}(1 + \lambda \operatorname{sign}(A) \hat z_t, 0, 2)

    The advantages of the mean gradient are rewards minus their group's mean, and :math:`\hat z` is z over its root mean
    square in the batch. This is the additive form :math:`A + \lambda |A| \hat z`, without a change of sign: a token
    whose gradient helps the batch is encouraged more, or discouraged less. Ours; sign: all. Weight 1 where the
    advantage is 0.

    Options: ``strength`` (0.5), lambda.

    Raises:
        CreditError: an option outside its range, or no passes of the policy.

    Cost: one forward and backward pass, and about two forward passes.
    """
    options = options_of(batch, strength=0.5)
    advantages = outcome_advantages(batch.responses)
    influence = passes_of(batch).influence(advantages)
    has_side = batch.scored & (advantages != 0)[:, None]
    ones = torch.ones(batch.scored.shape, dtype=torch.float32, device=batch.scored.device)
    if not bool(has_side.any()):
        return ones

    # z over its root mean square. The division by the largest value comes first, because the squares of small
    # gradients would leave the range of float32.
    largest = influence[has_side].abs().max()
    if float(largest) == 0:
        return ones
    relative = influence / largest
    root_mean_square = relative[has_side].square().mean().sqrt()
    standardised = relative / root_mean_square

    change = options["strength"] * advantages.sign()[:, None] * standardised
    weights = (1 + change).clamp(0.0, 2.0)
    return torch.where(has_side, weights, ones)


def outcome_advantages(responses: Responses) -> Float[Tensor, " batch"]:
    """Compute the reward of each response minus the mean of its group; minus that of the batch in a group of one."""
    rewards = responses.rewards.float()
    _, group, sizes = responses.groups.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(sizes.shape, dtype=torch.float32, device=rewards.device).index_add(0, group, rewards)
    mean = (total / sizes)[group]
    alone = sizes[group] == 1
    return rewards - torch.where(alone, rewards.mean(), mean)


def _whole_option(batch: CreditInput, name: str, default: int) -> int:
    """Read the only option of a rule, an integer of at least 0."""
    for given in batch.options:
        if given not in (name, "rows"):
            raise CreditError(f"options: must be options of this rule, got {given!r}; there are {name}")
    value = batch.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CreditError(
            f"options: {name} must be a whole number of at least 0, got {value!r}; {default} is the default"
        )
    return value


def _z_scores(
    values: Float[Tensor, "batch response"], scored: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Compute the z-score over the scored tokens of each response; 0 elsewhere, and where the values do not vary."""
    # Mean and standard deviation of each response, over its scored tokens.
    wide = torch.where(scored, values.to(scored.device).double(), 0.0)
    count = scored.sum(1, keepdim=True).clamp_min(1)
    mean = wide.sum(1, keepdim=True) / count
    deviation = torch.where(scored, wide - mean, 0.0)
    variance = deviation.square().sum(1, keepdim=True) / count
    spread = variance.sqrt()

    # A spread that is rounding would divide noise by noise.
    largest = wide.abs().amax(1, keepdim=True)
    varies = spread > _LEAST_SPREAD * largest
    divisor = torch.where(varies, spread, 1.0)
    return torch.where(varies, deviation / divisor, 0.0).float()


def _weighted_mean(
    vectors: Float[Tensor, "batch response hidden"], weights: Float[Tensor, "batch response"]
) -> Float[Tensor, " hidden"]:
    """Compute the weighted mean of the vectors of all tokens."""
    total = torch.einsum("brd,br->d", vectors, weights)
    return total / weights.sum()


def _concentration(rows: AttentionRows, readable: Tensor, start: int, stop: int) -> Float[Tensor, "batch block"]:
    """Compute one minus the normalised entropy of the rows [start, stop); 1 for a row that reads one token."""
    weights = rows.block(start, stop)
    # x log x is 0 at 0. Rows may sum to less than 1 (learned sinks), so they are normalised first.
    smallest = torch.finfo(weights.dtype).tiny
    row_sums = weights.sum(-1, keepdim=True)
    shares = weights / row_sums.clamp_min(smallest)
    entropy = -torch.xlogy(shares, shares).sum(-1)

    # log n_t is the entropy of a uniform row. It is 0 for n_t = 1, where no division is defined.
    greatest_entropy = readable[:, start:stop].clamp_min(1).float().log()
    has_choice = greatest_entropy > 0
    divisor = torch.where(has_choice, greatest_entropy, 1.0)
    normalised = torch.where(has_choice, entropy / divisor, 0.0)
    return (1 - normalised).clamp(0.0, 1.0)
