"""Search the tokens of the answer: by the selectors asked for, or the last stated answer of the final part."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from flowgraph.errors import NoAnswerError
from flowgraph.masks import Mask
from flowgraph.text.encoding import EncodedText, shorten
from flowgraph.text.literals import longer_word, number_value, occurrences
from flowgraph.text.selectors import (
    ARGUMENT,
    Answer,
    Explains,
    Part,
    Question,
    Regex,
    Selector,
    Span,
    final_part_of,
    selectors_for,
)
from flowgraph.text.spans import Offsets
from flowgraph.text.statements import RULES, last_code, last_sentence, statements_in

# How the automatic search found an answer: the form, and the name in AUTO_ANSWER of the selector that finds it again.
_SELECTOR_NAMES = {
    "boxed": "Boxed()",
    "hash": "NUMBER_SIGN",
    "tag": "TAG",
    "json": "JSON",
    "phrase": "PHRASE",
    "choice": "CHOICE",
    "code": "CodeBlock()",
    "last sentence": "LastSentence()",
    "whole response": "LastSentence()",
}
_UNFINISHED = ", unfinished text"
"""What follows the form where the text was cut off."""
_DIRECT_ANSWER = 80
"""Longest response, in characters, that counts as a direct answer when all of it was taken."""


@dataclass(frozen=True, eq=False)
class FoundAnswer:
    """The tokens of an answer, and how they were found.

    Attributes:
        mask: ``[T]`` bool.
        selector: name of the selector, for the record.
        by: how the answer was found, in words.
    """

    mask: Mask
    selector: str
    by: str


def find_answer(encoded: EncodedText, answer: Answer, truncated: bool) -> FoundAnswer:
    """Find the answer's tokens by the automatic search or by the selectors that were asked for."""
    if is_auto(answer):
        return _find_answer_automatically(encoded, truncated)
    # The selectors that were given, one after the other.
    candidates = selectors_for(answer, "response", encoded)
    mask, selector = first_that_finds(candidates, encoded, "response")
    if mask is not None:
        return FoundAnswer(mask, repr(selector), f"given: {type(selector).__name__}")

    # The message names why each selector found nothing.
    reasons = reasons_of(candidates, encoded, "response")
    final = final_part_of(encoded)
    if final.problem and not reasons:
        reasons = f", where the answer must stand after the thinking; the response has {final.problem}"
    raise NoAnswerError(
        f"answer: {selector!r} must select a visible, non-special character of the response, got none in "
        f"{_ending(encoded.response_text)!r}{reasons}; pass another Regex, Literal, Span(start, end), LastLine() or "
        "token indices"
    )


def _find_answer_automatically(encoded: EncodedText, truncated: bool) -> FoundAnswer:
    """Find the last stated answer of the final part; without one, the code or the sentence that ends it."""
    final = final_part_of(encoded)
    if final.problem:
        raise NoAnswerError(
            f"answer: must stand after the thinking or in the final channel, got a response with {final.problem}, "
            f"which ends in {_ending(encoded.response_text)!r}; let the model finish (max_new_tokens=), or pass a "
            "selector that searches the thinking too, such as selectors.Stated(thinking=True)"
        )

    # Candidates in the order of preference: the last statement first, then what ends the text.
    text = encoded.response_text[final.start : final.end]
    candidates: list[tuple[str, Offsets | None]] = []
    for stated in reversed(statements_in(text, RULES)):
        candidates.append((stated.rule, (stated.start, stated.end)))
    # Where nothing is stated, the end of an unfinished text is a guess.
    suffix = _UNFINISHED if truncated else ""
    candidates.append((f"code{suffix}", last_code(text)))
    sentence = last_sentence(text)
    is_whole = sentence is not None and encoded.response_text.strip() == text[slice(*sentence)]
    ending = "whole response" if is_whole else "last sentence"
    candidates.append((f"{ending}{suffix}", sentence))

    # The first candidate that selects a visible token is the answer.
    for by, place in candidates:
        if place is None:
            continue
        # A place of special tokens alone is passed over.
        first = final.start + place[0]
        last = final.start + place[1]
        mask = Span(first, last).select(encoded, "response")
        if bool(mask.any()):
            return FoundAnswer(mask, f"auto: {_SELECTOR_NAMES[by.removesuffix(_UNFINISHED)]}", by)
    raise NoAnswerError(
        "answer: auto: LastSentence() must select a visible, non-special character of the response, got none in "
        f"{_ending(encoded.response_text)!r}; pass another Regex, Literal, Span(start, end), LastLine() or token "
        "indices"
    )


