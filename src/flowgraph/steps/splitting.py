"""Find the first tokens of steps: lines, sentences, numbered steps, words, or a rule of the user's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import MaskLike, read_mask
from flowgraph.text.sentences import LINE, LINE_BREAKS, has_alphanumeric, sentence_starts

Region = Literal["question", "reasoning", "answer"]
By = (
    str
    | re.Pattern[str]
    | Callable[[str], Iterable[tuple[int, int]]]
    | Sequence[tuple[int, int]]
    | Int[Tensor, "steps 2"]
)
"""How to split: a rule's name, a pattern of step starts, a function from text to character spans, or token spans."""

REGIONS: tuple[Region, ...] = ("question", "reasoning", "answer")


_NO_REGION = -1
_MAX_QUOTE = 60
"""Characters of the reasoning in a message."""


@dataclass(frozen=True, eq=False)
class TokenText:
    """The text of a trace and the position of each token in it.

    Attributes:
        text: the text, or the tokens one after another where it is empty or the spans do not fit it.
        start: ``[T]`` first character of each token, never decreasing.
        end: ``[T]`` the character after its last, never decreasing.
        first_visible: ``[T]`` first visible character of each token; -1 for a blank one.
    """

    text: str
    start: np.ndarray
    end: np.ndarray
    first_visible: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[str], spans: Tensor, text: str) -> TokenText:
        """Check tokens and spans, and locate every token in the text.

        Args:
            tokens: text of each of the T tokens.
            spans: ``[T, 2]``, half-open character span of each token in ``text``.
            text: the complete text, or "".

        Raises:
            InvalidInputError: tokens that are no strings, or another number of spans.
        """
        try:
            spans = torch.as_tensor(spans).long()
        except (TypeError, ValueError, RuntimeError):
            spans = torch.empty(0, dtype=torch.int64)
        if not all(isinstance(token, str) for token in tokens):
            raise InvalidInputError(f"tokens: must be the text of each token, got {tokens!r:.80}; pass trace.tokens")
        if spans.shape != (len(tokens), 2) or len(tokens) == 0:
            raise InvalidInputError(
                f"spans: must be one (start, end) for each of at least one token, got shape {tuple(spans.shape)} for "
                f"{len(tokens)} tokens; pass the trace's own spans"
            )

        # Spans that do not fit the text are replaced by those of the joined tokens.
        start, end = spans.cpu().numpy().T
        is_inside = (start >= 0) & (start <= end) & (end <= len(text))
        has_characters = (start < end).any()
        if not (text and is_inside.all() and has_characters):
            text = "".join(tokens)
            lengths = [len(token) for token in tokens]
            end = np.cumsum(lengths)
            start = end - lengths

        # Tokenizers that split a character into bytes give its tokens overlapping spans.
        start = np.maximum.accumulate(start)
        end = np.maximum.accumulate(end)

        # A token whose characters are all blank keeps -1.
        first_visible = np.full(len(tokens), -1)
        for t in range(len(tokens)):
            characters = text[int(start[t]) : int(end[t])]
            visible = characters.lstrip()
            if visible:
                first_visible[t] = start[t] + len(characters) - len(visible)
        return cls(text, start, end, first_visible)

    def characters(self, low: int, high: int) -> str:
        """Return the characters of tokens ``low`` to ``high`` (exclusive)."""
        return self.text[int(self.start[low]) : int(self.end[high - 1])]

    def tokens_at(self, characters: Sequence[int], low: int, high: int) -> list[int]:
        """Find the token at which a step starts, for each character at which a rule starts one.

        Args:
            characters: positions in the text.
            low: first token of the passage.
            high: the token after its last.

        Returns:
            For each character the first token whose visible text starts there or later; characters before the first
            visible token, where the passage starts a step in any case, and after the last give none.
        """
        visible = low + np.flatnonzero(self.first_visible[low:high] >= 0)
        # Tokens may share characters, so the positions are made non-decreasing for the search.
        positions = np.maximum.accumulate(self.first_visible[visible])
        at = np.searchsorted(positions, characters)
        is_inside = (at > 0) & (at < visible.size)
        return visible[at[is_inside]].tolist()


