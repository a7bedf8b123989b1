"""Perturbation tasks: mask or remove tokens in the order of an explanation, and measure the answer along the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64

from flowgraph.attention.modules import base_model
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation import metrics
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import EvaluationTask, Metric, evaluation_task, registered_tasks
from flowgraph.evaluation.subject import Subject
from flowgraph.evaluation.tasks.texts import LICENCE, reasoned_items
from flowgraph.interventions.answer_logprobs import answer_logprobs
from flowgraph.interventions.knockout import Intervention, attention_cut

Perturbation = Literal["mask", "remove"]
Kind = Literal["deletion", "insertion", "comprehensiveness", "sufficiency"]
PERTURBATIONS: tuple[Perturbation, ...] = ("mask", "remove")

NUM_STEPS = 10
"""Groups of tokens along a curve."""
_BATCH = 5
"""Runs in one forward pass."""
_MIN_TOKENS = 10
_SMALLEST_LOSS = 1e-4
"""Share of the answer's probability; a smaller loss is the rounding of float32."""

_RISE_DELETION = Metric(
    "rise_deletion",
    "area under the answer's probability, rescaled to 1..0, while the tokens of highest score are masked first",
    higher_is_better=False,
)
_MAS_DELETION = Metric(
    "mas_deletion",
    "the same area with a penalty where the curve departs from the magnitudes of the scores",
    higher_is_better=False,
)
_RISE_INSERTION = Metric(
    "rise_insertion",
    "area under the answer's probability, rescaled to 0..1, while the tokens of highest score are restored first",
)
_MAS_INSERTION = Metric(
    "mas_insertion", "the same area with a penalty where the curve departs from the magnitudes of the scores"
)
_COMPREHENSIVENESS = Metric(
    "comprehensiveness", "mean share of the answer's probability lost without the best 1, 5, 10, 20 and 50 % of tokens"
)
_SUFFICIENCY = Metric(
    "sufficiency",
    "mean share of the answer's probability lost with only the best 1, 5, 10, 20 and 50 % of tokens",
    higher_is_better=False,
)
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "deletion": (_RISE_DELETION, _MAS_DELETION),
    "insertion": (_RISE_INSERTION, _MAS_INSERTION),
    "comprehensiveness": (_COMPREHENSIVENESS,),
    "sufficiency": (_SUFFICIENCY,),
}
SHOWS = "the tokens of highest score are those that the answer's probability needs (or that are enough for it)"
CANNOT_SHOW = (
    "whether low ranks are in order; and a text with most tokens masked is unlike any that the model was trained on, "
    "so part of the loss is surprise"
)


