"""The folder of a corpus run: what is done is what lies there, each file written whole or not at all.

::

    corpus.json     what the run is: options, model, and a fingerprint of every line
    traces/         one trace a line (and its page, where asked for)
    responses/      generated responses, so that none is generated twice
    records/        the figures of a finished line; written last, so a record says that its line is done
    tokens, traces, timing .parquet or .csv, errors.jsonl, index.html: written when the run ends
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.attention.modules import base_model
from flowgraph.corpus.requests import Line
from flowgraph.errors import InvalidInputError, OutputError
from flowgraph.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "flowgraph-corpus/1"
TABLES = ("tokens", "traces", "timing")
_FOLDERS = ("traces", "records", "responses")
_RESULTS = (*(f"{table}.{kind}" for table in TABLES for kind in ("parquet", "csv")), "errors.jsonl", "index.html")


class CorpusFolder:
    """One run's folder; see the module's text for what lies in it.

    Args:
        out: made if it is not there.
        settings: everything that decides a result; plain JSON values.
        lines: the lines of the input.
        restart: throw away what an earlier run left here.

    Raises:
        OutputError: the folder cannot be made or written, or another run is at work in it.
        InvalidInputError: it belongs to another input or other options, or holds files of no run.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], lines: Sequence[Line], *, restart: bool = False) -> None:
        self.out = out
        self._settings = json.loads(json.dumps(settings))
        self._lines = [[line.number, line.digest] for line in lines]
        self._manifest = out / "corpus.json"
        if restart and self._manifest.is_file():
            self._clear()
        self._sweep()
        self._adopt()
        for folder in _FOLDERS:
            _make(out / folder)

    def trace_path(self, line: Line) -> Path:
        return self.out / "traces" / f"{line.name}.safetensors"

    def page_path(self, line: Line) -> Path:
        return self.out / "traces" / f"{line.name}.html"

    def record(self, line: Line) -> dict[str, Any] | None:
        """The figures of a finished line, None where it has yet to be traced."""
        record = _read_json(self.out / "records" / f"{line.name}.json")
        done = record is not None and record.get("digest") == line.digest and self.trace_path(line).is_file()
        return record if done else None

    def finish(self, line: Line, record: Mapping[str, Any]) -> None:
        """Write a line's record, after everything else of it is on disk."""
        text = json.dumps({"digest": line.digest, **record}, allow_nan=False, separators=(",", ":"))
        write_text(self.out / "records" / f"{line.name}.json", text)

    def response(self, line: Line) -> list[int] | None:
        """A response generated earlier."""
        saved = _read_json(self.out / "responses" / f"{line.name}.json")
        return saved["ids"] if saved is not None and saved.get("digest") == line.digest else None

    def keep_response(self, line: Line, ids: list[int]) -> None:
        """Keep a generated response, the costly part of a line that has none."""
        path = self.out / "responses" / f"{line.name}.json"
        write_text(path, json.dumps({"digest": line.digest, "ids": ids}, separators=(",", ":")))

    def _adopt(self) -> None:
        """Take up the run that this folder holds, or begin one."""
        found = _read_json(self._manifest)
        if found is None:
            strange = [name for name in (*_FOLDERS, *_RESULTS) if (self.out / name).exists()]
            if strange:
                raise InvalidInputError(
                    f"out: must be a new folder or that of an earlier run, got {self.out} with {strange[0]!r} in "
                    "it and no readable corpus.json; choose another folder"
                )
            manifest = {"schema": SCHEMA, "settings": self._settings, "lines": self._lines}
            write_text(self._manifest, json.dumps(manifest))
            return
        remedy = "run it as before, choose another folder, or restart to throw the earlier results away"
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
            raise InvalidInputError(
                f"path: must be the file that the run in {self.out} began with, got one where "
                f"{_difference(found.get('lines', []), self._lines)}; {remedy}"
            )

    def _clear(self) -> None:
        """Remove what a run wrote, and nothing else; its manifest last, so that a kill leaves a run behind."""
        for folder in _FOLDERS:
            for path in (self.out / folder).glob("[0-9]*"):
                path.unlink(missing_ok=True)
        for name in _RESULTS:
            (self.out / name).unlink(missing_ok=True)
        for folder in _FOLDERS:
            if (self.out / folder).is_dir() and not any((self.out / folder).iterdir()):
                (self.out / folder).rmdir()
        self._manifest.unlink()
        strange = [folder for folder in _FOLDERS if (self.out / folder).exists()]
        if strange:
            raise InvalidInputError(
                f"out: must hold the files of a run alone, got others in {self.out / strange[0]}; move them away"
            )

    def _sweep(self) -> None:
        """Remove the half-written files of a killed run."""
        for name in ("corpus.json", *_RESULTS):
            for path in self.out.glob(f".{name}.*"):
                path.unlink(missing_ok=True)
        for folder in _FOLDERS:
            for path in (self.out / folder).glob(".[0-9]*"):
                path.unlink(missing_ok=True)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; the system lets go of the lock when a process dies."""
    _make(out)
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once would only do the same work twice
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
    """What names a model and its tokenizer: a few values of every weight tell two checkpoints apart."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)])
    inner = base_model(model)
    return {
        "model": str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__),
        "weights": digest.hexdigest()[:16],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "versions": {name: version(name) for name in ("flowgraph-llm", "torch", "transformers", "torch-geometric")},
    }


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(
            f"out: must be a folder that can be made, got {str(folder)!r} ({reason}); choose another place"
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def _difference(before: Sequence[Any], now: Sequence[Any]) -> str:
    """The first line that differs, in words."""
    for old, new in zip(before, now, strict=False):
        if old != new:
            return f"line {min(old[0], new[0])} has changed"
    more = len(now) - len(before)
    return f"there are {abs(more)} lines {'more' if more > 0 else 'fewer'}"
