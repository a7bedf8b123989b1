"""The two sweeps over rows: dense matrices read in place, or rows that are produced on demand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.propagation import block_substitution as sweeps
from flowgraph.propagation import numba_backend as compiled
from flowgraph.propagation.interface import Backend, in_token_order
from flowgraph.propagation.operators import DenseOperator, StreamedOperator
from flowgraph.propagation.row_sources import BalancedRows, RowSource
from flowgraph.propagation.scaling import scaled


class _SequenceSums:
    """Sums over vectors ``[B, T]``, one sequence a row."""

    propagation_factor: Float64[Tensor, "graphs tokens"]

    @property
    def can_propagate(self) -> Bool[Tensor, "graphs tokens"]:
        return self.propagation_factor > 0

    def total(self, x: Tensor) -> Float64[Tensor, " graphs"]:
        return x.sum(-1)

    def largest(self, x: Tensor) -> Tensor:
        return x.amax(-1)

    def spread(self, x: Tensor) -> Tensor:
        return x[:, None].expand_as(self.propagation_factor)


class DenseSweeps(_SequenceSums):
    """Sweeps over matrices ``[B, T, T]`` that are read in place; entries on and above the diagonal count as zero."""

    def __init__(self, propagation_factor: Float64[Tensor, "graphs tokens"], backend: Backend = "auto") -> None:
        if backend not in ("auto", "dense", "numba"):
            raise InvalidInputError(
                f"backend: dense rows are solved by 'dense' or 'numba', got {backend!r}; 'auto' takes what is there"
            )
        self.propagation_factor = propagation_factor
        if backend == "auto":
            backend = "numba" if compiled.available() and propagation_factor.device.type == "cpu" else "dense"
        if backend == "numba":
            compiled.require(propagation_factor.device)
        self.backend = backend

    def potential(self, weight: Tensor, demand: Tensor) -> Tensor:
        return self._run("potential", weight, demand)

    def influence(self, weight: Tensor, inflow: Tensor) -> Tensor:
        return self._run("influence", weight, inflow)

    def outer(self, at_target: Tensor, at_source: Tensor) -> Tensor:
        return (at_target[:, :, None] * (self.propagation_factor * at_source)[:, None, :]).tril(-1)

    def weights_into(self, weight: Tensor, *, last_first: bool) -> Iterator[tuple[int, slice, np.ndarray]]:
        tokens = weight.shape[-1]
        for graph, matrix in enumerate(weight.detach()):
            first = graph * tokens
            for t in in_token_order(tokens, last_first):
                yield first + t, slice(first, first + t), matrix[t, :t].double().cpu().numpy()

    def balanced(self, weight: Tensor, exponent: Tensor) -> Tensor:
        refuse_bad_weights(weight)  # an infinite weight is one way to get here
        propagated = weight.tril(-1) * (self.propagation_factor > 0)[:, None, :]
        return scaled(propagated, exponent[:, :, None] - exponent[:, None, :])

    def any_weight(self, weight: Tensor, target: Tensor, source: Tensor) -> bool:
        for matrix, readers, read in zip(weight.detach(), target, source, strict=True):
            at = read.nonzero().flatten()
            later = readers[:, None] & (torch.arange(readers.numel(), device=at.device)[:, None] > at)
            if bool((later & (matrix[:, at] > 0)).any()):
                return True
        return False

    def _run(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        if self.backend == "numba" and weight.dtype in (torch.float32, torch.float64):
            return compiled.over_rows(name, weight, self.propagation_factor, x)
        return getattr(sweeps, name)(DenseOperator(weight), self.propagation_factor, x)


def refuse_bad_weights(matrix: Float[Tensor, "graphs tokens tokens"]) -> None:
    """Say which capacity below the diagonal is none.

    Raises:
        GraphError: NaN, infinite or negative.
    """
    below = matrix.detach().tril(-1)
    bad = ~(torch.isfinite(below) & (below >= 0))
    if bool(bad.any()):
        graph, t, s = bad.nonzero()[0].tolist()
        raise GraphError(
            f"capacity: must be finite and non-negative, got {below[graph, t, s].item()} at [{graph}, {t}, {s}]; "
            "check the attention for NaN or overflow"
        )


class StreamSweeps(_SequenceSums):
    """Sweeps over rows that are produced on demand, block by block, and have no gradient of their own.

    The weight is a :class:`~flowgraph.propagation.row_sources.RowSource`.
    """

    backend = "streamed"

    def __init__(self, propagation_factor: Float64[Tensor, "graphs tokens"]) -> None:
        self.propagation_factor = propagation_factor

    def potential(self, weight: RowSource, demand: Tensor) -> Tensor:
        return sweeps.potential(StreamedOperator(weight), self.propagation_factor, demand)

    def influence(self, weight: RowSource, inflow: Tensor) -> Tensor:
        return sweeps.influence(StreamedOperator(weight), self.propagation_factor, inflow)

    def weights_into(self, weight: RowSource, *, last_first: bool) -> Iterator[tuple[int, slice, np.ndarray]]:
        tokens, step = weight.num_tokens, StreamedOperator(weight).block  # the blocks that the sweeps read
        for start in in_token_order(tokens, last_first, step=step):
            rows = weight.block(start, min(start + step, tokens)).double().cpu().numpy()
            for graph, matrix in enumerate(rows):
                for row in in_token_order(matrix.shape[0], last_first):
                    t, first = start + row, graph * tokens
                    yield first + t, slice(first, first + t), matrix[row, :t]

    def balanced(self, weight: RowSource, exponent: Tensor) -> RowSource:
        return BalancedRows(weight, exponent, self.propagation_factor > 0)

    def any_weight(self, weight: RowSource, target: Tensor, source: Tensor) -> bool:
        columns, step = source.any(0).nonzero().flatten(), StreamedOperator(weight).block
        for start in range(0, weight.num_tokens, step):
            here = slice(start, min(start + step, weight.num_tokens))
            rows = weight.block(here.start, here.stop)
            at = columns[columns < here.stop]
            if bool(((rows[:, :, at] > 0) & target[:, here, None] & source[:, None, at]).any()):
                return True
        return False
