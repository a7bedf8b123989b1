r"""Conserved relevance: a signed flow that one backward pass of the model makes itself.

The backward pass runs with the model's linear parts kept and its non-linear factors held constant
(:mod:`flowgraph.capacities.linear_rules`). With z the output of a head before the output projection,

.. math::
    N[t, s] = \sum_{l, h} A[l, h, t, s] \, \langle v[l, h, s], dL/dz[l, h, t] \rangle, \qquad s < t

is the relevance that the reader t passes to the token s. At every token

.. math::
    d[t] + \sum_{t' > t} N[t', t] = \sum_{s < t} N[t, s] + a[t] + \mathrm{bias}[t]

where d is the demand at the rows that predict the answer, a the relevance absorbed by the token's embedding, and bias
that absorbed by the biases at its position. The two sides are computed apart, so their difference is a test of the
whole pass, whatever the architecture. N holds negative values: they argue against the answer.

**Emission arcs.** A generated token k is an input (it absorbs a[k]) and an output of row k - 1. With ``hops > 0`` its
share is passed on: row k - 1 is seeded with a[k], in the direction of the logit of token k over its rivals, and the
pass is repeated until little remains. Then the sources are the prompt's embeddings, forced tokens and biases only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from flowgraph.attention.interception import AttentionDispatch
from flowgraph.attention.modules import (
    attention_modules,
    num_layers,
    text_config,
    uses_attention_interface,
)
from flowgraph.capacities.linear_rules import LinearRules
from flowgraph.capacities.module_balance import ModuleBalance
from flowgraph.capacities.predictions import (
    Target,
    at_rows,
    forward_logits,
    objective_of,
    predicting_rows,
    shift_left,
)
from flowgraph.capacities.relevance_balance import BalanceRecorder
from flowgraph.capacities.tape import MAX_BLOCK, SCRATCH_BYTES, Tape, TapeLayer
from flowgraph.errors import CaptureError, InvalidInputError, first_line
from flowgraph.memory import require_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_RIVALS = 10
"""A generated token's logit is contrasted with the mean of this many best other tokens."""

FORCED_MARGIN = 0.05
"""A generated token whose logit exceeds its rivals' mean by less holds its relevance: the model did not choose it."""

CHAIN_REMAINDER = 0.02
"""Share of the demand below which the chain of emission arcs stops."""

_SMALLEST_DEMAND = 1e-5
"""Shares of a demand smaller than this, beside the largest throughput, would be rounding."""

