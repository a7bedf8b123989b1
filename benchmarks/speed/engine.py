"""Compare the flow engine with one read of its input, and with simpler ways to compute the same numbers.

    python -m benchmarks.speed.engine [dense] [batch] [peers] [fill]

Everything is timed in full (``solve`` or ``solve_rows``: validation, both sweeps, source, range check), CPU, medians
of interleaved runs. The limit is one read: of the triangle (half of ``matrix.sum()``), or of the edges
(``capacity.sum() + edge_index.sum()``), with all threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch_geometric.data import Batch
from torch_geometric.utils import scatter

from benchmarks.common import interleaved, save
from benchmarks.speed.streaming import LAYERS, build
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.flow.solve import solve
from flowgraph.flow.solve_rows import solve_rows
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.propagation.edge_sweeps import EdgeSweeps
from flowgraph.propagation.row_sweeps import DenseSweeps
from flowgraph.propagation.topology import CACHE, topology_of

Rows = list[dict[str, Any]]


def attention(tokens: int) -> Tensor:
    """Draw random causal attention with a few strong links in each row."""
    random = torch.Generator().manual_seed(tokens)
    logits = 2 * torch.randn(tokens, tokens, generator=random)
    future = torch.ones(tokens, tokens).triu(1).bool()
    return torch.softmax(logits.masked_fill(future, -torch.inf), -1)


def sparse_graph(tokens: int, degree: int, seed: int = 0) -> FlowGraph:
    """Draw a graph in which every token reads ``degree`` others: its predecessor, and tokens drawn at random."""
    random = torch.Generator().manual_seed(seed)
    target = torch.arange(1, tokens).repeat_interleave(degree)
    source = (torch.rand(target.numel(), generator=random) * target).long()
    source[::degree] = target[::degree] - 1
    edges = torch.unique(torch.stack([source, target]), dim=1)
    weights = torch.rand(edges.shape[1], generator=random)
    # Rows sum to 1, as attention does.
    total = scatter(weights, edges[1], dim_size=tokens, reduce="sum")
    return FlowGraph.from_edges(
        edges, weights / total[edges[1]], num_nodes=tokens, question=range(1, tokens // 4), answer=[tokens - 1]
    )


def over(times: dict[str, float], limit: str) -> dict[str, float]:
    """Return each time in milliseconds, and as a multiple of the limit's time."""
    columns = {f"{limit}_ms": 1e3 * times[limit]}
    for name, value in times.items():
        if name != limit:
            columns |= {f"{name}_ms": 1e3 * value, f"{name}_ratio": value / times[limit]}
    return columns


def dense(repeats: int) -> Rows:
    """One dense matrix, both sweeps, against one read of its triangle."""
    rows = []
    for tokens in (512, 1024, 2048, 4096, 8192):
        for dtype in (torch.float32, torch.float64):
            matrix = attention(tokens).tril(-1).to(dtype)
            question = torch.arange(tokens) < tokens // 4
            answer = torch.arange(tokens) == tokens - 1

            def run(backend: Any, matrix: Tensor = matrix, masks: Any = (question, answer)) -> Callable[[], object]:
                return lambda: solve_rows(matrix, question=masks[0], answer=masks[1], preset=None, backend=backend)

            times = interleaved(
                {
                    "read": lambda m=matrix: m.sum(),
                    "numba_sweeps": sweeps_alone(matrix, "numba"),
                    "torch_sweeps": sweeps_alone(matrix, "dense"),
                    "numba": run("numba"),
                    "torch": run("dense"),
                },
                repeats,
            )
            # Half of the matrix lies above the diagonal and need not be read.
            times["read"] /= 2
            rows.append({"tokens": tokens, "dtype": str(dtype)[6:], **over(times, "read")})
    return rows


def sweeps_alone(matrix: Tensor, backend: Any) -> Callable[[], object]:
    """Return both sweeps without the checks of ``solve_rows`` (most of them: one read to refuse bad capacities)."""
    ones = torch.ones(1, matrix.shape[0], dtype=torch.float64)
    end = torch.zeros_like(ones)
    end[:, -1] = 1
    engine = DenseSweeps(ones, backend)
    return lambda: (engine.potential(matrix[None], end), engine.influence(matrix[None], end))


