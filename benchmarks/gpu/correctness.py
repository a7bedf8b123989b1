"""Section "correctness": the device computes what the CPU computes, and captured rows are the model's attention."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch
from transformers import AttentionInterface

import flowgraph as fg
import rl
from benchmarks.gpu import models
from benchmarks.gpu.context import Context
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
    for family in models.FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"capture {family} {str(dtype).removeprefix('torch.')}"
            record.attempt(name, lambda f=family, d=dtype, n=name: _check_capture(context, record, n, f, d))
    record.attempt("powers of two", lambda: _check_powers_of_two(context, record))
    record.attempt("solve", lambda: _check_solve(context, record))
    record.attempt("solve, out of range", lambda: _check_out_of_range(context, record))
    record.attempt("solve_rows", lambda: _check_solve_rows(context, record))
    record.attempt("solve_rows, streamed", lambda: _check_streamed(context, record))
    record.attempt("gradients", lambda: _check_gradients(context, record))
    record.attempt("determinism", lambda: _check_determinism(context, record))
    for name, function in _device_functions(context).items():
        record.attempt(name, lambda n=name, f=function: record.require(n, f()), needs=0.0 if context.toy else 5.0)


# Capture -----------------------------------------------------------------------------------------------------


def _check_capture(context: Context, record: Record, name: str, family: str, dtype: torch.dtype) -> None:
    model = models.small_model(family, context.device, dtype, context.seed)
    errors: dict[str, float] = {}
    for side in ("left", "right"):
        batch = models.small_batch(side, context.seed + 1, context.device)
        mask = batch["attention_mask"]
        rows = fg.capture(model, batch["input_ids"], mask, layers="all").dense().double()

        # The softmax of the very queries and keys of the pass, in float64: what the rows should be.
        with _overheard_weights() as weights, torch.no_grad():
            plain = model(**batch, use_cache=False).logits
        exact = torch.stack([layer.mean(1) for layer in weights]).mean(0) * mask[:, :, None]
        errors[f"{side}, same queries and keys"] = _largest_difference(rows, exact)

        # Recording must not change a bit of what the model computes.
        with fg.AttentionRecorder(model, layers="all"), torch.no_grad():
            recorded = model(**batch, use_cache=False).logits
        record.require(f"{name}, {side}: logits are the same bits while recorded", torch.equal(plain, recorded))

        errors[f"{side}, eager pass"] = _against_eager(model, batch, rows, family, dtype, context)
    for case, error in errors.items():
        bound = EAGER_BOUND[dtype] if case.endswith("eager pass") else EXACT_ROWS_BOUND
        record.check(f"{name}, {case}", error, bound)
    again = fg.capture(model, batch["input_ids"], mask, layers="all").dense().double()
    record.row(
        part="capture",
        family=family,
        dtype=str(dtype),
        implementation=model.config._attn_implementation,
        errors=errors,
        same_bits_when_repeated=torch.equal(again, rows),
    )


def _against_eager(
    model: Any, batch: dict[str, Tensor], rows: Tensor, family: str, dtype: torch.dtype, context: Context
) -> float:
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
    expected = torch.stack([layer.double().mean(1) for layer in attentions]).mean(0) * mask[:, :, None]
    return _largest_difference(rows, expected)


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
            weights.append(default(module, query.double(), key.double(), value.double(), mask, **options)[1].double())
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
        return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -1e30)
    return mask.double()


# Solutions ---------------------------------------------------------------------------------------------------


def _check_powers_of_two(context: Context, record: Record) -> None:
    """Rescaling in powers of two is exact only if the device's own are."""
    exponents = torch.arange(-1000, 1001, dtype=torch.float64)
    on_device = torch.exp2(exponents.to(context.device)).cpu()
    exact = torch.tensor([2.0**exponent for exponent in range(-1000, 1001)], dtype=torch.float64)
    record.require("powers of two are exact", torch.equal(on_device, exact))


