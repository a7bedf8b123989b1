"""``solve``: the conserved, answer-targeted flow on a ``FlowGraph``, exact and batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch_geometric.data import Batch
from torch_geometric.utils import scatter

from flowgraph.errors import GraphError, InvalidInputError, NumericalRangeError
from flowgraph.graph import FlowGraph
from flowgraph.propagation.operators import BatchLayout, DenseOperator, SparseOperator
from flowgraph.propagation.reference import influence_reference, potential_reference
from flowgraph.propagation.sweeps import influence, potential

Backend = Literal["auto", "dense", "scatter", "reference"]
SourceRule = Literal["uniform", "potential"]
Absorption = Literal["absorb", "pass_through"]

_DENSE_FILL = 0.2
"""Share of all possible edges above which dense tiles beat gather and scatter (benchmarks/solve.py)."""
_DENSE_MAX_BYTES = 2**30
_SMALLEST_NORMAL = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Flow:
    r"""The unit flow from question to answer on one graph, or on each graph of a batch.

    Node vectors have one entry per node of ``graph``, float64; graph vectors one entry per graph.

    Attributes:
        graph: the graph that was solved.
        h: backward potential :math:`h = b + N^\top h`, the total influence of a token that reaches the answer.
        g: forward influence :math:`g = q + N g`, influence arriving per unit of potential.
        throughput: :math:`f = g \cdot h`, share of the unit flow that passes through the token, in [0, 1].
        source: share of the unit flow that enters at each token (sums to 1 where feasible).
        demand: b, weight of the edge from each token to the virtual sink.
        absorbing: tokens that no edge leaves (the answer, when it absorbs).
        feasible: per graph, whether any source token reaches the demand; where not, g and f are zero.
        alpha: per graph, the largest scaling of this flow that fits the capacities,
            ``1 / max over edges with flow of g[s] * h[t]``; a lower bound of the max flow on N. Infinite when no
            edge carries flow.
        damping: factor per hop.
        source_rule, absorption, backend: what was asked for, after defaults were filled in.
    """

    graph: FlowGraph
    h: Float64[Tensor, " nodes"]
    g: Float64[Tensor, " nodes"]
    throughput: Float64[Tensor, " nodes"]
    source: Float64[Tensor, " nodes"]
    demand: Float64[Tensor, " nodes"]
    absorbing: Bool[Tensor, " nodes"]
    feasible: Bool[Tensor, " graphs"]
    alpha: Float64[Tensor, " graphs"]
    damping: float
    source_rule: str
    absorption: str
    backend: str

    @classmethod
    def from_potentials(
        cls,
        graph: FlowGraph,
        *,
        h: Float64[Tensor, " nodes"],
        g: Float64[Tensor, " nodes"],
        source: Float64[Tensor, " nodes"],
        absorbing: Bool[Tensor, " nodes"],
        damping: float,
        **facts: Any,
    ) -> Flow:
        """Complete a flow from its two potentials; ``facts`` are the remaining fields."""
        ptr, graph_of_node = _layout(graph)
        num_graphs = ptr.numel() - 1
        feasible = scatter(source, graph_of_node, dim_size=num_graphs, reduce="sum") > 0
        start, end = graph.edge_index
        congestion = torch.where(absorbing[start], 0.0, g[start] * h[end])
        worst = scatter(congestion, graph_of_node[start], dim_size=num_graphs, reduce="max")
        return cls(
            graph=graph,
            h=h,
            g=g,
            throughput=g * h,
            source=source,
            absorbing=absorbing,
            feasible=feasible,
            alpha=torch.where(worst > 0, 1 / worst, torch.inf),
            damping=damping,
            **facts,
        )

    def weight(self) -> Float64[Tensor, " edges"]:
        """N on the edges: capacity times damping, zero where the source absorbs."""
        leaves = ~self.absorbing[self.graph.edge_index[0]]
        return self.graph.capacity.double() * leaves * self.damping

    def edge_flow(self) -> Float64[Tensor, " edges"]:
        r"""Flow on each edge, :math:`F(s, t) = g[s] \, N[t, s] \, h[t]`, in the order of ``graph.edge_index``."""
        source, target = self.graph.edge_index
        return self.g[source] * self.weight() * self.h[target]

    def absorbed(self) -> Float64[Tensor, " nodes"]:
        """Share of the unit flow that leaves to the virtual sink at each token, ``g * b``; sums to 1 where feasible."""
        return self.g * self.demand

    def __repr__(self) -> str:
        feasible = (
            f"{int(self.feasible.sum())}/{self.feasible.numel()} feasible"
            if self.feasible.numel() > 1
            else ("feasible" if bool(self.feasible) else "not feasible: the answer is unreachable")
        )
        return (
            f"Flow({self.graph.num_nodes} tokens, {self.graph.num_edges} edges, {feasible}, source={self.source_rule}, "
            f"absorption={self.absorption}, damping={self.damping:g}, backend={self.backend})"
        )


def solve(
    graph: FlowGraph | Batch,
    *,
    backend: Backend = "auto",
    source: SourceRule | Tensor = "uniform",
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
) -> Flow:
    r"""Solve the conserved flow from question to answer exactly.

    .. math::
        h = b + N^\top h, \quad q = \mathrm{source}/h, \quad g = q + N g, \quad f = g \cdot h,

    with N the capacities (damped, nothing leaving an absorbing token). Equivalent to the re-weighted
    transition :math:`P(s \to t) = A[t,s] h[t] / h[s]` of the paper, which is never formed: errors of h cancel in
    :math:`g \cdot h`.

    Args:
        graph: one :class:`FlowGraph`, or a PyG ``Batch`` of many (one call, no cross-talk).
        backend: ``"scatter"``, blocked substitution over PyG scatter (canonical); ``"dense"``, the same over
            a dense matrix; ``"reference"``, one token at a time in Python; ``"auto"``, dense when a fifth of all
            possible edges exist and the matrix is small, else scatter.
        source: where the unit enters: ``"uniform"`` over the question tokens that reach the answer (paper),
            ``"potential"`` in proportion to h over question tokens, or a non-negative vector ``[N]``, normalised
            per graph over the tokens that reach the demand.
        demand: b, a non-negative vector ``[N]``; default: 1 on answer tokens.
        absorption: ``"absorb"``, nothing leaves an answer token (default with the default demand), or
            ``"pass_through"``, all edges stay (default with a demand of your own).
        damping: factor per hop in (0, 1].

    Returns:
        A :class:`Flow`. A graph whose answer is unreachable is not an error: ``feasible`` is False there and
        the flow is zero.

    Raises:
        InvalidInputError: an option outside its set, a vector of the wrong length, negative or not finite.
        GraphError: not a FlowGraph.
        NumericalRangeError: a potential underflows float64 (adversarial chains); no number is returned.

    Cost: two reads of the edges. Source: arXiv 2606.10646 (answer conditioning and local conservation), in the g-form.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0], answer=[3]))
        >>> [round(x, 4) for x in flow.throughput.tolist()]
        [1.0, 0.6667, 0.3333, 1.0]
    """
    if not isinstance(graph, FlowGraph):
        raise GraphError(
            f"graph: must be a FlowGraph or a Batch of them, got {type(graph).__name__}; see FlowGraph.from_dense "
            "(a FlowTrace has its graph as trace.graph, solved as trace.flow)"
        )
    check_options(backend, source, absorption, damping)
    if absorption is None:
        absorption = "absorb" if demand is None else "pass_through"
    absorbing = graph.answer_mask if absorption == "absorb" else torch.zeros_like(graph.answer_mask)
    b = graph.answer_mask.double() if demand is None else _vector(demand, graph, "demand")
    ptr, graph_of_node = _layout(graph)
    sweep_h, sweep_g, used = _sweeps(graph, ptr, absorbing, damping, backend)

    h = sweep_h(b)
    _check_range(graph, h, absorbing, damping)
    injected = _source(graph, source, h, graph_of_node, ptr.numel() - 1)
    g = sweep_g(torch.where(injected > 0, injected / h, 0.0))
    if not bool(torch.isfinite(g).all()):
        raise NumericalRangeError(_RANGE_MESSAGE.format("the forward influence overflows", float(h[h > 0].min())))
    return Flow.from_potentials(
        graph,
        h=h,
        g=g,
        source=injected,
        demand=b,
        absorbing=absorbing,
        damping=float(damping),
        source_rule=source if isinstance(source, str) else "vector",
        absorption=absorption,
        backend=used,
    )


def check_options(backend: str, source: str | Tensor, absorption: str | None, damping: float) -> None:
    """Refuse an option of :func:`solve` that lies outside its set.

    Raises:
        InvalidInputError: which one, and what it may be.
    """
    choices = [("backend", backend, get_args(Backend))]
    if not isinstance(source, Tensor):
        choices.append(("source", source, get_args(SourceRule)))
    if absorption is not None:
        choices.append(("absorption", absorption, get_args(Absorption)))
    for name, value, allowed in choices:
        if value not in allowed:
            raise InvalidInputError(f"{name}: must be one of {', '.join(map(repr, allowed))}, got {value!r}; see solve")
    if not 0 < damping <= 1:
        raise InvalidInputError(f"damping: must lie in (0, 1], got {damping!r}; 1 is undamped")


def _vector(vector: Tensor, graph: FlowGraph, name: str) -> Tensor:
    vector = torch.as_tensor(vector, device=graph.capacity.device).double()
    if vector.shape != (graph.num_nodes,):
        raise InvalidInputError(
            f"{name}: must have one entry per token ({graph.num_nodes}), got shape {tuple(vector.shape)}; "
            "pass a vector [N]"
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
        raise InvalidInputError(
            f"{name}: must be finite and non-negative, got {vector.min().item():g} as its least; clamp it first"
        )
    return vector


def _layout(graph: FlowGraph) -> tuple[Int64[Tensor, " graphs_plus_1"], Int64[Tensor, " nodes"]]:
    device = graph.capacity.device
    if isinstance(graph, Batch):
        return graph["ptr"], graph["batch"]
    nodes = graph.question_mask.numel()
    return torch.tensor([0, nodes], device=device), torch.zeros(nodes, dtype=torch.int64, device=device)


def _sweeps(graph: FlowGraph, ptr: Tensor, absorbing: Tensor, damping: float, backend: Backend):
    """The two sweeps as functions of node vectors ``[N]``, and the name of the backend that runs them."""
    if backend == "auto":
        backend = _choose(graph, ptr)
    if backend == "reference":
        keep = ~absorbing[graph.edge_index[0]]
        edge_index, weight = graph.edge_index[:, keep], graph.capacity[keep].double() * damping
        return (
            lambda b: potential_reference(edge_index, weight, b),
            lambda q: influence_reference(edge_index, weight, q),
            backend,
        )
    layout = BatchLayout(ptr)
    if backend == "dense":
        operator = _dense_operator(graph, layout, absorbing, damping)
    else:
        operator = SparseOperator(graph.edge_index, graph.capacity, layout, absorbing, damping)
    return (
        lambda b: layout.unpad(potential(operator, layout.pad(b))),
        lambda q: layout.unpad(influence(operator, layout.pad(q))),
        backend,
    )


def _choose(graph: FlowGraph, ptr: Tensor) -> Backend:
    sizes = ptr.diff().double()
    possible = float((sizes * (sizes - 1)).sum()) / 2
    cells = sizes.numel() * float(sizes.max()) ** 2
    small = cells * graph.capacity.element_size() <= _DENSE_MAX_BYTES
    return "dense" if small and graph.num_edges >= _DENSE_FILL * max(possible, cells / 4) else "scatter"


def _dense_operator(graph: FlowGraph, layout: BatchLayout, absorbing: Tensor, damping: float) -> DenseOperator:
    size = layout.num_tokens
    matrix = graph.capacity.new_zeros(layout.num_graphs, size, size)
    source, target = graph.edge_index
    matrix[layout.graph_of_node[target], layout.local[target], layout.local[source]] = graph.capacity
    padded = layout.pad(absorbing).bool()
    return DenseOperator(matrix, padded, damping)


def _source(graph: FlowGraph, rule: SourceRule | Tensor, h: Tensor, graph_of_node: Tensor, num_graphs: int) -> Tensor:
    """Distribute one unit per graph over the tokens that reach the demand (h > 0)."""
    if isinstance(rule, Tensor):
        share = _vector(rule, graph, "source") * (h > 0)
    elif rule == "uniform":
        share = (graph.question_mask & (h > 0)).double()
    else:
        share = graph.question_mask * h
    total = scatter(share, graph_of_node, dim_size=num_graphs, reduce="sum")[graph_of_node]
    return torch.where(share > 0, share / total, 0.0)


_RANGE_MESSAGE = (
    "capacity: the potential h must stay within float64, but {} (smallest positive h {:.3g}); "
    "exclude the attention sink, renormalise the rows or shorten the chain"
)


def _check_range(graph: FlowGraph, h: Tensor, absorbing: Tensor, damping: float) -> None:
    """A token whose reader has influence must have some itself; if it has none, the product underflowed."""
    if not bool(torch.isfinite(h).all()):
        at = int((~torch.isfinite(h)).nonzero()[-1])
        raise NumericalRangeError(_RANGE_MESSAGE.format(f"it overflows at token {at}", float(h[h > 0].min())))
    source, target = graph.edge_index
    vanished = (h[source] < _SMALLEST_NORMAL) & (h[target] > 0) & ~absorbing[source]
    if bool(vanished.any()):
        at = int(source[vanished][-1])
        raise NumericalRangeError(_RANGE_MESSAGE.format(f"it underflows at token {at}", float(h[h > 0].min())))