def batch(repeats: int) -> Rows:
    """Sparse graphs in one call, topology known, against one read of the edges; and the first call."""
    rows = []
    for graphs, tokens, degree in ((1, 2048, 64), (64, 512, 64), (64, 2048, 64), (256, 512, 32), (1, 32768, 64)):
        single: list[Any] = [sparse_graph(tokens, degree, seed) for seed in range(graphs)]
        together: Any = Batch.from_data_list(single)

        def first(backend: Any, together: Any = together) -> Callable[[], object]:
            def run() -> object:
                vars(together).pop(CACHE, None)
                return solve(together, backend=backend)

            return run

        def again(backend: Any, together: Any = together) -> Callable[[], object]:
            return lambda: solve(together, backend=backend)

        engine = EdgeSweeps(topology_of(together), torch.ones(together.num_nodes).double(), "numba")
        end = together.answer_mask.double()
        times = interleaved(
            {
                "read": lambda b=together: (b.capacity.sum(), b.edge_index.sum()),
                "numba_sweeps": lambda w=together.capacity, b=end, e=engine: (e.potential(w, b), e.influence(w, b)),
                "numba": again("numba"),
                "scatter": again("scatter"),
            },
            repeats,
        )
        times |= interleaved({"numba_first": first("numba"), "scatter_first": first("scatter")}, max(repeats // 2, 1))
        rows.append({"graphs": graphs, "tokens": tokens, "edges": together.num_edges, **over(times, "read")})
    return rows


def peers(repeats: int) -> Rows:
    """The same flow of 64 x 2,048 tokens by other means, as multiples of one batched solve."""
    graphs: list[Any] = [sparse_graph(2048, 64, seed) for seed in range(64)]
    together = Batch.from_data_list(graphs)
    times = interleaved(
        {
            "one batched solve, numba": lambda: solve(together, backend="numba"),
            "one batched solve, scatter": lambda: solve(together, backend="scatter"),
            "Python loop over solve, numba": lambda: [solve(graph, backend="numba") for graph in graphs],
            "Python loop over solve, scatter": lambda: [solve(graph, backend="scatter") for graph in graphs],
            "Jacobi to 1e-6, batched scatter": lambda: jacobi(together),
        },
        repeats,
    )
    network = in_networkx(graphs[0])
    single = interleaved(
        {"networkx": lambda: through_networkx(network), "reference": lambda: solve(graphs[0], backend="reference")}, 1
    )
    times["networkx graph, Python loops (one graph x 64)"] = 64 * single["networkx"]
    times["Python loop over edges (one graph x 64)"] = 64 * single["reference"]
    best = times["one batched solve, numba"]
    exact = solve(together).throughput
    errors = {"Jacobi to 1e-6, batched scatter": float((jacobi(together) - exact).abs().max())}
    return [
        {"way": way, "seconds": value, "ratio": value / best, "largest error": errors.get(way, 0.0)}
        for way, value in times.items()
    ]


def jacobi(graph: Any, tolerance: float = 1e-6) -> Tensor:
    """Repeat both sweeps on all edges at once until no value changes by more than the tolerance."""
    source, target = graph.edge_index
    weight = graph.capacity.double() * ~graph.answer_mask[source]

    def fixed_point(start: Tensor, read: Tensor, write: Tensor) -> Tensor:
        x = start
        while True:
            new = start + scatter(weight * x[read], write, dim_size=x.numel(), reduce="sum")
            if float((new - x).abs().max()) <= tolerance * float(new.abs().max()):
                return new
            x = new

    # h = b + N^T h; the source enters as q = src / h; g = q + N g; throughput = g h.
    h = fixed_point(graph.answer_mask.double(), target, source)
    enters = graph.question_mask & (h > 0)
    count = scatter(enters.double(), graph.batch, reduce="sum")[graph.batch]
    q = torch.where(enters, 1 / (h * count).clamp_min(1e-300), 0.0)
    g = fixed_point(q, source, target)
    return g * h


def in_networkx(graph: FlowGraph) -> nx.DiGraph:
    """Convert the graph to networkx."""
    network = nx.DiGraph()
    network.add_nodes_from(range(graph.num_nodes or 0))
    network.add_weighted_edges_from(zip(*graph.edge_index.tolist(), graph.capacity.tolist(), strict=True))
    network.graph["question"] = graph.question_mask.tolist()
    network.graph["answer"] = graph.answer_mask.tolist()
    return network


def through_networkx(network: nx.DiGraph) -> list[float]:
    """Run both sweeps in topological order over networkx's adjacency."""
    answer = network.graph["answer"]
    question = network.graph["question"]
    order = list(nx.topological_sort(network))

    # Backward sweep: h = b + N^T h.
    h: dict[int, float] = {}
    for s in reversed(order):
        if answer[s]:
            h[s] = 1.0
        else:
            h[s] = sum(link["weight"] * h[t] for t, link in network.adj[s].items())

    # Forward sweep: g = q + N g.
    enters = [t for t in order if question[t] and h[t] > 0]
    g = {t: 1 / (len(enters) * h[t]) if question[t] and h[t] > 0 else 0.0 for t in order}
    for t in order:
        g[t] += sum(link["weight"] * g[s] for s, link in network.pred[t].items() if not answer[s])
    return [g[t] * h[t] for t in order]


def fill(repeats: int) -> Rows:
    """Dense tiles against scatter by the share of possible edges: what ``auto`` takes where numba is missing."""
    rows = []
    for tokens in (512, 2048):
        for share in (1.0, 0.5, 0.3, 0.2, 0.1, 0.05):
            weights = attention(tokens).tril(-1)
            weights *= torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(1)) < share
            # A link to the token before keeps the answer reachable.
            weights[1:].diagonal().fill_(0.1)
            graph = FlowGraph.from_dense(weights, question=range(1, tokens // 4), answer=[tokens - 1])
            backends: tuple[Any, ...] = ("dense", "scatter", "numba")
            times = interleaved({b: lambda b=b, g=graph: solve(g, backend=b) for b in backends}, repeats)
            rows.append(
                {
                    "tokens": tokens,
                    "fill": share,
                    **{f"{name}_ms": 1e3 * value for name, value in times.items()},
                    "dense_over_scatter": times["dense"] / times["scatter"],
                }
            )
    return rows


def shared(repeats: int) -> Rows:
    """Scoring 16 responses of one prompt from a recorded pass: prompt rows computed once, or for each response."""
    model = build()
    rows = []
    for prompt, response in ((128, 128), (512, 128), (128, 512), (1024, 256)):
        tokens = prompt + response
        ids = torch.randint(0, 4096, (16, tokens), generator=torch.Generator().manual_seed(0))
        ids[:, :prompt] = ids[:1, :prompt]
        mask = torch.ones_like(ids)
        position = torch.arange(tokens).expand_as(ids)
        masks: Any = {"question": (position > 0) & (position < prompt), "answer": position >= tokens - 8}

        def forward(ids: Tensor = ids, mask: Tensor = mask) -> None:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, use_cache=False)

        with AttentionRecorder(model, layers=LAYERS) as recorder:
            forward()
        # With the ids the recorder sees that the prompts are equal, and computes their rows once.
        once = recorder.rows(mask, ids)
        each = recorder.rows(mask)
        times = interleaved(
            {
                "forward": forward,
                "once": lambda rows=once, masks=masks: solve_rows(rows, **masks),
                "each": lambda rows=each, masks=masks: solve_rows(rows, **masks),
            },
            repeats,
        )
        throughput_once = solve_rows(once, **masks).throughput
        throughput_each = solve_rows(each, **masks).throughput
        difference = float((throughput_once - throughput_each).abs().max())
        rows.append({"prompt": prompt, "response": response, **over(times, "forward"), "difference": difference})
    return rows


def main() -> None:
    sections = {"dense": dense, "batch": batch, "peers": peers, "fill": fill, "shared": shared}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*sections, []], help="all of them if none is named")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.sections or sections:
        print(f"{name}: {sections[name].__doc__}", flush=True)
        rows = sections[name](arguments.repeats)
        save(f"engine_{name}", rows, str(sections[name].__doc__))


if __name__ == "__main__":
    main()
