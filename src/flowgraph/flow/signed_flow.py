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

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.graph.edge_collection import edges_kept
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

    Cost: one read of the T x T matrix, and one selection among its entries where edges are left out.

    Example:
        ``relevance_flow(rows, question=slice(5, 20), answer=[41]).shares()["question"]``
    """
    if not 0 <= item < rows.batch_size:
        raise InvalidInputError(
            f"item: must lie in 0..{rows.batch_size - 1}, got {item}; it counts the sequences of the batch"
        )
    total = rows.total_demand(item)
    kept = rows.attention_mask[item].nonzero().flatten()
    num_tokens = kept.numel()

    def shares_of(values: Tensor) -> Float64[Tensor, " tokens"]:
        return values[item][kept].double().cpu() / total

    # The demand d stands at the row before each answer token; it becomes an arc of that token.
    demand_at_row = shares_of(rows.demand)
    demand = torch.zeros(num_tokens, dtype=torch.float64)
    demand[1:] = demand_at_row[:-1]
    arc = shares_of(rows.emitted) + demand

    # F(s -> t): reads, and the arcs from t - 1 to t.
    matrix = rows.matrix[item][kept][:, kept].double().cpu() / total
    position = torch.arange(1, num_tokens)
    matrix[position, position - 1] += arc[1:]

    # Keep the strongest edges; the sums of the others per token keep the law.
    inflow = matrix.sum(1)
    outflow = matrix.sum(0)
    target, source = matrix.nonzero(as_tuple=True)
    weight = matrix[target, source]
    limit = edges_kept(max_edges, num_tokens)
    if weight.numel() > limit:
        strongest = weight.abs().topk(limit).indices.sort().values
        target = target[strongest]
        source = source[strongest]
        weight = weight[strongest]
        pruned_in = inflow.index_add(0, target, -weight)
        pruned_out = outflow.index_add(0, source, -weight)
    else:
        pruned_in = torch.zeros_like(inflow)
        pruned_out = torch.zeros_like(outflow)

    graph = SignedGraph.from_edges(
        torch.stack([source, target]),
        weight,
        num_nodes=num_tokens,
        question=question,
        answer=answer,
        reasoning=reasoning,
    )
    return SignedFlow(
        graph=graph,
        demand=demand,
        absorbed=shares_of(rows.absorbed),
        bias=shares_of(rows.bias),
        pruned_in=pruned_in,
        pruned_out=pruned_out,
        generated=rows.generated[item][kept].cpu(),
        forced=rows.forced[item][kept].cpu(),
        total=total,
        target=rows.target,
        hops=rows.hops,
        residual=rows.residual,
        bound=rows.bound,
    )
