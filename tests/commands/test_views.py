"""How much the commands print: a screen by default, one line with --quiet, everything with --full."""

import sys
from pathlib import Path

import pytest
import typer

from flowgraph.commands.views import View
from tests.fixtures.figures import make_trace
from tests.fixtures.tiny import PROMPT, RESPONSE, save_tiny

ONE_SCREEN = 27


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command in a terminal of 80 columns; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> tuple[int, str, str]:
        from flowgraph.cli import main

        monkeypatch.setattr(sys, "argv", ["flowgraph", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_trace_fits_a_screen_and_full_prints_the_rest(run, checkpoint: Path, tmp_path: Path):
    options = ("trace", PROMPT, "-m", checkpoint, "--response", RESPONSE, "--relevance")
    code, brief, _ = run(*options, "--out", tmp_path)
    assert code == 0
    assert "answer: '7'" in brief
    assert "certificate: all " in brief
    assert "--full prints" in brief
    assert f"wrote {tmp_path / 'trace.html'} (open it in a browser), trace.json, trace.safetensors" in brief
    code, full, _ = run(*options, "--full")
    assert code == 0
    assert "influence on the answer" in full
    assert "residual" in full
    assert len(full.splitlines()) > 2 * len(brief.splitlines())
    assert len(run("show", tmp_path / "trace.safetensors")[1].splitlines()) <= ONE_SCREEN
    assert "all tokens" in run("show", tmp_path / "trace.safetensors", "--all")[1]


def test_quiet_prints_one_line_and_no_progress(run, checkpoint: Path, tmp_path: Path):
    code, printed, progress = run(
        "trace", PROMPT, "-m", checkpoint, "--response", RESPONSE, "--out", tmp_path, "--quiet"
    )
    assert (code, printed, progress) == (0, "7\n", "")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".safetensors"]
    file = tmp_path / "trace.safetensors"
    assert run("show", file, "-q") == (0, "7\n", "")
    code, printed, progress = run("certify", file, "-q")
    assert (code, printed.startswith("certificate: all "), printed.count("\n"), progress) == (0, True, 1, "")
    for command in (("steps", file), ("compare", file, file), ("knockout", file, "-m", checkpoint, "--tokens", "40")):
        code, printed, progress = run(*command, "-q")
        assert code == 0
        assert printed.count("\n") <= 2  # a line of more than 80 characters is folded
        assert progress == ""


def test_quiet_and_full_contradict_each_other(run):
    for command in (("trace", "x"), ("demo",), ("show", "x"), ("steps", "x"), ("compare", "x", "y")):
        code, _, said = run(*command, "--full", "--quiet")
        assert code == 2
        assert "--full and --quiet must not be given together" in " ".join(said.replace("│", " ").split())
    with pytest.raises(typer.BadParameter):
        View(all_tokens=True, quiet=True)


@pytest.mark.parametrize("texts", [("word ",), ("a\n",), ("x" * 300,), ("\n\n\n",), ("汤",)])
def test_any_text_fits_a_screen(run, tmp_path: Path, texts: tuple[str, ...]):
    trace = make_trace(700, 40, 1, texts)
    trace.save(tmp_path / "t.safetensors")
    _, printed, _ = run("show", tmp_path / "t.safetensors")
    assert len(printed.splitlines()) <= ONE_SCREEN
    assert "tokens before]" in printed
    assert len(run("steps", tmp_path / "t.safetensors")[1].splitlines()) <= ONE_SCREEN


def test_a_long_answer_leaves_room_for_the_rest(run, tmp_path: Path):
    make_trace(400, 40, 300).save(tmp_path / "t.safetensors")
    _, printed, _ = run("show", tmp_path / "t.safetensors")
    assert len(printed.splitlines()) <= ONE_SCREEN
    assert "widest routes" in printed


def test_a_failed_check_is_printed_in_every_view(run, checkpoint: Path, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    run("trace", PROMPT, "-m", checkpoint, "--response", RESPONSE, "--out", tmp_path, "-q")
    path = tmp_path / "trace.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["g"] = tensors["g"] * 1.01
    save_file(tensors, path, metadata)
    code, printed, _ = run("certify", path, "-q")
    assert code == 1
    assert "FAIL" in printed
    assert "✗" in printed
    assert "✓" not in printed
