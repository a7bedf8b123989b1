"""Read a JSON object from a file, and check its numbers; shared by the records of models and machines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flowgraph.errors import InvalidInputError

_MAX_SHOWN = 80
"""Characters of a wrong value that a message shows."""


def read_object(argument: str, path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        argument: name of the argument, for the message.
        path: the file.
        remedy: what the caller can do, for the message.

    Raises:
        InvalidInputError: the file cannot be read, or holds no JSON object.
    """
    try:
        # A byte order mark is what Windows editors add.
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidInputError(
            f"{argument}: must be a readable file with a JSON object, got {str(path)!r} "
            f"({type(error).__name__}: {str(error)[:_MAX_SHOWN]}); {remedy}"
        ) from error
    if not isinstance(entries, dict):
        raise InvalidInputError(
            f"{argument}: must be a file with one JSON object, got {type(entries).__name__} in {str(path)!r}; {remedy}"
        )
    return entries


def positive_integer(name: str, value: Any, remedy: str) -> int:
    """Return a value that must be a positive integer.

    Raises:
        InvalidInputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{name}: must be a positive integer, got {shown(value)}; {remedy}")
    return value


def positive_number(name: str, value: Any, remedy: str) -> float:
    """Return a value that must be a positive finite number.

    Raises:
        InvalidInputError: it is none.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise InvalidInputError(f"{name}: must be a positive finite number, got {shown(value)}; {remedy}")
    return float(value)


def shown(value: Any) -> str:
    """Format a wrong value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
