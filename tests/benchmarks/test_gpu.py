"""The GPU benchmark at toy sizes on the CPU: everything runs, and whatever goes wrong is recorded."""

from __future__ import annotations

import ast
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import comparisons, correctness, credit, internals, models, timing
from benchmarks.gpu import run as runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.context import Context, DeviceLostError
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import SCHEMA, Record, plain, write_json
from benchmarks.gpu.run import Section, run_sections
from benchmarks.gpu.sections import SECTIONS

import flowgraph

CPU = torch.device("cpu")
NAMES = [section.name for section in SECTIONS]
STATUSES = {"complete", "incomplete", "failed", "timed out", "skipped"}


def read(path: Path) -> dict[str, Any]:
    """A file as strict JSON: NaN and infinity are none."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and folder of a whole toy run."""
    folder = tmp_path_factory.mktemp("gpu") / "new" / "folder"
    return main(["--toy", "--out", str(folder)]), folder


@pytest.fixture
def context() -> Context:
    return Context(CPU, True, 0, time.perf_counter())


@pytest.fixture
def record(context: Context, tmp_path: Path) -> Record:
    return Record("part", "a title", tmp_path / "part.json", context, 60.0)


# The whole run ------------------------------------------------------------------------------------------------


def test_a_toy_run_is_complete_and_every_check_holds(toy: tuple[int, Path]):
    code, folder = toy
    summary = read(folder / "summary.json")
    problems = {name: found for name, found in summary["sections"].items() if not found["passed"]}
    assert problems == {}
    assert code == 0
    assert summary["exit_code"] == 0
    assert summary["finished"]
    assert summary["asked"] == NAMES
    assert list(summary["sections"]) == NAMES
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{name}.json" for name in NAMES), "summary.json"]
    )


