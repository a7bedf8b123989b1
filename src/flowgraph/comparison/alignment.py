"""Align two traces by tokens, characters or steps: which part of one corresponds to which part of the other."""

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
"""A group of the first trace and one of the second; -1 where there is no partner."""
Groups = tuple[Group, ...]
"""All tokens of a trace, in order, as groups."""

BY = ("auto", "tokens", "characters", "steps")
SAME_TOKENS = "the token ids are the same"
SAME_TEXT = "the text is the same, cut into other tokens"
SAME_PROMPT = "the prompt is the same; the rest by matching runs of tokens"
SAME_QUESTION = "the question is the same; the rest by matching runs of tokens"
_MIN_SHARED_TOKENS = 0.5
"""Two steps are partners when at least this share of their tokens are."""
_PARTS = ("before the question", "question", "between", "answer", "rest")
_QUOTE_LENGTH = 24
"""Characters of each text in a message."""


@dataclass(frozen=True)
class Alignment:
    """Two traces cut into groups of tokens, and the pairs of corresponding groups.

    Attributes:
        by: "tokens" (every group is one token, or an answer that differs), "characters" (the finest groups that both
            share) or "steps".
        rule: what made the alignment possible, in words.
        groups: of the first and of the second trace; each list covers its tokens in order.
        pairs: every group of both, in reading order; matched pairs never cross.
    """

    by: str
    rule: str
    groups: tuple[Groups, Groups]
    pairs: tuple[Pair, ...]

    @property
    def num_matched(self) -> int:
        """Number of pairs with a group on both sides."""
        return sum(i >= 0 and j >= 0 for i, j in self.pairs)


def align(first: FlowTrace, second: FlowTrace, by: str = "auto") -> Alignment:
    """Align two traces.

    Equal token ids are aligned by position; equal texts cut differently by the token borders they share. Two
    answers of one question share their prompt, token by token; what follows is aligned by the longest matching runs
    (:class:`difflib.SequenceMatcher`). Answers that differ are joined, each to one group from its first to its last
    token, and the two groups are partners: all flow ends in the answer, so its tokens one by one would only show into
    how many tokens it was cut. A single token replaced by another is its partner. Steps are partners when half of
    their tokens are, chosen so that most tokens are covered. Exchanging the traces exchanges the sides and changes
    nothing else.

    Args:
        first: one trace.
        second: the other.
        by: "auto" (tokens, or characters where the same text was cut into other tokens), "tokens", "characters"
            or "steps".

    Raises:
        InvalidInputError: the traces have neither a text nor a question in common, or not what ``by`` needs.

    Cost: linear in the tokens for equal ids or texts; quadratic at worst otherwise.
    """
    if by not in BY:
        raise InvalidInputError(f"by: must be one of {', '.join(map(repr, BY))}, got {by!r}; 'auto' chooses")
    rule = _rule(first, second, by)

    # The matcher, and the choice among equally good steps, prefer what comes first. An order that depends on the
    # traces alone makes the result independent of the order of the arguments.
    is_swapped = _sort_key(second) < _sort_key(first)
    one = second if is_swapped else first
    other = first if is_swapped else second

    # The finest alignment.
    if rule == SAME_TEXT:
        level = "characters"
        groups = _shared_groups(one, other)
        matched = [(k, k) for k in range(len(groups[0]))]
    else:
        level = "tokens"
        groups = (_single_tokens(one), _single_tokens(other))
        matched = _matched_tokens(one, other, rule)

    # Steps are matched by the tokens that they share.
    if by == "steps":
        level = "steps"
        steps = (_steps(one), _steps(other))
        matched = _matched_steps(groups, matched, steps)
        groups = steps
    elif rule in (SAME_PROMPT, SAME_QUESTION):
        groups, matched = _join_answers(one, other, rule, matched)

    # Back to the order of the arguments.
    if is_swapped:
        groups = (groups[1], groups[0])
        matched = [(j, i) for i, j in matched]
    pairs = _in_reading_order(matched, len(groups[0]), len(groups[1]))
    return Alignment(level, rule, groups, pairs)


