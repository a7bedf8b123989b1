r"""``certify``: everything that is provable about one flow (method, section 4), recomputed from the edges.

Nothing here calls the solver's sweeps. N is rebuilt from the graph and the named options, reachability is a
search of the topology, sums are taken edge by edge in numpy, and the max flow comes from igraph, re-checked.

Bounds. All terms are non-negative, so a sum of n products, in any order, has a relative error of at most
``(n + 2) * eps / 2``. A **local** identity compares two such sums over the edges at one token, the solver's and
ours: they differ by at most ``local = (n + 32) * eps``, n the largest number of edges at one token, the 32 for
the handful of other roundings. A **whole** identity adds the local defects of all tokens, each weighted by what
passes there (f, once in and once out): at most ``whole = 2 * local * sum(f) + N * eps``, N tokens. These are worst
cases: rounding errors mostly cancel, and a solved flow stays far below them. Numbers below ``2**-900`` of
the unit flow, where float64 runs out, count as zero.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch_geometric.data import Batch

from flowgraph.errors import InvalidInputError
from flowgraph.flow import Flow
from flowgraph.maxflow import MAX_EDGES, TOLERANCE, Network, source_tokens

EPS = float(np.finfo(np.float64).eps)
_NOTHING = 2.0**-900
_PREFIX_CUTS, _RANDOM_CUTS = 8, 16
_STATEMENTS = {
    "graph": "edges run forward in token order; regions are disjoint",
    "absorbing": "no edge leaves a token that absorbs, every edge leaves the others",
    "reachability": "h > 0 exactly where the demand can be reached",
    "feasible": "a flow exists exactly when a source token reaches the demand",
    "out-mass": "P hands on exactly 1 from every token that reaches the demand",
    "zero flow": "no route: source, g, throughput and edge flow are 0, alpha is infinite",
    "source": "one unit enters, as its rule says",
    "influence": "g = q + N g at every token",
    "inflow": "source + inflow = throughput at every token",
    "outflow": "throughput = outflow + absorbed at every token",
    "absorbed": "the demand absorbs exactly 1",
    "range": "0 <= throughput <= 1",
    "path length": "sum of edge flows = sum of throughput - 1, the mean route",
    "inner products": "<q, h> = <g, b>",
    "cuts": "net flow out of any set = its source - what it absorbs; 1 if it separates",
    "congestion": "F(s, t) / N[t, s] = g[s] h[t] on every edge",
    "alpha": "alpha F fits the capacity of every edge and fills one",
    "smallest cut": "alpha, and V, are at most the capacity of every cut tested",
    "max flow": "V is a feasible flow and a cut of the same size; V > 0 exactly with a flow",
    "alpha <= V": "the scaled flow fits, so it is no larger than the max flow",
    "support": "a max flow uses only edges that carry flow",
    "through": "alpha f[v] is at most what could pass through v",
}
"""Every check, in the words of the table."""
_NODE_VECTORS = ("h", "g", "throughput", "source", "demand", "absorbing")


@dataclass(frozen=True)
class Check:
    """One statement about a flow, with the number that decides it.

    Attributes:
        name: short and stable.
        statement: what must hold, in plain words.
        residual: how far it is from holding (relative, or a count where the bound is 0).
        bound: what rounding can explain.
        ok: ``residual <= bound``.
        detail: the numbers behind it.
    """

    name: str
    statement: str
    residual: float
    bound: float
    ok: bool
    detail: str


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
    exact: Literal["auto"] | bool = "auto",
    max_edges: int = MAX_EDGES,
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
        exact: compute the max flow: ``True``, ``False``, or ``"auto"``: when the graph has at most ``max_edges``.
        max_edges: size limit of the exact max flow.
        num_through: for how many tokens M[v] is computed: those with most throughput among the tokens that are
            neither source nor demand.
        seed: of the random cuts.

    Returns:
        A :class:`Certificate`. A check that fails is reported, never raised; a check that was not made is
        absent and named in ``notes``. An infeasible flow is certified as such: everything is zero, and V is.

    Raises:
        InvalidInputError: a flow over a Batch, or an option outside its range.
        TooLargeError: ``exact=True`` on a graph above ``max_edges``.
        NumericalRangeError: the max flow solver failed its re-check.

    Cost: some 40 reads of the edges and 1 + 2 num_through max flows. Source: method, section 4; arXiv 2606.10646.

    Example:
        >>> import torch
        >>> from flowgraph.flow import solve
        >>> from flowgraph.graph import FlowGraph
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.25, 0.75, 0]])
        >>> certificate = certify(solve(FlowGraph.from_dense(weights, question=[0], answer=[3])))
        >>> certificate.ok, certificate.max_flow_value, round(certificate.gap, 4)
        (True, 0.5, 0.8333)
    """
    _check_options(flow, exact, num_through)
    alpha = float(flow.alpha)
    fault = _fault(flow)
    graph_check = _check("graph", bool(fault), 0, fault)
    if fault:
        note = "nothing else was checked: the statements are about valid graphs"
        return Certificate((graph_check,), None, alpha, None, (note,))
    with np.errstate(all="ignore"):  # a corrupted flow may hold anything; NaN fails every comparison
        books = _Books(flow)
        checks = [graph_check, *_structure(books)]
        notes = []
        sides = []
        if books.feasible:
            rng = np.random.default_rng(seed)
            sides = _separating_cuts(books, rng)
            checks += [*_conservation(books), _cuts(books, sides, rng), *_scaling(books)]
        else:
            checks.append(_nothing_flows(books))
            notes.append("no flow: no source token reaches the demand, so conservation and scaling say nothing")
        network = _network(books, exact, max_edges, notes)
        value = None
        if network is not None:
            value, exact_checks = _against_max_flow(books, network, sides, num_through, notes)
            checks += exact_checks
        elif sides:
            checks.append(_smallest_cut(books, sides, books.alpha))
    gap = alpha / value if value and math.isfinite(alpha) else None
    return Certificate(tuple(checks), value, alpha, gap, tuple(notes))


