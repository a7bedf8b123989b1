"""What results show in a notebook and as text: well-formed, escaped, and with the right numbers."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from flowgraph import Certificate, FlowGraph, FlowTrace, StepRelevance, compare, solve
from tests.fixtures.figures import HOSTILE, make_trace

ELEMENTS = {
    "b", "bdi", "br", "details", "div", "i", "li", "ol", "span", "sub", "summary", "table", "td", "th", "tr",
}  # fmt: skip
MARKUP = (*HOSTILE, "</td></table><script>window.hacked=1</script>", '" onload="x', "<img src=x onerror=x>", "&lt;")


class Fragment(HTMLParser):
    """Checks that elements nest, and collects their names, attributes and words."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def shown(result: Any) -> Fragment:
    return Fragment(result._repr_html_())


def hostile_results() -> list[Any]:
    trace = make_trace(60, 15, 2, MARKUP)
    other = make_trace(60, 15, 2, MARKUP, seed=3)
    steps = trace.steps("lines")
    count = steps.num_steps
    flow = torch.zeros(count, count, dtype=torch.float64)
    flow[count - 1] = torch.linspace(-0.5, 0.5, count, dtype=torch.float64)
    flow[count - 1, count - 1] = 0
    demand = torch.zeros(count, dtype=torch.float64)
    demand[count - 1] = 1
    nothing = torch.zeros(count, dtype=torch.float64)
    relevance = StepRelevance(steps.steps, flow, nothing, demand, nothing, nothing, nothing, nothing, 3.0, 1e-7)
    comparisons = [compare(trace, other, by=by) for by in ("tokens", "steps")]
    return [trace, steps, trace.certify(), relevance, *comparisons]


@pytest.mark.parametrize("number", range(6))
def test_token_text_is_data_in_every_fragment(number: int):
    result = hostile_results()[number]
    html = result._repr_html_()
    fragment = Fragment(html)
    assert fragment.names <= ELEMENTS
    assert fragment.attributes <= {"style", "title", "dir", "class", "open"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ud800-\udfff]", html)
    assert "mathjax_ignore" in html
    assert len(html) < 250_000


def test_a_certificate_is_folded_and_opens_where_a_check_fails():
    certificate = make_trace(20).certify()
    html = certificate._repr_html_()
    assert "<details><summary>" in html
    words = shown(certificate).words
    assert f"all {len(certificate.checks)} checks hold" in words
    assert all(made.statement in words for made in certificate.checks)

    broken = replace(certificate.checks[5], ok=False)
    failed = replace(certificate, checks=(*certificate.checks[:5], broken, *certificate.checks[6:]))
    assert "<details open>" in failed._repr_html_()
    assert "✗" in shown(failed).words


def test_the_text_of_a_certificate_is_short_and_names_what_fails():
    certificate = make_trace(20).certify()
    assert repr(certificate).split("\n") == [
        f"Certificate: all {len(certificate.checks)} checks hold",
        f"  {certificate.figures}",
        f"  tokens are ranked by: {certificate.score}",
        "  print(certificate) lists the checks",
    ]
    assert len(str(certificate).split("\n")) == 3 + len(certificate.checks)
    broken = replace(certificate.checks[5], ok=False)
    failed: Certificate = replace(certificate, checks=(*certificate.checks[:5], broken))
    assert f"✗ {broken.name}" in repr(failed)
    assert certificate.checks[4].name not in repr(failed)


def test_steps_show_their_throughput_and_strongest_flows():
    steps = make_trace(40).steps()
    words = shown(steps).words
    assert f"{steps.num_steps} steps by {steps.by}" in words
    for step in steps.steps[:40]:
        share = 100 * float(steps.throughput[step.index])
        assert f"{share:.3g} %" in words or share > 99.9
    assert f"{100 * steps.flow_table(1)[0]['flow']:.3g} %" in words


def test_a_comparison_shows_the_changes_in_points():
    comparison = compare(make_trace(40, 12, 2), make_trace(40, 12, 2, seed=5))
    words = shown(comparison).words
    assert f"total variation {comparison.total_variation:.3f}" in words
    for gains in (True, False):
        strongest = comparison.largest(1, gains=gains)[0]
        assert f"{100 * float(comparison.difference[strongest]):+.1f}" in words
    same = shown(compare(make_trace(20), make_trace(20))).words
    assert "more flow in B: nothing" in same


def test_routes_of_a_comparison_have_their_text():
    comparison = compare(make_trace(40, 12, 2), make_trace(40, 12, 2, seed=5))
    route = comparison.routes[0]
    assert route.text == tuple(comparison.text(pair) for pair in route.pairs)
    assert all(f"{pair} {text!r}" in repr(route) for pair, text in zip(route.pairs, route.text, strict=True))
    assert comparison.to_dict()["routes"][0].keys() == {"pairs", "first", "second", "shared"}


def test_a_trace_prints_its_answer_with_every_character_once():
    trace = make_trace(12, 4, 2)
    assert f"\n  answer: {''.join(trace.tokens[10:]).strip()!r}\n" in repr(trace)
    named = replace(trace, provenance={**trace.provenance, "answer_by": "boxed"})
    assert "(boxed)\n" in repr(named)
    # Three tokens of one character, as byte-level tokenizers make them of a rare one.
    graph = FlowGraph.from_dense(torch.ones(5, 5).tril(-1), question=[0], answer=[2, 3, 4])
    spans = torch.tensor([[0, 1], [1, 2], [2, 3], [2, 3], [2, 3]])
    split = FlowTrace(
        ("a", "b", "汤", "汤", "汤"), torch.arange(5), "ab汤", spans, torch.arange(5) > 0, graph, solve(graph)
    )
    assert "answer: '汤'\n" in repr(split)
    assert "answer: 汤" in shown(split).words
    assert split.text_of(split.answer) == "汤"


def test_routes_and_roles_of_a_trace_have_their_text():
    trace = make_trace(12)
    route = trace.routes(1)[0]
    assert route.text == tuple(trace.tokens[token] for token in route.tokens)
    assert all(f"{token} {trace.tokens[token]!r}" in repr(route) for token in route.tokens)
    for role in (trace.hubs(1)[0], trace.checkpoints(1)[0]):
        assert role.text == trace.tokens[role.token]
        assert repr(role.text) in repr(role)
    payload = trace.to_dict()
    assert payload["routes"][0].keys() == {"tokens", "flow"}
    assert payload["hubs"][0].keys() == {"token", "throughput", "inflows", "outflows", "score"}
