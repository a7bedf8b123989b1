"""``flowgraph compare``: two saved traces side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import console, stages

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from flowgraph.comparison.compare import Comparison

_ROWS = 6
_NUM_ROUTES = 6
_CONTEXT = 12
_STEP = 60
_LETTER = {"question": "Q", "reasoning": "R", "answer": "A", None: ""}


def compare(
    first: Annotated[Path, typer.Argument(help="A: a trace written by `flowgraph trace` or FlowTrace.save.")],
    second: Annotated[Path, typer.Argument(help="B: another trace of the same text, or of the same question.")],
    by: Annotated[
        str, typer.Option(help="'tokens', 'characters' (two tokenizers), 'steps', or 'auto': tokens where it can.")
    ] = "auto",
    html: Annotated[Path | None, typer.Option(help="Also write the side-by-side web page here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the comparison here.")] = None,
) -> None:
    """Compare two traces: of one text (two models, two layer ranges), or of two answers to one question."""
    from flowgraph.comparison.compare import compare
    from flowgraph.files import check_writable
    from flowgraph.tracing.flow_trace import load_trace

    for path in (html, json_file):
        if path is not None:
            check_writable(path)
    if html is not None and html == json_file:
        raise typer.BadParameter(f"--html and --json must name two files, got {html} for both")
    with stages() as progress:
        progress("comparing")
        comparison = compare(load_trace(first), load_trace(second), by=by)
    console().print(_render(comparison))
    if json_file is not None:
        comparison.to_json(json_file)
    if html is not None:
        comparison.to_html(html)


def _render(comparison: Comparison) -> RenderableType:
    """Summary, largest gains and losses in their context, and routes."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [*_summary(comparison)]
    for title, gains in (("more flow in B", True), ("less flow in B", False)):
        parts += [Text(), _changes(comparison, title, gains)]
    parts += [Text(), _routes(comparison)]
    return Group(*parts)


def _summary(comparison: Comparison) -> list[Text]:
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    units = "groups of tokens" if comparison.by == "characters" else comparison.by
    counts = [f"{len(side)} {units}" for side in comparison.units]
    lines = []
    for letter, style, name, count, hops in zip(
        "AB", ("magenta", "yellow"), comparison.names, counts, comparison.mean_hops, strict=True
    ):
        line = Text(letter, style=f"bold {style}").append(f" {visible(name)}", style="not bold default")
        lines.append(line.append(f": {count}, mean route {hops:.2f} hops", style="dim not bold default"))
    lines.append(Text(f"compared by {units}: {comparison.rule}; {comparison.num_matched} have a partner"))
    facts = [
        f"{comparison.edge_overlap:.0%} of all hops",
        f"{sum(r.shared for r in comparison.routes)} of the {len(comparison.routes)} widest routes",
    ]
    if comparison.hub_overlap is not None:
        facts.append(f"{comparison.hub_overlap:.0%} of the {comparison.num_hubs} strongest hubs")
    lines.append(Text(f"shared: {', '.join(facts)}", style="bold"))
    ranks = comparison.rank_correlation
    lines.append(
        Text(
            f"throughput: total variation {comparison.total_variation:.3f} (0 alike, 1 nothing in common), "
            f"rank correlation {'not defined' if ranks is None else f'{ranks:.3f}'}"
        )
    )
    return [*lines, *(Text(f"note: {visible(note)}", style="yellow") for note in comparison.notes)]


def _changes(comparison: Comparison, title: str, gains: bool) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    chosen = comparison.largest(_ROWS, gains=gains)
    if not chosen:
        return Text(f"{title}: nothing")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for name in ("A #", "B #", "", "in context", "A", "B", "B - A"):
        table.add_column(name, justify="left" if name in ("", "in context") else "right", overflow="fold")
    values, change = comparison.throughput.tolist(), comparison.difference.tolist()
    for pair in chosen:
        i, j = comparison.pairs[pair].tolist()
        unit = comparison.units[0][i] if i >= 0 else comparison.units[1][j]
        shares = [f"{values[pair][side]:.1%}" if index >= 0 else "none" for side, index in enumerate((i, j))]
        places = [str(comparison.units[side][index].start) if index >= 0 else "-" for side, index in enumerate((i, j))]
        table.add_row(
            *places, _LETTER[unit.region], _in_context(comparison, pair), *shares, f"{100 * change[pair]:+.1f}"
        )
    if gains:
        table.caption = (
            "#: first token; Q question, R reasoning, A answer; A and B: share of the flow that passes; "
            "none: no partner; B - A: in points of 100 %"
        )
    return table


def _in_context(comparison: Comparison, pair: int) -> Text:
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    before, text, after = comparison.context(pair, _CONTEXT)
    line = Text()
    if comparison.by != "steps":
        line.append(visible(before).lstrip("␣") if before.strip(" ") else "", style="dim")
    line.append(f"[{visible(text[:_STEP])}]", style="bold")
    other = _other_text(comparison, pair)
    if other is not None:
        line.append(" | ", style="dim").append(f"[{visible(other[:_STEP])}]", style="bold")
    elif comparison.by != "steps":
        line.append(visible(after) if after.strip(" ") else "", style="dim")
    return line


def _other_text(comparison: Comparison, pair: int) -> str | None:
    """What B says, where it has the unit and says something else."""
    i, j = comparison.pairs[pair].tolist()
    if i < 0 or j < 0 or comparison.units[0][i].text == comparison.units[1][j].text:
        return None
    return comparison.units[1][j].text


def _routes(comparison: Comparison) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    table = Table(title="widest routes", title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for name in ("A", "B", "", "route"):
        table.add_column(name, justify="right" if name in "AB" and name else "left", overflow="fold")
    for route in comparison.routes[:_NUM_ROUTES]:
        wider = "A" if route.first > route.second else "B"
        kind = "both" if route.shared else f"{'more' if min(route.first, route.second) > 0 else 'only'} in {wider}"
        names = []
        for pair in route.pairs:
            text, other = comparison.text(pair), _other_text(comparison, pair)
            said = visible(text[:24]).strip() or visible(text)
            names.append(Text(said if other is None else f"{said}|{visible(other[:24]).strip()}"))
            names[-1].append(f"[{_place(comparison, pair)}]", style="dim")
        table.add_row(f"{route.first:.1%}", f"{route.second:.1%}", kind, Text(" → ", style="dim").join(names))
    table.caption = "width: how much flow the route could carry in each; routes overlap, so widths do not add up"
    return table


def _place(comparison: Comparison, pair: int) -> int:
    i, j = comparison.pairs[pair].tolist()
    return comparison.units[0][i].start if i >= 0 else comparison.units[1][j].start
