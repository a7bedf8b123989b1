"""Measure how well a model solves a task of the package, and where its wrong responses have their first error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from rl.evaluation.significance import wilson_interval
from rl.policy.sampling import evaluating
from rl.records import Sample
from rl.tasks.base import Task

_BATCH_SIZE = 500
_CUT_OFF = "<unk>"
"""Ends a truncated response, so that no task finds an answer in it."""


def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    num_problems: int = 1000,
    num_samples: int = 8,
    seed: int = 0,
    max_new_tokens: int = 56,
    group_by: str | None = None,
    first_error: Callable[[Sample, str], str | None] | None = None,
) -> dict[str, Any]:
    """Measure how well a model solves fresh problems of the task ("eval"), sampled at temperature 1 and greedily.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, which pads on the left.
        task: the problems; rewards are 0 and 1.
        num_problems: number of problems.
        num_samples: sampled responses to each problem.
        seed: of the sampling.
        max_new_tokens: token limit of a response.
        group_by: a key of the samples' metadata, by whose values the shares are given too.
        first_error: names the first error of a response, ``"format"`` for an ill-formed one; None for no error.

    Returns:
        ``sampled`` and ``greedy``: right answers out of n with 95 % Wilson intervals, in all and by group (the first
        sample of each problem); ``mean_over_samples``; ``pass_at``: share of problems that the first k samples solve
        at least once; ``mean_tokens`` of a sampled response with its end token; ``without_answer``: share of sampled
        responses that state none. With ``first_error`` also ``ill_formed`` and ``wrong_by_first_error``: shares of
        sampled responses, and ``right_with_errors``: share whose answer is right although a step is wrong. For a task
        that marks them, ``decisive_share`` and ``detour_share``: shares of the tokens of sampled responses.

    Cost: one pass of generation per sample, some seconds for 1000 problems on one core.
    """
    problems = [task.sample("eval", index) for index in range(num_problems)]

    # The caller's generator keeps its state.
    # Samples are drawn on the model's device, so that device's generator is seeded and restored too.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        sampled = [respond(model, tokenizer, problems, max_new_tokens=max_new_tokens) for _ in range(num_samples)]
    greedy = respond(model, tokenizer, problems, temperature=0, max_new_tokens=max_new_tokens)

    # Rewards [num_samples, num_problems], and all sampled responses in the same order.
    rewards = torch.tensor([_rewards(task, problems, texts) for texts in sampled], dtype=torch.float32)
    responses = [(problem, text) for texts in sampled for problem, text in zip(problems, texts, strict=True)]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for _, text in responses)
    num_silent = sum(task.find_answer(text) is None for _, text in responses)
    result = {
        "num_problems": num_problems,
        "sampled": _by_group(problems, rewards[0].tolist(), group_by),
        "greedy": _by_group(problems, _rewards(task, problems, greedy), group_by),
        "mean_over_samples": rewards.mean().item(),
        "pass_at": {k: rewards[:k].amax(0).mean().item() for k in range(1, num_samples + 1)},
        "mean_tokens": num_tokens / len(responses),
        "without_answer": num_silent / len(responses),
    }
    if first_error is not None:
        errors = [first_error(problem, text) for problem, text in responses]
        result |= _error_shares(errors, rewards.flatten().tolist())
    result |= _marked_shares(task, responses, num_tokens)
    return result


def respond(
    model: Any, tokenizer: Any, samples: list[Sample], *, temperature: float = 1.0, max_new_tokens: int = 56
) -> list[str]:
    """Generate one response to each prompt with torch's global generator.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, which pads on the left.
        samples: the problems.
        temperature: of the sampling; 0 takes the likeliest token.
        max_new_tokens: token limit of a response.

    Returns:
        The response texts. A truncated response ends in ``<unk>``, so that it counts as ill-formed.
    """
    choice: dict[str, Any] = {"do_sample": False}
    if temperature:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    texts = []
    for start in range(0, len(samples), _BATCH_SIZE):
        prompts = [str(sample.prompt) for sample in samples[start : start + _BATCH_SIZE]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        batch = batch.to(model.device)
        with torch.no_grad(), evaluating(model):
            output = model.generate(**batch, **choice, max_new_tokens=max_new_tokens)
        responses = output[:, batch["input_ids"].shape[1] :]
        has_ended = (responses == tokenizer.eos_token_id).any(1).tolist()
        decoded = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for text, ended in zip(decoded, has_ended, strict=True):
            texts.append(text if ended else text + _CUT_OFF)
    return texts


def _rewards(task: Task, problems: list[Sample], texts: list[str]) -> list[float]:
    """Return the reward of one response to each problem."""
    return [task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)]


def _error_shares(errors: list[str | None], rewards: list[float]) -> dict[str, Any]:
    """Count the first errors of wrong responses, and the right responses that have one."""
    num_right_with_errors = 0
    wrong: Counter[str] = Counter()
    for error, reward in zip(errors, rewards, strict=True):
        if reward == 0:
            wrong[str(error)] += 1
        elif error is not None:
            num_right_with_errors += 1
    return {
        "ill_formed": errors.count("format") / len(errors),
        "wrong_by_first_error": {error: count / len(errors) for error, count in sorted(wrong.items())},
        "right_with_errors": num_right_with_errors / len(errors),
    }


def _marked_shares(task: Task, responses: list[tuple[Sample, str]], num_tokens: int) -> dict[str, float]:
    """Return the shares of decisive tokens and of detours; in the own tasks a span is one token."""
    methods = {"decisive_share": task.oracle, "detour_share": getattr(task, "detours", None)}
    shares = {}
    for name, method in methods.items():
        if method is not None:
            shares[name] = sum(len(method(sample, text) or []) for sample, text in responses) / num_tokens
    return shares


def _by_group(samples: list[Sample], rewards: list[float], key: str | None) -> dict[str, Any]:
    """Return the share of right answers with its interval, in all and for each value of a key, in rising order."""
    groups: dict[str, list[float]] = {"all": list(rewards)}
    if key is not None:
        for value in sorted({sample.metadata[key] for sample in samples}):
            groups[str(value)] = [
                reward for sample, reward in zip(samples, rewards, strict=True) if sample.metadata[key] == value
            ]
    results = {}
    for name, group in groups.items():
        num_right = sum(group)
        results[name] = {
            "share": num_right / len(group),
            "n": len(group),
            "interval": list(wilson_interval(num_right, len(group))),
        }
    return results
