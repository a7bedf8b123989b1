"""The relevance on the trace page: the tree of parts, the colours of the text, and what a reader can click."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowgraph import FlowTrace, InvalidInputError, RelevanceTrace, trace
from flowgraph.pages.evidence import colourings, relevance_data
from tests.fixtures.browser import browser, open_file  # noqa: F401
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")


@pytest.fixture(scope="module")
def made() -> tuple[FlowTrace, RelevanceTrace, FlowTrace]:
    model, tokenizer = tiny()
    plain = trace(model, tokenizer, PROMPT, RESPONSE)
    other = trace(model, tokenizer, PROMPT, RESPONSE, capacity="vtrace_share")
    return plain, plain.relevance(model, target="logprob"), other


def test_the_payload_holds_the_tree_and_all_scores(made):
    plain, relevance, other = made
    payload = plain.to_dict(relevance=relevance, beside=[other])
    data = relevance_data(payload["relevance"])
    assert data is not None
    steps = relevance.steps()
    assert [part[3] for part in data["parts"]] == pytest.approx(steps.throughput.tolist(), rel=1e-5)
    answer = int(steps.demand.argmax())
    assert data["roots"] == [[answer, 1.0]]
    for source, target, share in data["edges"]:
        assert share == pytest.approx(float(steps.flow[target, source]), rel=1e-5)

    names = [(each["name"], each["signed"]) for each in colourings(payload)]
    assert names == [("relevance", True), ("flow on attention", False), ("vtrace_share (h)", False)]
    potentials = colourings(payload)[2]["values"]
    assert max(potentials) == 1
    expected = (other.scores / other.scores.max()).tolist()
    assert potentials == pytest.approx(expected, rel=1e-5)


def test_a_trace_of_another_text_is_refused(made):
    plain, relevance, _ = made
    model, tokenizer = tiny()
    foreign = trace(model, tokenizer, PROMPT, "So 3 + 4 is 7.")
    with pytest.raises(InvalidInputError, match="beside: must be of the tokens of this trace, got a trace of"):
        plain.to_dict(beside=[foreign])
    with pytest.raises(InvalidInputError, match="relevance: must be of the tokens of this trace"):
        foreign.to_dict(relevance=relevance)


@pytest.mark.browser
def test_the_page_starts_with_the_tree_and_colours_by_any_score(open_file, made, tmp_path: Path):  # noqa: F811
    plain, relevance, other = made
    plain.to_html(tmp_path / "trace.html", relevance=relevance, beside=[other])
    page = open_file(tmp_path / "trace.html")

    # The answer is the root of the tree; a click on a part marks its tokens and shows its numbers.
    first = page.locator("#evidence-tree .part").first
    assert first.locator(".share").inner_text() == "+100 %"
    assert first.locator(".words").inner_text() == "7"
    while page.locator("#evidence-tree button.aside").count():
        page.locator("#evidence-tree button.aside").first.click()
    # A bar has the colour of its sign, and the same length for the same share in every row.
    rows = page.eval_on_selector_all(
        "#evidence-tree .part",
        "parts => parts.map(part => [part.querySelector('.share').textContent, part.querySelector('.bar').className,"
        " part.querySelector('.track').offsetWidth])",
    )
    assert any(share.startswith("−") for share, *_ in rows)
    for share, class_name, _ in rows:
        assert class_name == ("bar minus" if share.startswith("−") else "bar plus")
    page.set_viewport_size({"width": 420, "height": 900})
    widths = "parts => parts.map(part => part.querySelector('.track').offsetWidth)"
    assert len({width for *_, width in rows}) == 1
    assert len(set(page.eval_on_selector_all("#evidence-tree .part", widths))) == 1
    page.set_viewport_size({"width": 1280, "height": 900})

    part = page.locator("#evidence-tree .part").nth(2)
    part.click()
    words = part.locator(".words").inner_text()
    marked = page.eval_on_selector_all("#text .t.instep", "tokens => tokens.map(t => Number(t.dataset.index))")
    step = next(step for step in relevance.steps().steps if step.start == marked[0])
    assert marked == list(range(step.start, step.stop))
    assert " ".join(step.text.split()) == words
    assert "of the answer" in page.locator("#detail").inner_text()

    # The colours follow the choice; the slider belongs to the flow.
    for token in (int(relevance.scores.argmin()), int(relevance.scores.argmax())):
        sign = "minus" if relevance.scores[token] < 0 else "plus"
        assert sign in page.locator(f".t[data-index='{token}']").get_attribute("class").split()
    token = int(torch.argmax(relevance.scores.abs()))
    strength = "index => document.querySelector(`.t[data-index='${index}']`).style.getPropertyValue('--f')"
    assert float(page.evaluate(strength, token)) == 1
    assert not page.locator(".slider").is_visible()
    page.locator("#colouring").select_option(label="flow on attention")
    assert page.locator(".slider").is_visible()
    page.locator("#colouring").select_option(label="vtrace_share (h)")
    assert not page.locator(".slider").is_visible()
    assert "potential h" in page.locator("#colouring-note").inner_text()


@pytest.mark.browser
def test_smaller_sources_are_listed_on_request(open_file, made, tmp_path: Path):  # noqa: F811
    _, relevance, _ = made
    relevance.to_html(tmp_path / "relevance.html")
    page = open_file(tmp_path / "relevance.html")
    assert page.locator("#show-steps").count() == 0
    before = page.locator("#evidence-tree .part").count()
    page.locator("#evidence-tree button.aside").first.click()
    assert page.locator("#evidence-tree .part").count() > before
