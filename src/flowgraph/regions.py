r"""Question, reasoning and answer as token masks, selected from the text in a user's own words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from flowgraph.errors import InvalidInputError, NoAnswerError, RegionError
from flowgraph.masks import MaskLike, as_mask
from flowgraph.text import EncodedText, Offsets, covers

Part = Literal["prompt", "response"]
Mask = Bool[Tensor, " tokens"]
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
        mask = _read_mask(self.which, encoded.num_tokens, ARGUMENT[part])
        outside = mask & ~_part_mask(encoded, part)
        if bool(outside.any()):
            first, last = (
                (0, encoded.prompt_length) if part == "prompt" else (encoded.prompt_length, encoded.num_tokens)
            )
            raise RegionError(
                f"{ARGUMENT[part]}: tokens must lie in the {part}, {first}..{last - 1}, got token "
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


@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The three disjoint regions over T tokens (``method.md`` section 1), and what was generated.

    Attributes:
        question: ``[T]`` bool; where flow enters.
        reasoning: ``[T]`` bool; generated tokens before the first answer token. May be empty.
        answer: ``[T]`` bool; where flow leaves.
        generated: ``[T]`` bool; tokens the model emitted, special ones included. Tokens in no region may
            route flow.
        question_selector: what selected the question, for the record; "mask" for masks given as such.
        answer_selector: the same for the answer; "auto: ..." names what the automatic search settled on.

    Raises:
        RegionError: see :func:`validate_regions`.
    """

    question: Mask
    reasoning: Mask
    answer: Mask
    generated: Mask
    question_selector: str = "mask"
    answer_selector: str = "mask"

    def __post_init__(self) -> None:
        """Regions that break a rule cannot exist."""
        validate_regions(self)

    def __repr__(self) -> str:
        """Sizes."""
        parts = ", ".join(f"{name}={int(mask.sum())}" for name, mask in _masks(self))
        return f"Regions({parts} of {self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.question.numel()

    @classmethod
    def from_masks(
        cls,
        question: MaskLike,
        answer: MaskLike,
        reasoning: MaskLike | None = None,
        generated: MaskLike | None = None,
        *,
        num_tokens: int | None = None,
    ) -> Self:
        """Build from bool masks, token indices or slices, without any text.

        Args:
            question: tokens where flow enters.
            answer: tokens where flow leaves.
            reasoning: default: generated tokens before the first answer token, outside question and answer.
            generated: default: every token after the last question token.
            num_tokens: T; needed unless one of the arguments is a mask.

        Raises:
            RegionError: T is unknown, or a rule of :func:`validate_regions` is broken.

        Example:
            >>> regions = Regions.from_masks([0, 1], [4], num_tokens=5)
            >>> regions.reasoning.tolist()
            [False, False, True, True, False]
        """
        size = num_tokens if num_tokens is not None else _mask_length(question, answer, reasoning, generated)
        asked = _read_mask(question, size, "question")
        answered = _read_mask(answer, size, "answer")
        position = torch.arange(size)
        if generated is None:
            emitted = position > _last(asked)
        else:
            emitted = _read_mask(generated, size, "generated")
        if reasoning is None:
            reasoned = emitted & (position < _first(answered)) & ~asked
        else:
            reasoned = _read_mask(reasoning, size, "reasoning")
        return cls(question=asked, reasoning=reasoned, answer=answered, generated=emitted)

    def describe(self, tokens: Sequence[str] | None = None) -> str:
        """One line a region: how many tokens, which, the text if ``tokens`` are given, and who selected them.

        Example:
            >>> print(Regions.from_masks([0, 1], [4], num_tokens=5).describe(["2", "+3", " is", " ", "5"]))
            question: 2 tokens (0..1) '2+3' by mask
            reasoning: 2 tokens (2..3) ' is '
            answer: 1 token (4) '5' by mask
            generated: 3 tokens (2..4) ' is 5'
        """
        selectors = {"question": self.question_selector, "answer": self.answer_selector}
        lines = []
        for name, mask in _masks(self):
            indices: list[int] = mask.nonzero().flatten().tolist()
            line = f"{name}: {len(indices)} token{'s' * (len(indices) != 1)}"
            line += f" ({_ranges(indices)})" if indices else ""
            line += f" {_shorten(''.join(tokens[index] for index in indices))!r}" if tokens and indices else ""
            lines.append(line + (f" by {selectors[name]}" if name in selectors else ""))
        return "\n".join(lines)


