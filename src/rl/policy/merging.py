"""Merge a LoRA adapter into its base, so that plain transformers computes what the adapter model computes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rl.errors import PolicyError
from rl.policy.loading import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapter of a PEFT model into its base; the merged model has the adapter model's logits.

    The sum of weight and update is rounded to the dtype of the base: in 16 bits a small update loses digits, so load
    the base in float32 to keep them.

    Many models share one weight between the embeddings and the output layer. An adapter on one of them would then
    change the other too, so the two are untied where an adapter touches either, and tied again where both still have
    equal values. The configuration of the merged model records whether they are tied.

    Args:
        model: with LoRA layers, ``modules_to_save`` or ``trainable_token_indices``; used up by the merge.

    Returns:
        The base model without any trace of PEFT.

    Raises:
        PolicyError: the adapter is on a weight that other layers of the model use too, or the base is quantised.

    Cost: that of PEFT's merge; untied weights take the memory of one more embedding.
    """
    base: Any = model.get_base_model()
    quantization = quantization_of(base)
    if quantization is not None:
        raise PolicyError(
            f"model: must be in its own dtype for a merge, got {quantization} weights, to which the update would be "
            "rounded; give the base that is not quantised"
        )
    # The check comes after the untying, because untied layers share no weight any more.
    is_tied = _is_tied(base)
    if is_tied and _touches_embeddings(model):
        _untie(base)
    _refuse_shared(model)

    # Layers that are still equal share one tensor again, as they did before.
    merge: Any = model.merge_and_unload
    with torch.no_grad():
        merged = merge()
    if is_tied:
        _tie_again(merged)
    return merged


def _is_tied(model: Any) -> bool:
    """Tell whether embeddings and output layer are one tensor."""
    embeddings = _inner(model.get_input_embeddings())
    output = _inner(model.get_output_embeddings())
    return output is not None and output.weight is embeddings.weight


def _inner(module: nn.Module | None) -> Any:
    """Return the original layer inside the wrappers of PEFT."""
    while module is not None:
        inner = getattr(module, "base_layer", None)
        if inner is None:
            inner = getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner
    return None


def _touches_embeddings(model: PeftModel) -> bool:
    """Tell whether the embeddings or the output layer are wrapped by PEFT."""
    base: Any = model.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    return any(_inner(layer) is not layer for layer in layers)


def _untie(model: Any) -> None:
    """Give the output layer a copy of the weight that it shares with the embeddings."""
    output = _inner(model.get_output_embeddings())
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    _set_tied(model, False)


def _tie_again(merged: Any) -> None:
    """Share one tensor between embeddings and output layer where both have equal values, and record which it is."""
    embeddings = merged.get_input_embeddings()
    output = merged.get_output_embeddings()
    is_equal = bool(torch.equal(embeddings.weight, output.weight))
    # Only the weight is shared: the output layer may have a bias of its own.
    if is_equal:
        output.weight = embeddings.weight
    _set_tied(merged, is_equal)


def _set_tied(model: Any, tied: bool) -> None:
    """Record in the configuration whether embeddings and output layer are one tensor: loading follows it."""
    # In a text-only model both are the same record.
    model.config.tie_word_embeddings = tied
    model.config.get_text_config(decoder=True).tie_word_embeddings = tied


def _refuse_shared(model: PeftModel) -> None:
    """Reject adapters on a weight that several layers share: one merged update would reach all of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # The names of each weight; a shared one has several.
    uses: dict[int, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        uses[id(weight)].append(name)

    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        names = [] if weight is None else uses[id(weight)]
        if len(names) > 1:
            raise PolicyError(
                f"adapter: must be on weights that one layer uses, got {names[0]}, which is {names[1]} too; a merge "
                "would change both, so load the adapter with PeftModel.from_pretrained instead"
            )
