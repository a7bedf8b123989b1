"""Run the study of docs/faithfulness.md on the demo model, and keep its tables and figures.

    python -m benchmarks.evaluation.faithfulness --folder build/faithfulness             half an hour to an hour
    python -m benchmarks.evaluation.faithfulness --part edges --folder build/edges       one to two hours
    python -m benchmarks.evaluation.faithfulness --folder build/look --items 5           a look, which keeps nothing

The part "tokens" asks which tokens and lines matter, "edges" which part of the text reads which. A run continues where
it was stopped. Only a complete one replaces the table and the figures of the documentation. The settings of the
capacities are those named in docs/capacities.md, fixed before; a first look at 8 items a task of the dev split changed
none of them. Test was read once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import flowgraph as fg
from benchmarks.common import RESULTS
from flowgraph.demo import load_demo_model

TASKS = ("line_knockout", "detour", "question_knockout_short")
EDGE_TASKS = ("edge_knockout", "step_suppression")
METHODS = (
    # Attention, composed in four ways: the paper's flow, its potential, CAGE, and one hop.
    "attention",
    "attention:h",
    "attention:cage",
    "attention:one_hop",
    # Sharpened capacities, with composition and without.
    "sharp",
    "sharp:one_hop",
    "sharp_max",
    "sharp_max:cage",
    "vtrace",
    "vtrace:one_hop",
    "vtrace_share",
    "vtrace_share:one_hop",
    # What takes a backward pass.
    "relevance",
    "relevance:absorbed",
    "gradient_positive",
    "gradient_x_input",
    "gradient_norm",
    # Published baselines.
    "attention_late",
    "attention_all",
    "rollout",
    "fai",
    "waad",
    "preset:trivial",
)
EDGE_METHODS = (
    "attention",
    "attention:one_hop",
    "attention_late",
    "sharp",
    "sharp_max",
    "vtrace",
    "vtrace_share",
    "relevance",
    "gradient",
    "gradient_positive",
    "preset:trivial",
)
"""Methods that score edges; a capacity and its compositions have the same edges."""

PARTS = {
    "tokens": (TASKS, METHODS, "faithfulness.json"),
    "edges": (EDGE_TASKS, EDGE_METHODS, "faithfulness_edges.json"),
}
"""Tasks, methods and the file of results, by name."""

ITEMS = 60
IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Run the study; copy table and figures of a complete run to where the documentation reads them."""
    parser = argparse.ArgumentParser(description="Run the faithfulness study on the demo model.")
    parser.add_argument("--folder", type=Path, required=True, help="of the run; continues there")
    parser.add_argument("--part", choices=list(PARTS), default="tokens", help="which tasks and methods to run")
    parser.add_argument("--items", type=int, default=ITEMS, help=f"items of each task; {ITEMS} make a complete run")
    arguments = parser.parse_args()

    tasks, methods, results = PARTS[arguments.part]
    model, tokenizer = load_demo_model()
    evaluation = fg.evaluate(
        model,
        tokenizer,
        tasks=list(tasks),
        methods=list(methods),
        items=arguments.items,
        split="test",
        out=arguments.folder,
    )
    print(evaluation)
    failed = sum(sum(summary.failed.values()) for summary in evaluation.summaries)
    if failed:
        sys.exit(f"{failed} items failed; nothing was kept: see the notes of the tables, and run again")
    if arguments.items != ITEMS:
        return
    shutil.copyfile(arguments.folder / "table.json", RESULTS / results)
    for task in tasks:
        axis = fg.plot_evaluation(evaluation, task=task)
        fg.save_figure(axis, IMAGES / f"faithfulness_{task}.png")


if __name__ == "__main__":
    main()
