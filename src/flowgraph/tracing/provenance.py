"""What was run: model, choices and versions as JSON values."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowgraph.capacities.registry import find_capacity
from flowgraph.flow.compositions import ComposedScores
from flowgraph.text.regions import Regions
from flowgraph.tracing.recapture import RECORD, capture_record
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
) -> dict[str, Any]:
    """Describe what was run, with which choices and versions, as plain JSON values.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: None for a trace of ids alone.
        regions: their selectors are recorded.
        layers: indices of the layers that were read.
        options: the other choices.
    """
    return {
        "model": model_name(model),
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "capacity": options.capacity,
        "capacity_options": {name: _plain(value) for name, value in (options.capacity_options or {}).items()},
        "score": find_capacity(options.capacity).score,
        "layers": list(layers),
        "heads": str(options.heads or "mean"),
        "edge_weight": options.edge_weight,
        RECORD: capture_record(options, layers),
        "preset": options.preset,
        # The rules that apply, after the overrides of the preset.
        "rows": options.rules.rows,
        "self_attention": options.rules.self_attention,
        "first_token": options.rules.first_token,
        "normalization": options.rules.normalization,
        "question_selector": regions.question_selector,
        "answer_selector": regions.answer_selector,
        "answer_by": regions.answer_by,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _plain(value: Any) -> Any:
    """Return a JSON value as it is, and the text of anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def composition_record(composed: ComposedScores) -> dict[str, Any]:
    """Describe a composition as plain JSON values: its name, all of its options, and its residual."""
    options = {}
    for name, value in composed.options.items():
        options[name] = value.tolist() if isinstance(value, Tensor) else value
    return {"name": composed.name, "options": options, "residual": composed.residual}


def model_name(model: PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from, or its class where it was built in memory."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def package_versions() -> dict[str, str]:
    """Return the installed versions of flowgraph and of the packages that decide its numbers."""
    return {package: version(package) for package in _PACKAGES}
