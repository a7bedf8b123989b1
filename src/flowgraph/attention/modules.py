"""Find the attention modules of a causal LM, and how each of them computes its attention."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn

from flowgraph.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EAGER_NAMES = ("eager_attention_forward", "text_eager_attention_forward", "simple_eager_attention_forward")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside compiled and PEFT wrappers.

    Raises:
        CaptureError: not a transformers model, or not a decoder-only language model.
    """
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise CaptureError(
            f"model: must be a Hugging Face PreTrainedModel, got {type(model).__name__}; load it with AutoModelForCausalLM"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"model: must be decoder-only, got the encoder-decoder {type(inner).__name__}; its answer reads the question "
            "through cross-attention, which this method does not describe"
        )
    if inner.get_output_embeddings() is None or not _is_causal_config(inner):
        raise CaptureError(
            f"model: must be a causal language model, got {type(inner).__name__}; load it with AutoModelForCausalLM"
        )
    return inner


def _is_causal_config(model: PreTrainedModel) -> bool:
    """BERT-like models carry a language model head too, and say so unless is_decoder is set."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    bidirectional = getattr(model.config, "is_decoder", None) is False and any(
        getattr(module, "is_causal", True) is False for module in model.modules()
    )
    return not masked and not bidirectional


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The self-attention module of each decoder layer, by layer index.

    A layer that has none (state-space or linear layers of hybrid models) is missing from the result.

    Raises:
        CaptureError: nothing that looks like attention.
    """
    decoder = model.get_decoder() or model
    found: dict[int, nn.Module] = {}
    for name, module in decoder.named_modules():
        index = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if index and "Attention" in type(module).__name__ and not _wraps_attention(module) and "cross" not in name.lower():
            found.setdefault(int(index.group(1)), module)
    if not found:
        raise CaptureError(
            f"model: no attention module found in {type(model).__name__}; only architectures with softmax attention can be traced"
        )
    return found


def _wraps_attention(module: nn.Module) -> bool:
    return any("Attention" in type(child).__name__ for child in list(module.modules())[1:])


@lru_cache(maxsize=256)
def uses_attention_interface(kind: type[nn.Module]) -> bool:
    """Whether this module class dispatches through transformers' ``AttentionInterface``."""
    for cls in kind.__mro__:
        if "forward" in vars(cls):
            try:
                return "get_interface(" in inspect.getsource(cls)
            except (OSError, TypeError):
                return False
    return False


def eager_function(module: nn.Module) -> Callable:
    """The architecture's own definition of its attention: ``eager_attention_forward`` beside the module's class.

    It is the one place that knows about soft-caps, learned sinks, position biases and whatever comes next,
    so rows are always computed by it and never by a formula of ours.

    Raises:
        CaptureError: the modeling file defines none.
    """
    for cls in type(module).__mro__:
        namespace = vars(sys.modules.get(cls.__module__, None)) if cls.__module__ in sys.modules else {}
        for name in _EAGER_NAMES:
            if name in namespace:
                return namespace[name]
    raise CaptureError(
        f"model: {type(module).__name__} defines no eager attention function, so its rows cannot be recomputed; "
        "please report the architecture"
    )
