"""The page of a comparison is whole, shows what the payload says, and treats token text as data."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from flowgraph.comparison.compare import compare
from flowgraph.errors import OutputError
from flowgraph.flow.solve import solve
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.pages.comparison_page import render_comparison, write_comparison_html
from flowgraph.tracing.flow_trace import FlowTrace
from tests.fixtures.browser import (
    assert_nothing_is_loaded_or_written_as_markup,
    assert_policy_names_the_inline_code,
    browser,  # noqa: F401
    open_file,  # noqa: F401
)
from tests.fixtures.convert import random_attention

HOSTILE = [
    "</script><img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "<!--<script>",
    "&lt;img src=x onerror=window.hacked=1&gt;",
    "\u2028window.hacked=1\u2029",
    "\x00\x07\x1b[31m\x7f",
    "\ud83d",
    "\u202eevil\u2066",
    "{{ 7 * 7 }}{% raw %}",
    '" onfocus="window.hacked=1',
]
PROMPT = ["Tom", " has", " 3", " apples", ".", " How", " many", "?", "\n"]


def make_trace(
    tokens: list[str], question: int, seed: int, model: str = "tiny/model", heads: str = "mean"
) -> FlowTrace:
    count = len(tokens)
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0)
    attention = random_attention(count, sharpness=3.0, seed=seed).double()
    graph = FlowGraph.from_dense(attention, question=range(question), answer=[count - 1])
    return FlowTrace(
        tokens=tuple(tokens),
        token_ids=torch.tensor([abs(hash(token)) for token in tokens]),
        text="".join(tokens),
        spans=torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1),
        generated=torch.arange(count) >= question,
        graph=graph,
        flow=solve(graph),
        provenance={"model": model, "layers": [1, 2], "heads": heads},
    )


@pytest.fixture(scope="module")
def payload() -> dict:
    """Two answers: B says " now" where A says nothing, and another last token."""
    right = make_trace([*PROMPT, " 3", " +", " 4", "\n", " is", " so", " 7"], len(PROMPT), 0)
    wrong = make_trace([*PROMPT, " 3", " -", " 4", "\n", " is", " so", " now", " 1"], len(PROMPT), 1)
    return compare(right, wrong).to_dict()


@pytest.fixture(scope="module")
def hostile() -> dict:
    first, second = (make_trace(HOSTILE * 2, 4, k, HOSTILE[0] + "\u202e\x00", HOSTILE[k]) for k in (0, 1))
    return compare(first, second).to_dict()


def data_of(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="comparison">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_text_arrives_unchanged_and_cannot_leave_its_element(hostile: dict):
    page = render_comparison(hostile)
    for side in data_of(page)["units"]:
        assert [unit[0] for unit in side] == HOSTILE * 2
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert "\u202e" not in page
    raw = re.search(r'id="comparison">(.*?)</script>', page, re.DOTALL)
    assert raw is not None
    assert raw[1].isascii()
    assert not set(raw[1]) & set("<>&\x00\x1b")


def test_the_policy_names_exactly_the_inline_code_and_nothing_is_loaded(payload: dict):
    page = render_comparison(payload)
    assert_policy_names_the_inline_code(page)
    assert_nothing_is_loaded_or_written_as_markup(page)
    assert "style=" not in page


def test_the_header_says_what_the_summary_says(payload: dict):
    page, summary = render_comparison(payload), payload["summary"]
    assert "tiny/model, layers 1-2, answer &#39;7&#39;" in page
    assert f"<dd>{100 * summary['edge_overlap']:.0f} %</dd>" in page
    assert f"<dd>{summary['total_variation']:.3f}</dd>" in page
    assert "of 16 tokens in A and 17 in B" in page
    assert "the prompt is the same" in page
    assert '<ul class="notes">' not in page
    strange = copy.deepcopy(payload)
    strange["summary"].update(rank_correlation=None, hub_overlap=None)
    strange["notes"] = ["look at <b>this</b>"]
    page = render_comparison(strange)
    assert "rank correlation" not in page
    assert "shared hubs" not in page
    assert "look at &lt;b&gt;this&lt;/b&gt;" in page


def test_gains_and_losses_are_the_largest_first(payload: dict):
    values = data_of(render_comparison(payload))
    change = [pair[2] for pair in values["pairs"]]
    assert values["gains"]
    assert [change[k] for k in values["gains"]] == sorted((c for c in change if c > 1e-9), reverse=True)[:8]
    assert [change[k] for k in values["losses"]] == sorted(c for c in change if c < -1e-9)[:8]


def test_the_file_is_the_page(tmp_path: Path, hostile: dict):
    path = write_comparison_html(tmp_path / "c.html", hostile)
    assert path.read_bytes().decode("utf-8") == render_comparison(hostile)
    with pytest.raises(OutputError, match="must name a file"):
        write_comparison_html(tmp_path, hostile)


@pytest.fixture
def visit(open_file, tmp_path: Path):  # noqa: F811
    """Open a payload's page from disk."""
    return lambda payload, **options: open_file(write_comparison_html(tmp_path / "c.html", payload), **options)


