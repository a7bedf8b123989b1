"""Join the heads of one layer: mean, maximum, or the mean of heads chosen by a statistic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from flowgraph.attention.layers_and_heads import HeadSelector
from flowgraph.errors import InvalidInputError


class HeadAggregator:
    """``[batch, heads, block, stop]`` weights of one layer -> ``[batch, block, stop]``, heads joined by the rule."""

    def __init__(self, heads: str | Sequence[int] | HeadSelector) -> None:
        self.heads = heads

    def choose(
        self, weights: Iterator[tuple[int, Tensor]], readable: Bool[Tensor, "batch tokens"], num_heads: int
    ) -> Int[Tensor, "batch kept"] | None:
        """Heads to average in each sequence, or None for all; a selector reads the layer once to decide.

        Each sequence chooses for itself, so its rows never depend on what else is in the batch.

        Raises:
            InvalidInputError: an index that this layer does not have.
        """
        if isinstance(self.heads, HeadSelector):
            scores = head_statistic(weights, self.heads.statistic, readable, num_heads)
            return torch.stack([self.heads.choose(row) for row in scores]).to(readable.device)
        if isinstance(self.heads, str):
            return None
        if max(self.heads) >= num_heads:
            raise InvalidInputError(
                f"heads: must lie in 0..{num_heads - 1} in every chosen layer, got {max(self.heads)}; "
                "choose other heads or layers"
            )
        return torch.tensor(list(self.heads), device=readable.device).expand(readable.shape[0], -1)

    def join(
        self,
        weights: Float[Tensor, "batch heads block stop"],
        chosen: Int[Tensor, "batch kept"] | None,
        value_norm: Float[Tensor, "batch key_heads tokens"] | None,
    ) -> Float[Tensor, "batch block stop"]:
        """Mean (or max) over heads; a row keeps the sum that plain attention gives it."""
        if value_norm is not None:  # query heads share value heads
            value_norm = value_norm.repeat_interleave(weights.shape[1] // value_norm.shape[1], 1)
        if chosen is not None:
            item = torch.arange(weights.shape[0], device=weights.device)[:, None]
            weights = weights[item, chosen]
            value_norm = None if value_norm is None else value_norm[item, chosen]
        if self.heads != "max" and value_norm is None:
            return weights.mean(1)
        total = weights.sum(-1).mean(1)
        if value_norm is not None:
            weights = weights * value_norm[:, :, None, : weights.shape[-1]]
        joined = weights.amax(1) if self.heads == "max" else weights.mean(1)
        return joined * (total / joined.sum(-1).clamp_min(torch.finfo(joined.dtype).tiny))[..., None]


def head_statistic(
    weights: Iterator[tuple[int, Tensor]], statistic: str, readable: Bool[Tensor, "batch tokens"], num_heads: int
) -> Float64[Tensor, "batch heads"]:
    """Mean attention distance, or kurtosis of received attention, of each head in each sequence.

    Padding neither reads nor is read. The first token gathers mass in every head whatever the text says, so it
    is left out of the kurtosis, which would otherwise only find the heads with the strongest attention sink.
    """
    readable = readable.cpu()
    distance = torch.zeros(readable.shape[0], num_heads, dtype=torch.float64)
    received = torch.zeros(readable.shape[0], num_heads, readable.shape[1], dtype=torch.float64)
    for start, block in weights:
        stop, width = start + block.shape[2], block.shape[3]
        block = block.double().cpu() * readable[:, None, start:stop, None]
        gap = torch.arange(start, stop)[:, None] - torch.arange(width)[None]
        distance += torch.einsum("bhts,ts->bh", block, gap.double())
        received[:, :, :width] += (block * (gap > 0)).sum(2)
    if statistic == "distance":
        return distance / readable.sum(-1, keepdim=True)
    later = readable & (readable.cumsum(-1) > 1)
    count = later.sum(-1)[:, None].clamp_min(1)
    mean = (received * later[:, None]).sum(-1) / count
    spread = (received - mean[..., None]) * later[:, None]
    variance = spread.square().sum(-1) / count
    return spread.pow(4).sum(-1) / count / variance.square().clamp_min(torch.finfo(torch.float64).tiny) - 3
