"""Derivatives by single attention weights, by autograd alone: every weight of the eager pass gets a factor of its own.

The eager attention function of the model's module is replaced by one that multiplies the weights with leaves that are
1 everywhere; the gradient of a leaf is A dL/dA of its weight.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor


def edge_gradients(model: Any, ids: Tensor, answer: list[int], target: str, patch: pytest.MonkeyPatch) -> Tensor:
    """Return ``[layers, heads, T, T]``: dL / d(factor of A[l, h, t, s]), L summed over the answer's tokens."""
    module = sys.modules[type(model).__module__]
    original = module.eager_attention_forward
    leaves: list[Tensor] = []

    def attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        _, weights = original(layer, query, key, value, mask, **options)
        weights = weights[..., : key.shape[2]]
        factor = torch.ones_like(weights).requires_grad_()
        leaves.append(factor)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return ((weights * factor) @ values).transpose(1, 2).contiguous(), weights

    with patch.context() as context:
        context.setattr(module, "eager_attention_forward", attention)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for token in answer:
        row = logits[token - 1]
        if target == "margin":
            others = torch.cat([row[: ids[token]], row[ids[token] + 1 :]])
            total = total + row[ids[token]] - others.max()
        else:
            total = total + row.log_softmax(-1)[ids[token]]
    return torch.stack(torch.autograd.grad(total, leaves))[:, 0]
