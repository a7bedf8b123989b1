r"""Both sweeps as differentiable functions: the adjoint of each is the other.

With :math:`h = b + D C^\top h` and a gradient :math:`\bar h`, the adjoint :math:`\lambda = \bar h + C D \lambda` is
an influence sweep; :math:`\bar b = \lambda` and :math:`\bar C[t, s] = h[t] \, D[s] \lambda[s]`. With
:math:`g = q + C D g` and :math:`\bar g`, :math:`\lambda = \bar g + D C^\top \lambda` is a potential sweep;
:math:`\bar q = \lambda` and :math:`\bar C[t, s] = \lambda[t] \, D[s] g[s]`. Nothing but the solution is stored, and
each backward pass is made of the same two functions, so derivatives of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowgraph.propagation.interface import Sweeps


def potential(sweeps: Sweeps, weight: Any, demand: Tensor) -> Tensor:
    """Differentiable ``h = b + D C^T h``; see :meth:`Sweeps.potential`."""
    return _Potential.apply(sweeps, weight, demand)  # type: ignore[return-value]


def influence(sweeps: Sweeps, weight: Any, inflow: Tensor) -> Tensor:
    """Differentiable ``g = q + C D g``; see :meth:`Sweeps.influence`."""
    return _Influence.apply(sweeps, weight, inflow)  # type: ignore[return-value]


class _Potential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sweeps: Sweeps, weight: Any, demand: Tensor) -> Tensor:
        h = sweeps.potential(weight, demand)
        _save(ctx, sweeps, weight, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor]:
        weight, h = _saved(ctx)
        adjoint = influence(ctx.sweeps, weight, gradients[0])
        return None, _of_weight(ctx, weight, h, adjoint), adjoint


class _Influence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sweeps: Sweeps, weight: Any, inflow: Tensor) -> Tensor:
        g = sweeps.influence(weight, inflow)
        _save(ctx, sweeps, weight, g)
        return g

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor]:
        weight, g = _saved(ctx)
        adjoint = potential(ctx.sweeps, weight, gradients[0])
        return None, _of_weight(ctx, weight, adjoint, g), adjoint


def _save(ctx: Any, sweeps: Sweeps, weight: Any, solution: Tensor) -> None:
    """Rows on demand are no tensor and have no gradient; they are read again for that of the other argument."""
    ctx.sweeps, ctx.rows = sweeps, None if isinstance(weight, Tensor) else weight
    ctx.save_for_backward(*((weight, solution) if ctx.rows is None else (solution,)))


def _saved(ctx: Any) -> tuple[Any, Tensor]:
    return ctx.saved_tensors if ctx.rows is None else (ctx.rows, ctx.saved_tensors[0])


def _of_weight(ctx: Any, weight: Tensor, at_target: Tensor, at_source: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    return ctx.sweeps.outer(at_target, at_source).to(weight.dtype)
