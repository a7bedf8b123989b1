"""Time and memory of functions whose work runs asynchronously on a GPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

GIB = 2**30
"""Bytes of a GiB."""


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Hand unused memory back to the device, so that the next measurement starts from the same state."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on the device may take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 5,
    limit: float = 20.0,
    prepare: Callable[[], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time several functions in turns, so that a change of clock rate or load meets all of them alike.

    Args:
        runs: the functions, by name.
        device: where they work.
        repeats: rounds after one warm-up round.
        limit: seconds after which no further round is begun. If the warm-up round alone takes longer, its own times are
            returned and ``warm`` is False.
        prepare: called before every single call, outside its time.

    Returns:
        Of each function ``median_s``, ``min_s``, ``max_s``, ``repeats`` and ``warm``.
    """
    began = time.perf_counter()

    def timed(run: Callable[[], object]) -> float:
        if prepare is not None:
            prepare()
        return seconds_of(run, device)

    # The first call of a kernel loads and selects code, so its time is kept only where there is no other.
    cold = {name: timed(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        if time.perf_counter() - began > limit:
            break
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: _figures(times[name], cold[name]) for name in runs}


def measure(run: Callable[[], object], device: torch.device, **options: Any) -> dict[str, Any]:
    """Time one function; options and result as for :func:`alternate`."""
    return alternate({"run": run}, device, **options)["run"]


def peak_gib(run: Callable[[], object], device: torch.device) -> float:
    """Peak memory of one call above what was in use before it, in GiB; NaN where PyTorch keeps no count (CPU)."""
    if device.type != "cuda":
        run()
        return math.nan
    release(device)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of a copy inside the device's memory, bytes read and bytes written both counted."""
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, repeats=20, limit=5.0)
    return 2 * source.numel() * source.element_size() / timing["median_s"]


def _figures(times: list[float], cold: float) -> dict[str, Any]:
    used = times or [cold]
    return {
        "median_s": statistics.median(used),
        "min_s": min(used),
        "max_s": max(used),
        "repeats": len(used),
        "warm": bool(times),
    }
