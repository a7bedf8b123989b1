"""Two flows compared with plain loops, over dictionaries and exact fractions where the numbers allow it."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Pair = tuple[int, int]
EdgeFlow = dict[tuple[int, int], Fraction]


def total_variation(first: Sequence[Fraction], second: Sequence[Fraction], pairs: Sequence[Pair]) -> Fraction:
    """Half of the summed absolute differences of throughput, each side scaled to sum 1."""
    whole, other = sum(first, Fraction(0)), sum(second, Fraction(0))
    shares = [
        (first[i] / whole if i >= 0 else Fraction(0), second[j] / other if j >= 0 else Fraction(0)) for i, j in pairs
    ]
    return sum((abs(a - b) for a, b in shares), Fraction(0)) / 2


def edge_overlap(first: EdgeFlow, second: EdgeFlow, pairs: Sequence[Pair]) -> Fraction:
    """Twice the common flow over the flow of both, over edges whose two ends have partners."""
    partner = {i: j for i, j in pairs if i >= 0 and j >= 0}
    common = sum(
        (
            min(amount, second.get((partner[s], partner[t]), Fraction(0)))
            for (s, t), amount in first.items()
            if s in partner and t in partner
        ),
        Fraction(0),
    )
    whole = sum(first.values(), Fraction(0)) + sum(second.values(), Fraction(0))
    return 2 * common / whole if whole else Fraction(1)


def width(route: Sequence[int], edges: EdgeFlow, source: Sequence[Fraction], absorbed: Sequence[Fraction]) -> Fraction:
    """The least flow on a route: where it enters, on each edge, where it leaves."""
    if -1 in route:
        return Fraction(0)
    on_edges = [edges.get(edge, Fraction(0)) for edge in pairwise(route)]
    return min([source[route[0]], absorbed[route[-1]], *on_edges])


def contract(edges: EdgeFlow, source: Sequence[Fraction], group_of: Sequence[int]) -> tuple[list[Fraction], EdgeFlow]:
    """Throughput of groups and flow between them."""
    between: EdgeFlow = {}
    for (s, t), amount in edges.items():
        ends = group_of[s], group_of[t]
        if ends[0] != ends[1]:
            between[ends] = between.get(ends, Fraction(0)) + amount
    throughput = [Fraction(0)] * (max(group_of) + 1)
    for token, share in enumerate(source):
        throughput[group_of[token]] += share
    for (_, t), amount in between.items():
        throughput[t] += amount
    return throughput, between


def shared_cuts(first: Sequence[str], second: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where both cut one text, as numbers of tokens: for tokens that tile the text, none of them empty."""

    def ends(tokens: Sequence[str]) -> dict[int, int]:
        return {len("".join(tokens[: count + 1])): count + 1 for count in range(len(tokens))}

    one, other = ends(first), ends(second)
    both = sorted(set(one) & set(other))
    return [one[at] for at in both], [other[at] for at in both]
