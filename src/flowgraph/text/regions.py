"""Question, reasoning and answer of a text as disjoint token masks: build, find and check them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from flowgraph.errors import RegionError
from flowgraph.files import loadable
from flowgraph.masks import Mask, MaskLike, read_mask
from flowgraph.text.answer_search import find_answer, first_that_finds, is_auto, last_resort, reasons_of
from flowgraph.text.encoding import EncodedText, shorten
from flowgraph.text.selectors import (
    AUTO_ANSWER,
    CHOICE,
    JSON,
    NUMBER_SIGN,
    PHRASE,
    TAG,
    AllOf,
    Answer,
    Boxed,
    CodeBlock,
    LastLine,
    LastSentence,
    Literal,
    Part,
    Prompt,
    Question,
    Regex,
    Role,
    Selector,
    Span,
    Stated,
    Tokens,
    part_mask,
    selectors_for,
)
from flowgraph.text.spans import selected_text

# The selectors are part of this module's interface, beside the regions that they select.
__all__ = [
    "AUTO_ANSWER",
    "CHOICE",
    "JSON",
    "NUMBER_SIGN",
    "PHRASE",
    "TAG",
    "AllOf",
    "Answer",
    "Boxed",
    "CodeBlock",
    "LastLine",
    "LastSentence",
    "Literal",
    "Mask",
    "Part",
    "Prompt",
    "Question",
    "Regex",
    "Regions",
    "Role",
    "Selector",
    "Span",
    "Stated",
    "Tokens",
    "find_question",
    "find_regions",
    "last_resort",
    "locate_regions",
    "validate_regions",
]


@loadable
@dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The three disjoint regions over T tokens, and the generated tokens.

    Tokens in no region may route flow.

    Attributes:
        question: ``[T]`` bool; where flow enters.
        reasoning: ``[T]`` bool; generated tokens before the first answer token. May be empty.
        answer: ``[T]`` bool; where flow leaves.
        generated: ``[T]`` bool; tokens that the model generated, special ones included.
        question_selector: the selector of the question, for the record; "mask" for a region given as a mask.
        answer_selector: the same for the answer; "auto: ..." names the selector that the automatic search chose.
        answer_by: how the answer was found, in words: "boxed", "hash", "tag", "json", "phrase" or "choice" for a stated
            one; "code", "last sentence" or "whole response" where none is stated, with ", unfinished text" where the
            response was cut off; "given: ..." and the kind of selector for one that was asked for.

    Raises:
        RegionError: see :func:`validate_regions`.
    """

    question: Mask
    reasoning: Mask
    answer: Mask
    generated: Mask
    question_selector: str = "mask"
    answer_selector: str = "mask"
    answer_by: str = "given: mask"

    def __post_init__(self) -> None:
        """Refuse regions that break a rule."""
        validate_regions(self)

    def __repr__(self) -> str:
        """Show the size of each region."""
        parts = ", ".join(f"{name}={int(mask.sum())}" for name, mask in _masks(self))
        return f"Regions({parts} of {self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
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
        """Build regions from bool masks, token indices or slices, without any text.

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
        # What is not given follows from the rest: generated is what follows the question, reasoning what is between.
        if num_tokens is None:
            num_tokens = _mask_length(question, answer, reasoning, generated)
        question_mask = read_mask(question, num_tokens, "question")
        answer_mask = read_mask(answer, num_tokens, "answer")
        position = torch.arange(num_tokens)
        if generated is None:
            generated_mask = position > _last(question_mask)
        else:
            generated_mask = read_mask(generated, num_tokens, "generated")
        if reasoning is None:
            is_before_answer = position < _first(answer_mask)
            reasoning_mask = generated_mask & is_before_answer & ~question_mask
        else:
            reasoning_mask = read_mask(reasoning, num_tokens, "reasoning")
        return cls(question_mask, reasoning_mask, answer_mask, generated_mask)

    def describe(self, tokens: Sequence[str] | EncodedText | None = None) -> str:
        """Describe each region in one line: number of tokens, indices, text and selector.

        Args:
            tokens: the text of each token; the description shows no text without it. An encoded text shows the
                characters that several tokens share once.

        Example:
            >>> print(Regions.from_masks([0, 1], [4], num_tokens=5).describe(["2", "+3", " is", " ", "5"]))
            question: 2 tokens (0..1) '2+3' by mask
            reasoning: 2 tokens (2..3) ' is '
            answer: 1 token (4) '5' by mask
            generated: 3 tokens (2..4) ' is 5'
        """
        selectors = {"question": self.question_selector, "answer": self.answer_selector}
        lines = []
        # One line per region, for example "answer: 2 tokens (7..8) '42' by LastLine()".
        for name, mask in _masks(self):
            indices: list[int] = mask.nonzero().flatten().tolist()
            line = f"{name}: 1 token" if len(indices) == 1 else f"{name}: {len(indices)} tokens"
            if indices:
                line += f" ({_ranges(indices)})"
            if indices and tokens is not None:
                # Spans keep the blanks between tokens; texts of tokens alone are joined as they are.
                if isinstance(tokens, EncodedText):
                    text = selected_text(tokens.text, [tokens.spans[index] for index in indices])
                else:
                    text = "".join(tokens[index] for index in indices)
                line += f" {shorten(text)!r}"
            if name in selectors:
                line += f" by {selectors[name]}"
            lines.append(line)
        return "\n".join(lines)


def find_regions(
    encoded: EncodedText, question: Question = None, answer: Answer = None, *, truncated: bool = False
) -> Regions:
    r"""Find question, reasoning and answer in an encoded text.

    A token belongs to a region if it has a visible character inside the selected text. Special and template
    tokens belong to no region. Reasoning are the generated tokens before the first answer token.

    The answer stands in the final part of the response: after the last closed thinking block, or in the final channel
    (:func:`flowgraph.final_part`). A selector with ``thinking=True`` searches the complete response; positions lie
    anywhere.

    Args:
        encoded: from :func:`flowgraph.text.encoding.encode`.
        question: a selector for the prompt, or the short form of one: ``"prompt"``, a role such as ``"user"``,
            another string, ``(start, end)`` for a :class:`Span`, a list of such pairs, indices or a bool mask for
            :class:`Tokens`. A string is searched as literal text, then as a :class:`Regex`; one with signs that only
            regular expressions have is a :class:`Regex` at once. None or ``"auto"``: the last user message of a chat,
            else the complete prompt.
        answer: the same for the response. None or ``"auto"``: the last stated answer (``\boxed{}``, ``#### ...``,
            ``<answer>``, JSON, "the answer is ...", "the right option is (B)"), else the block of code that ends the
            response, else its last sentence.
        truncated: whether the response was cut off, so that its end is not a conclusion.

    Returns:
        The regions, with the selectors that were used.

    Raises:
        NoAnswerError: nothing in the response is selected, or its thinking is not closed.
        RegionError: nothing in the prompt is selected, or the selection lies outside.
        InvalidInputError: an invalid selector, or a pattern that does not compile.

    Warns:
        UserWarning: the answer was found by the last resort: see :func:`last_resort`.

    Cost: linear in the text.
    """
    regions = locate_regions(encoded, question, answer, truncated=truncated)
    warning = last_resort(regions.answer_by, encoded)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return regions


def locate_regions(
    encoded: EncodedText, question: Question = None, answer: Answer = None, *, truncated: bool = False
) -> Regions:
    """Find the regions as :func:`find_regions` does, without a warning about the last resort."""
    question_mask, question_selector = _find_question(encoded, question)
    found = find_answer(encoded, answer, truncated)
    # The reasoning is what was generated before the answer, without special tokens.
    generated = part_mask(encoded, "response")
    is_before_answer = torch.arange(encoded.num_tokens) < _first(found.mask)
    return Regions(
        question=question_mask,
        reasoning=generated & is_before_answer & ~encoded.special,
        answer=found.mask,
        generated=generated,
        question_selector=question_selector,
        answer_selector=found.selector,
        answer_by=found.by,
    )


def find_question(encoded: EncodedText, question: Question = None) -> Mask:
    """Find the question's tokens alone, for a response without an answer.

    Args:
        encoded: from :func:`flowgraph.text.encoding.encode`.
        question: as for :func:`find_regions`.

    Returns:
        ``[T]`` bool mask.

    Raises:
        RegionError: nothing in the prompt is selected, or the selection lies outside.
        InvalidInputError: an invalid selector, or a pattern that does not compile.
    """
    question_mask, _ = _find_question(encoded, question)
    return question_mask


def validate_regions(regions: Regions) -> None:
    """Check the rules that every later step relies on; :class:`Regions` calls it when built.

    Raises:
        RegionError: a mask is not a 1-D bool tensor or has another length; question or answer is empty; two
            regions overlap; reasoning or answer was not generated; token 0 counts as generated; the answer
            starts before the question.
    """
    size = regions.num_tokens
    for name, mask in _masks(regions):
        if mask.dtype != torch.bool or mask.ndim != 1 or mask.numel() != size:
            raise RegionError(
                f"{name}: must be a 1-D bool mask over {size} tokens, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}; build regions with find_regions or Regions.from_masks"
            )

    question = regions.question
    reasoning = regions.reasoning
    answer = regions.answer
    for name, mask in (("question", question), ("answer", answer)):
        if not bool(mask.any()):
            raise RegionError(f"{name}: must hold at least one token, got none of {size}; select a token of the text")

    # The regions are disjoint, and what lies behind the question was generated.
    _refuse_tokens(question & reasoning, "question: must not overlap reasoning", "give it to one")
    _refuse_tokens(question & answer, "question: must not overlap answer", "give it to one")
    _refuse_tokens(reasoning & answer, "reasoning: must not overlap answer", "give it to one")
    for name, mask in (("reasoning", reasoning), ("answer", answer)):
        _refuse_tokens(
            mask & ~regions.generated,
            f"{name}: must lie in the generated tokens (by default those after the question)",
            "pass generated= with it, or move the region",
        )

    # In emission rows a generated token reads through the position before it, which token 0 does not have.
    if bool(regions.generated[0]):
        raise RegionError(
            "generated: must not include token 0, which no earlier token can generate, got it included; "
            "pass the response only"
        )
    if _first(answer) < _first(question):
        raise RegionError(
            f"answer: must come after a question token, got answer from token {_first(answer)} and question from "
            f"token {_first(question)}; check that the two are not exchanged"
        )


def _find_question(encoded: EncodedText, question: Question) -> tuple[Mask, str]:
    """Find the question's tokens, and name the selector that found them."""
    # By default the messages of the user, or the complete prompt where it has no messages.
    is_chosen_automatically = is_auto(question)
    if is_chosen_automatically:
        candidates: list[Selector] = [Role("user") if encoded.roles else Prompt()]
    else:
        candidates = selectors_for(question, "prompt", encoded)
    mask, selector = first_that_finds(candidates, encoded, "prompt")
    if mask is None:
        raise RegionError(
            f"question: {selector!r} must select a visible, non-special character of the prompt, got none in "
            f"{shorten(encoded.prompt_text)!r}{reasons_of(candidates, encoded, 'prompt')}; "
            "pass another Regex, Span(start, end), Role, Prompt() or token indices"
        )
    name = f"auto: {selector!r}" if is_chosen_automatically else repr(selector)
    return mask, name


