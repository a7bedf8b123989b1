"""Write tables and a status line to the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NAME_WIDTH = 28
"""Most characters of a name in one line of a table of figures; six figures fit beside it into 80 columns."""


def console(*, stderr: bool = False) -> Console:
    """Return a console of rich, which is imported here because it loads slowly."""
    from rich.console import Console

    return Console(stderr=stderr)


def table(*columns: str, figures: bool = False) -> Table:
    """Return an empty table.

    Args:
        columns: headings.
        figures: whether all columns but the first hold numbers. They are then aligned to the right, and a long name in
            the first is folded, so that the headings of the others stay whole.
    """
    from rich import box
    from rich.table import Table

    empty = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        is_name = number == 0
        if figures and is_name:
            empty.add_column(column, overflow="fold", max_width=_NAME_WIDTH)
        elif figures:
            empty.add_column(column, justify="right")
        else:
            empty.add_column(column)
    return empty


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """Show a spinner with one line on a terminal, and nothing elsewhere; yield the function that sets the line."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda text: None
        return
    with screen.status("starting") as status:
        yield status.update
