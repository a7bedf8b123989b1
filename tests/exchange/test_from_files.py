"""Graph files come back bit for bit; broken, foreign and hostile ones end in a message that names the file."""

import json
import sys
import tempfile
import time
from pathlib import Path

import igraph
import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgraph import (
    Flow,
    FlowGraph,
    FlowTrace,
    InvalidInputError,
    MissingExtraError,
    RegionError,
    TraceFileError,
    read_edges,
    read_gexf,
    read_graphml,
    read_json,
    solve,
    to_igraph,
    to_networkx,
    write_edges,
    write_gexf,
    write_graphml,
    write_tokens,
)
from tests.fixtures.convert import to_graph
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

WEIGHTS = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
GRAPH = FlowGraph.from_dense(WEIGHTS, question=[0], answer=[3])
XML = {"graphml": (write_graphml, read_graphml), "gexf": (write_gexf, read_gexf)}


def through_table(graph: FlowGraph | Flow, folder: Path, suffix: str) -> FlowGraph:
    write_edges(graph, folder / f"e{suffix}")
    write_tokens(graph, folder / f"t{suffix}")
    return read_edges(folder / f"e{suffix}", folder / f"t{suffix}")


def through_xml(graph: FlowGraph | Flow, folder: Path, kind: str) -> FlowGraph:
    write, read = XML[kind]
    write(graph, folder / "g.xml")
    return read(folder / "g.xml")


TRIPS = {
    "graphml": lambda graph, folder: through_xml(graph, folder, "graphml"),
    "gexf": lambda graph, folder: through_xml(graph, folder, "gexf"),
    "csv": lambda graph, folder: through_table(graph, folder, ".csv"),
    "parquet": lambda graph, folder: through_table(graph, folder, ".parquet"),
}


def assert_same(one: FlowGraph, other: FlowGraph, facts: bool = True):
    for name in ("edge_index", "question_mask", "reasoning_mask", "answer_mask"):
        assert torch.equal(one[name], other[name]), name
    assert one.num_nodes == other.num_nodes
    assert torch.equal(one.capacity.double(), other.capacity.double())
    if facts:
        assert one.capacity.dtype == other.capacity.dtype
        assert one.rules == other.rules
        for name in ("kept_attention", "kept_flow", "throughput_error"):
            assert torch.equal(one[name], other[name]), name
    first, second = solve(one), solve(other)
    assert torch.equal(first.throughput, second.throughput)
    assert torch.equal(first.edge_flow, second.edge_flow)


@pytest.mark.parametrize("trip", TRIPS)
@given(
    case=flow_graphs(min_nodes=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    losses=st.booleans(),
    solved=st.booleans(),
)
@settings(max_examples=25)
def test_round_trips(trip: str, case: Case, dtype: torch.dtype, losses: bool, solved: bool):
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer, dtype)
    graph.capacity = graph.capacity / 3  # as many bits as the type has
    graph.rules = "rows=emission"
    if losses:
        graph.kept_flow, graph.throughput_error = graph.kept_flow / 3, graph.throughput_error + 0.1
    with tempfile.TemporaryDirectory() as folder:
        back = TRIPS[trip](solve(graph) if solved else graph, Path(folder))
    assert_same(back, graph, facts=trip != "csv")


@pytest.mark.parametrize("trip", TRIPS)
def test_the_ends_of_float64(trip: str, tmp_path: Path):
    edges, capacity = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([5e-324, 1e300, 0.1], dtype=torch.float64)
    graph = FlowGraph.from_edges(edges, capacity, num_nodes=5, question=[0], answer=[3], reasoning=[2])
    assert_same(TRIPS[trip](graph, tmp_path), graph)


def test_the_backbone_comes_back_as_a_graph_that_knows_what_it_lost(tmp_path: Path):
    flow = solve(GRAPH)
    for write, read in XML.values():
        write(flow, tmp_path / "g.xml", keep=0.5)
        back = read(tmp_path / "g.xml")
        assert back.num_edges == 2
        assert back.kept_flow.item() == pytest.approx(2 / 3)
        assert back.throughput_error.item() == pytest.approx(1 / 3)