def certify_each(flow: Flow, **options: Any) -> list[Certificate]:
    """:func:`certify` for every graph of a flow over a Batch, as it was solved there; the same options.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Batch
        >>> from flowgraph.flow import solve
        >>> from flowgraph.graph import FlowGraph
        >>> graph = FlowGraph.from_dense(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), question=[0], answer=[1])
        >>> [certificate.ok for certificate in certify_each(solve(Batch.from_data_list([graph, graph])))]
        [True, True]
    """
    if not isinstance(flow.graph, Batch):
        return [certify(flow, **options)]
    ptr = flow.graph.ptr.tolist()
    certificates = []
    for number, graph in enumerate(flow.graph.to_data_list()):
        nodes, this = slice(ptr[number], ptr[number + 1]), slice(number, number + 1)
        parts = {name: getattr(flow, name)[nodes] for name in _NODE_VECTORS}
        single = replace(flow, graph=graph, feasible=flow.feasible[this], alpha=flow.alpha[this], **parts)
        certificates.append(certify(single, **options))
    return certificates


def _check_options(flow: Flow, exact: object, num_through: int) -> None:
    if isinstance(flow.graph, Batch):
        raise InvalidInputError(
            f"flow: a certificate is about one graph, got a flow over a Batch of {flow.graph.num_graphs}; "
            "use certify_each(flow)"
        )
    if exact not in ("auto", True, False):
        raise InvalidInputError(f"exact: must be 'auto', True or False, got {exact!r}; 'auto' is the default")
    if num_through < 0:
        raise InvalidInputError(f"num_through: must be at least 0, got {num_through}; 0 leaves the check out")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check(name: str, residual: float, bound: float, detail: str = "") -> Check:
    residual, bound = float(residual) + 0.0, float(bound)  # + 0.0 turns -0 into 0
    return Check(name, _STATEMENTS[name], residual, bound, residual <= bound, detail)


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


