"""Section "profile": which kernels a recorded forward pass and its solve spend their time in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import models
from benchmarks.gpu.context import Context
from benchmarks.gpu.credit import CASES, TOY_CASES, CreditBench, borrowed_policy, make_tokens
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import seconds_of

SHOWN = 25
"""Kernels and operators that are listed."""


def run(context: Context, record: Record) -> None:
    """Profile the first case of section "credit", forward pass and solve apart."""
    model = context.model()
    case = context.sized(CASES[0], TOY_CASES[0])
    record.notes.update(
        model=models.shape_of(model),
        case=case.name,
        columns="self_ms: time of the kernel itself; share: of all kernels; busy_share: all kernels over the wall time "
        "of the profiled call (the rest is launching and waiting); unprofiled_ms: the same call without the profiler",
    )
    with borrowed_policy(model, context) as policy:
        bench = CreditBench(policy, make_tokens(case, policy.causal_lm, context))
        # Once each without the profiler: the first calls load kernels.
        record.attempt("warm-up", lambda: (bench.score_recorded(), bench.solve()))
        for name, function in (("forward, recorded", bench.score_recorded), ("solve", bench.solve)):
            needs = context.sized(5.0, 0.0)
            record.attempt(name, partial(_profile, context, record, name, function), needs=needs)
        bench.forget()


def _profile(context: Context, record: Record, name: str, function: Callable[[], None]) -> None:
    unprofiled = seconds_of(function, context.device)
    on_gpu = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        wall = seconds_of(function, context.device)
    events = list(profiler.key_averages())

    # With a GPU, kernels are events of their own and operators carry the sum of theirs: both lists are useful.
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    time_of = _device_time if on_gpu else _cpu_time
    measured = kernels if on_gpu else operators
    total = sum(time_of(event) for event in measured)
    record.row(
        part=name,
        unprofiled_ms=1e3 * unprofiled,
        wall_ms=1e3 * wall,
        kernel_ms=total / 1e3 if on_gpu else None,
        busy_share=total / 1e6 / wall if on_gpu else None,
        num_launches=sum(event.count for event in measured),
        kernels=_top(kernels, time_of, total),
        operators=_top(operators, time_of, total),
    )
    first = _top(measured, time_of, total)[:3]
    context.say(f"profile: {name}: " + "; ".join(f"{row['name'][:50]} {row['share']:.0%}" for row in first))


def _top(events: list[Any], time_of: Callable[[Any], float], total: float) -> list[dict[str, Any]]:
    """The events with most time of their own, longest first."""
    ordered = sorted(events, key=time_of, reverse=True)[:SHOWN]
    return [
        {
            "name": event.key[:200],
            "count": event.count,
            "self_ms": time_of(event) / 1e3,
            "share": time_of(event) / total if total else 0.0,
        }
        for event in ordered
        if time_of(event) > 0
    ]


def _device_time(event: Any) -> float:
    """Microseconds on the GPU."""
    return float(event.self_device_time_total)


def _cpu_time(event: Any) -> float:
    """Microseconds on the CPU."""
    return float(event.self_cpu_time_total)
