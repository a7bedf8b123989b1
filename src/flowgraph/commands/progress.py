"""The progress of a long run: a bar with figures in a terminal, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console


@runtime_checkable
class RunState(Protocol):
    """What a run reports after every step."""

    @property
    def stage(self) -> str:
        """What is being done; a stage with " skipped: " reports something that was left out."""
        ...

    @property
    def done(self) -> int:
        """Finished parts."""
        ...

    @property
    def total(self) -> int:
        """All parts."""
        ...


State = TypeVar("State", bound=RunState)

_SECONDS_BETWEEN_LINES = 5.0
"""Time between the lines of progress where there is no terminal."""


@contextmanager
def reporting(
    figures: Callable[[State], str], *, quiet: bool, failed: Callable[[State], int] | None = None
) -> Iterator[Callable[[State], None]]:
    """Show a bar with figures on standard error; lines of text where that is not a terminal.

    A quiet run shows what was skipped, and no figures.

    Args:
        figures: counts, rates and time left as text.
        quiet: show no figures.
        failed: parts that ended without being done; none by default.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    def finished(state: State) -> int:
        return state.done + (0 if failed is None else failed(state))

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _ProgressLines(console, figures, finished, only_skipped=quiet)
        return
    # Stages contain text of the input, which must not be read as markup.
    columns = (BarColumn(), TextColumn("{task.fields[status]}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, status="starting")

        def report(state: State) -> None:
            stage = state.stage
            # What was skipped stays on the screen above the bar.
            if _is_skipped(stage):
                bar.console.print(stage, highlight=False, markup=False)
                stage = ""
            bar.update(task, total=state.total, completed=finished(state), status=f"{figures(state)}  {stage}")

        yield report


class _ProgressLines(Generic[State]):
    """Progress as plain lines: what was skipped at once, figures every few seconds and at the end.

    Attributes:
        console: where the lines are printed.
        figures: counts, rates and time left as text.
        finished: parts that are done or have failed.
        only_skipped: print no figures.
        last: clock reading at the latest figures.
        ended: whether the final figures were printed.
    """

    def __init__(
        self,
        console: Console,
        figures: Callable[[State], str],
        finished: Callable[[State], int],
        *,
        only_skipped: bool,
    ) -> None:
        self.console = console
        self.figures = figures
        self.finished = finished
        self.only_skipped = only_skipped
        self.last = -_SECONDS_BETWEEN_LINES
        self.ended = False

    def __call__(self, state: State) -> None:
        """Print the state if a line is due."""
        if _is_skipped(state.stage):
            self._print(state.stage)
            return
        if self.only_skipped:
            return
        now = time.monotonic()
        is_finished = self.finished(state) == state.total
        is_due = now - self.last >= _SECONDS_BETWEEN_LINES
        if is_due or (is_finished and not self.ended):
            self.last = now
            self.ended = is_finished
            self._print(self.figures(state))

    def _print(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _is_skipped(stage: str) -> bool:
    """Return whether a stage reports something that was left out."""
    return " skipped: " in stage


def clock(seconds: float) -> str:
    """Format a duration as ``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
