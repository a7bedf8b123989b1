"""Steps: the contracted flow against loops and routes, and text split where a reader would split it."""

import csv
import json
import re
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch

from flowgraph import (
    Flow,
    FlowGraph,
    FlowTrace,
    InfeasibleFlowError,
    InvalidInputError,
    MemoryLimitError,
    OutputError,
    RegionError,
    Step,
    contract,
    solve,
    split_steps,
)
from flowgraph.tracing.payload import trace_payload
from tests.fixtures.convert import close, random_attention, to_graph
from tests.reference import flow as reference
from tests.reference import steps as slow
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

some = settings(max_examples=60, deadline=None)


@st.composite
def contractions(draw: st.DrawFn, max_nodes: int = 8) -> tuple[Case, list[int]]:
    case = draw(flow_graphs(max_nodes=max_nodes, min_nodes=2))
    grows = draw(st.lists(st.booleans(), min_size=case.num_nodes - 1, max_size=case.num_nodes - 1))
    step = [0]
    for grow in grows:
        step.append(step[-1] + grow)
    return case, step


def solved(case: Case) -> Flow:
    flow = solve(to_graph(case.num_nodes, case.edges, case.question, case.answer))
    assume(bool(flow.feasible))
    return flow


# The flow between steps -----------------------------------------------------------------------------------


@given(drawn=contractions(max_nodes=12))
@some
def test_the_contracted_flow_is_the_sum_of_the_edge_flows(drawn: tuple[Case, list[int]]):
    case, step = drawn
    fast = contract(solved(case), step)
    edges = reference.effective_edges(case.edges, case.answer)
    exact = reference.solve(case.num_nodes, edges, case.question, case.answer)
    expected = slow.contract(edges, exact.edge_flow, exact.source, reference.absorbed(exact.g, case.answer), step)
    pairs = [(source, target) for source, target in fast.edge_index.T.tolist()]
    assert pairs == sorted(expected.edges, key=lambda pair: (pair[1], pair[0]))
    assert close(fast.edge_flow, [expected.edges[pair] for pair in pairs])
    for name in ("within", "throughput", "source", "absorbed"):
        assert close(getattr(fast, name), getattr(expected, name)), name


@given(drawn=contractions())
@some
def test_throughput_is_the_chance_that_a_route_visits_the_step_and_it_visits_once(drawn: tuple[Case, list[int]]):
    case, step = drawn
    fast = contract(solved(case), step)
    edges = reference.effective_edges(case.edges, case.answer)
    source = reference.solve(case.num_nodes, edges, case.question, case.answer).source
    every = reference.routes(case.num_nodes, edges, source, case.answer)
    assert all(moves == sorted(set(moves)) for moves in (slow.moves(route, step) for route in every))
    assert close(fast.throughput, slow.visits(every, step))


@given(drawn=contractions(max_nodes=20), absorption=st.sampled_from(["absorb", "pass_through"]))
@some
def test_the_flow_is_conserved_at_every_step(drawn: tuple[Case, list[int]], absorption: str):
    case, step = drawn
    flow = solve(to_graph(case.num_nodes, case.edges, case.question, case.answer), absorption=absorption)
    assume(bool(flow.feasible))
    steps = contract(flow, torch.tensor(step, dtype=torch.int32))
    torch.testing.assert_close(steps.source + steps.inflow, steps.outflow + steps.absorbed)
    torch.testing.assert_close(steps.throughput, steps.source + steps.inflow)
    of_tokens = torch.zeros(steps.num_steps, dtype=torch.float64).index_add(0, torch.tensor(step), flow.throughput)
    torch.testing.assert_close(steps.throughput + steps.within, of_tokens)
    assert steps.throughput.max() < 1 + 1e-12
    assert steps.absorbed.sum() == pytest.approx(1)
    assert bool((steps.edge_index[0] < steps.edge_index[1]).all())
    matrix = steps.matrix(within=True)
    assert torch.equal(matrix, matrix.tril())
    assert matrix.sum() == pytest.approx(float(flow.edge_flow.sum()))
    assert torch.equal(matrix - torch.diag(steps.within), steps.matrix())


