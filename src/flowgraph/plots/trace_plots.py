"""Figures of a trace, drawn with matplotlib on axes of yours or on new ones.

Nothing here shows a window or changes a global setting. Token text is data: it is never read as mathematics, and what
cannot be drawn, control characters or glyphs that no installed font has, is written as a sign or as its code point.
Colours are those of :mod:`flowgraph.pages.palette`, which also colours the pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flowgraph.comparison.compare import Comparison
from flowgraph.errors import InfeasibleFlowError, InvalidInputError, MissingExtraError
from flowgraph.files import PathLike, atomic_write
from flowgraph.pages.palette import PALETTE
from flowgraph.plots.drawing import COLOURS, INK, drawable, families, frame, mark_regions, place_labels
from flowgraph.steps.step_flow import By, StepFlow, step_flow
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_TICKS = (0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
_STEP_LABELS = 40
_NO_FLOW = "no flow: no question token reaches the answer"


def plot_throughput(
    trace: FlowTrace,
    *,
    ax: Axes | None = None,
    top: int = 12,
    max_bars: int = 400,
    scale: Literal["sqrt", "linear"] = "sqrt",
) -> Axes:
    """Throughput along the text: a bar per token, coloured by region, the strongest with their text.

    A text of more than ``max_bars`` tokens is drawn in bins of equally many tokens. A bar is then the *maximum* of its
    bin, in the colour of the token that has it, and the axis says so: no peak is averaged away.

    Args:
        trace: what to draw; without a flow the figure says that there is none.
        ax: where; new axes by default.
        top: label this many tokens, strongest first; one that finds no room without overlap is left out.
        max_bars: most bars to draw.
        scale: of the axis; ``"sqrt"`` keeps small shares visible beside an answer token that takes everything.

    Raises:
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``plot_throughput(trace).figure.savefig("throughput.png")``
    """
    _require_trace("trace", trace)
    _require_count("top", top, 0)
    _require_count("max_bars", max_bars, 1)
    if scale not in ("sqrt", "linear"):
        raise InvalidInputError(f"scale: must be 'sqrt' or 'linear', got {scale!r}; 'linear' has even ticks")
    ax = _axes(ax, (10, 4))
    throughput, regions = trace.throughput.numpy(), _regions(trace)
    width = math.ceil(trace.num_tokens / max_bars)
    starts = range(0, trace.num_tokens, width)
    peaks = np.array([start + int(throughput[start : start + width].argmax()) for start in starts])
    for region, colour in COLOURS.items():
        mine = np.array([regions[token] == region for token in peaks])
        if mine.any():
            left = np.array(starts)[mine]
            wide = np.minimum(width, trace.num_tokens - left)
            label = f"{region} ({_counted(regions.count(region), 'token')})"
            ax.bar(
                left + (wide - 1) / 2, throughput[peaks[mine]], wide * (0.86 if width == 1 else 1), color=colour,
                label=label, linewidth=0,
            )  # fmt: skip
    ax.set_xlim(-0.8, trace.num_tokens - 0.2)
    if scale == "sqrt":
        ax.set_yscale("function", functions=(_root, _square))
    highest = float(throughput.max()) if trace.feasible else 1.0
    ax.set_ylim(0, highest)
    if scale == "sqrt":  # the usual even ticks would leave the lower half of a root scale without any
        ax.set_yticks(_root_ticks(highest))
    ax.set_xlabel("token")
    ax.set_ylabel(
        ("throughput" if width == 1 else f"throughput, maximum of each {width} tokens")
        + (", root scale" if scale == "sqrt" else "")
    )
    _tidy(ax, trace)
    mark_regions(ax, regions)
    order = peaks[np.argsort(-throughput[peaks], kind="stable")][:top].tolist()
    place_labels(ax, [
        (t // width * width + (min(width, trace.num_tokens - t // width * width) - 1) / 2, float(throughput[t]),
         f"{drawable(trace.tokens[t])} ({throughput[t]:.2g})")
        for t in order if throughput[t] > 0
    ])  # fmt: skip
    return ax


def plot_potentials(trace: FlowTrace, *, ax: Axes | None = None) -> Axes:
    """h (influence on the answer) and g (influence from the question) along the text, on a log scale.

    A potential of 0 has no place on a log scale: those tokens are a gap in the curve and a mark at the foot of the
    figure, and the legend counts them. Potentials beyond the range of float64 are drawn where they belong.

    Args:
        trace: what to draw; an infeasible one has potentials too.
        ax: where; new axes by default.

    Raises:
        InvalidInputError: no trace.
        MissingExtraError: matplotlib is not installed.
    """
    _require_trace("trace", trace)
    ax = _axes(ax, (10, 4))
    flow, token = trace.flow, np.arange(trace.num_tokens)
    exponent = flow.exponent.numpy()
    meaning = {"h": "cannot reach the answer", "g": "nothing arrives from the question"}
    for name, mark, colour, shift, foot in (
        ("h", "o", PALETTE["answer"].light, 1, 0.06),
        ("g", "^", PALETTE["question"].light, -1, 0.02),
    ):
        value = getattr(flow, name).numpy()
        missing = value <= 0
        height = np.where(missing, np.nan, np.log10(np.where(missing, 1.0, value)) + shift * exponent * math.log10(2))
        size = 3.5 if trace.num_tokens <= 400 else 1.5
        ax.plot(token, height, mark + "-", color=colour, markersize=size, linewidth=0.7, label=name)
        if missing.any():
            ax.plot(
                token[missing], np.full(missing.sum(), foot), "|", color=colour, markersize=5, clip_on=False,
                transform=ax.get_xaxis_transform(),
                label=f"{name} = 0: {meaning[name]} ({_counted(int(missing.sum()), 'token')})",
            )  # fmt: skip
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = ax.get_ylim()
    middle, reach = (low + high) / 2, max((high - low) / 2, 1.0)  # at least two decades, so that some tick is whole
    ax.set_ylim(middle - 1.25 * reach, middle + reach)  # with room for the marks at the foot
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    ax.set_xlim(-0.8, trace.num_tokens - 0.2)
    ax.set_xlabel("token")
    ax.set_ylabel("potential, log scale")
    _tidy(ax, trace)
    mark_regions(ax, _regions(trace))
    return ax


def plot_steps(trace: FlowTrace, by: By = "auto", *, ax: Axes | None = None, min_flow: float = 0.01) -> Axes:
    """The steps from left to right, as high as their throughput, and the flow between them as bands of its width.

    A band is as wide as its flow where it leaves and arrives, in the units of the axis, so what enters and leaves a
    step fills its height. Steps without flow are left out, and of many steps only the highest are named. Bands below
    ``min_flow`` are left out too, and the title adds them up.

    Args:
        trace: a feasible trace.
        by: how to split the reasoning; see :meth:`flowgraph.FlowTrace.steps`.
        ax: where; new axes by default.
        min_flow: narrowest band drawn, a share of the flow in [0, 1].

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.
    """
    _require_trace("trace", trace)
    if not 0 <= min_flow <= 1:
        raise InvalidInputError(f"min_flow: must lie in [0, 1], got {min_flow!r}; 0.01 leaves out bands below 1 %")
    if not trace.feasible:
        raise InfeasibleFlowError(f"trace: must have a flow, got none ({_NO_FLOW[9:]}); check the regions")
    steps = step_flow(trace.flow, tokens=trace.tokens, spans=trace.spans, text=trace.text, by=by)
    drawn = [step for step in steps.steps if float(steps.throughput[step.index]) > 0]
    place = {step.index: x for x, step in enumerate(drawn)}
    ax = _axes(ax, (min(max(7.0, 0.75 * len(drawn)), 18.0), 5))
    heights = [float(steps.throughput[step.index]) for step in drawn]
    for region, colour in COLOURS.items():
        mine = [x for x, step in enumerate(drawn) if (step.region or "context") == region]
        if mine:
            ax.bar(mine, [heights[x] for x in mine], 0.24, color=colour, label=region, linewidth=0, zorder=3)
    summit, hidden = _bands(ax, steps, place, heights, min_flow)
    named = _spaced(heights, -(-len(drawn) // _STEP_LABELS))
    labels = [f"{drawable(drawn[x].text.strip(), 26)}  {heights[x]:.0%}" for x in named]
    ax.set_xticks(
        named, labels, rotation=38, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False,
        fontfamily=families(),
    )  # fmt: skip
    ax.set_xlim(-0.5, len(drawn) - 0.5)
    ax.set_ylim(0, max(summit, 1.0) * 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
    ax.set_ylabel("throughput", y=0.5 / ax.get_ylim()[1])
    thin = f"; bands below {min_flow:.2g} are not drawn, {hidden:.2g} in all" if hidden else ""
    _tidy(ax, trace, f"\nsteps by {drawable(steps.by, 60)}{thin}")
    ax.spines["left"].set_bounds(0, 1)
    return ax


def plot_comparison(comparison: Comparison, *, ax: Axes | None = None, top: int = 10) -> Axes:
    """Two throughputs along the aligned text, and their difference, second minus first, as bars.

    A unit that only one of the two has breaks the other's line; a mark at the foot says which of them has it.

    Args:
        comparison: what :func:`flowgraph.compare` found.
        ax: where; new axes by default.
        top: label this many units, the largest changes first; one that finds no room without overlap is left out.

    Raises:
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.
    """
    if not isinstance(comparison, Comparison):
        raise InvalidInputError(
            f"comparison: must be a Comparison, got {type(comparison).__name__}; flowgraph.compare(a, b) makes one"
        )
    _require_count("top", top, 0)
    ax = _axes(ax, (10, 4.5))
    values, present = comparison.throughput.numpy(), comparison.pairs.numpy() >= 0
    change, place = comparison.difference.numpy(), np.arange(len(values))
    more, less = PALETTE["flow"].light, PALETTE["less"].light
    # A has the colour of less flow in B, and B that of more; the bars are pale, so that the lines stand out.
    for bars, colour, label in ((change > 0, more, "more in B"), (change < 0, less, "less in B")):
        if bars.any():
            ax.bar(place[bars], change[bars], 0.9, color=colour, alpha=0.45, label=label, linewidth=0)
    for side, (name, colour, line) in enumerate((("A", less, "-"), ("B", more, "--"))):
        height = np.where(present[:, side], values[:, side], np.nan)
        label = f"{name}: {drawable(comparison.names[side], 40)}"
        ax.plot(place, height, line, marker=".", markersize=2.5, color=colour, linewidth=0.9, label=label)
        alone = present[:, side] & ~present[:, 1 - side]
        if alone.any():
            ax.plot(
                place[alone], np.full(alone.sum(), 0.02), "|", color=colour, markersize=5, clip_on=False,
                transform=ax.get_xaxis_transform(), label=f"only in {name} ({_counted(alone.sum(), 'unit')})",
            )  # fmt: skip
    ax.axhline(0, color=INK, linewidth=0.7)
    low, high = min(change.min(initial=0.0), 0.0), max(values.max(initial=0.0), 1e-12)
    ax.set_ylim(low - 0.06 * (high - low), high * 1.02)
    ax.set_xlim(-0.8, len(values) - 0.2)
    ax.set_xlabel(f"aligned {'groups of tokens' if comparison.by == 'characters' else comparison.by}")
    ax.set_ylabel("throughput, and its change")
    frame(ax, f"total variation {comparison.total_variation:.3f}, {comparison.num_matched} matched")
    order = [int(k) for k in np.argsort(-np.abs(change), kind="stable")[:top] if change[k]]
    place_labels(ax, [(k, float(values[k].max()), f"{drawable(comparison.text(k))} ({change[k]:+.2g})") for k in order])
    return ax


def _spaced(heights: Sequence[float], distance: int) -> list[int]:
    """Places at least ``distance`` apart, the highest first; all of them at distance 1."""
    chosen: list[int] = []
    for x in sorted(range(len(heights)), key=lambda x: -heights[x]):
        if all(abs(x - other) >= distance for other in chosen):
            chosen.append(x)
    return sorted(chosen)


def _bands(
    ax: Axes, steps: StepFlow, place: dict[int, int], heights: Sequence[float], min_flow: float
) -> tuple[float, float]:
    """Draw the flows, nested so that the longest jump is outermost; the highest point, and the flow not drawn."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    flows = [
        (place[source], place[target], flow)
        for (source, target), flow in zip(steps.edge_index.T.tolist(), steps.edge_flow.tolist(), strict=True)
    ]
    leaving, arriving = np.zeros(len(heights)), np.zeros(len(heights))
    foot: dict[tuple[int, int], list[float]] = {}
    for source, target, flow in sorted(flows, key=lambda band: band[1] - band[0]):
        foot[source, target] = [leaving[source], arriving[target]]  # the nearest neighbour lies at the bottom
        leaving[source] += flow
        arriving[target] += flow
    summit, hidden = max(heights), 0.0
    for source, target, flow in flows:
        if flow < min_flow:
            hidden += flow
            continue
        (low, end), jump = foot[source, target], target - source
        start_x, end_x = source + 0.12, target - 0.12
        rise = 0.0 if jump == 1 else max(heights[source + 1 : target]) + 0.07 * jump
        over = [(4 * rise - (low + end) / 2) / 3] * 2 if jump > 1 else [low, end]
        over = [max(rise, control, low, end) if jump > 1 else control for control in over]
        bend = min(0.5 * (end_x - start_x), 0.3 + 0.15 * jump)
        curve = [(start_x, low), (start_x + bend, over[0]), (end_x - bend, over[1]), (end_x, end)]
        upper = [(x, y + flow) for x, y in reversed(curve)]
        codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.CLOSEPOLY]
        outline = Curve([*curve, *upper, curve[0]], codes)
        ax.add_patch(PathPatch(outline, color=PALETTE["flow"].light, alpha=0.35, linewidth=0.6))
        summit = max(summit, (low + end) / 8 + 3 / 8 * sum(over) + flow)
    return summit, hidden


