"""The step view in a real browser: bands as wide as their flow, numbers and text of a step, the way to its tokens."""

import copy
import re
from pathlib import Path

import pytest

from flowgraph.pages.trace_page import render_html, write_html
from tests.fixtures.browser import await_text, browser, open_file, token_of  # noqa: F401
from tests.fixtures.pages import HOSTILE, make_payload

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def payload() -> dict:
    return make_payload(90, 18, 3)


@pytest.fixture
def visit(open_file, tmp_path: Path):  # noqa: F811
    return lambda payload, **options: open_file(write_html(tmp_path / "trace.html", payload), **options)


def steps_of(page):
    page.keyboard.press("2")
    # The steps are drawn once their holder has been measured, a moment after the view is switched.
    page.locator(".step").first.wait_for()
    return page.locator(".step")


def panel_of(page) -> str:
    return page.locator("#detail").inner_text()


def percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.01 else 1}f} %"


@pytest.mark.parametrize("steps", [None, {}])
def test_a_trace_without_steps_has_no_step_view(visit, payload: dict, steps):
    without = {name: value for name, value in payload.items() if name != "steps"} | ({"steps": None} if steps else {})
    page = visit(without)
    assert page.locator("#show-steps").count() == 0
    page.keyboard.press("2")
    assert page.locator("#text").is_visible()


def test_steps_stand_from_left_to_right_as_tall_as_their_throughput(visit, payload: dict):
    page = visit(payload)
    nodes = [node for node in payload["steps"]["nodes"] if node["throughput"] > 0]
    assert steps_of(page).count() == len(nodes) > 5
    assert page.locator("#text").is_hidden()
    boxes = page.eval_on_selector_all(
        ".river .node", "nodes => nodes.map(n => [n.getAttribute('x'), n.getAttribute('height')].map(Number))"
    )
    places = [x for x, _ in boxes]
    assert places == sorted(places)
    assert len(set(places)) == len(nodes)
    unit = boxes[0][1] / nodes[0]["throughput"]
    assert unit > 200
    for (_, height), node in zip(boxes, nodes, strict=True):
        assert height == pytest.approx(max(2, unit * node["throughput"]), rel=1e-3, abs=0.02)
    assert page.locator(".river text").all_text_contents()[1:3] == [percent(node["throughput"]) for node in nodes[1:3]]


def test_bands_are_as_wide_as_their_flow_and_run_beside_the_steps_between(visit, payload: dict):
    page = visit(payload)
    steps_of(page)
    edges = {(source, target): flow for source, target, flow in payload["steps"]["edges"]}
    unit = page.eval_on_selector(".river .node", "node => Number(node.getAttribute('height'))")
    unit /= next(node["throughput"] for node in payload["steps"]["nodes"] if node["throughput"] > 0)
    widths = "bands => bands.map(band => [band.dataset.ends, band.getAttribute('stroke-width')])"
    drawn = page.eval_on_selector_all(".band", widths)
    assert len(drawn) == min(120, len(edges))
    for ends, width in drawn:
        source, target = (int(end) - 1 for end in ends.split("-"))
        assert float(width) == pytest.approx(max(1, unit * edges[source, target]), rel=1e-3, abs=0.02)
    crossed = page.evaluate("""() => {
        const inside = [];
        const nodes = [...document.querySelectorAll(".river .node")];
        const boxes = nodes.map(node => [node.parentElement.dataset.step, node.getBBox()]);
        for (const band of document.querySelectorAll(".band")) {
            const ends = band.dataset.ends.split("-").map(end => String(end - 1));
            const half = band.getAttribute("stroke-width") / 2;
            for (const [step, box] of boxes) {
                if (ends.includes(step)) continue;
                const length = band.getTotalLength();
                for (let i = 0; i <= 60; i++) {
                    const { x, y } = band.getPointAtLength(length * i / 60);
                    const within = x > box.x + 2 && x < box.x + box.width - 2;
                    if (within && y + half > box.y + 2 && y - half < box.y + box.height - 2)
                        inside.push([band.dataset.ends, step]);
                }
            }
        }
        return inside;
    }""")
    assert crossed == []


def test_a_step_shows_its_numbers_and_text_and_a_second_click_goes_there(visit, payload: dict):
    page = visit(payload)
    node = next(node for node in payload["steps"]["nodes"] if node["region"] == "reasoning" and node["throughput"] > 0)
    card = steps_of(page).locator(f"xpath=self::*[@data-step='{node['index']}']")
    card.hover()
    assert f"Step {node['index'] + 1} of {len(payload['steps']['nodes'])}" in panel_of(page)
    assert percent(node["throughput"]) in panel_of(page)
    assert " ".join(node["text"].split()) in " ".join(panel_of(page).split())
    card.click()
    assert card.get_attribute("aria-pressed") == "true"
    into = [edge for edge in payload["steps"]["edges"] if edge[1] == node["index"]]
    assert page.locator(".band.in").count() == len(into)
    card.click()
    assert page.locator("#text").is_visible()
    inside = page.eval_on_selector_all("#text .t.instep", "tokens => tokens.map(token => Number(token.dataset.index))")
    assert inside == list(range(node["start"], node["stop"]))
    assert page.evaluate("Number(document.activeElement.dataset.index)") == node["start"]


