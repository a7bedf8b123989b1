r"""``SignedFlow``: the conserved relevance of one answer as a signed flow over the token DAG.

The relevance of :func:`flowgraph.capture` is conserved by itself, so nothing is solved here. The flow is read from the
rows N, in shares of the demand D:

.. math::
    F(s \to t) = \frac{N[t, s] + [s = t - 1] \, (e[t] + d[t - 1])}{D}

where e[t] is the relevance that the generated token t passed on to row t - 1, and d[t - 1] the demand at the row that
predicts the answer token t: the demand is drawn as if it entered at the answer token. At every token v

.. math::
    b[v] + \sum_{t > v} F(v \to t) + p_{out}[v] = \sum_{s < v} F(s \to v) + p_{in}[v] + a[v] + \beta[v]

with b the demand, a what stays at the token's embedding, beta what stays in biases, and p what was left out by pruning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.files import loadable
from flowgraph.graph.edge_collection import StrongestEdges, edges_kept
from flowgraph.graph.signed_graph import SignedGraph
from flowgraph.masks import MaskLike


@loadable
@dataclass(frozen=True, eq=False)
class SignedFlow:
    """The signed flow from prompt to answer; numbers are shares of the demand, and negative ones argue against it.

    Attributes:
        graph: the DAG; its weights are F(s -> t).
        demand: ``[N]`` b, the share that enters at each answer token; 1 in all.
        absorbed: ``[N]`` a, the share that stays at each token's embedding.
        bias: ``[N]`` beta, the share that stays in biases of the model at each position.
        pruned_in: ``[N]``, the share on edges into each token that the graph leaves out.
        pruned_out: ``[N]``, the share on edges out of each token that the graph leaves out.
        generated: ``[N]`` bool, tokens that the model produced.
        forced: ``[N]`` bool, generated tokens that hold their relevance: the model did not choose them.
        total: D, the demand in the units of the target (logits, or nats).
        target: what the demand is the relevance of: ``"margin"``, ``"logprob"`` or ``"contrast"``.
        hops: emission hops made.
        residual: largest difference between the two sides of the law at a token, relative to its largest term, as it
            was measured in the capture.
        bound: largest residual that the dtype of the model allows.
    """

    graph: SignedGraph
    demand: Float64[Tensor, " tokens"]
    absorbed: Float64[Tensor, " tokens"]
    bias: Float64[Tensor, " tokens"]
    pruned_in: Float64[Tensor, " tokens"]
    pruned_out: Float64[Tensor, " tokens"]
    generated: Bool[Tensor, " tokens"]
    forced: Bool[Tensor, " tokens"]
    total: float
    target: str
    hops: int
    residual: float
    bound: float

    @property
    def edge_flow(self) -> Float64[Tensor, " edges"]:
        """F on the edges, in the order of ``graph.edge_index``."""
        return self.graph.weight.double()

    @property
    def throughput(self) -> Float64[Tensor, " tokens"]:
        """Share that reaches each token: its demand and what later tokens take from it. Cost: O(E) at each access."""
        return self.demand + self.outflow + self.pruned_out

    @property
    def outflow(self) -> Float64[Tensor, " tokens"]:
        """Share that later tokens take from each token, over the edges of the graph."""
        return torch.zeros_like(self.demand).index_add_(0, self.graph.edge_index[0], self.edge_flow)

    @property
    def inflow(self) -> Float64[Tensor, " tokens"]:
        """Share that each token takes from earlier tokens, over the edges of the graph."""
        return torch.zeros_like(self.demand).index_add_(0, self.graph.edge_index[1], self.edge_flow)

    @property
    def leaving(self) -> Float64[Tensor, " tokens"]:
        """The right side of the law: what each token takes from earlier ones, absorbs, or leaves in biases."""
        return self.inflow + self.pruned_in + self.absorbed + self.bias

    def shares(self) -> dict[str, float]:
        """Return where the demand ends, as shares that sum to 1.

        ``question``: embeddings of question tokens; ``context``: other prompt tokens, such as the chat template;
        ``forced``: generated tokens that the model did not choose; ``remainder``: other generated tokens (all of them
        without hops); ``bias``: biases of the model.
        """
        is_question = self.graph.question_mask
        kinds = {
            "question": is_question & ~self.generated,
            "context": ~is_question & ~self.generated,
            "forced": self.generated & self.forced,
            "remainder": self.generated & ~self.forced,
        }
        shares = {name: float(self.absorbed[mask].sum()) for name, mask in kinds.items()}
        shares["bias"] = float(self.bias.sum())
        return shares

    def __repr__(self) -> str:
        ends = ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items() if abs(share) >= 5e-4)
        return (
            f"SignedFlow({self.demand.numel()} tokens, {self.graph.num_edges} edges, demand {self.total:.3g} by "
            f"{self.target}, {self.hops} hops, residual {self.residual:.1e}; ends in: {ends})"
        )


def relevance_flow(
    rows: RelevanceRows,
    *,
    question: MaskLike,
    answer: MaskLike,
    reasoning: MaskLike | None = None,
    item: int = 0,
    max_edges: int | str = "auto",
) -> SignedFlow:
    """Read the relevance of one sequence as a signed flow over its tokens.

    Args:
        rows: from ``capture(..., capacity="relevance")``.
        question: mask, indices or slice of the question's tokens, among the tokens without padding.
        answer: the same for the tokens that were explained.
        reasoning: the same for the tokens between; see :meth:`flowgraph.SignedGraph.from_edges`.
        item: the sequence of the batch.
        max_edges: ``"all"``, a number (the edges of largest absolute weight), or ``"auto"``: all up to 2,048 tokens,
            else 64 per token. What the others carry is recorded per token, so the law still holds.

    Raises:
        InvalidInputError: no such sequence; an answer whose demand is 0; masks that do not fit.
        RegionError, GraphError: regions that are empty or overlap; weights that are not finite.

    Cost: one read of the rows, a block at a time; memory O(block x T + edges) beyond the rows.

    Example:
        ``relevance_flow(rows, question=slice(5, 20), answer=[41]).shares()["question"]``
    """
    # All values are shares of the total demand of one sequence, padding left out.
    one = rows.sequence(item)
    total = one.total_demand()
    kept = one.attention_mask[0].nonzero().flatten()
    num_tokens = kept.numel()

    def shares_of(values: Tensor) -> Float64[Tensor, " tokens"]:
        return values[0][kept].double().cpu() / total

    # The demand d stands at the row before each answer token; it becomes an arc of that token.
    demand = torch.zeros(num_tokens, dtype=torch.float64)
    demand[1:] = shares_of(one.demand)[:-1]

    # F(s -> t): reads, and the arcs from t - 1 to t. The strongest edges are kept as the rows pass by; the sums of the
    # others per token keep the law.
    strongest = StrongestEdges(num_tokens, _limit(max_edges, num_tokens))
    inflow = torch.zeros(num_tokens, dtype=torch.float64)
    outflow = torch.zeros(num_tokens, dtype=torch.float64)
    for start, block in share_blocks(one, total):
        stop = start + block.shape[0]
        inflow[start:stop] = block.sum(1)
        outflow[:stop] += block.sum(0)
        strongest.add(start, block, block.abs())
    edge_index, weight = strongest.edges()
    source, target = edge_index
    if strongest.limit is None:
        pruned_in = torch.zeros_like(inflow)
        pruned_out = torch.zeros_like(outflow)
    else:
        pruned_in = inflow.index_add(0, target, -weight)
        pruned_out = outflow.index_add(0, source, -weight)

    graph = SignedGraph.from_edges(
        edge_index,
        weight,
        num_nodes=num_tokens,
        question=question,
        answer=answer,
        reasoning=reasoning,
    )
    return SignedFlow(
        graph=graph,
        demand=demand,
        absorbed=shares_of(one.absorbed),
        bias=shares_of(one.bias),
        pruned_in=pruned_in,
        pruned_out=pruned_out,
        generated=one.generated[0][kept].cpu(),
        forced=one.forced[0][kept].cpu(),
        total=total,
        target=rows.target,
        hops=rows.hops,
        residual=rows.residual,
        bound=rows.bound,
    )


def streams(max_edges: int | str, num_tokens: int) -> bool:
    """Tell whether a flow with this limit leaves edges out, so that its rows need not be held as one matrix.

    Raises:
        InvalidInputError: ``max_edges`` is neither "auto", "all" nor a positive number.
    """
    return _limit(max_edges, num_tokens) is not None


def _limit(max_edges: int | str, num_tokens: int) -> int | None:
    """Return the number of edges to keep; None for all."""
    limit = edges_kept(max_edges, num_tokens)
    return limit if limit < num_tokens * (num_tokens - 1) // 2 else None


def share_blocks(rows: RelevanceRows, total: float) -> Iterator[tuple[int, Float64[Tensor, "block stop"]]]:
    """Yield F(s -> t) of one sequence without padding, as (first token t, block of rows over earlier tokens).

    Args:
        rows: those of one sequence.
        total: D, the demand that shares are of.
    """
    kept = rows.attention_mask[0].nonzero().flatten()
    # The emission arc e[t] and the demand d[t - 1], on the edge from t - 1 to t.
    arc = rows.emitted[0][kept].double().cpu()
    arc[1:] += rows.demand[0][kept].double().cpu()[:-1]
    arc = arc / total

    # Rows and columns of padding are left out, so that token numbers count the kept tokens.
    first_token = 0
    for start, block in rows.blocks():
        is_inside = (kept >= start) & (kept < start + block.shape[1])
        count = int(is_inside.sum())
        if count == 0:
            continue
        stop = first_token + count
        row_in_block = kept[is_inside] - start
        relevance = block[0][row_in_block][:, kept[:stop]]
        shares = relevance.double().cpu() / total

        # The arc into token t lies on the edge from t - 1; token 0 has no earlier token.
        reader = torch.arange(max(first_token, 1), stop)
        shares[reader - first_token, reader - 1] += arc[reader]
        yield first_token, shares
        first_token = stop
