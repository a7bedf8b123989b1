"""Join the tokens of a graph, in order, to fewer nodes: the same flow between them, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch_geometric.utils import coalesce, scatter

from flowgraph.errors import InvalidInputError
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.memory import require_memory

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class Contraction:
    """The flow of a graph whose tokens were joined, in order, to S steps; exact, nothing is estimated.

    Attributes:
        edge_index: ``[2, E]`` int64, (source step, target step), source < target, sorted by (target, source).
        edge_flow: ``[E]`` float64 > 0, flow from one step to a later one.
        within: ``[S]`` float64, flow on edges inside a step; it may exceed 1.
        throughput: ``[S]`` float64, source + inflow = outflow + absorbed: the share of the flow that visits the step.
        source: ``[S]`` float64, share of the flow that enters from outside.
        absorbed: ``[S]`` float64, share that leaves for good.
    """

    edge_index: Int64[Tensor, "2 edges"]
    edge_flow: Float64[Tensor, " edges"]
    within: Float64[Tensor, " steps"]
    throughput: Float64[Tensor, " steps"]
    source: Float64[Tensor, " steps"]
    absorbed: Float64[Tensor, " steps"]

    @property
    def num_steps(self) -> int:
        """S."""
        return self.throughput.numel()

    @property
    def inflow(self) -> Float64[Tensor, " steps"]:
        """Flow into each step from others."""
        return scatter(self.edge_flow, self.edge_index[1], dim_size=self.num_steps, reduce="sum")

    @property
    def outflow(self) -> Float64[Tensor, " steps"]:
        """Flow out of each step to others."""
        return scatter(self.edge_flow, self.edge_index[0], dim_size=self.num_steps, reduce="sum")

    def matrix(self, *, within: bool = False) -> Float64[Tensor, "steps steps"]:
        """Flow as a dense matrix with entry [target, source]; the diagonal is 0, or the flow within each step.

        Raises:
            MemoryLimitError: more steps than a dense matrix has room for.
        """
        require_memory(8 * self.num_steps**2, "matrix", "read edge_index and edge_flow instead", self.edge_flow.device)
        matrix = torch.diag(self.within) if within else self.within.new_zeros(self.num_steps, self.num_steps)
        return matrix.index_put((self.edge_index[1], self.edge_index[0]), self.edge_flow)

    def table(self) -> list[dict[str, Any]]:
        """One row a step: index, throughput, source, absorbed, inflow, outflow, within."""
        columns = ("throughput", "source", "absorbed", "inflow", "outflow", "within")
        values = [getattr(self, name).tolist() for name in columns]
        return [{"index": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(zip(*values, strict=True))]

    def flow_table(self, k: int | None = None) -> list[dict[str, Any]]:
        """One row a flow between steps, strongest first: source, target, flow; the first ``k`` of them.

        Raises:
            InvalidInputError: ``k`` negative or no whole number.
        """
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            raise InvalidInputError(f"k: must be a whole number, 0 or more, got {k!r}; None lists every flow")
        order = torch.argsort(self.edge_flow, descending=True, stable=True)[:k]
        rows = zip(*self.edge_index[:, order].tolist(), self.edge_flow[order].tolist(), strict=True)
        return [{"source": source, "target": target, "flow": flow} for source, target, flow in rows]

    def to_networkx(self) -> nx.DiGraph:
        """A ``networkx.DiGraph``: a node a step with its row of :meth:`table`, edges with their ``flow``.

        A region that is missing is "", because GraphML has no null.
        """
        import networkx as nx

        graph = nx.DiGraph()
        for row in self.table():
            graph.add_node(row.pop("index"), **{name: "" if value is None else value for name, value in row.items()})
        graph.add_edges_from((row["source"], row["target"], {"flow": row["flow"]}) for row in self.flow_table())
        return graph


def contract(flow: Flow, step_of_token: Int64[Tensor, " tokens"] | Sequence[int]) -> Contraction:
    r"""Join the tokens of each step to one node; the flow between the nodes is exact.

    :math:`F(A, B) = \sum_{s \in A, t \in B} F(s, t)`, and the throughput of a step is what enters it there plus what
    flows in from other steps, :math:`f(B) = \sum_{t \in B} src[t] + \sum_{A \ne B} F(A, B)`. Steps are contiguous, so
    a route visits a step once or never and f(B) is the probability that it does. The throughput of the tokens of a
    step adds up to f(B) plus the flow within it.

    Args:
        flow: a feasible flow on one graph.
        step_of_token: the step of each token: 0 first, then growing by 0 or 1 from token to token.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch; numbers that are no such steps.

    Cost: one sort of the edges between steps.

    Example:
        >>> from flowgraph.graph.flow_graph import FlowGraph
        >>> from flowgraph.flow.solve import solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> contracted = contract(flow, [0, 1, 1, 2])
        >>> contracted.edge_index.tolist(), contracted.throughput.tolist()
        ([[0, 1], [1, 2]], [1.0, 1.0, 1.0])
    """
    require_single_feasible(flow)
    step = _step_numbers(flow, step_of_token)
    num_steps = int(step[-1]) + 1
    edge_flow = flow.edge_flow
    used = edge_flow > 0
    ends, amount = step[flow.graph.edge_index[:, used]], edge_flow[used]
    crosses = ends[0] != ends[1]
    edge_index, crossing = coalesce(
        ends[:, crosses], amount[crosses], num_nodes=num_steps, reduce="sum", sort_by_row=False
    )
    source, absorbed = (scatter(x, step, dim_size=num_steps, reduce="sum") for x in (flow.source, flow.absorbed))
    return Contraction(
        edge_index=edge_index,
        edge_flow=crossing,
        within=scatter(amount[~crosses], ends[0, ~crosses], dim_size=num_steps, reduce="sum"),
        throughput=source + scatter(crossing, edge_index[1], dim_size=num_steps, reduce="sum"),
        source=source,
        absorbed=absorbed,
    )


def _step_numbers(flow: Flow, step_of_token: Tensor | Sequence[int]) -> Int64[Tensor, " tokens"]:
    num_tokens = flow.throughput.numel()
    try:
        step = torch.as_tensor(step_of_token, device=flow.h.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"step_of_token: must be {num_tokens} whole numbers, got {step_of_token!r:.80}; pass the step of each token"
        ) from error
    if step.shape != (num_tokens,) or step.is_floating_point() or step.is_complex() or step.dtype == torch.bool:
        raise InvalidInputError(
            f"step_of_token: must be {num_tokens} whole numbers, one per token, got {step.dtype} of shape "
            f"{tuple(step.shape)}; number the steps 0, 1, 2... in token order"
        )
    step = step.long()
    wrong = (step.diff() != 0) & (step.diff() != 1)
    if int(step[0]) != 0 or bool(wrong.any()):
        at = int(wrong.nonzero()[0]) + 1 if int(step[0]) == 0 else 0
        got = f"{int(step[at])} at token {at}" + (f" after {int(step[at - 1])}" if at else "")
        raise InvalidInputError(
            f"step_of_token: must start at 0 and grow by 0 or 1 from token to token, got {got}; "
            "torch.unique_consecutive(steps, return_inverse=True)[1] numbers contiguous steps so"
        )
    return step
