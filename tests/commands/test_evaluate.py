"""The command ``flowgraph evaluate``: lists, tables at 100 columns, messages, exit codes, and how a run continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flowgraph import InvalidInputError, MissingExtraError, OutputError
from flowgraph.commands import evaluate as module
from tests.fixtures import evaluation as toys
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PLUGIN = """
from tests.fixtures.evaluation import register_toys
register_toys()
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The command as the application registers it; returns (exit code, stdout, stderr)."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.evaluate)
    checkpoint = save_tiny(tmp_path / "checkpoint")
    monkeypatch.setenv("COLUMNS", "100")

    def run_it(*arguments: object) -> tuple[int, str, str]:
        given = [*map(str, arguments), "--model", str(checkpoint)]
        result = CliRunner().invoke(app, given)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    with toys.registries():
        toys.register_toys()
        yield run_it


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_command_prints_a_table_that_fits_and_writes_files(call, tmp_path: Path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    options = ("--tasks", "toy", "--methods", "toy_right, toy_constant,toy_position", "--items", 6, "--out", out)
    code, printed, err = call(*options, "--full", "--figures")
    assert code == 0
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    lines = printed.splitlines()
    assert lines[0] == "toy (test)"
    head = next(line for line in lines if line.startswith("method"))
    assert "- toy_" in head
    assert "p" in head.split()
    assert next(line for line in lines if line.startswith("toy_right")).split()[-1] == "6"
    assert any(line.startswith("toy_position*") for line in lines)
    assert "other metrics" in printed
    assert "2 scores compared on test" in squeezed(printed)
    assert "undefined on some items, left out pairwise: toy_constant 6" in squeezed(printed)
    assert "6/6 items" in err
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["toy-test.png"]
    assert json.loads((out / "table.json").read_text())["methods"][:2] == ["toy_right", "toy_constant"]

    # The same command computes nothing, and a quiet one prints a line a task.
    stamps = [path.stat().st_mtime_ns for path in sorted(out.glob("items/*/*/*.json"))]
    code, printed, err = call(*options, "--quiet")
    assert code == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("items/*/*/*.json"))] == stamps
    assert squeezed(printed).startswith("toy (test): toy_right .")
    assert "control toy_" in printed
    assert "items/s" not in err


def test_dev_says_that_it_is_for_choosing(call):
    _, printed, _ = call("-t", "toy", "-M", "toy_right,toy_position", "-n", 2, "--split", "dev")
    assert "dev: for choosing; read test once for what was chosen" in squeezed(printed)
    assert "2 items: too few for intervals, which need 5" in squeezed(printed)


def test_a_fault_of_a_method_is_printed_and_ends_with_code_1(call):
    code, printed, err = call("-t", "toy", "-M", "toy_right,toy_breaks", "-n", 2)
    assert code == 1
    assert "got method toy_breaks: KeyError: 'no such key' (2)" in squeezed(err)
    assert "toy_breaks skipped on 2 items" in squeezed(printed)


def test_the_list_names_tasks_methods_and_presets(call):
    code, printed, _ = call("--list")
    assert code == 0
    for text in ("toy", "Digits of the prompt are the truth.", "toy_noise", "(control)", "gives edges", "preset:all"):
        assert text in squeezed(printed), text


def test_bad_options_are_refused_before_the_model_is_loaded(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    good = ("-t", "toy", "-M", "toy_right")
    for options, message in (
        ((), "--tasks must name at least one of them, got none; `flowgraph evaluate --list` prints them"),
        (("-t", "toy"), "--methods must name at least one"),
        ((*good, "--figures"), "--figures needs a folder, got no --out; name one"),
        ((*good, "--full", "--quiet"), "--full and --quiet must not be given together"),
        (
            (*good, "--import", "nowhere.py"),
            "--import must be a Python file or module, got 'nowhere.py', which is no file",
        ),
        (
            (*good, "--import", "no_such_module"),
            "got 'no_such_module' (No module named 'no_such_module'); check the name",
        ),
    ):
        code, _, err = call(*options)
        assert code == 2
        assert message in squeezed(err.replace("│", " ")), err
    (tmp_path / "broken.py").write_text("def")
    code, _, err = call(*good, "--import", tmp_path / "broken.py")
    assert code == 2
    assert "correct the file" in squeezed(err.replace("│", " "))
    with pytest.raises(InvalidInputError, match=r"tasks: must be of toy, .*got 'nothing'|got 'nothing'; register"):
        call("-t", "nothing", "-M", "toy_right")
    with pytest.raises(InvalidInputError, match="split: must be 'dev', 'test' or 'both', got 'train'"):
        call(*good, "--split", "train")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="out: must be a folder that can be"):
        call(*good, "--out", tmp_path / "file")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="--figures: needs matplotlib, got an environment without it; pip"):
        call(*good, "--figures", "--out", tmp_path / "out")


