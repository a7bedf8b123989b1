"""Trace four answers of the demo model and draw them into docs/images/; print the numbers of docs/four-answers.md.

pip install --group demo --group bench
python -m benchmarks.figures.four_answers
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib  # pyright: ignore[reportMissingImports]
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

import flowgraph as fg
from flowgraph import plot_steps, plot_throughput, save_figure
from flowgraph.demo import PROMPT, load_demo_model
from flowgraph.steps.step_flow import step_flow

IMAGES = Path(__file__).parents[2] / "docs" / "images"


class Case(NamedTuple):
    """A question to the demo model.

    Attributes:
        name: part of the file names.
        prompt: the user's message.
        answer: regular expression that finds the answer; None: found by default rules.
    """

    name: str
    prompt: str
    answer: str | None = None


CASES = (
    Case("apples", PROMPT),
    Case(
        "wallet",
        "The key is in the kitchen. The wallet is in the car. Where is the wallet? "
        "Think step by step and end with Answer: and the place.",
    ),
    Case(
        "list",
        "Repeat this list of words exactly, separated by commas: copper, lantern, violet, harbor, nine.",
        answer=r"is: (.*)\.",
    ),
    Case(
        "sheep",
        "A farmer has 17 sheep. All but 9 run away. How many sheep are left? "
        "Think step by step and end with 'Answer:' and the number.",
    ),
)


def draw(case: Case, trace: fg.FlowTrace) -> None:
    """Draw throughput, and steps where the trace has reasoning."""
    IMAGES.mkdir(exist_ok=True)
    pictures = [("", plot_throughput(trace))]
    if bool(trace.reasoning.any()):
        pictures.append(("_steps", plot_steps(trace)))
    for ending, axes in pictures:
        # Text stays text in the SVG: the files are smaller, and the browser chooses the font.
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            path = save_figure(axes, IMAGES / f"gallery_{case.name}{ending}.svg")
        plt.close(axes.figure)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def describe(case: Case, trace: fg.FlowTrace) -> None:
    """Print the numbers that the page states."""
    source, target = trace.graph.edge_index
    flow = trace.flow.edge_flow
    is_direct = trace.question[source] & trace.answer[target]
    direct = float(flow[is_direct].sum())
    backbone = trace.backbone(0.9)
    routes = trace.routes(1000)
    print(f"\n== {case.name}\n{trace.text[trace.text.rindex('assistant') :]}\n{trace}")
    print(f"direct from question to answer: {direct:.1%} (one hop)")
    print(f"backbone: {backbone.num_edges} of {int((flow > 0).sum())} edges with flow")
    print(f"widest 10 routes: {sum(r.flow for r in routes[:10]):.1%}; widest 1,000: {sum(r.flow for r in routes):.1%}")
    for route in routes[:6]:
        print(f"  {route.flow:.2%} {[(token, trace.tokens[token]) for token in route.tokens]}")
    for name, mask in (("question", trace.question), ("reasoning", trace.reasoning)):
        # Tokens outside the region sort last.
        value = torch.where(mask, trace.throughput, -1.0)
        num_shown = min(8, int(mask.sum()))
        best = value.argsort(descending=True)[:num_shown].tolist()
        print(name, [(t, trace.tokens[t], round(float(value[t]), 3)) for t in best])
    print(step_flow(trace.flow, tokens=trace.tokens, spans=trace.spans, text=trace.text))


def main() -> None:
    model, tokenizer = load_demo_model(print)
    for case in CASES:
        chat = [{"role": "user", "content": case.prompt}]
        trace = fg.trace(model, tokenizer, chat, answer=case.answer, max_new_tokens=160)
        draw(case, trace)
        describe(case, trace)


if __name__ == "__main__":
    main()
