"""Compare captured attention with eager attention, family by family; write results/families.json and docs/models.md.

    python -m benchmarks.speed.families

Tiny random models (two to four layers, sharp attention), a batch of two texts padded left and right, all layers.
float32: largest difference from the mean of eager ``output_attentions`` on each text alone. bfloat16: largest
difference from float64 weights of the same queries and keys. The tests assert the same, family by family.
``family_capacities`` measures what else is on the page.
"""

from __future__ import annotations

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

from benchmarks import models_page
from benchmarks.common import save
from flowgraph.attention.capture import capture


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
    models_page.write()


if __name__ == "__main__":
    main()
