"""What every benchmark shares: medians, the machine, and the committed result file."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``run``; one call first to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall time of several functions, taken in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "date": date.today().isoformat(),
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "torch-geometric", "flowgraph-llm")},
    }


def save(name: str, rows: list[dict[str, Any]], notes: str) -> None:
    """Write ``results/<name>.json`` and print the rows."""
    RESULTS.mkdir(exist_ok=True)
    result = {"benchmark": name, "notes": notes, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows that share their keys."""
    names = list(rows[0])
    cells = [[f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(n), *(len(line[k]) for line in cells)) for k, n in enumerate(names)]
    for line in [names, *cells]:
        sys.stdout.write("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + "\n")