def test_files_of_other_writers(tmp_path: Path):
    """igraph names nodes n0, n1; GEXF 1.3 is what Gephi writes."""
    to_igraph(GRAPH).write_graphml(str(tmp_path / "i.graphml"))
    assert_same(read_graphml(tmp_path / "i.graphml"), GRAPH)
    nx.write_gexf(to_networkx(GRAPH), tmp_path / "g.gexf", version="1.3")
    assert_same(read_gexf(tmp_path / "g.gexf"), GRAPH, facts=False)
    again = igraph.Graph([(0, 1)], directed=True, edge_attrs={"weight": [0.5]})
    again.write_graphml(str(tmp_path / "w.graphml"))
    graph = read_graphml(tmp_path / "w.graphml", capacity="weight", question=[0], answer=[1])
    assert graph.capacity.tolist() == [0.5]


# Hostile and broken XML ---------------------------------------------------------------------------------


BOMB = '<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY a0 "lol">' + "".join(
    f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12)
)


@pytest.mark.parametrize("read", [read_graphml, read_gexf])
@pytest.mark.parametrize(
    "head",
    [
        BOMB + "]><graphml>&a11;</graphml>",
        '<!DOCTYPE g [<!ENTITY x SYSTEM "file:///etc/passwd">]><graphml>&x;</graphml>',
        '<!DOCTYPE graphml SYSTEM "http://graphml.example/graphml.dtd"><graphml/>',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_document_type_is_refused_before_anything_expands(read, head: str, encoding: str, tmp_path: Path):
    (tmp_path / "g.xml").write_bytes(head.replace('"1.0"', f'"1.0" encoding="{encoding}"').encode(encoding))
    before = time.process_time()
    with pytest.raises(TraceFileError, match=r"path: must be XML without a document type, got a DOCTYPE in .*g.xml"):
        read(tmp_path / "g.xml")
    assert time.process_time() - before < 5


@pytest.mark.parametrize("kind", XML)
def test_every_truncation_is_refused(kind: str, tmp_path: Path):
    write, read = XML[kind]
    write(solve(GRAPH), tmp_path / "g.xml")
    content = (tmp_path / "g.xml").read_bytes().rstrip()
    for length in range(0, len(content), 37):
        (tmp_path / "g.xml").write_bytes(content[:length])
        with pytest.raises(
            TraceFileError, match=r"path: must be complete XML, got .*g.xml .*; it is truncated, or no XML"
        ):
            read(tmp_path / "g.xml")


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_graphml, "<html><body/></html>", r"path: must hold a flow graph, got .*; write it again"),
        (read_gexf, "<html><body/></html>", r"path: must hold a flow graph, got .*No <graph> element"),
        (read_graphml, "<?xml version='1.0' encoding='klingon'?><a/>", r"path: must hold .*unknown encoding: klingon"),
        (read_graphml, "\x00\x01", r"path: must be complete XML"),
        (read_gexf, "<gexf>" * 200_000, r"path: must be complete XML"),
    ],
)
def test_what_is_no_graph_file_is_refused(read, content: str, message: str, tmp_path: Path):
    (tmp_path / "g.xml").write_text(content)
    with pytest.raises(TraceFileError, match=message):
        read(tmp_path / "g.xml")


