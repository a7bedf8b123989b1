"""Solve time against one read of what is solved, and dense against scatter by fill.

    python -m benchmarks.solve

Both sweeps and the completed result (throughput, alpha, range checks), CPU, float32 weights. The limit is one
read of the edges: ``capacity.sum() + edge_index.sum()``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.common import interleaved, save
from flowgraph.solving import solve
from flowgraph.graph import FlowGraph


def attention(tokens: int) -> Tensor:
    """Random causal attention with a few strong links in each row."""
    logits = 2 * torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(tokens))
    return torch.softmax(logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf), -1)


def graph(tokens: int, fill: float) -> FlowGraph:
    """A graph that keeps a share of all possible edges, at random."""
    weights = attention(tokens).tril(-1)
    if fill < 1:
        weights = weights * (torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(1)) < fill)
        weights[1:].diagonal().fill_(0.1)  # so that the answer stays reachable
    return FlowGraph.from_dense(weights, question=range(1, tokens // 4), answer=[tokens - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--fills", type=float, nargs="+", default=[1.0, 0.3, 0.1, 0.03])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    rows = []
    for tokens in arguments.tokens:
        for fill in arguments.fills:
            g = graph(tokens, fill)
            times = interleaved(
                {
                    "read": lambda g=g: (g.capacity.sum(), g.edge_index.sum()),
                    "dense": lambda g=g: solve(g, backend="dense"),
                    "scatter": lambda g=g: solve(g, backend="scatter"),
                },
                arguments.repeats,
            )
            rows.append(
                {
                    "tokens": tokens,
                    "fill": fill,
                    "edges": g.num_edges,
                    "read_ms": 1e3 * times["read"],
                    "dense_ms": 1e3 * times["dense"],
                    "scatter_ms": 1e3 * times["scatter"],
                    "dense_over_read": times["dense"] / times["read"],
                    "scatter_over_read": times["scatter"] / times["read"],
                    "auto": solve(g).backend,
                }
            )
    save("solve", rows, "solve() in full: both sweeps, source, alpha, range check; read = one pass over the edges")


if __name__ == "__main__":
    main()
