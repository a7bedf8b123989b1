"""What a trace page's script draws, cut from the trace's payload: short numbers, bounded lists, nothing invented."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MAX_EDGES = 20_000
"""Edges the page knows by their numbers, the strongest of the trace."""
_MAX_BANDS = 4_000
"""Edges between steps that the page knows, the strongest."""


def page_data(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the script draws, with the numbers as short as they are shown."""
    backbone = payload["backbone"]
    edges = payload["edges"][:_MAX_EDGES]
    return {
        "tokens": list(_tokens(payload["tokens"])),
        "edges": [[source, target, _short(flow)] for source, target, _, flow in edges],
        "edges_left_out": payload["edges_left_out"] + len(payload["edges"]) - len(edges),
        "entering": _positive(token["source"] for token in payload["tokens"]),
        "leaving": _positive(token["absorbed"] for token in payload["tokens"]),
        "backbone": backbone and {"share": _short(backbone["share"]), "num_edges": len(backbone["edges"])},
        "routes": [[route["tokens"], _short(route["flow"])] for route in payload["routes"]],
        "hubs": _roles(payload["hubs"]),
        "checkpoints": _roles(payload["checkpoints"]),
        "steps": _steps(payload.get("steps")),
    }


def _tokens(tokens: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """[text, region, generated, h, g, throughput, shares its characters with the token before]."""
    before = None
    for token in tokens:
        span = (token["start"], token["end"])
        numbers = [_short(token[name]) for name in ("h", "g", "throughput")]
        yield [
            token["text"],
            token["region"],
            int(token["generated"]),
            *numbers,
            int(span == before and span[0] < span[1]),
        ]
        before = span


def _positive(values: Iterable[float]) -> list[list[float | None]]:
    """[token, share] of the tokens that have one."""
    return [[index, _short(value)] for index, value in enumerate(values) if value > 0]


def _steps(steps: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Steps as [start, stop, region, throughput, source, absorbed]; their text is that of their tokens."""
    if not steps:
        return None
    edges = sorted(steps["edges"], key=lambda edge: -edge[2])
    numbers = ("throughput", "source", "absorbed")
    # A route enters a step once, from an earlier one or as it starts: this counts the edges left out as well.
    arriving = math.fsum(node["throughput"] - node["source"] for node in steps["nodes"])
    return {
        "by": steps["by"],
        "nodes": [
            [node["start"], node["stop"], node["region"], *(_short(node[name]) for name in numbers)]
            for node in steps["nodes"]
        ],
        "edges": [[source, target, _short(flow)] for source, target, flow in edges[:_MAX_BANDS]],
        "num_edges": len(edges) + steps.get("edges_left_out", 0),
        "edge_flow": _short(arriving),
    }


def _roles(roles: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    return [[role["token"], *(_short(role[name]) for name in ("throughput", "inflows", "outflows"))] for role in roles]


def _short(value: float | None) -> float | None:
    """Six significant digits, twice what is shown; None where there is no number to show."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
