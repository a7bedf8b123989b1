"""RowSource and its implementations: matrix, cached and rescaled rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from flowgraph.errors import GraphError
from flowgraph.propagation.block_substitution import BLOCK
from flowgraph.propagation.scaling import scaled


class RowSource(Protocol):
    """Rows of a batch of causal matrices, computed or fetched on demand."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """Rows ``[start, stop)``, columns ``[0, stop)``: causality leaves nothing to the right."""
        ...


@dataclass(frozen=True)
class BalancedRows:
    """Rows in other units, see :mod:`~flowgraph.propagation.scaling`."""

    source: RowSource
    exponent: Int64[Tensor, "graphs tokens"]
    propagation_factor: Bool[Tensor, "graphs tokens"]

    @property
    def num_tokens(self) -> int:
        return self.source.num_tokens

    @property
    def device(self) -> torch.device:
        return self.source.device

    def block(self, start: int, stop: int) -> Float64[Tensor, "graphs block stop"]:
        gap = self.exponent[:, start:stop, None] - self.exponent[:, None, :stop]
        return scaled(self.source.block(start, stop) * self.propagation_factor[:, None, :stop], gap)


@dataclass(frozen=True)
class MatrixRows:
    """Whole attention matrices in the shape of :class:`RowSource`."""

    matrix: Float[Tensor, "graphs tokens tokens"]

    @property
    def num_tokens(self) -> int:
        return self.matrix.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        """A view."""
        return self.matrix[:, start:stop, :stop]


def as_row_source(rows: RowSource | Tensor, *, triangle_only: bool = False) -> RowSource:
    """Accept a matrix ``[T, T]``, or a batch of them, wherever streamed rows are accepted.

    Args:
        rows: a matrix, or what is a source already.
        triangle_only: what stands above the diagonal is no business of the caller's.

    Raises:
        GraphError: no square floating point matrix, or one with weights above the diagonal.
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
    matrix = rows[None] if rows.ndim == 2 else rows
    if not triangle_only:
        _refuse_future(matrix)
    return MatrixRows(matrix)


def _refuse_future(matrix: Tensor) -> None:
    """Columns to the right of a block are never read, so a whole matrix is checked when it comes in."""
    for start in range(0, matrix.shape[-1], BLOCK):
        rows = matrix[:, start : start + BLOCK, start:].triu(1)
        if bool(rows.any()):
            _, row, column = rows.nonzero()[0].tolist()
            raise GraphError(
                f"attention: must be causal (zero above the diagonal), got {rows[rows != 0][0].item():g} at "
                f"[{start + row}, {start + column}]; row t is the reader t, and it reads tokens 0..t"
            )


@dataclass
class KeptRows:
    """Rows that are remembered as long as they fit: later sweeps over a short text recompute nothing.

    What is kept is decided by position alone, the first blocks that fit into ``budget`` bytes, so that both
    directions of reading find the same ones.
    """

    source: RowSource
    budget: int = 2**28
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _store: Tensor | None = None
    _used: int = 0

    @property
    def num_tokens(self) -> int:
        return self.source.num_tokens

    @property
    def device(self) -> torch.device:
        return self.source.device

    def block(self, start: int, stop: int) -> Float[Tensor, "graphs block stop"]:
        rows = self._kept.get((start, stop))
        if rows is None:
            rows = self.source.block(start, stop)
            if rows.shape[0] * stop * (stop + 1) // 2 * rows.element_size() <= self.budget:  # it and all before it
                self._keep(start, stop, rows)
        return rows

    def _keep(self, start: int, stop: int, rows: Tensor) -> None:
        """Copy it into one allocation of the whole budget: kept among passing blocks, they would riddle the heap."""
        if self._store is None:
            widest = rows.shape[0] * rows.shape[1] * self.num_tokens
            whole = rows.shape[0] * self.num_tokens**2 // 2 + widest
            room = min(whole, self.budget // rows.element_size() + widest)
            self._store = torch.empty(room, dtype=rows.dtype, device=rows.device)
        if self._used + rows.numel() <= self._store.numel():
            self._kept[start, stop] = self._store[self._used : self._used + rows.numel()].view(rows.shape).copy_(rows)
            self._used += rows.numel()
