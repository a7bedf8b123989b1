"""Measure which capacities and compositions find what decides the answers of planted models.

    python -m benchmarks.evaluation.planted [--number 8]

Every figure is exact up to the texts that are drawn: the models are set by hand, and their truth is known.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import flowgraph as fg
from benchmarks.common import save

SETTINGS: dict[str, tuple[str, str | None]] = {
    "attention": ("attention", None),
    "attention, one_hop": ("attention", "one_hop"),
    "attention, cage": ("attention", "cage"),
    "attention, hops": ("attention", "hops"),
    "attention, rollout": ("attention", "rollout"),
    "value_norm": ("value_norm", None),
    "centred": ("centred", None),
    "sharp": ("sharp", None),
    "sharp, one_hop": ("sharp", "one_hop"),
    "sharp_max": ("sharp_max", None),
    "vtrace": ("vtrace", None),
    "vtrace, one_hop": ("vtrace", "one_hop"),
    "vtrace, cage": ("vtrace", "cage"),
    "vtrace, hops": ("vtrace", "hops"),
    "vtrace, katz": ("vtrace", "katz"),
    "vtrace, vtrace": ("vtrace", "vtrace"),
    "vtrace_share": ("vtrace_share", None),
    "vtrace_share, one_hop": ("vtrace_share", "one_hop"),
    "gradient_positive": ("gradient_positive", None),
    "gradient_positive, one_hop": ("gradient_positive", "one_hop"),
    "relevance": ("relevance", None),
}
"""Capacity and composition; None: the score that ranks tokens best for the capacity."""


def of_trace(name: str) -> fg.EvaluationMethod:
    """Explain by the scores and edges of a trace."""
    capacity, composition = SETTINGS[name]
    options: dict[str, Any] = {} if composition is None else {"composition": composition}

    def explain(subject: fg.Subject) -> fg.Explanation:
        trace = subject.trace(capacity, **options)
        values = trace.graph.weight if isinstance(trace, fg.RelevanceTrace) else trace.flow.edge_flow
        # A composition has scores of tokens only; its edges are those of the capacity.
        edges = None if composition else matrix(trace.graph.edge_index, values, trace.num_tokens)
        return fg.Explanation(tokens=trace.scores, edges=edges)

    return fg.EvaluationMethod(name, explain, "scores of a trace")


def matrix(edge_index: Tensor, values: Tensor, num_tokens: int) -> Tensor:
    """Write one value per edge into a matrix: row: target, column: source."""
    dense = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    source, target = edge_index.long()
    dense[target, source] = values.double()
    return dense


def random_scores(subject: fg.Subject) -> Tensor:
    """Score tokens at random, by the text."""
    generator = torch.Generator().manual_seed(int(subject.token_ids.sum()))
    return torch.rand(subject.num_tokens, generator=generator)


def recent(subject: fg.Subject) -> Tensor:
    """Score later tokens higher."""
    return torch.arange(subject.num_tokens, dtype=torch.float64)


def main() -> None:
    """Measure every setting on every kind, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=8, help="texts of each kind")
    number = parser.parse_args().number
    methods = [
        fg.EvaluationMethod("random", random_scores, "random", trivial=True),
        fg.EvaluationMethod("recency", recent, "later tokens first", trivial=True),
        *(of_trace(name) for name in SETTINGS),
    ]
    scores = fg.planted_check(methods, number=number)
    rows = []
    for score in scores:
        values = score.to_dict()
        rows.append({"kind": score.kind, "method": score.method, "error": score.error, **values["figures"]})
    save("planted", rows, f"{number} texts of each kind; recovered: share of deciding tokens above all others")


if __name__ == "__main__":
    main()
