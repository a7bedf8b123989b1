r"""Count the FLOPs, bytes and operations of each part of a training step and of the credit.

Symbols: B sequences of T tokens, L layers, d the model's width, H query heads and K key heads of e entries, I the
width of the MLP, V the vocabulary, w the bytes of a weight. A product of matrices [a, b] and [b, c] has 2abc FLOPs.

A cell is one (reader, token) pair of one sequence. A sequence has about T^2 / 2 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowgraph.attention.attention_rows import BLOCK
from flowgraph.attention.layer_record import MAX_BLOCK
from flowgraph.cost.capacity_costs import CapacityCost
from flowgraph.cost.machine import Machine
from flowgraph.cost.model_shape import ModelShape

ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward pass over those of its forward pass: five products instead of two
(FlashAttention-2, arXiv 2307.08691)."""

CALLS_PER_LAYER = 30
"""Operations that one layer starts in a forward pass: projections, norms, rotary embedding, attention, MLP."""

RECORD_CALLS = 60
"""Operations that recording a layer starts: the comparison of three rows with the layer's own output."""

STEP_CALLS = 16
"""Operations of one step of rows: mask, repeated keys, product, scale, softmax, and joined heads."""

_CELL_FLOPS = 10
"""Elementwise FLOPs of a cell and head: scale, mask, softmax, joined heads."""

_JOINED_ACCESSES = 6
"""Accesses to the joined rows of a layer: written once, copied, added to the total."""

_CAPACITY_ACCESSES = 6
"""Accesses to the total that turn rows into capacities."""

_SWEEP_BYTES = 20
"""Bytes of a cell in a sweep in PyTorch: float32 read, widened to float64, read again."""

_COMPILED_SWEEP_BYTES = 4
"""Bytes of a cell in a compiled sweep, which reads float32 in place."""

_EDGE_BYTES = 76
"""Bytes of an edge in a sweep in PyTorch: two indices, the weight widened, gathered, multiplied and scattered."""

_COMPILED_EDGE_BYTES = 20
"""Bytes of an edge in a compiled sweep: index, weight, and the value that it reads."""

_SELECT_BYTES = 40
"""Bytes of a cell while edges are selected: its flow in float64, the comparison, the sum of capacities."""


@dataclass(frozen=True)
class Work:
    """What one part of a stage needs.

    Attributes:
        flops: floating-point operations.
        bytes: traffic with memory, caches left out.
        calls: operations that are started one after the other.
        dtype: precision of the FLOPs.
    """

    flops: float
    bytes: float
    calls: float
    dtype: str

    def seconds(self, machine: Machine, compute_efficiency: float, bandwidth_efficiency: float) -> float:
        """Return the time: the slowest of computing, moving and starting."""
        # Work of the three kinds overlaps, so the slowest decides.
        computing = self.flops / (machine.peak[self.dtype] * compute_efficiency)
        moving = self.bytes / (machine.bandwidth * bandwidth_efficiency)
        starting = self.calls * machine.call_seconds
        return max(computing, moving, starting)


@dataclass(frozen=True)
class Batch:
    """What the model runs on.

    Attributes:
        sequences: B.
        tokens: T.
        prompt: first tokens that all sequences share; their rows are computed once.
        logits: tokens of each sequence whose logits are computed.
        dtype: precision of the model.
        weight_bytes: w.
    """

    sequences: int
    tokens: int
    prompt: int
    logits: int
    dtype: str
    weight_bytes: int


# Passes of the model -----------------------------------------------------------------------------------------


def forward(shape: ModelShape, batch: Batch) -> list[Work]:
    """Count a forward pass under fused causal attention: linear layers, attention, logits.

    Linear layers: 2 P B T FLOPs for P weights. Attention: two products over the cells, 2 H e T^2 B L.
    """
    num_tokens = batch.sequences * batch.tokens
    weights = shape.layers * shape.layer_weights
    traffic = weights + shape.layers * num_tokens * _activations(shape)
    linear = Work(
        2.0 * weights * num_tokens,
        float(batch.weight_bytes * traffic),
        CALLS_PER_LAYER * shape.layers,
        batch.dtype,
    )
    return [linear, _attention(shape, batch, factor=1.0), _logits(shape, batch)]


def backward(shape: ModelShape, batch: Batch, *, skips_queries: bool = False) -> list[Work]:
    """Count a backward pass to the activations, with all weights frozen.

    Args:
        shape: of the model.
        batch: what it runs on.
        skips_queries: no gradient through queries and keys, as in relevance; fused attention computes theirs anyway.
    """
    num_tokens = batch.sequences * batch.tokens
    layer_weights = shape.layer_weights
    if skips_queries:
        layer_weights -= shape.query_weights
    weights = shape.layers * layer_weights
    # Gradients are read and written beside the activations.
    traffic = weights + 2 * shape.layers * num_tokens * _activations(shape)
    linear = Work(
        2.0 * weights * num_tokens,
        float(batch.weight_bytes * traffic),
        2 * CALLS_PER_LAYER * shape.layers,
        batch.dtype,
    )
    return [linear, _attention(shape, batch, factor=ATTENTION_BACKWARD), _logits(shape, batch)]


def adapters(shape: ModelShape, batch: Batch, rank: int) -> Work:
    """Count LoRA adapters on all matrices of all layers: forward, and backward to inputs and adapters, 6 A B T.

    A is the number of adapter weights.
    """
    num_tokens = batch.sequences * batch.tokens
    weights = shape.layers * rank * shape.adapter_rows
    # Three passes read the input of each matrix and write its output.
    traffic = 3 * shape.layers * num_tokens * shape.adapter_rows
    return Work(6.0 * weights * num_tokens, float(batch.weight_bytes * traffic), 42 * shape.layers, batch.dtype)


def _activations(shape: ModelShape) -> int:
    """Count the numbers that one token and layer reads and writes in a forward pass.

    Norms, residuals, inputs and outputs of the matrices, rotary embedding and the activation of the MLP.
    """
    mlp = 8 if shape.mlp_matrices == 3 else 4
    queries = shape.heads * shape.head_width
    keys = shape.key_heads * shape.head_width
    return 15 * shape.width + 6 * queries + 6 * keys + mlp * shape.mlp_width


def _attention(shape: ModelShape, batch: Batch, *, factor: float) -> Work:
    """Count fused causal attention of all layers, as a multiple of its forward pass."""
    queries = shape.heads * shape.head_width
    keys = shape.key_heads * shape.head_width
    flops = 2.0 * queries * batch.tokens**2 * batch.sequences * shape.layers
    # Fused attention writes no cells: queries, keys, values and outputs pass once.
    traffic = 2 * (queries + keys) * batch.tokens * batch.sequences * shape.layers
    return Work(factor * flops, factor * batch.weight_bytes * traffic, shape.layers, batch.dtype)


def _logits(shape: ModelShape, batch: Batch) -> Work:
    """Count the output projection, or the gradient of its input: 2 d V FLOPs for each row."""
    rows = batch.sequences * batch.logits
    weights = shape.width * shape.vocabulary
    traffic = batch.weight_bytes * (weights + rows * (shape.width + shape.vocabulary))
    return Work(2.0 * weights * rows, float(traffic), 2, batch.dtype)


# Capture -----------------------------------------------------------------------------------------------------


def recording(shape: ModelShape, batch: Batch, num_layers: int) -> Work:
    """Count the comparison of three recomputed rows of each recorded layer with its output.

    It casts keys and values to float32, repeats them for their query heads and reads the values' largest entries.
    """
    num_tokens = batch.sequences * batch.tokens
    queries = shape.heads * shape.head_width
    keys = shape.key_heads * shape.head_width
    per_token = 2 * keys * (batch.weight_bytes + 4) + 16 * queries + 12 * keys
    flops = 12.0 * queries * num_tokens * num_layers
    return Work(flops, float(per_token * num_tokens * num_layers), RECORD_CALLS * num_layers, "float32")


def projection(shape: ModelShape, batch: Batch, num_layers: int) -> Work:
    """Count VTRACE's reader W_O^T D_t / norm(D_t): the output projection forward and transposed, 4 d H e B T."""
    num_tokens = batch.sequences * batch.tokens
    queries = shape.heads * shape.head_width
    weights = shape.width * queries
    # The model's precision inside the projection; float32 for norms, centred values and readers.
    per_token = batch.weight_bytes * 3 * (shape.width + queries) + 4 * (4 * shape.width + 2 * queries)
    traffic = 2 * batch.weight_bytes * weights + per_token * num_tokens
    return Work(4.0 * weights * num_tokens * num_layers, float(traffic * num_layers), 12 * num_layers, batch.dtype)


@dataclass(frozen=True)
class RowSteps:
    """How the rows of a batch are cut into steps whose float32 weights of all heads fit the scratch memory.

    Attributes:
        cells: (reader, token) pairs over all sequences, those above the diagonal inside a step included.
        keys: keys read, summed over steps and sequences.
        steps: number of steps.
    """

    cells: int
    keys: int
    steps: int

    @classmethod
    def of(cls, heads: int, sequences: int, tokens: int, prompt: int, scratch_bytes: int) -> RowSteps:
        """Cut blocks of 128 rows into steps, as ``capture`` does; rows of a shared prompt are those of one sequence."""
        cells = 0
        keys = 0
        steps = 0
        for start in range(0, tokens, BLOCK):
            stop = min(start + BLOCK, tokens)
            # A block that ends inside the shared prompt is the same in every sequence.
            distinct = 1 if stop <= prompt else sequences
            step = max(1, min(MAX_BLOCK, scratch_bytes // (4 * distinct * heads * stop)))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                cells += distinct * (last - first) * last
                keys += distinct * last
                steps += 1
        return cls(cells, keys, steps)


def rows(shape: ModelShape, batch: Batch, num_layers: int, cost: CapacityCost, steps: RowSteps) -> Work:
    """Count one read of the rows: the product Q K^T again, softmax, joined heads, in float32.

    FLOPs of a layer: H x cells x (2 e products + 10). Each step also casts, repeats and reads all its keys.
    """
    queries = shape.heads * shape.head_width
    keys = shape.key_heads * shape.head_width
    # Half-precision keys are cast to float32, and repeated where query heads share them.
    cast = keys * (batch.weight_bytes + 4) if batch.weight_bytes < 4 else 0
    repeated = 4 * (keys + queries) if shape.heads > shape.key_heads else 0
    per_key = cast + repeated + 4 * queries
    # The second product reads values by group, without repeating them.
    per_key += (cost.products - 1) * (cast + 4 * keys)

    # Traffic with cells grows with their number, traffic with keys with the number of steps.
    per_cell = 4 * (shape.heads * cost.accesses + _JOINED_ACCESSES)
    traffic = num_layers * (per_cell * steps.cells + per_key * steps.keys) + 4 * _CAPACITY_ACCESSES * steps.cells
    flops = num_layers * shape.heads * steps.cells * (2 * shape.head_width * cost.products + _CELL_FLOPS)
    calls = (STEP_CALLS + 4 * (cost.products - 1)) * num_layers * steps.steps
    return Work(float(flops), float(traffic), calls, "float32")


# Solve -------------------------------------------------------------------------------------------------------


def dense_sweeps(cells: float, blocks: int, *, compiled: bool, sweeps: int = 2) -> Work:
    """Count sweeps over rows: every cell is read once a sweep, 2 FLOPs in float64."""
    per_cell = _COMPILED_SWEEP_BYTES if compiled else _SWEEP_BYTES
    calls = sweeps if compiled else 6 * sweeps * blocks
    return Work(2.0 * sweeps * cells, float(per_cell * sweeps * cells), calls, "float64")


def sparse_sweeps(edges: float, blocks: int, *, compiled: bool, sweeps: int = 2) -> Work:
    """Count sweeps over edges: every edge is read once a sweep, 2 FLOPs in float64."""
    per_edge = _COMPILED_EDGE_BYTES if compiled else _EDGE_BYTES
    calls = sweeps if compiled else 6 * sweeps * blocks
    return Work(2.0 * sweeps * edges, float(per_edge * sweeps * edges), calls, "float64")


def edge_selection(cells: float, edges: float, blocks: int) -> Work:
    """Count the choice of edges while rows are in memory: the flow of each cell, and the edges kept, sorted."""
    # Kept edges pass about three times through selections and one sort, with key, capacity and flow.
    return Work(4.0 * cells, float(_SELECT_BYTES * cells + 4 * 16 * edges), 12 * blocks, "float64")