def _mask_length(*regions: MaskLike | None) -> int:
    """Read T off the first argument that is a mask."""
    for region in regions:
        if region is not None and not isinstance(region, slice):
            values = torch.as_tensor(region)
            if values.dtype == torch.bool and values.ndim == 1:
                return values.numel()
    raise RegionError(
        "num_tokens: must be given where no region is a 1-D bool mask, got None; pass the number of tokens"
    )


def _first(mask: Mask) -> int:
    """Return the index of the first token, T for an empty mask."""
    indices = mask.nonzero().flatten()
    return int(indices[0]) if indices.numel() else mask.numel()


def _last(mask: Mask) -> int:
    """Return the index of the last token, -1 for an empty mask."""
    indices = mask.nonzero().flatten()
    return int(indices[-1]) if indices.numel() else -1


def _masks(regions: Regions) -> list[tuple[str, Mask]]:
    """List all masks with their names."""
    return [
        ("question", regions.question),
        ("reasoning", regions.reasoning),
        ("answer", regions.answer),
        ("generated", regions.generated),
    ]


def _refuse_tokens(invalid: Mask, rule: str, remedy: str) -> None:
    """Raise an error that names the first invalid token, where there is one."""
    if bool(invalid.any()):
        raise RegionError(f"{rule}, got token {_first(invalid)}; {remedy}")


def _ranges(indices: Sequence[int]) -> str:
    """Write sorted indices as runs, ``3..5, 9``, at most four of them."""
    # Runs of consecutive indices, each as [first, last].
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = []
    for low, high in runs[:4]:
        shown.append(f"{low}..{high}" if low < high else str(low))
    if len(runs) > 4:
        shown.append("...")
    return ", ".join(shown)
