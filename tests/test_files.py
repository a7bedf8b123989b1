"""Files are written atomically, with the permissions of ordinary files."""

import re

import pytest

from flowgraph import OutputError, atomic_write
from flowgraph.files import check_writable, read_json, write_json, write_text


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"path: its folder must exist, got .*; create it first"):
        check_writable(tmp_path / "no" / "file")
    with pytest.raises(OutputError, match=r"path: must name a file, got the folder"):
        check_writable(tmp_path)
    assert check_writable(tmp_path / "new") == tmp_path / "new"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = write_text(tmp_path / "kept", "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match=re.escape("No space left on device")):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_written_files_are_ordinary_files(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert write_text(tmp_path / "made", "x").stat().st_mode == plain.stat().st_mode


def test_only_an_object_is_read(tmp_path):
    path = tmp_path / "values.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None, "\ud800"]})
    assert read_json(path) == {"a": [1, None, "\ud800"]}
    for other in ("[1]", "7", "{", "", b"\xff{}"):
        path.write_bytes(other if isinstance(other, bytes) else other.encode())
        assert read_json(path) is None
