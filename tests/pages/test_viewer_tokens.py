"""The token view in a real browser: roles in words, routes that play, search, theme, keys, odd text, long traces."""

import copy
from pathlib import Path
from typing import Any

import pytest

from flowgraph.pages.trace_page import write_html
from tests.fixtures.browser import await_text, browser, open_file, token_of  # noqa: F401
from tests.fixtures.pages import infeasible, long_payload, make_payload

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def payload() -> dict:
    return make_payload(40, 12, 3)


@pytest.fixture
def visit(open_file, tmp_path: Path):  # noqa: F811
    return lambda payload, **options: open_file(write_html(tmp_path / "trace.html", payload), **options)


def panel_of(page) -> str:
    return page.locator("#detail").inner_text()


def marked(page, name: str) -> list[int]:
    return page.eval_on_selector_all(f"#text .t.{name}", "tokens => tokens.map(token => Number(token.dataset.index))")


def test_a_click_says_in_words_what_part_a_token_plays(visit, payload: dict):
    page = visit(payload)
    hub = payload["hubs"][1]["token"]
    token_of(page, hub).click()
    assert "hub number 2 in the reasoning by the flow that passes through" in panel_of(page)
    checkpoint = payload["checkpoints"][0]["token"]
    token_of(page, checkpoint).click()
    assert "checkpoint number 1 in the reasoning at gathering flow from many places" in panel_of(page)
    token_of(page, 39).click()
    assert "leaf the flow ends here, in the answer" in panel_of(page)
    token_of(page, 0).click()
    assert "root flow only starts here" in panel_of(page)


def test_a_token_that_leads_nowhere_is_a_leaf_and_one_that_nothing_reaches_is_idle(visit, payload: dict):
    odd = copy.deepcopy(payload)
    odd["hubs"] = odd["checkpoints"] = []
    odd["tokens"][20].update(h=0.0, throughput=0.0)
    odd["tokens"][21].update(throughput=0.0)
    page = visit(odd)
    for index, words in ((20, "leaf a dead end"), (21, "idle no flow from the question arrives here"), (22, "relay")):
        token_of(page, index).click()
        assert words in panel_of(page)


def test_without_a_flow_no_part_is_claimed(visit):
    page = visit(infeasible())
    token_of(page, 0).click()
    assert "idle" not in panel_of(page)
    assert "relay" not in panel_of(page)
    for key in ("p", ".", ",", "2", "n"):
        page.keyboard.press(key)
    assert page.locator("#player").is_hidden()


def stop_the_clock(page: Any) -> None:
    """Time goes on in ``run_for`` alone: left to itself, a slow machine would see a route play on."""
    page.clock.install(time=0)
    page.clock.pause_at(1000)


def test_a_route_plays_token_by_token_to_its_end(visit, payload: dict):
    page = visit(payload)
    stop_the_clock(page)
    route = payload["routes"][0]["tokens"]
    page.get_by_role("button", name="Play route 1", exact=True).click()
    assert marked(page, "walk") == [route[0]]
    assert f"token {route[0]} " in panel_of(page)
    page.clock.run_for(1150)
    assert marked(page, "walk") == [route[1]]
    assert marked(page, "on") == [route[0]]
    assert page.locator(".focus .route.ahead").count() == len(route) - 2
    page.clock.run_for(1100 * len(route))
    assert marked(page, "walk") == [route[-1]]
    assert page.locator("#play-pause").inner_text() == "▶ play"
    assert f"token {len(route)} of {len(route)}" in page.locator("#play-place").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#player").is_hidden()
    assert marked(page, "walk") == []


def test_a_route_goes_on_and_back_by_keys_and_stops_on_another_choice(visit, payload: dict):
    page = visit(payload)
    stop_the_clock(page)
    route = payload["routes"][0]["tokens"]
    page.keyboard.press("p")
    page.keyboard.press(".")
    assert marked(page, "walk") == [route[1]]
    page.clock.run_for(5000)
    assert marked(page, "walk") == [route[1]], "a step by hand pauses"
    page.keyboard.press(",")
    assert marked(page, "walk") == [route[0]]
    assert page.locator("#play-back").is_disabled()
    token_of(page, 30).click()
    assert page.locator("#player").is_hidden()
    assert "token 30 " in panel_of(page)