def test_steps_of_one_token_are_the_graph_itself_and_one_step_holds_everything():
    rows = random_attention(20)
    flow = solve(FlowGraph.from_dense(rows, question=range(4), answer=[18, 19]))
    alone, whole = contract(flow, range(20)), contract(flow, [0] * 20)  # type: ignore[arg-type]
    torch.testing.assert_close(alone.throughput, flow.throughput)
    used = flow.edge_flow > 0
    assert torch.equal(alone.edge_index, flow.graph.edge_index[:, used])
    assert torch.equal(alone.edge_flow, flow.edge_flow[used])
    assert not alone.within.any()
    assert (whole.edge_index.shape, whole.throughput.tolist()) == ((2, 0), [pytest.approx(1)])
    assert float(whole.within) == pytest.approx(float(flow.throughput.sum()) - 1)


def test_a_potential_beyond_float64_changes_nothing():
    """A chain whose potentials leave float64: all of the flow passes every step."""
    pairs = torch.stack([torch.arange(39), torch.arange(1, 40)])
    graph = FlowGraph.from_edges(pairs, torch.full((39,), 1e-30), num_nodes=40, question=[0], answer=[39])
    steps = contract(solve(graph), [k // 10 for k in range(40)])
    torch.testing.assert_close(steps.throughput, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(steps.within, torch.full((4,), 9.0, dtype=torch.float64))


def diamond() -> FlowGraph:
    weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
    return FlowGraph.from_dense(weights, question=[0], answer=[3])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 1, 1], r"step_of_token: must be 4 integers, one per token, got torch.int64 of shape \(3,\)"),
        ([0.0, 1, 1, 2], r"step_of_token: must be 4 integers, one per token, got torch.float32"),
        ([False, True, True, True], r"step_of_token: must be 4 integers, one per token, got torch.bool"),
        (["a", "b"], r"step_of_token: must be 4 integers, got \['a', 'b'\]; pass the step of each token"),
        ([1, 1, 1, 2], r"step_of_token: must start at 0 and grow by 0 or 1 .*, got 1 at token 0; torch.unique"),
        ([0, 1, 0, 1], r"step_of_token: must start at 0 and grow by 0 or 1 .*, got 0 at token 2 after 1;"),
        ([0, 0, 2, 2], r"step_of_token: must start at 0 and grow by 0 or 1 .*, got 2 at token 2 after 0;"),
    ],
)
def test_numbers_that_are_no_steps(numbers: list, message: str):
    with pytest.raises(InvalidInputError, match=message):
        contract(solve(diamond()), numbers)


def test_a_batch_and_an_unreachable_answer_are_refused():
    with pytest.raises(InvalidInputError, match=r"flow: must be the flow of one graph, got a batch of 2"):
        contract(solve(Batch.from_data_list([diamond()] * 2)), [0] * 8)
    cut = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible, got none: no question token reaches"):
        contract(solve(cut), [0, 1, 2])


def test_a_matrix_without_room_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: 1)
    with pytest.raises(MemoryLimitError, match=r"matrix: would need .*; read edge_index and edge_flow instead"):
        contract(solve(diamond()), [0, 1, 1, 2]).matrix()


# Splitting text -------------------------------------------------------------------------------------------


