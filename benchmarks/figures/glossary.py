"""Draw the pictures of the glossary, one for each term, into docs/images/glossary/.

    python -m benchmarks.figures.glossary

All but the last show the worked example of ``flow_picture``: its numbers are solved by the library, and each picture
shows the one quantity that its term names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import matplotlib  # pyright: ignore[reportMissingImports]

matplotlib.use("agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch  # pyright: ignore[reportMissingImports]

import flowgraph as fg
from benchmarks.figures.flow_picture import (
    ANSWER,
    BLUE,
    CAPACITY,
    GREEN,
    GREY,
    PLACES,
    QUESTION,
    TOKENS,
    VERMILLION,
    fraction,
    solved,
)
from benchmarks.figures.plots import IMAGES

FOLDER = IMAGES / "glossary"
BOX_WIDTH = 1.9
BOX_HEIGHT = 1.0
PALE = "#c9ccd4"
Edge = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """What one picture shows of the example.

    Attributes:
        edge_labels: text beside an edge.
        edge_widths: line width of an edge in points; an edge without one is drawn pale and thin.
        token_labels: second line in a token's box.
        marked: tokens whose box is filled.
        note: a line below the graph.
    """

    edge_labels: Mapping[Edge, str] = field(default_factory=dict)
    edge_widths: Mapping[Edge, float] = field(default_factory=dict)
    token_labels: Mapping[int, str] = field(default_factory=dict)
    marked: tuple[int, ...] = ()
    note: str = ""


def pictures(flow: fg.Flow) -> dict[str, Picture]:
    """Describe the picture of each term."""
    edges: list[Edge] = [(int(source), int(target)) for source, target in flow.graph.edge_index.T.tolist()]
    edge_flow = dict(zip(edges, flow.edge_flow.tolist(), strict=True))
    potential, influence = (values.tolist() for values in flow.potentials)
    throughput = flow.throughput.tolist()
    carrying = {edge: 9 * value for edge, value in edge_flow.items() if value > 0}
    flow_labels = {edge: fraction(value) for edge, value in edge_flow.items() if value > 0}

    # The backbone: the fewest edges, strongest first, whose own routes carry the stated share.
    backbone = fg.backbone(flow, keep=0.5)
    kept = [edge for edge, is_kept in zip(edges, backbone.edge_mask.tolist(), strict=True) if is_kept]
    hub = fg.hubs(flow, 1)[0].token
    checkpoint = fg.checkpoints(flow, 1)[0].token
    alpha = float(flow.alpha)

    def of_tokens(name: str, values: list[float]) -> dict[int, str]:
        return {token: f"{name} = {fraction(value)}" for token, value in enumerate(values)}

    return {
        "capacity": Picture(
            edge_labels={edge: f"c = {fraction(value)}" for edge, value in CAPACITY.items()},
            edge_widths={edge: 6 * value for edge, value in CAPACITY.items()},
            note="how much of its reading a token spends on an earlier one",
        ),
        "potential": Picture(
            token_labels=of_tokens("h", potential),
            edge_widths=dict.fromkeys(CAPACITY, 1.2),
            note="sum over all paths to the answer, capacities multiplied",
        ),
        "influence": Picture(
            token_labels=of_tokens("g", influence),
            edge_widths=dict.fromkeys(CAPACITY, 1.2),
            note="what arrives from the question, per unit of potential",
        ),
        "flow": Picture(
            edge_labels=flow_labels,
            edge_widths=carrying,
            note="one unit from question to answer, on edges that reach the answer",
        ),
        "throughput": Picture(
            token_labels=of_tokens("f", throughput),
            edge_widths=carrying,
            note="share of the unit that passes through a token: f = g h",
        ),
        "conserved": Picture(
            edge_labels={edge: flow_labels[edge] for edge in flow_labels if 3 in edge},
            edge_widths={edge: carrying[edge] for edge in carrying if 3 in edge},
            marked=(3,),
            note="1/2 + 1/4 flows in, 3/8 + 3/8 flows out",
        ),
        "backbone": Picture(
            edge_labels={edge: flow_labels[edge] for edge in flow_labels if edge in kept},
            edge_widths={edge: carrying[edge] for edge in carrying if edge in kept},
            note=f"the strongest edges; their own routes carry {fraction(backbone.share)} of the flow",
        ),
        "hub": Picture(
            token_labels={hub: f"f = {fraction(throughput[hub])}"},
            edge_widths=carrying,
            marked=(hub,),
            note="the reasoning token with most throughput",
        ),
        "checkpoint": Picture(
            edge_labels={edge: flow_labels[edge] for edge in flow_labels if checkpoint in edge},
            edge_widths={edge: carrying[edge] for edge in carrying if checkpoint in edge},
            marked=(checkpoint,),
            note="throughput that arrives by several edges",
        ),
        "certificate": Picture(
            edge_labels={(3, 5): "3/8", (4, 5): "5/8"},
            edge_widths={(3, 5): carrying[(3, 5)], (4, 5): carrying[(4, 5)]},
            marked=(5,),
            note="recomputed apart from the solver: exactly one unit arrives",
        ),
        "alpha": Picture(
            edge_labels={edge: f"{fraction(edge_flow[edge])} of {fraction(CAPACITY[edge])}" for edge in carrying},
            edge_widths=carrying,
            note=f"flow times alpha = {fraction(alpha)} fits into every capacity",
        ),
    }


def draw(axis: Axes, picture: Picture) -> None:
    """Draw the example with what one picture shows."""
    axis.set_xlim(-1.2, 10.8)
    axis.set_ylim(-2.9, 3.0)
    axis.axis("off")
    for edge in CAPACITY:
        _draw_edge(axis, edge, picture.edge_widths.get(edge, 0.0), picture.edge_labels.get(edge, ""))
    for token in range(len(TOKENS)):
        _draw_token(axis, token, picture.token_labels.get(token, ""), is_marked=token in picture.marked)
    axis.text(4.8, -2.75, picture.note, ha="center", va="bottom", fontsize=9.5, color=GREY)


def _draw_edge(axis: Axes, edge: Edge, width: float, label: str) -> None:
    """Draw an arrow between two boxes, with its label on it."""
    (x, y), (to_x, to_y) = PLACES[edge[0]], PLACES[edge[1]]
    arrow = FancyArrowPatch(
        (x + BOX_WIDTH / 2, y),
        (to_x - BOX_WIDTH / 2, to_y),
        arrowstyle="-|>",
        mutation_scale=11,
        linewidth=max(width, 0.9),
        color=VERMILLION if width > 0 else PALE,
        shrinkA=0,
        shrinkB=0,
    )
    axis.add_patch(arrow)
    if label:
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1}
        axis.text((x + to_x) / 2, (y + to_y) / 2, label, ha="center", va="center", fontsize=9, bbox=behind, zorder=2)


def _draw_token(axis: Axes, token: int, label: str, *, is_marked: bool) -> None:
    """Draw a token as a box with its text and, below it, its number."""
    colour = GREY
    if token in QUESTION:
        colour = BLUE
    if token in ANSWER:
        colour = GREEN
    x, y = PLACES[token]
    box = FancyBboxPatch(
        (x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2),
        BOX_WIDTH,
        BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="#fbe3d3" if is_marked else "white",
        edgecolor=colour,
        linewidth=1.8,
        zorder=3,
    )
    axis.add_patch(box)
    lift = 0.2 if label else 0.0
    axis.text(x, y + lift, TOKENS[token], ha="center", va="center", fontsize=11, weight="bold", color=colour, zorder=4)
    if label:
        axis.text(x, y - 0.25, label, ha="center", va="center", fontsize=9, zorder=4)


def draw_alignment(axis: Axes) -> None:
    """Draw two gradients of the same rollouts and the angle of each to the gradient of all other rollouts."""
    axis.set_xlim(-0.4, 4.6)
    axis.set_ylim(-0.75, 2.6)
    axis.set_aspect("equal")
    axis.axis("off")
    directions = [(0.0, 4.0, GREY, "gradient of all other rollouts"), (22.0, 3.2, VERMILLION, "with credit"),
                  (48.0, 3.0, BLUE, "plain")]  # fmt: skip
    for degrees, length, colour, label in directions:
        angle = math.radians(degrees)
        tip = (length * math.cos(angle), length * math.sin(angle))
        axis.add_patch(FancyArrowPatch((0, 0), tip, arrowstyle="-|>", mutation_scale=12, linewidth=2, color=colour))
        below = degrees == 0
        axis.text(tip[0], tip[1] + (-0.12 if below else 0.08), label, ha="right" if below else "left",
                  va="top" if below else "bottom", fontsize=9.5, color=colour)  # fmt: skip
    axis.add_patch(Arc((0, 0), 1.6, 1.6, theta1=0, theta2=22, color=VERMILLION, linewidth=1.5))
    axis.add_patch(Arc((0, 0), 2.2, 2.2, theta1=0, theta2=48, color=BLUE, linewidth=1.5))
    axis.text(2.1, -0.72, "the smaller the angle, the fewer rollouts are needed", ha="center", fontsize=9.5, color=GREY)


def save(name: str, drawn: Callable[[Axes], None]) -> None:
    """Write one picture as SVG."""
    with plt.rc_context({"svg.hashsalt": "flowgraph", "svg.fonttype": "path", "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(6.2, 3.1), layout="constrained")
        drawn(axis)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Solve the example and draw every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures(solved()).items():
        save(name, lambda axis, picture=picture: draw(axis, picture))
    save("alignment", draw_alignment)
    print(FOLDER)


if __name__ == "__main__":
    main()