def save_figure(ax: Axes, path: PathLike, *, dpi: int = 160) -> Path:
    """Write the figure of some axes as PNG, SVG or PDF by its ending; the same drawing gives the same SVG.

    Raises:
        InvalidInputError: an ending that matplotlib does not write.
        OutputError: the path cannot be written.
    """
    from pathlib import Path

    import matplotlib

    kind, figure = Path(path).suffix.removeprefix(".").lower() or "png", ax.figure
    known = sorted(figure.canvas.get_supported_filetypes())
    if kind not in known:
        raise InvalidInputError(f"path: must end in one of {', '.join(known)}, got {str(path)!r}; use .png or .svg")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with atomic_write(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "flowgraph"}):
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=undated)  # type: ignore[union-attr]
    return Path(path)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
    except ImportError as error:
        raise MissingExtraError(
            'figures: need matplotlib, got an environment without it; pip install "flowgraph-llm[plot]"'
        ) from error
    if ax is None:
        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InvalidInputError(
            f"ax: must be matplotlib axes, got {type(ax).__name__}; pass one of plt.subplots()[1], or nothing"
        )
    return ax


def _root_ticks(highest: float) -> list[float]:
    """Ticks of a root scale up to ``highest``; an answer that takes everything may sum to a rounding below 1."""
    return [0.0, *(tick for tick in _TICKS if highest / 100 <= tick <= highest * (1 + 1e-9))]


def _root(value: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(value, 0.0))  # an axis asks below its range too


def _square(value: np.ndarray) -> np.ndarray:
    return np.square(value)


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _require_trace(name: str, trace: object) -> None:
    if not isinstance(trace, FlowTrace):
        raise InvalidInputError(
            f"{name}: must be a FlowTrace, got {type(trace).__name__}; trace() makes one, load_trace() reads one"
        )


def _require_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name}: must be a whole number, {least} or more, got {value!r}; leave it out")


def _regions(trace: FlowTrace) -> list[str]:
    """The region of each token, "context" outside the three."""
    names = ["context"] * trace.num_tokens
    for name in ("question", "reasoning", "answer"):
        for token in getattr(trace, name).nonzero().flatten().tolist():
            names[token] = name
    return names


def _tidy(ax: Axes, trace: FlowTrace, more: str = "") -> None:
    """What every figure of a trace says: the model, its size, and whether there is a flow at all."""
    model = drawable(str(trace.provenance.get("model") or "a model"), 60)
    frame(ax, f"{model}, {_counted(trace.num_tokens, 'token')}{more}")
    if not trace.feasible:
        ax.text(0.5, 0.5, _NO_FLOW, transform=ax.transAxes, ha="center", color=INK, parse_math=False)
