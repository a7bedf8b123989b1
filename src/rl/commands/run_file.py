"""Read a run from a YAML file, flags and settings, and find the files that a run wrote.

Precedence: ``NAME=VALUE`` settings override flags, flags override the file, the file overrides the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rl.config import PPOConfig
from rl.errors import CheckpointError, ConfigError
from rl.policy.shipped_models import SHIPPED_MODELS, default_model
from rl.training.checkpoint import find_checkpoints

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")
"""What YAML 1.1 reads as a number to the base 60, and YAML 1.2 as text."""

_TEXT_SETTINGS = ("model", "task", "output", "quantize")
"""Settings of a run that are text, even where the text looks like a number."""


@dataclass(frozen=True)
class Run:
    """A training run as the command line describes it.

    Attributes:
        model: a name, a folder, or a shipped model.
        task: name or file of a task.
        output: folder of the run.
        config: settings of the trainer.
        task_options: arguments of the task.
        quantize: "4bit", or None for the base's own dtype.
    """

    model: str
    task: str
    output: Path
    config: PPOConfig
    task_options: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def to_yaml(self) -> str:
        """Return all settings, defaults included, as YAML; the same text starts the same run."""
        import yaml

        settings = {
            "model": self.model,
            "task": self.task,
            "task_options": self.task_options,
            "output": str(self.output),
            "quantize": self.quantize,
            **self.config.to_dict(),
        }
        return yaml.safe_dump(settings, sort_keys=False)


def read_run(
    path: Path | None,
    flags: Mapping[str, Any],
    *,
    credit: str | None,
    settings: Sequence[str],
    task_options: Sequence[str],
) -> Run:
    """Read a YAML file, overridden by flags, overridden by ``NAME=VALUE`` settings.

    Args:
        path: the YAML file; None: defaults only.
        flags: values by name; None is a flag that was not given.
        credit: a credit rule; None: as the file names it.
        settings: ``NAME=VALUE``, with dots for settings inside a setting.
        task_options: ``NAME=VALUE``, arguments of the task.

    Raises:
        ConfigError: a missing file, invalid YAML, an unknown setting, or a value that breaks a rule.
    """
    # Merge the sources, the strongest last.
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(path)
    for name, value in flags.items():
        if value is not None:
            values[name] = value
    if credit is not None:
        _set_nested(values, ["credit", "rule"], credit)
    for name, value in parse_options(settings).items():
        _set_nested(values, name.split("."), value)

    # Take out the settings of the run; what is left belongs to PPOConfig.
    options = _require_mapping("task_options", values.pop("task_options", None))
    options |= parse_options(task_options, flag="--task-option")
    text = _pop_text_settings(values)
    task = text.get("task", "chain")
    model = text.get("model") or default_model(task)
    if model in SHIPPED_MODELS:
        values = {**SHIPPED_MODELS[model].settings, **values}
    config = PPOConfig.from_dict(values)

    # A colon, as in reasoning_gym:NAME, is not allowed in file names everywhere.
    task_name = Path(task).stem.replace(":", "-")
    output = text.get("output", f"runs/{task_name}-{config.credit.rule}")
    return Run(
        model=model,
        task=task,
        output=Path(output),
        config=config,
        task_options=options,
        quantize=text.get("quantize"),
    )


def parse_options(options: Sequence[str], *, flag: str = "--set") -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts; values are YAML, such as ``[2,4]``, ``0.5``, ``true`` or text.

    Args:
        options: the texts; of equal names the last one counts.
        flag: name of the flag, for error messages.

    Raises:
        ConfigError: a text without ``=``, or with invalid YAML after it.

    Example:
        >>> parse_options(["hops=[2,4]", "rate=1e-4"])
        {'hops': [2, 4], 'rate': 0.0001}
        >>> parse_options(["level=4:0"])
        {'level': '4:0'}
    """
    import yaml

    values: dict[str, Any] = {}
    for option in options:
        name, sign, text = option.partition("=")
        if not sign or not name:
            example = "credit.strength=2" if flag == "--set" else "hops=[2,4]"
            raise ConfigError(f"{flag}: must look like NAME=VALUE, got {option!r}; for example {example}")
        try:
            value = yaml.load(text, _yaml_loader())
        # An impossible date is a ValueError, deep nesting a RecursionError.
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{flag}: {name} must have a YAML value, got {text!r}; put text in quotes") from error
        values[name.replace("-", "_")] = _read_numbers(value)
    return values


def policy_folder(path: Path) -> Path:
    """Return the PEFT folder of a run (its newest checkpoint), of a checkpoint, or the PEFT folder itself.

    Raises:
        CheckpointError: the path holds no policy.
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


def optional_policy_folder(path: Path | None) -> Path | None:
    """Return :func:`policy_folder` of a path, and None for None."""
    if path is None:
        return None
    return policy_folder(path)


def newest_rollout(path: Path) -> Path:
    """Return a rollout file itself, or the newest one of a run.

    Raises:
        CheckpointError: the path holds no rollout.
    """
    if path.is_file():
        return path
    # Step numbers are padded with zeros, so the order of names is the order of steps.
    rollouts = sorted((path / "rollouts").glob("step-*.safetensors"))
    if not rollouts:
        raise CheckpointError(
            f"source: must be a rollout file or a run that wrote some, got {path}; train with --set report_every=10"
        )
    return rollouts[-1]


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file; an empty file has none."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader())
    except OSError as error:
        raise ConfigError(f"config: must be a YAML file, got {path} ({error.strerror}); check the name") from error
    # Invalid UTF-8 and impossible dates are ValueErrors, deep nesting is a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config: must be YAML, got {path}, which is not ({error}); correct it") from error

    values = _require_mapping("config", content)
    for name, value in values.items():
        if name not in _TEXT_SETTINGS:
            values[name] = _read_numbers(value)
    return values


@cache
def _yaml_loader() -> Any:
    """Return the safe loader of YAML, which reads 4:0 as text and not as 240, as YAML 1.2 does."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain values without numbers to the base 60."""

    # The first pattern that fits decides; they are listed by the first character of the text.
    Loader.yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", _BASE_60), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _pop_text_settings(values: dict[str, Any]) -> dict[str, str]:
    """Remove model, task and output from the settings and return those that are given."""
    text: dict[str, str] = {}
    for name in _TEXT_SETTINGS:
        value = values.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ConfigError(f"{name}: must be text, got {value!r}; put it in quotes")
        text[name] = value
    return text


def _require_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a copy of a mapping; None, which YAML reads where nothing is written, is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name}: must be a mapping of names to values, got {type(value).__name__}; write NAME: VALUE"
        )
    return dict(value)


def _read_numbers(value: Any) -> Any:
    """Convert texts such as 1e-4 to numbers, at any depth: YAML 1.1 reads them as text."""
    if isinstance(value, dict):
        return {name: _read_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_read_numbers(inner) for inner in value]
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set_nested(values: dict[str, Any], names: list[str], value: Any) -> None:
    """Set a value inside nested mappings, which are created where they are missing."""
    *outer, last = names
    for name in outer:
        inner = values.get(name)
        # ``credit: flow`` is short for ``credit: {rule: flow}``.
        if name == "credit" and isinstance(inner, str):
            inner = {"rule": inner}
        values[name] = _require_mapping(name, inner)
        values = values[name]
    values[last] = value