class _Books:
    """One flow on the CPU in float64: what it claims, and N rebuilt from the graph and the named options."""

    def __init__(self, flow: Flow) -> None:
        graph = flow.graph
        self.flow, self.feasible, self.alpha = flow, bool(flow.feasible), float(flow.alpha)
        self.tail, self.head = graph.edge_index.cpu().numpy()
        self.h, self.g, self.f, self.source, self.demand = (
            vector.double().cpu().numpy() for vector in (flow.h, flow.g, flow.throughput, flow.source, flow.demand)
        )
        self.absorbed = flow.absorbed().cpu().numpy()
        self.edge_flow = flow.edge_flow().cpu().numpy()
        self.absorbing = graph.answer_mask.cpu().numpy() & (flow.absorption == "absorb")
        self.weight = graph.capacity.double().cpu().numpy() * ~self.absorbing[self.tail] * flow.damping
        self.question = graph.question_mask.cpu().numpy()
        self.enters, self.leaves = source_tokens(flow).cpu().numpy(), self.demand > 0
        self.reaches = self._reaches_demand()
        degree = max(np.bincount(ends, minlength=1).max() for ends in (self.tail, self.head))
        self.local = float(degree + 32) * EPS
        self.whole = 2 * self.local * float(self.f.sum()) + self.f.size * EPS

    def _reaches_demand(self) -> NDArray[np.bool_]:
        """A search of the topology: last token first, so a token is settled before the edges into it are read."""
        reaches = self.leaves.copy()
        ends = np.searchsorted(self.head, np.arange(reaches.size + 1))
        live = self.weight > 0
        for token in reversed(range(reaches.size)):
            if reaches[token]:
                into = slice(ends[token], ends[token + 1])
                reaches[self.tail[into][live[into]]] = True
        return reaches

    def into(self, per_edge: NDArray) -> NDArray:
        """Sum over the edges into each token."""
        return np.bincount(self.head, per_edge, self.f.size)

    def out_of(self, per_edge: NDArray) -> NDArray:
        """Sum over the edges out of each token."""
        return np.bincount(self.tail, per_edge, self.f.size)

    def out_of_side(self, side: NDArray, per_edge: NDArray) -> float:
        """Sum over the edges that leave a set of tokens."""
        return float(per_edge[side[self.tail] & ~side[self.head]].sum())


def _difference(got: NDArray, wanted: NDArray) -> float:
    """Largest difference relative to the larger of the two: 0 for nothing, 1 for something against nothing."""
    scale = np.maximum(np.maximum(np.abs(got), np.abs(wanted)), _NOTHING)
    return float(np.max(np.abs(got - wanted) / scale, initial=0.0))


def _structure(books: _Books) -> list[Check]:
    """What holds with and without a flow (items 1 and 2): who absorbs, who reaches the demand, and P."""
    h, absorbing, reaches = books.h, books.absorbing, books.reaches
    wrong_mask = (books.flow.absorbing.cpu().numpy() != absorbing).sum()
    possible = bool((books.enters & reaches).any())
    handed_on = books.demand + books.out_of(books.weight * h[books.head])
    return [
        _check("absorbing", wrong_mask, 0, f"{books.flow.absorption}: {absorbing.sum()} of {h.size} tokens"),
        _check("reachability", ((h > 0) != reaches).sum(), 0, f"{reaches.sum()} of {h.size} tokens"),
        _check("feasible", books.feasible != possible, 0),
        _check("out-mass", _difference(handed_on, h), books.local),
    ]


