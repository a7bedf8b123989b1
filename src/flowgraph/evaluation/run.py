"""``evaluate``: run methods over the items of tasks, resumably, and compare them in tables."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from flowgraph.corpus.run_folder import claimed, fingerprint
from flowgraph.errors import FlowgraphError, InvalidInputError
from flowgraph.evaluation.catalogue import expand_methods, find_method, find_task
from flowgraph.evaluation.evaluation_folder import EvaluationFolder
from flowgraph.evaluation.item_record import SCHEMA, ItemPlace, compute_record, missing_methods, seeded
from flowgraph.evaluation.page_items import page_payload
from flowgraph.evaluation.records import EvaluationItem
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask
from flowgraph.evaluation.results import Evaluation
from flowgraph.evaluation.tables import task_table
from flowgraph.files import PathLike
from flowgraph.pages.evaluation_page import write_evaluation_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("dev", "test")
DEFAULT_ITEMS = 60
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MAX_ITEMS = 100_000
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class EvaluationProgress:
    """The state of a run.

    Attributes:
        stage: what is being done, or one line about an item that could not be used.
        done: items finished, earlier runs included.
        total: items of all tasks.
        now: items computed by this run.
        left: items that this run still has to compute.
        seconds: since this run began to compute.
    """

    stage: str
    done: int
    total: int
    now: int
    left: int
    seconds: float

    @property
    def items_per_second(self) -> float:
        """Items of this run per second; 0 before any time has passed."""
        if self.seconds <= 0:
            return 0.0
        return self.now / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the remaining time, as if all items took the same; None before the first item."""
        if not self.now:
            return None
        return self.left * self.seconds / self.now


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: str | Sequence[str],
    methods: str | Sequence[str],
    items: int = DEFAULT_ITEMS,
    split: Literal["dev", "test", "both"] = "test",
    seed: int = 0,
    out: PathLike | None = None,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> Evaluation:
    """Compare explanation methods on tasks whose truth is known or measured.

    Every method explains every item; each task scores the explanations against its truth. The table compares each
    method with the best trivial control and with the control ``text_only``, over the same items.

    With ``out``, every finished item is a file, written atomically: after a kill the same call continues the run,
    and a later call with more tasks, items or methods computes only what is missing. The table of a resumed run
    equals that of an uninterrupted one byte for byte, on the same machine with the same number of threads.

    A library error of a method on one item is recorded, counted and shown; so is any other exception, as a fault of
    the method, with a warning at the end.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        tasks: names of tasks; :func:`flowgraph.evaluation_tasks` lists them.
        methods: names of methods and presets (``"preset:all"``, ``"preset:trivial"``);
            :func:`flowgraph.evaluation_methods` lists the methods.
        items: number of items of each task and split; a task may have fewer.
        split: ``"dev"`` for choosing, ``"test"`` to be read once for what was chosen, or ``"both"``.
        seed: of items, of methods that draw, of bootstrap and sign flips.
        out: folder for records, tables and page; a new one, or that of an earlier run with the same model and seed.
        progress: called after every step.

    Returns:
        Records, summaries and the table.

    Raises:
        InvalidInputError: an unknown or repeated name, an argument outside its range, methods that give nothing that
            a task reads, items that break the rules of :class:`flowgraph.EvaluationItem`, a folder of another run.
        CaptureError: the architecture cannot be traced correctly.
        OutputError: the folder cannot be written; everything finished so far stays.

    Warns:
        UserWarning: a method or task raised an exception that is not the library's.

    Cost: for each item and task: one trace, the task's interventions, and every method once.
    """
    chosen_tasks, chosen_methods = check_request(tasks, methods, items, split, seed)
    # All items are made before the first is run, so that a fault of a source is found at once.
    splits = SPLITS if split == "both" else (split,)
    places: list[ItemPlace] = []
    for task in chosen_tasks:
        for name in splits:
            places += _places(task, name, items, seed)

    # What decides a result, apart from the items and methods, which records name themselves.
    settings = {**fingerprint(model, tokenizer), "seed": seed}
    with _opened(out, settings) as folder:
        run = _Run(model, tokenizer, chosen_methods, seed, folder, progress)
        records = run.records(places)
        run.report("computing the tables")
        evaluation = _compared(chosen_tasks, splits, chosen_methods, records, settings, seed, out)
        if evaluation.out is not None:
            evaluation.write_tables(evaluation.out)
            write_evaluation_page(evaluation.out / "index.html", page_payload(evaluation))

    # A fault of a method does not stop a run of hours, but it must not pass unseen.
    if evaluation.unexpected:
        errors = "; ".join(f"{error} ({number})" for error, number in evaluation.unexpected.items())
        warnings.warn(
            f"methods: must raise the library's errors only, got {errors[:600]}; these items have no score: correct "
            "the method and run again",
            stacklevel=2,
        )
    return evaluation


