"""The page of an evaluation: complete without scripts, texts as data, small, and drawn by a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowgraph.evaluation.page_items import LEVELS, levels_of, page_payload
from flowgraph.evaluation.results import Evaluation
from flowgraph.evaluation.tables import task_table
from flowgraph.pages.evaluation_page import figure, render_evaluation, write_evaluation_page
from tests.evaluation.test_tables import GAIN, LOSS, method, task
from tests.pages.test_corpus_page import Page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '</script><img src=x onerror="window.hacked=1">{{ 7 * 7 }}\u202e\x1b'


def record(place: int, methods: list[str], num_tokens: int, truth: dict[str, Any] | None = None, **changed) -> dict:
    tokens = [f" word{(place + token) % 50}" for token in range(num_tokens)]
    return {
        "task": "made", "split": "test", "id": f"item-{place}", "error": None, "unusable": None,
        "model_right": place != 1,
        "tokens": tokens, "regions": [*["question"] * (num_tokens - 1), "answer"], "answer": "".join(tokens[-1:]),
        "truth": truth or {"units": [[0, 1], [2]], "effects": [0.5, -0.25]},
        "scores": {name: {"gain": 0.1 * place + (name == "good"), "loss": 0.2} for name in methods},
        "token_scores": {name: [float(token - 1) for token in range(num_tokens)] for name in methods},
        "skipped": {}, "seconds": {},
    } | changed  # fmt: skip


def evaluation(records: list[dict], methods: list[str], tasks: int = 1) -> Evaluation:
    chosen = [method(name, name == "control") for name in methods]
    summaries = []
    rows: list[dict] = []
    items = []
    summary, own = task_table(replace(task(GAIN, LOSS), shows="what it shows"), "test", records, chosen, 0)
    # Several tasks are copies of one, because tables take time.
    for name in [f"made {number}" for number in range(tasks)]:
        summaries.append(replace(summary, task=name))
        rows += [{**row, "task": name} for row in own]
        items += [{**entry, "task": name} for entry in records]
    settings = {"model": f"tiny/{HOSTILE}", "seed": 0, "versions": {"torch": "2"}}
    return Evaluation(settings, tuple(methods), tuple(summaries), tuple(rows), tuple(items))


def test_scores_become_levels_with_their_sign():
    assert levels_of([]) == ""
    assert levels_of([0.0, 0.0]) == LEVELS[31] * 2
    assert levels_of([4.0, -4.0, 1.0, None]) == LEVELS[62] + LEVELS[0] + LEVELS[31 + 16] + LEVELS[31]
    assert len(set(LEVELS)) == 63
    assert not set(LEVELS) & set("<>&'\"\\")


def test_the_page_is_complete_without_scripts():
    names = ["good", "control"]
    page = Page(render_evaluation(page_payload(evaluation([record(n, names, 6) for n in range(8)], names))))
    for text in (
        "made 0",
        "what it shows",
        "minus control*",
        "control*",
        "good",
        "right only",
        "versions.torch",
        "gain: higher is better; higher is better",
    ):
        assert text in page.text, text
    assert "the model answers 1 of 8 items wrongly" in page.text
    assert "2 methods on 1" in page.text
    assert "Other metrics" in page.text


def test_texts_are_data_and_the_policy_names_the_two_parts():
    names = [HOSTILE, "control"]
    hostile = record(
        0, names, 3, tokens=[HOSTILE, "\ud83d", "\u2028"], truth={"note": HOSTILE}, unusable=HOSTILE, id="x"
    )
    text = render_evaluation(page_payload(evaluation([hostile, record(1, names, 3)], names)))
    page = Page(text)
    assert "img" not in [tag for tag, _ in page.elements]
    assert "\u202e" not in text
    assert "\x1b" not in text
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert "https://" not in text


def test_many_items_stay_below_the_size_and_what_is_left_out_is_said():
    names = [f"method {number}" for number in range(15)]
    records = [record(place, names, 200) for place in range(60)]
    payload = page_payload(evaluation(records, names, tasks=12))
    assert sum(task["left_out"] for task in payload["tasks"]) == 0
    assert len(render_evaluation(payload).encode()) < 5_000_000
    # A smaller limit leaves out the last items of every task, and the page says so.
    small = page_payload(evaluation(records, names, tasks=12), max_bytes=1_000_000)
    left_out = [task["left_out"] for task in small["tasks"]]
    assert all(0 < number < 60 for number in left_out)
    items = json.dumps([task["items"] for task in small["tasks"]])
    assert len(items) + len(json.dumps(small["texts"])) < 1_100_000
    assert f"The last {left_out[0]} of 60 items are left out" in " ".join(Page(render_evaluation(small)).text.split())


def test_the_page_says_what_known_methods_are():
    names = ["vtrace_share", "gradient_norm", "gone"]
    payload = page_payload(evaluation([record(n, names, 6) for n in range(5)], names))
    assert set(payload["summaries"]) == {"vtrace_share", "gradient_norm"}
    assert ":math:" not in payload["summaries"]["gradient_norm"]
    page = Page(render_evaluation(payload))
    assert "What the methods are" in page.text
    assert payload["summaries"]["vtrace_share"] in page.text
    # Nothing is said where no method is known.
    assert "What the methods are" not in Page(render_evaluation(page_payload(evaluation([], ["gone"])))).text


def test_tokens_that_the_task_does_not_compare_have_no_colour():
    sink = record(0, ["good"], 4, {"units": [[1], [2]], "effects": [0.5, 0.25]})
    sink["token_scores"] = {"good": [100.0, 1.0, -0.25, 7.0]}
    everywhere = record(1, ["good"], 4, {"curve": [0.5]})
    everywhere["token_scores"] = sink["token_scores"]
    items = page_payload(evaluation([sink, everywhere], ["good"]))["tasks"][0]["items"]
    assert items[0]["methods"]["good"] == levels_of([0, 1, -0.25, 0])
    assert items[1]["methods"]["good"] == levels_of([100, 1, -0.25, 7])


def test_truths_of_all_kinds_are_shown():
    kinds = [
        {"units": [[0], [1, 2]], "gold": [False, True]},
        {"units": [[0], [1, 2]], "pairs": [[1, 0]], "effects": [0.3]},
        {"units": [[0], [1]], "effects": [1.0]},
        {"curve": [0.1, 0.2]},
        {},
    ]
    records = [record(place, ["good"], 4, truth) for place, truth in enumerate(kinds)]
    records[4]["truth"] = {}
    items = page_payload(evaluation(records, ["good"]))["tasks"][0]["items"]
    assert items[0]["truth"] == levels_of([0, 1, 1, 0])
    assert items[0]["units"] == [["word1 word2", 1.0]]
    assert items[1]["truth"] == levels_of([0.3, 0, 0, 0])
    assert items[1]["pairs"] == [["word2 word3", "word1", 0.3]]
    assert (items[2]["truth"], items[2]["plain"]) == (None, '{"units": [[0], [1]], "effects": [1.0]}')
    assert items[3]["plain"] == '{"curve": [0.1, 0.2]}'
    assert items[4]["plain"] == ""


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.125, False, ".12"),
        (1.0, False, "1.00"),
        (0.0, True, ".00"),
        (-0.001, True, ".00"),
        (0.3, True, "+.30"),
        (-12.34, False, "-12.3"),
        (None, True, "\u2013"),
    ],
)
def test_figures_are_short(value: float | None, signed: bool, text: str):
    assert figure(value, signed=signed) == text


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
def test_a_browser_draws_an_item_by_any_method(tmp_path: Path):
    from playwright.sync_api import sync_playwright

    names = ["good", "control"]
    records = [record(place, names, 6) for place in range(3)]
    records[0]["tokens"][1] = HOSTILE
    records.append(record(3, [], 0, {"x": 1}, error={"message": HOSTILE, "kind": "RegionError", "expected": True}))
    path = write_evaluation_page(tmp_path / "index.html", page_payload(evaluation(records, names)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.get_by_text("Look at the items").click()
        viewer = page.locator(".viewer")
        assert viewer.locator("h3").all_inner_texts() == ["scores of good", "truth"]
        assert viewer.locator(".sides .prose").count() == 2
        assert viewer.locator(".prose").first.locator(".t").count() == 6
        assert viewer.locator(".prose").first.locator(".minus").count() == 1
        viewer.locator("select").nth(1).select_option(index=1)
        assert viewer.locator("h3").first.inner_text() == "scores of control"
        # The chosen method stays when the item changes; an item without a result says why.
        viewer.locator("select").first.select_option(index=1)
        assert viewer.locator("h3").first.inner_text() == "scores of control"
        assert "item-1 (answered wrongly)" in viewer.locator("select").first.inner_text()
        viewer.locator("select").first.select_option(index=3)
        assert "onerror" in viewer.locator(".alert").inner_text()
        assert page.evaluate("window.hacked") is None
        assert problems == []
        browser.close()
