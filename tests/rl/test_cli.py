"""The command line as a user meets it: exit codes, messages, files that plain libraries read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.main
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rl.cli import app
from rl.credit.registry import rule_names
from rl.training.tracking import read_metrics
from tests.fixtures.policies import alphabet, tiny_policy

ROOT = Path(__file__).parents[2]
# A random model earns nothing on this task: the bonus for entropy is what moves the weights.
SETTINGS = ("num_prompts=2", "group_size=2", "max_response_tokens=6", "lora.rank=2", "learning_rate=1e-2",
            "advantage=rloo", "report_every=1", "entropy_coefficient=1")  # fmt: skip
SMALL = [part for setting in SETTINGS for part in ("--set", setting)]
SHORT = ["--task", "chain", "--task-option", "hops=[1,1]", "--task-option", "num_variables=2"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
Main = Callable[..., tuple[int, str, str]]


def invoke(*arguments: object, code: int = 0):
    """Run the command in this process; its own complaints stay exceptions."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The whole command in this process; (exit code, stdout, stderr with its lines joined)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from rl.cli import main

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_policy(context=512).save_pretrained(folder)
    alphabet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    invoke(
        "train",
        "--model",
        model,
        *SHORT,
        "--credit",
        "flow",
        "--steps",
        2,
        "--output",
        folder,
        "--device",
        "cpu",
        *SMALL,
    )
    return folder


def test_help_says_what_there_is():
    shown = invoke("--help").output
    for name in (*COMMANDS, "Exit codes"):
        assert name in shown
    assert invoke(code=2).output.count("Usage") == 1, "no command: help, and no success"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_every_option(name: str):
    shown = invoke(name, "--help").output
    for parameter in COMMANDS[name].params:
        for option in parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown, re.IGNORECASE), option


def test_rules_lists_all_of_them():
    shown = invoke("rules").output
    for name in rule_names():
        assert re.search(rf"^\s*{name}\s", shown, re.MULTILINE), name
    assert "a backward pass" in shown
    assert "ground truth" in shown


def test_train_writes_metrics_checkpoints_rollouts_and_its_settings(run: Path):
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert (run / "checkpoint-000002" / "policy" / "adapter_config.json").is_file()
    assert len(list((run / "rollouts").iterdir())) == 2
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert (settings["task"], settings["task_options"]["hops"], settings["lora"]["rank"]) == ("chain", [1, 1], 2)
    assert settings["learning_rate"] == 0.01


def test_a_longer_run_resumes_and_equals_one_that_never_stopped(run: Path, model: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ["--model", model, *SHORT, "--credit", "flow", *SMALL]
    invoke("train", *common, "--steps", 3, "--output", whole)
    invoke("train", *common, "--steps", 2, "--output", cut)
    result = invoke("train", *common, "--steps", 3, "--output", cut, "--resume")
    assert "resumed after step 2" in result.stderr
    assert [row["step"] for row in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3]
    ends = [load_file(folder / "checkpoint-000003" / "policy" / "adapter_model.safetensors") for folder in (whole, cut)]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name
    before = load_file(run / "checkpoint-000002" / "policy" / "adapter_model.safetensors")
    assert any(not torch.equal(weight, ends[0][name]) for name, weight in before.items())
    again = invoke("train", whole / "run.yaml", "--output", cut, "--resume")
    assert "resumed after step 3" in again.stderr


def test_a_finished_run_without_its_metrics_still_ends_well(run: Path, model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    invoke("train", "--model", model, *SHORT, *SMALL, "--steps", 1, "--output", folder)
    (folder / "metrics.jsonl").unlink()
    assert "metrics and checkpoints in" in invoke("train", folder / "run.yaml", "--resume").output


def test_a_step_in_which_nothing_was_learned_is_summed_up(model: Path, tmp_path: Path):
    settings = ["--set", "truncated=mask", "--set", "max_response_tokens=1", "--output", tmp_path / "run", "--steps", 1]
    assert "reward" in invoke("train", "--model", model, *SHORT, *SMALL, *settings).output


def test_show_settings_prints_them_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shown = invoke("train", "--show-settings", "--set", "credit.share=0.5", "--credit", "entropy").output
    assert yaml.safe_load(shown)["credit"]["share"] == 0.5
    assert yaml.safe_load(shown)["credit"]["rule"] == "entropy"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.yaml").write_text(shown)
    assert invoke("train", "run.yaml", "--show-settings").output == shown


def test_eval_prints_json_and_writes_every_response(run: Path, model: Path, tmp_path: Path):
    common = ["eval", "--model", model, *SHORT, "-n", 3, "--max-response-tokens", 6]
    plain = json.loads(invoke(*common, "--json").stdout)
    assert plain["num_problems"] == 3
    assert set(plain) == {"reward", "low", "high", "best_of", "num_problems", "samples", "answer_share",
                          "truncated_share", "response_tokens"}  # fmt: skip
    out = tmp_path / "responses.jsonl"
    tuned = invoke(*common, "--adapter", run, "--temperature", 1, "-k", 2, "--out", out)
    assert "best of 2" in tuned.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    alone = json.loads(
        invoke(*common[:-4], "-n", 1, "-k", 2, "--temperature", 1, "--max-response-tokens", 6, "--json").stdout,
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert alone["high"] > 0.7, "one problem says next to nothing"


def test_merge_and_adapter_are_what_plain_libraries_read(run: Path, model: Path, tmp_path: Path):
    out = tmp_path / "deep" / "merged"
    assert f"wrote {out}" in "".join(invoke("merge", run, "--model", model, "--out", out).output.split("\n"))
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    ids = torch.tensor([alphabet()("a=1;b=a+2;b?")["input_ids"]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model)
        untouched = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(run / "checkpoint-000002" / "policy"))(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - untouched).abs().max() > 1e-3


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
    main: Main, run: Path, model: Path, tmp_path: Path, arguments: list[str], message: str
):
    other, broken = tmp_path / "other", tmp_path / "broken"
    if "OTHER" in arguments:
        tiny_policy("gpt2").save_pretrained(other)
        alphabet().save_pretrained(other)
    if "BROKEN" in arguments:
        broken.mkdir()
        (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
        (broken / "adapter_model.safetensors").write_bytes(b"short")
    places = {"MODEL": model, "RUN": run, "OTHER": other, "BROKEN": broken}

    def named(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    code, printed, complaint = main(*map(named, arguments))
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
def test_a_process_ends_with_code_2_and_one_message(model: Path, arguments: list[str], message: str):
    named = [str(model) if argument == "MODEL" else argument for argument in arguments]
    done = subprocess.run(command(*named), capture_output=True, text=True, timeout=120, env=environment(), check=False)
    complaint = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert message in complaint
    assert complaint.startswith(("flowgraph-rl: ", "Usage: ")), complaint
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_interrupt_says_how_to_go_on(model: Path, tmp_path: Path):
    arguments = command("train", "--model", model, *SHORT, *SMALL, "--steps", 100000, "--output", tmp_path / "run",
                        "--set", "save_every=1")  # fmt: skip
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


def test_the_shipped_model_is_evaluated_with_no_option_at_all():
    figures = json.loads(invoke("eval", "-n", 2, "--json").stdout)
    assert figures["num_problems"] == 2
    assert figures["truncated_share"] == 0.0
