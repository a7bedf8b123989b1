"""Aggregate the heads of one layer: mean, maximum, or the mean of heads selected by a statistic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from flowgraph.attention.layers_and_heads import HeadSelector, per_query_head
from flowgraph.errors import InvalidInputError


class HeadAggregator:
    """The rule by which ``[batch, heads, block, stop]`` weights of a layer become ``[batch, block, stop]``.

    Attributes:
        heads: ``"mean"``, ``"max"``, indices of the heads to average, or a selector of them.
    """

    def __init__(self, heads: str | Sequence[int] | HeadSelector) -> None:
        self.heads = heads

    def choose(
        self,
        weights: Iterator[tuple[int, Tensor]],
        readable: Bool[Tensor, "batch tokens"],
        num_heads: int,
    ) -> Int[Tensor, "batch kept"] | None:
        """Choose the heads to average in each sequence.

        Each sequence gets heads of its own, so its rows never depend on the other sequences of the batch.

        Args:
            weights: blocks of rows, ``[batch, heads, block, stop]``, each with its first row. Only a selector reads
                them, all once.
            readable: False on padding.
            num_heads: query heads of the layer.

        Returns:
            Indices of heads, or None for all heads.

        Raises:
            InvalidInputError: an index that this layer does not have.
        """
        if isinstance(self.heads, HeadSelector):
            scores = head_statistic(weights, self.heads.statistic, readable, num_heads)
            chosen = [self.heads.choose(of_sequence) for of_sequence in scores]
            return torch.stack(chosen).to(readable.device)
        if isinstance(self.heads, str):
            return None
        if max(self.heads) >= num_heads:
            raise InvalidInputError(
                f"heads: must lie in 0..{num_heads - 1} in every chosen layer, got {max(self.heads)}; "
                "choose other heads or layers"
            )
        # The same heads for every sequence.
        indices = torch.tensor(list(self.heads), device=readable.device)
        return indices.expand(readable.shape[0], -1)

    def join(
        self,
        weights: Float[Tensor, "batch heads block stop"],
        chosen: Int[Tensor, "batch kept"] | None,
        value_norm: Float[Tensor, "batch key_heads tokens"] | None,
    ) -> Float[Tensor, "batch block stop"]:
        """Aggregate the heads by their mean or maximum, and keep the row sums of the attention weights.

        With value norms, a joined row is proportional to ``mean over heads of A[t, s] * norm(v[s])``.

        Args:
            weights: softmax weights of a block of rows.
            chosen: the heads of each sequence, from :meth:`choose`.
            value_norm: Euclidean norm of each value vector, or None for plain attention.
        """
        if value_norm is not None:
            value_norm = per_query_head(value_norm, weights.shape[1])
        # Each sequence has its own choice of heads.
        if chosen is not None:
            item = torch.arange(weights.shape[0], device=weights.device)[:, None]
            weights = weights[item, chosen]
            if value_norm is not None:
                value_norm = value_norm[item, chosen]

        # The mean of attention weights has the right row sums already.
        if self.heads != "max" and value_norm is None:
            return weights.mean(1)

        # Otherwise the joined rows are rescaled to the mean row sum of the attention weights.
        row_sum = weights.sum(-1).mean(1)
        if value_norm is not None:
            weights = weights * value_norm[:, :, None, : weights.shape[-1]]
        if self.heads == "max":
            joined = weights.amax(1)
        else:
            joined = weights.mean(1)
        smallest = torch.finfo(joined.dtype).tiny
        scale = row_sum / joined.sum(-1).clamp_min(smallest)
        return joined * scale[..., None]

    def split(
        self,
        weights: Float[Tensor, "batch heads block stop"],
        chosen: Int[Tensor, "batch kept"] | None,
        value_norm: Float[Tensor, "batch key_heads tokens"] | None,
    ) -> Float[Tensor, "batch heads block stop"]:
        """Compute the part of each head in what :meth:`join` returns; the parts sum to it.

        Args:
            weights: softmax weights of a block of rows.
            chosen: the heads of each sequence, from :meth:`choose`; the others have no part.
            value_norm: Euclidean norm of each value vector, or None for plain attention.

        Raises:
            InvalidInputError: heads that are joined by their maximum.
        """
        if self.heads == "max":
            raise InvalidInputError(
                "heads: must be summed to be told apart, got their maximum; use heads='mean', or by_layer"
            )
        # Heads that were not chosen have the part 0; the others are divided by the number of chosen heads.
        num_heads = weights.shape[1]
        is_chosen = torch.ones(weights.shape[:2], dtype=torch.bool, device=weights.device)
        if chosen is not None:
            is_chosen = torch.zeros_like(is_chosen).scatter(1, chosen.long(), True)
        kept = weights * is_chosen[:, :, None, None]
        count = is_chosen.sum(1)[:, None, None, None]
        if value_norm is None:
            return kept / count

        # Rows are rescaled to the sums that they had as attention.
        row_sum = kept.sum(-1).sum(1) / count[..., 0, 0]
        norm_of_head = per_query_head(value_norm, num_heads)[:, :, None, : weights.shape[-1]]
        parts = kept * norm_of_head / count
        smallest = torch.finfo(parts.dtype).tiny
        scale = row_sum / parts.sum(1).sum(-1).clamp_min(smallest)
        return parts * scale[:, None, :, None]


def head_statistic(
    weights: Iterator[tuple[int, Tensor]],
    statistic: str,
    readable: Bool[Tensor, "batch tokens"],
    num_heads: int,
) -> Float64[Tensor, "batch heads"]:
    """Compute the mean attention distance, or the kurtosis of received attention, of each head in each sequence.

    Distance is ``mean over t of sum over s of A[t, s] * (t - s)``. Kurtosis is ``m4 / m2 ** 2 - 3``, with the central
    moments over tokens s of the attention ``sum over t > s of A[t, s]`` that a token receives. The first token
    receives much attention in every head whatever the text, so the kurtosis leaves it out: it would only find
    the heads with the strongest attention sink.

    Args:
        weights: all blocks of rows in order, ``[batch, heads, block, stop]``, each with its first row.
        statistic: ``"distance"`` or ``"kurtosis"``.
        readable: False on padding, whose rows and columns do not count.
        num_heads: heads of the layer.

    Cost: linear in the weights; memory of batch x heads x tokens.
    """
    readable = readable.cpu()
    num_sequences, num_tokens = readable.shape
    distance = torch.zeros(num_sequences, num_heads, dtype=torch.float64)
    received = torch.zeros(num_sequences, num_heads, num_tokens, dtype=torch.float64)
    for start, block in weights:
        stop = start + block.shape[2]
        width = block.shape[3]
        # Rows of padding count as 0.
        rows = block.double().cpu()
        rows = rows * readable[:, None, start:stop, None]
        # gap[t, s] = t - s; only positive gaps are edges.
        reader = torch.arange(start, stop)
        read = torch.arange(width)
        gap = reader[:, None] - read[None]

        # distance: sum over t, s of A[t, s] (t - s); received[s]: sum over t > s of A[t, s].
        distance += torch.einsum("bhts,ts->bh", rows, gap.double())
        edges = rows * (gap > 0)
        received[:, :, :width] += edges.sum(2)
    if statistic == "distance":
        return distance / readable.sum(-1, keepdim=True)

    # Moments over the tokens after the first.
    is_counted = readable & (readable.cumsum(-1) > 1)
    count = is_counted.sum(-1)[:, None].clamp_min(1)
    mean = (received * is_counted[:, None]).sum(-1) / count
    deviation = (received - mean[..., None]) * is_counted[:, None]
    second_moment = deviation.square().sum(-1) / count
    fourth_moment = deviation.pow(4).sum(-1) / count

    # Excess kurtosis m4 / m2**2 - 3, which is 0 for a normal distribution.
    smallest = torch.finfo(torch.float64).tiny
    return fourth_moment / second_moment.square().clamp_min(smallest) - 3
