"""Tasks by name. Nothing heavy is imported before a task is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rl.errors import TaskError

if TYPE_CHECKING:
    from rl.tasks.base import Task

GYM_NAMES = ("chain_sum", "countdown", "gsm_symbolic")
"""Datasets of reasoning-gym that have a short name."""

_PREFIX = "reasoning_gym:"


def task_names() -> list[str]:
    """Names that :func:`make_task` knows; the last two stand for many.

    Example:
        >>> task_names()
        ['chain', 'chain_sum', 'countdown', 'gsm_symbolic', 'reasoning_gym:<dataset>', '<path>.jsonl']
    """
    return ["chain", *GYM_NAMES, f"{_PREFIX}<dataset>", "<path>.jsonl"]


def make_task(task: str | Task, **options: Any) -> Task:
    """The task of this name.

    Args:
        task: ``"chain"`` (:class:`rl.tasks.chain.Chain`); ``"countdown"``, ``"gsm_symbolic"``, ``"chain_sum"`` or
            ``"reasoning_gym:<dataset>"`` (:class:`rl.tasks.procedural.Procedural`); a path that ends in ``.jsonl``
            (:class:`rl.tasks.jsonl.JsonlTask`); or a task, which is returned as it is.
        **options: the keyword arguments of that class.

    Raises:
        TaskError: no such task, or options that it does not take.
        MissingExtraError: its package is not installed.

    Example:
        >>> make_task("countdown", min_numbers=3, max_numbers=3).name
        'reasoning_gym:countdown'
    """
    if not isinstance(task, str):
        return _own_task(task, options)
    if task == "chain":
        from rl.tasks.chain import Chain

        return _built(Chain, task, options)
    if task in GYM_NAMES or task.startswith(_PREFIX):
        from rl.tasks.procedural import Procedural

        return _built(Procedural, task, {"dataset": task.removeprefix(_PREFIX), **options})
    if task.endswith(".jsonl"):
        from rl.tasks.jsonl import JsonlTask

        return _built(JsonlTask, task, {"path": task, **options})
    raise TaskError(
        f"task: must be one of {', '.join(task_names())}, got {task!r}; datasets of reasoning-gym without a short name "
        "take its name as a prefix"
    )


def _own_task(task: Any, options: dict[str, Any]) -> Task:
    from rl.tasks.base import Task

    if not isinstance(task, Task):
        missing = [
            name for name in ("name", "size", "sample", "find_answer", "reward", "oracle") if not hasattr(task, name)
        ]
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


def _built(kind: Callable[..., Any], task: str, options: dict[str, Any]) -> Task:
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        known = [name for name in inspect.signature(kind).parameters if name not in ("path", "dataset", "options")]
        raise TaskError(
            f"options: must be arguments of the task {task!r}, got {', '.join(options)} ({error}); "
            f"it takes {', '.join(known)}"
        ) from error
    return kind(**options)
