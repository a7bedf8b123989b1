"""Requests that would not fit into memory are refused."""

import pytest
import torch

from flowgraph import MemoryLimitError
from flowgraph.memory import available_bytes, require_memory


def test_requests_up_to_nine_tenths_of_the_free_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: 10 * 2**30)
    require_memory(9 * 2**30, "graph", "prune it")
    with pytest.raises(
        MemoryLimitError, match=r"^graph: would need about 9\.5 GiB, got 10\.0 GiB free on cpu; prune it$"
    ):
        require_memory(9.5 * 2**30, "graph", "prune it")


def test_unused_reserve_of_the_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert available_bytes("cuda") == 10 + 70 - 30
    assert available_bytes(torch.device("cuda", 0)) == 50


def test_the_cpu_has_what_the_machine_has_left():
    assert available_bytes() > 0
    assert available_bytes("meta") > 0
