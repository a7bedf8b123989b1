"""The hub test: which tokens each arm masks, that its figures are those of single knock-outs, and its intervals."""

import json
import math
from dataclasses import replace
from functools import cache
from statistics import fmean

import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner

import flowgraph
from flowgraph import (
    FlowGraph,
    FlowgraphError,
    FlowTrace,
    HubTest,
    InfeasibleFlowError,
    InvalidInputError,
    RegionError,
    hub_test,
    knockout,
    solve,
)
from flowgraph.analysis.statistics import t_interval, wilson_interval
from flowgraph.commands.hubtest import hub_test as hub_command
from flowgraph.interventions.hubtest import HubRun, summarise
from tests.fixtures.tiny import save_tiny, tiny, tiny_model


@cache
def trace_of(seed: int = 0, length: int = 40) -> FlowTrace:
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return flowgraph.trace(
        tiny_model(), input_ids=ids, question=range(1, 6), answer=[length - 2, length - 1], prompt_length=7
    )


@cache
def hub_result() -> HubTest:
    return hub_test(tiny_model(), trace_of(), seeds=range(4), fractions=(0.1, 0.2))


def test_every_figure_is_that_of_a_single_knock_out():
    trace, result = trace_of(), hub_result()
    assert len(result.runs) == 2 * (1 + 4 + 4 + 1)
    assert (result.num_traces, result.score, result.region) == (1, "throughput", "reasoning")
    for run in result.runs:
        alone = knockout(tiny_model(), trace, tokens=run.tokens)
        assert run.change == pytest.approx(alone.change, abs=1e-4)  # float32, in a batch of 8
        assert run.change_per_token == run.change / 2
        assert run.flips == alone.flips
        assert run.kl == pytest.approx(float(alone.kl.mean()), abs=1e-4)


def test_the_arms_mask_what_they_say():
    trace = trace_of()
    inside = trace.reasoning.nonzero().flatten().tolist()
    order = sorted(inside, key=lambda token: -float(trace.throughput[token]))
    for run in hub_result().runs:
        count = len(run.tokens)
        assert count == round(run.fraction * len(inside))
        assert list(run.tokens) == sorted(set(run.tokens))
        assert set(run.tokens) <= set(inside)
        assert (run.seed is None) == (run.arm in ("top", "bottom"))
        if run.arm == "top":
            assert set(run.tokens) == set(order[:count])
        if run.arm == "bottom":
            assert set(run.tokens) == set(order[-count:])


def test_matched_draws_keep_the_places_of_top():
    scores = torch.zeros(40)
    scores[[19, 20, 25, 31, 35, 36]] = 1
    matched = hub_test(
        tiny_model(), trace_of(), fractions=[0.2], arms=["top", "matched"], scores=scores, seeds=range(8)
    ).runs
    top = next(run for run in matched if run.arm == "top").tokens
    tenths = torch.tensor_split(trace_of().reasoning.nonzero().flatten(), 10)
    drawn = {run.tokens for run in matched if run.arm == "matched"}
    for tokens in drawn:
        for tenth in tenths:
            places = set(tenth.tolist())
            assert len(places & set(tokens)) == len(places & set(top))
    assert len(drawn) > 1


def test_draws_follow_the_seed_and_the_text_alone():
    first, second = trace_of(0), trace_of(1)
    options = {"fractions": [0.2], "arms": ["random"], "seeds": [3, 5]}
    pair = hub_test(tiny_model(), [first, second], **options)
    swapped = hub_test(tiny_model(), [second, first], batch_size=1, **options)
    by_trace = [[run.tokens for run in pair.runs if run.trace == number] for number in (0, 1)]
    again = [[run.tokens for run in swapped.runs if run.trace == number] for number in (1, 0)]
    assert by_trace == again
    assert len({tokens for trace in by_trace for tokens in trace}) == 4
    assert pair.rows[0].change == pytest.approx(swapped.rows[0].change, abs=1e-4)


