"""What a run writes down survives a kill, and what it shows needs no terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest

from flowgraph import MissingExtraError, OutputError
from rl import ConfigError
from rl.training.tracking import TRACKERS, Display, MetricsFile, check_trackers, read_metrics


def rows(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "reward": step / 10}) + "\n" for step in steps)


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize(("finished", "kept"), [(0, []), (2, [1, 2]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_a_resume_drops_the_lines_beyond_the_checkpoint(path: Path, finished: int, kept: list[int]):
    path.write_text(rows(1, 2, 3, 4))
    file = MetricsFile(path, finished)
    assert steps(path) == kept
    file.write({"step": finished + 1, "reward": 0.5})
    assert steps(path) == [*kept, finished + 1]
    assert path.read_text().endswith("\n")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "cut", ['{"step": 3, "rew', '{"step": 3', "{", "3", "null", '["step"]', '{"reward": 1}', "\n", "\udcff"]
)
def test_a_last_line_that_is_no_row_is_left_out(path: Path, cut: str):
    path.write_bytes(rows(1, 2).encode() + cut.encode(errors="surrogateescape"))
    assert steps(path) == [1, 2]
    MetricsFile(path, 5).write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_numbers_that_json_does_not_know_become_null(path: Path):
    MetricsFile(path, 0).write({"step": 1, "kl": float("nan"), "ratio": float("inf"), "reward": 0.25, "note": "x"})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "kl": None, "ratio": None, "reward": 0.25, "note": "x"}


def test_a_full_disk_is_named(path: Path):
    file = MetricsFile(path, 0)
    file.path = Path("/dev/full")
    with pytest.raises(
        OutputError, match=r"output: metrics must fit into /dev/full, got: .*; make room there and resume"
    ):
        file.write({"step": 1})
    with pytest.raises(OutputError, match="its folder must exist"):
        MetricsFile(path.parent / "gone" / "metrics.jsonl", 0)


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch):
    assert check_trackers([]) == []
    with pytest.raises(
        ConfigError, match=r"trackers: must be among tensorboard, wandb, trackio, got 'mlflow'; metrics.jsonl"
    ):
        check_trackers(["mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(MissingExtraError, match=f"trackers: '{name}' needs a package .* pip install {name}"):
            check_trackers([name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert check_trackers(("wandb", "trackio")) == ["wandb", "trackio"]


def test_without_a_terminal_plain_lines_are_written_now_and_then(capsys: pytest.CaptureFixture[str]):
    with Display(30, 0, enabled=True) as display:
        for step in range(1, 31):
            display.show(
                {"step": step, "reward": 0.5, "kl_reference": None, "clip_share": 0.125, "entropy": float("nan")}
            )
        display.message("[bold]as it is[/bold]")
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == ""
    assert 2 <= len(lines) <= 4, "not one line for each of thirty fast steps"
    assert lines[-2] == "step 30/30: reward 0.500, clipped 12.5%, entropy nan, 0 s left"
    assert lines[-1] == "[bold]as it is[/bold]"


def test_a_display_that_is_off_shows_nothing(capsys: pytest.CaptureFixture[str]):
    with Display(1, 0, enabled=False) as display:
        display.show({"step": 1, "reward": 1.0})
        display.message("hidden")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_live_and_markup_stays_text(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Display(4, 2, enabled=True) as display:
        display.show({"step": 3, "reward": 0.75, "tokens_per_second": 1234.5})
        display.message("saved [3]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "reward 0.750, tokens/s 1234" in shown
    assert "3/4" in shown
    assert "saved [3]" in shown
    assert "step 3/4" not in shown


def test_the_line_stops_when_the_run_breaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    display = Display(4, 0, enabled=True)
    with pytest.raises(ZeroDivisionError), display:
        raise ZeroDivisionError
    assert display._progress.finished is False
    assert not display._progress.live.is_started
