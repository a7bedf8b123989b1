"""The graphs of the fuzz: small ones of every kind, with capacities of every kind; each is had again by its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flowgraph.graph.flow_graph import FlowGraph

GROUP = 200
MOST_TOKENS = 24
EPS = float(np.finfo(np.float64).eps)


def _all(tokens: int) -> NDArray:
    """Every pair (source, target), sorted by target."""
    return np.stack(np.tril_indices(tokens, -1)[::-1])


def _band(tokens: int, random: np.random.Generator) -> NDArray:
    return _where(tokens, lambda s, t: t - s <= random.integers(2, 5))


def _star(tokens: int, random: np.random.Generator) -> NDArray:
    hub = random.integers(tokens)
    return _where(tokens, lambda s, t: (s == hub) | (t == hub))


def _diamond(tokens: int, random: np.random.Generator) -> NDArray:
    return _where(tokens, lambda s, t: (s == 0) != (t == tokens - 1))


def _sparse(tokens: int, random: np.random.Generator) -> NDArray:
    share = random.uniform(0.05, 0.6)
    return _where(tokens, lambda s, t: random.random(s.size) < share)


def _disconnected(tokens: int, random: np.random.Generator) -> NDArray:
    """Nothing crosses a place in the text, or nobody reads some of its tokens."""
    cut, unread = random.integers(1, tokens + 1), random.random(tokens) < 0.5
    crossing = random.random() < 0.5
    return _where(tokens, lambda s, t: ~((s < cut) & (t >= cut)) if crossing else ~unread[s])


def _single(tokens: int, random: np.random.Generator) -> NDArray:
    pairs = _all(tokens)
    return pairs[:, [random.integers(pairs.shape[1])]] if tokens > 1 else pairs


def _where(tokens: int, keep: Callable[[NDArray, NDArray], NDArray]) -> NDArray:
    pairs = _all(tokens)
    return pairs[:, keep(*pairs)]


KINDS: dict[str, Callable[[int, np.random.Generator], NDArray]] = {
    "chain": lambda tokens, random: _where(tokens, lambda s, t: t == s + 1),
    "band": _band,
    "sink": lambda tokens, random: _all(tokens),
    "star": _star,
    "diamond": _diamond,
    "sparse": _sparse,
    "dense": lambda tokens, random: _all(tokens),
    "disconnected": _disconnected,
    "single edge": _single,
    "edgeless": lambda tokens, random: np.empty((2, 0), np.int64),
}
WEIGHTS = ("attention", "ties", "free", "spread")
SINK = 1e-7
"""What a token of a "sink" graph leaves for all it reads but the first token."""


def _capacities(kind: str, weights: str, pairs: NDArray, random: np.random.Generator) -> NDArray:
    source, target = pairs
    if weights == "wide":
        return 10.0 ** random.uniform(-300, 300, source.size)
    if weights == "ties":
        level = random.choice([0.0, 0.25, 1.0, 3.0])
        count = np.bincount(target, minlength=1)[target] if target.size else target
        return np.full(source.size, level) if level else 1.0 / count
    if weights == "free":  # as of contributions: rows sum to anything
        return random.integers(1, 4097, source.size) / 1024
    if weights == "spread":
        return 10.0 ** random.uniform(-4, 2, source.size)
    raw = np.exp(random.choice([0.5, 2, 6]) * random.normal(size=source.size))
    others = raw * (source != 0) if kind == "sink" else raw
    own = np.exp(random.normal(size=MOST_TOKENS))  # what a token reads of itself is no edge
    share = others / (np.bincount(target, others, MOST_TOKENS) + own)[target]
    return np.where(source == 0, 1 - SINK, SINK * share) if kind == "sink" else share


@dataclass(frozen=True, eq=False)
class Case:
    """One graph as drawn: edges sorted by (target, source), masks, and vectors of its own."""

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
        """One token alone would be question and answer at once, which no valid graph allows."""
        return self.tokens > 1

    @property
    def bound(self) -> float:
        """How far two solvers may be apart: each is off by tokens times the certificate's local bound at most."""
        ends = np.concatenate([[0], np.bincount(self.pairs[0]), np.bincount(self.pairs[1])])
        return 2 * self.tokens * (float(ends.max()) + 32) * EPS


@dataclass(frozen=True)
class Options:
    """What all graphs of a group have in common, as they are solved in one call."""

    flavour: str
    dtype: torch.dtype
    source: str
    own_demand: bool
    absorption: str | None
    damping: float

    @classmethod
    def of(cls, seed: int, group: int) -> Options:
        random = np.random.default_rng([seed, 1, group])
        return cls(
            flavour=str(random.choice(["ordinary", "mixed", "wide"], p=[0.65, 0.2, 0.15])),
            dtype=torch.float32 if random.random() < 0.4 else torch.float64,
            source=str(random.choice(["uniform", "potential", "vector"])),
            own_demand=bool(random.random() < 0.3),
            absorption=[None, "absorb", "pass_through"][random.integers(3)],
            damping=[1.0, 1.0, 0.9, 0.5, float(random.uniform(0.01, 1))][random.integers(5)],
        )


