"""Which part of one trace stands for which part of another: by tokens, by characters, or by steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np

from flowgraph.errors import InvalidInputError
from flowgraph.tracing.flow_trace import FlowTrace

Group = tuple[int, int]
"""Tokens [start, stop) that are compared as one."""
Pair = tuple[int, int]
"""A group of the first trace and one of the second; -1 where there is none."""

BY = ("auto", "tokens", "characters", "steps")
SAME_TOKENS = "the token ids are the same"
SAME_TEXT = "the text is the same, cut into other tokens"
SAME_PROMPT = "the prompt is the same; the rest by matching runs of tokens"
SAME_QUESTION = "the question is the same; the rest by matching runs of tokens"
_MATCH = 0.5
"""Two steps are partners when at least this share of their tokens are."""
_ANSWER = 3
"""The part that holds the answer, of: before the question, question, between, answer, rest."""
_SHOWN = 24
"""Characters of each text in a message."""


@dataclass(frozen=True)
class Alignment:
    """Two traces cut into groups of tokens, and which group stands for which.

    Attributes:
        by: "tokens" (every group is one token), "characters" (the finest groups that both share) or "steps".
        rule: what made the alignment possible, in words.
        groups: of the first and of the second trace; each list covers its tokens in order.
        pairs: every group of both, in reading order; matched pairs never cross.
    """

    by: str
    rule: str
    groups: tuple[tuple[Group, ...], tuple[Group, ...]]
    pairs: tuple[Pair, ...]

    @property
    def num_matched(self) -> int:
        """Number of pairs with a group on both sides."""
        return sum(i >= 0 and j >= 0 for i, j in self.pairs)


def align(first: FlowTrace, second: FlowTrace, by: str = "auto") -> Alignment:
    """Line two traces up.

    Equal token ids are aligned by position; equal texts cut differently by the token borders they share. Two
    answers of one question share their prompt, token by token; what follows is aligned by the longest matching runs
    (:class:`difflib.SequenceMatcher`), the reasoning and the answer each for itself. The tokens of the answers are
    partners whatever they say, and so is a single token replaced by another. Steps are partners when half of their
    tokens are, chosen so that most tokens are covered. Exchanging the traces exchanges the sides and changes nothing
    else.

    Args:
        first: one trace.
        second: the other.
        by: "auto" (tokens, or characters where the same text was cut into other tokens), "tokens", "characters"
            or "steps".

    Raises:
        InvalidInputError: the traces have neither a text nor a question in common, or not what ``by`` needs.

    Cost: linear for equal ids or texts; quadratic in the tokens at worst otherwise.
    """
    if by not in BY:
        raise InvalidInputError(f"by: must be one of {', '.join(map(repr, BY))}, got {by!r}; 'auto' chooses")
    rule = _rule(first, second, by)
    # The matcher and the choice among equally good steps prefer what comes first, so the order must not be the caller's
    swapped = _order(second) < _order(first)
    one, other = (second, first) if swapped else (first, second)
    if rule == SAME_TEXT:
        groups = _shared_borders(one, other)
        matched = [(k, k) for k in range(len(groups[0]))]
    else:
        groups = (_single(one), _single(other))
        matched = _matched_tokens(one, other, rule)
    level = "characters" if rule == SAME_TEXT else "tokens"
    if by == "steps":
        steps = (_steps(one), _steps(other))
        groups, matched, level = steps, _matched_steps(groups, matched, steps), "steps"
    if swapped:
        groups, matched = (groups[1], groups[0]), [(i, j) for j, i in matched]
    return Alignment(level, rule, groups, _in_reading_order(matched, len(groups[0]), len(groups[1])))


def question_text(trace: FlowTrace) -> str:
    """The characters from the first to the last question token."""
    spans = trace.spans[trace.question]
    return trace.text[int(spans[:, 0].min()) : int(spans[:, 1].max())].strip()


def prompt_ids(trace: FlowTrace) -> list[int]:
    """Ids of the tokens before the first generated one."""
    made = trace.generated.nonzero()
    return trace.token_ids[: int(made[0]) if made.numel() else trace.num_tokens].tolist()


def _rule(first: FlowTrace, second: FlowTrace, by: str) -> str:
    same_text = first.text == second.text and bool(first.text)
    if by == "characters" and not same_text:
        raise InvalidInputError(
            f"by: 'characters' needs two traces of one text, got texts that differ "
            f"{_difference(first.text, second.text)}; "
            "'auto' or 'tokens' also aligns two answers of one question"
        )
    if by == "characters":
        return SAME_TEXT
    if first.token_ids.tolist() == second.token_ids.tolist():
        return SAME_TOKENS
    if same_text and by != "tokens":
        return SAME_TEXT
    if prompt_ids(first) == prompt_ids(second) and prompt_ids(first):
        return SAME_PROMPT
    questions = question_text(first), question_text(second)
    if questions[0] == questions[1] and questions[0]:
        return SAME_QUESTION
    raise InvalidInputError(
        "first, second: must trace one text or answer one question, got questions that differ "
        f"{_difference(*questions)}, in traces of {first.num_tokens} and {second.num_tokens} tokens; "
        "trace the same question twice"
    )


def _difference(first: str, second: str) -> str:
    """Where two texts part, and how long they are."""
    at = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    shown = [repr(text[at : at + _SHOWN]) if text[at:] else "its end" for text in (first, second)]
    return f"from character {at} on ({shown[0]} and {shown[1]}; {len(first)} and {len(second)} characters)"


def _order(trace: FlowTrace) -> tuple[list[int], tuple[str, ...], list[list[int]]]:
    regions = [mask.nonzero().flatten().tolist() for mask in (trace.question, trace.reasoning, trace.answer)]
    return trace.token_ids.tolist(), trace.tokens, regions


def _single(trace: FlowTrace) -> tuple[Group, ...]:
    return tuple((t, t + 1) for t in range(trace.num_tokens))


def _matched_tokens(one: FlowTrace, other: FlowTrace, rule: str) -> list[Pair]:
    """Matching runs, looked for part by part, so that answers meet answers; single replaced tokens are partners."""
    if rule == SAME_TOKENS:
        return [(t, t) for t in range(one.num_tokens)]
    if rule == SAME_PROMPT:  # one vocabulary: ids tell apart what prints alike
        start = len(prompt_ids(one))
        keys: tuple[Sequence[object], Sequence[object]] = (one.token_ids.tolist(), other.token_ids.tolist())
    else:
        start, keys = 0, (one.tokens, other.tokens)
    matched = [(t, t) for t in range(start)]
    parts = zip(*(pairwise(_borders_of_parts(trace, start)) for trace in (one, other)), strict=True)
    for number, ((low, high), (other_low, other_high)) in enumerate(parts):
        matcher = SequenceMatcher(None, keys[0][low:high], keys[1][other_low:other_high], autojunk=False)
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            if kind == "equal" or (kind == "replace" and (number == _ANSWER or i_end - i == j_end - j == 1)):
                run = zip(range(low + i, low + i_end), range(other_low + j, other_low + j_end), strict=False)
                matched += run  # of unequal answers, as many tokens as both have
    return matched


def _borders_of_parts(trace: FlowTrace, start: int) -> list[int]:
    """Where the question, the text after it, the answer and the rest begin, from ``start`` on."""
    asked, answered = (mask.nonzero().flatten().tolist() for mask in (trace.question, trace.answer))
    borders = [start, asked[0], asked[-1] + 1, answered[0], answered[-1] + 1]
    return [*np.maximum.accumulate(borders).tolist(), trace.num_tokens]


def _shared_borders(one: FlowTrace, other: FlowTrace) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Both traces cut at every place where both have a border between tokens: as many groups on either side."""
    borders, k, j = (_borders(one), _borders(other)), 0, 0
    cuts: tuple[list[int], list[int]] = ([0], [0])
    while k < len(borders[0]) and j < len(borders[1]):
        (low, high, token), (other_low, other_high, other_token) = borders[0][k], borders[1][j]
        if high >= other_low and other_high >= low:
            cuts[0].append(token)
            cuts[1].append(other_token)
            k, j = k + 1, j + 1
        elif high < other_low:
            k += 1
        else:
            j += 1
    cuts[0].append(one.num_tokens)
    cuts[1].append(other.num_tokens)
    return tuple(pairwise(cuts[0])), tuple(pairwise(cuts[1]))


