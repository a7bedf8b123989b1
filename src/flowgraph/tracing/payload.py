"""A trace as plain JSON values, for files, web pages and other tools.

Schema ``flowgraph-trace/1``::

    schema        "flowgraph-trace/1"
    model         name, or null
    text          prompt + response
    feasible      whether any question token reaches the answer
    summary       {num_tokens, num_edges, mean_hops, alpha, kept_attention, kept_flow, throughput_error}
    tokens        [{index, text, start, end, region, generated, h, g, throughput, source, absorbed}]; region is
                  "question", "reasoning", "answer" or null; start and end are characters of text; h or g
                  is null where it is too large for float64; source and absorbed are the flow that enters and
                  leaves at the token
    edges         [[source, target, capacity, flow]], those with most flow first
    edges_left_out  number of edges with flow that are not listed
    backbone      {keep, share, edges: [[source, target, flow]]}, or null without a flow
    routes        [{tokens, flow}], widest first
    steps         {by, nodes: [{index, start, stop, region, text, throughput, source, absorbed, within}],
                  edges: [[source step, target step, flow]], edges_left_out}, or null without a flow; a node is
                  the tokens start to stop (exclusive), split by the rule that ``by`` names, strongest edges first
    hubs, checkpoints   [{token, throughput, inflows, outflows, score}] of the reasoning tokens
    provenance    what was run, with which choices and versions
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flowgraph.analysis.backbone import backbone
from flowgraph.analysis.routes import checkpoints, hubs, widest_routes
from flowgraph.flow.flow import Flow
from flowgraph.steps.step_flow import step_flow

SCHEMA = "flowgraph-trace/1"
_NUM_ROUTES = 20
_NUM_ROLES = 20


def trace_payload(
    flow: Flow,
    *,
    tokens: Sequence[str],
    text: str,
    spans: Int64[Tensor, "tokens 2"],
    generated: Bool[Tensor, " tokens"],
    provenance: Mapping[str, Any],
    keep: float,
    max_edges: int,
) -> dict[str, Any]:
    """The trace in the schema above. Cost: one backbone search and twenty routes."""
    graph, feasible = flow.graph, bool(flow.feasible)
    edge_flow = flow.edge_flow
    strongest = torch.argsort(edge_flow, descending=True, stable=True)[: int((edge_flow > 0).sum())]
    payload: dict[str, Any] = {
        "schema": SCHEMA,
        "model": provenance.get("model"),
        "text": text,
        "feasible": feasible,
        "summary": {
            "num_tokens": len(tokens),
            "num_edges": graph.num_edges,
            "mean_hops": float(flow.throughput.sum()) - 1 if feasible else None,
            "alpha": float(flow.alpha) if bool(torch.isfinite(flow.alpha)) else None,
            "kept_attention": _known(graph.kept_attention),
            "kept_flow": float(graph.kept_flow),
            "throughput_error": float(graph.throughput_error),
        },
        "tokens": _tokens(flow, tokens, spans, generated),
        "edges": _edges(graph.edge_index, strongest[:max_edges], graph.capacity.double(), edge_flow),
        "edges_left_out": max(0, strongest.numel() - max_edges),
        "backbone": None,
        "routes": [],
        "steps": None,
        "hubs": [],
        "checkpoints": [],
        "provenance": dict(provenance),
    }
    if feasible:
        bone = backbone(flow, keep)
        kept = strongest[bone.edge_mask[strongest]]
        payload["backbone"] = {"keep": keep, "share": bone.share, "edges": _edges(graph.edge_index, kept, edge_flow)}
        payload["routes"] = [asdict(route) for route in widest_routes(flow, _NUM_ROUTES)]
        payload["steps"] = step_flow(flow, tokens=tokens, spans=spans, text=text).to_dict(max_edges=max_edges)
        payload["hubs"] = [asdict(role) for role in hubs(flow, _NUM_ROLES)]
        payload["checkpoints"] = [asdict(role) for role in checkpoints(flow, _NUM_ROLES)]
    return payload


def _known(share: Tensor) -> float | None:
    """None where nobody knows: a graph that was read from a file may not say what it lost."""
    return float(share) if bool(torch.isfinite(share)) else None


def _tokens(flow: Flow, tokens: Sequence[str], spans: Tensor, generated: Tensor) -> list[dict[str, Any]]:
    graph = flow.graph
    regions = {"question": graph.question_mask, "reasoning": graph.reasoning_mask, "answer": graph.answer_mask}
    starts, made = spans.tolist(), generated.tolist()
    h, g = ([x if math.isfinite(x) else None for x in vector.tolist()] for vector in flow.potentials)
    throughput, source, absorbed = (x.tolist() for x in (flow.throughput, flow.source, flow.absorbed))
    return [
        {
            "index": index,
            "text": token,
            "start": starts[index][0],
            "end": starts[index][1],
            "region": next((name for name, mask in regions.items() if bool(mask[index])), None),
            "generated": made[index],
            "h": h[index],
            "g": g[index],
            "throughput": throughput[index],
            "source": source[index],
            "absorbed": absorbed[index],
        }
        for index, token in enumerate(tokens)
    ]


def _edges(edge_index: Tensor, chosen: Tensor, *values: Tensor) -> list[list[float]]:
    columns = [
        edge_index[0, chosen].tolist(),
        edge_index[1, chosen].tolist(),
        *(value[chosen].tolist() for value in values),
    ]
    return [list(row) for row in zip(*columns, strict=True)]
