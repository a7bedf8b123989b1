"""A run is a YAML file, overridden by flags, overridden by settings; whatever is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl import CheckpointError, ConfigError
from rl.commands.run_file import Run, newest_rollout, parse_options, policy_folder, read_run


def read(
    path: Path | None = None, *settings: str, credit: str | None = None, options: tuple[str, ...] = (), **flags
) -> Run:
    return read_run(path, flags, credit=credit, settings=settings, task_options=options)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_win_over_flags_and_flags_over_the_file(tmp_path: Path):
    path = written(
        tmp_path,
        "model: base\ntask: countdown\noutput: here\nsteps: 5\nseed: 1\nlearning_rate: 1e-4\n"
        "credit: {rule: entropy, strength: 2}\ntask_options: {hops: [1, 2], max_addend: 3}\n",
    )
    plain = read(path)
    assert (plain.model, plain.task, plain.output) == ("base", "countdown", Path("here"))
    assert (plain.config.steps, plain.config.seed, plain.config.learning_rate) == (5, 1, 1e-4)
    assert (plain.config.credit.rule, plain.config.credit.strength) == ("entropy", 2.0)
    assert plain.task_options == {"hops": [1, 2], "max_addend": 3}
    flagged = read(path, credit="random", steps=6, model=None, output="there", options=("hops=[2,3]",))
    assert (flagged.config.steps, flagged.config.seed, flagged.model, flagged.output) == (6, 1, "base", Path("there"))
    assert (flagged.config.credit.rule, flagged.config.credit.strength) == ("random", 2.0)
    assert flagged.task_options == {"hops": [2, 3], "max_addend": 3}
    every = ("steps=7", "credit.rule=flow", "credit.share=0.5", "model=other", "lora.rank=4", "task_options.seed=9")
    settled = read(path, *every, credit="random", steps=6)
    assert (settled.config.steps, settled.config.lora.rank, settled.model) == (7, 4, "other")
    assert (settled.config.credit.rule, settled.config.credit.share, settled.config.credit.strength) == (
        "flow",
        0.5,
        2.0,
    )
    assert settled.task_options["seed"] == 9


def test_a_task_of_the_package_brings_its_model_and_its_limits(tmp_path: Path):
    for task, limit in (("chain", 48), ("wandering", 128), ("pathsearch", 64), ("program", 48)):
        run = read(task=task)
        assert (run.model, run.config.max_response_tokens, run.config.learning_rate) == (task, limit, 1e-3)
        assert run.output == Path(f"runs/{task}-flow")
    assert read(task="countdown").model == "chain"
    assert read(task="wandering", model="base").config.max_response_tokens == 256
    assert read(task="wandering", model="chain").model == "chain"
    assert read(None, "max_response_tokens=100", task="wandering").config.max_response_tokens == 100


def test_levels_are_text_and_no_numbers_to_the_base_60(tmp_path: Path):
    """YAML 1.1 reads 4:0 as 240, and 0:5 as text."""
    for level in ("4:0", "0:5", "2:2"):
        run = read(task="wandering", options=(f"level={level}",))
        assert run.task_options == {"level": level}
        assert read(written(tmp_path, run.to_yaml())).task_options == {"level": level}
        assert read(written(tmp_path, f"task_options: {{level: {level}}}")).task_options == {"level": level}
    assert parse_options(["a=190:20:30.15", "b=-1:30", "c=12", "d=1_000", "e=1.5", "f=0x1F", "g=[1:30, 2]"]) == {
        "a": "190:20:30.15", "b": "-1:30", "c": 12, "d": 1000, "e": 1.5, "f": 31, "g": ["1:30", 2],
    }  # fmt: skip


def test_credit_may_be_a_name_and_then_have_settings(tmp_path: Path):
    path = written(tmp_path, "credit: entropy\n")
    assert read(path).config.credit.rule == "entropy"
    assert read(path, "credit.strength=3").config.credit.rule == "entropy"
    assert read(path, "credit=random", "credit.strength=3").config.credit.strength == 3.0
    assert read(path, credit="flow").config.credit.rule == "flow"


def test_defaults():
    run = read()
    assert (run.model, run.task, run.output) == ("chain", "chain", Path("runs/chain-flow"))
    assert run.config.max_response_tokens == 48
    assert read(None, "max_response_tokens=9").config.max_response_tokens == 9
    assert read(model="other").config.max_response_tokens == 256
    assert read(task="folder/my.jsonl", credit="random").output == Path("runs/my-random")
    assert read(task="reasoning_gym:chain_sum").output == Path("runs/reasoning_gym-chain_sum-flow")


def test_empty_files_and_empty_entries_mean_the_defaults(tmp_path: Path):
    assert read(written(tmp_path, "")) == read()
    assert read(written(tmp_path, "# nothing\nmodel:\noutput:\ntask_options:\n")) == read()


def test_the_same_yaml_starts_the_same_run(tmp_path: Path):
    run = read(None, "credit.options.window=10", "lora.targets=[q_proj]", "kl_target=0.1", "max_grad_norm=.inf",
               options=("hops=[2,4]",), seed=3)  # fmt: skip
    assert read(written(tmp_path, run.to_yaml())) == run


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4"])
def test_scientific_notation_is_a_number_everywhere(tmp_path: Path, text: str):
    assert read(None, f"learning_rate={text}").config.learning_rate == 1e-4
    assert read(written(tmp_path, f"learning_rate: {text}\n")).config.learning_rate == 1e-4
    options = read(written(tmp_path, f"credit: {{options: {{rate: {text}, many: [{text}]}}}}\n")).config.credit.options
    assert options == {"rate": 1e-4, "many": [1e-4]}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("a=1", 1), ("a=", None), ("a=true", True), ("a=[2,4]", [2, 4]), ("a=x=y", "x=y"), ("a={b: 1e2}", {"b": 100.0}),
        ("a=text", "text"), ("a='3'", "3"), ("a=null", None), ("a=e", "e"), ("a=1e400", float("inf")),
    ],
)  # fmt: skip
def test_options_are_yaml(option: str, value: Any):
    assert parse_options([option]) == {"a": value}


def test_dashes_in_names_are_underscores_and_the_last_one_counts():
    assert parse_options(["max-response-tokens=3", "max_response_tokens=4"]) == {"max_response_tokens": 4}


@pytest.mark.parametrize("text", ["[1, 2]", "word", "3", "true"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="config: must be a mapping of names to values, got"):
        read(written(tmp_path, text))


@pytest.mark.parametrize(
    "content", [b"a: [", b"a: b: c", b"\xff\xfe\x00", b"a: 2001-13-45", b"? {a: 1}\n: 2\n", b"[" * 5000]
)
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="config: must be"):
        read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"config: must be a YAML file, got .*none.yaml \(No such file.*\); check the name"
    ):
        read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"config: must be a YAML file, got .* \(Is a directory\)"):
        read(tmp_path)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["steps"], "--set: must look like NAME=VALUE, got 'steps'; for example credit.strength=2"),
        (["=3"], "--set: must look like NAME=VALUE, got '=3'"),
        (["steps=[1"], r"--set: steps must have a YAML value, got '\[1'; put text in quotes"),
        (["steps=2001-99-99"], "--set: steps must have a YAML value, got '2001-99-99'"),
        (["steps=many"], "steps: must be int, got 'many'"),
        (["credit.gamma=2"], "credit.gamma: must be a setting of CreditConfig"),
        (["steps.x=2"], "steps: must be a setting of PPOConfig|steps: must be int"),
        (["seed=1", "seed.x=2"], "seed: must be a mapping of names to values, got int"),
        (["lora=5", "lora.rank=2"], "lora: must be a mapping of names to values, got int"),
        (["lora=all", "lora.rank=2"], "lora: must be a mapping of names to values, got str"),
        (["credit=[flow]", "credit.share=1"], "credit: must be a mapping of names to values, got list"),
        (["credit..share=1"], "credit.: must be a setting of CreditConfig"),
        (["output=3"], "output: must be text, got 3; put it in quotes"),
        (["model=[a]"], r"model: must be text, got \['a'\]"),
        (["task=2001-01-01"], "task: must be text, got datetime.date"),
        (["task_options=3"], "task_options: must be a mapping of names to values, got int"),
        (["task_options=0"], "task_options: must be a mapping of names to values, got int"),
    ],
)
def test_settings_that_break_a_rule_are_named(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        read(None, *settings)


def test_task_options_are_named_by_their_own_flag():
    with pytest.raises(
        ConfigError, match=r"--task-option: must look like NAME=VALUE, got 'hops'; for example hops=\[2,4\]"
    ):
        read(options=("hops",))


def test_policy_folder_finds_the_newest_policy(tmp_path: Path):
    for name in ("checkpoint-000002/policy", "checkpoint-000010/policy", "checkpoint-000010-001"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("checkpoint-000002/policy", "checkpoint-000010/policy"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    newest = tmp_path / "checkpoint-000010" / "policy"
    assert policy_folder(tmp_path) == newest
    assert policy_folder(newest) == newest
    assert policy_folder(newest.parent) == newest
    assert policy_folder(tmp_path / "checkpoint-000002") == tmp_path / "checkpoint-000002" / "policy"


@pytest.mark.parametrize("name", ["empty", "none", "file"])
def test_a_place_without_a_policy_is_refused(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"adapter: must be a run, a checkpoint or a PEFT folder, got .*; train first"
    ):
        policy_folder(tmp_path / name)


def test_newest_rollout(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"source: must be a rollout file or a run .*; train with --set report_every"
    ):
        newest_rollout(tmp_path)
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in (5, 20, 10):
        (folder / f"step-{step:06d}.safetensors").touch()
    (folder / "step-000030.tmp").touch()
    assert newest_rollout(tmp_path) == folder / "step-000020.safetensors"
    assert newest_rollout(folder / "step-000005.safetensors") == folder / "step-000005.safetensors"
    with pytest.raises(CheckpointError, match="source: must be"):
        newest_rollout(tmp_path / "none")
