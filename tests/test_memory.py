"""What a device has free: on a GPU, what PyTorch keeps in reserve counts as free."""

import pytest
import torch

from flowgraph.memory import available_bytes


def test_unused_reserve_of_the_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert available_bytes("cuda") == 10 + 70 - 30
    assert available_bytes(torch.device("cuda", 0)) == 50


def test_the_cpu_has_what_the_machine_has_left():
    assert available_bytes() > 0
    assert available_bytes("meta") > 0
