"""Fill the column "measured" of docs/papers.md from the committed results.

    python -m benchmarks.paper_index

The rows are written by hand. A row that SOURCES names gets its figures from there, every other row "not measured".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
CREDIT_PAGE = PAGE.parent / "credit.md"
AUC_HEAD = "| rule | `wandering`, 0:5 | `program` | `pathsearch` |"
HEAD = "| method | paper, equation | line | measured |"
NOT_MEASURED = "not measured"
HUB_TEST = "[equal to masking at matched positions](interventions.md#on-the-demo-model)"
SOURCES = {
    # Figures of the evaluation, by the name of its method.
    "conserved flow, throughput": {"evaluation": "attention"},
    "reach": {"evaluation": "attention:h"},
    "sharpened attention": {"evaluation": "sharp"},
    "sharpened maximum": {"evaluation": "sharp_max"},
    "VTRACE edges": {"evaluation": "vtrace"},
    "VTRACE edges as squared shares": {"evaluation": "vtrace_share"},
    "conserved relevance": {"evaluation": "relevance"},
    "positive part of the attention gradient": {"evaluation": "gradient_positive"},
    "gradient x input": {"evaluation": "gradient_x_input"},
    "one hop": {"evaluation": "attention:one_hop"},
    "CAGE": {"evaluation": "attention:cage"},
    "attention rollout": {"evaluation": "rollout"},
    # Figures of training and of gradients, by the name of an arm.
    "token credit by flow": {"auc": "flow", "chain": "flow", "multiplier": "flow"},
    "recommended credit": {"auc": "reach_sharp", "wandering": "recommended", "program": "recommended"},
    "flow on sharpened attention": {"auc": "flow_sharp", "wandering": "flow_sharp wide", "program": "flow_sharp wide"},
    "largest sharpened attention of a later token": {"auc": "max_attention_sharp", "program": "max_attention_sharp"},
    "largest attention of a later token": {
        "auc": "max_attention",
        "wandering": "max_attention",
        "program": "max_attention",
        "chain": "max attention, soft",
        "multiplier": "max_attention:soft",
    },
    "correlation with the answer's attention": {"multiplier": "correlation"},
    "preplan tokens": {"evaluation": "waad", "multiplier": "waad"},
    "anchor tokens": {"evaluation": "fai", "multiplier": "fai"},
    "preplan and anchor tokens, coupled": {"multiplier": "coupled:raw"},
    "attention of the answer, z-scored": {"multiplier": "atpo:soft"},
    "VTRACE credit": {"auc": "vtrace"},
    "top-entropy tokens": {"auc": "entropy"},
    # A table of the documentation whose runs are not committed as data.
    "hub test": {"text": HUB_TEST},
}
"""Where the figures of a row come from, by the text of its first cell."""

CONTROLS = (
    ("the best control, the last lines, has", "line_knockout", "recency"),
    ("the best control, the longest tokens, has", "detour", "length"),
)
"""Words of the legend before a figure, with the task and the control that it belongs to."""


def results(name: str) -> dict[str, Any]:
    """Read a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def evaluated(task: str, method: str) -> str:
    """Return the primary metric of a method on a task.

    Raises:
        KeyError: no such figure.
    """
    for row in results("faithfulness")["rows"]:
        is_primary = row["primary"] and row["items"] == "all"
        if is_primary and (row["task"], row["method"]) == (task, method):
            return short(row["value"])
    raise KeyError(f"method: must be in faithfulness.json, got {method!r} on {task!r}; see SOURCES")


def trained(study: str, arm: str, level: str | None = None) -> str:
    """Return the gain of an arm over plain PPO with its interval.

    Raises:
        KeyError: no such arm.
    """
    for test in results(study)["tests"]:
        is_gain = test["against"] == "uniform" and test.get("metric", "area") == "area"
        if is_gain and test["arm"] == arm and test.get("level") == level:
            gain, half = test["difference"], test["half_width"]
            return f"{signed(gain)} ({signed(gain - half)} to {signed(gain + half)})"
    raise KeyError(f"arm: must be compared with uniform in {study}.json, got {arm!r}; see SOURCES")


def multiplier(arm: str) -> str:
    """Return the sample multiplier of an arm before training, with its interval.

    Raises:
        KeyError: no such arm.
    """
    for row in results("alignment_start/alignment")["arms"]:
        if row["name"] == arm:
            figures = row["multiplier"]
            low = figures["corrected"] - 1.96 * figures["error"]
            high = figures["corrected"] + 1.96 * figures["error"]
            return f"{figures['corrected']:.2f} ({low:.2f} to {high:.2f})"
    raise KeyError(f"arm: must be in alignment_start, got {arm!r}; see SOURCES")


def auc(rule: str) -> str:
    """Return the AUC of a rule on `wandering` and `program`, from the table of the page on credit rules.

    Raises:
        KeyError: no such rule in the table.
    """
    table = CREDIT_PAGE.read_text(encoding="utf-8").partition(AUC_HEAD)[2]
    for line in table.split("\n\n")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith(f"`{rule}`"):
            wandering, program = (cell.replace("*", "") for cell in cells[1:3])
            return f"{wandering} on wandering, {program} on program"
    raise KeyError(f"rule: must be in the table of docs/credit.md, got {rule!r}; see SOURCES")


def measured(method: str) -> str:
    """Return the last cell of a row.

    Args:
        method: the text of its first cell.
    """
    figures = []
    for source, name in SOURCES.get(method, {}).items():
        if source == "evaluation":
            figures += [f"lines {evaluated('line_knockout', name)}", f"detour {evaluated('detour', name)}"]
        elif source == "auc":
            figures.append(f"AUC {auc(name)}")
        elif source == "wandering":
            figures.append(f"wandering {trained('credit_study', name, '0:5')}")
        elif source == "program":
            figures.append(f"program {trained('credit_study', name, 'program')}")
        elif source == "chain":
            figures.append(f"chain {trained('rl_study', name)}")
        elif source == "multiplier":
            figures.append(f"multiplier {multiplier(name)}")
        else:
            figures.append(name)
    return "; ".join(figures) or NOT_MEASURED


def short(value: float) -> str:
    """Write a share with two digits and without its zero."""
    return f"{value:.2f}".removeprefix("0")


def signed(value: float) -> str:
    """Write a difference with three digits and without its zero."""
    return f"{value:+.3f}".replace("+0.", "+.").replace("-0.", "-.")


def rows_of(text: str) -> list[list[str]]:
    """List the rows of the tables of methods, as their cells."""
    rows = []
    inside = False
    for line in text.splitlines():
        is_row = line.startswith("| ")
        if is_row and inside:
            # A bar inside code is part of a cell.
            cells = re.findall(r"(?:`[^`]*`|[^|`])+", line.strip("|"))
            rows.append([cell.strip() for cell in cells])
        inside = line == HEAD or (inside and line.startswith("|"))
    return rows


def page(text: str) -> str:
    """Return the page with its last columns filled.

    Args:
        text: the page as it is.
    """
    for cells in rows_of(text):
        method, paper, code = cells[:3]
        before = re.compile(re.escape(f"| {method} | {paper} | {code} |") + ".*")
        line = f"| {method} | {paper} | {code} | {measured(method)} |"
        text = before.sub(lambda _, line=line: line, text)
    for words, task, control in CONTROLS:
        figure = evaluated(task, control)
        text = re.sub(rf"(?<={re.escape(words)} )[\w.]+(?=[; ])", figure, text)
    return text


def main() -> None:
    """Write the page again."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
