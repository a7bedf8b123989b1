"""A worker of a corpus on Ray: it reads lines from the input file, and writes traces and records to the folder.

What goes through the object store of Ray is the place of a task in a file, and a few numbers a line. The module does
not import Ray.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flowgraph import errors
from flowgraph.attention.modules import base_model
from flowgraph.corpus.corpus_options import CorpusOptions
from flowgraph.corpus.requests import CorpusFields, Line, read_requests
from flowgraph.corpus.run import FinishedLine, Run, finished_line
from flowgraph.corpus.run_folder import CorpusFolder, fingerprint
from flowgraph.corpus.work_notes import LOADING, WorkNotes
from flowgraph.errors import ClusterError, FlowgraphError, InvalidInputError, OutputError, first_line

Load = Callable[[], tuple[Any, Any]]
_UNREADABLE = (OSError, ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError)
_CHECKED = ("weights", "tokenizer", "versions")
"""Settings that a worker compares with its own model and packages."""


@dataclass(frozen=True)
class CorpusTask:
    """The work on one batch of lines.

    Attributes:
        lines: all lines that share a forward pass, finished ones included; or one line whose response is generated.
        unfinished: numbers of the lines to trace.
        generates: whether the responses are generated and kept, and nothing is traced.
    """

    lines: tuple[Line, ...]
    unfinished: tuple[int, ...]
    generates: bool = False

    def to_text(self) -> str:
        """Write the task as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str | bytes) -> CorpusTask:
        """Read a task from its line."""
        values = json.loads(text)
        lines = tuple(Line(**line) for line in values["lines"])
        return cls(lines, tuple(values["unfinished"]), values["generates"])


@dataclass(frozen=True)
class RayJob:
    """What every worker of a run needs to know.

    Attributes:
        path: the input file.
        fields: the keys of a line.
        out: the folder of the run.
        notes: the folder of the tasks and of what is under way.
        options: the choices of the run.
        settings: everything that decides a result, from the manifest.
        threads: number of torch threads.
        retries: how often the work on a line is tried again after the death of its worker.
        load: returns model and tokenizer.
    """

    path: str
    fields: CorpusFields
    out: str
    notes: str
    options: CorpusOptions
    settings: Mapping[str, Any]
    threads: int
    retries: int
    load: Load

    @property
    def tasks(self) -> Path:
        """The file of the tasks, one a line."""
        return Path(self.notes) / "tasks.jsonl"


