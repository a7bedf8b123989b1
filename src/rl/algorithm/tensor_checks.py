"""Shape, dtype and range checks of [batch, response] tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.errors import ConfigError


def require_mask(name: str, mask: Tensor) -> None:
    """A bool tensor over responses and tokens."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        raise ConfigError(
            f"{name}: must be a bool tensor of shape (responses, tokens), got {described(mask)}; convert with .bool()"
        )


def require_run(mask: Tensor) -> None:
    """A mask whose tokens stand on a run from column 0."""
    require_mask("mask", mask)
    gaps = (mask[:, 1:] & ~mask[:, :-1]).any(1)
    if bool(gaps.any()):
        raise ConfigError(
            f"mask: must be True on one run of tokens from column 0, got a gap in response {int(gaps.nonzero()[0])}; "
            "pad responses on the right"
        )


def require_floats(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """A float tensor of this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != tuple(shape):
        raise ConfigError(
            f"{name}: must be a float tensor of shape {tuple(shape)}, got {described(value)}; B responses and R "
            "response columns are the same in all arguments"
        )


def require_alike(**tensors: Tensor) -> None:
    """Float tensors, all of the shape of the first."""
    shapes = [value.shape for value in tensors.values() if isinstance(value, Tensor)]
    for name, value in tensors.items():
        require_floats(name, value, shapes[0] if shapes else ())


def require_finite(name: str, value: Tensor, where: Tensor) -> None:
    """Floats of the shape of ``where``, finite where it is True."""
    require_floats(name, value, where.shape)
    wrong = where & ~torch.isfinite(value)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ConfigError(
            f"{name}: must be finite wherever a token stands, got {float(value[tuple(place)])} at {place}; look for "
            "the reward function or the model that returned it"
        )


def require_range(name: str, value: float, holds: bool, rule: str, remedy: str) -> None:
    """Refuse a number that breaks its rule.

    Raises:
        ConfigError: ``holds`` is False.
    """
    if not holds:
        raise ConfigError(f"{name}: must {rule}, got {value!r}; {remedy}")


def described(value: object) -> str:
    """Describe a tensor by dtype and shape, anything else by its type, for error messages."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
