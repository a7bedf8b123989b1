"""The command ``flowgraph trace-corpus``: exit codes, messages, and how a run continues."""

import json
from pathlib import Path

import pytest

import flowgraph
from flowgraph import CorpusRay, InvalidInputError
from flowgraph.commands.trace_corpus import CorpusCommand
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
    app.command(cls=CorpusCommand)(command)
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


class ReachedError(Exception):
    """The library is called; the argument is its choice of Ray."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, ray: CorpusRay | None, **__: object) -> None:
        raise ReachedError(ray)

    monkeypatch.setattr("flowgraph.corpus.corpus_ray.check_ray_installed", lambda: None)
    monkeypatch.setattr(flowgraph, "trace_corpus", stop)


def test_an_address_after_ray_is_optional_wherever_it_stands(call, reached: None, tmp_path: Path):
    path = write(tmp_path / "in.jsonl", LINES)
    for given, address in (
        (("--ray", path), "local"),
        ((path, "--ray"), "local"),
        (("--ray", "auto", path), "auto"),
        ((path, "--ray", "10.0.0.1:6379", "--plain"), "10.0.0.1:6379"),
        ((path, "--ray=[::1]:6379"), "[::1]:6379"),
    ):
        with pytest.raises(ReachedError) as found:
            call(*given)
        (choice,) = found.value.args
        assert choice.address == address
        assert (choice.workers, choice.threads, choice.retries, choice.device) == (None, None, 3, "cpu")
    with pytest.raises(ReachedError) as found:
        call(path)
    assert found.value.args == (None,)
    options = ("--ray-workers", 4, "--ray-threads", 2, "--ray-retries", 0, "--object-store-memory", 10**9)
    with pytest.raises(ReachedError) as found:
        call(path, "--ray", *options, "--device", "cpu")
    (choice,) = found.value.args
    assert (choice.workers, choice.threads, choice.retries, choice.object_store_memory) == (4, 2, 0, 10**9)
    # A worker loads the model of the command by itself.
    model, tokenizer = choice.load()
    assert model.config.vocab_size == 360
    assert tokenizer("apples")["input_ids"]


def test_options_that_do_not_fit_ray_are_refused_before_the_model_is_loaded(call, reached: None, tmp_path: Path):
    path = write(tmp_path / "in.jsonl", LINES)
    code, _, err = call(path, "--ray-workers", 2)
    assert code == 2
    assert "--ray-workers must stand with --ray, got 2 without; add --ray" in err.replace("│ ", "").replace(" │", "")
    code, _, err = call(path, "--object-store-memory", 10**9)
    assert code == 2
    assert "--object-store-memory must stand with --ray" in err.replace("│ ", "").replace(" │", "")
    with pytest.raises(InvalidInputError, match=r"device: must be 'cpu' or 'cuda' on Ray, .* got 'cuda:1'; choose one"):
        call(path, "--ray", "--device", "cuda:1")
    with pytest.raises(InvalidInputError, match="ray: address must be that of the cluster itself, got 'ray://head:1'"):
        call("--ray", "ray://head:1", path)
    with pytest.raises(InvalidInputError, match="ray: address must be HOST:PORT, 'auto' or 'local', got 'head'"):
        call("--ray=head", path)
