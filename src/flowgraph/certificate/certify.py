r"""certify: check everything that is provable about one flow (method, section 4), recomputed from the edges.

The solver's sweeps are not used here. N is rebuilt from the graph and the named options, reachability is a search of
the topology, sums are taken edge by edge in numpy, and the max flow comes from igraph and is re-verified.

The checks themselves, and the bounds they must meet, are in :mod:`flowgraph.certificate.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph.certificate.checks import (
    Check,
    TokenSet,
    against_max_flow,
    check,
    conservation,
    net_flow_across_cuts,
    scaling,
    separating_cuts,
    smallest_cut,
    structure,
    zero_flow,
)
from flowgraph.certificate.flow_arrays import FlowArrays
from flowgraph.certificate.law import law
from flowgraph.certificate.rational import RATIONAL_EDGES, against_fractions, require_rational_size
from flowgraph.display.fragment import escaped, folded, fragment, table
from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow
from flowgraph.flow.signed_flow import SignedFlow
from flowgraph.maxflow.problem import MAX_EDGES, MaxFlowProblem

Level = Literal["auto", "fast", "exact", "rational"]
_MAX_STATEMENT = 400
"""Characters of a statement, a detail or a note that a notebook shows."""


@loadable
@dataclass(frozen=True, repr=False)
class Certificate:
    """The result of checking one flow.

    Attributes:
        checks: in the order of the method.
        max_flow_value: V between the flow's source and demand tokens; None where it was not computed.
        alpha: the largest scaling of the flow that fits the capacities, so alpha <= V; infinite without edge flow, NaN
            for a signed flow.
        gap: alpha / V in (0, 1]; None without V or without flow. It has no constant lower bound: a small gap
            means that the routes are narrow somewhere, not that the flow is wrong.
        notes: what was not checked, and why.
        score: what ranks the tokens of the trace that was checked; None for a flow alone. The checks are about the
            flow.
    """

    checks: tuple[Check, ...]
    max_flow_value: float | None
    alpha: float
    gap: float | None
    notes: tuple[str, ...]
    score: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(made.ok for made in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(made for made in self.checks if not made.ok)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        checks = []
        for made in self.checks:
            row = asdict(made)
            row["residual"] = _finite(made.residual)
            row["bound"] = _finite(made.bound)
            checks.append(row)
        return {
            "ok": self.ok,
            "score": self.score,
            "max_flow_value": _finite(self.max_flow_value),
            "alpha": _finite(self.alpha),
            "gap": _finite(self.gap),
            "checks": checks,
            "notes": list(self.notes),
        }

    @property
    def result(self) -> str:
        """Whether all checks hold, or which do not, in one line."""
        if self.ok:
            return f"all {len(self.checks)} checks hold"
        names = ", ".join(made.name for made in self.failed)
        return f"{len(self.failed)} of {len(self.checks)} checks FAIL: {names}"

    @property
    def figures(self) -> str:
        """Alpha, the max flow V and their ratio, as far as they are known, in one line."""
        if math.isnan(self.alpha):
            return "no capacities to compare with"
        numbers = f"alpha = {self.alpha:.6g}"
        if self.max_flow_value is not None:
            numbers += f", max flow V = {self.max_flow_value:.6g}"
        if self.gap is not None:
            numbers += f", alpha / V = {self.gap:.4g}"
        return numbers

    def __str__(self) -> str:
        """List every check with its residual and its bound."""
        return "\n".join([*self._headline(), *self._rows(self.checks), *self._noted()])

    def __repr__(self) -> str:
        """Summarise: the result, the figures and the checks that do not hold; ``print`` lists all of them."""
        lines = [*self._headline(), *self._rows(self.failed), *self._noted()]
        if self.ok:
            lines.append("  print(certificate) lists the checks")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Render the certificate for a notebook: result and figures, with the checks folded below them."""
        rows = []
        for made in self.checks:
            mark = "✓" if made.ok else "<b>✗</b>"
            statement = escaped(made.statement, _MAX_STATEMENT)
            if made.detail:
                statement += f' <span style="opacity:.65">({escaped(made.detail, _MAX_STATEMENT)})</span>'
            rows.append([mark, escaped(made.name), f"{made.residual:.1g}", f"{made.bound:.1g}", statement])
        checks = table(["", "check", "residual", "bound", "statement"], rows, left=["", "check", "statement"])
        notes = "".join(f"<div>note: {escaped(note, _MAX_STATEMENT)}</div>" for note in self.notes)
        headline = f"<b>Certificate:</b> {escaped(self.result, _MAX_STATEMENT)}; {escaped(self.figures)}"
        if self.score is not None:
            headline += f"; tokens ranked by {escaped(self.score, _MAX_STATEMENT)}"
        # A failed check must be seen without a click.
        return fragment(folded(headline, checks, is_open=not self.ok), notes)

    def _headline(self) -> list[str]:
        lines = [f"Certificate: {self.result}", f"  {self.figures}"]
        if self.score is not None:
            lines.append(f"  tokens are ranked by: {self.score}")
        return lines

    def _rows(self, checks: Sequence[Check]) -> list[str]:
        name_width = max((len(made.name) for made in checks), default=0)
        return [_table_row(made, name_width) for made in checks]

    def _noted(self) -> list[str]:
        return [f"  note: {note}" for note in self.notes]


