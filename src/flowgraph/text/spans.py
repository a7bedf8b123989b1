"""Character spans: half-open ranges in a text, their order, their alignment between two texts, and coverage."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool
from torch import Tensor

from flowgraph.errors import InvalidInputError

Offsets = tuple[int, int]

# Characters that must agree before a difference between decoded and given text is over.
ANCHOR = 4
# Longest such difference, in characters.
RESYNC = 64


def check_unicode(text: str, argument: str, place: str = "the text") -> None:
    """Refuse text with half of a surrogate pair, which no tokenizer and no file can hold.

    Args:
        text: the text.
        argument: name of the argument, for the message.
        place: where the text stands in it.

    Raises:
        InvalidInputError: the first half found, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidInputError(
            f"{argument}: {place} must be complete Unicode characters, got half of a surrogate pair, {found}; remove "
            "it, or read the text again with its encoding (text.encode('utf-16', 'surrogatepass').decode('utf-16', "
            "'replace') joins halves that belong together)"
        ) from None


def shorten(text: str) -> str:
    """Return both ends of a long text, for messages."""
    if len(text) <= 60:
        return text
    return f"{text[:28]}...{text[-28:]}"


def covers(spans: Sequence[Offsets], text: str, selected: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Mark the tokens that have at least one visible (not whitespace) character in a selected range.

    Args:
        spans: one range for each token.
        text: the text that all ranges refer to.
        selected: ranges of characters.

    Cost: linear in the text, plus tokens times selected ranges.

    Example:
        >>> covers([(0, 3), (3, 5), (5, 8)], "one  two", [(2, 5)]).tolist()
        [True, False, False]
    """
    # num_visible[i] counts the visible characters before position i, so a difference counts those in a range.
    num_visible = [0, *accumulate(not character.isspace() for character in text)]
    is_covered = torch.zeros(len(spans), dtype=torch.bool)
    for low, high in selected:
        has_visible = [num_visible[min(end, high)] > num_visible[max(start, low)] for start, end in spans]
        is_covered |= torch.tensor(has_visible, dtype=torch.bool)
    return is_covered


def inside(spans: Sequence[Offsets], text: str, contents: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Mark the tokens that lie within one content, or have a visible character in one."""
    is_within = []
    for start, end in spans:
        is_within.append(any(low <= start < end <= high for low, high in contents))
    return covers(spans, text, contents) | torch.tensor(is_within, dtype=torch.bool)


def printed_pieces(tokens: Sequence[str], spans: Sequence[Sequence[int]], text: str) -> list[str]:
    """Divide a text between its tokens, so that tokens that share a character print it once.

    Args:
        tokens: readable text of each token.
        spans: range of characters of each, in order.
        text: the text that the ranges refer to.

    Returns:
        What each token prints when all are printed one after another: the characters that no token before it
        prints; the name of a token that has no character.

    Example:
        >>> printed_pieces(["<s>", "汤", "汤", "汤 3"], [(0, 0), (0, 1), (0, 1), (0, 3)], "汤 3")
        ['<s>', '汤', '', ' 3']
    """
    pieces = []
    reached = 0
    for token, (start, end) in zip(tokens, spans, strict=True):
        pieces.append(text[max(start, reached) : end] if start < end else token)
        reached = max(reached, end)
    return pieces


def selected_text(text: str, spans: Sequence[Sequence[int]]) -> str:
    """Join the characters of some tokens, each once.

    Blanks between two tokens are kept; other characters between them show as an ellipsis.

    Args:
        text: the text that the ranges refer to.
        spans: range of characters of each token.
    """
    joined = ""
    end_so_far = None
    # In reading order, so that a character which several tokens share is read once.
    for start, end in sorted((start, end) for start, end in spans):
        if end_so_far is None:
            joined += text[start:end]
            end_so_far = end
            continue

        # A gap with visible characters is marked; a blank one is kept.
        between = text[end_so_far:start]
        joined += " … " if between.strip() else between
        joined += text[max(start, end_so_far) : end]
        end_so_far = max(end, end_so_far)
    return joined.strip()


def close_gaps(spans: Sequence[Offsets], text: str, start: int) -> list[Offsets]:
    """Give whitespace that no token reports to the token after it, and empty spans a place in the order.

    Args:
        spans: one range for each token, as the tokenizer reports them.
        text: the text that the ranges refer to.
        start: the first character that the tokens may cover.

    Returns:
        Ranges whose starts never lie before ``start``.
    """
    closed: list[Offsets] = []
    reached = start
    for reported_low, reported_high in spans:
        low = max(reported_low, start)
        high = max(reported_high, start)
        if low >= high and low < reached:
            # A special token that the tokenizer added reports (0, 0).
            low = reached
            high = reached
        elif reached < low and not text[reached:low].strip():
            low = reached
        closed.append((low, high))
        reached = max(reached, high)
    return closed


def join_marks(spans: Sequence[Offsets], text: str) -> list[Offsets]:
    """Give characters that a normaliser composed with the one before them to the tokens of that one.

    A tokenizer that composes (NFC) reads "e" and a combining accent as one character, and may report the place of the
    "e" alone. The same holds for the parts of a Hangul syllable.

    Args:
        spans: one range for each token, as the tokenizer reports them.
        text: the text that the ranges refer to.

    Returns:
        The ranges, extended over marks that no token reports.

    Cost: linear in the text.
    """
    if unicodedata.is_normalized("NFC", text):
        return list(spans)
    starts = sorted({start for start, end in spans if start < end})
    extended = []
    for start, end in spans:
        if start >= end:
            extended.append((start, end))
            continue
        # Up to the next token, as far as each character joins those before it.
        following = bisect_right(starts, end - 1)
        limit = starts[following] if following < len(starts) else len(text)
        while end < limit and _joins(text[start:end], text[end]):
            end += 1
        extended.append((start, end))
    return extended


def _joins(before: str, character: str) -> bool:
    """Return whether a character is a mark on the text before it, or composes with it."""
    if unicodedata.category(character).startswith("M"):
        return True
    composed = unicodedata.normalize("NFC", before)
    return len(unicodedata.normalize("NFC", before + character)) == len(composed)


def align(decoded: str, spans: Sequence[Offsets], text: str) -> list[Offsets]:
    """Convert spans in a decoded text to spans in the text that was tokenised.

    Only visible characters are compared, without regard to case and compatibility forms, because tokenizers
    normalise both. Where the two texts still differ (an unknown token; a BOS that only the decoded text has), every
    decoded character of the difference corresponds to the complete difference in ``text``.

    Args:
        decoded: the text decoded from the tokens.
        spans: one range in ``decoded`` for each token.
        text: the text given to the tokenizer.

    Returns:
        One range in ``text`` for each token.

    Raises:
        InvalidInputError: a difference longer than 64 characters.

    Cost: linear in the texts where they agree.
    """
    if decoded == text:
        return list(spans)

    # Blanks differ between the two texts, so only visible characters are matched.
    decoded_visible, decoded_places = _visible(decoded)
    text_visible, text_places = _visible(text)
    matches = _match(decoded_visible, text_visible)

    # An empty range behind the last visible character lies at the end of the text.
    text_places.append(len(text))
    carried: list[Offsets] = []
    high = 0
    for start, end in spans:
        first = bisect_left(decoded_places, start)
        last = bisect_left(decoded_places, end)
        # A span that holds only a space, between two characters of one difference, belongs to this difference.
        if first == last and 0 < first < len(matches) and matches[first - 1] == matches[first]:
            first -= 1

        if first < last:
            low = matches[first][0]
            high = matches[last - 1][1]
        else:
            low = high
        if low < high:
            carried.append((text_places[low], text_places[high - 1] + 1))
        else:
            carried.append((text_places[low], text_places[low]))
    return carried


def _visible(text: str) -> tuple[str, list[int]]:
    """Return the characters that survive any tokenizer's normalisation, and the place of each in the text."""
    characters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        # One character may become several: a ligature, or an accent of its own.
        for part in unicodedata.normalize("NFKD", character).casefold():
            if not part.isspace():
                characters.append(part)
                places.append(place)
    return "".join(characters), places


def _match(decoded: str, text: str) -> list[Offsets]:
    """Find the range of ``text`` that each character of ``decoded`` corresponds to, for visible characters."""
    matches: list[Offsets] = []
    text_place = 0
    while len(matches) < len(decoded):
        place = len(matches)
        num_decoded = 1
        num_text = 1
        # Where the texts differ, all characters of the difference share one range.
        if decoded[place] != text[text_place : text_place + 1]:
            window = RESYNC + ANCHOR
            num_decoded, num_text = _difference(decoded[place : place + window], text[text_place : text_place + window])
        matches += [(text_place, text_place + num_text)] * num_decoded
        text_place += num_text
    return matches


def _difference(decoded: str, text: str) -> Offsets:
    """Count the characters of either text to skip, at least one in all, until both agree again."""
    # The smallest number of skipped characters first: the closest place at which both agree.
    for total in range(1, 2 * RESYNC + 1):
        fewest = max(0, total - min(RESYNC, len(text)))
        most = min(total, RESYNC, len(decoded))
        for num_decoded in range(fewest, most + 1):
            num_text = total - num_decoded
            if decoded[num_decoded : num_decoded + ANCHOR] == text[num_text : num_text + ANCHOR]:
                return num_decoded, num_text
    raise InvalidInputError(
        f"tokenizer: what it decodes must agree with the text it read, got {decoded[:20]!r} for "
        f"{text[:20]!r}; pass input_ids, with question and answer as token masks"
    )
