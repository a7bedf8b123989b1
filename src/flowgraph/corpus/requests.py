"""The lines of a corpus: one JSON object each, read one at a time, with the text that each requests to be traced.

The file is scanned once, so that every invalid line is known before a model runs. Texts are read again when their
window is traced: memory holds a few hundred bytes per line, and the texts of one window.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from flowgraph.errors import InvalidInputError
from flowgraph.files import PathLike
from flowgraph.text.selectors import AllOf, Literal, Selector
from flowgraph.tracing.inputs import TextRequest

_SHORT_NAME = 40
"""Characters of an id that its file name keeps; the line number makes the name unique."""


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CorpusFields:
    """The keys of a line, by what they hold; ``""`` turns an optional one off.

    Attributes:
        prompt: text, or chat messages.
        messages: chat messages, another name for the prompt; a final assistant message is the response.
        response: the model's response, as text or generated ids.
        id: a text or integer, unique in the file.
        question: literal text of the prompt, where flow enters; a list of texts: all of them.
        answer: literal text of the final part of the response, where flow leaves, or a list of texts; the last
            occurrence of each counts.
        chat_template_kwargs: arguments of the chat template, an object; they override those of the run.

    Raises:
        InvalidInputError: no key for the prompt, or one key for two fields.
    """

    prompt: str = "prompt"
    messages: str = "messages"
    response: str = "response"
    id: str = "id"
    question: str = "question"
    answer: str = "answer"
    chat_template_kwargs: str = "chat_template_kwargs"

    def __post_init__(self) -> None:
        """Refuse a missing prompt, and two fields with one key, which would read one value as two things."""
        if not self.prompt and not self.messages:
            raise InvalidInputError("fields: prompt or messages must have a name, got two empty ones; name one")
        seen: set[str] = set()
        for field in fields(self):
            key = getattr(self, field.name)
            if key in seen:
                raise InvalidInputError(
                    f"fields: each must have a name of its own, got {key!r} more than once; "
                    "turn the one you do not use off with ''"
                )
            if key:
                seen.add(key)


@dataclass(frozen=True)
class Line:
    """The place of one line in the file, and what is known of it without a model.

    Attributes:
        number: counted from 1, blank lines included.
        start: offset of its first byte.
        size: its length in bytes.
        digest: fingerprint of its bytes.
        id: the id that it states, else ``line-NUMBER``.
        error: why it is not a valid request; None where it is valid.
    """

    number: int
    start: int
    size: int
    digest: str
    id: str
    error: str | None = None

    @property
    def name(self) -> str:
        """A file name that is safe on every system and unique to this line."""
        if self.id == _default_id(self.number):
            return f"{self.number:06d}"
        # The number makes the name unique, the id makes it readable.
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", self.id).strip("-")
        return f"{self.number:06d}-{slug[:_SHORT_NAME]}".rstrip("-")


def _default_id(number: int) -> str:
    """Return the id of a line that states none."""
    return f"line-{number}"


def scan(path: PathLike, names: CorpusFields) -> list[Line]:
    """List every line that is not blank, in order; an invalid line holds its error.

    Args:
        path: the file.
        names: the keys of a line.

    Raises:
        InvalidInputError: the file cannot be read, or holds no line.

    Cost: one read of the file.
    """
    lines: list[Line] = []
    number_of_id: dict[str, int] = {}
    for number, start, raw in _raw_lines(path):
        # A line that fails before its id is read gets the default one.
        line_id = _default_id(number)
        error = None
        try:
            values = _parse(raw)
            line_id = _identity(values, names, default=line_id)
            _request(values, names)
            if line_id in number_of_id:
                raise InvalidInputError(
                    f"{names.id}: must be unique, got {line_id[:80]!r} as on line {number_of_id[line_id]}; "
                    "give each line its own"
                )
        except InvalidInputError as invalid:
            error = str(invalid)
        else:
            number_of_id[line_id] = number
        lines.append(Line(number, start, len(raw), _digest(raw), line_id, error))
    if not lines:
        raise InvalidInputError(f"path: must hold at least one line, got none in {path}; write one JSON object a line")
    return lines


def read_requests(path: PathLike, lines: list[Line], names: CorpusFields) -> Iterator[tuple[Line, TextRequest]]:
    """Read the requests of some valid lines, in the order given.

    Args:
        path: the file that was scanned.
        lines: some of its valid lines.
        names: the keys of a line.

    Raises:
        InvalidInputError: a line has changed since the file was scanned.
    """
    with _open(path) as file:
        for line in lines:
            # The offset leads to the line, so earlier lines are not read again.
            file.seek(line.start)
            raw = file.read(line.size)
            if _digest(raw) != line.digest:
                raise InvalidInputError(
                    f"path: must stay as it is during a run, got another line {line.number} in {path}; start again"
                )
            yield line, _request(_parse(raw), names)


def _digest(raw: bytes) -> str:
    """Return a short fingerprint of a line."""
    return hashlib.sha256(raw).hexdigest()[:16]


def _open(path: PathLike) -> BinaryIO:
    """Open the file for reading."""
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        # A NUL in the name is a ValueError.
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"path: must be a file that can be read, got {str(path)!r} ({reason}); check the name"
        ) from error


def _raw_lines(path: PathLike) -> Iterator[tuple[int, int, bytes]]:
    """Read number, offset and bytes of every line that is not blank."""
    start = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.removeprefix(_BYTE_ORDER_MARK).strip():
                yield number, start, raw
            start += len(raw)


def _parse(raw: bytes) -> dict[str, Any]:
    """Read the bytes of a line as one JSON object."""
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"line: must be UTF-8, got the byte 0x{raw[error.start]:02x} at position {error.start}; convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        raise InvalidInputError(
            f"line: must be one JSON object, got invalid JSON ({reason}); write one object a line"
        ) from None
    if not isinstance(values, dict):
        raise InvalidInputError(
            f'line: must be a JSON object, got {json.dumps(values):.80}; write it as {{"prompt": ...}}'
        )
    # JSON can escape half of a surrogate pair, which neither a tokenizer nor a table can hold.
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidInputError(
            "line: must be text that UTF-8 can hold, got half of a surrogate pair (\\ud800 to \\udfff alone); "
            "write the complete character"
        ) from None
    return values


def _identity(values: Mapping[str, Any], names: CorpusFields, default: str) -> str:
    """Read the id of a line, or the default where it states none."""
    given = _optional(values, names.id)
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise InvalidInputError(
            f"{names.id}: must be a text or an integer, got {given!r:.80}; leave it out to get the line's number"
        )
    return str(given)


def _request(values: Mapping[str, Any], names: CorpusFields) -> TextRequest:
    """Read what a line requests to be traced."""
    prompt = _prompt(values, names)
    response = _optional(values, names.response)
    if response is not None and not isinstance(response, str | list):
        raise InvalidInputError(
            f"{names.response}: must be text or a list of token ids, got {response!r:.80}; "
            "leave it out to have it generated"
        )
    return TextRequest(
        prompt,
        response,
        question=_literal(values, names.question),
        answer=_literal(values, names.answer),
        chat_template_kwargs=_template_arguments(values, names.chat_template_kwargs),
    )


def _template_arguments(values: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Read the arguments of the chat template."""
    arguments = _optional(values, key)
    if arguments is not None and not isinstance(arguments, dict):
        raise InvalidInputError(
            f"{key}: must be an object of template arguments, got {arguments!r:.80}; "
            'write it as {"enable_thinking": false}'
        )
    return arguments