def _check_solve(context: Context, record: Record) -> None:
    """One graph and a batch of graphs of different sizes, with every rule of source and absorption."""
    sizes = (30, 64, 65, 200) if context.toy else (30, 64, 65, 200, 1000)
    graphs = [random_graph(tokens, 16, context.seed + tokens) for tokens in sizes]
    vector = torch.rand(sum(sizes), generator=context.generator(1), dtype=torch.float64)
    batch: Any = Batch.from_data_list(graphs)
    on_device = batch.clone().to(str(context.device))
    cases: dict[str, dict[str, Any]] = {
        "uniform source": {},
        "potential source": {"source": "potential"},
        "damped": {"damping": 0.5},
        "answer passes through": {"absorption": "pass_through"},
        "own source and demand": {"source": vector, "demand": vector.flip(0)},
    }
    for case, options in cases.items():
        expected = fg.solve(batch, **options)
        moved = _moved(options, context)
        for backend in ("scatter", "dense"):
            found = fg.solve(on_device, backend=backend, **moved)
            error = max(
                relative_difference(getattr(found, name), getattr(expected, name))
                for name in ("h", "g", "throughput", "source")
            )
            record.check(f"solve, {case}, {backend}", error, SOLVER_BOUND)
            record.row(part="solve", case=case, backend=backend, error=error)


def _check_out_of_range(context: Context, record: Record) -> None:
    """A chain whose potential leaves the range of float64 is solved in powers of two, with the same exponents."""
    tokens = 120 if context.toy else 1500
    edges = torch.stack([torch.arange(tokens - 1), torch.arange(1, tokens)])
    weak = torch.full((tokens - 1,), 1e-3, dtype=torch.float64)
    weak[::7] = 1e-9
    graph = fg.FlowGraph.from_edges(edges, weak, num_nodes=tokens, question=[0, 1], answer=[tokens - 1])
    expected = fg.solve(graph)
    found = fg.solve(graph.clone().to(str(context.device)), backend="scatter")
    record.require("out of range: the same exponents", torch.equal(found.exponent.cpu(), expected.exponent))
    record.require("out of range: scaled at all", bool(expected.exponent.any()))
    record.check("out of range: throughput", relative_difference(found.throughput, expected.throughput), SOLVER_BOUND)


def _check_solve_rows(context: Context, record: Record) -> None:
    """Matrices of capacities, and attention as matrices with both presets, in both precisions."""
    sequences, tokens = 3, 80 if context.toy else 700
    masks = _regions(sequences, tokens)
    for dtype in (torch.float32, torch.float64):
        attention = random_attention(sequences, tokens, dtype, context.generator(2))
        for preset in (None, "default", "paper"):
            # The default preset rescales rows in their own precision, so it starts from rows in float64.
            if preset == "default" and dtype == torch.float32:
                continue
            expected = fg.solve_rows(attention, **masks, preset=preset)
            found = fg.solve_rows(attention.to(context.device), **_moved(masks, context), preset=preset)
            error = max(
                relative_difference(getattr(found, name), getattr(expected, name)) for name in ("h", "g", "throughput")
            )
            name = f"solve_rows, preset {preset}, {str(dtype).removeprefix('torch.')}"
            record.check(name, error, SOLVER_BOUND)
            record.row(part="solve_rows", preset=preset, dtype=str(dtype), error=error)