def _conservation(books: _Books) -> list[Check]:
    """Items 2, 3 and 6: the unit enters, is conserved at every token, and leaves."""
    h, g, f, F, source = books.h, books.g, books.f, books.edge_flow, books.source
    q = np.divide(source, h, out=np.zeros_like(h), where=source != 0)
    misplaced = max(_difference(source, _named_source(books)), abs(float(source.sum()) - 1))
    received = q + books.into(books.weight * g[books.tail])
    arriving, leaving, length = float(np.sum(q * h)), float(books.absorbed.sum()), float(F.sum())
    outside = max(float(f.max()) - 1, -float(f.min()))
    local, whole = books.local, books.whole
    entry = f"{books.flow.source_rule}, {(source > 0).sum()} tokens"
    return [
        _check("source", misplaced, (f.size + 32) * EPS, entry),
        _check("influence", _difference(g, received), local),
        _check("inflow", _difference(source + books.into(F), f), local),
        _check("outflow", _difference(books.out_of(F) + books.absorbed, f), local),
        _check("absorbed", abs(leaving - 1), whole, f"{(books.absorbed > 0).sum()} tokens"),
        _check("range", max(outside, 0.0), whole, f"{f.min():.3g} to {f.max():.6g}"),
        _check("path length", abs(length - float(f.sum()) + 1), whole, f"{length:.4g} edges"),
        _check("inner products", abs(arriving - leaving), whole, f"{arriving:.6g} and {leaving:.6g}"),
    ]


def _named_source(books: _Books) -> NDArray:
    """The distribution that the rule names; of a vector only its support and its sum can be checked."""
    rules = {"uniform": books.question, "potential": books.question * books.h}
    weights = rules.get(books.flow.source_rule, books.source)
    share = np.where(books.reaches, np.maximum(weights, 0.0), 0.0)
    return share / share.sum()


def _nothing_flows(books: _Books) -> Check:
    """Without a route every number of the flow is exactly zero and any scaling fits."""
    largest = np.abs(np.concatenate([books.g, books.f, books.source, books.edge_flow])).max()
    return _check("zero flow", largest if math.isinf(books.alpha) else 1.0, 0)


def _separating_cuts(books: _Books, rng: np.random.Generator) -> list[NDArray]:
    """Source sides of cuts: the two trivial ones, the narrowest prefixes of the text, random ones."""
    enters, leaves, position = books.enters, books.leaves, np.arange(books.f.size)
    if (enters & leaves).any() or not enters.any() or not leaves.any():
        return []
    sides = [enters, ~leaves]
    narrow = np.cumsum(books.out_of(books.weight) - books.into(books.weight))  # [k]: out of the first k + 1 tokens
    between = np.arange(position[enters].max(), position[leaves].min())
    sides += [position <= k for k in between[np.argsort(narrow[between], kind="stable")[:_PREFIX_CUTS]]]
    sides += [(rng.random(position.size) < rng.random()) & ~leaves | enters for _ in range(_RANDOM_CUTS)]
    return sides


def _cuts(books: _Books, sides: list[NDArray], rng: np.random.Generator) -> Check:
    """Item 4, on every prefix of the text, on the separating cuts, and on random sets of tokens."""
    F, balance = books.edge_flow, books.source - books.absorbed
    prefixes = np.cumsum(books.out_of(F) - books.into(F)) - np.cumsum(balance)
    worst = [float(np.abs(prefixes).max())]
    anywhere = [rng.random(balance.size) < rng.random() for _ in range(_RANDOM_CUTS)]
    for side, wanted in [*((side, 1.0) for side in sides), *((side, float(balance[side].sum())) for side in anywhere)]:
        worst.append(abs(books.out_of_side(side, F) - books.out_of_side(~side, F) - wanted))
    running = balance.size * EPS * (float(books.f.sum()) + 1)  # two running sums over the tokens
    tested = f"{balance.size} prefixes, {len(sides)} separating and {len(anywhere)} random sets"
    return _check("cuts", float(np.max(worst)), books.whole + running, tested)


