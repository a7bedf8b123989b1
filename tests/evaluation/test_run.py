"""An evaluation: right values, what is left out is counted, and a killed run continues to the same table."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import flowgraph as fg
from flowgraph import EvaluationItem, InvalidInputError, OutputError
from flowgraph.evaluation import item_record
from flowgraph.evaluation.evaluation_folder import safe_name
from tests.fixtures import evaluation as toys
from tests.fixtures.kills import kill_at_change
from tests.fixtures.tiny import tiny, tiny_model

METHODS = ["toy_right", "toy_noise", "toy_position"]
TABLES = ("table.json", "table.csv", "index.html")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with toys.registries():
        toys.register_toys()
        yield


def run(out: Path | None = None, **options) -> fg.Evaluation:
    chosen = {"tasks": "toy", "methods": METHODS, "items": 4, "out": out, **options}
    return fg.evaluate(*tiny(), **chosen)


def values(evaluation: fg.Evaluation, **options) -> dict[str, float | None]:
    return {row["method"]: row["value"] for row in evaluation.table(metric="primary", **options)}


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_means_of_the_items(tmp_path: Path):
    evaluation = run(tmp_path / "out")
    model, tokenizer = tiny()
    shares = []
    for item in toys.items("test", 4, 0):
        subject = fg.Subject(model, tokenizer, item)
        truth = toys.digits_truth(subject)
        shares.append(truth.score(fg.Explanation(toys.by_digits(subject)))["share"])
    assert values(evaluation)["toy_right"] == pytest.approx(sum(shares) / 4, rel=1e-9)
    assert [item["scores"]["toy_right"]["share"] for item in evaluation.items] == shares
    # The best method is first, for the metric where low is good as well.
    assert evaluation.table("toy", metric="share")[0]["method"] == "toy_right"
    assert evaluation.table("toy", metric="misplaced")[0]["method"] == "toy_right"
    assert evaluation.table("toy", metric="misplaced")[0]["value"] == 0
    # Files and memory hold the same.
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == json.loads(json.dumps(evaluation.to_dict()))
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in evaluation.rows]
    assert values(run()) == values(evaluation)
    assert "3 methods over 4 items" in repr(evaluation)


def test_random_methods_depend_on_the_seed_alone_and_change_no_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    together = values(run())
    assert torch.equal(torch.get_rng_state(), state)
    assert values(run(methods=["toy_noise", "toy_right"]))["toy_noise"] == together["toy_noise"]
    assert values(run(seed=1))["toy_noise"] != together["toy_noise"]


def test_splits_have_rows_of_their_own_and_notes_on_their_use():
    evaluation = run(split="both", methods=["toy_right", "toy_position", "toy_refuses"])
    assert [summary.split for summary in evaluation.summaries] == ["dev", "test"]
    dev, test = evaluation.summaries
    assert any(note.startswith("dev: for choosing") for note in dev.notes)
    assert any(note.startswith("2 scores compared on test") for note in test.notes)
    assert values(evaluation, split="dev") != values(evaluation, split="test")
    only = run(methods=["toy_right", "toy_position"])
    assert not any("compared on test" in note for note in only.summaries[0].notes)


def test_scores_that_an_earlier_run_compared_count(tmp_path: Path):
    run(tmp_path / "out", methods=["toy_refuses", "toy_position"])
    later = run(tmp_path / "out", methods=["toy_right", "toy_position"])
    assert later.summaries[0].num_compared == 2
    assert values(later).keys() == {"toy_right", "toy_position"}


# --- what is left out ------------------------------------------------------------------------------------------------


def test_a_library_error_of_a_method_skips_the_item_and_is_counted():
    evaluation = run(methods=["toy_right", "toy_refuses"])
    [summary] = evaluation.summaries
    assert summary.skipped == {"toy_refuses": {"method: must have an even item, got an odd one; take another": 2}}
    rows = {row["method"]: row for row in evaluation.table(metric="primary")}
    assert (rows["toy_refuses"]["n"], rows["toy_refuses"]["skipped"]) == (2, 2)
    # The value of the items that remain is right.
    even = [item["scores"]["toy_right"]["share"] for item in evaluation.items[::2]]
    assert rows["toy_refuses"]["value"] == pytest.approx(sum(even) / 2)
    assert evaluation.unexpected == {}


def test_another_exception_is_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.warns(UserWarning, match=r"methods: must raise .*, got method toy_breaks: KeyError: 'no such key' \(4"):
        evaluation = run(tmp_path / "out", methods=["toy_breaks", "toy_right"])
    reason = evaluation.items[0]["skipped"]["toy_breaks"]
    assert (reason["kind"], reason["expected"]) == ("KeyError", False)
    assert any("no such key" in place for place in reason["where"])
    assert values(evaluation)["toy_right"] is not None
    # The corrected method runs in the same folder.
    method = fg.EvaluationMethod("toy_breaks", toys.by_digits, "Corrected.")
    monkeypatch.setitem(toys.registry._METHODS, "toy_breaks", method)
    again = run(tmp_path / "out", methods=["toy_breaks", "toy_right"])
    assert values(again)["toy_breaks"] == values(again)["toy_right"]


def test_wrong_shapes_nan_and_missing_metrics_are_skipped_by_message():
    toys.evaluation_method("toy_short")(lambda_with_docstring(lambda subject: torch.zeros(2)))
    toys.evaluation_method("toy_nan")(
        lambda_with_docstring(lambda subject: torch.full((subject.num_tokens,), torch.nan))
    )
    toys.register("toy_lacks", metrics=(*toys.METRICS, fg.Metric("other", "never returned")))
    evaluation = run(methods=["toy_short", "toy_nan", "toy_right"])
    reasons = evaluation.summaries[0].skipped
    assert "must return tokens of shape" in next(iter(reasons["toy_short"]))
    assert "must be finite" in next(iter(reasons["toy_nan"]))
    lacking = run(tasks="toy_lacks", methods=["toy_right"]).summaries[0].skipped["toy_right"]
    assert "must return all of its metrics, got none for 'other'" in next(iter(lacking))


def lambda_with_docstring(function: Callable) -> Callable:
    function.__doc__ = "A method."
    return function


def test_undefined_values_are_left_out_pairwise_and_counted():
    evaluation = run(methods=["toy_constant", "toy_right", "toy_position"])
    rows = {row["method"]: row for row in evaluation.table(metric="primary")}
    assert rows["toy_constant"]["value"] is None
    assert (rows["toy_constant"]["n"], rows["toy_constant"]["undefined"]) == (0, 4)
    assert any("undefined on some items, left out pairwise: toy_constant 4" in n for n in evaluation.summaries[0].notes)


def test_unusable_and_failing_items_are_counted_with_their_reasons():
    def half(subject: fg.Subject) -> toys.Digits:
        """Every second item decides nothing."""
        truth = toys.digits_truth(subject)
        is_odd = int(subject.item.id[-1]) % 2 == 1
        return toys.Digits(truth.gold, truth.num_tokens, "all effects are 0" if is_odd else None)

    def bad_items(split: str, number: int, seed: int) -> list[EvaluationItem]:
        made = toys.items(split, number - 1, seed)
        return [*made, EvaluationItem("lost", "Who?", "I do not know", answer=fg.selectors.Literal("nowhere"))]

    toys.register("toy_half", half, items=bad_items)
    [summary] = run(tasks="toy_half", items=5).summaries
    assert summary.unusable == {"all effects are 0": 2}
    assert sum(summary.failed.values()) == 1
    assert "nowhere" in next(iter(summary.failed))
    assert (summary.num_items, summary.num_usable) == (5, 2)
    assert "2 items: too few for intervals, which need 5" in summary.notes
    assert any(note.startswith("2 of 5 items unusable: all effects are 0") for note in summary.notes)


def test_effects_that_are_all_zero_make_an_item_unusable():
    class NoEffect(toys.Digits):
        def to_dict(self) -> dict:
            return {"units": [[0], [1]], "effects": torch.zeros(2, dtype=torch.float64)}

    def truth(subject: fg.Subject) -> NoEffect:
        """Nothing changes anything."""
        return NoEffect((0,), subject.num_tokens)

    toys.register("toy_zero", truth)
    evaluation = run(tasks="toy_zero")
    [summary] = evaluation.summaries
    assert summary.unusable == {"all effects are 0": 4}
    assert summary.notes[0] == "no usable item: this task decides nothing here"
    assert set(values(evaluation).values()) == {None}


def test_a_task_that_raises_is_named():
    def broken(subject: fg.Subject) -> toys.Digits:
        """Raise."""
        raise ZeroDivisionError("by zero")

    toys.register("toy_broken", broken)
    with pytest.warns(UserWarning, match="task toy_broken: ZeroDivisionError: by zero"):
        [summary] = run(tasks="toy_broken").summaries
    assert summary.failed == {"ZeroDivisionError: by zero": 4}

    toys.register("toy_sourceless", items=lambda split, number, seed: {}["gone"])
    with pytest.raises(InvalidInputError, match=r"items of 'toy_sourceless' must be made .*, got KeyError: 'gone'"):
        run(tasks="toy_sourceless")


# --- right and wrong answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "contains"),
    [
        ("7", "7", True),
        (" The answer is 7.", "7", True),
        ("17", "7", False),
        ("7.5", "7", False),
        ("1.7", "7", False),
        ("7km", "7", False),
        ("seven", "Seven", True),
        ("New  York", "new york", True),
        ("a+b", "a+b", True),
        ("", "7", False),
    ],
)
def test_an_answer_is_found_as_a_whole(text: str, expected: str, contains: bool):
    assert item_record.contains_answer(text, expected) is contains


def test_a_given_answer_is_right_where_the_model_predicts_it(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny()
    item = toys.items("test", 1, 0)[0]
    subject = fg.Subject(model, tokenizer, item)
    answer = subject.answer.nonzero().flatten()
    with torch.no_grad():
        logits = model(input_ids=subject.token_ids[None]).logits[0]
    predicted = bool((logits[answer - 1].argmax(-1) == subject.token_ids[answer]).all())
    assert item_record.answers_rightly(subject) is predicted

    # A model that predicts every token: log-probabilities with their maximum there.
    def certain(model, trace, answer, batch):
        table = torch.zeros(batch, len(answer), 400, dtype=torch.float64)
        return table.scatter(2, trace.token_ids[answer][None, :, None], 1.0)

    monkeypatch.setattr(item_record, "answer_logprobs", certain)
    assert item_record.answers_rightly(subject) is True
    other = EvaluationItem("x", item.prompt, item.response, data={"expected": "9"})
    assert item_record.answers_rightly(fg.Subject(model, tokenizer, other)) is False
    silent = EvaluationItem("x", item.prompt, item.response)
    assert item_record.answers_rightly(fg.Subject(model, tokenizer, silent)) is None


def test_wrong_answers_are_counted_and_the_others_shown_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(item_record, "answers_rightly", lambda subject: int(subject.item.id[-1]) < 3)
    evaluation = run()
    [summary] = evaluation.summaries
    assert (summary.num_right, summary.num_wrong) == (3, 1)
    assert "the model answers 1 of 4 items wrongly; the others are also shown alone" in summary.notes
    right = values(evaluation, items="right")["toy_right"]
    expected = [item["scores"]["toy_right"]["share"] for item in evaluation.items[:3]]
    assert right == pytest.approx(sum(expected) / 3)
    # Without a wrong answer there is one table.
    monkeypatch.setattr(item_record, "answers_rightly", lambda subject: True)
    assert run().table(items="right") == []


# --- edges -----------------------------------------------------------------------------------------------------------


def test_methods_are_run_only_on_tasks_that_read_what_they_give():
    toys.register("toy_reads_edges", reads="edges", metrics=(fg.Metric("share", "s"),), function=edge_truth)
    evaluation = run(tasks=["toy", "toy_reads_edges"], methods=["toy_right", "toy_edges"])
    tokens, edges = evaluation.summaries
    assert tokens.not_applicable == ["toy_edges"]
    assert edges.not_applicable == ["toy_right"]
    assert values(evaluation, task="toy_reads_edges") == {"toy_edges": 1.0}
    with pytest.raises(
        InvalidInputError,
        match=r"methods: must give edges, which task 'toy_reads_edges' reads, got toy_right \(tokens\); add a method",
    ):
        run(tasks=["toy", "toy_reads_edges"], methods=["toy_right"])


def edge_truth(subject: fg.Subject) -> object:
    """Every edge is right."""

    class Edges:
        unusable = None

        def score(self, explanation: fg.Explanation) -> dict[str, float]:
            between = explanation.between_units([[0], [1]])
            return {"share": float(between[1, 0])}

        def to_dict(self) -> dict:
            return {"units": [[0], [1]], "pairs": [[1, 0]], "gold": [True]}

    return Edges()


# --- resume ----------------------------------------------------------------------------------------------------------


def test_a_second_call_computes_only_what_is_missing(tmp_path: Path):
    counts = {"truth": 0, "restored": 0}

    def counted(subject: fg.Subject) -> toys.Digits:
        """Digits, counted."""
        counts["truth"] += 1
        return toys.digits_truth(subject)

    def counted_restore(subject: fg.Subject, values) -> toys.Digits:
        counts["restored"] += 1
        return toys.restored(subject, values)

    toys.register("toy_counted", counted, restore=counted_restore)
    options = {"tasks": "toy_counted"}
    first = run(tmp_path / "out", methods=METHODS[:2], **options)
    assert counts == {"truth": 4, "restored": 0}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "items").rglob("*.json")}
    run(tmp_path / "out", methods=METHODS[:2], **options)
    assert counts == {"truth": 4, "restored": 0}
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "items").rglob("*.json")}

    # A method that is added needs no new truth where the task can restore it, and more items only their own.
    both = run(tmp_path / "out", methods=METHODS, **options)
    assert counts == {"truth": 4, "restored": 4}
    assert values(both)["toy_noise"] == values(first)["toy_noise"]
    more = run(tmp_path / "out", methods=METHODS, **{**options, "items": 6})
    assert counts == {"truth": 6, "restored": 4}
    assert values(more) == values(run(methods=METHODS, **{**options, "items": 6}))
    # Fewer items: the table is that of the fewer.
    assert values(run(tmp_path / "out", **{**options, "items": 2})) == values(run(**{**options, "items": 2}))


def evaluated_in_a_process(out: Path, kill_at: int | None = None) -> None:
    """What a process of its own does; it is killed at a change of a file, or leaves the number of its changes."""
    torch.set_num_threads(1)
    toys.register_toys()
    out.mkdir(exist_ok=True)
    changes = kill_at_change(out, kill_at)
    run(out, items=6)
    out.with_suffix(".changes").write_text(str(changes[0]))


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_table(tmp_path: Path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["flowgraph.evaluation.run", "tests.fixtures.tiny"])

    def start(*arguments: object) -> int | None:
        worker = processes.Process(target=evaluated_in_a_process, args=arguments)
        worker.start()
        worker.join()
        return worker.exitcode

    whole = tmp_path / "whole"
    out = tmp_path / "out"
    assert start(whole) == 0
    changes = int(whole.with_suffix(".changes").read_text())
    choose = random.Random(3)
    for _ in range(3):
        assert start(out, choose.randint(1, changes // 4)) == -signal.SIGKILL
    done = len(list(out.glob("items/*/*/test-*.json")))
    assert 0 < done < 6
    assert start(out) == 0
    for name in TABLES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    # Nothing half-written is left.
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*"))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names


def test_what_a_kill_leaves_half_written_is_removed_and_computed_again(tmp_path: Path):
    out = tmp_path / "out"
    before = run(out)
    folder = out / "items" / "toy" / "test"
    (folder / ".test-0.json.abc").write_text("{")
    (out / ".table.json.abc").write_text("{")
    (folder / "test-1.json").write_text('{"half')
    (folder / "test-2.json").write_text('{"schema": "another"}')
    again = run(out)
    assert values(again) == values(before)
    assert not list(out.rglob(".*.abc"))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "nothing"}, "tasks: must be of .*toy.*, got 'nothing'; register your own with"),
        ({"methods": ["nothing"]}, "methods: must be of .*toy_right.*, got 'nothing'; register your own"),
        ({"methods": ["toy_right", "toy_right"]}, "methods: must name each once, got 'toy_right' twice; leave one out"),
        ({"tasks": ["toy", "toy"]}, "tasks: must name each once, got 'toy' twice; leave one out"),
        ({"methods": []}, "methods: must name at least one, got none; e.g. 'preset:all'"),
        ({"tasks": ()}, "tasks: must name at least one, got none"),
        ({"methods": ["preset:nothing"]}, "a preset must be one of|must name a preset|got 'preset:nothing'"),
        ({"methods": [toys.by_digits]}, "methods: must be names, got function; register a function"),
        ({"items": 0}, "items: must be an integer from 1 to 100,000, got 0; omit it"),
        ({"items": True}, "items: must be an integer from 1 to 100,000, got True"),
        ({"items": 2.5}, "items: must be an integer .*, got 2.5"),
        ({"seed": -1}, "seed: must be an integer from 0 to"),
        ({"split": "train"}, "split: must be 'dev', 'test' or 'both', got 'train'; choose on dev"),
    ],
)
def test_arguments_outside_their_range_are_refused_before_anything_runs(options, message: str, tmp_path: Path):
    with pytest.raises(InvalidInputError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_format_keeps_its_message(tmp_path: Path):
    """A task that reads a file refuses it in its own words, and nothing is written."""

    def unreadable(split: str, number: int, seed: int) -> list[EvaluationItem]:
        raise InvalidInputError("tasks: data.json must hold a list of problems, got an object; pass another file")

    toys.register("toy_file:data.json", items=unreadable)
    with pytest.raises(
        InvalidInputError, match=r"^tasks: data\.json must hold a list of problems, got an object; pass"
    ):
        run(tmp_path / "out", tasks="toy_file:data.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a/../b"], "an id must be 1 to 100 letters, digits, '-' and '_', as it names a file, got 'a/../b' from task"),
        ([""], "an id must be .*, got '' from task"),
        (["x" * 101], "an id must be 1 to 100 letters"),
        (["a", "b", "a"], "an id must be unique within its task and split, .*, got 'a' twice from task 'toy_ids'"),
        (["a", "A"], "an id must be unique within .* upper and lower case being equal, got 'A' twice"),
        ([], "tasks: must have items in every split that is run, got none of 'toy_ids' in 'test'; choose another"),
    ],
)
def test_items_that_break_the_rules_are_refused(ids: list[str], message: str):
    toys.register("toy_ids", items=lambda split, number, seed: [EvaluationItem(name, "3?", "3") for name in ids])
    with pytest.raises(InvalidInputError, match=message):
        run(tasks="toy_ids")


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    before = values(run(out))
    with pytest.raises(InvalidInputError, match=r"must be continued with the settings .*, got seed 1 and not 0 in"):
        run(out, seed=1)
    changed = tiny_model.__wrapped__()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(InvalidInputError, match="out: must be continued with the settings of its run, got weights '"):
        fg.evaluate(changed, tiny()[1], tasks="toy", methods=METHODS, items=4, out=out)
    assert values(run(out)) == before

    manifest = json.loads((out / "evaluation.json").read_text())
    (out / "evaluation.json").write_text(json.dumps({**manifest, "schema": "flowgraph-evaluation/9"}))
    with pytest.raises(InvalidInputError, match="out: must hold schema flowgraph-evaluation/1, got 'flowgraph-eval"):
        run(out)
    (out / "evaluation.json").unlink()
    with pytest.raises(InvalidInputError, match=r"out: must be a new folder or that of an earlier evaluation, got .*"):
        run(out)


def test_a_task_whose_items_have_changed_is_refused(tmp_path: Path):
    run(tmp_path / "out")
    toys.register(
        items=lambda split, number, seed: [
            EvaluationItem(i.id, f"{i.prompt}!", i.response) for i in toys.items(split, number, seed)
        ]
    )
    with pytest.raises(
        InvalidInputError, match=r"got another text or data for item 'test-0' of task 'toy' in .*: choose"
    ):
        run(tmp_path / "out")


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="out: must be a folder that can be"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_becomes_read_only_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    run(out, items=2)
    from flowgraph import files

    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"path: must be writable, got .*; choose another place"):
        run(out, items=3)
    monkeypatch.undo()
    assert len(list(out.glob("items/toy/test/*.json"))) == 2
    assert values(run(out, items=3)) == values(run(items=3))


def test_names_of_tasks_become_names_of_folders():
    assert safe_name("line_knockout") == "line_knockout"
    names = {safe_name(name) for name in ("parc:a/b", "parc:a_b", "parc_a_b", "../x", "a" * 300, "a" * 299)}
    assert len(names) == 6
    assert all("/" not in name and "." not in name and len(name) < 80 for name in names)
