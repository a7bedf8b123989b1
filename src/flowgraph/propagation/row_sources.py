"""Rows of causal matrices that are read in blocks: the protocol, and the sources that wrap a matrix or another source.

Row t holds the weights ``C[t, s]`` with which token t reads the tokens s. A source yields the rows ``[start, stop)``
with the columns ``[0, stop)``: by causality, everything to the right is 0.

- :class:`MatrixRows`: the rows of a matrix in memory; :func:`as_row_source` makes it from a tensor and checks it.
- :class:`KeptRows`: the rows of another source, stored up to a memory budget, so that later sweeps need not recompute.
- :class:`BalancedRows`: the rows of another source, scaled by powers of two (see :mod:`.scaling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from flowgraph.errors import GraphError
from flowgraph.propagation.block_substitution import token_blocks
from flowgraph.propagation.scaling import scaled

KEPT_BYTES = 2**28
"""Memory budget of :class:`KeptRows`: 256 MiB."""


@runtime_checkable
class RowSource(Protocol):
    """Rows of a batch of causal matrices, computed or fetched on demand."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Return the rows ``[start, stop)``, columns ``[0, stop)``."""
        ...


# A matrix ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixRows:
    """The rows of matrices in memory.

    Attributes:
        matrix: ``[graphs, tokens, tokens]``.
    """

    matrix: Float[Tensor, "graphs tokens tokens"]

    @property
    def num_tokens(self) -> int:
        return self.matrix.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Return the rows as a view."""
        return self.matrix[:, start:stop, :stop]


def as_row_source(rows: RowSource | Tensor, *, triangle_only: bool = False) -> RowSource:
    """Accept a matrix ``[T, T]``, or a batch of them, where streamed rows are accepted.

    Args:
        rows: a matrix, a batch of matrices, or a source, which is returned unchanged.
        triangle_only: ignore the entries above the diagonal instead of checking that they are 0.

    Raises:
        GraphError: the matrix is not square or not floating point, or has weights above the diagonal.
    """
    if not isinstance(rows, Tensor):
        return rows
    if rows.ndim not in (2, 3) or rows.shape[-1] != rows.shape[-2]:
        raise GraphError(
            f"rows: must be a square matrix [tokens, tokens] or a batch of them, got shape {tuple(rows.shape)}; "
            "aggregate heads and layers first"
        )
    if not rows.is_floating_point():
        raise GraphError(f"rows: must be floating point, got {rows.dtype}; call .float() on them")

    # One sequence is a batch of one.
    matrix = rows[None] if rows.ndim == 2 else rows
    if not triangle_only:
        _check_causal(matrix)
    return MatrixRows(matrix)


def _check_causal(matrix: Tensor) -> None:
    """Refuse weights above the diagonal. A sweep never reads them, so the matrix is checked once, on entry."""
    for block in token_blocks(matrix.shape[-1]):
        above = matrix[:, block, block.start :].triu(1)
        if bool(above.any()):
            _, row, column = above.nonzero()[0].tolist()
            raise GraphError(
                f"attention: must be causal (zero above the diagonal), got {above[above != 0][0].item():g} at "
                f"[{block.start + row}, {block.start + column}]; row t is the reader t, and it reads tokens 0..t"
            )


# Rows of another source --------------------------------------------------------------------------------------


class _DerivedRows:
    """Rows made from those of ``source``, with its tokens and device."""

    source: RowSource

    @property
    def num_tokens(self) -> int:
        return self.source.num_tokens

    @property
    def device(self) -> torch.device:
        return self.source.device


@dataclass(frozen=True)
class BalancedRows(_DerivedRows):
    """``C[t, s] * 2**(k[t] - k[s])``, and 0 where the source s propagates nothing.

    Attributes:
        source: the rows of C.
        scale_exponent: ``[graphs, tokens]`` k; see :mod:`.scaling`.
        propagates: ``[graphs, tokens]`` tokens with a positive propagation factor.
    """

    source: RowSource
    scale_exponent: Int64[Tensor, "graphs tokens"]
    propagates: Bool[Tensor, "graphs tokens"]

    def block(self, start: int, stop: int) -> Float64[Tensor, "graphs block stop"]:
        """Return the scaled rows ``[start, stop)`` in float64."""
        at_target = self.scale_exponent[:, start:stop, None]
        at_source = self.scale_exponent[:, None, :stop]
        active = self.source.block(start, stop) * self.propagates[:, None, :stop]
        return scaled(active, at_target - at_source)


class KeptRows(_DerivedRows):
    """Rows that are stored as long as they fit, so that later sweeps over a short text recompute nothing.

    The first blocks of the text are stored, up to ``budget`` bytes. The choice depends on the position alone, so the
    backward and the forward sweep find the same blocks.

    Args:
        source: the rows.
        budget: memory in bytes.
    """

    def __init__(self, source: RowSource, budget: int = KEPT_BYTES) -> None:
        self.source = source
        self.budget = budget
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._storage: Tensor | None = None
        self._used = 0

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Return the rows from storage, or compute them."""
        stored = self._blocks.get((start, stop))
        if stored is not None:
            return stored
        rows = self.source.block(start, stop)
        # The size of the triangle that ends with this block: it and all blocks before it.
        numbers_so_far = rows.shape[0] * stop * (stop + 1) // 2
        if numbers_so_far * rows.element_size() <= self.budget:
            self._store(start, stop, rows)
        return rows

    def _store(self, start: int, stop: int, rows: Tensor) -> None:
        """Copy the rows into one allocation: many small ones between short-lived blocks would fragment the heap."""
        if self._storage is None:
            self._storage = self._allocate(rows)

        # What does not fit is computed again in the next sweep.
        end = self._used + rows.numel()
        if end > self._storage.numel():
            return
        stored = self._storage[self._used : end].view(rows.shape)
        stored.copy_(rows)
        self._blocks[start, stop] = stored
        self._used = end

    def _allocate(self, rows: Tensor) -> Tensor:
        """Allocate room for all blocks of the text, or for the budget, whichever is smaller."""
        graphs, num_rows, _ = rows.shape
        # Blocks are rectangles, so they stick out of the triangle by up to one block of full width.
        widest_block = graphs * num_rows * self.num_tokens
        all_blocks = graphs * self.num_tokens**2 // 2 + widest_block
        within_budget = self.budget // rows.element_size() + widest_block
        return torch.empty(min(all_blocks, within_budget), dtype=rows.dtype, device=rows.device)