def certify(
    flow: Flow | SignedFlow,
    *,
    level: Level = "auto",
    max_edges: int | None = None,
    num_through: int = 8,
    seed: int = 0,
) -> Certificate:
    r"""Check everything that must hold for a conserved flow on any graph, and compare it with the exact max flow.

    .. math::
        h > 0 \Leftrightarrow \text{reachable}, \quad \sum_t P(s \to t) = 1, \quad f = src + \sum F_{in} =
        \sum F_{out} + g b, \quad \sum_t g[t] b[t] = 1, \quad \langle q, h \rangle = \langle g, b \rangle, \quad
        \alpha F \le N, \quad \alpha \le V \le \text{any cut}, \quad \alpha f[v] \le M[v].

    Args:
        flow: of one graph; for a batch see :func:`certify_each`. Of a :class:`flowgraph.SignedFlow` the law is checked:
            conservation at every token, across every cut and in total; the options do not apply to it.
        level: ``"fast"``, everything but the max flow; ``"exact"``, with it; ``"rational"``, with it and with every
            number recomputed in exact fractions; ``"auto"``, exact where the graph is small enough, else fast.
        max_edges: size limit; default a million edges for the max flow, 5,000 for fractions.
        num_through: for how many tokens M[v] is computed: those with most throughput among the tokens that are
            neither source nor demand.
        seed: of the random cuts.

    Returns:
        A :class:`Certificate`. A check that fails is reported, never raised; a check that was not made is
        absent and named in ``notes`` (the max flow also where a token is both source and demand: V is unlimited there).
        For an infeasible flow the certificate checks that every number is zero, V included.

    Raises:
        InvalidInputError: a flow over a Batch, or an option outside its range.
        TooLargeError: level ``"exact"`` or ``"rational"`` on a graph above ``max_edges``.
        NumericalRangeError: the max-flow solver failed its re-check.

    Cost: some 40 reads of the edges and 1 + 2 num_through max flows. Source: method, section 4; arXiv 2606.10646.

    Example:
        >>> import torch
        >>> from flowgraph import FlowGraph, solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> certificate = certify(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
        >>> certificate.ok, certificate.max_flow_value, round(certificate.gap, 4)
        (True, 0.5, 0.8333)
    """
    if isinstance(flow, SignedFlow):
        note = "max flow: not defined for signed weights; see flow.graph.positive() and flow.graph.negative()"
        return Certificate(tuple(law(flow)), None, math.nan, None, (note,))
    _check_options(flow, level, num_through)

    # The statements are about valid graphs: on any other graph, nothing else is checked.
    fault = _fault(flow)
    graph_check = check("graph", bool(fault), 0, fault)
    if fault:
        note = "nothing else was checked: the statements are about valid graphs"
        return Certificate((graph_check,), None, math.nan, None, (note,))

    # Refuse a graph that is too large for fractions before the max flow is computed.
    max_flow_edges = MAX_EDGES if max_edges is None else max_edges
    rational_edges = RATIONAL_EDGES if max_edges is None else max_edges
    if level == "rational":
        require_rational_size(flow.graph.num_edges, rational_edges)

    notes: list[str] = []
    sides: list[TokenSet] = []
    # A corrupted flow may hold any number: overflow and NaN show as failed checks, not as warnings.
    with np.errstate(all="ignore"):
        arrays = FlowArrays.from_flow(flow)
        checks = [graph_check, *structure(arrays)]

        # Conservation and scaling, or their counterpart where there is no flow.
        if arrays.feasible:
            rng = np.random.default_rng(seed)
            sides = separating_cuts(arrays, rng)
            checks += conservation(arrays)
            checks.append(net_flow_across_cuts(arrays, sides, rng))
            checks += scaling(arrays)
        else:
            checks.append(zero_flow(arrays))
            notes.append("no flow: no source token reaches the demand, so conservation and scaling do not apply")

        # The max flow; without it, alpha is still compared with the cuts.
        max_flow_value = None
        problem = _max_flow_problem(arrays, level, max_flow_edges, notes)
        if problem is not None:
            max_flow_value, exact_checks = against_max_flow(arrays, problem, sides, num_through, notes)
            checks += exact_checks
        elif sides:
            checks.append(smallest_cut(arrays, sides, arrays.alpha))

        if level == "rational":
            checks += against_fractions(arrays, max_flow_value, max_edges=rational_edges)

    alpha = arrays.alpha
    gap = None
    if max_flow_value and math.isfinite(alpha):
        gap = alpha / max_flow_value
    return Certificate(tuple(checks), max_flow_value, alpha, gap, tuple(notes))