def unit_of(page, side: int, index: int):
    return page.locator(f'.t[data-side="{side}"][data-index="{index}"]')


@pytest.mark.browser
def test_both_texts_are_on_the_page_in_order_and_their_lines_meet(visit, payload: dict):
    page = visit(payload)
    for side in (0, 1):
        found = page.eval_on_selector_all(f'.t[data-side="{side}"]', "all => all.map(one => Number(one.dataset.index))")
        assert found == list(range(len(payload["units"][side])))
    assert page.locator("#text h2").all_inner_texts() == ["Question", "Reasoning", "Answer"]
    for i, j, _ in payload["pairs"]:
        if i >= 0 and j >= 0:
            boxes = unit_of(page, 0, i).bounding_box(), unit_of(page, 1, j).bounding_box()
            assert abs(boxes[0]["y"] - boxes[1]["y"]) < 1
            assert boxes[1]["x"] > boxes[0]["x"] + 300
    assert page.locator(".t.alone[data-side]").all_inner_texts() == ["now"]


@pytest.mark.browser
def test_pointing_at_a_token_shows_both_numbers_and_frames_the_partner(visit, payload: dict):
    page = visit(payload)
    pair = max(range(len(payload["pairs"])), key=lambda k: min(payload["pairs"][k][:2]) >= 0 and payload["pairs"][k][2])
    i, j, change = payload["pairs"][pair]
    unit_of(page, 0, i).hover()
    shown = page.locator("#panel").inner_text()
    assert f"{100 * payload['units'][0][i]['throughput']:.1f} %" in shown
    assert f"{100 * payload['units'][1][j]['throughput']:.1f} %" in shown
    assert f"+{100 * change:.1f} points" in shown
    assert page.locator(".t.partner").count() == 1
    assert "partner" in unit_of(page, 1, j).get_attribute("class")
    assert {"plus", "strong"} <= set(unit_of(page, 1, j).get_attribute("class").split())
    page.mouse.move(5, 5)
    assert page.locator(".t.partner").count() == 0
    page.locator(".t.alone[data-side]").hover()
    assert "no partner" in page.locator("#panel").inner_text()


@pytest.mark.browser
def test_a_click_pins_and_escape_releases(visit, payload: dict):
    page = visit(payload)
    unit_of(page, 0, 3).click()
    assert unit_of(page, 0, 3).get_attribute("aria-pressed") == "true"
    unit_of(page, 1, 5).hover()
    assert "token 3" in page.locator("#panel").inner_text()
    page.keyboard.press("Escape")
    assert "Point at a token" in page.locator("#panel").inner_text()
    unit_of(page, 0, 3).click()
    page.get_by_role("button", name="unpin").click()
    assert page.locator('[aria-pressed="true"]').count() == 0


