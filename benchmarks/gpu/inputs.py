"""Random graphs, attention and regions, drawn on the CPU: the same ones for every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flowgraph as fg


def random_graph(tokens: int, degree: int, seed: int) -> Any:
    """A graph in which every token reads its predecessor and others drawn at random; rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(1, tokens).repeat_interleave(degree)
    source = (torch.rand(target.numel(), generator=generator) * target).long()
    source[::degree] = target[::degree] - 1

    # One number for each edge, in the order of a FlowGraph: by target, then by source.
    key = torch.unique(target * tokens + source)
    source = key % tokens
    target = key // tokens
    weights = torch.rand(key.numel(), generator=generator)
    total = torch.zeros(tokens).scatter_add_(0, target, weights)
    return fg.FlowGraph.from_edges(
        torch.stack([source, target]),
        weights / total[target],
        num_nodes=tokens,
        question=range(1, tokens // 4),
        answer=[tokens - 1],
    )


def random_attention(sequences: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Causal attention ``[sequences, tokens, tokens]`` with a few strong links in each row."""
    shape = (sequences, tokens, tokens)
    scores = 2 * torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=generator.device).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), -1).to(dtype)


def regions(sequences: int, tokens: int) -> dict[str, Any]:
    """Masks ``[sequences, tokens]``: the first quarter without the first token asks, the last four tokens answer."""
    position = torch.arange(tokens).expand(sequences, -1)
    question = (position > 0) & (position < tokens // 4)
    return {"question": question, "answer": position >= tokens - 4}


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same arguments with their tensors on the device."""
    on_device = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            on_device[name] = value.to(device)
    return on_device


def largest_unit_error(flow: Any) -> float:
    """How far what the demand absorbs is from one unit, in the sequence that is furthest off."""
    demand = flow.demand * torch.exp2(-flow.exponent.double())
    absorbed = (flow.g * demand).sum(-1)
    return float((absorbed - 1).abs().max())
