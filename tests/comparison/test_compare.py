"""Comparisons against plain loops over fractions, their symmetry, and what is refused."""

import json
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from flowgraph import (
    Comparison,
    FlowGraph,
    FlowgraphError,
    FlowTrace,
    InfeasibleFlowError,
    InvalidInputError,
    OutputError,
    TraceFileError,
    compare,
    contract,
    prune,
    solve,
    trace,
)
from flowgraph.commands.compare import compare as command
from flowgraph.comparison.alignment import align
from tests.fixtures.convert import random_attention, to_graph
from tests.fixtures.tiny import PROMPT, chat, tiny
from tests.reference import comparison as reference
from tests.reference import flow as exact_flow
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

some = settings(max_examples=30, deadline=None)
VOCABULARY = [" a", " b", " c", ".", "\n", " 7"]


def trace_of(graph: FlowGraph, tokens: list[str], ids: list[int] | None = None, prompt: int = 1, **facts) -> FlowTrace:
    """A trace whose tokens tile its text."""
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0)
    return FlowTrace(
        tokens=tuple(tokens),
        token_ids=torch.tensor(ids if ids is not None else [VOCABULARY.index(token) for token in tokens]),
        text="".join(tokens),
        spans=torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1),
        generated=torch.arange(len(tokens)) >= prompt,
        graph=graph,
        flow=solve(graph),
        provenance={"model": "tiny/model", "layers": [1, 2], **facts},
    )


def dense_trace(tokens: list[str], question: int | list[int], answer: int, seed: int = 0, **facts) -> FlowTrace:
    """Random attention; the first tokens (or those named) ask, the last ones answer."""
    count = len(tokens)
    asked = list(range(question)) if isinstance(question, int) else question
    weights = random_attention(count, seed=seed).double()
    graph = FlowGraph.from_dense(weights, question=asked, answer=range(count - answer, count))
    ids = [sum(256**k * ord(letter) for k, letter in enumerate(token)) % 2**31 for token in tokens]
    return trace_of(graph, tokens, ids, prompt=asked[-1] + 1, **facts)


def words(text: str) -> list[str]:
    return text.replace(" ", "| ").replace("\n", "|\n").strip("|").split("|")


@st.composite
def cases_of_one_question(draw: st.DrawFn) -> tuple[tuple[Case, FlowTrace], tuple[Case, FlowTrace]]:
    """Two traces that begin alike and go on in random words."""
    prompt = draw(st.integers(1, 3))
    start = draw(st.lists(st.sampled_from(VOCABULARY), min_size=prompt, max_size=prompt))
    made = []
    for _ in range(2):
        case = draw(flow_graphs(max_nodes=8, min_nodes=4))
        assume(case.question.index(True) < prompt)
        tokens = start + draw(
            st.lists(st.sampled_from(VOCABULARY), min_size=case.num_nodes - prompt, max_size=case.num_nodes - prompt)
        )
        found = trace_of(to_graph(case.num_nodes, case.edges, case.question, case.answer), tokens, prompt=prompt)
        assume(found.feasible)
        made.append((case, found))
    return made[0], made[1]


def exact(case: Case):
    """Exact throughput, flow per edge, source and absorbed share."""
    edges = exact_flow.effective_edges(case.edges, case.answer)
    solution = exact_flow.solve(case.num_nodes, edges, case.question, case.answer)
    amounts = {(s, t): amount for (s, t, _), amount in zip(edges, solution.edge_flow, strict=True)}
    absorbed = [f if ends else Fraction(0) for f, ends in zip(solution.throughput, case.answer, strict=True)]
    return solution.throughput, amounts, solution.source, absorbed


def contracted(comparison: Comparison, side: int, case: Case):
    """The exact flow between the units of one side: answers that differ are one unit each."""
    _, edges, source, absorbed = exact(case)
    units = comparison.units[side]
    group_of = [unit.index for unit in units for _ in range(unit.start, unit.stop)]
    throughput, between = reference.contract(edges, source, group_of)
    sums = [[sum(values[unit.start : unit.stop], Fraction(0)) for unit in units] for values in (source, absorbed)]
    return throughput, between, *sums


