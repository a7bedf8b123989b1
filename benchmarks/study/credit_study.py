"""Compare credit rules where responses hold unused work: runs paired by seed, with a learning-rate grid for each arm.

    python -m benchmarks.study.credit_study --workers 2                          every run; continues where it stopped
    python -m benchmarks.study.credit_study --levels 0:5 --arms uniform,recommended --seeds 16
    python -m benchmarks.study.credit_study --report                             only the tables, from finished runs

Fixed before the first run: the metric is the mean reward over all steps of a run, on problems that are new to the
policy; the second metric is the accuracy on 512 held-out problems at temperature 1 after the last step. Each arm takes
the learning rate with the best metric on the grid's seeds, at each level; these seeds have no part in the comparison.
The problems and the sampling noise of a seed are the same for all arms. Named in advance is, for each of
PRIMARY_LEVELS, the family of PRIMARY against BASELINES, with one Holm correction; every other comparison is
exploratory, with a correction of its own for each level, baseline and metric.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine
from benchmarks.study import paired_runs
from benchmarks.study.paired_runs import Run, add_holm, area, finished, mean_curve, mean_reward, paired_test
from rl.errors import ConfigError, CreditError, DivergedError

WIDE = {"shape": "soft", "floor": 0.25, "ceiling": 4.0}
NARROW = {"shape": "soft", "floor": 0.5, "ceiling": 2.0}
ARMS: dict[str, dict[str, Any]] = {
    # Plain training, and what the best possible knowledge is worth.
    "uniform": {"rule": "uniform"},
    "oracle": {"rule": "oracle", **WIDE},
    "oracle narrow": {"rule": "oracle", **NARROW},
    # Rules that need no graph, and the paper's rules on the mean of the middle layers.
    "entropy": {"rule": "entropy", **WIDE},
    "entropy top": {"rule": "entropy"},
    "max_attention": {"rule": "max_attention", **WIDE},
    "flow paper": {"rule": "flow"},
    "flow soft": {"rule": "flow", **WIDE},
    # The sharpened graph.
    "flow_sharp wide": {"rule": "flow_sharp", **WIDE},
    "flow_sharp narrow": {"rule": "flow_sharp", **NARROW},
    "flow_sharp anneal": {"rule": "flow_sharp", **WIDE, "anneal": 0.5},
    "reach_sharp narrow": {"rule": "reach_sharp", **NARROW},
    "recommended": {"rule": "reach_sharp", **NARROW, "fallback": 0.5},
    "reach_pre": {
        "rule": "reach_sharp",
        **NARROW,
        "options": {"place": "pre", "power": 2, "normalization": "leak"},
    },
    "max_attention_sharp": {"rule": "max_attention_sharp", **WIDE},
    "max_attention_sharp narrow": {"rule": "max_attention_sharp", **NARROW},
    # Controls: no information, the structure of the graph, its sink, and the position of a token.
    "random": {"rule": "random", **WIDE},
    "shuffled_flow_sharp": {"rule": "shuffled_flow_sharp", **WIDE},
    "wrong_sink": {"rule": "wrong_sink", **WIDE},
    "position_matched": {"rule": "position_matched", **WIDE, "options": {"of": "flow_sharp"}},
    # Other rules, in the form of their source where it defines one.
    "relevance": {"rule": "relevance", **NARROW},
    "vtrace": {"rule": "vtrace"},
    "grail": {"rule": "grail"},
    "oar_gradient": {"rule": "oar_gradient"},
    "delta": {"rule": "delta"},
    "taco": {"rule": "taco"},
    "attention_entropy": {"rule": "attention_entropy", **WIDE},
    "lora_influence": {"rule": "lora_influence"},
}
SHARP_GRAPH = ("flow_sharp", "reach_sharp", "max_attention_sharp", "shuffled_flow_sharp", "wrong_sink")
"""Rules that take the graph of a level, where it has one of its own."""

BASELINES = ("uniform", "max_attention")
PRIMARY = ("recommended", "flow_sharp wide")
PRIMARY_LEVELS = ("0:5", "program", "pathsearch")
"""Levels on which the AUC test lets the recommended rule pass: above .7 against detours; each is a study of its own."""
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
GRID_SEEDS = (100, 101)
HELD_OUT = 512
SETTINGS: dict[str, Any] = {
    "steps": 100,
    "num_prompts": 4,
    "group_size": 4,
    "advantage": "group",
    "clip": 0.2,
    "epochs": 1,
    "num_minibatches": 2,
    "micro_batch_size": 16,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "kl_coefficient": 0.0,
    "lora": {"rank": 8, "alpha": 16},
}


@dataclass(frozen=True)
class Level:
    """A task of the study.

    Attributes:
        task: its name, which is that of its base model too.
        options: of the task.
        detours: unused sub-results of a demonstration; None where the level has no place on the dose-response curve.
        graph: options of the sharpened graph, where the AUC test chose another than the default.
        max_response_tokens: responses are cut off there.
    """

    task: str
    options: dict[str, Any]
    detours: int | None = None
    graph: dict[str, Any] = field(default_factory=dict)
    max_response_tokens: int = 128


LEVELS = {
    "0:0": Level("wandering", {"level": "0:0"}, detours=0),
    "0:2": Level("wandering", {"level": "0:2"}, detours=2),
    "0:5": Level("wandering", {"level": "0:5"}, detours=5),
    "4:0": Level("wandering", {"level": "4:0"}),
    "pathsearch": Level("pathsearch", {}, max_response_tokens=64),
    "program": Level("program", {}, max_response_tokens=48),
}


@dataclass(frozen=True)
class Job:
    """A run of the study.

    Attributes:
        level: name of the level.
        arm: name of the arm.
        learning_rate: of the policy's adapter.
        seed: of problems, sampling and adapter.
        steps: number of steps.
        evaluates: whether the second metric is measured, which the grid does not need.
    """

    level: str
    arm: str
    learning_rate: float
    seed: int
    steps: int
    evaluates: bool

    @property
    def key(self) -> str:
        """Return the name of the run in the log."""
        return run_key(self.level, self.arm, self.learning_rate, self.seed)


def run_key(level: str, arm: str, learning_rate: float, seed: int) -> str:
    """Return the name of a run in the log."""
    return f"{level} | {arm} | {learning_rate:g} | {seed}"


def credit_of(level: Level, arm: str) -> dict[str, Any]:
    """Return the credit settings of an arm at a level: rules on the sharpened graph take the level's own graph."""
    credit = dict(ARMS[arm])
    # An arm that names its graph keeps it.
    if level.graph and credit["rule"] in SHARP_GRAPH and "place" not in credit.get("options", {}):
        credit["options"] = {**credit.get("options", {}), **level.graph}
    return credit


