"""``capture``: one forward pass, aggregated attention rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from flowgraph.attention.modules import base_model
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.attention.rows import AttentionRows
from flowgraph.attention.selection import HeadSelector, LayerRule
from flowgraph.errors import InvalidInputError


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
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
    input_ids, attention_mask = _check_inputs(inner, input_ids, attention_mask)
    recorder = AttentionRecorder(model, layers=layers, heads=heads, edge_weight=edge_weight)
    arguments = _forward_arguments(inner, attention_mask)
    with _evaluating(inner), torch.no_grad(), recorder:
        inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments)
    return recorder.rows(attention_mask)


def _forward_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor | int]:
    """Positions counted from the mask (left padding shifts nothing), and no logits that nobody reads."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Tensor | int] = {}
    if "position_ids" in parameters:
        arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    return arguments


def _check_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
        raise InvalidInputError(
            f"input_ids: must be integers of shape [batch, tokens], got {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
            "pass the tokenizer's input_ids"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.ndim == 1:
        attention_mask = attention_mask[None]
    if attention_mask.shape != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask: must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}; "
            "pass both from the same tokenizer call"
        )
    if not bool(attention_mask.bool().any(-1).all()):
        raise InvalidInputError("attention_mask: every sequence needs at least one token, got a row of padding only; drop that row")
    inside = attention_mask.bool()
    gaps = (inside[:, 1:] != inside[:, :-1]).sum(-1) - (~inside[:, 0]).long() - (~inside[:, -1]).long()
    if bool((gaps > 0).any()):
        raise InvalidInputError(
            f"attention_mask: padding must stand on the left or on the right, got a gap inside row {int((gaps > 0).nonzero()[0])}; "
            "remove the masked tokens instead"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise InvalidInputError(
            f"input_ids: must lie in 0..{config.vocab_size - 1}, got {low}..{high}; use the tokenizer that belongs to this model"
        )
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    longest = int(inside.sum(-1).max())
    if limit is not None and longest > limit:
        raise InvalidInputError(
            f"input_ids: must fit the model's context of {limit} tokens, got {longest}; shorten the prompt or the response"
        )
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return input_ids.to(device), attention_mask.to(device)


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
