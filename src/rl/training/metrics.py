"""The metrics of a step: running sums, seconds by purpose, and the row that is logged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rl.config import PPOConfig
from rl.credit.scope import answer_openers, end_tokens
from rl.credit.weights import effective_token_ratio, gini
from rl.records import Experience
from rl.training.experience import compared_rewards, zero_variance_share


@dataclass
class Averages:
    """Running weighted means, and extremes.

    Attributes:
        sums: weighted sum of each quantity.
        counts: sum of the weights, for example the number of tokens.
        minima: smallest value of each quantity that has one.
        maxima: greatest value of each quantity that has one.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over ``count`` items to the quantity of this name."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def extend(self, name: str, least: Tensor | float, greatest: Tensor | float) -> None:
        """Extend the range of the quantity of this name."""
        self.minima[name] = min(self.minima.get(name, math.inf), float(least))
        self.maxima[name] = max(self.maxima.get(name, -math.inf), float(greatest))

    def join(self, other: Averages) -> None:
        """Add the sums and counts, and the ranges, of another process."""
        for name in other.sums:
            self.add(name, other.sums[name], other.counts[name])
        for name in other.minima:
            self.extend(name, other.minima[name], other.maxima[name])

    def ranges(self) -> dict[str, float]:
        """Return the smallest and the greatest value of each quantity that has them."""
        found = {}
        for name in self.minima:
            found[f"{name}_min"] = self.minima[name]
            found[f"{name}_max"] = self.maxima[name]
        return found

    def means(self) -> dict[str, float]:
        """Compute the means of all quantities with a positive count."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}


class Clock:
    """Seconds by purpose, from one stop to the next.

    Attributes:
        seconds: total by purpose.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._since = time.perf_counter()

    def stop(self, name: str) -> None:
        """Add the time since the last stop to this purpose."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def restart(self) -> None:
        """Leave the time since the last stop out of all purposes."""
        self._since = time.perf_counter()


def step_averages(updates: Averages, experience: Experience, config: PPOConfig, *, kl_weight: float) -> Averages:
    """Sum the metrics of a step in one process: those of its updates and those of the rollout.

    Args:
        updates: of the step's updates.
        experience: of the step.
        config: of the run.
        kl_weight: beta at this step.
    """
    averages = Averages()
    averages.join(updates)
    responses = experience.responses
    scores = experience.scores
    credit = experience.credit
    mask = responses.response_mask
    num_responses = responses.num_sequences
    num_tokens = int(mask.sum())

    # Means over responses.
    averages.add("reward", responses.rewards.sum(), num_responses)
    if responses.reward_parts is not None:
        for name, part in zip(responses.reward_names, responses.reward_parts.unbind(1), strict=True):
            applies = ~part.isnan()
            averages.add(f"reward/{name}", part[applies].sum(), applies.sum())
    averages.extend("reward", responses.rewards.min(), responses.rewards.max())
    averages.add("response_tokens", num_tokens, num_responses)
    averages.add("truncated_share", responses.truncated.sum(), num_responses)
    averages.add("answer_share", responses.answer.any(1).sum(), num_responses)

    # A problem without variance is one whose advantages are 0, so penalties and the KL count.
    rewards = compared_rewards(responses, scores, config, kl_weight=kl_weight)
    compared = replace(responses, rewards=rewards)
    averages.add("zero_variance_share", zero_variance_share(compared), 1)

    # Means over tokens.
    token_weights = experience.policy_weights.masked_fill(~mask, 0.0)
    is_raised = credit.scored & (credit.weights > 1)
    averages.add("entropy_old", scores.entropy.sum(), num_tokens)
    averages.add("weight_mean", token_weights.sum(), num_tokens)
    averages.add("raised_share", is_raised.sum(), int(credit.scored.sum()))
    averages.add("advantage", (experience.advantages * mask).sum(), num_tokens)
    _add_weight_figures(averages, experience)

    # How far generation and scoring disagree about the tokens that were drawn, which PPO takes for equal.
    if responses.sampled_logprobs is not None:
        gap = (scores.logprobs - responses.sampled_logprobs)[mask]
        averages.add("sampling_gap", gap.abs().sum(), num_tokens)
        if num_tokens:
            averages.extend("sampling_ratio", gap.min().exp(), gap.max().exp())

    # The KL is a sum over the tokens of a response, so its mean is over responses.
    if scores.ref_logprobs is not None:
        kl = scores.logprobs - scores.ref_logprobs
        averages.add("kl_reference", kl.sum(), num_responses)
    if scores.values is not None:
        averages.add("value", scores.values.sum(), num_tokens)
    return averages


def _add_weight_figures(averages: Averages, experience: Experience) -> None:
    """Add the unevenness of the weights within a response, and the weights of end tokens and answer openers.

    An end token or an answer opener with a low weight teaches wrong lengths; unanchored responses have weights of 1.
    """
    responses = experience.responses
    weights = experience.policy_weights
    # Means over responses, so that any split of the batch over processes gives the same figure.
    for row, mask in zip(weights, responses.response_mask, strict=True):
        of_response = row[mask]
        averages.add("weight_gini", gini(of_response), 1)
        averages.add("effective_token_ratio", effective_token_ratio(of_response), 1)

    ends = end_tokens(responses)
    openers = answer_openers(responses)
    averages.add("weight_end", weights[ends].sum(), ends.sum())
    averages.add("weight_answer_opener", weights[openers].sum(), openers.sum())

    unanchored = experience.credit.unanchored
    if unanchored is not None:
        averages.add("unanchored_share", unanchored.sum(), responses.num_sequences)


def step_row(step: int, averages: Averages, seconds: Mapping[str, float], **settings: float) -> dict[str, Any]:
    """Build one row of the log: means over all processes, and the seconds of this one.

    Args:
        step: its number, from 1.
        averages: of :func:`step_averages`, gathered.
        seconds: by purpose; ``credit_seconds`` is a part of the others.
        **settings: other figures of the step, for example the learning rate.
    """
    # The overhead compares the credit with the step that would remain without it.
    credit_seconds = seconds["credit_seconds"]
    total_seconds = sum(value for name, value in seconds.items() if name != "credit_seconds")
    seconds_without_credit = total_seconds - credit_seconds
    return {
        "step": step,
        **averages.means(),
        **averages.ranges(),
        **settings,
        "seconds": total_seconds,
        **seconds,
        "tokens_per_second": averages.sums["response_tokens"] / total_seconds,
        "credit_overhead_percent": 100 * credit_seconds / seconds_without_credit,
    }