def test_one_trace_gives_intervals_over_draws():
    result = hub_result()
    rows = {(row.fraction, row.arm): row for row in result.rows}
    assert len(rows) == 8
    for (fraction, arm), row in rows.items():
        runs = [run for run in result.runs if (run.fraction, run.arm) == (fraction, arm)]
        assert row.change == pytest.approx(fmean(run.change for run in runs))
        assert row.flip_rate == fmean(run.flips for run in runs)
        if arm in ("top", "bottom"):
            assert (row.count, row.units, row.change_interval, row.flip_interval) == (1, "traces", None, None)
        else:
            assert (row.count, row.units) == (4, "seeds")
            assert row.change_interval == t_interval([run.change for run in runs])
            assert row.flip_interval == wilson_interval(row.flip_rate, 4)
    gaps = {(row.fraction, row.arm): row for row in result.differences}
    assert {arm for _, arm in gaps} == {"top - random", "top - matched", "top - bottom"}
    gap = gaps[0.2, "top - random"]
    assert gap.change == pytest.approx(rows[0.2, "top"].change - rows[0.2, "random"].change)
    assert gap.count == 4


def test_several_traces_give_paired_intervals_over_traces():
    traces = [trace_of(seed) for seed in range(4)]
    result = hub_test(tiny_model(), traces, fractions=[0.2], seeds=range(2), arms=("top", "random"))
    per_trace = {
        arm: [fmean(r.change for r in result.runs if (r.trace, r.arm) == (n, arm)) for n in range(4)]
        for arm in ("top", "random")
    }
    top, random = result.rows
    assert (top.units, top.count, random.count) == ("traces", 4, 4)
    assert random.change_interval == pytest.approx(t_interval(per_trace["random"]))
    (gap,) = result.differences
    paired = [a - b for a, b in zip(per_trace["top"], per_trace["random"], strict=True)]
    assert (gap.change, gap.change_interval) == (pytest.approx(fmean(paired)), pytest.approx(t_interval(paired)))


def test_intervals_against_published_values():
    # t(0.975): 12.7062 (1), 4.3027 (2), 3.1824 (3), 2.2622 (9), 2.0423 (30)
    for degrees, quantile in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)):
        values = [float(k) for k in range(degrees + 1)]
        spread = torch.tensor(values, dtype=torch.float64).std().item() / (degrees + 1) ** 0.5
        low, high = t_interval(values) or (0.0, 0.0)
        assert (high - low) / 2 / spread == pytest.approx(quantile, abs=5e-5)
        assert (high + low) / 2 == pytest.approx(degrees / 2)
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 1.0, 1.0]) is None
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 1) is None


def test_other_scores_rank_other_tokens():
    trace = trace_of()
    inside = trace.reasoning.nonzero().flatten().tolist()
    received = torch.zeros(40, dtype=torch.float64)
    for (source, _), weight in zip(trace.graph.edge_index.T.tolist(), trace.graph.capacity.tolist(), strict=True):
        received[source] += weight
    scored = {"recency": torch.arange(40.0), "attention": received, "potential": trace.potential}
    for name, vector in scored.items():
        (run,) = hub_test(tiny_model(), trace, fractions=[0.2], arms=["top"], scores=name).runs
        best = sorted(inside, key=lambda token, vector=vector: -float(vector[token]))[: len(run.tokens)]
        assert run.tokens == tuple(sorted(best)), name
        given = hub_test(tiny_model(), [trace, trace], fractions=[0.2], arms=["top"], scores=[vector, vector])
        assert [one.tokens for one in given.runs] == [run.tokens] * 2
    assert given.score == "given scores"
    question = hub_test(tiny_model(), trace, fractions=[0.2], arms=["top"], region="question").runs[0]
    assert trace.question[list(question.tokens)].all()