def split(text: str, by: object = "auto", size: int = 0) -> list[str]:
    """The reasoning's steps, stripped; tokens are words with the blank before them, or ``size`` characters."""
    pieces = [text[k : k + size] for k in range(0, len(text), size)] if size else re.findall(r"\s*\S+|\s+$", text)
    ends = torch.tensor([0, 1, *(1 + torch.tensor([len(p) for p in pieces]).cumsum(0)).tolist(), 2 + len(text)])
    steps = split_steps(
        ["Q", *pieces, "A"],
        torch.stack([ends[:-1], ends[1:]], 1),
        f"Q{text}A",
        question=[0],
        reasoning=slice(1, len(pieces) + 1),
        answer=[len(pieces) + 1],
        by=by,  # type: ignore[arg-type]
    )
    assert [steps[0].text, steps[-1].text] == ["Q", "A"]
    assert "".join(step.text for step in steps) == f"Q{text}A"
    return [step.text.strip() for step in steps[1:-1]]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Pi is 3.14 or so.", "Then 2.5 + 1.5 = 4.0.", "Done!"],
        ["It costs $5.00.", "So we pay 5.", "Is that all?", "Yes."],
        ["We know e.g. apples, i.e. The fruit, vs. Pears.", "Mr. Smith and Dr. Who agree.", "J. K. Rowling too."],
        ["Wait... let me think.", "1, 2, ..., 5 and 1, 2, ... 10 are lists.", "Hmm...", "Next one."],
        ["1. First do this.", "2. Then that."],
        ["Step 1. Find x.", "**Step 2.** Solve it."],
        ["The train leaves at 3 p.m. and stops.", "It starts at 5 p.m.", "Then it rests."],
        ["5! = 120 and 3! < 7.", '"Really?" he asked.', '"Yes!"', "(So it is.)", "**Good.**", "_End._"],
        ["Let the number be x.", "The answer is C.", "Because of Fig. 3, eq. (2) and no. 7 it holds."],
        ["他有3个苹果。", "又买了4个！", "共7个吗？", "3.14是的。"],
        ["これは．３です｡", "「はい。」", "終わり"],
        ["यह तीन है।", "वह चार है।"],
        ["هل هذا صحيح؟", "نعم."],
        ["What?!", "No way!!!", "Fine. . ."],
        ["A line without a stop", "Another one"],
    ],
    ids=lambda sentences: sentences[0][:12],
)
def test_sentences(sentences: list[str]):
    glue = "\n" if not re.search(r"\W$", sentences[0]) else "" if ord(sentences[0][0]) > 0x3000 else " "
    assert split(glue.join(sentences), "sentences", size=1) == sentences


def test_no_token_is_cut():
    """A boundary inside a token falls to its end; the blank before a word belongs to the word's token."""
    tokens = ["Q", "One.", " Tw", "o.Th", "ree. F", "our", ".\n", "\n", "Five", "A"]
    steps = split_steps(
        tokens,
        torch.zeros(10, 2).long(),
        "",
        question=[0],
        reasoning=slice(1, 9),
        answer=[9],
        by="sentences",
    )
    assert [step.text for step in steps] == ["Q", "One.", " Two.Three. F", "our.\n\n", "Five", "A"]
    assert [(step.index, step.start, step.stop) for step in steps][2] == (2, 2, 5)


def test_tokens_that_share_a_character_stay_together():
    spans = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [3, 4], [3, 4], [4, 5]])
    steps = split_steps(
        ["Q", "a", "。", "\ufffd", "\ufffd", "\ufffd", "A"],
        spans,
        "Qa。😀A",
        question=[0],
        reasoning=slice(1, 6),
        answer=[6],
        by=r"😀",
    )
    assert [(step.start, step.stop, step.text) for step in steps[1:3]] == [(1, 3, "a。"), (3, 6, "😀")]


LIST = "We add.\n1. Tom has 3.\n2. He buys 4.\n3. That is 7.\n\nThe answer is "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LIST, ["We add.", "1. Tom has 3.", "2. He buys 4.", "3. That is 7.", "The answer is"]),
        ("1) a\n(2) b\n**3.** c\n- 4. d", ["1) a", "(2) b", "**3.** c", "- 4. d"]),
        ("Step 1: a\n\nx\n\nStep 2. b\n\ny\n\nSo", ["Step 1: a\n\nx", "Step 2. b\n\ny", "So"]),
        ("Step 1: we add. Step 2: so 7, as in Step 1 above.", ["Step 1: we add.", "Step 2: so 7, as in Step 1 above."]),
        ("### Step one\n1. a\n2. b\n### Step two\n1. c", ["### Step one\n1. a\n2. b", "### Step two\n1. c"]),
        ("第一步：三个。第2步：四个。", ["第一步：三个。", "第2步：四个。"]),
        ("第一步：三个\r\n第2步：四个", ["第一步：三个", "第2步：四个"]),
        ("1、甲\u20282、乙", ["1、甲", "2、乙"]),
        ("3.14 is\n2.5 no\n1. only", ["3.14 is\n2.5 no", "1. only"]),
    ],
)
def test_numbered(text: str, expected: list[str]):
    assert split(text, "numbered", size=1) == expected