@pytest.mark.parametrize("read", [read_graphml, read_gexf, read_json, lambda path: read_edges(path, num_nodes=1)])
def test_a_file_that_is_not_there(read, tmp_path: Path):
    with pytest.raises(TraceFileError, match=r"path: must be a readable file, got .*none \(No such file"):
        read(tmp_path / "none")
    with pytest.raises(TraceFileError, match=r"path: must be a readable file, got .*Is a directory"):
        read(tmp_path)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('edgedefault="directed"', 'edgedefault="undirected"', r"graph: must be a directed networkx graph, got Graph"),
        ('<edge source="0" target="1"', '<edge source="3" target="1"', r"an edge must run from an earlier .* 3 -> 1"),
        ('<edge source="0" target="1"', '<edge source="0" target="2"', r"an edge may appear once, got 0 -> 2 twice"),
        ('attr.name="capacity" attr.type="double"', 'attr.name="capacity" attr.type="string"', r"number, got '0.5'"),
        ('attr.name="capacity"', 'attr.name="size"', r"capacity of the edge 0 -> 1: must be a number, got None"),
        (">0.25<", ">nan<", r"capacity: must be finite and non-negative, got nan on the edge 0 -> 2"),
        (">0.25<", ">much<", r"could not convert string to float"),
        ("flowgraph-graph/1", "flowgraph-graph/9", r"schema: must be 'flowgraph-graph/1', got 'flowgraph-graph/9'"),
        ('attr.name="position"', 'attr.name="place"', r""),
    ],
)
def test_what_is_wrong_in_a_graph_file_is_named(old: str, new: str, message: str, tmp_path: Path):
    write_graphml(GRAPH, tmp_path / "g.graphml")
    text = (tmp_path / "g.graphml").read_text()
    assert text.count(old) >= 1
    (tmp_path / "g.graphml").write_text(text.replace(old, new))
    if not message:  # node names serve as well
        assert read_graphml(tmp_path / "g.graphml").num_edges == 4
        return
    with pytest.raises(
        TraceFileError, match=rf"path: must hold a flow graph, got .*g.graphml \(.*{message}.*; write it"
    ):
        read_graphml(tmp_path / "g.graphml")


@pytest.mark.parametrize("kind", XML)
@pytest.mark.parametrize("prefix", ["", "other:"])
def test_a_file_of_several_graphs_is_refused(kind: str, prefix: str, tmp_path: Path):
    """Reading the first and saying nothing would give the numbers of another graph."""
    write, read = XML[kind]
    write(GRAPH, tmp_path / "g.xml")
    text = (tmp_path / "g.xml").read_text()
    more = f'</graph><{prefix}graph edgedefault="directed" xmlns:other="http://graphml.example/ns"></{prefix}graph>'
    (tmp_path / "g.xml").write_text(text.replace("</graph>", more))
    with pytest.raises(
        TraceFileError, match=r"graph: must be one, got several <graph> elements; write each to its own"
    ):
        read(tmp_path / "g.xml")


def test_an_unknown_loss_in_json_is_unknown_again(tmp_path: Path):
    graph = GRAPH.clone()
    graph.kept_attention = torch.full_like(graph.kept_attention, torch.nan)
    made = FlowTrace(
        tuple("abcd"), torch.arange(4), "abcd", torch.tensor([[k, k + 1] for k in range(4)]), torch.ones(4).bool(),
        graph, solve(graph),
    )  # fmt: skip
    made.to_json(tmp_path / "t.json")
    assert bool(torch.isnan(read_json(tmp_path / "t.json").kept_attention).all())


def test_a_foreign_description_is_no_fact(tmp_path: Path):
    write_gexf(GRAPH, tmp_path / "g.gexf")
    text = (tmp_path / "g.gexf").read_text()
    start, end = text.index("<description>"), text.index("</description>")
    (tmp_path / "g.gexf").write_text(text[:start] + "<description>My graph" + text[end:])
    assert read_gexf(tmp_path / "g.gexf").kept_flow.item() == 1
    (tmp_path / "g.gexf").write_text(text.replace('"flowgraph-graph/1"', '"flowgraph-graph/1'))
    with pytest.raises(TraceFileError, match=r"path: must hold a flow graph"):
        read_gexf(tmp_path / "g.gexf")


def test_regions_missing_in_a_file_are_a_region_error(tmp_path: Path):
    nx.write_graphml(nx.DiGraph([(0, 1)]), tmp_path / "g.graphml")
    with pytest.raises(RegionError, match=r"question: must be given or marked on the nodes"):
        read_graphml(tmp_path / "g.graphml")


# Tables -------------------------------------------------------------------------------------------------


