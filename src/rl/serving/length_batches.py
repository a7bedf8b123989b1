"""Collect requests into batches of similar length."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_CLASSES_PER_OCTAVE = 2
"""Lengths of one class differ by at most a factor of the root of 2."""


@dataclass
class _LengthClass(Generic[Item]):
    """Waiting requests of similar length that can share a forward pass.

    Attributes:
        waiting: requests with their arrival in seconds, longest sequence in tokens, and number of sequences.
        num_sequences: of all of them.
        longest: most tokens of a sequence that waited here since the class was last empty.
    """

    waiting: deque[tuple[Item, float, int, int]] = field(default_factory=deque)
    num_sequences: int = 0
    longest: int = 0


class LengthBatches(Generic[Item]):
    """Queue of requests; a batch holds requests of one key and similar length, up to a number of padded tokens.

    The cost of a batch is its number of sequences times the longest one. A class is due when its cost reaches the
    budget, or when its oldest request has waited long enough; the class that has waited longest comes first. The
    caller passes the time, so that nothing here reads a clock.

    Args:
        max_tokens: budget of a batch in padded tokens; a request above it is a batch of its own.
        max_wait: longest wait in seconds.
    """

    def __init__(self, max_tokens: int, max_wait: float) -> None:
        self._max_tokens = max_tokens
        self._max_wait = max_wait
        self._classes: dict[tuple[Hashable, int], _LengthClass[Item]] = {}
        self._size = 0

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return self._size

    def add(self, item: Item, *, key: Hashable, longest: int, num_sequences: int, now: float) -> None:
        """Put a request into the queue.

        Args:
            item: the request.
            key: requests of different keys are never in one batch.
            longest: tokens of its longest sequence.
            num_sequences: its sequences.
            now: time of arrival in seconds.
        """
        number = math.floor(_CLASSES_PER_OCTAVE * math.log2(max(1, longest)))
        of_length = self._classes.setdefault((key, number), _LengthClass())
        of_length.waiting.append((item, now, longest, num_sequences))
        of_length.num_sequences += num_sequences
        of_length.longest = max(of_length.longest, longest)
        self._size += 1

    def take(self, now: float, *, at_once: bool = False) -> list[Item]:
        """Take the next batch that is due out of the queue; empty where none is.

        Args:
            now: the time in seconds.
            at_once: every class is due, as at the end of the service.
        """
        # Of the classes that are due, the one whose oldest request came first.
        due = []
        for key, of_length in self._classes.items():
            arrival = of_length.waiting[0][1]
            if at_once or now >= arrival + self._max_wait or self._is_full(of_length):
                due.append((arrival, key))
        if not due:
            return []
        _, key = min(due, key=lambda entry: entry[0])
        batch = self._take_from(self._classes[key])
        if not self._classes[key].waiting:
            del self._classes[key]
        return batch

    def due_in(self, now: float) -> float | None:
        """Return the seconds until the next batch is due if no request arrives; None for an empty queue."""
        if not self._classes:
            return None
        oldest = min(of_length.waiting[0][1] for of_length in self._classes.values())
        return max(0.0, oldest + self._max_wait - now)

    def _is_full(self, of_length: _LengthClass[Item]) -> bool:
        """Tell whether the requests of a class reach the budget of a batch."""
        return of_length.num_sequences * of_length.longest >= self._max_tokens

    def _take_from(self, of_length: _LengthClass[Item]) -> list[Item]:
        """Take the oldest requests of a class, as many as the budget allows and at least one."""
        batch = []
        longest = 0
        num_sequences = 0
        while of_length.waiting:
            item, _, item_longest, item_sequences = of_length.waiting[0]
            cost = max(longest, item_longest) * (num_sequences + item_sequences)
            if batch and cost > self._max_tokens:
                break
            of_length.waiting.popleft()
            batch.append(item)
            longest = max(longest, item_longest)
            num_sequences += item_sequences
        of_length.num_sequences -= num_sequences
        self._size -= len(batch)
        return batch