def _borders(trace: FlowTrace) -> list[tuple[int, int, int]]:
    """(from character, to character, token after): between them, all tokens before end and all after begin."""
    spans = trace.spans.numpy()
    ends = np.maximum.accumulate(spans[:, 0].clip(spans[:, 1]))[:-1]
    starts = np.minimum.accumulate(spans[::-1, 0])[::-1][1:]
    return [(int(ends[t]), int(starts[t]), int(t) + 1) for t in np.flatnonzero(ends <= starts)]


def _steps(trace: FlowTrace) -> tuple[Group, ...]:
    return tuple((step.start, step.stop) for step in trace.steps().steps)


def _matched_steps(
    groups: tuple[tuple[Group, ...], tuple[Group, ...]],
    matched: list[Pair],
    steps: tuple[tuple[Group, ...], tuple[Group, ...]],
) -> list[Pair]:
    """Pairs of steps that do not cross and share most tokens: a longest common subsequence weighted by them."""
    step_of = [np.repeat(np.arange(len(side)), [stop - start for start, stop in side]) for side in steps]
    sizes = [np.array([stop - start for start, stop in side]) for side in steps]
    shared = np.zeros((len(steps[0]), len(steps[1])))
    for i, j in matched:
        (start, stop), (other_start, other_stop) = groups[0][i], groups[1][j]
        shared[step_of[0][start], step_of[1][other_start]] += stop - start + other_stop - other_start
    worth = np.where(shared >= _MATCH * (sizes[0][:, None] + sizes[1][None, :]), shared, 0)
    best = np.zeros((len(steps[0]) + 1, len(steps[1]) + 1))  # of the steps from i and from j on
    for i in reversed(range(len(steps[0]))):
        for j in reversed(range(len(steps[1]))):
            best[i, j] = max(best[i + 1, j], best[i, j + 1], worth[i, j] + best[i + 1, j + 1])
    pairs, i, j = [], 0, 0
    while i < len(steps[0]) and j < len(steps[1]):
        if worth[i, j] and best[i, j] == worth[i, j] + best[i + 1, j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1
    return pairs


def _in_reading_order(matched: list[Pair], num_first: int, num_second: int) -> tuple[Pair, ...]:
    """All groups of both: what has no partner stands before the next pair, the first trace's ahead."""
    pairs, i, j = [], 0, 0
    for end, other_end in [*matched, (num_first, num_second)]:
        pairs += [(k, -1) for k in range(i, end)] + [(-1, k) for k in range(j, other_end)]
        pairs.append((end, other_end))
        i, j = end + 1, other_end + 1
    return tuple(pairs[:-1])
