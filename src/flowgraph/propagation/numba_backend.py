"""Run the compiled sweeps of :mod:`.kernels`, in threads where a batch is large enough."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.propagation.topology import Topology

_EDGES_PER_THREAD = 100_000  # below that, handing work to a thread costs more than it saves


def available() -> bool:
    """Whether compiled sweeps can be had."""
    return find_spec("numba") is not None


def require(device: torch.device) -> None:
    """Refuse the compiled backend where it cannot run.

    Raises:
        MissingExtraError: numba is not installed.
        InvalidInputError: the tensors are not on the CPU.
    """
    if not available():
        raise MissingExtraError(
            "backend: 'numba' needs the package numba, got an environment without it; "
            "pip install 'flowgraph-llm[numba]', or use backend='auto'"
        )
    if device.type != "cpu":
        raise InvalidInputError(
            f"backend: 'numba' runs on the CPU, got tensors on {device}; use backend='scatter' or 'dense' there"
        )


def over_edges(name: str, topology: Topology, weight: Tensor, propagation_factor: Tensor, x: Tensor) -> Tensor:
    """One sweep (``"potential"`` or ``"influence"``) over the edges of a batch, graphs shared out to threads."""
    from flowgraph.propagation import numba_kernels as kernels

    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()  # exact: half precision numbers are float32 numbers
    out = x.detach().double().clone()
    row_ptr, source = topology.row_ptr.numpy(), topology.source32.numpy().view(np.uint32)
    arrays = (
        row_ptr,
        source,
        weight.contiguous().numpy(),
        propagation_factor.numpy(),
        out.numpy(),
        np.zeros(out.numel()),
    )
    kernel = getattr(kernels, name)
    _in_threads([lambda a=a, b=b: kernel(*arrays, a, b) for a, b in _ranges(topology)])
    return out


def _ranges(topology: Topology) -> list[tuple[int, int]]:
    """Node ranges of about equally many edges, each ending with a graph, one per thread."""
    edges = topology.edge_index.shape[1]
    parts = min(torch.get_num_threads(), topology.num_graphs, max(1, edges // _EDGES_PER_THREAD))
    if parts <= 1:
        return [(0, topology.num_nodes)]
    ends = topology.row_ptr[topology.ptr]
    cuts = torch.searchsorted(ends, torch.linspace(0, edges, parts + 1)[1:-1].to(ends.dtype))
    borders = sorted({0, topology.num_nodes, *topology.ptr[cuts].tolist()})
    return list(pairwise(borders))


def over_rows(name: str, weight: Tensor, propagation_factor: Tensor, x: Tensor) -> Tensor:
    """The same over matrices ``[B, T, T]``, float32 or float64, read in place."""
    from flowgraph.propagation import numba_kernels as kernels

    out, matrices = x.detach().double().clone(), weight.detach().numpy()
    kernel = getattr(kernels, f"dense_{name}")
    calls = [
        lambda b=b: kernel(matrices[b], propagation_factor[b].numpy(), out[b].numpy()) for b in range(out.shape[0])
    ]
    _in_threads(calls, torch.get_num_threads() if weight[0].numel() > _EDGES_PER_THREAD else 1)
    return out


def _in_threads(calls: list[Callable[[], None]], threads: int | None = None) -> None:
    """Run them side by side; compiled code lets go of the interpreter's lock."""
    threads = min(len(calls), torch.get_num_threads() if threads is None else threads)
    if threads <= 1:
        for call in calls:
            call()
        return
    with ThreadPoolExecutor(threads - 1) as pool:  # the last share is this thread's own
        others = [pool.submit(lambda part=part: [call() for call in part]) for part in _shares(calls, threads)[:-1]]
        for call in _shares(calls, threads)[-1]:
            call()
        for other in others:
            other.result()


def _shares(calls: list[Callable[[], None]], parts: int) -> list[list[Callable[[], None]]]:
    return [calls[part::parts] for part in range(parts)]
