"""The three regions of a text, question, reasoning and answer, as token masks that keep the rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from flowgraph.errors import NoAnswerError, RegionError
from flowgraph.masks import Mask, MaskLike, read_mask
from flowgraph.text.encoding import EncodedText, shorten
from flowgraph.text.selectors import (
    AUTO_ANSWER,
    NUMBER_SIGN,
    PHRASE,
    TAG,
    Answer,
    Boxed,
    LastLine,
    Part,
    Prompt,
    Question,
    Regex,
    Role,
    Selector,
    Span,
    Tokens,
    as_selector,
    part_mask,
)

# Users find the selectors here, beside the regions that they select.
__all__ = [
    "AUTO_ANSWER",
    "NUMBER_SIGN",
    "PHRASE",
    "TAG",
    "Answer",
    "Boxed",
    "LastLine",
    "Mask",
    "Part",
    "Prompt",
    "Question",
    "Regex",
    "Regions",
    "Role",
    "Selector",
    "Span",
    "Tokens",
    "find_question",
    "find_regions",
    "validate_regions",
]


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
        asked = read_mask(question, size, "question")
        answered = read_mask(answer, size, "answer")
        position = torch.arange(size)
        if generated is None:
            emitted = position > _last(asked)
        else:
            emitted = read_mask(generated, size, "generated")
        if reasoning is None:
            reasoned = emitted & (position < _first(answered)) & ~asked
        else:
            reasoned = read_mask(reasoning, size, "reasoning")
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
            line += f" {shorten(''.join(tokens[index] for index in indices))!r}" if tokens and indices else ""
            lines.append(line + (f" by {selectors[name]}" if name in selectors else ""))
        return "\n".join(lines)


def find_regions(encoded: EncodedText, question: Question = None, answer: Answer = None) -> Regions:
    r"""Find question, reasoning and answer in an encoded text.

    A token is in a region where it has a visible character inside the selected text. Special and template
    tokens are in none. Reasoning is what was generated before the first answer token.

    Args:
        encoded: from :func:`flowgraph.text.encoding.encode`.
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
    asked, question_selector = _find_question(encoded, question)
    answered, answer_selector = _find_answer(encoded, answer)
    generated = part_mask(encoded, "response")
    before = torch.arange(encoded.num_tokens) < _first(answered)
    return Regions(
        question=asked,
        reasoning=generated & before & ~encoded.special,
        answer=answered,
        generated=generated,
        question_selector=question_selector,
        answer_selector=answer_selector,
    )


def find_question(encoded: EncodedText, question: Question = None) -> Mask:
    """The question's tokens alone, for a response without an answer; see :func:`find_regions`.

    Raises:
        RegionError: nothing in the prompt is selected, or the selection lies outside.
        InvalidInputError: an argument that names no selector, a pattern that does not compile.
    """
    return _find_question(encoded, question)[0]


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


def _find_question(encoded: EncodedText, question: Question) -> tuple[Mask, str]:
    """The question's tokens and the selector that found them."""
    if _is_auto(question):
        asked_by: Selector = Role("user") if encoded.roles else Prompt()
        name = f"auto: {asked_by!r}"
    else:
        asked_by = as_selector(question, "prompt", encoded)
        name = repr(asked_by)
    asked = asked_by.select(encoded, "prompt")
    if not bool(asked.any()):
        raise RegionError(
            f"question: {asked_by!r} must select a visible, non-special character of the prompt, got none in "
            f"{shorten(encoded.prompt_text)!r}; pass another Regex, Span(start, end), Role, Prompt() or token indices"
        )
    return asked, name


def _find_answer(encoded: EncodedText, answer: Answer) -> tuple[Mask, str]:
    """The answer's tokens and the selector that found them."""
    if _is_auto(answer):
        tried = {f"auto: {name}": selector for name, selector in AUTO_ANSWER.items()}
    else:
        only = as_selector(answer, "response", encoded)
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


def _ending(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-80:]}"
