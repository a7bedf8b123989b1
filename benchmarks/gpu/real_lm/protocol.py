"""Does token credit pay on a real language model? The protocol for one GPU and about ten minutes.

    python -m benchmarks.gpu.real_lm --model FOLDER --out results.json [--device cuda] [--budget 540]
    python -m benchmarks.gpu.real_lm --model program --task program --toy --out toy.json

1. The AUC test over attention graphs, on responses that the model writes: does any graph rank the result that the
   answer uses above the five that it does not? Chosen on the problems of even place, measured on the others. Without a
   graph above .7 nothing is trained: there is no basis for credit.
2. Paired runs: plain PPO, the recommended setting on the chosen graph, and the oracle; the weighted arms at half the
   learning rate. All arms of a seed have the same problems and the same noise.

Fixed before the first run: the metric is the mean reward over the steps of a run. Two seeds give a direction and no
interval; the file says so. A run for which no time is left is named as not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rl
from benchmarks.common import machine
from benchmarks.gpu.real_lm.named_sums import NamedSums
from flowgraph import FlowgraphError, atomic_write
from flowgraph.files import check_writable
from rl.alignment.arms import parse_arm
from rl.policy.loading import load_model
from rl.tasks.base import Task

LEAST_AUC = 0.7
"""Below it, a rule is no basis for credit on a task."""
AUC_RULES = ("flow", "reach_sharp", "max_attention", "entropy")
SWEPT_RULE = "reach_sharp"
FULL = {"steps": 60, "num_prompts": 8, "group_size": 4, "max_response_tokens": 160, "problems": 48, "seeds": 2}
TOY = {"steps": 2, "num_prompts": 2, "group_size": 2, "max_response_tokens": 48, "problems": 12, "seeds": 1}
LEARNING_RATE = 2e-4


def main(arguments: list[str] | None = None) -> int:
    """Run the protocol and write its result; return the exit code: 2 for bad input."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("real_lm: --device: must be available, got 'cuda' without a GPU; pass --device cpu", file=sys.stderr)
        return 2
    try:
        check_writable(options.out)
        run(options)
    except FlowgraphError as error:
        print(f"real_lm: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Run both stages and write the result.

    Raises:
        FlowgraphError: the model, the task or the file cannot be used.
    """
    began = time.perf_counter()
    sizes = TOY if options.toy else FULL
    model, tokenizer = load(options)
    task: Any = NamedSums() if options.task == "named_sums" else rl.make_task(options.task)

    result: dict[str, Any] = {
        "benchmark": "real_lm",
        "machine": machine(),
        "device": _device_name(options.device),
        "model": options.model,
        "task": repr(task),
        "sizes": sizes,
        "learning_rate": LEARNING_RATE,
        "toy": options.toy,
    }
    graph = auc_stage(model, tokenizer, task, sizes, result)
    del model
    if graph is None and not options.toy:
        result["stopped"] = f"no graph is above {LEAST_AUC} against detours: there is no basis for credit here"
    else:
        train_stage(options, task, sizes, graph, result, ends=began + options.budget)
    result["seconds"] = round(time.perf_counter() - began, 1)
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.real_lm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of an instruction model, or a shipped base model")
    parser.add_argument("--task", default="named_sums", help="named_sums, or a task with oracle and detours")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--device", default="cpu", help="a torch device; default cpu")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="time in all; default 540")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to see that everything runs")
    return parser


def _device_name(device: str) -> str:
    """Return the name of the GPU, or the device."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def ppo_settings(sizes: dict[str, int]) -> dict[str, Any]:
    """Return what all runs share."""
    return {
        "steps": sizes["steps"],
        "num_prompts": sizes["num_prompts"],
        "group_size": sizes["group_size"],
        "max_response_tokens": sizes["max_response_tokens"],
        "advantage": "group",
        "epochs": 1,
        "num_minibatches": 2,
        "kl_coefficient": 0.0,
        "lora": {"rank": 16, "alpha": 32},
    }


def auc_stage(model: Any, tokenizer: Any, task: Task, sizes: dict[str, int], result: dict[str, Any]) -> str | None:
    """Measure rules, sweep over graphs, and return the credit setting of the best graph; None where none passes."""
    config = rl.PPOConfig.from_dict(ppo_settings(sizes))
    shared: dict[str, Any] = {"config": config, "num_problems": sizes["problems"]}
    named = rl.credit_auc(model, tokenizer, task, rules=list(AUC_RULES), **shared)
    swept = rl.credit_auc(model, tokenizer, task, rules=[SWEPT_RULE], sweep=True, **shared)
    best = swept.best
    result["auc"] = {
        "reward": named.reward,
        "response_tokens": named.response_tokens,
        "responses": named.num_responses,
        "without_answer": named.num_unanswered,
        "rules": named.table(),
        "graphs": swept.table(),
        "best": None if best is None else asdict(best),
    }
    for row in named.rules:
        print(f"AUC {row.rule}: {row.auc}")
    if best is None:
        return None
    print(f"best of {best.num_graphs} graphs: {best.rule}, AUC {best.auc} on problems that did not choose it")
    if best.auc is None or best.auc < LEAST_AUC:
        return None
    return best.rule


def arms_of(graph: str | None) -> dict[str, dict[str, Any]]:
    """Return the credit settings of the arms; the recommended one on the chosen graph."""
    recommended = asdict(rl.CreditConfig.recommended())
    if graph is not None:
        recommended["options"] = dict(parse_arm(graph).options)
    oracle = {"rule": "oracle", "shape": "soft", "floor": 0.5, "ceiling": 2.0}
    return {"uniform": {"rule": "uniform"}, "recommended": recommended, "oracle": oracle}


def train_stage(
    options: argparse.Namespace,
    task: Task,
    sizes: dict[str, int],
    graph: str | None,
    result: dict[str, Any],
    *,
    ends: float,
) -> None:
    """Train every arm on every seed, seed by seed, as long as there is time."""
    result["arms"] = arms_of(graph)
    result["runs"] = []
    result["not_run"] = []
    longest = 0.0
    for seed in range(sizes["seeds"]):
        for arm, credit in result["arms"].items():
            if time.perf_counter() + longest > ends:
                result["not_run"].append({"arm": arm, "seed": seed})
                print(f"{arm}, seed {seed}: not run, no time left")
                continue
            found = one_run(options, task, sizes, arm, credit, seed)
            longest = max(longest, found["seconds"])
            result["runs"].append(found)
            print(f"{arm}, seed {seed}: mean reward {found['mean_reward']:.3f} in {found['seconds']:.0f} s")
    result["differences"] = differences(result["runs"])
    result["reading"] = f"{sizes['seeds']} seeds give a direction and no interval"


def one_run(
    options: argparse.Namespace, task: Task, sizes: dict[str, int], arm: str, credit: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Train one run from the model as it is loaded; weighted arms take half the rate."""
    started = time.perf_counter()
    model, tokenizer = load(options)
    rate = LEARNING_RATE if arm == "uniform" else LEARNING_RATE / 2
    config = rl.PPOConfig.from_dict(
        {**ppo_settings(sizes), "credit": credit, "learning_rate": rate, "seed": seed, "micro_batch_size": 8}
    )
    trainer = rl.PPOTrainer(model, tokenizer, task=task, config=config, progress=False)
    rewards = [row["reward"] for row in trainer.train()]
    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": rate,
        "reward": [round(reward, 5) for reward in rewards],
        "mean_reward": round(statistics.fmean(rewards), 5),
        "seconds": round(time.perf_counter() - started, 1),
    }


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the paired differences of the metric to plain training, seed by seed."""
    plain = {run["seed"]: run["mean_reward"] for run in runs if run["arm"] == "uniform"}
    return [
        {"arm": run["arm"], "seed": run["seed"], "minus_uniform": round(run["mean_reward"] - plain[run["seed"]], 5)}
        for run in runs
        if run["arm"] != "uniform" and run["seed"] in plain
    ]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model to the device: bfloat16 on a GPU, float32 elsewhere."""
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    model: Any
    model, tokenizer = load_model(options.model, dtype)
    return model.to(torch.device(options.device)), tokenizer