def _scaling(books: _Books) -> list[Check]:
    """Item 5: congestion is rank one, and alpha fills the fullest edge."""
    rank_one = books.g[books.tail] * books.h[books.head]
    used = np.where(books.weight > 0, rank_one, 0.0)
    residual, full = float(not math.isinf(books.alpha)), "no edge carries flow"
    if used.any():
        at = used.argmax()
        residual, full = abs(books.alpha * used[at] - 1), f"{books.tail[at]} -> {books.head[at]} is full first"
    return [
        _check(
            "congestion",
            _difference(books.edge_flow, books.g[books.tail] * books.weight * books.h[books.head]),
            4 * EPS,
        ),
        _check("alpha", residual, 4 * EPS, full),
    ]


def _smallest_cut(books: _Books, sides: list[NDArray], largest: float) -> Check:
    """Item 5: nothing that fits the capacities exceeds a cut."""
    smallest = min(books.out_of_side(side, books.weight) for side in sides)
    detail = f"the smallest of {len(sides)} is {smallest:.6g}"
    return _check("smallest cut", _excess(largest, smallest), books.whole, detail)


def _excess(small: float, large: float) -> float:
    """By what share a number that must be the smaller is the larger; infinite against nothing."""
    return max(float(np.float64(small) / large) - 1, 0.0)


def _network(books: _Books, exact: Literal["auto"] | bool, max_edges: int, notes: list[str]) -> Network | None:
    """The max flow problem between the flow's own source and demand tokens, or a note that says why not."""
    num_edges = books.weight.size
    if (books.enters & books.leaves).any():
        notes.append("max flow: not computed; a token is both source and demand, so no edge limits what passes there")
    elif exact is False:
        notes.append("max flow: not computed, as asked (exact=False); alpha is a lower bound of it")
    elif exact == "auto" and num_edges > max_edges:
        notes.append(
            f"max flow: not computed; {num_edges:,} edges are above max_edges = {max_edges:,}; "
            f"pass max_edges={num_edges} to compute it"
        )
    else:
        return Network(books.flow, max_edges=max_edges)
    return None


def _against_max_flow(
    books: _Books, network: Network, sides: list[NDArray], num_through: int, notes: list[str]
) -> tuple[float, list[Check]]:
    """Items 1, 5, 7 and 8 against the exact max flow."""
    best = network.between(network.sources, network.sinks)
    value = best.cut_capacity
    exists = value > 0
    scale = value if exists else 1.0
    cut = f"V = {value:.6g}, {best.cut_edges.numel()} edges cut"
    width = best.error / scale if exists == books.feasible else 1.0
    checks = [_check("max flow", width, TOLERANCE * network.total / scale, cut)]
    if not (exists and books.feasible):
        return value, checks
    used = best.edge_flow.cpu().numpy()
    carries = (books.g[books.tail] > 0) & (books.h[books.head] > 0) & (books.weight > 0)
    stray, noise = float(used[~carries].sum()) / scale, (best.error + EPS * network.total) / scale
    checks += [
        _check("alpha <= V", _excess(books.alpha, value), books.whole, f"alpha is {books.alpha / value:.4g} of V"),
        _smallest_cut(books, sides, max(books.alpha, value - best.error)),
        _check("support", stray, noise, f"{(used > 0).sum()} of {carries.sum()} edges"),
    ]
    inner = np.flatnonzero(~(books.enters | books.leaves) & (books.f > 0))
    tokens = inner[np.argsort(-books.f[inner], kind="stable")[:num_through]].tolist()
    if tokens:
        ratios = [books.alpha * float(books.f[v]) / np.float64(network.through(v)) for v in tokens]
        worst = float(np.max(ratios))
        checks.append(
            _check("through", max(worst - 1, 0.0), books.whole, f"at most {worst:.3g} of it, {len(tokens)} tokens")
        )
    else:
        notes.append("through: not computed; num_through is 0, or no token between source and demand carries flow")
    return value, checks
