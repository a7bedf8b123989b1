"""Tasks that are made when they are asked for: ``deletion:remove``, ``parc:PATH``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowgraph.evaluation.registry import EvaluationTask
from flowgraph.evaluation.tasks.gold_files import FORMATS, file_task
from flowgraph.evaluation.tasks.perturbation import METRICS, perturbation_task

_FAMILIES: dict[str, Callable[[str], EvaluationTask]] = {
    **{kind: partial(perturbation_task, kind) for kind in METRICS},
    **{name: partial(file_task, name) for name in FORMATS},
}
"""The part of a name before the colon, to a function of the part after it."""


def task_on_demand(name: str) -> EvaluationTask | None:
    """Make the task of a name such as ``parc:PATH``; None for a name without a colon, or of another family.

    Args:
        name: family, colon and detail.

    Raises:
        InvalidInputError: the family has no such task: another perturbation, or a file that is not of the format.
    """
    family, colon, detail = name.partition(":")
    if not colon or family not in _FAMILIES:
        return None
    return _FAMILIES[family](detail)
