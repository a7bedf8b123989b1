"""The units of a text that tasks knock out and score: lines, equal chunks, steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.subject import Subject
from flowgraph.steps.splitting import TokenText, starts_by_rule
from flowgraph.text.sentences import has_alphanumeric

Units = list[list[int]]
"""Token positions of each unit, in order."""


def lines_of(subject: Subject, mask: Bool[Tensor, " tokens"]) -> Units:
    """Split the tokens of a mask by the lines of the text; a line break belongs to the line that it ends.

    Args:
        subject: its text and tokens.
        mask: which tokens.
    """
    positions = subject.positions(mask)
    if not positions:
        return []
    low = positions[0]
    high = positions[-1] + 1
    text = TokenText.of(subject.base.tokens, subject.base.spans, subject.base.text)
    starts, _ = starts_by_rule("lines", text, [(low, high)], "reasoning")

    # Each line reaches to the start of the next one; only its tokens in the mask are taken.
    later_starts = sorted(set(starts) - {low})
    borders = [low, *later_starts, high]
    chosen = set(positions)
    units = []
    for first, end in pairwise(borders):
        unit = [position for position in range(first, end) if position in chosen]
        if unit:
            units.append(unit)
    return units


def chunks_of(positions: list[int], count: int) -> Units:
    """Split positions into runs whose lengths differ by one at most; fewer runs where there are fewer positions.

    Args:
        positions: in order.
        count: number of runs.
    """
    parts = np.array_split(np.asarray(positions, dtype=np.int64), count)
    return [part.tolist() for part in parts if part.size]


def answer_line(subject: Subject) -> list[int]:
    """List the generated tokens of the line in which the answer begins, up to the answer's last token.

    In a text of one line that is the answer alone.
    """
    answer = subject.positions(subject.answer)
    lines = lines_of(subject, subject.reasoning)
    text = subject.base.text
    spans = subject.base.spans
    cue: list[int] = []
    if len(lines) > 1:
        # The last line of the reasoning leads up to the answer, unless there is a line break between them.
        last_line = lines[-1]
        last_token_begins = int(spans[last_line[-1], 0])
        answer_begins = int(spans[answer[0], 0])
        between = text[last_token_begins:answer_begins]
        if "\n" not in between:
            cue = last_line
    return [*cue, *answer]


def steps_before_answer(subject: Subject) -> Units:
    """Split the reasoning into its lines, without the words that lead up to the answer in the answer's own line."""
    # "Answer:" belongs to the form of the response, not to the reasoning.
    cue = set(answer_line(subject))
    steps = []
    for line in lines_of(subject, subject.reasoning):
        step = [position for position in line if position not in cue]
        if step:
            steps.append(step)
    return steps


def lines_or_chunks(subject: Subject, count: int) -> Units:
    """Split the reasoning into its lines where it has about ``count`` of them, else into ``count`` equal chunks.

    The line of the answer ("Answer: 7") is in no unit: without its words every answer becomes unlikely, for any
    reasoning.

    Args:
        subject: its reasoning is split.
        count: number of chunks; between two thirds and four thirds of it, lines are taken.
    """
    steps = steps_before_answer(subject)
    if 2 * count <= 3 * len(steps) <= 4 * count:
        return steps
    positions = [position for step in steps for position in step]
    return chunks_of(positions, count)


def tokens_at(subject: Subject, begin: int, end: int, *, words_only: bool = False) -> list[int]:
    """List the visible tokens among the characters ``begin`` to ``end`` (exclusive) of the text.

    Args:
        subject: its text and tokens.
        begin: first character.
        end: the character after the last.
        words_only: leave out tokens without a letter or a digit.
    """
    text = subject.base.text
    found = []
    for position, (low, high) in enumerate(subject.base.spans.tolist()):
        # A token at the border counts by its part inside.
        first = max(low, begin)
        last = min(high, end)
        inside = text[first:last]
        is_wanted = has_alphanumeric(inside) if words_only else bool(inside.strip())
        if is_wanted:
            found.append(position)
    return found


def tokens_of_passages(subject: Subject, passages: Sequence[str], part: Literal["prompt", "response"]) -> Units:
    """Find passages that follow each other in the prompt or in the response, and list the tokens of each.

    Args:
        subject: its text holds them.
        passages: in order.
        part: which part holds them.

    Raises:
        InvalidInputError: a passage is not there.
    """
    text = subject.base.text
    # The response begins at its first token. A passage may occur in both parts, so only one of them is searched.
    border = int(subject.base.spans[subject.prompt_length, 0])
    place = 0 if part == "prompt" else border
    limit = border if part == "prompt" else len(text)

    # Each passage is searched from the end of the one before.
    units = []
    for passage in passages:
        begin = text.find(passage, place, limit)
        if begin < 0:
            raise InvalidInputError(
                f"data: its passages must stand in the {part} in this order, got none of {passage!r:.80} after "
                f"character {place}; correct the item"
            )
        place = begin + len(passage)
        units.append(tokens_at(subject, begin, place))
    return units
