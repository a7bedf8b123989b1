"""Settings of the commands that sample responses and train nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl.commands.run_file import parse_options
from rl.config import PPOConfig
from rl.policy.shipped_models import SHIPPED_MODELS


def rollout_config(model: str, defaults: Mapping[str, Any], settings: Sequence[str]) -> PPOConfig:
    """Return the settings of rollouts: group advantages, the defaults of the command and model, then NAME=VALUE texts.

    Raises:
        ConfigError: an unknown setting, or a value that breaks a rule.
    """
    values: dict[str, Any] = {"advantage": "group", **defaults}
    if model in SHIPPED_MODELS:
        values |= SHIPPED_MODELS[model].settings
    return PPOConfig.from_dict({**values, **parse_options(settings)})
