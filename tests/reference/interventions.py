"""Attention with cells cut out, read by read: the slow twin of the masks in ``flowgraph.attention.masking``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

Forbidden = Callable[[int, int, int, int], bool]
"""(layer, head, row, column): may this position not read that token?"""

_NAME = "flowgraph_reference_cut"


def logprobs(model: PreTrainedModel, ids: Tensor, forbidden: Forbidden) -> Tensor:
    """``[T, V]`` log-probabilities of the next token; the model is set back to how it was."""

    def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **options):
        _, heads, length, width = query.shape
        scale = width**-0.5 if scaling is None else scaling
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=query.dtype)
        for head in range(heads):
            shared = head * key.shape[1] // heads
            for row in range(length):
                scores = torch.full((length,), -torch.inf, dtype=query.dtype)
                for column in range(row + 1):
                    near = sliding_window is None or row - column < sliding_window
                    if near and not forbidden(module.layer_idx, head, row, column):
                        scores[column] = scale * (query[0, head, row] @ key[0, shared, column])
                output[0, row, head] = scores.softmax(-1) @ value[0, shared]
        return output, None

    AttentionInterface.register(_NAME, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.no_grad():
            return model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(_NAME, None)
