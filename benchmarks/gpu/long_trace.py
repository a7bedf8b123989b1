"""Section "trace": one long text, time and memory of a trace over those of the plain forward pass.

Lengths double until 32,768 tokens; each is begun only if it can be expected to end in time. Should the largest not be
reached on the whole model, the same width with fewer layers is traced, and the shape is stated.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import flowgraph as fg
from benchmarks.gpu import internals, models
from benchmarks.gpu.context import Context
from benchmarks.gpu.record import Record, describe
from benchmarks.gpu.timing import GIB, free_bytes, measure, peak_gib, release, seconds_of

LENGTHS = (4096, 8192, 16384, 32768)
TOY_LENGTHS = (256, 512)
FEWER_LAYERS = 6
_GROWTH = 4.5
"""Expected time of a text of twice the length, relative to this one; attention alone would give 4."""
_LARGE_SCRATCH = 2**30


def run(context: Context, record: Record) -> None:
    """Trace texts of growing length."""
    record.notes.update(
        definition="trace: fg.trace with its defaults (middle third of the layers, 64 edges per token kept by flow, "
        "exact streamed solve); forward: the same model and text, logits of one position, no cache",
        growth_expected_per_doubling=_GROWTH,
        stages="read off the host's clock without waiting for the device, so work that was queued in one stage may be "
        "waited for in the next",
    )
    lengths = context.sized(LENGTHS, TOY_LENGTHS)
    model = context.model()
    reached = _ladder(context, record, model, lengths, 0.7 * context.left())
    if reached == lengths[-1]:
        return

    # The whole model was too slow or too large for the longest text: fewer layers of the same width.
    context.drop_model()
    config = context.sized(models.qwen3_4b_config(FEWER_LAYERS), models.toy_config(3))
    small = models.random_model(config, context.device, models.LARGE_DTYPE, context.seed)
    context.say(f"trace: {lengths[-1]} tokens were not reached; going on with {config.num_hidden_layers} layers")
    _ladder(context, record, small, lengths[-2:], context.left())


def _ladder(context: Context, record: Record, model: Any, lengths: tuple[int, ...], seconds: float) -> int:
    """Trace one length after the other; returns the largest that was reached."""
    shape = models.shape_of(model)
    ends = time.perf_counter() + seconds
    expected = 0.0
    reached = 0
    for tokens in lengths:
        left = ends - time.perf_counter()
        name = f"{tokens} tokens on {shape['num_hidden_layers']} layers"
        if expected > left:
            record.skip(name, f"expected to take {expected:.0f} s, and {max(left, 0):.0f} s are left for it")
            break
        row = record.attempt(name, lambda t=tokens: _measure_length(context, model, t))
        if row is None:
            break
        record.row(part="trace", model=shape, **row)
        record.save()
        expected = _GROWTH * row["total_s"]
        reached = tokens
    if reached:
        left = ends - time.perf_counter()
        _with_large_scratch(context, record, model, reached, left)
    return reached


def _measure_length(context: Context, model: Any, tokens: int) -> dict[str, Any]:
    """Forward pass and trace of one text: time once (the shorter text before it warmed up), and peak memory."""
    began = time.perf_counter()
    ids = torch.randint(3, model.config.vocab_size, (tokens,), generator=context.generator(30)).to(context.device)
    batch = ids[None]

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False, logits_to_keep=1)

    forward_s = measure(forward, context.device, repeats=3, limit=3.0)["median_s"]
    forward_gib = peak_gib(forward, context.device)

    stages: list[tuple[str, float]] = []
    traces: list[Any] = []
    release(context.device)
    trace_gib = peak_gib(lambda: traces.append(_trace(model, ids, stages)), context.device)
    # The pass that measured memory is timed by its own stages; a second one is made where it is cheap.
    start = stages[0][1]
    trace_s = stages[-1][1] - start
    if trace_s < 5:
        stages.clear()
        trace_s = seconds_of(lambda: _trace(model, ids, stages), context.device)
    graph = traces[0].graph
    context.say(
        f"trace: {tokens} tokens: forward {forward_s:.2f} s, trace {trace_s:.2f} s, {trace_s / forward_s:.1f} times; "
        f"memory {forward_gib:.2f} and {trace_gib:.2f} GiB"
    )
    return {
        "tokens": tokens,
        "forward_s": forward_s,
        "trace_s": trace_s,
        "time_ratio": trace_s / forward_s,
        "forward_gib": forward_gib,
        "trace_gib": trace_gib,
        "memory_over_forward_gib": trace_gib - forward_gib,
        "one_matrix_gib": 4 * tokens**2 / GIB,
        "edges": graph.num_edges,
        "kept_attention": float(graph.kept_attention),
        "kept_flow": float(graph.kept_flow),
        "throughput_error": float(graph.throughput_error),
        "feasible": traces[0].feasible,
        "stages": [{"stage": name, "seconds": after - at} for (name, at), (_, after) in pairwise(stages)],
        "total_s": time.perf_counter() - began,
    }


def _trace(model: Any, ids: Tensor, stages: list[tuple[str, float]]) -> Any:
    """A trace with the default choices; the moments at which its stages began and it ended are noted."""
    tokens = ids.numel()
    question = torch.zeros(tokens, dtype=torch.bool)
    answer = torch.zeros(tokens, dtype=torch.bool)
    question[1 : tokens // 8] = True
    answer[-8:] = True
    stages.append(("preparing", time.perf_counter()))
    result = fg.trace(
        model,
        input_ids=ids,
        question=question,
        answer=answer,
        progress=lambda line: stages.append((line, time.perf_counter())),
    )
    stages.append(("end", time.perf_counter()))
    return result


def _with_large_scratch(context: Context, record: Record, model: Any, tokens: int, seconds: float) -> None:
    """The longest text once more with a larger softmax scratch, whose size in use was chosen for a CPU's caches."""
    last = record.rows[-1]
    size = context.sized(_LARGE_SCRATCH, 2**20)
    part = f"{tokens} tokens with {size / 2**20:g} MiB of scratch"
    if 1.2 * last["trace_s"] > seconds:
        record.skip(part, f"could take {last['trace_s']:.0f} s, and {max(seconds, 0):.0f} s are left for it")
        return
    if 6 * size > free_bytes(context.device):
        record.skip(part, "the scratch and its temporaries would not fit the memory")
        return
    ids = torch.randint(3, model.config.vocab_size, (tokens,), generator=context.generator(30)).to(context.device)
    try:
        with internals.setting(internals.SCRATCH_BYTES, size):
            seconds_taken = seconds_of(lambda: _trace(model, ids, []), context.device)
    except (LookupError, torch.OutOfMemoryError) as error:
        record.skip(part, describe(error))
        return
    context.say(f"trace: {part}: {seconds_taken:.2f} s")
    record.row(
        part="trace with large scratch",
        model=last["model"],
        tokens=tokens,
        scratch_bytes=size,
        trace_s=seconds_taken,
        time_ratio=seconds_taken / last["forward_s"],
    )