def one_run(job: Job) -> Run:
    """Train one run; the base model, problems and noise depend on level and seed alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    from rl import PPOConfig, PPOTrainer, evaluate, make_task
    from rl.policy.loading import load_model

    level = LEVELS[job.level]
    started = time.perf_counter()
    run: Run = {
        "key": job.key,
        "level": job.level,
        "arm": job.arm,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
    }
    config = PPOConfig.from_dict(
        {
            **SETTINGS,
            "steps": job.steps,
            "max_response_tokens": level.max_response_tokens,
            "credit": credit_of(level, job.arm),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
        }
    )
    model, tokenizer = load_model(level.task)
    task = make_task(level.task, **level.options)
    trainer = PPOTrainer(model, tokenizer, task=task, config=config, progress=False)
    try:
        history = trainer.train()
    except DivergedError as error:
        # A rate that ends training is the worst of its arm; the other runs go on.
        return {**run, "error": str(error), "seconds": round(time.perf_counter() - started, 1)}
    run["reward"] = [round(row["reward"], 5) for row in history]
    run["entropy"] = [round(row["entropy"], 4) for row in history[::10]]
    run["response_tokens"] = [round(row["response_tokens"], 2) for row in history[::10]]
    run["credit_overhead_percent"] = round(statistics.median(row["credit_overhead_percent"] for row in history), 2)
    if job.evaluates:
        found = evaluate(
            trainer.policy.causal_lm,
            tokenizer,
            task,
            num_problems=HELD_OUT,
            temperature=1.0,
            max_response_tokens=level.max_response_tokens,
            batch_size=256,
        )
        run["accuracy"] = round(found.reward, 5)
    run["seconds"] = round(time.perf_counter() - started, 1)
    return run


# Learning rates -----------------------------------------------------------------------------------------


def grid_areas(runs: dict[str, Run], level: str, arm: str) -> dict[float, float]:
    """Return the mean area of an arm on the grid's seeds by learning rate; rates with a missing or failed run none."""
    areas = {}
    for rate in LEARNING_RATES:
        found = [runs.get(run_key(level, arm, rate, seed), {}) for seed in GRID_SEEDS]
        if all("reward" in run for run in found):
            areas[rate] = statistics.fmean(area(run) for run in found)
    return areas