MAX_RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest residual of the law, relative to the largest term at any token."""

_BYTES_PER_CELL = 4
"""Memory of one N[t, s]."""

MAX_RESIDUAL_HALF = 0.1
"""The same for bfloat16 and float16, whose gradients are rounded to 2**-8 at every layer."""


@dataclass(frozen=True, eq=False)
class RelevanceRows:
    """The signed capacities N of a batch, and the terms of the law.

    Row t is the position that reads, so the answer's demand stands at the position before each answer token.

    Attributes:
        matrix: ``[batch, tokens, tokens]`` float32, N[t, s] for s < t, zero elsewhere. None for streamed rows, which
            :meth:`block` recomputes from the tape.
        demand: ``[batch, tokens]`` d: relevance that enters at the row that predicts an answer token.
        absorbed: ``[batch, tokens]`` a: relevance that stays at the token's embedding.
        emitted: ``[batch, tokens]`` relevance that the generated token k passed on to row k - 1; 0 without hops.
        bias: ``[batch, tokens]`` relevance that stays in biases at the position.
        forced: ``[batch, tokens]`` bool, generated tokens that hold their relevance: the model did not choose them.
        generated: ``[batch, tokens]`` bool, tokens that the model produced.
        attention_mask: ``[batch, tokens]`` bool, False on padding.
        residual: largest difference between the two sides of the law at a token, relative to its largest term.
        bound: largest residual that the dtype of the model allows.
        hops: emission hops made.
        target: what the demand is the relevance of.
        layers: indices of the layers summed.
        tape: queries, keys, values and gradients of each layer, for :meth:`by_head` and for streamed rows; None unless
            they were kept.
        taken: ``[batch, tokens]`` sum over later readers t of N[t, s], of streamed rows; None: of the matrix.
    """

    matrix: Float[Tensor, "batch tokens tokens"] | None
    demand: Float[Tensor, "batch tokens"]
    absorbed: Float[Tensor, "batch tokens"]
    emitted: Float[Tensor, "batch tokens"]
    bias: Float[Tensor, "batch tokens"]
    forced: Bool[Tensor, "batch tokens"]
    generated: Bool[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    residual: float
    bound: float
    hops: int
    target: str
    layers: tuple[int, ...]
    tape: Mapping[int, TapeLayer] | None = None
    taken: Float[Tensor, "batch tokens"] | None = None

    @property
    def batch_size(self) -> int:
        return self.demand.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.demand.shape[1]

    @property
    def device(self) -> torch.device:
        return self.demand.device

    @property
    def throughput(self) -> Float[Tensor, "batch tokens"]:
        """Relevance that reaches each position: demand + emission arc + what later readers pass to it."""
        taken = self.dense().sum(1) if self.taken is None else self.taken
        return self.demand + shift_left(self.emitted) + taken

    def total_demand(self, item: int = 0) -> float:
        """Return the demand of one sequence, in the units of the target, to divide by.

        A negative demand means that the model prefers another token: the shares are those of the case against the
        answer, and a warning states the demand.

        Raises:
            InvalidInputError: the demand is 0, or vanishes beside the relevance that cancels in it.
        """
        total = float(self.demand[item].sum())
        # Shares of a demand near 0, in which large relevances cancel, would be rounding.
        if abs(total) <= _SMALLEST_DEMAND * float(self.throughput[item].abs().max()):
            raise InvalidInputError(
                f"answer: must have a demand to take shares of, got {total:.2g} with target {self.target!r}: "
                "the answer and its rivals tie; pass token ids to contrast with as target="
            )
        if total < 0:
            warnings.warn(
                f"answer: should be what the model prefers, got a demand of {total:.2g} with target {self.target!r}, "
                "so shares are those of the case against it; pass token ids to contrast with as target=",
                stacklevel=3,
            )
        return total

    def shares(self, item: int = 0) -> dict[str, float]:
        """Return where the demand of one sequence ends, as shares that sum to 1.

        ``prompt``: embeddings of the prompt; ``forced``: generated tokens that the model did not choose;
        ``remainder``: other generated tokens (all of them without hops); ``bias``: biases of the model.
        """
        total = self.total_demand(item)
        absorbed = self.absorbed[item]
        generated = self.generated[item]
        forced = self.forced[item]
        return {
            "prompt": float(absorbed[~generated].sum()) / total,
            "forced": float(absorbed[generated & forced].sum()) / total,
            "remainder": float(absorbed[generated & ~forced].sum()) / total,
            "bias": float(self.bias[item].sum()) / total,
        }

    def dense(self) -> Float[Tensor, "batch tokens tokens"]:
        """Return N[t, s] of the batch.

        Raises:
            MemoryLimitError: streamed rows whose matrix would not fit.
        """
        if self.matrix is not None:
            return self.matrix
        # The same cells as block(), in one matrix.
        shape = (self.batch_size, self.num_tokens, self.num_tokens)
        require_memory(
            _BYTES_PER_CELL * self.batch_size * self.num_tokens**2,
            f"matrix of {self.batch_size} x {self.num_tokens} tokens",
            "read block(start, stop) instead",
            self.device,
        )
        matrix = torch.zeros(shape, device=self.device, dtype=torch.float32)
        for start, rows in self.blocks():
            matrix[:, start : start + rows.shape[1], : rows.shape[2]] = rows
        return matrix

    def sequence(self, item: int) -> RelevanceRows:
        """Return the rows of one sequence, padding included, as a batch of one; its tensors are views.

        Raises:
            InvalidInputError: no such sequence.
        """
        if not 0 <= item < self.batch_size:
            raise InvalidInputError(
                f"item: must lie in 0..{self.batch_size - 1}, got {item}; it counts the sequences of the batch"
            )
        one = slice(item, item + 1)
        return replace(
            self,
            matrix=None if self.matrix is None else self.matrix[one],
            demand=self.demand[one],
            absorbed=self.absorbed[one],
            emitted=self.emitted[one],
            bias=self.bias[one],
            forced=self.forced[one],
            generated=self.generated[one],
            attention_mask=self.attention_mask[one],
            tape=None if self.tape is None else {index: layer.select(one) for index, layer in self.tape.items()},
            taken=None if self.taken is None else self.taken[one],
        )

    def by_head(self, row: int, column: int, item: int = 0) -> Float[Tensor, "layers heads"]:
        """Split N[row, column] of one sequence into the parts of layers and heads, which sum to it.

        Args:
            row: the position that reads.
            column: an earlier token.
            item: the sequence of the batch.

        Raises:
            InvalidInputError: rows captured without ``keep_tape=True``, or no edge.
        """
        if self.tape is None:
            raise InvalidInputError(
                "keep_tape: must be True to tell heads apart, got rows without their tape; capture again with "
                "capture(..., keep_tape=True)"
            )
        if not 0 <= column < row < self.num_tokens:
            raise InvalidInputError(
                f"row, column: must satisfy 0 <= column < row < {self.num_tokens}, got {row} and {column}; rows are "
                "readers"
            )
        parts = []
        for index in self.layers:
            products = self.tape[index].products(row, row + 1)
            parts.append(products[item, :, 0, column].double().cpu())
        # Layers may differ in their number of heads; missing ones are 0.
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Return the rows [start, stop) over the columns [0, stop), read from the matrix or recomputed from the tape.

        Cost: of streamed rows, two products like Q K^T of every layer on the block.
        """
        if self.matrix is not None:
            return self.matrix[:, start:stop, :stop]
        assert self.tape is not None  # streamed rows keep their tape
        return _rows_of_tape(self.tape, self.attention_mask, start, stop)

    def blocks(self, size: int = MAX_BLOCK) -> Iterator[tuple[int, Float[Tensor, "batch block stop"]]]:
        """Yield all rows in order, as (first row, block)."""
        for start in range(0, self.num_tokens, size):
            yield start, self.block(start, min(start + size, self.num_tokens))

    def __repr__(self) -> str:
        return (
            f"RelevanceRows({self.batch_size} x {self.num_tokens} tokens, target={self.target}, hops={self.hops}, "
            f"residual={self.residual:.1e})"
        )


