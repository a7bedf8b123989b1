"""Write a folder atomically: it exists with all its files, or not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgraph import OutputError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` and rename it to ``out`` on success; delete it on failure.

    Args:
        out: a folder that does not exist yet; missing parent folders are created.

    Raises:
        OutputError: the folder cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    # A rename is atomic only within one file system, so the temporary folder is a sibling of ``out``.
    temporary = out.with_name(f".writing-{out.name}")
    try:
        # An interrupted run may have left a folder of this name.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _share_files_like_folder(temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"out: must be a new folder that can be written, got {out} ({reason}); free disk space, or choose another "
            "place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share_files_like_folder(folder: Path) -> None:
    """Give files the read and write permissions of their folder, because safetensors writes private files."""
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(permissions)
