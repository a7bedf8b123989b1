"""Extract the stated answer of a response, and compare two answers.

Extraction is strict, because a policy learns to exploit a lenient one: answers inside the thinking are not read, of
several statements the last one counts, only the stated text is compared, and a statement without an end, or one that is
too long, is ignored. Where the thinking ends and what states an answer is decided by :func:`flowgraph.final_part` and
:func:`flowgraph.stated_answers`, as for traces.
"""

from __future__ import annotations

import ast
import logging
import operator
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flowgraph import MissingExtraError, final_part, stated_answers
from rl.errors import TaskError

if TYPE_CHECKING:
    from rl.records import CharSpan

MAX_ANSWER = 256
"""Longest answer, in characters."""

SEARCH_WINDOW = 65_536
"""Characters at the end of a response's final part that are searched."""

PATTERN_SECONDS = 1.0
"""Time limit of a user's regular expression on one response, in seconds."""

FORMATS = ("boxed", "tag", "hash")
"""Named ways to state an answer."""


# Extraction ---------------------------------------------------------------------------------------------


def find_answer(
    text: str, pattern: str | None = None, *, max_length: int = MAX_ANSWER, opening: str = "", thinking: bool = False
) -> CharSpan | None:
    r"""Find the characters of the last stated answer of a response, without surrounding white space.

    The answer stands in the final part of the response: after the last closed thinking block, or in the final channel
    (:func:`flowgraph.final_part`). A response whose thinking is not closed has no answer.

    Three formats are searched: ``\boxed{...}`` with balanced braces, ``<answer>...</answer>``, and a line ``#### ...``.
    Of all complete statements the last one in the text counts, whatever its format, and of nested ones the innermost.
    An opening without its end is ignored, and so are blank statements; a repetition of the format that was asked for
    (``\boxed{answer}``) counts only where nothing else is stated.

    Args:
        text: a response; the last 65,536 characters of its final part are searched.
        pattern: only ``"boxed"``, ``"tag"`` or ``"hash"``; or a regular expression, whose last match states the
            answer in its group 1.
        max_length: longest answer, in characters; a longer statement gives None.
        opening: what the prompt wrote of the response, such as ``"<think>"``; see
            :func:`flowgraph.response_opening` and ``Sample.opening``.
        thinking: search the complete response, its thinking too.

    Returns:
        ``(start, end)``, or None if no answer is stated.

    Raises:
        TaskError: the expression is invalid, has no group, or runs for more than a second.

    Cost: one pass over the text for each format.

    Example:
        >>> text = "I try 3 + 4 = 7, so <answer>7</answer>. No: <answer> 3 * 4 </answer>"
        >>> start, end = find_answer(text)
        >>> text[start:end]
        '3 * 4'
    """
    start = 0
    end = len(text)
    if not thinking:
        part = final_part(text, opening=opening)
        start = part.start
        end = part.end
    offset = max(end - SEARCH_WINDOW, start)
    tail = text[offset:end]
    span = _last_statement(tail, pattern)
    if span is None:
        return None

    # Trim white space, and move from positions in the tail to positions in the text.
    start, end = span
    statement = tail[start:end]
    answer = statement.strip()
    start += offset + len(statement) - len(statement.lstrip())
    if not 0 < len(answer) <= max_length:
        return None
    return start, start + len(answer)


def check_pattern(pattern: str | None) -> None:
    """Check a pattern for :func:`find_answer`.

    Raises:
        TaskError: neither a named format nor a regular expression with a group.
    """
    if pattern is not None and pattern not in FORMATS:
        _compiled(pattern)


def _last_statement(text: str, pattern: str | None) -> CharSpan | None:
    """Find the last statement of a final part, in one format or in any of them."""
    if pattern is not None and pattern not in FORMATS:
        return _last_match(text, pattern)
    formats = FORMATS if pattern is None else (pattern,)
    # The text is a final part already, so no thinking is left in it.
    stated = stated_answers(text, formats, strict=True, thinking=True)
    if not stated:
        return None
    return stated[-1].start, stated[-1].end


def _last_match(text: str, pattern: str) -> CharSpan | None:
    """Find group 1 of the last match of a user's regular expression, within the time limit."""
    last = None
    try:
        for match in _compiled(pattern).finditer(text, timeout=PATTERN_SECONDS):
            last = match.span(1)
    except TimeoutError as error:
        raise TaskError(
            f"pattern: must be searched in {PATTERN_SECONDS:g} s, got {pattern!r}, which takes longer on a response of "
            f"{len(text)} characters; avoid repeats within repeats"
        ) from error
    # A group that takes no part in the match has the span (-1, -1).
    return None if last == (-1, -1) else last


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    """Compile a user's regular expression with the package regex, which, unlike re, has a time limit."""
    import regex

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise TaskError(
            f"pattern: must be {', '.join(map(repr, FORMATS))} or a regular expression, got {pattern!r} ({error}); "
            "escape special characters"
        ) from error
    if not compiled.groups:
        raise TaskError(
            f"pattern: must have a group that states the answer, got {pattern!r}; "
            "put the answer in parentheses: r'Answer: (.*)'"
        )
    return compiled


# Text and numbers ---------------------------------------------------------------------------------------

