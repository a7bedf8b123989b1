"""What finds tokens in a prompt or a response, in a user's own words: patterns, spans, roles, indices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import Mask, MaskLike, read_mask
from flowgraph.text.encoding import EncodedText
from flowgraph.text.spans import Offsets, covers

Part = Literal["prompt", "response"]
ARGUMENT: dict[Part, str] = {"prompt": "question", "response": "answer"}
ROLES = frozenset({"assistant", "developer", "function", "model", "system", "tool", "user"})


@runtime_checkable
class Selector(Protocol):
    """Anything that finds tokens of one part of an encoded text; write your own with this one method."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """``[T]`` bool mask of the tokens found, all False where nothing was found."""
        ...


@dataclass(frozen=True)
class Regex:
    r"""The text that a regular expression matches.

    Matches of no visible character are passed over, so ``\d*`` finds the last number and not the empty end.

    Attributes:
        pattern: as for :func:`re.finditer`; it sees the part alone, without the special tokens that end it.
        flags: as for :func:`re.compile`.
        group: number or name of the group to take; None: group 1 if the pattern has one, else the whole match.
        occurrence: which match counts.

    Raises:
        InvalidInputError: the pattern does not compile, the group does not exist, an unknown occurrence.
    """

    pattern: str
    flags: int = 0
    group: int | str | None = None
    occurrence: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        """Reject what could never match."""
        try:
            compiled = re.compile(self.pattern, self.flags)
        except re.error as error:
            raise InvalidInputError(
                f"pattern: must be a regular expression, got {self.pattern!r} with an error at position "
                f"{error.pos}: {error.msg}; escape literal text with re.escape"
            ) from error
        groups = [None, *range(compiled.groups + 1), *compiled.groupindex]
        if self.group not in groups:
            raise InvalidInputError(
                f"group: must be a group of the pattern {self.pattern!r}, got {self.group!r}; "
                f"choose one of {groups[1:]}"
            )
        if self.occurrence not in ("last", "first"):
            raise InvalidInputError(
                f"occurrence: must be 'last' or 'first', got {self.occurrence!r}; for another match narrow the pattern"
            )

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens of the chosen match."""
        low, high = _window(encoded, part)
        compiled = re.compile(self.pattern, self.flags)
        group = self.group if self.group is not None else min(compiled.groups, 1)
        found: list[Offsets] = []
        for match in compiled.finditer(encoded.text[low:high]):
            if (match[group] or "").strip():
                found = [(low + match.start(group), low + match.end(group))]
                if self.occurrence == "first":
                    break
        return _tokens_in(encoded, found, part)


@dataclass(frozen=True)
class Boxed:
    r"""The content of the last ``\boxed{...}``, with braces balanced; one left open or empty does not count."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens between the braces."""
        low, high = _window(encoded, part)
        text = encoded.text[low:high]
        best: list[Offsets] = []
        opened: list[tuple[int, bool]] = []
        # One pass with a stack: a response that repeats "\boxed{" for ever stays linear. "\{" is no brace.
        for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
            if match[0].endswith("{") and match[0] != r"\{":
                opened.append((match.end(), match[0] != "{"))
            elif match[0] == "}" and opened:
                start, boxed = opened.pop()
                inner = text[start : match.start()]
                if boxed and inner.strip() and (not best or low + start > best[0][0]):
                    best = [(low + start, low + match.start())]
        return _tokens_in(encoded, best, part)


@dataclass(frozen=True)
class LastLine:
    """The last line that is not blank."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens of that line."""
        low, high = _window(encoded, part)
        end = low + len(encoded.text[low:high].rstrip())
        start = max(encoded.text.rfind(mark, low, end) for mark in "\r\n") + 1
        return _tokens_in(encoded, [(max(start, low), end)], part)


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of the response or, for a question, of the prompt.

    Attributes:
        start: negative: counted from the end, as in a slice; trailing special tokens are not counted.
        end: the same; None: to the end.
    """

    start: int
    end: int | None = None

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens with a visible character in the span."""
        low, high = _window(encoded, part)
        length = high - low
        start = self.start + length * (self.start < 0)
        end = length if self.end is None else self.end + length * (self.end < 0)
        if not 0 <= start < end <= length:
            raise RegionError(
                f"{ARGUMENT[part]}: a span must hold characters of the {part}, which has {length}, "
                f"got ({self.start}, {self.end}); pass (start, end) with start < end"
            )
        return _tokens_in(encoded, [(low + start, low + end)], part)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token indices counted from the start of the prompt, a slice of them, or a bool mask over all tokens."""

    which: MaskLike

    def __repr__(self) -> str:
        """Short: a mask as its number of tokens."""
        which = self.which
        if isinstance(which, slice):
            return f"Tokens({which})"
        values = torch.as_tensor(which)
        count = int(values.sum()) if values.dtype == torch.bool else values.numel()
        return (
            f"Tokens({values.tolist()})" if count <= 8 and values.dtype != torch.bool else f"Tokens(<{count} tokens>)"
        )

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """The tokens named, which must lie in the part; special ones are left out."""
        mask = read_mask(self.which, encoded.num_tokens, ARGUMENT[part])
        inner = part_mask(encoded, part)
        outside = mask & ~inner
        if bool(outside.any()):
            first, last = inner.nonzero()[[0, -1], 0].tolist()
            raise RegionError(
                f"{ARGUMENT[part]}: tokens must lie in the {part}, {first}..{last}, got token "
                f"{int(outside.nonzero()[0])}; for any other choice use Regions.from_masks"
            )
        return mask & ~encoded.special


@dataclass(frozen=True)
class Role:
    """The content of the last chat message with this role."""

    role: str

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens of the message, without the template around it."""
        known = dict.fromkeys(role.role for role in encoded.roles)
        if self.role not in known:
            got = f"messages of {', '.join(map(repr, known))}" if known else "a prompt without chat messages"
            raise RegionError(
                f"{ARGUMENT[part]}: {self!r} needs a chat message of that role, got {got}; "
                "pass Prompt(), a Regex or a Span of the prompt instead"
            )
        last = max(role.message for role in encoded.roles if role.role == self.role)
        return _tokens_in(encoded, [(r.start, r.end) for r in encoded.roles if r.message == last], part)


