"""Record the terms of the conservation law outside the attention layers: embeddings, head input and biases."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgraph.attention.modules import first_block, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BalanceRecorder:
    """Hooks for the terms of the law that stand outside the attention layers: x0, y and biases.

    Attributes:
        x0: input of the first block, a leaf of the backward pass.
        y: input of the output projection, at the rows whose logits were computed.
        absorbed: ``[batch, tokens]`` a[t] = <x0[t], dL/dx0[t]>, summed over the backward passes so far.
        bias: ``[batch, tokens]`` sum over biases b of <b, dL/d output[t]>.
    """

    def __init__(self, model: PreTrainedModel, shape: torch.Size, device: torch.device) -> None:
        self._model = model
        self._stack = ExitStack()
        self.x0: Tensor | None = None
        self.y: Tensor | None = None
        self.absorbed = torch.zeros(shape, device=device, dtype=torch.float32)
        self.bias = torch.zeros(shape, device=device, dtype=torch.float32)

    def __enter__(self) -> BalanceRecorder:
        with ExitStack() as stack:
            first = first_block(text_decoder(self._model))
            stack.callback(first.register_forward_pre_hook(self._start_at, with_kwargs=True).remove)
            head = self._model.get_output_embeddings()
            assert head is not None  # base_model() refuses models without one
            stack.callback(head.register_forward_pre_hook(self._keep_y).remove)
            for module in self._model.modules():
                bias = getattr(module, "bias", None)
                if module is head:
                    continue
                if isinstance(bias, Tensor) and bias.ndim == 1:
                    stack.callback(module.register_forward_hook(self._watch_bias).remove)
                elif any(name.endswith("_bias") and p.ndim > 1 for name, p in module.named_parameters(recurse=False)):
                    # Experts with fused weights: their biases are measured as the block's imbalance.
                    stack.callback(module.register_forward_pre_hook(self._watch_input).remove)
                    stack.callback(module.register_forward_hook(self._watch_output).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start_at(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.x0 = hidden.detach().requires_grad_()
        if args:
            return (self.x0, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.x0}

    def _keep_y(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.y = args[0]

    def _add_to_bias(self, per_position: Tensor) -> None:
        # Mixtures of experts flatten the batch; outputs of other shapes hold no positions.
        if per_position.numel() == self.bias.numel():
            self.bias += per_position.reshape(self.bias.shape)

    def _watch_bias(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            bias = module.bias.detach().float()  # type: ignore[union-attr,operator]
            output.register_hook(lambda gradient: self._add_to_bias(gradient.float() @ bias))

    def _watch_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if not x.requires_grad:
            return None
        # A view of its own, so that its gradient is that of this module alone.
        private = x.view_as(x)
        value = x.detach().float()

        # bias[t] = <out, dL/dout> - <in, dL/din>; this hook subtracts the second term.
        def subtract_entering(gradient: Tensor) -> None:
            entering = (gradient.float() * value).sum(-1)
            self._add_to_bias(-entering)

        private.register_hook(subtract_entering)
        return (private, *args[1:])

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return
        value = first.detach().float()

        # The first term of the same difference, <out, dL/dout>.
        def add_leaving(gradient: Tensor) -> None:
            leaving = (gradient.float() * value).sum(-1)
            self._add_to_bias(leaving)

        first.register_hook(add_leaving)
