"""What one attention layer leaves behind for its rows to be recomputed, block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowgraph.errors import CaptureError

_MASKED = -1e4  # additive masks hold 0 or the dtype's minimum; position biases of readable tokens stay above this
_SAME_VALUES = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest deviation from the layer's output, relative to the head's largest value; TF32 stays below it."""
_SAME_VALUES_HALF = 2**-6
"""The same for bfloat16 and float16: weights and output are each rounded by up to 2**-8."""


@dataclass(frozen=True)
class LayerRecord:
    """Query and key after normalisation and rotary embedding, the mask, and the function that joins them.

    Attributes:
        module: a frozen copy of the attention module, as eager functions read attributes (learned sinks) off it.
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
        return self.query.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.query.shape[0], self.query.shape[2]

    @property
    def device(self) -> torch.device:
        return self.query.device

    def select(self, items: slice | Tensor) -> LayerRecord:
        """The record of some sequences of the batch; a slice gives views."""
        batch = self.shape[0]

        def cut(entry: Any) -> Any:
            spans_batch = isinstance(entry, Tensor) and entry.ndim >= 2 and entry.shape[0] == batch
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
        """Softmax attention of the queries ``[start, stop)`` over the keys ``[0, stop)``, in float32 or wider.

        The architecture's own eager function runs on a block of queries, with keys cut at the last one that
        causality lets the block read, and with one value column, since only its weights are wanted.

        Raises:
            CaptureError: the layer reads future tokens, or its eager function returns no weights.
        """
        value = torch.zeros_like(self.key[:, :, :stop, :1])
        _, weights = self.attend(torch.arange(start, stop, device=self.query.device), stop, value)
        if weights is None or weights.shape[-2:] != (stop - start, stop):
            raise CaptureError(
                f"model: the eager attention of {type(self.module).__name__} returned no weights for a block of "
                "queries, so its rows cannot be had; please report the architecture"
            )
        return weights

    def attend(self, queries: Tensor, stop: int, value: Tensor, *, exact: bool = True) -> tuple[Tensor, Tensor | None]:
        """Run the architecture's eager function on some queries; returns its (output, weights).

        Args:
            queries: positions of the queries.
            stop: number of keys.
            value: ``[batch, key_heads, stop, any width]``.
            exact: compute in float32 or wider; False repeats the layer's own precision and autocast.
        """
        dtype = torch.promote_types(self.query.dtype, torch.float32) if exact else self.query.dtype
        mask = self._additive_mask(queries, stop, dtype)
        with torch.autocast(self.query.device.type, enabled=False) if exact else nullcontext():
            return self.eager(
                self.module,
                self.query[:, :, queries].to(dtype),
                self.key[:, :, :stop].to(dtype),
                value.to(dtype),
                mask,
                **{**self._options_for(queries, stop), "dropout": 0.0},
            )

    def _options_for(self, queries: Tensor, stop: int) -> dict[str, Any]:
        """Cut options that span the text (position biases) like the mask; pass everything else as it came."""
        tokens, cut = self.query.shape[2], {}
        for name, option in self.options.items():
            if isinstance(option, Tensor) and option.ndim >= 3 and option.shape[-1] == tokens:
                option = option[..., queries, :stop] if option.shape[-2] == tokens else option[..., :stop]
            cut[name] = option
        return cut

    def _additive_mask(self, queries: Tensor, stop: int, dtype: torch.dtype) -> Tensor:
        lowest = torch.finfo(dtype).min
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            rows = mask[:, :, queries] if mask.shape[2] > 1 else mask.expand(-1, -1, queries.numel(), -1)
            self._check_causal(rows, queries)
            rows = rows[..., :stop]
            if rows.dtype == torch.bool:
                return torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill(~rows, lowest)
            return rows.to(dtype).clamp_min(lowest)
        columns = torch.arange(stop, device=queries.device)
        allowed = columns[None] <= queries[:, None]
        window = self.options.get("sliding_window")
        if window is not None:
            allowed &= columns[None] > queries[:, None] - window
        allowed = allowed[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, :stop].bool()
        return torch.zeros(allowed.shape, dtype=dtype, device=queries.device).masked_fill(~allowed, lowest)

    def _check_causal(self, rows: Tensor, queries: Tensor) -> None:
        future = torch.arange(rows.shape[-1], device=rows.device)[None] > queries[:, None]
        # A row that may read nothing belongs to padding; its softmax is uniform and is never used.
        if bool((_readable(rows) & future).any()):
            raise CaptureError(
                f"model: {type(self.module).__name__} reads future tokens; only causal attention forms a DAG over "
                "tokens, so load a causal language model and leave out masks that look ahead"
            )

    def verify(self, value: Tensor, output: Tensor) -> None:
        """Compare the eager function with what the layer really computed, on a few queries.

        This is what makes a silently wrong row impossible: a mask read wrongly, an option not passed on or a
        kernel that does something else shows up as another output. Sharp attention in half precision may differ
        from exact weights by rounding alone, so there the same precision gets a second chance.

        Args:
            value: ``[batch, key_heads, tokens, dim]``.
            output: ``[batch, tokens, heads, dim]``, the layer's attention output.

        Raises:
            CaptureError: the two differ by more than rounding.
        """
        tokens = self.query.shape[2]
        probes = torch.tensor(sorted({tokens // 3, tokens // 2, tokens - 1}), device=output.device)
        error = self._deviation(probes, value, output, exact=True)
        tolerance = _SAME_VALUES.get(output.dtype, _SAME_VALUES_HALF)
        if float(error.max()) > tolerance and output.dtype not in _SAME_VALUES:
            error = self._deviation(probes, value, output, exact=False)
        if not float(error.max()) <= tolerance:
            raise CaptureError(
                f"model: the recomputed attention of {type(self.module).__name__} differs from what the layer computed "
                f"by {float(error.max()):.2g} of the largest value; its rows would be wrong. "
                "Try model.set_attn_implementation('eager'), and please report the architecture"
            )

    def _deviation(
        self, probes: Tensor, value: Tensor, output: Tensor, *, exact: bool
    ) -> Float[Tensor, "batch probes heads"]:
        """Largest difference of each head's output, relative to its largest value; 0 for rows of padding."""
        expected, _ = self.attend(probes, self.query.shape[2], value, exact=exact)
        wide = torch.promote_types(expected.dtype, torch.float32)
        actual = output.reshape(expected.shape[0], self.query.shape[2], *expected.shape[2:])[:, probes].to(wide)
        scale = value.to(wide).abs().amax((-1, -2)).repeat_interleave(expected.shape[2] // value.shape[1], 1)
        error = (actual - expected.to(wide)).abs().amax(-1) / scale[:, None].clamp_min(1e-6)
        return error.masked_fill(self._reads_nothing(probes)[..., None], 0.0)

    def _reads_nothing(self, queries: Tensor) -> Bool[Tensor, "batch queries"]:
        if self.mask is None:
            return torch.zeros(1, queries.numel(), dtype=torch.bool, device=queries.device)
        if self.mask.ndim == 2:
            return ~self.mask[:, queries].bool()
        rows = self.mask[:, 0, queries] if self.mask.shape[2] > 1 else self.mask[:, 0].expand(-1, queries.numel(), -1)
        return ~_readable(rows).any(-1)


def _readable(mask: Tensor) -> Bool[Tensor, ...]:
    return mask if mask.dtype == torch.bool else mask > _MASKED


def frozen(module: nn.Module) -> nn.Module:
    """A shallow copy of an attention module in evaluation mode, with vectors of its own.

    Rows are often read after an optimizer step, or after an offloaded layer has left memory; and whoever reads
    them must not have to touch the training flags of a live model.
    """
    parameters = {
        name: part if part is None else (part.detach().clone() if part.ndim <= 1 else part.detach())
        for name, part in module._parameters.items()
    }
    children = {name: frozen(part) if isinstance(part, nn.Dropout) else part for name, part in module._modules.items()}
    twin = copy.copy(module)
    twin.__dict__.update(training=False, _parameters=parameters, _modules=children)
    return twin