def test_a_table_of_ones_own(tmp_path: Path):
    (tmp_path / "e.csv").write_text("\ufefftarget,note,source,capacity\n2,x,1,1\n1,y,0,5e-1\n", encoding="utf-8")
    graph = read_edges(tmp_path / "e.csv", num_nodes=4, question=[0], answer=[2])
    assert graph.edge_index.tolist() == [[0, 1], [1, 2]]
    assert graph.capacity.tolist() == [0.5, 1.0]
    assert graph.num_nodes == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns: must hold source, target, capacity once each, got none"),
        (
            "source;target;capacity\n0;1;1\n",
            r"once each, got source;target;capacity; name them so, separated by commas",
        ),
        ("source,target,capacity,source\n", r"columns: must hold source, target, capacity once each"),
        ("source,target,capacity\n0,1\n", r"line 2: must have 3 cells, got 2; it is truncated"),
        ("source,target,capacity\n0,1,a\n", r"capacity of the edge 0 -> 1: must be a number, got 'a'"),
        ("source,target,capacity\n0,1,\n", r"capacity of the edge 0 -> 1: must be a number, got ''"),
        ("source,target,capacity\n0,1,1_0\n", r"must be a number, got '1_0'"),
        ("source,target,capacity\n0,1,nan\n", r"capacity: must be finite"),
        ("source,target,capacity\n0,1,inf\n", r"capacity: must be finite"),
        ("source,target,capacity\n0.5,1,1\n", r"source: must be a non-negative integer, got 0.5"),
        ("source,target,capacity\n-1,1,1\n", r"source: must be a non-negative integer, got -1"),
        ("source,target,capacity\n0,nan,1\n", r"target: must be a non-negative integer, got nan"),
        ("source,target,capacity\n0,9,1\n", r"edges: must join tokens 0..2, got 0 -> 9; add the missing token"),
        ("source,target,capacity\n0,99999999999999999999,1\n", r"target: must be a non-negative integer, got 1e\+20"),
        ("source,target,capacity\n1,0,1\n", r"an edge must run from an earlier to a later token, got 1 -> 0"),
        ("source,target,capacity\n0,1,1\n0,1,1\n", r"an edge may appear once, got 0 -> 1 twice"),
        ('source,target,capacity\n0,1,"1\n', r"unexpected end of data"),
        ("source,target,capacity\n0,1,\udcff\n", r"codec can't decode byte 0xff"),
    ],
)
def test_a_bad_table_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TraceFileError, match=rf"path: must hold a flow graph, got .*e.csv \(.*{message}"):
        read_edges(tmp_path / "e.csv", num_nodes=3, question=[0], answer=[2])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("position,region\n0,question\n2,answer\n", TraceFileError, r"position: must be 0..1, once each"),
        ("position,region\n0,question\nb,answer\n", TraceFileError, r"position: must be a number, got 'b'"),
        ("index,region\n0,question\n", TraceFileError, r"columns: must hold position, region once each, got index"),
        ("position,region\n0,question\n1,end\n", RegionError, r"region: must be one of .* got 'end' on node 1"),
        ("position,region\n0,question\n1,\n", RegionError, r"answer: must hold at least one token, got none"),
    ],
)
def test_a_bad_token_table_is_refused(text: str, error: type, message: str, tmp_path: Path):
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "e.csv").write_text("source,target,capacity\n0,1,1\n")
    with pytest.raises(error, match=message):
        read_edges(tmp_path / "e.csv", tmp_path / "t.csv")


def test_the_number_of_tokens_is_not_guessed():
    for both in ({}, {"tokens": "t.csv", "num_nodes": 3}):
        with pytest.raises(InvalidInputError, match=r"tokens, num_nodes: exactly one must be given, got"):
            read_edges("e.csv", **both)


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow
    from pyarrow import parquet

    path, options = tmp_path / "e.parquet", {"num_nodes": 2, "question": [0], "answer": [1]}
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(TraceFileError, match=r"path: must be complete Parquet"):
        read_edges(path, **options)
    columns = {"source": [0], "target": [1], "capacity": [None]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(TraceFileError, match=r"capacity of the edge 0 -> 1: must be a number, got None"):
        read_edges(path, **options)
    parquet.write_table(pyarrow.table({"source": [0]}), path)
    with pytest.raises(TraceFileError, match=r"columns: must hold source, target, capacity once each, got source"):
        read_edges(path, **options)
    table = pyarrow.table(columns | {"capacity": [0.5]}).replace_schema_metadata({"flowgraph": '{"schema": "x/2"}'})
    parquet.write_table(table, path)
    with pytest.raises(TraceFileError, match=r"schema: must be 'flowgraph-graph/1', got 'x/2'"):
        read_edges(path, **options)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"run pip install pyarrow"):
        read_edges(path, **options)


