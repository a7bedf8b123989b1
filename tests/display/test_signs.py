"""Signs of invisible characters are the same in Python and in the browser, and no invisible character is left."""

import unicodedata
from pathlib import Path

import pytest

from flowgraph.display.signs import visible, visible_name
from flowgraph.pages.page import render_page
from tests.fixtures.browser import browser, open_file  # noqa: F401

TEMPLATE = """{% extends "page.html.jinja" %}{% block body %}<p id="shown"></p>{% endblock %}"""
SCRIPT = """
const shown = page.codes.map((code) => visible(String.fromCodePoint(code)));
byId("shown").textContent = JSON.stringify([shown, page.texts.map(visible)]);
"""
TEXTS = ["a\u200db", "\u200d", "\u200c", "", "\r\n\t", "\U0001f469\u200d\U0001f469", "\x1b[31m", "\u202eabc\u2066"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" apples", " apples"),
        ("\n\t\x00\x1f\x7f", "⏎⇥␀␟␡"),
        ("\x85\xad\u202e\u2028\ue000\ud83d", "⟨U+0085⟩⟨U+00AD⟩⟨U+202E⟩⟨U+2028⟩⟨U+E000⟩⟨U+D83D⟩"),
        ("\U000e0001", "⟨U+E0001⟩"),
        ("क्‍ष", "क्‍ष"),
        ("\u200d", "⟨U+200D⟩"),
        ("", ""),
    ],
)
def test_each_invisible_character_has_a_sign(text: str, shown: str):
    assert visible(text) == shown


def test_a_name_has_no_spaces_at_its_ends_and_is_never_empty():
    assert visible_name(" two words ") == "two words"
    assert visible_name("   ") == "␣␣␣"
    assert visible_name(" \n") == "⏎"


@pytest.mark.browser
def test_the_browser_shows_the_same_signs(open_file, tmp_path: Path):  # noqa: F811
    # A browser may know characters that this Python does not know yet.
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) != "Cn"]
    codes = [code for code in codes if not 0xF0000 < code < 0x10FFFF or code % 997 == 0]  # few of the private planes
    path = tmp_path / "signs.html"
    data = {"codes": codes, "texts": TEXTS}
    path.write_text(render_page(TEMPLATE, scripts=[SCRIPT], data_id="data", page_data=data), encoding="utf-8")
    page = open_file(path)
    shown, texts = page.evaluate("JSON.parse(document.getElementById('shown').textContent)")
    assert texts == [visible(text) for text in TEXTS]
    different = [hex(code) for code, sign in zip(codes, shown, strict=True) if sign != visible(chr(code))]
    assert different == []
