"""The relevance of an answer as plain JSON values, for files, web pages and other tools.

Schema ``flowgraph-relevance/1``; shares are of the demand, and negative ones argue against the answer::

    schema        "flowgraph-relevance/1"
    model         name, or null
    text          prompt + response
    summary       {num_tokens, num_edges, total, target, hops, residual, bound}
    ends          {question, context, forced, remainder, bias}: where the demand ends; they sum to 1
    tokens        [{index, text, start, end, region, generated, forced, share, absorbed, bias}]
    edges         [[source, target, share]], largest absolute share first
    edges_left_out  number of edges that are not listed
    steps         [{index, start, stop, region, text, share, absorbed, bias, demand}]
    step_edges    [[source step, target step, share]], largest absolute share first
    score         what the shares of the tokens are, in words
    baselines     rankings of the tokens without a flow, as in flowgraph.tracing.payload, or null
    edge_parts    layers and heads of edges, as in flowgraph.tracing.payload; only if asked for
    provenance    what was run, with which choices and versions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flowgraph.flow.signed_flow import SignedFlow
from flowgraph.graph.flow_graph import REGIONS
from flowgraph.pages.trace_page import RELEVANCE_SCHEMA
from flowgraph.steps.step_relevance import StepRelevance

SCHEMA = RELEVANCE_SCHEMA


def relevance_payload(
    flow: SignedFlow,
    steps: StepRelevance,
    *,
    tokens: Sequence[str],
    text: str,
    spans: Int64[Tensor, "tokens 2"],
    provenance: Mapping[str, Any],
    max_edges: int,
) -> dict[str, Any]:
    """Describe a signed flow as plain JSON values in the schema above.

    Args:
        flow: of one sequence.
        steps: its steps.
        tokens: readable text of each token.
        text: prompt and response.
        spans: character span of each token in ``text``.
        provenance: what was run; plain JSON values.
        max_edges: most edges between tokens.
    """
    # Edges of the largest absolute flow, for and against the answer.
    edge_flow = flow.edge_flow
    strongest = torch.argsort(edge_flow.abs(), descending=True, stable=True)[:max_edges]
    return {
        "schema": SCHEMA,
        "model": provenance.get("model"),
        "text": text,
        "summary": {
            "num_tokens": len(tokens),
            "num_edges": flow.graph.num_edges,
            "total": flow.total,
            "target": flow.target,
            "hops": flow.hops,
            "residual": flow.residual,
            "bound": flow.bound,
        },
        "ends": flow.shares(),
        "tokens": _tokens(flow, tokens, spans),
        "edges": _edges(flow.graph.edge_index[:, strongest], edge_flow[strongest]),
        "edges_left_out": edge_flow.numel() - strongest.numel(),
        "steps": _steps(steps),
        "step_edges": _step_edges(steps),
        "provenance": dict(provenance),
    }


def page_payload(relevance: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a relevance without a flow in the schema of :mod:`flowgraph.tracing.payload`, for the trace page."""
    # The page needs the fields of a flow; without one they are empty or 0.
    tokens = []
    for token in relevance["tokens"]:
        shown = {name: token[name] for name in ("index", "text", "start", "end", "region", "generated")}
        tokens.append({**shown, "h": None, "g": None, "throughput": 0.0, "source": 0.0, "absorbed": 0.0})
    return {
        "schema": SCHEMA,
        "model": relevance["model"],
        "text": relevance["text"],
        "feasible": False,
        "summary": {
            "num_tokens": relevance["summary"]["num_tokens"],
            "num_edges": relevance["summary"]["num_edges"],
            "mean_hops": None,
            "alpha": None,
            "kept_attention": 1.0,
            "kept_flow": 1.0,
            "throughput_error": 0.0,
        },
        "tokens": tokens,
        "edges": [],
        "edges_left_out": 0,
        "backbone": None,
        "routes": [],
        "steps": None,
        "hubs": [],
        "checkpoints": [],
        "specificity": None,
        "relevance": relevance,
        "edge_parts": relevance.get("edge_parts", []),
        "score": relevance.get("score"),
        "baselines": relevance.get("baselines"),
        "provenance": relevance["provenance"],
    }


def _tokens(flow: SignedFlow, tokens: Sequence[str], spans: Tensor) -> list[dict[str, Any]]:
    """Describe every token."""
    # None for tokens in no region.
    regions: list[str | None] = [None] * len(tokens)
    for region in REGIONS:
        for token in flow.graph[f"{region}_mask"].nonzero().flatten().tolist():
            regions[token] = region
    columns = zip(
        tokens,
        spans.tolist(),
        regions,
        flow.generated.tolist(),
        flow.forced.tolist(),
        flow.throughput.tolist(),
        flow.absorbed.tolist(),
        flow.bias.tolist(),
        strict=True,
    )
    described = []
    for index, (token, span, region, generated, forced, share, absorbed, bias) in enumerate(columns):
        described.append(
            {
                "index": index,
                "text": token,
                "start": span[0],
                "end": span[1],
                "region": region,
                "generated": generated,
                "forced": forced,
                "share": share,
                "absorbed": absorbed,
                "bias": bias,
            }
        )
    return described


def _steps(steps: StepRelevance) -> list[dict[str, Any]]:
    """Describe every step."""
    throughput = steps.throughput.tolist()
    described = []
    for step in steps.steps:
        described.append(
            {
                "index": step.index,
                "start": step.start,
                "stop": step.stop,
                "region": step.region,
                "text": step.text,
                "share": throughput[step.index],
                "absorbed": float(steps.absorbed[step.index]),
                "bias": float(steps.bias[step.index]),
                "demand": float(steps.demand[step.index]),
            }
        )
    return described


def _step_edges(steps: StepRelevance) -> list[list[float]]:
    """List the edges between steps, largest absolute share first."""
    target, source = steps.flow.nonzero(as_tuple=True)
    share = steps.flow[target, source]
    order = torch.argsort(share.abs(), descending=True, stable=True)
    return _edges(torch.stack([source, target])[:, order], share[order])


def _edges(edge_index: Tensor, share: Tensor) -> list[list[float]]:
    """List edges as ``[source, target, share]``."""
    return [[source, target, value] for source, target, value in zip(*edge_index.tolist(), share.tolist(), strict=True)]
