"""Section "batches": solves of many graphs and matrices against one read of them at the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

import flowgraph as fg
from benchmarks.gpu import internals
from benchmarks.gpu.comparisons import relative_difference
from benchmarks.gpu.context import Context
from benchmarks.gpu.inputs import largest_unit_error, random_attention, random_graph
from benchmarks.gpu.models import dtype_name
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import alternate, copy_bandwidth, measure, peak_gib

_BLOCKS = (128, 256, 512)
"""Tokens per block of the sparse sweeps that are tried beside the number in use."""


@dataclass(frozen=True)
class SparseBatch:
    """A batch of sparse graphs, and what it is compared with.

    Attributes:
        on_cpu, on_device: the same batch twice.
        num_bytes: of its edges and capacities.
        read_s: seconds of one read of those at the bandwidth of a copy.
        repeats, limit: of every timing.
    """

    on_cpu: Any
    on_device: Any
    num_bytes: int
    read_s: float
    repeats: int
    limit: float


def run(context: Context, record: Record) -> None:
    """Sparse batches by both backends, then dense matrices in both precisions."""
    bandwidth = record.attempt("copy bandwidth", lambda: _bandwidth(context, record))
    graphs = context.sized(64, 4)
    tokens = context.sized(2048, 128)
    degree = context.sized(64, 8)
    record.notes.update(
        graphs=graphs,
        tokens=tokens,
        edges_per_token=degree,
        read="bytes of the edges (or of the triangles) over the bandwidth of a copy, read and written bytes counted",
    )
    if bandwidth is None:
        record.skip("all ratios", "the copy bandwidth could not be measured")
        return

    sparse = record.attempt("sparse graphs", lambda: _sparse_batch(context, bandwidth, graphs, tokens, degree))
    if sparse is not None:
        parts: tuple[tuple[str, Callable[..., None]], ...] = (
            ("sparse, topology known", _topology_known),
            ("sparse, first solve", _first_solve),
            ("sparse, deterministic mode", _deterministic_mode),
            ("sparse, against the CPU", _against_cpu),
            ("sparse, other blocks", _other_blocks),
        )
        for name, part in parts:
            record.attempt(name, partial(part, context, record, sparse))
        del sparse

    shapes = context.sized([(64, 2048), (1, 8192)], [(2, 96), (1, 256)])
    for sequences, size in shapes:
        for dtype in (torch.float32, torch.float64):
            name = f"dense {sequences} x {size}, {dtype_name(dtype)}"
            part = partial(_dense, context, record, name, bandwidth, sequences, size, dtype)
            record.attempt(name, part, needs=context.sized(3.0, 0.0))


def _bandwidth(context: Context, record: Record) -> float:
    num_bytes = context.sized(2**30, 2**20)
    found = copy_bandwidth(context.device, num_bytes)
    record.row(part="copy bandwidth", bytes_copied=num_bytes, bytes_per_second=found)
    context.say(f"batches: a copy moves {found / 1e9:.0f} GB/s, read and written bytes counted")
    return found


def _sparse_batch(context: Context, bandwidth: float, graphs: int, tokens: int, degree: int) -> SparseBatch:
    """The graphs are made on the CPU, the same ones for every device."""
    on_cpu: Any = Batch.from_data_list([random_graph(tokens, degree, context.seed + n) for n in range(graphs)])
    tensors = (on_cpu.edge_index, on_cpu.capacity)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    context.say(f"batches: made {graphs} graphs of {tokens} tokens with {on_cpu.num_edges:,} edges")
    return SparseBatch(
        on_cpu=on_cpu,
        on_device=on_cpu.clone().to(str(context.device)),
        num_bytes=num_bytes,
        read_s=num_bytes / bandwidth,
        repeats=context.sized(7, 2),
        limit=max(context.left() / 10, 0.5),
    )


def _topology_known(context: Context, record: Record, sparse: SparseBatch) -> None:
    """What every solve after the first one costs, by each backend of the device."""
    batch = sparse.on_device
    runs = {
        "read by two sums": lambda: (batch.capacity.sum(), batch.edge_index.sum()),
        "scatter": lambda: fg.solve(batch, backend="scatter"),
        "dense": lambda: fg.solve(batch, backend="dense"),
    }
    times = alternate(runs, context.device, repeats=sparse.repeats, limit=sparse.limit)
    for way, run_way in runs.items():
        _sparse_row(context, record, sparse, way, times[way], peak_gib=peak_gib(run_way, context.device))


def _first_solve(context: Context, record: Record, sparse: SparseBatch) -> None:
    """The first solve of a batch also computes its topology, which is kept on it: each call gets a new batch."""
    new: list[Any] = []

    def renew() -> None:
        new[:] = [sparse.on_device.clone()]

    def solve() -> None:
        fg.solve(new[0], backend="scatter")

    timing = measure(solve, context.device, repeats=sparse.repeats, limit=sparse.limit, prepare=renew)
    _sparse_row(context, record, sparse, "scatter, first solve", timing)


def _deterministic_mode(context: Context, record: Record, sparse: SparseBatch) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        timing = measure(
            lambda: fg.solve(sparse.on_device, backend="scatter"),
            context.device, repeats=sparse.repeats, limit=sparse.limit,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    _sparse_row(context, record, sparse, "scatter, deterministic mode", timing)


def _against_cpu(context: Context, record: Record, sparse: SparseBatch) -> None:
    expected = fg.solve(sparse.on_cpu).throughput
    for backend in ("scatter", "dense"):
        found = fg.solve(sparse.on_device, backend=backend).throughput
        record.check(f"throughput of the batch by {backend}", relative_difference(found, expected), 1e-12)


def _other_blocks(context: Context, record: Record, sparse: SparseBatch) -> None:
    """The sparse sweeps with larger blocks: fewer kernel launches, larger triangles."""
    sizes = context.sized(_BLOCKS, (32,))
    in_use = internals.value_of(internals.SPARSE_BLOCK)
    for size in sizes:
        with internals.setting(internals.SPARSE_BLOCK, size):
            batch = sparse.on_device.clone()  # its topology is computed with this block size

            def solve(batch: Any = batch) -> None:
                fg.solve(batch, backend="scatter")

            timing = measure(solve, context.device, repeats=sparse.repeats, limit=sparse.limit / len(sizes))
        _sparse_row(context, record, sparse, f"scatter in blocks of {size}", timing, block_in_use=in_use)


def _sparse_row(
    context: Context, record: Record, sparse: SparseBatch, way: str, timing: dict[str, Any], **more: Any
) -> None:
    ratio = timing["median_s"] / sparse.read_s
    record.row(
        part="sparse", way=way, edges=sparse.on_device.num_edges, bytes=sparse.num_bytes, read_s=sparse.read_s,
        ratio_to_read=ratio, **timing, **more,
    )  # fmt: skip
    context.say(f"batches: {way}: {1e3 * timing['median_s']:.2f} ms, {ratio:.1f} reads")


def _dense(
    context: Context, record: Record, name: str, bandwidth: float, sequences: int, tokens: int, dtype: torch.dtype
) -> None:
    """Both sweeps over matrices of capacities, with all that ``solve_rows`` does around them."""
    matrices = _matrices(context, sequences, tokens, dtype)
    position = torch.arange(tokens, device=context.device).expand(sequences, -1)
    question = (position > 0) & (position < tokens // 4)
    answer = position == tokens - 1

    def solve() -> Any:
        return fg.solve_rows(matrices, question=question, answer=answer, preset=None, backend="dense")

    # The least that any solver must do is one read of the entries below the diagonal.
    num_entries = sequences * tokens * (tokens - 1) // 2
    num_bytes = num_entries * matrices.element_size()
    read_s = num_bytes / bandwidth
    runs = {"read by one sum": matrices.sum, "dense": solve}
    limit = max(context.left() / 6, 0.5)
    times = alternate(runs, context.device, repeats=context.sized(5, 2), limit=limit)
    memory = {"dense": peak_gib(solve, context.device)}
    for way, timing in times.items():
        ratio = timing["median_s"] / read_s
        record.row(
            part="dense",
            way=way,
            sequences=sequences,
            tokens=tokens,
            dtype=dtype_name(dtype),
            triangle_bytes=num_bytes,
            read_s=read_s,
            ratio_to_read=ratio,
            peak_gib=memory.get(way),
            **timing,
        )
        context.say(f"batches: {name}: {way}: {1e3 * timing['median_s']:.2f} ms, {ratio:.1f} reads")

    flow = solve()
    record.require(f"{name}: every sequence has a flow", bool(flow.feasible.all()))
    record.check(f"{name}: one unit leaves", largest_unit_error(flow), 1e-9)


def _matrices(context: Context, sequences: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Random causal attention, drawn on the device one sequence at a time."""
    generator = torch.Generator(context.device).manual_seed(context.seed)
    matrices = torch.empty(sequences, tokens, tokens, dtype=dtype, device=context.device)
    for matrix in matrices:
        (attention,) = random_attention(1, tokens, dtype, generator)
        matrix.copy_(attention)
    return matrices
