"""Find tasks and methods by name: those of this package and those that users registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

# Importing these packages registers what they hold.
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation import methods as _methods
from flowgraph.evaluation import tasks as _tasks
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask, registered_methods, registered_tasks
from flowgraph.evaluation.tasks.perturbation import METRICS as PERTURBATION_METRICS
from flowgraph.evaluation.tasks.perturbation import perturbation_task

__all__ = ["evaluation_methods", "evaluation_tasks", "find_method", "find_task"]

_BUILTIN = (_methods, _tasks)

# Tasks that are made on demand: what stands before the colon, to a function of what stands after it.
_FAMILIES: dict[str, Callable[[str], EvaluationTask]] = {
    kind: partial(perturbation_task, kind) for kind in PERTURBATION_METRICS
}


def evaluation_tasks() -> list[str]:
    """List the names of all registered tasks."""
    return sorted(registered_tasks())


def evaluation_methods() -> list[str]:
    """List the names of all registered methods."""
    return sorted(registered_methods())


def find_task(name: str) -> EvaluationTask:
    """Return a registered task, or one that is made for what stands after the colon.

    ``deletion:remove`` is a perturbation task in which tokens are removed instead of masked.

    Raises:
        InvalidInputError: no task of this name, or nothing of what stands after the colon.
    """
    known = registered_tasks()
    family, colon, detail = name.partition(":")
    if name not in known and colon and family in _FAMILIES:
        return _FAMILIES[family](detail)
    if name not in known:
        raise InvalidInputError(
            f"tasks: must be of {', '.join(sorted(known)) or 'none'}, got {name!r}; register your own with "
            "flowgraph.evaluation_task"
        )
    return known[name]


def find_method(name: str) -> EvaluationMethod:
    """Return a registered method.

    Raises:
        InvalidInputError: no method of this name.
    """
    known = registered_methods()
    if name not in known:
        raise InvalidInputError(
            f"methods: must be of {', '.join(sorted(known)) or 'none'}, got {name!r}; register your own with "
            "flowgraph.evaluation_method"
        )
    return known[name]