def test_lines():
    text = "One. Two.\r\n\r\n  Three\n\\[\nx = 1\n\\]\n---\nFour"
    assert split(text, "lines") == ["One. Two.", "Three\n\\[", "x = 1\n\\]\n---", "Four"]


def test_auto_takes_numbers_then_lines_then_sentences():
    assert split(LIST) == split(LIST, "numbered")
    three = "One. Two.\nThree.\nFour"
    assert split(three) == split(three, "lines") == ["One. Two.", "Three.", "Four"]
    two = "1. One. Two.\nThe answer is"
    assert split(two) == split(two, "sentences") == ["1. One.", "Two.", "The answer is"]
    assert split("(((") == ["((("]


def test_a_pattern_starts_a_step_where_it_matches_or_at_its_group():
    text = "first; second; third\n\nfourth"
    assert split(text, r";\s*()") == ["first;", "second;", "third\n\nfourth"]
    assert split(text, re.compile(r"(?<=;)")) == ["first;", "second;", "third\n\nfourth"]
    assert split(text, r"\n\n") == ["first; second; third", "fourth"]
    assert split(text, r"(x)?third") == ["first; second;", "third\n\nfourth"]
    assert split(text, re.compile("SECOND", re.IGNORECASE)) == ["first;", "second; third\n\nfourth"]


def test_a_function_gives_character_spans_of_the_reasoning():
    text = " one two three four"
    asked = []

    def halves(seen: str) -> list[tuple[int, int]]:
        asked.append(seen)
        return [(1, 4), (9, 14)]  # what stands between belongs to the step before

    assert split(text, halves) == ["one two", "three four"]
    assert asked == [text]
    with pytest.raises(InvalidInputError, match=r"by: function <lambda> must match in the reasoning, got no match"):
        split(text, lambda seen: [])


def test_token_spans_are_taken_as_they_are():
    assert split("a b c d", [(1, 3), (3, 4)]) == ["a b", "c", "d"]
    assert split("a b c d", torch.tensor([[2, 4]])) == ["a", "b c", "d"]
    assert split("a b c d", []) == ["a b c d"]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("line", r"by: must be one of 'auto', .*, got 'line'; did you mean 'lines'\? For the word itself pass re.comp"),
        ("Sentences", r"got 'Sentences'; did you mean 'sentences'"),
        ("", r"by: must be one of .*, got ''; try 'auto'"),
        ("(", r"by: must be a regular expression or one of .*, got '\(' with an error at position 0: missing \)"),
        (re.compile(b"x"), r"by: must be a pattern of text, got one of bytes"),
        ("numbered", r"by: numbered must match in the reasoning, got no match in 'a b c'; 'auto', 'lines' and 'sent"),
        ("zebra", r"by: pattern 'zebra' must match in the reasoning, got no match in 'a b c'"),
        (None, r"by: must be a rule's name, a pattern, a function or token spans, got None; 'auto' is a good start"),
        (3, r"by: must be a rule's name, .*, got 3"),
        (
            [(0, 9)],
            r"by: must give token spans \(start, stop\) within 0..5, in order and without overlap, got \(0, 9\)",
        ),
        ([(1, 3), (2, 4)], r"by: must give token spans .*, got \(2, 4\) after 3; sort them"),
        ([(1, 1)], r"by: must give token spans .*, got \(1, 1\) after 0"),
        ([(1.5, 2)], r"by: must give token spans .*, got \(1.5, 2\)"),
        ([1, 2], r"by: must give token spans .*, got \[1, 2\]; return a list such as"),
        ([(0, 2)], r"by: a step must lie in one region, got tokens \(0, 2\) with question and reasoning; cut it where"),
        (lambda text: None, r"by: must give character spans .* within 0..5, .*, got None"),
        (lambda text: [(0, 6)], r"by: must give character spans .*, got \(0, 6\) after 0"),
    ],
)
def test_bad_ways_to_split(by: object, message: str):
    with pytest.raises(InvalidInputError, match=message):
        split("a b c", by)


