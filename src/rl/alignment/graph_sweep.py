"""List the attention graphs that a credit rule may read, for a sweep over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from rl.config import CreditConfig
from rl.credit.registry import find_rule
from rl.errors import ConfigError

POWERS = (1, 2, 4, 8)
HEADS = ("max", "mean")
_MOST_SINGLE_LAYERS = 8
"""In a model with more layers, only ranges of layers are tried."""


def graphs_of(setting: CreditConfig, model: nn.Module) -> list[CreditConfig]:
    """Return one setting for each graph: of layers and heads, and of powers for rules on the sharpened graph.

    Args:
        setting: rule, shape and all options that are not swept.
        model: whose layers are counted.

    Raises:
        ConfigError: the rule reads no attention.

    Example:
        >>> import rl
        >>> model, _ = rl.load_chain_model()
        >>> [graph.layers for graph in graphs_of(CreditConfig(rule="reach"), model)[::2]]
        ['all', '1-', 'middle', '0-0', '1-1', '2-2', '3-3']
    """
    rule = find_rule(setting.rule)
    if not rule.needs:
        raise ConfigError(
            f"rules: must read attention to be swept over graphs, got {setting.rule!r}, which reads none; leave it "
            "out, or measure it without a sweep"
        )
    # The sharpened graph is named by options of the rule, others by settings.
    is_sharp = any(need.power is not None for need in rule.needs.values())
    graphs = []
    for layers in _layer_choices(model):
        # The power only matters to rules that have one.
        for heads in HEADS:
            if not is_sharp:
                graphs.append(replace(setting, layers=layers, heads=heads))
                continue
            for power in POWERS:
                options: dict[str, Any] = {**setting.options, "power": power, "heads": heads, "layers": layers}
                graphs.append(replace(setting, options=options))
    return graphs


def _layer_choices(model: nn.Module) -> list[str]:
    """List the layers that a sweep tries, as texts."""
    config: Any = model.config
    num_layers: int = config.get_text_config().num_hidden_layers
    choices = ["all"]
    if num_layers > 1:
        choices.append("1-")
    if num_layers > 2:
        choices.append("middle")
    if num_layers <= _MOST_SINGLE_LAYERS:
        return choices + [f"{layer}-{layer}" for layer in range(num_layers)]
    # The lower half, the upper half, and the last quarter.
    half = num_layers // 2
    quarter = num_layers - num_layers // 4
    return [*choices, f"0-{half - 1}", f"{half}-", f"{quarter}-"]
