"""What one attention layer leaves behind for its rows to be recomputed, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowgraph.errors import CaptureError

_MASKED = -1e4  # additive masks hold 0 or the dtype's minimum; ALiBi biases stay far above this


@dataclass(frozen=True)
class LayerRecord:
    """Query and key after normalisation and rotary embedding, the mask, and the function that joins them.

    Attributes:
        query: ``[batch, heads, tokens, dim]``.
        key: ``[batch, key_heads, tokens, dim]``.
        value_norm: ``[batch, key_heads, tokens]``, Euclidean norm of each value vector.
        mask: as the layer got it: None (causal), ``[batch, tokens]`` (padding; flash attention), or
            ``[batch, 1 or heads, tokens, tokens]``, bool (True = may read) or additive.
        options: scaling, soft-cap, sliding window, sinks... as the layer passed them.
    """

    module: nn.Module
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    query: Tensor
    key: Tensor
    value_norm: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

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
                f"model: the eager attention of {type(self.module).__name__} returned no weights for a block of queries; "
                "please report the architecture"
            )
        return weights

    def attend(self, queries: Tensor, stop: int, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the architecture's eager function on some queries; returns its (output, weights)."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        mask = self._additive_mask(queries, stop, wide)
        with _eval_mode(self.module), torch.autocast(self.query.device.type, enabled=False):
            return self.eager(
                self.module,
                self.query[:, :, queries].to(wide),
                self.key[:, :, :stop].to(wide),
                value.to(wide),
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
        allowed = rows if rows.dtype == torch.bool else rows > _MASKED
        readable = allowed.any(-1, keepdim=True)  # a row that may read nothing belongs to padding
        if bool((allowed & readable & future).any()):
            raise CaptureError(
                f"model: {type(self.module).__name__} reads future tokens; only causal attention forms a DAG over tokens, "
                "so load a causal language model"
            )

    def verify(self, value: Tensor, output: Tensor) -> None:
        """Compare the eager function with what the layer really computed, on a few queries.

        This is what makes a silently wrong row impossible: a mask read wrongly, an option not passed on or a
        kernel that does something else shows up as another output.

        Args:
            value: ``[batch, key_heads, tokens, dim]``.
            output: ``[batch, tokens, heads, dim]``, the layer's attention output.

        Raises:
            CaptureError: the two differ by more than rounding.
        """
        tokens = self.query.shape[2]
        probes = torch.tensor(sorted({tokens // 3, tokens // 2, tokens - 1}), device=output.device)
        expected, _ = self.attend(probes, tokens, value)
        actual = output.reshape(*expected.shape[:1], tokens, *expected.shape[2:])[:, probes].to(expected.dtype)
        error = (actual - expected).abs().amax((-1, -2))
        scale = value.to(expected.dtype).abs().amax((-1, -2, -3))[:, None].clamp_min(1e-6)
        tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 4e-2
        padding = self._reads_nothing(probes)
        if bool(((error > tolerance * scale) & ~padding).any()):
            raise CaptureError(
                f"model: the recomputed attention of {type(self.module).__name__} differs from what the layer computed by "
                f"{float((error / scale)[~padding].max()):.2g} of the largest value; its rows would be wrong. "
                "Try model.set_attn_implementation('eager'), and please report the architecture"
            )

    def _reads_nothing(self, queries: Tensor) -> Tensor:
        if self.mask is None:
            return torch.zeros(self.query.shape[0], queries.numel(), dtype=torch.bool, device=queries.device)
        if self.mask.ndim == 2:
            return ~self.mask[:, queries].bool()
        rows = self.mask[:, 0, queries] if self.mask.shape[2] > 1 else self.mask[:, 0].expand(-1, queries.numel(), -1)
        allowed = rows if rows.dtype == torch.bool else rows > _MASKED
        return ~allowed.any(-1)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off inside one attention module, its training flags put back afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
