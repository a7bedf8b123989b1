"""Collect edges from streamed rows: all of them, or those with most flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.graph.edge_rules import EdgeRows, EdgeRules
from flowgraph.memory import require_memory
from flowgraph.propagation.block_substitution import BLOCK, influence_steps
from flowgraph.propagation.conservation import ConservedFlow, conserve
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.operators import StreamedOperator
from flowgraph.propagation.row_sources import BalancedRows, KeptRows, RowSource, as_row_source
from flowgraph.propagation.row_sweeps import StreamSweeps
from flowgraph.propagation.scaling import scaled
from flowgraph.propagation.topology import Topology

AUTO_ALL_TOKENS = 2048
"""``"auto"`` keeps every edge up to this many tokens (2 million edges); beyond it, the edges with most flow."""

AUTO_EDGES_PER_TOKEN = 64
"""Edges per token that ``"auto"`` keeps beyond ``AUTO_ALL_TOKENS``."""

BYTES_PER_EDGE = 60
"""Peak memory of one edge: edge_index and capacity, twice while they are joined, and one sort key."""

_BYTES_PER_BLOCK_ENTRY = 40
"""Peak memory of one entry of a block of rows: the row, its flow, and the edges selected from it."""


@dataclass(frozen=True)
class CollectedEdges:
    """Edges in (target, source) order, and the share of the rows that they hold.

    Attributes:
        edge_index: ``[2, E]`` int64, source over target.
        capacity: ``[E]``, in the dtype of the rows.
        kept_attention: share of the edge mass.
        kept_flow: share of the unit flow whose entire route is kept.
        throughput_error: largest difference of a token's throughput between all edges and these.
    """

    edge_index: Int64[Tensor, "2 edges"]
    capacity: Float[Tensor, " edges"]
    kept_attention: float
    kept_flow: float
    throughput_error: float


def collect_edges(
    rows: RowSource | Tensor,
    rules: EdgeRules,
    generated: Bool[Tensor, " tokens"],
    question: Bool[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
    *,
    max_edges: int | str = "auto",
) -> CollectedEdges:
    """Read the rows of one sequence block by block and keep all edges, or the ``max_edges`` of them with most flow.

    Args:
        rows: attention of one sequence, row t = what token t reads.
        rules: which row belongs to a token, and what is left out.
        generated: ``[T]`` tokens that the model produced.
        question: ``[T]`` where flow enters.
        answer: ``[T]`` where flow is absorbed.
        max_edges: see :func:`edges_kept`.

    Returns:
        The edges, with what the limit lost.

    Raises:
        GraphError: the rows are not causal attention, or those of several sequences.
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
        MemoryLimitError: the edges would not fit.

    Cost: one read of the rows, or two with a limit; memory O(block x T + edges), and rows of up to 256 MiB that
    are kept between the reads.
    """
    # The first row of each sequence shows how many there are; a graph has one.
    source = as_row_source(rows)
    num_tokens = source.num_tokens
    device = source.device
    num_sequences = source.block(0, 1).shape[0]
    if num_sequences != 1:
        raise GraphError(
            f"rows: must be those of one sequence, got a batch of {num_sequences}; "
            "build a graph for each rows.sequence(i), or solve them all at once with solve_rows"
        )

    # Refuse what does not fit before any row is computed.
    num_kept = edges_kept(max_edges, num_tokens)
    require_memory(
        BYTES_PER_EDGE * num_kept + _BYTES_PER_BLOCK_ENTRY * BLOCK * num_tokens,
        f"edges of {num_tokens} tokens",
        "pass max_edges=, which keeps the edges with most flow",
        device,
    )

    first_token = torch.zeros(1, dtype=torch.int64, device=device)
    edge_rows = EdgeRows(source, rules, generated.to(device)[None], first_token).scaled_for(answer[None])
    num_possible = num_tokens * (num_tokens - 1) // 2
    if num_kept == num_possible:
        return _all_edges(edge_rows)
    return _strongest_by_flow(edge_rows, question.to(device), answer.to(device), num_kept)


def edges_kept(max_edges: int | str, num_tokens: int) -> int:
    """Compute the most edges that a graph of this many tokens will hold.

    Args:
        max_edges: ``"all"``, a number, or ``"auto"``: all up to 2,048 tokens, else 64 per token.
        num_tokens: T.

    Raises:
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
    """
    num_possible = num_tokens * (num_tokens - 1) // 2
    if max_edges == "all" or (max_edges == "auto" and num_tokens <= AUTO_ALL_TOKENS):
        return num_possible
    if max_edges == "auto":
        return min(AUTO_EDGES_PER_TOKEN * num_tokens, num_possible)
    if isinstance(max_edges, bool) or not isinstance(max_edges, int) or max_edges < 1:
        raise InvalidInputError(
            f"max_edges: must be 'auto', 'all' or a positive number, got {max_edges!r}; 64 per token keeps most flow"
        )
    return min(max_edges, num_possible)


@dataclass
class _Candidates:
    """Edges that may be among the strongest.

    Attributes:
        key: ``[E]`` int64, ``target * T + source``: its order is that of a FlowGraph.
        capacity: ``[E]``.
        importance: ``[E]``, the number by which edges are chosen.
    """

    key: Int64[Tensor, " edges"]
    capacity: Float[Tensor, " edges"]
    importance: Float[Tensor, " edges"]


class StrongestEdges:
    """The edges of positive importance, or the ``limit`` most important of them, from blocks of rows in order.

    Attributes:
        num_tokens: T.
        limit: most edges that are kept; None keeps all.
        total_capacity: sum of the capacities of all edges that were added, kept or not.
    """

    def __init__(self, num_tokens: int, limit: int | None = None) -> None:
        self.num_tokens = num_tokens
        self.limit = limit
        self.total_capacity = 0.0
        self._threshold = 0.0
        self._parts: list[_Candidates] = []

    def add(self, start: int, capacity: Float[Tensor, "block stop"], importance: Float[Tensor, "block stop"]) -> None:
        """Add the edges into the tokens from ``start`` on.

        With a limit, rows are added a few at a time, so that the edges not yet selected stay a fraction of the limit.
        """
        self.total_capacity += float(capacity.sum(dtype=torch.float64))
        num_rows, stop = capacity.shape
        rows_at_once = num_rows
        if self.limit is not None:
            rows_at_once = max(1, self.limit // (4 * stop))

        for first in range(0, num_rows, rows_at_once):
            # Candidates: edges of positive importance that may still be among the strongest.
            candidates = importance[first : first + rows_at_once] > self._threshold
            row, source = candidates.nonzero(as_tuple=True)
            row += first
            key = (row + start) * self.num_tokens + source
            self._parts.append(_Candidates(key, capacity[row, source], importance[row, source]))

            num_waiting = sum(part.key.numel() for part in self._parts)
            if self.limit is not None and num_waiting > 1.5 * self.limit:
                # Keep the strongest so far. An edge below the weakest of `limit` edges cannot be among the strongest.
                strongest = self._select(self.limit)
                self._parts = [strongest]
                self._threshold = float(strongest.importance.min())

    def edges(self) -> tuple[Int64[Tensor, "2 edges"], Float[Tensor, " edges"]]:
        """Return edge_index and capacity in (target, source) order."""
        if self.limit is None:
            # Blocks came in order, so the keys are sorted.
            kept = self._joined()
            key = kept.key
            capacity = kept.capacity
        else:
            kept = self._select(self.limit)
            order = torch.argsort(kept.key)
            key = kept.key[order]
            capacity = kept.capacity[order]
        source = key % self.num_tokens
        target = key // self.num_tokens
        return torch.stack([source, target]), capacity

    def _joined(self) -> _Candidates:
        """Join all parts."""
        return _Candidates(
            key=torch.cat([part.key for part in self._parts]),
            capacity=torch.cat([part.capacity for part in self._parts]),
            importance=torch.cat([part.importance for part in self._parts]),
        )

    def _select(self, limit: int) -> _Candidates:
        """Select the ``limit`` most important candidates, in any order."""
        joined = self._joined()
        num_selected = min(limit, joined.importance.numel())
        best = torch.topk(joined.importance, num_selected, sorted=False).indices
        return _Candidates(joined.key[best], joined.capacity[best], joined.importance[best])


class _CollectingSweeps(StreamSweeps):
    """Streamed sweeps that select the strongest edges while the second sweep has their rows in memory.

    When a block is finished, g is known up to its end and h everywhere, so the flow of each of its edges is known:
    F(s, t) = g[s] N[t, s] h[t].

    Attributes:
        limit: most edges that are kept.
        h: potential of the last backward sweep.
        strongest: the edges selected in the last forward sweep.
    """

    def __init__(self, propagation_factor: Float64[Tensor, "1 tokens"], limit: int) -> None:
        super().__init__(propagation_factor)
        self.limit = limit

    def potential(self, weight: RowSource, demand: Tensor) -> Tensor:
        """Run the backward sweep and keep its result."""
        self.h = super().potential(weight, demand)
        return self.h

    def influence(self, weight: RowSource, inflow: Tensor) -> Tensor:
        """Run the forward sweep, and select edges from each finished block."""
        g = inflow.clone()
        self.strongest = StrongestEdges(weight.num_tokens, self.limit)
        for block, rows in influence_steps(StreamedOperator(weight), self.propagation_factor, g):
            weights = rows.weights[0]
            propagated = (g * self.propagation_factor)[0, : block.stop]
            flow = weights * propagated * self.h[0, block, None]

            # Rescaled rows give the same flow, but the graph needs the capacities as they were.
            if isinstance(weight, BalancedRows):
                capacity = weight.source.block(block.start, block.stop)[0]
            else:
                capacity = weights
            self.strongest.add(block.start, capacity, flow)
        return g


def _all_edges(rows: EdgeRows) -> CollectedEdges:
    """Collect every edge of positive capacity."""
    edges = StrongestEdges(rows.num_tokens)
    for start in range(0, rows.num_tokens, BLOCK):
        stop = min(start + BLOCK, rows.num_tokens)
        capacity = rows.block(start, stop)[0]
        edges.add(start, capacity, capacity)
    edge_index, capacity = edges.edges()
    return CollectedEdges(edge_index, capacity, kept_attention=1.0, kept_flow=1.0, throughput_error=0.0)


def _strongest_by_flow(
    rows: EdgeRows, question: Bool[Tensor, " tokens"], answer: Bool[Tensor, " tokens"], limit: int
) -> CollectedEdges:
    """Solve exactly on the streamed rows, keep the edges with most flow, and measure what that loses."""
    propagation_factor = (~answer).double()[None]
    # No edge leaves an excluded first token; a factor of 0 spares the solver the search for its potential.
    if rows.rules.first_token == "exclude":
        propagation_factor[:, 0] = 0.0

    # Both sweeps over all edges; the second one selects the strongest.
    sweeps = _CollectingSweeps(propagation_factor, limit)
    demand = answer.double()[None]
    unpruned = conserve(sweeps, KeptRows(rows), demand=demand, question=question[None], source="uniform")
    edge_index, capacity = sweeps.strongest.edges()

    # What is lost: attention mass, routes, and the change of throughput.
    kept_flow, throughput_error = _losses(edge_index, capacity, unpruned, question, answer)
    total_capacity = sweeps.strongest.total_capacity
    kept_attention = 1.0
    if total_capacity:
        kept_attention = float(capacity.sum(dtype=torch.float64)) / total_capacity
    return CollectedEdges(edge_index, capacity, kept_attention, kept_flow, throughput_error)


def _losses(
    edge_index: Int64[Tensor, "2 edges"],
    capacity: Float[Tensor, " edges"],
    unpruned: ConservedFlow,
    question: Bool[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
) -> tuple[float, float]:
    """Compute the kept share of the flow, and the largest change of a throughput, both exactly."""
    ptr = torch.tensor([0, answer.numel()], device=answer.device)
    sweeps = EdgeSweeps(Topology(edge_index, ptr), propagation_factor=(~answer).double())
    demand = answer.double()
    h = unpruned.h[0]
    scale_exponent = unpruned.exponent[0]

    # With the potential of all edges, influence that moves along the kept edges K alone arrives in proportion to the
    # routes that lie entirely in K: g_K = q + N_K g_K, and the share is <g_K, b>.
    source = unpruned.source[0]
    q = torch.where(source > 0, source / torch.where(h > 0, h, 1.0), 0.0)
    kept_influence = sweeps.influence(sweeps.balanced(capacity, scale_exponent), q)
    kept_flow = float((kept_influence * scaled(demand, -scale_exponent)).sum())

    # Solved anew, the kept edges give the throughput f = g h that users of the graph will see.
    pruned = conserve(sweeps, capacity, demand=demand, question=question, source="uniform")
    throughput = pruned.g * pruned.h
    unpruned_throughput = unpruned.g[0] * h
    throughput_error = float((throughput - unpruned_throughput).abs().max())
    return min(kept_flow, 1.0), throughput_error