def best_rates(runs: dict[str, Run], levels: list[str], arms: list[str]) -> dict[tuple[str, str], float]:
    """Return the learning rate with the largest area on the grid's seeds, for each level and arm with any."""
    best = {}
    for level, arm in itertools.product(levels, arms):
        areas = grid_areas(runs, level, arm)
        if areas:
            best[level, arm] = max(areas, key=areas.__getitem__)
    return best


# The report ---------------------------------------------------------------------------------------------


def compared_runs(
    runs: dict[str, Run], levels: list[str], arms: list[str], num_seeds: int
) -> dict[tuple[str, str], list[Run]]:
    """Return the finished runs of each level and arm at its own rate, on the seeds of the comparison."""
    found: dict[tuple[str, str], list[Run]] = {}
    for (level, arm), rate in best_rates(runs, levels, arms).items():
        candidates = [runs.get(run_key(level, arm, rate, seed), {}) for seed in range(num_seeds)]
        finished_runs = [run for run in candidates if "reward" in run]
        if finished_runs:
            found[level, arm] = finished_runs
    return found


def figure_of(runs: list[Run], metric: str) -> dict[int, float]:
    """Return a metric by seed: ``"area"`` or ``"accuracy"``."""
    if metric == "area":
        return {run["seed"]: area(run) for run in runs}
    return {run["seed"]: run["accuracy"] for run in runs if "accuracy" in run}


def compare(
    found: dict[tuple[str, str], list[Run]], pairs: Sequence[tuple[str, str, str]], metric: str, family: str
) -> list[dict[str, Any]]:
    """Test (level, arm, baseline) triples as one family; a pair with fewer than two shared seeds is left out."""
    tests = []
    for level, arm, base in pairs:
        if (level, arm) not in found or (level, base) not in found:
            continue
        test = paired_test(figure_of(found[level, arm], metric), figure_of(found[level, base], metric))
        if test is not None:
            tests.append({"family": family, "metric": metric, "level": level, "arm": arm, "against": base, **test})
    add_holm(tests)
    return tests


def all_tests(found: dict[tuple[str, str], list[Run]], levels: list[str], arms: list[str]) -> list[dict[str, Any]]:
    """Run the tests of the named family, then the exploratory ones of each level, baseline and metric."""
    named = list(itertools.product(PRIMARY_LEVELS, PRIMARY, BASELINES))
    tests = []
    for level in PRIMARY_LEVELS:
        tests += compare(found, [pair for pair in named if pair[0] == level], "area", "named")
    for level, base, metric in itertools.product(levels, BASELINES, ("area", "accuracy")):
        pairs = [(level, arm, base) for arm in arms if arm != base]
        if metric == "area":
            pairs = [pair for pair in pairs if pair not in named]
        tests += compare(found, pairs, metric, "exploratory")
    return tests


