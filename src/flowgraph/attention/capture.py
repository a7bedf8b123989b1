"""``capture``: one forward pass, aggregated attention rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.attention.modules import base_model
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.errors import CaptureError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RELATIVE_POSITIONS = {"bloom", "mpt", "roformer"}
"""Take no positions and need none: attention depends on distances alone, so left padding shifts nothing."""


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "*batch tokens"],
    attention_mask: Shaped[Tensor, "*batch tokens"] | None = None,
    *,
    layers: LayerRule = "middle",
    heads: str | Sequence[int] | HeadSelector = "mean",
    edge_weight: str = "attention",
) -> AttentionRows:
    """Run one forward pass under the model's own attention and return its aggregated rows.

    ``rows[b, t, s]`` is the mean over the chosen layers of the joined heads' attention of token t to token s.
    The rows are recomputed in blocks from queries and keys after normalisation and rotary embedding, by the
    architecture's own eager function, and checked against the layer's real output during the pass. The model is
    left exactly as it was found, also after an exception.

    Args:
        model: a Hugging Face causal LM.
        input_ids: ``[batch, tokens]`` (or ``[tokens]``), prompt and response together.
        attention_mask: 1 on tokens, 0 on padding, left or right; positions are counted from it.
        layers: ``"middle"`` (default), ``"all"``, ``"10-19"`` or indices.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a ``HeadSelector``.
        edge_weight: ``"attention"`` or ``"value_norm"``.

    Raises:
        CaptureError: an architecture whose rows cannot be had correctly.
        InvalidInputError: ids, mask or choices that do not fit the model.

    Cost: one forward pass; memory of queries and keys of the chosen layers, O(layers x T x width).
    """
    inner = base_model(model)
    recorder = AttentionRecorder(model, layers=layers, heads=heads, edge_weight=edge_weight)
    input_ids = _checked_ids(input_ids)
    attention_mask = _checked_mask(input_ids, attention_mask)
    check_fits(inner, input_ids, attention_mask)
    device = next(inner.get_input_embeddings().parameters()).device
    if device.type == "meta":  # offloaded weights: the offloading hooks move the inputs themselves
        device = input_ids.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    with _evaluating(inner), torch.no_grad(), recorder:
        inner(**inputs, **_forward_arguments(inner, inputs["attention_mask"]), use_cache=False)
    return recorder.rows(attention_mask, input_ids)


def _forward_arguments(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Tensor | int]:
    """No logits that nobody reads; and under left padding, positions counted from the mask.

    Without left padding a model's own positions are right whatever they start from.

    Raises:
        CaptureError: left padding, and a model that would shift its positions.
    """
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Tensor | int] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if bool(attention_mask[:, 0].all()):
        return arguments
    # RoBERTa-like embeddings count from padding_idx + 1, and from the ids instead of the mask.
    own_count = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    if "position_ids" in parameters and not own_count:
        arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    elif model.config.model_type not in _RELATIVE_POSITIONS:
        raise CaptureError(
            f"attention_mask: must pad on the right for {type(model).__name__}, got padding on the left, which would "
            "shift its positions; set tokenizer.padding_side = 'right'"
        )
    return arguments


def _checked_ids(input_ids: Tensor) -> Int[Tensor, "batch tokens"]:
    if not isinstance(input_ids, Tensor):
        raise InvalidInputError(
            f"input_ids: must be a tensor, got {type(input_ids).__name__}; tokenize with return_tensors='pt'"
        )
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    whole = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
    if input_ids.ndim != 2 or not whole or input_ids.numel() == 0:
        raise InvalidInputError(
            f"input_ids: must be integers of shape [batch, tokens], at least one, got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}; pass the tokenizer's input_ids"
        )
    return input_ids


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Int[Tensor, "batch tokens"]:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.int64)
    if attention_mask.ndim == 1:
        attention_mask = attention_mask[None]
    if attention_mask.shape != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask: must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; pass both from the same tokenizer call"
        )
    inside = attention_mask != 0
    if not bool(inside.any(-1).all()):
        empty = int((~inside.any(-1)).nonzero()[0])
        raise InvalidInputError(
            f"attention_mask: every sequence needs at least one token, got a row of padding only (row {empty}); "
            "drop that row"
        )
    edges = (inside[:, 1:] != inside[:, :-1]).sum(-1)
    gaps = edges - (~inside[:, 0]).long() - (~inside[:, -1]).long()
    if bool((gaps > 0).any()):
        raise InvalidInputError(
            "attention_mask: padding must stand on the left or on the right, got a gap inside row "
            f"{int((gaps > 0).nonzero()[0])}; remove the masked tokens instead"
        )
    return inside.long()


def check_fits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Ids inside the vocabulary, text inside the context."""
    config = model.config.get_text_config(decoder=True)
    low, high = int(input_ids.min()), int(input_ids.max())
    size = getattr(config, "vocab_size", None)
    if low < 0 or (size is not None and high >= size):
        raise InvalidInputError(
            f"input_ids: must lie in 0..{'' if size is None else size - 1}, got {low}..{high}; "
            "use the tokenizer that belongs to this model"
        )
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    # Positions run over right padding too; under left padding they are counted from the mask.
    left = not bool(attention_mask[:, 0].all())
    longest = int(attention_mask.sum(-1).max()) if left else input_ids.shape[1]
    if limit is not None and 0 < limit < longest:
        raise InvalidInputError(
            f"input_ids: must fit the model's context of {limit} tokens, got {longest}; "
            "shorten the prompt or the response"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for one pass; every module's own training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
