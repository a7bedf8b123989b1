"""``flowgraph knockout``: mask tokens, edges or a route of a saved trace, and see what becomes of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import Device, Dtype, Model, console, load_model, stages

if TYPE_CHECKING:
    from flowgraph.interventions.knockout import KnockoutResult
    from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.commands.common import warnings_on_stderr


def knockout(
    file: Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")],
    model: Model = "demo",
    tokens: Annotated[str | None, typer.Option(help="Tokens that nothing later may read, like 5,7-9.")] = None,
    edges: Annotated[str | None, typer.Option(help="Edges SOURCE-TARGET that may not be read, like 3-9,4-9.")] = None,
    route: Annotated[str | None, typer.Option(help="Ranks of the widest routes to cut, like 1 or 1-3.")] = None,
    layers: Annotated[str, typer.Option(help="'all', 'middle', 'FIRST-LAST'.")] = "all",
    heads: Annotated[str, typer.Option(help="'all' or indices like 0,3.")] = "all",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Mask tokens, edges or routes of a saved trace in the model's attention, and measure the answer again."""
    from flowgraph.files import check_writable, write_json
    from flowgraph.tracing.flow_trace import load_trace

    if tokens is None and edges is None and route is None:
        raise typer.BadParameter("say what to knock out: --tokens, --edges or --route")
    if json_file is not None:
        check_writable(json_file)
    chosen: dict[str, Any] = {
        "tokens": numbers("tokens", tokens),
        "edges": [_edge(pair) for pair in edges.split(",")] if edges is not None else (),
    }
    ranks = numbers("route", route)
    trace = load_trace(file)
    if ranks:
        routes = trace.routes(max(1, *ranks))
        if min(ranks) < 1 or max(ranks) > len(routes):
            raise typer.BadParameter(f"--route must lie in 1..{len(routes)}, the routes of this trace, got {route!r}")
        chosen["routes"] = [routes[rank - 1] for rank in ranks]
    with stages() as progress:
        network, tokenizer = load_model(model, dtype, device, progress)
        import flowgraph.interventions.knockout as interventions

        progress("measuring the answer")
        with warnings_on_stderr():
            result = interventions.knockout(
                network, trace, layers=layers, heads=numbers("heads", heads) if heads != "all" else heads, **chosen
            )
    if json_file is not None:
        write_json(json_file, {"schema": "flowgraph-knockout/1", **result.to_dict()})
    _report(trace, result, tokenizer)


def numbers(name: str, text: str | None) -> list[int]:
    """ "5,7-9" is 5, 7, 8, 9."""
    found: list[int] = []
    problem = typer.BadParameter(f"--{name} must be numbers and ranges like 5,7-9, got {(text or '')[:80]!r}")
    for part in (text or "").split(",") if text is not None else ():
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and (not _is_number(last) or int(last) < int(first))):
            raise problem
        found += range(int(first), int(last or first) + 1)
    return found


def _edge(text: str) -> tuple[int, int]:
    source, _, target = text.strip().partition("-")
    if not _is_number(source) or not _is_number(target):
        raise typer.BadParameter(f"--edges must be pairs SOURCE-TARGET like 3-9,4-9, got {text[:80]!r}")
    return int(source), int(target)


def _is_number(text: str) -> bool:
    """Whether it counts tokens, heads or routes: of seven digits at most, so that a slip makes no endless range."""
    return text.isdecimal() and len(text) <= 7


def _report(trace: FlowTrace, result: KnockoutResult, tokenizer: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from flowgraph.commands.terminal import visible
    from flowgraph.text.decoding import token_name

    def name(token: int) -> Text:
        return Text(visible(tokenizer.decode([token]) or token_name(tokenizer, token)))

    table = Table(title="the answer, token by token", title_justify="left", show_edge=False)
    for heading in ("token", "text", "log p before", "after", "change", "greedy before", "after"):
        table.add_column(heading, justify="left" if heading in ("text", "greedy before") else "right")
    columns = (result.answer, result.before, result.after, result.greedy_before, result.greedy_after)
    for position, before, after, said, says in zip(*(column.tolist() for column in columns), strict=True):
        table.add_row(
            str(position), Text(visible(trace.tokens[position])), f"{before:.4f}", f"{after:.4f}",
            f"{after - before:+.4f}", name(said), name(says) if says != said else Text("same"),
        )  # fmt: skip
    terminal = console()
    terminal.print(_knocked_out(trace, result), highlight=False, markup=False)
    terminal.print(table)
    before, after = float(result.before.sum()), float(result.after.sum())
    terminal.print(
        f"\nlog-probability of the answer {before:.4f} -> {after:.4f} ({result.change:+.4f} nats); the most probable "
        f"answer tokens {'change: it flips' if result.flips else 'stay: it does not flip'}",
        highlight=False,
    )
    if not bool((result.greedy_before == trace.token_ids[result.answer]).all()):
        terminal.print(
            "note: even before, the trace's answer is not what this model would say; it was sampled, given, or made "
            "by another model or precision",
            highlight=False,
        )


def _knocked_out(trace: FlowTrace, result: KnockoutResult) -> str:
    from flowgraph.commands.terminal import visible

    what = result.intervention

    def named(tokens: Any, between: str) -> str:
        return between.join(f"{token} {visible(trace.tokens[token])!r}" for token in tokens)

    parts = [f"tokens {named(what.tokens, ', ')}"] if what.tokens else []
    parts += [f"edge {named(edge, ' -> ')}" for edge in what.edges]
    parts += [f"route {named(getattr(route, 'tokens', route), ' -> ')}" for route in what.routes]
    where = f"layers {what.layers}, heads {what.heads}"
    return f"knocked out: {'; '.join(parts)} ({where})"