def region_of_tokens(
    token_text: TokenText,
    question: MaskLike,
    reasoning: MaskLike,
    answer: MaskLike,
) -> np.ndarray:
    """Number the region of each token by its place in ``REGIONS``; -1 for none.

    Blank tokens outside the regions count to the token before them.

    Args:
        token_text: the T tokens.
        question: mask, indices or slice of the question's tokens.
        reasoning: the same for the reasoning.
        answer: the same for the answer.

    Returns:
        ``[T]`` int64.

    Raises:
        RegionError: regions that overlap or lie outside.
    """
    num_tokens = token_text.first_visible.size
    regions = np.full(num_tokens, _NO_REGION)
    for number, (name, region) in enumerate(zip(REGIONS, (question, reasoning, answer), strict=True)):
        mask = read_mask(region, num_tokens, name).numpy()
        in_two = mask & (regions != _NO_REGION)
        if in_two.any():
            token = int(np.flatnonzero(in_two)[0])
            raise RegionError(
                f"{name}: regions must be disjoint, got token {token} in the {REGIONS[regions[token]]} too; "
                "remove it from one of them"
            )
        regions[mask] = number

    # Each token takes the region of the last token up to it that is visible or in a region.
    is_stray_blank = (regions == _NO_REGION) & (token_text.first_visible < 0)
    last_kept = np.maximum.accumulate(np.where(is_stray_blank, 0, np.arange(num_tokens)))
    return regions[last_kept]


def runs_of(regions: np.ndarray) -> list[tuple[int, int]]:
    """Return the token ranges of consecutive tokens of one region."""
    changes = np.flatnonzero(np.diff(regions)) + 1
    borders = [0, *changes.tolist(), regions.size]
    return list(pairwise(borders))


def starts_by_rule(
    by: Any,
    token_text: TokenText,
    passages: Sequence[tuple[int, int]],
    region: str,
) -> tuple[list[int], str]:
    """Find the first tokens of the steps inside the passages of one region.

    Args:
        by: name of a rule, pattern, or function from text to character spans.
        token_text: the tokens.
        passages: token ranges of the region.
        region: its name.

    Returns:
        Tokens, and the name of the rule that found them.

    Raises:
        InvalidInputError: an invalid rule, or one that has no match in the reasoning.
    """
    texts = [token_text.characters(low, high) for low, high in passages]
    plain_texts = [text.translate(LINE_BREAKS) for text in texts]
    is_auto = isinstance(by, str) and by == "auto"
    rule = _auto_rule(plain_texts) if is_auto else by

    # Characters at which steps start, for each passage.
    if isinstance(rule, str) and rule in _RULES:
        starts_in = _RULES[rule]
        found = [starts_in(text) for text in plain_texts]
    elif isinstance(rule, str | re.Pattern):
        # A pattern starts a step at each of its matches.
        pattern = _compiled(rule)
        found = []
        for text in texts:
            found.append([_start_of(match) for match in pattern.finditer(text)])
    else:
        # A function of the text returns the spans of the steps.
        found = []
        for text in texts:
            spans = _checked_spans(rule(text), len(text), "character")
            found.append([low for low, _ in spans])

    # Lines, sentences and words may be few, but the other rules are about marks that must be there.
    must_match = region == "reasoning" and rule not in ("lines", "sentences", "words")
    if must_match and not any(found) and any(text.strip() for text in texts):
        quote = "".join(texts).strip()
        if len(quote) > _MAX_QUOTE:
            quote = quote[: _MAX_QUOTE - 3] + "..."
        raise InvalidInputError(
            f"by: {name_of(by)} must match in the reasoning, got no match in "
            f"{quote!r}; 'auto', 'lines' and 'sentences' split any text"
        )

    # From characters of a passage to tokens of the text.
    starts: list[int] = []
    for (low, high), offsets in zip(passages, found, strict=True):
        passage_start = int(token_text.start[low])
        characters = [passage_start + offset for offset in offsets]
        starts += token_text.tokens_at(characters, low, high)
    name = f"auto: {rule}" if is_auto else name_of(by)
    return starts, name


