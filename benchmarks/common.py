"""Measure time and memory, describe the machine, and write the committed result file of a benchmark."""

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
    """Measure the median wall time of ``run``, in seconds; one call first warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Measure the median wall time of several functions, in turns, so that a busy machine slows all of them alike."""
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
    """The peak resident size of this process above its size on entry, sampled every two milliseconds.

    On Linux, memory that the process freed before is first returned to the system, so that its reuse is counted.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._before = self._process.memory_info().rss
        self._peak = self._before
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
        """Return the peak in MiB."""
        return (self._peak - self._before) / 2**20


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that the figures were measured with."""
    packages = ("torch", "transformers", "torch-geometric", "flowgraph-llm")
    return {
        "date": date.today().isoformat(),
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def save(name: str, rows: list[dict[str, Any]], notes: str, hide: Sequence[str] = ()) -> None:
    """Write ``results/<name>.json`` and print the rows, without the columns to hide."""
    RESULTS.mkdir(exist_ok=True)
    result = {"benchmark": name, "notes": notes, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = [{key: value for key, value in row.items() if key not in hide} for row in rows]
    print_table(shown)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows that share their keys."""
    names = list(rows[0])
    lines = [names]
    for row in rows:
        lines.append([_cell(row[name]) for name in names])
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(padded) + "\n")


def _cell(value: Any) -> str:
    """Format a value; three digits are enough for a float."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
