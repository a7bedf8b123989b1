"""Compare the cost model with every measured point, and write the tables of docs/cost.md.

    python -m benchmarks.cost.check_cost

Nothing is timed. The measured points are those of benchmarks/results: times of a 2-core CPU as multiples of the
forward pass, or of one read of the input, measured in the same run. Predictions are for the machine ``cpu``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flowgraph as fg
from benchmarks.common import RESULTS
from flowgraph.cost import work
from flowgraph.cost.estimate import CostEstimate
from flowgraph.cost.machine import MACHINES

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
FORWARD = "forward passes"
READS = "reads of the input"
EDGE_INPUT_BYTES = 20
"""One read of an edge: two int64 indices and a float32 capacity."""

SMOLLM2 = fg.ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, 8192)
CAPTURED = fg.ModelShape("16 layers of width 1024", 16, 1024, 16, 16, 64, 2816, 4096, 8192)
SMALL = fg.ModelShape("4 layers of width 256", 4, 256, 4, 4, 64, 704, 4096, 65536)
"""The models of the benchmarks capacities, capture, and streaming and engine."""

CAPACITY_FILES = ("capacities", "capacities_long")
NOT_MODELLED = ("relevance, streamed", "eager attention, autograd")
"""Ways of these files that the model says nothing about."""

WITH_FORWARD = ("capacities.json", "capacities_long.json", "capture.json", "streaming.json")
"""Files whose ratios hold one complete forward pass."""

NOT_PREDICTED = {
    "engine_dense.json, float64": "captured rows are float32",
    "engine_dense.json and engine_batch.json, complete and first calls": "checks and the topology are not counted",
    "engine_fill.json": "compares backends with each other",
    "engine_peers.json and flashtrace.json": "other methods, and no forward pass beside them",
    "peak memory": "the model counts traffic, not what is held",
}
"""Measured points that the model says nothing about, and why."""

GENERATED = ("<!-- made by benchmarks/cost/check_cost.py -->", "<!-- end -->")
TABLE_TOKENS = (1024, 8192, 32768)
TABLE_CAPACITIES = ("attention", "sharp", "vtrace_share", "relevance")
TABLE_RESPONSES = 16
LARGE_SCRATCH = 2**30

Row = dict[str, Any]


def measured(name: str) -> list[Row]:
    """Read the rows of a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def on_cpu(shape: fg.ModelShape, **choices: Any) -> CostEstimate:
    """Estimate in float32 on the machine of the benchmarks."""
    return fg.estimate_cost(shape, machine="cpu", dtype="float32", **choices)


def seconds(estimate: CostEstimate, *names: str) -> float:
    """Add the times of stages, those that an estimate does not have left out."""
    return sum(stage.seconds for stage in estimate.stages if stage.name in names)


def capacity_points() -> Iterator[Row]:
    """Predict each capacity over the forward pass: captured, and all rows read once."""
    for name in CAPACITY_FILES:
        for row in measured(name):
            tokens = row["tokens"]
            way = row["way"]
            if way == "forward" or way in NOT_MODELLED:
                continue
            plain = seconds(on_cpu(SMOLLM2, tokens=tokens, logits=1), "scoring pass")
            if way == "forward and backward":
                estimate = on_cpu(SMOLLM2, tokens=tokens, logits=1, capacity="gradient")
                predicted = seconds(estimate, "pass with gradients", "backward")
            else:
                predicted = captured_seconds(tokens, way)
            yield point(f"{name}.json", f"{way}, {tokens} tokens", FORWARD, predicted / plain, row["over_forward"])


def captured_seconds(tokens: int, way: str) -> float:
    """Predict the passes, the recording and one read of the rows."""
    name, _, hops = way.partition(", ")
    num_hops = 4 if hops else 0
    # With hops, half of the text is generated, and the logits of that half are computed.
    logits = tokens // 2 if hops else 1
    estimate = on_cpu(SMOLLM2, tokens=tokens, logits=logits, capacity=name, hops=num_hops)
    stages = ["pass with gradients", "backward", "recording", "projection", "rows"]
    if not seconds(estimate, "pass with gradients"):
        stages.append("scoring pass")
    return seconds(estimate, *stages)