def question_text(trace: FlowTrace) -> str:
    """Return the characters from the first to the last question token."""
    spans = trace.spans[trace.question]
    start = int(spans[:, 0].min())
    stop = int(spans[:, 1].max())
    return trace.text[start:stop].strip()


def prompt_ids(trace: FlowTrace) -> list[int]:
    """Return the ids of the tokens before the first generated one."""
    generated = trace.generated.nonzero()
    stop = int(generated[0]) if generated.numel() else trace.num_tokens
    return trace.token_ids[:stop].tolist()


def _rule(first: FlowTrace, second: FlowTrace, by: str) -> str:
    """Choose what the alignment is based on: token ids, the text, the prompt or the question, in this order."""
    same_text = first.text == second.text and bool(first.text)
    if by == "characters" and not same_text:
        raise InvalidInputError(
            f"by: 'characters' needs two traces of one text, got texts that differ "
            f"{_difference(first.text, second.text)}; "
            "'auto' or 'tokens' also aligns two answers of one question"
        )
    if by == "characters":
        return SAME_TEXT

    # From the most to the least that two traces can have in common.
    if first.token_ids.tolist() == second.token_ids.tolist():
        return SAME_TOKENS
    if same_text and by != "tokens":
        return SAME_TEXT
    first_prompt = prompt_ids(first)
    if first_prompt and first_prompt == prompt_ids(second):
        return SAME_PROMPT
    first_question = question_text(first)
    second_question = question_text(second)
    if first_question and first_question == second_question:
        return SAME_QUESTION
    raise InvalidInputError(
        "first, second: must trace one text or answer one question, got questions that differ "
        f"{_difference(first_question, second_question)}, in traces of {first.num_tokens} and {second.num_tokens} "
        "tokens; trace the same question twice"
    )


def _difference(first: str, second: str) -> str:
    """Quote two texts from the first character in which they differ, with their lengths."""
    at = min(len(first), len(second))
    for k, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            at = k
            break
    quotes = []
    # A text that ends before the other is quoted as its end.
    for text in (first, second):
        rest = text[at : at + _QUOTE_LENGTH]
        quotes.append(repr(rest) if rest else "its end")
    return f"from character {at} on ({quotes[0]} and {quotes[1]}; {len(first)} and {len(second)} characters)"


def _sort_key(trace: FlowTrace) -> tuple[list[int], tuple[str, ...], list[list[int]]]:
    """Order traces by all that the alignment reads."""
    regions = []
    for mask in (trace.question, trace.reasoning, trace.answer):
        regions.append(mask.nonzero().flatten().tolist())
    return trace.token_ids.tolist(), trace.tokens, regions


def _single_tokens(trace: FlowTrace) -> Groups:
    """Return every token as a group of its own."""
    return tuple((t, t + 1) for t in range(trace.num_tokens))


def _matched_tokens(one: FlowTrace, other: FlowTrace, rule: str) -> list[Pair]:
    """Match runs of tokens part by part, so that answers meet answers; single replaced tokens are partners."""
    if rule == SAME_TOKENS:
        return [(t, t) for t in range(one.num_tokens)]

    # What is matched: with one prompt the traces have one vocabulary, and ids distinguish tokens that print alike.
    one_keys: Sequence[object]
    other_keys: Sequence[object]
    if rule == SAME_PROMPT:
        start = len(prompt_ids(one))
        one_keys = one.token_ids.tolist()
        other_keys = other.token_ids.tolist()
    else:
        start = 0
        one_keys = one.tokens
        other_keys = other.tokens

    matched = [(t, t) for t in range(start)]
    one_parts = pairwise(_part_borders(one, start))
    other_parts = pairwise(_part_borders(other, start))
    for part, (low, high), (other_low, other_high) in zip(_PARTS, one_parts, other_parts, strict=True):
        matcher = SequenceMatcher(None, one_keys[low:high], other_keys[other_low:other_high], autojunk=False)
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            is_one_for_one = i_end - i == 1 and j_end - j == 1
            is_partner = part == "answer" or is_one_for_one
            if kind == "equal" or (kind == "replace" and is_partner):
                # Of answers with different lengths, as many tokens as both have.
                run = range(low + i, low + i_end)
                other_run = range(other_low + j, other_low + j_end)
                matched += zip(run, other_run, strict=False)
    return matched


