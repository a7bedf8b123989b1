r"""From capacities to the conserved unit flow: one recipe over every kind of :class:`~.interface.Sweeps`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.propagation import gradients
from flowgraph.propagation.ratios import masked_ratio
from flowgraph.propagation.scaling import scale_exponents, scaled

_MIN_POTENTIAL = 2.0**-150
_MAX_POTENTIAL = 2.0**150
"""Potentials in this range keep g * N * h accurate in any order of multiplication, for flows above 2**-800."""
_NO_EXPONENT = -(2**40)
"""Smaller than the scale exponent of any token."""


@dataclass(frozen=True, eq=False)
class ConservedFlow:
    """Both potentials and the source distribution; vectors ``[N]`` over a batch of graphs, or ``[B, T]``.

    Attributes:
        h: potential, scaled: the true potential is ``h * 2**exponent``.
        g: influence, scaled: the true influence is ``g * 2**-exponent``. The product ``g * h`` needs no scaling.
        exponent: 0 everywhere, unless some potential leaves 2**-150 .. 2**150.
        source: share of the unit that enters at each token. Sums to 1 per graph, or to 0 where nothing flows.
    """

    h: Float64[Tensor, " ..."]
    g: Float64[Tensor, " ..."]
    exponent: Int64[Tensor, " ..."]
    source: Float64[Tensor, " ..."]


def conserve(
    sweeps: Any,
    weight: Any,
    *,
    demand: Tensor,
    question: Bool[Tensor, " ..."],
    source: str | Tensor,
) -> ConservedFlow:
    r"""Solve :math:`h = b + N^\top h`, spread one unit over the source tokens, solve :math:`g = \mathrm{src}/h + N g`.

    If h leaves the middle of the range of float64, or g the range itself, the same system is solved once more in
    balanced form (see :mod:`.scaling`). The balanced form shows by the edges alone which tokens reach the demand. In
    the plain form this is ``h > 0``, and the range check makes sure that both agree.

    Args:
        sweeps: how the sweeps are run, with D.
        weight: C.
        demand: b.
        question: tokens of the ``"uniform"`` and ``"potential"`` rules.
        source: ``"uniform"``, ``"potential"`` or a non-negative vector.

    Returns:
        The flow; ``exponent`` is 0 where the plain form was in range. Cost: two reads of the weights; several
        more, and one pass in Python over the tokens, in balanced form.
    """
    # Backward sweep: h = b + N^T h.
    unscaled = torch.zeros(demand.shape, dtype=torch.int64, device=demand.device)
    potential = _potential(sweeps, weight, demand)

    if _is_in_range(sweeps, weight, potential.detach()):
        # Forward sweep: the source enters as q = src / h, then g = q + N g.
        entry = _source_distribution(sweeps, potential, unscaled, question, source)
        influence = _influence(sweeps, weight, inflow(entry, potential))
        # Off the routes (h = 0) g has no bound; a finite g needs no balancing.
        if bool(torch.isfinite(influence.detach()).all()):
            return ConservedFlow(h=potential, g=influence, exponent=unscaled, source=entry)

    # The same two sweeps with N' = 2**k N 2**-k and b' = 2**-k b.
    scale_exponent = scale_exponents(sweeps, weight, demand)
    balanced_weight = sweeps.balanced(weight, scale_exponent)
    balanced_demand = scaled(demand, -scale_exponent)
    potential = _potential(sweeps, balanced_weight, balanced_demand)
    entry = _source_distribution(sweeps, potential, scale_exponent, question, source)
    influence = _influence(sweeps, balanced_weight, inflow(entry, potential))
    return ConservedFlow(h=potential, g=influence, exponent=scale_exponent, source=entry)


def inflow(source: Tensor, potential: Tensor) -> Tensor:
    """Return ``q = src / h``, and 0 where nothing enters."""
    return masked_ratio(source > 0, source, potential)


def _potential(sweeps: Any, weight: Any, demand: Tensor) -> Tensor:
    """Solve ``h = b + N^T h``, through autograd only where a derivative is required."""
    if _needs_gradient(weight, demand):
        return gradients.potential(sweeps, weight, demand)
    return sweeps.potential(weight, demand)


def _influence(sweeps: Any, weight: Any, inflow: Tensor) -> Tensor:
    """Solve ``g = q + N g``, through autograd only where a derivative is required."""
    if _needs_gradient(weight, inflow):
        return gradients.influence(sweeps, weight, inflow)
    return sweeps.influence(weight, inflow)


def _needs_gradient(weight: Any, x: Tensor) -> bool:
    """Tell whether a derivative by the weights or by the other argument of a sweep is required."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or getattr(weight, "requires_grad", False)


def _is_in_range(sweeps: Any, weight: Any, potential: Tensor) -> bool:
    """Tell whether float64 holds the potential, with a margin for every product that is made of it."""
    # The comparisons are written so that NaN counts as out of range.
    largest = float(potential.max())
    smallest = float(torch.where(potential > 0, potential, 1.0).min())
    if not largest <= _MAX_POTENTIAL or smallest < _MIN_POTENTIAL:
        return False

    # A token with an edge to a token with h > 0 has h > 0 itself. If its h is 0, a product underflowed.
    # Only tokens before the last one with h > 0 of their graph can have such an edge.
    position = torch.arange(potential.shape[-1], device=potential.device).expand_as(potential)
    last_reaching = sweeps.maximum(torch.where(potential > 0, position, -1))
    suspects = (potential == 0) & sweeps.can_propagate
    suspects &= position < sweeps.broadcast(last_reaching)
    if not bool(suspects.any()):
        return True
    return not sweeps.has_edge(weight, source=suspects, target=potential > 0)


def _source_distribution(
    sweeps: Any,
    potential: Tensor,
    scale_exponent: Tensor,
    question: Tensor,
    rule: str | Tensor,
) -> Tensor:
    """Spread one unit per graph over source tokens that reach the demand."""
    reaches = potential > 0
    if isinstance(rule, Tensor):
        share = rule * reaches
    elif rule == "uniform":
        share = (question & reaches).to(potential.dtype)
    else:
        # In proportion to the true potential 2**k h. Only ratios count, so the largest k of each graph is divided out.
        enters = question & reaches
        largest = sweeps.maximum(torch.where(enters, scale_exponent, _NO_EXPONENT))
        relative = (scale_exponent - sweeps.broadcast(largest)).clamp_max(0)
        share = torch.where(enters, scaled(potential, relative), 0.0)

    # Normalise: the shares of a graph sum to 1, or to 0 where no source token reaches the demand.
    total = sweeps.broadcast(sweeps.total(share))
    return masked_ratio(share > 0, share, total)
