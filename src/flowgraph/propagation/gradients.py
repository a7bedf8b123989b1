r"""Both sweeps as differentiable functions: the adjoint of each sweep is the other sweep.

With :math:`h = b + D C^\top h` and a gradient :math:`\bar h`, the adjoint :math:`\lambda = \bar h + C D \lambda` is
an influence sweep; :math:`\bar b = \lambda` and :math:`\bar C[t, s] = h[t] \, D[s] \lambda[s]`.

With :math:`g = q + C D g` and a gradient :math:`\bar g`, the adjoint :math:`\lambda = \bar g + D C^\top \lambda` is a
potential sweep; :math:`\bar q = \lambda` and :math:`\bar C[t, s] = \lambda[t] \, D[s] g[s]`.

Only the solution is stored. Each backward pass consists of the same two functions, so derivatives of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowgraph.propagation.interface import Sweeps


def potential(sweeps: Sweeps, weight: Any, demand: Tensor) -> Tensor:
    """Solve ``h = b + D C^T h`` differentiably; see :meth:`.Sweeps.potential`."""
    return _Potential.apply(sweeps, weight, demand)  # type: ignore[return-value]


def influence(sweeps: Sweeps, weight: Any, inflow: Tensor) -> Tensor:
    """Solve ``g = q + C D g`` differentiably; see :meth:`.Sweeps.influence`."""
    return _Influence.apply(sweeps, weight, inflow)  # type: ignore[return-value]


class _Potential(torch.autograd.Function):
    """The backward sweep, with the forward sweep as its adjoint."""

    @staticmethod
    def forward(ctx: Any, sweeps: Sweeps, weight: Any, demand: Tensor) -> Tensor:
        h = sweeps.potential(weight, demand)
        _save(ctx, sweeps, weight, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor]:
        weight, h = _saved(ctx)
        adjoint = influence(ctx.sweeps, weight, gradients[0])
        of_weight = _gradient_of_weight(ctx, weight, at_target=h, at_source=adjoint)
        return None, of_weight, adjoint


class _Influence(torch.autograd.Function):
    """The forward sweep, with the backward sweep as its adjoint."""

    @staticmethod
    def forward(ctx: Any, sweeps: Sweeps, weight: Any, inflow: Tensor) -> Tensor:
        g = sweeps.influence(weight, inflow)
        _save(ctx, sweeps, weight, g)
        return g

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor]:
        weight, g = _saved(ctx)
        adjoint = potential(ctx.sweeps, weight, gradients[0])
        of_weight = _gradient_of_weight(ctx, weight, at_target=adjoint, at_source=g)
        return None, of_weight, adjoint


def _save(ctx: Any, sweeps: Sweeps, weight: Any, solution: Tensor) -> None:
    """Store what the backward pass reads."""
    ctx.sweeps = sweeps
    if isinstance(weight, Tensor):
        ctx.rows = None
        ctx.save_for_backward(weight, solution)
    else:
        # Streamed rows are not a tensor and have no gradient. The adjoint sweep computes them again.
        ctx.rows = weight
        ctx.save_for_backward(solution)


def _saved(ctx: Any) -> tuple[Any, Tensor]:
    """Return the weights (a tensor, or streamed rows) and the solution."""
    if ctx.rows is None:
        return ctx.saved_tensors
    return ctx.rows, ctx.saved_tensors[0]


def _gradient_of_weight(
    ctx: Any,
    weight: Any,
    *,
    at_target: Tensor,
    at_source: Tensor,
) -> Tensor | None:
    """Return ``at_target[t] * D[s] * at_source[s]`` for each weight, where this gradient is required."""
    if not ctx.needs_input_grad[1]:
        return None
    return ctx.sweeps.outer(at_target, at_source).to(weight.dtype)
