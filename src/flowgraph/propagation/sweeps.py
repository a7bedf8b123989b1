r"""The two sweeps of the method, by block forward substitution.

With :math:`N` the (strictly lower triangular) matrix of capacities, absorbing columns zeroed,

.. math:: h = b + N^\top h \qquad\text{and}\qquad g = q + N g .

Both are triangular systems, so they are solved exactly in one pass over the rows: for a block of tokens
``[i, j)`` everything that comes from outside the block is one product (pull) or one scatter (push), and what
remains is a unit triangular system of the block's size. There is no iteration count and no tolerance. Every
term is non-negative, so nothing cancels and each entry is accurate to a few units in its own last place.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

BLOCK = 128
"""Tokens per block: large enough to amortise a kernel call, small enough that in-block work stays minor."""


class BlockRows(Protocol):
    """The rows of N for the tokens ``[start, stop)`` of every graph of a batch."""

    inner: Float64[Tensor, "graphs block block"]
    """``N[start:stop, start:stop]``, strictly lower triangular."""

    def pull(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, "graphs block"]:
        """``N[start:stop, :start] @ x[:start]``: what the block receives from earlier tokens."""
        ...

    def push(self, y: Float64[Tensor, "graphs block"], out: Float64[Tensor, "graphs tokens"]) -> None:
        """``out[:start] += N[start:stop, :start].T @ y``: what the block's readers hand back to earlier tokens."""
        ...


class BlockOperator(Protocol):
    """A batch of causal matrices N that can be read in blocks of rows; see :mod:`.operators`."""

    num_graphs: int
    num_tokens: int
    block: int
    device: torch.device

    def rows(self, start: int, stop: int) -> BlockRows:
        """Read the rows of the tokens ``[start, stop)``."""
        ...


def potential(operator: BlockOperator, demand: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, "graphs tokens"]:
    r"""Backward potential :math:`h = b + N^\top h` (total influence of each token that reaches the demand).

    Args:
        operator: N in blocks of rows.
        demand: b, non-negative.

    Returns:
        h, same shape. Cost: one read of N.
    """
    h = demand.clone()
    for start in reversed(range(0, operator.num_tokens, operator.block)):
        stop = min(start + operator.block, operator.num_tokens)
        rows = operator.rows(start, stop)
        h[:, start:stop] = _solve(rows.inner.mT, h[:, start:stop], upper=True)
        rows.push(h[:, start:stop], h)
    return h


def influence(operator: BlockOperator, inflow: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, "graphs tokens"]:
    r"""Forward influence :math:`g = q + N g` (influence arriving at each token per unit of its potential).

    Args:
        operator: N in blocks of rows.
        inflow: q = source / h, non-negative.

    Returns:
        g, same shape. Cost: one read of N.
    """
    g = inflow.clone()
    for start in range(0, operator.num_tokens, operator.block):
        stop = min(start + operator.block, operator.num_tokens)
        rows = operator.rows(start, stop)
        g[:, start:stop] = _solve(rows.inner, g[:, start:stop] + rows.pull(g), upper=False)
    return g


def _solve(inner: Tensor, rhs: Tensor, *, upper: bool) -> Tensor:
    """Solve ``(I - inner) x = rhs``; the unit diagonal is implied, so negating is all the set-up there is."""
    return torch.linalg.solve_triangular(-inner, rhs.unsqueeze(-1), upper=upper, unitriangular=True).squeeze(-1)
