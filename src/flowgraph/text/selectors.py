"""Selectors that find tokens in a prompt or a response: texts, patterns, statements, spans, chat roles, indices.

A selector that searches the response reads its final part: what stands after the thinking, or in the final channel
(:mod:`flowgraph.text.final_part`). With ``thinking=True`` it reads the complete response. Positions (``Span``,
``Tokens``) lie anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from typing import Literal as OneOf

import numpy as np
import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import Mask, MaskLike, read_mask
from flowgraph.text.encoding import EncodedText
from flowgraph.text.final_part import FinalPart, final_part, response_opening
from flowgraph.text.literals import literal_spans, longer_word, occurrences
from flowgraph.text.spans import Offsets, covers
from flowgraph.text.statements import RULES, last_code, last_line, last_sentence, statements_in

Part = OneOf["prompt", "response"]
# The argument that a selector of each part was given as, for messages.
ARGUMENT: dict[Part, str] = {"prompt": "question", "response": "answer"}
# Signs that text rarely has and regular expressions often: such a string is not searched as literal text.
_MEANT_AS_REGEX = re.compile(r"\\|\[|\||\.[*+?]|\(\?|[)\]][*+?]|\A\^|\{\d")
# Strings that name a role even where no message of the prompt has it, so that the error names the role.
ROLES = frozenset({"assistant", "developer", "function", "model", "system", "tool", "user"})


@runtime_checkable
class Selector(Protocol):
    """The interface of selectors: find tokens of one part of an encoded text. Any class with this method is one."""

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Return a ``[T]`` bool mask of the tokens found, all False where nothing was found."""
        ...


@runtime_checkable
class Explains(Protocol):
    """The interface of selectors that can say why they found nothing."""

    def reason(self, encoded: EncodedText, part: Part) -> str:
        """Return what stands in the text instead, in words; "" where there is nothing to say."""
        ...


@dataclass(frozen=True)
class Regex:
    r"""The text that a regular expression matches.

    Matches without a visible character are ignored, so ``\d*`` finds the last number and not the empty end.

    Attributes:
        pattern: as for :func:`re.finditer`; it sees the part alone, without the special tokens that end it.
        flags: as for :func:`re.compile`.
        group: number or name of the group to take; None: group 1 if the pattern has one, else the complete match.
        occurrence: which match counts; "all": every one.
        thinking: also search the thinking of a response.

    Raises:
        InvalidInputError: the pattern does not compile, the group does not exist, an unknown occurrence.
    """

    pattern: str
    flags: int = 0
    group: int | str | None = None
    occurrence: OneOf["last", "first", "all"] = "last"
    thinking: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse patterns, groups and occurrences that do not exist."""
        try:
            compiled = re.compile(self.pattern, self.flags)
        except re.error as error:
            raise InvalidInputError(
                f"pattern: must be a regular expression, got {self.pattern!r} with an error at position "
                f"{error.pos}: {error.msg}; escape literal text with re.escape, or pass it as selectors.Literal"
            ) from error
        groups = [None, *range(compiled.groups + 1), *compiled.groupindex]
        if self.group not in groups:
            raise InvalidInputError(
                f"group: must be a group of the pattern {self.pattern!r}, got {self.group!r}; "
                f"choose one of {groups[1:]}"
            )
        _check_occurrence(self.occurrence, "narrow the pattern")

    def __repr__(self) -> str:
        """Show all options but the default place of the search."""
        shown = f"pattern={self.pattern!r}, flags={self.flags}, group={self.group!r}, occurrence={self.occurrence!r}"
        return f"Regex({shown}, thinking=True)" if self.thinking else f"Regex({shown})"

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of the chosen matches."""
        low, high = _window(encoded, part, self.thinking)
        found = _of_occurrence(self._matches(encoded.text[low:high]), self.occurrence)
        return _tokens_in(encoded, _moved(found, low), part)

    def reason(self, encoded: EncodedText, part: Part) -> str:
        """Return that the pattern stands in the text as it is, or matches in the thinking."""
        low, high = _window(encoded, part, self.thinking)
        # Signs such as "(" or "." have a meaning in an expression, so the text itself is not matched.
        if re.escape(self.pattern) != self.pattern and self.pattern in encoded.text[low:high]:
            return (
                f"the text holds {self.pattern!r} literally, where a regular expression gives its signs a meaning; "
                f"pass selectors.Literal({self.pattern!r}), or escape it with re.escape"
            )
        low, high = _window(encoded, part, thinking=True)
        if self._matches(encoded.text[low:high]):
            return "it matches in the thinking alone; pass selectors.Regex(..., thinking=True) to search there"
        return ""

    def _matches(self, text: str) -> list[Offsets]:
        """Find all matches with a visible character."""
        compiled = re.compile(self.pattern, self.flags)
        group = self.group
        if group is None:
            group = min(compiled.groups, 1)
        found = []
        for match in compiled.finditer(text):
            # A group that took no part in the match is None.
            matched = match[group] or ""
            if matched.strip():
                found.append(match.span(group))
        return found


