"""Make tasks by name; packages that a task needs are imported when it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import TaskError
from rl.tasks.tables import DATASET_PREFIX, is_dataset, is_table

if TYPE_CHECKING:
    from rl.tasks.base import Task

OWN_NAMES = ("chain", "pathsearch", "program", "wandering")
"""The package's own tasks, whose decisive tokens and detours are known."""

GYM_NAMES = ("chain_sum", "countdown", "gsm_symbolic")
"""Datasets of reasoning-gym that have a short name."""

_GYM_PREFIX = "reasoning_gym:"
_TASK_MEMBERS = ("name", "size", "sample", "find_answer", "reward", "oracle")


def task_names() -> list[str]:
    """List the names that :func:`make_task` accepts; each of the last four is a pattern for many.

    Example:
        >>> task_names()[:7]
        ['chain', 'chain_sum', 'countdown', 'gsm_symbolic', 'pathsearch', 'program', 'wandering']
        >>> task_names()[7:]
        ['reasoning_gym:<dataset>', 'datasets:<name>', '<path>.parquet', '<path>.jsonl']
    """
    patterns = [f"{_GYM_PREFIX}<dataset>", f"{DATASET_PREFIX}<name>", "<path>.parquet", "<path>.jsonl"]
    return [*sorted(OWN_NAMES + GYM_NAMES), *patterns]


def make_task(task: Any, **options: Any) -> Task:
    """Make the task of this name.

    Args:
        task: one of the package's own, ``"chain"`` (:class:`rl.tasks.chain.Chain`), ``"pathsearch"``
            (:class:`rl.tasks.path_search.PathSearch`), ``"program"`` (:class:`rl.tasks.program.Program`) or
            ``"wandering"`` (:class:`rl.tasks.wandering.Wandering`);
            ``"countdown"``, ``"gsm_symbolic"``, ``"chain_sum"`` or ``"reasoning_gym:<dataset>"``
            (:class:`rl.tasks.procedural.Procedural`); a path that ends in ``.jsonl`` or ``.parquet``, a folder of
            ``Dataset.save_to_disk``, or ``"datasets:NAME"`` for a dataset of the library datasets, or such a dataset
            itself (:class:`rl.tasks.jsonl.JsonlTask`); or a task, which is returned as it is.
        **options: the keyword arguments of that class.

    Raises:
        TaskError: an unknown task, or options that it does not take.
        MissingExtraError: a package that the task needs is not installed.

    Example:
        >>> make_task("countdown", min_numbers=3, max_numbers=3).name
        'reasoning_gym:countdown'
    """
    if is_dataset(task):
        from rl.tasks.jsonl import JsonlTask

        return _construct(JsonlTask, "dataset", {"path": task, **options})
    if isinstance(task, Path):
        task = str(task)
    if not isinstance(task, str):
        return _checked_task(task, options)
    if task in OWN_NAMES:
        return _construct(_own_task(task), task, options)
    if task in GYM_NAMES or task.startswith(_GYM_PREFIX):
        from rl.tasks.procedural import Procedural

        return _construct(Procedural, task, {"dataset": task.removeprefix(_GYM_PREFIX), **options})
    if task.endswith(".jsonl") or is_table(task):
        from rl.tasks.jsonl import JsonlTask

        return _construct(JsonlTask, task, {"path": task, **options})
    raise TaskError(
        f"task: must be one of {', '.join(task_names())}, got {task!r}; datasets of reasoning-gym without a short name "
        "take its name as a prefix"
    )


def _own_task(name: str) -> Callable[..., Any]:
    """Return the class of one of the package's own tasks."""
    if name == "chain":
        from rl.tasks.chain import Chain

        return Chain
    if name == "pathsearch":
        from rl.tasks.path_search import PathSearch

        return PathSearch
    if name == "program":
        from rl.tasks.program import Program

        return Program
    from rl.tasks.wandering import Wandering

    return Wandering


def _checked_task(task: Any, options: dict[str, Any]) -> Task:
    """Return a task object of the caller; a missing method or an option is an error."""
    from rl.tasks.base import Task

    if not isinstance(task, Task):
        missing = [name for name in _TASK_MEMBERS if not hasattr(task, name)]
        raise TaskError(
            f"task: must be a name or have the methods of rl.tasks.base.Task, got a {type(task).__name__} without "
            f"{', '.join(missing)}; names are {', '.join(task_names())}"
        )
    if options:
        raise TaskError(
            f"options: must be left out beside a task that exists already, got {', '.join(options)}; "
            "give them to its constructor"
        )
    return task


def _construct(kind: Callable[..., Any], task: str, options: dict[str, Any]) -> Task:
    """Construct a task; an option that its class does not take is an error that lists the known ones."""
    signature = inspect.signature(kind)
    # Binding first tells a wrong option apart from a TypeError inside the constructor.
    try:
        signature.bind(**options)
    except TypeError as error:
        # The first two come from the name of the task, the third is the name of ``**options`` itself.
        known = [name for name in signature.parameters if name not in ("path", "dataset", "options")]
        raise TaskError(
            f"options: must be arguments of the task {task!r}, got {', '.join(options)} ({error}); "
            f"it takes {', '.join(known)}"
        ) from error
    return kind(**options)
