"""The page is whole, shows what the payload says, and treats token text as data."""

import copy
import json
import re
from pathlib import Path

import pytest

from flowgraph.analysis.backbone import backbone
from flowgraph.errors import OutputError
from flowgraph.pages.trace_page import render_html, write_html
from tests.fixtures.browser import (
    assert_nothing_is_loaded_or_written_as_markup,
    assert_policy_names_the_inline_code,
    browser,  # noqa: F401
    contrasts,
    is_dark,
    open_file,  # noqa: F401
    token_of,
)
from tests.fixtures.pages import HOSTILE, infeasible, long_payload, make_flow, make_payload

MENTIONED = (  # names that are never fetched
    "http://www.w3.org/2000/svg",
    "https://d3js.org/d3-array/",
    "https://github.com/d3/d3-sankey",
)


@pytest.fixture(scope="module")
def payload() -> dict:
    return make_payload(40, 12, 3)


@pytest.fixture(scope="module")
def hostile() -> dict:
    payload = make_payload(2 * len(HOSTILE), 6, 3, HOSTILE * 2)
    payload["model"] = HOSTILE[0] + "\u202e\x00"
    payload["provenance"] = {"model": payload["model"], HOSTILE[1]: [HOSTILE[0], 2], "nested": {"x": HOSTILE[-1]}}
    return payload


