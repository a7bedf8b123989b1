"""Conserved relevance of a Llama by the letter: every rule written into the forward pass, no hooks.

The model is run in float64 by its weights alone. Attention matrices are leaves of the graph, so the relevance of an
edge is the weight times its own gradient, and relevance at any point is the value times its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Relevance(NamedTuple):
    """N[t, s] with its diagonal, demand at each row, relevance absorbed at each embedding."""

    edges: Tensor
    demand: Tensor
    absorbed: Tensor


def llama_relevance(model: Any, ids: Tensor, answer: list[int]) -> Relevance:
    """Explain the sum over answer tokens of (logit - best other logit), for one sequence of ids."""
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    tokens = ids.numel()

    x0 = weights["model.embed_tokens.weight"][ids].requires_grad_()
    cos, sin = _rotary(tokens, dim, config.rope_parameters["rope_theta"])
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    x = x0
    matrices = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        normed = _norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        query = _heads(normed @ weights[prefix + "self_attn.q_proj.weight"].T, heads)
        key = _heads(normed @ weights[prefix + "self_attn.k_proj.weight"].T, key_heads)
        value = _heads(normed @ weights[prefix + "self_attn.v_proj.weight"].T, key_heads)
        query, key = _turn(query, cos, sin), _turn(key, cos, sin)
        mixed = []
        for head in range(heads):
            shared = head * key_heads // heads
            scores = (query[head] @ key[shared].T / dim**0.5).masked_fill(future, -torch.inf)
            matrix = scores.softmax(-1).detach().requires_grad_()
            matrices.append(matrix)
            mixed.append(matrix @ value[shared])
        x = x + torch.cat(mixed, -1) @ weights[prefix + "self_attn.o_proj.weight"].T

        normed = _norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ weights[prefix + "mlp.up_proj.weight"].T
        gated = gate * torch.sigmoid(gate).detach() * up
        out = gated @ weights[prefix + "mlp.down_proj.weight"].T
        x = x + out / 2 + (out / 2).detach()

    y = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    y.retain_grad()
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = y @ head.T
    total = torch.zeros((), dtype=torch.float64)
    for token in answer:
        row = logits[token - 1]
        others = torch.cat([row[: ids[token]], row[ids[token] + 1 :]])
        total = total + row[ids[token]] - others.max()
    total.backward()
    edges = torch.stack([matrix.detach() * matrix.grad for matrix in matrices]).sum(0)
    return Relevance(edges, (y * y.grad).sum(-1).detach(), (x0 * x0.grad).sum(-1).detach())


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale.detach() * gain


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(x.shape[0], count, -1).transpose(0, 1)


def _rotary(tokens: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency[None]
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin
