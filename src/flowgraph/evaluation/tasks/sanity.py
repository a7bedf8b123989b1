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
"""Of the random weights: every item and method meets the same random model."""

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
        num_tokens = int(compared.sum())
        if reason is None and num_tokens < _MIN_TOKENS:
            reason = f"{num_tokens} tokens to compare, fewer than the {_MIN_TOKENS} that a ranking needs"
        self.unusable: str | None = reason

    def score(self, explanation: Explanation) -> NoReturn:
        """Refuse one explanation.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"truth: must compare the explanations of two subjects for {self.kind}, got one; call "
            "flowgraph.evaluation.scoring.score_of"
        )

    def score_pair(self, explanation: Explanation, other: Explanation) -> Mapping[str, float]:
        """Compare both explanations over the compared tokens."""
        units = [[position] for position in torch.nonzero(self.compared).flatten().tolist()]
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
            "units": [[position] for position in torch.nonzero(self.compared).flatten().tolist()],
            "unusable": self.unusable,
        }


def _total_variation(before: Float64[np.ndarray, " tokens"], after: Float64[np.ndarray, " tokens"]) -> float:
    """Compute the distance of two score vectors as distributions; NaN where one has no positive score."""
    # Negative scores argue against the answer and hold no share.
    first = np.maximum(before, 0)
    second = np.maximum(after, 0)
    if first.sum() <= 0 or second.sum() <= 0:
        return float("nan")
    return float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)


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
    reasoning = subject.positions(subject.reasoning)
    size = int(subject.answer.sum())
    # In the second half, so that question and part of the reasoning lie before it.
    words = [place for place in reasoning[len(reasoning) // 2 :] if has_alphanumeric(subject.base.tokens[place])]
    if not words:
        return None
    chosen = [place for place in reasoning if words[0] <= place < words[0] + size]
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
    position = torch.arange(subject.num_tokens)
    # The first token is a sink of attention: it holds no text of its own.
    places = range(1, question[0])
    before = [place for place in places if has_alphanumeric(subject.base.tokens[place])]
    chosen = before or question[: len(question) // 2]
    kind = "the text before the question" if before else "the first half of the question"
    if not chosen:
        return ChangedExplanation(None, subject.reasoning, kind, "a question of one token with no text before it")
    other = changed_subject(subject, question=torch.isin(position, torch.tensor(chosen)))
    return ChangedExplanation(other, subject.reasoning.clone(), kind)
