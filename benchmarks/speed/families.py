"""Compare captured attention with eager attention, family by family; write docs/models.md and results/families.json.

    python -m benchmarks.speed.families

Tiny random models (two to four layers, sharp attention), a batch of two texts padded left and right, all layers.
float32: largest difference from the mean of eager ``output_attentions`` on each text alone. bfloat16: largest
difference from float64 weights of the same queries and keys. The tests assert the same, family by family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.attention.test_capture_families import (
    FUSED,
    HANDS_OUT_WEIGHTS,
    HYBRID_LAYERS,
    attention_alone,
    joined,
    overheard,
    rows_of,
)
from tests.fixtures.models import FAMILIES, SINKS, WINDOWED, family, padded, sequences

from benchmarks.common import save
from flowgraph.attention.capture import capture

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
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

The table gives the largest absolute error of a row entry, over left- and right-padded batches, with {version}.
float32 is compared with eager `output_attentions` on each text alone; bfloat16 with float64 weights of the same
queries and keys (a bfloat16 eager pass rounds every score, so it is itself accurate only to about 1e-2).

"""


def worst(name: str) -> dict[str, Any]:
    """Measure the largest errors of one family."""
    layers = HYBRID_LAYERS.get(name, (0, 1, 2))
    texts = sequences()
    # float32. Falcon with alibi computes another function under its other kernels, so both sides are eager.
    single = 0.0
    implementation = "eager" if name == "falcon_alibi" else None
    for side in ("left", "right"):
        rows = capture(family(name, implementation), *padded(side), layers="all")
        for item, text in enumerate(texts):
            expected = joined(attention_alone(family(name, "eager"), text, layers))
            single = max(single, (rows_of(rows, item).double() - expected).abs().max().item())

    # bfloat16, against float64 weights of the queries and keys of the same pass.
    model = family(name, None, torch.bfloat16)
    ids, mask = padded("left")
    positions = {} if name in ("bloom", "mpt") else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with overheard(name, model) as weights, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    captured = capture(model, ids, mask, layers="all").dense()
    half = (captured - joined(weights) * mask[:, :, None]).abs().max().item()

    path = "interface"
    if name in HANDS_OUT_WEIGHTS:
        path = "hands out weights"
    elif name in FUSED:
        path = "fused"
    features = []
    if name in WINDOWED:
        features.append("sliding window")
    if name in SINKS:
        features.append("learned sinks")
    return {
        "family": name,
        "class": type(model).__name__,
        "path": path,
        "float32": single,
        "bfloat16": half,
        "with": ", ".join(features),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [worst(name) for name in FAMILIES]
    save("families", rows, "largest absolute error of captured rows, tiny random models")
    from importlib.metadata import version

    lines = ["| family | class | path | float32 | bfloat16 | |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['family']} | {row['class']} | {row['path']} "
        f"| {row['float32']:.0e} | {row['bfloat16']:.0e} | {row['with']} |"
        for row in rows
    ]
    introduction = INTRODUCTION.replace("{version}", f"transformers {version('transformers')}")
    PAGE.write_text(introduction + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
