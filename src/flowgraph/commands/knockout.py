"""``flowgraph knockout``: mask tokens, edges or a route of a saved trace, and measure the answer again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    Device,
    Dtype,
    Layers,
    Model,
    Quiet,
    TraceFile,
    check_outputs,
    console,
    is_short_number,
    layer_choice,
    load_model,
    numbers,
    stages,
    warnings_on_stderr,
)

if TYPE_CHECKING:
    from rich.table import Table

    from flowgraph.analysis.routes import Route
    from flowgraph.interventions.knockout import KnockoutResult
    from flowgraph.tracing.flow_trace import FlowTrace

_HEADINGS = ("token", "text", "log p before", "after", "change", "greedy before", "after")
_LEFT_ALIGNED = ("text", "greedy before")


def knockout(
    file: TraceFile,
    model: Model = "demo",
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens that nothing later may read, like 5,7-9; `flowgraph show --all` lists them."),
    ] = None,
    edges: Annotated[str | None, typer.Option(help="Edges SOURCE-TARGET that may not be read, like 3-9,4-9.")] = None,
    route: Annotated[str | None, typer.Option(help="Ranks of the widest routes to cut, like 1 or 1-3.")] = None,
    layers: Layers = "all",
    heads: Annotated[str, typer.Option(help="'all' or indices like 0,3.")] = "all",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Mask tokens, edges or routes of a saved trace in the model's attention, and measure the answer again."""
    from flowgraph.files import write_json
    from flowgraph.tracing.flow_trace import load_trace

    # Read what is masked before the model is loaded.
    if tokens is None and edges is None and route is None:
        raise typer.BadParameter("one of --tokens, --edges and --route must be given, got none; choose what to mask")
    check_outputs(json_file)
    masked_tokens = [] if tokens is None else numbers("tokens", tokens)
    masked_edges = [] if edges is None else [_edge(pair) for pair in edges.split(",")]
    masked_heads = heads if heads == "all" else numbers("heads", heads)
    ranks = [] if route is None else numbers("route", route)
    trace = load_trace(file)
    masked_routes = _routes(trace, ranks)

    with stages(quiet=quiet) as progress:
        network, tokenizer = load_model(model, dtype, device, progress)
        import flowgraph

        progress("measuring the answer")
        with warnings_on_stderr():
            result = flowgraph.knockout(
                network,
                trace,
                tokens=masked_tokens,
                edges=masked_edges,
                routes=masked_routes,
                layers=layer_choice(layers),
                heads=masked_heads,
            )
    if json_file is not None:
        write_json(json_file, {"schema": "flowgraph-knockout/1", **result.to_dict()})
    _print(trace, result, tokenizer, quiet)


def _edge(text: str) -> tuple[int, int]:
    """Read SOURCE-TARGET as an edge."""
    source, _, target = text.strip().partition("-")
    if not is_short_number(source) or not is_short_number(target):
        raise typer.BadParameter(
            f"--edges must be pairs SOURCE-TARGET like 3-9,4-9, got {text[:80]!r}; separate them by commas"
        )
    return int(source), int(target)


def _routes(trace: FlowTrace, ranks: list[int]) -> list[Route]:
    """Find the routes of these ranks, counted from 1 in order of width."""
    if not ranks:
        return []
    routes = trace.routes(max(1, *ranks))
    if min(ranks) < 1 or max(ranks) > len(routes):
        raise typer.BadParameter(
            f"--route must lie in 1..{len(routes)}, the routes of this trace, got {min(ranks)}..{max(ranks)}; "
            "`flowgraph show` lists the widest"
        )
    return [routes[rank - 1] for rank in ranks]


def _print(trace: FlowTrace, result: KnockoutResult, tokenizer: Any, quiet: bool) -> None:
    """Print what was masked, the answer token by token, and the sum; the sum alone where quiet."""
    terminal = console()
    if not quiet:
        terminal.print(_masked(trace, result), highlight=False, markup=False)
        terminal.print(_answer_table(trace, result, tokenizer))
        terminal.print()
    before = float(result.before.sum())
    after = float(result.after.sum())
    if result.flips:
        outcome = "change: it flips"
    else:
        outcome = "stay: it does not flip"
    terminal.print(
        f"log-probability of the answer {before:.4f} -> {after:.4f} ({result.change:+.4f} nats); the most probable "
        f"answer tokens {outcome}",
        highlight=False,
    )
    # Flips are counted against what the model itself would generate.
    if not quiet and not bool((result.greedy_before == trace.token_ids[result.answer]).all()):
        terminal.print(
            "note: even before, the trace's answer is not the most probable one of this model; it was sampled, given, "
            "or made by another model or precision",
            highlight=False,
        )


def _answer_table(trace: FlowTrace, result: KnockoutResult, tokenizer: Any) -> Table:
    """Tabulate log-probabilities and most probable tokens of the answer before and after."""
    from rich.table import Table
    from rich.text import Text

    from flowgraph.commands.terminal import visible
    from flowgraph.text.decoding import token_name

    def name(token: int) -> Text:
        # Special tokens decode to nothing and are shown by name.
        return Text(visible(tokenizer.decode([token]) or token_name(tokenizer, token)))

    table = Table(title="the answer, token by token", title_justify="left", show_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _LEFT_ALIGNED else "right")
    columns = zip(
        result.answer.tolist(),
        result.before.tolist(),
        result.after.tolist(),
        result.greedy_before.tolist(),
        result.greedy_after.tolist(),
        strict=True,
    )
    for position, before, after, greedy_before, greedy_after in columns:
        table.add_row(
            str(position),
            Text(visible(trace.tokens[position])),
            f"{before:.4f}",
            f"{after:.4f}",
            f"{after - before:+.4f}",
            name(greedy_before),
            Text("same") if greedy_after == greedy_before else name(greedy_after),
        )
    return table


def _masked(trace: FlowTrace, result: KnockoutResult) -> str:
    """Describe what was masked, with the text of every token."""
    from flowgraph.commands.terminal import visible

    def named(tokens: Iterable[int], separator: str) -> str:
        return separator.join(f"{token} {visible(trace.tokens[token])!r}" for token in tokens)

    what = result.intervention
    parts = []
    if what.tokens:
        parts.append(f"tokens {named(what.tokens, ', ')}")
    for edge in what.edges:
        parts.append(f"edge {named(edge, ' -> ')}")
    for route in what.routes:
        # A route is a Route, or token indices.
        tokens: Any = getattr(route, "tokens", route)
        parts.append(f"route {named(tokens, ' -> ')}")
    return f"knocked out: {'; '.join(parts)} (layers {what.layers}, heads {what.heads})"
