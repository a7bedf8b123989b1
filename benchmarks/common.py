"""What every benchmark shares: medians, the machine, and the committed result file."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
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


class PeakMemory:
    """Peak resident size of this process above what it was on entry, sampled every two milliseconds.

    On Linux what the process had freed before is handed back first, so that it is counted again.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._watcher.join()

    @property
    def mib(self) -> float:
        """The peak, in MiB."""
        return (self._peak - self._before) / 2**20


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


def save(name: str, rows: list[dict[str, Any]], notes: str, hide: Sequence[str] = ()) -> None:
    """Write ``results/<name>.json`` and print the rows, without the columns to hide."""
    RESULTS.mkdir(exist_ok=True)
    result = {"benchmark": name, "notes": notes, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table([{key: value for key, value in row.items() if key not in hide} for row in rows])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows that share their keys."""
    names = list(rows[0])
    cells = [[f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(n), *(len(line[k]) for line in cells)) for k, n in enumerate(names)]
    for line in [names, *cells]:
        sys.stdout.write("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + "\n")