@dataclass(frozen=True)
class Literal:
    """A text as it is, never read as a regular expression.

    It must stand as complete words or as a complete number: 7 is not found in 17, 7.5 or 1,007. A unit may follow a
    number ("7km"), and scripts without spaces need no border ("是7个"). A number that does not occur as written is
    found by its value: 1234 in "$1,234". For a part of a word use :class:`Regex` with :func:`re.escape`.

    Attributes:
        text: the text, or a number.
        occurrence: which place counts; "all": every one.
        thinking: also search the thinking of a response.

    Raises:
        InvalidInputError: no text, or one without a visible character; an unknown occurrence.
    """

    text: str | int | float
    occurrence: OneOf["last", "first", "all"] = "last"
    thinking: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no text, and write a number as text."""
        is_text = isinstance(self.text, str | int | float) and not isinstance(self.text, bool)
        if not is_text or not str(self.text).strip():
            raise InvalidInputError(
                f"text: must be text with a visible character, or a number, got {self.text!r:.80}; "
                "pass what stands in the response"
            )
        object.__setattr__(self, "text", str(self.text).strip())
        _check_occurrence(self.occurrence, "use a Span")

    def __repr__(self) -> str:
        """Show the text, and options that are not the default."""
        shown = f"text={self.text!r}"
        if self.occurrence != "last":
            shown += f", occurrence={self.occurrence!r}"
        return f"Literal({shown}, thinking=True)" if self.thinking else f"Literal({shown})"

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of the chosen places."""
        low, high = _window(encoded, part, self.thinking)
        found = _of_occurrence(literal_spans(encoded.text[low:high], str(self.text)), self.occurrence)
        return _tokens_in(encoded, _moved(found, low), part)

    def reason(self, encoded: EncodedText, part: Part) -> str:
        """Return the longer word that holds the text, or that it stands in the thinking."""
        low, high = _window(encoded, part, self.thinking)
        text = encoded.text[low:high]
        for span in occurrences(text, str(self.text)):
            return (
                f"it stands there as a part of {longer_word(text, span)!r} alone; give the complete word or number, "
                "or match the part with selectors.Regex"
            )
        low, high = _window(encoded, part, thinking=True)
        if literal_spans(encoded.text[low:high], str(self.text)):
            return "it stands in the thinking alone; pass selectors.Literal(..., thinking=True) to search there"
        return ""


@dataclass(frozen=True)
class Stated:
    """The last answer that the text states, in one of some forms.

    Attributes:
        rules: names of the forms, as for :func:`flowgraph.stated_answers`; of several the last statement counts.
        thinking: also search the thinking of a response.

    Raises:
        InvalidInputError: an unknown form.
    """

    rules: tuple[str, ...] = RULES
    thinking: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse forms that do not exist."""
        for rule in self.rules:
            if rule not in RULES:
                raise InvalidInputError(f"rules: must be among {', '.join(RULES)}, got {rule!r}; choose some of them")

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of the statement."""
        low, high = _window(encoded, part, self.thinking)
        stated = statements_in(encoded.text[low:high], self.rules)
        found = [(one.start, one.end) for one in stated[-1:]]
        return _tokens_in(encoded, _moved(found, low), part)