def test_planted_models_need_no_model_and_have_known_values(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    options = ("--planted", "--methods", "relevance,attention:one_hop,recency", "--items", 2)
    code, printed, err = call(*options, "--out", tmp_path / "out", "--full")
    assert code == 0
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    lines = printed.splitlines()
    head = next(line for line in lines if line.startswith("method"))
    assert head.split()[1:] == ["copy", "induction", "two_hop", "generated_hop"]
    # Relevance keeps attention constant, so that it finds one of the two tokens of an induction.
    assert next(line for line in lines if line.startswith("relevance")).split()[1:] == ["1.00", ".50", "1.00", "1.00"]
    assert any(line.startswith("recency*") for line in lines)
    assert "| copy | relevance | 1.00 |" in printed
    assert "planted two_hop: 3 methods on 2 texts" in squeezed(err)

    payload = json.loads((tmp_path / "out" / "planted.json").read_text())
    assert payload["schema"] == "flowgraph-planted/1"
    assert payload["settings"] == {"number": 2, "seed": 0}
    assert len(payload["rows"]) == 4 * 3
    (row,) = [row for row in payload["rows"] if (row["kind"], row["method"]) == ("copy", "relevance")]
    assert (row["num_items"], row["error"]) == (2, None)
    assert row["figures"]["recovered"] == 1
    assert payload["rows"][-1]["figures"]["edge_auroc"] is None

    code, printed, err = call("--planted", "--methods", "recency", "--items", 1, "--quiet")
    assert code == 0
    assert printed.startswith("recency: copy ")
    assert len(printed.splitlines()) == 1
    assert err == ""


def test_what_planted_models_refuse(call, tmp_path: Path):
    code, printed, _ = call("--planted", "--methods", "toy_refuses, toy_right", "--items", 2)
    assert code == 0
    kinds = "copy, induction, two_hop, generated_hop"
    assert f"toy_refuses has no value for {kinds}: method: must have an even item" in squeezed(printed)
    code, printed, _ = call("--planted", "--methods", "toy_refuses", "--items", 2)
    assert code == 1
    for options in (("--tasks", "toy"), ("--split", "dev"), ("--figures",)):
        code, _, err = call("--planted", "--methods", "recency", *options)
        assert code == 2
        message = f"--planted has texts of its own and no figure, got {options[0]}; leave one out"
        assert message in squeezed(err.replace("│", " "))
    with pytest.raises(InvalidInputError, match="number: must be at least 1, got 0; 8 is the default"):
        call("--planted", "--methods", "recency", "--items", 0)
    with pytest.raises(InvalidInputError, match=r"methods: must be of .*, got 'nothing'; register"):
        call("--planted", "--methods", "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="out: must be a folder that can be"):
        call("--planted", "--methods", "recency", "--out", tmp_path / "file")


def test_a_killed_command_continues_to_the_same_table(call, tmp_path: Path):
    """SIGKILL in the middle of a run of the program, then the same command: the table of a run never killed."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}

    options = ["-q", "-t", "toy", "-M", "toy_right,toy_noise", "-n", "12", "--out"]

    def start() -> subprocess.Popen:
        arguments = [*options, str(tmp_path / "out"), "-m", str(tmp_path / "checkpoint")]
        program = [sys.executable, "-m", "flowgraph.cli", "evaluate", "--import", str(tmp_path / "plugin.py")]
        return subprocess.Popen([*program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    killed = start()
    records = tmp_path / "out" / "items" / "toy" / "test"
    while killed.poll() is None and len(list(records.glob("test-*.json"))) < 3:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 3 <= len(list(records.glob("test-*.json"))) < 12
    assert not (tmp_path / "out" / "table.json").exists()
    again = start()
    assert again.communicate()[1] == b""
    assert again.returncode == 0
    assert call(*options, tmp_path / "whole")[0] == 0
    for name in ("table.json", "table.csv", "index.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
