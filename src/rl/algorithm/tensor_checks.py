"""Check the shape, dtype and range of tensors ``[B, R]``: B responses, R response columns.

The first functions check one tensor, the next relate several, and :func:`require_range` checks a number. All raise
:class:`rl.errors.ConfigError` with the name of the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.errors import ConfigError


def require_mask(name: str, mask: Tensor) -> None:
    """Require a bool tensor ``[B, R]``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        raise ConfigError(
            f"{name}: must be a bool tensor of shape (responses, tokens), got {described(mask)}; convert with .bool()"
        )


def require_run(mask: Tensor) -> None:
    """Require a bool tensor ``[B, R]`` that is True on one run of tokens from column 0 in each response."""
    require_mask("mask", mask)
    # A token of the mask whose left neighbour is outside it starts a second run.
    starts = mask[:, 1:] & ~mask[:, :-1]
    has_gap = starts.any(1)
    if bool(has_gap.any()):
        first = int(has_gap.nonzero()[0])
        raise ConfigError(
            f"mask: must be True on one run of tokens from column 0, got a gap in response {first}; "
            "pad responses on the right"
        )


def require_indices(name: str, value: Tensor, shape: str, ndim: int, remedy: str) -> None:
    """Require an int64 tensor with this number of dimensions; ``shape`` is how the message describes it."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != ndim:
        raise ConfigError(f"{name}: must be an int64 tensor of shape {shape}, got {described(value)}; {remedy}")


def require_floats(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Require a float tensor of this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != tuple(shape):
        raise ConfigError(
            f"{name}: must be a float tensor of shape {tuple(shape)}, got {described(value)}; B responses and R "
            "response columns are the same in all arguments"
        )


def require_alike(**tensors: Tensor) -> None:
    """Require float tensors, all of the shape of the first."""
    shapes = [value.shape for value in tensors.values() if isinstance(value, Tensor)]
    # Where no argument is a tensor, any shape serves: the check fails on the type.
    shape = shapes[0] if shapes else ()
    for name, value in tensors.items():
        require_floats(name, value, shape)


def require_finite(name: str, value: Tensor, where: Tensor) -> None:
    """Require a float tensor of the shape of ``where`` that is finite where ``where`` is True."""
    require_floats(name, value, where.shape)
    is_wrong = where & ~torch.isfinite(value)
    if bool(is_wrong.any()):
        place = is_wrong.nonzero()[0].tolist()
        got = float(value[tuple(place)])
        raise ConfigError(
            f"{name}: must be finite on every token of the mask, got {got} at {place}; look for "
            "the reward function or the model that returned it"
        )


def require_range(name: str, value: float, is_valid: bool, rule: str, remedy: str) -> None:
    """Require that a number keeps its rule.

    Args:
        name: of the argument.
        value: the number.
        is_valid: whether it keeps the rule; False raises.
        rule: as the message states it after "must".
        remedy: last part of the message.
    """
    if not is_valid:
        raise ConfigError(f"{name}: must {rule}, got {value!r}; {remedy}")


def described(value: object) -> str:
    """Describe a tensor by dtype and shape, anything else by its type, for error messages."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
