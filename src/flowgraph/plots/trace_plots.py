"""Figures of a trace, drawn with matplotlib on the caller's axes or on new ones.

Colours are those of :mod:`flowgraph.display.palette`, which also colours the pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from flowgraph.display.palette import PALETTE
from flowgraph.errors import InfeasibleFlowError, InvalidInputError
from flowgraph.plots.drawing import (
    COLOURS,
    INK,
    FigureSize,
    Label,
    axes_or_new,
    counted,
    drawable,
    finish_axes,
    font_families,
    mark_by_hatch,
    mark_missing,
    mark_regions,
    place_labels,
    require_count,
    text_size,
    thin_ticks,
)
from flowgraph.steps.step_flow import By, Step, StepFlow, step_flow
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.payload import token_regions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOT_TICKS = (0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
_MAX_STEP_LABELS = 40
_MAX_NARROW_STEP_LABELS = 14
"""Names of steps below the axis, and those below an axis as narrow as a column of a paper."""
_STEP_NAME = 26
_NARROW_STEP_NAME = 10
"""Characters of such names."""
_STEP_TEXT_SIZE = 8.0
_LOW = 3.5
"""Height of a figure in inches below which names of steps are short."""
_HALF_BAR = 0.12
"""Half the width of a step's bar; the steps are 1 apart."""
_NO_ROUTE = "no question token reaches the answer"


def plot_throughput(
    trace: FlowTrace,
    *,
    ax: Axes | None = None,
    top: int = 12,
    max_bars: int = 400,
    scale: Literal["sqrt", "linear"] = "sqrt",
    size: FigureSize | None = None,
) -> Axes:
    r"""Draw the throughput along the text: a bar per token, coloured by region, the strongest with their text.

    The throughput of token t is :math:`f_t = h_t g_t`. A text of more than ``max_bars`` tokens is drawn in bins of
    equally many tokens. A bar is then the *maximum* of its bin, so that no peak is averaged away, in the colour of the
    token that has it; the label of the axis names the bin width.

    Args:
        trace: what to draw; a trace without a flow gives empty axes with a note.
        ax: where; new axes by default.
        top: label this many tokens, strongest first; one that fits nowhere without overlap is left out.
        max_bars: most bars to draw.
        scale: of the axis; ``"sqrt"`` keeps small shares visible beside an answer token that takes everything.
        size: of a new figure: ``"single"`` or ``"double"`` column of a paper, or width and height in inches.

    Returns:
        The axes.

    Raises:
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``plot_throughput(trace).figure.savefig("throughput.png")``
    """
    _require_trace(trace)
    require_count("top", top, 0)
    require_count("max_bars", max_bars, 1)
    if scale not in ("sqrt", "linear"):
        raise InvalidInputError(f"scale: must be 'sqrt' or 'linear', got {scale!r}; 'linear' has even ticks")
    ax = axes_or_new(ax, (10, 4), size)

    # One bar per bin, as high as its strongest token.
    throughput = trace.throughput.numpy()
    regions = _region_names(trace)
    bin_width = math.ceil(trace.num_tokens / max_bars)
    bin_start = np.arange(0, trace.num_tokens, bin_width)
    bin_stop = np.minimum(bin_start + bin_width, trace.num_tokens)
    peak = np.array([start + int(throughput[start : start + bin_width].argmax()) for start in bin_start])
    width = bin_stop - bin_start
    middle = bin_start + (width - 1) / 2
    # Bars of single tokens leave a gap between them; bins touch.
    drawn_width = width * (0.86 if bin_width == 1 else 1)
    for region, colour in COLOURS.items():
        chosen = np.array([regions[token] == region for token in peak])
        if chosen.any():
            label = f"{region} ({counted(regions.count(region), 'token')})"
            bars = ax.bar(
                middle[chosen],
                throughput[peak[chosen]],
                drawn_width[chosen],
                color=colour,
                label=label,
                linewidth=0,
            )
            for bar in bars:
                mark_by_hatch(bar, region)

    ax.set_xlim(-0.8, trace.num_tokens - 0.2)
    ax.set_xlabel("token")
    quantity = "throughput"
    if bin_width > 1:
        quantity += f", maximum of each {bin_width} tokens"
    highest = float(throughput.max()) if trace.feasible else 1.0
    if scale == "sqrt":
        quantity += ", root scale"
        ax.set_yscale("function", functions=(_root, np.square))
        ax.set_ylim(0, highest)
        # The usual even ticks would leave the lower half of a root scale without any.
        ax.set_yticks(_root_ticks(highest))
    else:
        ax.set_ylim(0, highest)
    ax.set_ylabel(quantity)
    _add_title(ax, trace)
    mark_regions(ax, regions)

    labels = []
    for place in np.argsort(-throughput[peak], kind="stable")[:top].tolist():
        token = int(peak[place])
        height = float(throughput[token])
        if height > 0:
            labels.append(Label(float(middle[place]), height, f"{drawable(trace.tokens[token])} ({height:.2g})"))
    place_labels(ax, labels)
    if scale == "sqrt":
        thin_ticks(ax)
    return ax


