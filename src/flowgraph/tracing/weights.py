"""Which weights were run: adapters, quantisation, and a digest that tells a model from its fine-tuned versions."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLED = 64
"""Values of each parameter that enter the digest of the weights."""

_ADAPTER_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "base_model_name_or_path",
    "revision",
)
"""Fields of an adapter's configuration that are recorded, where it has them."""

_digests: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, dict[str, Any]]] = weakref.WeakKeyDictionary()
"""The last record of each model, with the versions of its weights."""


def weights_record(model: PreTrainedModel) -> dict[str, Any]:
    """Describe the weights of a model as plain JSON values.

    Args:
        model: the transformers model, without wrappers.

    Returns:
        ``weights``: digest of 64 evenly spaced values of every parameter, None where weights are offloaded; it differs
        between a model and its merged or fine-tuned versions, and between dtypes.
        ``adapters``: of each active adapter, by name, its type, rank, targets and a digest of all its weights.
        ``quantization``: method, bits and settings, or None.

    Cost: one small read of every parameter and one of the adapters; nothing where no weight changed since.
    """
    layers = list(_adapter_layers(model))
    parameters = dict(model.named_parameters())
    # The state of the weights: which tensors, how often each was edited in place, and which adapters apply.
    tensors = tuple((name, id(parameter), _version(parameter)) for name, parameter in parameters.items())
    adapters = tuple((id(layer), tuple(_active(layer)), _merged(layer)) for _, layer in layers)
    version = (tensors, adapters)
    # In the same state the record is the same, and the digest need not be computed again.
    known = _digests.get(model)
    if known is not None and known[0] == version:
        return dict(known[1])

    record = {
        "weights": _sampled_digest(parameters),
        "adapters": _adapters(model, layers),
        "quantization": _quantization(model),
    }
    _digests[model] = (version, record)
    return dict(record)


def _version(parameter: Tensor) -> int | None:
    """Return how often a parameter was edited in place; None where that is not counted."""
    return None if parameter.is_inference() else parameter._version


def _sampled_digest(parameters: Mapping[str, Tensor]) -> str | None:
    """Hash some values of every parameter; None where a parameter is not in memory."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        if parameter.is_meta:
            return None
        values = parameter.detach().reshape(-1)
        step = max(1, values.numel() // _SAMPLED)
        _add(digest, name, values[::step][:_SAMPLED], parameter.shape)
    return f"sha256:{digest.hexdigest()[:32]}"


def _add(digest: Any, name: str, values: Tensor, shape: Sequence[int]) -> None:
    """Add a tensor to a hash: its name, dtype, shape and bytes."""
    digest.update(f"{name} {values.dtype} {tuple(shape)}".encode())
    as_bytes = values.contiguous().view(torch.uint8) if values.numel() else values.new_empty(0, dtype=torch.uint8)
    digest.update(as_bytes.cpu().numpy().tobytes())


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that hold weights of adapters, with their names. PEFT marks them by this attribute."""
    for name, module in model.named_modules():
        if getattr(module, "adapter_layer_names", None):
            yield name, module


def _active(layer: Any) -> list[str]:
    """List the adapters of a layer that are in effect."""
    if getattr(layer, "disable_adapters", False):
        return []
    active = getattr(layer, "active_adapters", [])
    return [active] if isinstance(active, str) else list(active)


def _merged(layer: Any) -> tuple[str, ...]:
    """List the adapters of a layer whose weights were added to the base weights."""
    return tuple(getattr(layer, "merged_adapters", ()) or ())


def _adapters(model: PreTrainedModel, layers: Sequence[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Describe each adapter that is active, or merged into the base weights, in some layer, by name."""
    # A dictionary without values keeps each name once, in order.
    names: dict[str, None] = {}
    for _, layer in layers:
        for name in (*_active(layer), *_merged(layer)):
            names[name] = None

    # One record per adapter: its settings, whether it is merged, and a digest of its weights.
    configs = getattr(model, "peft_config", None) or {}
    records = {}
    for name in sorted(names):
        config = configs.get(name) if isinstance(configs, Mapping) else None
        records[name] = {
            **_adapter_config(config),
            "merged": any(name in _merged(layer) for _, layer in layers),
            "digest": _adapter_digest(name, layers),
        }
    return records


def _adapter_config(config: Any) -> dict[str, Any]:
    """Return the type of an adapter and the settings that decide its weights."""
    if config is None:
        return {"type": None}
    kind = getattr(config, "peft_type", None)
    fields: dict[str, Any] = {"type": getattr(kind, "value", kind)}
    for field in _ADAPTER_FIELDS:
        value = getattr(config, field, None)
        if value:
            fields[field] = _plain(value)
    return fields


def _adapter_digest(name: str, layers: Sequence[tuple[str, Any]]) -> str | None:
    """Hash all weights and scalings of an adapter; None where weights are not in memory."""
    digest = hashlib.sha256()
    for place, layer in layers:
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, Mapping) and name in scaling:
            digest.update(f"{place} scaling {scaling[name]}".encode())
        for part in layer.adapter_layer_names:
            holder = getattr(layer, part, None)
            # Holders are dictionaries by adapter: of modules, or of parameters.
            if holder is None or not hasattr(holder, "keys") or name not in holder:
                continue
            weights = holder[name]
            tensors = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else {"": weights}
            for key, tensor in sorted(tensors.items()):
                if tensor.is_meta:
                    return None
                _add(digest, f"{place}.{part}.{key}", tensor.detach().reshape(-1), tensor.shape)
    return f"sha256:{digest.hexdigest()[:32]}"


def _quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """Describe how the weights were quantised; None for a model that is not."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    settings = config if isinstance(config, Mapping) else config.to_dict()
    method = settings.get("quant_method")
    bits = settings.get("bits")
    # bitsandbytes states its bits by flags.
    if bits is None and settings.get("load_in_4bit"):
        bits = 4
    if bits is None and settings.get("load_in_8bit"):
        bits = 8
    return {
        "method": str(getattr(method, "value", method)),
        "bits": bits,
        "settings": {str(key): _plain(value) for key, value in sorted(settings.items())},
    }


def _plain(value: Any) -> Any:
    """Return a JSON value: sets sorted, anything unknown as text."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