def find_regions(encoded: EncodedText, question: Question = None, answer: Answer = None) -> Regions:
    r"""Find question, reasoning and answer in an encoded text.

    A token is in a region where it has a visible character inside the selected text. Special and template
    tokens are in none. Reasoning is what was generated before the first answer token.

    Args:
        encoded: from :func:`flowgraph.text.encode`.
        question: a selector for the prompt, or short for one: ``"prompt"``, a role such as ``"user"``, another
            string for a :class:`Regex`, ``(start, end)`` for a :class:`Span`, indices or a bool mask for
            :class:`Tokens`. None or ``"auto"``: the last user message of a chat, else the whole prompt.
        answer: the same for the response, where a string is a :class:`Regex`. None or ``"auto"``:
            ``\boxed{}``, ``#### ...``, ``<answer>``, "the answer is ...", else the last line.

    Returns:
        The regions, with the selectors that were used.

    Raises:
        NoAnswerError: nothing in the response is selected.
        RegionError: nothing in the prompt is selected, or the selection lies outside.
        InvalidInputError: an argument that names no selector, a pattern that does not compile.
    """
    if _is_auto(question):
        asked_by: Selector = Role("user") if encoded.roles else Prompt()
        question_selector = f"auto: {asked_by!r}"
    else:
        asked_by = _as_selector(question, "prompt", encoded)
        question_selector = repr(asked_by)
    asked = asked_by.select(encoded, "prompt")
    if not bool(asked.any()):
        raise RegionError(
            f"question: {asked_by!r} must select a visible, non-special character of the prompt, got none in "
            f"{_shorten(encoded.prompt_text)!r}; pass another Regex, Span(start, end), Role, Prompt() or token indices"
        )
    answered, answer_selector = _find_answer(encoded, answer)
    generated = _part_mask(encoded, "response")
    before = torch.arange(encoded.num_tokens) < _first(answered)
    return Regions(
        question=asked,
        reasoning=generated & before & ~encoded.special,
        answer=answered,
        generated=generated,
        question_selector=question_selector,
        answer_selector=answer_selector,
    )


def validate_regions(regions: Regions) -> None:
    """Check the rules that every later step relies on; :class:`Regions` calls it when built.

    Raises:
        RegionError: a mask is no 1-D bool tensor or has another length; question or answer is empty; two
            regions overlap; reasoning or answer was not generated; token 0 counts as generated; no question
            token stands before the answer.
    """
    size = regions.question.numel()
    for name, mask in _masks(regions):
        if mask.dtype != torch.bool or mask.ndim != 1 or mask.numel() != size:
            raise RegionError(
                f"{name}: must be a 1-D bool mask over {size} tokens, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}; build regions with find_regions or Regions.from_masks"
            )
    for name in ("question", "answer"):
        if not bool(getattr(regions, name).any()):
            raise RegionError(f"{name}: must hold at least one token, got none of {size}; select a token of the text")
    for one, other in (("question", "reasoning"), ("question", "answer"), ("reasoning", "answer")):
        _reject(getattr(regions, one) & getattr(regions, other), f"{one}: must not overlap {other}", "give it to one")
    for name in ("reasoning", "answer"):
        _reject(
            getattr(regions, name) & ~regions.generated,
            f"{name}: must lie in the generated tokens (by default those after the question)",
            "pass generated= with it, or move the region",
        )
    if bool(regions.generated[0]):
        raise RegionError(
            "generated: must leave out token 0, which no token can have emitted, got it in; pass the response only"
        )
    question, answer = _first(regions.question), _first(regions.answer)
    if answer < question:
        raise RegionError(
            f"answer: must come after a question token, got answer from token {answer} and question from token "
            f"{question}; check that the two are not exchanged"
        )


