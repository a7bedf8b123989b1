"""Requests that would not fit into memory are refused."""

import pytest

from flowgraph import MemoryLimitError
from flowgraph.memory import available_bytes, require_memory


def test_requests_up_to_nine_tenths_of_the_free_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: 10 * 2**30)
    require_memory(9 * 2**30, "graph", "prune it")
    with pytest.raises(
        MemoryLimitError, match=r"^graph: would need about 9\.5 GiB, got 10\.0 GiB free on cpu; prune it$"
    ):
        require_memory(9.5 * 2**30, "graph", "prune it")


def test_there_is_some_memory():
    assert available_bytes() > 0