class PerturbedAnswers:
    """The answer's probability with some tokens of question and reasoning masked or removed; measured once each.

    Attributes:
        candidates: positions of the tokens that may be perturbed: question and reasoning.
        perturbation: ``"mask"``: no later position may read the token; ``"remove"``: the token is not in the text.
        num_measured: runs of the model so far.
    """

    def __init__(self, subject: Subject, perturbation: Perturbation = "mask") -> None:
        """Start without measurements.

        Raises:
            InvalidInputError: another perturbation.
        """
        if perturbation not in PERTURBATIONS:
            raise InvalidInputError(
                f"perturbation: must be 'mask' or 'remove', got {perturbation!r}; 'mask' keeps every position in place"
            )
        self.perturbation: Perturbation = perturbation
        self.candidates = subject.positions(subject.question | subject.reasoning)
        self.num_measured = 0
        self._subject = subject
        self._known: dict[bytes, Float64[np.ndarray, " masks"]] = {}

    def ends(self) -> tuple[float, float]:
        """Measure the answer with all candidates and with none; once."""
        both = np.array([[True], [False]]).repeat(len(self.candidates), axis=1)
        full, empty = self._measured(both)
        return float(full), float(empty)

    def values(self, kept: Bool[np.ndarray, "masks candidates"]) -> Float64[np.ndarray, " masks"]:
        r"""Measure the answer for each mask of kept candidates.

        .. math:: v = \exp\!\left(\frac{1}{A} \sum_{a} \log p(a)\right)

        over the A tokens of the answer: the geometric mean of their probabilities, which does not shrink with A.

        Args:
            kept: True for candidates that are left in place.

        Cost: one run for each mask between the two ends, five runs a pass; none for masks that were measured before.
        """
        full, empty = self.ends()
        values = np.where(kept.all(axis=1), full, empty)
        is_between = ~kept.all(axis=1) & kept.any(axis=1)
        if is_between.any():
            values[is_between] = self._measured(kept[is_between])
        return values

    def _measured(self, kept: Bool[np.ndarray, "masks candidates"]) -> Float64[np.ndarray, " masks"]:
        """Measure masks, or return what was measured of exactly these masks before.

        The same masks are always measured in the same batches. So their values, rounding included, do not depend on
        the explanations before, and a run that is continued gives the same table as one that was not interrupted.
        """
        key = kept.tobytes()
        if key in self._known:
            return self._known[key]
        positions = np.asarray(self.candidates)
        perturbed = [positions[~mask].tolist() for mask in kept]
        measure = self._masked if self.perturbation == "mask" else self._removed
        values = np.array(measure(perturbed))
        self._known[key] = values
        self.num_measured += len(kept)
        return values

    def _masked(self, token_sets: Sequence[Sequence[int]]) -> list[float]:
        """Measure the answer with the attention to each set of tokens masked, several sets in a pass."""
        trace = self._subject.base
        inner = base_model(self._subject.model)
        # All runs read the same tokens, so the answer has the same positions in each.
        answer = trace.answer.cpu().nonzero().flatten()
        ids = trace.token_ids.cpu()[answer]
        values = []
        for first in range(0, len(token_sets), _BATCH):
            batch = token_sets[first : first + _BATCH]
            size = len(batch)
            interventions = [Intervention(tokens=tokens) for tokens in batch]
            with attention_cut(inner, trace, interventions):
                logprobs = answer_logprobs(inner, trace, answer, size)
            # The geometric mean of the probabilities of the answer's own tokens.
            wanted = ids[None, :, None].expand(size, -1, 1)
            of_answer = logprobs.gather(2, wanted)[..., 0]
            values += of_answer.mean(1).exp().tolist()
        return values

    def _removed(self, token_sets: Sequence[Sequence[int]]) -> list[float]:
        """Measure the answer in the text without each set of tokens; later tokens move up."""
        trace = self._subject.base
        inner = base_model(self._subject.model)
        values = []
        for tokens in token_sets:
            stays = torch.ones(trace.num_tokens, dtype=torch.bool)
            stays[list(tokens)] = False
            places = stays.nonzero().flatten()
            shortened = replace(
                trace,
                tokens=tuple(trace.tokens[place] for place in places.tolist()),
                token_ids=trace.token_ids.cpu()[places],
                spans=trace.spans.cpu()[places],
                generated=trace.generated.cpu()[places],
            )
            # The answer's positions and ids are those in the shorter text.
            answer = trace.answer.cpu()[places].nonzero().flatten()
            logprobs = answer_logprobs(inner, shortened, answer, 1)[0]
            wanted = shortened.token_ids[answer][:, None]
            of_answer = logprobs.gather(1, wanted)[:, 0]
            values.append(float(of_answer.mean().exp()))
        return values


def perturbed_answers(subject: Subject, perturbation: Perturbation = "mask") -> PerturbedAnswers:
    """Return the measurements of a subject, shared by all perturbation tasks."""
    return subject.once(f"perturbed answers {perturbation}", partial(PerturbedAnswers, subject, perturbation))


