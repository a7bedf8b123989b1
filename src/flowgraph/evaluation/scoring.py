"""Run a method on a subject and compare its explanation with the truth of a task."""

from __future__ import annotations

from collections.abc import Mapping

from flowgraph.evaluation.records import Explanation, PairedTruth, Truth
from flowgraph.evaluation.registry import EvaluationMethod
from flowgraph.evaluation.subject import Subject

__all__ = ["score_of"]


def score_of(
    truth: Truth,
    method: EvaluationMethod,
    subject: Subject,
    *,
    explanation: Explanation | None = None,
) -> tuple[Explanation, Mapping[str, float]]:
    """Explain a subject by a method, and compute the metrics of a task for it.

    A paired truth makes the method run on the truth's other subject as well.

    Args:
        truth: what the task's function returned for this subject.
        method: the method.
        subject: the subject.
        explanation: the method's explanation of this subject, where it is known already.

    Returns:
        The explanation of the subject, and the value of each metric by name; NaN where one is undefined.

    Raises:
        InvalidInputError: the method returns scores of another shape, or not the part that the task reads.

    Cost: that of the method, twice for a paired truth, and that of the truth's comparison.
    """
    if explanation is None:
        explanation = method.explain(subject)
    if isinstance(truth, PairedTruth):
        other = method.explain(truth.other_subject)
        return explanation, truth.score_pair(explanation, other)
    return explanation, truth.score(explanation)
