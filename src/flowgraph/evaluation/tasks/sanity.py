"""Sanity checks: an explanation must change with the weights of the model, with the answer, and with the question.

Scores that are drawn anew for each text change with everything, so a random control passes. A check decides only
against a method, and its table compares with no control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from flowgraph.errors import InvalidInputError
from flowgraph.evaluation import metrics
from flowgraph.evaluation.changed_subject import changed_subject
from flowgraph.evaluation.randomized_model import randomized_copy
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import Metric, evaluation_task
from flowgraph.evaluation.subject import Subject
from flowgraph.evaluation.tasks.texts import LICENCE, reasoned_items
from flowgraph.text.sentences import has_alphanumeric

_MIN_TOKENS = 10
_SEED = 0
"""Seed of the random weights, the same for every item and method."""

_ABSOLUTE = Metric(
    "abs_spearman",
    "absolute rank correlation of the scores before and after",
    higher_is_better=False,
)
_SIGNED = Metric("spearman", "rank correlation of the scores before and after", higher_is_better=False)
_VARIATION = Metric(
    "total_variation", "distance, 0 to 1, of the positive scores over the reasoning as shares, before and after"
)


class ChangedExplanation:
    """The truth of a sanity check: how far an explanation changes with a condition.

    Attributes:
        other_subject: the subject under the changed condition; None where the item is unusable.
        compared: ``[tokens]``, mask of the tokens whose scores are compared.
        kind: what was changed, for the record.
    """

    def __init__(
        self,
        other_subject: Subject | None,
        compared: Bool[Tensor, " tokens"],
        kind: str,
        reason: str | None = None,
    ) -> None:
        """Note why the item is unusable: ``reason``, or too few tokens to compare."""
        self.other_subject = other_subject
        self.compared = compared
        self.kind = kind
        # A reason of the task comes first: without another subject the number of tokens means nothing.
        num_tokens = int(compared.sum())
        if reason is None and num_tokens < _MIN_TOKENS:
            reason = f"{num_tokens} tokens to compare, fewer than the {_MIN_TOKENS} that a ranking needs"
        self.unusable: str | None = reason

    def score(self, explanation: Explanation) -> NoReturn:
        """Raise an error: one explanation is not enough.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"truth: must compare the explanations of two subjects for {self.kind}, got one; call "
            "flowgraph.evaluation.scoring.score_of"
        )

    def score_pair(self, explanation: Explanation, other: Explanation) -> Mapping[str, float]:
        """Compare both explanations over the compared tokens."""
        units = self._units()
        before = explanation.of_units(units).double().cpu().numpy()
        after = other.of_units(units).double().cpu().numpy()
        correlation = metrics.rank_correlation(before, after)
        return {
            _ABSOLUTE.name: abs(correlation),
            _SIGNED.name: correlation,
            _VARIATION.name: _total_variation(before, after),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "units": self._units(),
            "unusable": self.unusable,
        }

    def _units(self) -> list[list[int]]:
        """List the compared tokens as units of one token each."""
        positions = torch.nonzero(self.compared).flatten()
        return [[position] for position in positions.tolist()]


def _total_variation(before: Float64[np.ndarray, " tokens"], after: Float64[np.ndarray, " tokens"]) -> float:
    """Compute the distance of two score vectors as distributions; NaN where one has no positive score."""
    # Negative scores argue against the answer and hold no share.
    first = np.maximum(before, 0)
    second = np.maximum(after, 0)
    first_total = first.sum()
    second_total = second.sum()
    if first_total <= 0 or second_total <= 0:
        return float("nan")
    differences = np.abs(first / first_total - second / second_total)
    return float(differences.sum() / 2)


# Random weights ---------------------------------------------------------------------------------------------------

_RANDOMIZED: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def _randomized(model: nn.Module) -> nn.Module:
    """Return the copy of a model with the weights of all layers in random order; one copy for all items and methods."""
    if model not in _RANDOMIZED:
        _RANDOMIZED[model] = randomized_copy(model, seed=_SEED)
    return _RANDOMIZED[model]


