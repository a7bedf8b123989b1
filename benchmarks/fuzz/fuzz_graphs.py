"""The graphs of the fuzz: small ones of every kind, with capacities of every kind, each drawn again by its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flowgraph import FlowGraph
from flowgraph.certificate.flow_arrays import EPS

GROUP = 200
"""Graphs that are solved in one call."""
MOST_TOKENS = 24
SINK = 1e-7
"""Mass that a token of a "sink" graph spreads over all tokens but the first."""


# Kinds of graphs: pairs (source, target) with source < target, sorted by target. -----------------------------------


def _all_pairs(tokens: int) -> NDArray:
    """List every pair (source, target), sorted by target."""
    target, source = np.tril_indices(tokens, -1)
    return np.stack([source, target])


def _chain(tokens: int, random: np.random.Generator) -> NDArray:
    pairs = _all_pairs(tokens)
    source, target = pairs
    return pairs[:, target == source + 1]


def _band(tokens: int, random: np.random.Generator) -> NDArray:
    pairs = _all_pairs(tokens)
    source, target = pairs
    width = random.integers(2, 5)
    return pairs[:, target - source <= width]


def _complete(tokens: int, random: np.random.Generator) -> NDArray:
    return _all_pairs(tokens)


def _star(tokens: int, random: np.random.Generator) -> NDArray:
    hub = random.integers(tokens)
    pairs = _all_pairs(tokens)
    source, target = pairs
    return pairs[:, (source == hub) | (target == hub)]


def _diamond(tokens: int, random: np.random.Generator) -> NDArray:
    pairs = _all_pairs(tokens)
    source, target = pairs
    return pairs[:, (source == 0) != (target == tokens - 1)]


def _sparse(tokens: int, random: np.random.Generator) -> NDArray:
    density = random.uniform(0.05, 0.6)
    pairs = _all_pairs(tokens)
    return pairs[:, random.random(pairs.shape[1]) < density]


def _disconnected(tokens: int, random: np.random.Generator) -> NDArray:
    """Remove every edge across a place in the text, or every edge out of some tokens."""
    cut = random.integers(1, tokens + 1)
    is_unread = random.random(tokens) < 0.5
    pairs = _all_pairs(tokens)
    source, target = pairs
    if random.random() < 0.5:
        crosses = (source < cut) & (target >= cut)
        return pairs[:, ~crosses]
    return pairs[:, ~is_unread[source]]


def _single_edge(tokens: int, random: np.random.Generator) -> NDArray:
    pairs = _all_pairs(tokens)
    if tokens == 1:
        return pairs
    return pairs[:, [random.integers(pairs.shape[1])]]


def _edgeless(tokens: int, random: np.random.Generator) -> NDArray:
    return np.empty((2, 0), np.int64)


KINDS: dict[str, Callable[[int, np.random.Generator], NDArray]] = {
    "chain": _chain,
    "band": _band,
    "sink": _complete,
    "star": _star,
    "diamond": _diamond,
    "sparse": _sparse,
    "dense": _complete,
    "disconnected": _disconnected,
    "single edge": _single_edge,
    "edgeless": _edgeless,
}


# Capacities. -------------------------------------------------------------------------------------------------------

WEIGHTS = ("attention", "ties", "free", "spread")
"""Kinds of capacities in an ordinary group; "wide" ones, from 1e-300 to 1e300, are drawn in their own groups."""


def _capacities(kind: str, weights: str, pairs: NDArray, random: np.random.Generator) -> NDArray:
    source, target = pairs
    num_edges = source.size
    if weights == "wide":
        return 10.0 ** random.uniform(-300, 300, num_edges)
    if weights == "ties":
        return _tied(target, random)
    if weights == "free":
        # As of contributions: rows sum to any number.
        return random.integers(1, 4097, num_edges) / 1024
    if weights == "spread":
        return 10.0 ** random.uniform(-4, 2, num_edges)
    return _attention(kind, source, target, random)


def _tied(target: NDArray, random: np.random.Generator) -> NDArray:
    """Draw one capacity for all edges, or one for all edges into a token."""
    level = random.choice([0.0, 0.25, 1.0, 3.0])
    if level:
        return np.full(target.size, level)
    if target.size == 0:
        return 1.0 / target
    num_incoming = np.bincount(target, minlength=1)
    return 1.0 / num_incoming[target]


def _attention(kind: str, source: NDArray, target: NDArray, random: np.random.Generator) -> NDArray:
    """Draw softmax rows over the edges into each token and the token itself, which is no edge."""
    sharpness = random.choice([0.5, 2, 6])
    raw = np.exp(sharpness * random.normal(size=source.size))
    is_from_first = source == 0
    if kind == "sink":
        raw = raw * ~is_from_first
    own = np.exp(random.normal(size=MOST_TOKENS))
    total = np.bincount(target, raw, MOST_TOKENS) + own
    share = raw / total[target]
    if kind == "sink":
        return np.where(is_from_first, 1 - SINK, SINK * share)
    return share


# One graph, and the options that it is solved with. ----------------------------------------------------------------

_FLAVOURS = ("ordinary", "mixed", "wide")
_FLAVOUR_SHARES = (0.65, 0.2, 0.15)
_SOURCES = ("uniform", "potential", "vector")
_ABSORPTIONS = (None, "absorb", "pass_through")


@dataclass(frozen=True, eq=False)
class Case:
    """One graph as drawn, with vectors for its own source and demand.

    Attributes:
        number: its number within the seed.
        kind: one of ``KINDS``.
        weights: one of ``WEIGHTS``, or "wide".
        pairs: ``[2, E]`` source over target, sorted by (target, source).
        capacity: ``[E]`` > 0.
        question: ``[T]`` bool.
        answer: ``[T]`` bool.
        source: ``[T]`` used where the group's source is a vector.
        demand: ``[T]`` used where the group has its own demand.
        graph: the same as a FlowGraph, built from edges in random order.
    """

    number: int
    kind: str
    weights: str
    pairs: NDArray
    capacity: NDArray
    question: NDArray
    answer: NDArray
    source: NDArray
    demand: NDArray
    graph: FlowGraph

    @property
    def tokens(self) -> int:
        return self.question.size

    @property
    def valid(self) -> bool:
        """Whether it is a valid graph: a single token is question and answer at once, which is refused."""
        return self.tokens > 1

    @property
    def bound(self) -> float:
        """Largest difference of two solvers: each is off by at most tokens times the certificate's local bound."""
        num_out = np.bincount(self.pairs[0], minlength=1)
        num_in = np.bincount(self.pairs[1], minlength=1)
        most_edges_at_a_token = float(max(num_out.max(), num_in.max()))
        return 2 * self.tokens * (most_edges_at_a_token + 32) * EPS


