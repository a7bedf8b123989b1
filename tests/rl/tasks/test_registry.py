"""Tasks by name, and nothing loaded before its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rl import JsonlTask, TaskError, make_task, task_names
from rl.tasks.procedural import Procedural


def test_names_give_their_tasks():
    assert task_names()[0] == "chain"
    for name in ("countdown", "gsm_symbolic", "chain_sum", "reasoning_gym:gcd"):
        task = make_task(name, seed=3)
        assert isinstance(task, Procedural)
        assert task.name == f"reasoning_gym:{name.removeprefix('reasoning_gym:')}"
        assert task.seed == 3
        assert make_task(task.name).sample("train", 0) == make_task(name).sample("train", 0)


def test_a_path_gives_a_file_and_a_task_itself(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"q": "1 + 1?", "answer": 2}))
    task = make_task(str(path), prompt="q", equality="number")
    assert isinstance(task, JsonlTask)
    assert task.sample("train", 0).prompt == "1 + 1?"
    assert make_task(task) is task


def test_bad_requests(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    path.write_text("{}")
    for arguments, message in (
        (("sudoku",), r"task: must be one of chain, .*, <path>.jsonl, got 'sudoku'; datasets of reasoning-gym without"),
        (
            (3,),
            r"task: must be a name or have the methods of rl.tasks.base.Task, got a int without .*; names are",
        ),
        (("reasoning_gym:sudokus",), r"dataset: must be one of .*sudoku.*, got 'sudokus'"),
    ):
        with pytest.raises(TaskError, match=message):
            make_task(*arguments)
    with pytest.raises(TaskError, match=r"options: must be arguments of the task '.*', got .*field.*; it takes prompt"):
        make_task(str(path), field="q")
    with pytest.raises(TaskError, match=r"options: must be left out beside a task that exists already, got seed; give"):
        make_task(make_task("chain_sum"), seed=1)


def test_importing_the_tasks_loads_nothing_heavy():
    code = "import sys, rl.tasks; print(*({'torch', 'reasoning_gym', 'sympy', 'regex'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_an_object_that_is_no_task_hears_what_it_lacks():
    class Half:
        name, size = "half", None

        def sample(self, split, index): ...

        def reward(self, sample, completion): ...

    with pytest.raises(TaskError, match="got a Half without find_answer, oracle; names are chain"):
        make_task(Half())  # type: ignore[arg-type]
