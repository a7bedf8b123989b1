"""The two sweeps one edge at a time in plain Python: slow, and used to check the fast backends."""

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
    """Solve ``h[s] = b[s] + sum over edges s -> t of d[s] * C[t, s] * h[t]``, last token first.

    Args:
        edge_index: ``[2, E]`` sorted by target; the graphs of a batch follow each other.
        weight: ``[E]`` C.
        propagation_factor: ``[N]`` d, what each token propagates.
        demand: ``[N]`` b.

    Returns:
        ``[N]`` h in float64. Cost: E Python steps.
    """
    d = propagation_factor.tolist()
    h = demand.double().tolist()
    # Every edge out of t has a later target, so h[t] is final when the edges into t are read.
    for s, t, w in reversed(_edges(edge_index, weight)):
        h[s] += d[s] * w * h[t]
    return torch.tensor(h, dtype=torch.float64, device=weight.device)


def influence(
    edge_index: Int64[Tensor, "2 edges"],
    weight: Float[Tensor, " edges"],
    propagation_factor: Float64[Tensor, " nodes"],
    inflow: Float64[Tensor, " nodes"],
) -> Float64[Tensor, " nodes"]:
    """Solve ``g[t] = q[t] + sum over edges s -> t of C[t, s] * d[s] * g[s]``, first token first.

    Args:
        edge_index: ``[2, E]`` sorted by target; the graphs of a batch follow each other.
        weight: ``[E]`` C.
        propagation_factor: ``[N]`` d, what each token propagates.
        inflow: ``[N]`` q.

    Returns:
        ``[N]`` g in float64. Cost: E Python steps.
    """
    d = propagation_factor.tolist()
    g = inflow.double().tolist()
    # Every edge into s has a target before t, so g[s] is final when the edges into t are read.
    for s, t, w in _edges(edge_index, weight):
        g[t] += w * d[s] * g[s]
    return torch.tensor(g, dtype=torch.float64, device=weight.device)


def _edges(edge_index: Tensor, weight: Tensor) -> list[tuple[int, int, float]]:
    """List the edges as (source, target, weight)."""
    source, target = edge_index.tolist()
    return list(zip(source, target, weight.double().tolist(), strict=True))