# JSON ---------------------------------------------------------------------------------------------------


def traced(graph: FlowGraph) -> FlowTrace:
    count = int(graph.num_nodes or 0)
    spans = torch.tensor([[k, k + 1] for k in range(count)])
    tokens = tuple("ab"[k % 2] for k in range(count))
    return FlowTrace(
        tokens, torch.arange(count), "x" * count, spans, torch.ones(count).bool(), graph, solve(graph), {"model": "m"}
    )


@given(case=flow_graphs(min_nodes=2))
@settings(max_examples=40)
def test_json_gives_the_same_flow(case: Case):
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
    graph.capacity = graph.capacity / 3
    trace = traced(graph)
    with tempfile.TemporaryDirectory() as folder:
        trace.to_json(Path(folder) / "t.json")
        if not trace.feasible and graph.num_edges:
            with pytest.raises(TraceFileError, match=r"edges: must all be there, got 0 of"):
                read_json(Path(folder) / "t.json")
            return
        back = read_json(Path(folder) / "t.json")
    carries = trace.flow.edge_flow > 0
    assert torch.equal(back.edge_index, graph.edge_index[:, carries])
    assert torch.equal(back.capacity, graph.capacity[carries])
    assert bool(back.kept_attention.isnan()) == (not bool(carries.all()))
    again = solve(back)
    torch.testing.assert_close(again.throughput, trace.throughput, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(again.edge_flow, trace.flow.edge_flow[carries], rtol=1e-12, atol=1e-15)


def test_json_without_all_edges_is_refused(tmp_path: Path):
    traced(GRAPH).to_json(tmp_path / "t.json", max_edges=3)
    with pytest.raises(
        TraceFileError, match=r"edges: must all be there, got 3 of 4, 1 with flow left out; write it with"
    ):
        read_json(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "flowgraph-trace/2"}, r"schema: must be 'flowgraph-trace/1', got 'flowgraph-trace/2'"),
        ({"schema": None}, r"schema: must be 'flowgraph-trace/1', got None"),
        ({"edges": [[0, 1, 0.5]]}, r"must hold a flow graph"),
        ({"edges": [[0, 1, "0.5", 1.0]]}, r"capacity of the edge 0 -> 1: must be a number, got '0.5'"),
        ({"edges": [[1, 0, 0.5, 1.0]]}, r"an edge must run from an earlier to a later token"),
        ({"edges": [[0, 1, float("nan"), 1.0]]}, r"numbers: must be finite, got NaN"),
        ({"edges": None}, r"must hold a flow graph"),
        ({"tokens": []}, r"question: must be|must join tokens|at least 1"),
        ({"tokens": [{"index": 3, "region": "question"}]}, r"tokens: must be in order"),
        ({"summary": {}}, r"KeyError: 'num_edges'"),
        ({"edges_left_out": "none"}, r"edges_left_out: must be a number"),
    ],
)
def test_bad_json_is_refused(change: dict, message: str, tmp_path: Path):
    payload = traced(GRAPH).to_dict()
    (tmp_path / "t.json").write_text(json.dumps(payload | change))
    with pytest.raises((TraceFileError, RegionError), match=message):
        read_json(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "[1]", '{"schema"', "[" * 200_000, "3", "\udcff"])
def test_what_is_no_json_trace_is_refused(text: str, tmp_path: Path):
    (tmp_path / "t.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TraceFileError, match=r"path: must hold a flow graph, got .*t.json"):
        read_json(tmp_path / "t.json")
