"""Make the figures that all pictures of this package share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from flowgraph import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def embedded_fonts() -> AbstractContextManager[None]:
    """Return a context in which fonts are embedded as TrueType."""
    import matplotlib

    return matplotlib.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42})


def new_figure(width: float, height: float) -> Figure:
    """Create a figure without matplotlib's global state, so that no display is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plot: needs matplotlib, got an environment without it; pip install 'flowgraph-llm[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
