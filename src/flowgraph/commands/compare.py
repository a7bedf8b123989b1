"""``flowgraph compare``: two saved traces side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import Full, Quiet, check_outputs, console, one_view, stages

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from flowgraph.comparison.compare import Comparison

_NUM_BRIEF = 3
"""Rows of each table in the view that fits a screen."""
_NUM_CHANGES = 6
"""Rows of each table in the full view."""
_CONTEXT_TOKENS = 12
_MAX_STEP_CHARACTERS = 60
_MAX_ROUTE_CHARACTERS = 24
_SIDE_STYLES = {"A": "magenta", "B": "yellow"}
_REGION_LETTERS = {"question": "Q", "reasoning": "R", "answer": "A", None: ""}


def compare(
    first: Annotated[Path, typer.Argument(help="A: a trace written by `flowgraph trace` or FlowTrace.save.")],
    second: Annotated[Path, typer.Argument(help="B: another trace of the same text, or of the same question.")],
    by: Annotated[
        str, typer.Option(help="'tokens', 'characters' (two tokenizers), 'steps', or 'auto': tokens where it can.")
    ] = "auto",
    html: Annotated[Path | None, typer.Option(help="Also write the side-by-side web page here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the comparison here.")] = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Compare two traces: of one text (two models, two layer ranges), or of two answers to one question."""
    from flowgraph.comparison.compare import compare
    from flowgraph.tracing.flow_trace import load_trace

    one_view(full=full, quiet=quiet)
    check_outputs(html, json_file)
    with stages(quiet=quiet) as progress:
        progress("comparing")
        comparison = compare(load_trace(first), load_trace(second), by=by)
    console().print(_one_line(comparison) if quiet else _render(comparison, _NUM_CHANGES if full else _NUM_BRIEF))
    if json_file is not None:
        comparison.to_json(json_file)
    if html is not None:
        comparison.to_html(html)


def _one_line(comparison: Comparison) -> str:
    """Say in one line how far the two flows agree."""
    return (
        f"{comparison.edge_overlap:.0%} of all hops are shared; throughput: total variation "
        f"{comparison.total_variation:.3f}"
    )


def _render(comparison: Comparison, num_rows: int) -> RenderableType:
    """Join the summary, the largest gains and losses in their context, and the routes.

    Args:
        comparison: what was compared.
        num_rows: of each table.
    """
    from rich.console import Group
    from rich.text import Text

    return Group(
        *_summary(comparison),
        Text(),
        _changes(comparison, "more flow in B", num_rows, gains=True),
        Text(),
        _changes(comparison, "less flow in B", num_rows, gains=False),
        Text(),
        _routes(comparison, num_rows),
    )


