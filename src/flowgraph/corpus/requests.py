"""The lines of a corpus: one JSON object each, read one at a time, and what each asks to be traced.

The file is scanned once, so that every line that is no request is known before a model runs; texts are read again
when their turn comes, so memory holds a few hundred bytes per line and no text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flowgraph.errors import InvalidInputError
from flowgraph.files import PathLike
from flowgraph.masks import Mask
from flowgraph.text.encoding import EncodedText
from flowgraph.text.selectors import Part, Regex, Selector

_SHORT_NAME = 40
"""Characters of an id that its file name keeps; the line number makes the name unique."""


@dataclass(frozen=True)
class CorpusFields:
    """The keys of a line, by what they hold; ``""`` turns an optional one off.

    Attributes:
        prompt: text, or chat messages.
        messages: chat messages, another name for the prompt; a final assistant message is the response.
        response: the model's response, as text or generated ids.
        id: a text or whole number, unique in the file.
        question: literal text of the prompt, where flow enters.
        answer: literal text of the response, where flow leaves; its last occurrence counts.
    """

    prompt: str = "prompt"
    messages: str = "messages"
    response: str = "response"
    id: str = "id"
    question: str = "question"
    answer: str = "answer"

    def __post_init__(self) -> None:
        """Two fields of one name would read one value as two things."""
        if not self.prompt and not self.messages:
            raise InvalidInputError("fields: prompt or messages must have a name, got two empty ones; name one")
        names = [name for name in (getattr(self, each.name) for each in fields(self)) if name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidInputError(
                f"fields: each must have a name of its own, got {twice[0]!r} more than once; "
                "turn the one you do not use off with ''"
            )


@dataclass(frozen=True)
class Line:
    """Where one line of the file lies, and what is known of it without a model.

    Attributes:
        number: counted from 1, blank lines too.
        start, size: its bytes in the file.
        digest: fingerprint of its bytes.
        id: the id it states, else ``line-NUMBER``.
        error: why it is no request; None where it is one.
    """

    number: int
    start: int
    size: int
    digest: str
    id: str
    error: str | None = None

    @property
    def name(self) -> str:
        """A file name: safe on every system, and of this line alone."""
        slug = "" if self.id == f"line-{self.number}" else re.sub(r"[^A-Za-z0-9_]+", "-", self.id).strip("-")
        return f"{self.number:06d}-{slug[:_SHORT_NAME]}".rstrip("-")


@dataclass(frozen=True)
class Literal:
    """The last occurrence of a text, itself and never an expression: data must not be read as a pattern.

    A text that begins or ends with a letter or digit is found as a whole word: the answer 7 is not in 17.
    """

    text: str

    def select(self, encoded: EncodedText, part: Part) -> Mask:
        """Tokens of the occurrence."""
        before = r"(?<!\w)" if re.match(r"\w", self.text[0]) else ""
        after = r"(?!\w)" if re.match(r"\w", self.text[-1]) else ""
        return Regex(before + re.escape(self.text) + after).select(encoded, part)


@dataclass(frozen=True)
class Request:
    """What one line asks to be traced."""

    prompt: str | list[dict[str, Any]]
    response: str | list[int] | None
    question: Selector | None
    answer: Selector | None


def scan(path: PathLike, names: CorpusFields) -> list[Line]:
    """Every line that is not blank, in order; those that are no request say why.

    Raises:
        InvalidInputError: the file cannot be read, or holds no line.

    Cost: one read of the file.
    """
    lines: list[Line] = []
    first: dict[str, int] = {}
    for number, start, raw in _raw_lines(path):
        digest = hashlib.sha256(raw).hexdigest()[:16]
        given = f"line-{number}"
        try:
            values = _parse(raw)
            given = _identity(values, names, given)
            _request(values, names)
            if given in first:
                raise InvalidInputError(
                    f"{names.id}: must be unique, got {given[:80]!r} as on line {first[given]}; give each line its own"
                )
        except InvalidInputError as error:
            lines.append(Line(number, start, len(raw), digest, given, str(error)))
        else:
            first[given] = number
            lines.append(Line(number, start, len(raw), digest, given))
    if not lines:
        raise InvalidInputError(f"path: must hold at least one line, got none in {path}; write one JSON object a line")
    return lines


def read_requests(path: PathLike, lines: list[Line], names: CorpusFields) -> Iterator[tuple[Line, Request]]:
    """The requests of some lines, in the order given.

    Raises:
        InvalidInputError: a line is no longer what it was when the file was scanned.
    """
    with _open(path) as file:
        for line in lines:
            file.seek(line.start)
            raw = file.read(line.size)
            if hashlib.sha256(raw).hexdigest()[:16] != line.digest:
                raise InvalidInputError(
                    f"path: must stay as it is during a run, got another line {line.number} in {path}; start again"
                )
            yield line, _request(_parse(raw), names)


def _open(path: PathLike) -> Any:
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"path: must be a file that can be read, got {str(path)!r} ({reason}); check the name"
        ) from error


def _raw_lines(path: PathLike) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, start, raw
            start += len(raw)


def _parse(raw: bytes) -> dict[str, Any]:
    """One JSON object out of the bytes of a line."""
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"line: must be UTF-8, got the byte 0x{raw[error.start]:02x} at position {error.start}; convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        raise InvalidInputError(
            f"line: must be one JSON object, got text that is none ({reason}); write one object a line"
        ) from None
    if not isinstance(values, dict):
        raise InvalidInputError(
            f'line: must be a JSON object, got {json.dumps(values):.80}; write it as {{"prompt": ...}}'
        )
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidInputError(
            "line: must be text that UTF-8 can hold, got half of a surrogate pair (\\ud800 to \\udfff alone); "
            "write the whole character"
        ) from None
    return values


def _identity(values: Mapping[str, Any], names: CorpusFields, default: str) -> str:
    given = _optional(values, names.id)
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise InvalidInputError(
            f"{names.id}: must be a text or a whole number, got {given!r:.80}; leave it out to get the line's number"
        )
    return str(given)


def _request(values: Mapping[str, Any], names: CorpusFields) -> Request:
    prompts = {name: values[name] for name in (names.prompt, names.messages) if _optional(values, name) is not None}
    if len(prompts) != 1:
        wanted = " or ".join(repr(name) for name in (names.prompt, names.messages) if name)
        got = "both" if prompts else f"the keys {sorted(values)!s:.80}"
        raise InvalidInputError(f"{wanted}: must be given, one of them, got {got}; name the field if it is another")
    [(name, prompt)] = prompts.items()
    is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and (name == names.messages or not isinstance(prompt, str)):
        wanted = "chat messages" if name == names.messages else "text or chat messages"
        raise InvalidInputError(
            f"{name}: must be {wanted}, got {prompt!r:.80}; write {'' if name == names.messages else 'a string, or '}"
            "a list of objects with role and content"
        )
    response = _optional(values, names.response)
    if response is not None and not isinstance(response, str | list):
        raise InvalidInputError(
            f"{names.response}: must be text or a list of token ids, got {response!r:.80}; "
            "leave it out to have it generated"
        )
    question, answer = (_literal(values, field) for field in (names.question, names.answer))
    return Request(prompt, response, question, answer)


def _optional(values: Mapping[str, Any], name: str) -> Any:
    return values.get(name) if name else None


def _literal(values: Mapping[str, Any], name: str) -> Selector | None:
    text = _optional(values, name)
    if text is None:
        return None
    if isinstance(text, bool) or not isinstance(text, str | int | float) or not str(text).strip():
        raise InvalidInputError(
            f"{name}: must be text or a number that stands in the line's text, got {text!r:.80}; "
            "leave it out to have it found"
        )
    return Literal(str(text).strip())