@dataclass(frozen=True)
class Options:
    """The options that all graphs of a group share, as they are solved in one call.

    Attributes:
        flavour: "ordinary"; "wide", capacities from 1e-300 to 1e300; or "mixed", some of them wide.
        dtype: of the capacities.
        source: "uniform", "potential" or "vector".
        own_demand: whether the demand is a vector of the case.
        absorption: None, "absorb" or "pass_through".
        damping: in (0, 1].
    """

    flavour: str
    dtype: torch.dtype
    source: str
    own_demand: bool
    absorption: str | None
    damping: float

    @classmethod
    def of(cls, seed: int, group: int) -> Options:
        """Draw the options of a group. The order of the draws is part of the numbering of graphs."""
        random = np.random.default_rng([seed, 1, group])
        flavour = str(random.choice(_FLAVOURS, p=_FLAVOUR_SHARES))
        dtype = torch.float32 if random.random() < 0.4 else torch.float64
        source = str(random.choice(_SOURCES))
        own_demand = bool(random.random() < 0.3)
        absorption = _ABSORPTIONS[random.integers(3)]

        # Two in five groups are undamped, one has a damping of its own.
        any_damping = float(random.uniform(0.01, 1))
        dampings = (1.0, 1.0, 0.9, 0.5, any_damping)
        damping = dampings[random.integers(5)]
        return cls(flavour, dtype, source, own_demand, absorption, damping)


