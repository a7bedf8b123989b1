r"""Capacities of one forward pass: sharpened and centred attention, VTRACE.

Mean attention over many heads is diffuse: a lookup is made by one or a few heads, and the mean dilutes it at every hop.
Each capacity here is a kind of layer rows that :class:`~flowgraph.attention.attention_rows.AttentionRows` joins over
layers. A[h, t, s] is the attention of token t to token s in head h.

- sharpened (:mod:`flowgraph.attention.sharpened_layer`): mean over h of A^p (``"pre"``), (mean over h of A)^p
  (``"post"``), or (max over h of A)^p (``"max"``);
- centred: max(0, A[t, s] - mean over readers t' of A[t', s]) of the heads' mean: attention sinks vanish;
- VTRACE (Yuan et al. 2026): relu(sum over h of A[h, t, s] <W_O^h (v_s^h - mean v^h), D_t>) / norm(D_t), where D_t is
  the output of the attention block before the residual; ``vtrace_share`` takes the shares of each row, to the power p.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowgraph.attention.interception import AttentionCall
from flowgraph.attention.layer_record import LayerRecord, in_steps
from flowgraph.attention.modules import is_sharded
from flowgraph.capacities.tape import MAX_BLOCK, Tape, TapeLayer
from flowgraph.errors import CaptureError, InvalidInputError


@dataclass(frozen=True)
class CentredLayer:
    """Mean attention of one layer, minus what each token receives from its readers on average.

    Attributes:
        record: queries, keys and mask.
        received: ``[batch, tokens]``, mean of A[t, s] over the readers t >= s.
    """

    record: LayerRecord
    received: Float[Tensor, "batch tokens"]

    @classmethod
    def of(cls, record: LayerRecord, readable: Tensor) -> CentredLayer:
        """Read all rows once to find what each token receives; ``readable`` is False on padding."""
        batch, tokens = record.shape
        total = torch.zeros(batch, tokens, device=record.device, dtype=torch.float32)
        for start in range(0, tokens, MAX_BLOCK):
            stop = min(start + MAX_BLOCK, tokens)
            rows = in_steps(record, lambda first, last: record.weights(first, last).mean(1), start, stop)
            total[:, :stop] += (rows * readable[:, start:stop, None]).sum(1)
        # Token s is read by itself and by all later tokens of its text.
        readers = readable.long().flip(-1).cumsum(-1).flip(-1)
        return cls(record, total / readers.clamp_min(1))

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.record.shape

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.record.device

    def select(self, items: slice | Tensor) -> CentredLayer:
        """Return the layer of some sequences of the batch."""
        return CentredLayer(self.record.select(items), self.received[items])

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Recompute the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""
        record = self.record
        mean = in_steps(record, lambda first, last: record.weights(first, last).mean(1), start, stop)
        # Cells that causality or a window closes have weight 0, and stay 0.
        return (mean - self.received[:, None, :stop]).clamp_min(0)

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Recompute by how much each head exceeds what its layer gives on average; the parts sum to :meth:`block`.

        Parts may be negative. They are 0 where the sum over heads is not positive.
        """
        excess = self.record.weights(start, stop) - self.received[:, None, None, :stop]
        return excess * (excess.mean(1, keepdim=True) > 0) / self.record.num_heads


@dataclass(frozen=True)
class VtraceLayer:
    """Agreement of what each head moves with what the attention block writes.

    Attributes:
        tape: rows A <v, reader>, with centred values and reader_t = W_O^T D_t / norm(D_t).
        share_power: None for the plain values; otherwise each row's shares to this power.
    """

    tape: TapeLayer
    share_power: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.tape.record.shape

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.tape.record.device

    def select(self, items: slice | Tensor) -> VtraceLayer:
        """Return the layer of some sequences of the batch."""
        assert self.tape.reader is not None
        part = TapeLayer(self.tape.record.select(items), self.tape.value[items], self.tape.reader[items])
        return VtraceLayer(part, self.share_power)

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Recompute the rows of the readers ``[start, stop)`` over the tokens ``[0, stop)``."""

        def joined(first: int, last: int) -> Tensor:
            return self.tape.products(first, last).sum(1).clamp_min(0)

        rows = in_steps(self.tape.record, joined, start, stop)
        if self.share_power is None:
            return rows
        total = rows.sum(-1, keepdim=True)
        return (rows / total.clamp_min(torch.finfo(rows.dtype).tiny)).pow(self.share_power)

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Recompute the part of each head in the same rows; parts may be negative and sum to :meth:`block`.

        Raises:
            InvalidInputError: shares to a power, which is taken after the heads are joined.
        """
        if self.share_power not in (None, 1):
            raise InvalidInputError(
                f"heads: must be summed to be told apart, got shares to the power {self.share_power:g}, which joins "
                "them before the power; use capacity='vtrace', or by_layer"
            )
        products = self.tape.products(start, stop)
        parts = products * (products.sum(1, keepdim=True) > 0)
        if self.share_power is None:
            return parts
        total = parts.sum(1, keepdim=True).sum(-1, keepdim=True)
        return parts / total.clamp_min(torch.finfo(parts.dtype).tiny)


def _refuse_released_parts(projection: nn.Module) -> None:
    """Refuse a projection of several modules, such as an adapter's, whose sharded weights are released one by one.

    The weights of a single module are complete while it runs; those of its parts are gone before the backward pass.
    """
    if list(projection.children()) and is_sharded(projection):
        raise CaptureError(
            "capacity: must read output projections of one module where processes share the weights (FSDP2, ZeRO-3), "
            f"got {type(projection).__name__}; merge the adapter, or use 'attention' or 'sharp'"
        )


class ProjectionTape(Tape):
    """A tape that also finds reader_t = W_O^T D_t / norm(D_t), D_t the attention block's output.

    The output projection is the child module whose input is the heads' output z; its transpose is applied by a
    vector-Jacobian product, so any linear projection works, an adapter's included.
    """

    def __init__(self, modules: dict[nn.Module, int], readable: Bool[Tensor, "batch tokens"]) -> None:
        super().__init__(modules)
        self._readable = readable
        self._stack = ExitStack()

    def __enter__(self) -> ProjectionTape:
        with ExitStack() as stack:
            for module in self.modules:
                for child in module.children():
                    hook = self._project_back(module)
                    # First of all hooks: FSDP2 and ZeRO-3 release the weights of a module in a hook of theirs.
                    stack.callback(child.register_forward_hook(hook, prepend=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Record the layer, with values centred over the text."""
        super().record(module, call)
        layer = self.layers[self.modules[module]]
        # Padding holds no text: it has no part in the mean.
        readable = self._readable[:, None, :, None].to(layer.value.device)
        total = (layer.value.float() * readable).sum(2, keepdim=True)
        layer.value = layer.value.float() - total / readable.sum(2, keepdim=True)

    def _project_back(self, attention: nn.Module) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            layer = self.layers.get(self.modules[attention])
            if layer is None or layer.reader is not None or not args or not isinstance(output, Tensor):
                return
            batch, tokens = layer.record.shape
            heads = layer.record.num_heads
            dim = layer.value.shape[-1]
            if args[0].shape[-1] != heads * dim:
                return
            _refuse_released_parts(child)
            with torch.enable_grad():
                z = args[0].detach().requires_grad_()
                projected = child.forward(z)
                direction = output.detach()
                norm = direction.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                (reader,) = torch.autograd.grad(projected, z, (direction / norm).to(projected.dtype))
            layer.reader = reader.detach().reshape(batch, tokens, heads, dim).transpose(1, 2).float()

        return hook
