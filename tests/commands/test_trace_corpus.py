"""The command ``flowgraph trace-corpus``: exit codes, messages, and how a run continues."""

import json
from pathlib import Path

import pytest

from flowgraph import InvalidInputError
from flowgraph.commands.trace_corpus import trace_corpus as command
from tests.fixtures.tiny import PROMPT, RESPONSE, save_tiny

LINES = [
    {"id": "first", "prompt": PROMPT, "response": RESPONSE},
    {"prompt": "Tom has 3 apples. How many?", "response": "Tom has 3, so the answer is 3."},
    {"id": "short", "prompt": "3 + 4?", "response": "7", "answer": 7},
    {"id": "long", "prompt": PROMPT * 3, "response": RESPONSE * 3},
]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The command as the application will register it; returns (exit code, stdout, stderr)."""
    import typer
    from typer.testing import CliRunner

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    checkpoint = save_tiny(tmp_path / "checkpoint")

    def run_it(*arguments: object) -> tuple[int, str, str]:
        given = [*map(str, arguments), "--model", str(checkpoint), "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, given)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())

    return run_it


def test_the_command(call, tmp_path: Path):
    renamed = [{"q": line["prompt"], "a": line["response"], "answer": "nowhere"} for line in LINES[:2]]
    path = write(tmp_path / "in.jsonl", [*renamed, "not json"])
    options = (path, "--prompt-field", "q", "--response-field", "a", "--answer-field", "")
    code, out, err = call(*options)
    assert code == 1
    assert "2 traced in 0:" in out
    assert "1 failed; open" in out
    assert "line 3 skipped: line: must be one JSON object" in err
    assert "2/3 traced, 1 failed," in err
    assert "traces/s" in err
    assert "tokens/s, 0:00 left" in err
    code, out, _ = call(*options)
    assert (code, "0 traced in 0:" in out, "2 by earlier runs" in out) == (1, True, True)
    with pytest.raises(InvalidInputError, match=r"got damping '0\.5' and not '1\.0'"):
        call(*options, "--damping", "0.5")
    write(path, renamed)
    code, out, _ = call(*options, "--restart", "--format", "csv", "--html")
    assert (code, "failed" in out) == (0, False)
    assert len(list((tmp_path / "out" / "traces").iterdir())) == 4


def test_the_command_when_every_line_is_bad(call, tmp_path: Path):
    code, _, err = call(write(tmp_path / "in.jsonl", ["{}", "x"]))
    assert code == 1
    assert "flowgraph: no line could be traced; line 1: 'prompt' or 'messages': must be given" in err
    assert (tmp_path / "out" / "errors.jsonl").read_text().count("\n") == 2


def test_control_c_tells_how_to_continue(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "in.jsonl", LINES)
    from flowgraph.corpus.run import Run

    real = Run._finish

    def interrupted(self: Run, *arguments) -> None:
        if self.now == 2:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(Run, "_finish", interrupted)
    code, _, err = call(path)
    assert code == 130
    assert "stopped; everything finished is in" in err
    assert "run the same command to continue" in err
    monkeypatch.undo()
    code, out, _ = call(path)
    assert (code, "2 by earlier runs" in out) == (0, True)
