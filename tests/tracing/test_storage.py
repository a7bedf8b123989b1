"""Trace files are written atomically, and a file that is not a trace is refused."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowgraph import (
    FlowGraph,
    FlowTrace,
    InvalidInputError,
    OutputError,
    TraceFileError,
    load_trace,
    solve,
)


def small_trace(text: str = "abcd") -> FlowTrace:
    weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
    graph = FlowGraph.from_dense(weights, question=[0], answer=[3])
    spans = torch.tensor([[k, k + 1] for k in range(4)])
    return FlowTrace(
        tuple(text), torch.arange(4), text, spans, torch.tensor([False, True, True, True]), graph, solve(graph)
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "t.safetensors"
    small_trace().save(path)
    return path


def rewritten(path, change_tensors=None, change_metadata=None):
    """The file again, with something in it changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)
    return path


def test_round_trip_with_text_that_is_hostile(tmp_path):
    hostile = ["</script>", "\x1b[31m", "\ud800", "\u2028"]
    made = small_trace()
    made = FlowTrace(tuple(hostile), made.token_ids, "x", made.spans, made.generated, made.graph, made.flow)
    made.save(tmp_path / "t.safetensors")
    assert load_trace(tmp_path / "t.safetensors").tokens == tuple(hostile)
    made.to_json(tmp_path / "t.json")
    assert [t["text"] for t in json.loads((tmp_path / "t.json").read_text())["tokens"]] == hostile


def test_float64_capacities_survive_so_the_certificate_does(tmp_path):
    torch.manual_seed(0)
    weights = torch.rand(30, 30, dtype=torch.float64).tril(-1)
    graph = FlowGraph.from_dense(weights / weights.sum(-1, keepdim=True).clamp_min(1), question=[0, 1], answer=[29])
    spans = torch.zeros(30, 2, dtype=torch.int64)
    made = FlowTrace(("x",) * 30, torch.arange(30), "", spans, torch.ones(30).bool(), graph, solve(graph))
    made.save(tmp_path / "t")
    again = load_trace(tmp_path / "t")
    assert again.graph.capacity.dtype == torch.float64
    assert again.certify().ok


def test_a_loss_that_nobody_knows_comes_back_unknown(tmp_path):
    made = small_trace()
    made.graph.kept_attention = torch.full_like(made.graph.kept_attention, torch.nan)
    made.save(tmp_path / "t")
    again = load_trace(tmp_path / "t").graph
    assert bool(torch.isnan(again.kept_attention).all())
    assert again.kept_flow.item() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1, 2}])
def test_a_provenance_that_is_no_json_is_refused(value, tmp_path):
    made = small_trace()
    made = FlowTrace(
        made.tokens, made.token_ids, made.text, made.spans, made.generated, made.graph, made.flow, {"mine": value}
    )
    with pytest.raises(InvalidInputError, match=r"record: must hold plain JSON values and finite numbers, got others"):
        made.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 7, 100, 1000])
def test_truncated_files(saved, size: int):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(TraceFileError, match=r"path: must be a complete safetensors file, got .*t\.safetensors"):
        load_trace(saved)


def test_foreign_files(tmp_path, saved):
    with pytest.raises(TraceFileError, match=r"path: must be an existing trace file, got .*nothing; check the name"):
        load_trace(tmp_path / "nothing")
    (tmp_path / "p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(TraceFileError, match="path: must be a complete safetensors file"):
        load_trace(tmp_path / "p")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        TraceFileError, match=r"path: must be a file written by FlowTrace.save, got .* without the format mark"
    ):
        load_trace(tmp_path / "model.safetensors")
    with pytest.raises(TraceFileError, match="path: must"):
        load_trace(tmp_path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2", r"path: must have schema 1, got 2 in .*; upgrade flowgraph-llm to read it"),
        ("0", r"path: must have schema 1, got 0 in .*; trace it again with this version"),
        ("", r"path: must state its schema version, got ''"),
        ("x", r"path: must state its schema version, got 'x'"),
    ],
)
def test_other_versions(saved, version: str, message: str):
    rewritten(saved, change_metadata=lambda metadata: metadata.update(schema=version))
    with pytest.raises(TraceFileError, match=message):
        load_trace(saved)


def set_tensor(name: str, value: torch.Tensor):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("h"), r"tensor 'h' must be torch.float64 with 1 dimensions, got none"),
        (set_tensor("h", torch.ones(4)), r"tensor 'h' must be torch.float64 with 1 dimensions, got torch.float32"),
        (set_tensor("h", torch.ones(3).double()), r"every token vector must have 4 entries"),
        (set_tensor("g", torch.full((4,), torch.nan).double()), r"g must be finite, got NaN or infinity"),
        (set_tensor("question", torch.ones(4).bool()), r"must hold a consistent trace, .*regions must be disjoint"),
        (set_tensor("question", torch.ones(9).bool()), r"must hold a consistent trace, .*one entry per token"),
        (set_tensor("edge_index", torch.tensor([[3], [0]]).int()), r"must hold a consistent trace"),
        (set_tensor("spans", torch.ones(4, 3).long()), r"every token vector must have 4 entries"),
    ],
)
def test_inconsistent_tensors(saved, change, message: str):
    rewritten(saved, change_tensors=change)
    with pytest.raises(TraceFileError, match=message):
        load_trace(saved)


@pytest.mark.unchecked
@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"tokens": ["a"]}'])
def test_records_that_are_not_records(saved, record: str):
    rewritten(saved, change_metadata=lambda metadata: metadata.update(record=record))
    with pytest.raises(TraceFileError, match=r"path: must hold a (trace record|consistent trace)"):
        load_trace(saved)


def test_a_folder_is_refused_as_a_file(tmp_path):
    with pytest.raises(OutputError, match=r"path: must name a file, got the folder"):
        small_trace().save(tmp_path)
