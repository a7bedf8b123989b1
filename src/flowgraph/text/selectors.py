"""Selectors that find tokens in a prompt or a response: patterns, spans, chat roles, indices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import Mask, MaskLike, read_mask
from flowgraph.text.encoding import EncodedText
from flowgraph.text.spans import Offsets, covers

Part = Literal["prompt", "response"]
# The argument that a selector of each part was given as, for messages.
ARGUMENT: dict[Part, str] = {"prompt": "question", "response": "answer"}
# Strings that name a role even where no message of the prompt has it, so that the error names the role.
ROLES = frozenset({"assistant", "developer", "function", "model", "system", "tool", "user"})


@runtime_checkable
class Selector(Protocol):
    """The interface of selectors: find tokens of one part of an encoded text. Any class with this method is one."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Return a ``[T]`` bool mask of the tokens found, all False where nothing was found."""
        ...


@dataclass(frozen=True)
class Regex:
    r"""The text that a regular expression matches.

    Matches without a visible character are ignored, so ``\d*`` finds the last number and not the empty end.

    Attributes:
        pattern: as for :func:`re.finditer`; it sees the part alone, without the special tokens that end it.
        flags: as for :func:`re.compile`.
        group: number or name of the group to take; None: group 1 if the pattern has one, else the complete match.
        occurrence: which match counts.

    Raises:
        InvalidInputError: the pattern does not compile, the group does not exist, an unknown occurrence.
    """

    pattern: str
    flags: int = 0
    group: int | str | None = None
    occurrence: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        """Refuse patterns, groups and occurrences that do not exist."""
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
        """Select the tokens of the chosen match."""
        low, high = _window(encoded, part)
        compiled = re.compile(self.pattern, self.flags)
        group = self.group
        if group is None:
            group = min(compiled.groups, 1)
        chosen: list[Offsets] = []
        for match in compiled.finditer(encoded.text[low:high]):
            # A group that took no part in the match is None.
            matched = match[group] or ""
            if not matched.strip():
                continue
            chosen = [(low + match.start(group), low + match.end(group))]
            if self.occurrence == "first":
                break
        return _tokens_in(encoded, chosen, part)


@dataclass(frozen=True)
class Boxed:
    r"""The content of the last ``\boxed{...}``, with braces balanced; open or empty ones are ignored."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens between the braces."""
        low, high = _window(encoded, part)
        text = encoded.text[low:high]
        last: Offsets | None = None
        # Each open brace: where its content starts, and whether it opened a \boxed. The stack makes this one pass,
        # so the cost stays linear for a response that repeats "\boxed{" many times.
        open_braces: list[tuple[int, bool]] = []
        for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
            symbol = match[0]
            # An escaped brace, "\{", does not open anything.
            if symbol.endswith("{") and symbol != r"\{":
                is_boxed = symbol != "{"
                open_braces.append((match.end(), is_boxed))
            elif symbol == "}" and open_braces:
                start, is_boxed = open_braces.pop()
                end = match.start()
                # Boxes close from the inside out; the one that opened last counts.
                is_later = last is None or start > last[0]
                if is_boxed and is_later and text[start:end].strip():
                    last = (start, end)
        if last is None:
            return _tokens_in(encoded, [], part)
        start, end = last
        return _tokens_in(encoded, [(low + start, low + end)], part)


@dataclass(frozen=True)
class LastLine:
    """The last line that is not blank."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of that line."""
        low, high = _window(encoded, part)
        end = low + len(encoded.text[low:high].rstrip())
        # rfind returns -1 without a line break; the line then starts with the part.
        line_break = max(encoded.text.rfind("\r", low, end), encoded.text.rfind("\n", low, end))
        start = max(line_break + 1, low)
        return _tokens_in(encoded, [(start, end)], part)


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of the response or, for a question, of the prompt.

    Attributes:
        start: counted from the end if negative, as in a slice; trailing special tokens are not counted.
        end: the same; None is the end of the part.
    """

    start: int
    end: int | None = None

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens with a visible character in the span."""
        low, high = _window(encoded, part)
        length = high - low
        start = self.start
        end = length if self.end is None else self.end
        if start < 0:
            start += length
        if end < 0:
            end += length
        if not 0 <= start < end <= length:
            raise RegionError(
                f"{ARGUMENT[part]}: a span must hold characters of the {part}, which has {length}, "
                f"got ({self.start}, {self.end}); pass (start, end) with start < end"
            )
        return _tokens_in(encoded, [(low + start, low + end)], part)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens by position.

    Attributes:
        which: indices counted from the start of the prompt, a slice of them, or a bool mask over all tokens.
    """

    which: MaskLike

    def __repr__(self) -> str:
        """Show up to eight indices, and a mask as its number of tokens."""
        which = self.which
        if isinstance(which, slice):
            return f"Tokens({which})"
        values = torch.as_tensor(which)
        if values.dtype == torch.bool:
            return f"Tokens(<{int(values.sum())} tokens>)"
        if values.numel() > 8:
            return f"Tokens(<{values.numel()} tokens>)"
        return f"Tokens({values.tolist()})"

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select these tokens, which must lie in the part, except special ones."""
        mask = read_mask(self.which, encoded.num_tokens, ARGUMENT[part])
        in_part = part_mask(encoded, part)
        outside = mask & ~in_part
        if bool(outside.any()):
            first, last = in_part.nonzero()[[0, -1], 0].tolist()
            raise RegionError(
                f"{ARGUMENT[part]}: tokens must lie in the {part}, {first}..{last}, got token "
                f"{int(outside.nonzero()[0])}; for any other choice use Regions.from_masks"
            )
        return mask & ~encoded.special