def test_question_and_answer_steps_say_what_enters_and_what_ends(visit, payload: dict):
    page = visit(payload)
    cards = steps_of(page)
    cards.first.hover()
    assert re.search(r"enters\n\S+ %\nstarts in this step", panel_of(page))
    cards.last.hover()
    assert re.search(r"ends\n\S+ %\nis absorbed in this step", panel_of(page))


def test_a_band_shows_its_flow_and_both_texts(visit, payload: dict):
    page = visit(payload)
    steps_of(page)
    source, target, flow = payload["steps"]["edges"][0]
    page.locator(f'.band[data-ends="{source + 1}-{target + 1}"]').dispatch_event("click")
    assert f"{percent(flow)} of the flow" in panel_of(page)
    assert f"from step {source + 1} to step {target + 1}" in panel_of(page)
    assert page.locator("#detail blockquote").count() == 2
    assert page.locator(".step.on").count() == 2
    page.keyboard.press("Escape")
    assert "One step at a time" in panel_of(page)


def test_the_keyboard_walks_over_the_steps(visit, payload: dict):
    page = visit(payload)
    cards = steps_of(page)
    cards.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    third = int(cards.nth(2).get_attribute("data-step") or -1)
    assert f"Step {third + 1} of" in panel_of(page)
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement === [...document.querySelectorAll('.step')].at(-1)")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("#text").is_visible()
    page.keyboard.press("2")
    assert page.locator("#text").is_hidden()


def test_search_marks_steps(visit, payload: dict):
    changed = copy.deepcopy(payload)
    changed["tokens"][40]["text"] = " pears"
    page = visit(changed)
    steps_of(page)
    page.locator("#search").fill("pears")
    await_text(page, "#hits", "1 match")
    page.locator("#search").press("Enter")
    assert page.locator("#hits").inner_text() == "1 of 1"
    step = next(node["index"] for node in payload["steps"]["nodes"] if node["start"] <= 40 < node["stop"])
    assert page.eval_on_selector_all(".step.hit", "cards => cards.map(card => Number(card.dataset.step))") == [step]
    assert f"Step {step + 1} of" in panel_of(page)


def test_of_many_steps_the_ends_of_the_strongest_bands_are_shown_and_the_rest_is_counted(visit, payload: dict):
    many = copy.deepcopy(payload)
    number = 300
    texts = [dict(many["tokens"][i % 90], index=i, start=3 * i, end=3 * i + 3) for i in range(2 * number)]
    common = {"region": "reasoning", "text": "", "throughput": 0.5, "source": 0, "absorbed": 0}
    nodes = [{"index": i, "start": 2 * i, "stop": 2 * i + 2, **common} for i in range(number)]
    bands = [[i, i + 1, 0.4 - i / 1000] for i in range(number - 1)]
    many |= {"tokens": texts, "steps": {"by": "lines", "nodes": nodes, "edges": bands, "edges_left_out": 7}}
    page = visit(many)
    cards = steps_of(page)
    assert page.eval_on_selector_all(".step", "all => all.map(card => Number(card.dataset.step))") == list(range(40))
    held = sum(band[2] for band in bands[:39]) / (0.5 * number)
    said = page.locator("#step-count").inner_text()
    assert f"40 of 300 steps, those of the strongest bands, and 39 of 306 bands, with {percent(held)}" in said
    page.select_option("#step-limit", "80")
    assert cards.count() == 80
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_hostile_text_is_data_in_steps_too(visit):
    texts = [text + ("\n" if index % 3 == 2 else "") for index, text in enumerate(HOSTILE * 4)]
    payload = make_payload(len(texts), 9, 3, texts)
    page = visit(payload)
    cards = steps_of(page)
    for index in range(0, cards.count(), 3):
        cards.nth(index).hover()
    cards.nth(1).click()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert "⟨U+202E⟩" in "".join(cards.all_inner_texts())
    assert "\u202e" not in page.locator("body").inner_text()


def test_a_phone_scrolls_the_river_not_the_page(visit, payload: dict):
    page = visit(payload, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.locator("#show-steps").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("(r => r.scrollWidth > r.clientWidth)(document.getElementById('river'))")
    page.locator(".step").nth(1).tap()
    assert "Step " in panel_of(page)


def test_a_page_of_2000_tokens_with_steps_stays_under_three_megabytes(payload: dict):
    big = copy.deepcopy(payload)
    big["tokens"] = [dict(payload["tokens"][i % 90], index=i, start=3 * i, end=3 * i + 3) for i in range(2000)]
    big["edges"] = [[i % 1999, i % 1999 + 1, 1 / 7, 1 / (7 + i)] for i in range(20_000)]
    nodes = payload["steps"]["nodes"]
    big["steps"]["nodes"] = [dict(nodes[i % len(nodes)], index=i, start=10 * i, stop=10 * i + 10) for i in range(200)]
    big["steps"]["edges"] = [[s, t, 1 / (3 + s + t)] for s in range(200) for t in range(s + 1, 200)]
    assert len(render_html(big).encode()) < 3_000_000