def test_the_summary_says_what_the_figures_were_taken_on(toy: tuple[int, Path]):
    summary = read(toy[1] / "summary.json")
    assert summary["schema"] == SCHEMA
    assert summary["toy"] is True
    assert summary["seed"] == 0
    assert summary["budget_seconds"] == 480
    assert summary["device"]["type"] == "cpu"
    # The local part of a version (+cpu, +cu128) may be missing in the metadata of the package.
    assert summary["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(summary["machine"]["versions"]) >= {"flowgraph-llm", "transformers", "torch-geometric", "peft"}


@pytest.mark.parametrize("name", NAMES)
def test_every_section_has_the_same_layout(toy: tuple[int, Path], name: str):
    found = read(toy[1] / f"{name}.json")
    assert set(found) == {
        "schema", "section", "title", "device", "toy", "seed", "status", "passed", "seconds", "limit_seconds",
        "message", "notes", "checks", "rows", "failures", "skipped",
    }  # fmt: skip
    assert found["section"] == name
    assert found["status"] == "complete"
    assert found["seconds"] > 0
    assert found["rows"]
    assert all(set(check) == {"name", "holds", "value", "bound"} for check in found["checks"])
    assert len({check["name"] for check in found["checks"]}) == len(found["checks"])


def test_correctness_covers_families_solvers_gradients_and_functions(toy: tuple[int, Path]):
    found = read(toy[1] / "correctness.json")
    names = [check["name"] for check in found["checks"]]
    assert all(check["holds"] for check in found["checks"])
    for family in models.FAMILIES:
        for dtype in ("float32", "bfloat16"):
            for case in (
                "left, same queries and keys",
                "right, eager pass",
                "left: logits are the same bits while recorded",
            ):
                assert any(name.startswith(f"capture {family} {dtype}") and name.endswith(case) for name in names)
    for start in (
        "solve, ", "solve_rows, ", "gradient of solve to capacity", "gradient of solve to source", "out of range",
        "gradient of solve to demand", "gradient of solve_rows", "powers of two", "scatter in deterministic mode",
        "a trace certifies", "PPO steps",
    ):  # fmt: skip
        assert any(name.startswith(start) for name in names), start
    bounds = {check["bound"] for check in found["checks"] if check["name"].startswith(("solve, ", "gradient"))}
    assert bounds == {1e-12}


def test_credit_rows_add_up(toy: tuple[int, Path]):
    rows = read(toy[1] / "credit.json")["rows"]
    assert [row["case"] for row in rows] == [case.name for case in credit.TOY_CASES]
    assert [row["training"]["checkpointing"] for row in rows] == [False, True]
    for row in rows:
        recording = row["scoring_recorded"]["median_s"] - row["scoring"]["median_s"]
        assert row["credit_s"] == pytest.approx(recording + row["solve"]["median_s"])
        assert row["step_s"] == pytest.approx(row["scoring"]["median_s"] + row["training"]["timing"]["median_s"])
        assert row["credit_percent_of_step"] == pytest.approx(100 * row["credit_s"] / row["step_s"])
        assert row["layers"] == [2, 3]
        assert row["scratch_bytes_in_use"] == 2**25


def test_other_sections_hold_the_figures_that_were_asked_for(toy: tuple[int, Path]):
    folder = toy[1]
    ways = [row.get("way") for row in read(folder / "batches.json")["rows"]]
    assert {"scatter", "dense", "scatter, first solve", "scatter, deterministic mode", None} <= set(ways)
    profiled = read(folder / "profile.json")["rows"]
    assert [row["part"] for row in profiled] == ["forward, recorded", "solve"]
    assert all(row["operators"] and row["operators"][0]["self_ms"] > 0 for row in profiled)
    noise = [row["way"] for row in read(folder / "noise.json")["rows"]]
    assert len(noise) == 4
    lengths = [row["tokens"] for row in read(folder / "trace.json")["rows"]]
    assert lengths == [256, 512, 512]


# What goes wrong ----------------------------------------------------------------------------------------------


def options_for(folder: Path, sections: list[Section], **changes: Any) -> Options:
    return Options(
        folder, True, tuple(section.name for section in sections), CPU, **({"budget": 60.0, "seed": 0} | changes)
    )


def section(name: str, run: Callable[[Context, Record], None], share: float = 1.0, least: float = 0.0) -> Section:
    return Section(name, "a title", run, share, least)


def good(context: Context, record: Record) -> None:
    record.row(figure=1.0)
    record.require("it holds", True)


def bad(context: Context, record: Record) -> None:
    record.row(figure=2.0)
    raise ValueError("nothing works")


def test_a_failing_section_is_recorded_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def half(context: Context, record: Record) -> None:
        record.attempt("first", lambda: 1 / 0)
        record.attempt("second", lambda: record.row(figure=3.0))

    def wrong(context: Context, record: Record) -> None:
        record.check("small enough", 2.0, 1.0)
        record.check("a number", float("nan"), 1.0)

    sections = [section("bad", bad), section("half", half), section("wrong", wrong), section("good", good)]
    assert run_sections(options_for(tmp_path, sections), sections) == 1
    summary = read(tmp_path / "summary.json")
    statuses = {name: found["status"] for name, found in summary["sections"].items()}
    assert statuses == {"bad": "failed", "half": "incomplete", "wrong": "complete", "good": "complete"}
    assert {name: found["passed"] for name, found in summary["sections"].items()} == {
        "bad": False, "half": False, "wrong": False, "good": True,
    }  # fmt: skip
    assert summary["sections"]["bad"]["message"] == "ValueError: nothing works"
    assert summary["sections"]["wrong"]["failed_checks"] == ["small enough", "a number"]
    failed = read(tmp_path / "bad.json")
    assert failed["rows"] == [{"figure": 2.0}]
    assert "nothing works" in failed["failures"][0]["traceback"]
    part = read(tmp_path / "half.json")
    assert part["failures"][0]["part"] == "first"
    assert part["failures"][0]["message"].startswith("ZeroDivisionError")
    assert part["rows"] == [{"figure": 3.0}]
    printed = capsys.readouterr().out
    assert "wrong: does not hold: small enough (2, bound 1)" in printed
    assert "exit code 1" in printed


def test_an_exhausted_budget_is_recorded_section_by_section(tmp_path: Path):
    assert main(["--toy", "--out", str(tmp_path), "--budget", "0.001"]) == 1
    summary = read(tmp_path / "summary.json")
    assert {found["status"] for found in summary["sections"].values()} == {"skipped"}
    for name in NAMES:
        message = read(tmp_path / f"{name}.json")["message"]
        assert message.startswith("budget: must leave at least ")
        assert message.endswith("raise --budget or name fewer --sections")


def test_parts_without_time_are_left_out_and_the_section_is_incomplete(tmp_path: Path):
    def late(context: Context, record: Record) -> None:
        record.attempt("cheap", lambda: record.row(figure=1.0))
        record.attempt("dear", lambda: pytest.fail("there was no time"), needs=1000.0)

    sections = [section("late", late)]
    assert run_sections(options_for(tmp_path, sections), sections) == 1
    found = read(tmp_path / "late.json")
    assert found["status"] == "incomplete"
    assert found["rows"] == [{"figure": 1.0}]
    assert found["skipped"][0]["part"] == "dear"
    assert found["skipped"][0]["reason"].startswith("needs about 1000 s, and ")


def test_a_section_that_does_not_end_is_stopped_with_its_rows(tmp_path: Path):
    def endless(context: Context, record: Record) -> None:
        record.row(figure=1.0)
        record.attempt("sleep", lambda: time.sleep(600))

    sections = [section("endless", endless, share=1), section("good", good, share=200)]
    assert run_sections(options_for(tmp_path, sections, budget=20.0), sections) == 1
    assert read(tmp_path / "endless.json")["status"] == "timed out"
    assert read(tmp_path / "endless.json")["rows"] == [{"figure": 1.0}]
    assert read(tmp_path / "good.json")["status"] == "complete"


def test_time_that_a_section_leaves_goes_to_the_others(tmp_path: Path):
    sections = [section("one", good, share=1), section("two", good, share=3)]
    assert run_sections(options_for(tmp_path, sections, budget=40.0), sections) == 0
    assert read(tmp_path / "one.json")["limit_seconds"] <= 10.0
    assert read(tmp_path / "two.json")["limit_seconds"] > 30.0


def test_a_lost_device_is_left_to_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lose(context: Context, record: Record) -> None:
        raise DeviceLostError("an illegal memory access was encountered")

    commands: list[list[str]] = []
    monkeypatch.setattr(runner.os, "execv", lambda path, command: commands.append(command))
    sections = [section("good", good), section("lose", lose), section("after", good)]
    assert run_sections(options_for(tmp_path, sections), sections) == 1
    summary = read(tmp_path / "summary.json")
    assert summary["sections"]["lose"]["status"] == "failed"
    assert "illegal memory access" in summary["sections"]["lose"]["message"]
    assert not summary["finished"]
    (command,) = commands
    assert command[1:3] == ["-m", "benchmarks.gpu"]
    assert command[command.index("--continue") + 1] == summary["run"]
    assert "--toy" in command

    # The new process keeps what is there, goes on with the rest, and cannot turn the failure into a success.
    (tmp_path / "good.json").unlink()
    again = options_for(tmp_path, sections, continued=summary["run"])
    assert run_sections(again, sections) == 1
    later = read(tmp_path / "summary.json")
    assert later["finished"]
    assert later["processes"] == 2
    assert later["started"] == summary["started"]
    assert {name: found["passed"] for name, found in later["sections"].items()} == {
        "good": True, "lose": False, "after": True,
    }  # fmt: skip
    assert not (tmp_path / "good.json").exists()


def test_a_device_that_stops_answering_is_noticed_after_a_failed_part(record: Record, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Context, "device_answers", lambda self: False)
    with pytest.raises(DeviceLostError, match="after division: the device no longer answers"):
        record.attempt("division", lambda: 1 / 0)
    assert record.failures[0]["part"] == "division"


# Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], r"--device: must be one that torch can use here, got 'cuda:99' \(.+\); run on a"),
        (["--toy", "--device", "none"], r"--device: must be one that torch can use here, got 'none' \(.+\); run on a"),
        (["--device", "cpu"], r"--device: must be a GPU for the full sizes, got 'cpu', .*; pass --toy"),
        (["--toy", "--sections", "credit,x"], r"--sections: must name sections .*, got 'x'; there are correctness, "),
        (["--toy", "--sections", ","], r"--sections: must name sections .*, got none; there are correctness, "),
        (["--toy", "--budget", "-3"], r"--budget: must be a positive number of seconds, got -3; 480 is the default"),
        (["--toy", "--budget", "nan"], r"--budget: must be a positive number of seconds, got nan; 480"),
    ],
)
def test_bad_input_ends_in_a_message_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.setattr(runner, "run_sections", lambda *a: pytest.fail("work was begun"))
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.gpu: ")
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(error))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "run_sections", lambda *a: pytest.fail("work was begun"))
    file = tmp_path / "file"
    file.write_text("something else")
    assert main(["--toy", "--out", str(file / below)]) == 2
    error = capsys.readouterr().err
    assert "--out: must be a folder that can be written, got " in error
    assert error.rstrip().endswith("; choose another place")
    assert file.read_text() == "something else"