def plot_potentials(trace: FlowTrace, *, ax: Axes | None = None, size: FigureSize | None = None) -> Axes:
    """Draw h (influence on the answer) and g (influence from the question) along the text, on a log scale.

    A potential of 0 has no place on a log scale: those tokens are a gap in the curve and a mark at the foot of the
    figure, and the legend counts them. Potentials beyond the range of float64 are drawn at their true height.

    Args:
        trace: what to draw; an infeasible one has potentials too.
        ax: where; new axes by default.
        size: of a new figure: ``"single"`` or ``"double"`` column of a paper, or width and height in inches.

    Returns:
        The axes.

    Raises:
        InvalidInputError: no trace.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``plot_potentials(trace).figure.savefig("potentials.png")``
    """
    _require_trace(trace)
    ax = axes_or_new(ax, (10, 4), size)

    # The flow stores scaled values: the potentials are h 2^exponent and g 2^-exponent.
    shift = trace.flow.exponent.numpy() * math.log10(2)
    _draw_potential(ax, "h", trace.flow.h.numpy(), shift)
    _draw_potential(ax, "g", trace.flow.g.numpy(), -shift)

    _label_powers_of_ten(ax)
    ax.set_xlim(-0.8, trace.num_tokens - 0.2)
    ax.set_xlabel("token")
    ax.set_ylabel("potential, log scale")
    _add_title(ax, trace)
    mark_regions(ax, _region_names(trace))
    return ax


def _draw_potential(ax: Axes, name: Literal["h", "g"], value: np.ndarray, shift: np.ndarray) -> None:
    """Draw one potential as log10(value) + shift, and mark the tokens where it is 0."""
    if name == "h":
        marker = "o"
        colour = PALETTE["answer"].light
        foot = 0.06
        meaning = "cannot reach the answer"
    else:
        marker = "^"
        colour = PALETTE["question"].light
        foot = 0.02
        meaning = "nothing arrives from the question"

    token = np.arange(len(value))
    is_zero = value <= 0
    height = np.where(is_zero, np.nan, np.log10(np.where(is_zero, 1.0, value)) + shift)
    size = 3.5 if len(value) <= 400 else 1.5
    ax.plot(token, height, marker + "-", color=colour, markersize=size, linewidth=0.7, label=name)
    zeros = token[is_zero]
    if len(zeros):
        mark_missing(ax, zeros, foot, colour, f"{name} = 0: {meaning} ({counted(len(zeros), 'token')})")


