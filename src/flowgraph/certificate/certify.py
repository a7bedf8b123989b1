r"""``certify``: everything that is provable about one flow (method, section 4), recomputed from the edges.

Nothing here calls the solver's sweeps. N is rebuilt from the graph and the named options, reachability is a
search of the topology, sums are taken edge by edge in numpy, and the max flow comes from igraph, re-checked.

The checks themselves, and the bounds they must meet, are in :mod:`flowgraph.certificate.checks`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch_geometric.data import Batch

from flowgraph.certificate.checks import (
    Check,
    against_max_flow,
    check,
    conservation,
    net_flow_across_cuts,
    nothing_flows,
    scaling,
    separating_cuts,
    smallest_cut,
    structure,
)
from flowgraph.certificate.flow_arrays import FlowArrays
from flowgraph.certificate.rational import RATIONAL_EDGES, against_fractions, require_rational_size
from flowgraph.errors import InvalidInputError
from flowgraph.flow.flow import Flow
from flowgraph.maxflow.problem import MAX_EDGES, MaxFlowProblem

Level = Literal["auto", "fast", "exact", "rational"]

_NODE_VECTORS = ("h", "g", "exponent", "throughput", "source", "demand", "absorbing")


@dataclass(frozen=True)
class Certificate:
    """What is proved about one flow.

    Attributes:
        checks: in the order of the method.
        max_flow_value: V between the flow's source and demand tokens; None where it was not computed.
        alpha: the largest scaling of the flow that fits the capacities, so alpha <= V; infinite without edge flow.
        gap: alpha / V in (0, 1]; None without V or without flow. It has no constant lower bound: a small gap
            says that the routes are narrow somewhere, not that the flow is wrong.
        notes: what was not checked, and why.
    """

    checks: tuple[Check, ...]
    max_flow_value: float | None
    alpha: float
    gap: float | None
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None."""
        return {
            "ok": self.ok,
            "max_flow_value": _finite(self.max_flow_value),
            "alpha": _finite(self.alpha),
            "gap": _finite(self.gap),
            "checks": [
                {**asdict(check), "residual": _finite(check.residual), "bound": _finite(check.bound)}
                for check in self.checks
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if self.ok:
            verdict = f"all {len(self.checks)} checks hold"
        else:
            verdict = f"{len(self.failed)} of {len(self.checks)} checks FAIL: {', '.join(c.name for c in self.failed)}"
        numbers = f"alpha = {self.alpha:.6g}"
        if self.max_flow_value is not None:
            numbers += f", max flow V = {self.max_flow_value:.6g}"
        if self.gap is not None:
            numbers += f", alpha / V = {self.gap:.4g}"
        width = max((len(check.name) for check in self.checks), default=0)
        rows = [
            f"  {'✓' if c.ok else '✗'} {c.name:<{width}}  {c.residual:>7.1g} {'<=' if c.ok else '> '} {c.bound:<7.1g}  "
            f"{c.statement}{c.detail and f' ({c.detail})'}"
            for c in self.checks
        ]
        return "\n".join(
            [f"Certificate: {verdict}", f"  {numbers}", *rows, *(f"  note: {note}" for note in self.notes)]
        )


def certify(
    flow: Flow,
    *,
    level: Level = "auto",
    max_edges: int | None = None,
    num_through: int = 8,
    seed: int = 0,
) -> Certificate:
    r"""Check everything that must hold for a conserved flow, whatever the graph, against the exact max flow.

    .. math::
        h > 0 \Leftrightarrow \text{reachable}, \quad \sum_t P(s \to t) = 1, \quad f = src + \sum F_{in} =
        \sum F_{out} + g b, \quad \sum_t g[t] b[t] = 1, \quad \langle q, h \rangle = \langle g, b \rangle, \quad
        \alpha F \le N, \quad \alpha \le V \le \text{any cut}, \quad \alpha f[v] \le M[v].

    Args:
        flow: of one graph; for a batch see :func:`certify_each`.
        level: ``"fast"``, everything but the max flow; ``"exact"``, with it; ``"rational"``, with it and with every
            number recomputed in exact fractions; ``"auto"``, exact where the graph is small enough, else fast.
        max_edges: size limit; default a million edges for the max flow, 5,000 for fractions.
        num_through: for how many tokens M[v] is computed: those with most throughput among the tokens that are
            neither source nor demand.
        seed: of the random cuts.

    Returns:
        A :class:`Certificate`. A check that fails is reported, never raised; a check that was not made is
        absent and named in ``notes`` (the max flow also where a token is both source and demand: V is unlimited there).
        An infeasible flow is certified as such: everything is zero, and V is.

    Raises:
        InvalidInputError: a flow over a Batch, or an option outside its range.
        TooLargeError: level ``"exact"`` or ``"rational"`` on a graph above ``max_edges``.
        NumericalRangeError: the max flow solver failed its re-check.

    Cost: some 40 reads of the edges and 1 + 2 num_through max flows. Source: method, section 4; arXiv 2606.10646.

    Example:
        >>> import torch
        >>> from flowgraph.flow.solve import solve
        >>> from flowgraph.graph.flow_graph import FlowGraph
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> certificate = certify(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
        >>> certificate.ok, certificate.max_flow_value, round(certificate.gap, 4)
        (True, 0.5, 0.8333)
    """
    _check_options(flow, level, num_through)
    fault = _fault(flow)
    graph_check = check("graph", bool(fault), 0, fault)
    if fault:
        note = "nothing else was checked: the statements are about valid graphs"
        return Certificate((graph_check,), None, math.nan, None, (note,))
    alpha = float(flow.alpha)
    if level == "rational":  # before the max flow, which would be for nothing
        require_rational_size(flow.graph.num_edges, RATIONAL_EDGES if max_edges is None else max_edges)
    with np.errstate(all="ignore"):  # a corrupted flow may hold anything; NaN fails every comparison
        arrays = FlowArrays(flow)
        checks = [graph_check, *structure(arrays)]
        notes = []
        sides = []
        if arrays.feasible:
            rng = np.random.default_rng(seed)
            sides = separating_cuts(arrays, rng)
            checks += [*conservation(arrays), net_flow_across_cuts(arrays, sides, rng), *scaling(arrays)]
        else:
            checks.append(nothing_flows(arrays))
            notes.append("no flow: no source token reaches the demand, so conservation and scaling say nothing")
        network = _network(arrays, level, MAX_EDGES if max_edges is None else max_edges, notes)
        value = None
        if network is not None:
            value, exact_checks = against_max_flow(arrays, network, sides, num_through, notes)
            checks += exact_checks
        elif sides:
            checks.append(smallest_cut(arrays, sides, arrays.alpha))
        if level == "rational":
            checks += against_fractions(arrays, value, max_edges=RATIONAL_EDGES if max_edges is None else max_edges)
    gap = alpha / value if value and math.isfinite(alpha) else None
    return Certificate(tuple(checks), value, alpha, gap, tuple(notes))


def certify_each(flow: Flow, **options: Any) -> list[Certificate]:
    """:func:`certify` for every graph of a flow over a Batch, as it was solved there; the same options.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Batch
        >>> from flowgraph.flow.solve import solve
        >>> from flowgraph.graph.flow_graph import FlowGraph
        >>> graph = FlowGraph.from_dense(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), question=[0], answer=[1])
        >>> [certificate.ok for certificate in certify_each(solve(Batch.from_data_list([graph, graph])))]
        [True, True]
    """
    if not isinstance(flow.graph, Batch):
        return [certify(flow, **options)]
    ptr = flow.graph.ptr.tolist()
    certificates = []
    for number, graph in enumerate(flow.graph.to_data_list()):
        nodes = slice(ptr[number], ptr[number + 1])
        parts = {name: getattr(flow, name)[nodes] for name in _NODE_VECTORS}
        certificates.append(certify(replace(flow, graph=graph, **parts), **options))
    return certificates


def _check_options(flow: Flow, level: str, num_through: int) -> None:
    if isinstance(flow.graph, Batch):
        raise InvalidInputError(
            f"flow: a certificate is about one graph, got a flow over a Batch of {flow.graph.num_graphs}; "
            "use certify_each(flow)"
        )
    if level not in get_args(Level):
        allowed = ", ".join(map(repr, get_args(Level)))
        raise InvalidInputError(f"level: must be one of {allowed}, got {level!r}; 'auto' is the default")
    if num_through < 0:
        raise InvalidInputError(f"num_through: must be at least 0, got {num_through}; 0 leaves the check out")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _fault(flow: Flow) -> str:
    """What makes the graph invalid, or nothing."""
    sizes = {name: getattr(flow, name).numel() for name in _NODE_VECTORS}
    wrong = [name for name, size in sizes.items() if size != flow.graph.num_nodes]
    if wrong:
        return f"{', '.join(wrong)} must have one entry per token ({flow.graph.num_nodes})"
    try:
        flow.graph.validate()
    except InvalidInputError as error:
        return str(error)
    return ""


def _network(arrays: FlowArrays, level: Level, max_edges: int, notes: list[str]) -> MaxFlowProblem | None:
    """The max flow problem between the flow's own source and demand tokens, or a note that says why not."""
    num_edges = arrays.weight.size
    if (arrays.is_source & arrays.is_sink).any():
        notes.append("max flow: not computed; a token is both source and demand, so no edge limits what passes there")
    elif level == "fast":
        notes.append("max flow: not computed, as asked (level='fast'); alpha is a lower bound of it")
    elif level == "auto" and num_edges > max_edges:
        notes.append(
            f"max flow: not computed; {num_edges:,} edges are above max_edges = {max_edges:,}; "
            f"pass max_edges={num_edges} to compute it"
        )
    else:
        return MaxFlowProblem(arrays.flow, max_edges=max_edges)
    return None
