"""Graphs in other people's tools keep every number and every name."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import igraph
import networkx as nx
import pytest
import torch
import typer
from torch_geometric.data import Batch, Data
from typer.testing import CliRunner

from flowgraph import (
    FlowGraph,
    FlowTrace,
    InfeasibleFlowError,
    InvalidInputError,
    MissingExtraError,
    OutputError,
    backbone,
    certify,
    from_networkx,
    read_gexf,
    read_graphml,
    read_json,
    solve,
    to_igraph,
    to_networkx,
    to_pyg,
    write_edges,
    write_gexf,
    write_graphml,
    write_tokens,
)
from flowgraph.commands.export import export
from flowgraph.display.palette import PALETTE, channels
from flowgraph.exchange.export import GRAPH_SCHEMA

WEIGHTS = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
GRAPH = FlowGraph.from_dense(WEIGHTS, question=[0], answer=[3])
GEXF = "{http://www.gexf.net/1.2draft}"
CUT = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=3, question=[0], answer=[2])


def traced(tokens=("a", "b", "c", "d"), graph: FlowGraph = GRAPH) -> FlowTrace:
    count = len(tokens)
    spans = torch.tensor([[k, k + 1] for k in range(count)])
    return FlowTrace(
        tuple(tokens), torch.arange(count), "x" * count, spans, torch.ones(count).bool(), graph, solve(graph)
    )


def run(*arguments: object):
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


# In memory ----------------------------------------------------------------------------------------------


def test_networkx_keeps_masks_capacities_and_flow():
    bare, flow = to_networkx(GRAPH), solve(GRAPH)
    assert bare.edges[0, 2] == {"capacity": 0.25}
    assert bare.nodes[3]["answer_mask"]
    assert bare.graph["schema"] == GRAPH_SCHEMA
    full = to_networkx(flow)
    assert full.nodes[1]["throughput"] == pytest.approx(2 / 3)
    pairs = zip(*GRAPH.edge_index.tolist(), strict=True)
    assert [full.edges[pair]["flow"] for pair in pairs] == flow.edge_flow.tolist()


def test_a_trace_brings_its_tokens_and_igraph_the_same_numbers():
    exported = to_igraph(traced())
    assert exported.vs["token"] == list("abcd")
    assert "_nx_name" not in exported.vs.attributes()
    assert sum(exported.es["flow"]) == pytest.approx(2)
    assert exported.is_dag()


def test_exports_name_the_score(tmp_path: Path):
    leaking = replace(traced(), provenance={"capacity": "vtrace_share", "score": "potential"})
    composed = replace(
        leaking,
        composed=torch.arange(4, dtype=torch.float64),
        provenance={"capacity": "sharp_max", "composition": {"name": "cage", "options": {}}},
    )
    facts = {"score_name": "potential on vtrace_share", "capacity_name": "vtrace_share"}
    graph = to_networkx(leaking)
    assert facts.items() <= graph.graph.items()
    assert "composition" not in graph.graph
    assert [graph.nodes[token]["score"] for token in range(4)] == leaking.potential.tolist()
    assert to_pyg(composed).score_name == "cage on sharp_max"
    assert to_pyg(composed).composition == "cage"
    assert to_pyg(composed).score.tolist() == [0, 1, 2, 3]
    assert to_igraph(composed)["composition"] == "cage"

    # Files of graph tools hold the name once, tables in each row; readers of graphs ignore both.
    write_graphml(leaking, tmp_path / "g.graphml")
    read = nx.read_graphml(tmp_path / "g.graphml")
    assert facts.items() <= read.graph.items()
    assert [node["score"] for node in read.nodes.values()] == leaking.potential.tolist()
    write_gexf(composed, tmp_path / "g.gexf")
    assert b"cage on sharp_max" in (tmp_path / "g.gexf").read_bytes()
    for name, reader in (("g.graphml", read_graphml), ("g.gexf", read_gexf)):
        assert torch.equal(reader(tmp_path / name).capacity, leaking.graph.capacity)
    write_tokens(composed, tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert {row["score_name"] for row in rows} == {"cage on sharp_max"}
    assert [float(row["score"]) for row in rows] == [0, 1, 2, 3]
    # A flow alone has no score of a trace.
    assert "score_name" not in to_networkx(solve(GRAPH)).graph

    # The certificate names it, too.
    certificate = composed.certify()
    assert certificate.ok
    assert certificate.score == "cage on sharp_max"
    assert "tokens are ranked by: cage on sharp_max" in str(certificate)
    assert certificate.to_dict()["score"] == "cage on sharp_max"
    assert certify(solve(GRAPH)).score is None


def test_pyg_gets_a_plain_copy():
    trace = traced()
    data = to_pyg(trace)
    assert type(data) is Data
    assert "x" not in data
    assert torch.equal(data.flow, trace.flow.edge_flow)
    assert torch.equal(data.throughput, trace.throughput)
    assert data.token_id.tolist() == [0, 1, 2, 3]
    data.capacity.zero_()
    data.throughput.zero_()
    assert trace.graph.capacity.all()
    assert trace.throughput[0] == 1
    batch = Batch.from_data_list([to_pyg(trace), to_pyg(trace)])
    assert batch.edge_index.max() == 7  # shifted like node ids
    assert batch.token_id.max() == 3  # not shifted


def test_keep_exports_the_backbone_with_the_flow_of_the_whole():
    flow = solve(GRAPH)
    bone = backbone(flow, 0.5)
    part, data = to_networkx(flow, keep=0.5), to_pyg(flow, keep=0.5)
    assert set(part.edges) == {(0, 1), (1, 3)}
    assert [flow for *_, flow in part.edges(data="flow")] == flow.edge_flow[bone.edge_mask].tolist()
    assert part.nodes[2]["throughput"] == pytest.approx(1 / 3)
    assert part.graph["kept_flow"] == pytest.approx(2 / 3) == data.kept_flow.item()
    assert to_igraph(flow, keep=0.5).ecount() == data.num_edges == 2


@pytest.mark.unchecked
def test_a_batch_and_keep_without_a_flow_are_refused():
    batch = Batch.from_data_list([GRAPH, GRAPH])
    for graph in (batch, solve(batch), torch.eye(3)):
        with pytest.raises(InvalidInputError, match=r"graph: must be one FlowGraph, Flow or FlowTrace"):
            to_networkx(graph)
    with pytest.raises(InvalidInputError, match=r"keep: needs a flow to choose edges by, got 0.9 with a graph alone"):
        to_networkx(GRAPH, keep=0.9)
    with pytest.raises(InvalidInputError, match=r"keep: must lie in \(0, 1\], got 2"):
        to_pyg(solve(GRAPH), keep=2)
    with pytest.raises(InfeasibleFlowError, match=r"flow: must be feasible, got none"):
        to_igraph(solve(CUT), keep=0.9)


# Files, read by other readers than ours -----------------------------------------------------------------

NASTY = ("<b>&\"'</b>", "\x00\x1b\r", "\ud800x\ufffe", " the\n\tend ", "", "שלום\u202e", "]]>", "🙂")
CLEAN = ("<b>&\"'</b>", "␀␛␍", "\ufffdx\ufffd", " the\n\tend ", None, "שלום\u202e", "]]>", "🙂")
LABELS = ("<b>&\"'</b>", "␀␛␍", "\ufffdx\ufffd", " the␊␉end ", "4", "שלום\u202e", "]]>", "🙂")


def nasty_trace() -> FlowTrace:
    weights = torch.ones(8, 8).tril(-1) / torch.arange(8).clamp_min(1)[:, None]
    return traced(NASTY, FlowGraph.from_dense(weights, question=[1], answer=[7]))


def test_igraph_reads_our_graphml(tmp_path: Path):
    trace = nasty_trace()
    write_graphml(trace, tmp_path / "t.graphml")
    read = igraph.Graph.Read_GraphML(str(tmp_path / "t.graphml"))
    assert read.is_directed()
    assert tuple(read.vs["label"]) == LABELS
    assert [token or None for token in read.vs["token"]] == list(CLEAN)
    assert read.vs["position"] == list(range(8))
    assert read.vs["region"] == ["other", "question", *["reasoning"] * 5, "answer"]
    assert read.vs["throughput"] == trace.throughput.tolist()
    assert read.vs["h"] == trace.potential.tolist()
    assert sorted(zip(read.get_edgelist(), read.es["weight"], read.es["capacity"], strict=True)) == sorted(
        zip(
            zip(*trace.graph.edge_index.tolist(), strict=True),
            trace.flow.edge_flow.tolist(),
            trace.graph.capacity.tolist(),
            strict=True,
        )
    )


def test_networkx_reads_our_gexf(tmp_path: Path):
    trace = nasty_trace()
    write_gexf(trace, tmp_path / "t.gexf")
    read = nx.read_gexf(tmp_path / "t.gexf")
    nodes = [read.nodes[str(k)] for k in range(8)]
    assert tuple(node["label"] for node in nodes) == LABELS
    assert tuple(node.get("token") for node in nodes) == CLEAN
    assert [node["throughput"] for node in nodes] == trace.throughput.tolist()
    for node in (nodes[0], nodes[1]):
        # Colours of the regions are those of the pages.
        region = node["region"] if node["region"] in PALETTE else "context"
        shade = node["viz"]["color"]
        assert (int(shade["r"]), int(shade["g"]), int(shade["b"])) == channels(PALETTE[region].light)
    assert nodes[1]["viz"]["size"] == 50
    weights = {(int(s), int(t)): weight for s, t, weight in read.edges(data="weight")}
    assert [weights[pair] for pair in zip(*trace.graph.edge_index.tolist(), strict=True)] == (
        trace.flow.edge_flow.tolist()
    )


def test_our_gexf_keeps_to_the_schema(tmp_path: Path):
    """GEXF 1.2: the order of sections, declared attributes of known types, ids that exist."""
    write_gexf(nasty_trace(), tmp_path / "t.gexf")
    root = ElementTree.parse(tmp_path / "t.gexf").getroot()
    assert root.tag == f"{GEXF}gexf"
    assert root.get("version") == "1.2"
    assert [child.tag for child in root] == [f"{GEXF}meta", f"{GEXF}graph"]
    graph = root[1]
    assert graph.get("defaultedgetype") == "directed"
    assert graph.get("mode") == "static"
    assert [child.tag.removeprefix(GEXF) for child in graph] == ["attributes", "attributes", "nodes", "edges"]
    declared = {
        (of.get("class"), one.get("title")): (one.get("id"), one.get("type"))
        for of in graph.findall(f"{GEXF}attributes")
        for one in of
    }
    kinds = {name: kind for (_, name), (_, kind) in declared.items()}
    assert kinds == {
        "position": "long", "region": "string", "token": "string", "throughput": "double", "h": "double", "g": "double",
        "score": "double", "capacity": "double",
    }  # fmt: skip
    ids = {node.get("id") for node in graph.iter(f"{GEXF}node")}
    assert ids == {str(k) for k in range(8)}
    assert all(edge.get("source") in ids and edge.get("target") in ids for edge in graph.iter(f"{GEXF}edge"))
    assert {value.get("for") for value in graph.iter(f"{GEXF}attvalue")} == {number for number, _ in declared.values()}


def test_a_graph_without_flow_is_weighted_by_capacity(tmp_path: Path):
    write_graphml(GRAPH, tmp_path / "g.graphml")
    assert nx.read_graphml(tmp_path / "g.graphml").edges["0", "2"] == {"weight": 0.25, "capacity": 0.25}


def test_a_number_too_large_for_float64_is_left_out(tmp_path: Path):
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    tiny = torch.full((3,), 1e-150, dtype=torch.float64)
    flow = solve(FlowGraph.from_edges(edges, tiny, num_nodes=4, question=[0], answer=[3]))
    assert flow.potentials[1].isinf().any()
    write_gexf(flow, tmp_path / "t.gexf")
    assert b"inf" not in (tmp_path / "t.gexf").read_bytes().lower()
    write_tokens(flow, tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows[0]["g"] == ""
    assert float(rows[0]["throughput"]) == pytest.approx(1)


def test_tables_in_csv_and_parquet(tmp_path: Path):
    from pyarrow import parquet

    trace = nasty_trace()
    for name in ("e.csv", "e.PARQUET"):
        write_edges(trace, tmp_path / name)
    for name in ("t.csv", "t.parquet"):
        write_tokens(trace, tmp_path / name)
    wanted = {"capacity": trace.graph.capacity.tolist(), "flow": trace.flow.edge_flow.tolist()}
    with (tmp_path / "e.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["source", "target", "capacity", "flow"]
    for name, values in wanted.items():
        assert [float(row[name]) for row in rows] == values
        assert parquet.read_table(tmp_path / "e.PARQUET")[name].to_pylist() == values
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(row["token"] or None for row in rows) == CLEAN
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["position", "region", "token", "throughput", "h", "g", "score", "score_name"]
    assert set(table["score_name"].to_pylist()) == {trace.score_name}
    assert tuple(token or None for token in table["token"].to_pylist()) == CLEAN


def test_parquet_without_pyarrow_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"needs pyarrow, got none installed; run pip install pyarrow"):
        write_edges(GRAPH, tmp_path / "e.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_graphml, write_gexf, write_edges, write_tokens])
def test_files_are_whole_or_not_there(write, tmp_path: Path):
    with pytest.raises(OutputError, match=r"path: its folder must exist, got .*create it first"):
        write(GRAPH, tmp_path / "no" / "t.x")
    (tmp_path / "t.x").write_text("before")
    with pytest.raises(InvalidInputError, match=r"graph: must be one FlowGraph"):
        write(Batch.from_data_list([GRAPH, GRAPH]), tmp_path / "t.x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("t.x", "before")]


# The command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o.graphml", "o.gexf", "o.csv", "o.parquet", "o.json"])
def test_the_command_chooses_by_suffix(name: str, tmp_path: Path):
    saved = tmp_path / "t.safetensors"
    traced().save(saved)
    result = run(saved, tmp_path / name)
    assert result.exit_code == 0, result.output
    assert "4 tokens, 4 of 4 edges" in result.output
    begins = {".graphml": b"<?xml", ".gexf": b"<?xml", ".csv": b"source,", ".parquet": b"PAR1", ".json": b"{"}
    assert (tmp_path / name).read_bytes().startswith(begins[Path(name).suffix])
    result = run(saved, tmp_path / name, "--keep", 0.5)
    assert "4 tokens, 2 of 4 edges" in result.output


def test_the_command_writes_a_json_that_is_read_back(tmp_path: Path):
    traced().save(tmp_path / "t.safetensors")
    run(tmp_path / "t.safetensors", tmp_path / "o.json")
    assert torch.equal(read_json(tmp_path / "o.json").capacity, GRAPH.capacity.double())


def test_the_command_writes_the_token_table(tmp_path: Path):
    traced().save(tmp_path / "t.safetensors")
    assert run(tmp_path / "t.safetensors", tmp_path / "o.csv", "--tokens").exit_code == 0
    assert (
        (tmp_path / "o.csv")
        .read_text()
        .startswith("position,region,token,throughput,h,g,score,score_name\n0,question,a,1.0,")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o.png"], r".graphml (GraphML, for Cytoscape, igraph, yEd); .gexf (GEXF, for Gephi); .csv"),
        (["o.gexf", "--tokens"], "--tokens writes every token to a .csv or .parquet table"),
        (["o.csv", "--tokens", "--keep", "0.9"], "leave --keep out"),
    ],
)
def test_the_command_refuses_what_it_cannot_write(arguments: list[str], message: str, tmp_path: Path):
    result = run(tmp_path / "t.safetensors", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_command_warns_of_graphs_too_large_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.commands.export._MANY_EDGES", 3)
    traced().save(tmp_path / "t.safetensors")
    assert "--keep 0.9 writes those that carry" in run(tmp_path / "t.safetensors", tmp_path / "o.gexf").output
    assert "--keep" not in run(tmp_path / "t.safetensors", tmp_path / "o.csv").output


def test_a_graph_read_back_exports_to_the_same_graph():
    once = to_networkx(GRAPH)
    assert nx.utils.graphs_equal(to_networkx(from_networkx(once)), once)
