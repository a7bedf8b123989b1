"""What the commands have in common on a terminal: tables, and a line that says what is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """A console of rich, which takes its time to load."""
    from rich.console import Console

    return Console(stderr=stderr)


def table(*columns: str, figures: bool = False) -> Table:
    """An empty table.

    Args:
        columns: headings.
        figures: all columns but the first hold numbers and stand to the right; the first is never wrapped.
    """
    from rich import box
    from rich.table import Table

    empty = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        empty.add_column(column, justify="right" if figures and number else "left", no_wrap=figures and number == 0)
    return empty


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A spinner with one line on a terminal; nothing elsewhere."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda text: None
        return
    with screen.status("starting") as status:
        yield status.update
