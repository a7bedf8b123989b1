"""Draw the gain of token credit against the number of detours in a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures.plots import BLACK, BLUE, GREEN, ORANGE, plt

SHOWN = {
    "oracle": (GREEN, "^-"),
    "recommended": (BLUE, "o-"),
    "flow_sharp wide": (BLUE, "s--"),
    "max_attention": (ORANGE, "D-"),
    "flow paper": (BLACK, "v-"),
}
"""Arms of the curve, with colour and marker."""


def draw_dose_response(source: Path, target: Path) -> Path:
    """Draw gains over uniform with 95 % intervals: by number of detours, and for every arm and level.

    Args:
        source: report of the study.
        target: the picture.

    Returns:
        The picture.
    """
    content = json.loads(source.read_text())
    detours_of = {row["level"]: row["detours"] for row in content["rows"]}
    tests = [test for test in content["tests"] if test["against"] == "uniform" and test["metric"] == "area"]
    figure, (curve, gaps) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained", width_ratios=(1, 1.2))
    _draw_curve(curve, tests, detours_of)
    _draw_gaps(gaps, tests)
    # A figure without a date: the same results give the same file.
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return target


def _draw_curve(axis: Any, tests: list[dict[str, Any]], detours_of: dict[str, int | None]) -> None:
    """Draw the gain of a few arms against the number of detours."""
    for number, (arm, (colour, style)) in enumerate(SHOWN.items()):
        points = []
        for test in tests:
            detours = detours_of[test["level"]]
            if test["arm"] == arm and detours is not None:
                points.append((detours, test["difference"], test["half_width"]))
        if not points:
            continue
        points.sort()
        # Arms are a little apart, so that their intervals do not cover each other.
        places = [detours + 0.06 * (number - 2) for detours, _, _ in points]
        gains = [gain for _, gain, _ in points]
        widths = [width for _, _, width in points]
        axis.errorbar(places, gains, yerr=widths, fmt=style, color=colour, label=arm, capsize=2, markersize=5)
    axis.axhline(0, color=BLACK, linewidth=1)
    axis.set_xlabel("detours in a demonstration")
    axis.set_ylabel("mean reward over the run minus uniform's, 95 %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)


def _draw_gaps(axis: Any, tests: list[dict[str, Any]]) -> None:
    """Draw the gain of every arm at every level."""
    levels = list(dict.fromkeys(test["level"] for test in tests))
    arms = list(dict.fromkeys(test["arm"] for test in tests))
    markers = "osD^v"
    colours = (BLUE, ORANGE, GREEN, BLACK, "#cc79a7")
    for number, level in enumerate(levels):
        found = {test["arm"]: test for test in tests if test["level"] == level}
        rows = [arms.index(arm) + 0.14 * (number - len(levels) / 2) for arm in found]
        axis.errorbar(
            [test["difference"] for test in found.values()],
            rows,
            xerr=[test["half_width"] for test in found.values()],
            fmt=markers[number % len(markers)],
            color=colours[number % len(colours)],
            markersize=4,
            label=level,
        )
    axis.axvline(0, color=BLACK, linewidth=1)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_xlabel("mean reward over the run minus uniform's, 95 %")
    axis.legend(frameon=False, title="level")
