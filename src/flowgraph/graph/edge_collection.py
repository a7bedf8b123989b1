"""From streamed rows to a list of edges: all of them, or those with most flow."""

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
"""Up to here a trace keeps every edge (2 million of them); beyond it, the edges with most flow."""
AUTO_EDGES_PER_TOKEN = 64
BYTES_PER_EDGE = 60  # edge_index and capacity, twice while they are joined, and one sort key
_EVERYTHING_KEPT = (1.0, 1.0, 0.0)


@dataclass(frozen=True)
class CollectedEdges:
    """Edges in (target, source) order, and what they hold of the rows they were taken from.

    Attributes:
        kept_attention: share of the edge mass.
        kept_flow: share of the unit flow whose whole route is kept.
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

    Raises:
        GraphError: the rows are not causal attention, or those of several sequences.
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
        MemoryLimitError: the edges would not fit.

    Cost: one read of the rows, or two with a limit; memory O(block x T + edges), and rows of up to 256 MiB that
    are kept between the reads.
    """
    source = as_row_source(rows)
    num_tokens, device = source.num_tokens, source.device
    batch = source.block(0, 1).shape[0]
    if batch != 1:
        raise GraphError(
            f"rows: must be those of one sequence, got a batch of {batch}; "
            "build a graph for each rows.sequence(i), or solve them all at once with solve_rows"
        )
    start = torch.zeros(1, dtype=torch.int64, device=device)
    edge_rows = EdgeRows(source, rules, generated.to(device)[None], start)
    kept = edges_kept(max_edges, num_tokens)
    require_memory(
        BYTES_PER_EDGE * kept + 40 * BLOCK * num_tokens,
        f"edges of {num_tokens} tokens",
        "pass max_edges=, which keeps the edges with most flow",
        device,
    )
    if kept == num_tokens * (num_tokens - 1) // 2:
        everything = _Strongest(num_tokens)
        for start in range(0, num_tokens, BLOCK):
            weights = edge_rows.block(start, min(start + BLOCK, num_tokens))[0]
            everything.add(start, weights, weights)
        return CollectedEdges(*everything.edges(), *_EVERYTHING_KEPT)
    return _strongest_by_flow(edge_rows, question.to(device), answer.to(device), kept)


def edges_kept(max_edges: int | str, num_tokens: int) -> int:
    """The most edges that a graph of this many tokens will hold.

    Raises:
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
    """
    possible = num_tokens * (num_tokens - 1) // 2
    if max_edges == "all" or (max_edges == "auto" and num_tokens <= AUTO_ALL_TOKENS):
        return possible
    if max_edges == "auto":
        return min(AUTO_EDGES_PER_TOKEN * num_tokens, possible)
    if isinstance(max_edges, bool) or not isinstance(max_edges, int) or max_edges < 1:
        raise InvalidInputError(
            f"max_edges: must be 'auto', 'all' or a positive number, got {max_edges!r}; 64 per token keeps most flow"
        )
    return min(max_edges, possible)