def _label_powers_of_ten(ax: Axes) -> None:
    """Label an axis of base-10 logarithms by powers of ten, and leave space for the marks at its foot."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # At least two decades, so that some tick is an integer power.
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    reach = max((high - low) / 2, 1.0)
    ax.set_ylim(middle - 1.25 * reach, middle + reach)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))


def plot_steps(
    trace: FlowTrace,
    by: By = "auto",
    *,
    ax: Axes | None = None,
    min_flow: float = 0.01,
    size: FigureSize | None = None,
) -> Axes:
    """Draw the steps from left to right, as high as their throughput, and the flow between them as bands.

    A band is as wide as its flow where it leaves and arrives, in the units of the axis, so that what enters and leaves
    a step fills its height. Steps without flow are left out, and of many steps only the highest are named. Bands below
    ``min_flow`` are left out too, and the title gives their sum.

    Args:
        trace: a feasible trace.
        by: how to split the reasoning; see :meth:`flowgraph.FlowTrace.steps`.
        ax: where; new axes by default.
        min_flow: narrowest band drawn, a share of the flow in [0, 1].
        size: of a new figure: ``"single"`` or ``"double"`` column of a paper, or width and height in inches.

    Returns:
        The axes.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``plot_steps(trace, "sentence").figure.savefig("steps.png")``
    """
    _require_trace(trace)
    if not 0 <= min_flow <= 1:
        raise InvalidInputError(f"min_flow: must lie in [0, 1], got {min_flow!r}; 0.01 leaves out bands below 1 %")
    if not trace.feasible:
        raise InfeasibleFlowError(f"trace: must have a flow, got none ({_NO_ROUTE}); check the regions")
    steps = step_flow(trace.flow, tokens=trace.tokens, spans=trace.spans, text=trace.text, by=by)

    # The steps with flow, in order; a step's place on the axis is its place in this list.
    drawn = [step for step in steps.steps if float(steps.throughput[step.index]) > 0]
    heights = [float(steps.throughput[step.index]) for step in drawn]
    ax = axes_or_new(ax, (min(max(7.0, 0.75 * len(drawn)), 18.0), 5), size)
    _draw_step_bars(ax, drawn, heights)

    # Bands are nested by all flows, drawn or not, so that the drawn ones keep their places.
    bands = _nested_bands(steps, drawn)
    summit = max(heights)
    hidden_flow = 0.0
    for band in bands:
        if band.flow < min_flow:
            hidden_flow += band.flow
        else:
            summit = max(summit, _draw_band(ax, band, heights))

    _name_steps(ax, drawn, heights)
    ax.set_xlim(-0.5, len(drawn) - 0.5)
    # Bands may rise above the throughput axis, which ends at 1.
    ax.set_ylim(0, max(summit, 1.0) * 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
    ax.set_ylabel("throughput", y=0.5 / ax.get_ylim()[1])
    details = f"\nsteps by {drawable(steps.by, 60)}"
    if hidden_flow:
        details += f"; bands below {min_flow:.2g} are not drawn, {hidden_flow:.2g} in all"
    _add_title(ax, trace, details)
    ax.spines["left"].set_bounds(0, 1)
    return ax


def _draw_step_bars(ax: Axes, drawn: Sequence[Step], heights: Sequence[float]) -> None:
    """Draw a bar per step in the colour of its region."""
    for region, colour in COLOURS.items():
        places = [place for place, step in enumerate(drawn) if (step.region or "context") == region]
        if places:
            bars = ax.bar(
                places,
                [heights[place] for place in places],
                2 * _HALF_BAR,
                color=colour,
                label=region,
                linewidth=0,
                zorder=3,
            )
            for bar in bars:
                mark_by_hatch(bar, region)


def _name_steps(ax: Axes, drawn: Sequence[Step], heights: Sequence[float]) -> None:
    """Write text and throughput below the highest steps, so far apart that the names do not overlap."""
    points = text_size(ax)
    is_narrow = points < _STEP_TEXT_SIZE
    most = _MAX_NARROW_STEP_LABELS if is_narrow else _MAX_STEP_LABELS
    # Slanted names take their length from the height of the drawing.
    is_low = float(ax.figure.get_figheight()) < _LOW  # type: ignore[union-attr]
    length = _NARROW_STEP_NAME if is_narrow or is_low else _STEP_NAME
    places = _spaced(heights, math.ceil(len(drawn) / most))
    labels = [f"{drawable(drawn[place].text.strip(), length)}  {heights[place]:.0%}" for place in places]
    ax.set_xticks(
        places,
        labels,
        rotation=38,
        ha="right",
        rotation_mode="anchor",
        fontsize=points,
        parse_math=False,
        fontfamily=font_families(),
    )


def _spaced(heights: Sequence[float], distance: int) -> list[int]:
    """Choose places at least ``distance`` apart, the highest first; all places at distance 1."""
    highest_first = sorted(range(len(heights)), key=lambda place: -heights[place])
    chosen: list[int] = []
    for place in highest_first:
        if all(abs(place - other) >= distance for other in chosen):
            chosen.append(place)
    return sorted(chosen)


class _Band(NamedTuple):
    """The flow from one drawn step to a later one.

    Attributes:
        source: place of the step where it leaves.
        target: place of the step where it arrives.
        flow: its width.
        start: lower edge where it leaves, a height.
        end: lower edge where it arrives, a height.
    """

    source: int
    target: int
    flow: float
    start: float
    end: float


def _nested_bands(steps: StepFlow, drawn: Sequence[Step]) -> list[_Band]:
    """Stack the bands at each step, nearest neighbour lowest, so that the longest jump is outermost."""
    place = {step.index: number for number, step in enumerate(drawn)}
    pairs = []
    for source, target in steps.edge_index.T.tolist():
        pairs.append((place[source], place[target]))
    flow_of = dict(zip(pairs, steps.edge_flow.tolist(), strict=True))

    # A band starts where the shorter jumps from its source end, and likewise at its target.
    leaving = [0.0] * len(drawn)
    arriving = [0.0] * len(drawn)
    bands: dict[tuple[int, int], _Band] = {}
    for source, target in sorted(pairs, key=lambda pair: pair[1] - pair[0]):
        flow = flow_of[source, target]
        bands[source, target] = _Band(source, target, flow, leaving[source], arriving[target])
        leaving[source] += flow
        arriving[target] += flow
    return [bands[pair] for pair in pairs]


def _draw_band(ax: Axes, band: _Band, heights: Sequence[float]) -> float:
    """Draw a band between two cubic Bézier curves; return the height of its upper curve in the middle."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    start_x = band.source + _HALF_BAR
    end_x = band.target - _HALF_BAR
    jump = band.target - band.source
    if jump == 1:
        control_start = band.start
        control_end = band.end
    else:
        # The middle of a cubic curve is start / 8 + 3/8 (both controls) + end / 8. Both controls are chosen so that
        # it rises above the bars in between.
        clearance = max(heights[band.source + 1 : band.target]) + 0.07 * jump
        control = (4 * clearance - (band.start + band.end) / 2) / 3
        control_start = control_end = max(clearance, control, band.start, band.end)

    # The lower edge, then the same curve one band width higher, backwards.
    bend = min(0.5 * (end_x - start_x), 0.3 + 0.15 * jump)
    lower = [
        (start_x, band.start),
        (start_x + bend, control_start),
        (end_x - bend, control_end),
        (end_x, band.end),
    ]
    upper = [(x, y + band.flow) for x, y in reversed(lower)]
    curve = [Path.CURVE4] * 3
    codes = [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY]
    outline = Path([*lower, *upper, lower[0]], codes)
    ax.add_patch(PathPatch(outline, color=PALETTE["flow"].light, alpha=0.35, linewidth=0.6))
    return (band.start + band.end) / 8 + 3 / 8 * (control_start + control_end) + band.flow


