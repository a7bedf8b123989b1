"""``solve_rows``: the same flow for a whole padded batch, straight from rows, without building graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError, RegionError
from flowgraph.flow.flow import log2_potential
from flowgraph.flow.solve import Absorption, SourceRule, check_options, token_vector
from flowgraph.graph.edge_rules import EdgeRows, EdgeRules
from flowgraph.propagation.block_substitution import BLOCK
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.row_sources import KeptRows, MatrixRows, RowSource, as_row_source
from flowgraph.propagation.row_sweeps import DenseSweeps, StreamSweeps, refuse_bad_weights


@dataclass(frozen=True, eq=False)
class RowFlow:
    r"""The unit flow from question to answer on each sequence of a batch; vectors ``[B, T]``, float64.

    Attributes:
        h: backward potential, in units of ``2**exponent``; see :class:`flowgraph.Flow`.
        g: forward influence, in units of ``2**-exponent``.
        exponent: int64, 0 everywhere unless some potential of the batch leaves ``2**-150 .. 2**150``.
        throughput: share of the unit flow through each token, in [0, 1]; 0 on padding.
        source: share of the unit that enters at each token.
        demand: b, weight of the edge from each token to the virtual sink.
        damping: factor per hop.
        source_rule, absorption, backend: what was asked for, after defaults were filled in.
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
        """Per sequence, whether any source token reaches the demand; where not, the throughput is zero."""
        return self.source.detach().sum(-1) > 0

    @property
    def log2_potential(self) -> Float64[Tensor, "batch tokens"]:
        """Binary logarithm of the true potential; minus infinity where the demand cannot be reached."""
        return log2_potential(self.h, self.exponent)

    def __repr__(self) -> str:
        batch, tokens = self.h.shape
        return (
            f"RowFlow({batch} x {tokens} tokens, {int(self.feasible.sum())}/{batch} feasible, "
            f"source={self.source_rule}, absorption={self.absorption}, damping={self.damping:g}, "
            f"backend={self.backend})"
        )


def solve_rows(
    rows: RowSource | Float[Tensor, "*batch tokens tokens"],
    *,
    question: Shaped[Tensor, "*batch tokens"],
    answer: Shaped[Tensor, "*batch tokens"],
    generated: Shaped[Tensor, "*batch tokens"] | None = None,
    preset: str | None = "default",
    rules: EdgeRules | None = None,
    backend: Backend = "auto",
    source: SourceRule | Tensor = "uniform",
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
) -> RowFlow:
    r"""Solve the flow of every sequence of a batch exactly, from attention rows or from dense capacities.

    The numbers of :func:`flowgraph.solve` on :meth:`flowgraph.FlowGraph.from_rows` with all edges, without a graph:
    dense rows are read in place, streamed rows block by block and never held whole. This is the way to score many
    responses at once (rows of a shared prompt are computed once, see :class:`flowgraph.AttentionRows`).

    Args:
        rows: captured :class:`flowgraph.AttentionRows` of a padded batch, or a matrix ``[T, T]`` or ``[B, T, T]``.
        question: ``[B, T]`` bool, where flow enters.
        answer: ``[B, T]`` bool, where flow leaves. A sequence without any has no flow: ``feasible`` is False there.
        generated: ``[B, T]`` bool, tokens that the model produced (for emission rows). Default: everything after the
            last question token.
        preset: ``"default"`` or ``"paper"``, how rows become edges; None: ``rows`` are capacities already,
            ``capacity[t, s]`` for s < t, and what stands on and above the diagonal is not read.
        rules: the same choices one by one; overrides ``preset``.
        backend: for capacities in a matrix: ``"dense"`` or ``"numba"``; ``"auto"`` takes what is there.
        source: ``"uniform"``, ``"potential"`` or a vector ``[B, T]``; this and the rest: see :func:`flowgraph.solve`.
        demand: b, ``[B, T]``.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.

    Raises:
        GraphError: rows that are no causal attention, or no square matrix.
        RegionError: a region of another shape, or regions that overlap.
        InvalidInputError: an option outside its set.

    Derivatives flow back to a matrix, ``source`` and ``demand`` where they require them, not through captured rows.

    Cost: two reads of the rows; streamed rows of up to 256 MiB are kept between the two.

    Example:
        >>> import torch
        >>> attention = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.3, 0.3, 0.3]])
        >>> question, answer = torch.tensor([0, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 1]).bool()
        >>> solve_rows(attention, question=question, answer=answer).throughput.round(decimals=3).tolist()
        [[0.0, 1.0, 0.625, 1.0]]
    """
    check_options(backend, source, absorption, damping)
    masks = _masks(rows, question=question, answer=answer, generated=generated)
    if absorption is None:
        absorption = "absorb" if demand is None else "pass_through"
    propagation_factor = (~(masks["answer"] & (absorption == "absorb"))).double() * damping
    shape, device = propagation_factor.shape, propagation_factor.device
    b = masks["answer"].double() if demand is None else token_vector(_batched(demand), shape, device, "demand")
    entry = source if isinstance(source, str) else token_vector(_batched(source), shape, device, "source")
    sweeps, weight = _prepared(
        rows, masks, propagation_factor, rules or (EdgeRules.preset(preset) if preset else None), backend
    )
    solved = conserve(sweeps, weight, demand=b, question=masks["question"], source=entry)
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