class _Strongest:
    """Edges of positive importance, or the ``limit`` most important of them, out of blocks of rows in order."""

    def __init__(self, num_tokens: int, limit: int | None = None) -> None:
        self.num_tokens, self.limit = num_tokens, limit
        self.total_capacity, self._threshold = 0.0, 0.0
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # key = target * T + source, capacity, importance

    def add(self, start: int, capacity: Float[Tensor, "block stop"], importance: Tensor) -> None:
        """Take in a block of rows, a few at a time: what is not yet sorted out stays a fraction of the limit."""
        self.total_capacity += float(capacity.sum(dtype=torch.float64))
        rows, stop = capacity.shape
        few = rows if self.limit is None else max(1, self.limit // (4 * stop))
        for first in range(0, rows, few):
            some = slice(first, first + few)
            target, source = (importance[some] > self._threshold).nonzero(as_tuple=True)
            target += first
            chosen = importance[target, source]
            self._kept.append(((target + start) * self.num_tokens + source, capacity[target, source], chosen))
            if self.limit is not None and sum(key.numel() for key, _, _ in self._kept) > 1.5 * self.limit:
                self._shorten(self.limit)
                self._threshold = float(self._kept[0][2].min())  # nothing below it can be among the strongest

    def edges(self) -> tuple[Int64[Tensor, "2 edges"], Float[Tensor, " edges"]]:
        """edge_index and capacity in (target, source) order."""
        if self.limit is not None:
            self._shorten(self.limit)
        key, capacity = (torch.cat([part[column] for part in self._kept]) for column in (0, 1))
        if self.limit is not None:
            order = torch.argsort(key)
            key, capacity = key[order], capacity[order]
        return torch.stack([key % self.num_tokens, key // self.num_tokens]), capacity

    def _shorten(self, limit: int) -> None:
        key, capacity, score = (torch.cat(column) for column in zip(*self._kept, strict=True))
        best = torch.topk(score, min(limit, score.numel()), sorted=False).indices
        self._kept = [(key[best], capacity[best], score[best])]


class _CollectingSweeps(StreamSweeps):
    """Streamed sweeps that take the strongest edges out of the rows while the second sweep has them in memory.

    When a block is finished, g is known up to its end and h everywhere: that is the flow of each of its edges.
    """

    def __init__(self, propagation_factor: Float64[Tensor, "1 tokens"], limit: int) -> None:
        super().__init__(propagation_factor)
        self.limit = limit

    def potential(self, weight: RowSource, demand: Tensor) -> Tensor:
        self.h = super().potential(weight, demand)
        return self.h

    def influence(self, weight: RowSource, inflow: Tensor) -> Tensor:
        g, self.strongest = inflow.clone(), _Strongest(weight.num_tokens, self.limit)
        for here, rows in influence_steps(StreamedOperator(weight), self.propagation_factor, g):
            weights, stop = rows.weights[0], here.stop
            flow = weights * (g * self.propagation_factor)[0, :stop] * self.h[0, here, None]
            if isinstance(weight, BalancedRows):  # the flow is the same in other units, the capacity is not
                weights = weight.source.block(here.start, here.stop)[0]
            self.strongest.add(here.start, weights, flow)
        return g


def _strongest_by_flow(rows: EdgeRows, question: Tensor, answer: Tensor, limit: int) -> CollectedEdges:
    """Solve exactly on the streamed rows, keep the edges with most flow, and measure what that loses."""
    propagation_factor = (~answer).double()[None]
    if rows.rules.first_token == "exclude":  # nothing leaves it, and the solver need not search for what it lost
        propagation_factor[:, 0] = 0.0
    sweeps = _CollectingSweeps(propagation_factor, limit)
    whole = conserve(sweeps, KeptRows(rows), demand=answer.double()[None], question=question[None], source="uniform")
    edge_index, capacity = sweeps.strongest.edges()
    total = sweeps.strongest.total_capacity
    kept_flow, error = _losses(edge_index, capacity, whole, question, answer)
    kept_attention = float(capacity.sum(dtype=torch.float64)) / total if total else 1.0
    return CollectedEdges(edge_index, capacity, kept_attention, kept_flow, error)


def _losses(
    edge_index: Tensor, capacity: Tensor, whole: ConservedFlow, question: Tensor, answer: Tensor
) -> tuple[float, float]:
    """Kept share of the flow, and the largest change of a throughput, both exact.

    With the potential of *all* edges, influence pushed along the kept ones alone arrives in proportion to the routes
    that lie wholly among them; solved anew, the kept edges give the throughput that users of the graph will see.
    """
    topology = Topology(edge_index, torch.tensor([0, answer.numel()], device=answer.device))
    sweeps = EdgeSweeps(topology, (~answer).double())
    h, units, demand = whole.h[0], whole.exponent[0], answer.double()
    inflow = torch.where(whole.source[0] > 0, whole.source[0] / torch.where(h > 0, h, 1.0), 0.0)
    g = sweeps.influence(sweeps.balanced(capacity, units), inflow)
    arrived = float((g * scaled(demand, -units)).sum())
    pruned = conserve(sweeps, capacity, demand=demand, question=question, source="uniform")
    error = float((pruned.g * pruned.h - whole.g[0] * h).abs().max())
    return min(arrived, 1.0), error
