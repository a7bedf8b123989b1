"""Run the compiled sweeps of :mod:`.numba_kernels`, in threads where a batch is large enough."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.propagation.topology import Topology

_EDGES_PER_THREAD = 100_000
"""Below this, starting a thread costs more time than it saves."""


def available() -> bool:
    """Tell whether numba is installed."""
    return find_spec("numba") is not None


def runs_on(device: torch.device) -> bool:
    """Tell whether the compiled sweeps run on this device: numba is installed, and it is the CPU."""
    return device.type == "cpu" and available()


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


def accepts(dtype: torch.dtype) -> bool:
    """Tell whether the compiled sweeps read weights of this dtype in place."""
    return dtype in (torch.float32, torch.float64)


# Edges of a batch --------------------------------------------------------------------------------------------


def edge_potential(
    topology: Topology,
    weight: Tensor,
    propagation_factor: Tensor,
    demand: Tensor,
) -> Tensor:
    """Solve ``h = b + D C^T h`` over the edges of a batch, its graphs shared between threads."""
    from flowgraph.propagation import numba_kernels

    return _sweep_edges(numba_kernels.potential, topology, weight, propagation_factor, demand)


def edge_influence(
    topology: Topology,
    weight: Tensor,
    propagation_factor: Tensor,
    inflow: Tensor,
) -> Tensor:
    """Solve ``g = q + C D g`` over the edges of a batch, its graphs shared between threads."""
    from flowgraph.propagation import numba_kernels

    return _sweep_edges(numba_kernels.influence, topology, weight, propagation_factor, inflow)


def _sweep_edges(
    kernel: Callable[..., None],
    topology: Topology,
    weight: Tensor,
    propagation_factor: Tensor,
    x: Tensor,
) -> Tensor:
    """Run a kernel on each node range; ``x`` is what its system adds (b or q)."""
    weight = weight.detach()
    if not accepts(weight.dtype):
        weight = weight.float()  # exact: half-precision numbers are float32 numbers

    # The kernel writes into this copy.
    solution = x.detach().double().clone()
    arrays = (
        topology.row_ptr.numpy(),
        topology.source_int32.numpy().view(np.uint32),
        weight.contiguous().numpy(),
        propagation_factor.numpy(),
        solution.numpy(),
        np.zeros(solution.numel()),
    )

    # Graphs share no edge, so each range is solved on its own, in any order.
    calls = []
    for first, last in _node_ranges(topology):
        calls.append(partial(kernel, *arrays, first, last))
    _in_threads(calls, torch.get_num_threads())
    return solution


def _node_ranges(topology: Topology) -> list[tuple[int, int]]:
    """Cut the nodes into one range per thread, each with about equally many edges and ending with a graph."""
    num_edges = topology.edge_index.shape[1]
    worthwhile = max(1, num_edges // _EDGES_PER_THREAD)
    num_ranges = min(torch.get_num_threads(), topology.num_graphs, worthwhile)
    if num_ranges <= 1:
        return [(0, topology.num_nodes)]

    # Cut at the graph border that follows each equal share of the edges.
    edges_before_graph = topology.row_ptr[topology.ptr]
    equal_shares = torch.linspace(0, num_edges, num_ranges + 1)[1:-1].to(edges_before_graph.dtype)
    cuts = torch.searchsorted(edges_before_graph, equal_shares)
    borders = {0, topology.num_nodes, *topology.ptr[cuts].tolist()}
    return list(pairwise(sorted(borders)))


# Matrices ----------------------------------------------------------------------------------------------------


def dense_potential(matrix: Tensor, propagation_factor: Tensor, demand: Tensor) -> Tensor:
    """Solve ``h = b + D C^T h`` for matrices ``[B, T, T]`` in float32 or float64, read in place."""
    from flowgraph.propagation import numba_kernels

    return _sweep_matrices(numba_kernels.dense_potential, matrix, propagation_factor, demand)


def dense_influence(matrix: Tensor, propagation_factor: Tensor, inflow: Tensor) -> Tensor:
    """Solve ``g = q + C D g`` for matrices ``[B, T, T]`` in float32 or float64, read in place."""
    from flowgraph.propagation import numba_kernels

    return _sweep_matrices(numba_kernels.dense_influence, matrix, propagation_factor, inflow)


def _sweep_matrices(
    kernel: Callable[..., None],
    matrix: Tensor,
    propagation_factor: Tensor,
    x: Tensor,
) -> Tensor:
    """Run a kernel on each matrix; ``x`` is what its system adds (b or q)."""
    # The kernel writes into this copy.
    solution = x.detach().double().clone()
    matrices = matrix.detach().numpy()
    calls = []
    for b in range(solution.shape[0]):
        factor = propagation_factor[b].numpy()
        calls.append(partial(kernel, matrices[b], factor, solution[b].numpy()))

    is_worthwhile = matrix[0].numel() > _EDGES_PER_THREAD
    num_threads = torch.get_num_threads() if is_worthwhile else 1
    _in_threads(calls, num_threads)
    return solution


# Threads -----------------------------------------------------------------------------------------------------


def _in_threads(calls: list[Callable[[], None]], num_threads: int) -> None:
    """Run the calls in parallel; compiled code releases the interpreter lock."""
    num_threads = min(len(calls), num_threads)
    if num_threads <= 1:
        _run_all(calls)
        return

    # This thread takes the last share itself.
    shares = [calls[first::num_threads] for first in range(num_threads)]
    with ThreadPoolExecutor(num_threads - 1) as pool:
        running = [pool.submit(_run_all, share) for share in shares[:-1]]
        _run_all(shares[-1])
        for share in running:
            share.result()


def _run_all(calls: list[Callable[[], None]]) -> None:
    """Run the calls of one thread, one after the other."""
    for call in calls:
        call()
