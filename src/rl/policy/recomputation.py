"""Recompute decoder layers in the backward pass instead of keeping their activations (gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from rl.errors import PolicyError

Restored = Callable[[nn.Module], AbstractContextManager[None]]
"""A layer -> the context in which it computes what it computed in the forward pass."""


def recomputable_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers of a model that transformers marks as units of gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def require_recomputable(model: nn.Module) -> None:
    """Require at least one layer that can be recomputed.

    Raises:
        PolicyError: the architecture marks none.
    """
    if not recomputable_layers(model):
        raise PolicyError(
            f"gradient_checkpointing: must have layers that transformers can recompute, got {type(model).__name__} "
            "without any; leave it out, and lower micro_batch_size instead"
        )


@contextmanager
def recomputing(layers: Sequence[nn.Module], restored: Restored) -> Iterator[None]:
    """Keep only the inputs of the given layers in the passes inside the context; the backward pass recomputes the rest.

    The checkpointing of transformers itself works only in training mode, which turns dropout on.

    Args:
        layers: of :func:`recomputable_layers`; their forward functions are replaced inside the context.
        restored: entered around the recomputation of a layer, long after the forward pass: it sets everything that the
            layer's result depends on, such as the active adapter.

    Cost: one more forward pass of the layers.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers:
            # Usually None: the function is that of the class. Libraries such as accelerate set one of the instance.
            own_forward = layer.__dict__.get("forward")
            replaced.append((layer, own_forward))
            layer.forward = partial(_checkpointed, layer, layer.forward, restored)  # type: ignore[method-assign]
        yield
    finally:
        # Without the attribute of the instance, the function of the class is found again.
        for layer, before in replaced:
            del layer.forward
            if before is not None:
                layer.forward = before


def _checkpointed(
    layer: nn.Module, forward: Callable[..., Any], restored: Restored, *arguments: Any, **options: Any
) -> Any:
    """Run one layer and keep only its inputs."""

    # The forward pass itself needs no context; the recomputation restores what the result depends on.
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        in_recomputation = _EnteredAgain(partial(restored, layer))
        return nullcontext(), in_recomputation

    # Passes run without dropout, so there is no state of generators to preserve.
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        **options,
    )


class _EnteredAgain(AbstractContextManager[None]):
    """A context that is made anew each time: a graph that is retained is recomputed once for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.pop().__exit__(*exception)
