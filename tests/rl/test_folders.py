"""A new folder is there whole or not at all, and is no more private than any other."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flowgraph import OutputError
from rl.folders import new_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_open_as_the_umask_says(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "deep" / "new") as temporary:
            (temporary / "inner").mkdir()
            save_file({"x": torch.ones(1)}, temporary / "inner" / "x.safetensors")
            assert not (tmp_path / "deep" / "new").exists()
    finally:
        os.umask(before)
    written = tmp_path / "deep" / "new" / "inner" / "x.safetensors"
    assert stat.S_IMODE(written.stat().st_mode) == mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
    ],
)
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, error: Exception, reason: str):
    def write() -> None:
        with new_folder(tmp_path / "new") as temporary:
            (temporary / "half").write_text("x")
            raise error

    with pytest.raises(OutputError, match=rf"out: must be a new folder that can be written, got .*{reason}"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_any_other_error_passes_and_leaves_nothing_either(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_part_of_the_next(tmp_path: Path):
    (tmp_path / ".writing-new").mkdir()
    (tmp_path / ".writing-new" / "old").touch()
    with new_folder(tmp_path / "new") as temporary:
        (temporary / "fresh").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fresh"]


def test_a_place_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    refused = pytest.raises(OutputError, match=r"out: must be a new folder that can be written, got .*Not a directory")
    with refused, new_folder(tmp_path / "file" / "new"):
        pass
