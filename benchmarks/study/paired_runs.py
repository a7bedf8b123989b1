"""Training runs that are paired by seed: a log of finished runs, and comparisons over the seeds.

A run is a line of a JSON-lines file, written when it ends, so that a study continues where it was stopped. Runs of one
seed share problems and sampling noise.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flowgraph import holm

Job = TypeVar("Job")
Run = dict[str, Any]
"""A finished run: ``key``, ``reward`` of each step, and what the study adds; ``error`` in their place if it failed."""

_MOST_EXACT = 16
"""Sign patterns of up to this many pairs are listed; of more pairs, patterns are drawn."""
_DRAWN_PATTERNS = 200_000


def finished(log: Path) -> dict[str, Run]:
    """Read the finished runs of a log, by key; a last line that was cut off is no run."""
    if not log.exists():
        return {}
    runs = {}
    for line in log.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            run = json.loads(line)
            runs[run["key"]] = run
    return runs


def run_all(
    jobs: Sequence[Job], *, one_run: Callable[[Job], Run], key_of: Callable[[Job], str], log: Path, workers: int
) -> None:
    """Train every run that is not in the log yet, and append a line for each.

    Args:
        jobs: in the order in which they are started.
        one_run: trains a run in a process of its own; a function of a module.
        key_of: name of a run in the log.
        log: the file.
        workers: runs at a time.
    """
    known = finished(log)
    waiting = [job for job in jobs if key_of(job) not in known]
    if not waiting:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(log)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, log.open("a") as lines:
        futures = [pool.submit(one_run, job) for job in waiting]
        for number, future in enumerate(as_completed(futures), 1):
            run = future.result()
            lines.write(json.dumps(run) + "\n")
            lines.flush()
            outcome = run["error"] if "error" in run else f"{area(run):.4f}"
            print(f"{number}/{len(waiting)} {run['key']}: {outcome} in {run['seconds']:.0f} s", flush=True)


def _end_last_line(log: Path) -> None:
    """Remove a last line that was cut off when a study was stopped."""
    if log.exists():
        text = log.read_text()
        if text and not text.endswith("\n"):
            log.write_text(text[: text.rfind("\n") + 1])


def area(run: Run) -> float:
    """Return the metric: the mean reward over all steps."""
    return statistics.fmean(run["reward"])


def mean_curve(runs: Sequence[Run]) -> list[float]:
    """Return the mean reward over the runs at each step."""
    curves = [run["reward"] for run in runs]
    return [round(statistics.fmean(values), 4) for values in zip(*curves, strict=True)]


def mean_reward(runs: Sequence[Run], steps: slice) -> float:
    """Return the mean reward over some steps and all runs."""
    return statistics.fmean(statistics.fmean(run["reward"][steps]) for run in runs)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Compute the two-sided paired sign-flip test of mean 0: the share of sign patterns at least as extreme.

    All patterns of up to 16 pairs are listed; of more pairs 200,000 are drawn, and the observed one is counted with
    them, so that p is never 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    # The tolerance counts the observed pattern itself despite rounding.
    threshold = abs(values.sum()) - 1e-12
    if len(values) <= _MOST_EXACT:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values) >= threshold))
    random = np.random.default_rng(0)
    signs = random.choice([-1, 1], size=(_DRAWN_PATTERNS, len(values)))
    num_extreme = int(np.sum(np.abs(signs @ values) >= threshold))
    return (num_extreme + 1) / (_DRAWN_PATTERNS + 1)


def paired_test(one: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any] | None:
    """Compare two arms on the seeds that both have finished, with a t interval over seeds.

    Args:
        one: a figure by seed.
        other: the figure of the arm that is compared with, by seed.

    Returns:
        Difference, half the width of its 95 % interval, standard error, wins, pairs and p; None with fewer than two
        pairs.
    """
    from scipy import stats

    seeds = sorted(one.keys() & other.keys())
    paired = [one[seed] - other[seed] for seed in seeds]
    if len(paired) < 2:
        return None
    error = statistics.stdev(paired) / len(paired) ** 0.5
    return {
        "difference": statistics.fmean(paired),
        "half_width": float(stats.t.ppf(0.975, len(paired) - 1)) * error,
        "error": error,
        "wins": sum(difference > 0 for difference in paired),
        "n": len(paired),
        "p": sign_flip_p(paired),
    }


def add_holm(tests: Sequence[dict[str, Any]]) -> None:
    """Add Holm's adjusted p-values within one family of tests, as ``p_holm``."""
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
