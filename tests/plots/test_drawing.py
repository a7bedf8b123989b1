"""What the figures share: text that never breaks one, fonts, and files that are reproducible."""

import sys
from pathlib import Path

import matplotlib
import pytest

from flowgraph import (
    InvalidInputError,
    MissingExtraError,
    OutputError,
    plot_potentials,
    plot_steps,
    plot_throughput,
    save_figure,
)
from flowgraph.plots.drawing import drawable, font_families
from tests.fixtures.figures import labels_of, make_trace, plain_trace


def test_text_is_shown_as_it_is_or_as_code_points():
    assert drawable(" apples") == "apples"
    assert drawable("  ") == "␣␣"
    assert drawable("$x_1$") == "$x_1$"
    assert drawable("\n\t") == "⏎⇥"
    assert drawable("\u202e\x00") == "⟨U+202E⟩<U+0000>"
    assert drawable("\ud83d") == "⟨U+D83D⟩"
    assert drawable("\U00100000") == "⟨U+100000⟩"
    assert drawable("a" * 50, 10) == "a" * 10 + "…"
    assert drawable("\x00" * 9, 10) == "<U+0000>…"
    ax = plot_throughput(make_trace(8, 2, 1, ("$x_1$", "$$")))
    assert not any(text.get_parse_math() for text in labels_of(ax))


def test_a_small_set_of_fonts_is_enough_and_is_the_readers():
    with matplotlib.rc_context({"font.family": ["DejaVu Sans Mono"]}):
        assert font_families()[0] == "DejaVu Sans Mono"


def test_the_same_figure_is_the_same_file(tmp_path: Path):
    for plot in (plot_throughput, plot_potentials, plot_steps):
        for name in ("one", "two"):
            assert save_figure(plot(plain_trace()), tmp_path / f"{name}.svg") == tmp_path / f"{name}.svg"
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
        assert b"<dc:date>" not in (tmp_path / "one.svg").read_bytes()


def test_bad_paths(tmp_path: Path):
    ax = plot_potentials(plain_trace())
    with pytest.raises(InvalidInputError, match=r"path: must end in one of .*svg.*, got .*figure\.doc'; use \.png"):
        save_figure(ax, tmp_path / "figure.doc")
    with pytest.raises(OutputError, match="path: its folder must exist"):
        save_figure(ax, tmp_path / "none" / "figure.png")


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(MissingExtraError, match=r'pip install "flowgraph-llm\[plot\]"'):
        plot_throughput(plain_trace())
