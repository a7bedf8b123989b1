"""Section "correctness": the device computes what the CPU computes, and captured rows are the model's attention."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch
from transformers import AttentionInterface

import flowgraph as fg
import rl
from benchmarks.gpu import models
from benchmarks.gpu.comparisons import absolute_difference, norm_difference, relative_difference
from benchmarks.gpu.context import Context
from benchmarks.gpu.inputs import moved, random_attention, random_graph, regions
from benchmarks.gpu.models import dtype_name
from benchmarks.gpu.record import Record

SOLVER_BOUND = 1e-12
"""Largest relative difference between a solution on the device and one on the CPU (docs/engine.md)."""
STREAMED_BOUND = 1e-5
"""The same between rows recomputed in blocks of different shapes, each a softmax in float32."""
EXACT_ROWS_BOUND = 1e-5
"""Captured rows against float64 weights of the same queries and keys; float32 softmax of scores below 20."""
EAGER_BOUND = {torch.float32: 5e-5, torch.bfloat16: 2e-2}
"""Captured rows against eager attention of another pass. A bfloat16 eager pass rounds every score to 8 bits, so there
only the first layer, whose inputs are the same, is compared."""


SOLVED = ("h", "g", "throughput")
"""Vectors of a solution that are compared."""


def run(context: Context, record: Record) -> None:
    """Compare capture, solutions and gradients with their references, part by part."""
    record.notes["bounds"] = {
        "solver": SOLVER_BOUND,
        "solver, streamed": STREAMED_BOUND,
        "rows, same queries and keys": EXACT_ROWS_BOUND,
        "rows, eager pass": {str(dtype): bound for dtype, bound in EAGER_BOUND.items()},
    }
    # TF32 keeps 10 bits of float32 products; PyTorch's own default leaves it off.
    torch.set_float32_matmul_precision("highest")

    # Rows are the model's own attention.
    for family in models.FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"capture {family} {dtype_name(dtype)}"
            record.attempt(name, partial(_check_capture, context, record, name, family, dtype))

    # Solutions on the device are those of the CPU.
    parts: dict[str, Callable[[Context, Record], None]] = {
        "powers of two": _check_powers_of_two,
        "solve": _check_solve,
        "solve, out of range": _check_out_of_range,
        "solve_rows": _check_solve_rows,
        "solve_rows, streamed": _check_streamed,
        "gradients": _check_gradients,
        "determinism": _check_determinism,
    }
    for name, part in parts.items():
        record.attempt(name, partial(part, context, record))

    # Everything else that uses the device runs on it at all.
    needs = context.sized(5.0, 0.0)
    for name, function in _device_functions(context).items():
        record.attempt(name, partial(_require, record, name, function), needs=needs)


def _require(record: Record, name: str, function: Callable[[], bool]) -> None:
    record.require(name, function())


# Capture -----------------------------------------------------------------------------------------------------


def _check_capture(context: Context, record: Record, name: str, family: str, dtype: torch.dtype) -> None:
    """Rows of one family, padded on either side, against two references."""
    model = models.small_model(family, context.device, dtype, context.seed)
    errors: dict[str, float] = {}
    repeats_bits = True
    for side in ("left", "right"):
        batch = models.small_batch(side, context.seed + 1, context.device)
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        rows = fg.capture(model, ids, mask, layers="all").dense().double()

        # The softmax of the very queries and keys of the pass, in float64: what the rows should be.
        with _overheard_weights() as weights, torch.no_grad():
            plain = model(**batch, use_cache=False).logits
        exact = _mean_over_layers(weights) * mask[:, :, None]
        errors[f"{side}, same queries and keys"] = absolute_difference(rows, exact)
        record.check(f"{name}, {side}, same queries and keys", absolute_difference(rows, exact), EXACT_ROWS_BOUND)

        # Recording must not change a bit of what the model computes.
        with fg.AttentionRecorder(model, layers="all"), torch.no_grad():
            recorded = model(**batch, use_cache=False).logits
        record.require(f"{name}, {side}: logits are the same bits while recorded", torch.equal(plain, recorded))

        # What the architecture itself reports, from a pass of its own.
        eager = _eager_difference(model, batch, rows, dtype)
        errors[f"{side}, eager pass"] = eager
        record.check(f"{name}, {side}, eager pass", eager, EAGER_BOUND[dtype])

        again = fg.capture(model, ids, mask, layers="all").dense().double()
        repeats_bits = repeats_bits and torch.equal(again, rows)
    record.row(
        part="capture",
        family=family,
        dtype=dtype_name(dtype),
        implementation=model.config._attn_implementation,
        errors=errors,
        same_bits_when_repeated=repeats_bits,
    )


def _eager_difference(model: Any, batch: dict[str, Tensor], rows: Tensor, dtype: torch.dtype) -> float:
    """Largest difference between captured rows and the ``output_attentions`` of an eager pass."""
    mask = batch["attention_mask"]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(**batch, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    if dtype == torch.bfloat16:
        rows = fg.capture(model, batch["input_ids"], mask, layers=[0]).dense().double()
        attentions = attentions[:1]
    expected = _mean_over_layers([layer.double() for layer in attentions]) * mask[:, :, None]
    return absolute_difference(rows, expected)


def _mean_over_layers(weights: list[Tensor]) -> Tensor:
    """Mean over heads, then over layers."""
    of_layers = [layer.mean(1) for layer in weights]
    return torch.stack(of_layers).mean(0)


@contextmanager
def _overheard_weights() -> Iterator[list[Tensor]]:
    """Attention weights ``[batch, heads, tokens, tokens]`` in float64 of each layer of a pass made inside."""
    weights: list[Tensor] = []
    original = AttentionInterface.get_interface

    def get_interface(table: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        function = original(table, attn_implementation, default)

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            mask = _additive(attention_mask, query)
            _, exact = default(module, query.double(), key.double(), value.double(), mask, **options)
            weights.append(exact.double())
            return function(module, query, key, value, attention_mask, **options)

        return attention

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield weights
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


def _additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask as numbers to add to the scores, in float64; None means causal."""
    tokens = query.shape[2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        allowed = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        return allowed.masked_fill(~mask, -1e30)
    return mask.double()


# Solutions ---------------------------------------------------------------------------------------------------


def _check_powers_of_two(context: Context, record: Record) -> None:
    """Rescaling in powers of two is exact only if the device's own are."""
    exponents = range(-1000, 1001)
    exact = torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float64)
    on_device = torch.arange(-1000, 1001, dtype=torch.float64, device=context.device)
    record.require("powers of two are exact", torch.equal(torch.exp2(on_device).cpu(), exact))


