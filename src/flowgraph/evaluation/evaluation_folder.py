"""The folder of an evaluation. Its files are the state of the run; each is written atomically.

::

    evaluation.json                what the run is: model, tokenizer, versions, seed
    items/TASK/SPLIT/ID.json       the record of a finished item; see flowgraph.evaluation.item_record
    table.json, table.csv, index.html, figures/: written when the run ends
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgraph.errors import InvalidInputError, OutputError
from flowgraph.files import read_json, write_text

SCHEMA = "flowgraph-evaluation/1"
_MANIFEST = "evaluation.json"
_RESULTS = ("items", "table.json", "table.csv", "index.html")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_NAME = 60
"""Characters of a task's name that the name of its folder keeps."""
_DIGEST = 8


def safe_name(name: str) -> str:
    """Write the name of a task as the name of a folder; names that differ stay different.

    Example:
        >>> safe_name("line_knockout")
        'line_knockout'
        >>> safe_name("parc:../data.json")
        'parc_data_json-1599c3a6'
    """
    plain = _UNSAFE.sub("_", name)[:_MAX_NAME]
    if plain == name:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    return f"{plain}-{digest}"


class EvaluationFolder:
    """The folder of one evaluation; the module's docstring lists its files.

    Args:
        out: exists, and is claimed by this run.
        settings: everything that decides a result apart from items and methods; plain JSON values.

    Raises:
        OutputError: the folder cannot be written.
        InvalidInputError: it belongs to a run with other settings, or holds files of no run.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        # As the manifest will hold them: after a round trip, tuples are lists.
        self._settings = json.loads(json.dumps(settings))
        self._remove_temporary_files()
        self._begin_or_continue()

    def item_path(self, task: str, split: str, item: str) -> Path:
        """Return the path of an item's record."""
        return self.out / "items" / safe_name(task) / split / f"{item}.json"

    def record(self, task: str, split: str, item: str) -> dict[str, Any] | None:
        """Return the record of a finished item; None without a record that can be read."""
        return read_json(self.item_path(task, split, item))

    def finish(self, task: str, split: str, item: str, record: Mapping[str, Any]) -> None:
        """Write the record of an item, atomically.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = self.item_path(task, split, item)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"out: must be a folder that can be written, got {self.out} ({error.strerror}); choose another place"
            ) from error
        write_text(path, json.dumps(record, allow_nan=False, separators=(",", ":")))

    def _begin_or_continue(self) -> None:
        """Write the manifest of a new run, or check that the run found here is the same one."""
        found = read_json(self.out / _MANIFEST)
        if found is None:
            self._refuse_other_files()
            manifest = {"schema": SCHEMA, "settings": self._settings}
            write_text(self.out / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            return

        # A run continues only if everything that decides a result is the same.
        if found.get("schema") != SCHEMA:
            raise InvalidInputError(
                f"out: must hold schema {SCHEMA}, got {found.get('schema')!r} in {self.out}; choose another folder"
            )
        before = found.get("settings")
        if not isinstance(before, dict):
            before = {}
        for name in (*self._settings, *before):
            if before.get(name) != self._settings.get(name):
                raise InvalidInputError(
                    f"out: must be continued with the settings of its run, got {name} {self._settings.get(name)!r:.80} "
                    f"and not {before.get(name)!r:.80} in {self.out}; run it as before, or choose another folder"
                )

    def _refuse_other_files(self) -> None:
        """Check that a folder without a manifest holds no files with the names of results."""
        for name in _RESULTS:
            if (self.out / name).exists():
                raise InvalidInputError(
                    f"out: must be a new folder or that of an earlier evaluation, got {self.out} with {name!r} in it "
                    f"and no readable {_MANIFEST}; choose another folder"
                )

    def _remove_temporary_files(self) -> None:
        """Remove the temporary files of a run that was killed while it wrote."""
        # atomic_write adds a dot before a name and random characters after it.
        for name in (_MANIFEST, *_RESULTS[1:]):
            for path in self.out.glob(f".{name}.*"):
                path.unlink(missing_ok=True)
        for path in self.out.glob("items/*/*/.*.json.*"):
            path.unlink(missing_ok=True)
