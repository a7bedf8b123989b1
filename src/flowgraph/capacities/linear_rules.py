"""Replace the backward pass of a model's non-linear parts by that of a linear map with the same output.

A causal LM is linear in its residual stream except for norms, activations, gates, routers and attention weights.
With each of these held constant, the model becomes a linear map of its embeddings (plus biases), and the gradient
times the input is a conserved quantity: what a layer's output receives equals what its input passes on.

| part              | held constant                     | backward pass                                         |
|-------------------|-----------------------------------|-------------------------------------------------------|
| RMSNorm           | 1 / rms                           | gradient * gain / rms                                 |
| LayerNorm         | 1 / std                           | the same, minus its mean over the width               |
| activation        | act(x) / x                        | gradient * act(x) / x                                 |
| gated MLP, expert | (bilinear in its input)           | half of the gradient at the block's output            |
| router            | the routing weights               | none                                                  |

Forward values are never changed. Modules are recognised by what they do to a probe, not by their type; a part that is
missed shows up as a residual of the conservation law (:mod:`flowgraph.capacities.relevance`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flowgraph.errors import CaptureError

_ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names of the modules of a mixture of experts whose output weighs the experts."""

_NEAR_ZERO = 1e-6
"""Below this, act(x) / x is replaced by 1/2, its limit for SiLU and GELU."""