def check_request(
    tasks: str | Sequence[str], methods: str | Sequence[str], items: int, split: str, seed: int
) -> tuple[list[EvaluationTask], list[EvaluationMethod]]:
    """Check the arguments of :func:`evaluate`, without a model.

    Returns:
        The tasks and the methods.

    Raises:
        InvalidInputError: an unknown or repeated name, an argument outside its range, methods that give nothing that
            a task reads.
    """
    # Presets become names before the methods are looked up.
    chosen_tasks = [find_task(name) for name in _names("tasks", tasks)]
    chosen_methods = [find_method(name) for name in expand_methods(_names("methods", methods))]
    for name, value, lowest, highest in (("items", items, 1, _MAX_ITEMS), ("seed", seed, 0, _MAX_SEED)):
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise InvalidInputError(
                f"{name}: must be an integer from {lowest:,} to {highest:,}, got {value!r:.80}; omit it for the default"
            )
    if split not in (*SPLITS, "both"):
        raise InvalidInputError(
            f"split: must be 'dev', 'test' or 'both', got {split!r}; choose on dev, then read test once"
        )
    for task in chosen_tasks:
        _require_method(task, chosen_methods)
    return chosen_tasks, chosen_methods


class _Run:
    """One run over the items: what is known already, and the counts for the progress.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        methods: the methods.
        seed: of everything random.
        folder: where records are written, and earlier ones found; None: nowhere.
        progress: called after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        methods: Sequence[EvaluationMethod],
        seed: int,
        folder: EvaluationFolder | None,
        progress: Callable[[EvaluationProgress], None] | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.methods = methods
        self.seed = seed
        self.folder = folder
        self._progress = progress
        # Counts, reported after every step.
        self.done = 0
        self.total = 0
        self.now = 0
        self.left = 0
        self.began = time.perf_counter()

    def records(self, places: Sequence[ItemPlace]) -> list[dict[str, Any]]:
        """Return the record of every item; compute what is missing.

        Raises:
            InvalidInputError: an item that differs from the one of its record.
        """
        # What is known already decides how much is left, before anything is computed.
        earlier: list[dict[str, Any] | None] = []
        missing: list[list[EvaluationMethod]] = []
        for place in places:
            record = self._earlier(place)
            earlier.append(record)
            missing.append(missing_methods(record, self._applicable(place)))
        self.total = len(places)
        self.left = sum(map(bool, missing))
        self.done = self.total - self.left
        self.began = time.perf_counter()

        # Each record is written as soon as its item is finished: a kill loses one item at most.
        records = []
        for place, record, methods in zip(places, earlier, missing, strict=True):
            if record is None or methods:
                self.report(f"{place.task.name}: {place.item.id}")
                record = compute_record(self.model, self.tokenizer, place, methods, record, self.seed)
                if self.folder is not None:
                    self.folder.finish(place.task.name, place.split, place.item.id, record)
                self.now += 1
                self.done += 1
                self.left -= 1
                self._report_problem(place, record)
            records.append(record)
        return records

    def report(self, stage: str) -> None:
        """Report the state of the run."""
        if self._progress is None:
            return
        seconds = time.perf_counter() - self.began
        self._progress(EvaluationProgress(stage, self.done, self.total, self.now, self.left, seconds))

    def _report_problem(self, place: ItemPlace, record: dict[str, Any]) -> None:
        """Report an item that decides nothing, with the reason."""
        name = f"{place.task.name}: {place.item.id}"
        if record["error"] is not None:
            self.report(f"{name} skipped: {record['error']['message']}")
        elif record["unusable"] is not None:
            self.report(f"{name} skipped: {record['unusable']}")

    def _applicable(self, place: ItemPlace) -> list[EvaluationMethod]:
        """List the methods that give what the task reads."""
        return [method for method in self.methods if place.task.reads in method.gives]

    def _earlier(self, place: ItemPlace) -> dict[str, Any] | None:
        """Return the record of an earlier run."""
        if self.folder is None:
            return None
        record = self.folder.record(place.task.name, place.split, place.item.id)
        # Anything but a record of this version is computed again.
        if record is None or record.get("schema") != SCHEMA:
            return None
        if record.get("digest") != place.digest:
            raise InvalidInputError(
                f"out: must hold records of the same items, got another text or data for item {place.item.id!r} of "
                f"task {place.task.name!r} in {self.folder.out}; the task or its file has changed: choose another "
                "folder"
            )
        return record


def _names(argument: str, given: str | Sequence[str]) -> list[str]:
    """Return names as a list.

    Raises:
        InvalidInputError: none, something that is not a text, or a name twice.
    """
    names = [given] if isinstance(given, str) else list(given)
    example = "'preset:all'" if argument == "methods" else "one of flowgraph.evaluation_tasks()"
    if not names:
        raise InvalidInputError(f"{argument}: must name at least one, got none; e.g. {example}")
    for name in names:
        if not isinstance(name, str):
            raise InvalidInputError(
                f"{argument}: must be names, got {type(name).__name__}; register a function and pass its name"
            )
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise InvalidInputError(f"{argument}: must name each once, got {repeated[0]!r} twice; leave one out")
    return names


def _require_method(task: EvaluationTask, methods: Sequence[EvaluationMethod]) -> None:
    """Check that at least one of the methods gives what a task reads."""
    if any(task.reads in method.gives for method in methods):
        return
    described = [f"{method.name} ({', '.join(method.gives)})" for method in methods]
    given = ", ".join(described)
    raise InvalidInputError(
        f"methods: must give {task.reads}, which task {task.name!r} reads, got {given}; add a method that gives "
        f"{task.reads}, or leave the task out"
    )


def _places(task: EvaluationTask, split: str, number: int, seed: int) -> list[ItemPlace]:
    """Make the items of one task and split, and check them.

    Raises:
        InvalidInputError: no items, or ones that break the rules.
    """
    try:
        with seeded(seed, task.name, split):
            items = list(task.items(split, number, seed))[:number]
    except FlowgraphError:
        raise
    except Exception as error:
        # A registered source is foreign code: its error gets the name of the task.
        raise InvalidInputError(
            f"tasks: the items of {task.name!r} must be made without an error, got {type(error).__name__}: {error}; "
            "correct its source"
        ) from error
    if not items:
        raise InvalidInputError(
            f"tasks: must have items in every split that is run, got none of {task.name!r} in {split!r}; choose "
            "another split or task"
        )
    # An id names a file.
    seen = set()
    for item in items:
        if not isinstance(item, EvaluationItem):
            raise InvalidInputError(
                f"items: must be EvaluationItem, got {type(item).__name__} from task {task.name!r}; correct its source"
            )
        if not isinstance(item.id, str) or _ID.fullmatch(item.id) is None:
            raise InvalidInputError(
                f"items: an id must be 1 to 100 letters, digits, '-' and '_', as it names a file, got {item.id!r:.120} "
                f"from task {task.name!r}; correct its source"
            )
        # Some file systems do not tell apart letters by case.
        if item.id.lower() in seen:
            raise InvalidInputError(
                f"items: an id must be unique within its task and split, upper and lower case being equal, got "
                f"{item.id!r} twice from task {task.name!r}; correct its source"
            )
        seen.add(item.id.lower())
    return [ItemPlace.of(task, split, item) for item in items]


@contextmanager
def _opened(out: PathLike | None, settings: dict[str, Any]) -> Iterator[EvaluationFolder | None]:
    """Open and lock the folder of the run; None where nothing is written."""
    if out is None:
        yield None
        return
    # Two runs must not write one folder at once.
    with claimed(Path(out)):
        yield EvaluationFolder(Path(out), settings)


def _compared(
    tasks: Sequence[EvaluationTask],
    splits: Sequence[str],
    methods: Sequence[EvaluationMethod],
    records: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    seed: int,
    out: PathLike | None,
) -> Evaluation:
    """Compute the tables of all tasks and splits."""
    summaries = []
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for split in splits:
            chosen = [record for record in records if record["task"] == task.name and record["split"] == split]
            summary, own_rows = task_table(task, split, chosen, methods, seed)
            summaries.append(summary)
            rows += own_rows
    return Evaluation(
        settings=settings,
        methods=tuple(method.name for method in methods),
        summaries=tuple(summaries),
        rows=tuple(rows),
        items=tuple(records),
        out=None if out is None else Path(out),
    )
