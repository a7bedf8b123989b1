"""Half-open character ranges in a text: ranges put in order, carried to another text, and what they cover."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool
from torch import Tensor

from flowgraph.errors import InvalidInputError

Offsets = tuple[int, int]

ANCHOR = 4  # characters that have to agree before a difference between decoded and given text is over
RESYNC = 64  # longest such difference, in characters


def covers(spans: Sequence[Offsets], text: str, selected: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Which tokens have at least one visible (not whitespace) character in one of the selected ranges.

    Example:
        >>> covers([(0, 3), (3, 5), (5, 8)], "one  two", [(2, 5)]).tolist()
        [True, False, False]
    """
    seen = [0, *accumulate(not character.isspace() for character in text)]
    hit = torch.zeros(len(spans), dtype=torch.bool)
    for low, high in selected:
        hit |= torch.tensor([seen[min(e, high)] > seen[max(s, low)] for s, e in spans], dtype=torch.bool)
    return hit


def inside(spans: Sequence[Offsets], text: str, contents: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Tokens within a content, or with a visible character in one."""
    visible = covers(spans, text, contents)
    within = [any(low <= s < e <= high for low, high in contents) for s, e in spans]
    return visible | torch.tensor(within, dtype=torch.bool)


def close_gaps(spans: Sequence[Offsets], text: str, start: int) -> list[Offsets]:
    """Give whitespace that no token reports to the token after it, and empty spans a place in the order."""
    closed: list[Offsets] = []
    reached = start
    for low, high in spans:
        low, high = max(low, start), max(high, start)
        if low >= high and low < reached:  # A special token that the tokenizer added reports (0, 0).
            low = high = reached
        elif reached < low and not text[reached:low].strip():
            low = reached
        closed.append((low, high))
        reached = max(reached, high)
    return closed


def align(decoded: str, spans: Sequence[Offsets], text: str) -> list[Offsets]:
    """Carry spans in a decoded text over to the text that was tokenised.

    Only visible characters are compared, without regard to case and compatibility forms, because tokenizers
    normalise both. Where the two still differ (an unknown-token; a BOS that only the decoded text has), every
    decoded character of the difference stands for all of it.
    """
    if decoded == text:
        return list(spans)
    source, places = _visible(decoded)
    target, origin = _visible(text)
    reach: list[Offsets] = []
    here = there = 0
    while here < len(source):
        skipped, passed = 1, 1
        if source[here] != target[there : there + 1]:
            window = RESYNC + ANCHOR
            skipped, passed = _difference(source[here : here + window], target[there : there + window])
        reach += [(there, there + passed)] * skipped
        here, there = here + skipped, there + passed
    origin.append(len(text))
    carried: list[Offsets] = []
    high = 0
    for start, end in spans:
        first, last = bisect_left(places, start), bisect_left(places, end)
        if first == last and 0 < first < len(reach) and reach[first - 1] == reach[first]:
            first -= 1  # Only a space, but between two characters of one difference.
        parts = reach[first:last]
        low, high = (parts[0][0], parts[-1][1]) if parts else (high, high)
        carried.append((origin[low], origin[high - 1] + 1) if low < high else (origin[low], origin[low]))
    return carried


def _visible(text: str) -> tuple[str, list[int]]:
    """The characters of a text that survive any tokenizer's normalisation, and where each comes from."""
    kept = [
        (part, place)
        for place, character in enumerate(text)
        for part in unicodedata.normalize("NFKD", character).casefold()
        if not part.isspace()
    ]
    return "".join(part for part, _ in kept), [place for _, place in kept]


def _difference(source: str, target: str) -> Offsets:
    """How many characters of either text to pass, at least one, until both agree again."""
    for total in range(1, 2 * RESYNC + 1):
        for skipped in range(max(0, total - min(RESYNC, len(target))), min(total, RESYNC, len(source)) + 1):
            if source[skipped : skipped + ANCHOR] == target[total - skipped : total - skipped + ANCHOR]:
                return skipped, total - skipped
    raise InvalidInputError(
        f"tokenizer: what it decodes must agree with the text it read, got {source[:20]!r} for "
        f"{target[:20]!r}; pass input_ids, with question and answer as token masks"
    )
