"""Find the attention modules of a causal LM, and how each of them computes its attention."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowgraph.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside compiled, data-parallel and PEFT wrappers.

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
            "question through cross-attention, which this method does not describe"
        )
    if inner.get_output_embeddings() is None or not _is_causal(inner):
        raise CaptureError(
            f"model: must be a causal language model, got {type(inner).__name__}; load it with AutoModelForCausalLM"
        )
    return inner


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
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


def _is_causal(model: PreTrainedModel) -> bool:
    """BERT-like models carry a language model head too, and say so unless is_decoder is set."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    bidirectional = getattr(model.config, "is_decoder", None) is False and any(
        getattr(module, "is_causal", True) is False for module in model.modules()
    )
    return not masked and not bidirectional


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers that reads the text, without the vision and audio towers beside it.

    Raises:
        CaptureError: nothing that looks like attention.
    """
    # Some heads call their output projection "decoder", so what get_decoder() finds need not be the stack.
    for part in (model.get_decoder(), model.base_model, model):
        if isinstance(part, nn.Module) and _self_attentions(part):
            return part
    raise CaptureError(
        f"model: no attention module found in {type(model).__name__}; "
        "only architectures with softmax attention can be traced"
    )


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The softmax self-attention module of each layer of the text decoder, by layer index.

    A layer that has none (state-space or linear layers of hybrid models) is missing from the result. Where a
    layer holds several, their own ``layer_idx`` counts.

    Raises:
        CaptureError: nothing that looks like attention, or layers that cannot be told apart.
    """
    named = _self_attentions(text_decoder(model))
    modules = [module for _, module in named]
    indices = [int(re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)[0]) for name, _ in named]
    if len(set(indices)) < len(indices):
        indices = _own_indices(model, named, indices)
    return dict(sorted(zip(indices, modules, strict=True), key=lambda item: item[0]))


def _own_indices(model: PreTrainedModel, named: list[tuple[str, nn.Module]], indices: list[int]) -> list[int]:
    """The modules' own ``layer_idx``, for layers that hold several attentions."""
    own = [getattr(module, "layer_idx", None) for _, module in named]
    counted = [index for index in own if isinstance(index, int)]
    if len(set(counted)) < len(own):
        doubled = next(index for index in indices if indices.count(index) > 1)
        names = ", ".join(name for (name, _), index in zip(named, indices, strict=True) if index == doubled)
        raise CaptureError(
            f"model: each layer must have one attention module, got {names} in layer {doubled} of "
            f"{type(model).__name__}; this architecture cannot be captured"
        )
    return counted


def _self_attentions(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost attention modules inside numbered layers, cross-attention left out."""
    found = [
        (name, module)
        for name, module in decoder.named_modules()
        if _looks_like_attention(module)
        and re.search(r"(?:^|\.)\d+(?:\.|$)", name)
        and not re.search(r"cross|encoder_attn", f"{name} {type(module).__name__}".lower())
        and not any(_looks_like_attention(child) for child in list(module.modules())[1:])
    ]
    # Linear and delta attention have the word in their names, but no softmax and no interface.
    dispatching = [(name, module) for name, module in found if uses_attention_interface(type(module))]
    return dispatching or found


def _looks_like_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ or uses_attention_interface(type(module))


@lru_cache(maxsize=4096)
def uses_attention_interface(kind: type[nn.Module]) -> bool:
    """Whether this module class dispatches through transformers' ``AttentionInterface``."""
    methods = (
        inspect.unwrap(member) for cls in kind.__mro__ for member in vars(cls).values() if inspect.isfunction(member)
    )
    return any("get_interface" in method.__code__.co_names for method in methods)