@dataclass(frozen=True)
class Prompt:
    """The whole prompt, without special tokens and chat template."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens of the prompt."""
        return _tokens_in(encoded, [(0, encoded.response_start)], part)


# What a value has around it and does not own: markdown, quotes, a formula's dollar signs.
_MARKS = r"*_\"'`$"
# A sentence is over at a full stop before a space, but for the titles that write one.
_SENTENCE_END = rf"(?<=[.!?])(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bSt\.)(?<!\bMrs\.)[{_MARKS})]*\s"
# 300 characters at most: a model that repeats itself on one endless line must not cost its square.
_VALUE = (
    rf"(?=[\s:{_MARKS}]*(?![.,;!?]+(?:\s|\Z))([^\s:{_MARKS}].{{0,300}}?)"
    rf"[\s.,;:!?{_MARKS}]*(?:[\r\n]|\Z|{_SENTENCE_END}))"
)
NUMBER_SIGN = Regex(r"(?m)(?<!#)####[ \t]*(-?\$?\d(?:[\d,./ ]*\d)?%?(?=[.\s]*$)|[^\s#](?:.{0,300}\S)?(?=\s*\Z))")
TAG = Regex(r"(?is)<answer>((?:(?!<answer>).)*?)</answer>")
PHRASE = Regex(
    rf"(?im)(?:\banswer\b[ \t{_MARKS}]*(?:(?:to|for)\b[^\n.:=]{{1,80}}?\s)?(?:is\b|are\b|was\b|[:=])"
    rf"|^[ \t#{_MARKS}]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t{_MARKS}]*\r?\n){_VALUE}"
)
AUTO_ANSWER: dict[str, Selector] = {
    "Boxed()": Boxed(),
    "NUMBER_SIGN": NUMBER_SIGN,
    "TAG": TAG,
    "PHRASE": PHRASE,
    "LastLine()": LastLine(),
}
"""What an answer is looked for as, in this order, when nobody says; the first that finds something wins.
The keys are the values' names in this module, which is how regions report the choice."""

Question = str | Selector | tuple[int, int | None] | Sequence[int] | Tensor | None
Answer = Question


def as_selector(choice: Question, part: Part, encoded: EncodedText) -> Selector:
    """A selector, from one or from the short form of one."""
    # Tensors first: they have a method named select, too.
    if isinstance(choice, Tensor):
        return Tokens(choice)
    if isinstance(choice, Selector):
        return choice
    if isinstance(choice, str):
        if part == "prompt" and choice == "prompt":
            return Prompt()
        roles = ROLES.union(role.role for role in encoded.roles)
        return Role(choice) if part == "prompt" and choice in roles else Regex(choice)
    if isinstance(choice, tuple) and len(choice) == 2 and all(isinstance(c, int | None) for c in choice):
        start, end = choice
        return Span(start or 0, end)
    values = choice.tolist() if hasattr(choice, "tolist") else choice  # type: ignore[union-attr]
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        return Tokens(values)
    raise InvalidInputError(
        f"{ARGUMENT[part]}: must be a selector, a string, (start, end) characters, token indices or a bool mask, "
        f"got {choice!r:.80}; see flowgraph.find_regions"
    )


def part_mask(encoded: EncodedText, part: Part) -> Mask:
    """All tokens of the prompt or of the response, special ones included."""
    in_prompt = torch.arange(encoded.num_tokens) < encoded.prompt_length
    return in_prompt if part == "prompt" else ~in_prompt


def _window(encoded: EncodedText, part: Part) -> Offsets:
    """First and last (exclusive) character of the prompt, or of the response up to its special ending."""
    return (0, encoded.response_start) if part == "prompt" else (encoded.response_start, encoded.response_end)


def _tokens_in(encoded: EncodedText, selected: Sequence[Offsets], part: Part) -> Mask:
    """Tokens of a part with a visible character in a selected range, special and template ones left out."""
    return covers(encoded.spans, encoded.text, selected) & part_mask(encoded, part) & ~encoded.special