def capture_points() -> Iterator[Row]:
    """Predict the capture of 4 of 16 layers over the forward pass."""
    for row in measured("capture"):
        estimate = on_cpu(CAPTURED, tokens=row["tokens"], logits=1, layers="6-9")
        predicted = seconds(estimate, "scoring pass", "recording", "rows") / seconds(estimate, "scoring pass")
        yield point(
            "capture.json", f"attention, 4 of 16 layers, {row['tokens']} tokens", FORWARD, predicted, row["time_ratio"]
        )


def streaming_points() -> Iterator[Row]:
    """Predict traces of long texts, with the 64 edges per token that carry most flow, over the forward pass."""
    for row in measured("streaming"):
        estimate = on_cpu(SMALL, tokens=row["tokens"], logits=1, layers=[1, 2], max_edges="auto")
        plain = seconds(estimate, "scoring pass")
        predicted = (plain + estimate.credit_seconds) / plain
        yield point("streaming.json", f"trace, {row['tokens']} tokens", FORWARD, predicted, row["time_ratio"])


def shared_points() -> Iterator[Row]:
    """Predict the scores of 16 recorded responses, their prompt's rows computed once or for each."""
    for row in measured("engine_shared"):
        tokens = row["prompt"] + row["response"]
        for key, prompt in (("once", row["prompt"]), ("each", 0)):
            estimate = on_cpu(SMALL, tokens=tokens, responses=16, layers=[1, 2], prompt=prompt)
            predicted = seconds(estimate, "rows", "sweeps") / seconds(estimate, "scoring pass")
            name = f"16 responses of {row['prompt']} + {row['response']} tokens, prompt {key}"
            yield point("engine_shared.json", name, FORWARD, predicted, row[f"{key}_ratio"])


