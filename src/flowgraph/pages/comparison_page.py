"""One self-contained HTML page of a comparison: both texts side by side, coloured by the difference of throughput.

As safe as the page of one trace: no request of any kind, text only as data, one script and one style sheet by hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph.display.signs import visible
from flowgraph.files import PathLike, write_text
from flowgraph.flow.flow import NEGLIGIBLE_FLOW
from flowgraph.pages.page import asset, flattened, render_page

_LISTED = 8
"""Rows of each table of largest differences."""


def render_comparison(payload: Mapping[str, Any]) -> str:
    """Render a comparison as one HTML page.

    Args:
        payload: a comparison in the schema ``flowgraph-comparison/1``; see ``docs/compare.md``.

    Returns:
        The page, about a hundred bytes per unit.

    Cost: one pass over the units.
    """
    return render_page(
        asset("comparison.html.jinja"),
        styles=[asset("comparison.css")],
        scripts=[asset("comparison.js")],
        data_id="comparison",
        page_data=_page_data(payload),
        names=[visible(name) for name in payload["names"]],
        notes=[visible(note) for note in payload["notes"]],
        provenance=_both_provenances(payload["provenance"]),
        by=payload["by"],
        rule=payload["rule"],
        schema=payload["schema"],
        summary=payload["summary"],
        num_routes=len(payload["routes"]),
        shared_routes=sum(route["shared"] for route in payload["routes"]),
    )


def write_comparison_html(path: PathLike, payload: Mapping[str, Any]) -> Path:
    """Write :func:`render_comparison` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_comparison(payload))


def _page_data(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the script draws, with numbers as short as they are shown."""
    units = []
    for side in payload["units"]:
        units.append([_unit(unit) for unit in side])
    routes = []
    for route in payload["routes"]:
        first_width = _short(route["first"])
        second_width = _short(route["second"])
        routes.append([route["pairs"], first_width, second_width, int(route["shared"])])
    pairs = []
    for first, second, difference in payload["pairs"]:
        pairs.append([first, second, _short(difference)])

    # The largest differences are ranked by the exact numbers, not by the short ones.
    change = [difference for _, _, difference in payload["pairs"]]
    largest_first = sorted(range(len(change)), key=lambda pair: -abs(change[pair]))
    gains = [pair for pair in largest_first if change[pair] > NEGLIGIBLE_FLOW]
    losses = [pair for pair in largest_first if change[pair] < -NEGLIGIBLE_FLOW]
    return {
        "by": payload["by"],
        "units": units,
        "pairs": pairs,
        "gains": gains[:_LISTED],
        "losses": losses[:_LISTED],
        "routes": routes,
    }


def _unit(unit: Mapping[str, Any]) -> list[Any]:
    """Return one unit of a text as [text, region, start, stop, throughput, pair]."""
    return [
        unit["text"],
        unit["region"],
        unit["start"],
        unit["stop"],
        _short(unit["throughput"]),
        unit["pair"],
    ]


def _short(value: float) -> float:
    """Round to six significant digits, twice what is shown."""
    return float(f"{value:.6g}")


def _both_provenances(both: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """List (name, value in A, value in B) for every entry of either, those of A first."""
    first = dict(flattened(both[0]))
    second = dict(flattened(both[1]))
    names = {**first, **second}
    return [(name, first.get(name, "none"), second.get(name, "none")) for name in names]