def check_numbers(comparison: Comparison, cases: tuple[Case, Case]) -> None:
    pairs = [tuple(pair) for pair in comparison.pairs.tolist()]
    sides = [contracted(comparison, side, case) for side, case in enumerate(cases)]
    (f, edges, source, absorbed), (other_f, other_edges, other_source, other_absorbed) = sides
    expected = [[float(side[k]) if k >= 0 else 0 for side, k in zip((f, other_f), p, strict=True)] for p in pairs]
    np.testing.assert_allclose(comparison.throughput, expected, atol=1e-12)
    assert comparison.total_variation == pytest.approx(float(reference.total_variation(f, other_f, pairs)), abs=1e-12)
    assert comparison.edge_overlap == pytest.approx(float(reference.edge_overlap(edges, other_edges, pairs)), abs=1e-12)
    for route in comparison.routes:
        paths = [[pairs[pair][side] for pair in route.pairs] for side in (0, 1)]
        assert route.first == pytest.approx(float(reference.width(paths[0], edges, source, absorbed)), abs=1e-12)
        width = reference.width(paths[1], other_edges, other_source, other_absorbed)
        assert route.second == pytest.approx(float(width), abs=1e-12)


@given(both=cases_of_one_question())
@some
def test_the_numbers_are_those_of_plain_loops(both):
    (case, first), (other, second) = both
    comparison = compare(first, second, by="tokens")
    check_numbers(comparison, (case, other))
    assert 0 <= comparison.total_variation <= 1
    assert 0 <= comparison.edge_overlap <= 1
    matched = comparison.throughput[(comparison.pairs >= 0).all(1)]
    if comparison.rank_correlation is not None:
        expected = stats.spearmanr(*matched.round(decimals=12).T).statistic
        assert comparison.rank_correlation == pytest.approx(expected, abs=1e-12)


@given(both=cases_of_one_question(), by=st.sampled_from(["auto", "tokens", "steps"]))
@some
def test_exchanging_the_traces_only_exchanges_the_sides(both, by: str):
    (_, first), (_, second) = both
    there, back = compare(first, second, by=by), compare(second, first, by=by)
    matched = [[p for p in c.pairs.tolist() if min(p) >= 0] for c in (there, back)]
    assert [[j, i] for i, j in matched[0]] == matched[1]
    assert sorted(there.pairs.tolist()) == sorted([j, i] for i, j in back.pairs.tolist())
    for name in ("total_variation", "rank_correlation", "hub_overlap", "edge_overlap"):
        values = getattr(there, name), getattr(back, name)
        assert values[0] == pytest.approx(values[1], abs=1e-12), name
    assert there.mean_hops == back.mean_hops[::-1]
    assert {(r.first, r.second) for r in there.routes} == {(r.second, r.first) for r in back.routes}


@given(case=flow_graphs(max_nodes=9, min_nodes=2), by=st.sampled_from(["auto", "tokens", "characters", "steps"]))
@some
def test_a_trace_does_not_differ_from_itself(case: Case, by: str):
    tokens = [VOCABULARY[k % len(VOCABULARY)] for k in range(case.num_nodes)]
    one = trace_of(to_graph(case.num_nodes, case.edges, case.question, case.answer), tokens)
    assume(one.feasible)
    comparison = compare(one, one, by=by)
    assert comparison.difference.abs().max() == 0
    assert comparison.total_variation == 0
    assert comparison.edge_overlap == pytest.approx(1, abs=1e-15)
    assert comparison.hub_overlap in (1, None)
    assert comparison.rank_correlation is None or comparison.rank_correlation == pytest.approx(1)
    assert comparison.largest() == comparison.largest(gains=False) == []
    assert all(route.shared and route.first == route.second > 0 for route in comparison.routes)
    assert (comparison.pairs[:, 0] == comparison.pairs[:, 1]).all()


