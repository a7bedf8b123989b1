r"""From capacities to the conserved unit flow: one recipe over every kind of :class:`Sweeps`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.propagation import gradients
from flowgraph.propagation.scaling import exponents, scaled

_LEAST, _LARGEST = 2.0**-150, 2.0**150
"""Potentials inside make g * N * h right to the last digit, in any order, for every flow above 2**-800 of the unit."""


@dataclass(frozen=True, eq=False)
class ConservedFlow:
    """Both potentials and where the unit enters; vectors ``[N]`` over a batch of graphs, or ``[B, T]``.

    Attributes:
        h, g: potential and influence in units of ``2**exponent`` and ``2**-exponent``: ``g * h`` needs no unit.
        exponent: 0 everywhere unless some potential leaves 2**-150 .. 2**150.
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

    Should h leave the middle of the range of float64, or g the range, the same system is solved once more in balanced
    units (:mod:`~flowgraph.propagation.scaling`). Which token reaches the demand is then read off the topology; before,
    it is ``h > 0``, and checked to be the same.

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
        if bool(torch.isfinite(g.detach()).all()):  # beside the routes, where h is 0, influence may grow to anything
            return ConservedFlow(h, g, units, entry)
    units = exponents(sweeps, weight, demand)
    weight, demand = sweeps.balanced(weight, units), scaled(demand, -units)
    h = _sweep("potential", sweeps, weight, demand)
    entry = _entry(sweeps, h, units, question, source)
    return ConservedFlow(h, _sweep("influence", sweeps, weight, _per_potential(entry, h)), units, entry)


def _sweep(name: str, sweeps: Any, weight: Any, x: Tensor) -> Tensor:
    """Through autograd only where a derivative is wanted, of the weights or of what enters."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or getattr(weight, "requires_grad", False))
    return getattr(gradients if wanted else sweeps, name)(*((sweeps, weight, x) if wanted else (weight, x)))


def _in_range(sweeps: Any, weight: Any, h: Tensor) -> bool:
    """Whether float64 holds the potential with room to spare for every product that is made of it.

    A token whose reader has influence must have some itself; if it has none, a product underflowed.
    """
    if not float(h.max()) <= _LARGEST or float(torch.where(h > 0, h, 1.0).min()) < _LEAST:  # NaN is not in range
        return False
    vanished = (h == 0) & sweeps.can_propagate
    if not bool(vanished.any()):
        return True
    position = torch.arange(h.shape[-1], device=h.device).expand_as(h)
    vanished &= position < sweeps.spread(sweeps.largest(torch.where(h > 0, position, -1)))  # someone later is read
    return not bool(vanished.any()) or not sweeps.any_weight(weight, target=h > 0, source=vanished)


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
