"""Find the capacities that each family allows, and the residual of its conserved relevance.

    python -m benchmarks.speed.family_capacities

The models are those of the family tests: tiny, with random weights, and for relevance with random biases. A batch of
two texts padded on the right; relevance of the last token's log-probability, with three emission hops. The residual is
the largest difference of both sides of the conservation law at a token. Writes results/family_capacities.json and
docs/models.md.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tests.capacities.test_relevance import last_token, with_biases
from tests.fixtures.models import FAMILIES, family, padded

from benchmarks import models_page
from benchmarks.common import save
from flowgraph import CaptureError, capture

OF_ANSWERS = ("gradient", "gradient_positive")
"""Capacities that weigh edges for one answer."""


def refusals(name: str) -> dict[str, str]:
    """Map each capacity that a family does not allow to the message that says why."""
    ids, mask = padded("right")
    refused = {}
    for capacity in models_page.CAPACITIES:
        options: dict[str, Any] = {"answer": last_token(mask)} if capacity in OF_ANSWERS else {}
        try:
            capture(family(name), ids, mask, capacity=capacity, **options)
        except CaptureError as error:
            refused[capacity] = str(error)
    return refused


def relevance_residual(name: str) -> tuple[float | None, str]:
    """Measure the residual of conserved relevance, or return the message of its refusal."""
    ids, mask = padded("right")
    generated = (mask.cumsum(-1) > 6) & (mask == 1)
    try:
        rows = capture(
            with_biases(name), ids, mask, capacity="relevance", answer=last_token(mask), generated=generated,
            target="logprob", hops=3,
        )  # fmt: skip
    except CaptureError as error:
        return None, str(error)
    return float(rows.residual), ""


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in FAMILIES:
        with warnings.catch_warnings():
            # The random models do not prefer the answers that they are asked about.
            warnings.simplefilter("ignore", UserWarning)
            residual, message = relevance_residual(name)
            refused = refusals(name)
        rows.append({"family": name, "residual": residual, "relevance_refused": message, "refused": refused})
    save(
        "family_capacities",
        rows,
        "capacities that a family allows, and the residual of conserved relevance, tiny random models",
        hide=("relevance_refused", "refused"),
    )
    models_page.write()


if __name__ == "__main__":
    main()
