"""Knock-out tasks: mask lines, question tokens, edges between chunks or steps in the model, and measure the effect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.attention.modules import base_model
from flowgraph.evaluation.registry import evaluation_task
from flowgraph.evaluation.subject import Subject
from flowgraph.evaluation.tasks.texts import LICENCE, own_items, reasoned_items, short_items
from flowgraph.evaluation.tasks.truths import (
    AUROC_OF_2,
    PARTIAL,
    PARTIAL_DISTANCE,
    PER_READER,
    SHARE_OF_3,
    SPEARMAN,
    PairEffects,
    UnitEffects,
)
from flowgraph.evaluation.tasks.units import Units, answer_line, chunks_of, lines_or_chunks, steps_before_answer
from flowgraph.interventions.answer_logprobs import answer_logprobs
from flowgraph.interventions.knockout import Intervention, attention_cell, attention_cut

NUM_CHUNKS = 12
"""Units of the reasoning in ``line_knockout``."""
NUM_EDGE_CHUNKS = 5
"""Units of the reasoning in ``edge_knockout``: with question and answer that is 21 pairs."""
_MIN_LINES = 6
_MIN_STEPS = 3
_MIN_PAIRS = 6
_BATCH_OF_DISTRIBUTIONS = 2
"""Runs in one pass of ``step_suppression``, which holds the distributions of all later tokens."""
_KNOCK_OUT_SHOWS = "the scores find what the model's answer depends on through attention, in this text"
_KNOCK_OUT_CANNOT = (
    "whether the model is right, how a unit acts, or effects that need two units to be masked together; the token just "
    "before the answer keeps the influence of its own position"
)


def drops(subject: Subject, units: Sequence[Sequence[int]]) -> Float64[np.ndarray, " units"]:
    r"""Measure how much the answer's log-probability drops when no later token may read a unit.

    .. math:: e_u = \log p(\mathrm{answer}) - \log p(\mathrm{answer} \mid \text{attention to } u \text{ masked})

    Args:
        subject: the text and the model.
        units: token positions of each unit; none of the answer.

    Returns:
        ``[units]``, in nats; positive where the unit supports the answer.

    Cost: 1 + units / 8 forward passes of 8 copies.
    """
    interventions = [Intervention(tokens=list(unit)) for unit in units]
    return _effects_of(subject, interventions)


def _effects_of(subject: Subject, interventions: Sequence[Intervention]) -> Float64[np.ndarray, " interventions"]:
    """Measure interventions; an effect is the negative change, so what supports the answer has a positive one."""
    results = subject.knockouts(interventions)
    return np.array([-result.change for result in results], dtype=np.float64)


@evaluation_task(
    "line_knockout",
    items=reasoned_items,
    metrics=(SHARE_OF_3, AUROC_OF_2, SPEARMAN, PARTIAL),
    causal=True,
    restore=UnitEffects.restored,
    shows=_KNOCK_OUT_SHOWS,
    cannot_show=_KNOCK_OUT_CANNOT,
    licence=LICENCE,
)
def line_knockout(subject: Subject) -> UnitEffects:
    """Mask each line of the reasoning, or each of 12 equal chunks where it has not 8 to 16 lines."""
    units = lines_or_chunks(subject, NUM_CHUNKS)
    return UnitEffects(units, drops(subject, units), min_units=_MIN_LINES, kind="line knock-out")


def _question_knockout(subject: Subject) -> UnitEffects:
    """Mask each token of the question by itself."""
    units = [[position] for position in subject.positions(subject.question)]
    return UnitEffects(units, drops(subject, units), kind="question token knock-out")


@evaluation_task(
    "question_knockout_short",
    items=short_items,
    metrics=(SPEARMAN, PARTIAL, SHARE_OF_3, AUROC_OF_2),
    causal=True,
    restore=UnitEffects.restored,
    shows=_KNOCK_OUT_SHOWS,
    cannot_show=_KNOCK_OUT_CANNOT,
    licence=LICENCE,
)
def question_knockout_short(subject: Subject) -> UnitEffects:
    """Mask each token of the question; the response is the answer alone."""
    return _question_knockout(subject)


@evaluation_task(
    "question_knockout_reasoned",
    items=reasoned_items,
    metrics=(SPEARMAN, PARTIAL, SHARE_OF_3, AUROC_OF_2),
    causal=True,
    restore=UnitEffects.restored,
    shows=_KNOCK_OUT_SHOWS,
    cannot_show=f"{_KNOCK_OUT_CANNOT}; a question token whose value the reasoning repeats has a small effect",
    licence=LICENCE,
)
def question_knockout_reasoned(subject: Subject) -> UnitEffects:
    """Mask each token of the question; the response is a reasoned solution."""
    return _question_knockout(subject)


@evaluation_task(
    "question_knockout_own",
    items=own_items,
    metrics=(SPEARMAN, PARTIAL, SHARE_OF_3, AUROC_OF_2),
    causal=True,
    restore=UnitEffects.restored,
    shows=_KNOCK_OUT_SHOWS,
    cannot_show=_KNOCK_OUT_CANNOT,
    licence=LICENCE,
)
def question_knockout_own(subject: Subject) -> UnitEffects:
    """Mask each token of the question; the response is what the model generates greedily."""
    return _question_knockout(subject)


@evaluation_task(
    "edge_knockout",
    items=reasoned_items,
    metrics=(SPEARMAN, PARTIAL_DISTANCE, AUROC_OF_2, PER_READER),
    reads="edges",
    causal=True,
    restore=PairEffects.restored,
    shows="the edge scores find which readings between parts of the text the answer depends on",
    cannot_show=f"{_KNOCK_OUT_CANNOT}; readings inside a part are not tested",
    licence=LICENCE,
)
def edge_knockout(subject: Subject) -> PairEffects:
    """Mask what one part of the text reads from an earlier part: question, 5 chunks of the reasoning, answer."""
    # The answer's own line is the last reader; its words are never a source.
    question = subject.positions(subject.question)
    reasoning = [position for step in steps_before_answer(subject) for position in step]
    chunks = chunks_of(reasoning, NUM_EDGE_CHUNKS)
    units: Units = [question, *chunks, answer_line(subject)]

    # One intervention for each pair: all edges from the source to the reader.
    pairs = pairs_of(len(units))
    interventions = []
    for reader, source in pairs:
        edges = _edges_between(subject, units[source], units[reader])
        interventions.append(Intervention(edges=edges))
    effects = _effects_of(subject, interventions)
    return PairEffects(units, pairs, effects, min_pairs=_MIN_PAIRS)


def pairs_of(num_units: int) -> list[tuple[int, int]]:
    """List all pairs (reader, source) of units with the source first in the text."""
    return [(reader, source) for reader in range(num_units) for source in range(reader)]


def _edges_between(subject: Subject, source: Sequence[int], reader: Sequence[int]) -> list[tuple[int, int]]:
    """List the edges from one unit to a later one, without those that are a position's reading of itself."""
    edges = []
    for target in reader:
        for origin in source:
            # Rows belong to emitting positions, so the edge between neighbours may be a cell of the diagonal.
            row, column = attention_cell(subject.base, origin, target)
            if row != column:
                edges.append((origin, target))
    return edges


@evaluation_task(
    "step_suppression",
    items=reasoned_items,
    metrics=(SPEARMAN, PARTIAL_DISTANCE, AUROC_OF_2, PER_READER),
    reads="edges",
    causal=True,
    restore=PairEffects.restored,
    shows="the edge scores between steps find which later steps the model writes differently without a step",
    cannot_show="whether a dependence is direct: a step acts on a later one through those between them; and near steps "
    "depend on each other most, so a score of distance ranks the pairs well, and partial_spearman is what counts",
    licence=LICENCE,
)
def step_suppression(subject: Subject) -> PairEffects:
    r"""Mask a step and measure how the next-token distributions inside each later step change.

    .. math:: e_{ji} = \frac{1}{|j|} \sum_{t \in j} \mathrm{KL}(p_t \,\|\, p_t^{\text{attention to } i \text{ masked}})

    Source: the attention suppression of Thought Anchors (Bogdan et al. 2025, arXiv 2506.19143), without its logarithm,
    which does not change ranks.
    """
    steps = steps_before_answer(subject)
    # Every step is a source, and every later step and the answer's line a reader.
    units: Units = [*steps, answer_line(subject)]
    pairs = pairs_of(len(units))
    if len(steps) < _MIN_STEPS:
        return PairEffects(units, [], np.zeros(0), min_pairs=_MIN_PAIRS, kind="step suppression")

    # p_t at every token of a later step, from one pass without intervention.
    inner = base_model(subject.model)
    later_positions = sorted(position for unit in units[1:] for position in unit)
    later = torch.tensor(later_positions)
    before = answer_logprobs(inner, subject.base, later, 1)[0]

    # The divergence of each of these distributions when a step is masked, a row for each step.
    divergence = np.zeros((len(steps), len(later)))
    for first in range(0, len(steps), _BATCH_OF_DISTRIBUTIONS):
        batch = steps[first : first + _BATCH_OF_DISTRIBUTIONS]
        interventions = [Intervention(tokens=step) for step in batch]
        with attention_cut(inner, subject.base, interventions):
            after = answer_logprobs(inner, subject.base, later, len(batch))
        for number, changed in enumerate(after):
            divergence[first + number] = _divergence(before, changed).numpy()

    # The mean over the tokens of each later step.
    index = {position: number for number, position in enumerate(later_positions)}
    effects = []
    for reader, source in pairs:
        columns = [index[position] for position in units[reader]]
        effects.append(float(divergence[source, columns].mean()))
    return PairEffects(units, pairs, np.array(effects), min_pairs=_MIN_PAIRS, kind="step suppression")


def _divergence(
    before: Float64[Tensor, "tokens vocabulary"], after: Float64[Tensor, "tokens vocabulary"]
) -> Float64[Tensor, " tokens"]:
    """Compute KL(before || after) of each distribution, in nats."""
    # A token with p = 0 adds nothing; rounding may make the sum negative.
    log_ratio = (before - after).masked_fill(before == -torch.inf, 0)
    return (before.exp() * log_ratio).sum(-1).clamp_min(0)
