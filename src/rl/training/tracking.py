"""The output of a run: a live line, a JSONL file, and the trackers that accelerate supports."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph import MissingExtraError, OutputError, atomic_write
from rl.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "trackio")
SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("answer_share", "answers", "{:.0%}"),
    ("kl_reference", "KL", "{:.3f}"),
    ("clip_share", "clipped", "{:.1%}"),
    ("entropy", "entropy", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("credit_overhead_percent", "credit", "{:.1f} %"),
)
"""Metrics of the progress line: name in the row, label, format."""
_SECONDS_BETWEEN_LINES = 10
"""Without a terminal, a step is shown only so long after the one before."""


def check_trackers(names: str | Sequence[str]) -> list[str]:
    """Reject unknown trackers, and known ones whose package is missing, before any work is done.

    Args:
        names: of ``TRACKERS``.

    Returns:
        The names as a list.

    Raises:
        MissingExtraError: a package is missing; the message has the command that installs it.
        ConfigError: an unknown name.
    """
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"trackers: must be among {', '.join(TRACKERS)}, got {name!r}; metrics.jsonl is always written"
            )
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"trackers: {name!r} needs a package that is not installed; pip install {name}")
    return list(names)


class MetricsFile:
    """A file with one JSON object a step, appended and flushed; a resume drops the lines beyond the checkpoint.

    Args:
        path: of the file.
        finished: finished steps of the resumed run; 0 starts a new file.

    Attributes:
        path: of the file.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, finished: int) -> None:
        # The steps after the checkpoint are made again, and with them their rows.
        kept = []
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= finished]
        lines = [f"{json.dumps(row)}\n" for row in kept]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; NaN and infinity become null, because JSON has no such numbers.

        Raises:
            OutputError: the disk is full, or the folder is missing.
        """
        clean: dict[str, Any] = {}
        for name, value in row.items():
            is_json = not isinstance(value, float) or math.isfinite(value)
            clean[name] = value if is_json else None

        # Flushed to the disk, so that a crash of the machine loses no finished step.
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"output: metrics must fit into {self.path}, got: {error.strerror or error}; make room there and resume"
            ) from error


def set_aside(path: Path, finished: int) -> Path | None:
    """Copy a metrics file that holds rows beyond the finished steps to ``metrics-001.jsonl`` or the next free number.

    A new start or changed settings make these rows again with other values; a plain resume makes them again as they
    were.

    Args:
        path: of the file; it stays as it is.
        finished: finished steps of the run.

    Returns:
        The copy; None where no row would be lost.

    Raises:
        OutputError: the copy cannot be written.
    """
    if not path.exists() or all(row["step"] <= finished for row in read_metrics(path)):
        return None
    # The first free number: earlier copies stay.
    number = 1
    copy = path.with_name(f"{path.stem}-{number:03d}{path.suffix}")
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.stem}-{number:03d}{path.suffix}")
    with atomic_write(copy) as temporary:
        temporary.write_bytes(path.read_bytes())
    return copy


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file up to the first invalid line: a kill may have cut the last line in half."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class Display:
    """A live progress line on a terminal, an occasional plain line elsewhere.

    Args:
        total: steps of the run.
        finished: steps that are finished already.
        enabled: whether anything is shown.

    Attributes:
        total: steps of the run.
        enabled: whether anything is shown.
    """

    def __init__(self, total: int, finished: int, *, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self._is_live = enabled and sys.stderr.isatty()
        self._last_shown = 0.0
        self._started = time.monotonic()
        self._finished = finished
        self._progress: Any = None
        self._task: Any = None
        self._evaluation = ""

    def __enter__(self) -> Display:
        if self._is_live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("training", total=self.total, completed=self._finished, line="")
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a finished step."""
        # Only the metrics that this step has.
        shown = []
        for name, label, form in SHOWN:
            value = row.get(name)
            if value is not None:
                shown.append(f"{label} {form.format(value)}")
        # The last evaluation stays in the line until the next one.
        if row.get("eval_reward") is not None:
            best = f"best {row['eval_best_reward']:.3f} at step {row['eval_best_step']}"
            self._evaluation = f"eval {row['eval_reward']:.3f} ({best})"
        if self._evaluation:
            shown.append(self._evaluation)
        line = ", ".join(shown)
        step = int(row["step"])

        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        elif self.enabled:
            self._print_now_and_then(step, line)

    def message(self, text: str) -> None:
        """Show a message between the steps."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr)  # noqa: T201

    def warn(self, text: str) -> None:
        """Show a warning between the steps; where nothing is shown, log it."""
        if self.enabled:
            self.message(f"warning: {text}")
        else:
            logging.getLogger("rl").warning(text)

    def notice_signal(self, name: str) -> None:
        """Print that a signal was received, from inside its handler."""
        text = f"{name}: the running step ends with a checkpoint; a second one stops at once\n"
        # The signal may have interrupted a print, whose buffer must not be entered twice: write to the file itself.
        if self.enabled and sys.__stderr__ is not None:
            os.write(sys.__stderr__.fileno(), text.encode())

    def _print_now_and_then(self, step: int, line: str) -> None:
        """Print a line if the last one is some seconds old, and for the last step."""
        now = time.monotonic()
        is_recent = now - self._last_shown <= _SECONDS_BETWEEN_LINES
        if is_recent and step != self.total:
            return
        self._last_shown = now

        # The pace of this run alone: steps before a resume took time that is not measured here.
        num_steps = max(1, step - self._finished)
        seconds_per_step = (now - self._started) / num_steps
        seconds_left = seconds_per_step * (self.total - step)
        print(f"step {step}/{self.total}: {line}, {seconds_left:.0f} s left", file=sys.stderr)  # noqa: T201