def _check_solve(context: Context, record: Record) -> None:
    """A batch of graphs of different sizes, with every rule of source and absorption."""
    sizes = context.sized((30, 64, 65, 200, 1000), (30, 64, 65, 200))
    graphs = [random_graph(tokens, 16, context.seed + tokens) for tokens in sizes]
    batch: Any = Batch.from_data_list(graphs)
    on_device = batch.clone().to(str(context.device))
    vector = torch.rand(sum(sizes), generator=context.generator(1), dtype=torch.float64)
    cases: dict[str, dict[str, Any]] = {
        "uniform source": {},
        "potential source": {"source": "potential"},
        "damped": {"damping": 0.5},
        "answer passes through": {"absorption": "pass_through"},
        "own source and demand": {"source": vector, "demand": vector.flip(0)},
    }
    for case, options in cases.items():
        expected = fg.solve(batch, **options)
        for backend in ("scatter", "dense"):
            found = fg.solve(on_device, backend=backend, **moved(options, context.device))
            error = _solution_difference(found, expected)
            record.check(f"solve, {case}, {backend}", error, SOLVER_BOUND)
            record.row(part="solve", case=case, backend=backend, error=error)


def _solution_difference(found: Any, expected: Any) -> float:
    """Largest relative difference of a potential, an influence or a throughput."""
    vectors = [(getattr(found, name), getattr(expected, name)) for name in SOLVED]
    return max(relative_difference(one, other) for one, other in vectors)


def _check_out_of_range(context: Context, record: Record) -> None:
    """A chain whose potential leaves the range of float64 is solved in powers of two, with the same exponents."""
    tokens = context.sized(1500, 120)
    weak = torch.full((tokens - 1,), 1e-3, dtype=torch.float64)
    weak[::7] = 1e-9
    source = torch.arange(tokens - 1)
    edges = torch.stack([source, source + 1])
    chain = fg.FlowGraph.from_edges(edges, weak, num_nodes=tokens, question=[0, 1], answer=[tokens - 1])
    expected = fg.solve(chain)
    found = fg.solve(chain.clone().to(str(context.device)), backend="scatter")
    record.require("out of range: scaled at all", bool(expected.exponent.any()))
    record.require("out of range: the same exponents", torch.equal(found.exponent.cpu(), expected.exponent))
    error = relative_difference(found.throughput, expected.throughput)
    record.check("out of range: throughput", error, SOLVER_BOUND)


