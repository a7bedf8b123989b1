"""What a run is, as a YAML file and flags say it: model, task, folder and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config import PPOConfig
from rl.errors import CheckpointError, ConfigError
from rl.training.checkpoint import find_checkpoints

CHAIN_DEFAULTS = {"max_response_tokens": 48, "learning_rate": 1e-3}
"""For the shipped model, whose context is short and whose few weights take larger steps than a language model's."""
_OWN = ("model", "task", "output")
"""Settings of a run that are text, and stay so if they look like numbers."""


@dataclass(frozen=True)
class Run:
    """A run from the command line.

    Attributes:
        model: a name, a folder, or "chain".
        task: a task's name or file.
        task_options: of the task.
        output: folder of the run.
        config: everything else.
    """

    model: str
    task: str
    output: Path
    config: PPOConfig
    task_options: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """All settings, defaults included; the same file starts the same run."""
        import yaml

        own = {"model": self.model, "task": self.task, "task_options": self.task_options, "output": str(self.output)}
        return yaml.safe_dump(own | self.config.to_dict(), sort_keys=False)


def read_run(
    path: Path | None,
    flags: Mapping[str, Any],
    *,
    credit: str | None,
    settings: Sequence[str],
    task_options: Sequence[str],
) -> Run:
    """A YAML file, overridden by flags, overridden by ``NAME=VALUE`` settings.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown setting, or a value that breaks a rule.
    """
    values: dict[str, Any] = {} if path is None else _read_yaml(path)
    values |= {name: value for name, value in flags.items() if value is not None}
    if credit is not None:
        _put(values, ["credit", "rule"], credit)
    for name, value in parse_options(settings).items():
        _put(values, name.split("."), value)
    options = values.pop("task_options", None)
    options = _mapping("task_options", {} if options is None else options)
    options |= parse_options(task_options, flag="--task-option")
    own = {name: value for name in _OWN if (value := values.pop(name, None)) is not None}
    for name, value in own.items():
        if not isinstance(value, str):
            raise ConfigError(f"{name}: must be text, got {value!r}; put it in quotes")
    model, task = own.get("model", "chain"), own.get("task", "chain")
    if model == "chain":
        values = {**CHAIN_DEFAULTS, **values}
    config = PPOConfig.from_dict(values)
    name = Path(task).stem.replace(":", "-")
    output = Path(own.get("output", f"runs/{name}-{config.credit.rule}"))
    return Run(model=model, task=task, output=output, config=config, task_options=options)


def parse_options(options: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """``NAME=VALUE`` strings; values are read as YAML, so ``[2,4]``, ``0.5``, ``true`` and text all work.

    Example:
        >>> parse_options(["hops=[2,4]", "rate=1e-4"])
        {'hops': [2, 4], 'rate': 0.0001}

    Raises:
        ConfigError: no ``=`` in it, or no YAML after it; the message names the flag.
    """
    import yaml

    out: dict[str, Any] = {}
    for option in options:
        name, sign, text = option.partition("=")
        if not sign or not name:
            example = "credit.strength=2" if flag == "--set" else "hops=[2,4]"
            raise ConfigError(f"{flag}: must look like NAME=VALUE, got {option!r}; for example {example}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
            raise ConfigError(f"{flag}: {name} must have a YAML value, got {text!r}; put text in quotes") from error
        out[name.replace("-", "_")] = _number(value)
    return out


def policy_folder(path: Path) -> Path:
    """The PEFT folder of a run, a checkpoint, or itself.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "adapter_config.json").is_file():
        return path
    for folder in [path, *find_checkpoints(path)]:
        if (folder / "policy" / "adapter_config.json").is_file():
            return folder / "policy"
    raise CheckpointError(
        f"adapter: must be a run, a checkpoint or a PEFT folder, got {path}, which holds none; train first, or "
        "give the folder with adapter_config.json"
    )


def newest_rollout(path: Path) -> Path:
    """A rollout file, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    found = sorted((path / "rollouts").glob("step-*.safetensors"))
    if not found:
        raise CheckpointError(
            f"source: must be a rollout file or a run that wrote some, got {path}; train with --set report_every=10"
        )
    return found[-1]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: must be a YAML file, got {path} ({error.strerror}); check the name") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bad UTF-8 and impossible dates are ValueErrors
        raise ConfigError(f"config: must be YAML, got {path}, which is not ({error}); mend it") from error
    values = _mapping("config", {} if values is None else values)
    return {name: value if name in _OWN else _number(value) for name, value in values.items()}


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name}: must be a mapping of names to values, got {type(value).__name__}; write NAME: VALUE"
        )
    return dict(value)


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for text; people do not."""
    if isinstance(value, dict):
        return {name: _number(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _put(values: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        inner = values.get(name)
        if name == "credit" and isinstance(inner, str):
            inner = {"rule": inner}
        values[name] = _mapping(name, {} if inner is None else inner)
        values = values[name]
    values[names[-1]] = value
