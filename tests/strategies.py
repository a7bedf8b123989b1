"""Hypothesis strategies: flow graphs of every shape that has surprised us, and causal attention."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import NamedTuple

from hypothesis import strategies as st

Pair = tuple[int, int]
Edge = tuple[int, int, Fraction]
Masks = tuple[list[bool], list[bool]]

# Shares of a row are whole numbers of units, so that float32 holds each of them exactly.
UNITS = 2**20
# Longer lists of numbers come from a drawn seed: they shrink no further, and hypothesis can hold them.
DRAWN_ONE_BY_ONE = 30
# Large against the other weights of a row (1 to 100), small enough that none of those rounds to zero units.
SHARP = 500_000


class FlowGraph(NamedTuple):
    """A graph with its regions. `edges` are raw: those that leave answer tokens are still there."""

    num_nodes: int
    edges: list[Edge]
    question: list[bool]
    answer: list[bool]
    kind: str


def _integers(draw: st.DrawFn, least: int, most: int, count: int) -> list[int]:
    if count <= DRAWN_ONE_BY_ONE:
        return draw(st.lists(st.integers(least, most), min_size=count, max_size=count))
    random = Random(draw(st.integers(0, 2**32 - 1)))
    return [random.randint(least, most) for _ in range(count)]


def _subset(draw: st.DrawFn, tokens: Sequence[int]) -> set[int]:
    """At least one of the tokens."""
    chosen = _integers(draw, 0, 1, len(tokens))
    return {v for v, taken in zip(tokens, chosen, strict=True) if taken} or {draw(st.sampled_from(tokens))}


def all_pairs(num_nodes: int) -> list[Pair]:
    return [(s, t) for t in range(num_nodes) for s in range(t)]


# Which pairs are edges: one function per kind -----------------------------------------------------------


def _chain(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    return [(s, t) for s, t in all_pairs(num_nodes) if t == s + 1]


def _band(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    width = draw(st.integers(2, 4))
    return [(s, t) for s, t in all_pairs(num_nodes) if t - s <= width]


def _dense(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    return all_pairs(num_nodes)


def _star(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    """Every edge begins or ends at one hub."""
    hub = draw(st.integers(0, num_nodes - 1))
    return [(s, t) for s, t in all_pairs(num_nodes) if hub in (s, t)]


def _diamond(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    """The first token spreads to all in between, which meet in the last; the direct edge if two tokens."""
    pairs = [(s, t) for s, t in all_pairs(num_nodes) if (s == 0) != (t == num_nodes - 1)]
    return pairs or all_pairs(num_nodes)


def _sparse(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    pairs = all_pairs(num_nodes)
    if not pairs:
        return []
    return sorted(draw(st.sets(st.sampled_from(pairs), min_size=num_nodes - 1, max_size=2 * num_nodes)))


def _disconnected(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    """Nothing crosses a cut between question and answer, or nobody reads some of the question."""
    question, answer = masks
    asked = [s for s in range(num_nodes) if question[s]]
    if num_nodes == 1 or draw(st.booleans()):
        cut = draw(st.integers(max(asked) + 1, answer.index(True))) if num_nodes > 1 else 1
        return [(s, t) for s, t in all_pairs(num_nodes) if not s < cut <= t]
    unread = _subset(draw, asked[:-1] or asked)
    return [(s, t) for s, t in all_pairs(num_nodes) if s not in unread]


def _single_edge(draw: st.DrawFn, num_nodes: int, masks: Masks) -> list[Pair]:
    pairs = all_pairs(num_nodes)
    return [draw(st.sampled_from(pairs))] if pairs else []


_PAIRS: dict[str, Callable[[st.DrawFn, int, Masks], list[Pair]]] = {
    "chain": _chain,
    "band": _band,
    "sink": _dense,
    "star": _star,
    "diamond": _diamond,
    "dense": _dense,
    "sparse": _sparse,
    "disconnected": _disconnected,
    "single_edge": _single_edge,
}
KINDS = tuple(_PAIRS)


# Capacities and masks -----------------------------------------------------------------------------------


def _shares(weights: Sequence[int]) -> list[Fraction]:
    """Weights as shares of one in whole units, rounded down: the sum is at most 1."""
    return [Fraction(weight * UNITS // sum(weights), UNITS) for weight in weights]


@st.composite
def _row_weights(draw: st.DrawFn, count: int, least: int = 1) -> list[int]:
    """Weights of one attention row; now and then one entry takes nearly everything."""
    weights = _integers(draw, least, 100, count)
    if draw(st.integers(0, 3)) == 0:
        weights[draw(st.integers(0, count - 1))] = SHARP
    return weights


@st.composite
def _attention_capacities(draw: st.DrawFn, pairs: Sequence[Pair], to_first: bool) -> list[Edge]:
    """Each token shares at most 1 over what it reads; the part of its self-attention is no edge."""
    edges = []
    for t in sorted({t for _, t in pairs}):
        read = [s for s, head in pairs if head == t]
        weights = draw(_row_weights(len(read) + 1))
        if to_first and 0 in read:
            weights[read.index(0)] = draw(st.integers(3, 1000)) * sum(weights)
        edges += [(s, t, c) for s, c in zip(read, _shares(weights), strict=False) if c > 0]
    return edges


@st.composite
def _free_capacities(draw: st.DrawFn, pairs: Sequence[Pair]) -> list[Edge]:
    """Any positive capacities, as of contributions: rows sum to anything. Multiples of 2^-10 up to 4."""
    units = _integers(draw, 1, 4096, len(pairs))
    return [(s, t, Fraction(unit, 1024)) for (s, t), unit in zip(pairs, units, strict=True)]


@st.composite
def _masks(draw: st.DrawFn, num_nodes: int) -> Masks:
    """Question tokens before answer tokens, at least one of each, with gaps; one token alone is both."""
    if num_nodes == 1:
        return [True], [True]
    cut = draw(st.integers(1, num_nodes - 1))
    asked, answered = _subset(draw, range(cut)), _subset(draw, range(cut, num_nodes))
    if draw(st.booleans()):  # the ends, between which the named shapes have their routes
        asked, answered = asked | {0}, answered | {num_nodes - 1}
    return [v in asked for v in range(num_nodes)], [v in answered for v in range(num_nodes)]


@st.composite
def flow_graphs(draw: st.DrawFn, max_nodes: int = 8, min_nodes: int = 1, kinds: Sequence[str] = KINDS) -> FlowGraph:
    """A graph of one of the kinds; capacities are positive, at most 4, and exact in float32.

    Edges are sorted by target, then source, one per pair. Half of the graphs are attention-like (what a
    token reads sums to at most 1); "sink" graphs always are, and everyone reads token 0 with three quarters
    of its mass or more.
    """
    num_nodes = draw(st.integers(min_nodes, max_nodes))
    kind = draw(st.sampled_from(kinds))
    masks = draw(_masks(num_nodes))
    pairs = _PAIRS[kind](draw, num_nodes, masks)
    if kind == "sink" or draw(st.booleans()):
        edges = draw(_attention_capacities(pairs, to_first=kind == "sink"))
    else:
        edges = draw(_free_capacities(pairs))
    edges.sort(key=lambda edge: (edge[1], edge[0]))
    return FlowGraph(num_nodes, edges, *masks, kind)


@st.composite
def attention_matrices(draw: st.DrawFn, max_tokens: int = 8, min_tokens: int = 1) -> list[list[Fraction]]:
    """Causal attention A[t][s], tokens x tokens: rows sum to exactly 1, zeros above the diagonal.

    Every entry is exact in float32. Some rows are sharp, some entries zero.
    """
    num_tokens = draw(st.integers(min_tokens, max_tokens))
    rows = []
    for t in range(num_tokens):
        weights = draw(_row_weights(t + 1, least=0))
        if sum(weights) == 0:
            weights[t] = 1
        row = _shares(weights)
        row[weights.index(max(weights))] += 1 - sum(row)
        rows.append(row + [Fraction(0)] * (num_tokens - t - 1))
    return rows