def _prompt(values: Mapping[str, Any], names: CorpusFields) -> str | list[dict[str, Any]]:
    """Read the prompt under one of its two keys; only chat messages may be under the second."""
    keys = [key for key in (names.prompt, names.messages) if key]
    # Exactly one of the two keys must hold a value.
    given = [key for key in keys if values.get(key) is not None]
    if len(given) != 1:
        wanted = " or ".join(repr(key) for key in keys)
        got = "both" if given else f"the keys {sorted(values)!s:.80}"
        raise InvalidInputError(f"{wanted}: must be given, one of them, got {got}; name the field if it is another")
    key = given[0]
    prompt = values[key]
    # Whether each message has a role and text is checked with the prompt, when its turn comes.
    is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
    if is_chat:
        return prompt
    if key == names.messages:
        raise InvalidInputError(
            f"{key}: must be chat messages, got {prompt!r:.80}; write a list of objects with role and content"
        )
    if not isinstance(prompt, str):
        raise InvalidInputError(
            f"{key}: must be text or chat messages, got {prompt!r:.80}; write a string, or a list of objects with "
            "role and content"
        )
    return prompt


def _optional(values: Mapping[str, Any], key: str) -> Any:
    """Read the value under a key; None where the key is missing or turned off."""
    if not key:
        return None
    return values.get(key)


def _literal(values: Mapping[str, Any], key: str) -> Selector | None:
    """Read the literal text of a question or an answer, or several, as a selector."""
    given = _optional(values, key)
    if given is None:
        return None
    texts: list[Any] = given if isinstance(given, list) and given else [given]
    for text in texts:
        is_text = isinstance(text, str | int | float) and not isinstance(text, bool)
        if not is_text or not str(text).strip():
            raise InvalidInputError(
                f"{key}: must be text or a number that is part of the line's text, or a list of them, got "
                f"{text!r:.80}; leave it out to have it found"
            )
    literals = [Literal(text) for text in texts]
    return literals[0] if len(literals) == 1 else AllOf(literals)