def _start_of(match: re.Match[str]) -> int:
    """Return where group 1 starts, or the match if it has no such group or the group took no part."""
    if match.re.groups >= 1 and match.start(1) >= 0:
        return match.start(1)
    return match.start()


def name_of(by: Any) -> str:
    """Name a rule in words.

    Raises:
        InvalidInputError: an unknown name, or a pattern that does not compile.
    """
    if isinstance(by, str) and (by in _RULES or by == "auto"):
        return by
    if callable(by):
        return f"function {getattr(by, '__name__', type(by).__name__)}"
    return f"pattern {_compiled(by).pattern!r}"


def _compiled(by: str | re.Pattern[str]) -> re.Pattern[str]:
    """Compile a pattern; refuse a misspelt rule, which would be a pattern that matches its own letters."""
    # Only names close to a rule are refused: any other text is a pattern.
    known = ["auto", *_RULES]
    known_names = ", ".join(map(repr, known))
    if isinstance(by, str):
        similar = get_close_matches(by.casefold(), known, n=1, cutoff=0.8)
        if similar or not by:
            remedy = "try 'auto'"
            if similar:
                remedy = f"did you mean {similar[0]!r}? For the word itself pass re.compile({by!r})"
            raise InvalidInputError(
                f"by: must be one of {known_names}, a pattern, a function or token spans, got {by!r}; {remedy}"
            )
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise InvalidInputError(
            f"by: must be a regular expression or one of {known_names}, got {by!r} with an error at "
            f"position {error.pos}: {error.msg}; escape literal text with re.escape"
        ) from error
    if isinstance(pattern.pattern, bytes):
        raise InvalidInputError(f"by: must be a pattern of text, got one of bytes, {by!r:.80}; compile a str")
    return pattern


def _checked_spans(spans: Any, length: int, what: str) -> list[tuple[int, int]]:
    """Check that spans are pairs of integers, in order, without overlap, not empty and inside the text."""
    rule = f"by: must give {what} spans (start, stop) within 0..{length}, in order and without overlap"
    # Tensors and arrays become lists of Python integers.
    values = spans.tolist() if hasattr(spans, "tolist") else spans
    try:
        pairs = [(low, high) for low, high in values]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{rule}, got {spans!r:.80}; return a list such as [(0, 12), (12, 30)]") from error
    previous_stop = 0
    for start, stop in pairs:
        are_integers = _is_integer(start) and _is_integer(stop)
        if not are_integers or not previous_stop <= start < stop <= length:
            raise InvalidInputError(
                f"{rule}, got {(start, stop)} after {previous_stop}; sort them, and make each at least 1 long"
            )
        previous_stop = stop
    return pairs


def _is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or numpy; a bool does not count."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def starts_of_token_spans(by: Any, regions: np.ndarray, runs: Sequence[tuple[int, int]]) -> list[int]:
    """Find the first tokens of steps given as token spans; tokens between the spans are split by region.

    Args:
        by: pairs (start, stop) of tokens.
        regions: ``[T]``, the region of each token.
        runs: token ranges of one region each.

    Raises:
        InvalidInputError: anything else than such spans, or a span with tokens of two regions.
    """
    if by is None or isinstance(by, int | float | bytes):
        raise InvalidInputError(
            f"by: must be a rule's name, a pattern, a function or token spans, got {by!r:.80}; 'auto' is a good start"
        )
    pairs = _checked_spans(by, regions.size, "token")

    # Context may be part of a step of any region. A run that starts inside a span does not start a step.
    is_inside_span = np.zeros(regions.size, dtype=bool)
    for low, high in pairs:
        in_span = np.unique(regions[low:high])
        found = in_span[in_span != _NO_REGION]
        if found.size > 1:
            names = " and ".join(REGIONS[number] for number in found)
            raise InvalidInputError(
                f"by: a step must lie in one region, got tokens ({low}, {high}) with {names}; cut it where they meet"
            )
        is_inside_span[low + 1 : high] = True
    starts = [low for low, _ in runs if not is_inside_span[low]]

    # A span starts a step, and so does the token after it.
    for low, high in pairs:
        starts.append(int(low))
        if high < regions.size:
            starts.append(int(high))
    return starts


