"""Text that remembers which chat message each of its characters came from, through the operations of a template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, SupportsIndex

TEMPLATE = -1
"""The origin of a character that no message brought."""


class TracedText(str):
    """A string that equals its text in every comparison, and keeps the origin of each character.

    A template that tests, strips, splits, replaces or joins such a string does the same as with a plain one, because
    it is one. Operations that are not listed here return plain text, whose origin is the template.

    Attributes:
        origins: one number for each character: its place among the characters of all messages, or :data:`TEMPLATE`.
    """

    origins: Sequence[int]

    def __new__(cls, text: str, origins: Sequence[int]) -> Self:
        """Build from a text and the origin of each of its characters."""
        traced = super().__new__(cls, text)
        traced.origins = origins
        return traced

    def __str__(self) -> str:
        """Return the text with its origins, because a template converts whatever it writes."""
        return self

    def __iter__(self) -> Iterator[str]:
        """Iterate over the characters, each with its origin."""
        for place in range(len(self)):
            yield self[place]

    def __add__(self, other: str) -> str:
        """Concatenate."""
        if not isinstance(other, str):
            return NotImplemented
        return join((self, other))

    def __radd__(self, other: str) -> str:
        """Concatenate with a plain text in front."""
        if not isinstance(other, str):
            return NotImplemented
        return join((other, self))

    def __mul__(self, count: SupportsIndex) -> str:
        """Repeat."""
        return join([self] * count.__index__())

    def __rmul__(self, count: SupportsIndex) -> str:
        """Repeat."""
        return self * count

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        """Select a character or a slice."""
        if isinstance(key, slice):
            return TracedText(super().__getitem__(key), self.origins[key])
        return TracedText(super().__getitem__(key), [self.origins[key.__index__()]])

    def lstrip(self, chars: str | None = None, /) -> str:
        """Remove characters from the left."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        """Remove characters from the right."""
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None, /) -> str:
        """Remove characters from both ends."""
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> str:
        """Remove a text from the start."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        """Remove a text from the end."""
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split at a separator, or at whitespace."""
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Split at a separator, or at whitespace, from the right."""
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Split into lines."""
        return self._located(super().splitlines(keepends), None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the first occurrence of a separator."""
        return self._divided(super().partition(sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """Split at the last occurrence of a separator."""
        return self._divided(super().rpartition(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """Replace occurrences of a text."""
        if not old:
            return super().replace(old, new, count)
        pieces: list[str] = []
        cursor = 0
        for piece in self.split(old, count):
            if cursor:
                # What replaces a part of a content belongs to it.
                replaced = self.origins[cursor - len(old)]
                pieces.append(new if isinstance(new, TracedText) else TracedText(new, [replaced] * len(new)))
            pieces.append(piece)
            cursor += len(piece) + len(old)
        return join(pieces)

    def lower(self) -> str:
        """Convert to lower case."""
        return self._same_length(super().lower())

    def upper(self) -> str:
        """Convert to upper case."""
        return self._same_length(super().upper())

    def title(self) -> str:
        """Convert to title case."""
        return self._same_length(super().title())

    def capitalize(self) -> str:
        """Convert the first character to upper case and the rest to lower case."""
        return self._same_length(super().capitalize())

    def join(self, parts: Iterable[str], /) -> str:
        """Join parts with this text between them."""
        return join_with(self, list(parts))

    def _located(self, pieces: list[str], separator: str | None) -> list[str]:
        """Give consecutive pieces of this text their origins."""
        located = []
        cursor = 0
        for piece in pieces:
            # Without a separator, only whitespace lies between two pieces, and a piece starts with something else.
            start = cursor if separator is not None else str.find(self, piece, cursor)
            located.append(self[start : start + len(piece)])
            cursor = start + len(piece) + len(separator or "")
        return located

    def _divided(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        """Give the three parts of a partition their origins."""
        first, second, _ = parts
        start = len(first)
        end = start + len(second)
        return self[:start], self[start:end], self[end:]

    def _same_length(self, converted: str) -> str:
        """Give a converted text the origins of this one, where each character was converted on its own."""
        if len(converted) != len(self):
            return converted
        return TracedText(converted, self.origins)


def join(pieces: Iterable[str]) -> str:
    """Concatenate pieces of which some are traced; plain text where none is."""
    parts = list(pieces)
    text = "".join(parts)
    if not any(isinstance(part, TracedText) for part in parts):
        return text
    origins: list[int] = []
    for part in parts:
        origins += origins_of(part)
    return TracedText(text, origins)


def join_with(separator: str, parts: Sequence[str]) -> str:
    """Concatenate parts with a separator between them, some of them traced."""
    pieces: list[str] = []
    for part in parts:
        if pieces:
            pieces.append(separator)
        pieces.append(part)
    return join(pieces)


def origins_of(text: Any) -> Sequence[int]:
    """Return the origin of each character; :data:`TEMPLATE` for plain text."""
    if isinstance(text, TracedText):
        return text.origins
    return [TEMPLATE] * len(text)
