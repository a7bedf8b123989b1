"""What was run: model, choices and versions as JSON values."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jaxtyping import Int64
from torch import Tensor

from flowgraph.attention.modules import context_length
from flowgraph.capacities.registry import find_capacity
from flowgraph.flow.compositions import ComposedScores
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regions
from flowgraph.tracing.generation import end_tokens
from flowgraph.tracing.recapture import RECORD, capture_record
from flowgraph.tracing.trace_options import TraceOptions
from flowgraph.tracing.weights import weights_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGES = ("flowgraph-llm", "torch", "transformers", "torch-geometric")


def provenance_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    regions: Regions,
    layers: tuple[int, ...],
    options: TraceOptions,
    response: Mapping[str, Any],
    encoded: EncodedText,
) -> dict[str, Any]:
    """Describe what was run, with which choices and versions, as plain JSON values.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: None for a trace of ids alone.
        regions: their selectors are recorded.
        layers: indices of the layers that were read.
        options: the other choices.
        response: how the response was made, from :func:`response_record`.
        encoded: the text, which records how it was made.
    """
    # Options may hold selectors or tensors; a record holds plain JSON values.
    capacity_options = {}
    for name, value in (options.capacity_options or {}).items():
        capacity_options[name] = _plain(value)
    dtype = next(model.parameters()).dtype
    return {
        "model": model_name(model),
        "architecture": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        **weights_record(model),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "text": dict(encoded.origin),
        "capacity": options.capacity,
        "capacity_options": capacity_options,
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
        **response,
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


def response_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    response: Int64[Tensor, " response"],
    *,
    was_generated: bool,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Describe how a response was made, and whether it ended by itself.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: its tokenizer, or None.
        response: ids of the response.
        was_generated: whether this run generated it, instead of reading it.
        max_new_tokens: the limit of a generated response.

    Returns:
        ``response``: "generated" or "given"; ``truncated``: whether it was cut off before an end token; ``stop``: what
        ended it. The last two are None for a given response, of which they are unknown.
    """
    # A chat template closes a given text with an end token, which says nothing about how the text was made.
    if not was_generated:
        return {"response": "given", "truncated": None, "stop": None}

    last = int(response[-1])
    if last in end_tokens(model, tokenizer):
        return {"response": "generated", "truncated": False, "stop": f"end token {last}"}
    if response.numel() >= max_new_tokens:
        stop = f"max_new_tokens={max_new_tokens}"
    else:
        stop = f"context of {context_length(model)} tokens"
    return {"response": "generated", "truncated": True, "stop": stop}


def describe_response(provenance: Mapping[str, Any]) -> str | None:
    """Describe in one line how the response was made; None where the provenance does not say."""
    made = provenance.get("response")
    if made is None:
        return None
    truncated = provenance.get("truncated")
    stop = provenance.get("stop")
    if truncated:
        return f"{made}, cut off by {stop} before it ended"
    if truncated is False:
        return f"{made}, ended by itself ({stop})"
    return str(made)


def warn_if_truncated(record: Mapping[str, Any], stacklevel: int) -> None:
    """Warn where a generated response was cut off, so that its last line is not taken for its answer unawares."""
    if record["truncated"]:
        warnings.warn(
            f"max_new_tokens: the response should end by itself, got one cut off by {record['stop']}, so its answer "
            "may be missing; raise max_new_tokens, or pass the response",
            stacklevel=stacklevel,
        )


def model_name(model: PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from, or its class where it was built in memory."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def package_versions() -> dict[str, str]:
    """Return the installed versions of flowgraph and of the packages that decide its numbers."""
    return {package: version(package) for package in _PACKAGES}
