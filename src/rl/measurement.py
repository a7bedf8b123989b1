"""How well a model solves the variable chain, and where the rest of its responses first go wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from rl.evaluation import wilson_interval
from rl.records import Sample
from rl.tasks.chain import Chain, first_error


def respond(
    model: Any, tokenizer: Any, samples: list[Sample], *, temperature: float = 1.0, max_new_tokens: int = 56
) -> list[str]:
    """One response to each prompt, drawn with torch's own generator; temperature 0 takes the likeliest token.

    A response that ran out of tokens ends in ``<unk>``, so that it counts as ill-formed.
    """
    texts = []
    choice: dict[str, Any] = {"do_sample": False}
    if temperature:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(samples), 500):
        batch = tokenizer([str(sample.prompt) for sample in samples[start : start + 500]],
                          padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)  # fmt: skip
        with torch.no_grad():
            written = model.generate(**batch, **choice, max_new_tokens=max_new_tokens)
        written = written[:, batch["input_ids"].shape[1] :]
        ended = (written == tokenizer.eos_token_id).any(1).tolist()
        found = tokenizer.batch_decode(written, skip_special_tokens=True)
        texts += [text if end else text + "<unk>" for text, end in zip(found, ended, strict=True)]
    return texts


def measure(
    model: Any, tokenizer: Any, task: Chain, *, num_problems: int = 1000, num_samples: int = 8, seed: int = 0
) -> dict[str, Any]:
    """How well a model solves fresh problems of the task ("eval"), sampled at temperature 1 and greedily.

    Returns:
        ``sampled`` and ``greedy``: right answers out of n with 95 % Wilson intervals, in all and by number of hops
        (the first sample of each problem); ``mean_over_samples``; ``pass_at``: share of problems that the first k
        samples solve at least once; ``mean_tokens`` of a sampled response with its end token; ``ill_formed`` and
        ``wrong_by_first_error``: shares of sampled responses (see :func:`rl.tasks.chain.first_error`);
        ``right_with_errors``: share whose answer is right although a line is wrong.

    Cost: one pass of generation per sample, some seconds for 1000 problems on one core.
    """
    samples = [task.sample("eval", index) for index in range(num_problems)]
    # Samples are drawn where the model is, so that generator is seeded and put back too.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = [respond(model, tokenizer, samples) for _ in range(num_samples)]
    rewards = torch.tensor([[task.reward(*pair) for pair in zip(samples, texts, strict=True)] for texts in drawn])
    greedy = respond(model, tokenizer, samples, temperature=0)
    verdicts = [task.reward(*pair) for pair in zip(samples, greedy, strict=True)]
    pairs = [pair for texts in drawn for pair in zip(samples, texts, strict=True)]
    errors = [first_error(*pair) for pair in pairs]
    judged = list(zip(errors, rewards.flatten().tolist(), strict=True))
    wrong = Counter(str(error) for error, reward in judged if not reward)
    slips = sum(error is not None and reward > 0 for error, reward in judged)
    return {
        "num_problems": num_problems,
        "sampled": _by_hops(samples, rewards[0].tolist()),
        "greedy": _by_hops(samples, verdicts),
        "mean_over_samples": rewards.mean().item(),
        "pass_at": {k: rewards[:k].amax(0).mean().item() for k in range(1, num_samples + 1)},
        "mean_tokens": sum(len(tokenizer(text)["input_ids"]) + 1 for _, text in pairs) / len(pairs),
        "ill_formed": sum(error == "format" for error in errors) / len(pairs),
        "wrong_by_first_error": {error: count / len(pairs) for error, count in sorted(wrong.items())},
        "right_with_errors": slips / len(pairs),
    }


def _by_hops(samples: list[Sample], rewards: list[float]) -> dict[str, Any]:
    groups: dict[str, list[float]] = {"all": list(rewards)}
    for sample, reward in sorted(zip(samples, rewards, strict=True), key=lambda pair: pair[0].metadata["hops"]):
        groups.setdefault(str(sample.metadata["hops"]), []).append(reward)
    return {
        hops: {
            "share": sum(group) / len(group),
            "n": len(group),
            "interval": list(wilson_interval(sum(group), len(group))),
        }
        for hops, group in groups.items()
    }
