"""``flowgraph cost``: what capture and solve cost beside a training step, computed from sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import Quiet, check_outputs, console, is_short_number, layer_choice

if TYPE_CHECKING:
    from rich.table import Table

    from flowgraph.cost.estimate import CostEstimate

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cost(
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="'4b' (Qwen3-4B), '8b' (Llama-3.1-8B), '70b' (Llama-3.1-70B), a model folder, or a config.json.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", "-t", help="Tokens of each response, its prompt included.")],
    responses: Annotated[int, typer.Option("--responses", "-g", help="Responses of the batch.")] = 1,
    machine: Annotated[
        str,
        typer.Option(
            "--machine", "-m", help="'h100', 'h200', 'cpu', or a JSON file with the fields of flowgraph.Machine."
        ),
    ] = "h100",
    capacity: Annotated[
        str, typer.Option(help="What an edge weighs: 'attention', 'sharp', 'vtrace_share', 'relevance'...")
    ] = "attention",
    layers: Annotated[
        str | None,
        typer.Option(
            help="'middle', 'upper', 'all', 'FIRST-LAST', 'FIRST-' or a list. Default: as the capacity has it."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="First tokens that all responses share; their rows count once.")] = 0,
    hops: Annotated[int, typer.Option(help="Emission hops of relevance, one backward pass each, all counted.")] = 0,
    max_edges: Annotated[
        str | None,
        typer.Option(help="'auto', 'all' or a number: also a graph of each response. Default: scores from the rows."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: 'bfloat16', 'float16' or 'float32'.")] = "bfloat16",
    lora_rank: Annotated[int, typer.Option(help="Of the adapters on all matrices.")] = 16,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing: layers run once more.")
    ] = False,
    scratch_mib: Annotated[
        int, typer.Option("--scratch-mib", help="Memory of the weights of all heads that capture holds at once.")
    ] = 32,
    compute_efficiency: Annotated[
        float | None, typer.Option(help="Share of the peak FLOP/s that is reached. Default: the machine's assumption.")
    ] = None,
    bandwidth_efficiency: Annotated[
        float | None, typer.Option(help="Share of the bandwidth that is reached. Default: the machine's assumption.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the estimate here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Estimate FLOPs, memory traffic and time of capture and solve beside a training step.

    Nothing runs: every figure is computed from the sizes of the model and the peaks of the machine. A training step
    is a scoring pass and a forward and backward pass with LoRA adapters. docs/cost.md states the model.

    Example: flowgraph cost --config 8b --tokens 8192 --responses 16 --machine h100 --capacity sharp --layers upper
    """
    import flowgraph
    from flowgraph.files import write_json

    check_outputs(json_file)
    # Words pass through; the library checks them.
    edges = int(max_edges) if max_edges is not None and is_short_number(max_edges) else max_edges
    estimate = flowgraph.estimate_cost(
        config,
        tokens=tokens,
        responses=responses,
        machine=machine,
        capacity=capacity,
        layers=None if layers is None else layer_choice(layers),
        prompt=prompt,
        hops=hops,
        max_edges=edges,
        dtype=dtype,
        lora_rank=lora_rank,
        checkpointing=checkpointing,
        scratch_bytes=scratch_mib * 2**20,
        compute_efficiency=compute_efficiency,
        bandwidth_efficiency=bandwidth_efficiency,
    )
    # The table first, the result in one line last.
    terminal = console()
    if not quiet:
        for line in _head(estimate):
            terminal.print(line, highlight=False, markup=False)
        terminal.print(_table(estimate))
    terminal.print(_result(estimate), highlight=False, markup=False)
    if json_file is not None:
        write_json(json_file, estimate.to_dict())


def _head(estimate: CostEstimate) -> list[str]:
    """Say what the estimate is for, and which assumptions it makes."""
    settings = estimate.settings
    machine = estimate.machine
    chosen = f"{estimate.capacity}, {len(estimate.layers)} of {estimate.shape.layers} layers"
    return [
        f"{estimate.shape.name}, {settings['responses']:,} x {settings['tokens']:,} tokens, {settings['dtype']}",
        f"credit: {chosen}",
        f"{machine.name}: assumed {machine.compute_efficiency:.0%} of its peak FLOP/s, "
        f"{machine.bandwidth_efficiency:.0%} of {_with_unit(machine.bandwidth)}B/s",
    ]


def _table(estimate: CostEstimate) -> Table:
    """Make a table of the stages, with the sum of each part."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for name in ("FLOPs", "bytes", "operations", "time", "of a step"):
        table.add_column(name, justify="right", no_wrap=True)
    for part, total in (("step", estimate.step_seconds), ("credit", estimate.credit_seconds)):
        for stage in estimate.stages:
            if stage.part != part:
                continue
            table.add_row(
                stage.name,
                _with_unit(stage.flops),
                _with_unit(stage.bytes),
                _with_unit(stage.calls),
                seconds_text(stage.seconds),
                f"{stage.share:.2%}",
            )
        title = "training step" if part == "step" else "capture and solve"
        table.add_row(title, "", "", "", seconds_text(total), f"{total / estimate.step_seconds:.2%}", style="bold")
        table.add_section()
    return table


def _result(estimate: CostEstimate) -> str:
    """Say in one line what capture and solve cost."""
    return (
        f"capture and solve: {seconds_text(estimate.credit_seconds)}, {estimate.credit_share:.2%} of a training step "
        f"of {seconds_text(estimate.step_seconds)} (computed, not measured)"
    )


def _with_unit(value: float) -> str:
    """Format a count with three digits and a prefix: 1.23 T."""
    for size, prefix in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def seconds_text(seconds: float) -> str:
    """Format a time with three digits and a unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
