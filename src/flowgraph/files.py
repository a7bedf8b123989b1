"""Write files atomically, and check before a long run that a path can be written."""

from __future__ import annotations

import copyreg
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from flowgraph.errors import OutputError, TraceFileError

PathLike = str | os.PathLike[str]
Result = TypeVar("Result", bound=type)
_LOADABLE: set[type] = set()


def loadable(cls: Result) -> Result:
    """Let ``torch.load`` read what ``torch.save`` wrote of a class of plain values, with its safe default.

    By default ``torch.load`` runs no code of a file, and calls registered functions alone. An object is pickled as a
    call of :func:`restored` with its values, so that one registration covers every such class.
    """
    _LOADABLE.add(cls)
    if "__reduce__" not in vars(cls):
        cls.__reduce__ = _reduced  # type: ignore[method-assign]
    allow_restored()
    return cls


def allow_restored() -> None:
    """Register :func:`restored` with torch."""
    import torch

    torch.serialization.add_safe_globals([restored])


def _reduced(self: Any) -> tuple[Any, ...]:
    """Describe an object as the call that builds it."""
    cls = type(self)
    items = tuple(self) if isinstance(self, tuple) else ()
    if cls not in _LOADABLE:
        # A subclass of the user's: pickled in the usual way.
        return copyreg.__newobj__, (cls, *items), getattr(self, "__dict__", None)  # type: ignore[attr-defined]
    values = vars(self)
    if is_dataclass(self):
        # Cached numbers, and the version of a graph in this process, are not part of a result.
        values = {field.name: values[field.name] for field in fields(self)}
    return restored, (cls.__module__, cls.__qualname__, items or dict(values))


def restored(module: str, name: str, values: Any) -> Any:
    """Build an object of a registered class from its values, as pickling wrote them.

    Args:
        module: the module of the class, in this package.
        name: the name of the class.
        values: its attributes, or the items of a tuple.

    Raises:
        TraceFileError: a class that is not registered.
    """
    cls = None
    if module.startswith("flowgraph."):
        # Importing the module registers its classes.
        cls = getattr(importlib.import_module(module), name, None)
    if not isinstance(cls, type) or cls not in _LOADABLE:
        raise TraceFileError(
            f"file: must hold results of flowgraph, got {module}.{name}; write it again with this version"
        )
    if issubclass(cls, tuple):
        return cls(*values)
    if hasattr(cls, "_restored"):
        return cls._restored(values)
    result = object.__new__(cls)
    vars(result).update(values)
    return result


def check_writable(path: PathLike) -> Path:
    """Refuse a path that could not be written later.

    Returns:
        The path.

    Raises:
        OutputError: a folder, or a place where no file can be made.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"path: must name a file, got the folder {target}; add a file name")
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"path: its folder must exist, got {target} and no folder {folder}; create it first")
    is_protected = target.exists() and not os.access(target, os.W_OK)
    if is_protected or not os.access(folder, os.W_OK):
        raise OutputError(f"path: must be writable, got {target} without permission; choose another place")
    return target


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Provide a temporary path in the same folder, and move it to ``path`` on success; on failure, remove it.

    A reader sees the old file or the complete new one.

    Raises:
        OutputError: the path cannot be written (also when the disk is full).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "result.txt"
        >>> with atomic_write(path) as temporary:
        ...     _ = temporary.write_text("done")
        >>> path.read_text()
        'done'
    """
    target = check_writable(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes a private file; the result gets the permissions of an ordinary one.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"path: must be writable, got {target}: {error.strerror or error}; choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """Return the permissions that the process withholds from new files; the system can only exchange them."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: PathLike, text: str) -> Path:
    """Write UTF-8 text atomically; lone surrogates become question marks.

    Returns:
        The path.

    Raises:
        OutputError: the path cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return Path(path)


def write_json(path: PathLike, payload: dict[str, Any]) -> None:
    """Write a payload as JSON, atomically; lone surrogates of broken token text are escaped, so they survive.

    Raises:
        OutputError: the path cannot be written.
    """
    write_text(path, json.dumps(payload, ensure_ascii=True, allow_nan=False, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
