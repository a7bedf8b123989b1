"""Parts of notebook fragments: text is data, numbers are honest."""

import pytest

from flowgraph.display.fragment import bar, escaped, folded, one_line, percent, table


def test_text_is_escaped_and_shown_by_signs():
    assert escaped('<b>"&\x1b[31m\u202e') == "&lt;b&gt;&quot;&amp;␛[31m⟨U+202E⟩"
    assert escaped("a" * 5, 3) == "aaa…"
    assert one_line("1. Tom\n  has  <3") == "<bdi>1. Tom has &lt;3</bdi>"
    assert one_line("\n") == "<bdi>⏎</bdi>"


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.99999, "99.9 %"), (0.1234, "12.3 %"), (1 - 1e-13, "100 %")]
)
def test_a_percentage_is_whole_only_for_a_whole(share: float, text: str):
    assert percent(share) == text


def test_a_bar_is_never_wider_than_a_whole():
    assert "width:4.00em" in bar(0.5)
    assert "width:8.00em" in bar(1.5)
    assert "width:0.00em" in bar(-1)
    assert bar(0.5) != bar(0.5, "less")


def test_tables_and_folded_parts():
    assert table(["n"], [["1"]]).count("text-align:right") == 2
    assert table(["n"], [["1"]], left=["n"]).count("text-align:left") == 2
    assert folded("all hold", "<b>x</b>") == "<details><summary>all hold</summary><b>x</b></details>"
    assert folded("some fail", "x", is_open=True).startswith("<details open>")
