"""Capture the rows of a trace again, with the options that its provenance records or with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import HeadSelector
from flowgraph.capacities.capture import capture
from flowgraph.capacities.registry import find_capacity
from flowgraph.errors import InvalidInputError
from flowgraph.tracing.traced import Traced

if TYPE_CHECKING:
    from flowgraph.tracing.trace_options import TraceOptions

RECORD = "captured_with"
"""Key of the provenance that holds the options of the capture."""

_OF_THE_TEXT = ("answer", "generated")
"""Options that are masks over the tokens of a trace."""


def capture_record(options: TraceOptions, layers: tuple[int, ...]) -> dict[str, Any]:
    """Describe the options of a capture as plain JSON values, from which :func:`capture_again` reads them.

    Args:
        options: the choices of the trace.
        layers: indices of the layers that were read.
    """
    # Only options that the capacity has: others would be refused when it is captured again.
    known = find_capacity(options.capacity).defaults
    record: dict[str, Any] = {}
    if "layers" in known:
        record["layers"] = list(layers)
    if "heads" in known:
        record["heads"] = _heads_as_json(options.heads)
    if "edge_weight" in known:
        record["edge_weight"] = options.edge_weight
    return record


def capture_again(
    trace: Traced, model: nn.Module, *, capacity: str | None = None, options: Mapping[str, Any] | None = None
) -> AttentionRows:
    """Capture the rows of a trace's text again.

    Args:
        trace: its text, answer and provenance are read.
        model: the model of the trace.
        capacity: another capacity, with its own defaults; None: that of the trace.
        options: changes of the options.

    Raises:
        InvalidInputError: a trace whose provenance does not say how it was captured, or options outside their range.
        CaptureError: the architecture cannot be captured.

    Cost: one capture.
    """
    # The options of the trace, those given here, and the regions of the text where the capacity reads them.
    chosen = dict(options or {})
    if capacity is None:
        capacity, recorded = recorded_capture(trace)
        chosen = {**recorded, **chosen}
    known = find_capacity(capacity).defaults
    for name in _OF_THE_TEXT:
        if name in known:
            chosen[name] = getattr(trace, name)
    return capture(model, trace.token_ids, capacity=capacity, **chosen)


def recorded_capture(trace: Traced) -> tuple[str, dict[str, Any]]:
    """Return the capacity of a trace and the options of its capture.

    Raises:
        InvalidInputError: the provenance does not hold them.
    """
    provenance = trace.provenance
    capacity = provenance.get("capacity")
    record = provenance.get(RECORD)
    if not isinstance(capacity, str) or not isinstance(record, Mapping):
        raise InvalidInputError(
            f"trace: must say how its edges were captured, got a provenance without {RECORD!r}; make it with "
            "flowgraph.trace of this version"
        )
    # The options of the capacity may name layers and heads too; a selector was written as its fields.
    options = {**dict(record), **dict(provenance.get("capacity_options") or {})}
    heads = options.get("heads")
    if isinstance(heads, Mapping):
        options["heads"] = HeadSelector(**heads)
    return capacity, options


def _heads_as_json(heads: Any) -> Any:
    """Return a choice of heads as a name, a list of indices, or the fields of a selector."""
    if heads is None:
        return "mean"
    if isinstance(heads, HeadSelector):
        return asdict(heads)
    if isinstance(heads, (str, int)):
        return heads
    return [int(head) for head in heads]
