"""Intercept the attention of a model at the two places where transformers' models compute it.

Most architectures look their attention function up in transformers' ``AttentionInterface``
(:class:`AttentionDispatch`). Some call torch's fused kernel themselves (:class:`KernelWatch`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowgraph.attention.layers_and_heads import per_query_head

EagerFunction = Callable[..., tuple[Tensor, Tensor | None]]
_FUSED_KERNEL = functional.scaled_dot_product_attention


class AttentionCall(NamedTuple):
    """The inputs of one attention layer in a pass, and its output.

    Attributes:
        eager: the definition of this attention: ``(module, query, key, value, mask, **options)`` to
            (output, weights).
        query: ``[batch, heads, tokens, dim]``.
        key: ``[batch, key_heads, tokens, dim]``.
        value: ``[batch, key_heads, tokens, dim]``.
        mask: None (causal), or as the layer got it.
        options: scaling, soft-cap, sliding window, sinks...
        output: ``[batch, tokens, heads, dim]``.
    """

    eager: EagerFunction
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    output: Tensor


@runtime_checkable
class Listener(Protocol):
    """The interface of an object that records the attention of some modules."""

    def wants(self, module: nn.Module) -> bool:
        """Return whether the attention of this module is to be recorded now."""
        ...

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Record one call of the module's attention."""
        ...


@runtime_checkable
class Rewriter(Protocol):
    """A listener that also changes what an attention layer is given, for instance to stop a gradient."""

    def rewrite(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class AttentionDispatch:
    """A wrapper of transformers' ``AttentionInterface`` that is installed while there are listeners.

    Each architecture requests the function of its attention implementation from the interface, with its own eager
    function as the default. The returned function is wrapped so that it tells the listeners about each call. The
    table of functions does not change, and models without a listener are unaffected, so nesting and threads are safe.
    Compiled code would bypass the wrapper, so it runs uncompiled meanwhile.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _listeners: ClassVar[list[Listener]] = []
    _installed: ClassVar[ExitStack] = ExitStack()

    @classmethod
    @contextmanager
    def heard_by(cls, listener: Listener) -> Iterator[None]:
        """Tell a listener about the attention calls of its modules inside a ``with`` block."""
        # The interface is replaced while there is at least one listener, and restored after the last.
        with cls._lock:
            cls._listeners.append(listener)
            if len(cls._listeners) == 1:
                cls._install()
        try:
            yield
        finally:
            with cls._lock:
                cls._listeners.remove(listener)
                if not cls._listeners:
                    cls._installed.close()

    @classmethod
    def _install(cls) -> None:
        """Wrap the interface and turn compilation off, until ``_installed`` is closed."""
        from transformers import AttentionInterface

        original = AttentionInterface.get_interface

        def get_interface(table: AttentionInterface, attn_implementation: str, default: EagerFunction) -> Callable:
            function = original(table, attn_implementation, default)
            return cls._with_listeners(function, default)

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
        cls._installed.callback(setattr, AttentionInterface, "get_interface", original)
        cls._installed.enter_context(torch.compiler.set_stance("force_eager"))

    @classmethod
    def _with_listeners(cls, function: Callable, eager: EagerFunction) -> Callable:
        """Wrap an attention function so that it reports each call to the listeners."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            # Before the call: a listener may replace query, key and value, so that later ones see its tensors.
            for listener in list(cls._listeners):
                if isinstance(listener, Rewriter) and listener.wants(module):
                    query, key, value = listener.rewrite(module, query, key, value)
            result = function(module, query, key, value, attention_mask, **options)

            # After the call: each listener gets the tensors that the model's own function used.
            output = result[0]
            for listener in list(cls._listeners):
                if listener.wants(module):
                    call = AttentionCall(eager, query, key, value, attention_mask, options, output)
                    listener.record(module, call)
            return result

        return attention


class KernelWatch(TorchFunctionMode):
    """A record of the calls of torch's fused attention in the code that runs inside a ``with`` block.

    Attributes:
        calls: the calls so far.
    """

    # The positional parameters of the kernel.
    _PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function unchanged, and record it if it is the fused attention."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _FUSED_KERNEL:
            arguments = dict(zip(self._PARAMETERS, args, strict=False)) | kwargs
            self._record(arguments, result)
        return result

    def _record(self, arguments: dict[str, Any], result: Tensor) -> None:
        """Convert the arguments of the kernel to those of an eager attention function."""
        query = arguments["query"]
        mask = arguments.get("attn_mask")
        # Without a mask and is_causal, torch reads all keys; a single token has no later key to read.
        is_causal = arguments.get("is_causal", False) or mask is not None or query.shape[-2] == 1
        options = {
            "scaling": arguments.get("scale") or query.shape[-1] ** -0.5,
            "dropout": arguments.get("dropout_p", 0.0),
            "is_causal": is_causal,
        }
        output = result.transpose(1, 2)
        call = AttentionCall(_eager_of_kernel, query, arguments["key"], arguments["value"], mask, options, output)
        self.calls.append(call)


def _eager_of_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute the definition of ``scaled_dot_product_attention``, weights included."""
    # Query heads of a group share one key head and one value head.
    num_heads = query.shape[1]
    key = per_query_head(key, num_heads)
    value = per_query_head(value, num_heads)
    scores = query @ key.transpose(-1, -2) * scaling + mask
    weights = scores.softmax(-1)
    output = weights @ value
    return output.transpose(1, 2), weights
