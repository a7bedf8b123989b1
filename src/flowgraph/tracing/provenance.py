"""What was run: model, choices and versions as JSON values."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.text.regions import Regions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def provenance_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    regions: Regions,
    layers: tuple[int, ...],
    heads: Any,
    edge_weight: str,
    preset: str,
    rules: EdgeRules,
) -> dict[str, Any]:
    """What was run, with which choices and versions, as plain JSON values."""
    config = model.config  # type: ignore[union-attr]
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": type(tokenizer).__name__ if tokenizer is not None else None,
        "layers": list(layers),
        "heads": heads if isinstance(heads, str) else str(heads),
        "edge_weight": edge_weight,
        "preset": preset,
        "rows": rules.rows,
        "self_attention": rules.self_attention,
        "first_token": rules.first_token,
        "question_selector": regions.question_selector,
        "answer_selector": regions.answer_selector,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flowgraph-llm", "torch", "transformers", "torch-geometric")},
        },
    }