def sweep_points() -> Iterator[Row]:
    """Predict both sweeps over one read of the matrix, or of the edges."""
    cpu = MACHINES["cpu"]
    shares = (cpu.compute_efficiency, cpu.bandwidth_efficiency)
    for row in measured("engine_dense"):
        if row["dtype"] != "float32":
            continue
        tokens = row["tokens"]
        cells = tokens * (tokens + 1) / 2
        read = work.Work(cells, 4 * cells, 1, "float64").seconds(cpu, *shares)
        for key, compiled in (("numba", True), ("torch", False)):
            both = work.dense_sweeps(cells, -(-tokens // 128), compiled=compiled).seconds(cpu, *shares)
            name = f"matrix of {tokens} tokens, {key}"
            yield point("engine_dense.json", name, READS, both / read, row[f"{key}_sweeps_ratio"])
    for row in measured("engine_batch"):
        edges = row["edges"]
        read = work.Work(edges, EDGE_INPUT_BYTES * edges, 1, "float64").seconds(cpu, *shares)
        for key, measured_key, compiled in (("numba", "numba_sweeps_ratio", True), ("scatter", "scatter_ratio", False)):
            blocks = -(-row["tokens"] // 128)
            both = work.sparse_sweeps(edges, blocks, compiled=compiled).seconds(cpu, *shares)
            name = f"{row['graphs']} graphs of {row['tokens']} tokens, {key}"
            yield point("engine_batch.json", name, READS, both / read, row[measured_key])


def point(source: str, name: str, unit: str, predicted: float, observed: float) -> Row:
    """Describe one point; six digits are the same on every machine.

    Points that hold a complete forward pass are close to 1 whatever is computed, so the part above 1 is compared too.
    """
    row = {
        "source": source,
        "point": name,
        "unit": unit,
        "predicted": _rounded(predicted),
        "measured": _rounded(observed),
        "predicted_over_measured": _rounded(predicted / observed),
        "added_predicted_over_measured": None,
    }
    if source in WITH_FORWARD:
        row["added_predicted_over_measured"] = _rounded((predicted - 1) / (observed - 1))
    return row


def _rounded(value: float) -> float:
    """Keep six digits."""
    return float(f"{value:.6g}")


def all_points() -> list[Row]:
    """List every point that the model predicts."""
    return [*capacity_points(), *capture_points(), *streaming_points(), *shared_points(), *sweep_points()]


def result() -> dict[str, Any]:
    """Return what benchmarks/results/cost_check.json holds."""
    return {
        "benchmark": "cost_check",
        "notes": "flowgraph.estimate_cost for 2 cores of a CPU against measured ratios; no GPU was measured",
        "machine": MACHINES["cpu"].to_dict(),
        "not_predicted": NOT_PREDICTED,
        "rows": all_points(),
    }


# The page ----------------------------------------------------------------------------------------------------


def generated() -> str:
    """Write the tables of the page: estimates for large models, and every point of the check."""
    return "\n\n".join([*estimate_tables(), check_table()])


def estimate_tables() -> Iterator[str]:
    """Write a table of each machine, with the scratch memory of today and a larger one."""
    for name in ("h100", "h200"):
        lines = [
            f"**{MACHINES[name].name}, {TABLE_RESPONSES} responses, share of a training step (computed)**",
            "",
            "| model | tokens | step | " + " | ".join(f"`{capacity}`" for capacity in TABLE_CAPACITIES) + " |",
            "|---|---|---|" + "---|" * len(TABLE_CAPACITIES),
        ]
        for model in ("4b", "8b", "70b"):
            for tokens in TABLE_TOKENS:
                lines.append(estimate_row(model, tokens, name))
        yield "\n".join(lines)


def estimate_row(model: str, tokens: int, machine: str) -> str:
    """Write a row: share with the default scratch memory / with 1 GiB / with rows of one response at a time."""
    cells = []
    step = 0.0
    for capacity in TABLE_CAPACITIES:
        sizes: dict[str, Any] = {"tokens": tokens, "responses": TABLE_RESPONSES, "machine": machine}
        today = fg.estimate_cost(model, capacity=capacity, **sizes)
        large = fg.estimate_cost(model, capacity=capacity, scratch_bytes=LARGE_SCRATCH, **sizes)
        single: dict[str, Any] = {**sizes, "responses": 1}
        one = fg.estimate_cost(model, capacity=capacity, **single)
        step = today.step_seconds
        apart = TABLE_RESPONSES * one.credit_seconds / step
        cells.append(f"{share(today.credit_share)} / {share(large.credit_share)} / {share(apart)}")
    return f"| {model.upper()} | {tokens:,} | {step:.3g} s | " + " | ".join(cells) + " |"


def share(value: float) -> str:
    """Format a share: percent below 1, multiples of a step above."""
    if value < 1:
        return f"{value:.1%}"
    return f"{value:.1f}x" if value < 10 else f"{value:.0f}x"


def check_table() -> str:
    """Write every predicted point beside what was measured."""
    lines = [
        "**Every measured point that the model predicts**",
        "",
        "| file | point | unit | predicted (computed) | measured | predicted / measured | the same above 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in all_points():
        numbers = f"{row['predicted']:.3g} | {row['measured']:.3g} | {row['predicted_over_measured']:.2f}"
        added = row["added_predicted_over_measured"]
        last = "-" if added is None else f"{added:.2f}"
        lines.append(f"| {row['source']} | {row['point']} | {row['unit']} | {numbers} | {last} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Replace the part of the page between the two comments."""
    before, _, rest = text.partition(GENERATED[0])
    _, _, after = rest.partition(GENERATED[1])
    return f"{before}{GENERATED[0]}\n\n{generated()}\n\n{GENERATED[1]}{after}"


def main() -> None:
    (RESULTS / "cost_check.json").write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for row in all_points():
        print(f"{row['predicted_over_measured']:6.2f}  {row['predicted']:8.3g}  {row['measured']:8.3g}  {row['point']}")


if __name__ == "__main__":
    main()