def capture_relevance(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *,
    answer: Bool[Tensor, "batch tokens"],
    generated: Bool[Tensor, "batch tokens"] | None = None,
    target: Target | Int64[Tensor, "batch tokens"] = "margin",
    hops: int = 0,
    keep_tape: bool = False,
    streamed: bool = False,
) -> RelevanceRows:
    """Run one forward pass and one backward pass per hop; return the conserved relevance of the answer.

    Args:
        model: the transformers model, in evaluation mode.
        inputs: arguments of its forward pass, with ``input_ids`` and ``attention_mask``.
        answer: tokens whose prediction is explained.
        generated: tokens that the model produced; needed with ``hops``.
        target: ``"margin"``: logit minus the best other logit; ``"logprob"``: log-probability; or the ids of the
            tokens to contrast with, of which those at the answer's positions count.
        hops: largest number of emission hops; 0 leaves the relevance of generated tokens at their embeddings.
        keep_tape: keep queries, keys, values and gradients of every layer with the result.
        streamed: make no T x T matrix: rows are recomputed from the tape, which is kept.

    Raises:
        CaptureError: a part of the model without a rule (with the residual and the module), or one that has no
            backward pass.
        InvalidInputError: masks, targets or hops that do not fit.
        MemoryLimitError: the tape, or the matrix, would not fit.

    Cost: 2.6 plain forward passes at 128 tokens and 3.0 at 512 (1.2 of a forward and backward pass), and one more
    backward pass per hop; memory of the activations of one pass and, unless streamed, one T x T matrix.
    """
    # Tensors made under inference_mode cannot take part in a backward pass; their copies can.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return capture_relevance(
                model,
                {name: _copied(value) for name, value in inputs.items()},
                answer=_copied(answer),
                generated=_copied(generated),
                target=_copied(target),
                hops=hops,
                keep_tape=keep_tape,
                streamed=streamed,
            )

    # Refuse what cannot be done before the pass is paid for.
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"].bool()
    generated = torch.zeros_like(answer) if generated is None else generated
    rows = predicting_rows(answer | generated, mask)
    modules = attention_modules(model)
    _refuse_unsupported(model, modules)
    require_memory(
        relevance_bytes(model, mask.shape[0], mask.shape[1], streamed=streamed),
        f"relevance of {mask.shape[0]} x {mask.shape[1]} tokens",
        "trace fewer sequences at a time, a shorter text, or with streamed=True (max_edges= of a trace)",
        mask.device,
    )

    # One forward pass under the linear rules. The tape keeps A and v, then dL/dz of each backward pass.
    tape = Tape({module: index for index, module in modules.items()}, detach=True, gradients=True)
    balance = BalanceRecorder(model, mask.shape, mask.device)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(AttentionDispatch.heard_by(tape))
        stack.enter_context(LinearRules(model, set(modules.values())))
        stack.enter_context(balance)
        tape.listening = True
        logits, rows = forward_logits(model, inputs, rows)
        tape.listening = False
        passes = _BackwardPasses(balance, rows)

        # Demand of the answer: d[t] = <y[t], dL/dy[t]> at the input y of the output projection.
        seed = passes.gradient_at_y(objective_of(logits, rows, ids, answer, target))
        demand = passes.demand_of(seed)
        passes.push(seed)

        # Emission arcs: a generated token k passes a[k] on to row k - 1, unless it was forced (m_k too small).
        emitted = torch.zeros_like(demand)
        forced = torch.zeros_like(answer)
        hops_made = 0
        if hops:
            gradient, margin = _emission_gradient(passes, logits, rows, ids, generated)
            forced = generated & (margin < FORCED_MARGIN)
            chosen = generated & ~forced
            emitted, hops_made = _run_chain(passes, balance, rows, gradient, margin, chosen, demand, hops)

    # N in blocks: into one matrix, or only its sums over readers and over what they read.
    matrix = None
    taken = torch.zeros_like(demand)
    given = torch.zeros_like(demand)
    if not streamed:
        matrix = torch.zeros(*mask.shape, mask.shape[1], device=mask.device, dtype=torch.float32)
    for start, stop in _row_blocks(list(tape.layers.values()), mask.shape[1], mask.shape[0]):
        block = _rows_of_tape(tape.layers, mask, start, stop)
        taken[:, :stop] += block.sum(1)
        given[:, start:stop] = block.sum(2)
        if matrix is not None:
            matrix[:, start:stop, :stop] = block

    # The two sides of the law are computed apart: their difference tests the whole pass.
    residual = _residual_of_law(taken, given, demand, emitted, balance.absorbed, balance.bias, mask)
    model_dtype = next(model.parameters()).dtype
    result = RelevanceRows(
        matrix=matrix,
        demand=demand,
        absorbed=balance.absorbed - emitted,
        emitted=emitted,
        bias=balance.bias,
        forced=forced,
        generated=generated,
        attention_mask=mask,
        residual=residual,
        bound=MAX_RESIDUAL.get(model_dtype, MAX_RESIDUAL_HALF),
        hops=hops_made,
        target=target if isinstance(target, str) else "contrast",
        layers=tuple(sorted(tape.layers)),
        tape=tape.layers if keep_tape or streamed else None,
        taken=taken,
    )
    if not result.residual <= result.bound:
        culprit = _find_culprit(model, modules, inputs, rows, answer, target, result.bound)
        raise _not_conserved(model, result, culprit)
    return result


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _BackwardPasses:
    """Backward passes from y to x0 over one recorded forward pass; their results add up on the tape."""

    def __init__(self, balance: BalanceRecorder, rows: Int64[Tensor, " kept"]) -> None:
        if balance.x0 is None or balance.y is None or not balance.y.requires_grad:
            raise CaptureError(
                "model: its output must depend differentiably on its first block, got a pass without a backward; "
                "load the model without a kernel that has no backward pass, or use capacity='vtrace'"
            )
        self._balance = balance
        self._rows = rows
        self.x0 = balance.x0
        self.y = balance.y

    def gradient_at_y(self, objective: Tensor) -> Tensor:
        """Return d objective / dy, of the shape of y."""
        (gradient,) = torch.autograd.grad(objective, self.y, retain_graph=True)
        return gradient

    def demand_of(self, seed: Tensor) -> Float[Tensor, "batch tokens"]:
        """Return <y[t], seed[t]> at the rows that the seed belongs to."""
        per_row = (self.y.detach().float() * seed.float()).sum(-1)
        demand = torch.zeros_like(self._balance.absorbed)
        demand[:, self._rows] = per_row
        return demand

    def push(self, seed: Tensor) -> None:
        """Propagate a gradient at y through all layers; add to dL/dz, a and the biases."""
        try:
            (gradient,) = torch.autograd.grad(self.y, self.x0, seed, retain_graph=True)
        except torch.OutOfMemoryError:
            # A RuntimeError too, and no fault of the model.
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"model: its backward pass failed ({first_line(error)}); conserved relevance needs kernels "
                "with a backward pass, so load the model unquantised or use capacity='vtrace'"
            ) from error
        self._balance.absorbed += (self.x0.detach().float() * gradient.float()).sum(-1)


