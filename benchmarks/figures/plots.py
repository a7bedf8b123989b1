"""Draw the committed results into docs/images/.

pip install --group bench
python -m benchmarks.figures.plots
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]

matplotlib.use("agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
from matplotlib.ticker import StrMethodFormatter  # pyright: ignore[reportMissingImports]

from benchmarks.common import RESULTS

IMAGES = Path(__file__).parents[2] / "docs" / "images"
# Okabe and Ito's palette: the colours can be told apart with any common colour vision, on white and on grey.
BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#009e73"
BLACK = "#444444"
plt.rcParams |= {
    "svg.hashsalt": "flowgraph",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Read the rows of a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def powers_of_two(axis: Axes, ticks: list[int]) -> None:
    """Give an axis a logarithmic scale of tokens, with labels such as 512 and 4k."""
    labels = [f"{tokens // 1024}k" if tokens >= 1024 else str(tokens) for tokens in ticks]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, labels)
    axis.set_xlabel("tokens")


def plain_numbers(axis: Axes) -> None:
    """Label the vertical axis with plain numbers in place of powers."""
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def streaming() -> None:
    """Draw memory and time of a trace over its length."""
    rows = rows_of("streaming")
    tokens = [row["tokens"] for row in rows]
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    memory.plot(tokens, [row["matrix_mib"] for row in rows], "--", color=BLACK, label="one T x T matrix, float32")
    memory.plot(tokens, [row["trace_mib"] for row in rows], "o-", color=BLUE, label="trace, above the model")
    memory.plot(tokens, [row["forward_mib"] for row in rows], "s-", color=GREEN, label="its forward pass alone")
    memory.set_yscale("log", base=2)
    memory.set_ylabel("MiB")
    memory.legend(frameon=False)
    time.plot(tokens, [row["trace_s"] for row in rows], "o-", color=BLUE, label="trace")
    time.plot(tokens, [row["forward_s"] for row in rows], "s-", color=GREEN, label="its forward pass alone")
    time.set_yscale("log", base=10)
    time.set_ylabel("seconds, 2 cores")
    time.legend(frameon=False)
    for axis in (memory, time):
        powers_of_two(axis, tokens)
        plain_numbers(axis)
    write(figure, "streaming")


def engine() -> None:
    """Draw the time of both sweeps as a multiple of one read of their input."""
    figure, (dense, batch) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for dtype, marker in (("float32", "o-"), ("float64", "s-")):
        rows = [row for row in rows_of("engine_dense") if row["dtype"] == dtype]
        tokens = [row["tokens"] for row in rows]
        dense.plot(tokens, [row["numba_sweeps_ratio"] for row in rows], marker, color=BLUE, label=f"numba, {dtype}")
        dense.plot(tokens, [row["torch_sweeps_ratio"] for row in rows], marker, color=ORANGE, label=f"torch, {dtype}")
    powers_of_two(dense, tokens)
    dense.set_yscale("log", base=2)
    dense.axhline(2, color=BLACK, linestyle="--", linewidth=1, label="two reads")
    dense.set_ylabel("both sweeps / one read of the triangle")
    dense.legend(frameon=False)
    rows = rows_of("engine_batch")
    labels = [f"{row['graphs']} x {row['tokens']:,}\n{row['edges'] / 1e6:.1f}M edges" for row in rows]
    for offset, name, colour in ((-0.2, "numba", BLUE), (0.2, "scatter", ORANGE)):
        batch.bar(
            [k + offset for k in range(len(rows))], [r[f"{name}_ratio"] for r in rows], 0.4, color=colour, label=name
        )
    batch.set_xticks(range(len(rows)), labels, fontsize=8)
    batch.set_yscale("log", base=2)
    batch.set_ylim(bottom=1)
    batch.set_ylabel("complete solve / one read of the edges")
    batch.legend(frameon=False)
    for axis in (dense, batch):
        plain_numbers(axis)
    write(figure, "engine")


def peers() -> None:
    """Draw time and memory of a trace by flowgraph and by FlashTrace."""
    rows = rows_of("flashtrace")
    tokens = [row["tokens"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, unit, label in ((axes[0], "s", "seconds, 2 cores"), (axes[1], "mib", "MiB above the model")):
        axis.plot(tokens, [row[f"flowgraph_{unit}"] for row in rows], "o-", color=BLUE, label="flowgraph")
        axis.plot(tokens, [row[f"flashtrace_{unit}"] for row in rows], "s-", color=ORANGE, label="FlashTrace 0.1.1")
        axis.set_yscale("log", base=10)
        axis.set_ylabel(label)
        axis.legend(frameon=False)
        powers_of_two(axis, tokens)
        plain_numbers(axis)
    write(figure, "flashtrace")


def study() -> None:
    """Draw learning curves of some arms, and every arm's difference to uniform."""
    content = json.loads((RESULTS / "rl_study.json").read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    figure, (curves, gaps) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(1.1, 1))
    shown = {"uniform": BLACK, "flow": BLUE, "oracle": GREEN, "flow x entropy, soft": ORANGE}
    for arm, colour in shown.items():
        values = rows[arm]["curve"]
        # Mean of the last five steps.
        windows = [values[max(0, step - 4) : step + 1] for step in range(len(values))]
        smooth = [sum(window) / len(window) for window in windows]
        curves.plot(range(1, len(values) + 1), smooth, color=colour, label=arm)
    curves.set_xlabel("step")
    curves.set_ylabel(f"reward on new problems, {rows['uniform']['seeds']} seeds")
    curves.legend(frameon=False)
    tests = [row for row in content["tests"] if row["against"] == "uniform"]
    tests.sort(key=lambda row: row["difference"])
    places = range(len(tests))
    gaps.errorbar(
        [row["difference"] for row in tests],
        places,
        xerr=[row["half_width"] for row in tests],
        fmt="o",
        color=BLUE,
        capsize=3,
    )
    gaps.axvline(0, color=BLACK, linewidth=1)
    gaps.set_yticks(places, [row["arm"] for row in tests])
    gaps.set_xlabel("area under the curve minus uniform's, 95 %")
    write(figure, "rl_study")


def alignment() -> None:
    """Draw every arm's sample multiplier before training and in mid-training, best first."""
    found = {
        name: json.loads((RESULTS / f"alignment_{name}" / "alignment.json").read_text()) for name in ("start", "mid")
    }
    arms = {name: {arm["name"]: arm for arm in content["arms"]} for name, content in found.items()}
    order = sorted(arms["start"], key=lambda arm: arms["start"][arm]["multiplier"]["corrected"])
    figure, axis = plt.subplots(figsize=(8, 7.5), layout="constrained")
    axis.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    for offset, name, colour, marker, label in (
        (0.15, "start", BLUE, "o", "at the start"),
        (-0.15, "mid", ORANGE, "s", "in mid-training"),
    ):
        estimates = [arms[name][arm]["multiplier"] for arm in order]
        axis.errorbar(
            [one["corrected"] for one in estimates],
            [place + offset for place in range(len(order))],
            xerr=[1.96 * one["error"] for one in estimates],
            fmt=marker,
            color=colour,
            markersize=5,
            label=f"{label}: {found[name]['num_batches']} batches, reward {found[name]['reward']:.2f}",
        )
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("sample multiplier of the policy gradient (1 = uniform), 95 %")
    axis.legend(frameon=False, loc="lower right")
    write(figure, "rl_alignment")


def write(figure: Any, name: str) -> None:
    """Write a figure without a date, so that the same results give the same file."""
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    for draw in (streaming, engine, peers, study, alignment):
        draw()
