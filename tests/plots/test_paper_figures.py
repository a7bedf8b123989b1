"""Figures as narrow as a column of a paper: nothing is cut, fonts are embedded, and grey tells regions apart."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from flowgraph import (
    InvalidInputError,
    compare,
    plot_comparison,
    plot_potentials,
    plot_steps,
    plot_throughput,
    save_figure,
)
from flowgraph.plots.drawing import COLUMN_SIZES, HATCHES
from tests.fixtures.figures import make_trace, plain_trace


def draw_comparison(trace, **options):
    return plot_comparison(compare(trace, make_trace(40, 12, 2, seed=5)), **options)


PLOTS = [plot_throughput, plot_potentials, plot_steps, draw_comparison]


def texts_of(ax) -> list:
    """Every text that is drawn: labels, ticks, title and legend."""
    legend = ax.get_legend()
    ticks = []
    for axis in (ax.xaxis, ax.yaxis):
        # Ticks outside the limits are not drawn.
        low, high = axis.get_view_interval()
        ticks += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title, *legend.get_texts(), *ticks]
    return [text for text in texts if text.get_text() and text.get_visible()]


def assert_nothing_is_cut(ax) -> None:
    ax.figure.draw_without_rendering()
    page = ax.figure.bbox
    for text in texts_of(ax):
        box = text.get_window_extent()
        inside = box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
        assert inside, f"{text.get_text()!r} at {box} is outside {page}"


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("layout", [None, "constrained"])
def test_nothing_is_cut_in_a_small_figure_of_the_caller(plot: Callable, layout: str | None):
    _, ax = plt.subplots(figsize=(3.3, 2.0), layout=layout)
    assert_nothing_is_cut(plot(plain_trace(), ax=ax))
    assert ax.get_window_extent().height > 0.25 * ax.figure.bbox.height, "the drawing keeps a quarter of the height"


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("size", ["single", "double", (5, 3)])
def test_sizes_for_a_paper(plot: Callable, size):
    ax = plot(plain_trace(), size=size)
    assert tuple(ax.figure.get_size_inches()) == pytest.approx(COLUMN_SIZES.get(size, size))
    assert_nothing_is_cut(ax)


@pytest.mark.parametrize("plot", PLOTS)
def test_long_names_and_scripts_are_fitted(plot: Callable):
    trace = make_trace(40, 12, 2, ("verylongtoken" * 9, "中文", "\n", "$x_1$"))
    trace.provenance["model"] = "organisation/a-model-with-a-long-name-and-many-parts-7B-Instruct-v0.3"  # type: ignore[index]
    assert_nothing_is_cut(plot(trace, size="single"))


def test_heights_of_ticks_do_not_overlap():
    ax = plot_throughput(plain_trace(), size="single")
    boxes = sorted((text.get_window_extent() for text in ax.get_yticklabels()), key=lambda box: box.y0)
    assert len(boxes) >= 3
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert ax.get_yticks()[0] == 0


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("layout", [None, "constrained"])
def test_two_panels_keep_their_size_and_do_not_cover_each_other(plot: Callable, layout: str | None):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.8), layout=layout)
    for ax in (left, right):
        plot(plain_trace(), ax=ax)
    figure.draw_without_rendering()
    for ax in (left, right):
        assert ax.get_window_extent().width > 0.25 * figure.bbox.width
        assert ax.get_window_extent().height > 0.2 * figure.bbox.height
    for text in (left._left_title, *left.get_legend().get_texts()):
        assert text.get_window_extent().x1 <= right.get_window_extent().x0


def test_other_axes_of_a_figure_keep_their_layout():
    figure, (first, _) = plt.subplots(1, 2, figsize=(10, 4))
    plot_throughput(plain_trace(), ax=first)
    assert figure.get_layout_engine() is None


@pytest.mark.parametrize("plot", PLOTS)
def test_fonts_of_a_pdf_are_embedded_as_truetype(plot: Callable, tmp_path: Path):
    content = save_figure(plot(plain_trace(), size="single"), tmp_path / "figure.pdf").read_bytes()
    assert b"/Type3" not in content
    assert b"/CIDFontType2" in content


@pytest.mark.parametrize("plot", [plot_throughput, plot_steps])
def test_question_and_answer_differ_without_colour(plot: Callable):
    ax = plot(plain_trace())
    hatches = {}
    for bars in ax.containers:
        hatches[bars.get_label().split(" ")[0]] = {bar.get_hatch() for bar in bars}
    assert hatches["question"] == {HATCHES["question"]}
    assert hatches["answer"] == {HATCHES["answer"]}
    assert hatches["reasoning"] == {None}
    assert HATCHES["question"] != HATCHES["answer"]


@pytest.mark.unchecked
@pytest.mark.parametrize("size", ["column", 3, (3,), (3, 0), (3, "2"), (200, 2)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InvalidInputError, match="size: must be 'single', 'double' or width and height in inches"):
        plot_throughput(plain_trace(), size=size)


def test_axes_that_exist_have_their_size():
    _, ax = plt.subplots()
    with pytest.raises(InvalidInputError, match=r"size: must not be given with ax, .*, got 'single'; pass figsize="):
        plot_steps(plain_trace(), ax=ax, size="single")