@pytest.mark.browser
def test_the_keyboard_moves_in_a_text_and_tab_reaches_the_partner(visit, payload: dict):
    page = visit(payload)
    assert page.locator('.t[tabindex="0"]').count() == 2
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    place = "[document.activeElement.dataset.side, document.activeElement.dataset.index].map(Number)"
    assert page.evaluate(place) == [0, 0]
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(place) == [0, 10]
    page.keyboard.press("Tab")
    assert page.evaluate(place) == [1, 10]
    page.keyboard.press("End")
    assert page.evaluate(place) == [1, 16]
    page.keyboard.press("ArrowUp")
    assert page.evaluate(place)[1] < 16
    page.keyboard.press("Enter")
    assert page.locator('[aria-pressed="true"]').count() == 1
    assert "difference" in unit_of(page, 0, 3).get_attribute("aria-label")


@pytest.mark.browser
def test_tables_and_routes_lead_to_the_text(visit, payload: dict):
    page = visit(payload)
    values = data_of(render_comparison(payload))
    assert page.locator("#tables tbody tr").count() == len(values["gains"]) + len(values["losses"])
    page.locator("#tables tbody button").first.click()
    assert page.locator(".t.on").count() == 1
    page.keyboard.press("Escape")
    page.locator("#routes tbody button").first.hover()
    path = payload["routes"][0]["pairs"]
    there = sum(index >= 0 for pair in path for index in payload["pairs"][pair][:2])
    assert page.locator(".t.route").count() == there
    kinds = page.locator("#routes .kind").all_inner_texts()
    assert [kind == "both" for kind in kinds] == [route["shared"] for route in payload["routes"]]


@pytest.mark.browser
def test_a_phone_stacks_the_texts_without_sideways_scrolling(visit, payload: dict):
    page = visit(payload, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    unit_of(page, 0, 1).tap()
    assert "token 1" in page.locator("#panel").inner_text()
    boxes = unit_of(page, 0, 1).bounding_box(), unit_of(page, 1, 1).bounding_box()
    assert boxes[1]["y"] > boxes[0]["y"] + 10
    assert abs(boxes[1]["x"] - boxes[0]["x"]) < 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_hostile_tokens_are_shown_and_never_run(visit, hostile: dict):
    page = visit(hostile)
    for index in range(len(HOSTILE)):
        unit_of(page, 0, index).hover()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    shown = [text.strip() for text in page.locator('.t[data-side="1"]').all_inner_texts()]
    assert shown[:4] == HOSTILE[:4]
    assert shown[4:8] == [
        "⟨U+2028⟩window.hacked=1⟨U+2029⟩",
        "␀␇␛[31m␡",
        "⟨U+D83D⟩",
        "⟨U+202E⟩evil⟨U+2066⟩",
    ]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_is_readable_and_lightness_alone_carries_the_size(visit, payload: dict, scheme: str):
    page = visit(payload, color_scheme=scheme)
    shades = page.evaluate("""() => {
        const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const luminance = colour => {
            pixel.fillStyle = colour;
            pixel.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const token = document.querySelector(".t"), ramps = [];
        for (const name of ["plus", "minus"]) {
            token.classList.remove("plus", "minus");
            token.classList.add(name);
            const ramp = [];
            for (let f = 0; f <= 1; f += 0.05) {
                token.style.setProperty("--f", f);
                const style = getComputedStyle(token);
                const both = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => b - a);
                ramp.push([(both[0] + 0.05) / (both[1] + 0.05), luminance(style.backgroundColor)]);
            }
            ramps.push(ramp);
        }
        return ramps;
    }""")
    for ramp in shades:
        assert min(contrast for contrast, _ in ramp) >= 4.5
        lightness = [value for _, value in ramp]
        assert lightness == sorted(lightness, reverse=scheme == "light")


@pytest.mark.browser
def test_equal_traces_say_that_nothing_differs(visit):
    one = make_trace([*PROMPT, " so", " 7"], len(PROMPT), 0)
    page = visit(compare(one, one).to_dict())
    assert "No difference anywhere" in page.locator("#legend").inner_text()
    assert page.locator("#tables").inner_text().count("nothing") == 2
    page = visit(compare(one, one, by="steps").to_dict())
    assert page.locator('.t[data-side="0"]').count() == 3
