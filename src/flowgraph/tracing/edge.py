"""``Edge``: one edge of a trace, and the layers and heads that its weight comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows, SequenceRows
from flowgraph.errors import InvalidInputError
from flowgraph.tracing.recapture import capture_again
from flowgraph.tracing.traced import Traced

_TOLERANCE = 1e-3
"""Largest difference between the capacities of a trace and those captured again, relative to the row's largest."""

_TOLERANCE_HALF = 5e-2
"""The same in half precision, where a text in another batch is rounded differently."""

NUM_EDGES = 200
"""Edges that are split by default, those with most flow or of largest absolute share."""

_LISTED = 8
"""Layers and heads that a repr lists."""


@dataclass(frozen=True, eq=False)
class EdgeParts:
    """The parts that layers and heads have in the capacity of one edge; they sum to it.

    A part may be negative where the capacity is the positive part of a sum over heads: this head argues against the
    others.

    Attributes:
        source: the token that is read.
        target: the token that takes from it.
        capacity: capacity of the edge in the trace.
        layers: index in the model of each row of ``values``.
        values: ``[layers, heads]`` float64, in the units of the capacity; one column where heads were not told apart.
        heads_apart: whether columns are heads.
        kind: ``"capacity"``, or ``"relevance"`` of an edge of a relevance trace, whose capacity is its signed share.
        arc: the part of a relevance edge that no head holds: the demand of an answer token, and what a generated token
            passed on to the token before it. 0 for other edges and capacities.
    """

    source: int
    target: int
    capacity: float
    layers: tuple[int, ...]
    values: Float64[Tensor, "layers heads"]
    heads_apart: bool
    kind: Literal["capacity", "relevance"] = "capacity"
    arc: float = 0.0

    @property
    def total(self) -> float:
        """Sum over layers and heads, and the arc: the capacity, up to rounding."""
        return float(self.values.sum()) + self.arc

    @property
    def by_layer(self) -> Float64[Tensor, " layers"]:
        """Sum over the heads of each layer."""
        return self.values.sum(1)

    def top(self, k: int = _LISTED) -> list[tuple[int, int, float]]:
        """List the ``k`` parts of largest absolute value, as (layer, head, part); without heads, head is -1."""
        # The place in the flat list gives the layer and the head.
        flat = self.values.flatten()
        order = torch.argsort(flat.abs(), descending=True, stable=True)[: max(k, 0)]
        num_heads = self.values.shape[1]
        listed = []
        for place in order.tolist():
            layer = self.layers[place // num_heads]
            head = place % num_heads if self.heads_apart else -1
            listed.append((layer, head, float(flat[place])))
        return listed

    def to_dict(self) -> dict[str, Any]:
        """Describe the parts as plain JSON values."""
        return {
            "kind": self.kind,
            "source": self.source,
            "target": self.target,
            "capacity": self.capacity,
            "layers": list(self.layers),
            "heads_apart": self.heads_apart,
            "arc": self.arc,
            "values": self.values.tolist(),
        }

    def __repr__(self) -> str:
        lines = [f"EdgeParts({self.source} -> {self.target}, capacity {self.capacity:.4g})"]
        if self.arc:
            lines.append(f"  arc to the token before: {self.arc:+.3g} ({self.arc / self.capacity:+.1%})")
        for layer, head, part in self.top():
            share = part / self.capacity if self.capacity else 0.0
            place = f"layer {layer:>2}" if head < 0 else f"layer {layer:>2}, head {head:>2}"
            lines.append(f"  {place}: {part:+.3g} ({share:+.1%})")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Edge:
    """One edge of a trace: the token ``source`` is read for the token ``target``.

    Attributes:
        source: the earlier token.
        target: the later token.
        texts: both tokens as text.
        capacity: its capacity in the graph.
        flow: share of the unit flow on it.
        trace: the trace that it belongs to.
    """

    source: int
    target: int
    texts: tuple[str, str]
    capacity: float
    flow: float
    trace: Traced = field(repr=False)

    def by_head(self, model: nn.Module) -> EdgeParts:
        """Find which layers and heads the capacity comes from; the rows are captured again.

        Args:
            model: the model of the trace.

        Returns:
            The parts, which sum to the capacity.

        Raises:
            InvalidInputError: a capacity that does not sum over heads (``"vtrace_share"``, ``"sharp_max"``, a maximum);
                another model; a trace whose provenance does not say how it was captured.
            CaptureError: the model cannot be captured.

        Cost: one capture, and one row of attention for each layer and head.
        """
        return self._parts(model, heads_apart=True)

    def by_layer(self, model: nn.Module) -> EdgeParts:
        """Find which layers the capacity comes from, also for capacities that join heads before they sum.

        Args:
            model: the model of the trace.

        Raises:
            InvalidInputError: layers joined by their maximum; another model; a trace without a record of its capture.
            CaptureError: the model cannot be captured.

        Cost: one capture, and one row of each layer.
        """
        return self._parts(model, heads_apart=False)

    def _parts(self, model: nn.Module, *, heads_apart: bool) -> EdgeParts:
        captured = capture_again(self.trace, model)
        (parts,) = _split(self.trace, captured, [(self.source, self.target, self.capacity)], heads_apart=heads_apart)
        return parts


def _split(
    trace: Traced, captured: AttentionRows, edges: Sequence[tuple[int, int, float]], *, heads_apart: bool
) -> list[EdgeParts]:
    """Split edges, given as (source, target, capacity), by the rows that were captured again."""
    rows = captured.sequence(0)
    # A token with one edge says nothing about the model, so the last row is compared as well.
    last = int(trace.graph.edge_index[1, -1])
    factors = {last: _factor_of_row(trace, last, rows)}
    found = []
    for source, target, capacity in edges:
        if target not in factors:
            factors[target] = _factor_of_row(trace, target, rows)
        row = _row_of(trace, target)
        if heads_apart:
            values = rows.by_head(row, source)
        else:
            values = rows.by_layer(row, source)[:, None]
        # The factor turns weights of the row into capacities, so that the parts sum to the capacity of the edge.
        found.append(
            EdgeParts(
                source=source,
                target=target,
                capacity=capacity,
                layers=_layers_of(captured.layers, rows),
                values=values.double() * factors[target],
                heads_apart=heads_apart,
            )
        )
    return found


def strongest_parts(trace: Traced, model: nn.Module, count: int) -> list[EdgeParts]:
    """Split the edges with most flow, from one capture: by heads, or by layers where the capacity joins heads first.

    Args:
        trace: its edges.
        model: the model of the trace.
        count: number of edges.

    Raises:
        InvalidInputError: a count below 1; layers joined by their maximum; another model; a trace without a record of
            its capture.
        CaptureError: the model cannot be captured.

    Cost: one capture, and one row of each layer and head per edge.
    """
    check_count(count)
    # The edges that carry most flow; a stable sort keeps equal ones in the graph's order.
    flow = trace.flow.edge_flow
    order = torch.argsort(flow, descending=True, stable=True)[:count]
    order = order[flow[order] > 0]
    source, target = trace.graph.edge_index[:, order].tolist()
    capacity = trace.graph.capacity[order].tolist()
    edges = list(zip(source, target, capacity, strict=True))
    if not edges:
        return []

    # One pass of the model serves all edges.
    captured = capture_again(trace, model)
    heads_apart = _can_split_heads(captured.sequence(0))
    return _split(trace, captured, edges, heads_apart=heads_apart)


def _can_split_heads(rows: SequenceRows) -> bool:
    """Tell whether the heads of every layer are summed; the first cell is split as an attempt."""
    try:
        rows.by_head(0, 0)
    except InvalidInputError:
        # Heads that are joined before. Layers that are joined by their maximum are refused by by_layer, too.
        return False
    return True


def check_count(count: Any) -> None:
    """Refuse a number of edges that is not a positive integer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInputError(f"count: must be a positive integer, got {count!r}; {NUM_EDGES} is the default")


def parts_payload(parts: Sequence[EdgeParts], kinds: Mapping[str, Int64[Tensor, "2 edges"]]) -> list[dict[str, Any]]:
    """Describe the parts of edges as plain JSON values of bounded size, in shares of each edge.

    Args:
        parts: of edges of one trace.
        kinds: for each kind of edges that the trace has, its edges.

    Returns:
        ``{kind, source, target, weight, arc, heads_apart, layers: [[layer, share]], heads: [[layer, head, share]]}`` of
        each edge; ``heads`` holds the eight of largest absolute value.

    Raises:
        InvalidInputError: parts of another trace.
    """
    known = {}
    for kind, edges in kinds.items():
        known[kind] = set(map(tuple, edges.T.tolist()))
    described = []
    for each in parts:
        if (each.source, each.target) not in known.get(each.kind, ()):
            raise InvalidInputError(
                f"edge_parts: must be of edges of this trace, got {each.source} -> {each.target} ({each.kind}), which "
                "it does not have; pass trace.edge_parts(model), and those of the relevance together with it"
            )

        # All layers, and the largest parts of heads, as shares of the edge.
        weight = each.capacity
        shares = (each.by_layer / weight).tolist()
        layers = [[layer, share] for layer, share in zip(each.layers, shares, strict=True)]
        heads = []
        if each.heads_apart:
            heads = [[layer, head, part / weight] for layer, head, part in each.top()]
        described.append(
            {
                "kind": each.kind,
                "source": each.source,
                "target": each.target,
                "weight": weight,
                "arc": each.arc / weight,
                "heads_apart": each.heads_apart,
                "layers": layers,
                "heads": heads,
            }
        )
    return described


def edge_of(trace: Traced, source: Any, target: Any) -> Edge:
    """Return one edge of a trace.

    Args:
        trace: the trace.
        source: the earlier token.
        target: the later token.

    Raises:
        InvalidInputError: not two tokens in order, or no edge between them.
    """
    s, t = ends_of_edge(source, target, trace.num_tokens)
    at = position_of_edge(trace.graph.edge_index, s, t)
    if at is None:
        raise InvalidInputError(
            f"source, target: must be the ends of an edge, got {s} and {t} without one; the capacity is 0, or the edge "
            "was pruned or excluded by a rule (see trace.graph.rules)"
        )
    return Edge(
        source=s,
        target=t,
        texts=(trace.tokens[s], trace.tokens[t]),
        capacity=float(trace.graph.capacity[at]),
        flow=float(trace.flow.edge_flow[at]),
        trace=trace,
    )


def ends_of_edge(source: Any, target: Any, num_tokens: int) -> tuple[int, int]:
    """Check the two tokens of an edge.

    Raises:
        InvalidInputError: not two integers, or not in the order of the text.
    """
    try:
        s = index(source)
        t = index(target)
    except TypeError:
        raise InvalidInputError(
            f"source, target: must be integers, got {source!r:.40} and {target!r:.40}; tokens are counted from 0"
        ) from None
    if not 0 <= s < t < num_tokens:
        raise InvalidInputError(
            f"source, target: must satisfy 0 <= source < target < {num_tokens}, got {s} and {t}; the earlier token is "
            "the source"
        )
    return s, t


def position_of_edge(edge_index: Int64[Tensor, "2 edges"], source: int, target: int) -> int | None:
    """Return the column of an edge in ``edge_index``; None where it is missing."""
    found = ((edge_index[0] == source) & (edge_index[1] == target)).nonzero().flatten()
    return int(found[0]) if found.numel() else None


def _row_of(trace: Traced, target: int) -> int:
    """Return the position whose row the target was given: the one before a generated token under emission rows."""
    rule = trace.provenance.get("rows")
    if rule == "literal":
        return target
    if rule == "emission_all" or bool(trace.generated[target]):
        return target - 1
    return target


def _factor_of_row(trace: Traced, target: int, rows: SequenceRows) -> float:
    """Return the factor by which the rules scaled the row of a token, after comparing all edges into the token.

    Raises:
        InvalidInputError: no factor fits all of them, because the model is another one.
    """
    row = _row_of(trace, target)
    weights = rows.block(row, row + 1)[0, 0].double().cpu()
    edge_index = trace.graph.edge_index
    into = edge_index[1] == target
    capacity = trace.graph.capacity[into].double()
    captured = weights[edge_index[0][into]]

    # The largest edge gives the factor, which must fit the others.
    strongest = int(capacity.abs().argmax())
    largest = float(capacity[strongest])
    weight = float(captured[strongest])
    factor = largest / weight if weight else 0.0
    error = float((captured * factor - capacity).abs().max()) / abs(largest)
    is_half = trace.provenance.get("dtype") in ("bfloat16", "float16")
    if not error <= (_TOLERANCE_HALF if is_half else _TOLERANCE):
        raise InvalidInputError(
            f"model: must be the model of the trace, got one whose weights into token {target} differ from the trace's "
            f"by {error:.2g} of the largest; pass {trace.provenance.get('model')!r} with the same weights and dtype"
        )
    return factor


def _layers_of(indices: tuple[int, ...], rows: SequenceRows) -> tuple[int, ...]:
    """Return the index of each layer; capacities of a user may state none."""
    return indices or tuple(range(len(rows.layers)))