def _summary(comparison: Comparison) -> list[Text]:
    """Describe both traces, how they were matched, and how far their flows agree."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    kind = comparison.by
    if kind == "characters":
        kind = "groups of tokens"

    # One line per trace.
    lines = []
    sides = zip(_SIDE_STYLES.items(), comparison.names, comparison.units, comparison.mean_hops, strict=True)
    for (letter, style), name, parts, hops in sides:
        line = Text(letter, style=f"bold {style}")
        line.append(f" {visible(name)}", style="not bold default")
        line.append(f": {len(parts)} {kind}, mean route {hops:.2f} hops", style="dim not bold default")
        lines.append(line)
    # How the parts of the two texts were matched.
    lines.append(Text(f"compared by {kind}: {comparison.rule}; {comparison.num_matched} have a partner"))

    # Agreement of edges, routes and hubs, then of the throughput.
    num_shared_routes = sum(route.shared for route in comparison.routes)
    shared = [
        f"{comparison.edge_overlap:.0%} of all hops",
        f"{num_shared_routes} of the {len(comparison.routes)} widest routes",
    ]
    if comparison.hub_overlap is not None:
        shared.append(f"{comparison.hub_overlap:.0%} of the {comparison.num_hubs} strongest hubs")
    lines.append(Text(f"shared: {', '.join(shared)}", style="bold"))
    correlation = "not defined"
    if comparison.rank_correlation is not None:
        correlation = f"{comparison.rank_correlation:.3f}"
    lines.append(
        Text(
            f"throughput: total variation {comparison.total_variation:.3f} (0 alike, 1 nothing in common), "
            f"rank correlation {correlation}"
        )
    )
    for note in comparison.notes:
        lines.append(Text(f"note: {visible(note)}", style="yellow"))
    return lines


def _changes(comparison: Comparison, title: str, num_rows: int, *, gains: bool) -> RenderableType:
    """Tabulate the largest gains or losses of flow in B."""
    from rich.table import Table
    from rich.text import Text

    pairs = comparison.largest(num_rows, gains=gains)
    if not pairs:
        return Text(f"{title}: nothing")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for name in ("A #", "B #", "", "in context", "A", "B", "B - A"):
        justify = "left" if name in ("", "in context") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    throughput = comparison.throughput.tolist()
    change = comparison.difference.tolist()
    for pair in pairs:
        # An index below 0 marks a side without a partner.
        places = []
        shares = []
        region = None
        for side, index in enumerate(comparison.pairs[pair].tolist()):
            if index < 0:
                places.append("-")
                shares.append("none")
                continue
            part = comparison.units[side][index]
            places.append(str(part.start))
            shares.append(f"{throughput[pair][side]:.1%}")
            if side == 0 or places[0] == "-":
                region = part.region
        table.add_row(
            *places,
            _REGION_LETTERS[region],
            _in_context(comparison, pair),
            *shares,
            f"{100 * change[pair]:+.1f}",
        )
    # Both tables have the same columns, so the first explains them.
    if gains:
        table.caption = (
            "#: first token; Q question, R reasoning, A answer; A and B: share of the flow that passes; "
            "none: no partner; B - A: in points of 100 %"
        )
    return table


def _in_context(comparison: Comparison, pair: int) -> Text:
    """Show the text of a pair in brackets, with the text around it, or with B's text where that differs."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    before, text, after = comparison.context(pair, _CONTEXT_TOKENS)
    # A step is long enough to be recognised alone.
    shows_context = comparison.by != "steps"
    line = Text()
    if shows_context and before.strip(" "):
        line.append(visible(before).lstrip("␣"), style="dim")
    line.append(f"[{visible(text[:_MAX_STEP_CHARACTERS])}]", style="bold")
    other = _other_text(comparison, pair)
    if other is not None:
        line.append(" | ", style="dim")
        line.append(f"[{visible(other[:_MAX_STEP_CHARACTERS])}]", style="bold")
    elif shows_context and after.strip(" "):
        line.append(visible(after), style="dim")
    return line


def _other_text(comparison: Comparison, pair: int) -> str | None:
    """Return the text of B, where both sides have the pair and their texts differ."""
    i, j = comparison.pairs[pair].tolist()
    if i < 0 or j < 0:
        return None
    first = comparison.units[0][i].text
    second = comparison.units[1][j].text
    if first == second:
        return None
    return second


def _routes(comparison: Comparison, num_rows: int) -> RenderableType:
    """Tabulate the widest routes of both traces."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="widest routes", title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for name in ("A", "B", "", "route"):
        justify = "right" if name in ("A", "B") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for route in comparison.routes[:num_rows]:
        if route.shared:
            kind = "both"
        else:
            # A route that only one trace has among its widest may still carry flow in the other.
            wider = "A" if route.first > route.second else "B"
            is_in_both = min(route.first, route.second) > 0
            kind = f"{'more' if is_in_both else 'only'} in {wider}"
        parts = [_route_part(comparison, pair) for pair in route.pairs]
        table.add_row(f"{route.first:.1%}", f"{route.second:.1%}", kind, Text(" → ", style="dim").join(parts))
    # A caption of the table would be as narrow as the table.
    caption = "A, B: how much flow the route could carry in each; routes overlap, so widths do not add up"
    return Group(table, Text(caption, style="dim italic"))


def _route_part(comparison: Comparison, pair: int) -> Text:
    """Show the text of one stop of a route, and B's text where it differs, with the place in the text."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    text = comparison.text(pair)
    shown = visible(text[:_MAX_ROUTE_CHARACTERS]).strip() or visible(text)
    other = _other_text(comparison, pair)
    if other is not None:
        shown = f"{shown}|{visible(other[:_MAX_ROUTE_CHARACTERS]).strip()}"
    part = Text(shown)
    part.append(f"[{_place(comparison, pair)}]", style="dim")
    return part


def _place(comparison: Comparison, pair: int) -> int:
    """Return the first token of a pair, in A where A has it."""
    i, j = comparison.pairs[pair].tolist()
    if i >= 0:
        return comparison.units[0][i].start
    return comparison.units[1][j].start
