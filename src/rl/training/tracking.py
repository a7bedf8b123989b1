"""What a run shows and writes down: a live line, a JSONL file, and the trackers that accelerate knows."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph import MissingExtraError, OutputError, atomic_write

TRACKERS = ("tensorboard", "wandb", "trackio")
SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("kl_reference", "KL", "{:.3f}"),
    ("clip_share", "clipped", "{:.1%}"),
    ("entropy", "entropy", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("credit_overhead_percent", "credit", "{:.1f} %"),
)


def check_trackers(names: str | Sequence[str]) -> list[str]:
    """Refuse unknown trackers, and known ones whose package is missing, before any work is done.

    Raises:
        MissingExtraError: with the command that installs it.
        ConfigError: an unknown name.
    """
    from importlib.util import find_spec

    from rl.errors import ConfigError

    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"trackers: must be among {', '.join(TRACKERS)}, got {name!r}; metrics.jsonl is always written"
            )
        if find_spec(name) is None:
            raise MissingExtraError(f"trackers: {name!r} needs a package that is not installed; pip install {name}")
    return list(names)


class MetricsFile:
    """One JSON object a step, appended and flushed; after a resume, lines beyond the checkpoint are dropped.

    Args:
        path: of the file.
        finished: steps that the resumed run has behind it; 0 starts a new file.
    """

    def __init__(self, path: Path, finished: int) -> None:
        kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= finished] if path.exists() else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that JSON does not know become null.

        Raises:
            OutputError: the disk is full, or the folder is gone.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"output: metrics must fit into {self.path}, got: {error.strerror or error}; make room there and resume"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file up to the first that is none: a kill may have cut the last line in half."""
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
    """A live progress line on a terminal, a plain line now and then elsewhere.

    Args:
        total: steps of the run.
        finished: steps behind it.
        enabled: whether anything is shown.
    """

    def __init__(self, total: int, finished: int, *, enabled: bool) -> None:
        self.total, self.enabled = total, enabled
        self._live = enabled and sys.stderr.isatty()
        self._last = 0.0
        self._started, self._finished = time.monotonic(), finished
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Display:
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._progress.add_task("training", total=self.total, completed=self._finished, line="")
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a finished step."""
        line = ", ".join(f"{label} {form.format(row[key])}" for key, label, form in SHOWN if row.get(key) is not None)
        step = int(row["step"])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        elif self.enabled and (time.monotonic() - self._last > 10 or step == self.total):
            self._last = time.monotonic()
            rate = (time.monotonic() - self._started) / max(1, step - self._finished)
            print(f"step {step}/{self.total}: {line}, {rate * (self.total - step):.0f} s left", file=sys.stderr)  # noqa: T201

    def message(self, text: str) -> None:
        """A message beside the steps."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr)  # noqa: T201