def draw(seed: int, number: int) -> Case:
    """Draw one graph of a seed; it does not depend on which other graphs are drawn.

    The order of the draws is part of the numbering of graphs: committed results name them by number.
    """
    options = Options.of(seed, number // GROUP)
    random = np.random.default_rng([seed, 0, number])

    # Size, kind and kind of capacities.
    tokens = int(random.integers(1, MOST_TOKENS + 1))
    kind = str(random.choice(list(KINDS)))
    weights = "attention" if kind == "sink" else str(random.choice(WEIGHTS))
    if options.flavour == "wide" or (options.flavour == "mixed" and random.random() < 0.3):
        weights = "wide"
    is_wide = weights == "wide"

    # Edges; in float32 wide capacities are moved into its range, and others may underflow to 0.
    pairs = KINDS[kind](tokens, random)
    capacity = _capacities(kind, weights, pairs, random)
    if options.dtype == torch.float32:
        if is_wide:
            capacity = 10.0 ** (np.log10(capacity) / 7 - 5)
        capacity = capacity.astype(np.float32)

    question, answer = _regions(tokens, random)
    source = _vector(tokens, is_wide, random)
    demand = _vector(tokens, is_wide, random)

    is_positive = capacity > 0
    pairs = pairs[:, is_positive]
    capacity = capacity[is_positive]
    order = random.permutation(capacity.size)
    graph = _graph(pairs[:, order], capacity[order], question, answer)
    return Case(number, kind, weights, pairs, capacity, question, answer, source, demand, graph)


def _regions(tokens: int, random: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Draw disjoint regions, none empty (a single token is both); the question mostly comes first."""
    question = np.zeros(tokens, bool)
    answer = np.zeros(tokens, bool)
    if tokens == 1:
        return ~question, ~answer

    order = np.arange(tokens)
    if random.random() < 0.15:
        order = random.permutation(tokens)
    cut = random.integers(1, tokens)
    question[order[:cut]] = random.random(cut) < 0.5
    answer[order[cut:]] = random.random(tokens - cut) < 0.4

    # Mostly, the first and the last token are in the regions.
    if random.random() < 0.7 or not question.any():
        question[order[0]] = True
    if random.random() < 0.7 or not answer.any():
        answer[order[-1]] = True
    return question, answer


def _vector(tokens: int, is_wide: bool, random: np.random.Generator) -> NDArray:
    """Draw a source or demand with some zeros; in one of twenty vectors all entries are zero."""
    vector = random.exponential(size=tokens)
    is_kept = random.random(tokens) < 0.6
    any_kept = random.random() < 0.95
    vector = vector * is_kept * any_kept
    if is_wide:
        vector = vector * 10.0 ** random.uniform(-300, 300, tokens)
    return vector


def _graph(pairs: NDArray, capacity: NDArray, question: NDArray, answer: NDArray) -> FlowGraph:
    edge_index = torch.from_numpy(pairs)
    weight = torch.from_numpy(capacity)
    question_mask = torch.from_numpy(question)
    answer_mask = torch.from_numpy(answer)
    if question.size > 1:
        return FlowGraph.from_edges(
            edge_index, weight, num_nodes=question.size, question=question_mask, answer=answer_mask
        )

    # A single token is question and answer at once: from_edges refuses it, so the object is filled in directly.
    valid = FlowGraph.from_edges(torch.empty(2, 0).long(), weight, num_nodes=2, question=[0], answer=[1])
    return FlowGraph(
        edge_index=edge_index,
        capacity=weight,
        num_nodes=1,
        question_mask=question_mask,
        answer_mask=answer_mask,
        reasoning_mask=torch.zeros_like(question_mask),
        kept_attention=valid.kept_attention,
        kept_flow=valid.kept_flow,
        throughput_error=valid.throughput_error,
        rules=valid.rules,
    )


def described(seed: int, case: Case) -> str:
    """Describe the graph and the options it was solved with, every number exact."""
    options = Options.of(seed, case.number // GROUP)
    dtype = str(options.dtype).removeprefix("torch.")
    demand = "own" if options.own_demand else None
    lines = [
        f"graph {case.number} of seed {seed}: {case.kind}, {case.weights} weights, {case.tokens} tokens, "
        f"{case.capacity.size} edges, {dtype}",
        f"  source={options.source!r}, demand={demand}, absorption={options.absorption!r}, "
        f"damping={options.damping.hex()}",
        f"  question {np.flatnonzero(case.question).tolist()}, answer {np.flatnonzero(case.answer).tolist()}",
    ]
    if options.source == "vector":
        lines.append(f"  source {_in_hex(case.source)}")
    if options.own_demand:
        lines.append(f"  demand {_in_hex(case.demand)}")
    lines.append("  edges" if case.capacity.size else "  no edges")
    for source, target, capacity in zip(*case.pairs, case.capacity, strict=True):
        lines.append(f"    {source} -> {target}  {float(capacity).hex()}")
    return "\n".join(lines)


def _in_hex(values: NDArray) -> str:
    return " ".join(float(value).hex() for value in values)