def unreachable() -> FlowTrace:
    trace = trace_of()
    graph = FlowGraph.from_edges(
        torch.tensor([[10], [12]]), torch.ones(1), num_nodes=40, question=trace.question, answer=trace.answer
    )
    return replace(trace, graph=graph, flow=solve(graph))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fractions": [0.01]}, RegionError, "must mask at least one token and leave one, got 0.01 of 31"),
        ({"fractions": [0.99]}, RegionError, "leave one, got 0.99 of 31"),
        ({"fractions": []}, InvalidInputError, r"fractions: must lie in \(0, 1\)"),
        ({"fractions": [0.1, 1.0]}, InvalidInputError, r"fractions: must lie in \(0, 1\)"),
        ({"fractions": [0.1, 0.1]}, InvalidInputError, "each once"),
        ({"arms": ["middle"]}, InvalidInputError, "arms: must be some of 'top'"),
        ({"arms": "top"}, InvalidInputError, "arms: must be some of 'top'"),
        ({"seeds": []}, InvalidInputError, "seeds: must be non-negative integers"),
        ({"seeds": [1, 1]}, InvalidInputError, "seeds: must be non-negative integers, each once"),
        ({"seeds": [1.5]}, InvalidInputError, r"seeds: must be non-negative integers, each once, got \[1.5\]"),
        ({"seeds": 5}, InvalidInputError, "integers, each once, got 5"),
        ({"fractions": 0.2}, InvalidInputError, r"fractions: must lie in \(0, 1\), each once, got 0.2"),
        ({"fractions": ["a"]}, InvalidInputError, r"got \['a'\]"),
        ({"arms": [["top"]]}, InvalidInputError, "arms: must be some of 'top'"),
        ({"arms": None}, InvalidInputError, "arms: must be some of 'top'"),
        ({"scores": None}, InvalidInputError, "scores: must be one finite number"),
        ({"scores": [["a"] * 40]}, InvalidInputError, "scores: must be one finite number"),
        ({"scores": torch.ones(40, dtype=torch.complex64)}, InvalidInputError, "scores: must be one finite number"),
        ({"seeds": [-1]}, InvalidInputError, "seeds: must be non-negative"),
        ({"region": "answer"}, InvalidInputError, "region: must be 'reasoning' or 'question'"),
        ({"scores": "luck"}, InvalidInputError, "scores: must be 'throughput'"),
        ({"scores": torch.ones(3)}, InvalidInputError, r"scores: must be one finite number for each of the 40 tokens"),
        ({"scores": torch.full((40,), torch.nan)}, InvalidInputError, "one finite number"),
        ({"scores": [torch.ones(40)] * 2}, InvalidInputError, "one vector for each trace"),
    ],
)
def test_bad_input_is_refused(options: dict, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        hub_test(tiny_model(), trace_of(), **options)


@pytest.mark.unchecked
def test_traces_that_cannot_be_hub_result():
    with pytest.raises(InvalidInputError, match="trace: must be a FlowTrace or several"):
        hub_test(tiny_model(), [])
    with pytest.raises(InvalidInputError, match=r"trace: must be a FlowTrace or several, got \['NoneType'\]"):
        hub_test(tiny_model(), None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="trace: must be a FlowTrace"):
        hub_test(tiny_model(), ["t.safetensors"])  # type: ignore[list-item]
    with pytest.raises(InfeasibleFlowError, match="must have a flow to be ranked by throughput"):
        hub_test(tiny_model(), unreachable())
    assert hub_test(tiny_model(), unreachable(), scores="attention", fractions=[0.2], arms=["top"]).runs
    ids = trace_of().token_ids
    bare = flowgraph.trace(tiny_model(), input_ids=ids, question=range(1, 38), answer=[38, 39], prompt_length=38)
    with pytest.raises(RegionError, match="reasoning: must hold tokens to mask, got none"):
        hub_test(tiny_model(), bare)


def test_reasoning_that_the_answer_cannot_read_is_refused():
    def traced(**regions) -> FlowTrace:
        return flowgraph.trace(
            tiny_model(), input_ids=trace_of().token_ids, question=range(1, 6), prompt_length=7, **regions
        )

    with pytest.raises(RegionError, match="that the answer can read, got none before token 11, which emits"):
        hub_test(tiny_model(), traced(answer=[12], reasoning=range(13, 38)), fractions=[0.2])
    with pytest.raises(RegionError, match="that the answer can read"):
        hub_test(tiny_model(), traced(answer=[12], reasoning=[11, 14, 15]), fractions=[0.4])
    readable = hub_test(
        tiny_model(), traced(answer=[12], reasoning=[10, 14, 15]), fractions=[0.4], arms=["bottom", "top"],
        scores="recency",
    ).runs  # fmt: skip
    assert readable[0].tokens == (10,)
    assert readable[0].change != 0
    assert readable[1].change == pytest.approx(0, abs=1e-5)  # what stands behind the answer is idle


def test_intervals_against_scipy():
    for count in (2, 3, 4, 11, 40):
        values = [math.sin(k) for k in range(count)]
        expected = stats.t.interval(0.95, count - 1, fmean(values), stats.sem(values))
        assert t_interval(values) == pytest.approx(expected, rel=1e-9)
        for hits in {0, 1, count // 2, count}:
            share = stats.binomtest(hits, count).proportion_ci(0.95, "wilson")
            assert wilson_interval(hits / count, count) == pytest.approx((share.low, share.high), abs=1e-9)


def test_a_difference_of_shares_stays_between_minus_one_and_one():
    flips = {"top": (True, True, True), "bottom": (False, False, True)}
    runs = [
        HubRun(number, 0.2, arm, None, (9,), 0.0, 0.0, flip, 0.0)
        for arm, found in flips.items()
        for number, flip in enumerate(found)
    ]
    (gap,) = summarise(runs, [0.2], list(flips), 3)[1]
    low, high = t_interval([1.0, 1.0, 0.0]) or (0.0, 0.0)
    assert high > 1
    assert gap.flip_interval == (low, 1.0)


def test_progress_json_and_text():
    heard: list[str] = []
    result = hub_test(
        tiny_model(), [trace_of(), trace_of(1)], fractions=[0.2], arms=["top", "bottom"], progress=heard.append
    )
    assert heard[0] == "trace 1 of 2: interventions 1 to 2 of 2"
    assert heard[-1].startswith("trace 2 of 2")
    record = json.loads(json.dumps(result.to_dict()))
    assert record["schema"] == "flowgraph-hub-test/1"
    assert record["rows"][0]["change"] == result.rows[0].change
    assert len(record["runs"]) == 4
    assert "top - bottom" in repr(result)
    assert "2 traces" in repr(result)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    save_tiny(tmp_path)
    text = "Step 1: we take 2. Step 2: we add 3 to it and find 2 + 3 = 5. The answer is 5."
    flowgraph.trace(*tiny(), [{"role": "user", "content": "2 + 3?"}], text).save(tmp_path / "t.safetensors")
    command = typer.Typer()
    command.command()(hub_command)
    arguments = [str(tmp_path / "t.safetensors"), "--model", str(tmp_path), "--fractions", "0.2", "--seeds", "2"]
    out = tmp_path / "hub.json"
    result = CliRunner().invoke(command, [*arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "top - random" in result.output
    assert "one trace" in result.output
    record = json.loads(out.read_text())
    assert len(record["runs"]) == 1 + 2 + 2 + 1
    assert record["files"] == [str(tmp_path / "t.safetensors")]
    refused = CliRunner().invoke(command, [*arguments, "--fractions", "a"])
    assert refused.exit_code == 2
    assert "--fractions must be numbers" in refused.output
    refused = CliRunner().invoke(command, [*arguments, "--score", "luck"])
    assert isinstance(refused.exception, FlowgraphError)
    assert "scores: must be" in str(refused.exception)
