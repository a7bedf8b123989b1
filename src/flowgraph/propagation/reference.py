"""The method word for word: one token at a time, no blocks, no batching. Slow; for checking the fast paths."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


def potential(
    edge_index: Int64[Tensor, "2 edges"],
    weight: Float[Tensor, " edges"],
    propagation_factor: Float64[Tensor, " nodes"],
    demand: Float64[Tensor, " nodes"],
) -> Float64[Tensor, " nodes"]:
    """``h[s] = b[s] + sum over edges s -> t of d[s] * C[t, s] * h[t]``, last token first.

    Args:
        edge_index: ``[2, E]`` sorted by target; several graphs may stand one after the other.
        weight: ``[E]`` C.
        propagation_factor: d, what each token hands on.
        demand: b.

    Returns:
        h in float64. Cost: E Python steps.
    """
    h, d = demand.double().tolist(), propagation_factor.tolist()
    for s, t, w in reversed(_edges(edge_index, weight)):
        h[s] += d[s] * w * h[t]  # every edge out of t has a later target, so h[t] is final here
    return torch.tensor(h, dtype=torch.float64, device=weight.device)


def influence(
    edge_index: Int64[Tensor, "2 edges"],
    weight: Float[Tensor, " edges"],
    propagation_factor: Float64[Tensor, " nodes"],
    inflow: Float64[Tensor, " nodes"],
) -> Float64[Tensor, " nodes"]:
    """``g[t] = q[t] + sum over edges s -> t of C[t, s] * d[s] * g[s]``, first token first; arguments as above."""
    g, d = inflow.double().tolist(), propagation_factor.tolist()
    for s, t, w in _edges(edge_index, weight):
        g[t] += w * d[s] * g[s]
    return torch.tensor(g, dtype=torch.float64, device=weight.device)


def _edges(edge_index: Tensor, weight: Tensor) -> list[tuple[int, int, float]]:
    return list(zip(*edge_index.tolist(), weight.double().tolist(), strict=True))
