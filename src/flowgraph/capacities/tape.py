"""Record, for every attention layer of one pass, what the rows of a capacity are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowgraph.attention.interception import AttentionCall
from flowgraph.attention.layer_record import MAX_BLOCK, SCRATCH_BYTES, LayerRecord, frozen
from flowgraph.errors import CaptureError

__all__ = ["MAX_BLOCK", "SCRATCH_BYTES", "Tape", "TapeLayer"]


@dataclass
class TapeLayer:
    """One attention layer of a pass.

    Attributes:
        record: queries, keys and mask, from which softmax rows are recomputed.
        value: ``[batch, key_heads, tokens, dim]``, the value vectors, without gradient.
        reader: ``[batch, heads, tokens, dim]``, the vector that each reader takes the inner product with. For
            relevance it is dL/dz, the gradient at the head output z; for VTRACE a projection of the layer's output.
    """

    record: LayerRecord
    value: Tensor
    reader: Tensor | None = None

    def select(self, items: slice) -> TapeLayer:
        """Return the layer of some sequences of the batch, as views."""
        reader = None if self.reader is None else self.reader[items]
        return TapeLayer(self.record.select(items), self.value[items], reader)

    def products(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Return A[t, s] <v_s, reader_t> of each head, for the readers [start, stop) and s < stop, in float32.

        Cost: two products like Q K^T on the block.
        """
        if self.reader is None:
            raise RuntimeError("the tape holds no reader vectors; make the backward pass first")
        weights = self.record.weights(start, stop)
        batch, heads, block, _ = weights.shape
        key_heads = self.value.shape[1]

        # Query heads that share a value head form a group.
        readers = self.reader[:, :, start:stop].to(weights.dtype)
        readers = readers.reshape(batch, key_heads, (heads // key_heads) * block, -1)
        values = self.value[:, :, :stop].to(weights.dtype)
        # A[t, s] * <v_s, reader_t>, with the groups of heads unfolded again.
        inner = readers @ values.transpose(-1, -2)
        return weights * inner.reshape(batch, heads, block, stop)


class Tape:
    """Listen to a forward pass and keep a :class:`TapeLayer` for each attention module.

    Args:
        modules: attention module -> layer index.
        detach: stop the gradient through queries and keys (attention weights are constants).
        gradients: also accumulate dL/dz during later backward passes, in ``TapeLayer.reader``.

    Attributes:
        modules: attention module -> layer index.
        layers: layer index -> what was recorded.
    """

    def __init__(self, modules: dict[nn.Module, int], *, detach: bool = False, gradients: bool = False) -> None:
        self.modules = modules
        self._detach = detach
        self._gradients = gradients
        self.layers: dict[int, TapeLayer] = {}
        self.listening = False

    def wants(self, module: nn.Module) -> bool:
        """Tell whether this module's attention is recorded now."""
        return self.listening and module in self.modules

    def rewrite(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detach query and key, so that attention weights are constants of the backward pass."""
        if self._detach:
            return query.detach(), key.detach(), value
        return query, key, value

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Keep what the rows of one layer need, after checking it against the layer's own output.

        Raises:
            CaptureError: a layer that runs twice in one pass, or rows that do not reproduce its output.
        """
        index = self.modules[module]
        if index in self.layers:
            raise CaptureError(
                f"model: each attention layer must run once, got {type(module).__name__} of layer {index} twice in one "
                "pass; this architecture has no token graph of this capacity, so use capacity='attention'"
            )
        # Softmax rows are recomputed from query and key later, so they must reproduce the layer's output now.
        value = call.value.detach()
        with torch.no_grad():
            record = LayerRecord(
                frozen(module), call.eager, call.query.detach(), call.key.detach(), None, call.mask, call.options
            )
            record.verify(value, call.output.detach())
        layer = TapeLayer(record, value)
        self.layers[index] = layer
        # The dL/dz of every backward pass are added up. A forward-only capacity sets the reader itself.
        if not (self._gradients and call.output.requires_grad):
            return

        def accumulate(gradient: Tensor) -> None:
            # z is [batch, tokens, heads, dim]; the reader vectors are kept with heads first.
            part = gradient.detach().transpose(1, 2)
            layer.reader = part.float() if layer.reader is None else layer.reader + part.float()

        call.output.register_hook(accumulate)
