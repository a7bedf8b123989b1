"""The two sweeps over rows: dense matrices that are read in place, or rows that are computed on demand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.propagation import block_substitution, numba_backend
from flowgraph.propagation.block_substitution import token_blocks
from flowgraph.propagation.checks import check_weights_below_diagonal
from flowgraph.propagation.interface import Backend, IncomingEdges, in_order
from flowgraph.propagation.operators import DenseOperator, StreamedOperator
from flowgraph.propagation.row_sources import BalancedRows, RowSource
from flowgraph.propagation.scaling import scaled


class _SequenceVectors:
    """Sums and broadcasts of vectors ``[B, T]``, one sequence per row."""

    propagation_factor: Float64[Tensor, "graphs tokens"]

    @property
    def can_propagate(self) -> Bool[Tensor, "graphs tokens"]:
        return self.propagation_factor > 0

    def total(self, x: Tensor) -> Float64[Tensor, " graphs"]:
        return x.sum(-1)

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax(-1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x[:, None].expand_as(self.propagation_factor)


class DenseSweeps(_SequenceVectors):
    """Sweeps over matrices ``[B, T, T]`` that are read in place; the diagonal and everything above it are ignored.

    Args:
        propagation_factor: ``[B, T]`` the diagonal of D.
        backend: ``"dense"`` (torch), ``"numba"`` (compiled, CPU), or ``"auto"``: compiled where it runs.

    Raises:
        InvalidInputError: another backend, or ``"numba"`` on another device than the CPU.
        MissingExtraError: the package of the backend is not installed.
    """

    def __init__(
        self,
        propagation_factor: Float64[Tensor, "graphs tokens"],
        backend: Backend = "auto",
    ) -> None:
        if backend not in ("auto", "dense", "numba"):
            raise InvalidInputError(
                f"backend: dense rows are solved by 'dense' or 'numba', got {backend!r}; 'auto' takes what is there"
            )
        device = propagation_factor.device
        if backend == "auto":
            backend = "numba" if numba_backend.runs_on(device) else "dense"
        if backend == "numba":
            numba_backend.require(device)
        self.propagation_factor = propagation_factor
        self.backend: Backend = backend

    def potential(self, weight: Tensor, demand: Tensor) -> Tensor:
        if self._is_compiled(weight):
            return numba_backend.dense_potential(weight, self.propagation_factor, demand)
        return block_substitution.potential(DenseOperator(weight), self.propagation_factor, demand)

    def influence(self, weight: Tensor, inflow: Tensor) -> Tensor:
        if self._is_compiled(weight):
            return numba_backend.dense_influence(weight, self.propagation_factor, inflow)
        return block_substitution.influence(DenseOperator(weight), self.propagation_factor, inflow)

    def _is_compiled(self, weight: Tensor) -> bool:
        """Half-precision matrices are solved in torch, which converts them block by block."""
        return self.backend == "numba" and numba_backend.accepts(weight.dtype)

    def outer(self, at_target: Tensor, at_source: Tensor) -> Tensor:
        propagated = self.propagation_factor * at_source
        return (at_target[:, :, None] * propagated[:, None, :]).tril(-1)

    def incoming_edges(self, weight: Tensor, *, last_first: bool) -> Iterator[IncomingEdges]:
        num_tokens = weight.shape[-1]
        for graph, matrix in enumerate(weight.detach()):
            first = graph * num_tokens
            for t in in_order(range(num_tokens), last_first):
                weights = matrix[t, :t].double().cpu().numpy()
                yield first + t, slice(first, first + t), weights

    def balanced(self, weight: Tensor, scale_exponent: Tensor) -> Tensor:
        # An infinite weight makes the potential infinite, which leads here.
        check_weights_below_diagonal(weight)
        active = weight.tril(-1) * (self.propagation_factor > 0)[:, None, :]
        return scaled(active, scale_exponent[:, :, None] - scale_exponent[:, None, :])

    def has_edge(self, weight: Tensor, *, source: Tensor, target: Tensor) -> bool:
        position = torch.arange(weight.shape[-1], device=weight.device)
        for matrix, is_source, is_target in zip(weight.detach(), source, target, strict=True):
            # Only the columns of sources are read; entries on and above the diagonal are no edges.
            columns = is_source.nonzero().flatten()
            is_below_diagonal = position[:, None] > columns
            is_positive = matrix[:, columns] > 0
            is_edge = is_positive & is_target[:, None] & is_below_diagonal
            if bool(is_edge.any()):
                return True
        return False


class StreamSweeps(_SequenceVectors):
    """Sweeps over rows that are computed on demand, block by block, and have no gradient of their own.

    The weight is a :class:`~flowgraph.propagation.row_sources.RowSource`.

    Args:
        propagation_factor: ``[B, T]`` the diagonal of D.
    """

    backend = "streamed"

    def __init__(self, propagation_factor: Float64[Tensor, "graphs tokens"]) -> None:
        self.propagation_factor = propagation_factor

    def potential(self, weight: RowSource, demand: Tensor) -> Tensor:
        return block_substitution.potential(StreamedOperator(weight), self.propagation_factor, demand)

    def influence(self, weight: RowSource, inflow: Tensor) -> Tensor:
        return block_substitution.influence(StreamedOperator(weight), self.propagation_factor, inflow)

    def incoming_edges(
        self,
        weight: RowSource,
        *,
        last_first: bool,
    ) -> Iterator[IncomingEdges]:
        num_tokens = weight.num_tokens
        for here in in_order(_streamed_blocks(weight), last_first):
            rows = weight.block(here.start, here.stop).double().cpu().numpy()
            # Tokens are numbered through the batch: token t of a graph is first_node + t.
            for graph, block in enumerate(rows):
                first_node = graph * num_tokens
                for row in in_order(range(block.shape[0]), last_first):
                    t = here.start + row
                    sources = slice(first_node, first_node + t)
                    yield first_node + t, sources, block[row, :t]

    def balanced(self, weight: RowSource, scale_exponent: Tensor) -> RowSource:
        return BalancedRows(weight, scale_exponent, self.propagation_factor > 0)

    def has_edge(self, weight: RowSource, *, source: Tensor, target: Tensor) -> bool:
        # A column is read if it is a source in any sequence.
        source_columns = source.any(0).nonzero().flatten()
        for here in _streamed_blocks(weight):
            columns = source_columns[source_columns < here.stop]
            is_positive = weight.block(here.start, here.stop)[:, :, columns] > 0
            is_edge = is_positive & target[:, here, None] & source[:, None, columns]
            if bool(is_edge.any()):
                return True
        return False


def _streamed_blocks(rows: RowSource) -> list[slice]:
    """List the blocks that the sweeps read, so that stored blocks are found again."""
    return token_blocks(rows.num_tokens, StreamedOperator(rows).block)