def data_of(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_token_text_arrives_unchanged_and_cannot_leave_its_element(hostile: dict):
    page = render_html(hostile)
    assert [token[0] for token in data_of(page)["tokens"]] == HOSTILE * 2
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    raw = re.search(r'id="trace">(.*?)</script>', page, re.DOTALL)
    assert raw is not None
    assert raw[1].isascii()
    assert not set(raw[1]) & set("<>&\u2028\u2029\x00\x1b")


def test_text_outside_the_data_is_escaped_and_visible(hostile: dict):
    page = render_html(hostile)
    assert "&lt;/script&gt;&lt;img src=x onerror=window.hacked=1&gt;⟨U+202E⟩␀" in page
    assert "\u202e" not in page
    assert "\x00" not in page


def test_the_policy_names_exactly_the_inline_code(payload: dict):
    assert_policy_names_the_inline_code(render_html(payload))


def test_nothing_is_loaded_and_nothing_is_written_as_markup(payload: dict):
    assert_nothing_is_loaded_or_written_as_markup(render_html(payload), names=MENTIONED)


def test_the_vendored_files_carry_their_licences(payload: dict):
    page = render_html(payload)
    assert page.count("Redistribution and use in source and binary forms") == 2
    assert page.count("Mike Bostock\nAll rights reserved") == 2


def test_the_header_says_what_the_summary_says(payload: dict):
    payload = copy.deepcopy(payload)
    summary, backbone = payload["summary"], payload["backbone"]
    backbone["share"] = 0.9034
    page = render_html(payload)
    assert "tiny/model" in page
    assert f"<dd>{summary['mean_hops']:.1f}</dd>" in page
    assert f"<dd>{summary['alpha']:.2g}</dd>" in page
    assert "<dd>90.3 %</dd>" in page
    assert f"on {len(backbone['edges']):,} of {summary['num_edges']:,} edges" in page
    assert "12 question, 25 reasoning, 3 answer" in page
    assert "<dt>versions.torch</dt><dd>2</dd>" in page
    assert "<dt>layers</dt><dd>1, 2</dd>" in page
    assert "left out of this graph" not in page
    assert "answer found by" not in page
    payload["provenance"] = {**payload["provenance"], "answer_by": "last sentence, unfinished text"}
    assert "answer found by: last sentence, unfinished text" in render_html(payload)


@pytest.mark.parametrize(("kept", "shown"), [(0.9871, "98.7 %"), (0.99999, "99.9 %"), (0.5, "50 %")])
def test_a_pruned_graph_says_how_much_is_left(payload: dict, kept: float, shown: str):
    pruned = copy.deepcopy(payload)
    pruned["summary"]["kept_flow"] = kept
    assert f"it keeps {shown} of the flow and 100 % of the attention" in render_html(pruned)


def test_an_infeasible_trace_says_so_and_keeps_its_text():
    page = render_html(infeasible())
    assert "No question token reaches the answer" in page
    assert [token[0] for token in data_of(page)["tokens"]] == ["Why", " not", "?"]
    assert 'id="arcs"' not in page


def test_two_tokens_are_enough():
    page = render_html(make_payload(2, 1, 1))
    assert data_of(page)["edges"] == [[0, 1, 1.0]]
    assert data_of(page)["entering"] == [[0, 1.0]]
    assert data_of(page)["leaving"] == [[1, 1.0]]
    assert "<dd>100 %</dd>" in page


def test_numbers_that_are_none_or_not_finite_are_left_out(payload: dict):
    strange = copy.deepcopy(payload)
    strange["tokens"][3].update(g=float("inf"), h=float("nan"))
    strange["summary"].update(alpha=None)
    strange["model"] = None
    page = render_html(strange)
    assert data_of(page)["tokens"][3][3:5] == [None, None]
    assert "alpha</dt>" not in page


def test_tokens_that_share_a_character_are_marked(payload: dict):
    shared = copy.deepcopy(payload)
    for index in (5, 6, 7):
        shared["tokens"][index].update(text="🍎", start=20, end=22)
    assert [token[6] for token in data_of(render_html(shared))["tokens"][4:9]] == [0, 0, 1, 1, 0]


def test_a_long_trace_stays_small_and_says_what_it_leaves_out(payload: dict):
    big = copy.deepcopy(payload)
    big["tokens"] = [dict(payload["tokens"][i % 40], index=i, start=3 * i, end=3 * i + 3) for i in range(2000)]
    big["edges"] = [[i % 1999, i % 1999 + 1, 1 / 7, 1 / (7 + i)] for i in range(30_000)]
    big["edges_left_out"] = 11
    big["backbone"]["edges"] = [[source, target, flow] for source, target, _, flow in big["edges"][:25_000]]
    page = render_html(big)
    assert len(page.encode()) < 3_000_000
    values = data_of(page)
    assert len(values["edges"]) == 20_000
    assert values["edges_left_out"] == 10_011
    assert values["backbone"] == {"share": pytest.approx(payload["backbone"]["share"], abs=1e-6), "num_edges": 25_000}


def test_the_file_is_the_page(tmp_path: Path, hostile: dict):
    path = write_html(tmp_path / "trace.html", hostile)
    assert path.read_bytes().decode("utf-8") == render_html(hostile)
    with pytest.raises(OutputError, match="must name a file"):
        write_html(tmp_path, hostile)


@pytest.fixture
def visit(open_file, tmp_path: Path):  # noqa: F811
    """Open a payload's page from disk."""
    return lambda payload, **options: open_file(write_html(tmp_path / "trace.html", payload), **options)


def strongest(payload: dict, region: str) -> dict:
    return max((t for t in payload["tokens"] if t["region"] == region), key=lambda token: token["throughput"])


def panel_of(page) -> str:
    return page.locator("#panel").inner_text()


@pytest.mark.browser
def test_every_token_is_on_the_page_in_order_and_in_its_section(visit, payload: dict):
    page = visit(payload)
    assert page.locator("#text .t").count() == 40
    indices = page.eval_on_selector_all("#text .t", "tokens => tokens.map(token => Number(token.dataset.index))")
    assert indices == list(range(40))
    assert page.locator("#text h2").all_inner_texts() == ["Question", "Reasoning", "Answer"]
    assert page.locator(".answer .t").count() == 3
    assert "⏎" in token_of(page, 6).inner_text()
    above, below = (token_of(page, index).bounding_box() for index in (6, 7))
    assert below["y"] > above["y"] + 5, "a line break in the text is one on the page"


@pytest.mark.browser
def test_pointing_at_a_token_shows_its_numbers_and_its_curves(visit, payload: dict):
    page = visit(payload)
    token = strongest(payload, "reasoning")
    token_of(page, token["index"]).hover()
    shown = panel_of(page)
    assert f"token {token['index']} · reasoning · generated" in shown
    assert f"{100 * token['throughput']:.1f} %" in shown
    assert f"{token['h']:.3f}" in shown
    assert f"{token['g']:.3f}" in shown
    into = [edge for edge in payload["edges"] if edge[1] == token["index"]]
    assert f"{100 * into[0][3]:.1f} %" in shown
    assert page.locator(".focus .in").count() == min(14, len(into))
    page.mouse.move(5, 5)
    assert "One token at a time" in panel_of(page)
    assert page.locator(".focus path").count() == 0


@pytest.mark.browser
def test_a_question_token_says_what_starts_there_and_an_answer_token_what_ends(visit, payload: dict):
    page = visit(payload)
    token_of(page, 0).hover()
    assert "starts here" in panel_of(page)
    token_of(page, 39).hover()
    assert "ends here" in panel_of(page)


def move_slider(page, to: int):
    page.eval_on_selector(
        "#arcs", "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }", to
    )


@pytest.mark.browser
def test_the_slider_keeps_the_edges_and_the_share_of_the_backbone(visit, payload: dict):
    page, flow = visit(payload), make_flow(40, 12, 3)
    known = len(payload["edges"])
    assert 0 < page.locator(".arcs .all path").count() <= 60
    page.locator("#arcs").focus()
    page.keyboard.press("Home")
    assert page.locator(".arcs .all path").count() == 0
    assert page.locator("#arc-share").inner_text() == "0 % of the flow"
    page.keyboard.press("ArrowRight")
    assert page.locator(".arcs .all path").count() == min(5, backbone(flow, 0.05).num_edges)
    page.keyboard.press("End")
    assert page.locator(".arcs .all path").count() == known
    assert page.locator("#arc-share").inner_text() == "100 % of the flow"
    sizes = {backbone(flow, percent / 100).num_edges: percent for percent in range(5, 100, 5)}
    met = 0
    for stop in range(int(page.get_attribute("#arcs", "max"))):
        move_slider(page, stop)
        shown = page.locator(".arcs .all path").count()
        held = sum(edge[3] for edge in payload["edges"][:shown]) / payload["summary"]["mean_hops"]
        assert f"stay on {shown} of {known} edges" in page.locator("#arc-count").inner_text()
        assert percent_in(page, "#arc-count", r"([\d.]+) % of all hops") == pytest.approx(100 * held, abs=0.1)
        if shown in sizes:
            exact = 100 * backbone(flow, sizes[shown] / 100).share
            assert percent_in(page, "#arc-share", r"^([\d.]+) %") == pytest.approx(exact, abs=0.1)
            met += 1
    assert met >= 15, "the stops by share are the backbones of those shares"


def percent_in(page, selector: str, pattern: str) -> float:
    found = re.search(pattern, page.locator(selector).inner_text())
    assert found is not None
    return float(found[1])


@pytest.mark.browser
def test_the_slider_knows_its_share_where_weak_edges_are_not_listed(visit):
    page = visit(make_payload(40, 12, 3, max_edges=100))
    move_slider(page, 3)
    count = re.search(r"stay on (\d+) of 777", page.locator("#arc-count").inner_text())
    assert count is not None
    flow, size = make_flow(40, 12, 3), int(count[1])
    strongest = flow.edge_flow.argsort(descending=True, stable=True)[:size]
    carried = flow.source.clone()
    for edge in strongest[flow.graph.edge_index[0, strongest].argsort(stable=True)].tolist():
        source, target = flow.graph.edge_index[:, edge].tolist()
        carried[target] += carried[source] * flow.edge_flow[edge] / flow.throughput[source]
    exact = float((carried * flow.absorbed / flow.throughput.clamp(min=1e-300)).sum())
    assert 0 < size < 100
    assert percent_in(page, "#arc-share", r"^([\d.]+) %") == pytest.approx(100 * exact, abs=0.1)


@pytest.mark.browser
def test_the_first_view_shows_whole_routes_of_a_long_trace(visit):
    # A chain of 800 hops: no smaller number of edges makes a route from question to answer.
    page = visit(long_payload(8_000))
    assert page.locator("#arc-share").inner_text() == "100 % of the flow"
    assert page.locator(".arcs .all path").count() > 700


@pytest.mark.browser
def test_edges_without_a_whole_route_are_counted_by_their_hops(visit):
    page, flow = visit(make_payload(40, 12, 3, max_edges=1)), make_flow(40, 12, 3)
    held = float(flow.edge_flow.sort(descending=True).values[:1].sum() / flow.edge_flow.sum())
    assert percent_in(page, "#arc-share", r"^([\d.]+) % of all hops") == pytest.approx(100 * held, abs=0.1)
    assert "on 1 of 777 edges with flow, which alone make no route" in page.locator("#arc-count").inner_text()
    assert page.locator(".arcs .all path").count() == 1


def test_the_numbers_of_edges_are_told_apart():
    """Every edge of the graph, those that carry flow, and those of the backbone."""
    payload = make_payload(40, 12, 3)
    page = " ".join(render_html(payload).split())
    num_flowing = len(payload["edges"])
    num_edges = payload["summary"]["num_edges"]
    num_kept = len(payload["backbone"]["edges"])
    assert f"of the flow, on {num_kept} of {num_edges} edges, of which {num_flowing} carry flow" in page
    assert "times this flow is the most that fits through the attention" in page


@pytest.mark.browser
def test_the_quantities_of_a_token_are_explained_beside_their_numbers(visit, payload: dict):
    page = visit(payload)
    page.locator('.t[data-index="20"]').click()
    notes = page.locator(".numbers dd.note").all_inner_texts()
    assert notes == [
        "of the flow passes here: h · g",
        "influence on the answer, over all paths",
        "influence that arrives from the question",
    ]
    assert "context (chat template)" in page.locator("#legend").inner_text()


@pytest.mark.browser
def test_curves_follow_their_tokens(visit, payload: dict):
    page = visit(payload)
    source = payload["backbone"]["edges"][0][0]
    start_of_first_curve = """index => {
        const path = document.querySelector(".arcs .all path"), box = path.ownerSVGElement.getBoundingClientRect();
        const token = document.querySelector(`.t[data-index="${index}"]`).getClientRects()[0];
        return Math.abs(path.getPointAtLength(0).x + box.left - (token.left + token.right) / 2);
    }"""
    assert page.evaluate(start_of_first_curve, source) < 1
    page.set_viewport_size({"width": 420, "height": 800})
    for _ in range(100):  # the curves are drawn again after the change of size, when the browser gets to it
        if page.evaluate(start_of_first_curve, source) < 1:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(start_of_first_curve, source) < 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


@pytest.mark.browser
def test_a_click_pins_and_escape_releases(visit, payload: dict):
    page = visit(payload)
    token_of(page, 20).click()
    assert token_of(page, 20).get_attribute("aria-pressed") == "true"
    token_of(page, 15).hover()
    assert "token 20 " in panel_of(page)
    page.keyboard.press("Escape")
    assert token_of(page, 20).get_attribute("aria-pressed") == "false"
    assert "One token at a time" in panel_of(page)
    token_of(page, 15).click()
    page.get_by_role("button", name="unpin").click()
    assert "One token at a time" in panel_of(page)


@pytest.mark.browser
def test_the_keyboard_reaches_every_token(visit, payload: dict):
    page = visit(payload)
    assert page.locator('.t[tabindex="0"]').count() == 1
    page.locator("#arcs").focus()
    page.keyboard.press("Tab")
    assert "token 0 " in panel_of(page)
    page.keyboard.press("ArrowRight")
    assert "token 1 " in panel_of(page)
    page.keyboard.press("End")
    assert "token 39 " in panel_of(page)
    page.keyboard.press("ArrowRight")
    assert "token 39 " in panel_of(page)
    page.keyboard.press("ArrowUp")
    above = page.evaluate("Number(document.activeElement.dataset.index)")
    assert above < 37
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    assert f"token {above} " in panel_of(page)
    page.keyboard.press("Escape")
    assert page.locator('.t[tabindex="0"]').count() == 1
    name = token_of(page, 3).get_attribute("aria-label")
    assert name is not None
    assert name.startswith("3, token 3, question, throughput ")


@pytest.mark.browser
def test_a_tap_pins_on_a_phone_without_sideways_scrolling(visit, payload: dict):
    page = visit(payload, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    token_of(page, 20).tap()
    assert "token 20 " in panel_of(page)
    assert page.locator("#panel").bounding_box()["y"] < 800
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_a_route_highlights_its_tokens(visit, payload: dict):
    page = visit(payload)
    page.locator("#routes .path").first.hover()
    route = payload["routes"][0]["tokens"]
    marked = page.eval_on_selector_all("#text .t.on", "tokens => tokens.map(token => Number(token.dataset.index))")
    assert marked == list(route)
    assert page.locator(".focus .route").count() == len(route) - 1
    assert page.locator("#routes li").count() == len(payload["routes"])
    assert page.locator("#roles table").count() == 2


@pytest.mark.browser
def test_hostile_tokens_are_shown_and_never_run(visit, hostile: dict):
    page = visit(hostile)
    for index in range(len(HOSTILE)):
        token_of(page, index).hover()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    shown = [text.strip() for text in page.locator("#text .t").all_inner_texts()]
    assert shown[:5] == HOSTILE[:5]
    assert shown[6] == "⟨U+2028⟩window.hacked=1⟨U+2029⟩"
    assert shown[7] == "␀␇␛[31m␡"
    assert shown[8] == "⟨U+D83D⟩"
    assert shown[9] == "⟨U+202E⟩evil⟨U+2066⟩"


@pytest.mark.browser
def test_the_policy_stops_what_slips_through(browser, payload: dict, tmp_path: Path):  # noqa: F811
    page = browser.new_page()
    page.goto(write_html(tmp_path / "trace.html", payload).as_uri())
    blocked = page.evaluate("""async () => {
        const blocked = [];
        document.addEventListener("securitypolicyviolation", event => blocked.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        await new Promise(resolve => setTimeout(resolve, 100));
        return [blocked, window.hacked ?? null];
    }""")
    page.close()
    assert blocked == [["script-src-elem"], None]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_keep_every_token_readable(visit, payload: dict, scheme: str):
    page = visit(payload, color_scheme=scheme)
    assert is_dark(page) == (scheme == "dark")
    assert min(contrasts(page, ".t:not(.dim)")) >= 4.5


@pytest.mark.browser
def test_pages_without_a_flow_and_of_two_tokens_load(visit):
    page = visit(infeasible())
    assert "".join(page.locator("#text .t").all_inner_texts()) == "Whynot?"
    token_of(page, 1).hover()
    assert "token 1 " in panel_of(page)
    page = visit(make_payload(2, 1, 1))
    assert page.locator(".arcs .all path").count() == 1
