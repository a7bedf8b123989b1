r"""The two sweeps of the method, by block forward substitution.

With :math:`N = C D` (capacities C, strictly lower triangular; D the diagonal of what each token hands on: damping,
or 0 where it absorbs),

.. math:: h = b + N^\top h \qquad\text{and}\qquad g = q + N g .

Both are triangular systems, so they are solved exactly in one pass over the rows: for a block of tokens
``[i, j)`` everything that comes from outside the block is one product (pull) or one scatter (push), and what
remains is a unit triangular system of the block's size. There is no iteration count and no tolerance. With
non-negative terms nothing cancels, and each entry is accurate to a few units in its own last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor

BLOCK = 128
"""Tokens per dense block: large enough to amortise a kernel call, small enough that in-block work stays minor."""


class BlockRows(Protocol):
    """The rows of C for the tokens ``[start, stop)`` of every graph of a batch."""

    inner: Float64[Tensor, "graphs block block"]
    """``C[start:stop, start:stop]``, strictly lower triangular."""

    def pull(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, "graphs block"]:
        """``C[start:stop, :start] @ x[:start]``; x is zero from ``start`` on."""
        ...

    def push(self, y: Float64[Tensor, "graphs block"], out: Float64[Tensor, "graphs tokens"]) -> None:
        """``out[:start] += C[start:stop, :start].T @ y``; what it does to ``out[start:]`` is of no account."""
        ...


Rows_co = TypeVar("Rows_co", bound=BlockRows, covariant=True)


class BlockOperator(Protocol[Rows_co]):
    """A batch of causal matrices C that can be read in blocks of rows; see :mod:`.operators`."""

    num_tokens: int
    block: int

    def rows(self, start: int, stop: int) -> Rows_co:
        """Read the rows of the tokens ``[start, stop)``."""
        ...


def potential(
    operator: BlockOperator,
    propagation_factor: Float64[Tensor, "graphs tokens"],
    demand: Float64[Tensor, "graphs tokens"],
) -> Float64[Tensor, "graphs tokens"]:
    r"""Backward potential :math:`h = b + D C^\top h` (total influence of each token that reaches the demand).

    Args:
        operator: C in blocks of rows.
        propagation_factor: the diagonal of D.
        demand: b.

    Returns:
        h, same shape. Cost: one read of C.
    """
    h, accumulated = demand.clone(), torch.zeros_like(demand)
    for start in reversed(range(0, operator.num_tokens, operator.block)):
        here = slice(start, min(start + operator.block, operator.num_tokens))
        rows = operator.rows(here.start, here.stop)
        known = demand[:, here] + propagation_factor[:, here] * accumulated[:, here]
        h[:, here] = _solve((rows.inner * propagation_factor[:, None, here]).mT, known, upper=True)
        rows.push(h[:, here], accumulated)
    return h


def influence(
    operator: BlockOperator,
    propagation_factor: Float64[Tensor, "graphs tokens"],
    inflow: Float64[Tensor, "graphs tokens"],
) -> Float64[Tensor, "graphs tokens"]:
    r"""Forward influence :math:`g = q + C D g` (influence arriving at each token per unit of its potential).

    Args:
        operator: C in blocks of rows.
        propagation_factor: the diagonal of D.
        inflow: q = source / h.

    Returns:
        g, same shape. Cost: one read of C.
    """
    g = inflow.clone()
    for _ in influence_steps(operator, propagation_factor, g):
        pass
    return g


def influence_steps(
    operator: BlockOperator[Rows_co],
    propagation_factor: Float64[Tensor, "graphs tokens"],
    g: Float64[Tensor, "graphs tokens"],
) -> Iterator[tuple[slice, Rows_co]]:
    """The same sweep in place, ``g`` holding the inflow at first, one block at a time.

    What is yielded is the block just finished and its rows, for callers that use each row while it is in memory.
    """
    propagated = torch.zeros_like(g)
    for start in range(0, operator.num_tokens, operator.block):
        here = slice(start, min(start + operator.block, operator.num_tokens))
        rows = operator.rows(here.start, here.stop)
        known = g[:, here] + rows.pull(propagated)
        g[:, here] = _solve(rows.inner * propagation_factor[:, None, here], known, upper=False)
        propagated[:, here] = propagation_factor[:, here] * g[:, here]
        yield here, rows


def _solve(inner: Tensor, rhs: Tensor, *, upper: bool) -> Tensor:
    """Solve ``(I - inner) x = rhs``; the unit diagonal is implied, so negating is all the set-up there is."""
    return torch.linalg.solve_triangular(-inner, rhs.unsqueeze(-1), upper=upper, unitriangular=True).squeeze(-1)
