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
                  leaves at the token; with a composition also "score"
    edges         [[source, target, capacity, flow]], those with most flow first
    edges_left_out  number of edges with flow that are not listed
    backbone      {keep, share, edges: [[source, target, flow]]}, or null without a flow
    routes        [{tokens, flow}], widest first
    steps         {by, nodes: [{index, start, stop, region, text, throughput, source, absorbed, within}],
                  edges: [[source step, target step, flow]], edges_left_out}, or null without a flow; a node is
                  the tokens start to stop (exclusive), split by the rule that ``by`` names, strongest edges first
    hubs, checkpoints   [{token, throughput, inflows, outflows, score}] of the reasoning tokens
    specificity   {total_variation, compared_with, rank_correlation, entry, description}, or null without a flow; see
                  flowgraph.analysis.specificity
    score         what ranks the tokens, with its capacity, in words
    baselines     {score, region, num_tokens, num_top, baselines: [{baseline, description, spearman, overlap, reason}]}:
                  how far rankings without a flow agree with that of the trace, or null
    relevance     the relevance of the same answer, in the schema of flowgraph.tracing.relevance_payload; only if asked
                  for
    scores        [{capacity, kind, symbol, values}]: scores of the tokens by other capacities; only if asked for
    edge_parts    [{kind, source, target, weight, arc, heads_apart, layers: [[layer, share]], heads: [[layer, head,
                  share]]}]: which layers and heads an edge comes from, in shares of its weight; kind is "capacity" or
                  "relevance"; only if asked for
    provenance    what was run, with which choices and versions; "answer_by" is how the answer was found
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.analysis.backbone import backbone
from flowgraph.analysis.routes import TokenRole, checkpoints, hubs, widest_routes
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import REGIONS, FlowGraph
from flowgraph.graph.signed_graph import SignedGraph
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
    scores: Float64[Tensor, " tokens"] | None = None,
) -> dict[str, Any]:
    """Describe a trace as plain JSON values in the schema above.

    Args:
        flow: the solved flow; it has the graph.
        tokens: readable text of each token.
        text: prompt and response.
        spans: character span of each token in ``text``.
        generated: tokens that the model produced.
        provenance: what was run; plain JSON values.
        keep: share of the flow whose routes make the backbone.
        max_edges: most edges listed, and most flows between steps.
        scores: the scores of a composition; None without one.

    Returns:
        The payload.

    Cost: one backbone search and twenty routes.
    """
    graph = flow.graph
    feasible = bool(flow.feasible)

    # Edges that carry flow, strongest first; equal flows stay in the graph's order.
    edge_flow = flow.edge_flow
    num_carrying = int((edge_flow > 0).sum())
    strongest = torch.argsort(edge_flow, descending=True, stable=True)[:num_carrying]

    payload: dict[str, Any] = {
        "schema": SCHEMA,
        "model": provenance.get("model"),
        "text": text,
        "feasible": feasible,
        "summary": {
            "num_tokens": len(tokens),
            "num_edges": graph.num_edges,
            "mean_hops": float(flow.throughput.sum()) - 1 if feasible else None,
            "alpha": finite_or_none(float(flow.alpha)),
            "kept_attention": finite_or_none(float(graph.kept_attention)),
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
        "specificity": None,
        "provenance": dict(provenance),
    }
    # Scores of a composition stand beside the throughput of each token.
    if scores is not None:
        for described, score in zip(payload["tokens"], scores.tolist(), strict=True):
            described["score"] = score
    if not feasible:
        return payload

    # The analyses below need a flow.
    kept = backbone(flow, keep)
    kept_edges = strongest[kept.edge_mask[strongest]]
    steps = step_flow(flow, tokens=tokens, spans=spans, text=text)
    payload["backbone"] = {
        "keep": keep,
        "share": kept.share,
        "edges": _edges(graph.edge_index, kept_edges, edge_flow),
    }
    routes = []
    for route in widest_routes(flow, _NUM_ROUTES):
        routes.append({"tokens": route.tokens, "flow": route.flow})
    payload["routes"] = routes
    payload["steps"] = steps.to_dict(max_edges=max_edges)
    payload["hubs"] = _roles(hubs(flow, _NUM_ROLES))
    payload["checkpoints"] = _roles(checkpoints(flow, _NUM_ROLES))
    return payload


def finite_or_none(value: float) -> float | None:
    """Return a number, or None where it is infinite or NaN, which JSON cannot hold."""
    if not math.isfinite(value):
        return None
    return value


def token_regions(graph: FlowGraph | SignedGraph) -> list[str | None]:
    """Name the region of every token; None outside the three."""
    # Regions are disjoint, so no name is overwritten.
    names: list[str | None] = [None] * int(graph.question_mask.numel())
    for region in REGIONS:
        for token in graph[f"{region}_mask"].nonzero().flatten().tolist():
            names[token] = region
    return names


def _tokens(flow: Flow, tokens: Sequence[str], spans: Tensor, generated: Tensor) -> list[dict[str, Any]]:
    """Describe every token."""
    # One column per field, each converted at once: access to single elements of tensors is slow.
    potential, influence = flow.potentials
    columns = zip(
        tokens,
        spans.tolist(),
        token_regions(flow.graph),
        generated.tolist(),
        potential.tolist(),
        influence.tolist(),
        flow.throughput.tolist(),
        flow.source.tolist(),
        flow.absorbed.tolist(),
        strict=True,
    )
    described = []
    for index, (token, span, region, is_generated, h, g, throughput, source, absorbed) in enumerate(columns):
        described.append(
            {
                "index": index,
                "text": token,
                "start": span[0],
                "end": span[1],
                "region": region,
                "generated": is_generated,
                "h": finite_or_none(h),
                "g": finite_or_none(g),
                "throughput": throughput,
                "source": source,
                "absorbed": absorbed,
            }
        )
    return described


def _roles(roles: Sequence[TokenRole]) -> list[dict[str, Any]]:
    """Describe hubs or checkpoints; their texts are those of the tokens."""
    described = []
    for role in roles:
        described.append(
            {
                "token": role.token,
                "throughput": role.throughput,
                "inflows": role.inflows,
                "outflows": role.outflows,
                "score": role.score,
            }
        )
    return described


def _edges(edge_index: Tensor, chosen: Tensor, *values: Tensor) -> list[list[float]]:
    """List the chosen edges as ``[source, target, *values]``."""
    columns = [edge_index[0, chosen].tolist(), edge_index[1, chosen].tolist()]
    for value in values:
        columns.append(value[chosen].tolist())
    return [list(row) for row in zip(*columns, strict=True)]