@pytest.mark.unchecked
def test_bad_regions_and_spans():
    spans = torch.zeros(3, 2).long()
    with pytest.raises(RegionError, match=r"reasoning: regions must be disjoint, got token 0 in the question too"):
        split_steps("abc", spans, "", question=[0], reasoning=[0, 1], answer=[2])
    with pytest.raises(RegionError, match=r"answer: token indices must lie in 0..2, got 3"):
        split_steps("abc", spans, "", question=[0], reasoning=[1], answer=[3])
    with pytest.raises(
        InvalidInputError, match=r"spans: must be one \(start, end\) for each .*, got shape \(2, 2\) for 3"
    ):
        split_steps("abc", spans[:2], "", question=[0], reasoning=[1], answer=[2])


CHAT = ["\n", "<user>", "How", "\n", "many?", "\n", "<bot>", " One.", " Two.", "\n", "7", "\n", "!", "<end>"]


def test_regions_make_steps_and_blank_tokens_outside_them_join_the_step_before():
    steps = split_steps(
        CHAT,
        torch.zeros(14, 2).long(),
        "",
        question=[2, 4],
        reasoning=slice(7, 10),
        answer=[10, 12],
        by="sentences",
    )
    assert [(step.region, step.text) for step in steps] == [
        (None, "\n<user>"),
        ("question", "How\nmany?\n"),
        (None, "<bot>"),
        ("reasoning", " One."),
        ("reasoning", " Two.\n"),
        ("answer", "7\n!"),
        (None, "<end>"),
    ]
    named = {"question": [2, 4], "reasoning": slice(7, 10), "answer": [10, 12]}
    asked = split_steps(CHAT, torch.zeros(14, 2).long(), "", **named, by="lines", split_question=True)  # type: ignore[arg-type]
    assert [step.text for step in asked if step.region == "question"] == ["How\n", "many?\n"]
    wide = split_steps(CHAT, torch.zeros(14, 2).long(), "", **named, by=[(1, 7)])  # type: ignore[arg-type]
    assert wide[1] == Step(1, 1, 7, "".join(CHAT[1:7]), "question")


@given(data=st.data())
@some
def test_every_token_is_in_one_step_of_its_own_region(data: st.DataObject):
    alphabet = ["a", "B.", " C", ". ", "1. ", "\n", " ", "。", "😀", "\ud800", "", "Step 2:", "</s>", "...", "\u2028"]
    tokens = data.draw(st.lists(st.sampled_from(alphabet), min_size=3, max_size=24))
    kinds = data.draw(st.lists(st.sampled_from([-1, 0, 1, 1, 1, 2]), min_size=len(tokens), max_size=len(tokens)))
    masks = [torch.tensor([kind == which for kind in kinds]) for which in range(3)]
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0)
    spans = torch.stack([ends - torch.tensor([len(token) for token in tokens]), ends], 1)
    text = data.draw(st.sampled_from(["".join(tokens), ""]))
    by = data.draw(st.sampled_from(["auto", "lines", "sentences", lambda seen: [(0, len(seen))] if seen else []]))
    question, reasoning, answer = masks
    split_question = data.draw(st.booleans())
    try:
        steps = split_steps(
            tokens,
            spans,
            text,
            question=question,
            reasoning=reasoning,
            answer=answer,
            by=by,
            split_question=split_question,
        )
    except InvalidInputError:
        assert callable(by)
        return
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [t for step in steps for t in range(step.start, step.stop)] == list(range(len(tokens)))
    assert "".join(step.text for step in steps) == "".join(tokens)
    for step in steps:
        for t in range(step.start, step.stop):
            inside = {0: "question", 1: "reasoning", 2: "answer", -1: None}[kinds[t]]
            assert inside == step.region or (inside is None and not tokens[t].strip())


# What a user holds ----------------------------------------------------------------------------------------

WORDS = ["Why?", " We", " say", ".", " So", " =", " it", " is", " ", "7", "."]


def small_trace(graph: FlowGraph | None = None, tokens: list[str] | None = None) -> FlowTrace:
    tokens = tokens or WORDS
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0)
    spans = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], 1)
    graph = graph or FlowGraph.from_dense(random_attention(11), question=[0], answer=[9])
    generated = torch.arange(len(tokens)) > 0
    return FlowTrace(tuple(tokens), torch.arange(len(tokens)), "".join(tokens), spans, generated, graph, solve(graph))


