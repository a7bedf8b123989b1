"""Measure how well a model solves the variable chain, and where its wrong responses have their first error."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from rl.evaluation.significance import wilson_interval
from rl.policy.sampling import evaluating
from rl.records import Sample
from rl.tasks.chain import Chain, first_error

_BATCH_SIZE = 500


def measure(
    model: Any, tokenizer: Any, task: Chain, *, num_problems: int = 1000, num_samples: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Measure how well a model solves fresh problems of the task ("eval"), sampled at temperature 1 and greedily.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, which pads on the left.
        task: the problems.
        num_problems: number of problems.
        num_samples: sampled responses to each problem.
        seed: of the sampling.

    Returns:
        ``sampled`` and ``greedy``: right answers out of n with 95 % Wilson intervals, in all and by number of hops
        (the first sample of each problem); ``mean_over_samples``; ``pass_at``: share of problems that the first k
        samples solve at least once; ``mean_tokens`` of a sampled response with its end token; ``ill_formed`` and
        ``wrong_by_first_error``: shares of sampled responses (see :func:`rl.tasks.chain.first_error`);
        ``right_with_errors``: share whose answer is right although a line is wrong.

    Cost: one pass of generation per sample, some seconds for 1000 problems on one core.
    """
    problems = [task.sample("eval", index) for index in range(num_problems)]

    # The caller's generator keeps its state.
    # Samples are drawn on the model's device, so that device's generator is seeded and restored too.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        sampled = [respond(model, tokenizer, problems) for _ in range(num_samples)]
    greedy = respond(model, tokenizer, problems, temperature=0)

    # Rewards [num_samples, num_problems] and the first error of every sampled response, in the same order.
    rewards = torch.tensor([_rewards(task, problems, texts) for texts in sampled])
    errors = []
    num_tokens = 0
    for texts in sampled:
        for problem, text in zip(problems, texts, strict=True):
            errors.append(first_error(problem, text))
            num_tokens += len(tokenizer(text)["input_ids"]) + 1

    num_responses = len(errors)
    num_right_with_errors = 0
    wrong: Counter[str] = Counter()
    for error, reward in zip(errors, rewards.flatten().tolist(), strict=True):
        if reward == 0:
            wrong[str(error)] += 1
        elif error is not None:
            num_right_with_errors += 1

    return {
        "num_problems": num_problems,
        "sampled": _by_hops(problems, rewards[0].tolist()),
        "greedy": _by_hops(problems, _rewards(task, problems, greedy)),
        "mean_over_samples": rewards.mean().item(),
        "pass_at": {k: rewards[:k].amax(0).mean().item() for k in range(1, num_samples + 1)},
        "mean_tokens": num_tokens / num_responses,
        "ill_formed": errors.count("format") / num_responses,
        "wrong_by_first_error": {error: count / num_responses for error, count in sorted(wrong.items())},
        "right_with_errors": num_right_with_errors / num_responses,
    }


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
            texts.append(text if ended else f"{text}<unk>")
    return texts


def _rewards(task: Chain, problems: list[Sample], texts: list[str]) -> list[float]:
    """Return the reward of one response to each problem."""
    return [task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)]


def _by_hops(samples: list[Sample], rewards: list[float]) -> dict[str, Any]:
    """Return the share of right answers with its interval, in all and for each number of hops, in rising order."""
    groups: dict[str, list[float]] = {"all": list(rewards)}
    for hops in sorted({sample.metadata["hops"] for sample in samples}):
        groups[str(hops)] = [
            reward for sample, reward in zip(samples, rewards, strict=True) if sample.metadata["hops"] == hops
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