# Sign, whole part (digits may be grouped in threes by commas), decimals, exponent of ten.
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)?(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# The typographic minus sign of print, which a text may have in place of the hyphen.
_PRINTED_MINUS = "\u2212"


def equal_text(one: str, other: str) -> bool:
    """Compare two texts, ignoring case and the amount of white space.

    Example:
        >>> equal_text(" New  York", "new york")
        True
    """
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()


def equal_number(one: str, other: str) -> bool:
    """Compare two numbers exactly; a text that :func:`parse_number` cannot read is not equal to anything.

    Example:
        >>> equal_number("2,000", "2000.0"), equal_number("0.5", "1/2"), equal_number("0.333", "1/3")
        (True, True, False)
    """
    number = parse_number(one)
    return number is not None and number == parse_number(other)


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a number, or None for any other text (units, currency signs, several numbers).

    A number is an integer or a decimal, may group its digits in threes by commas, may have an exponent of ten, and may
    be divided once by another.

    Example:
        >>> parse_number("-1,250.50"), parse_number("3/4"), parse_number("1,00"), parse_number("5 or 6")
        (Fraction(-2501, 2), Fraction(3, 4), None, None)
    """
    if len(text) > MAX_ANSWER:
        return None
    parts = [_parse_decimal(part.strip()) for part in text.replace(_PRINTED_MINUS, "-").split("/")]
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 2:
        return None
    numerator, denominator = parts
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def _parse_decimal(text: str) -> Fraction | None:
    """Return the exact value of an integer or decimal, or None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, integer, decimals, exponent = match.groups()
    if not integer and not decimals:
        return None
    # The digits without their point are an integer, which a power of ten scales back.
    decimals = decimals or ""
    digits = (integer or "").replace(",", "") + decimals
    scale = int(exponent or 0) - len(decimals)
    return Fraction(int(sign + digits)) * Fraction(10) ** scale


def evaluate_arithmetic(text: str) -> Fraction | None:
    """Return the exact value of an expression of integers, ``+ - * /`` and parentheses; None for any other text.

    The text is never executed: it is parsed, and its syntax tree is evaluated.

    Example:
        >>> evaluate_arithmetic("(7 - 1) / 4"), evaluate_arithmetic("2 ** 9"), evaluate_arithmetic("1 / 0")
        (Fraction(3, 2), None, None)
    """
    if len(text) > MAX_ANSWER or not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        # The last two are raised for nesting that is too deep.
        return None


def _evaluate(node: ast.AST) -> Fraction:
    """Evaluate a syntax tree of integers and the four operations; any other node is a ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        apply_sign = _SIGNS[type(node.op)]
        return apply_sign(_evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        apply_operation = _OPERATIONS[type(node.op)]
        return apply_operation(_evaluate(node.left), _evaluate(node.right))
    raise ValueError("not arithmetic")


# Mathematics --------------------------------------------------------------------------------------------

# A power: its exponent (braces nested once, parentheses, a number, or one character) and an operator that follows.
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\)|[+-]?\d+|\S)\s*((?:\^|\*\*|!)?)")
# Sums, products, integrals and limits; factorials of three digits or of an expression; large binomials; repeated exp.
_COSTLY = re.compile(r"\\(?:sum|prod|int|iint|oint|lim)\b|\d{3}\s*!|[)}!]\s*!|binom\D*\d{4}|(?:exp.*){3}", re.DOTALL)
_LARGEST_POWER = 100_000
_MAX_BRACKETS = 40


def is_costly(text: str) -> bool:
    """Tell whether parsing this expression, or exact arithmetic on it, may take very long.

    True for towers of powers, powers that multiply to more than 100,000, large factorials and binomials, repeated
    exponentials, sums, products, integrals, limits, and more than 40 brackets.

    Example:
        >>> is_costly("(x + 1)^2 + x^{10}"), is_costly("9^{9^9}"), is_costly("((9**99)**99)**99")
        (False, True, True)
    """
    num_brackets = sum(text.count(opening) for opening in "([{")
    if num_brackets > _MAX_BRACKETS:
        return True

    # Nested powers multiply their exponents, so the product bounds the size of the result.
    power = 1
    for exponent, next_operator in _EXPONENT.findall(text):
        is_tower = bool(next_operator) or any(sign in exponent for sign in ("^", "**", "!"))
        is_unreadable = exponent in ("{", "(")
        if is_tower or is_unreadable:
            return True
        for number in re.findall(r"\d+", exponent):
            power *= max(int(number), 1)
    return power > _LARGEST_POWER or _COSTLY.search(text) is not None


def equal_math(one: str, other: str) -> bool:
    r"""Compare two expressions by math-verify: ``\frac{1}{2}`` and 0.5, ``x^2 + 2x + 1`` and ``(x + 1)^2``.

    A text that cannot be parsed is not equal to anything. Expressions whose exact value may take hours (see
    :func:`is_costly`) are compared as text alone: the time limit of math-verify uses signals, which fail outside the
    main thread.

    Args:
        one: the reference; math-verify is not symmetric for equations and inequalities.
        other: the answer to judge.

    Raises:
        MissingExtraError: math-verify is not installed.

    Source: math-verify, https://github.com/huggingface/Math-Verify

    Example:
        >>> equal_math(r"\frac{1}{2}", "0.5")
        True
    """
    parse, verify = _math_verify()
    if len(one) > MAX_ANSWER or len(other) > MAX_ANSWER:
        return False
    if equal_text(one, other):
        return True
    for text in (one, other):
        # Delimiters inside the text would let an answer state several expressions.
        if "$" in text or "boxed" in text or is_costly(text):
            return False
    try:
        reference = parse(f"${one}$", parsing_timeout=None)
        answer = parse(f"${other}$", parsing_timeout=None)
        return bool(reference and answer and verify(reference, answer, timeout_seconds=None))
    except Exception:  # noqa: BLE001  (a hostile text may break the parser, and is then not equal)
        return False


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    """Import ``parse`` and ``verify`` of math-verify, and hide its warning that the time limit is off."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError(
            "equality: 'math' needs the package math-verify, got an environment without it; "
            "pip install 'flowgraph-llm[tasks]', or use equality='number'"
        ) from error

    def is_other_message(record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in record.getMessage()

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(is_other_message)
    return parse, verify
