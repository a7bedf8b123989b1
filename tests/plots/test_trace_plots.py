"""Figures of traces: what is drawn agrees with the trace, and token text never breaks a figure."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from flowgraph import (
    FlowGraph,
    FlowTrace,
    InfeasibleFlowError,
    InvalidInputError,
    plot_potentials,
    plot_steps,
    plot_throughput,
    save_figure,
    solve,
)
from flowgraph.display.palette import PALETTE
from flowgraph.plots.drawing import drawable
from flowgraph.plots.trace_plots import _root_ticks
from flowgraph.steps.step_flow import step_flow
from tests.fixtures.figures import HOSTILE, bars_of, labels_of, make_trace, plain_trace


@pytest.mark.parametrize("scale", ["sqrt", "linear"])
def test_a_bar_is_the_throughput_of_its_token(scale: str):
    ax = plot_throughput(plain_trace(), scale=scale)
    assert bars_of(ax) == {float(t): float(f) for t, f in enumerate(plain_trace().throughput)}
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] >= plain_trace().throughput.max()
    assert all(0 <= tick <= 1 for tick in ax.get_yticks())
    legend = ax.get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["question (12 tokens)", "reasoning (24 tokens)", "answer (2 tokens)", "context (2 tokens)"]
    colours = {to_hex(group.patches[0].get_facecolor()): len(group.patches) for group in ax.containers}
    regions = {"question": 12, "reasoning": 24, "answer": 2, "context": 2}
    assert colours == {PALETTE[region].light: number for region, number in regions.items()}


@pytest.mark.parametrize("num_tokens", [97, 100, 101, 250])
def test_a_long_text_is_binned_with_its_maximum(num_tokens: int):
    trace = make_trace(num_tokens, 20)
    ax = plot_throughput(trace, max_bars=50)
    width = -(-num_tokens // 50)
    bins = [trace.throughput[start : start + width] for start in range(0, num_tokens, width)]
    middles = [width * k + (part.numel() - 1) / 2 for k, part in enumerate(bins)]
    expected = {middle: float(part.max()) for middle, part in zip(middles, bins, strict=True)}
    assert bars_of(ax) == pytest.approx(expected)
    assert len(bins) <= 50
    assert f"maximum of each {width} tokens" in ax.get_ylabel()
    assert max(bars_of(ax).values()) == trace.throughput.max()


@pytest.mark.parametrize("highest", [1.0, 1 - 2**-52, 1 - 1e-12])
def test_the_root_scale_ends_at_1_also_where_sums_round_below(highest: float):
    assert _root_ticks(highest) == [0, 0.01, 0.05, 0.1, 0.2, 0.5, 1]
    assert _root_ticks(0.4 * highest)[-1] == 0.2


def test_labels_name_the_strongest_and_never_overlap():
    trace = make_trace(120, 30, 2)
    ax = plot_throughput(trace, top=15)
    ax.figure.draw_without_rendering()
    labels = labels_of(ax)
    assert 8 <= len(labels) <= 15
    strongest = trace.throughput.argsort(descending=True, stable=True)[0]
    assert labels[0].get_text() == f"{drawable(trace.tokens[strongest])} ({trace.throughput[strongest]:.2g})"
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    frame = ax.get_window_extent()
    top_of_bars = ax.transData.transform((0, float(trace.throughput.max())))[1]
    for box in boxes:
        assert frame.x0 - 1 <= box.x0
        assert box.x1 <= frame.x1 + 1
        assert box.y0 >= top_of_bars - 1
    plt.close("all")
    assert labels_of(plot_throughput(trace, top=0)) == []


def test_the_strip_under_the_axis_shows_the_regions_token_by_token():
    ax = plot_throughput(plain_trace())
    strip = [patch for patch in ax.patches if patch.get_y() < 0]
    assert [(patch.get_x() + 0.5, patch.get_width()) for patch in strip] == [(2, 12), (14, 24), (38, 2)]


def test_potentials_are_drawn_on_a_log_scale_and_zeros_are_counted():
    trace = plain_trace()
    ax = plot_potentials(trace)
    curves = {line.get_label(): line for line in ax.lines}
    h, g = (value.numpy() for value in trace.flow.potentials)
    for name, value in (("h", h), ("g", g)):
        drawn = np.asarray(curves[name].get_ydata())
        assert np.array_equal(np.isnan(drawn), value == 0)
        np.testing.assert_allclose(10 ** drawn[value > 0], value[value > 0])
    missing = curves["g = 0: nothing arrives from the question (2 tokens)"]
    assert list(missing.get_xdata()) == [0, 1]
    assert ax.get_ylim()[0] < np.nanmin(curves["h"].get_ydata())


def test_potentials_beyond_float64_are_drawn_where_they_are():
    links = torch.full((300,), 1e-5, dtype=torch.float64)
    edges = torch.stack([torch.arange(300), torch.arange(1, 301)])
    graph = FlowGraph.from_edges(edges, links, num_nodes=301, question=[0], answer=[300])
    whole = make_trace(301)
    trace = FlowTrace(**{**vars(whole), "graph": graph, "flow": solve(graph)})
    assert float(trace.potential[0]) == 0  # 1e-1500
    ax = plot_potentials(trace)
    assert np.asarray(ax.lines[0].get_ydata())[0] == pytest.approx(-1500)
    assert np.asarray(ax.lines[1].get_ydata())[0] == pytest.approx(1500)


def test_steps_have_the_height_of_their_throughput_and_bands_the_width_of_their_flow():
    trace = plain_trace()
    steps = step_flow(trace.flow, tokens=trace.tokens, spans=trace.spans, text=trace.text)
    alive = [k for k in range(len(steps.steps)) if steps.throughput[k] > 0]
    ax = plot_steps(trace, min_flow=0.0)
    assert bars_of(ax) == {float(x): pytest.approx(float(steps.throughput[k])) for x, k in enumerate(alive)}
    bands = {}
    for patch in ax.patches:
        if isinstance(patch, PathPatch):
            corners = np.asarray(patch.get_path().vertices)
            start, end, end_above, start_above = corners[0], corners[3], corners[4], corners[7]
            width = start_above[1] - start[1]
            assert end_above[1] - end[1] == pytest.approx(width)
            bands[alive[round(start[0] - 0.12)], alive[round(end[0] + 0.12)]] = width
    pairs = map(tuple, steps.edge_index.T.tolist())
    assert bands == {pair: pytest.approx(flow) for pair, flow in zip(pairs, steps.edge_flow.tolist(), strict=True)}


def test_thin_bands_are_left_out_and_added_up():
    trace = plain_trace()
    steps = step_flow(trace.flow, tokens=trace.tokens, spans=trace.spans, text=trace.text)
    ax = plot_steps(trace, min_flow=0.05)
    thick = steps.edge_flow >= 0.05
    assert sum(isinstance(patch, PathPatch) for patch in ax.patches) == int(thick.sum())
    hidden = float(steps.edge_flow[~thick].sum())
    assert f"bands below 0.05 are not drawn, {hidden:.2g} in all" in ax.get_title(loc="left")


def test_of_many_steps_the_highest_are_named_without_overlap():
    ax = plot_steps(make_trace(300, 4, 1, ("Tom", " has.", "\n")))
    heights = bars_of(ax)
    assert len(heights) > 60
    named = ax.get_xticks()
    assert 10 <= len(named) <= 60
    assert np.diff(named).min() >= 2
    assert {x for x, height in heights.items() if height == max(heights.values())} & set(named)


@pytest.mark.parametrize("plot", [plot_throughput, plot_potentials, plot_steps])
@pytest.mark.parametrize("texts", [HOSTILE, HOSTILE[::-1]])
def test_hostile_tokens_draw_without_a_warning(plot, texts, tmp_path: Path):
    ax = plot(make_trace(40, 15, 2, texts))
    for ending in ("png", "svg"):
        save_figure(ax, tmp_path / f"figure.{ending}", dpi=50)
    assert "\x00" not in (tmp_path / "figure.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("num_tokens", [4, 7])
def test_small_traces_draw(num_tokens: int, tmp_path: Path):
    for plot in (plot_throughput, plot_potentials, plot_steps):
        path = save_figure(plot(make_trace(num_tokens, 1)), tmp_path / f"{plot.__name__}.png", dpi=40)
        assert plt.imread(path).std() > 0.01, "something is drawn"


def test_a_trace_without_flow_says_so(tmp_path: Path):
    trace = make_trace(20, cut=True)
    for plot in (plot_throughput, plot_potentials):
        ax = plot(trace)
        assert "no flow: no question token reaches the answer" in [text.get_text() for text in ax.texts]
        save_figure(ax, tmp_path / "figure.png", dpi=40)
    with pytest.raises(InfeasibleFlowError, match=r"trace: must have a flow, got none \(no question token reaches"):
        plot_steps(trace)


def test_axes_of_the_caller_are_used_and_new_ones_are_new():
    figure, axes = plt.subplots(3)
    for plot, ax in zip((plot_throughput, plot_potentials, plot_steps), axes, strict=True):
        assert plot(plain_trace(), ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
    assert plot_throughput(plain_trace()).figure is not plot_throughput(plain_trace()).figure


@pytest.mark.unchecked
def test_bad_requests():
    with pytest.raises(InvalidInputError, match="trace: must be a FlowTrace, got Flow; trace"):
        plot_throughput(plain_trace().flow)
    for name, value in (("top", -1), ("top", 2.5), ("max_bars", 0), ("max_bars", True)):
        with pytest.raises(InvalidInputError, match=f"{name}: must be an integer of at least ., got {value!r}; omit"):
            plot_throughput(plain_trace(), **{name: value})
    with pytest.raises(InvalidInputError, match="scale: must be 'sqrt' or 'linear', got 'log'; 'linear'"):
        plot_throughput(plain_trace(), scale="log")
    with pytest.raises(InvalidInputError, match=r"min_flow: must lie in \[0, 1\], got -1; 0.01"):
        plot_steps(plain_trace(), min_flow=-1)
    with pytest.raises(InvalidInputError, match="ax: must be matplotlib axes, got Figure; pass one of"):
        plot_potentials(plain_trace(), ax=plt.figure())