def _check_solve_rows(context: Context, record: Record) -> None:
    """Matrices of capacities, and attention as matrices with both presets, in both precisions."""
    sequences = 3
    tokens = context.sized(700, 80)
    masks = regions(sequences, tokens)
    for dtype in (torch.float32, torch.float64):
        attention = random_attention(sequences, tokens, dtype, context.generator(2))
        for preset in (None, "default", "paper"):
            # The default preset rescales rows in their own precision, so it starts from rows in float64.
            if preset == "default" and dtype == torch.float32:
                continue
            expected = fg.solve_rows(attention, **masks, preset=preset)
            # The masks are moved to the device of the rows by solve_rows itself.
            found = fg.solve_rows(attention.to(context.device), **masks, preset=preset)
            error = _solution_difference(found, expected)
            record.check(f"solve_rows, preset {preset}, {dtype_name(dtype)}", error, SOLVER_BOUND)
            record.row(part="solve_rows", preset=preset, dtype=dtype_name(dtype), error=error)


def _check_streamed(context: Context, record: Record) -> None:
    """Rows recomputed block by block from queries and keys give the flow of the same rows held as one matrix."""
    # Above 256 MiB of capacities solve_rows streams; a toy stays below it, and compares two ways of holding rows.
    sequences = context.sized(5, 2)
    tokens = context.sized(4096, 64)
    model = models.small_model(
        "llama", context.device, torch.float32, context.seed, max_position_embeddings=tokens, initializer_range=0.1
    )
    ids = torch.randint(3, models.SMALL_VOCABULARY, (sequences, tokens), generator=context.generator(3))
    masks = regions(sequences, tokens)
    rows = fg.capture(model, ids.to(context.device))
    streamed = fg.solve_rows(rows, **masks)

    # The matrix is solved one sequence at a time, which is small enough not to stream.
    largest = 0.0
    for item in range(sequences):
        question = masks["question"][item : item + 1]
        answer = masks["answer"][item : item + 1]
        matrix = rows.sequence(item).block(0, tokens)
        held = fg.solve_rows(matrix, question=question, answer=answer, backend="dense")
        largest = max(largest, relative_difference(streamed.throughput[item], held.throughput[0]))
    # The rows themselves are float32 softmaxes of blocks of another shape, so they differ by float32 rounding.
    record.check("solve_rows, streamed against held", largest, STREAMED_BOUND)
    record.row(part="streamed", sequences=sequences, tokens=tokens, backend=streamed.backend, error=largest)


def _check_gradients(context: Context, record: Record) -> None:
    """Gradients to capacities, source and demand of a batch, and to matrices."""
    graphs = [random_graph(tokens, 8, context.seed + tokens) for tokens in (40, 90)]
    num_nodes = 130
    weights = torch.rand(num_nodes, generator=context.generator(4), dtype=torch.float64)
    vectors = torch.rand(2, num_nodes, generator=context.generator(5), dtype=torch.float64) + 0.1

    def of_graph(device: torch.device, backend: Any) -> list[Tensor]:
        batch: Any = Batch.from_data_list(graphs)
        batch = batch.to(str(device))
        batch.capacity = batch.capacity.double().requires_grad_()
        source = vectors[0].to(device).requires_grad_()
        demand = vectors[1].to(device).requires_grad_()
        flow = fg.solve(batch, source=source, demand=demand, backend=backend)
        total = (flow.throughput * weights.to(device)).sum()
        return list(torch.autograd.grad(total, [batch.capacity, source, demand]))

    expected = of_graph(torch.device("cpu"), "auto")
    for backend in ("scatter", "dense"):
        found = of_graph(context.device, backend)
        for name, one, other in zip(("capacity", "source", "demand"), found, expected, strict=True):
            record.check(f"gradient of solve to {name}, {backend}", norm_difference(one, other), SOLVER_BOUND)

    sequences = 2
    tokens = 70
    masks = regions(sequences, tokens)
    attention = random_attention(sequences, tokens, torch.float64, context.generator(6))

    def of_rows(device: torch.device) -> Tensor:
        matrix = attention.to(device).requires_grad_()
        flow = fg.solve_rows(matrix, **masks, preset=None)
        total = (flow.throughput * weights[:tokens].to(device)).sum()
        (gradient,) = torch.autograd.grad(total, matrix)
        return gradient

    error = norm_difference(of_rows(context.device), of_rows(torch.device("cpu")))
    record.check("gradient of solve_rows to the matrices", error, SOLVER_BOUND)