@dataclass(frozen=True)
class Boxed:
    r"""The content of the last ``\boxed{...}``, with braces balanced; open or empty ones are ignored.

    Attributes:
        thinking: also search the thinking of a response.
    """

    thinking: bool = field(default=False, kw_only=True, repr=False)

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens between the braces."""
        return Stated(("boxed",), thinking=self.thinking).select(encoded, part)


@dataclass(frozen=True)
class CodeBlock:
    """The content of the fenced block of code that ends the text.

    Attributes:
        thinking: also search the thinking of a response.
    """

    thinking: bool = field(default=False, kw_only=True, repr=False)

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens between the fences."""
        low, high = _window(encoded, part, self.thinking)
        return _tokens_in(encoded, _moved([last_code(encoded.text[low:high])], low), part)


@dataclass(frozen=True)
class LastLine:
    """The last line that is not blank.

    Attributes:
        thinking: also search the thinking of a response.
    """

    thinking: bool = field(default=False, kw_only=True, repr=False)

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of that line."""
        low, high = _window(encoded, part, self.thinking)
        return _tokens_in(encoded, _moved([last_line(encoded.text[low:high])], low), part)


@dataclass(frozen=True)
class LastSentence:
    """The last sentence of the last line; lines of marks alone and courtesies ("I hope this helps!") are passed over.

    Attributes:
        thinking: also search the thinking of a response.
    """

    thinking: bool = field(default=False, kw_only=True, repr=False)

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of that sentence."""
        low, high = _window(encoded, part, self.thinking)
        return _tokens_in(encoded, _moved([last_sentence(encoded.text[low:high])], low), part)


