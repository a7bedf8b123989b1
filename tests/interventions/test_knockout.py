"""Knock-outs against attention computed read by read, and the promises about what they leave alone."""

import json
import threading
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import flowgraph
from flowgraph import (
    CaptureError,
    FlowgraphError,
    FlowTrace,
    Intervention,
    InvalidInputError,
    MemoryLimitError,
    NumericalRangeError,
    Route,
    attention_cell,
    attention_cut,
    capture,
    knockout,
    knockouts,
)
from flowgraph.commands.knockout import knockout as knockout_command
from tests.fixtures.models import build, sequences
from tests.fixtures.tiny import save_tiny, tiny
from tests.reference import interventions as reference

ANSWER = (20, 21, 22)


@cache
def model_of(name: str, implementation: str = "sdpa"):
    return build(name, implementation, torch.float64)


@cache
def trace_of(name: str = "llama", preset: str = "default", rows: str | None = None) -> FlowTrace:
    return flowgraph.trace(
        model_of(name),
        input_ids=sequences()[0],
        question=range(2, 9),
        answer=list(ANSWER),
        prompt_length=10,
        preset=preset,
        rows=rows,
    )


@cache
def uncut(name: str) -> torch.Tensor:
    return reference.logprobs(model_of(name), trace_of(name).token_ids, lambda *cell: False)


CASES = {
    "nothing": ({}, lambda layer, head, row, column: False),
    "tokens": ({"tokens": [4, 12]}, lambda layer, head, row, column: column in (4, 12) and row > column),
    "tokens, one layer": (
        {"tokens": [12], "layers": [1]},
        lambda layer, head, row, column: layer == 1 and column == 12 and row > 12,
    ),
    "tokens, some heads": (
        {"tokens": [5], "heads": [0, 3], "layers": "1-2"},
        lambda layer, head, row, column: layer > 0 and head in (0, 3) and column == 5 and row > 5,
    ),
    "edges": (
        {"edges": [(4, 9), (6, 15), (13, 14), (19, 20)]},  # prompt row; generated rows, two of them its own reading
        lambda layer, head, row, column: (row, column) in [(9, 4), (14, 6), (13, 13), (19, 19)],
    ),
    "route": (
        {"routes": [(3, 7, 15, 20)]},
        lambda layer, head, row, column: (row, column) in [(7, 3), (14, 7), (19, 15)],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen3", "sdpa"),
        ("mistral_sliding", "sdpa"),
        ("gpt_neox", "sdpa"),
    ],
)
def test_as_attention_computed_read_by_read(name: str, implementation: str, case: str):
    options, forbidden = CASES[case]
    model, trace = model_of(name, implementation), trace_of(name)
    result = knockout(model, trace, **options)
    before = uncut(name)[[t - 1 for t in ANSWER]]
    after = reference.logprobs(model, trace.token_ids, forbidden)[[t - 1 for t in ANSWER]]
    said = trace.token_ids[list(ANSWER)][:, None]
    assert result.answer.tolist() == list(ANSWER)
    exact = 1e-10 if implementation == "sdpa" else 1e-5  # eager functions take their softmax in float32
    torch.testing.assert_close(result.before, before.gather(1, said)[:, 0], rtol=0, atol=exact)
    torch.testing.assert_close(result.after, after.gather(1, said)[:, 0], rtol=0, atol=exact)
    assert result.greedy_before.tolist() == before.argmax(-1).tolist()
    assert result.greedy_after.tolist() == after.argmax(-1).tolist()
    assert result.flips == (before.argmax(-1).tolist() != after.argmax(-1).tolist())
    divergence = (before.exp() * (before - after)).sum(-1)
    torch.testing.assert_close(result.kl, divergence, rtol=0, atol=10 * exact)
    assert result.change == pytest.approx(float((result.after - result.before).sum()))
    if case == "tokens":
        assert abs(result.change) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_sliding"])