def test_with_reduced_motion_a_route_waits_for_the_reader(visit, payload: dict):
    page = visit(payload, reduced_motion="reduce")
    stop_the_clock(page)
    page.get_by_role("button", name="Play route 2", exact=True).click()
    page.clock.run_for(5000)
    assert marked(page, "walk") == [payload["routes"][1]["tokens"][0]]
    page.get_by_role("button", name="One token forward").click()
    assert marked(page, "walk") == [payload["routes"][1]["tokens"][1]]


def test_search_marks_every_match_counts_and_goes_on(visit, payload: dict):
    page = visit(payload)
    apples = [t["index"] for t in payload["tokens"] if t["text"] == " apples"]
    page.keyboard.press("/")
    page.keyboard.type("APPLES")
    await_text(page, "#hits", "1 of 4")
    assert marked(page, "hit") == apples
    assert marked(page, "now") == apples[:1]
    page.keyboard.press("Enter")
    assert marked(page, "now") == apples[1:2]
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    assert marked(page, "now") == apples[3:]
    page.locator("#search").blur()
    page.keyboard.press("n")
    assert marked(page, "now") == apples[:1]
    page.keyboard.press("N")
    assert page.locator("#hits").inner_text() == "4 of 4"
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert marked(page, "hit") == []
    assert page.locator("#search").input_value() == ""
    assert page.locator("#hits").inner_text() == ""


def test_search_finds_words_across_tokens_and_says_when_there_is_none(visit, payload: dict):
    page = visit(payload)
    page.locator("#search").fill("has 3 app")
    await_text(page, "#hits", "1 of 4")
    assert marked(page, "now") == [1, 2, 3, 4]
    page.locator("#search").fill("</script>")
    await_text(page, "#hits", "no match")
    assert marked(page, "hit") == []
    assert page.locator("#hit-on").is_disabled()


def test_the_theme_button_turns_the_page_over(visit, payload: dict):
    page = visit(payload, color_scheme="dark")
    button, shade = page.locator("#theme"), "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    button.click()
    assert button.inner_text() == "Theme: light"
    assert page.evaluate(shade) != dark
    page.keyboard.press("t")
    assert button.inner_text() == "Theme: dark"
    assert page.evaluate(shade) == dark
    button.click()
    assert button.inner_text() == "Theme: auto"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(shade) != dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_soft_text_and_the_colours_of_flow_are_readable(visit, payload: dict, scheme: str):
    page = visit(payload, color_scheme=scheme)
    ratios = page.evaluate("""() => {
        const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const probe = document.body.appendChild(document.createElement("b"));
        const luminance = name => {
            probe.style.color = `var(${name})`;
            pixel.fillStyle = getComputedStyle(probe).color;
            pixel.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        return ["--ink", "--soft", "--in", "--out"].flatMap(name =>
            ["--page", "--card"].map(ground => ratio(luminance(name), luminance(ground))));
    }""")
    assert len(ratios) == 8
    assert min(ratios) >= 4.5


def test_help_opens_and_closes_by_keyboard(visit, payload: dict):
    page = visit(payload)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert page.locator("#keys dt").count() == page.locator("#keys dd").count() >= 10
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.get_by_role("button", name="Keyboard help").click()
    page.get_by_role("button", name="Close").click()
    assert page.locator("#help").is_hidden()


def test_letters_typed_into_the_search_are_no_commands(visit, payload: dict):
    page = visit(payload)
    page.locator("#search").focus()
    page.keyboard.type("pnt?2")
    assert page.locator("#search").input_value() == "pnt?2"
    assert page.locator("#theme").inner_text() == "Theme: auto"
    assert page.locator("#help").is_hidden()
    assert page.locator("#player").is_hidden()


