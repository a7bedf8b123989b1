"""Compare credit of a frozen base with credit of the current policy: how alike do they rank the tokens of a response?

Adapters of other engines score with a frozen copy of the base (docs/engines.md). A policy is trained on the shipped
``program`` model; its responses are then scored twice with every rule, by the policy and by the base. The figure is
Spearman's rank correlation of the two scores within each response, over the tokens that compete, as mean over responses
with its standard error.

    python -m benchmarks.study.frozen_credit [--steps 30] [--out frozen_credit.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from flowgraph.analysis.statistics import spearman
from rl import ActorCritic, CreditConfig, PPOConfig, PPOTrainer, load_base_model, make_task
from rl.credit.scoring import score_rollout
from rl.records import Responses
from rl.rollouts.rollout import PromptEncoder, judge, sample_responses

RULES = ("flow_sharp", "reach_sharp", "max_attention_sharp", "max_attention", "flow", "entropy")
"""Rules that are compared; ``entropy`` is the one that the policy's own distribution determines."""
PROBLEMS = 32
GROUP_SIZE = 4
RESPONSE_TOKENS = 96


def main(arguments: list[str]) -> None:
    """Train, score twice, print the correlations and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("frozen_credit.json"))
    given = parser.parse_args(arguments)

    trained, tokenizer = load_base_model("program")
    config = PPOConfig(
        steps=given.steps,
        num_prompts=8,
        group_size=8,
        advantage="group",
        max_response_tokens=RESPONSE_TOKENS,
        learning_rate=3e-3,
        seed=given.seed,
        credit=CreditConfig(rule="uniform"),
    )
    trainer = PPOTrainer(trained, tokenizer, task="program", config=config)
    history = trainer.train()

    # The base of the trained policy is frozen, but a second copy keeps the two passes apart.
    base_model, _ = load_base_model("program")
    base = ActorCritic(base_model, config.lora, critic=False)
    responses = sample(trainer.policy, tokenizer, given.seed)
    figures = {}
    for rule in RULES:
        figures[rule] = correlation(trainer.policy, base, responses, rule)
        print(f"{rule:22} {figures[rule]['mean']:.3f} (SE {figures[rule]['error']:.3f})")
    result = {
        "steps": given.steps,
        "seed": given.seed,
        "responses": responses.num_sequences,
        "reward_first": history[0]["reward"],
        "reward_last": history[-1]["reward"],
        "spearman": figures,
        "torch": torch.__version__,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def sample(policy: ActorCritic, tokenizer: Any, seed: int) -> Responses:
    """Sample responses of the policy to problems that it was not trained on."""
    task = make_task("program")
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 256, RESPONSE_TOKENS)
    problems = [task.sample("eval", number) for number in range(PROBLEMS)]
    generated = sample_responses(
        policy.causal_lm,
        encoder,
        problems,
        group_size=GROUP_SIZE,
        max_response_tokens=RESPONSE_TOKENS,
        temperature=1.0,
        seed=seed,
        step=0,
    )
    samples = [problem for problem in problems for _ in range(GROUP_SIZE)]
    return judge(task, tokenizer, samples, generated)


def correlation(policy: ActorCritic, base: ActorCritic, responses: Responses, rule: str) -> dict[str, float]:
    """Compute the mean rank correlation within responses, its standard error, and their number."""
    scores = [scores_of(model, responses, rule) for model in (policy, base)]
    values = []
    for row in range(responses.num_sequences):
        scored = scores[0].scored[row]
        pair = [credit.scores[row][scored] for credit in scores]
        # Fewer than three tokens, or equal scores, have no order.
        if int(scored.sum()) < 3 or any(bool((one == one[0]).all()) for one in pair):
            continue
        values.append(spearman(pair[0].numpy(), pair[1].numpy()))
    spread = torch.tensor(values, dtype=torch.float64)
    error = float(spread.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(spread.mean()), "error": error, "responses": len(values)}


def scores_of(policy: ActorCritic, responses: Responses, rule: str) -> Any:
    """Score the tokens of the responses by one rule under one model."""
    credit = CreditConfig(rule=rule, shape="soft")
    scored = score_rollout(
        policy, responses, credit, temperature=1.0, micro_batch_size=32, seed=0, step=0, reference=False
    )
    return scored.credit


if __name__ == "__main__":
    main(sys.argv[1:])
