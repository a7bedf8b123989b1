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
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks.common import RESULTS, machine
from rl.evaluation.significance import holm

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

T_95 = {8: 2.365, 7: 2.447, 6: 2.571, 5: 2.776, 4: 3.182, 3: 4.303, 2: 12.706}
"""Two-sided 95 % quantiles of Student's t, by number of pairs."""


def key_of(arm: str, learning_rate: float, seed: int) -> str:
    """Return the name of a run in the log."""
    return f"{arm} | {learning_rate:g} | {seed}"


def one_run(arm: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train one run; the base model, problems and noise depend on the seed alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from rl import PPOConfig, PPOTrainer, load_chain_model

    started = time.perf_counter()
    config = PPOConfig.from_dict({**SETTINGS, "credit": ARMS[arm], "learning_rate": learning_rate, "seed": seed})
    model, tokenizer = load_chain_model()
    history = PPOTrainer(model, tokenizer, task="chain", config=config, progress=False).train()
    return {
        "key": key_of(arm, learning_rate, seed),
        "arm": arm,
        "learning_rate": learning_rate,
        "seed": seed,
        "reward": [round(row["reward"], 5) for row in history],
        "seconds": round(time.perf_counter() - started, 1),
        "credit_overhead_percent": statistics.median(row["credit_overhead_percent"] for row in history),
        "entropy": [round(row["entropy"], 4) for row in history[::10]],
    }


def finished() -> dict[str, dict[str, Any]]:
    """Read the finished runs from the log, by key."""
    if not LOG.exists():
        return {}
    rows = [json.loads(line) for line in LOG.read_text().splitlines()]
    return {row["key"]: row for row in rows}


def run_all(jobs: list[tuple[str, float, int]], workers: int) -> None:
    """Train every run that is not in the log yet, and append a line for each."""
    known = finished()
    waiting = [job for job in jobs if key_of(*job) not in known]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, LOG.open("a") as log:
        futures = [pool.submit(one_run, *job) for job in waiting]
        for number, future in enumerate(as_completed(futures), 1):
            row = future.result()
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(f"{number}/{len(waiting)} {row['key']}: {area(row):.4f} in {row['seconds']:.0f} s", flush=True)


def area(row: dict[str, Any]) -> float:
    """Return the metric: the mean reward over all steps."""
    return statistics.fmean(row["reward"])


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
        areas[rate] = statistics.fmean(area(rows[key_of(arm, rate, seed)]) for seed in GRID_SEEDS)
    return areas


def sign_flip_p(differences: list[float]) -> float:
    """Compute the exact two-sided paired sign-flip test of mean 0: the share of sign patterns at least as extreme."""
    # The tolerance counts the observed pattern itself despite rounding.
    threshold = abs(sum(differences)) - 1e-12
    num_extreme = 0
    for signs in itertools.product((-1, 1), repeat=len(differences)):
        total = sum(sign * difference for sign, difference in zip(signs, differences, strict=True))
        num_extreme += abs(total) >= threshold
    return num_extreme / 2 ** len(differences)


def compare(areas: dict[str, list[float]], base: str, family: list[str]) -> list[dict[str, Any]]:
    """Compute paired differences to an arm, with t intervals over seeds and Holm's adjustment within the family."""
    rows = []
    for arm in family:
        paired = [one - other for one, other in zip(areas[arm], areas[base], strict=True)]
        half_width = T_95[len(paired)] * statistics.stdev(paired) / len(paired) ** 0.5
        rows.append(
            {
                "arm": arm,
                "against": base,
                "difference": statistics.fmean(paired),
                "half_width": half_width,
                "wins": sum(difference > 0 for difference in paired),
                "n": len(paired),
                "p": sign_flip_p(paired),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def mean_curve(runs: list[dict[str, Any]]) -> list[float]:
    """Return the mean reward over the seeds at each step."""
    curves = [row["reward"] for row in runs]
    return [round(statistics.fmean(values), 4) for values in zip(*curves, strict=True)]


def mean_reward(runs: list[dict[str, Any]], steps: slice) -> float:
    """Return the mean reward over some steps and all seeds."""
    return statistics.fmean(statistics.fmean(row["reward"][steps]) for row in runs)


def report() -> None:
    """Print the tables, and write ``results/rl_study.json``."""
    rows = finished()
    rates = best_rates(rows)

    # Only seeds that every arm has finished: the comparisons are paired.
    seeds = [seed for seed in SEEDS if all(key_of(arm, rates[arm], seed) in rows for arm in ARMS)]
    runs = {arm: [rows[key_of(arm, rates[arm], seed)] for seed in seeds] for arm in ARMS}
    areas = {arm: [area(row) for row in found] for arm, found in runs.items()}
    table = []
    for arm, found in runs.items():
        table.append(
            {
                "arm": arm,
                "learning_rate": rates[arm],
                "seeds": len(seeds),
                "area": statistics.fmean(areas[arm]),
                "area_sd": statistics.stdev(areas[arm]),
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
        rates = best_rates(finished())
        # Seed by seed, so that a study that is stopped has complete comparisons.
        run_all([(arm, rates[arm], seed) for seed in SEEDS for arm in ARMS], options.workers)
    report()


if __name__ == "__main__":
    main()
