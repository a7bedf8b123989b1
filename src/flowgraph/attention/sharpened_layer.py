"""Attention to a power: rows in which a lookup by one or a few heads is not averaged away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from flowgraph.attention.layer_record import LayerRecord, in_steps
from flowgraph.errors import InvalidInputError

PowerPlace = Literal["pre", "post", "max"]

GREATEST_POWER = 64
"""Higher powers of weights below 1 are 0 in float32 almost everywhere."""


def checked_power(power: Any) -> float:
    """Return a power as a float.

    Raises:
        InvalidInputError: no number, or one outside [1, 64].
    """
    is_number = isinstance(power, (int, float)) and not isinstance(power, bool)
    if not is_number or not 1 <= power <= GREATEST_POWER:
        raise InvalidInputError(
            f"power: must lie in [1, {GREATEST_POWER}], got {power!r}; 1 changes nothing, 2 and 4 are usual"
        )
    return float(power)


def checked_place(place: Any) -> PowerPlace:
    """Return the place of a power.

    Raises:
        InvalidInputError: another place.
    """
    if place not in get_args(PowerPlace):
        raise InvalidInputError(f"place: must be 'pre', 'post' or 'max', got {place!r}; 'pre' is the default")
    return place


def sharpened(
    weights: Float[Tensor, "batch heads block stop"], power: float, place: PowerPlace
) -> Float[Tensor, "batch block stop"]:
    """Join the heads of a block of weights, with the power before or after.

    ``"pre"``: mean over h of A_h^p; ``"post"``: (mean over h of A_h)^p; ``"max"``: (max over h of A_h)^p.
    """
    if place == "pre":
        return weights.pow(power).mean(1)
    if place == "post":
        return weights.mean(1).pow(power)
    return weights.amax(1).pow(power)


@dataclass(frozen=True)
class SharpenedLayer:
    """Attention of one layer to a power, before or after the heads are joined.

    Attributes:
        record: queries, keys and mask.
        power: p, at least 1.
        place: where the power is taken; ``"max"`` joins the heads by their maximum.
    """

    record: LayerRecord
    power: float
    place: PowerPlace

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.record.shape

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.record.device

    def select(self, items: slice | Tensor) -> SharpenedLayer:
        """Return the layer of some sequences of the batch."""
        return replace(self, record=self.record.select(items))

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Recompute the rows of the queries ``[start, stop)`` over the keys ``[0, stop)``."""

        def joined(first: int, last: int) -> Tensor:
            return sharpened(self.record.weights(first, last), self.power, self.place)

        return in_steps(self.record, joined, start, stop)

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Recompute the part of each head in the same rows; the parts sum to :meth:`block`.

        Raises:
            InvalidInputError: a power that is taken after the heads are joined.
        """
        is_sum = self.place == "pre" or (self.place == "post" and self.power == 1)
        if not is_sum:
            raise InvalidInputError(
                f"heads: must be summed to be told apart, got place={self.place!r} with power {self.power:g}, which "
                "joins them before the power; use place='pre', or by_layer"
            )
        return self.record.weights(start, stop).pow(self.power) / self.record.num_heads
