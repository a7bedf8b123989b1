"""Multipliers of all arms as horizontal intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowgraph import MissingExtraError, atomic_write
from rl.alignment.multipliers import Alignment, ArmAlignment
from rl.evaluation.significance import Z_95

# Okabe and Ito's colours: told apart by people with any common kind of colour vision; the markers differ as well.
_SERIES = (
    ("multiplier", "weighted as trained", "#0072B2", "o"),
    ("only_selected", "only the selected tokens", "#D55E00", "^"),
    ("only_rest", "only the other tokens", "#009E73", "s"),
)


def plot_alignment(alignment: Alignment, path: str | Path) -> Path:
    """Write a picture (PNG, PDF or SVG by its ending): best arm first, 95 % intervals, a line at uniform's 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the path cannot be written.
    """
    figure_type = _figure_type()
    arms = sorted(alignment.arms, key=lambda arm: arm.multiplier.corrected)
    figure = figure_type(figsize=(8, 1.6 + 0.55 * len(arms)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="#555555", linewidth=1, linestyle="--")
    for offset, series in zip((0.22, 0.0, -0.22), _SERIES, strict=True):
        _draw(axes, arms, offset, *series)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_xlabel("sample multiplier (1 = uniform; 1.1 = as good as 10 % more rollouts), 95 % interval")
    axes.set_title(f"Gradient alignment, {alignment.num_batches} batches", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="best")
    target = Path(path)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi=160, format=target.suffix.removeprefix(".") or "png")
    return target


def _draw(axes: Any, arms: list[ArmAlignment], offset: float, name: str, label: str, colour: str, marker: str) -> None:
    found = [(row + offset, getattr(arm, name)) for row, arm in enumerate(arms) if getattr(arm, name) is not None]
    if not found:
        return
    middle = [estimate.corrected for _, estimate in found]
    reach = [Z_95 * estimate.error for _, estimate in found]
    axes.errorbar(
        middle, [row for row, _ in found], xerr=reach, fmt=marker, color=colour, label=label, markersize=5,
        linewidth=1.4, linestyle="none", capsize=0,
    )  # fmt: skip


def _figure_type() -> Any:
    """Matplotlib's figure without its global state, so that no display is looked for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plot: needs matplotlib, got an environment without it; pip install 'flowgraph-llm[plot]'"
        ) from error
    return Figure