def _join_answers(
    one: FlowTrace, other: FlowTrace, rule: str, matched: list[Pair]
) -> tuple[tuple[Groups, Groups], list[Pair]]:
    """Join the tokens of each answer to one group where the answers differ, and pair the two groups.

    Args:
        one: a trace.
        other: the other trace.
        rule: what the alignment is based on.
        matched: pairs of tokens, in order.
    """
    keys = _answer_ids if rule == SAME_PROMPT else _answer_tokens
    one_extent = _answer_extent(one)
    other_extent = _answer_extent(other)
    if keys(one) == keys(other) or one_extent is None or other_extent is None:
        return (_single_tokens(one), _single_tokens(other)), matched

    # The pairs before the answers stay; in each trace the answer becomes one group, so groups after it move down.
    low, high = one_extent
    other_low, other_high = other_extent
    shift = high - low - 1
    other_shift = other_high - other_low - 1
    before = []
    after = []
    for i, j in matched:
        if i < low and j < other_low:
            before.append((i, j))
        elif i >= high and j >= other_high:
            after.append((i - shift, j - other_shift))
    groups = (_with_one_group(one, one_extent), _with_one_group(other, other_extent))
    return groups, [*before, (low, other_low), *after]


def _answer_ids(trace: FlowTrace) -> list[int]:
    """Return the ids of the answer."""
    return trace.token_ids[trace.answer].tolist()


def _answer_tokens(trace: FlowTrace) -> list[str]:
    """Return the texts of the answer's tokens."""
    return [trace.tokens[token] for token in trace.answer.nonzero().flatten().tolist()]


def _answer_extent(trace: FlowTrace) -> Group | None:
    """Return the tokens from the first to the last of the answer; None where the question reaches into them."""
    answer = trace.answer.nonzero().flatten().tolist()
    last_question = int(trace.question.nonzero()[-1])
    if last_question > answer[0]:
        return None
    return answer[0], answer[-1] + 1


def _with_one_group(trace: FlowTrace, extent: Group) -> Groups:
    """Return every token as a group of its own, but those of one range as one."""
    low, high = extent
    singles = _single_tokens(trace)
    return (*singles[:low], extent, *singles[high:])


def _part_borders(trace: FlowTrace, start: int) -> list[int]:
    """List the tokens between which the five parts lie, from token ``start`` on."""
    question = trace.question.nonzero().flatten().tolist()
    answer = trace.answer.nonzero().flatten().tolist()
    borders = [start, question[0], question[-1] + 1, answer[0], answer[-1] + 1]
    # Parts before start, or out of order, are empty.
    return [*np.maximum.accumulate(borders).tolist(), trace.num_tokens]


def _shared_groups(one: FlowTrace, other: FlowTrace) -> tuple[Groups, Groups]:
    """Cut both traces at every place where both have a border between tokens: as many groups on either side."""
    one_borders = _borders(one)
    other_borders = _borders(other)
    one_cuts = [0]
    other_cuts = [0]
    i = 0
    j = 0
    # Both lists are in reading order: advance the border that ends first, and cut where two borders meet.
    while i < len(one_borders) and j < len(other_borders):
        low, high, token = one_borders[i]
        other_low, other_high, other_token = other_borders[j]
        if high >= other_low and other_high >= low:
            one_cuts.append(token)
            other_cuts.append(other_token)
            i += 1
            j += 1
        elif high < other_low:
            i += 1
        else:
            j += 1
    one_cuts.append(one.num_tokens)
    other_cuts.append(other.num_tokens)
    return tuple(pairwise(one_cuts)), tuple(pairwise(other_cuts))


