"""Find tasks and methods by name: those of this package and those that users registered."""

from __future__ import annotations

from collections.abc import Sequence

# Importing these packages registers what they hold.
from flowgraph.capacities.registry import capacity_names
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation import methods as _methods
from flowgraph.evaluation import tasks as _tasks
from flowgraph.evaluation.methods import names as _names
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask, registered_methods, registered_tasks

__all__ = ["evaluation_methods", "evaluation_tasks", "expand_methods", "find_method", "find_task"]

_BUILTIN = (_methods, _tasks)


def evaluation_tasks() -> list[str]:
    """List the names of all registered tasks."""
    return sorted(registered_tasks())


def evaluation_methods() -> list[str]:
    """List the names of all registered methods."""
    return sorted(registered_methods())


def find_task(name: str) -> EvaluationTask:
    """Return a registered task, or one that is made from the part of its name after the colon.

    ``deletion:remove`` removes tokens instead of masking them; ``parc:PATH``, ``prontoqa:PATH`` and
    ``processbench:PATH`` read a file.

    Raises:
        InvalidInputError: no task of this name, or a file that is not of the format.
    """
    made = _tasks.task_on_demand(name)
    if made is not None:
        return made
    known = registered_tasks()
    if name not in known:
        raise InvalidInputError(
            f"tasks: must be of {', '.join(sorted(known)) or 'none'}, or one made on demand such as 'deletion:remove' "
            f"or 'parc:PATH', got {name!r}; register your own with flowgraph.evaluation_task"
        )
    return known[name]


def find_method(name: str) -> EvaluationMethod:
    """Return a method by its name: a registered one, or one that is made from a capacity and a composition.

    Args:
        name: one of :func:`evaluation_methods`, ``CAPACITY[:SCORE]`` (``"vtrace_share:h"``, ``"sharp:cage"``),
            ``text_only:SCORE``, ``matched:METHOD`` or ``matched_length:METHOD``; see docs/methods.md.

    Raises:
        InvalidInputError: no method of this name, or a preset.
    """
    found = _names.find_evaluation_method(name)
    if found is None:
        raise InvalidInputError(
            f"methods: must be of {', '.join(evaluation_methods())}, a capacity ({', '.join(capacity_names())}) with "
            f"or without a composition (such as 'vtrace_share:cage'), or preset:NAME, got {name!r}; register your own "
            "with flowgraph.evaluation_method"
        )
    return found


def expand_methods(names: Sequence[str]) -> list[str]:
    """Replace every ``preset:NAME`` in a list of methods by its methods; each is listed once, at its first place.

    Raises:
        InvalidInputError: no preset of this name.
    """
    return _names.expand_methods(names)
