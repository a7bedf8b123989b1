"""What the rows of each capacity cost: products, memory accesses, and passes of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowgraph.cost.json_records import shown
from flowgraph.errors import InvalidInputError

_SOFTMAX = 8
"""Accesses of a cell and head: product written, scaled, masked, softmax, read by the product with one column."""

_INNER = 4
"""Accesses of a cell and head in A <v, reader>: the second product written, both read, their product written."""


@dataclass(frozen=True)
class CapacityCost:
    """What a capacity needs beside one forward pass.

    Attributes:
        accesses: float32 numbers read and written for each cell and head.
        products: products over all cells like Q K^T.
        reads_before: reads of all rows before the first one that is asked for.
        projects: applies the output projection once more, and its transpose (VTRACE).
        backward: None; ``"values"``: a backward pass without gradients of queries and keys; ``"full"``: one with them.
        sweeps: False where the rows are a flow already, so that nothing is solved.
    """

    accesses: int
    products: int = 1
    reads_before: int = 0
    projects: bool = False
    backward: Literal["values", "full"] | None = None
    sweeps: bool = True


_MEAN = _SOFTMAX + 1
_POWER_THEN_MEAN = _SOFTMAX + 2 + 1
_PRODUCTS = _SOFTMAX + _INNER + 1

CAPACITY_COSTS = {
    "attention": CapacityCost(_MEAN),
    "value_norm": CapacityCost(_SOFTMAX + 3 + 1),
    "sharpened": CapacityCost(_POWER_THEN_MEAN),
    "sharp": CapacityCost(_POWER_THEN_MEAN),
    "sharp_max": CapacityCost(_MEAN),
    "centred": CapacityCost(_MEAN, reads_before=1),
    "vtrace": CapacityCost(_PRODUCTS, products=2, projects=True),
    "vtrace_share": CapacityCost(_PRODUCTS, products=2, projects=True),
    "gradient": CapacityCost(_PRODUCTS, products=2, backward="full", sweeps=False),
    "gradient_positive": CapacityCost(_PRODUCTS, products=2, backward="full"),
    "relevance": CapacityCost(_PRODUCTS, products=2, backward="values", sweeps=False),
}
"""Costs by name of the capacity; ``sharpened`` with its power before the mean over heads."""


def find_capacity_cost(name: str) -> CapacityCost:
    """Return what a capacity costs.

    Raises:
        InvalidInputError: no figures for this name.
    """
    if not isinstance(name, str) or name not in CAPACITY_COSTS:
        raise InvalidInputError(
            f"capacity: must be one of {', '.join(CAPACITY_COSTS)}, got {shown(name)}; for one of your own take the "
            "nearest of these"
        )
    return CAPACITY_COSTS[name]