def test_a_trace_gives_its_steps():
    trace = small_trace()
    steps = trace.steps()
    assert [(step.region, step.text) for step in steps.steps] == [
        ("question", "Why?"),
        ("reasoning", " We say."),
        ("reasoning", " So = it is "),
        ("answer", "7"),
        (None, "."),
    ]
    assert steps.by == "auto: sentences"
    assert steps.throughput.tolist() == pytest.approx(
        contract(trace.flow, [0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 4]).throughput.tolist(), abs=0
    )
    assert steps.throughput[[0, 3]].tolist() == pytest.approx([1, 1])
    lines = repr(steps).split("\n")
    assert lines[0] == f"StepFlow of 5 steps by auto: sentences, {steps.edge_flow.numel()} flows between them"
    assert lines[3].split()[:2] == ["2", "reasoning"]
    assert trace.steps(r"So").by == "pattern 'So'"
    assert trace.steps(lambda text: [(0, len(text))]).by == "function <lambda>"
    assert trace.steps([(1, 3)]).by == "token spans"
    assert "... and 5 more" in repr(
        small_trace(
            FlowGraph.from_dense(random_attention(45), question=[0], answer=[44]), ["Q", *["x\n"] * 43, "A"]
        ).steps("lines")
    )


@pytest.mark.unchecked
def test_every_form_holds_the_same_numbers(tmp_path: Path):
    steps = small_trace().steps()
    table = steps.table()
    assert table[2]["inflow"] == steps.inflow[2].item()
    assert list(table[0]) == [
        "index", "start", "stop", "region", "text", "throughput", "source", "absorbed", "inflow", "outflow", "within",
    ]  # fmt: skip
    flows = steps.flow_table()
    assert [row["flow"] for row in flows] == sorted(steps.edge_flow.tolist(), reverse=True)
    assert steps.flow_table(2) == flows[:2]
    matrix = steps.matrix()
    assert all(matrix[row["target"], row["source"]] == row["flow"] for row in flows)
    graph = steps.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes[4] == {
        name: value if value is not None else "" for name, value in table[4].items() if name != "index"
    }
    assert {(s, t): d["flow"] for s, t, d in graph.edges(data=True)} == {
        (row["source"], row["target"]): row["flow"] for row in flows
    }
    steps.to_csv(tmp_path / "s.csv")
    steps.to_csv(tmp_path / "f.csv", flows=True)
    steps.to_json(tmp_path / "s.json")
    read = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines(keepends=True)))
    assert [(row["text"], float(row["throughput"])) for row in read] == [(r["text"], r["throughput"]) for r in table]
    read = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert [{name: float(row[name]) for name in row} for row in read] == flows
    assert json.loads((tmp_path / "s.json").read_text()) == steps.to_dict()
    with pytest.raises(OutputError, match=r"path: its folder must exist"):
        steps.to_csv(tmp_path / "no" / "s.csv")
    for k in (-1, 1.5, True):
        with pytest.raises(InvalidInputError, match=r"k: must be an integer, 0 or more, got"):
            steps.flow_table(k)  # type: ignore[arg-type]


def test_hostile_text_survives_in_files(tmp_path: Path):
    hostile = ["</script>", ' "a,b"\n', "\ud800", "\x00\x1b[31m", "=1+1", "\u2028x", "\u202e", "é", ",", "7", "'"]
    steps = small_trace(tokens=hostile).steps("lines")
    steps.to_json(tmp_path / "s.json")
    assert "".join(node["text"] for node in json.loads((tmp_path / "s.json").read_text())["nodes"]) == "".join(hostile)
    steps.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert "".join(row["text"] for row in read) == "".join(hostile).replace("\ud800", "?")


def test_the_payload_holds_the_steps_or_null():
    trace = small_trace()
    payload = trace.to_dict()
    assert payload["steps"] == trace.steps().to_dict()
    assert list(payload["steps"]) == ["by", "nodes", "edges", "edges_left_out"]
    shown = trace.to_dict(max_edges=2)["steps"]
    assert shown["edges"] == payload["steps"]["edges"][:2]
    assert shown["edges_left_out"] == len(payload["steps"]["edges"]) - 2
    cut = FlowGraph.from_edges(torch.tensor([[1], [2]]), torch.ones(1), num_nodes=11, question=[0], answer=[9])
    assert small_trace(cut).to_dict()["steps"] is None
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible"):
        small_trace(cut).steps()