def certify_each(flow: Flow, **options: Any) -> list[Certificate]:
    """Certify every graph of a flow over a Batch, as it was solved there.

    Args:
        flow: over a Batch, or over one graph.
        options: those of :func:`certify`.

    Returns:
        One certificate per graph, in the order of the batch.

    Raises:
        InvalidInputError, TooLargeError, NumericalRangeError: as :func:`certify`.

    Cost: that of :func:`certify`, for each graph.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Batch
        >>> from flowgraph import FlowGraph, solve
        >>> graph = FlowGraph.from_dense(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), question=[0], answer=[1])
        >>> [certificate.ok for certificate in certify_each(solve(Batch.from_data_list([graph, graph])))]
        [True, True]
    """
    if not isinstance(flow.graph, Batch):
        return [certify(flow, **options)]
    first_node = flow.graph.ptr.tolist()
    certificates = []
    for number, graph in enumerate(flow.graph.to_data_list()):
        nodes = slice(first_node[number], first_node[number + 1])
        vectors = {name: vector[nodes] for name, vector in _node_vectors(flow).items()}
        single = replace(flow, graph=graph, **vectors)
        certificates.append(certify(single, **options))
    return certificates


def _check_options(flow: Flow, level: str, num_through: int) -> None:
    """Refuse a batch, and options outside their range."""
    if isinstance(flow.graph, Batch):
        raise InvalidInputError(
            f"flow: a certificate is about one graph, got a flow over a Batch of {flow.graph.num_graphs}; "
            "use certify_each(flow)"
        )
    if level not in get_args(Level):
        allowed = ", ".join(map(repr, get_args(Level)))
        raise InvalidInputError(f"level: must be one of {allowed}, got {level!r}; 'auto' is the default")
    if num_through < 0:
        raise InvalidInputError(f"num_through: must be at least 0, got {num_through}; 0 omits the check")


def _node_vectors(flow: Flow) -> dict[str, Tensor]:
    """List the vectors of a flow that have one entry per token."""
    return {
        "h": flow.h,
        "g": flow.g,
        "exponent": flow.exponent,
        "throughput": flow.throughput,
        "source": flow.source,
        "demand": flow.demand,
        "absorbing": flow.absorbing,
    }


def _fault(flow: Flow) -> str:
    """Describe what makes the graph invalid; empty for a valid graph."""
    num_nodes = flow.graph.num_nodes
    wrong = [name for name, vector in _node_vectors(flow).items() if vector.numel() != num_nodes]
    if wrong:
        return f"{', '.join(wrong)} must have one entry per token ({num_nodes})"
    try:
        flow.graph.validate()
        flow.require_unchanged()
    except InvalidInputError as error:
        return str(error)
    return ""


def _max_flow_problem(arrays: FlowArrays, level: Level, max_edges: int, notes: list[str]) -> MaxFlowProblem | None:
    """Set up the max flow between the flow's own source and demand tokens, or note why it is not computed."""
    num_edges = arrays.weight.size
    if (arrays.is_source & arrays.is_sink).any():
        notes.append("max flow: not computed; a token is both source and demand, so no edge limits what passes there")
        return None
    if level == "fast":
        notes.append("max flow: not computed, as requested (level='fast'); alpha is a lower bound of it")
        return None
    if level == "auto" and num_edges > max_edges:
        notes.append(
            f"max flow: not computed; {num_edges:,} edges are above max_edges = {max_edges:,}; "
            f"pass max_edges={num_edges} to compute it"
        )
        return None
    return MaxFlowProblem(arrays.flow, max_edges=max_edges)


def _finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if value is None or not math.isfinite(value):
        return None
    return value


def _table_row(made: Check, name_width: int) -> str:
    """Write one check as a line of the table."""
    mark = "✓" if made.ok else "✗"
    relation = "<=" if made.ok else "> "
    row = f"  {mark} {made.name:<{name_width}}  {made.residual:>7.1g} {relation} {made.bound:<7.1g}  {made.statement}"
    if made.detail:
        row += f" ({made.detail})"
    return row
