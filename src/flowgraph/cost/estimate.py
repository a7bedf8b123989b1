"""``estimate_cost``: FLOPs, memory traffic, time and share of a training step for capture and solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flowgraph.attention.attention_rows import BLOCK
from flowgraph.attention.layer_record import SCRATCH_BYTES
from flowgraph.attention.layers_and_heads import LayerRule, resolve_layers
from flowgraph.capacities.registry import find_capacity
from flowgraph.cost import work
from flowgraph.cost.capacity_costs import CapacityCost, find_capacity_cost
from flowgraph.cost.json_records import positive_integer, positive_number, shown
from flowgraph.cost.machine import PRECISIONS, Machine, find_machine
from flowgraph.cost.model_shape import ModelShape, find_shape
from flowgraph.cost.work import Batch, RowSteps, Work
from flowgraph.errors import InvalidInputError
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.propagation.row_sources import KEPT_BYTES

SCHEMA = "flowgraph-cost/1"

DENSE_BYTES = 2**28
"""Rows of a batch up to this size are written into one matrix by ``solve_rows``; larger ones are streamed."""

_LOSS_SWEEPS = 3
"""Sweeps over the kept edges that measure what the others would have carried."""


@dataclass(frozen=True)
class CostStage:
    """One stage, computed and not measured.

    Attributes:
        name: for tables.
        part: ``"step"``: belongs to the training step; ``"credit"``: added by capture and solve.
        flops: floating-point operations.
        bytes: traffic with memory.
        calls: operations that are started one after the other.
        seconds: time, the sum over the parts of the stage of the slowest of computing, moving and starting.
        share: seconds over those of the training step.
    """

    name: str
    part: str
    flops: float
    bytes: float
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class CostEstimate:
    """The stages of a training step and of its credit. Every figure is computed, none is measured.

    Attributes:
        shape: of the model.
        machine: with the efficiencies that were used.
        capacity: name.
        layers: indices of the layers whose rows are read.
        settings: the other choices.
        stages: in the order in which they run.
    """

    shape: ModelShape
    machine: Machine
    capacity: str
    layers: tuple[int, ...]
    settings: dict[str, Any]
    stages: tuple[CostStage, ...]

    @property
    def step_seconds(self) -> float:
        """Return the time of the training step: scoring pass, forward and backward pass."""
        return sum(stage.seconds for stage in self.stages if stage.part == "step")

    @property
    def credit_seconds(self) -> float:
        """Return the time that capture and solve add."""
        return sum(stage.seconds for stage in self.stages if stage.part == "credit")

    @property
    def credit_share(self) -> float:
        """Return the time that capture and solve add, over that of the training step."""
        return self.credit_seconds / self.step_seconds

    def stage(self, name: str) -> CostStage:
        """Return a stage by name.

        Raises:
            InvalidInputError: no stage of this name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise InvalidInputError(f"name: must be one of {names}, got {shown(name)}; stages depend on the capacity")

    def table(self) -> list[dict[str, Any]]:
        """List the stages as rows of a table."""
        return [asdict(stage) for stage in self.stages]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, schema ``flowgraph-cost/1``."""
        return {
            "schema": SCHEMA,
            "basis": "computed",
            "model": self.shape.to_dict(),
            "machine": self.machine.to_dict(),
            "capacity": self.capacity,
            "layers": list(self.layers),
            "settings": dict(self.settings),
            "stages": self.table(),
            "step_seconds": self.step_seconds,
            "credit_seconds": self.credit_seconds,
            "credit_share": self.credit_share,
        }

    def __repr__(self) -> str:
        return (
            f"CostEstimate({self.shape.name}, {self.settings['responses']} x {self.settings['tokens']} tokens, "
            f"{self.capacity} of {len(self.layers)} layers on {self.machine.name}: credit {self.credit_seconds:.3g} s, "
            f"{self.credit_share:.1%} of a step, computed)"
        )


def estimate_cost(
    config: str | Path | ModelShape,
    *,
    tokens: int,
    responses: int = 1,
    machine: str | Path | Machine = "h100",
    capacity: str = "attention",
    layers: LayerRule | None = None,
    prompt: int = 0,
    hops: int = 0,
    max_edges: int | str | None = None,
    dtype: str = "bfloat16",
    logits: int | None = None,
    lora_rank: int = 16,
    checkpointing: bool = False,
    scratch_bytes: int = SCRATCH_BYTES,
    compute_efficiency: float | None = None,
    bandwidth_efficiency: float | None = None,
) -> CostEstimate:
    r"""Estimate what capture and solve cost beside a training step, from counts and the peaks of a machine.

    The time of a stage is the sum over its parts of

    .. math:: \max\left(\frac{FLOPs}{peak \cdot \eta_c}, \frac{bytes}{bandwidth \cdot \eta_b}, calls \cdot t\right)

    A training step is the pass that scores the responses, and one forward and backward pass with LoRA adapters.
    Generation, critic, reference and optimizer are left out; with them the share of the credit is smaller.

    Args:
        config: ``"4b"``, ``"8b"``, ``"70b"``, a folder with a ``config.json``, such a file, or a :class:`ModelShape`.
        tokens: tokens of each response, its prompt included.
        responses: sequences of the batch.
        machine: ``"h100"``, ``"h200"``, ``"cpu"``, a JSON file with the fields of :class:`Machine`, or a machine.
        capacity: what an edge weighs.
        layers: as in :func:`flowgraph.capture`; None: the default of the capacity.
        prompt: first tokens that all responses share, whose rows are computed once.
        hops: emission hops of ``relevance``, one backward pass each; a capture makes fewer where little remains.
        max_edges: None: scores straight from the rows; ``"auto"``, ``"all"`` or a number: a graph of each response.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, of the model; rows are float32, sweeps float64.
        logits: tokens of each response whose logits are computed; None: all.
        lora_rank: of adapters on all matrices of all layers.
        checkpointing: gradient checkpointing, one more forward pass.
        scratch_bytes: memory of the float32 weights of all heads that capture holds at once.
        compute_efficiency: share of the peak FLOP/s that is reached; None: the assumption of the machine.
        bandwidth_efficiency: share of the peak bandwidth that is reached; None: the assumption of the machine.

    Returns:
        The stages. All figures are computed; ``docs/cost.md`` compares the model with measured points.

    Raises:
        InvalidInputError: unknown names, a configuration that the counts do not describe, more tokens than the
            model's context, or numbers that are not positive.

    Cost: milliseconds; nothing is run.

    Example:
        >>> import flowgraph as fg
        >>> estimate = fg.estimate_cost("8b", tokens=1024, responses=16, machine="h100", capacity="sharp")
        >>> [stage.name for stage in estimate.stages]
        ['scoring pass', 'forward and backward', 'recording', 'rows', 'sweeps']
    """
    # Names and files first: later rules depend on the sizes of the model.
    shape = find_shape(config)
    device = _with_efficiencies(find_machine(machine), compute_efficiency, bandwidth_efficiency)
    cost = find_capacity_cost(capacity)
    batch = _checked_batch(shape, tokens, responses, prompt, logits, dtype)
    positive_integer("lora_rank", lora_rank, "16 is usual")
    positive_integer("scratch_bytes", scratch_bytes, f"{SCRATCH_BYTES} is what capture uses")
    chosen = _chosen_layers(capacity, layers, shape.layers)
    _check_hops(capacity, hops)
    if not isinstance(checkpointing, bool):
        raise InvalidInputError(
            f"checkpointing: must be True or False, got {shown(checkpointing)}; True runs layers twice"
        )
    num_edges = None if max_edges is None else edges_kept(max_edges, tokens)

    parts: list[tuple[str, str, list[Work]]] = []
    # The training step: scores under the old policy, then one update of the adapters.
    scoring = work.forward(shape, batch)
    learning = [*work.forward(shape, batch), work.adapters(shape, batch, lora_rank), *work.backward(shape, batch)]
    if checkpointing:
        learning += work.forward(shape, batch)[:2]
    parts.append(("scoring pass", "step", scoring))
    parts.append(("forward and backward", "step", learning))
    # The credit: what capture adds to a pass, and the rows with their solve.
    parts += _capture_parts(shape, batch, cost, chosen, hops)
    parts += _row_parts(shape, batch, cost, chosen, num_edges, scratch_bytes, compiled=device.compiled_sweeps)

    # All other choices, so that the estimate can be repeated.
    settings = {
        "tokens": tokens,
        "responses": responses,
        "prompt": prompt,
        "hops": hops,
        "max_edges": max_edges,
        "dtype": dtype,
        "logits": batch.logits,
        "lora_rank": lora_rank,
        "checkpointing": checkpointing,
        "scratch_bytes": scratch_bytes,
    }
    return CostEstimate(shape, device, capacity, tuple(chosen), settings, _timed(parts, device))


def _with_efficiencies(machine: Machine, compute: float | None, bandwidth: float | None) -> Machine:
    """Return the machine with other efficiencies where they are given."""
    # Replacing a field checks it again.
    changes = {}
    if compute is not None:
        changes["compute_efficiency"] = positive_number("compute_efficiency", compute, "give a share, such as 0.5")
    if bandwidth is not None:
        changes["bandwidth_efficiency"] = positive_number(
            "bandwidth_efficiency", bandwidth, "give a share, such as 0.7"
        )
    return replace(machine, **changes)


def _checked_batch(
    shape: ModelShape, tokens: int, responses: int, prompt: int, logits: int | None, dtype: str
) -> Batch:
    """Check the sizes of the batch against each other and the model."""
    positive_integer("tokens", tokens, "count the tokens of one response, its prompt included")
    positive_integer("responses", responses, "1 is a single text")
    if tokens > shape.context:
        raise InvalidInputError(
            f"tokens: must not exceed the context of {shape.name}, {shape.context}, got {tokens}; shorten the text, or "
            "choose another model"
        )
    if isinstance(prompt, bool) or not isinstance(prompt, int) or not 0 <= prompt < tokens:
        raise InvalidInputError(
            f"prompt: must lie in 0..{tokens - 1}, fewer than tokens, got {shown(prompt)}; 0 shares nothing"
        )
    if logits is None:
        logits = tokens
    if positive_integer("logits", logits, "leave it out for all tokens") > tokens:
        raise InvalidInputError(f"logits: must not exceed tokens, {tokens}, got {logits}; leave it out for all tokens")
    if not isinstance(dtype, str) or dtype not in PRECISIONS:
        raise InvalidInputError(
            f"dtype: must be one of {', '.join(PRECISIONS)}, got {shown(dtype)}; bfloat16 is usual on a GPU"
        )
    return Batch(responses, tokens, prompt, logits, dtype, PRECISIONS[dtype])


def _chosen_layers(capacity: str, layers: LayerRule | None, num_layers: int) -> Sequence[int]:
    """Resolve the layers that are read; relevance sums over all of them."""
    # A capacity without the option has no choice of layers.
    defaults = find_capacity(capacity).defaults
    if "layers" not in defaults:
        if layers is not None:
            raise InvalidInputError(
                f"layers: cannot be chosen with capacity={capacity!r}, which sums over all layers, got "
                f"{shown(layers)}; leave it out"
            )
        return range(num_layers)
    return resolve_layers(defaults["layers"] if layers is None else layers, num_layers)


def _check_hops(capacity: str, hops: int) -> None:
    """Refuse hops that no pass makes."""
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 0:
        raise InvalidInputError(f"hops: must be at least 0, got {shown(hops)}; 0 makes no emission hop")
    if hops and capacity != "relevance":
        raise InvalidInputError(
            f"hops: must be 0 with capacity={capacity!r}, got {hops}; emission hops belong to capacity='relevance'"
        )


def _capture_parts(
    shape: ModelShape, batch: Batch, cost: CapacityCost, layers: Sequence[int], hops: int
) -> list[tuple[str, str, list[Work]]]:
    """List what a capacity does before its rows are read."""
    parts = []
    if cost.backward is not None:
        # Gradients need a pass of their own: the scoring pass keeps no activations.
        parts.append(("pass with gradients", "credit", work.forward(shape, batch)))
        once = work.backward(shape, batch, skips_queries=cost.backward == "values")
        # A hop starts at the input of the output projection; its seed is the gradient of all logits, taken once.
        of_hops = hops * once[:-1] + once[-1:] if hops else []
        parts.append(("backward", "credit", once + of_hops))
    parts.append(("recording", "credit", [work.recording(shape, batch, len(layers))]))
    if cost.projects:
        parts.append(("projection", "credit", [work.projection(shape, batch, len(layers))]))
    return parts


def _row_parts(
    shape: ModelShape,
    batch: Batch,
    cost: CapacityCost,
    layers: Sequence[int],
    num_edges: int | None,
    scratch_bytes: int,
    *,
    compiled: bool,
) -> list[tuple[str, str, list[Work]]]:
    """List the reads of the rows, the sweeps over them, and the edges with their sweeps."""
    # Graphs are made one response at a time; scores straight from rows are those of the batch.
    graphs = 1 if num_edges is None else batch.sequences
    together = batch.sequences // graphs
    tokens = batch.tokens
    prompt = batch.prompt if num_edges is None and not cost.projects and cost.backward is None else 0
    steps = RowSteps.of(shape.heads, together, tokens, prompt, scratch_bytes)
    one_read = work.rows(shape, batch, len(layers), cost, steps)
    cells = together * tokens * (tokens + 1) / 2
    blocks = -(-tokens // BLOCK)

    # A limit on edges, or a batch too large for one matrix, reads rows in both sweeps; the first ones are kept.
    is_complete = num_edges is not None and num_edges == tokens * (tokens - 1) // 2
    is_limited = num_edges is not None and not is_complete
    is_streamed = is_limited or (num_edges is None and 4 * together * tokens**2 > DENSE_BYTES)
    reads = 1.0 + cost.reads_before
    if is_streamed and cost.sweeps:
        reads += 1 - min(1.0, KEPT_BYTES / (4 * cells))
    if is_limited and not cost.sweeps:
        # Signed rows are read for the sums of the law, and once more for the edges.
        reads += 1
    # A fraction of a read stands for the rows that are not kept between the sweeps.
    parts = [("rows", "credit", [_times(one_read, reads * graphs)])]

    # A graph of all edges is solved on its edges alone.
    if cost.sweeps and not is_complete:
        both = work.dense_sweeps(cells, blocks, compiled=compiled and not is_streamed)
        parts.append(("sweeps", "credit", [_times(both, graphs)]))
    if num_edges is not None:
        parts.append(("edges", "credit", [_times(work.edge_selection(cells, num_edges, blocks), graphs)]))
        if cost.sweeps:
            sweeps = 2 + (_LOSS_SWEEPS if is_limited else 0)
            solve = work.sparse_sweeps(num_edges, blocks, compiled=compiled, sweeps=sweeps)
            parts.append(("sweeps over edges", "credit", [_times(solve, graphs)]))
    return parts


def _times(part: Work, factor: float) -> Work:
    """Return work that is done several times."""
    return Work(part.flops * factor, part.bytes * factor, part.calls * factor, part.dtype)


def _timed(parts: list[tuple[str, str, list[Work]]], machine: Machine) -> tuple[CostStage, ...]:
    """Turn counts into times, and times into shares of the training step."""
    efficiencies = (machine.compute_efficiency, machine.bandwidth_efficiency)
    # Parts of a stage run one after the other.
    seconds = [sum(each.seconds(machine, *efficiencies) for each in works) for _, _, works in parts]
    step = sum(time for time, (_, part, _) in zip(seconds, parts, strict=True) if part == "step")
    stages = []
    for (name, part, works), time in zip(parts, seconds, strict=True):
        stages.append(
            CostStage(
                name=name,
                part=part,
                flops=sum(each.flops for each in works),
                bytes=sum(each.bytes for each in works),
                calls=float(sum(each.calls for each in works)),
                seconds=time,
                share=time / step,
            )
        )
    return tuple(stages)