class PerturbationTruth:
    """The truth of a perturbation task: each explanation is scored by runs of the model in its own order.

    Attributes:
        kind: which figures.
        answers: the measurements.
        full: the answer's value with every token.
        empty: its value with every candidate masked or removed.
    """

    def __init__(self, kind: Kind, answers: PerturbedAnswers) -> None:
        """Measure both ends, unless there are too few tokens.

        Cost: two runs of the model.
        """
        self.kind: Kind = kind
        self.answers = answers
        self.full = math.nan
        self.empty = math.nan
        if len(answers.candidates) >= _MIN_TOKENS:
            self.full, self.empty = answers.ends()

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing."""
        num_tokens = len(self.answers.candidates)
        if num_tokens < _MIN_TOKENS:
            return f"{num_tokens} tokens of question and reasoning, fewer than the {_MIN_TOKENS} that a curve needs"
        if self.full - self.empty <= _SMALLEST_LOSS * self.full:
            return "all effects are 0 or below: the answer is as probable without question and reasoning"
        return None

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Run the model in the order of the explanation, at most nine times (five for shares)."""
        # Only the order among the candidates counts: the template is never perturbed.
        units = [[position] for position in self.answers.candidates]
        scores = explanation.of_units(units).double().cpu().numpy()
        if self.kind in ("deletion", "insertion"):
            return self._along_curve(scores)
        return self._at_shares(scores)

    def _along_curve(self, scores: Float64[np.ndarray, " tokens"]) -> dict[str, float]:
        """Measure ten groups of tokens."""
        if self.kind == "deletion":
            curve = metrics.deletion_curve(scores, self.answers.values, NUM_STEPS)
            return {
                _RISE_DELETION.name: metrics.rise(curve, "deletion"),
                _MAS_DELETION.name: metrics.mas(scores, curve, "deletion"),
            }
        curve = metrics.insertion_curve(scores, self.answers.values, NUM_STEPS)
        return {
            _RISE_INSERTION.name: metrics.rise(curve, "insertion"),
            _MAS_INSERTION.name: metrics.mas(scores, curve, "insertion"),
        }

    def _at_shares(self, scores: Float64[np.ndarray, " tokens"]) -> dict[str, float]:
        """Measure the five shares; values are relative to the full text, so that improbable answers count alike."""
        # Masks of the best tokens: kept for sufficiency, their complement for comprehensiveness.
        best = metrics.masks_at(scores)
        if self.kind == "comprehensiveness":
            values = self.answers.values(~best) / self.full
            return {_COMPREHENSIVENESS.name: metrics.comprehensiveness(1.0, values)}
        values = self.answers.values(best) / self.full
        return {_SUFFICIENCY.name: metrics.sufficiency(1.0, values)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "perturbation": self.answers.perturbation,
            "units": [[position] for position in self.answers.candidates],
            "full": None if math.isnan(self.full) else self.full,
            "empty": None if math.isnan(self.empty) else self.empty,
            "unusable": self.unusable,
        }


@evaluation_task(
    "deletion",
    items=reasoned_items,
    metrics=METRICS["deletion"],
    causal=True,
    shows=SHOWS,
    cannot_show=CANNOT_SHOW,
    licence=LICENCE,
)
def deletion(subject: Subject) -> PerturbationTruth:
    """Mask the attention to the tokens of highest score first, in ten groups, and measure the answer after each."""
    return PerturbationTruth("deletion", perturbed_answers(subject))


@evaluation_task(
    "insertion",
    items=reasoned_items,
    metrics=METRICS["insertion"],
    causal=True,
    shows=SHOWS,
    cannot_show=CANNOT_SHOW,
    licence=LICENCE,
)
def insertion(subject: Subject) -> PerturbationTruth:
    """Mask every token and restore those of highest score first, in ten groups."""
    return PerturbationTruth("insertion", perturbed_answers(subject))


@evaluation_task(
    "comprehensiveness",
    items=reasoned_items,
    metrics=METRICS["comprehensiveness"],
    causal=True,
    shows=SHOWS,
    cannot_show=CANNOT_SHOW,
    licence=LICENCE,
)
def comprehensiveness(subject: Subject) -> PerturbationTruth:
    """Mask the best 1, 5, 10, 20 and 50 % of the tokens, and average what the answer loses."""
    return PerturbationTruth("comprehensiveness", perturbed_answers(subject))


@evaluation_task(
    "sufficiency",
    items=reasoned_items,
    metrics=METRICS["sufficiency"],
    causal=True,
    shows=SHOWS,
    cannot_show=CANNOT_SHOW,
    licence=LICENCE,
)
def sufficiency(subject: Subject) -> PerturbationTruth:
    """Mask all tokens but the best 1, 5, 10, 20 and 50 %, and average what the answer loses."""
    return PerturbationTruth("sufficiency", perturbed_answers(subject))


def perturbation_task(kind: str, perturbation: str) -> EvaluationTask:
    """Return one of the tasks above with another perturbation: ``deletion:remove``.

    Args:
        kind: its name.
        perturbation: ``"mask"`` or ``"remove"``.

    Raises:
        InvalidInputError: another perturbation.
    """
    if perturbation not in PERTURBATIONS:
        raise InvalidInputError(
            f"tasks: must name the perturbation 'mask' or 'remove' after {kind!r}, got {perturbation!r}; write "
            f"{kind}:remove"
        )
    task = registered_tasks()[kind]

    def truth_of(subject: Subject) -> PerturbationTruth:
        return PerturbationTruth(kind, perturbed_answers(subject, perturbation))  # type: ignore[arg-type]

    if perturbation == "mask":
        return task
    return replace(
        task,
        name=f"{kind}_remove",
        function=truth_of,
        summary=f"{task.summary} The tokens are taken out of the text instead, and later ones move up.",
    )