class LinearRules:
    """Hooks that linearise a model's backward pass inside a ``with`` block; the model is restored afterwards.

    Args:
        model: the causal LM.
        attentions: its attention modules. Their weights are held constant elsewhere, by detaching query and key.
    """

    def __init__(self, model: nn.Module, attentions: set[nn.Module]) -> None:
        self._model = model
        self._attentions = attentions
        self._stack = ExitStack()
        self._norms: dict[tuple[nn.Module, torch.Size], _NormRule | None] = {}
        self._degrees: dict[type[nn.Module], int] = {}

    def __enter__(self) -> LinearRules:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                for hook in self._hooks_for(name, module):
                    stack.callback(module.register_forward_hook(hook).remove)
                if hasattr(module, "_apply_gate") and hasattr(module, "limit") and hasattr(module, "alpha"):
                    stack.callback(_replace_method(module, "_apply_gate", _clamped_gate))
            # Registered last, so that a block's gradient is halved after the rules of its parts are in place.
            for block in self._mlp_blocks():
                stack.callback(block.register_forward_hook(self._halve_if_gated).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _hooks_for(self, name: str, module: nn.Module) -> list[Callable[..., Any]]:
        if next(module.children(), None) is None and is_norm(module):
            return [self._linear_norm]
        if is_activation(module):
            return [_linear_activation]
        if name.rsplit(".", 1)[-1] in _ROUTERS:
            return [_constant_output]
        return []

    def _linear_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        # One module may see queries and keys, whose numbers of heads differ.
        key = (module, x.shape[2:])
        if key not in self._norms:
            self._norms[key] = _NormRule.probe(module, x)
        rule = self._norms[key]
        if rule is None:
            return None
        return rule.apply(module, x, output)

    def inside_blocks(self) -> set[nn.Module]:
        """Return the modules inside feed-forward blocks: a gated block conserves relevance as a whole only."""
        inside: set[nn.Module] = set()
        for block in self._mlp_blocks():
            inside.update(part for part in block.modules() if part is not block)
        return inside

    def _mlp_blocks(self) -> list[nn.Module]:
        """List the largest modules that hold an activation or a gate and no attention."""
        blocks: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            parts = list(module.modules())
            if module in self._attentions:
                return
            # The largest module without attention: a block is halved once, at its outermost output.
            has_attention = any(part in self._attentions for part in parts)
            has_activation = any(is_activation(part) for part in parts)
            if has_activation and not has_attention:
                blocks.append(module)
                return
            for child in module.children():
                visit(child)

        visit(self._model)
        return blocks

    def _halve_if_gated(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # A block may return a tuple whose first element is the hidden state.
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return None
        if not args or not isinstance(args[0], Tensor):
            return None

        # The degree is measured once per class of modules.
        kind = type(module)
        if kind not in self._degrees:
            self._degrees[kind] = 0  # the probe below calls the module again
            self._degrees[kind] = _degree(module, args[0])
        if self._degrees[kind] != 2:
            return None

        # Degree 2: <x, J x> = 2 <g, f(x)>, so half of the gradient conserves relevance.
        halved = _Backward.apply(first, first.detach(), lambda gradient: gradient / 2)
        if isinstance(output, tuple):
            return (halved, *output[1:])
        return halved


class _Backward(torch.autograd.Function):
    """Return a value whose gradient with respect to x is the one that is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.backward_of_x = backward
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.backward_of_x(gradients[0]), None, None


def with_backward(x: Tensor, value: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``value``, differentiable: its vector-Jacobian product with respect to x is ``backward``."""
    return _Backward.apply(x, value.detach(), backward)


@dataclass(frozen=True)
class _NormRule:
    """A norm as gain * (x - mean(x)) / scale + bias; the mean only where it is subtracted.

    Attributes:
        gain: the learned factor of each dimension, as the module applies it (w, or 1 + w).
        bias: what the module returns at the centre of its range; None for an RMSNorm.
        subtracts_mean: True for a LayerNorm.
    """

    gain: Tensor
    bias: Tensor | None
    subtracts_mean: bool

    @classmethod
    def probe(cls, module: nn.Module, x: Tensor) -> _NormRule | None:
        """Recognise the norm by its answers to a few inputs of the shape of one token; None if it is no norm."""
        with torch.no_grad():
            # One token: the dimensions of the gain, which may have one row per head, and 1 for those before.
            num_batch_dims = min(2, x.ndim - 1)
            shape = (*[1] * num_batch_dims, *x.shape[num_batch_dims:])
            signs = torch.ones(*shape, dtype=x.dtype, device=x.device)
            signs[..., ::2] = -1.0

            # The odd part (f(x) - f(-x)) / 2 is free of the bias; the even part (f(x) + f(-x)) / 2 is the bias.
            def odd_part(shift: float) -> Tensor:
                plus = module.forward(signs + shift).float()
                minus = module.forward(-signs - shift).float()
                return (plus - minus) / 2

            at_zero = odd_part(0.0)
            shifted = odd_part(2.0)
            doubled_plus = module.forward(2 * signs).float()
            doubled_minus = module.forward(-2 * signs).float()
            doubled = (doubled_plus - doubled_minus) / 2
            plus = module.forward(signs).float()
            minus = module.forward(-signs).float()
            even = (plus + minus) / 2

            # A norm does not change when its input is scaled.
            tolerance = 0.02 * float(at_zero.abs().max()) + 1e-12
            change_by_scale = float((doubled - at_zero).abs().max())
            if change_by_scale > tolerance:
                return None

            # Only a norm that subtracts the mean ignores a shift of its input.
            change_by_shift = float((shifted - at_zero).abs().max())
            subtracts_mean = change_by_shift <= tolerance
            centred = signs.float()
            if subtracts_mean:
                centred = centred - centred.mean(-1, keepdim=True)

            # Inputs of +-1 have rms 1 (and std 1 at an even width), so the output over the centred input is the gain.
            # Any other constant factor is part of the scale, which apply() fits for each token.
            gain = at_zero / centred
            bias = even if bool(even.any()) else None
            return cls(gain, bias, subtracts_mean)

    def apply(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return the module's output with the backward pass of the linear map."""
        with torch.no_grad():
            # Take the norm as value = gain * centred / scale, with the bias left out.
            centred = x.detach().float()
            if self.subtracts_mean:
                centred = centred - centred.mean(-1, keepdim=True)
            direction = self.gain * centred
            value = output.detach().float()
            if self.bias is not None:
                value = value - self.bias
            # The scale of each token by least squares: value = inverse_scale * direction.
            square = direction.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            inverse_scale = (value * direction).sum(-1, keepdim=True) / square
            # The rule holds only if the norm's own output is reproduced, to the rounding of its dtype.
            error = (value - inverse_scale * direction).abs().amax()
            limit = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
            largest_error = limit * float(value.abs().amax()) + 1e-12
            if not float(error) <= largest_error:
                raise CaptureError(
                    f"model: {type(module).__name__} must be an RMSNorm or a LayerNorm, got an output that differs "
                    f"from one by {float(error):.2g}; conserved relevance has no rule for it, so use capacity='vtrace'"
                )
        # Backward pass of x -> gain * (x - mean(x)) / scale with the scale held constant.
        factor = (self.gain * inverse_scale).to(x.dtype)
        subtracts_mean = self.subtracts_mean

        def backward(gradient: Tensor) -> Tensor:
            scaled = gradient * factor
            if subtracts_mean:
                scaled = scaled - scaled.mean(-1, keepdim=True)
            return scaled

        return with_backward(x, output, backward)


def _linear_activation(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hold act(x) / x constant."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
        return None
    ratio = constant_ratio(output, x)
    return with_backward(x, output, lambda gradient: gradient * ratio)


def constant_ratio(output: Tensor, x: Tensor) -> Tensor:
    """Return output / x without gradient, and 1/2 where x is almost 0."""
    with torch.no_grad():
        small = x.abs() < _NEAR_ZERO
        return torch.where(small, 0.5, output.detach() / torch.where(small, 1.0, x.detach()))


def _constant_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Stop the gradient of routing weights."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(part.detach() if isinstance(part, Tensor) else part for part in output)
    return None


def _clamped_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Apply the gate of gpt-oss, (up + 1) * gate * sigmoid(alpha * gate), with its own rule.

    Clamps and the sigmoid are constant factors. The product with ``up`` is bilinear, so it gets the half rule; the
    term without ``up`` is linear and keeps its gradient.
    """
    # gpt-oss interleaves the gate and the linear part along the last dimension.
    gate = gate_up[..., ::2]
    up = gate_up[..., 1::2]
    clamped_gate = gate.clamp(max=experts.limit)
    clamped_up = up.clamp(-experts.limit, experts.limit)
    glu = clamped_gate * torch.sigmoid(clamped_gate * experts.alpha)

    # Each factor becomes linear in its input: output / input is held constant.
    gate_ratio = constant_ratio(glu, gate)
    up_ratio = constant_ratio(clamped_up, up)
    linear_gate = with_backward(gate, glu, lambda gradient: gradient * gate_ratio)
    linear_up = with_backward(up, clamped_up, lambda gradient: gradient * up_ratio)

    # (up + 1) * gate = up * gate + gate: the half rule for the product, the plain gradient for the rest.
    product = linear_up * linear_gate
    halved_product = with_backward(product, product, lambda gradient: gradient / 2)
    return halved_product + linear_gate


def _replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Shadow a method of one module; return the function that restores it."""
    module.__dict__[name] = MethodType(function, module)

    def restore() -> None:
        module.__dict__.pop(name, None)

    return restore


def _degree(module: nn.Module, x: Tensor) -> int:
    """Tell a bilinear block (2) from a linear one (1) by Euler's identity <x, J x> = degree * <g, f(x)>.

    The input is large, so that biases are small beside it.
    """
    generator = torch.Generator().manual_seed(0)
    width = x.shape[-1]
    noise = torch.randn(1, 2, width, generator=generator, dtype=torch.float32)
    probe = (10 * noise).to(device=x.device, dtype=x.dtype).requires_grad_()
    with torch.enable_grad():
        output = module(probe)
        value = output[0] if isinstance(output, tuple) else output
        # A random direction: with the output itself, terms of the two degrees could hide each other.
        direction = torch.randn(value.shape, generator=generator).to(device=x.device, dtype=value.dtype)
        (gradient,) = torch.autograd.grad(value, probe, direction, allow_unused=True)

    # degree = <x, J^T g> / <g, f(x)>. A block that ignores its input, or returns 0, counts as linear.
    received = float((value.detach() * direction).sum())
    if gradient is None or received == 0:
        return 1
    passed_on = float((gradient * probe.detach()).sum())
    return round(passed_on / received)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module may be a norm, by its name; the probe decides."""
    return "norm" in type(module).__name__.lower()


def is_activation(module: nn.Module) -> bool:
    """Tell whether a module is an element-wise activation, by where its class is defined or what it is called."""
    kind = type(module)
    if next(module.children(), None) is not None:
        return False
    if kind.__module__ == "transformers.activations":
        return True
    if kind.__module__ == "torch.nn.modules.activation":
        return kind.__name__ not in ("MultiheadAttention", "Softmax", "Softmin", "Softmax2d", "LogSoftmax")
    return re.search(r"gelu|silu|relu|swish", kind.__name__.lower()) is not None
