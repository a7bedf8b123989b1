"""The index page: whole, sortable, and every text on it is data."""

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flowgraph.pages import corpus_page as module
from flowgraph.pages.corpus_page import render_index, write_index

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '</script><img src=x onerror="window.hacked=1">{{ 7 * 7 }}\u202e\x1b'


def row(line: int, **changed) -> dict:
    made = {
        "id": f"trace-{line}", "line": line, "file": f"traces/{line:06d}.safetensors", "tokens": 100 * line,
        "prompt_tokens": 50, "question": 12, "reasoning": 30, "answer": 1, "answer_text": f"answer {line}",
        "answer_by": "last sentence",
        "feasible": True, "mean_hops": 3 + 1 / line, "alpha": 0.5, "edges": 4000, "kept_flow": 1.0,
        "backbone_edges": 100 - line, "backbone_share": 0.9001,
    }  # fmt: skip
    return made | changed


ROWS = [
    row(1, id="b"),
    row(2, id="a10", answer_text=HOSTILE),
    {"id": HOSTILE, "line": 3, "error": f"line: must be JSON, got {HOSTILE}"},
    row(4, id="a9", feasible=False, mean_hops=None, alpha=None, backbone_edges=None, backbone_share=None),
]
FACTS = {"model": f"tiny/{HOSTILE}", "preset": "default", "versions": {"torch": "2"}}


class Page(HTMLParser):
    """What a browser would see: elements, and the text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self._silent = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag) -> None:
        self._silent = False

    def handle_data(self, data) -> None:
        self.text += "" if self._silent else data


def test_every_trace_and_every_error_is_listed():
    page = Page(render_index(ROWS, {1: "traces/000001-b.html"}, FACTS))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["#errors", "traces/000001-b.html", "traces/000002.safetensors", "traces/000004.safetensors"]
    for word in (
        "3 answers",
        "not traced",
        "no flow",
        "90 %",
        "without flow",
        "700",
        "found by",
        "last sentence",
        "preset",
        "versions.torch",
    ):
        assert word in page.text, word
    values = [attributes["data-v"] for tag, attributes in page.elements if tag == "td" and "data-v" in attributes]
    assert values[:8] == ["1", "100", "12", "30", "4.0", "0.5", "99", "0.9001"]
    assert values[-4:] == ["", "", "", ""]


def test_texts_are_data_and_the_policy_names_the_two_parts():
    text = render_index(ROWS, {}, FACTS)
    page = Page(text)
    assert "img" not in [tag for tag, _ in page.elements]
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "{{ 7 * 7 }}" in page.text
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert not re.search(r"https?://|@import|url\(|style=| on\w+=\"", text.replace("onerror=&#34;", ""))


def test_long_lists_and_texts_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    page = Page(render_index([row(n, answer_text="x" * 5000) for n in range(1, 8)], {}, FACTS))
    assert "The first 3 of 7 traces are listed" in page.text
    assert "x" * 200 not in page.text
    assert "2,800" in page.text  # the tokens of all seven


def test_a_run_without_any_trace_still_has_a_page(tmp_path: Path):
    path = write_index(tmp_path / "index.html", [ROWS[2]], {}, FACTS)
    page = Page(path.read_text(encoding="utf-8"))
    assert "No line could be traced." in page.text
    assert "table" in [tag for tag, _ in page.elements]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
def test_a_browser_sorts_and_finds(tmp_path: Path):
    from playwright.sync_api import sync_playwright

    path = write_index(tmp_path / "index.html", ROWS, {}, FACTS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())

        def lines() -> list[str]:
            return page.locator("#traces tbody tr:visible td:first-child").all_inner_texts()

        def click(name: str) -> list[str]:
            page.get_by_role("button", name=name, exact=True).click()
            return lines()

        assert lines() == ["1", "2", "4"]
        assert click("line") == ["4", "2", "1"]
        assert click("trace") == ["4", "2", "1"]  # a9, a10, b
        assert click("trace") == ["1", "2", "4"]
        assert click("tokens") == ["4", "2", "1"]  # numbers: the largest first
        assert click("mean hops") == ["1", "2", "4"]  # and no number last,
        assert click("mean hops") == ["2", "1", "4"]  # either way
        page.locator("#find").fill("A1")
        assert lines() == ["2"]
        assert page.locator("#count").inner_text() == "1 of 3 listed"
        assert page.evaluate("window.hacked") is None
        assert problems == []
        browser.close()