@given(case=flow_graphs(max_nodes=8, min_nodes=3), data=st.data())
@some
def test_another_cut_of_the_text_is_compared_in_the_finest_groups_of_both(case: Case, data: st.DataObject):
    text = "".join(VOCABULARY[k % 3] for k in range(case.num_nodes))
    made = []
    for _ in range(2):
        cuts = sorted(data.draw(st.permutations(range(1, len(text))))[: case.num_nodes - 1])
        tokens = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
        made.append(trace_of(graph, tokens, [hash(token) % 10**9 for token in tokens]))
    assume(made[0].feasible)
    comparison = compare(*made, by="characters")
    _, edges, source, _ = exact(case)
    cuts = reference.shared_cuts(made[0].tokens, made[1].tokens)
    sides = []
    for side in (0, 1):
        assert [unit.stop for unit in comparison.units[side]] == cuts[side]
        group_of = [k for k, unit in enumerate(comparison.units[side]) for _ in range(unit.start, unit.stop)]
        sides.append(reference.contract(edges, source, group_of))
        np.testing.assert_allclose(comparison.throughput[:, side], [float(x) for x in sides[side][0]], atol=1e-12)
    pairs = [(k, k) for k in range(len(cuts[0]))]
    overlap = reference.edge_overlap(sides[0][1], sides[1][1], pairs)
    assert comparison.edge_overlap == pytest.approx(float(overlap), abs=1e-12)
    texts = [[unit.text for unit in side] for side in comparison.units]
    assert texts[0] == texts[1]
    assert "".join(texts[0]) == text


def diamonds() -> tuple[FlowTrace, FlowTrace]:
    """One question, two ways between: 2/3 and 1/3 of the flow in A, the other way round in B."""
    made = []
    for upper, lower in ((0.5, 0.25), (0.25, 0.5)):
        weights = torch.tensor([[0.0, 0, 0, 0], [upper, 0, 0, 0], [lower, 0, 0, 0], [0, 0.5, 0.5, 0]]).double()
        made.append(trace_of(FlowGraph.from_dense(weights, question=[0], answer=[3]), [" a", " b", " c", " 7"]))
    return made[0], made[1]


def test_a_comparison_worked_by_hand():
    comparison = compare(*diamonds())
    assert comparison.difference.tolist() == pytest.approx([0, -1 / 3, 1 / 3, 0])
    assert comparison.total_variation == pytest.approx(1 / 9)  # of three visits each, a third of one moves
    assert comparison.edge_overlap == pytest.approx(2 / 3)  # each of four edges has 1/3 in common, of two hops
    assert comparison.mean_hops == pytest.approx((2, 2))
    assert comparison.hub_overlap == 1
    assert comparison.num_hubs == 2
    assert comparison.rank_correlation == pytest.approx(7 / 9)  # ranks 3.5 2 1 3.5 and 3.5 1 2 3.5
    assert comparison.largest() == [2]
    assert comparison.largest(gains=False) == [1]
    routes = {route.pairs: (route.first, route.second, route.shared) for route in comparison.routes}
    assert routes == {
        (0, 1, 3): (pytest.approx(2 / 3), pytest.approx(1 / 3), True),
        (0, 2, 3): (pytest.approx(1 / 3), pytest.approx(2 / 3), True),
    }
    assert "more in B: 'a b' then ' c' +0.333" in repr(comparison)
    assert "less in B: 'a' then ' b' -0.333" in repr(comparison)


