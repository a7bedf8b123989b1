"""contract: merge the tokens of a graph, in order, into fewer nodes, with the exact flow between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor
from torch_geometric.utils import coalesce, scatter

from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.memory import require_memory

if TYPE_CHECKING:
    import networkx as nx


@loadable
@dataclass(frozen=True, eq=False)
class Contraction:
    """The exact flow of a graph whose tokens were merged, in order, into S steps.

    Attributes:
        edge_index: ``[2, E]`` int64, (source step, target step), source < target, sorted by (target, source).
        edge_flow: ``[E]`` float64 > 0, flow from one step to a later one.
        within: ``[S]`` float64, flow on edges inside a step; it may exceed 1.
        throughput: ``[S]`` float64, source + inflow = outflow + absorbed: the share of the flow that visits the step.
        source: ``[S]`` float64, share of the flow that enters at the step's tokens from the virtual source.
        absorbed: ``[S]`` float64, share of the flow that ends at the step's tokens.
    """

    edge_index: Int64[Tensor, "2 edges"]
    edge_flow: Float64[Tensor, " edges"]
    within: Float64[Tensor, " steps"]
    throughput: Float64[Tensor, " steps"]
    source: Float64[Tensor, " steps"]
    absorbed: Float64[Tensor, " steps"]

    @property
    def num_steps(self) -> int:
        """Number of steps S."""
        return self.throughput.numel()

    @property
    def inflow(self) -> Float64[Tensor, " steps"]:
        """``[S]``, flow into each step from others."""
        return scatter(self.edge_flow, self.edge_index[1], dim_size=self.num_steps, reduce="sum")

    @property
    def outflow(self) -> Float64[Tensor, " steps"]:
        """``[S]``, flow out of each step to others."""
        return scatter(self.edge_flow, self.edge_index[0], dim_size=self.num_steps, reduce="sum")

    def matrix(self, *, within: bool = False) -> Float64[Tensor, "steps steps"]:
        """Return the flow as a dense matrix with entry [target, source].

        Args:
            within: put the flow within each step on the diagonal; default: 0.

        Raises:
            MemoryLimitError: the matrix does not fit into memory.
        """
        num_bytes = 8 * self.num_steps**2
        require_memory(num_bytes, "matrix", "read edge_index and edge_flow instead", self.edge_flow.device)
        diagonal = self.within if within else torch.zeros_like(self.within)
        source, target = self.edge_index
        return torch.diag(diagonal).index_put((target, source), self.edge_flow)

    def table(self) -> list[dict[str, Any]]:
        """Return one row per step: index, throughput, source, absorbed, inflow, outflow, within."""
        columns = {
            "index": list(range(self.num_steps)),
            "throughput": self.throughput.tolist(),
            "source": self.source.tolist(),
            "absorbed": self.absorbed.tolist(),
            "inflow": self.inflow.tolist(),
            "outflow": self.outflow.tolist(),
            "within": self.within.tolist(),
        }
        return _rows_of(columns)

    def flow_table(self, k: int | None = None) -> list[dict[str, Any]]:
        """Return one row per flow between steps, strongest first: source, target, flow.

        Args:
            k: list at most this many; default: all.

        Raises:
            InvalidInputError: ``k`` is not a non-negative integer.
        """
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            raise InvalidInputError(f"k: must be an integer, 0 or more, got {k!r}; None lists every flow")
        # The order is stable: flows of one size are listed by (target, source).
        strongest = torch.argsort(self.edge_flow, descending=True, stable=True)[:k]
        source, target = self.edge_index[:, strongest].tolist()
        return _rows_of({"source": source, "target": target, "flow": self.edge_flow[strongest].tolist()})

    def to_networkx(self) -> nx.DiGraph:
        """Return a ``networkx.DiGraph``: one node per step with its row of :meth:`table`, edges with their ``flow``.

        A missing region is "", because GraphML has no null.
        """
        # Imported here so that `import flowgraph` stays quick.
        import networkx as nx

        graph = nx.DiGraph()
        for row in self.table():
            index = row.pop("index")
            attributes = {name: "" if value is None else value for name, value in row.items()}
            graph.add_node(index, **attributes)
        for row in self.flow_table():
            graph.add_edge(row["source"], row["target"], flow=row["flow"])
        return graph


def _rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn columns of one length into rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def contract(flow: Flow, step_of_token: Int[Tensor, " tokens"] | Sequence[int]) -> Contraction:
    r"""Merge the tokens of each step into one node; the flow between the nodes is exact.

    .. math::
        F(A, B) = \sum_{s \in A, t \in B} F(s, t), \qquad
        f(B) = \sum_{t \in B} src[t] + \sum_{A \ne B} F(A, B)

    The throughput of a step is the flow that enters there plus the flow from other steps. Steps are contiguous, so a
    route visits a step once or never, and f(B) is the probability that it does. The throughput of the tokens of a step
    adds up to f(B) plus the flow within it.

    Args:
        flow: a feasible flow on one graph.
        step_of_token: ``[T]``, the step of each token: 0 first, then growing by 0 or 1 from token to token.

    Returns:
        A :class:`Contraction`.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch; or numbers that break the rule above.

    Cost: one sort of the edges between steps.

    Example:
        >>> from flowgraph import FlowGraph, solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> contracted = contract(flow, [0, 1, 1, 2])
        >>> contracted.edge_index.tolist(), contracted.throughput.tolist()
        ([[0, 1], [1, 2]], [1.0, 1.0, 1.0])
    """
    require_single_feasible(flow)
    step_of = _checked_steps(flow, step_of_token)
    num_steps = int(step_of[-1]) + 1

    # Each edge with flow lies between two steps, or within one.
    edge_flow = flow.edge_flow
    has_flow = edge_flow > 0
    amount = edge_flow[has_flow]
    ends = step_of[flow.graph.edge_index[:, has_flow]]
    is_within = ends[0] == ends[1]

    # F(A, B): sum the edges between the same two steps.
    edge_index, flow_between = coalesce(
        ends[:, ~is_within],
        amount[~is_within],
        num_nodes=num_steps,
        reduce="sum",
        sort_by_row=False,
    )

    # f(B) = src(B) + inflow.
    source = scatter(flow.source, step_of, dim_size=num_steps, reduce="sum")
    inflow = scatter(flow_between, edge_index[1], dim_size=num_steps, reduce="sum")
    return Contraction(
        edge_index=edge_index,
        edge_flow=flow_between,
        within=scatter(amount[is_within], ends[0, is_within], dim_size=num_steps, reduce="sum"),
        throughput=source + inflow,
        source=source,
        absorbed=scatter(flow.absorbed, step_of, dim_size=num_steps, reduce="sum"),
    )


def _checked_steps(flow: Flow, step_of_token: Tensor | Sequence[int]) -> Int64[Tensor, " tokens"]:
    """Check the step of each token, and return it as a tensor on the device of the flow."""
    num_tokens = flow.throughput.numel()
    try:
        step_of = torch.as_tensor(step_of_token, device=flow.h.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"step_of_token: must be {num_tokens} integers, got {step_of_token!r:.80}; pass the step of each token"
        ) from error

    # Booleans and floating point numbers are refused: they would be truncated to step numbers without notice.
    is_number_of_other_type = step_of.is_floating_point() or step_of.is_complex()
    is_integer = step_of.dtype != torch.bool and not is_number_of_other_type
    if step_of.shape != (num_tokens,) or not is_integer:
        raise InvalidInputError(
            f"step_of_token: must be {num_tokens} integers, one per token, got {step_of.dtype} of shape "
            f"{tuple(step_of.shape)}; number the steps 0, 1, 2... in token order"
        )
    step_of = step_of.long()

    # Steps are contiguous and none is empty: 0 first, then the same step or the next one.
    rule = "step_of_token: must start at 0 and grow by 0 or 1 from token to token"
    remedy = "torch.unique_consecutive(steps, return_inverse=True)[1] numbers contiguous steps so"
    if int(step_of[0]) != 0:
        raise InvalidInputError(f"{rule}, got {int(step_of[0])} at token 0; {remedy}")
    growth = step_of.diff()
    is_invalid = (growth != 0) & (growth != 1)
    if bool(is_invalid.any()):
        before = int(is_invalid.nonzero()[0])
        at = before + 1
        raise InvalidInputError(f"{rule}, got {int(step_of[at])} at token {at} after {int(step_of[before])}; {remedy}")
    return step_of