@dataclass(frozen=True)
class TaskOutcome:
    """What a worker returns of a task.

    Attributes:
        finished: the counts of every line that is traced.
        failed: number and message of every line that could not be.
        generated: numbers of the lines whose response is kept.
        warnings: texts of the warnings.
        fatal: class and message of the error that ends the run; None where it goes on.
    """

    finished: tuple[FinishedLine, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    generated: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    fatal: tuple[str, str] | None = None

    def to_text(self) -> str:
        """Write the outcome as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> TaskOutcome:
        """Read an outcome from JSON."""
        values = json.loads(text)
        fatal = values["fatal"]
        return cls(
            finished=tuple(FinishedLine(**line) for line in values["finished"]),
            failed=tuple((number, message) for number, message in values["failed"]),
            generated=tuple(values["generated"]),
            warnings=tuple(values["warnings"]),
            fatal=None if fatal is None else (fatal[0], fatal[1]),
        )

    def raise_fatal(self) -> None:
        """Raise the error that ended the task in its worker, if any, as the class that it was."""
        if self.fatal is None:
            return
        name, message = self.fatal
        raise vars(errors)[name](message)


class WorkerRun(Run):
    """A run whose next piece of work is noted before it begins; results and counts are those of :class:`Run`."""

    notes: WorkNotes

    def announce(self, work: str, lines: Sequence[Line]) -> None:
        """Note the next piece of work and its lines."""
        self.notes.begin(work, [line.number for line in lines])


class RayWorker:
    """Work on tasks, one after the other; the model is loaded at the first.

    Every file that is written is that of one line, complete or absent, and the same whoever writes it. So a task
    may run twice, or end in the middle and run again.
    """

    def __init__(self, job: RayJob) -> None:
        self._job = job
        self._run: WorkerRun | None = None

    def __call__(self, block: Mapping[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Work on the tasks of a block; yields one row for each."""
        for start, size in zip(block["start"], block["size"], strict=True):
            outcome = self.work(int(start), int(size))
            yield {"outcome": [outcome.to_text()]}

    def work(self, start: int, size: int) -> TaskOutcome:
        """Work on the task at a place in the file of tasks.

        Args:
            start: offset of its first byte.
            size: number of its bytes.
        """
        try:
            task = self._task(start, size)
            notes = WorkNotes(Path(self._job.notes) / f"{start}.json", self._job.retries)
            run = self._loaded(task, notes)
            outcome = self._generate(run, task) if task.generates else self._trace(run, task)
            notes.end()
        except FlowgraphError as error:
            # The error of one line is part of the outcome; this one concerns every line.
            return TaskOutcome(fatal=(_public_class(error), str(error)))
        return outcome

    def _task(self, start: int, size: int) -> CorpusTask:
        """Read a task from the file of tasks."""
        try:
            with self._job.tasks.open("rb") as file:
                file.seek(start)
                return CorpusTask.from_text(file.read(size))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"out: must be a folder that every worker reaches and that the run still uses, got {self._job.out} "
                f"without the tasks ({error}); use a shared folder, and run the same command again"
            ) from error

    def _loaded(self, task: CorpusTask, notes: WorkNotes) -> WorkerRun:
        """Return the run of this worker with its model, which the first task loads."""
        for number in task.unfinished:
            if notes.work.get(number) == LOADING and notes.given_up(number) is not None:
                raise ClusterError(
                    f"workers: must survive the loading of the model, got {notes.deaths[number]} deaths in a row; "
                    "give each more memory, or use fewer workers, and run the same command again"
                )
        if self._run is None:
            notes.begin(LOADING, task.unfinished)
            self._run = self._load()
        self._run.notes = notes
        return self._run

    def _load(self) -> WorkerRun:
        """Load the model, and check that it is the one of the run, under the same packages."""
        job = self._job
        # The number of threads decides the order of sums, and so the rounding.
        torch.set_num_threads(job.threads)
        model, tokenizer = _call(job.load)
        own = fingerprint(model, tokenizer)
        for name in _CHECKED:
            if own[name] != job.settings[name]:
                raise InvalidInputError(
                    f"ray: every worker must have the {name} that the run began with, got {own[name]!r:.200} and not "
                    f"{job.settings[name]!r:.200}; install the same packages and models on every machine"
                )
        # A trace states the name, and another path to the same weights must not change it.
        base_model(model).config._name_or_path = job.settings["model"]
        folder = CorpusFolder.at_work(Path(job.out))
        return WorkerRun(model, tokenizer, folder, job.options, 0, None)

    def _generate(self, run: WorkerRun, task: CorpusTask) -> TaskOutcome:
        """Generate and keep the responses of the lines of a task."""
        failed = _given_up(run.notes, task)
        wanted = [line for line in task.lines if line.number not in failed]
        with _recorded() as caught:
            for line, request in read_requests(self._job.path, wanted, self._job.fields):
                run.generate(line, request)
        for line in wanted:
            if line.number in run.failed:
                failed[line.number] = run.failed[line.number]
        kept = [line.number for line in wanted if line.number not in failed]
        return TaskOutcome(failed=tuple(failed.items()), generated=tuple(kept), warnings=_texts(caught))

    def _trace(self, run: WorkerRun, task: CorpusTask) -> TaskOutcome:
        """Trace the lines of a batch that have no record yet."""
        failed = _given_up(run.notes, task)
        # The process that planned the batch has encoded its lines too, and shown the warnings.
        prepared = []
        with _recorded():
            for line, request in read_requests(self._job.path, list(task.lines), self._job.fields):
                item = run.prepare(line, request)
                if item is not None:
                    prepared.append(item)
        # An earlier worker may have finished some of the lines before it died.
        wanted = {
            item.line.number
            for item in prepared
            if item.line.number in task.unfinished
            and item.line.number not in failed
            and run.folder.record(item.line) is None
        }
        with _recorded() as caught:
            if wanted:
                run.trace_batch(prepared, wanted)

        # What is on disk counts, whoever wrote it.
        finished = []
        for item in prepared:
            record = run.folder.record(item.line)
            if item.line.number in task.unfinished and record is not None:
                failed.pop(item.line.number, None)
                finished.append(finished_line(item, record))
        done = {line.number for line in finished}
        for number in task.unfinished:
            if number not in done and number in run.failed:
                failed[number] = run.failed[number]
        return TaskOutcome(tuple(finished), tuple(failed.items()), warnings=_texts(caught))