# Comparisons notice -------------------------------------------------------------------------------------------


def test_a_wrong_solution_on_the_device_is_noticed(context: Context, record: Record, monkeypatch: pytest.MonkeyPatch):
    solve = flowgraph.solve

    def almost(graph: Any, **options: Any) -> Any:
        flow = solve(graph, **options)
        if options.get("backend") != "scatter":
            return flow
        return dataclasses.replace(flow, throughput=flow.throughput * (1 + 1e-11))

    monkeypatch.setattr(flowgraph, "solve", almost)
    correctness._check_solve(context, record)
    assert record.failed_checks
    assert all(name.endswith("scatter") for name in record.failed_checks)


def test_wrong_rows_are_noticed(context: Context, record: Record, monkeypatch: pytest.MonkeyPatch):
    dense = flowgraph.AttentionRows.dense
    monkeypatch.setattr(flowgraph.AttentionRows, "dense", lambda rows: dense(rows) * 0.95)
    correctness._check_capture(context, record, "llama", "llama", torch.bfloat16)
    assert set(record.failed_checks) == {
        f"llama, {side}, {reference}"
        for side in ("left", "right")
        for reference in ("same queries and keys", "eager pass")
    }


def test_wrong_gradients_are_noticed(context: Context, record: Record, monkeypatch: pytest.MonkeyPatch):
    grad = torch.autograd.grad
    calls: list[int] = []

    def off(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        # The first call is the reference on the CPU.
        return grad(*arguments, **options) if len(calls) == 1 else [2 * g for g in grad(*arguments, **options)]

    monkeypatch.setattr(torch.autograd, "grad", off)
    correctness._check_gradients(context, record)
    assert len(record.failed_checks) >= 6


def test_differences_are_relative_and_never_hide_nan():
    one = torch.tensor([1.0, 0.0, 1e-200], dtype=torch.float64)
    doubled = torch.tensor([1.0, 0.0, 2e-200], dtype=torch.float64)
    not_zero = torch.tensor([1.0, 1e-300, 1e-200], dtype=torch.float64)
    assert comparisons.relative_difference(one, one) == 0
    assert comparisons.relative_difference(doubled, one) == pytest.approx(1)
    assert comparisons.relative_difference(not_zero, one) == float("inf")
    for broken in (torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([1.0, float("inf"), 0.0]), torch.ones(2)):
        assert comparisons.relative_difference(broken, one) == float("inf")
        assert comparisons.norm_difference(broken, one) == float("inf")
    assert comparisons.norm_difference(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0])) == pytest.approx(0.5)


