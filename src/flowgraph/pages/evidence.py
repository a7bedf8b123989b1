"""The relevance of an answer, and other scores of its tokens, as data of the trace page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_PART_EDGES = 4_000
"""Most edges between parts in the page, those of largest absolute share."""

_MAX_SPLIT_EDGES = 400
"""Most edges in the page whose layers and heads are listed."""

_FLOW_NOTE = "share of the unit flow that passes through each token"
_SCORE_NOTES = {
    "potential": "potential h: how much of the answer each token reaches, relative to the strongest token",
    "throughput": "share of the unit flow that passes through each token, on this capacity",
    "relevance": "share of the answer's relevance that reaches each token; purple argues against the answer",
}


def relevance_data(relevance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page draws of a payload in the schema ``flowgraph-relevance/1``; None without one.

    Returns:
        ``parts`` as [start, stop, region, share, absorbed], ``edges`` between them as [source, target, share],
        ``roots`` as [part, share] (the answer), and ``ends`` as [name, share].
    """
    if not relevance:
        return None
    # Steps as parts of the text; those with a demand are the roots from which the evidence is followed.
    parts = []
    roots = []
    for step in relevance["steps"]:
        share = _short(step["share"])
        absorbed = _short(step["absorbed"])
        parts.append([step["start"], step["stop"], step["region"], share, absorbed])
        if step["demand"] != 0:
            roots.append([step["index"], _short(step["demand"])])
    roots.sort(key=lambda root: -abs(root[1]))

    edges = []
    for source, target, share in relevance["step_edges"][:_MAX_PART_EDGES]:
        edges.append([source, target, _short(share)])
    ends = []
    for name, share in relevance["ends"].items():
        ends.append([_END_NAMES.get(name, name), _short(share)])
    return {"parts": parts, "edges": edges, "roots": roots, "ends": ends}


_END_NAMES = {
    "question": "question",
    "context": "other prompt (template, system)",
    "forced": "tokens the model did not choose",
    "remainder": "generated tokens",
    "bias": "biases of the model",
}


def colourings(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List what the colours of the text can show: relevance first, then the flow, then scores of other capacities.

    Returns:
        ``name``, ``note``, ``signed`` and ``values`` of each; the values of the flow are None, since the page holds
        them with its tokens.
    """
    listed: list[dict[str, Any]] = []

    # Relevance of the tokens, signed shares of the demand.
    relevance = payload.get("relevance")
    if relevance:
        values = [_short(token["share"]) for token in relevance["tokens"]]
        listed.append({"name": "relevance", "note": _SCORE_NOTES["relevance"], "signed": True, "values": values})

    # Throughput of the flow; the page has it with the tokens already.
    if payload["feasible"]:
        capacity = payload["provenance"].get("capacity", "attention")
        listed.append({"name": f"flow on {capacity}", "note": _FLOW_NOTE, "signed": False, "values": None})

    # Scores of other capacities. Potentials have no unit, so they are shown relative to the largest.
    for score in payload.get("scores", []):
        values = _relative(score["values"]) if score["kind"] == "potential" else score["values"]
        listed.append(
            {
                "name": f"{score['capacity']} ({score['symbol']})",
                "note": _SCORE_NOTES[score["kind"]],
                "signed": False,
                "values": [_short(value) for value in values],
            }
        )
    return listed


def edge_parts_data(parts: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the layers and heads of edges as the page holds them.

    Args:
        parts: ``edge_parts`` of a payload; see :mod:`flowgraph.tracing.payload`.

    Returns:
        [is relevance, source, target, weight, arc, [[layer, share], ...], [[layer, head, share], ...]] of each edge, at
        most 400 edges.
    """
    listed = []
    for edge in parts[:_MAX_SPLIT_EDGES]:
        layers = [[layer, _short(share, 3)] for layer, share in edge["layers"]]
        heads = [[layer, head, _short(share, 3)] for layer, head, share in edge["heads"]]
        is_relevance = int(edge["kind"] == "relevance")
        weight = _short(edge["weight"], 4)
        arc = _short(edge["arc"], 3)
        listed.append([is_relevance, edge["source"], edge["target"], weight, arc, layers, heads])
    return listed


def _relative(values: Sequence[float | None]) -> list[float]:
    """Divide by the largest finite value, so that potentials of any scale can be drawn."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=0.0)
    if largest <= 0:
        return [0.0 for _ in values]
    shares = []
    for value in values:
        # A value that the payload could not hold is beyond the largest finite one.
        bounded = largest if value is None else value
        shares.append(min(1.0, bounded / largest))
    return shares


def _short(value: float, digits: int = 6) -> float:
    """Round to some significant digits."""
    return float(f"{value:.{digits}g}")
