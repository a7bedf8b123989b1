r"""From capacities to the conserved unit flow: one recipe over every kind of :class:`Sweeps`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.propagation import gradients
from flowgraph.propagation.balance import exponents
from flowgraph.propagation.powers import scaled

_SMALLEST_NORMAL = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class ConservedFlow:
    """Both potentials and where the unit enters; vectors ``[N]`` over a batch of graphs, or ``[B, T]``.

    Attributes:
        h, g: potential and influence in units of ``2**exponent`` and ``2**-exponent``: ``g * h`` needs no unit.
        exponent: 0 everywhere unless float64 alone cannot hold the potential.
        source: share of the unit that enters at each token; sums to 1 per graph, or to 0 where nothing flows.
    """

    h: Float64[Tensor, ...]
    g: Float64[Tensor, ...]
    exponent: Int64[Tensor, ...]
    source: Float64[Tensor, ...]


def conserve(
    sweeps: Any, weight: Any, *, demand: Tensor, question: Bool[Tensor, ...], source: str | Tensor
) -> ConservedFlow:
    r"""Solve :math:`h = b + N^\top h`, spread one unit over the source tokens, solve :math:`g = \mathrm{src}/h + N g`.

    Should h or g leave the range of float64, the same system is solved once more in balanced units
    (:mod:`~flowgraph.propagation.balance`). Which token reaches the demand is then read off the topology; before, it
    is ``h > 0``, and checked to be the same.

    Args:
        sweeps: how the sweeps are run, with D.
        weight: C.
        demand: b.
        question: tokens of the ``"uniform"`` and ``"potential"`` rules.
        source: ``"uniform"``, ``"potential"`` or a non-negative vector.
    """
    units = torch.zeros(demand.shape, dtype=torch.int64, device=demand.device)
    h = _sweep("potential", sweeps, weight, demand)
    if _in_range(sweeps, weight, h.detach()):
        entry = _entry(sweeps, h, units, question, source)
        g = _sweep("influence", sweeps, weight, _per_potential(entry, h))
        if _influence_in_range(sweeps, weight, h.detach(), g.detach()):
            return ConservedFlow(h, g, units, entry)
    units = exponents(sweeps, weight, demand)
    weight, demand = sweeps.balanced(weight, units), scaled(demand, -units)
    h = _sweep("potential", sweeps, weight, demand)
    entry = _entry(sweeps, h, units, question, source)
    return ConservedFlow(h, _sweep("influence", sweeps, weight, _per_potential(entry, h)), units, entry)


def _sweep(name: str, sweeps: Any, weight: Any, x: Tensor) -> Tensor:
    """Through autograd only where a derivative is wanted: rows on demand have none."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or getattr(weight, "requires_grad", False))
    return getattr(gradients if wanted else sweeps, name)(*((sweeps, weight, x) if wanted else (weight, x)))


def _in_range(sweeps: Any, weight: Any, h: Tensor) -> bool:
    """A token whose reader has influence must have some itself; if it has none, a product underflowed."""
    if not bool(torch.isfinite(h).all()):
        return False
    vanished = (h < _SMALLEST_NORMAL) & sweeps.hands_on
    if not bool(vanished.any()):
        return True
    position = torch.arange(h.shape[-1], device=h.device).expand_as(h)
    vanished &= position < sweeps.spread(sweeps.largest(torch.where(h > 0, position, -1)))  # someone later is read
    return not bool(vanished.any()) or not sweeps.any_weight(weight, target=h > 0, source=vanished)


def _influence_in_range(sweeps: Any, weight: Any, h: Tensor, g: Tensor) -> bool:
    """The same for g, where it matters: what reads a token with influence, and reaches the demand, has some."""
    if not bool(torch.isfinite(g).all()):
        return False
    position = torch.arange(g.shape[-1], device=g.device).expand_as(g)
    first_source = -sweeps.spread(sweeps.largest(torch.where(g > 0, -position, -(2**40))))
    vanished = (g < _SMALLEST_NORMAL) & (h > 0) & (position > first_source)
    if not bool(vanished.any()):
        return True
    return not bool((vanished & (g > 0)).any()) and not sweeps.any_weight(
        weight, target=vanished, source=(g > 0) & sweeps.hands_on
    )


def _entry(sweeps: Any, h: Tensor, units: Tensor, question: Tensor, rule: str | Tensor) -> Tensor:
    """One unit per graph, spread over tokens that reach the demand."""
    reaches = h > 0
    if isinstance(rule, Tensor):
        share = rule * reaches
    elif rule == "uniform":
        share = (question & reaches).to(h.dtype)
    else:  # in proportion to the true potential, in units of the largest of each graph
        largest = sweeps.spread(sweeps.largest(torch.where(question & reaches, units, -(2**40))))
        share = torch.where(question & reaches, scaled(h, (units - largest).clamp_max(0)), 0.0)
    total = sweeps.spread(sweeps.total(share))
    return torch.where(share > 0, share / torch.where(total > 0, total, 1.0), 0.0)


def _per_potential(entry: Tensor, h: Tensor) -> Tensor:
    return torch.where(entry > 0, entry / torch.where(entry > 0, h, 1.0), 0.0)
