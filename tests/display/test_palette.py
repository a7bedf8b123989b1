"""Pages, notebooks and figures read one palette; its colours are readable on both grounds; no other hue is used."""

import colorsys
import json
import re
from pathlib import Path

import pytest

import flowgraph
import rl
from flowgraph import compare, plot_comparison, plot_potentials, plot_steps, plot_throughput
from flowgraph.display.palette import DARK_GROUND, FLOW_RAMP_ON_DARK, LIGHT_GROUND, PALETTE, css_variables, rgba
from flowgraph.pages.comparison_page import write_comparison_html
from flowgraph.pages.corpus_page import write_index
from flowgraph.pages.trace_page import write_html
from flowgraph.tracing.flow_trace import FlowTrace
from tests.fixtures.browser import browser, open_file  # noqa: F401
from tests.fixtures.pages import make_payload
from tests.pages.test_comparison_page import PROMPT, make_trace
from tests.rl.reports.test_credit_report import example

WORDS = [name for name in PALETTE if name not in ("context", "found")]


@pytest.fixture(scope="module")
def trace() -> FlowTrace:
    return make_trace([*PROMPT, " 3", " +", " 4", "\n", " is", " so", " 7"], len(PROMPT), 0)


def channels(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def luminance(colour: str) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PALETTE)
def test_every_colour_stands_out_from_both_grounds(name: str):
    least = 4.5 if name in WORDS else 3.0
    colour = PALETTE[name]
    assert min(contrast(colour.dark, ground) for ground in DARK_GROUND) >= least
    if name != "found":  # yellow on a light ground is seen by the line around it
        assert min(contrast(colour.light, ground) for ground in LIGHT_GROUND) >= least


def test_marks_of_a_notebook_stand_out_from_white_and_from_black():
    for name in ("question", "answer"):
        assert contrast(PALETTE[name].light, "#ffffff") >= 3
        assert contrast(PALETTE[name].light, "#111111") >= 3


def test_the_terminal_ramp_grows_lighter_and_its_text_can_be_read():
    lightness = [luminance(step) for step in FLOW_RAMP_ON_DARK]
    assert lightness == sorted(lightness)
    inks = ["#ffffff"] * 4 + ["#000000"] * 2
    assert min(contrast(step, ink) for step, ink in zip(FLOW_RAMP_ON_DARK, inks, strict=True)) >= 4.5


def rgb(colour: str) -> str:
    red, green, blue = channels(colour)
    return f"rgb({red}, {green}, {blue})"


