"""Evaluate a policy on problems that it was not trained on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl.config import shown
from rl.errors import ConfigError
from rl.evaluation.significance import Z_95, wilson_interval
from rl.policy.sampling import generate
from rl.rollouts.chat_templates import with_template_options
from rl.rollouts.rollout import PromptEncoder, draw_samples, join, judge
from rl.seeds import derive
from rl.tasks.base import SPLITS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Mean reward over fresh problems, with a 95 % interval over problems.

    Attributes:
        reward: mean reward; accuracy, where the task pays 1 for right and 0 for wrong.
        low: lower end of its interval: Wilson's where every problem has one reward of 0 or 1, else normal.
        high: upper end of its interval.
        best_of: mean over problems of the best of their samples (pass@k for 0/1 rewards).
        num_problems: n.
        samples: k, responses to each problem.
        answer_share: share of the responses with an answer.
        truncated_share: share of the responses that were cut off.
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
        """Return the figures without the responses, for JSON; an end of the interval that is unknown is None."""
        figures: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name != "responses":
                figures[name] = value if math.isfinite(value) else None
        return figures

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
    stop_strings: str | Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Generate responses to fresh problems and reward them.

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
        stop_strings: texts that end a response, beside the end tokens.
        chat_template_kwargs: options of the chat template.
        progress: called with the numbers of finished and of all responses.

    Raises:
        ConfigError: a number out of range.
        RewardError: the task failed.
    """
    _check_counts(
        num_problems=num_problems,
        samples=samples,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        batch_size=batch_size,
    )
    _check_sampling(samples, temperature, split)
    tokenizer = with_template_options(tokenizer, chat_template_kwargs or {})
    encoder = PromptEncoder(tokenizer, model, max_prompt_tokens, max_response_tokens, stop_strings)

    # One entry for each response: its problem, and its number among the responses to that problem.
    planned = []
    for sample in draw_samples(task, split, range(num_problems)):
        for number in range(samples):
            planned.append((sample, number))

    records: list[dict[str, Any]] = []
    num_answered = torch.zeros((), dtype=torch.float32)
    num_truncated = torch.zeros((), dtype=torch.float32)
    num_tokens = torch.zeros((), dtype=torch.float32)
    # All responses to a problem are judged in one call, because a reward may compare them.
    problems_at_once = max(1, batch_size // samples)
    for start in range(0, len(planned), problems_at_once * samples):
        part = planned[start : start + problems_at_once * samples]
        generated_parts = []
        for first in range(0, len(part), batch_size):
            batch = part[first : first + batch_size]
            # The noise is a function of the problem and the number, so the batch size changes no response.
            seeds = None
            if temperature > 0:
                seeds = [derive(seed, "evaluation", split, sample.index, number) for sample, number in batch]
            generated = generate(
                model,
                [encoder.ids(sample) for sample, _ in batch],
                seeds,
                ending=encoder.ending,
                max_new_tokens=max_response_tokens,
                temperature=temperature or 1.0,
            )
            generated_parts.append(generated)
        joined = join(generated_parts, encoder.ending.pad_id)
        responses = judge(task, tokenizer, [sample for sample, _ in part], joined)

        num_answered += responses.answer.any(1).sum()
        num_truncated += responses.truncated.sum()
        num_tokens += responses.response_mask.sum()
        rewards_of_part = responses.rewards.tolist()
        for (sample, _), completion, reward in zip(part, responses.completions, rewards_of_part, strict=True):
            records.append(
                {
                    "index": sample.index,
                    "prompt": sample.prompt,
                    "answer": sample.answer,
                    "completion": completion,
                    "reward": reward,
                }
            )
        if progress is not None:
            progress(len(records), len(planned))

    rewards = torch.tensor([record["reward"] for record in records], dtype=torch.float64)
    rewards = rewards.view(num_problems, samples)
    # A finite task starts again from its first problem, and a repeated problem is no new evidence.
    num_distinct = len({json.dumps(record["prompt"]) for record in records})
    low, high = _interval(rewards, num_distinct)
    return Evaluation(
        reward=float(rewards.mean()),
        low=low,
        high=high,
        best_of=float(rewards.max(1).values.mean()),
        num_problems=num_problems,
        samples=samples,
        answer_share=float(num_answered / len(records)),
        truncated_share=float(num_truncated / len(records)),
        response_tokens=float(num_tokens / len(records)),
        responses=records,
    )


def _interval(rewards: Float[Tensor, "problems samples"], num_distinct: int) -> tuple[float, float]:
    """Compute a 95 % interval of the mean reward over ``num_distinct`` different problems."""
    is_binary = bool(((rewards == 0) | (rewards == 1)).all())
    if rewards.shape[1] == 1 and is_binary:
        return wilson_interval(float(rewards.mean()) * num_distinct, num_distinct)

    # Means that are all 0 or all 1 have no spread, but the interval of the mean is not empty.
    means = rewards.mean(1)
    first = float(means[0])
    if bool((means == means[0]).all()) and first in (0.0, 1.0):
        return wilson_interval(first * num_distinct, num_distinct)

    # The normal approximation needs at least two problems.
    half = math.inf
    if num_distinct > 1:
        half = Z_95 * float(means.std()) / math.sqrt(num_distinct)
    mean = float(means.mean())
    return mean - half, mean + half


def _check_counts(**counts: int) -> None:
    """Check that every argument is an integer of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: must be at least 1, got {value}; see rl.evaluate for the defaults")


def _check_sampling(samples: int, temperature: float, split: str) -> None:
    """Check the arguments that exclude each other before anything is generated."""
    # An integer beyond every float is less than infinity, and overflows later.
    if not 0 <= temperature <= sys.float_info.max:
        raise ConfigError(f"temperature: must be finite and at least 0, got {shown(temperature)}; 0 is greedy decoding")
    if temperature == 0 and samples > 1:
        raise ConfigError(f"samples: must be 1 at temperature 0, got {samples}; greedy samples are all the same")
    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}; 'eval' holds fresh problems")
