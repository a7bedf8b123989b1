r"""Find the answer that a text states: in a box, behind ``####``, in tags, in JSON, in a phrase, as a choice.

Every way to state an answer is a function from a text to the characters of all its complete statements. Of several
statements the last one in the text counts, whatever its form; the order of the forms decides nothing. A text
that states no answer still ends in one: its last block of code, or its last sentence.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flowgraph.errors import InvalidInputError
from flowgraph.text.final_part import final_part
from flowgraph.text.sentences import LINE, LINE_BREAKS, sentence_starts
from flowgraph.text.spans import Offsets

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
# "The answer is 42", "Answer: 42", or "Answer" as a heading above the value.
_PHRASE = re.compile(
    rf"(?:\banswer\b[ \t{_MARKS}]*(?:(?:to|for)\b[^\n.:=]{{1,80}}?\s)?(?:is\b|are\b|was\b|[:=])"
    rf"|^[ \t#{_MARKS}]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t{_MARKS}]*\r?\n){_VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
# "The answer is correct" comments on an answer that is stated elsewhere.
_COMMENT = re.compile(
    r"(?:in)?correct|right|wrong|clear|obvious|given|shown|above|below|as|based|because|in|that|therefore|thus|also|"
    r"indeed|now|not|derived|obtained|found|simple|simply|consistent|valid|unique|verified|the same",
    re.IGNORECASE,
)

_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<(/?)answer>")
_TAG_ANY_CASE = re.compile(_TAG.pattern, re.IGNORECASE)
# A line of its own.
_HASH_LINE = re.compile(r"^[ \t]*####(?!#)([^\n]*)$", re.MULTILINE)
# A number at the end of a line, or other text at the end of the response.
_HASH = re.compile(
    r"(?<!#)####[ \t]*(-?\$?\d(?:[\d,./ ]*\d)?%?(?=[.\s]*$)|[^\s#](?:.{0,300}\S)?(?=\s*\Z))", re.MULTILINE
)

_JSON_KEY = re.compile(r"""(["'])(?:final[ _-]?)?answer\1\s*:\s*""", re.IGNORECASE)
_OTHER_JSON_KEY = re.compile(
    r"""(["'])(?:result|value|output|solution|response|choice|label|prediction)\1\s*:\s*""", re.IGNORECASE
)
_JSON_STRING = re.compile(r"""(["'])((?:(?!\1)[^\\\n]|\\.)*+)\1""")
_JSON_SCALAR = re.compile(r"-?\d[\d.]*(?:[eE][+-]?\d+)?|true\b|false\b", re.IGNORECASE)
_MAX_JSON = 20_000
"""Characters of a list or an object that states an answer."""

# "(B)" or "B": one letter, alone.
_LETTER = r"(\([A-Ja-j1-9]\)|[A-J](?![\w'’]))"  # noqa: RUF001
_CHOICES = (
    # "The right option is (B)."
    re.compile(
        rf"(?i:\b(?:option|choice|alternative)[ \t{_MARKS}]*(?:is|are|was|would be|must be|should be|[:=]))"
        rf"[\s:{_MARKS}]*(?:(?i:option|choice)\s)?{_LETTER}"
    ),
    # "The answer is option (B)", "The answer is (B), because ...".
    re.compile(
        rf"(?i:\banswer[ \t{_MARKS}]*(?:is|[:=]))[\s:{_MARKS}]*(?:(?i:the[ \t]+)?(?i:option|choice|alternative)\s"
        rf"[{_MARKS}]*{_LETTER}|{_LETTER}(?=[ \t{_MARKS}]*(?:[,;]|(?i:because|since)\b)))"
    ),
    # "Option (B) is correct."
    re.compile(
        rf"(?<![\w(]){_LETTER}[ \t{_MARKS}]*(?i:(?:is|would be|must be)[ \t]+(?:the[ \t]+)?(?:only[ \t]+)?"
        r"(?:correct|right|best|answer)\b)"
    ),
    # "I choose B."
    re.compile(rf"(?i:\b(?:choose|pick|select|go with)[ \t]+(?:(?:option|choice|answer)[ \t]+)?)[{_MARKS}]*{_LETTER}"),
)

# "\boxed{answer}" repeats the requested format, and states nothing.
_PLACEHOLDER = re.compile(
    r"[\s\[\](){}<>*_`\"'$]*(?:\\(?:text|mathrm|textbf)\{)?(?:(?:your|my|the|an?)[ _-]+)?"
    r"(?:(?:final|correct|numeric(?:al)?)[ _-]*)?(?:answer|solution)(?:[ _-]+here)?[\s\[\](){}<>*_`\"'$]*"
    r"|[\s.…_?]+|\\[lcd]?dots",
    re.IGNORECASE,
)

_FENCE = re.compile(r"^[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_PROSE_LANGUAGES = frozenset(
    ("text", "txt", "plain", "plaintext", "markdown", "md", "latex", "tex", "math", "json", "yaml", "xml", "output")
)
"""Names of a fence that do not make its block a program; a fence without a name does not either."""
# Lines that hold no sentence: rules, fences, brackets that close a formula.
_DECORATION = re.compile(r"[\s`~*_=#|>–—•+\\\[\](){}$-]*")  # noqa: RUF001
_COURTESY = re.compile(
    r"[\s*_]*(?:I hope (?:this|that|it)\b|Hope (?:this|that|it)\b|(?:Please )?let me know\b|(?:Please )?feel free\b"
    r"|Good luck\b|Have a (?:nice|great|good)\b|Is there anything else\b|Do you (?:want|need|have any)\b"
    r"|Would you like\b|If you have any\b|Happy to help\b|(?:I'm|I am) (?:happy|glad) to help\b|You're welcome\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class StatedAnswer:
    """An answer that a text states.

    Attributes:
        start: its first character.
        end: the character after its last.
        rule: the form in which it is stated, such as ``"boxed"``; see :func:`stated_answers`.
    """

    start: int
    end: int
    rule: str


def stated_answers(
    text: str,
    rules: Sequence[str] | None = None,
    *,
    strict: bool = False,
    opening: str = "",
    thinking: bool = False,
) -> list[StatedAnswer]:
    r"""Find all answers that a response states, in the order of the text: the last one counts.

    - ``"boxed"``: ``\boxed{...}``, braces balanced.
    - ``"hash"``: ``#### ...``.
    - ``"tag"``: ``<answer>...</answer>``.
    - ``"json"``: the value of ``"answer"`` or ``"final_answer"``.
    - ``"phrase"``: "The answer is ...", "Answer: ...".
    - ``"choice"``: "The right option is (B)", "B is correct".

    Of nested statements the innermost counts; a phrase or choice around or inside one of the first four gives way
    to it. Blank statements and those without an end are ignored. A repetition of the format that was asked for
    (``\boxed{answer}``, ``<answer>...</answer>`` with three dots) is ignored where another statement exists.

    Args:
        text: the response.
        rules: the forms to search; None: all.
        strict: tags in lower case and ``####`` at the start of a line only, as for rewards.
        opening: what the prompt wrote of the model's turn; see :func:`flowgraph.final_part`.
        thinking: search the complete response, not only its final part.

    Raises:
        InvalidInputError: an unknown rule.

    Cost: one pass over the text for each rule.

    Example:
        >>> text = r"Try \boxed{5}. So the answer is 7."
        >>> [(text[stated.start : stated.end], stated.rule) for stated in stated_answers(text)]
        [('5', 'boxed'), ('7', 'phrase')]
    """
    chosen = RULES if rules is None else tuple(rules)
    for rule in chosen:
        if rule not in RULES:
            raise InvalidInputError(f"rules: must be among {', '.join(RULES)}, got {rule!r}; choose some of them")
    start = 0
    end = len(text)
    if not thinking:
        part = final_part(text, opening=opening)
        start = part.start
        end = part.end
    found = statements_in(text[start:end], chosen, strict=strict)
    return [StatedAnswer(start + one.start, start + one.end, one.rule) for one in found]


def statements_in(text: str, rules: Sequence[str], *, strict: bool = False) -> list[StatedAnswer]:
    """Find the statements of a text that is the final part of a response; see :func:`stated_answers`."""
    # A variable or a comment in a program states nothing.
    code = [(block.start, block.end) for block in _code_blocks(text) if block.is_code]
    finders = _STRICT_FINDERS if strict else _FINDERS
    marked: set[StatedAnswer] = set()
    worded: set[StatedAnswer] = set()
    for rule in rules:
        # Phrases of prose and "####" lines inside a program are not statements.
        kept = worded if rule in _WORDED else marked
        is_in_prose = rule in _WORDED or rule == "hash"
        for low, high in finders[rule](text):
            if not text[low:high].strip():
                continue
            if is_in_prose and _touches(code, low, high):
                continue
            kept.add(StatedAnswer(low, high, rule))

    # Marks: the innermost. Words: not where they touch a mark, and a choice inside a phrase is its value.
    found = _innermost(marked)
    marks = sorted((one.start, one.end) for one in found)
    outside_marks = [one for one in worded if not _touches(marks, one.start, one.end)]
    found += _innermost(outside_marks)
    found.sort(key=_by_end)

    # Placeholders and comments are dropped where another statement is left.
    for states_nothing in (_is_placeholder, _is_comment):
        others = [one for one in found if not states_nothing(text, one)]
        found = others or found
    return found


def last_code(text: str) -> Offsets | None:
    """Find the content of the block of code that ends a text, courtesies aside; None where other text ends it.

    A block that is not closed extends to the end of the text.
    """
    blocks = _code_blocks(text)
    if not blocks or _last_spoken(text[blocks[-1].outer_end :]) is not None:
        return None
    last = blocks[-1]
    return _trimmed(text, last.start, last.end)


def last_line(text: str) -> Offsets | None:
    """Find the last line that is not blank, up to its last visible character."""
    end = len(text.rstrip())
    line_break = max(text.rfind("\r", 0, end), text.rfind("\n", 0, end))
    if not text[:end].strip():
        return None
    return line_break + 1, end


def last_sentence(text: str) -> Offsets | None:
    """Find the last sentence of a text; lines of marks alone and courtesies ("I hope this helps!") are passed over."""
    return _last_spoken(text) or last_line(text)


def _last_spoken(text: str) -> Offsets | None:
    """Find the last sentence that is no courtesy; None where there is none."""
    # Line breaks of all kinds become one sign, at the same characters; lines of decoration hold no sentence.
    plain = text.translate(LINE_BREAKS)
    lines = []
    for line in LINE.finditer(plain):
        if not _DECORATION.fullmatch(plain, *line.span()):
            lines.append(line.span())

    # From the last sentence of the last line backwards.
    for low, high in reversed(lines):
        starts = [low + offset for offset in sentence_starts(plain[low:high])]
        if not starts:
            starts = [low]
        ends = [*starts[1:], high]
        for start, end in zip(reversed(starts), reversed(ends), strict=True):
            if not _COURTESY.match(plain, start):
                return _trimmed(text, start, end)
    return None


@dataclass(frozen=True)
class _CodeBlock:
    """A fenced block of a text.

    Attributes:
        start: first character of its content.
        end: the character after its last.
        outer_end: the character after its closing fence.
        is_code: whether its fence names a programming language.
    """

    start: int
    end: int
    outer_end: int
    is_code: bool


def _code_blocks(text: str) -> list[_CodeBlock]:
    """Find the fenced blocks; one without a closing fence extends to the end."""
    blocks = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        language = fence[2].strip()
        if opened is None:
            opened = fence
        # Only a fence that repeats the opening one, without a language, closes the block.
        elif fence[1].startswith(opened[1]) and not language:
            blocks.append(_code_block(opened, fence.start(), fence.end()))
            opened = None
    if opened is not None:
        blocks.append(_code_block(opened, len(text), len(text)))
    return blocks


def _code_block(opened: re.Match[str], end: int, outer_end: int) -> _CodeBlock:
    """Build a block from its opening fence and its ends."""
    words = opened[2].casefold().split()
    is_code = bool(words) and words[0] not in _PROSE_LANGUAGES
    return _CodeBlock(min(opened.end(), end), end, outer_end, is_code)


def _boxes(text: str) -> list[Offsets]:
    r"""Find the contents of all closed ``\boxed{...}``."""
    found = []
    # Each open brace: where its content starts, and whether it opened a \boxed. The stack makes this one pass,
    # so the cost stays linear for a response that repeats "\boxed{" many times.
    open_braces: list[tuple[int, bool]] = []
    for match in _BOX.finditer(text):
        symbol = match[0]
        # An escaped brace, "\{", does not open anything.
        if symbol.endswith("{") and symbol != r"\{":
            open_braces.append((match.end(), symbol != "{"))
        elif symbol == "}" and open_braces:
            start, is_boxed = open_braces.pop()
            if is_boxed:
                found.append((start, match.start()))
    return found


def _tags(text: str, tag: re.Pattern[str] = _TAG) -> list[Offsets]:
    """Find the contents of all ``<answer>...</answer>``, each from the opening closest to its end."""
    found = []
    start = None
    for match in tag.finditer(text):
        # A second opening tag before a closing one restarts the content.
        if not match[1]:
            start = match.end()
        elif start is not None:
            found.append((start, match.start()))
            start = None
    return found


def _tags_of_any_case(text: str) -> list[Offsets]:
    """Find the same for ``<ANSWER>`` and ``<Answer>`` too."""
    return _tags(text, _TAG_ANY_CASE)


def _hash_lines(text: str) -> list[Offsets]:
    """Find the rest of each line that starts with ``####``."""
    return [match.span(1) for match in _HASH_LINE.finditer(text)]


def _hashes(text: str) -> list[Offsets]:
    """Find what stands behind ``####`` anywhere in a line."""
    return [match.span(1) for match in _HASH.finditer(text)]


def _json_values(text: str, key: re.Pattern[str] = _JSON_KEY) -> list[Offsets]:
    """Find the values of a key in JSON or in the text of a Python dict; a string without its quotes."""
    found = []
    for match in key.finditer(text):
        at = match.end()
        # A string, a number or word, or a list or object that is read to its end.
        string = _JSON_STRING.match(text, at)
        scalar = _JSON_SCALAR.match(text, at)
        if string:
            found.append(string.span(2))
        elif scalar:
            found.append(scalar.span())
        elif text[at : at + 1] in ("[", "{"):
            try:
                _, length = json.JSONDecoder().raw_decode(text[at : at + _MAX_JSON])
            except (ValueError, RecursionError):
                continue
            found.append((at, at + length))
    return found


def _json_answers(text: str) -> list[Offsets]:
    """Find the values of "answer" in JSON; in a text that is one JSON object, those of similar keys otherwise."""
    found = _json_values(text)
    if found:
        return found

    # Other keys count only where the response is one JSON object, alone or in its only code block.
    blocks = _code_blocks(text)
    low = 0
    high = len(text)
    if len(blocks) == 1:
        low = blocks[0].start
        high = blocks[0].end
    candidate = text[low:high]
    if not candidate.strip().startswith("{"):
        return []
    try:
        is_object = isinstance(json.loads(candidate), dict)
    except (ValueError, RecursionError):
        return []
    if not is_object:
        return []
    return [(low + start, low + end) for start, end in _json_values(candidate, _OTHER_JSON_KEY)]


def _phrases(text: str) -> list[Offsets]:
    """Find the values of "the answer is ..."; a value in a question ("Is the answer 12?") is not stated."""
    found = []
    for match in _PHRASE.finditer(text):
        start, end = match.span(1)
        is_asked = text[end : end + 3].lstrip("*_\"'`$)").startswith("?")
        if not is_asked:
            found.append((start, end))
    return found


def _choices(text: str) -> list[Offsets]:
    """Find the letters of options that are chosen."""
    found = []
    for pattern in _CHOICES:
        for match in pattern.finditer(text):
            # The letter is the only group, or one of two alternatives.
            group = match.lastindex or 0
            found.append(match.span(group))
    return found


_FINDERS: dict[str, Callable[[str], list[Offsets]]] = {
    "boxed": _boxes,
    "hash": _hashes,
    "tag": _tags_of_any_case,
    "json": _json_answers,
    "phrase": _phrases,
    "choice": _choices,
}
_STRICT_FINDERS = {**_FINDERS, "hash": _hash_lines, "tag": _tags}
_WORDED = ("phrase", "choice")
RULES = tuple(_FINDERS)
"""The names of all ways to state an answer."""


def _by_end(one: StatedAnswer) -> Offsets:
    """Sort key: by the end, the inner one of two with one end first."""
    return one.end, -one.start


def _innermost(statements: Iterable[StatedAnswer]) -> list[StatedAnswer]:
    """Remove every statement that holds another one."""
    kept: list[StatedAnswer] = []
    # In the order of their ends, a statement holds an earlier one exactly where it does not start behind it.
    latest_start = -1
    for one in sorted(statements, key=_by_end):
        if one.start > latest_start:
            kept.append(one)
        latest_start = max(latest_start, one.start)
    return kept


def _touches(spans: Sequence[Offsets], start: int, end: int) -> bool:
    """Return whether a range has a character in common with any of the spans, which are disjoint and in order."""
    # The only candidate is the last span that starts before the end of the range.
    index = bisect_left(spans, (end, 0))
    return index > 0 and spans[index - 1][1] > start


def _is_placeholder(text: str, one: StatedAnswer) -> bool:
    """Return whether a statement repeats the format that was asked for."""
    return _PLACEHOLDER.fullmatch(text, one.start, one.end) is not None


def _is_comment(text: str, one: StatedAnswer) -> bool:
    """Return whether a phrase speaks about an answer instead of stating it."""
    if one.rule != "phrase":
        return False
    comment = _COMMENT.match(text, one.start, one.end)
    return comment is not None and not text[comment.end() : comment.end() + 1].isalnum()


def _trimmed(text: str, start: int, end: int) -> Offsets | None:
    """Remove blanks from both ends of a span; None where nothing is left."""
    content = text[start:end]
    visible = content.strip()
    if not visible:
        return None
    start += len(content) - len(content.lstrip())
    return start, start + len(visible)
