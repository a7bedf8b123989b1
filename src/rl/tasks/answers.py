"""Where a response states its answer, and when two answers are the same.

Extraction is strict, because whatever is lenient here is learned: a response that states several answers is judged by
the last one, only the stated text is ever compared, and a statement without end or beyond all size is no answer.
"""

from __future__ import annotations

import ast
import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flowgraph import MissingExtraError
from rl.errors import TaskError

if TYPE_CHECKING:
    from rl.records import CharSpan

MAX_ANSWER = 256
"""Characters that a stated answer may have."""

SEARCHED = 65_536
"""Characters at the end of a response that are searched."""

PATTERN_SECONDS = 1.0
"""Time that a regular expression of the user may take on one response."""

FORMATS = ("boxed", "tag", "hash")
"""Named ways to state an answer, in the order in which they are looked for."""

_BOXED = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"</?answer>")
_HASH = re.compile(r"^[ \t]*####(?!#)([^\n]*)$", re.MULTILINE)
_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)?(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\)|[+-]?\d+|\S)\s*((?:\^|\*\*|!)?)")
_COSTLY = re.compile(r"\\(?:sum|prod|int|iint|oint|lim)\b|\d{3}\s*!|[)}!]\s*!|binom\D*\d{4}|(?:exp.*){3}", re.DOTALL)
_LARGEST_POWER = 100_000
_MOST_BRACKETS = 40


def find_answer(text: str, pattern: str | None = None, *, max_length: int = MAX_ANSWER) -> CharSpan | None:
    r"""The characters of the response's last stated answer, without the spaces around it.

    Three formats are looked for, in this order: ``\boxed{...}`` with balanced braces, ``<answer>...</answer>``, and a
    line ``#### ...``. The first format that occurs decides; within it the last complete statement counts, of nested
    ones the innermost. An opening without its end states nothing.

    Args:
        text: a response; its last 65,536 characters are searched.
        pattern: only ``"boxed"``, ``"tag"`` or ``"hash"``; or a regular expression, whose last match states the
            answer in its group 1.
        max_length: a longer statement is no answer.

    Returns:
        ``(start, end)``, or None where nothing is stated.

    Raises:
        TaskError: the expression is invalid, has no group, or runs for more than a second.

    Cost: one pass over the text for each format.

    Example:
        >>> text = "I try 3 + 4 = 7, so <answer>7</answer>. No: <answer> 3 * 4 </answer>"
        >>> start, end = find_answer(text)
        >>> text[start:end]
        '3 * 4'
    """
    offset = max(len(text) - SEARCHED, 0)
    tail = text[offset:]
    if pattern is None:
        spans = (_FINDERS[name](tail) for name in FORMATS)
        span = next((found for found in spans if found is not None), None)
    elif pattern in _FINDERS:
        span = _FINDERS[pattern](tail)
    else:
        span = _by_pattern(tail, pattern)
    if span is None:
        return None
    inner = tail[slice(*span)]
    start = span[0] + len(inner) - len(inner.lstrip())
    end = start + len(inner.strip())
    return (offset + start, offset + end) if 0 < end - start <= max_length else None


def extract_answer(text: str, pattern: str | None = None, *, max_length: int = MAX_ANSWER) -> str | None:
    """The text that :func:`find_answer` finds."""
    span = find_answer(text, pattern, max_length=max_length)
    return None if span is None else text[slice(*span)]


def check_pattern(pattern: str | None) -> None:
    """Refuse what :func:`find_answer` could not use.

    Raises:
        TaskError: neither a named format nor a regular expression with a group.
    """
    if pattern is not None and pattern not in FORMATS:
        _compiled(pattern)


def equal_text(one: str, other: str) -> bool:
    """Equal up to case and the amount of white space.

    Example:
        >>> equal_text(" New  York", "new york")
        True
    """
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()


