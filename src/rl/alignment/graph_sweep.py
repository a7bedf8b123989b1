"""List the attention graphs that a credit rule may read, for a sweep over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from rl.config import CreditConfig
from rl.credit.registry import find_rule
from rl.errors import ConfigError

SHARP_REACH = "reach_sharp"
SHARP_RULES = ("flow_sharp", "max_attention_sharp", SHARP_REACH, "shuffled_flow_sharp")
"""Rules on the sharpened graph, whose options name it."""

GRAPH_OPTIONS = ("power", "heads", "layers", "place")
"""Options of these rules that change the graph; ``normalization`` scales its rows."""

POWERS = (1, 2, 4, 8)
HEADS = ("max", "mean")
_MOST_SINGLE_LAYERS = 8
"""In a model with more layers, only ranges of layers are tried."""


def has_sharp_graph(setting: CreditConfig) -> bool:
    """Tell whether a setting reads the sharpened graph."""
    return setting.rule in SHARP_RULES


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
    if not find_rule(setting.rule).needs:
        raise ConfigError(
            f"rules: must read attention to be swept over graphs, got {setting.rule!r}, which reads none; leave it out, "
            "or measure it without a sweep"
        )
    graphs = []
    for layers in _layer_choices(model):
        for heads in HEADS:
            if not has_sharp_graph(setting):
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
