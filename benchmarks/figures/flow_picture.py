"""Draw a worked example of a flow into docs/images/flow.svg and flow.png.

    python -m benchmarks.figures.flow_picture

Six tokens: two of the question, three of the reasoning, one answer. The library solves the graph; the picture shows
the capacity and the flow of every edge, and h, g and f of every token, as fractions.
"""

from __future__ import annotations

from fractions import Fraction

import matplotlib  # pyright: ignore[reportMissingImports]

matplotlib.use("agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
import torch
from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # pyright: ignore[reportMissingImports]

import flowgraph as fg
from benchmarks.figures.plots import IMAGES
from flowgraph.display.palette import PALETTE

TOKENS = ["3", "4", "Well", "3 + 4", "is", "7"]
QUESTION, ANSWER = [0, 1], [5]
# (source, target): capacity, the share of its reading that the target spends on the source.
CAPACITY = {
    (0, 2): 1 / 2,
    (0, 3): 1 / 2,
    (1, 3): 1 / 2,
    (1, 4): 1 / 2,
    (3, 4): 1 / 2,
    (3, 5): 1 / 4,
    (4, 5): 1 / 2,
}
PLACES = {0: (0.0, 0.9), 1: (0.0, -1.3), 2: (3.3, 2.1), 3: (3.3, 0.5), 4: (6.6, -1.3), 5: (9.6, 0.3)}
BLUE = PALETTE["question"].light
GREY = PALETTE["reasoning"].light
GREEN = PALETTE["answer"].light
VERMILLION = PALETTE["flow"].light
HALF_WIDTH, HALF_HEIGHT = 0.85, 0.42


def solved() -> fg.Flow:
    """Solve the graph of the picture."""
    edge_index = torch.tensor(list(CAPACITY)).T
    capacity = torch.tensor(list(CAPACITY.values()))
    graph = fg.FlowGraph.from_edges(
        edge_index, capacity, num_nodes=len(TOKENS), question=QUESTION, answer=ANSWER, reasoning=[2, 3, 4]
    )
    return fg.solve(graph)


def fraction(value: float) -> str:
    """Write a number as the fraction with the smallest denominator that it equals to float accuracy."""
    return str(Fraction(value).limit_denominator(64))


def draw_edge(axis: Axes, source: int, target: int, capacity: float, flow: float) -> None:
    """Draw one edge, as wide as its flow; an edge without flow is dashed."""
    (x, y), (to_x, to_y) = PLACES[source], PLACES[target]
    arrow = FancyArrowPatch(
        (x + HALF_WIDTH, y),
        (to_x - HALF_WIDTH, to_y),
        arrowstyle="-|>",
        mutation_scale=16,
        linewidth=max(1.2, 14 * flow),
        linestyle="-" if flow > 0 else "--",
        color=VERMILLION if flow > 0 else GREY,
        alpha=0.55,
        shrinkA=0,
        shrinkB=0,
    )
    axis.add_patch(arrow)
    label = f"c = {fraction(capacity)}   F = {fraction(flow)}"
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
    axis.text((x + to_x) / 2, (y + to_y) / 2, label, ha="center", va="center", fontsize=8.5, bbox=behind, zorder=2)


def draw_token(axis: Axes, token: int, colour: str, numbers: str) -> None:
    """Draw one token as a box with its text inside and its numbers below."""
    x, y = PLACES[token]
    corner = (x - HALF_WIDTH, y - HALF_HEIGHT)
    box = FancyBboxPatch(
        corner, 2 * HALF_WIDTH, 2 * HALF_HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", facecolor="white",
        edgecolor=colour, linewidth=2, zorder=3,
    )  # fmt: skip
    axis.add_patch(box)
    axis.text(x, y + 0.12, TOKENS[token], ha="center", va="center", fontsize=12, weight="bold", color=colour, zorder=4)
    axis.text(x, y - 0.2, numbers, ha="center", va="center", fontsize=7.5, zorder=4)


def main() -> None:
    """Solve the graph and write the picture as SVG and PNG."""
    flow = solved()
    with plt.rc_context({"svg.hashsalt": "flowgraph", "svg.fonttype": "path", "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(10, 4.6), layout="constrained")
        axis.set_xlim(-1.1, 10.7)
        axis.set_ylim(-2.1, 3.1)
        axis.axis("off")

        edges = zip(*flow.graph.edge_index.tolist(), flow.graph.capacity.tolist(), flow.edge_flow.tolist(), strict=True)
        for source, target, capacity, edge_flow in edges:
            draw_edge(axis, source, target, capacity, edge_flow)

        colours = [BLUE, BLUE, GREY, GREY, GREY, GREEN]
        potentials, influences = flow.potentials
        for token, colour in enumerate(colours):
            h, g = fraction(float(potentials[token])), fraction(float(influences[token]))
            draw_token(axis, token, colour, f"h={h}  g={g}  f={fraction(float(flow.throughput[token]))}")

        headings = [(0.0, "question", BLUE), (4.8, "reasoning", GREY), (9.6, "answer", GREEN)]
        for x, text, colour in headings:
            axis.text(x, 2.85, text, ha="center", fontsize=12, color=colour)
        axis.text(
            4.8, -1.95, "c: capacity     F: flow (line width)     h: potential     g: influence per unit of potential"
            "     f = g h: throughput", ha="center", fontsize=9,
        )  # fmt: skip

        figure.savefig(IMAGES / "flow.svg", metadata={"Date": None})
        figure.savefig(IMAGES / "flow.png", dpi=130)
        plt.close(figure)
    print(IMAGES / "flow.svg", IMAGES / "flow.png")


if __name__ == "__main__":
    main()
