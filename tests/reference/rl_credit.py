"""Credit rules on one sequence without padding, in plain loops over lists.

``A`` is the attention of one sequence, rows are readers; ``start`` is the index of its first response token. Every
function gives one number for each response token.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from tests.reference import edges as edge_rules
from tests.reference import flow as flows

Matrix = Sequence[Sequence[float]]
Mask = Sequence[bool]


def solved(A: Matrix, start: int, question: Mask, answer: Mask, rows: str) -> flows.Solution:
    generated = [t >= start for t in range(len(A))]
    edges = edge_rules.edges_from_attention(A, generated, rows=rows)
    triples = [(s, t, c) for (s, t), c in edges.items()]
    return flows.solve(len(A), flows.effective_edges(triples, answer), question, [int(a) for a in answer])


def throughput(A: Matrix, start: int, question: Mask, answer: Mask, rows: str = "emission") -> list[float]:
    return [float(f) for f in solved(A, start, question, answer, rows).throughput[start:]]


def reach(A: Matrix, start: int, question: Mask, answer: Mask, rows: str = "emission") -> list[float]:
    return [float(h) for h in solved(A, start, question, answer, rows).h[start:]]


def shuffled(A: Matrix, start: int, keys: Matrix, rows: str = "emission") -> list[list[float]]:
    """Each row's weights handed out anew: the movable token with the smallest key gives to the first movable one."""
    out = []
    for t, row in enumerate(A):
        keeps_own = rows == "literal" or t < start
        movable = [s for s in range(1, t + 1) if not (keeps_own and s == t)]
        givers = sorted(movable, key=lambda s: keys[t][s])
        new = list(row)
        for place, giver in zip(movable, givers, strict=True):
            new[place] = row[giver]
        out.append(new)
    return out


def largest_edge(A: Matrix, start: int, rows: str = "emission") -> list[float]:
    generated = [t >= start for t in range(len(A))]
    edges = edge_rules.edges_from_attention(A, generated, rows=rows)
    return [
        max((float(c) for (source, reader), c in edges.items() if source == s and reader >= start), default=0.0)
        for s in range(start, len(A))
    ]


def wrong_sink(A: Matrix, start: int, question: Mask, answer: Mask, random: Any, rows: str = "emission") -> list[float]:
    """The flow to one token of the second half before the answer, which gets the mean score of the others."""
    candidates = reasoning(answer, start) if any(answer) else list(range(start, len(A)))
    later = candidates[len(candidates) // 2 :]
    if not later:
        return [0.0] * (len(A) - start)
    sink = later[int(torch.randint(len(later), (1,), generator=random))]
    scores = throughput(A, start, question, [t == sink for t in range(len(A))], rows)
    others = scores[: sink - start] + scores[sink - start + 1 :]
    scores[sink - start] = sum(others) / len(others) if others else 0.0
    return scores


def max_attention(A: Matrix, start: int) -> list[float]:
    return [max((A[t][s] for t in range(s + 1, len(A))), default=0.0) for s in range(start, len(A))]


def answer_reading(A: Matrix, answer: Mask) -> list[float]:
    readers = [t for t in range(len(A)) if answer[t]]
    return [sum(A[u][s] for u in readers) / len(readers) for s in range(len(A))]


def reasoning(answer: Mask, start: int) -> list[int]:
    last = max((t for t in range(len(answer)) if answer[t]), default=0)
    return [t for t in range(start, last) if not answer[t]]


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    both = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys)
    return both / math.sqrt(spread) if spread > 0 else 0.0


def correlation(A: Matrix, start: int, answer: Mask) -> list[float]:
    scores = [0.0] * (len(A) - start)
    tokens = reasoning(answer, start)
    read = answer_reading(A, answer) if tokens else []
    for s in tokens:
        later = [t for t in tokens if t > s]
        if len(later) >= 3:
            scores[s - start] = max(0.0, pearson([A[t][s] for t in later], [read[t] for t in later]))
    return scores


def fai(A: Matrix, start: int, near: int = 10, far: int = 50) -> list[float]:
    scores = []
    for s in range(start, len(A)):
        readers = [t for t in range(s + near, s + far + 1) if t < len(A)]
        scores.append(sum(A[t][s] for t in readers) / len(readers) if readers else 0.0)
    return scores


def waad(A: Matrix, start: int, window: int = 10) -> list[float]:
    reach_of = [sum(A[t][s] * min(t - s, window) for s in range(t + 1)) for t in range(start, len(A))]
    return [abs(a - b) for a, b in itertools.pairwise(reach_of)] + [0.0]


def top(scores: Sequence[float], among: Mask, share: float) -> set[int]:
    candidates = [t for t in range(len(scores)) if among[t]]
    order = sorted(candidates, key=lambda t: -scores[t])
    return {t for t in order[: math.ceil(round(share * len(candidates), 9))] if scores[t] > 0}


def coupled(
    waads: Sequence[float], fais: Sequence[float], among: Mask, share: float = 0.4, back: float = 0.5, window: int = 10
) -> list[float]:
    preplan, anchors = top(waads, among, share), top(fais, among, share)
    scores = [float(t in preplan or t in anchors) for t in range(len(waads))]
    for t in sorted(anchors - preplan):
        before = [p for p in preplan if t - window <= p < t]
        if before:
            scores[t] -= back
            scores[max(before)] += back
    return scores


def atpo(A_last: Matrix, start: int, answer: Mask, floor: float = 0.5) -> list[float]:
    scores = [0.0] * (len(A_last) - start)
    tokens = reasoning(answer, start)
    if not tokens:
        return scores
    read = answer_reading(A_last, answer)
    logs = [math.log(max(read[t], 1e-8)) for t in tokens]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    for t, log in zip(tokens, logs, strict=True):
        z = (log - mean) / max(spread, 1e-4)
        scores[t - start] = max(floor, 1 / (1 + math.exp(-z)))
    return scores
