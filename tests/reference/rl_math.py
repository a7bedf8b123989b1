"""The mathematics of PPO with token credit, one response at a time, in plain loops over lists of Python floats.

A response is the list of its action tokens, without padding; a batch is a list of responses of any lengths. Sums that
the library telescopes or recurses are written out from their definitions.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

Row = list[float]
Rows = list[Row]


# Advantages ---------------------------------------------------------------------------------------------


def token_rewards(reward: float, kl: Sequence[float], kl_weight: float) -> Row:
    """R on the last token, minus beta KL on each."""
    return [(reward if t == len(kl) - 1 else 0.0) - kl_weight * price for t, price in enumerate(kl)]


def gae(rewards: Row, values: Row, discount: float, gae_lambda: float, bootstrap: float) -> tuple[Row, Row]:
    """The sum of (gamma lambda)^l delta_{t+l}, written out for every t."""
    tokens = range(len(rewards))
    ahead = [*values[1:], bootstrap]
    delta = [rewards[t] + discount * ahead[t] - values[t] for t in tokens]
    decay = discount * gae_lambda
    advantages = [math.fsum(decay ** (u - t) * delta[u] for u in tokens if u >= t) for t in tokens]
    return advantages, [advantages[t] + values[t] for t in tokens]


def group_advantages(rewards: Row, groups: list[int], scale_std: bool, epsilon: float) -> Row:
    """(R - mean) / (std + epsilon), std over G - 1."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(members) / len(members)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in members) / (len(members) - 1))
        result.append((reward - mean) / (std + epsilon if scale_std else 1.0))
    return result


def rloo_advantages(rewards: Row, groups: list[int]) -> Row:
    """R minus the mean of the others."""
    result = []
    for i, group in enumerate(groups):
        others = [rewards[j] for j in range(len(rewards)) if j != i and groups[j] == group]
        result.append(rewards[i] - math.fsum(others) / len(others))
    return result


def whiten(rows: Rows) -> Rows:
    """(x - mean) / std over all tokens of the batch, std over n - 1; for two numbers or more that differ."""
    numbers = [x for row in rows for x in row]
    mean = math.fsum(numbers) / len(numbers)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))
    return [[(x - mean) / std for x in row] for row in rows]


# Losses -------------------------------------------------------------------------------------------------


def token_logprob(logits: Row, token: int, temperature: float) -> tuple[float, float]:
    """Log-probability of a token, and the entropy of the distribution."""
    highest = max(logits)
    parts = [math.exp((z - highest) / temperature) for z in logits]
    chances = [part / math.fsum(parts) for part in parts]
    logprob = (logits[token] - highest) / temperature - math.log(math.fsum(parts))
    return logprob, -math.fsum(p * math.log(p) for p in chances if p > 0)


def kl_estimate(logprob: float, ref_logprob: float, kind: str) -> float:
    """k1, k2 or k3 of the log-ratio, cut off at 20."""
    d = max(-20.0, min(20.0, logprob - ref_logprob))
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def policy_loss(
    logprob: float, old: float, advantage: float, clip: float, high: float, dual: float | None, weight: float
) -> tuple[float, float, bool]:
    """Loss of one token, its derivative by the log-probability, and whether it was clipped."""
    raw = logprob - old
    ratio = math.exp(max(-20.0, min(20.0, raw)))
    inside = max(1 - clip, min(1 + high, ratio))
    loss = max(-advantage * ratio, -advantage * inside)
    clipped = loss > -advantage * ratio
    if dual is not None and advantage < 0 and loss > -advantage * dual:
        loss, clipped = -advantage * dual, True
    moves = not clipped and -20 <= raw <= 20
    return weight * loss, weight * -advantage * ratio if moves else 0.0, clipped


def value_loss(value: float, old: float, target: float, clip: float | None) -> float:
    """Half the larger squared error."""
    plain = (value - target) ** 2
    if clip is None:
        return plain / 2
    return max(plain, (max(old - clip, min(old + clip, value)) - target) ** 2) / 2


def aggregate(rows: Rows, kind: str, num_tokens: int, num_sequences: int, max_tokens: int) -> float:
    """The three means; 0 over a count of 0."""
    if kind == "token_mean":
        return math.fsum(x for row in rows for x in row) / num_tokens if num_tokens else 0.0
    if kind == "seq_mean":
        return math.fsum(math.fsum(row) / len(row) for row in rows if row) / num_sequences if num_sequences else 0.0
    cells = num_sequences * max_tokens
    return math.fsum(x for row in rows for x in row) / cells if cells else 0.0


# Credit: `scored` lists the positions of a response that compete ----------------------------------------


def top_share(scores: Row, scored: list[int], share: str, largest: bool) -> set[int]:
    """The ceil(q n) best positions, q as the decimal it is written as; ties to the earlier."""
    count = math.ceil(Fraction(share) * len(scored))
    return set(sorted(scored, key=lambda t: (-scores[t] if largest else scores[t], t))[:count])


def shape_weights(
    scores: Row, scored: list[int], shape: str, share: str, strength: float, floor: float, ceiling: float
) -> Row:
    """Weights of one response."""
    weights = [1.0] * len(scores)
    if not any(scores[t] > 0 for t in scored):
        return weights
    mean = math.fsum(scores[t] for t in scored) / len(scored)
    chosen = top_share(scores, scored, share, largest=shape != "bottom_q")
    for t in scored:
        if shape == "soft":
            weights[t] = max(floor, min(ceiling, scores[t] / mean))
        elif shape == "raw":
            weights[t] = scores[t]
        elif shape == "only_top":
            weights[t] = 1.0 if t in chosen else 0.0
        elif t in chosen:
            weights[t] = strength
    return weights


def signed_weight(weight: float, advantage: float, sign: str) -> float:
    """w, 1 or 1 / w."""
    if sign == "all" or advantage >= 0:
        return weight
    if sign == "non_negative":
        return 1.0
    return 1 / weight if weight else 0.0


def mean_one(weights: Row) -> Row:
    """Over their mean, where it is not 0."""
    mean = math.fsum(weights) / len(weights) if weights else 0.0
    return [w / mean for w in weights] if mean else weights


def redistribute(reward: float, scores: Row, scored: list[int]) -> Row:
    """R s / sum(s) on scored tokens, or R on the last token."""
    total = math.fsum(scores[t] for t in scored)
    if total == 0:
        return token_rewards(reward, [0.0] * len(scores), 0.0)
    return [reward * scores[t] / total if t in scored else 0.0 for t in range(len(scores))]


def potential_rewards(scores: Row, scored: list[int], scale: float, discount: float) -> Row:
    """gamma Phi_{t+1} - Phi_t, each Phi summed anew."""
    total = math.fsum(scores[t] for t in scored)

    def potential(t: int) -> float:
        if t >= len(scores) or total == 0:
            return 0.0
        return scale * math.fsum(scores[u] for u in scored if u < t) / total

    return [discount * potential(t + 1) - potential(t) for t in range(len(scores))]