def _borders(trace: FlowTrace) -> list[tuple[int, int, int]]:
    """List (from character, to character, token after): between them all tokens before end and all after begin."""
    start, end = trace.spans.numpy().T
    end = np.maximum(start, end)

    # For each token t: where the tokens up to t end, and where those after t start.
    last_end = np.maximum.accumulate(end)
    first_start = np.minimum.accumulate(start[::-1])[::-1]
    borders = []
    for token in range(1, trace.num_tokens):
        low = int(last_end[token - 1])
        high = int(first_start[token])
        # Tokens that share a character have no border between them.
        if low <= high:
            borders.append((low, high, token))
    return borders


def _steps(trace: FlowTrace) -> Groups:
    """Return the token ranges of a trace's steps."""
    return tuple((step.start, step.stop) for step in trace.steps().steps)


def _matched_steps(groups: tuple[Groups, Groups], matched: list[Pair], steps: tuple[Groups, Groups]) -> list[Pair]:
    """Find the pairs of steps that do not cross and share most tokens: a weighted longest common subsequence."""
    weight = _step_weights(groups, matched, steps)
    num_first, num_second = weight.shape

    # best[i, j]: the largest total weight of pairs among the steps from i and from j on.
    best = np.zeros((num_first + 1, num_second + 1))
    for i in reversed(range(num_first)):
        for j in reversed(range(num_second)):
            if_paired = weight[i, j] + best[i + 1, j + 1]
            best[i, j] = max(best[i + 1, j], best[i, j + 1], if_paired)

    # Follow the choices that led to best[0, 0].
    pairs = []
    i = 0
    j = 0
    while i < num_first and j < num_second:
        if_paired = weight[i, j] + best[i + 1, j + 1]
        if weight[i, j] > 0 and best[i, j] == if_paired:
            pairs.append((i, j))
            i += 1
            j += 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1
    return pairs


def _step_weights(groups: tuple[Groups, Groups], matched: list[Pair], steps: tuple[Groups, Groups]) -> np.ndarray:
    """Count the matched tokens of each pair of steps, of both sides together; 0 where too few tokens match."""
    one_sizes = _sizes(steps[0])
    other_sizes = _sizes(steps[1])
    one_step_of_token = np.repeat(np.arange(one_sizes.size), one_sizes)
    other_step_of_token = np.repeat(np.arange(other_sizes.size), other_sizes)

    # Each pair of groups counts for the steps in which its groups begin.
    num_shared = np.zeros((one_sizes.size, other_sizes.size))
    for i, j in matched:
        start, stop = groups[0][i]
        other_start, other_stop = groups[1][j]
        step = one_step_of_token[start]
        other_step = other_step_of_token[other_start]
        num_shared[step, other_step] += stop - start
        num_shared[step, other_step] += other_stop - other_start

    # Partners share at least a fixed part of all their tokens.
    num_tokens = np.add.outer(one_sizes, other_sizes)
    are_partners = num_shared >= _MIN_SHARED_TOKENS * num_tokens
    return np.where(are_partners, num_shared, 0)


def _sizes(groups: Groups) -> np.ndarray:
    """Return the number of tokens of each group."""
    return np.array([stop - start for start, stop in groups])


def _in_reading_order(matched: list[Pair], num_first: int, num_second: int) -> tuple[Pair, ...]:
    """List all groups of both: those without a partner stand before the next pair, the first trace's before."""
    pairs: list[Pair] = []
    i = 0
    j = 0
    for next_i, next_j in [*matched, (num_first, num_second)]:
        pairs += [(k, -1) for k in range(i, next_i)]
        pairs += [(-1, k) for k in range(j, next_j)]
        pairs.append((next_i, next_j))
        i = next_i + 1
        j = next_j + 1
    # The last pair is the ends of both lists.
    return tuple(pairs[:-1])