def arm_rows(runs: dict[str, Run], found: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """Return a row for each level and arm with its figures and its mean curve."""
    rows = []
    for (level, arm), of_arm in found.items():
        areas = list(figure_of(of_arm, "area").values())
        accuracies = list(figure_of(of_arm, "accuracy").values())
        grid = grid_areas(runs, level, arm)
        rows.append(
            {
                "level": level,
                "detours": LEVELS[level].detours,
                "arm": arm,
                "credit": credit_of(LEVELS[level], arm),
                "learning_rate": of_arm[0]["learning_rate"],
                "seeds": len(of_arm),
                "area": statistics.fmean(areas),
                "area_sd": statistics.stdev(areas) if len(areas) > 1 else None,
                "accuracy": statistics.fmean(accuracies) if accuracies else None,
                "first_10": mean_reward(of_arm, slice(None, 10)),
                "last_10": mean_reward(of_arm, slice(-10, None)),
                "credit_overhead_percent": statistics.fmean(run["credit_overhead_percent"] for run in of_arm),
                "grid": {f"{rate:g}": value for rate, value in grid.items()},
                "curve": mean_curve(of_arm),
            }
        )
    return rows


def report(folder: Path, levels: list[str], arms: list[str], num_seeds: int, steps: int) -> None:
    """Print the tables, and write ``credit_study.json`` and the dose-response figure."""
    runs = finished(folder / "credit_study.jsonl")
    found = compared_runs(runs, levels, arms, num_seeds)
    rows = arm_rows(runs, found)
    tests = all_tests(found, levels, arms)
    failed = [run["key"] for run in runs.values() if "error" in run]

    for level in levels:
        print(f"\n{level}")
        for row in sorted((row for row in rows if row["level"] == level), key=lambda row: -row["area"]):
            accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            print(
                f"  {row['arm']:26} lr {row['learning_rate']:<6g} area {row['area']:.4f}  accuracy {accuracy}  "
                f"{row['seeds']} seeds"
            )
    print()
    for test in tests:
        print(
            f"{test['family']:11} {test['level']:10} {test['metric']:8} {test['arm']:26} - {test['against']:13} "
            f"{test['difference']:+.4f} +- {test['half_width']:.4f} wins {test['wins']}/{test['n']} "
            f"p {test['p']:.4f} Holm {test['p_holm']:.4f}"
        )
    num_arms = len({run["arm"] for run in runs.values()})
    num_variants = num_arms * len(LEARNING_RATES)
    print(f"{num_arms} arms in the log x {len(LEARNING_RATES)} learning rates = {num_variants} variants")
    if failed:
        print(f"ended by divergence: {', '.join(failed)}")

    content = {
        "benchmark": "credit_study",
        "notes": __doc__,
        "machine": machine(),
        "settings": {**SETTINGS, "steps": steps},
        "variants": num_variants,
        "finished_runs": len(runs),
        "failed_runs": failed,
        "rows": rows,
        "tests": tests,
    }
    (folder / "credit_study.json").write_text(json.dumps(content, indent=1) + "\n")
    if any(test["against"] == "uniform" for test in tests):
        draw(folder)


def draw(folder: Path) -> None:
    """Draw the dose-response figure where matplotlib is installed."""
    try:
        from benchmarks.figures.dose_response import draw_dose_response
    except ImportError:
        print("no picture: matplotlib is missing; pip install --group bench")
        return
    print(draw_dose_response(folder / "credit_study.json", folder / "credit_study.svg"))


# The command --------------------------------------------------------------------------------------------


def chosen(text: str | None, known: list[str], name: str) -> list[str]:
    """Read a comma-separated choice of names, in their own order; all of them by default."""
    if text is None:
        return known
    names = [part.strip() for part in text.split(",")]
    for part in names:
        if part not in known:
            raise ConfigError(f"--{name}: must be of {', '.join(known)}, got {part!r}; separate names with commas")
    return [part for part in known if part in names]


def check_arms(arms: list[str], levels: list[str]) -> None:
    """Check the credit settings of every arm at every level before the first run.

    Raises:
        CreditError: an unknown rule, or an option that it does not have.
        ConfigError: a setting that breaks a rule.
    """
    import rl.credit  # noqa: F401  (registers the rules)
    from rl.config import CreditConfig
    from rl.credit.ratings import check_credit

    for arm, level in itertools.product(arms, levels):
        check_credit(CreditConfig(**credit_of(LEVELS[level], arm)))


def check_log(log: Path, steps: int) -> None:
    """Refuse a log of runs with another number of steps: their areas cannot be compared."""
    for run in finished(log).values():
        if "reward" in run and len(run["reward"]) != steps:
            raise ConfigError(
                f"--steps: must be that of the runs in {log}, got {steps} and a run of {len(run['reward'])}; give "
                "--out another folder"
            )


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", help=f"commas between them, of: {', '.join(ARMS)}")
    parser.add_argument("--levels", help=f"commas between them, of: {', '.join(LEVELS)}")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the comparison, from 0")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="steps of a run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of log, report and figure")
    parser.add_argument("--report", action="store_true", help="only the tables, from the log")
    options = parser.parse_args()
    try:
        arms = chosen(options.arms, list(ARMS), "arms")
        levels = chosen(options.levels, list(LEVELS), "levels")
        check_arms(arms, levels)
        check_log(options.out / "credit_study.jsonl", options.steps)
    except (ConfigError, CreditError) as error:
        sys.exit(str(error))

    def train(jobs: list[Job]) -> None:
        log = options.out / "credit_study.jsonl"
        paired_runs.run_all(jobs, one_run=one_run, key_of=_key, log=log, workers=options.workers)

    if not options.report:
        train(
            [
                Job(level, arm, rate, seed, options.steps, evaluates=False)
                for seed, level, arm, rate in itertools.product(GRID_SEEDS, levels, arms, LEARNING_RATES)
            ]
        )
        rates = best_rates(finished(options.out / "credit_study.jsonl"), levels, arms)
        # Seed by seed, so that a study that is stopped has complete comparisons.
        train(
            [
                Job(level, arm, rate, seed, options.steps, evaluates=True)
                for seed in range(options.seeds)
                for (level, arm), rate in rates.items()
            ]
        )
    report(options.out, levels, arms, options.seeds, options.steps)


def _key(job: Job) -> str:
    """Return the key of a job."""
    return job.key


if __name__ == "__main__":
    main()