def _check_streamed(context: Context, record: Record) -> None:
    """Rows recomputed block by block from queries and keys give the flow of the same rows held as one matrix."""
    # Above 256 MiB of capacities solve_rows streams; a toy stays below, and then compares the two ways of holding rows.
    sequences, tokens = (2, 64) if context.toy else (5, 4096)
    model = models.small_model(
        "llama", context.device, torch.float32, context.seed, max_position_embeddings=tokens, initializer_range=0.1
    )
    ids = torch.randint(3, models.SMALL_VOCABULARY, (sequences, tokens), generator=context.generator(3))
    masks = _moved(_regions(sequences, tokens), context)
    rows = fg.capture(model, ids.to(context.device))
    streamed = fg.solve_rows(rows, **masks)
    # The matrix is solved one sequence at a time, which is small enough not to stream.
    errors = []
    for item in range(sequences):
        alone = {name: mask[item : item + 1] for name, mask in masks.items()}
        matrix = rows.sequence(item).block(0, tokens)
        whole = fg.solve_rows(matrix, **alone, backend="dense")
        errors.append(relative_difference(streamed.throughput[item], whole.throughput[0]))
    # The rows themselves are float32 softmaxes of blocks of another shape, so they differ by float32 rounding.
    record.check("solve_rows, streamed against held", max(errors), STREAMED_BOUND)
    record.row(part="streamed", sequences=sequences, tokens=tokens, backend=streamed.backend, error=max(errors))


def _check_gradients(context: Context, record: Record) -> None:
    """Gradients to capacities, source and demand of a batch, and to matrices."""
    graphs = [random_graph(tokens, 8, context.seed + tokens) for tokens in (40, 90)]
    weights = torch.rand(130, generator=context.generator(4), dtype=torch.float64)
    vectors = torch.rand(2, 130, generator=context.generator(5), dtype=torch.float64) + 0.1

    def of_graph(device: torch.device, backend: Any) -> list[Tensor]:
        batch: Any = Batch.from_data_list(graphs)
        batch = batch.to(str(device))
        batch.capacity = batch.capacity.double().requires_grad_()
        source, demand = (vector.to(device).requires_grad_() for vector in vectors)
        flow = fg.solve(batch, source=source, demand=demand, backend=backend)
        total = (flow.throughput * weights.to(device)).sum()
        return list(torch.autograd.grad(total, [batch.capacity, source, demand]))

    expected = of_graph(torch.device("cpu"), "auto")
    for backend in ("scatter", "dense"):
        found = of_graph(context.device, backend)
        for name, one, other in zip(("capacity", "source", "demand"), found, expected, strict=True):
            record.check(f"gradient of solve to {name}, {backend}", norm_difference(one, other), SOLVER_BOUND)

    sequences, tokens = 2, 70
    masks = _regions(sequences, tokens)
    attention = random_attention(sequences, tokens, torch.float64, context.generator(6))

    def of_rows(device: torch.device) -> Tensor:
        matrix = attention.to(device).requires_grad_()
        flow = fg.solve_rows(matrix, **masks, preset=None)  # masks are moved to the device of the matrix
        return torch.autograd.grad((flow.throughput * weights[:tokens].to(device)).sum(), matrix)[0]

    error = norm_difference(of_rows(context.device), of_rows(torch.device("cpu")))
    record.check("gradient of solve_rows to the matrices", error, SOLVER_BOUND)


def _check_determinism(context: Context, record: Record) -> None:
    """What gives the same bits twice. docs/engine.md promises it on a CPU, and of scatter in deterministic mode."""
    tokens = 200 if context.toy else 2000
    batch: Any = Batch.from_data_list([random_graph(tokens, 32, context.seed + n) for n in range(4)])
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
    flows = [fg.solve(batch, backend=backend) for _ in range(4)]
    return all(torch.equal(flow.throughput, flows[0].throughput) for flow in flows[1:])


# Everything else that touches the device ------------------------------------------------------------------------


