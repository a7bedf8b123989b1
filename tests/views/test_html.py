"""The page is whole, shows what the payload says, and treats token text as data."""

import base64
import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flowgraph.errors import OutputError
from flowgraph.graph import FlowGraph
from flowgraph.payload import trace_payload
from flowgraph.solving import solve
from flowgraph.views.html import render_html, write_html

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = [
    "</script><img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "<!--<script>",
    "-->",
    "]]>",
    "&lt;img src=x onerror=window.hacked=1&gt;",
    "\u2028window.hacked=1\u2029",
    "\x00\x07\x1b[31m\x7f",
    "\ud83d",
    "\u202eevil\u2066",
    "{{ 7 * 7 }}{% raw %}",
    '" onfocus="window.hacked=1',
]


def make_payload(num_tokens: int, question: int, answer: int, texts: list[str] | None = None) -> dict:
    """A trace of sharp random attention: the first tokens ask, the last ones answer."""
    generator = torch.Generator().manual_seed(7)
    scores = 4 * torch.randn(num_tokens, num_tokens, generator=generator, dtype=torch.float64)
    rows = torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf), 1)
    index = torch.arange(num_tokens)
    graph = FlowGraph.from_dense(rows, question=index < question, answer=index >= num_tokens - answer)
    words = ["Tom", " has", " ", "3", " apples", ".", "\n", " so", " 7"]
    texts = texts or [words[i % len(words)] for i in range(num_tokens)]
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return trace_payload(
        solve(graph),
        tokens=texts,
        text="".join(texts),
        spans=torch.stack([starts, ends], 1),
        generated=index >= question,
        provenance={"model": "tiny/model", "layers": [1, 2], "versions": {"torch": "2"}, "tokenizer": None},
        keep=0.9,
        max_edges=20_000,
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


def infeasible() -> dict:
    graph = FlowGraph.from_edges(
        torch.tensor([[1], [2]]), torch.ones(1, dtype=torch.float64), num_nodes=3, question=[0], answer=[2]
    )
    return trace_payload(
        solve(graph),
        tokens=["Why", " not", "?"],
        text="Why not?",
        spans=torch.tensor([[0, 3], [3, 7], [7, 8]]),
        generated=torch.tensor([False, True, True]),
        provenance={},
        keep=0.9,
        max_edges=10,
    )


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
    assert "&lt;/script&gt;&lt;img src=x onerror=window.hacked=1&gt;\ufffd\ufffd" in page
    assert "\u202e" not in page
    assert "\x00" not in page


def test_the_policy_names_exactly_the_inline_code(payload: dict):
    page = render_html(payload)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy[1]
    for directive, element in (("style-src", "style"), ("script-src", "script")):
        content = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert rules[directive] == f"'sha256-{digest}'"


def test_nothing_is_loaded_and_nothing_is_written_as_markup(payload: dict):
    page = render_html(payload)
    names = page.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    for trace_of_a_load in ("http://", "https://", "url(", "@import", "src=", "href=", "fetch(", "XMLHttpRequest"):
        assert trace_of_a_load not in names
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert danger not in page


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
    assert data_of(page)["arcs"] == [[0, 1, 1.0]]
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
    assert len(page.encode()) < 1_500_000
    values = data_of(page)
    assert len(values["edges"]) == 20_000
    assert values["edges_left_out"] == 10_011
    assert len(values["arcs"]) == 4_000
    assert values["num_arcs"] == 25_000


def test_the_file_is_the_page(tmp_path: Path, hostile: dict):
    path = write_html(tmp_path / "trace.html", hostile)
    assert path.read_bytes().decode("utf-8") == render_html(hostile)
    with pytest.raises(OutputError, match="must name a file"):
        write_html(tmp_path, hostile)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path: Path):
    """Open a payload's page from disk; afterwards no error and no request may have happened."""
    complaints, contexts = [], []

    def open_page(payload: dict, **options):
        path = write_html(tmp_path / "trace.html", payload)
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def strongest(payload: dict, region: str) -> dict:
    return max((t for t in payload["tokens"] if t["region"] == region), key=lambda token: token["throughput"])


def token_of(page, index: int):
    return page.locator(f'.t[data-index="{index}"]')


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


@pytest.mark.browser
def test_the_slider_sets_how_many_curves_are_drawn(visit, payload: dict):
    page = visit(payload)
    total = len(payload["backbone"]["edges"])
    arcs = page.locator(".arcs .all path")
    assert arcs.count() == min(60, total)
    slider = page.locator("#arcs")
    slider.focus()
    page.keyboard.press("Home")
    assert arcs.count() == 0
    page.keyboard.press("ArrowRight")
    assert arcs.count() == 5
    assert page.locator("#arc-count").inner_text() == f"the strongest 5 of {total}"
    page.keyboard.press("End")
    assert arcs.count() == total
    assert page.locator("#arc-count").inner_text() == f"all {total}"


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
    page.wait_for_timeout(200)
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
    page.locator("#routes button").first.hover()
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
def test_the_policy_stops_what_slips_through(browser, payload: dict, tmp_path: Path):
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
    page_is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 27)"
    assert page_is_dark == (scheme == "dark")
    contrasts = page.evaluate("""() => {
        const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const luminance = colour => {
            pixel.fillStyle = colour;
            pixel.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const token = document.querySelector(".t:not(.dim)"), contrasts = [];
        for (let f = 0; f <= 1; f += 0.01) {
            token.style.setProperty("--f", f);
            const style = getComputedStyle(token);
            const both = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => b - a);
            contrasts.push((both[0] + 0.05) / (both[1] + 0.05));
        }
        return contrasts;
    }""")
    assert min(contrasts) >= 4.4


@pytest.mark.browser
def test_pages_without_a_flow_and_of_two_tokens_load(visit):
    page = visit(infeasible())
    assert "".join(page.locator("#text .t").all_inner_texts()) == "Whynot?"
    token_of(page, 1).hover()
    assert "token 1 " in panel_of(page)
    page = visit(make_payload(2, 1, 1))
    assert page.locator(".arcs .all path").count() == 1
