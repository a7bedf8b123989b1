"""Where steps start: lines, sentences, numbers, or what a user says, as tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import MaskLike, read_mask

Region = Literal["question", "reasoning", "answer"]
By = str | re.Pattern[str] | Callable[[str], Iterable[tuple[int, int]]] | Sequence[tuple[int, int]]
"""How to split: a rule's name, a pattern of step starts, a function from text to character spans, or token spans."""

REGIONS: tuple[Region, ...] = ("question", "reasoning", "answer")


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens stand in the text.

    Attributes:
        text: the text, or the tokens one after another where there is none or the spans do not fit it.
        start, end: ``[T]`` characters of each token, never going back.
        seen: ``[T]`` first visible character of each token; -1 for a blank one.
    """

    text: str
    start: np.ndarray
    end: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[str], spans: Tensor, text: str) -> Places:
        try:
            spans = torch.as_tensor(spans).long()
        except (TypeError, ValueError, RuntimeError):
            spans = torch.empty(0)
        if not all(isinstance(token, str) for token in tokens):
            raise InvalidInputError(f"tokens: must be the text of each token, got {tokens!r:.80}; pass trace.tokens")
        if spans.shape != (len(tokens), 2) or len(tokens) == 0:
            raise InvalidInputError(
                f"spans: must be one (start, end) for each of at least one token, got shape {tuple(spans.shape)} for "
                f"{len(tokens)} tokens; pass the trace's own spans"
            )
        start, end = spans.cpu().numpy().T
        fits = bool(text) and bool((start >= 0).all() and (start <= end).all() and (end <= len(text)).all())
        if not fits or not (start < end).any():
            text, end = "".join(tokens), np.cumsum([len(token) for token in tokens])
            start = np.concatenate([[0], end[:-1]])
        start, end = np.maximum.accumulate(start), np.maximum.accumulate(end)
        pieces = [text[low:high] for low, high in zip(start.tolist(), end.tolist(), strict=True)]
        blanks = np.array([len(piece) - len(piece.lstrip()) for piece in pieces])
        return cls(text, start, end, np.where(blanks < np.array([len(p) for p in pieces]), start + blanks, -1))

    def text_of(self, low: int, high: int) -> str:
        """What tokens low to high say."""
        return self.text[int(self.start[low]) : int(self.end[high - 1])]

    def tokens_at(self, characters: Sequence[int], low: int, high: int) -> list[int]:
        """For each character the first of the tokens low to high that shows its first one there or later."""
        shown = low + np.flatnonzero(self.seen[low:high] >= 0)
        at = np.searchsorted(np.maximum.accumulate(self.seen[shown]), characters)
        return shown[at[(at > 0) & (at < shown.size)]].tolist()  # at 0 the run starts anyway


def region_of_tokens(places: Places, question: MaskLike, reasoning: MaskLike, answer: MaskLike) -> np.ndarray:
    """Region of each token, -1 for none; blank tokens outside the regions count to what stands before them."""
    num_tokens = places.seen.size
    label = np.full(num_tokens, -1)
    for number, (name, region) in enumerate(zip(REGIONS, (question, reasoning, answer), strict=True)):
        mask = read_mask(region, num_tokens, name).numpy()
        if (label[mask] >= 0).any():
            both = int(np.flatnonzero(mask & (label >= 0))[0])
            raise RegionError(
                f"{name}: regions must be disjoint, got token {both} in the {REGIONS[label[both]]} too; "
                "remove it from one of them"
            )
        label[mask] = number
    stray = (label < 0) & (places.seen < 0)
    return label[np.maximum.accumulate(np.where(stray, 0, np.arange(num_tokens)))]


def runs_of(label: np.ndarray) -> list[tuple[int, int]]:
    """Token ranges of one region each."""
    edges = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), label.size]
    return list(pairwise(edges))


def starts_by_rule(by: Any, places: Places, passages: Sequence[tuple[int, int]], region: str) -> tuple[list[int], str]:
    """First tokens of the steps inside the passages of one region, and the rule that found them."""
    texts = [places.text_of(low, high) for low, high in passages]
    plain = [text.translate(_LINE_BREAKS) for text in texts]
    rule = _auto_rule(plain) if isinstance(by, str) and by == "auto" else by
    if isinstance(rule, str) and rule in _RULES:
        found = [_RULES[rule](text) for text in plain]
    elif isinstance(rule, str | re.Pattern):
        pattern = _compiled(rule)
        found = [[_start_of(match) for match in pattern.finditer(text)] for text in texts]
    else:
        found = [[low for low, _ in _checked_spans(rule(text), len(text), "character")] for text in texts]
    must_match = region == "reasoning" and rule not in ("lines", "sentences")
    if must_match and not any(found) and any(text.strip() for text in texts):
        shown = "".join(texts).strip()
        raise InvalidInputError(
            f"by: {name_of(by)} must match in the reasoning, got no match in "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'!r}; 'auto', 'lines' and 'sentences' split any text"
        )
    starts: list[int] = []
    for (low, high), characters in zip(passages, found, strict=True):
        starts += places.tokens_at([int(places.start[low]) + at for at in characters], low, high)
    return starts, f"auto: {rule}" if isinstance(by, str) and by == "auto" else name_of(by)


def _start_of(match: re.Match[str]) -> int:
    """Where group 1 starts, or the match where there is no such group or it took no part."""
    group = min(match.re.groups, 1)
    return match.start(group if match.start(group) >= 0 else 0)


def name_of(by: Any) -> str:
    """The rule in words; a wrong one is refused here."""
    if isinstance(by, str) and (by in _RULES or by == "auto"):
        return by
    return (
        f"function {getattr(by, '__name__', type(by).__name__)}"
        if callable(by)
        else f"pattern {_compiled(by).pattern!r}"
    )


def _compiled(by: str | re.Pattern[str]) -> re.Pattern[str]:
    known = ["auto", *_RULES]
    if isinstance(by, str):
        meant = get_close_matches(by.casefold(), known, n=1, cutoff=0.8)
        if meant or not by:
            raise InvalidInputError(
                f"by: must be one of {', '.join(map(repr, known))}, a pattern, a function or token spans, got {by!r}; "
                + (f"did you mean {meant[0]!r}? For the word itself pass re.compile({by!r})" if meant else "try 'auto'")
            )
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise InvalidInputError(
            f"by: must be a regular expression or one of {', '.join(map(repr, known))}, got {by!r} with an error at "
            f"position {error.pos}: {error.msg}; escape literal text with re.escape"
        ) from error
    if isinstance(pattern.pattern, bytes):
        raise InvalidInputError(f"by: must be a pattern of text, got one of bytes, {by!r:.80}; compile a str")
    return pattern


def _checked_spans(spans: Any, length: int, unit: str) -> list[tuple[int, int]]:
    rule = f"by: must give {unit} spans (start, stop) within 0..{length}, in order and without overlap"
    values = spans.tolist() if hasattr(spans, "tolist") else spans
    try:
        pairs = [(low, high) for low, high in values]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{rule}, got {spans!r:.80}; return a list such as [(0, 12), (12, 30)]") from error
    reached = 0
    for pair in pairs:
        whole = all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in pair)
        if not whole or not reached <= pair[0] < pair[1] <= length:
            raise InvalidInputError(f"{rule}, got {pair} after {reached}; sort them, and make each at least 1 long")
        reached = pair[1]
    return pairs


def starts_of_token_spans(by: Any, label: np.ndarray, runs: Sequence[tuple[int, int]]) -> list[int]:
    """Step starts where token spans are given: the spans as they are, the rest by region."""
    if by is None or isinstance(by, int | float | bytes):
        raise InvalidInputError(
            f"by: must be a rule's name, a pattern, a function or token spans, got {by!r:.80}; 'auto' is a good start"
        )
    pairs = _checked_spans(by, label.size, "token")
    covered = np.zeros(label.size, dtype=bool)
    for low, high in pairs:
        mixed = np.unique(label[low:high][label[low:high] >= 0])
        if mixed.size > 1:
            names = " and ".join(REGIONS[number] for number in mixed)
            raise InvalidInputError(
                f"by: a step must lie in one region, got tokens ({low}, {high}) with {names}; cut it where they meet"
            )
        covered[low + 1 : high] = True
    ends = [edge for pair in pairs for edge in pair if edge < label.size]
    return [low for low, _ in runs if not covered[low]] + [int(edge) for edge in ends]


# The text a rule reads has one kind of line break. Every quantifier that could run away is possessive or bounded.
_LINE_BREAKS = str.maketrans(dict.fromkeys("\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\n"))
_MARKUP = r"[ \t>*_#-]*+"
_NUMBER = r"(?:\d{1,4}|one|two|three|four|five|six|seven|eight|nine|ten)"
_HEADING = re.compile(
    rf"(?:^|(?<=[.!?:;]\s)|(?<=[。！？；])){_MARKUP}(?:step[ \t]{{1,4}}{_NUMBER}(?=[ \t*_]{{0,4}}(?:[:.)–—-]|$))"  # noqa: RUF001
    r"|第\s?[\d一二三四五六七八九十]{1,4}\s?步)",
    re.IGNORECASE | re.MULTILINE,
)
_ITEM = re.compile(rf"^{_MARKUP}(?:\(?\d{{1,3}}(?:[.)](?=[\s*_])|、)|[①-⑳])", re.MULTILINE)
_LINE = re.compile(r"[^\n]+")
_SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]}*_$]*+(?=\s)|(?:[。！？｡؟।॥۔።။។։]|．(?!\d))++[”’»」』）】》)\]]*+"  # noqa: RUF001
)
_NO_SENTENCE_START = frozenset("=+-–−/<>≤≥×÷^|,;:&%)]}")  # noqa: RUF001
_NEVER_LAST = frozenset(["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "viz"])
_BEFORE_NUMBER = frozenset(["no", "nos", "eq", "eqs", "fig", "figs", "sec", "ch", "vol", "p", "pp"])
_INITIALS = re.compile(r"\b[A-Z]\.\s?[A-Z]$")
_MARKER = re.compile(r"[\W_]*(?:step\s+)?(?:\d+|[^\W\d_])", re.IGNORECASE)
_SEVERAL_LINES = 3  # of two lines the second is mostly "The answer is", and the first holds all the steps


def _auto_rule(texts: Sequence[str]) -> str:
    if sum(len(_markers(text)) for text in texts) >= 2:
        return "numbered"
    return "lines" if sum(len(_lines(text)) for text in texts) >= _SEVERAL_LINES else "sentences"


def _lines(text: str) -> list[int]:
    """Starts of the lines that have a letter or a digit: a lone bracket of a formula is no step."""
    return [line.start() for line in _LINE.finditer(text) if _says_something(line[0])]


def _markers(text: str) -> list[int]:
    """Starts of numbered steps: headings if there are at least two (lists inside them are detail), else items."""
    headings, items = ([match.start() for match in kind.finditer(text)] for kind in (_HEADING, _ITEM))
    return headings if len(headings) >= 2 else items or headings


def _numbered(text: str) -> list[int]:
    """Starts of numbered steps. Lines after the last that the longest step before it does not have are no part of it.

    "The answer is 7." below a list of one-line items is then a step of its own, and nothing says so but the lengths.
    """
    marks = _markers(text)
    lines = np.array(_lines(text))
    if len(marks) < 2:
        return marks
    more = [int(((lines > low) & (lines < high)).sum()) for low, high in pairwise(marks)]
    return marks + lines[lines > marks[-1]].tolist()[max(more) :]


def _sentences(text: str) -> list[int]:
    """Starts of sentences; a line break ends one too."""
    starts = []
    for line in _LINE.finditer(text):
        pieces = [line.start()]
        for end in _SENTENCE_END.finditer(text, *line.span()):
            if _ends_sentence(text, pieces[-1], end, line.end()):
                pieces.append(end.end())
        starts += [low for low, high in pairwise([*pieces, line.end()]) if _says_something(text[low:high])]
    return starts


def _ends_sentence(text: str, begin: int, end: re.Match[str], limit: int) -> bool:
    """Whether the stop ends the sentence that began at ``begin``. Looks no further than a word either way.

    A single capital reads as a name's initial only in a chain ("J. K."): "the answer is C." is far more frequent here.
    """
    stop, rest = re.match(r"[.…]*", end[0]), text[end.end() : min(limit, end.end() + 12)].lstrip()
    if not rest or end[0][0] not in ".!?…":
        return True
    if rest[0].islower() or rest[0] in _NO_SENTENCE_START or rest.startswith("* "):
        return False
    dots = stop[0] if stop else ""
    if dots != ".":
        return not (dots and rest[0].isdigit())  # "1, 2, ... 10" goes on, and so does a sum
    before = text[max(begin, end.start() - 40) : end.start()]
    word = (before.split() or [""])[-1].lstrip("([{\"'“‘*_").casefold()  # noqa: RUF001
    numbered = word in _BEFORE_NUMBER and (rest[0].isdigit() or rest[0] == "(")
    initial = _INITIALS.search(before) or (len(word) == 1 and re.match(r"[A-Z]\.", rest))
    return not (word in _NEVER_LAST or numbered or initial or _MARKER.fullmatch(before))


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


_RULES: dict[str, Callable[[str], list[int]]] = {"lines": _lines, "sentences": _sentences, "numbered": _numbered}