def _device_functions(context: Context) -> dict[str, Callable[[], bool]]:
    """Public functions that mix the device with the CPU, each as a statement that must hold."""
    model = models.small_model("llama", context.device, torch.float32, context.seed)
    ids = torch.randint(3, models.SMALL_VOCABULARY, (40,), generator=context.generator(7))
    regions = {"question": list(range(1, 12)), "answer": [38, 39]}
    graph = random_graph(60, 8, context.seed).to(str(context.device))

    def traced(**options: Any) -> fg.FlowTrace:
        return fg.trace(model, input_ids=ids.to(context.device), **regions, **options)

    def saved() -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.safetensors"
            trace = traced()
            trace.save(path)
            return torch.equal(fg.load_trace(path).throughput, trace.throughput)

    functions: dict[str, Callable[[], bool]] = {
        "a trace certifies": lambda: traced().certify().ok,
        "a trace of fewer edges certifies": lambda: traced(max_edges=120).certify().ok,
        "a trace of chosen heads certifies": lambda: traced(heads="global", layers="all").certify().ok,
        "a trace by value norms certifies": lambda: traced(edge_weight="value_norm").certify().ok,
        "a trace is saved and loaded": saved,
        "a flow on the device certifies": lambda: fg.certify(fg.solve(graph)).ok,
        "a flow on the device is pruned": lambda: 0 < fg.prune(fg.solve(graph), keep=0.9).num_edges <= graph.num_edges,
        "a flow on the device has a backbone": lambda: fg.backbone(fg.solve(graph), 0.9).share >= 0.9,
        "a flow on the device has routes": lambda: bool(fg.decompose(fg.solve(graph))),
        "a flow on the device is contracted": lambda: _contracts(graph),
        "tokens are knocked out": lambda: bool(fg.knockout(model, traced(), tokens=[5]).before.isfinite().all()),
    }
    rules = ["flow"] if context.toy else ["flow", "max_attention", "coupled", "shuffled_flow", "gradient", "atpo"]
    for rule in rules:
        functions[f"PPO steps with credit {rule!r}"] = lambda rule=rule: _ppo_steps(context, rule)
    return functions


def _contracts(graph: Any) -> bool:
    flow = fg.solve(graph)
    steps = torch.arange(graph.num_nodes) // 10
    return abs(float(fg.contract(flow, steps).throughput[-1]) - 1.0) < 1e-9


def _ppo_steps(context: Context, rule: str) -> bool:
    """Two steps of the shipped chain model with a critic; rewards and losses are finite."""
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
    on_device = trainer.policy.device.type == context.device.type
    return on_device and len(history) == 2 and all(torch.isfinite(torch.tensor(row["reward"])) for row in history)


# Inputs and comparisons -----------------------------------------------------------------------------------------


def random_graph(tokens: int, degree: int, seed: int) -> Any:
    """Every token reads its predecessor and others drawn at random; rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(1, tokens).repeat_interleave(degree)
    source = (torch.rand(target.numel(), generator=generator) * target).long()
    source[::degree] = target[::degree] - 1
    # One number for each edge, in the order of a FlowGraph: by target, then by source.
    key = torch.unique(target * tokens + source)
    source, target = key % tokens, key // tokens
    weights = torch.rand(key.numel(), generator=generator)
    total = torch.zeros(tokens).scatter_add_(0, target, weights)
    return fg.FlowGraph.from_edges(
        torch.stack([source, target]),
        weights / total[target],
        num_nodes=tokens,
        question=range(1, tokens // 4),
        answer=[tokens - 1],
    )


def random_attention(sequences: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Causal attention ``[sequences, tokens, tokens]`` with a few strong links in each row."""
    scores = 2 * torch.randn(sequences, tokens, tokens, generator=generator, dtype=torch.float64)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), -1).to(dtype)


def _regions(sequences: int, tokens: int) -> dict[str, Any]:
    position = torch.arange(tokens).expand(sequences, -1)
    question = (position > 0) & (position < tokens // 4)
    return {"question": question, "answer": position >= tokens - 4}


def _moved(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """The same arguments with their tensors on the device."""
    return {name: value.to(context.device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of an entry relative to that entry; infinite where one is not finite or only one is 0."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape or not bool((found.isfinite() & expected.isfinite()).all()):
        return float("inf")
    gap = (found - expected).abs()
    return float(torch.where(gap == 0, 0.0, gap / expected.abs()).max())


def norm_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry: gradients have terms of both signs, which may cancel."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.shape != expected.shape or not bool((found.isfinite() & expected.isfinite()).all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max())
