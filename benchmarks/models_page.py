"""Write docs/models.md from the committed results of the family benchmarks.

    python -m benchmarks.models_page

The families are those of the tests, in their order; tests/benchmarks/test_models_page.py fails where the page, the
results and the tests differ.
"""

from __future__ import annotations

import json
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
INTRODUCTION = """# Models

flowgraph reads the attention of any Hugging Face causal LM with softmax attention over tokens. During a forward
pass under the model's own attention kernel, it records the queries and keys of the chosen layers. It recomputes
rows in blocks with the **eager function of the architecture**, which applies soft-caps, sliding windows,
learned sinks and position biases. Every capture multiplies some rows by the values and compares the result with
the output of the layer; a mismatch raises `CaptureError`.

The architecture determines one of three paths:

- **interface**: the model dispatches through the attention interface of transformers (nearly all current
  models). Logits are bit-identical with and without recording.
- **fused**: the model calls torch's fused attention itself (Falcon); flowgraph records the arguments of that
  call.
- **hands out weights**: the model computes attention in plain torch and returns the weights (BLOOM, MPT,
  GPT-Neo); flowgraph keeps the weights of one layer at a time.

A model without softmax attention over tokens (Mamba, RWKV), or whose attention is not a single causal DAG,
raises `CaptureError` with its name. Hybrid models are traced through their softmax layers.

## The families tested

The tests run every family below, as a tiny model with random weights; this page is made from the same list. Measured
with {version}, over padded batches:

- **error**: the largest absolute error of a row entry. float32 is compared with eager `output_attentions` on each text
  alone; bfloat16 with float64 weights of the same queries and keys (a bfloat16 eager pass rounds every score, so it is
  itself accurate only to about 1e-2).
- **capacities**: which [capacities](capacities.md) the family allows; relevance has a column of its own.
- **relevance**: the residual of [conserved relevance](capacities.md#conserved-relevance), the largest difference of
  both sides of its law at a token, or why it is refused. On {conserving} of the {all} families it is conserved, with a
  residual of at most {largest}.

"""
CAPACITIES = (
    "attention",
    "value_norm",
    "sharpened",
    "sharp",
    "sharp_max",
    "centred",
    "vtrace",
    "vtrace_share",
    "gradient",
    "gradient_positive",
)
"""Capacities of the package besides relevance, in the order of the page on capacities."""
HEAD = [
    "| family | class | path | error, float32 | error, bfloat16 | capacities | relevance | has |",
    "|---|---|---|---|---|---|---|---|",
]
REASONS = {
    "its attention must go through transformers' AttentionInterface": "refused: attention outside the interface",
    "every layer must mix tokens by softmax attention": "refused: mixes tokens without attention",
    "must be conserved at every token": "refused: a part without a rule",
}
"""Words of a message, and the reason on the page."""


def results(name: str) -> dict[str, Any]:
    """Read a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def page() -> str:
    """Return the text of docs/models.md."""
    captured = results("families")
    measured = {row["family"]: row for row in results("family_capacities")["rows"]}
    residuals = [row["residual"] for row in measured.values() if row["residual"] is not None]
    introduction = INTRODUCTION.format(
        version=f"transformers {captured['machine']['transformers']}",
        conserving=len(residuals),
        all=len(measured),
        largest=rounded_up(max(residuals)),
    )
    lines = [_line(row, measured[row["family"]]) for row in captured["rows"]]
    return introduction + "\n".join([*HEAD, *lines]) + "\n"


def write() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def _line(captured: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the row of one family."""
    refused = measured["refused"]
    allowed = "all"
    if refused:
        allowed = ", ".join(f"`{name}`" for name in CAPACITIES if name not in refused)
    relevance = reason_of(measured["relevance_refused"])
    if measured["residual"] is not None:
        relevance = f"{measured['residual']:.0e}"
    cells = [
        captured["family"],
        captured["class"],
        captured["path"],
        f"{captured['float32']:.0e}",
        f"{captured['bfloat16']:.0e}",
        allowed,
        relevance,
        captured["with"],
    ]
    return f"| {' | '.join(cells)} |"


def rounded_up(value: float) -> str:
    """Write a number with two digits, rounded up, so that "at most" holds.

    Example:
        >>> rounded_up(1.21e-06)
        '1.3e-06'
    """
    digits = Decimal(value)
    step = Decimal(1).scaleb(digits.adjusted() - 1)
    return f"{float(digits.quantize(step, rounding=ROUND_CEILING)):.1e}"


def reason_of(message: str) -> str:
    """Shorten the message of a refusal to a few words.

    Raises:
        KeyError: a message that has no short form yet.
    """
    if not message:
        return ""
    for words, reason in REASONS.items():
        if words in message:
            return reason
    raise KeyError(f"REASONS: must hold a part of every refusal, got {message!r}; add it")


if __name__ == "__main__":
    write()
