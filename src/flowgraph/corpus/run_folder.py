"""The folder of a corpus run. Its files are the state of the run; each is written atomically.

::

    corpus.json     what the run is: options, model, and a fingerprint of every line
    traces/         one trace per line (and its page, where pages are wanted)
    responses/      generated responses, so that none is generated twice
    records/        the figures of a finished line; written last, so a line with a record is finished
    .ray/           what the workers of a cluster work on, while they do
    tokens, traces, timing .parquet or .csv, errors.jsonl, index.html: written when the run ends
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.attention.modules import base_model
from flowgraph.corpus.requests import Line
from flowgraph.errors import InvalidInputError, OutputError
from flowgraph.files import read_json, write_text
from flowgraph.tracing.provenance import model_name, package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "flowgraph-corpus/1"
TABLES = ("tokens", "traces", "timing")
_FOLDERS = ("traces", "records", "responses")
_NOTES = ".ray"
_TABLE_FILES = tuple(f"{table}.{suffix}" for table in TABLES for suffix in ("parquet", "csv"))
_RESULTS = (*_TABLE_FILES, "errors.jsonl", "index.html")
_SAMPLES_PER_WEIGHT = 64
_COMPACT = (",", ":")


class CorpusFolder:
    """The folder of one run; the module's docstring lists its files.

    Args:
        out: created if it is missing.
        settings: everything that decides a result; plain JSON values.
        lines: the lines of the input.
        restart: remove what an earlier run wrote here.

    Raises:
        OutputError: the folder cannot be created or written.
        InvalidInputError: it belongs to another input or other options, or holds files of no run.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], lines: Sequence[Line], *, restart: bool = False) -> None:
        self.out = out
        # As the manifest will hold them: after a round trip, tuples are lists.
        self._settings = json.loads(json.dumps(settings))
        self._lines = [[line.number, line.digest] for line in lines]
        self._manifest = out / "corpus.json"
        if restart and self._manifest.is_file():
            self._remove_results()
        self.remove_temporary_files()
        self._begin_or_continue()
        for folder in _FOLDERS:
            _make(out / folder)

    @classmethod
    def at_work(cls, out: Path) -> CorpusFolder:
        """Return the folder of a run that another process began, for a worker; nothing is checked or changed."""
        folder = cls.__new__(cls)
        folder.out = out
        return folder

    def make_notes(self) -> Path:
        """Create the folder of what workers work on, with a name that no other run has.

        Raises:
            OutputError: the folder cannot be created.
        """
        notes = self.out / _NOTES / uuid.uuid4().hex
        _make(notes)
        return notes

    def trace_path(self, line: Line) -> Path:
        """Return the path of a line's trace."""
        return self.out / "traces" / f"{line.name}.safetensors"

    def page_path(self, line: Line) -> Path:
        """Return the path of a line's page."""
        return self.out / "traces" / f"{line.name}.html"

    def _record_path(self, line: Line) -> Path:
        """Return the path of a line's record."""
        return self.out / "records" / f"{line.name}.json"

    def _response_path(self, line: Line) -> Path:
        """Return the path of a line's generated response."""
        return self.out / "responses" / f"{line.name}.json"

    def record(self, line: Line) -> dict[str, Any] | None:
        """Return the figures of a finished line; None where it is not finished."""
        record = read_json(self._record_path(line))
        # A record of other bytes, or one without its trace, is out of date.
        if record is None or record.get("digest") != line.digest or not self.trace_path(line).is_file():
            return None
        return record

    def finish(self, line: Line, record: Mapping[str, Any]) -> None:
        """Write a line's record, after every other file of the line."""
        text = json.dumps({"digest": line.digest, **record}, allow_nan=False, separators=_COMPACT)
        write_text(self._record_path(line), text)

    def response(self, line: Line) -> list[int] | None:
        """Return a response that was generated earlier."""
        saved = read_json(self._response_path(line))
        if saved is None or saved.get("digest") != line.digest:
            return None
        return saved["ids"]

    def keep_response(self, line: Line, ids: list[int]) -> None:
        """Keep a generated response, because generation is the costly part of a line."""
        text = json.dumps({"digest": line.digest, "ids": ids}, separators=_COMPACT)
        write_text(self._response_path(line), text)

    def _begin_or_continue(self) -> None:
        """Write the manifest of a new run, or check that the run found here is the same one."""
        found = read_json(self._manifest)
        if found is None:
            self._refuse_other_files()
            manifest = {"schema": SCHEMA, "settings": self._settings, "lines": self._lines}
            write_text(self._manifest, json.dumps(manifest))
            return

        # A run continues only if everything that decides a result is the same.
        remedy = "run it as before, choose another folder, or restart to remove the earlier results"
        if found.get("schema") != SCHEMA:
            raise InvalidInputError(
                f"out: must hold schema {SCHEMA}, got {found.get('schema')!r} in {self.out}; {remedy}"
            )
        change = _first_change(found.get("settings", {}), self._settings)
        if change is not None:
            name, before, now = change
            raise InvalidInputError(
                f"out: must be continued with the options of its run, got {name} {now!r:.80} and not {before!r:.80} "
                f"in {self.out}; {remedy}"
            )
        if found.get("lines") != self._lines:
            difference = _first_difference(found.get("lines", []), self._lines)
            raise InvalidInputError(
                f"path: must be the file that the run in {self.out} began with, got one where {difference}; {remedy}"
            )

    def _refuse_other_files(self) -> None:
        """Refuse a folder without a manifest that holds files with the names of results."""
        for name in (*_FOLDERS, *_RESULTS):
            if (self.out / name).exists():
                raise InvalidInputError(
                    f"out: must be a new folder or that of an earlier run, got {self.out} with {name!r} in "
                    "it and no readable corpus.json; choose another folder"
                )

    def _remove_results(self) -> None:
        """Remove the files of the earlier run and no others."""
        # Names of result files start with the number of their line; other files are not touched.
        for folder in _FOLDERS:
            for path in (self.out / folder).glob("[0-9]*"):
                path.unlink(missing_ok=True)
        for name in _RESULTS:
            (self.out / name).unlink(missing_ok=True)
        for folder in _FOLDERS:
            if (self.out / folder).is_dir() and not any((self.out / folder).iterdir()):
                (self.out / folder).rmdir()
        # The manifest goes last: a run killed before this line is still recognised as a run.
        self._manifest.unlink()
        for folder in _FOLDERS:
            if (self.out / folder).exists():
                raise InvalidInputError(
                    f"out: must hold the files of a run alone, got others in {self.out / folder}; move them away"
                )

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of a run or worker that was killed while it wrote, and the notes of workers.

        A worker of an earlier run that is still alive stops here: it cannot note its next piece of work.
        """
        notes = self.out / _NOTES
        if notes.is_dir() and not notes.is_symlink():
            shutil.rmtree(notes, ignore_errors=True)
        # atomic_write adds a dot in front of a name and random characters behind it.
        for name in ("corpus.json", *_RESULTS):
            for path in self.out.glob(f".{name}.*"):
                path.unlink(missing_ok=True)
        for folder in _FOLDERS:
            for path in (self.out / folder).glob(".[0-9]*"):
                path.unlink(missing_ok=True)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Create the folder and lock it against other runs; the system releases the lock when the process ends.

    Raises:
        OutputError: the folder cannot be created, or another run works in it.
    """
    _make(out)
    try:
        import fcntl
    except ImportError:
        # Windows has no such lock. Two runs at once would only do the same work twice.
        yield
        return
    try:
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"out: must be a folder that can be written, got {out} ({error.strerror}); choose another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"out: must be free, got {out} with another run at work in it; wait for it or choose another folder"
            ) from None
        yield


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe a model and its tokenizer so that two checkpoints can be told apart.

    Args:
        model: a Hugging Face causal LM; a few values of every weight are read.
        tokenizer: its vocabulary and chat template are read.

    Returns:
        Name, digests and package versions as plain JSON values.
    """
    # Shapes and evenly spaced values of all weights: a digest of every value would take too long.
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # Offloaded weights have no values here.
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().flatten()
            stride = max(1, flat.numel() // _SAMPLES_PER_WEIGHT)
            digest.update(flat[::stride].float().cpu().numpy().tobytes())
    # The chat template decides the tokens of a prompt as much as the vocabulary does.
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)])
    return {
        "model": model_name(base_model(model)),
        "weights": digest.hexdigest()[:16],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "versions": package_versions(),
    }


def _make(folder: Path) -> None:
    """Create a folder and its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        # A NUL in the name is a ValueError.
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(
            f"out: must be a folder that can be made, got {str(folder)!r} ({reason}); choose another place"
        ) from error


def _first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first setting that differs."""
    for name in (*now, *before):
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def _first_difference(before: Sequence[Any], now: Sequence[Any]) -> str:
    """Describe the first line that differs between two lists of ``[number, digest]``."""
    for old, new in zip(before, now, strict=False):
        if old != new:
            return f"line {min(old[0], new[0])} has changed"
    more = len(now) - len(before)
    if more > 0:
        return f"there are {more} lines more"
    return f"there are {-more} lines fewer"
