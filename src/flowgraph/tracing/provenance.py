"""What was run: model, choices and versions as JSON values."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flowgraph.capacities.registry import find_capacity
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regions
from flowgraph.tracing.trace_options import TraceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGES = ("flowgraph-llm", "torch", "transformers", "torch-geometric")


def provenance_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    regions: Regions,
    layers: tuple[int, ...],
    options: TraceOptions,
    encoded: EncodedText,
) -> dict[str, Any]:
    """Describe what was run, with which choices and versions, as plain JSON values.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: None for a trace of ids alone.
        regions: their selectors are recorded.
        layers: indices of the layers that were read.
        options: the other choices.
        encoded: the text, which records how it was made.
    """
    return {
        "model": model_name(model),
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "text": dict(encoded.origin),
        "capacity": options.capacity,
        "score": find_capacity(options.capacity).score,
        "layers": list(layers),
        "heads": str(options.heads or "mean"),
        "edge_weight": options.edge_weight,
        "preset": options.preset,
        # The rules that apply, after the overrides of the preset.
        "rows": options.rules.rows,
        "self_attention": options.rules.self_attention,
        "first_token": options.rules.first_token,
        "normalization": options.rules.normalization,
        "question_selector": regions.question_selector,
        "answer_selector": regions.answer_selector,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def model_name(model: PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from, or its class where it was built in memory."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def package_versions() -> dict[str, str]:
    """Return the installed versions of flowgraph and of the packages that decide its numbers."""
    return {package: version(package) for package in _PACKAGES}