COMPUTED = """selectors => selectors.map(([selector, property]) =>
    getComputedStyle(document.querySelector(selector))[property])"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_of_the_pages_have_the_colours_of_the_palette(open_file, tmp_path: Path, trace, scheme: str):  # noqa: F811
    def shade(name: str) -> str:
        return rgb(getattr(PALETTE[name], scheme))

    page = open_file(write_html(tmp_path / "trace.html", make_payload(40, 12, 3)), color_scheme=scheme)
    places = [[f".block.{name} .t", "borderBottomColor"] for name in ("question", "reasoning", "answer")]
    places += [[".arcs .all path", "stroke"], ["#arcs", "accentColor"], [".key svg", "stroke"]]
    expected = [shade(name) for name in ("question", "reasoning", "answer", "flow", "flow", "flow")]
    assert page.evaluate(COMPUTED, places) == expected
    page.locator('.t[data-index="20"]').click()
    places = [[".arcs .in", "stroke"], [".arcs .out", "stroke"], ["h3.in", "color"], ["h3.out", "color"]]
    assert page.evaluate(COMPUTED, places) == [shade("question"), shade("answer")] * 2

    other = make_trace([*PROMPT, " 3", " -", " 4", "\n", " is", " so", " 1"], len(PROMPT), 1)
    path = write_comparison_html(tmp_path / "c.html", compare(trace, other).to_dict())
    page = open_file(path, color_scheme=scheme)
    places = [[".names .a", "color"], [".names .b", "color"], [".block.question h2 span", "borderBottomColor"]]
    places += [[".t.minus.strong", "borderBottomColor"], [".t.plus.strong", "borderTopColor"]]
    expected = [shade(name) for name in ("less", "flow", "question", "less", "flow")]
    assert page.evaluate(COMPUTED, places) == expected

    experience, tokens, ratio = example()
    page = open_file(rl.write_report(tmp_path / "r.html", experience, tokens, ratio=ratio), color_scheme=scheme)
    page.select_option("#quantity", label="advantage")
    places = [["main .t.answer", "borderBottomColor"], ["main .t.minus", "borderTopColor"]]
    assert page.evaluate(COMPUTED, places) == [shade("answer"), shade("less")]


def test_every_page_carries_the_palette(tmp_path: Path, trace):
    experience, tokens, ratio = example(1, 2, 12)
    pages = [
        write_html(tmp_path / "trace.html", make_payload(20, 6, 3)),
        write_comparison_html(tmp_path / "comparison.html", compare(trace, trace).to_dict()),
        write_index(tmp_path / "index.html", [], {}, {}),
        rl.write_report(tmp_path / "credit.html", experience, tokens, ratio=ratio),
    ]
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert css_variables() in page
        assert 'id="theme"' in page


def test_the_notebook_reads_the_palette(trace):
    fragment = trace._repr_html_()
    assert f"border-bottom:2px solid {PALETTE['question'].light}" in fragment
    assert f"outline:2px solid {PALETTE['answer'].light}" in fragment
    assert f"background-color:{rgba(PALETTE['flow'].light, 0.75)}" in fragment
    shades = set(re.findall(r"rgba\((\d+,\d+,\d+),", fragment))
    assert shades == {",".join(map(str, channels(PALETTE["flow"].light)))}


def hexes(artists) -> set[str]:
    from matplotlib.colors import to_hex

    return {to_hex(artist.get_facecolor()) for artist in artists}


def test_figures_read_the_palette(trace):
    from matplotlib import pyplot
    from matplotlib.colors import to_hex

    regions = {PALETTE[name].light for name in ("question", "reasoning", "answer")}
    bars = plot_throughput(trace).containers
    assert hexes(bar for group in bars for bar in group) == regions
    ax = plot_steps(trace)
    assert hexes(bar for group in ax.containers for bar in group) == regions
    bands = [patch for patch in ax.patches if type(patch).__name__ == "PathPatch"]
    assert hexes(bands) == {PALETTE["flow"].light}
    lines = {line.get_label(): to_hex(line.get_color()) for line in plot_potentials(trace).get_lines()}
    assert (lines["h"], lines["g"]) == (PALETTE["answer"].light, PALETTE["question"].light)
    other = make_trace([*PROMPT, " 3", " -", " 4", "\n", " is", " so", " 1"], len(PROMPT), 1)
    ax = plot_comparison(compare(trace, other))
    colours = {to_hex(line.get_color()) for line in ax.get_lines() if str(line.get_label())[:2] in ("A:", "B:")}
    assert colours == {PALETTE["less"].light, PALETTE["flow"].light}
    pyplot.close("all")


def hue(colour: str) -> float:
    return 360 * colorsys.rgb_to_hsv(*(value / 255 for value in channels(colour)))[0]


def test_flow_shares_its_hue_with_no_region_and_no_other_meaning():
    for scheme in ("light", "dark"):
        flow = hue(getattr(PALETTE["flow"], scheme))
        for name in ("question", "answer", "less"):
            distance = abs(hue(getattr(PALETTE[name], scheme)) - flow) % 360
            assert min(distance, 360 - distance) > 45, name
    # The ramp of the terminal stays between red and yellow, like the flow itself.
    assert all(10 < hue(step) < 50 for step in FLOW_RAMP_ON_DARK)
    assert 10 < hue(PALETTE["flow"].light) < 50


def test_no_other_place_defines_a_colour_with_a_hue():
    packages = [Path(str(package.__file__)).parent for package in (flowgraph, rl)]
    sources = [
        path for package in packages for ending in ("css", "js", "jinja") for path in package.rglob(f"*.{ending}")
    ]
    sources += [path for package in packages for path in package.rglob("*.py") if path.stem != "palette"]
    assert len(sources) > 25
    strange = {}
    for path in sources:
        if path.name.endswith(".min.js"):
            continue
        for colour in re.findall(r"#[0-9a-fA-F]{6}\b", path.read_text(encoding="utf-8")):
            if max(channels(colour)) - min(channels(colour)) > 20:  # greys with a cool or warm tint are allowed
                strange.setdefault(path.name, []).append(colour)
    assert strange == {}, json.dumps(strange)