def test_nothing_knocked_out_changes_no_bit(name: str):
    model, trace = model_of(name), trace_of(name)
    ids = trace.token_ids[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with attention_cut(model, trace, [Intervention()]):
            assert torch.equal(model(ids, use_cache=False).logits, plain)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert knockout(model, trace).change == 0
    assert not knockout(model, trace).flips


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_before_a_masked_token_changes(name: str):
    model, trace = model_of(name), trace_of(name)
    ids = trace.token_ids[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
        with attention_cut(model, trace, [Intervention(tokens=[12])]):
            cut = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(cut[:13], plain[:13], rtol=0, atol=1e-11)  # token 12 itself included
    assert bool(((cut - plain)[13:].abs().amax(-1) > 1e-6).all())


@pytest.mark.parametrize(
    ("preset", "rows", "edge", "cell"),
    [
        ("default", None, (4, 9), (9, 4)),  # a prompt token has its own row
        ("default", None, (4, 15), (14, 4)),  # a generated one the row that emitted it
        ("default", None, (14, 15), (14, 14)),
        ("default", "emission_all", (4, 9), (8, 4)),
        ("paper", None, (4, 15), (15, 4)),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_sliding", "gemma2", "gpt_oss", "phi"])
def test_an_edge_cut_is_that_cell_and_no_other_row(
    name: str, preset: str, rows: str | None, edge: tuple[int, int], cell: tuple[int, int]
):
    exact = name != "gpt_oss"  # its experts are computed in float32 at most
    model = build(name, None, torch.float64 if exact else torch.float32)
    ids = sequences()[0]
    trace = flowgraph.trace(
        model, input_ids=ids, question=range(2, 9), answer=list(ANSWER), prompt_length=10, preset=preset, rows=rows
    )
    assert attention_cell(trace, *edge) == cell
    row, column = cell
    layer = 1 if "sliding" in name or name in ("gemma2", "gpt_oss") else 0  # one that reads the whole text
    plain = capture(model, ids, layers=[layer]).dense()[0]
    with attention_cut(model, trace, [Intervention(edges=[edge], layers=[layer])]):
        cut = capture(model, ids, layers=[layer]).dense()[0]
    assert plain[cell] > 0
    assert cut[cell] == 0
    others = torch.arange(len(ids)) != row
    torch.testing.assert_close(cut[others], plain[others], rtol=0, atol=1e-9 if exact else 1e-6)
    rest = torch.arange(len(ids)) != column
    ratio = cut[row, : row + 1][rest[: row + 1]] / plain[row, : row + 1][rest[: row + 1]]
    assert ratio.min() > 1 - (1e-9 if exact else 1e-5)  # the rest of the row shares what was cut
    if name != "gpt_oss":  # rows with a learned sink sum to less
        assert float(cut[row].sum()) == pytest.approx(1)


def test_heads_not_chosen_keep_their_attention():
    model, trace = model_of("llama"), trace_of()
    whole = [capture(model, trace.token_ids, layers=[0], heads=[head]).dense()[0] for head in range(4)]
    with attention_cut(model, trace, [Intervention(tokens=[4], layers=[0], heads=[1])]):
        cut = [capture(model, trace.token_ids, layers=[0], heads=[head]).dense()[0] for head in range(4)]
    assert float(cut[1][5:, 4].abs().max()) == 0
    assert float(whole[1][5:, 4].max()) > 0
    assert cut[1][4, 4] == pytest.approx(float(whole[1][4, 4]))
    for head in (0, 2, 3):
        torch.testing.assert_close(cut[head], whole[head], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_batched_as_one_by_one(name: str, batch_size: int):
    model, trace = model_of(name), trace_of(name)
    many = [
        Intervention(),
        Intervention(tokens=[4, 12]),
        Intervention(edges=[(6, 15)], layers=[1]),
        Intervention(tokens=[5], heads=[0, 3]),
        Intervention(routes=[Route((3, 7, 20), 0.1)], layers="0-1"),
    ]
    heard: list[str] = []
    together = knockouts(model, trace, many, batch_size=batch_size, progress=heard.append)
    for one, result in zip(many, together, strict=True):
        alone = knockouts(model, trace, [one])[0]
        assert result.intervention is one
        for field in ("before", "after", "kl"):
            torch.testing.assert_close(getattr(result, field), getattr(alone, field), rtol=0, atol=1e-11)
        assert torch.equal(result.greedy_after, alone.greedy_after)
    assert heard[0] == f"interventions 1 to {min(batch_size, 5)} of 5"
    assert len(heard) == -(-5 // batch_size)


def test_a_route_is_its_edges_and_cuts_add_up():
    model, trace = model_of("llama"), trace_of()
    route = trace.routes(1)[0]
    by_route = knockout(model, trace, routes=[route])
    by_edges = knockout(model, trace, edges=list(pairwise(route.tokens)))
    assert torch.equal(by_route.after, by_edges.after)
    both = knockout(model, trace, tokens=[4], edges=[(6, 15)])
    with attention_cut(model, trace, [Intervention(tokens=[4])]):
        inside = knockouts(model, trace, [Intervention(edges=[(6, 15)])])[0]
    assert torch.equal(inside.after, both.after)
    assert inside.before.sum() != both.before.sum()


def test_other_threads_and_training_flags_are_left_alone():
    model, trace = model_of("llama"), trace_of()
    ids, found = trace.token_ids[None], []
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits

        def other() -> None:
            with torch.no_grad():
                found.append(model(ids, use_cache=False).logits)

        with attention_cut(model, trace, [Intervention(tokens=[4])]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert not torch.equal(model(ids, use_cache=False).logits, plain)
    assert torch.equal(found[0], plain)
    model.model.layers[1].train()
    try:
        knockout(model, trace, tokens=[4])
        assert model.model.layers[1].training
        assert not model.model.layers[0].training
    finally:
        model.eval()


@pytest.mark.unchecked
def test_what_an_iterator_yields_is_cut():
    model, trace = model_of("llama"), trace_of()
    listed = knockout(model, trace, tokens=[4], edges=[(6, 15)], routes=[(3, 20)], layers=[1])
    once = knockout(
        model, trace, tokens=iter([4]), edges=zip([6], [15], strict=True), routes=iter([(3, 20)]), layers=iter([1])
    )  # type: ignore[arg-type]
    assert once.change == listed.change != 0
    assert once.to_dict() == listed.to_dict()


@pytest.mark.parametrize("preset", ["default", "paper", "all"])
def test_the_edge_into_every_token_is_the_cell_its_capacity_was_read_from(preset: str):
    """A sliding-window layer, grouped heads: the cell's attention, without the first token, is the capacity."""
    rows = "emission_all" if preset == "all" else None
    trace = trace_of("mistral_sliding", "paper" if preset == "paper" else "default", rows)
    attention = capture(
        model_of("mistral_sliding"), trace.token_ids, layers=trace.provenance["layers"], heads="mean"
    ).dense()[0].double()  # fmt: skip
    if preset != "paper":
        attention[:, 0] = 0
        attention /= attention.sum(1, keepdim=True).clamp_min(1e-300)
    read = [float(attention[attention_cell(trace, *edge)]) for edge in trace.graph.edge_index.T.tolist()]
    torch.testing.assert_close(torch.tensor(read).double(), trace.graph.capacity.double(), rtol=0, atol=1e-6)


def test_an_answer_without_a_finite_log_probability_is_refused(monkeypatch):
    model, trace = build("llama"), trace_of()
    said, plain = int(trace.token_ids[20]), model.lm_head.forward
    for value in (-torch.inf, torch.inf, torch.nan):
        monkeypatch.setattr(
            model.lm_head,
            "forward",
            lambda hidden, value=value: plain(hidden).index_fill(-1, torch.tensor([said]), value),
        )
        with pytest.raises(NumericalRangeError, match="every token of the answer a finite log-probability"):
            knockout(model, trace, tokens=[12])


@pytest.mark.unchecked
def test_a_result_is_plain_json():
    model, trace = model_of("llama"), trace_of()
    what = Intervention(torch.tensor([4]), [(6, 15)], [Route((3, 20), 0.5)], range(2), 1)  # type: ignore[arg-type]
    result = knockouts(model, trace, [what])[0]
    record = json.loads(json.dumps(result.to_dict()))
    assert record["intervention"] == {
        "tokens": [4],
        "edges": [[6, 15]],
        "routes": [[3, 20]],
        "layers": [0, 1],
        "heads": [1],
    }
    assert record["change"] == result.change == pytest.approx(record["logprob_after"] - record["logprob_before"])
    assert ("flips" if result.flips else "does not flip") in repr(result)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [24]}, r"tokens: must lie in 0..23, the tokens of the trace, got 24"),
        ({"tokens": [-1]}, r"tokens: must lie in 0..23"),
        ({"tokens": [4, 5, 4]}, r"tokens: each may be named once, got 4 twice"),
        ({"tokens": [4, 21]}, r"tokens: must not belong to the answer, .* got 21"),
        ({"tokens": [True, False]}, r"tokens: must be token indices.*mask.nonzero"),
        ({"tokens": torch.ones(24, dtype=torch.bool)}, r"tokens: must be token indices"),
        ({"tokens": ["4"]}, r"tokens: must be token indices"),
        ({"tokens": 4}, r"tokens: must be token indices"),
        ({"edges": [(9, 4)]}, r"edges: must run from an earlier to a later token, got 9 -> 4"),
        ({"edges": [(4, 4)]}, r"edges: must run from an earlier"),
        ({"edges": [(4, 30)]}, r"edges: must lie in 0..23"),
        ({"edges": [(4, 9), (4, 9)]}, r"edges: each may be named once, got 4 -> 9 twice"),
        ({"edges": torch.tensor([[4, 9], [4, 9]])}, r"edges: each may be named once, got 4 -> 9 twice"),
        ({"edges": None}, r"edges: must be a list, got None"),
        ({"edges": [None]}, r"edges: must be pairs \(source, target\), got None"),
        ({"edges": [(1.0, 2)]}, r"edges: must be token indices"),
        ({"routes": 3}, r"routes: must be a list, got 3"),
        ({"routes": Route((3, 9, 20), 0.1)}, r"routes: must be a list, got Route"),
        ({"edges": [4, 9]}, r"edges: must be pairs \(source, target\), got 4"),
        ({"edges": [(0, 1)], "tokens": [2], "routes": [(3,)]}, r"routes: must have at least two tokens, got \[3\]"),
        ({"routes": [(3, 9, 7)]}, r"edges: must run from an earlier to a later token, got 9 -> 7"),
        ({"tokens": [4], "layers": [7]}, r"layers: must lie in 0..2, got 7..7"),
        ({"tokens": [4], "layers": "late"}, r"layers: must be"),
        ({"tokens": [4], "heads": [4]}, r"heads: must lie in 0..3"),
        ({"tokens": [4], "heads": "mean"}, r"heads: must be 'all' or indices, got 'mean'"),
        ({"edges": [(13, 14)], "tokens": list(range(13))}, r"got none left for position 13 in layer 0"),
    ],
)
def test_bad_input_is_refused(options: dict, message: str):
    model = model_of("llama")
    with pytest.raises(InvalidInputError, match=message):
        knockout(model, trace_of(), **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_window_can_leave_a_position_blind():
    """Token 14 of the graph is emitted by position 13, which in a window of 8 reads 6..13 alone."""
    trace = trace_of("mistral_sliding")
    with pytest.raises(InvalidInputError, match="got none left for position 13"):
        knockout(model_of("mistral_sliding"), trace, tokens=range(6, 13), edges=[(13, 14)])
    assert knockout(model_of("llama"), trace_of(), tokens=range(6, 13), edges=[(13, 14)]).change != 0


def test_models_that_cannot_be_cut_are_refused():
    trace = replace(trace_of(), provenance={"rows": "emission"})
    with pytest.raises(CaptureError, match=r"must go through transformers' attention interface.*MptAttention"):
        knockout(build("mpt"), trace, tokens=[4])
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CaptureError, match=r"must be 'sdpa' or 'eager' to be cut, got 'flash_attention_2'"):
        knockout(model, trace, tokens=[4])
    with pytest.raises(InvalidInputError, match=r"layers: must have softmax attention, got \[0\]"):
        knockout(build("qwen3_next"), trace, tokens=[4], layers=[0])
    with pytest.raises(InvalidInputError, match="heads: must be 'all' where the layers of a model differ"):
        knockout(build("inkling"), trace, tokens=[4], heads=[0])
    assert knockout(build("qwen3_next"), trace, tokens=[4]).change != 0  # its attention layers alone


@pytest.mark.unchecked
def test_a_model_that_does_not_fit_the_trace():
    trace, model = trace_of(), model_of("llama")
    ids = trace.token_ids.clone()
    ids[5] = 1000
    with pytest.raises(InvalidInputError, match="vocabulary of 99, got id 1000"):
        knockout(model, replace(trace, token_ids=ids), tokens=[4])
    ids[5] = -1
    with pytest.raises(InvalidInputError, match="vocabulary of 99, got id -1"):
        knockout(model, replace(trace, token_ids=ids), tokens=[4])
    for foreign in ("middle", 2, [None]):  # no figure depends on it
        other = replace(trace, provenance={"layers": foreign, "rows": "emission"})
        assert knockout(model, other, tokens=[4]).change == knockout(model, trace, tokens=[4]).change
    with pytest.raises(InvalidInputError, match="trace: must be a FlowTrace, got NoneType"):
        knockout(model, None, tokens=[4])  # type: ignore[arg-type]
    for wrong in (Intervention(tokens=[4]), [{"tokens": [4]}]):
        with pytest.raises(InvalidInputError, match="interventions: must be a list of Intervention"):
            knockouts(model, trace, wrong)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowgraph.memory.available_bytes", lambda device: 1000)
        with pytest.raises(MemoryLimitError, match="batch_size: would need about"):
            knockout(model, trace, tokens=[4])
    with pytest.raises(InvalidInputError, match=r"trace's layers \(7\), got 3"):
        knockout(model, replace(trace, provenance={"layers": [6, 7], "rows": "emission"}), tokens=[4])
    with pytest.raises(InvalidInputError, match="context of 20, got 24"):
        knockout(build("llama", max_position_embeddings=20), trace, tokens=[4])
    with pytest.warns(UserWarning, match="the trace was made of 'LlamaForCausalLM', got 'GPT2LMHeadModel'"):
        knockout(model_of("gpt2"), trace, tokens=[4])
    with pytest.raises(InvalidInputError, match="batch_size: must be a positive number, got 0"):
        knockouts(model, trace, [], batch_size=0)
    cut = [Intervention(tokens=[4])]
    refusal = "once for each of 1 interventions, got shape"
    with pytest.raises(InvalidInputError, match=refusal), attention_cut(model, trace, cut):
        model(sequences()[1][None], use_cache=False)
    with pytest.raises(CaptureError, match="did not run, so nothing was cut"), attention_cut(model, trace, cut):
        pass


def test_edges_need_to_know_their_rows():
    trace, model = trace_of(), model_of("llama")
    graph = trace.graph.clone()
    graph.rules = ""
    unknown = replace(trace, graph=graph, provenance={})
    with pytest.raises(InvalidInputError, match="must say which attention rows its edges are"):
        knockout(model, unknown, edges=[(4, 9)])
    assert knockout(model, unknown, tokens=[4]).change == knockout(model, trace, tokens=[4]).change
    with pytest.raises(InvalidInputError, match="provenance 'literal' and rules 'rows=emission"):
        attention_cell(replace(trace, provenance={"rows": "literal"}), 4, 9)
    assert attention_cell(replace(trace, provenance={}), 4, 15) == (14, 4)  # the graph's own rules will do


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("knockout")
    save_tiny(folder)
    model, tokenizer = tiny()
    trace = flowgraph.trace(model, tokenizer, [{"role": "user", "content": "2 + 3?"}], "2 + 3 = 5. The answer is 5.")
    trace.save(folder / "t.safetensors")
    return str(folder), str(folder / "t.safetensors")


def run(*arguments: str):
    import typer

    command = typer.Typer()
    command.command()(knockout_command)
    return CliRunner().invoke(command, list(arguments))


def test_the_command(saved, tmp_path):
    model, file = saved
    out = tmp_path / "k.json"
    result = run(file, "--model", model, "--tokens", "5,7-9", "--route", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["schema"] == "flowgraph-knockout/1"
    assert record["intervention"]["tokens"] == [5, 7, 8, 9]
    trace = flowgraph.load_trace(file)
    assert record["intervention"]["routes"] == [list(trace.routes(1)[0].tokens)]
    assert f"{record['change']:+.4f} nats" in result.output.replace("\n", " ")
    assert "the trace was made of" in result.output  # saved under another name: said, not refused
    expected = knockout(tiny()[0], trace, tokens=[5, 7, 8, 9], routes=trace.routes(1))
    assert record["change"] == pytest.approx(expected.change, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose what to mask"),
        (["--tokens", "5,x"], "numbers and ranges like"),
        (["--tokens", "9-5"], "numbers and ranges like"),
        (["--tokens", "0-99999999999"], "numbers and ranges like"),
        (["--tokens", "9" * 5000], "numbers and ranges like"),
        (["--edges", "1-" + "9" * 5000], "must be pairs"),
        (["--edges", "3"], "must be pairs"),
        (["--route", "0"], "the routes of this"),
        (["--route", "100000"], "the routes of this"),
        (["--tokens", "5000"], "tokens: must lie in"),
    ],
)
def test_the_command_refuses(saved, arguments: list[str], message: str):
    model, file = saved
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        result = run(file, "--model", model, *arguments)
    assert result.exit_code != 0
    assert message in result.output or (
        isinstance(result.exception, FlowgraphError) and message in str(result.exception)
    )
