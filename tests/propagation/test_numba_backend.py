"""Where the compiled sweeps run, and how a batch is shared out to threads."""

import pytest
import torch

from flowgraph import InvalidInputError, MissingExtraError
from flowgraph.propagation import numba_backend as compiled
from flowgraph.propagation.topology import Topology


def test_only_on_the_cpu():
    with pytest.raises(
        InvalidInputError, match="'numba' runs on the CPU, got tensors on cuda:0; use backend='scatter'"
    ):
        compiled.require(torch.device("cuda:0"))


def test_an_environment_without_numba_is_told_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flowgraph-llm\[numba\]', or use backend='auto'"):
        compiled.require(torch.device("cpu"))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_shares_cover_every_node_once_and_end_with_graphs(threads: int, monkeypatch: pytest.MonkeyPatch):
    """Graphs of very different sizes; each share is a run of whole graphs."""
    monkeypatch.setattr(compiled, "_EDGES_PER_THREAD", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = torch.tensor([1, 40, 2, 3, 30, 1, 25])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    pairs = [
        (start + t - 1, start + t)
        for start, size in zip(ptr.tolist(), sizes.tolist(), strict=False)
        for t in range(1, size)
    ]
    topology = Topology(torch.tensor(pairs).T.contiguous(), ptr)
    shares = compiled._node_ranges(topology)
    assert [first for first, _ in shares] == [0, *(last for _, last in shares[:-1])]
    assert shares[-1][1] == topology.num_nodes
    assert {last for _, last in shares} <= set(ptr.tolist())
    assert 1 <= len(shares) <= threads
    assert len(shares) == 1 or threads > 1
