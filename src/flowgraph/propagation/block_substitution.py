r"""The two sweeps of the method, by block forward and backward substitution.

With :math:`N = C D` (capacities C, strictly lower triangular; D the diagonal of what each token propagates: the
damping, or 0 where it absorbs),

.. math:: h = b + N^\top h \qquad\text{and}\qquad g = q + N g .

Both are triangular systems, so one pass over the rows solves each exactly. For a block of tokens ``[start, stop)``,
the contribution of all tokens outside the block is one product (pull) or one scatter (push). What remains is a unit
triangular system of the size of the block. There is no iteration count and no tolerance. All terms are non-negative,
so nothing cancels, and each entry is accurate to a few units in its last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

BLOCK = 128
"""Tokens per dense block: large enough to amortise a kernel call, small enough to keep the in-block work minor."""


def token_blocks(num_tokens: int, size: int = BLOCK) -> list[slice]:
    """Cut the tokens into blocks of ``size``, the last one shorter.

    Example:
        >>> token_blocks(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    blocks = []
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        blocks.append(slice(start, stop))
    return blocks


@runtime_checkable
class BlockRows(Protocol):
    """The rows of C for the tokens ``[start, stop)`` of every graph of a batch.

    Attributes:
        inner: ``C[start:stop, start:stop]``, strictly lower triangular.
    """

    inner: Float64[Tensor, "graphs block block"]

    def pull(self, x: Float64[Tensor, "graphs tokens"]) -> Float64[Tensor, "graphs block"]:
        """Return ``C[start:stop, :start] @ x[:start]``; x is 0 from ``start`` on."""
        ...

    def push(
        self,
        y: Float64[Tensor, "graphs block"],
        out: Float64[Tensor, "graphs tokens"],
    ) -> None:
        """Add ``C[start:stop, :start].T @ y`` to ``out[:start]``; ``out[start:]`` is scratch afterwards."""
        ...


Rows_co = TypeVar("Rows_co", bound=BlockRows, covariant=True)


@runtime_checkable
class BlockOperator(Protocol[Rows_co]):
    """A batch of causal matrices C that can be read in blocks of rows; see :mod:`.operators`.

    Attributes:
        num_tokens: tokens of each sequence, padding included.
        block: tokens per block.
    """

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
    r"""Solve for the backward potential :math:`h = b + D C^\top h`, last block first.

    Args:
        operator: C in blocks of rows.
        propagation_factor: ``[graphs, tokens]`` the diagonal of D.
        demand: ``[graphs, tokens]`` b.

    Returns:
        h, same shape: the total influence of each token that reaches the demand. Cost: one read of C.
    """
    h = demand.clone()
    # C^T h over the blocks that are solved already.
    accumulated = torch.zeros_like(demand)
    for here in reversed(token_blocks(operator.num_tokens, operator.block)):
        rows = operator.rows(here.start, here.stop)
        factor = propagation_factor[:, here]

        # Outside the block: b + D C^T h. Inside: (I - D C^T) h = known.
        known = demand[:, here] + factor * accumulated[:, here]
        inner = (rows.inner * factor[:, None, :]).mT
        h[:, here] = _solve_unit_triangular(inner, known, upper=True)

        rows.push(h[:, here], accumulated)
    return h


def influence(
    operator: BlockOperator,
    propagation_factor: Float64[Tensor, "graphs tokens"],
    inflow: Float64[Tensor, "graphs tokens"],
) -> Float64[Tensor, "graphs tokens"]:
    r"""Solve for the forward influence :math:`g = q + C D g`, first block first.

    Args:
        operator: C in blocks of rows.
        propagation_factor: ``[graphs, tokens]`` the diagonal of D.
        inflow: ``[graphs, tokens]`` q = source / h.

    Returns:
        g, same shape: the influence that arrives at each token per unit of its potential. Cost: one read of C.
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
    """Run the forward sweep in place, one block at a time, for callers that use each row while it is in memory.

    Args:
        operator: C in blocks of rows.
        propagation_factor: ``[graphs, tokens]`` the diagonal of D.
        g: ``[graphs, tokens]``; holds q at first, and g at the end.

    Yields:
        The block just solved, and its rows.
    """
    # D g over the blocks that are solved already.
    propagated = torch.zeros_like(g)
    for here in token_blocks(operator.num_tokens, operator.block):
        rows = operator.rows(here.start, here.stop)
        factor = propagation_factor[:, here]

        # Outside the block: q + C D g. Inside: (I - C D) g = known.
        known = g[:, here] + rows.pull(propagated)
        inner = rows.inner * factor[:, None, :]
        g[:, here] = _solve_unit_triangular(inner, known, upper=False)

        propagated[:, here] = factor * g[:, here]
        yield here, rows


def _solve_unit_triangular(inner: Tensor, known: Tensor, *, upper: bool) -> Tensor:
    """Solve ``(I - inner) x = known``; the solver implies the unit diagonal, so ``-inner`` is its matrix."""
    column = known.unsqueeze(-1)
    solution = torch.linalg.solve_triangular(-inner, column, upper=upper, unitriangular=True)
    return solution.squeeze(-1)
