"""Find tasks and methods by name: those of this package and those that users registered."""

from __future__ import annotations

from collections.abc import Sequence

# Importing these packages registers what they hold.
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation import methods as _methods
from flowgraph.evaluation import tasks as _tasks
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask, registered_methods, registered_tasks

__all__ = ["evaluation_methods", "evaluation_tasks", "expand_methods", "find_method", "find_task", "method_presets"]

_BUILTIN = (_methods, _tasks)


def evaluation_tasks() -> list[str]:
    """List the names of all registered tasks."""
    return sorted(registered_tasks())


def evaluation_methods() -> list[str]:
    """List the names of all registered methods."""
    return sorted(registered_methods())


def find_task(name: str) -> EvaluationTask:
    """Return a registered task.

    Raises:
        InvalidInputError: no task of this name.
    """
    known = registered_tasks()
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


def method_presets() -> dict[str, tuple[str, ...]]:
    """Return the methods of each preset. ``all``: every registered method; ``trivial``: the controls."""
    names = evaluation_methods()
    return {
        "all": tuple(names),
        "trivial": tuple(name for name in names if find_method(name).trivial),
    }


def expand_methods(names: Sequence[str]) -> list[str]:
    """Replace every ``preset:NAME`` by its methods; each method is listed once, where it stands first.

    Args:
        names: names of methods and presets.

    Raises:
        InvalidInputError: no preset of this name.
    """
    presets = method_presets()
    expanded: list[str] = []
    for name in names:
        if not name.startswith("preset:"):
            expanded.append(name)
            continue
        preset = name.removeprefix("preset:")
        if preset not in presets:
            raise InvalidInputError(
                f"methods: a preset must be one of {', '.join(presets)}, got {name!r}; 'preset:all' is every method"
            )
        expanded.extend(presets[preset])
    return list(dict.fromkeys(expanded))
