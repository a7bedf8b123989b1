"""``RelevanceEdge``: one edge of a relevance trace, and the layers and heads that its share comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flowgraph.capacities.capture import capture
from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.errors import InvalidInputError
from flowgraph.flow.signed_flow import share_blocks
from flowgraph.tracing.edge import EdgeParts, check_count, ends_of_edge, position_of_edge
from flowgraph.tracing.recapture import RECORD
from flowgraph.tracing.traced import TracedRelevance

_TOLERANCE = 1e-3
"""Largest difference between the shares of a trace and those captured again, relative to the largest share."""

_TOLERANCE_HALF = 1e-1
"""The same in half precision, whose gradients are rounded at every layer."""


@dataclass(frozen=True, eq=False)
class RelevanceEdge:
    """One edge of a relevance trace: what the token ``target`` takes from the token ``source``.

    Attributes:
        source: the earlier token.
        target: the later token.
        texts: both tokens as text.
        share: signed share of the demand on it, its weight in ``trace.graph``.
        trace: the trace that it belongs to.
    """

    source: int
    target: int
    texts: tuple[str, str]
    share: float
    trace: TracedRelevance = field(repr=False)

    def by_head(self, model: nn.Module) -> EdgeParts:
        """Find which layers and heads the share comes from; the relevance is captured again.

        Args:
            model: the model of the trace.

        Returns:
            The parts, in shares of the demand. They and ``arc`` sum to the share.

        Raises:
            InvalidInputError: another model; a trace whose provenance does not say how it was captured.
            CaptureError: the model cannot be captured.

        Cost: one capture with the hops of the trace, one read of its rows, and one row of each layer and head.
        """
        (parts,) = relevance_parts(self.trace, model, [(self.source, self.target)])
        return parts

    def by_layer(self, model: nn.Module) -> EdgeParts:
        """Find which layers the share comes from: :meth:`by_head`, summed over the heads of each layer.

        Args:
            model: the model of the trace.

        Raises:
            InvalidInputError, CaptureError: as :meth:`by_head`.
        """
        parts = self.by_head(model)
        return EdgeParts(
            source=self.source,
            target=self.target,
            capacity=self.share,
            layers=parts.layers,
            values=parts.by_layer[:, None],
            heads_apart=False,
            kind="relevance",
            arc=parts.arc,
        )


def relevance_edge_of(trace: TracedRelevance, source: Any, target: Any) -> RelevanceEdge:
    """Return one edge of a relevance trace.

    Raises:
        InvalidInputError: not two tokens in order, or no edge between them.
    """
    s, t = ends_of_edge(source, target, trace.num_tokens)
    at = position_of_edge(trace.flow.graph.edge_index, s, t)
    if at is None:
        raise InvalidInputError(
            f"source, target: must be the ends of an edge, got {s} and {t} without one; the share is 0, or max_edges "
            "left the edge out"
        )
    return RelevanceEdge(
        source=s,
        target=t,
        texts=(trace.tokens[s], trace.tokens[t]),
        share=float(trace.flow.graph.weight[at]),
        trace=trace,
    )


def relevance_record(
    rows: RelevanceRows, explained: Bool[Tensor, " tokens"], contrast: Int64[Tensor, " tokens"] | None
) -> dict[str, Any]:
    """Describe how relevance was captured as plain JSON values, from which it can be captured again.

    Args:
        rows: what was captured.
        explained: the tokens whose prediction was explained.
        contrast: ids that were contrasted with, of which those at explained tokens count; None for a named target.
    """
    tokens = explained.nonzero().flatten()
    return {
        "explained": tokens.tolist(),
        "target": rows.target,
        "contrast_ids": None if contrast is None else contrast[tokens.to(contrast.device)].tolist(),
        "hops": rows.hops,
    }


def relevance_again(trace: TracedRelevance, model: nn.Module) -> RelevanceRows:
    """Capture the relevance of a trace again, with its tape, and compare it with the edges of the trace.

    Raises:
        InvalidInputError: another model; a trace whose provenance does not say how it was captured.
        CaptureError: the model cannot be captured.
    """
    record = trace.provenance.get(RECORD)
    if not isinstance(record, Mapping) or "explained" not in record:
        raise InvalidInputError(
            f"trace: must say how its edges were captured, got a provenance without {RECORD!r} of relevance; make it "
            "with flowgraph.trace of this version"
        )

    # The target as it was: a name, or the ids that the answer was contrasted with.
    explained = torch.zeros(trace.num_tokens, dtype=torch.bool)
    explained[record["explained"]] = True
    target: Any = record["target"]
    if record["contrast_ids"] is not None:
        target = trace.token_ids.clone()
        target[explained] = torch.tensor(record["contrast_ids"])

    # The rows keep their tape, from which heads and layers are told apart.
    rows = capture(
        model,
        trace.token_ids,
        capacity="relevance",
        answer=explained,
        generated=trace.flow.generated,
        target=target,
        hops=record["hops"],
        streamed=True,
    )
    _require_same(trace, rows)
    return rows


def _require_same(trace: TracedRelevance, rows: RelevanceRows) -> None:
    """Refuse rows that differ from the edges of the trace."""
    flow = trace.flow
    source, target = flow.graph.edge_index
    weight = flow.edge_flow
    # Blocks of rows are compared with the edges into the same tokens.
    largest = float(weight.abs().max())
    difference = 0.0
    for start, shares in share_blocks(rows, flow.total):
        inside = (target >= start) & (target < start + shares.shape[0])
        again = shares[target[inside] - start, source[inside]]
        if again.numel():
            difference = max(difference, float((again - weight[inside]).abs().max()))
    # Half precision rounds the gradients at every layer.
    is_half = trace.provenance.get("dtype") in ("bfloat16", "float16")
    tolerance = _TOLERANCE_HALF if is_half else _TOLERANCE
    error = difference / largest
    if not error <= tolerance:
        raise InvalidInputError(
            f"model: must be the model of the trace, got one whose relevance differs from the trace's by {error:.2g} "
            f"of the largest share; pass {trace.provenance.get('model')!r} with the same weights and dtype"
        )


def relevance_parts(trace: TracedRelevance, model: nn.Module, edges: list[tuple[int, int]]) -> list[EdgeParts]:
    """Split some edges of a relevance trace into the parts of layers and heads, from one capture.

    Args:
        trace: its flow and provenance are read.
        model: the model of the trace.
        edges: (source, target) of each, edges of the trace.

    Raises:
        InvalidInputError, CaptureError: as :func:`relevance_again`.

    Cost: one capture, one read of its rows, and one row of each layer and head per edge.
    """
    rows = relevance_again(trace, model)
    total = trace.flow.total
    weights = trace.flow.graph.weight
    found = []
    for source, target in edges:
        at = position_of_edge(trace.flow.graph.edge_index, source, target)
        assert at is not None  # edges of the trace
        # The demand and the emission arc of t lie on the edge from t - 1.
        arc = 0.0
        if source == target - 1:
            arc = float(rows.emitted[0, target] + rows.demand[0, source]) / total
        found.append(
            EdgeParts(
                source=source,
                target=target,
                capacity=float(weights[at]),
                layers=rows.layers,
                values=rows.by_head(target, source).double() / total,
                heads_apart=True,
                kind="relevance",
                arc=arc,
            )
        )
    return found


def strongest_relevance_parts(trace: TracedRelevance, model: nn.Module, count: int) -> list[EdgeParts]:
    """Split the edges of largest absolute share, from one capture.

    Args:
        trace: its edges.
        model: the model of the trace.
        count: number of edges.

    Raises:
        InvalidInputError: a count below 1, or as :func:`relevance_again`.
        CaptureError: the model cannot be captured.

    Cost: as :func:`relevance_parts`.
    """
    check_count(count)
    order = torch.argsort(trace.flow.edge_flow.abs(), descending=True, stable=True)[:count]
    edges = [(source, target) for source, target in trace.flow.graph.edge_index[:, order].T.tolist()]
    return relevance_parts(trace, model, edges)
