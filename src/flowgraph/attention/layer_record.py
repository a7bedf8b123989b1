"""The record of one attention layer's pass, from which its rows are recomputed block by block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowgraph.attention.layers_and_heads import per_query_head
from flowgraph.errors import CaptureError

# Additive masks hold 0 or the dtype's minimum; position biases of readable tokens stay above this value.
_MASKED = -1e4
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest deviation from the layer's output, relative to the head's largest value; TF32 stays below it."""
_TOLERANCE_HALF = 2**-6
"""The same for bfloat16 and float16: weights and output are each rounded by up to 2**-8."""
SCRATCH_BYTES = 2**25
"""Softmax weights of all heads held at once; small blocks stay in cache and were the fastest measured."""
MAX_BLOCK = 128
"""Most rows computed at once."""

_BlockOfLayer = Callable[[int, int], Float[Tensor, "batch block stop"]]


@dataclass(frozen=True)
class LayerRecord:
    """Query and key after normalisation and rotary embedding, the mask, and the layer's own eager function.

    Attributes:
        module: a frozen copy of the attention module, because eager functions read its attributes (learned sinks).
        eager: the architecture's eager attention, ``(module, query, key, value, mask, **options)`` to
            (output, weights).
        query: ``[batch, heads, tokens, dim]``.
        key: ``[batch, key_heads, tokens, dim]``.
        value_norm: ``[batch, key_heads, tokens]``, Euclidean norm of each value vector, where edges need it.
        mask: as the layer got it: None (causal), ``[batch, tokens]`` (padding; flash attention), or
            ``[batch, 1 or heads, tokens, tokens]``, bool (True = may read) or additive.
        options: scaling, soft-cap, sliding window, sinks... as the layer passed them.
    """

    module: nn.Module
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    query: Tensor
    key: Tensor
    value_norm: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.query.shape[0], self.query.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of query and key."""
        return self.query.device

    def select(self, items: slice | Tensor) -> LayerRecord:
        """Return the record of some sequences of the batch; a slice gives views."""
        batch_size = self.shape[0]

        def cut(entry: Any) -> Any:
            # Masks and options may also be shared by all sequences, or may not be tensors.
            spans_batch = isinstance(entry, Tensor) and entry.ndim >= 2 and entry.shape[0] == batch_size
            return entry[items] if spans_batch else entry

        return replace(
            self,
            query=self.query[items],
            key=self.key[items],
            value_norm=None if self.value_norm is None else self.value_norm[items],
            mask=cut(self.mask),
            options={name: cut(option) for name, option in self.options.items()},
        )

    def weights(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Compute the softmax attention of the queries ``[start, stop)`` over the keys ``[0, stop)``.

        The architecture's own eager function runs on a block of queries. Its keys are cut at the last one that
        causality lets the block read, and its values have one column, because only the weights are used.

        Returns:
            The weights in float32 or wider.

        Raises:
            CaptureError: the layer reads future tokens, or its eager function returns no weights.

        Cost: heads x block x stop x dim for each sequence.
        """
        queries = torch.arange(start, stop, device=self.query.device)
        value = torch.zeros_like(self.key[:, :, :stop, :1])
        _, weights = self.attend(queries, stop, value)
        if weights is None or weights.shape[-2:] != (stop - start, stop):
            raise CaptureError(
                f"model: the eager attention of {type(self.module).__name__} returned no weights for a block of "
                "queries, so its rows cannot be computed; please report the architecture"
            )
        return weights

    def attend(
        self,
        queries: Tensor,
        stop: int,
        value: Tensor,
        *,
        exact: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the architecture's eager function on some queries.

        Args:
            queries: positions of the queries.
            stop: number of keys.
            value: ``[batch, key_heads, stop, any width]``.
            exact: compute in float32 or wider; False repeats the layer's own precision and autocast.

        Returns:
            The output, ``[batch, queries, heads, width]``, and the weights where the function returns them.
        """
        dtype = self.query.dtype
        precision: AbstractContextManager[Any] = nullcontext()
        if exact:
            dtype = torch.promote_types(dtype, torch.float32)
            precision = torch.autocast(self.query.device.type, enabled=False)
        mask = self._additive_mask(queries, stop, dtype)
        options = self._options_for(queries, stop)
        options["dropout"] = 0.0
        with precision:
            return self.eager(
                self.module,
                self.query[:, :, queries].to(dtype),
                self.key[:, :, :stop].to(dtype),
                value.to(dtype),
                mask,
                **options,
            )

    def _options_for(self, queries: Tensor, stop: int) -> dict[str, Any]:
        """Cut options that span the text (position biases) like the mask; pass all others unchanged."""
        num_tokens = self.query.shape[2]
        options = {}
        for name, option in self.options.items():
            if isinstance(option, Tensor) and option.ndim >= 3 and option.shape[-1] == num_tokens:
                if option.shape[-2] == num_tokens:
                    option = option[..., queries, :]
                option = option[..., :stop]
            options[name] = option
        return options

    def _additive_mask(self, queries: Tensor, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the mask of some queries as eager functions read it, added to the scores before the softmax."""
        # Eager functions may take the softmax in float32, where the minimum of float64 is -inf.
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        if self.mask is not None and self.mask.ndim == 4:
            rows = _mask_rows(self.mask, queries)
            self._check_causal(rows, queries)
            rows = rows[..., :stop]
            if rows.dtype != torch.bool:
                # A finite minimum instead of -inf: the softmax of a row that reads nothing must not be NaN.
                return rows.to(dtype).clamp_min(lowest)
            is_readable = rows
        else:
            is_readable = self._causal_cells(queries, stop)
        additive = torch.zeros(is_readable.shape, dtype=dtype, device=is_readable.device)
        return additive.masked_fill(~is_readable, lowest)

    def _causal_cells(self, queries: Tensor, stop: int) -> Bool[Tensor, "batch_or_1 1 queries stop"]:
        """Mark what each query may read by causality, the sliding window and a mask of padding."""
        columns = torch.arange(stop, device=queries.device)
        is_readable = columns[None] <= queries[:, None]
        window = self.options.get("sliding_window")
        if window is not None:
            is_readable &= columns[None] > queries[:, None] - window
        is_readable = is_readable[None, None]
        if self.mask is not None:
            is_readable = is_readable & self.mask[:, None, None, :stop].bool()
        return is_readable

    def _check_causal(self, rows: Tensor, queries: Tensor) -> None:
        """Refuse a mask that lets a query read a later token."""
        columns = torch.arange(rows.shape[-1], device=rows.device)
        is_future = columns[None] > queries[:, None]
        # A row that may read nothing belongs to padding; its softmax is uniform and is never used.
        if bool((readable_cells(rows) & is_future).any()):
            raise CaptureError(
                f"model: {type(self.module).__name__} reads future tokens; only causal attention forms a DAG over "
                "tokens, so load a causal language model and leave out masks that look ahead"
            )

    def verify(self, value: Tensor, output: Tensor) -> None:
        """Compare the eager function with the layer's real output, on a few queries.

        The comparison finds a mask that was read wrongly, an option that was not passed on, and a kernel that
        computes something else: each changes the output. Without it, rows could be wrong without notice. In half
        precision, sharp attention may differ from exact weights by rounding alone, so there a second comparison
        runs in the layer's own precision.

        Args:
            value: ``[batch, key_heads, tokens, dim]``.
            output: ``[batch, tokens, heads, dim]``, the layer's attention output.

        Raises:
            CaptureError: the two differ by more than rounding.

        Cost: three rows of attention.
        """
        num_tokens = self.query.shape[2]
        positions = sorted({num_tokens // 3, num_tokens // 2, num_tokens - 1})
        probes = torch.tensor(positions, device=output.device)
        is_half = output.dtype not in _TOLERANCE
        tolerance = _TOLERANCE.get(output.dtype, _TOLERANCE_HALF)

        error = self._deviation(probes, value, output, exact=True)
        if float(error.max()) > tolerance and is_half:
            error = self._deviation(probes, value, output, exact=False)
        reads = ~self._reads_nothing(probes)[..., None]
        is_finite = output.isfinite().flatten(2).all(2)[:, probes, None]
        if bool((reads & ~is_finite).any()):
            raise CaptureError(
                f"model: {type(self.module).__name__} must compute finite outputs, got NaN or infinity in "
                f"{str(output.dtype).removeprefix('torch.')}; use another dtype, set_attn_implementation('sdpa') "
                "(eager attention in float64 gives NaN beside left padding), or sequences without padding"
            )
        # The negated comparison also refuses NaN.
        if not float(error.max()) <= tolerance:
            raise CaptureError(
                f"model: the recomputed attention of {type(self.module).__name__} differs from what the layer computed "
                f"by {float(error.max()):.2g} of the largest value; its rows would be wrong. "
                "Try model.set_attn_implementation('eager'), and please report the architecture"
            )

    def _deviation(
        self, probes: Tensor, value: Tensor, output: Tensor, *, exact: bool
    ) -> Float[Tensor, "batch probes heads"]:
        """Compute the largest difference of each head's output, relative to its largest value; 0 on padding."""
        num_tokens = self.query.shape[2]
        expected, _ = self.attend(probes, num_tokens, value, exact=exact)
        batch_size, _, num_heads, dim = expected.shape
        actual = output.reshape(batch_size, num_tokens, num_heads, dim)[:, probes]

        # Differences are taken in float32 or wider.
        wide = torch.promote_types(expected.dtype, torch.float32)
        difference = actual.to(wide) - expected.to(wide)
        difference = difference.abs().amax(-1)

        # An output is a weighted mean of values, so the largest value of a head is the scale of its outputs.
        largest = value.to(wide).abs().amax((-1, -2))
        largest = per_query_head(largest, num_heads)
        error = difference / largest[:, None].clamp_min(1e-6)
        return error.masked_fill(self._reads_nothing(probes)[..., None], 0.0)

    def _reads_nothing(self, queries: Tensor) -> Bool[Tensor, "batch queries"]:
        """Mark the queries that may read no token, which are padding."""
        if self.mask is None:
            return torch.zeros(1, queries.numel(), dtype=torch.bool, device=queries.device)
        if self.mask.ndim == 2:
            return ~self.mask[:, queries].bool()
        rows = _mask_rows(self.mask, queries)[:, 0]
        return ~readable_cells(rows).any(-1)


def in_steps(record: LayerRecord, block: _BlockOfLayer, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
    """Fill a block in steps of a few rows, since the weights of all heads are large."""
    batch = record.shape[0]
    rows = torch.zeros(batch, stop - start, stop, device=record.device, dtype=torch.float32)
    step = max(1, min(MAX_BLOCK, SCRATCH_BYTES // (4 * batch * record.num_heads * stop)))
    with torch.no_grad():
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows[:, first - start : last - start, :last] = block(first, last)
    return rows


def _mask_rows(mask: Tensor, queries: Tensor) -> Tensor:
    """Return the rows of a four-dimensional mask for some queries; a mask with one row holds for all of them."""
    if mask.shape[2] > 1:
        return mask[:, :, queries]
    return mask.expand(-1, -1, queries.numel(), -1)


def readable_cells(mask: Tensor) -> Bool[Tensor, " ..."]:
    """Mark the cells that a bool or additive attention mask allows to be read."""
    if mask.dtype == torch.bool:
        return mask
    return mask > _MASKED


def frozen(module: nn.Module) -> nn.Module:
    """Copy an attention module in evaluation mode: shared matrices, vectors of its own.

    Rows are often read after an optimizer step, or after an offloaded or sharded layer has left memory, so the copy
    keeps what eager functions read. Reading rows must not change the training flags of a live model either.
    """
    parameters: dict[str, Tensor | None] = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            parameters[name] = None
        elif parameter.ndim <= 1:
            # Learned sinks are vectors: small, and changed in place by an optimizer.
            parameters[name] = parameter.detach().clone()
        else:
            parameters[name] = parameter.detach()

    # Eager functions call dropout with the module's training flag, or as a submodule.
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        children[name] = frozen(child) if isinstance(child, nn.Dropout) else child

    # Not copy.copy: the class that FSDP2 gives a sharded module builds a new module of the original class instead.
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(training=False, _parameters=parameters, _modules=children)
    return twin