def _emission_gradient(
    passes: _BackwardPasses,
    logits: Float[Tensor, "batch kept vocabulary"],
    rows: Int64[Tensor, " kept"],
    ids: Int64[Tensor, "batch tokens"],
    generated: Bool[Tensor, "batch tokens"],
) -> tuple[Tensor, Float[Tensor, "batch tokens"]]:
    """Return dM_k/dy for every generated token k at row k - 1, and m_k = <y, dM_k/dy> at k.

    M_k is the logit of k minus the mean of its best rivals. The margin to the runner-up alone would be near 0 at near
    ties, and the seed a[k] / m_k would explode.
    """
    # M_k = logit of k - mean of the NUM_RIVALS best other logits.
    predicted = at_rows(ids, rows)[..., None]
    chosen = logits.gather(-1, predicted).squeeze(-1)
    others = logits.scatter(-1, predicted, -torch.inf)
    num_rivals = min(NUM_RIVALS, logits.shape[-1] - 1)
    rivals = others.topk(num_rivals, dim=-1).values.mean(-1)
    # Other rows are set to 0, so that one backward pass from the sum gives dM_k/dy at every row k - 1.
    contrast = torch.where(at_rows(generated, rows), chosen - rivals, 0.0)
    gradient = passes.gradient_at_y(contrast.sum())
    # <y, dM_k/dy> is computed at row k - 1; m_k belongs to token k.
    at_row = passes.demand_of(gradient)
    margin = torch.zeros_like(at_row)
    margin[:, 1:] = at_row[:, :-1]
    return gradient, margin


