"""Find the attention modules of a causal LM inside its wrappers, and read its numbers of layers and heads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowgraph.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NUMBER_IN_NAME = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_SCALED_ROPE = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rotary embeddings of transformers that are scaled for longer texts."""
_CROSS_ATTENTION = re.compile(r"cross|encoder_attn")


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside compiled, data-parallel and PEFT wrappers.

    Raises:
        CaptureError: not a transformers model, not a decoder-only language model, or one with a prompt adapter.
    """
    from transformers import PreTrainedModel

    inner = _unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise CaptureError(
            f"model: must be a Hugging Face PreTrainedModel, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"model: must be decoder-only, got the encoder-decoder {type(inner).__name__}; its answer reads the "
            "question through cross-attention, so load a decoder-only model with AutoModelForCausalLM"
        )
    if inner.get_output_embeddings() is None or not _is_causal(inner):
        raise CaptureError(
            f"model: must be a causal language model, got {type(inner).__name__}; load it with AutoModelForCausalLM"
        )
    return inner


def _unwrapped(model: nn.Module) -> nn.Module:
    """Remove wrappers, in any order and number, and refuse prompt adapters."""
    while True:
        # torch.compile keeps the original module in this attribute.
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            adapter = getattr(model, "active_peft_config", None)
            if getattr(adapter, "is_prompt_learning", False):
                raise CaptureError(
                    f"model: must have adapters on its weights, got prompt learning ({type(adapter).__name__}); its "
                    "virtual tokens stand outside the text, so trace a LoRA-like adapter or the base model"
                )
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes share the weights of a model: FSDP2, tensor parallelism or DeepSpeed ZeRO-3.

    Such weights are complete only while their module runs, and only in a pass that all processes make together.
    """
    # A DTensor has the method; DeepSpeed numbers the weights that it partitions.
    return any(hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") for weight in model.parameters())


def _is_causal(model: PreTrainedModel) -> bool:
    """Return whether a model with a language model head is causal; BERT-like models with such a head are not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return False
    # Models that may be either state it in is_decoder; their attention modules then are causal or not.
    if getattr(model.config, "is_decoder", None) is not False:
        return True
    return all(getattr(module, "is_causal", True) is not False for module in model.modules())


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the stack of layers that reads the text, without the vision and audio towers beside it.

    Raises:
        CaptureError: a model without attention modules.
    """
    # Some heads call their output projection "decoder", so what get_decoder() finds need not be the stack.
    for part in (model.get_decoder(), model.base_model, model):
        if isinstance(part, nn.Module) and _self_attentions(part):
            return part
    raise CaptureError(
        f"model: no attention module found in {type(model).__name__}; "
        "only architectures with softmax attention can be traced"
    )


def first_block(decoder: nn.Module) -> nn.Module:
    """Return the first layer of a decoder."""
    return decoder_blocks(decoder)[0]


def decoder_blocks(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder: the items of the numbered list that holds its attention modules.

    Lists of experts may be longer than the list of layers, so the length says nothing.
    """
    name, _ = _self_attentions(decoder)[0]
    before_number = re.split(r"(?:^|\.)\d+(?:\.|$)", name)[0]
    return list(decoder.get_submodule(before_number).children())


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the softmax self-attention module of each layer of the text decoder, by layer index.

    A layer without one (state-space or linear layers of hybrid models) is missing from the result. Where a
    numbered layer holds several, they are numbered by their own ``layer_idx``.

    Raises:
        CaptureError: a model without attention modules, or layers that cannot be told apart.
    """
    named = _self_attentions(text_decoder(model))
    # The first number in a module's name is its place in the stack: "layers.3.self_attn".
    indices = [int(_NUMBER_IN_NAME.findall(name)[0]) for name, _ in named]
    if len(set(indices)) < len(indices):
        indices = _own_indices(model, named, indices)
    modules = [module for _, module in named]
    by_layer = dict(zip(indices, modules, strict=True))
    return {index: by_layer[index] for index in sorted(by_layer)}


def _own_indices(
    model: PreTrainedModel,
    named: list[tuple[str, nn.Module]],
    indices: list[int],
) -> list[int]:
    """Number the modules by their own ``layer_idx``, for layers that hold several attention modules."""
    own: list[int] = []
    for _, module in named:
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            own.append(index)
    if len(set(own)) < len(named):
        repeated = next(index for index in indices if indices.count(index) > 1)
        names = []
        for (name, _), index in zip(named, indices, strict=True):
            if index == repeated:
                names.append(name)
        raise CaptureError(
            f"model: each layer must have one attention module, got {', '.join(names)} in layer {repeated} of "
            f"{type(model).__name__}; this architecture cannot be captured"
        )
    return own


def _self_attentions(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the innermost attention modules inside numbered layers, without cross-attention, with their names."""
    found = []
    for name, module in decoder.named_modules():
        if not _looks_like_attention(module) or not _NUMBER_IN_NAME.search(name):
            continue
        if _CROSS_ATTENTION.search(f"{name} {type(module).__name__}".lower()):
            continue
        descendants = list(module.modules())[1:]
        if not any(_looks_like_attention(child) for child in descendants):
            found.append((name, module))
    # Linear and delta attention have the word in their class names, but no softmax, and do not use the interface.
    dispatching = [(name, module) for name, module in found if uses_attention_interface(type(module))]
    return dispatching or found


def _looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module is attention by its class name or by its code."""
    return "Attention" in type(module).__name__ or uses_attention_interface(type(module))


@lru_cache(maxsize=4096)
def uses_attention_interface(kind: type[nn.Module]) -> bool:
    """Return whether this module class dispatches through transformers' ``AttentionInterface``.

    The code of its methods is searched for the call, because the classes declare it nowhere.
    """
    for base in kind.__mro__:
        for member in vars(base).values():
            if not inspect.isfunction(member):
                continue
            method = inspect.unwrap(member)
            if "get_interface" in method.__code__.co_names:
                return True
    return False


def attention_implementation(module: nn.Module) -> str:
    """Return the attention implementation of a module, such as ``"sdpa"``; empty where it states none."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) or ""


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the part of the configuration that describes the text decoder."""
    return model.config.get_text_config(decoder=True)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model can read at once, or None where its configuration states no limit.

    Rotary embeddings may be scaled for longer texts than ``max_position_embeddings``: ``linear`` and ``dynamic`` by
    their factor, ``yarn``, ``longrope`` and ``llama3`` to their factor times the length they were trained with. Where
    layers have embeddings of their own, the longest context counts.
    """
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is None or limit <= 0:
        return None
    scaled = [_scaled_context(config, limit, rope) for rope in _rope_parameters(config)]
    return max(scaled, default=limit)


def _rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """List the parameters of the rotary embeddings: one record, or one per type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return []
    by_layer_type = [value for value in parameters.values() if isinstance(value, Mapping)]
    return by_layer_type or [parameters]


def _scaled_context(config: PretrainedConfig, limit: int, rope: Mapping[str, Any]) -> int:
    """Return the context of one rotary embedding, at least ``max_position_embeddings``."""
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor")
    if kind not in _SCALED_ROPE or not isinstance(factor, (int, float)):
        return limit
    # Gemma 3 states the scaled length in its configuration, without the length it was trained with.
    if config.model_type.startswith("gemma3"):
        return limit
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * factor))


def num_layers(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> int:
    """Count the layers of the text decoder, those without softmax attention included.

    Args:
        model: the model.
        modules: its attention modules by layer, from :func:`attention_modules`.
    """
    configured = int(getattr(text_config(model), "num_hidden_layers", 0))
    return max(configured, max(modules) + 1)


def num_query_heads(model: PreTrainedModel) -> int | None:
    """Return the number of query heads of each layer, or None where layers differ or the model does not state it."""
    try:
        number = getattr(text_config(model), "num_attention_heads", None)
    except RuntimeError:
        # transformers refuses the attribute where layers differ.
        return None
    if isinstance(number, int) and number > 0:
        return number
    return None
