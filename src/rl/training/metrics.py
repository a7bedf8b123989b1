"""What is logged of a step: running sums, seconds by purpose, and the row that they become."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rl.records import Experience
from rl.training.experience import zero_variance_share


@dataclass
class Averages:
    """Running sums of what is logged, weighted by tokens."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def means(self) -> dict[str, float]:
        """Means of everything that was seen at least once."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}


class Clock:
    """Seconds by purpose, from one stop to the next."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._since = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def restart(self) -> None:
        self._since = time.perf_counter()


def step_averages(updates: Averages, experience: Experience) -> Averages:
    """The sums of a step in one process: those of its updates, and what the rollout itself says."""
    averages = Averages(dict(updates.sums), dict(updates.counts))
    responses, scores, credit = experience.responses, experience.scores, experience.credit
    mask, count = responses.response_mask, responses.num_sequences
    tokens, scored = int(mask.sum()), int(credit.scored.sum())
    averages.add("reward", responses.rewards.sum(), count)
    averages.add("response_tokens", tokens, count)
    averages.add("truncated_share", responses.truncated.sum(), count)
    averages.add("answer_share", responses.answer.any(1).sum(), count)
    averages.add("zero_variance_share", zero_variance_share(responses), 1)
    averages.add("entropy_old", scores.entropy.sum(), tokens)
    averages.add("weight_mean", experience.policy_weights.masked_fill(~mask, 0.0).sum(), tokens)
    averages.add("raised_share", (credit.scored & (credit.weights > 1)).sum(), scored)
    averages.add("advantage", (experience.advantages * mask).sum(), tokens)
    if scores.ref_logprobs is not None:
        averages.add("kl_reference", (scores.logprobs - scores.ref_logprobs).sum(), count)
    if scores.values is not None:
        averages.add("value", scores.values.sum(), tokens)
    return averages


def step_row(step: int, averages: Averages, seconds: Mapping[str, float], **settings: float) -> dict[str, Any]:
    """One line of the log: means over all processes, and the seconds of this one.

    Args:
        step: its number, from 1.
        averages: of :func:`step_averages`, gathered.
        seconds: by purpose; ``credit_seconds`` is a part of the others.
        **settings: what else is said of the step.
    """
    whole = sum(value for name, value in seconds.items() if name != "credit_seconds")
    return {
        "step": step,
        **averages.means(),
        **settings,
        "seconds": whole,
        **seconds,
        "tokens_per_second": averages.sums["response_tokens"] / whole,
        "credit_overhead_percent": 100 * seconds["credit_seconds"] / (whole - seconds["credit_seconds"]),
    }