def test_a_payload_without_text_or_with_spans_that_do_not_fit_reads_the_tokens():
    trace = small_trace()
    for text, spans in (("", torch.zeros(11, 2).long()), ("x", trace.spans), ("x" * 50, -trace.spans)):
        payload = trace_payload(
            trace.flow,
            tokens=WORDS,
            text=text,
            spans=spans.long(),
            generated=trace.generated,
            provenance={},
            keep=0.9,
            max_edges=9,
        )
        assert [node["text"] for node in payload["steps"]["nodes"]] == ["Why?", " We say.", " So = it is ", "7", "."]


def test_an_answer_without_reasoning_has_steps_too():
    graph = FlowGraph.from_dense(random_attention(3), question=[0, 1], answer=[2])
    steps = small_trace(graph, ["a", "b", "c"]).steps("numbered")
    assert [(step.region, step.text) for step in steps.steps] == [("question", "ab"), ("answer", "c")]
    assert steps.edge_flow.tolist() == pytest.approx([1])


def test_the_flow_between_steps_can_be_learned_from():
    rows = random_attention(11).double()
    base = FlowGraph.from_dense(rows, question=[0], answer=[9])
    base.capacity = base.capacity.requires_grad_()
    contract(solve(base), [0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 4]).throughput[1].backward()
    assert base.capacity.grad is not None
    assert bool(base.capacity.grad.any())


# The command ----------------------------------------------------------------------------------------------


def run(*arguments: object):
    import typer
    from typer.testing import CliRunner

    from flowgraph.commands.steps import steps

    app = typer.Typer()
    app.command()(steps)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.unchecked
def test_tokens_and_spans_of_another_kind_are_refused():
    regions = {"question": [0], "reasoning": [1], "answer": [2]}
    for spans in (None, ["a", "b", "c"]):
        with pytest.raises(InvalidInputError, match="spans: must be one"):
            split_steps(["a", "b", "c"], spans, "", **regions)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="tokens: must be the text of each token"):
        split_steps([1, 2, 3], torch.zeros(3, 2).long().long(), "", **regions)  # type: ignore[list-item]


def test_the_command_prints_steps_and_flows_and_writes_them(tmp_path: Path):
    trace = small_trace()
    trace.save(tmp_path / "t.safetensors")
    done = run(
        tmp_path / "t.safetensors", "--csv", tmp_path / "s.csv", "--flows-csv", tmp_path / "f.csv",
        "--json", tmp_path / "s.json", "--flows", 3,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "5 steps by auto: sentences" in done.output
    assert "So = it is" in done.output
    assert "strongest 3 of" in done.output
    assert json.loads((tmp_path / "s.json").read_text()) == trace.steps().to_dict()
    assert (tmp_path / "s.csv").read_text().startswith("index,start,stop,region,text,throughput")
    assert (tmp_path / "f.csv").read_text().startswith("source,target,flow\n")
    assert "by pattern 'So'" in run(tmp_path / "t.safetensors", "--by", "So", "--flows", 0).output
    assert "strongest" not in run(tmp_path / "t.safetensors", "--flows", 0).output


def test_the_command_keeps_token_text_from_steering_the_terminal_and_checks_outputs_first(tmp_path: Path):
    small_trace(tokens=["Q", "\x1b[31m", "[red]", "\u202e", *"abcde", "7", "!"]).save(tmp_path / "t")
    done = run(tmp_path / "t")
    assert done.exit_code == 0, done.output
    assert "[red]" in done.output
    assert "\x1b[31m" not in done.output
    assert "\u202e" not in done.output
    twice = run(tmp_path / "t", "--csv", tmp_path / "s.csv", "--json", tmp_path / "s.csv")
    assert twice.exit_code == 2
    assert not (tmp_path / "s.csv").exists()
    failed = run(tmp_path / "missing", "--csv", tmp_path / "no" / "s.csv")
    assert isinstance(failed.exception, OutputError)
    assert isinstance(run(tmp_path / "t", "--by", "line").exception, InvalidInputError)
