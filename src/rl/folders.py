"""A folder that is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgraph import OutputError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` and move it there on success; on failure leave nothing.

    Args:
        out: does not exist yet; folders above it are made.

    Raises:
        OutputError: it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    temporary = out.with_name(f".writing-{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # safetensors writes private files; these are as open as their folder
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"out: must be a new folder that can be written, got {out} ({reason}); make room, or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