def _root_ticks(highest: float) -> list[float]:
    """Choose ticks of a root scale up to ``highest``, which may be 1 less rounding."""
    visible = [tick for tick in _ROOT_TICKS if highest / 100 <= tick <= highest * (1 + 1e-9)]
    return [0.0, *visible]


def _root(value: np.ndarray) -> np.ndarray:
    """Take the square root; matplotlib also transforms values below the axis, where it is 0."""
    return np.sqrt(np.maximum(value, 0.0))


def _region_names(trace: FlowTrace) -> list[str]:
    """Name the region of each token, "context" outside the three."""
    return [region or "context" for region in token_regions(trace.graph)]


def _add_title(ax: Axes, trace: FlowTrace, details: str = "") -> None:
    """Add the model and its size as title, and a note where there is no flow."""
    model = drawable(str(trace.provenance.get("model") or "a model"), 60)
    finish_axes(ax, f"{model}, {counted(trace.num_tokens, 'token')}{details}")
    if not trace.feasible:
        ax.text(0.5, 0.5, f"no flow: {_NO_ROUTE}", transform=ax.transAxes, ha="center", color=INK, parse_math=False)


def _require_trace(trace: object) -> None:
    """Check that the argument is a trace."""
    if not isinstance(trace, FlowTrace):
        raise InvalidInputError(
            f"trace: must be a FlowTrace, got {type(trace).__name__}; trace() makes one, load_trace() reads one"
        )