def first_that_finds(candidates: Sequence[Selector], encoded: EncodedText, part: Part) -> tuple[Mask | None, Selector]:
    """Return the tokens of the first selector that finds any, and the selector; None and the last one otherwise."""
    for selector in candidates:
        mask = selector.select(encoded, part)
        if bool(mask.any()):
            if isinstance(selector, Regex) and selector is not candidates[0]:
                _warn_about_pattern(selector, encoded, part)
            return mask, selector
    return None, candidates[-1]


def _warn_about_pattern(given: Regex, encoded: EncodedText, part: Part) -> None:
    """Warn where a string that was not found as text matches something else as a regular expression.

    A part of a word is what the string says. A part of a longer number is not, nor is what signs with a meaning match.
    """
    pattern = given.pattern
    text = encoded.prompt_text if part == "prompt" else encoded.response_text
    # What was found: the pattern as text, with the word that holds it, or else what the expression matches.
    matched = re.search(pattern, text)
    places = list(occurrences(text, pattern))
    found = ""
    if places:
        found = longer_word(text, places[-1])
    elif matched:
        found = matched[0]

    # The text itself was found, and not as a part of a longer number: there is nothing to warn about.
    num_digits = sum(character.isdigit() for character in pattern)
    num_digits_found = sum(map(str.isdigit, found))
    is_in_longer_number = number_value(pattern) is not None and num_digits_found > num_digits
    if places and not is_in_longer_number:
        return
    warnings.warn(
        f"{ARGUMENT[part]}: the string {pattern!r} should stand in the {part} as it is, got no such place; as a "
        f"regular expression it matches in {shorten(found)!r}: pass selectors.Regex({pattern!r}) if that is meant, or "
        "correct it",
        stacklevel=6,
    )


def reasons_of(candidates: Sequence[Selector], encoded: EncodedText, part: Part) -> str:
    """Return why the selectors found nothing, for a message; "" where none of them knows."""
    for selector in candidates:
        reason = selector.reason(encoded, part) if isinstance(selector, Explains) else ""
        if reason:
            return f": {reason}"
    # A string was searched in two ways.
    given = candidates[-1]
    if len(candidates) > 1 and isinstance(given, Regex) and re.escape(given.pattern) != given.pattern:
        return (
            ": it stands there neither as text nor as a regular expression, in which some of its signs have a meaning "
            "(selectors.Literal takes them as they are)"
        )
    return ""


def last_resort(answer_by: str, encoded: EncodedText) -> str:
    """Return the warning about an answer that no rule found: the end of an unfinished text, or a long whole response.

    Args:
        answer_by: how the answer was found; see :class:`flowgraph.Regions`.
        encoded: the text that it was found in.

    Returns:
        The warning, or "" where the answer was found by a rule or asked for.
    """
    text = encoded.response_text.strip()
    if answer_by.endswith(_UNFINISHED):
        kind = answer_by.removesuffix(_UNFINISHED)
        return (
            f"answer: should be stated before the response ends, got a response that was cut off at {_ending(text)!r}; "
            f"its {kind} was taken: raise max_new_tokens, or pass answer="
        )
    if answer_by == "whole response" and len(text) > _DIRECT_ANSWER:
        return (
            f"answer: should be a part of the response, got one sentence of {len(text)} characters, {shorten(text)!r}; "
            "the whole response was taken, so no token lies before the answer: pass answer="
        )
    return ""


def is_auto(choice: Question) -> bool:
    """Return whether the region is to be found automatically; tensors do not compare with strings."""
    return choice is None or (isinstance(choice, str) and choice == "auto")


def _ending(text: str) -> str:
    """Return the end of a long text, where an answer is expected, for messages."""
    if len(text) <= 80:
        return text
    return f"...{text[-80:]}"
