"""How good a policy is on problems it never saw."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rl.errors import ConfigError
from rl.evaluation.significance import Z_95
from rl.policy.sampling import evaluating, generate
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge
from rl.seeds import generator
from rl.tasks.base import SPLITS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from rl.evaluation.significance import wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """Mean reward over fresh problems, with a 95 % interval over problems.

    Attributes:
        reward: mean reward; accuracy, where the task pays 1 for right and 0 for wrong.
        low, high: its interval: Wilson's where every problem has one verdict of 0 or 1, else normal over the problems.
        best_of: mean over problems of the best of their samples (pass@k for 0/1 rewards).
        num_problems, samples: n and k.
        answer_share, truncated_share: of all responses.
        response_tokens: mean length.
        responses: a record for each response: problem, completion, reward.
    """

    reward: float
    low: float
    high: float
    best_of: float
    num_problems: int
    samples: int
    answer_share: float
    truncated_share: float
    response_tokens: float
    responses: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """The figures without the responses, for JSON; an end of the interval that is unknown is None."""
        figures = {name: value for name, value in asdict(self).items() if name != "responses"}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def __repr__(self) -> str:
        return (
            f"Evaluation(reward {self.reward:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.num_problems} problems, "
            f"best of {self.samples} {self.best_of:.3f}, {self.response_tokens:.0f} tokens)"
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    num_problems: int = 200,
    samples: int = 1,
    temperature: float = 0.0,
    split: str = "eval",
    max_prompt_tokens: int = 512,
    max_response_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Let a model answer fresh problems and ask the task for its verdicts.

    Args:
        model: any causal LM, adapters included.
        tokenizer: of the model.
        task: with its ``eval`` split.
        num_problems: the first problems of the split.
        samples: responses to each.
        temperature: 0 for greedy decoding, which needs ``samples=1``.
        split: ``"eval"``, or ``"train"`` to compare.
        max_prompt_tokens: longer prompts are refused.
        max_response_tokens: responses are cut off there.
        batch_size: responses at a time.
        seed: of the sampling; the same problems get the same noise.
        progress: called with responses done and to do.

    Raises:
        ConfigError: a number out of range.
        RewardError: the task failed.
    """
    for name, value in (
        ("num_problems", num_problems), ("samples", samples), ("max_prompt_tokens", max_prompt_tokens),
        ("max_response_tokens", max_response_tokens), ("batch_size", batch_size),
    ):  # fmt: skip
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: must be at least 1, got {value}; see rl.evaluate for the defaults")
    _check(samples, temperature, split)
    encoder = PromptEncoder(tokenizer, model, max_prompt_tokens, max_response_tokens)
    each = [(sample, copy) for sample in draw_samples(task, split, range(num_problems)) for copy in range(samples)]
    rows: list[dict[str, Any]] = []
    totals = torch.zeros(3)
    for start in range(0, len(each), batch_size):
        part = each[start : start + batch_size]
        noise = None
        if temperature > 0:
            noise = [generator(seed, "evaluation", split, sample.index, copy) for sample, copy in part]
        with evaluating(model):
            generated = generate(
                model, [encoder.ids(sample) for sample, _ in part], noise, ending=encoder.ending,
                max_new_tokens=max_response_tokens, temperature=temperature or 1.0,
            )  # fmt: skip
        responses = judge(task, tokenizer, [sample for sample, _ in part], generated)
        totals += torch.stack([
            responses.answer.any(1).sum(), responses.truncated.sum(), responses.response_mask.sum()
        ])  # fmt: skip
        rows += [
            {
                "index": sample.index,
                "prompt": sample.prompt,
                "answer": sample.answer,
                "completion": text,
                "reward": reward,
            }
            for (sample, _), text, reward in zip(part, responses.completions, responses.rewards.tolist(), strict=True)
        ]
        if progress is not None:
            progress(len(rows), len(each))
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64).view(num_problems, samples)
    # A finite task starts again from its first problem: what is seen twice is no more evidence than once.
    low, high = _interval(rewards, distinct=len({json.dumps(row["prompt"]) for row in rows}))
    answered, truncated, tokens = (totals / len(rows)).tolist()
    return Evaluation(
        float(rewards.mean()), low, high, float(rewards.max(1).values.mean()), num_problems, samples, answered,
        truncated, tokens, rows,
    )  # fmt: skip


def _interval(rewards: torch.Tensor, distinct: int) -> tuple[float, float]:
    if rewards.shape[1] == 1 and bool(((rewards == 0) | (rewards == 1)).all()):
        return wilson_interval(float(rewards.mean()) * distinct, distinct)
    means = rewards.mean(1)
    if bool((means == means[0]).all()) and float(means[0]) in (0.0, 1.0):  # no spread is no certainty
        return wilson_interval(float(means[0]) * distinct, distinct)
    half = Z_95 * float(means.std()) / math.sqrt(distinct) if distinct > 1 else math.inf
    return float(means.mean()) - half, float(means.mean()) + half


def _check(samples: int, temperature: float, split: str) -> None:
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature: must be finite and at least 0, got {temperature}; 0 is greedy decoding")
    if temperature == 0 and samples > 1:
        raise ConfigError(f"samples: must be 1 at temperature 0, got {samples}; greedy samples are all the same")
    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}; 'eval' holds fresh problems")