def test_every_control_has_a_name(visit, payload: dict):
    page = visit(payload)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, [role=button]")]
        .filter(element => !(element.getAttribute("aria-label") ?? element.textContent).trim())
        .filter(element => !element.labels?.length)
        .map(element => element.outerHTML)""")
    assert nameless == []


def test_text_from_right_to_left_runs_right_to_left(visit):
    words = ["لدى", " توم", " ثلاث", " تفاحات", ".", " كم", " تفاحة", "؟", " سبع"]
    page = visit(make_payload(36, 9, 3, words * 4))
    first, second = (token_of(page, index).bounding_box() for index in (0, 1))
    assert first["x"] > second["x"]
    token_of(page, 0).focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("Number(document.activeElement.dataset.index)") == 1
    page.keyboard.press("ArrowRight")
    assert page.evaluate("Number(document.activeElement.dataset.index)") == 0


def test_an_emoji_over_several_tokens_and_a_lone_surrogate_are_shown_once_and_found(visit):
    texts = ["Eat", " 🍎", " 🍎", " 🍎", " now", "\ud83d", " or", " later", ".", "Yes"]
    payload = make_payload(10, 3, 2, texts)
    for index in (1, 2, 3):
        payload["tokens"][index].update(start=3, end=6)
    page = visit(payload)
    assert [token_of(page, index).inner_text().strip() for index in (1, 2, 3, 5)] == ["🍎", "‥", "‥", "⟨U+D83D⟩"]
    token_of(page, 2).click()
    assert "part of the character before" in panel_of(page)
    page.locator("#search").fill("🍎 now")
    await_text(page, "#hits", "1 of 1")
    assert marked(page, "hit") == [1, 2, 3, 4]


def test_print_keeps_text_and_tables_and_drops_the_controls(visit, payload: dict):
    page = visit(payload, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#text").is_visible()
    assert page.locator("#roles table").first.is_visible()
    for hidden in (".toolbar", "#panel", ".slider"):
        assert page.locator(hidden).is_hidden()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert len(page.pdf()) > 10_000


def test_a_trace_of_8000_tokens_is_all_there_and_quick_to_click(visit):
    page = visit(long_payload(8_000))
    assert page.locator("#text .t").count() == 8_000
    spent = page.evaluate("""() => {
        const start = performance.now();
        document.querySelector('.t[data-index="4000"]').click();
        return performance.now() - start;
    }""")
    assert "token 4000 " in panel_of(page)
    assert spent < 2_000, "a click is no matter of seconds, on however busy a machine"


def test_a_trace_of_100000_tokens_opens_as_steps_and_its_text_on_demand(visit):
    page = visit(long_payload(100_000))
    assert "This trace has 100,000 tokens, too many to show at once" in page.locator("#long").inner_text()
    assert page.locator("#step-view").is_visible()
    assert page.locator(".step").count() == 40
    assert "40 of 4,000 steps" in page.locator("#step-count").inner_text()
    assert page.locator(".t[data-index]").count() == 0
    page.keyboard.press("1")
    folds = page.locator(".fold")
    assert 300 < folds.count() < 1_000
    folds.nth(2).click()
    opened = page.locator(".t[data-index]").count()
    assert 100 < opened < 600
    assert folds.nth(2).get_attribute("aria-expanded") == "true"
    folds.nth(2).click()
    assert page.locator(".t[data-index]").count() == 0
    page.locator("#roles button").first.click()
    assert page.locator('.t[aria-pressed="true"]').count() == 1, "choosing a token opens its section"
    page.locator("#search").fill("word96")
    matches = sum(i % 97 == 96 and i % 25 > 0 for i in range(100_000))
    await_text(page, "#hits", f"{matches:,} matches")
    page.locator("#search").press("Enter")
    assert page.locator(".t.hit.now").count() == 1


def test_a_long_trace_without_steps_opens_as_folded_text(visit):
    page = visit(long_payload(12_000) | {"steps": None})
    assert "Its text opens section by section" in page.locator("#long").inner_text()
    assert page.locator(".fold").count() > 40
    assert page.locator("#show-steps").count() == 0
    page.keyboard.press("2")
    page.locator(".fold").first.click()
    assert page.locator(".t[data-index]").count() > 100