def equal_number(one: str, other: str) -> bool:
    """Exactly equal as numbers; see :func:`parse_number` for what is one.

    Example:
        >>> equal_number("2,000", "2000.0"), equal_number("0.5", "1/2"), equal_number("0.333", "1/3")
        (True, True, False)
    """
    left, right = parse_number(one), parse_number(other)
    return left is not None and left == right


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number, or None for anything else (units, signs of currency, several numbers).

    Numbers are whole or decimal, may group their digits in threes by commas, may have an exponent of ten, and may be
    divided once by another.

    Example:
        >>> parse_number("-1,250.50"), parse_number("3/4"), parse_number("1,00"), parse_number("5 or 6")
        (Fraction(-2501, 2), Fraction(3, 4), None, None)
    """
    if len(text) > MAX_ANSWER:
        return None
    parts = [_decimal(part.strip()) for part in text.replace("−", "-").split("/")]  # noqa: RUF001  (the minus sign of print)
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 2 or parts[0] is None or not parts[1]:
        return None
    return parts[0] / parts[1]


def evaluate_arithmetic(text: str) -> Fraction | None:
    """The exact value of an expression of whole numbers, ``+ - * /`` and parentheses; None for anything else.

    The text is never executed: it is parsed, and its tree is walked.

    Example:
        >>> evaluate_arithmetic("(7 - 1) / 4"), evaluate_arithmetic("2 ** 9"), evaluate_arithmetic("1 / 0")
        (Fraction(3, 2), None, None)
    """
    if len(text) > MAX_ANSWER or not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):  # too deep counts as unreadable
        return None


def is_costly(text: str) -> bool:
    """Whether reading this expression, or exact arithmetic on it, may take very long.

    So may towers of powers, powers that multiply to more than 100,000, large factorials and binomials, repeated
    exponentials, sums, products, integrals, limits, and more than 40 brackets.

    Example:
        >>> is_costly("(x + 1)^2 + x^{10}"), is_costly("9^{9^9}"), is_costly("((9**99)**99)**99")
        (False, True, True)
    """
    if sum(text.count(opening) for opening in "([{") > _MOST_BRACKETS:
        return True
    power = 1
    for exponent, more in _EXPONENT.findall(text):
        if more or any(sign in exponent for sign in ("^", "**", "!")) or exponent in ("{", "("):
            return True
        for number in re.findall(r"\d+", exponent):
            power *= max(int(number), 1)
    return power > _LARGEST_POWER or _COSTLY.search(text) is not None


def equal_math(one: str, other: str) -> bool:
    r"""Equal as mathematics, by math-verify: ``\frac{1}{2}`` and 0.5, ``x^2 + 2x + 1`` and ``(x + 1)^2``.

    What cannot be read is not equal to anything. Expressions whose exact value may take hours (see :func:`is_costly`)
    are compared as text alone: the time limit of math-verify works by signals, which fail outside the main thread.

    Args:
        one: the reference; math-verify is not symmetric where a side is an equation or an inequality.
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
    if any("$" in text or "boxed" in text or is_costly(text) for text in (one, other)):
        return False  # delimiters of its own would let an answer state several
    try:
        sides = [parse(f"${text}$", parsing_timeout=None) for text in (one, other)]
        return bool(sides[0] and sides[1] and verify(*sides, timeout_seconds=None))
    except Exception:  # noqa: BLE001  (a hostile text may break any parser, and is then not equal)
        return False


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError(
            "equality: 'math' needs the package math-verify, got an environment without it; "
            "pip install 'flowgraph-llm[tasks]', or use equality='number'"
        ) from error

    def keep(record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in record.getMessage()

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(keep)
    return parse, verify


def _last_boxed(text: str) -> CharSpan | None:
    opened: list[int | None] = []  # where each open brace's box begins; None for a plain brace
    best = None
    for match in _BOXED.finditer(text):
        token = match.group()
        if token == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
        elif token in ("{", "\\boxed{"):
            opened.append(match.end() if token != "{" else None)
    return best


def _last_tag(text: str) -> CharSpan | None:
    best, start = None, None
    for match in _TAG.finditer(text):
        if match.group() == "<answer>":
            start = match.end()
        elif start is not None:
            best, start = (start, match.start()), None
    return best


def _last_hash(text: str) -> CharSpan | None:
    best = None
    for match in _HASH.finditer(text):
        best = match.span(1)
    return best


_FINDERS = {"boxed": _last_boxed, "tag": _last_tag, "hash": _last_hash}


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    import regex  # unlike re it can be stopped, which an expression from a settings file must be

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


def _by_pattern(text: str, pattern: str) -> CharSpan | None:
    best = None
    try:
        for match in _compiled(pattern).finditer(text, timeout=PATTERN_SECONDS):
            best = match.span(1)
    except TimeoutError as error:
        raise TaskError(
            f"pattern: must be searched in {PATTERN_SECONDS:g} s, got {pattern!r}, which takes longer on a response of "
            f"{len(text)} characters; avoid repeats within repeats"
        ) from error
    return best if best != (-1, -1) else None


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None or not (match.group(2) or match.group(3)):
        return None
    sign, whole, decimals, exponent = match.groups()
    digits = (whole or "").replace(",", "") + (decimals or "")
    return Fraction(int(sign + digits)) * Fraction(10) ** (int(exponent or 0) - len(decimals or ""))


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        inner = _value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("no arithmetic")
