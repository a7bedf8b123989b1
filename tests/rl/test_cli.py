"""The entry point as a user meets it: help, exit codes, messages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from rl.cli import app, main
from tests.fixtures.policies import alphabet, tiny_policy
from tests.fixtures.rl_commands import SHORT, SMALL, invoke

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RunMain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunMain:
    """The complete command in this process; (exit code, stdout, stderr with its lines joined)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowgraph-rl", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


def test_help_says_what_there_is():
    shown = invoke("--help").output
    for name in (*COMMANDS, "Exit codes"):
        assert name in shown
    assert invoke(code=2).output.count("Usage") == 1, "without a command: help, and exit code 2"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_every_option(name: str):
    shown = invoke(name, "--help").output
    for parameter in COMMANDS[name].params:
        for option in parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown, re.IGNORECASE), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "config: must be a YAML file, got none.yaml (No such file or directory)"),
        (["train", "--set", "steps"], "--set: must look like NAME=VALUE, got 'steps'"),
        (["train", "--set", "lora=5", "--set", "lora.rank=3"], "lora: must be a mapping of names to values, got int"),
        (["train", "--set", "clip=-1"], "clip: must be positive, got -1.0"),
        (["train", "--steps", "0"], "steps: must be at least 1, got 0"),
        (["train", "--model", "none/at/all"], "model: must be a folder or a name that transformers can load"),
        (["train", "--model", "MODEL", "--credit", "flwo"], "credit: must name a registered rule, got 'flwo'"),
        (["train", "--model", "MODEL", "--task", "sums"], "task: must be one of chain, chain_sum"),
        (["train", "--model", "MODEL", "--task-option", "hop=2"], "options: must be arguments of the task 'chain'"),
        (["train", "--model", "MODEL", "--task-option", "hops"], "--task-option: must look like NAME=VALUE, got"),
        (["train", "--model", "MODEL", "--set", "lora.targets=[q]"], "lora.targets: must name linear layers"),
        (["train", "--model", "MODEL", "--set", "max_response_tokens=600"],
         "max_response_tokens: must leave room"),
        (["train", "--model", "MODEL", "--output", "RUN"], "output: must be a new folder, got RUN, which"),
        (["train", "--model", "MODEL", "--output", "RUN/run.yaml"], "output: must be a folder, got the file RUN/run"),
        (["train", "--model", "MODEL", "--output", "RUN/run.yaml/x"],
         "output: must be a folder that can be"),
        (["train", "--model", "MODEL", "--output", "RUN", "--resume", "--seed", "3"],
         "resume: the settings must be"),
        (["train", "--tracker", "excel"], "trackers: must be among tensorboard, wandb, trackio, got 'excel'"),
        (["train", "--model", "MODEL", "--device", "gpu"], "device: must be one that torch can use here, got 'gpu'"),
        (["eval", "--model", "MODEL", "--device", "cuda:99"], "device: must be one that torch can use here, got"),
        (["eval", "--model", "MODEL", "--dtype", "int8"], "dtype: must be one of auto, float32, bfloat16"),
        (["eval", "--model", "MODEL", "-n", "0"], "num_problems: must be at least 1, got 0"),
        (["eval", "--model", "MODEL", "-k", "2"], "samples: must be 1 at temperature 0, got 2"),
        (["eval", "--model", "MODEL", "--max-response-tokens", "0"], "max_response_tokens: must be at least 1, got 0"),
        (["eval", "--model", "MODEL", "--temperature", "nan"], "temperature: must be finite and at least 0, got nan"),
        (["eval", "--model", "MODEL", "--adapter", "MODEL"], "adapter: must be a run, a checkpoint or a PEFT"),
        (["eval", "--model", "OTHER", "--adapter", "RUN"], "adapter: must be a PEFT folder that fits the model"),
        (["eval", "--model", "MODEL", "--adapter", "BROKEN"], "adapter: must be a PEFT folder that fits the model"),
        (["eval", "--model", "MODEL", "-n", "1", "--max-response-tokens", "4", "--out", "none/x.jsonl"],
         "out: its folder must exist, got none/x.jsonl; make it first"),
        (["merge", "RUN", "--model", "MODEL", "--out", "RUN"], "out: must be a new folder, got RUN, which exists"),
        (["merge", "MODEL", "--model", "MODEL", "--out", "new"], "adapter: must be a run, a checkpoint or a PEFT"),
        (["report", "MODEL"], "source: must be a rollout file or a run that wrote some, got MODEL; train with"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_its_message(
    run_main: RunMain, trained_run: Path, saved_model: Path, tmp_path: Path, arguments: list[str], message: str
):
    other, broken = tmp_path / "other", tmp_path / "broken"
    if "OTHER" in arguments:
        tiny_policy("gpt2").save_pretrained(other)
        alphabet().save_pretrained(other)
    if "BROKEN" in arguments:
        broken.mkdir()
        (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
        (broken / "adapter_model.safetensors").write_bytes(b"short")
    places = {"MODEL": saved_model, "RUN": trained_run, "OTHER": other, "BROKEN": broken}

    def named(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    code, printed, complaint = run_main(*map(named, arguments))
    assert code == 2, complaint
    assert complaint.count("flowgraph-rl: ") == 1
    assert named(message) in complaint
    assert "Traceback" not in complaint + printed


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from rl.cli import main; main()", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "share=2"], "flowgraph-rl: share: must be a setting of PPOConfig, got an unknown name"),
        (["trian"], "No such command 'trian'"),
        (["train", "--stepz", "3"], "No such option"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["eval", "--model", "MODEL", "-n", "0"], "flowgraph-rl: num_problems: must be at least 1, got 0"),
    ],
)
def test_a_process_ends_with_code_2_and_one_message(saved_model: Path, arguments: list[str], message: str):
    named = [str(saved_model) if argument == "MODEL" else argument for argument in arguments]
    done = subprocess.run(command(*named), capture_output=True, text=True, timeout=120, env=environment(), check=False)
    complaint = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert message in complaint
    assert complaint.startswith(("flowgraph-rl: ", "Usage: ")), complaint
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_interrupt_says_how_to_go_on(saved_model: Path, tmp_path: Path):
    settings = [*SMALL, "--set", "save_every=1", "--steps", 100000, "--output", tmp_path / "run"]
    arguments = command("train", "--model", saved_model, *SHORT, *settings)
    # A shell that runs the suite in the background has interrupts ignored, and children inherit that.
    place = arguments.index("-c") + 1
    arguments[place] = f"import signal; signal.signal(2, signal.default_int_handler); {arguments[place]}"
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            until = time.monotonic() + 100
            while not list(tmp_path.glob("run/checkpoint-*")) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, complaint
    assert "flowgraph-rl: stopped; `train --resume` goes on from the newest checkpoint" in complaint
    assert "Traceback" not in complaint
