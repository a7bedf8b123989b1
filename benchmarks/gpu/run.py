"""Run the sections one after another: each is isolated, has a part of the time, and leaves its JSON behind at once."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.context import Context, DeviceLostError
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import SCHEMA, Record, describe, write_json
from benchmarks.gpu.timing import GIB, release

PACKAGES = ("flowgraph-llm", "torch", "transformers", "torch-geometric", "peft", "accelerate", "numba", "triton")


class OutOfTime(BaseException):
    """A section exceeded its hard limit. No ``except Exception`` on the way may swallow it."""


@dataclass(frozen=True)
class Section:
    """One section of the benchmark.

    Attributes:
        name: on the command line and of its file.
        title: one line that says what it measures.
        run: fills the record.
        share: its part of the budget, relative to those of the other sections that are still to run.
        least: seconds below which it is not begun, at the full sizes.
    """

    name: str
    title: str
    run: Callable[[Context, Record], None]
    share: float
    least: float


def run_sections(options: Options, sections: Sequence[Section]) -> int:
    """Run the sections that were asked for; returns the exit code, 0 if all of them ran and all checks held."""
    summary = _opened(options)
    # A run that another process began keeps the clock of that process.
    spent = time.time() - summary["started"]
    context = Context(options.device, options.toy, options.seed, time.perf_counter() - spent)
    context.say(f"run {summary['run']} on {summary['device'].get('name', options.device)}, budget {options.budget:g} s")
    waiting = [section for section in sections if section.name in options.sections]
    waiting = [section for section in waiting if section.name not in summary["sections"]]

    while waiting:
        section = waiting.pop(0)
        left = options.budget - (time.perf_counter() - context.began)
        limit = left * section.share / (section.share + sum(other.share for other in waiting))
        record = Record(section.name, section.title, options.out / f"{section.name}.json", context, limit)
        lost = _run_one(section, record, left, 0.0 if options.toy else section.least)
        summary["sections"][section.name] = record.summary()
        _save(summary, options, context)
        if lost and waiting:
            context.say("the device no longer answers; a new process goes on with the other sections")
            return _continue_in_new_process(options, summary["run"])

    passed = all(summary["sections"][name]["passed"] for name in options.sections)
    summary["exit_code"] = 0 if passed else 1
    summary["finished"] = True
    _save(summary, options, context)
    _print_outcome(summary, context)
    return summary["exit_code"]


def _run_one(section: Section, record: Record, left: float, least: float) -> bool:
    """Run a section and write its file; returns whether the device was lost."""
    context = record.context
    # A section that cannot say anything in the time that is left is recorded as skipped, with the figures.
    if left <= 0 or record.limit < least:
        record.status = "skipped"
        record.message = (
            f"budget: must leave at least {least:.0f} s for this section, got {max(record.limit, 0.0):.1f} s; raise "
            "--budget or name fewer --sections"
        )
        context.say(f"{section.name}: skipped: {record.message}")
        record.save()
        return False

    context.say(f"{section.name}: {section.title} (up to {record.limit:.0f} s)")
    start = time.perf_counter()
    context.section_ends = start + record.limit
    lost = False
    # The parts look at the clock themselves; the alarm is for a part that takes far longer than foreseen.
    hard_limit = min(1.5 * record.limit, left)
    try:
        with _alarm(hard_limit):
            section.run(context, record)
        record.status = "incomplete" if record.failures or record.skipped else "complete"
    except OutOfTime:
        record.status = "timed out"
        record.message = f"stopped after {time.perf_counter() - start:.0f} s; the rows so far are in this file"
    except DeviceLostError as error:
        record.status = "failed"
        record.message = describe(error)
        lost = True
    except Exception as error:  # noqa: BLE001  (one section must never take the others with it)
        record.status = "failed"
        record.message = describe(error)
        record.failures.append({"part": section.name, "message": record.message, "traceback": traceback.format_exc()})
    record.seconds = time.perf_counter() - start
    record.save()
    context.say(f"{section.name}: {record.status} after {record.seconds:.1f} s" + _reason(record))
    return lost or not _freed(context)


def _freed(context: Context) -> bool:
    """Free what the section left behind; False where the device no longer answers."""
    try:
        release(context.device)
    except RuntimeError:
        return False
    return context.device_answers()


def _reason(record: Record) -> str:
    return f": {record.message}" if record.message else ""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the block after so many seconds, where the platform has such a timer."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _continue_in_new_process(options: Options, run: str) -> int:
    """Replace this process, whose GPU context is broken, by one that goes on with the sections not yet run."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), "--continue", run]
    command += ["--sections", ",".join(options.sections), "--budget", str(options.budget), "--seed", str(options.seed)]
    command += ["--device", str(options.device)] + (["--toy"] if options.toy else [])
    sys.stdout.flush()
    os.execv(sys.executable, command)
    return 1  # only where execv is replaced by a test


def _opened(options: Options) -> dict[str, Any]:
    """The summary of a new run, written at once, or of the run that this process goes on with."""
    path = options.out / "summary.json"
    if options.continued is not None:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["run"] == options.continued:
            found["processes"] += 1
            return found
    summary = {
        "schema": SCHEMA,
        "benchmark": "gpu",
        "run": f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
        "started": time.time(),
        "processes": 1,
        "seconds": 0.0,
        "budget_seconds": options.budget,
        "toy": options.toy,
        "seed": options.seed,
        "asked": list(options.sections),
        "machine": machine_facts(),
        "device": device_facts(options.device),
        "sections": {},
        "finished": False,
        "exit_code": None,
    }
    write_json(path, summary)
    return summary


def _save(summary: dict[str, Any], options: Options, context: Context) -> None:
    summary["seconds"] = time.perf_counter() - context.began
    write_json(options.out / "summary.json", summary)


def _print_outcome(summary: dict[str, Any], context: Context) -> None:
    for name in summary["asked"]:
        section = summary["sections"][name]
        checks = f"{section['num_checks'] - len(section['failed_checks'])} of {section['num_checks']} checks hold"
        context.say(f"{name:12} {section['status']:10} {section['seconds']:6.1f} s  {checks}")
    outcome = "every section ran and every check holds" if summary["exit_code"] == 0 else "not everything ran or holds"
    context.say(f"{outcome}; exit code {summary['exit_code']}")


def machine_facts() -> dict[str, Any]:
    """Processor, memory and versions; a package that is not installed as such has the version None."""
    import psutil

    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver and library versions of the device."""
    if device.type != "cuda":
        return {"type": device.type, "name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None