def test_answers_meet_whatever_they_say_and_inserted_words_have_no_partner():
    right = dense_trace(words("How many ?\nTom has 3 + 4 = 7\nso 7"), 3, 1)
    wrong = dense_trace(words("How many ?\nTom has now 3 - 4 = 1\nso 1"), 3, 1)
    comparison = compare(right, wrong)
    assert comparison.rule.startswith("the prompt is the same")
    said = [
        tuple(comparison.units[side][index].text if index >= 0 else None for side, index in enumerate(pair))
        for pair in comparison.pairs.tolist()
    ]
    assert [pair for pair in said if pair[0] != pair[1]] == [(None, " now"), (" +", " -"), (" 7", " 1"), (" 7", " 1")]
    assert comparison.difference[-1] == pytest.approx(0, abs=1e-12)  # the answers absorb the whole flow
    assert comparison.names == ("tiny/model, layers 1-2, answer '7'", "tiny/model, layers 1-2, answer '1'")
    longer = dense_trace(words("How many ?\nso 7 7 7"), 3, 3)
    # The tokens of an answer are one unit, so that its length is no difference.
    other = compare(right, longer)
    assert other.pairs.tolist()[-1] == [len(right.tokens) - 1, 4]
    assert (other.units[1][-1].text, other.units[1][-1].region) == (" 7 7 7", "answer")
    assert other.difference[-1] == pytest.approx(0, abs=1e-12)
    assert other.notes[0].startswith(
        "the answers differ, '7' in A and '7 7 7' in B: the tokens of each are compared as"
    )
    assert "B tiny/model, layers 1-2, answer '7 7 7': 5 tokens, its answer as one" in repr(other)


def test_the_length_of_an_answer_is_no_difference():
    """One route through b and one through c: only the answer has other tokens."""

    def answered(answer: list[str]) -> FlowTrace:
        count = 4 + len(answer)
        weights = torch.zeros(count, count).double()
        weights[1, 0] = weights[2, 0] = 0.5
        for token in range(3, count):
            weights[token, 1] = weights[token, 2] = 0.5
        graph = FlowGraph.from_dense(weights, question=[0], answer=range(4, count))
        return trace_of(graph, [" a", " b", " c", ".", *answer], list(range(4)) + [10 + k for k in range(len(answer))])

    seven, twelve = answered([" 7"]), answered([" 1", "2"])
    comparison = compare(seven, FlowTrace(**{**vars(twelve), "token_ids": twelve.token_ids + (twelve.token_ids > 9)}))
    assert comparison.difference.abs().max() == pytest.approx(0, abs=1e-12)
    assert comparison.total_variation == pytest.approx(0, abs=1e-12)
    assert comparison.edge_overlap == pytest.approx(1)
    assert comparison.largest() == comparison.largest(gains=False) == []
    # Equal answers stay in their tokens.
    assert len(compare(twelve, twelve).units[0]) == 6


def test_an_answer_that_says_what_the_reasoning_said_is_still_the_answer():
    one = dense_trace(words("How many ? 5 or 6 so 7"), 3, 1)
    other = dense_trace(words("How many ? 5 or 7 so 6"), 3, 1)
    assert compare(one, other).pairs.tolist() == [[k, k] for k in range(8)]


def test_one_question_behind_two_templates():
    one = dense_trace(["<s>", "Why", "?", "</s>", " so", " 7"], [1, 2], 1)
    other = dense_trace(["[I]", "Why", "?", "[/I]", "[/I]", " so", " 7"], [1, 2], 1)
    comparison = compare(one, other)
    assert comparison.rule.startswith("the question is the same")
    assert comparison.pairs.tolist() == [[0, 0], [1, 1], [2, 2], [3, -1], [-1, 3], [-1, 4], [4, 5], [5, 6]]


def test_steps_are_compared_by_what_visits_them():
    lines = "How many ?\nTom has three apples in all\nhe gets four more apples now\nthree and four is seven\nso 7"
    first = dense_trace(words(lines), 3, 1)
    changed = lines.replace(" now", " and eats them")
    second = dense_trace(words(changed.replace("three and four is seven", "it rains in Spain today and")), 3, 1)
    comparison = compare(first, second, by="steps")
    assert comparison.by == "steps"
    texts = [[unit.text.strip() for unit in side] for side in comparison.units]
    said = [tuple(texts[side][k] if k >= 0 else None for side, k in enumerate(p)) for p in comparison.pairs.tolist()]
    assert ("he gets four more apples now", "he gets four more apples and eats them") in said
    assert ("three and four is seven", None) in said
    assert said[-1] == ("7", "7")
    for side, one in enumerate((first, second)):
        group_of = [k for k, unit in enumerate(comparison.units[side]) for _ in range(unit.start, unit.stop)]
        there = comparison.pairs[:, side] >= 0
        torch.testing.assert_close(comparison.throughput[there, side], contract(one.flow, group_of).throughput)
    assert comparison.units[0][0].region == "question"


