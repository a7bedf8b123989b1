"""``capture``: one forward pass, and a backward pass where the capacity needs it, to the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.capture import check_fits, checked_ids, checked_mask, evaluating, forward_arguments
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.attention.modules import base_model, is_sharded
from flowgraph.capacities.registry import CapacityInput, find_capacity
from flowgraph.errors import CaptureError, InvalidInputError


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "*batch tokens"] | Int[np.ndarray, "*batch tokens"] | Sequence[Any],
    attention_mask: Shaped[Tensor, "*batch tokens"] | Shaped[np.ndarray, "*batch tokens"] | Sequence[Any] | None = None,
    *,
    capacity: str = "attention",
    layers: LayerRule | None = None,
    heads: str | Sequence[int] | HeadSelector | None = None,
    answer: Bool[Tensor, "*batch tokens"] | None = None,
    generated: Bool[Tensor, "*batch tokens"] | None = None,
    **options: Any,
) -> Any:
    """Run the model once and return the capacities of its edges as rows: ``rows[b, t, s]``, t reads s.

    With ``capacity="attention"``, rows are the mean over the chosen layers of the joined heads' attention. They are
    recomputed in blocks from queries and keys after normalisation and rotary embedding, by the architecture's own
    eager function, and checked against the layer's real output. Afterwards the model is in the state that it had
    before, also after an exception.

    Where processes share the weights, all of them call this function, each with its own texts.

    Args:
        model: a Hugging Face causal LM.
        input_ids: ``[batch, tokens]`` (or ``[tokens]``), prompt and response together.
        attention_mask: 1 on tokens, 0 on padding, left or right; positions are counted from it.
        capacity: one of :func:`flowgraph.capacity_names`.
        layers: ``"middle"``, ``"upper"``, ``"all"``, ``"10-19"`` or indices; by default as the capacity has it.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a ``HeadSelector``.
        answer: mask of the tokens to explain (``"relevance"``, ``"gradient"``, ``"gradient_positive"``).
        generated: mask of the tokens that the model produced (``"relevance"`` with ``hops``).
        **options: further options of the capacity: ``edge_weight`` (``"attention"``), ``power`` and ``place``
            (``"sharpened"``), ``target`` (``"relevance"``, ``"gradient"``) and ``hops`` (``"relevance"``).

    Returns:
        :class:`flowgraph.AttentionRows`, :class:`flowgraph.RelevanceRows` or what a registered capacity returns; all
        have ``dense()`` and ``block(start, stop)``.

    Raises:
        CaptureError: an architecture whose rows cannot be computed correctly, or a capacity with a backward pass and
            weights that processes share (FSDP2, ZeRO-3).
        InvalidInputError: ids, masks or options that do not fit the model or the capacity.

    Cost: attention and sharpened: one forward pass, and memory of queries and keys of the chosen layers; VTRACE adds
    a projection per layer; relevance: see :class:`flowgraph.RelevanceRows`.
    """
    chosen = find_capacity(capacity)
    given = {"layers": layers, "heads": heads, "answer": answer, "generated": generated}
    given = {name: value for name, value in given.items() if value is not None} | options
    for name, value in given.items():
        if name not in chosen.defaults:
            known = ", ".join(sorted(chosen.defaults)) or "none"
            raise InvalidInputError(
                f"{name}: does not apply to capacity={capacity!r}, got {value!r:.60}; its options are {known}"
            )

    inner = base_model(model)
    if chosen.gradient and is_sharded(inner):
        raise CaptureError(
            "capacity: must need no backward pass where processes share the weights (FSDP2, ZeRO-3), got "
            f"{capacity!r}; capture with the complete model, or use 'attention', 'sharp' or 'vtrace'"
        )
    ids = checked_ids(input_ids)
    mask = checked_mask(ids, attention_mask)
    check_fits(inner, ids, mask)
    device = next(inner.get_input_embeddings().parameters()).device
    # With offloaded weights, the offloading hooks move the inputs themselves.
    if device.type == "meta":
        device = ids.device
    ids = ids.to(device)
    mask = mask.to(device)
    with evaluating(inner):
        rows = chosen.function(
            CapacityInput(inner, model, ids, mask, forward_arguments(inner, mask), {**chosen.defaults, **given})
        )
    if isinstance(rows, Tensor):
        rows = _as_rows(capacity, rows, mask)
    if isinstance(rows, AttentionRows):
        rows.normalization = chosen.normalization
    return rows


def _as_rows(capacity: str, matrix: Tensor, mask: Tensor) -> AttentionRows:
    """Wrap the matrices of a registered capacity as rows."""
    from flowgraph.attention.attention_rows import WeightedLayer

    batch, tokens = mask.shape
    if matrix.shape != (batch, tokens, tokens) or not matrix.is_floating_point():
        raise InvalidInputError(
            f"capacity: {capacity!r} must return floats of shape {(batch, tokens, tokens)}, got {matrix.dtype} of "
            f"shape {tuple(matrix.shape)}; rows are readers"
        )
    if not bool(torch.isfinite(matrix).all()) or bool(matrix.triu(1).any()):
        raise InvalidInputError(
            f"capacity: {capacity!r} must return finite rows that read no later token, got others; check its function"
        )
    return AttentionRows.of_layers([WeightedLayer(matrix.float())], (), mask, None)