# Parts --------------------------------------------------------------------------------------------------------


def test_the_large_model_has_the_shape_of_qwen3_4b():
    model = models.random_model(models.qwen3_4b_config(), torch.device("meta"), models.LARGE_DTYPE, 0)
    assert models.shape_of(model) == {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "parameters": 4_022_468_096, "dtype": "bfloat16",
    }  # fmt: skip
    assert models.described(model) == "qwen3 of 36 layers, width 2560, 4,022.5 million weights in bfloat16"


def test_the_estimate_asks_for_checkpointing_on_an_80_gib_card():
    config = models.qwen3_4b_config()
    for case in credit.CASES:
        assert credit.training_bytes(config, case, checkpointing=False) > 80 * timing.GIB
        assert credit.training_bytes(config, case, checkpointing=True) < 60 * timing.GIB


def test_a_training_pass_that_does_not_fit_is_split(context: Context, record: Record, monkeypatch: pytest.MonkeyPatch):
    case = credit.TOY_CASES[0]
    with credit.borrowed_policy(context.model(), context) as policy:
        bench = credit.CreditBench(policy, credit.make_tokens(case, policy.causal_lm, context))
        train = bench.train

        def small_memory(rows_at_once: int) -> None:
            if rows_at_once > 1:
                raise torch.OutOfMemoryError("out of memory")
            train(rows_at_once)

        monkeypatch.setattr(bench, "train", small_memory)
        row: dict[str, Any] = {}
        credit._measure_training(context, record, case, bench, row, limit=0.0)
    assert row["training"]["rows_at_once"] == 1
    assert row["training"]["checkpointing"] is True
    assert [text.split(":")[0] for text in row["training"]["out_of_memory"]] == [
        "gradient checkpointing off, 4 sequences at once",
        "gradient checkpointing on, 4 sequences at once",
        "gradient checkpointing on, 2 sequences at once",
    ]
    assert record.failed_checks == []