def test_ids_that_read_differently_and_other_doubts_are_noted():
    one, two = (
        dense_trace(words("How many ? so 7"), 3, 1, seed=s, versions={"flowgraph-llm": v})
        for s, v in ((0, "1"), (1, "2"))
    )
    other = FlowTrace(**{**vars(two), "tokens": ("Wie", *two.tokens[1:])})
    notes = compare(one, other).notes
    assert any("token 0: 'How' and 'Wie'" in note for note in notes)
    assert any("two versions of flowgraph-llm, 1 and 2" in note for note in notes)
    small = prune(one.flow, max_edges=5)
    pruned = FlowTrace(**{**vars(one), "graph": small, "flow": solve(small)})
    assert any(note.startswith("B was pruned to ") for note in compare(one, pruned).notes)
    assert compare(one, dense_trace(words("How many ? so 7"), 2, 1)).notes[0].startswith("flow enters at other tokens")
    heads = compare(dense_trace(words("a b c"), 1, 1, heads="max"), dense_trace(words("a b c"), 1, 1, heads="mean"))
    assert heads.names == ("tiny/model, layers 1-2, heads max", "tiny/model, layers 1-2, heads mean")
    assert heads.notes == ("heads differs: max in A, mean in B",)


@pytest.mark.unchecked
def test_what_cannot_be_compared_says_why():
    one, other = dense_trace(words("How many ? so 7"), 3, 1), dense_trace(words("How long ? so 7 or 8"), 3, 1)
    with pytest.raises(
        InvalidInputError, match=r"questions that differ from character 4 on \('many \?' and 'long \?'; 10 and"
    ):
        compare(one, other)
    with pytest.raises(InvalidInputError, match=r"in traces of 5 and 7 tokens; trace the same question twice"):
        compare(one, other, by="steps")
    with pytest.raises(
        InvalidInputError, match=r"by: 'characters' needs two traces of one text, got texts that differ"
    ):
        compare(one, other, by="characters")
    with pytest.raises(InvalidInputError, match=r"by: must be one of 'auto', .*, got 'words'"):
        compare(one, one, by="words")
    with pytest.raises(InvalidInputError, match=r"second: must be a FlowTrace, got str; flowgraph.load_trace"):
        compare(one, "b.safetensors")
    cut = FlowGraph.from_edges(torch.tensor([[1], [2]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match=r"first: must have a flow, got a trace in which no question token"):
        compare(trace_of(cut, [" a", " b", " c"]), one)
    with pytest.raises(InvalidInputError, match=r"k: must be at least 1, got 0"):
        compare(one, one).largest(0)


def test_no_prompt_in_either_is_no_prompt_in_common():
    made = [dense_trace(words(text), 3, 1) for text in ("How many ? so it is 7", "Why so blue ? so 8")]
    bare = [FlowTrace(**{**vars(one), "generated": torch.ones_like(one.generated)}) for one in made]
    with pytest.raises(InvalidInputError, match="must trace one text or answer one question"):
        compare(*bare)
    foreign = FlowTrace(**{**vars(made[0]), "provenance": {"versions": "1.0"}})
    assert compare(foreign, foreign).notes == ()


def test_a_route_of_no_hops_and_flows_without_hubs():
    """Everything in one group: nothing moves between groups, and that is the same in both."""
    graph = FlowGraph.from_dense(torch.tensor([[0.0, 0], [1, 0]]).double(), question=[0], answer=[1])
    pairs = [trace_of(graph, tokens, ids) for tokens, ids in ((["a", "bc"], [1, 2]), (["ab", "c"], [3, 4]))]
    comparison = compare(*pairs)
    assert comparison.by == "characters"
    assert comparison.edge_overlap == 1
    assert comparison.mean_hops == (0, 0)
    assert comparison.hub_overlap is None
    assert comparison.rank_correlation is None
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["summary"]["rank_correlation"] is None


@pytest.fixture(scope="module")
def two_layers() -> tuple[FlowTrace, FlowTrace]:
    model, tokenizer = tiny()
    made = [trace(model, tokenizer, chat(PROMPT), "3 + 4 = 7. So the answer is 7.", layers=[layer]) for layer in (0, 1)]
    return made[0], made[1]


def test_two_layer_ranges_of_a_model(two_layers, tmp_path: Path):
    comparison = compare(*two_layers)
    assert comparison.num_matched == two_layers[0].num_tokens
    torch.testing.assert_close(comparison.difference, two_layers[1].throughput - two_layers[0].throughput)
    assert 0 < comparison.total_variation < 1
    assert 0 < comparison.edge_overlap < 1
    assert "layers 0" in comparison.names[0]
    assert "layers 1" in comparison.names[1]
    comparison.to_json(tmp_path / "c.json")
    payload = json.loads((tmp_path / "c.json").read_text())
    assert payload["schema"] == "flowgraph-comparison/1"
    for side in (0, 1):
        for unit in payload["units"][side]:
            assert payload["pairs"][unit["pair"]][side] == unit["index"]
    before, text, after = comparison.context(comparison.largest()[0])
    assert f"{before}{text}{after}" in two_layers[0].text
    assert align(*two_layers).num_matched == comparison.num_matched


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "110")
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_and_writes(run, two_layers, tmp_path: Path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for one, path in zip(two_layers, paths, strict=True):
        one.save(path)
    result = run(*paths, "--html", tmp_path / "c.html", "--json", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    for part in ("layers 0", "layers 1", "more flow in B", "less flow in B", "widest routes", "of all hops"):
        assert part in result.output
    comparison = compare(*two_layers)
    strongest = comparison.largest(1)[0]
    assert f"{100 * float(comparison.difference[strongest]):+.1f}" in result.output
    assert json.loads((tmp_path / "c.json").read_text()) == comparison.to_dict()
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    assert "compared by steps" in run(*paths, "--by", "steps").output
    same = run(paths[0], paths[0])
    assert "more flow in B: nothing" in same.output


def test_steps_and_replaced_words_in_the_terminal(run, tmp_path: Path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    dense_trace(words("How many ?\n3 + 4 = 7\nso \x1b[31m 7"), 3, 1).save(paths[0])
    dense_trace(words("How many ?\n3 - 4 = 1\nso \x1b[31m 1"), 3, 1, seed=1).save(paths[1])
    result = run(*paths)
    assert "[ +] | [ -]" in result.output
    assert "7|1" in result.output
    assert "\x1b[31m" not in result.output


def test_bad_files_are_refused_before_anything_is_written(run, two_layers, tmp_path: Path):
    good, page = tmp_path / "a.safetensors", tmp_path / "c.html"
    two_layers[0].save(good)
    newer, foreign, other = tmp_path / "newer.safetensors", tmp_path / "foreign", tmp_path / "other.safetensors"
    size = struct.unpack("<Q", good.read_bytes()[:8])[0]
    header = good.read_bytes()[8 : 8 + size].replace(b'"schema":"1"', b'"schema":"9"')
    newer.write_bytes(struct.pack("<Q", len(header)) + header + good.read_bytes()[8 + size :])
    foreign.write_text("{}")
    dense_trace(words("Why so ?"), 1, 1).save(other)
    for second, kind, message in (
        (tmp_path / "missing", TraceFileError, "must be an existing trace file"),
        (newer, TraceFileError, "must have schema 1, got 9"),
        (foreign, TraceFileError, "must be a complete safetensors file"),
        (tmp_path, TraceFileError, "got the folder"),
        (other, InvalidInputError, "must trace one text or answer one question"),
    ):
        result = run(good, second, "--html", page)
        assert isinstance(result.exception, kind), second
        assert isinstance(result.exception, FlowgraphError)
        assert message in str(result.exception)
    result = run(good, good, "--json", tmp_path / "no" / "c.json", "--html", page)
    assert isinstance(result.exception, OutputError)
    assert not page.exists()
    assert "must each name a file of its own" in run(good, good, "--json", page, "--html", page).output
    assert not page.exists()
