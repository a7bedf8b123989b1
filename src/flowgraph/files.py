"""Write files atomically, and check before a long run that a path can be written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flowgraph.errors import OutputError

PathLike = str | os.PathLike[str]
Result = TypeVar("Result", bound=Callable[..., Any])


def loadable(cls: Result) -> Result:
    """Register a class of plain values with torch, so that ``torch.load`` reads what ``torch.save`` wrote of it.

    By default ``torch.load`` runs no code of a file, and builds objects of registered classes alone.
    """
    import torch

    torch.serialization.add_safe_globals([cls])
    return cls


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
