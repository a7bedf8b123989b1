"""Compare credit rules by training on the chain task: runs paired by seed, with a learning-rate grid for each arm.

    python -m benchmarks.study.rl_study --workers 2          every run; continues where it was stopped
    python -m benchmarks.study.rl_study --report             only the tables, from the finished runs

The metric was fixed before the first run: the mean reward over all steps of a run, that is, the area under its
learning curve. Every problem of a run is new to the policy when it is rewarded, and the problems and the sampling
noise of a seed are the same for all arms. Each arm takes the learning rate that was best for it on the grid's seeds,
which are not among those of the comparison. The comparisons of the first family (flow against uniform) were chosen in
advance, too; all others are exploratory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from typing import Any

from benchmarks.common import RESULTS, machine
from benchmarks.study import paired_runs
from benchmarks.study.paired_runs import add_holm, area, finished, mean_curve, mean_reward, paired_test

ARMS = {
    "uniform": {"rule": "uniform"},
    "random": {"rule": "random"},
    "oracle": {"rule": "oracle"},
    "oracle, soft": {"rule": "oracle", "shape": "soft"},
    "max attention": {"rule": "max_attention"},
    "max attention, soft": {"rule": "max_attention", "shape": "soft"},
    "entropy": {"rule": "entropy"},
    "entropy, soft": {"rule": "entropy", "shape": "soft"},
    "flow": {"rule": "flow"},
    "flow, literal rows": {"rule": "flow", "rows": "literal"},
    "flow, soft": {"rule": "flow", "shape": "soft"},
    "flow x entropy, soft": {"rule": "flow_entropy", "shape": "soft"},
}
PRIMARY = ("flow", "flow, soft", "flow x entropy, soft")
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
GRID_SEEDS = (100,)
SEEDS = tuple(range(8))
SETTINGS: dict[str, Any] = {
    "steps": 70,
    "num_prompts": 4,
    "group_size": 6,
    "advantage": "group",
    "max_response_tokens": 40,
    "micro_batch_size": 24,
    "lora": {"rank": 8, "alpha": 16},
}
LOG = RESULTS / "rl_study.jsonl"
"""A line for each finished run."""

Job = tuple[str, float, int]
"""Arm, learning rate and seed of a run."""


def key_of(job: Job) -> str:
    """Return the name of a run in the log."""
    arm, learning_rate, seed = job
    return f"{arm} | {learning_rate:g} | {seed}"


def one_run(job: Job) -> dict[str, Any]:
    """Train one run; the base model, problems and noise depend on the seed alone."""
    arm, learning_rate, seed = job
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from rl import PPOConfig, PPOTrainer, load_chain_model

    started = time.perf_counter()
    config = PPOConfig.from_dict({**SETTINGS, "credit": ARMS[arm], "learning_rate": learning_rate, "seed": seed})
    model, tokenizer = load_chain_model()
    history = PPOTrainer(model, tokenizer, task="chain", config=config, progress=False).train()
    return {
        "key": key_of(job),
        "arm": arm,
        "learning_rate": learning_rate,
        "seed": seed,
        "reward": [round(row["reward"], 5) for row in history],
        "seconds": round(time.perf_counter() - started, 1),
        "credit_overhead_percent": statistics.median(row["credit_overhead_percent"] for row in history),
        "entropy": [round(row["entropy"], 4) for row in history[::10]],
    }


def run_all(jobs: list[Job], workers: int) -> None:
    """Train every run that is not in the log yet."""
    paired_runs.run_all(jobs, one_run=one_run, key_of=key_of, log=LOG, workers=workers)


def best_rates(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return, for each arm, the learning rate with the largest area on the grid's seeds."""
    best = {}
    for arm in ARMS:
        areas = grid_areas(rows, arm)
        best[arm] = max(areas, key=areas.__getitem__)
    return best


def grid_areas(rows: dict[str, dict[str, Any]], arm: str) -> dict[float, float]:
    """Return the mean area of an arm on the grid's seeds, by learning rate."""
    areas = {}
    for rate in LEARNING_RATES:
        areas[rate] = statistics.fmean(area(rows[key_of((arm, rate, seed))]) for seed in GRID_SEEDS)
    return areas


def compare(areas: dict[str, dict[int, float]], base: str, family: list[str]) -> list[dict[str, Any]]:
    """Compute paired differences to an arm, with t intervals over seeds and Holm's adjustment within the family."""
    rows = []
    for arm in family:
        test = paired_test(areas[arm], areas[base])
        if test is not None:
            rows.append({"arm": arm, "against": base, **test})
    add_holm(rows)
    return rows


def report() -> None:
    """Print the tables, and write ``results/rl_study.json``."""
    rows = finished(LOG)
    rates = best_rates(rows)

    # Only seeds that every arm has finished: the comparisons are paired.
    seeds = [seed for seed in SEEDS if all(key_of((arm, rates[arm], seed)) in rows for arm in ARMS)]
    runs = {arm: [rows[key_of((arm, rates[arm], seed))] for seed in seeds] for arm in ARMS}
    areas = {arm: {row["seed"]: area(row) for row in found} for arm, found in runs.items()}
    table = []
    for arm, found in runs.items():
        table.append(
            {
                "arm": arm,
                "learning_rate": rates[arm],
                "seeds": len(seeds),
                "area": statistics.fmean(areas[arm].values()),
                "area_sd": statistics.stdev(areas[arm].values()),
                "first_10": mean_reward(found, slice(None, 10)),
                "last_10": mean_reward(found, slice(-10, None)),
                "grid": {f"{rate:g}": value for rate, value in grid_areas(rows, arm).items()},
                "curve": mean_curve(found),
            }
        )

    # Each call is a family of its own for Holm's adjustment; the first was chosen in advance.
    others = [arm for arm in ARMS if arm not in PRIMARY and arm != "uniform"]
    tests = compare(areas, "uniform", list(PRIMARY))
    tests += compare(areas, "uniform", others)
    tests += compare(areas, "random", list(PRIMARY))
    tests += compare(areas, "max attention", list(PRIMARY))

    for row in sorted(table, key=lambda row: -row["area"]):
        print(
            f"{row['arm']:22} lr {row['learning_rate']:<6g} area {row['area']:.4f} (sd {row['area_sd']:.4f}) "
            f"first {row['first_10']:.3f} last {row['last_10']:.3f}"
        )
    for row in tests:
        print(
            f"{row['arm']:22} - {row['against']:14} {row['difference']:+.4f} +- {row['half_width']:.4f} "
            f"wins {row['wins']}/{row['n']} p {row['p']:.3f} Holm {row['p_holm']:.3f}"
        )
    content = {
        "benchmark": "rl_study",
        "notes": __doc__,
        "machine": machine(),
        "settings": SETTINGS,
        "rows": table,
        "tests": tests,
    }
    (RESULTS / "rl_study.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="only the tables, from the log")
    options = parser.parse_args()
    if not options.report:
        run_all(list(itertools.product(ARMS, LEARNING_RATES, GRID_SEEDS)), options.workers)
        rates = best_rates(finished(LOG))
        # Seed by seed, so that a study that is stopped has complete comparisons.
        run_all([(arm, rates[arm], seed) for seed in SEEDS for arm in ARMS], options.workers)
    report()


if __name__ == "__main__":
    main()
