"""``capture``: one forward pass, aggregated attention rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.attention.modules import base_model, context_length, text_config
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.errors import CaptureError, InvalidInputError
from flowgraph.masks import as_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RELATIVE_POSITIONS = {"bloom", "mpt", "roformer"}
"""Models without an argument for positions whose attention depends on distances alone, so left padding is allowed."""


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "*batch tokens"] | Int[np.ndarray, "*batch tokens"] | Sequence[Any],
    attention_mask: Shaped[Tensor, "*batch tokens"] | Shaped[np.ndarray, "*batch tokens"] | Sequence[Any] | None = None,
    *,
    layers: LayerRule = "middle",
    heads: str | Sequence[int] | HeadSelector = "mean",
    edge_weight: str = "attention",
) -> AttentionRows:
    """Run one forward pass with the model's own attention and return its aggregated rows.

    ``rows[b, t, s]`` is the mean over the chosen layers of the joined heads' attention of token t to token s.
    The rows are recomputed in blocks from queries and keys after normalisation and rotary embedding, by the
    architecture's own eager function, and checked against the layer's real output during the pass. Afterwards the
    model is in the state that it had before, also after an exception.

    Args:
        model: a Hugging Face causal LM.
        input_ids: ``[batch, tokens]`` (or ``[tokens]``), prompt and response together.
        attention_mask: 1 on tokens, 0 on padding, left or right; positions are counted from it.
        layers: ``"middle"`` (default), ``"upper"``, ``"all"``, ``"10-19"``, ``"10-"`` or indices.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a ``HeadSelector``.
        edge_weight: ``"attention"`` or ``"value_norm"``, as for :class:`~flowgraph.AttentionRecorder`.

    Returns:
        The rows of the batch, which compute a block each time it is read.

    Raises:
        CaptureError: an architecture whose rows cannot be captured correctly.
        InvalidInputError: ids, mask or choices that do not fit the model.

    Cost: one forward pass; memory of queries and keys of the chosen layers, O(layers x T x width).
    """
    # The input is checked before the pass, in this order: shape, mask, vocabulary and context.
    inner = base_model(model)
    recorder = AttentionRecorder(model, layers=layers, heads=heads, edge_weight=edge_weight)
    input_ids = checked_ids(input_ids)
    attention_mask = checked_mask(input_ids, attention_mask)
    check_fits(inner, input_ids, attention_mask)

    device = input_device(inner, input_ids.device)
    mask_of_pass = attention_mask.to(device)
    arguments = forward_arguments(inner, mask_of_pass)
    with evaluating(inner), torch.no_grad(), recorder:
        inner(input_ids=input_ids.to(device), attention_mask=mask_of_pass, **arguments, use_cache=False)
    return recorder.rows(attention_mask, input_ids)


def input_device(model: PreTrainedModel, fallback: torch.device) -> torch.device:
    """Return the device on which a model reads its ids.

    Args:
        model: the model that will run.
        fallback: the device for a model with offloaded embeddings, whose hooks move the ids themselves.
    """
    device = next(model.get_input_embeddings().parameters()).device
    if device.type == "meta":
        return fallback
    return device


def forward_arguments(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Tensor | int]:
    """Choose the further arguments of the pass: few logits, and for left padding positions counted from the mask.

    Without left padding, a model's own positions are right, whatever number they start from.

    Raises:
        CaptureError: left padding, and a model that would shift its positions.
    """
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Tensor | int] = {}
    # The logits are not used, and those of all tokens can be the largest tensor of the pass.
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    if bool(attention_mask[:, 0].all()):
        return arguments
    # RoBERTa-like embeddings count from padding_idx + 1, and from the ids instead of the mask.
    counts_from_ids = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    if "position_ids" in parameters and not counts_from_ids:
        arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    elif model.config.model_type not in _RELATIVE_POSITIONS:
        raise CaptureError(
            f"attention_mask: must pad on the right for {type(model).__name__}, got padding on the left, which would "
            "shift its positions; set tokenizer.padding_side = 'right'"
        )
    return arguments


def checked_ids(input_ids: Any) -> Int[Tensor, "batch tokens"]:
    """Check the dtype and shape of ids, and add the dimension of the batch where it is missing.

    Args:
        input_ids: ``[batch, tokens]`` or ``[tokens]``, of any integer dtype; a tensor, an array or lists.

    Raises:
        InvalidInputError: no integers, another number of dimensions, or no id.
    """
    input_ids = as_tensor(input_ids, "input_ids", "tokenize with return_tensors='pt'")
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    dtype = input_ids.dtype
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if input_ids.ndim != 2 or not is_integer or input_ids.numel() == 0:
        raise InvalidInputError(
            f"input_ids: must be integers of shape [batch, tokens], at least one, got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}; pass the tokenizer's input_ids"
        )
    return input_ids


def checked_mask(input_ids: Tensor, attention_mask: Any) -> Int[Tensor, "batch tokens"]:
    """Check that each row of a mask has tokens and pads on one or both sides; return it as 0 and 1."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.int64)
    attention_mask = as_tensor(attention_mask, "attention_mask", "pass the tokenizer's", device=input_ids.device)
    if attention_mask.ndim == 1:
        attention_mask = attention_mask[None]
    if attention_mask.shape != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask: must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; pass both from the same tokenizer call"
        )

    # A sequence without a token has no row to read.
    is_token = attention_mask != 0
    is_empty = ~is_token.any(-1)
    if bool(is_empty.any()):
        raise InvalidInputError(
            "attention_mask: every sequence needs at least one token, got a row of padding only "
            f"(row {int(is_empty.nonzero()[0])}); drop that row"
        )

    # Padding on the left and on the right each cause one change between neighbours; any more changes are gaps.
    num_changes = (is_token[:, 1:] != is_token[:, :-1]).sum(-1)
    num_padded_sides = (~is_token[:, 0]).long() + (~is_token[:, -1]).long()
    has_gap = num_changes > num_padded_sides
    if bool(has_gap.any()):
        raise InvalidInputError(
            "attention_mask: padding must be on the left or on the right, got a gap inside row "
            f"{int(has_gap.nonzero()[0])}; remove the masked tokens instead"
        )
    return is_token.long()


def check_fits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Check that ids lie in the model's vocabulary and that the text fits its context.

    Args:
        model: the model that will run.
        input_ids: ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``, 1 on tokens, 0 on padding.

    Raises:
        InvalidInputError: an id outside the vocabulary, or more tokens than the context.
    """
    # An id outside the vocabulary fails inside the embedding, on a GPU without a readable message.
    config = text_config(model)
    low = int(input_ids.min())
    high = int(input_ids.max())
    vocabulary_size = getattr(config, "vocab_size", None)
    is_too_high = vocabulary_size is not None and high >= vocabulary_size
    if low < 0 or is_too_high:
        last = "" if vocabulary_size is None else vocabulary_size - 1
        raise InvalidInputError(
            f"input_ids: must lie in 0..{last}, got {low}..{high}; use the tokenizer that belongs to this model"
        )

    limit = context_length(model)
    # With left padding, positions are counted from the mask. Otherwise they include the padding on the right.
    is_left_padded = not bool(attention_mask[:, 0].all())
    if is_left_padded:
        longest = int(attention_mask.sum(-1).max())
    else:
        longest = input_ids.shape[1]
    if limit is not None and limit < longest:
        raise InvalidInputError(
            f"input_ids: must fit the model's context of {limit} tokens, got {longest}; "
            "shorten the prompt or the response"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for one pass, and restore every module's own training flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
