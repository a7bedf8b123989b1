"""Where the compiled sweeps run, and how a batch is shared out to threads."""

import subprocess
import sys

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


WITHOUT_A_CACHE_FOLDER = """
import warnings
from numba.core import caching
for kind in (caching.CacheImpl, *caching.CacheImpl.__subclasses__()):
    kind._locator_classes = []
import torch
from flowgraph import FlowGraph, solve
weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
graph = FlowGraph.from_dense(weights, question=[0], answer=[3])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        flow = solve(graph, backend="numba")
print([round(x, 4) for x in flow.throughput.tolist()])
print(sum("NUMBA_CACHE_DIR" in str(warning.message) for warning in caught))
"""


def test_no_folder_for_compiled_code_is_one_warning():
    """As with a read-only installation and no home folder."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_CACHE_FOLDER], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[1.0, 0.6667, 0.3333, 1.0]", "1"], done.stderr