def _find_answer(encoded: EncodedText, answer: Answer) -> tuple[Mask, str]:
    """The answer's tokens and the selector that found them."""
    if _is_auto(answer):
        tried = {f"auto: {name}": selector for name, selector in AUTO_ANSWER.items()}
    else:
        only = _as_selector(answer, "response", encoded)
        tried = {repr(only): only}
    for name, selector in tried.items():
        mask = selector.select(encoded, "response")
        if bool(mask.any()):
            return mask, name
    raise NoAnswerError(
        f"answer: {name} must select a visible, non-special character of the response, got none in "
        f"{_ending(encoded.response_text)!r}; pass another Regex, Span(start, end), LastLine() or token indices"
    )


def _is_auto(choice: Question) -> bool:
    return choice is None or (isinstance(choice, str) and choice == "auto")


def _as_selector(choice: Question, part: Part, encoded: EncodedText) -> Selector:
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
        f"got {choice!r:.80}; see flowgraph.regions.find_regions"
    )


def _window(encoded: EncodedText, part: Part) -> Offsets:
    """First and last (exclusive) character of the prompt, or of the response up to its special ending."""
    return (0, encoded.response_start) if part == "prompt" else (encoded.response_start, encoded.response_end)


def _part_mask(encoded: EncodedText, part: Part) -> Mask:
    in_prompt = torch.arange(encoded.num_tokens) < encoded.prompt_length
    return in_prompt if part == "prompt" else ~in_prompt


def _tokens_in(encoded: EncodedText, selected: Sequence[Offsets], part: Part) -> Mask:
    """Tokens of a part with a visible character in a selected range, special and template ones left out."""
    return covers(encoded.spans, encoded.text, selected) & _part_mask(encoded, part) & ~encoded.special


def _read_mask(region: MaskLike, num_tokens: int, name: str) -> Mask:
    """As :func:`as_mask`; an empty list selects nothing, and results live on the CPU."""
    if isinstance(region, slice):
        return as_mask(region, num_tokens, name)
    values = torch.as_tensor(region)
    return as_mask(values if values.numel() else values.long(), num_tokens, name, values.device).cpu()


def _mask_length(*regions: MaskLike | None) -> int:
    """T, from the first argument that is a mask."""
    for region in regions:
        if region is not None and not isinstance(region, slice):
            values = torch.as_tensor(region)
            if values.dtype == torch.bool and values.ndim == 1:
                return values.numel()
    raise RegionError(
        "num_tokens: must be given where no region is a 1-D bool mask, got None; pass the number of tokens"
    )


def _first(mask: Mask) -> int:
    """Index of the first token, T where there is none."""
    return int(mask.nonzero()[0]) if bool(mask.any()) else mask.numel()


def _last(mask: Mask) -> int:
    """Index of the last token, -1 where there is none."""
    return int(mask.nonzero()[-1]) if bool(mask.any()) else -1


def _masks(regions: Regions) -> Iterator[tuple[str, Mask]]:
    for name in ("question", "reasoning", "answer", "generated"):
        yield name, getattr(regions, name)


def _reject(wrong: Mask, rule: str, remedy: str) -> None:
    if bool(wrong.any()):
        raise RegionError(f"{rule}, got token {_first(wrong)}; {remedy}")


def _ranges(indices: Sequence[int]) -> str:
    """``3..5, 9``: sorted indices as runs, the first few of them."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = [f"{low}..{high}" if low < high else str(low) for low, high in runs[:4]]
    return ", ".join(shown + ["..."] * (len(runs) > 4))


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def _ending(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-80:]}"