def test_checkpointing_and_micro_batches_change_no_gradient(context: Context):
    case = credit.TOY_CASES[0]
    gradients = []
    for rows_at_once, checkpointing in ((4, False), (4, True), (1, False)):
        with credit.borrowed_policy(context.model(), context) as policy:
            bench = credit.CreditBench(policy, credit.make_tokens(case, policy.causal_lm, context))
            with credit._training_mode(bench.model, checkpointing):
                bench.train(rows_at_once)
            gradients.append(bench.gradient_sum())
    assert gradients[0] > 0
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)
    assert gradients[2] == pytest.approx(gradients[0], rel=5e-2)


@pytest.mark.parametrize("case", [*credit.TOY_CASES, *credit.CASES])
def test_responses_of_a_group_share_a_prompt_and_regions_are_disjoint(case: credit.Case, context: Context):
    tokens = credit.make_tokens(case, context.model(), context)
    prompts = tokens.input_ids[:, : case.prompt]
    for start in range(0, case.sequences, case.group):
        assert bool((prompts[start : start + case.group] == prompts[start]).all())
    inside = tokens.attention_mask.bool()
    assert bool(inside.all()) != case.padded
    assert not bool((tokens.question & tokens.answer).any())
    assert not bool(((tokens.question | tokens.answer | tokens.generated) & ~inside).any())
    assert bool((tokens.answer.sum(1) == credit.ANSWER_TOKENS).all())
    assert bool(tokens.generated[tokens.answer].all())
    assert bool(tokens.question.any(1).all())
    assert torch.equal(tokens.generated[:, case.prompt :], tokens.response_mask)


def test_a_constant_is_put_back_and_a_missing_one_is_named():
    before = internals.value_of(internals.SCRATCH_BYTES)
    with internals.setting(internals.SCRATCH_BYTES, 7):
        assert internals.value_of(internals.SCRATCH_BYTES) == 7
    assert internals.value_of(internals.SCRATCH_BYTES) == before
    with pytest.raises(LookupError, match=r"_NOWHERE: must be defined in a module of flowgraph, got none .*; look for"):
        internals.value_of("_NOWHERE")


def test_functions_are_timed_in_turns_and_one_slow_round_is_kept():
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.alternate(runs, CPU, repeats=2, prepare=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 3
    assert times["a"]["repeats"] == 2
    assert times["a"]["warm"]
    assert times["a"]["min_s"] <= times["a"]["median_s"] <= times["a"]["max_s"]
    cold = timing.measure(lambda: time.sleep(0.01), CPU, repeats=3, limit=0.001)
    assert cold["repeats"] == 1
    assert not cold["warm"]


def test_files_are_strict_json(tmp_path: Path):
    values = {"a": float("nan"), "b": [float("inf"), 1, None, True], 3: torch.float32}
    assert plain(values) == {"a": None, "b": [None, 1, None, True], "3": "torch.float32"}
    write_json(tmp_path / "x.json", values)
    assert read(tmp_path / "x.json")["b"][1] == 1


def test_only_one_module_reaches_below_the_roots_of_the_packages():
    folder = Path(runner.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            deep = [name for name in names if name.startswith(("flowgraph.", "rl."))]
            foreign = [name for name in names if name.startswith("tests")]
            others = [n for n in names if n.startswith("benchmarks.") and not n.startswith("benchmarks.gpu")]
            assert deep == foreign == others == [], path.name