_DENSE_BYTES = 2**28
"""Capacities up to this size are written into one matrix, which is then solved in place."""


def _prepared(
    rows: Any, masks: dict[str, Tensor], propagation_factor: Tensor, rules: EdgeRules | None, backend: Backend
) -> tuple[DenseSweeps | StreamSweeps, Any]:
    """The sweeps, and the capacities in the form they take."""
    dense = DenseSweeps(propagation_factor, backend)
    source = as_row_source(rows, triangle_only=rules is None)
    if rules is None:
        if not isinstance(source, MatrixRows):
            raise InvalidInputError(
                "preset: must be named for attention rows, got None, which is for a matrix of capacities; "
                "use 'default' or 'paper', or pass rows.dense()"
            )
        _refuse_bad_capacities(source.matrix)
        return dense, source.matrix
    readable = getattr(rows, "attention_mask", None)
    first = (
        torch.zeros_like(propagation_factor[:, 0], dtype=torch.int64)
        if readable is None
        else readable.long().argmax(-1)
    )
    if rules.first_token == "exclude":  # nothing leaves it, and the solver need not search for what it lost
        propagation_factor.scatter_(1, first[:, None], 0.0)
    capacities = EdgeRows(source, rules, masks["generated"], first)
    num_tokens = source.num_tokens
    differentiable = getattr(rows, "requires_grad", False) and torch.is_grad_enabled()
    if not differentiable and 4 * propagation_factor.shape[0] * num_tokens**2 > _DENSE_BYTES:
        if backend not in ("auto", "dense"):
            raise InvalidInputError(
                f"backend: {propagation_factor.shape[0]} x {num_tokens} tokens are solved while their rows stream, in torch, got "
                f"{backend!r}; use 'auto', or pass a matrix of capacities with preset=None"
            )
        return StreamSweeps(propagation_factor), KeptRows(capacities)
    dtype = rows.dtype if isinstance(rows, Tensor) else torch.float32
    matrix = torch.zeros(propagation_factor.shape[0], num_tokens, num_tokens, dtype=dtype, device=source.device)
    for start in range(0, num_tokens, BLOCK):
        stop = min(start + BLOCK, num_tokens)
        matrix[:, start:stop, :stop] = capacities.block(start, stop)
    return dense, matrix


def _batched(vector: Tensor) -> Tensor:
    """A vector over the tokens of one sequence as a batch of one."""
    return vector[None] if isinstance(vector, Tensor) and vector.ndim == 1 else vector


def _refuse_bad_capacities(matrix: Tensor) -> None:
    """One read of the triangle; what stands on and above the diagonal is never read, here or later."""
    tokens = matrix.shape[-1]
    ends = [(start, min(start + 4 * BLOCK, tokens)) for start in range(0, tokens, 4 * BLOCK)]
    least = [matrix.detach()[:, start:stop, :stop].amin() for start, stop in ends]  # NaN if there is one
    if all(bool(low >= 0) for low in least):
        return  # an infinite one shows in the potential
    refuse_bad_weights(matrix)


def _masks(rows: Any, **regions: Tensor | None) -> dict[str, Bool[Tensor, "batch tokens"]]:
    """The regions as bool masks of one shape, on the device of the rows."""
    if isinstance(rows, Tensor):
        shape = (1, rows.shape[-1]) if rows.ndim == 2 else (rows.shape[0], rows.shape[-1])
    else:
        shape = (getattr(rows, "batch_size", 1), rows.num_tokens)
    if 0 in shape:
        raise GraphError(
            f"rows: must hold at least one sequence of at least one token, got {shape[0]} of {shape[1]}; "
            "leave empty batches out"
        )
    masks = {}
    for name, region in regions.items():
        if region is None:
            continue
        mask = _batched(torch.as_tensor(region, device=rows.device))
        if mask.dtype != torch.bool or mask.shape != shape:
            raise RegionError(
                f"{name}: must be a bool mask of shape {shape}, one entry per token of each sequence, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}; build it over the padded input_ids"
            )
        masks[name] = mask
    both = masks["question"] & masks["answer"]
    if bool(both.any()):
        at, token = both.nonzero()[0].tolist()
        raise RegionError(
            f"question, answer: regions must be disjoint, got token {token} of sequence {at} in both; "
            "remove it from one of them"
        )
    if "generated" not in masks:
        position = torch.arange(shape[1], device=rows.device)
        last = torch.where(masks["question"], position, -1).amax(-1, keepdim=True)
        masks["generated"] = (position > last) & (last >= 0)
    return masks