# Every quantifier whose matching time could explode is possessive or bounded.
_MARKUP = r"[ \t>*_#-]*+"
_NUMBER = r"(?:\d{1,4}|one|two|three|four|five|six|seven|eight|nine|ten)"
_HEADING = re.compile(
    rf"(?:^|(?<=[.!?:;]\s)|(?<=[。！？；])){_MARKUP}(?:step[ \t]{{1,4}}{_NUMBER}(?=[ \t*_]{{0,4}}(?:[:.)–—-]|$))"  # noqa: RUF001
    r"|第\s?[\d一二三四五六七八九十]{1,4}\s?步)",
    re.IGNORECASE | re.MULTILINE,
)
_ITEM = re.compile(rf"^{_MARKUP}(?:\(?\d{{1,3}}(?:[.)](?=[\s*_])|、)|[①-⑳])", re.MULTILINE)
# Of two lines the second is mostly "The answer is", and the first holds all the steps.
_MIN_LINES = 3
_MIN_NUMBERED = 2


def _auto_rule(texts: Sequence[str]) -> str:
    """Choose a rule: numbered if there are two numbers, else lines if there are three, else sentences."""
    num_markers = sum(len(_markers(text)) for text in texts)
    if num_markers >= _MIN_NUMBERED:
        return "numbered"
    num_lines = sum(len(_lines(text)) for text in texts)
    if num_lines >= _MIN_LINES:
        return "lines"
    return "sentences"


def _lines(text: str) -> list[int]:
    """Find the starts of the lines with a letter or a digit: a lone bracket of a formula is not a step."""
    return [line.start() for line in LINE.finditer(text) if has_alphanumeric(line[0])]


def _markers(text: str) -> list[int]:
    """Find the starts of numbered steps: headings if there are at least two (lists in them are detail), else items."""
    headings = [match.start() for match in _HEADING.finditer(text)]
    if len(headings) >= _MIN_NUMBERED:
        return headings
    items = [match.start() for match in _ITEM.finditer(text)]
    return items or headings


def _numbered(text: str) -> list[int]:
    """Find the starts of numbered steps, and of the lines after the last step.

    The last step is taken to have at most as many lines as the longest step before it; every line after these is a
    step. "The answer is 7." below a list of one-line items is then a step of its own.
    """
    marks = _markers(text)
    if len(marks) < _MIN_NUMBERED:
        return marks

    # Lines inside each step but the last, and lines after the last marker.
    lines = np.array(_lines(text))
    continuation_lines = []
    for low, high in pairwise(marks):
        continuation_lines.append(int(((lines > low) & (lines < high)).sum()))
    lines_after_last = lines[lines > marks[-1]].tolist()
    return marks + lines_after_last[max(continuation_lines) :]


def _words(text: str) -> list[int]:
    """Return where words start: runs of characters without blanks."""
    return [match.start() for match in re.finditer(r"\S+", text)]


_RULES: dict[str, Callable[[str], list[int]]] = {
    "lines": _lines,
    "sentences": sentence_starts,
    "numbered": _numbered,
    "words": _words,
}
"""The named rules: from a text to the characters at which its steps start."""