def _run_chain(
    passes: _BackwardPasses,
    balance: BalanceRecorder,
    rows: Int64[Tensor, " kept"],
    gradient: Tensor,
    margin: Float[Tensor, "batch tokens"],
    chosen: Bool[Tensor, "batch tokens"],
    demand: Float[Tensor, "batch tokens"],
    hops: int,
) -> tuple[Float[Tensor, "batch tokens"], int]:
    """Pass what generated tokens absorbed on to the rows that emitted them; return it, and the hops made."""
    emitted = torch.zeros_like(demand)
    total = demand.sum(-1).abs()
    for hop in range(hops):
        # What the chosen tokens hold now, and have not passed on yet.
        pending = torch.where(chosen, balance.absorbed - emitted, 0.0)
        if bool((pending.abs().sum(-1) <= CHAIN_REMAINDER * total).all()):
            return emitted, hop
        # Seed row k - 1 with a[k] / m_k times dM_k/dy: its demand <y, seed> is then a[k].
        safe_margin = torch.where(chosen, margin, 1.0)
        scale = torch.where(chosen, pending / safe_margin, 0.0)
        scale_at_row = at_rows(scale, rows)[..., None].to(gradient.dtype)
        passes.push(gradient * scale_at_row)
        emitted = emitted + pending
    return emitted, hops


def relevance_bytes(model: PreTrainedModel, batch: int, tokens: int, *, streamed: bool) -> int:
    """Estimate the memory of a capture beyond the activations of its passes.

    Args:
        model: the transformers model, without wrappers.
        batch: sequences.
        tokens: T, padding included.
        streamed: whether no T x T matrix is made.

    Returns:
        Bytes of queries, keys, values and dL/dz of every layer, which are about as wide as the model, of one block of
        rows, and of the matrix.
    """
    width = text_config(model).hidden_size
    num_modules = len(attention_modules(model))
    num_bytes = model.dtype.itemsize
    tape = num_modules * batch * tokens * width * (3 * num_bytes + 4)
    matrix = 0 if streamed else _BYTES_PER_CELL * batch * tokens**2
    return tape + SCRATCH_BYTES + matrix


def _rows_of_tape(
    layers: Mapping[int, TapeLayer], mask: Bool[Tensor, "batch tokens"], start: int, stop: int
) -> Float[Tensor, "batch block stop"]:
    """Return N[t, s], the sum over layers and heads of A <v, dL/dz>, of the readers [start, stop) for s < t."""
    # Layers that no backward pass reached have dL/dz = 0 and add nothing.
    read = [layer for layer in layers.values() if layer.reader is not None]
    batch = mask.shape[0]
    rows = torch.zeros(batch, stop - start, stop, device=mask.device, dtype=torch.float32)
    with torch.no_grad():
        for first, last in _row_blocks(read, stop, batch, start):
            block = rows[:, first - start : last - start, :last]
            for layer in read:
                over_heads = layer.products(first, last).sum(1)
                block += over_heads.to(block.device)
            # Self edges cancel on both sides of the law.
            reader = torch.arange(first, last, device=mask.device)
            column = torch.arange(last, device=mask.device)
            block.masked_fill_(column[None] >= reader[:, None], 0.0)
    # Padding reads nothing.
    return rows.mul_(mask[:, start:stop, None])