@evaluation_task(
    "parameter_randomization",
    items=reasoned_items,
    metrics=(_ABSOLUTE, _SIGNED, _VARIATION),
    shows="the scores depend on what the model learned (low is good)",
    cannot_show="whether the scores are right: random scores pass; only a high correlation decides, against the method",
    licence=LICENCE,
    paired=True,
    compares=False,
)
def parameter_randomization(subject: Subject) -> ChangedExplanation:
    """Put the weights of all layers in random order; compare the scores of question and reasoning before and after."""
    compared = subject.question | subject.reasoning
    if int(compared.sum()) < _MIN_TOKENS:
        return ChangedExplanation(None, compared, "random weights")
    other = changed_subject(subject, model=_randomized(subject.model))
    return ChangedExplanation(other, compared, "random weights")


# Another answer ---------------------------------------------------------------------------------------------------


@evaluation_task(
    "target_randomization",
    items=reasoned_items,
    metrics=(_ABSOLUTE, _SIGNED, _VARIATION),
    shows="the scores are about this answer, not about the text (low is good)",
    cannot_show="whether the scores are right: random scores pass, and two answers may rest on the same words",
    licence=LICENCE,
    paired=True,
    compares=False,
)
def target_randomization(subject: Subject) -> ChangedExplanation:
    """Explain a word in the middle of the reasoning instead of the answer; compare the tokens before that word."""
    other_answer = _other_answer(subject)
    position = torch.arange(subject.num_tokens)
    if other_answer is None:
        nothing = torch.zeros(subject.num_tokens, dtype=torch.bool)
        return ChangedExplanation(None, nothing, "another answer", "no word in the second half of the reasoning")
    # No token after the other answer can act on it.
    first = int(other_answer.nonzero()[0])
    compared = (subject.question | subject.reasoning) & (position < first)
    other = changed_subject(subject, answer=other_answer)
    return ChangedExplanation(other, compared, "another answer")


def _other_answer(subject: Subject) -> Bool[Tensor, " tokens"] | None:
    """Choose the first word in the second half of the reasoning, with as many tokens as the answer if possible."""
    # In the second half, so that question and part of the reasoning lie before it.
    reasoning = subject.positions(subject.reasoning)
    second_half = reasoning[len(reasoning) // 2 :]
    words = [place for place in second_half if has_alphanumeric(subject.base.tokens[place])]
    if not words:
        return None

    # As many tokens as the answer from there on, as far as the reasoning reaches.
    size = int(subject.answer.sum())
    first = words[0]
    chosen = [place for place in reasoning if first <= place < first + size]
    mask = torch.zeros(subject.num_tokens, dtype=torch.bool)
    mask[chosen] = True
    return mask


# Another question -------------------------------------------------------------------------------------------------


@evaluation_task(
    "question_specificity",
    items=reasoned_items,
    metrics=(_VARIATION, _SIGNED, _ABSOLUTE),
    shows="how far the scores of the reasoning depend on which text counts as the question",
    cannot_show="a merit: a method that never reads the question's place has 0 by construction, and an answer may rest "
    "on one place alone; it is a description",
    licence=LICENCE,
    paired=True,
    compares=False,
)
def question_specificity(subject: Subject) -> ChangedExplanation:
    """Take the text before the question, or else its first half, as the question; compare the reasoning's scores."""
    question = subject.positions(subject.question)
    # The first token is a sink of attention: it holds no text of its own.
    places = range(1, question[0])
    chosen = [place for place in places if has_alphanumeric(subject.base.tokens[place])]
    kind = "the text before the question"
    if not chosen:
        chosen = question[: len(question) // 2]
        kind = "the first half of the question"
    if not chosen:
        return ChangedExplanation(None, subject.reasoning, kind, "a question of one token with no text before it")

    position = torch.arange(subject.num_tokens)
    other_question = torch.isin(position, torch.tensor(chosen))
    other = changed_subject(subject, question=other_question)
    return ChangedExplanation(other, subject.reasoning.clone(), kind)