def _call(load: Load) -> tuple[Any, Any]:
    """Call the function that loads the model, and report what it raises as one message."""
    try:
        model, tokenizer = load()
    except FlowgraphError:
        raise
    except Exception as error:
        # Code of the caller's, which may raise anything; its traceback would be lost among those of Ray.
        raise InvalidInputError(
            f"load: must return model and tokenizer in a worker, got {type(error).__name__}: {first_line(error)}; "
            "check that the model has the same path on every machine"
        ) from error
    return model, tokenizer


def _given_up(notes: WorkNotes, task: CorpusTask) -> dict[int, str]:
    """Return the message of every line that is not tried again."""
    found = {}
    for number in task.unfinished:
        message = notes.given_up(number)
        if message is not None:
            found[number] = message
    return found


@contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    """Record warnings instead of printing them into the log of a worker."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught


def _texts(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    """Return the texts of recorded warnings of a user's data, each once."""
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return tuple(dict.fromkeys(texts))


def _public_class(error: FlowgraphError) -> str:
    """Return the name of the first class of an error that ``flowgraph.errors`` holds."""
    names = [cls.__name__ for cls in type(error).__mro__ if vars(errors).get(cls.__name__) is cls]
    return names[0]


@dataclass(frozen=True)
class SavedModel:
    """Load the model that the run has written to its folder: settings as JSON, weights as safetensors, no code.

    Attributes:
        path: the folder.
        device: where the model goes.
        implementation: name of its attention function, which its settings do not keep; None: as transformers chooses.
    """

    path: str
    device: str
    implementation: str | None

    def __call__(self) -> tuple[Any, Any]:
        """Return model and tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Without ``trust_remote_code=False`` transformers offers to run code of a folder.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            # Workers of one machine share the pages that safetensors maps.
            model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype="auto", attn_implementation=self.implementation, use_safetensors=True, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(self.path, **local)
        except _UNREADABLE as error:
            raise InvalidInputError(
                f"model: must be one that a worker can read from a folder, got {first_line(error)}; "
                "pass CorpusRay(load=...), a function that returns model and tokenizer"
            ) from error
        loaded: Any = model
        # The stubs of transformers describe another signature.
        return loaded.eval().to(self.device), tokenizer


def save_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Write model and tokenizer to a new folder, for :class:`SavedModel`.

    Raises:
        InvalidInputError: a model with an adapter or another wrapper, or one that transformers does not write.
        OutputError: the folder cannot be written.
    """
    if model is not base_model(model):
        raise InvalidInputError(
            f"model: must be a transformers model without wrappers for workers on Ray, got {type(model).__name__}; "
            "merge its adapter, or pass CorpusRay(load=...), a function that returns model and tokenizer"
        )
    try:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    except OSError as error:
        raise OutputError(
            f"out: must hold the model for the workers, got {first_line(error)}; free some space, or pass "
            "CorpusRay(load=...)"
        ) from error
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        # Settings that JSON has no form for, or weights that share memory in a way of their own.
        raise InvalidInputError(
            f"model: must be one that save_pretrained writes, got {first_line(error)}; pass CorpusRay(load=...), a "
            "function that returns model and tokenizer"
        ) from error
