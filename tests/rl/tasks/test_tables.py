"""A Parquet file and a dataset give the problems of the JSONL file with the same rows."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from pathlib import Path

import pytest

from flowgraph import MissingExtraError
from rl import JsonlTask, TaskError, make_task

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": f"What is {k} + 1?", "answer": str(k + 1), "level": k % 3, "tags": ["a", None]} for k in range(25)]


def contents(task: JsonlTask) -> list:
    samples = [task.sample("train", index) for index in range(task.size)]
    samples += [task.sample("eval", index) for index in range(2)]
    return [(s.index, s.prompt, s.answer, dict(s.metadata)) for s in samples]


@pytest.fixture
def lines(tmp_path: Path) -> JsonlTask:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return JsonlTask(path, seed=5)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "sums.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_a_parquet_file_gives_the_problems_of_the_lines(lines: JsonlTask, table: Path):
    assert contents(JsonlTask(table, seed=5)) == contents(lines)
    made = make_task(str(table), seed=5)
    assert contents(made) == contents(lines)
    assert made.name == str(table)
    assert contents(make_task(table, seed=5)) == contents(lines)


def test_datasets_give_the_problems_of_the_lines(lines: JsonlTask, table: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(ROWS)
    assert contents(JsonlTask(dataset, seed=5)) == contents(lines)
    assert contents(make_task(dataset.with_format("numpy"), seed=5)) == contents(lines)
    dataset.save_to_disk(tmp_path / "saved")
    assert contents(make_task(str(tmp_path / "saved"), seed=5)) == contents(lines)
    (tmp_path / "folder").mkdir()
    table.rename(tmp_path / "folder" / "train.parquet")
    assert contents(make_task(f"datasets:{tmp_path / 'folder'}", seed=5)) == contents(lines)
    both = datasets.DatasetDict({"train": dataset, "test": dataset})
    with pytest.raises(TaskError, match=r"path: must be one split, got a DatasetDict of several \(train, test\); pass"):
        make_task(both)
    with pytest.raises(TaskError, match=r"path: must be a dataset of known length, got a IterableDataset; load it"):
        make_task(dataset.to_iterable_dataset())
    with pytest.raises(TaskError, match=r"path: must name a dataset that can be loaded, got 'datasets:.*none'"):
        make_task(f"datasets:{tmp_path / 'none'}")
    with pytest.raises(TaskError, match=r"path: must name a dataset behind 'datasets:', got 'datasets::train'; write"):
        make_task("datasets::train")


def test_chat_messages_lose_the_empty_keys_of_a_table(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?", "name": None}]
    path = tmp_path / "chat.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": messages, "answer": 2.5}]), path)
    sample = JsonlTask(path, equality="number", eval_every=0).sample("train", 0)
    assert sample.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?"}]
    assert sample.answer == "2.5"


def test_values_become_json_or_are_refused_with_row_and_column(tmp_path: Path):
    good = {"day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "at": datetime.datetime(2026, 1, 2, 3)}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "answer": "b", **good}]), path)
    sample = JsonlTask(path, eval_every=0).sample("train", 0)
    assert sample.metadata == {"day": "2026-01-02", "price": "1.50", "at": "2026-01-02T03:00:00"}
    json.dumps(dict(sample.metadata))
    for column, value, reason in (
        ("image", b"\xff", r"row 2: column 'image' holds a bytes, which JSON does not have"),
        ("score", float("nan"), r"row 2: column 'score' holds nan, which JSON does not have"),
        ("answer", None, r"row 2: 'answer' is neither text nor a number"),
    ):
        rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"} | {column: value}]
        parquet.write_table(pyarrow.Table.from_pylist([{column: None} | rows[0], rows[1]]), path)
        with pytest.raises(
            TaskError, match=rf"path: must hold one problem per row, got 1 bad of 2 rows in .*: {reason}"
        ):
            JsonlTask(path)


def test_files_that_are_no_tables(tmp_path: Path):
    path = tmp_path / "broken.parquet"
    for content in (b"", b"PAR1 not really"):
        path.write_bytes(content)
        with pytest.raises(TaskError, match=r"path: must name a Parquet file that can be read, got .*broken.parquet'"):
            JsonlTask(path)
    with pytest.raises(TaskError, match=r"path: must name a Parquet file that can be read, got .*none.parquet'"):
        make_task(str(tmp_path / "none.parquet"))
    with pytest.raises(TaskError, match=r"path: must be a file, a folder or a datasets.Dataset, got a int; datasets"):
        JsonlTask(3)


def test_missing_packages_are_named(table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"path: a .parquet file needs the package pyarrow, got .*sums.parquet' in an environment without it; pip"
    with pytest.raises(MissingExtraError, match=message):
        JsonlTask(table)
    message = r"path: a dataset needs the package datasets, got 'datasets:squad' in an environment without it; pip inst"
    with pytest.raises(MissingExtraError, match=message):
        make_task("datasets:squad")