def _check_determinism(context: Context, record: Record) -> None:
    """What gives the same bits twice. docs/engine.md promises it on a CPU, and of scatter in deterministic mode."""
    tokens = context.sized(2000, 200)
    batch: Any = Batch.from_data_list([random_graph(tokens, 32, context.seed + number) for number in range(4)])
    on_device = batch.to(str(context.device))
    promised = context.device.type == "cpu"
    for backend in ("scatter", "dense"):
        same = _same_bits(on_device, backend)
        record.row(part="determinism", backend=backend, deterministic_mode=False, same_bits=same)
        if promised:
            record.require(f"{backend}: the same bits twice", same)
    torch.use_deterministic_algorithms(True)
    try:
        same = _same_bits(on_device, "scatter")
    finally:
        torch.use_deterministic_algorithms(False)
    record.row(part="determinism", backend="scatter", deterministic_mode=True, same_bits=same)
    record.require("scatter in deterministic mode: the same bits twice", same)


def _same_bits(batch: Any, backend: Any) -> bool:
    first = fg.solve(batch, backend=backend).throughput
    again = [fg.solve(batch, backend=backend).throughput for _ in range(3)]
    return all(torch.equal(throughput, first) for throughput in again)


# Everything else that uses the device -------------------------------------------------------------------------


def _device_functions(context: Context) -> dict[str, Callable[[], bool]]:
    """Public functions that use the device and the CPU, each as a statement that must hold."""
    model = models.small_model("llama", context.device, torch.float32, context.seed)
    ids = torch.randint(3, models.SMALL_VOCABULARY, (40,), generator=context.generator(7))
    graph = random_graph(60, 8, context.seed).to(str(context.device))

    def trace(**options: Any) -> fg.FlowTrace:
        question = list(range(1, 12))
        return fg.trace(model, input_ids=ids.to(context.device), question=question, answer=[38, 39], **options)

    def certifies(**options: Any) -> Callable[[], bool]:
        return lambda: trace(**options).certify().ok

    functions: dict[str, Callable[[], bool]] = {
        "a trace certifies": certifies(),
        "a trace of fewer edges certifies": certifies(max_edges=120),
        "a trace of chosen heads certifies": certifies(heads="global", layers="all"),
        "a trace by value norms certifies": certifies(edge_weight="value_norm"),
        "a trace is saved and loaded": lambda: _saves(trace()),
        "tokens are knocked out": lambda: _knocks_out(model, trace()),
        "a flow on the device certifies": lambda: fg.certify(fg.solve(graph)).ok,
        "a flow on the device is pruned": lambda: _prunes(graph),
        "a flow on the device has a backbone": lambda: fg.backbone(fg.solve(graph), 0.9).share >= 0.9,
        "a flow on the device has routes": lambda: bool(fg.decompose(fg.solve(graph))),
        "a flow on the device is contracted": lambda: _contracts(graph),
    }
    rules = context.sized(("flow", "max_attention", "coupled", "shuffled_flow", "gradient", "atpo"), ("flow",))
    for rule in rules:
        functions[f"PPO steps with credit {rule!r}"] = partial(_ppo_steps, context, rule)
    return functions


def _saves(trace: fg.FlowTrace) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        trace.save(path)
        return torch.equal(fg.load_trace(path).throughput, trace.throughput)


def _knocks_out(model: Any, trace: fg.FlowTrace) -> bool:
    result = fg.knockout(model, trace, tokens=[5])
    return bool(result.before.isfinite().all()) and bool(result.after.isfinite().all())


def _prunes(graph: Any) -> bool:
    pruned = fg.prune(fg.solve(graph), keep=0.9)
    return 0 < pruned.num_edges <= graph.num_edges


def _contracts(graph: Any) -> bool:
    steps = torch.arange(graph.num_nodes) // 10
    contracted = fg.contract(fg.solve(graph), steps)
    return abs(float(contracted.throughput[-1]) - 1.0) < 1e-9


def _ppo_steps(context: Context, rule: str) -> bool:
    """Two steps of the shipped chain model with a critic run on the device; their rewards are finite."""
    from accelerate import Accelerator

    # accelerate takes a GPU wherever there is one, unless it is told not to.
    kept_off = context.device.type == "cpu" and torch.cuda.is_available()
    accelerator = Accelerator(cpu=True) if kept_off else None
    model, tokenizer = rl.load_chain_model()
    settings = rl.PPOConfig(steps=2, num_prompts=2, group_size=2, max_response_tokens=24, seed=context.seed)
    trainer = rl.PPOTrainer(
        model, tokenizer, task="chain", credit=rule, config=settings, progress=False, accelerator=accelerator
    )
    history = trainer.train()
    rewards = torch.tensor([row["reward"] for row in history])
    on_device = trainer.policy.device.type == context.device.type
    return on_device and len(history) == 2 and bool(rewards.isfinite().all())