def _row_blocks(layers: Sequence[TapeLayer], tokens: int, batch: int, first_row: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of row blocks whose products of all heads fit into the scratch memory."""
    heads = max((layer.record.num_heads for layer in layers), default=1)
    step = max(1, min(MAX_BLOCK, SCRATCH_BYTES // (4 * batch * heads * tokens)))
    for start in range(first_row, tokens, step):
        yield start, min(start + step, tokens)


def _residual_of_law(
    taken: Tensor, given: Tensor, demand: Tensor, emitted: Tensor, absorbed: Tensor, bias: Tensor, mask: Tensor
) -> float:
    """Return the largest difference of the two sides of the law, relative to the largest term of its sequence."""
    # d[t] + emission arcs + sum_{t' > t} N[t', t]  =  sum_{s < t} N[t, s] + a[t] + bias[t], padding left out.
    arriving = demand + shift_left(emitted) + taken
    leaving = given + absorbed + bias
    difference = torch.where(mask, (arriving - leaving).abs(), 0.0)

    # Where the demand is 0, so is every term, and no difference is left to compare.
    largest_term = torch.maximum(arriving.abs(), demand.abs()).amax(-1)
    smallest_normal = torch.finfo(largest_term.dtype).tiny
    relative = difference.amax(-1) / largest_term.clamp_min(smallest_normal)
    return float(relative.max())


def _not_conserved(model: PreTrainedModel, rows: RelevanceRows, culprit: tuple[str, str, float] | None) -> CaptureError:
    """Describe a pass that breaks the law, with the module that does."""
    place = type(model).__name__
    if culprit is not None:
        name, kind, imbalance = culprit
        place = f"{name} ({kind}), which loses {imbalance:.2g} of a demand of {float(rows.demand.sum()):.2g}"
    return CaptureError(
        f"model: relevance must be conserved at every token, got a residual of {rows.residual:.2g} (at most "
        f"{rows.bound:g}) from {place}: some part of it has no linear rule; use capacity='vtrace', and please report "
        "the architecture"
    )


def _find_culprit(
    model: PreTrainedModel,
    modules: dict[int, nn.Module],
    inputs: dict[str, Any],
    rows: Int64[Tensor, " kept"],
    answer: Bool[Tensor, "batch tokens"],
    target: Target | Int64[Tensor, "batch tokens"],
    bound: float,
) -> tuple[str, str, float] | None:
    """Repeat the pass and compare what enters and leaves each module; return the deepest that does not conserve."""
    # The same pass as before, with a balance for every module outside the feed-forward blocks.
    tape = Tape({module: index for index, module in modules.items()}, detach=True, gradients=True)
    recorder = BalanceRecorder(model, answer.shape, answer.device)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(AttentionDispatch.heard_by(tape))
        rules = stack.enter_context(LinearRules(model, set(modules.values())))
        balance = stack.enter_context(ModuleBalance(model, rules.inside_blocks()))
        stack.enter_context(recorder)
        tape.listening = True
        logits, rows = forward_logits(model, inputs, rows)
        tape.listening = False
        passes = _BackwardPasses(recorder, rows)
        seed = passes.gradient_at_y(objective_of(logits, rows, inputs["input_ids"], answer, target))
        passes.push(seed)
        # The balance is in the units of the target, the bound relative to the demand.
        scale = float(passes.demand_of(seed).abs().max())
    return balance.culprit(bound * scale)


def _refuse_unsupported(model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    """Refuse layers that mix tokens without softmax attention, and attention that cannot be rewritten."""
    # A layer without softmax attention (recurrent, convolutional) would be missing from N.
    missing = sorted(set(range(num_layers(model, modules))) - set(modules))
    if missing:
        raise CaptureError(
            f"model: every layer must mix tokens by softmax attention, got none in layers {missing} of "
            f"{type(model).__name__}; their flow would be missing, so use capacity='attention'"
        )
    # Query and key are detached inside the attention function, so each layer must call it.
    for module in modules.values():
        if not uses_attention_interface(type(module)):
            raise CaptureError(
                f"model: its attention must go through transformers' AttentionInterface, got {type(module).__name__} "
                f"of {type(model).__name__}, which bypasses it; use capacity='attention'"
            )