@dataclass(frozen=True)
class Role:
    """The content of the last chat message with a role.

    Attributes:
        role: the role, such as ``"user"``.
    """

    role: str

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of the message, without the template around it."""
        messages = [span.message for span in encoded.roles if span.role == self.role]
        if not messages:
            # The roles that exist, each once, in the order of the text.
            roles = list(dict.fromkeys(span.role for span in encoded.roles))
            got = f"messages of {', '.join(map(repr, roles))}" if roles else "a prompt without chat messages"
            raise RegionError(
                f"{ARGUMENT[part]}: {self!r} needs a chat message of that role, got {got}; "
                "pass Prompt(), a Regex or a Span of the prompt instead"
            )
        last_message = max(messages)
        contents = [(span.start, span.end) for span in encoded.roles if span.message == last_message]
        return _tokens_in(encoded, contents, part)


@dataclass(frozen=True)
class Prompt:
    """The complete prompt, without special tokens and chat template."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of the prompt."""
        return _tokens_in(encoded, [(0, encoded.response_start)], part)


# Marks around a value that are not part of it: markdown, quotes, a formula's dollar signs.
_MARKS = r"*_\"'`$"
# A sentence ends at a full stop before a space, except after the abbreviations of titles.
_SENTENCE_END = rf"(?<=[.!?])(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bSt\.)(?<!\bMrs\.)[{_MARKS})]*\s"
# A value: up to the end of its line or sentence, without marks and punctuation around it. The limit of 300
# characters keeps the cost linear for a response that repeats itself on one long line.
_VALUE = (
    rf"(?=[\s:{_MARKS}]*(?![.,;!?]+(?:\s|\Z))([^\s:{_MARKS}].{{0,300}}?)"
    rf"[\s.,;:!?{_MARKS}]*(?:[\r\n]|\Z|{_SENTENCE_END}))"
)
# "#### 42", as in GSM8K: a number at the end of a line, or other text at the end of the response.
NUMBER_SIGN = Regex(r"(?m)(?<!#)####[ \t]*(-?\$?\d(?:[\d,./ ]*\d)?%?(?=[.\s]*$)|[^\s#](?:.{0,300}\S)?(?=\s*\Z))")
# "<answer>42</answer>": the innermost tags.
TAG = Regex(r"(?is)<answer>((?:(?!<answer>).)*?)</answer>")
# "The answer is 42", "Answer: 42", or "Answer" as a heading above the value.
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
"""The selectors of the automatic search for an answer, in this order; the first that finds a token is chosen.
The keys are the values' names in this module, which :class:`Regions` records as the choice."""

Question = str | Selector | tuple[int, int | None] | Sequence[int] | Tensor | np.ndarray | None
Answer = Question


def as_selector(choice: Question, part: Part, encoded: EncodedText) -> Selector:
    """Convert a selector, or the short form of one, to a selector.

    Args:
        choice: a selector, a string, ``(start, end)``, indices or a mask; see :func:`flowgraph.find_regions`.
        part: the part of the text that it selects from.
        encoded: the text, whose roles a string may name.

    Raises:
        InvalidInputError: any other value, or a pattern that does not compile.
    """
    # Tensors first, because a tensor has a method named select too.
    if isinstance(choice, Tensor):
        return Tokens(choice)
    if isinstance(choice, Selector):
        return choice
    if isinstance(choice, str):
        roles = ROLES.union(span.role for span in encoded.roles)
        if part == "prompt" and choice == "prompt":
            return Prompt()
        if part == "prompt" and choice in roles:
            return Role(choice)
        return Regex(choice)
    if isinstance(choice, tuple) and len(choice) == 2 and all(isinstance(end, int | None) for end in choice):
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
    """Mark all tokens of the prompt or of the response, special ones included."""
    in_prompt = torch.arange(encoded.num_tokens) < encoded.prompt_length
    return in_prompt if part == "prompt" else ~in_prompt


def _window(encoded: EncodedText, part: Part) -> Offsets:
    """Return the range of characters of the prompt, or of the response up to its special ending."""
    if part == "prompt":
        return 0, encoded.response_start
    return encoded.response_start, encoded.response_end


def _tokens_in(encoded: EncodedText, selected: Sequence[Offsets], part: Part) -> Mask:
    """Mark the tokens of a part with a visible character in a selected range, except special and template ones."""
    is_covered = covers(encoded.spans, encoded.text, selected)
    return is_covered & part_mask(encoded, part) & ~encoded.special