def draw(seed: int, number: int) -> Case:
    """Graph ``number`` of a seed, whatever else is drawn."""
    options = Options.of(seed, number // GROUP)
    random = np.random.default_rng([seed, 0, number])
    tokens = int(random.integers(1, MOST_TOKENS + 1))
    kind = str(random.choice(list(KINDS)))
    weights = "attention" if kind == "sink" else str(random.choice(WEIGHTS))
    if options.flavour == "wide" or (options.flavour == "mixed" and random.random() < 0.3):
        weights = "wide"
    pairs = KINDS[kind](tokens, random)
    capacity = _capacities(kind, weights, pairs, random)
    if options.dtype == torch.float32:
        capacity = (10.0 ** (np.log10(capacity) / 7 - 5) if weights == "wide" else capacity).astype(np.float32)
    question, answer = _regions(tokens, random)
    source, demand = (_vector(tokens, weights == "wide", random) for _ in range(2))
    positive = capacity > 0  # a share can underflow in float32
    pairs, capacity = pairs[:, positive], capacity[positive]
    graph = _graph(pairs, capacity, question, answer, random.permutation(capacity.size))
    return Case(number, kind, weights, pairs, capacity, question, answer, source, demand, graph)


def _regions(tokens: int, random: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Disjoint, none empty (one token is both); mostly the question comes first, with the ends in the regions."""
    question, answer = np.zeros(tokens, bool), np.zeros(tokens, bool)
    if tokens == 1:
        return ~question, ~answer
    order = random.permutation(tokens) if random.random() < 0.15 else np.arange(tokens)
    cut = random.integers(1, tokens)
    question[order[:cut]], answer[order[cut:]] = random.random(cut) < 0.5, random.random(tokens - cut) < 0.4
    if random.random() < 0.7 or not question.any():
        question[order[0]] = True
    if random.random() < 0.7 or not answer.any():
        answer[order[-1]] = True
    return question, answer


def _vector(tokens: int, wide: bool, random: np.random.Generator) -> NDArray:
    """A source or demand of one's own, with zeros; now and then nothing but zeros."""
    vector = random.exponential(size=tokens) * (random.random(tokens) < 0.6) * (random.random() < 0.95)
    return vector * 10.0 ** random.uniform(-300, 300, tokens) if wide else vector


def _graph(pairs: NDArray, capacity: NDArray, question: NDArray, answer: NDArray, order: NDArray) -> FlowGraph:
    edges, weight = torch.from_numpy(pairs[:, order]), torch.from_numpy(capacity[order])
    masks = torch.from_numpy(question), torch.from_numpy(answer)
    if question.size > 1:
        return FlowGraph.from_edges(edges, weight, num_nodes=question.size, question=masks[0], answer=masks[1])
    blank = FlowGraph.from_edges(torch.empty(2, 0).long(), weight, num_nodes=2, question=[0], answer=[1])
    rest = {name: blank[name] for name in ("kept_attention", "kept_flow", "throughput_error", "rules")}
    return FlowGraph(
        edge_index=edges, capacity=weight, num_nodes=1, question_mask=masks[0], answer_mask=masks[1],
        reasoning_mask=torch.zeros_like(masks[0]), **rest,
    )  # fmt: skip


def described(seed: int, case: Case) -> str:
    """The graph and how it was solved, every number exact."""

    def exactly(values: NDArray) -> str:
        return " ".join(float(value).hex() for value in values)

    options = Options.of(seed, case.number // GROUP)
    edges = [f"    {s} -> {t}  {float(c).hex()}" for s, t, c in zip(*case.pairs, case.capacity, strict=True)]
    return "\n".join(
        [
            f"graph {case.number} of seed {seed}: {case.kind}, {case.weights} weights, {case.tokens} tokens, "
            f"{case.capacity.size} edges, {str(options.dtype)[6:]}",
            f"  source={options.source!r}, demand={'own' if options.own_demand else None}, "
            f"absorption={options.absorption!r}, damping={options.damping.hex()}",
            f"  question {np.flatnonzero(case.question).tolist()}, answer {np.flatnonzero(case.answer).tolist()}",
            *([f"  source {exactly(case.source)}"] if options.source == "vector" else []),
            *([f"  demand {exactly(case.demand)}"] if options.own_demand else []),
            "  edges" if edges else "  no edges",
            *edges,
        ]
    )
