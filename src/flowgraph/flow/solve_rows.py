"""``solve_rows``: the same flow for a padded batch of sequences, from rows instead of graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError, RegionError
from flowgraph.files import loadable
from flowgraph.flow.flow import log2_potential
from flowgraph.flow.solve import Absorption, SourceRule, Vector, absorption_rule, check_options
from flowgraph.graph.edge_rules import EdgeRows, EdgeRules
from flowgraph.masks import as_tensor
from flowgraph.propagation.block_substitution import token_blocks
from flowgraph.propagation.checks import as_batch, check_capacity_matrix, token_vector
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.row_sources import KeptRows, MatrixRows, RowSource, as_row_source
from flowgraph.propagation.row_sweeps import DenseSweeps, StreamSweeps

BatchMask = Shaped[Tensor, "*batch tokens"] | Shaped[np.ndarray, "*batch tokens"] | Sequence[Any]
"""A region of each sequence of a batch."""
_DENSE_BYTES = 2**28
"""Capacities up to this size are written into one matrix, which is then solved in place."""


@loadable
@dataclass(frozen=True, eq=False)
class RowFlow:
    r"""The unit flow from question to answer on each sequence of a batch; vectors ``[B, T]``, float64.

    Every quantity that takes no argument is a property, as in :class:`flowgraph.Flow`. ``feasible`` is cached.
    ``log2_potential`` is computed at each access.

    Attributes:
        h: backward potential, scaled: the true potential is ``h * 2**exponent``; see :class:`flowgraph.Flow`.
        g: forward influence, scaled: the true influence is ``g * 2**-exponent``.
        exponent: int64 scale exponents. 0 everywhere, unless some potential of the batch leaves
            ``2**-150 .. 2**150``.
        throughput: share of the unit flow through each token, in [0, 1]; 0 on padding.
        source: share of the unit flow that enters at each token.
        demand: b, weight of the edge from each token to the virtual sink.
        damping: factor per hop.
        source_rule: ``"uniform"``, ``"potential"`` or ``"vector"``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        backend: the backend that solved it.
    """

    h: Float64[Tensor, "batch tokens"]
    g: Float64[Tensor, "batch tokens"]
    exponent: Int64[Tensor, "batch tokens"]
    throughput: Float64[Tensor, "batch tokens"]
    source: Float64[Tensor, "batch tokens"]
    demand: Float64[Tensor, "batch tokens"]
    damping: float
    source_rule: str
    absorption: str
    backend: str

    @cached_property
    def feasible(self) -> Bool[Tensor, " batch"]:
        """Per sequence, whether any source token reaches the demand; if not, the throughput is zero. Cached."""
        return self.source.detach().sum(-1) > 0

    @property
    def log2_potential(self) -> Float64[Tensor, "batch tokens"]:
        """Binary logarithm of the true potential; minus infinity where the demand is unreachable."""
        return log2_potential(self.h, self.exponent)

    def __repr__(self) -> str:
        batch, tokens = self.h.shape
        num_feasible = int(self.feasible.sum())
        return (
            f"RowFlow({batch} x {tokens} tokens, {num_feasible}/{batch} feasible, "
            f"source={self.source_rule}, absorption={self.absorption}, damping={self.damping:g}, "
            f"backend={self.backend})"
        )


def solve_rows(
    rows: RowSource | Float[Tensor, "*batch tokens tokens"] | Float[np.ndarray, "*batch tokens tokens"] | Sequence[Any],
    *,
    question: BatchMask,
    answer: BatchMask,
    generated: BatchMask | None = None,
    preset: str | None = "default",
    rules: EdgeRules | None = None,
    backend: Backend = "auto",
    source: SourceRule | Vector = "uniform",
    demand: Vector | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
) -> RowFlow:
    r"""Solve the flow of every sequence of a batch exactly, from attention rows or from dense capacities.

    The result equals :func:`flowgraph.solve` on :meth:`flowgraph.FlowGraph.from_rows` with all edges, but no graph is
    built: dense rows are read in place, and streamed rows are read block by block. Use it to score many responses at
    once. Rows of a shared prompt are computed once, see :class:`flowgraph.AttentionRows`.

    Args:
        rows: captured :class:`flowgraph.AttentionRows` of a padded batch, or a matrix ``[T, T]`` or ``[B, T, T]``.
        question: ``[B, T]`` bool, where the flow enters.
        answer: ``[B, T]`` bool, where the flow is absorbed. A sequence without an answer has no flow: its
            ``feasible`` is False.
        generated: ``[B, T]`` bool, tokens that the model produced (for emission rows). Default: everything after the
            last question token.
        preset: ``"default"`` or ``"paper"``, how rows become edges. None: ``rows`` are capacities already,
            ``capacity[t, s]`` for s < t; the diagonal and everything above it are ignored.
        rules: the same choices one by one; overrides ``preset``.
        backend: for capacities in a matrix: ``"dense"`` or ``"numba"``; ``"auto"`` is compiled where that runs.
        source: ``"uniform"``, ``"potential"`` or a vector ``[B, T]``; see :func:`flowgraph.solve`, also for the
            options below.
        demand: b, ``[B, T]``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.

    Returns:
        A :class:`RowFlow`. Derivatives propagate to a matrix, ``source`` and ``demand`` where these require them. They
        do not propagate through captured rows.

    Raises:
        GraphError: the rows are not causal attention, or not a square matrix.
        RegionError: a region has another shape, or regions overlap.
        InvalidInputError: an option outside its set.

    Cost: two reads of the rows; streamed rows of up to 256 MiB are stored between the two.

    Example:
        >>> import torch
        >>> attention = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.3, 0.3, 0.3]])
        >>> question, answer = torch.tensor([0, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 1]).bool()
        >>> solve_rows(attention, question=question, answer=answer).throughput.round(decimals=3).tolist()
        [[0.0, 1.0, 0.625, 1.0]]
    """
    check_options(backend, source, absorption, damping)
    if isinstance(rows, np.ndarray | Sequence):
        rows = as_tensor(rows, "rows", "pass a matrix [batch, tokens, tokens]", error=GraphError, is_precise=True)
    masks = _region_masks(rows, question=question, answer=answer, generated=generated)

    # D: the damping, or 0 where an answer token absorbs.
    absorption = absorption_rule(absorption, demand)
    absorbing = masks["answer"] & (absorption == "absorb")
    propagation_factor = (~absorbing).double() * damping

    # The demand b, and the source: a checked vector, or the name of a rule that needs h first.
    shape = propagation_factor.shape
    device = propagation_factor.device
    if demand is None:
        b = masks["answer"].double()
    else:
        b = token_vector(as_batch(demand), shape, device, "demand")
    if not isinstance(source, str):
        source = token_vector(as_batch(source), shape, device, "source")

    # C: the matrix itself, or what the rules make of attention rows.
    if rules is None and preset is not None:
        rules = EdgeRules.preset(preset, normalization=getattr(rows, "normalization", None))
    if rules is None:
        sweeps = DenseSweeps(propagation_factor, backend)
        capacities = _capacity_matrix(rows)
    else:
        sweeps, capacities = _capacities_by_rules(
            rows,
            masks["generated"],
            masks["answer"],
            propagation_factor,
            rules,
            backend,
        )

    # h, g and src; the throughput f = g h follows.
    solved = conserve(sweeps, capacities, demand=b, question=masks["question"], source=source)
    return RowFlow(
        h=solved.h,
        g=solved.g,
        exponent=solved.exponent,
        throughput=solved.g * solved.h,
        source=solved.source,
        demand=b,
        damping=float(damping),
        source_rule=source if isinstance(source, str) else "vector",
        absorption=absorption,
        backend=sweeps.backend,
    )


def _capacity_matrix(rows: Any) -> Float[Tensor, "batch tokens tokens"]:
    """Check a matrix that holds capacities already."""
    source = as_row_source(rows, triangle_only=True)
    if not isinstance(source, MatrixRows):
        raise InvalidInputError(
            "preset: must be named for attention rows, got None, which is for a matrix of capacities; "
            "use 'default' or 'paper', or pass rows.dense()"
        )
    check_capacity_matrix(source.matrix)
    return source.matrix


def _capacities_by_rules(
    rows: Any,
    generated: Bool[Tensor, "batch tokens"],
    answer: Bool[Tensor, "batch tokens"],
    propagation_factor: Float64[Tensor, "batch tokens"],
    rules: EdgeRules,
    backend: Backend,
) -> tuple[DenseSweeps | StreamSweeps, Any]:
    """Turn attention rows into capacities, and choose the sweeps that read them.

    Small batches are written into one matrix. Larger ones are streamed. Where the rules exclude the first token,
    ``propagation_factor`` becomes 0 there, in place.
    """
    dense_sweeps = DenseSweeps(propagation_factor, backend)
    source = as_row_source(rows)
    batch, num_tokens = propagation_factor.shape

    first = _first_tokens(rows, propagation_factor)
    if rules.first_token == "exclude":
        # The first token has no outgoing edges. With D = 0 the range check does not mistake that for underflow.
        propagation_factor.scatter_(1, first[:, None], 0.0)
    capacities = EdgeRows(source, rules, generated, first).scaled_for(answer)

    # Streamed rows have no gradient, so a matrix that requires one is solved as a matrix, whatever its size.
    differentiable = getattr(rows, "requires_grad", False) and torch.is_grad_enabled()
    float32_bytes = 4 * batch * num_tokens**2
    if float32_bytes > _DENSE_BYTES and not differentiable:
        if backend not in ("auto", "dense"):
            raise InvalidInputError(
                f"backend: {batch} x {num_tokens} tokens are solved while their rows stream, in torch, got "
                f"{backend!r}; use 'auto', or pass a matrix of capacities with preset=None"
            )
        return StreamSweeps(propagation_factor), KeptRows(capacities)

    dtype = rows.dtype if isinstance(rows, Tensor) else torch.float32
    matrix = torch.zeros(batch, num_tokens, num_tokens, dtype=dtype, device=source.device)
    for block in token_blocks(num_tokens):
        matrix[:, block, : block.stop] = capacities.block(block.start, block.stop)
    return dense_sweeps, matrix


def _first_tokens(rows: Any, propagation_factor: Float64[Tensor, "batch tokens"]) -> Int64[Tensor, " batch"]:
    """Find the first token of each sequence: 0, or the first readable token where padding is on the left."""
    attention_mask = getattr(rows, "attention_mask", None)
    if attention_mask is None:
        return torch.zeros_like(propagation_factor[:, 0], dtype=torch.int64)
    return attention_mask.long().argmax(-1)


def _region_masks(rows: Any, **regions: BatchMask | None) -> dict[str, Bool[Tensor, "batch tokens"]]:
    """Check the regions, and return them as bool masks of one shape on the device of the rows."""
    shape = _batch_shape(rows)
    if 0 in shape:
        raise GraphError(
            f"rows: must hold at least one sequence of at least one token, got {shape[0]} of {shape[1]}; "
            "leave empty batches out"
        )

    # Each region is a mask of one shape; a missing `generated` follows from the question below.
    masks = {}
    for name, region in regions.items():
        if region is None:
            continue
        remedy = "build it over the padded input_ids"
        mask = as_batch(as_tensor(region, name, remedy, device=rows.device, error=RegionError))
        if mask.dtype != torch.bool or mask.shape != shape:
            raise RegionError(
                f"{name}: must be a bool mask of shape {shape}, one entry per token of each sequence, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}; {remedy}"
            )
        masks[name] = mask

    both = masks["question"] & masks["answer"]
    if bool(both.any()):
        sequence, token = both.nonzero()[0].tolist()
        raise RegionError(
            f"question, answer: regions must be disjoint, got token {token} of sequence {sequence} in both; "
            "remove it from one of them"
        )

    if "generated" not in masks:
        # Everything after the last question token; nothing in a sequence without a question.
        position = torch.arange(shape[1], device=rows.device)
        last_question = torch.where(masks["question"], position, -1).amax(-1, keepdim=True)
        masks["generated"] = (position > last_question) & (last_question >= 0)
    return masks


def _batch_shape(rows: Any) -> tuple[int, int]:
    """Return the number of sequences and of tokens."""
    if not isinstance(rows, Tensor):
        return getattr(rows, "batch_size", 1), rows.num_tokens
    num_sequences = 1 if rows.ndim == 2 else rows.shape[0]
    return num_sequences, rows.shape[-1]
