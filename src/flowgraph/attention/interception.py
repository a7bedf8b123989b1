"""See the attention that a model computes, at the two places where transformers' models compute it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

EagerFunction = Callable[..., tuple[Tensor, Tensor | None]]
_FUSED_KERNEL = functional.scaled_dot_product_attention


class AttentionCall(NamedTuple):
    """What one attention layer was given, and what it made of it.

    Attributes:
        eager: the definition of this attention: ``(module, query, key, value, mask, **options)`` to
            (output, weights).
        query: ``[batch, heads, tokens, dim]``; key and value: ``[batch, key_heads, tokens, dim]``.
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
    """Whoever wants to know about the attention of some modules."""

    def wants(self, module: nn.Module) -> bool: ...

    def record(self, module: nn.Module, call: AttentionCall) -> None: ...


@runtime_checkable
class Rewriter(Protocol):
    """A listener that also changes what an attention layer is given, for instance to stop a gradient."""

    def rewrite(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class AttentionDispatch:
    """A transparent layer over transformers' ``AttentionInterface``, present while anyone listens.

    Each architecture asks the interface for the function of its attention implementation and hands over its own
    eager function as the default; the answer is wrapped so that listeners are told after the call. The table of
    functions stays as it is, and models nobody listens to are unaffected, so nesting and threads are safe.
    Compiled code runs uncompiled meanwhile, since it would bypass the layer.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _listeners: ClassVar[list[Listener]] = []
    _undo: ClassVar[list[Callable[[], object]]] = []

    @classmethod
    @contextmanager
    def heard_by(cls, listener: Listener) -> Iterator[None]:
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
                    cls._remove()

    @classmethod
    def _install(cls) -> None:
        from transformers import AttentionInterface

        original = AttentionInterface.get_interface

        def get_interface(table: AttentionInterface, attn_implementation: str, default: EagerFunction) -> Callable:
            return cls._telling(original(table, attn_implementation, default), default)

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
        cls._undo.append(lambda: setattr(AttentionInterface, "get_interface", original))
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        cls._undo.append(lambda: stance.__exit__(None, None, None))

    @classmethod
    def _remove(cls) -> None:
        while cls._undo:
            cls._undo.pop()()

    @classmethod
    def _telling(cls, function: Callable, eager: EagerFunction) -> Callable:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            for listener in list(cls._listeners):
                if isinstance(listener, Rewriter) and listener.wants(module):
                    query, key, value = listener.rewrite(module, query, key, value)
            result = function(module, query, key, value, attention_mask, **options)
            for listener in list(cls._listeners):
                if listener.wants(module):
                    listener.record(module, AttentionCall(eager, query, key, value, attention_mask, options, result[0]))
            return result

        return attention


class KernelWatch(TorchFunctionMode):
    """Note each call of torch's fused attention in the code it surrounds, and change nothing."""

    _ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _FUSED_KERNEL:
            given = dict(zip(self._ARGUMENTS, args, strict=False)) | (kwargs or {})
            query, key, value = given["query"], given["key"], given["value"]
            options = {
                "scaling": given.get("scale") or query.shape[-1] ** -0.5,
                "dropout": given.get("dropout_p", 0.0),
                # torch reads a missing mask as "read everything"; a single token has nothing else to read.
                "is_causal": given.get("is_causal", False)
                or given.get("attn_mask") is not None
                or query.shape[-2] == 1,
            }
            self.calls.append(
                AttentionCall(_fused, query, key, value, given.get("attn_mask"), options, result.transpose(1, 2))
            )
        return result


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """What ``scaled_dot_product_attention`` is defined to compute, weights included."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(-1, -2) * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights
