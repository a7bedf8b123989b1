"""Batches hold requests of one key and similar length, and nobody waits longer than the limit."""

from __future__ import annotations

import random

from rl.serving.length_batches import LengthBatches


def test_requests_of_similar_length_are_batched():
    queue: LengthBatches[str] = LengthBatches(1000, 1.0)
    for name, longest in (("a", 100), ("b", 10), ("c", 110), ("d", 11)):
        queue.add(name, key="k", longest=longest, num_sequences=1, now=0.0)
    assert queue.take(0.5) == []
    assert queue.due_in(0.5) == 0.5
    assert queue.take(1.0) == ["a", "c"]
    assert queue.take(1.0) == ["b", "d"]
    assert queue.take(1.0) == []
    assert len(queue) == 0
    assert queue.due_in(1.0) is None


def test_a_full_batch_does_not_wait():
    queue: LengthBatches[int] = LengthBatches(400, 10.0)
    for number in range(5):
        queue.add(number, key="k", longest=100, num_sequences=1, now=0.0)
    assert queue.take(0.0) == [0, 1, 2, 3]
    assert queue.take(0.0) == []
    assert queue.take(0.0, at_once=True) == [4]


def test_the_oldest_comes_first_and_a_long_request_is_a_batch_of_its_own():
    queue: LengthBatches[str] = LengthBatches(100, 1.0)
    queue.add("late", key="k", longest=10, num_sequences=1, now=0.5)
    queue.add("group", key="k", longest=90, num_sequences=8, now=0.2)
    queue.add("other", key="k", longest=90, num_sequences=1, now=0.3)
    assert queue.take(0.6) == ["group"]
    assert queue.take(2.0) == ["other"]
    assert queue.take(2.0) == ["late"]


def test_requests_of_different_keys_are_never_in_one_batch():
    queue: LengthBatches[str] = LengthBatches(1000, 0.0)
    queue.add("a", key="v1", longest=10, num_sequences=1, now=0.0)
    queue.add("b", key="v2", longest=10, num_sequences=1, now=0.0)
    assert [queue.take(0.0), queue.take(0.0)] == [["a"], ["b"]]


def test_every_request_leaves_once_in_batches_within_the_budget():
    draw = random.Random(0)
    queue: LengthBatches[tuple[int, int, int, int]] = LengthBatches(500, 1.0)
    items = [(number, draw.randint(1, 200), draw.randint(1, 4), draw.randint(0, 1)) for number in range(300)]
    taken = []
    for item in items:
        queue.add(item, key=item[3], longest=item[1], num_sequences=item[2], now=0.0)
    while batch := queue.take(0.0, at_once=True):
        taken += batch
        longest = max(item[1] for item in batch)
        assert len(batch) == 1 or longest * sum(item[2] for item in batch) <= 500
        assert longest <= 2**0.5 * min(item[1] for item in batch) + 1
        assert len({item[3] for item in batch}) == 1
    assert sorted(taken) == items