@dataclass(frozen=True)
class AllOf:
    """The tokens of several selectors together, each of which must find some.

    Attributes:
        selectors: the selectors; a string stands for the :class:`Literal` of it.

    Raises:
        InvalidInputError: nothing, or something that is no selector.
    """

    selectors: Sequence[Selector | str]

    def __post_init__(self) -> None:
        """Make literal selectors of strings, and refuse what is no selector."""
        given = self.selectors
        members: list[Any] = []
        # A single string is a sequence of its letters, not a list of texts; it is refused below.
        if not isinstance(given, str):
            for one in given:
                members.append(Literal(one) if isinstance(one, str) else one)
        if not members or not all(isinstance(one, Selector) and not isinstance(one, Tensor) for one in members):
            raise InvalidInputError(
                f"selectors: must be a list of selectors or texts, got {given!r:.80}; "
                "pass for example AllOf(['3', Regex(r'(\\d+) apples')])"
            )
        object.__setattr__(self, "selectors", tuple(members))

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Select the tokens of all; none where one of them finds nothing."""
        masks = [one.select(encoded, part) for one in self._members()]
        together = torch.zeros(encoded.num_tokens, dtype=torch.bool)
        if all(bool(mask.any()) for mask in masks):
            for mask in masks:
                together |= mask
        return together

    def reason(self, encoded: EncodedText, part: Part) -> str:
        """Return which selector found nothing."""
        for one in self._members():
            if not bool(one.select(encoded, part).any()):
                why = one.reason(encoded, part) if isinstance(one, Explains) else ""
                return f"{one!r} found nothing" + (f": {why}" if why else "; leave it out, or correct it")
        return ""

    def _members(self) -> list[Selector]:
        """List the selectors; the constructor has made selectors of all strings."""
        return [one for one in self.selectors if not isinstance(one, str)]


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
        # A position is meant as it is, also inside the thinking.
        low, high = _window(encoded, part, thinking=True)
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


# The forms of a stated answer by themselves.
NUMBER_SIGN = Stated(("hash",))
TAG = Stated(("tag",))
JSON = Stated(("json",))
PHRASE = Stated(("phrase",))
CHOICE = Stated(("choice",))
AUTO_ANSWER: dict[str, Selector] = {
    "Boxed()": Boxed(),
    "NUMBER_SIGN": NUMBER_SIGN,
    "TAG": TAG,
    "JSON": JSON,
    "PHRASE": PHRASE,
    "CHOICE": CHOICE,
    "CodeBlock()": CodeBlock(),
    "LastSentence()": LastSentence(),
}
"""The selectors of the automatic search for an answer. Of the first six the one that finds the last statement is
chosen; the others follow in this order. The keys are the values' names in this module, which :class:`Regions` records
as the choice."""

Question = (
    str
    | Selector
    | tuple[int, int | None]
    | Sequence[tuple[int, int | None]]
    | Sequence[int]
    | Tensor
    | np.ndarray
    | None
)
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
    # A name of the prompt or of a role, else a regular expression.
    if isinstance(choice, str):
        roles = ROLES.union(span.role for span in encoded.roles)
        if part == "prompt" and choice == "prompt":
            return Prompt()
        if part == "prompt" and choice in roles:
            return Role(choice)
        return Regex(choice)
    # Pairs of characters, one or several; an open start is the start of the part.
    if _is_pair(choice):
        start, end = choice  # type: ignore[misc]
        return Span(start or 0, end)  # type: ignore[arg-type]
    if isinstance(choice, list) and choice and all(_is_pair(pair) for pair in choice):
        return AllOf([Span(start or 0, end) for start, end in choice])  # type: ignore[misc]
    # Indices or a mask, also from numpy.
    values: Any = choice.tolist() if hasattr(choice, "tolist") else choice  # type: ignore[union-attr]
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        return Tokens(values)
    raise InvalidInputError(
        f"{ARGUMENT[part]}: must be a selector, a string, (start, end) characters, token indices or a bool mask, "
        f"got {choice!r:.80}; see flowgraph.find_regions"
    )


def selectors_for(choice: Question, part: Part, encoded: EncodedText) -> list[Selector]:
    """List the selectors that a choice stands for; the first that finds a token counts.

    A string is searched as literal text first, then as a regular expression. A string with signs that only a
    regular expression has (a backslash, brackets, ``.*``, ``|``) is one.

    Raises:
        InvalidInputError: as :func:`as_selector`.
    """
    selector = as_selector(choice, part, encoded)
    is_text = isinstance(choice, str) and isinstance(selector, Regex) and bool(choice.strip())
    if is_text and not _MEANT_AS_REGEX.search(str(choice)):
        return [Literal(str(choice)), selector]
    return [selector]


def part_mask(encoded: EncodedText, part: Part) -> Mask:
    """Mark all tokens of the prompt or of the response, special ones included."""
    in_prompt = torch.arange(encoded.num_tokens) < encoded.prompt_length
    return in_prompt if part == "prompt" else ~in_prompt


def final_part_of(encoded: EncodedText) -> FinalPart:
    """Find the final part of the response, in characters of the response without its special ending."""
    return final_part(encoded.response_text, opening=response_opening(encoded))


def _is_pair(choice: object) -> bool:
    """Return whether a choice is a pair of characters (start, end)."""
    return isinstance(choice, tuple) and len(choice) == 2 and all(isinstance(end, int | None) for end in choice)


def _check_occurrence(occurrence: str, remedy: str) -> None:
    """Refuse an occurrence that does not exist."""
    if occurrence not in ("last", "first", "all"):
        raise InvalidInputError(
            f"occurrence: must be 'last', 'first' or 'all', got {occurrence!r}; for another match {remedy}"
        )


def _of_occurrence(found: Sequence[Offsets], occurrence: str) -> Sequence[Offsets]:
    """Choose the last, the first or all of the places found."""
    if occurrence == "all":
        return found
    return found[:1] if occurrence == "first" else found[-1:]


def _moved(found: Sequence[Offsets | None], shift: int) -> list[Offsets]:
    """Turn places in a part into places in the text; None is left out."""
    return [(shift + place[0], shift + place[1]) for place in found if place is not None]


def _window(encoded: EncodedText, part: Part, thinking: bool) -> Offsets:
    """Return the range of characters to search: the prompt, or the final part of the response.

    Args:
        encoded: the text.
        part: the part to search.
        thinking: take the complete response, up to its special ending.
    """
    if part == "prompt":
        return 0, encoded.response_start
    if thinking:
        return encoded.response_start, encoded.response_end
    final = final_part_of(encoded)
    return encoded.response_start + final.start, encoded.response_start + final.end


def _tokens_in(encoded: EncodedText, selected: Sequence[Offsets], part: Part) -> Mask:
    """Mark the tokens of a part with a visible character in a selected range, except special and template ones."""
    is_covered = covers(encoded.spans, encoded.text, selected)
    return is_covered & part_mask(encoded, part) & ~encoded.special
