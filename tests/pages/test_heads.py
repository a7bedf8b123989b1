"""An edge on the trace page: a click shows the layers and heads that its weight comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowgraph import FlowTrace, InvalidInputError, RelevanceTrace, trace
from flowgraph.pages.evidence import edge_parts_data
from tests.fixtures.browser import browser, open_file, token_of  # noqa: F401
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")


@pytest.fixture(scope="module")
def made() -> tuple[FlowTrace, RelevanceTrace]:
    plain = trace(*tiny(), PROMPT, RESPONSE, layers="all")
    return plain, plain.relevance(tiny_model(), target="logprob")


def test_the_payload_holds_layers_and_heads_of_the_strongest_edges(made):
    plain, relevance = made
    parts = [*plain.edge_parts(tiny_model(), 12), *relevance.edge_parts(tiny_model(), 8)]
    assert len(parts) == 20
    flow = plain.flow.edge_flow
    assert sorted(each.capacity for each in parts[:12]) == sorted(
        plain.graph.capacity[flow.argsort(descending=True)[:12]].tolist()
    )
    payload = json.loads(json.dumps(plain.to_dict(relevance=relevance, edge_parts=parts)))
    assert len(payload["edge_parts"]) == 20
    for described, each in zip(payload["edge_parts"], parts, strict=True):
        assert described["kind"] == each.kind
        # Shares of an edge sum to 1, over layers and over heads.
        assert described["arc"] + sum(share for _, share in described["layers"]) == pytest.approx(1, rel=1e-4)
        layer, head, share = described["heads"][0]
        assert share == pytest.approx(float(each.values[layer, head]) / each.capacity)
    data = edge_parts_data(payload["edge_parts"])
    assert [row[0] for row in data] == [0] * 12 + [1] * 8
    assert len(edge_parts_data(payload["edge_parts"] * 40)) == 400
    alone = relevance.to_dict(edge_parts=parts[12:])
    assert [edge["weight"] for edge in alone["edge_parts"]] == [each.capacity for each in parts[12:]]


def test_capacities_that_join_heads_are_split_by_layers():
    found = trace(*tiny(), PROMPT, RESPONSE, capacity="vtrace_share")
    (parts, *_) = found.edge_parts(tiny_model(), 3)
    assert not parts.heads_apart
    assert parts.total == pytest.approx(parts.capacity, rel=1e-4)
    described = found.to_dict(edge_parts=[parts])["edge_parts"][0]
    assert described["heads"] == []
    assert sum(share for _, share in described["layers"]) == pytest.approx(1, rel=1e-4)
    joined = trace(*tiny(), PROMPT, RESPONSE, capacity="sharp_max")
    with pytest.raises(InvalidInputError, match="layers: must be summed to be told apart, got their maximum"):
        joined.edge_parts(tiny_model())


@pytest.mark.unchecked
def test_parts_of_another_trace_are_refused(made):
    plain, relevance = made
    parts = relevance.edge_parts(tiny_model(), 1)
    with pytest.raises(InvalidInputError, match=r"edge_parts: must be of edges of this trace, got \d+ -> \d+ \(relev"):
        plain.to_dict(edge_parts=parts)
    with pytest.raises(InvalidInputError, match=r"edge_parts: must be of edges of this trace, got .* \(capacity\)"):
        relevance.to_dict(edge_parts=plain.edge_parts(tiny_model(), 1))
    for count in (0, True, 1.5):
        for each in (plain, relevance):
            with pytest.raises(InvalidInputError, match=f"count: must be a positive integer, got {count}; 200 is"):
                each.edge_parts(tiny_model(), count)


@pytest.mark.browser
def test_a_click_on_an_edge_shows_its_heads(open_file, made, tmp_path: Path):  # noqa: F811
    plain, relevance = made
    parts = [*plain.edge_parts(tiny_model(), 30), *relevance.edge_parts(tiny_model(), 30)]
    plain.to_html(tmp_path / "trace.html", relevance=relevance, edge_parts=parts)
    page = open_file(tmp_path / "trace.html")
    # From the list of the strongest edges.
    page.locator("#detail button.heads").first.click()
    strongest = parts[0]
    layer, head, _ = strongest.top(1)[0]
    panel = page.locator("#detail").inner_text()
    assert f"edge from token {strongest.source} to token {strongest.target} · capacity" in panel
    assert f"layer {layer}, head {head}" in panel
    assert page.locator("#detail .layerchart .column").count() == 3
    assert "most from layer" in str(page.locator(".layerchart").get_attribute("aria-label"))
    assert "in" in str(token_of(page, strongest.source).get_attribute("class")).split()
    page.keyboard.press("Escape")
    assert page.locator("#detail .layerchart").count() == 0
    # From the panel of a token, here an edge of the relevance.
    edge = max(parts[30:], key=lambda each: abs(each.capacity))
    token_of(page, edge.target).click()
    page.locator("#detail h3", has_text="Relevance taken from").locator("..").locator("button.heads").first.click()
    assert "of the answer’s relevance" in page.locator("#detail").inner_text()

    relevance.to_html(tmp_path / "relevance.html", edge_parts=parts[30:])
    page = open_file(tmp_path / "relevance.html")
    assert "Strongest edges of the relevance" in page.locator("#detail").inner_text()
    # A page without parts has no buttons.
    plain.to_html(tmp_path / "plain.html")
    page = open_file(tmp_path / "plain.html")
    assert page.locator("button.heads").count() == 0
