"""Which layers and which heads are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError

LayerRule = str | int | range | Sequence[int]


@dataclass(frozen=True)
class HeadSelector:
    """Keep, in each layer, the heads with the highest or lowest value of a statistic, and average those.

    Each sequence of a batch chooses for itself.

    Attributes:
        statistic: ``"distance"``: mean attention distance ``mean over t of sum over s of A[t, s] * (t - s)``
            (arXiv 2510.13554); ``"kurtosis"``: excess kurtosis over tokens of the attention that each receives
            from later tokens, the first token left out (arXiv 2506.19143 uses it to find receiver heads).
        keep: ``"highest"`` or ``"lowest"``.
        share: share of the heads kept, at least one.
    """

    statistic: Literal["distance", "kurtosis"] = "distance"
    keep: Literal["highest", "lowest"] = "highest"
    share: float = 0.3

    def __post_init__(self) -> None:
        """Refuse values outside the stated sets."""
        if self.statistic not in ("distance", "kurtosis") or self.keep not in ("highest", "lowest"):
            raise InvalidInputError(
                f"heads: statistic must be 'distance' or 'kurtosis' and keep 'highest' or 'lowest', got "
                f"{self.statistic!r} and {self.keep!r}; see HeadSelector"
            )
        if not 0 < self.share <= 1:
            raise InvalidInputError(
                f"heads: share must lie in (0, 1], got {self.share!r}; 0.3 keeps three heads in ten"
            )

    def choose(self, scores: Float[Tensor, " heads"]) -> Int64[Tensor, " kept"]:
        """Indices of the heads kept, ascending; ties go to the lower index."""
        count = max(1, round(self.share * scores.numel()))
        order = torch.argsort(scores, descending=self.keep == "highest", stable=True)
        return order[:count].sort().values


NAMED_HEADS = {
    "global": HeadSelector("distance", "highest"),
    "local": HeadSelector("distance", "lowest"),
    "receiver": HeadSelector("kurtosis", "highest"),
}


def resolve_heads(
    heads: str | int | Sequence[int] | HeadSelector, num_heads: int | None
) -> str | list[int] | HeadSelector:
    """Check a head choice against the model: ``"mean"``, ``"max"``, a named selector, indices, or a selector.

    Args:
        heads: the choice.
        num_heads: query heads of a layer, or None where layers differ (the forward pass checks then).

    Raises:
        InvalidInputError: an unknown name or an index outside.
    """
    if isinstance(heads, HeadSelector):
        return heads
    if isinstance(heads, str):
        if heads in NAMED_HEADS:
            return NAMED_HEADS[heads]
        if heads in ("mean", "max"):
            return heads
        names = ", ".join(map(repr, ("mean", "max", *NAMED_HEADS)))
        raise InvalidInputError(
            f"heads: must be {names}, indices or a HeadSelector, got {heads!r}; 'mean' is the default"
        )
    return _indices(heads, num_heads, "heads")


def resolve_layers(layers: LayerRule, num_layers: int) -> list[int]:
    """Layer indices, ascending: ``"middle"`` (the middle third), ``"all"``, ``"a-b"`` (both included), or indices.

    Raises:
        InvalidInputError: an unknown name, an empty choice or an index outside.

    Example:
        >>> resolve_layers("middle", 30)[:3], resolve_layers("2-4", 30)
        ([10, 11, 12], [2, 3, 4])
    """
    if not isinstance(layers, str):
        return _indices(layers, num_layers, "layers")
    if layers == "all":
        return list(range(num_layers))
    if layers == "middle":
        first = num_layers // 3
        return list(range(first, max(first + 1, num_layers - first)))
    parts = layers.replace(" ", "").split("-")
    if all(part.isdecimal() for part in parts) and len(parts) <= 2:
        first, last = int(parts[0]), int(parts[-1])
        if first > last:
            raise InvalidInputError(f"layers: FIRST must not exceed LAST, got {layers!r}; write '{last}-{first}'")
        return _indices(range(first, last + 1), num_layers, "layers")
    raise InvalidInputError(
        f"layers: must be 'middle', 'all', 'FIRST-LAST' or indices, got {layers!r}; e.g. layers='10-19'"
    )


def _indices(values: int | Iterable[int], count: int | None, name: str) -> list[int]:
    try:
        chosen = sorted({index(value) for value in (values if isinstance(values, Iterable) else (values,))})
    except TypeError:
        raise InvalidInputError(f"{name}: indices must be integers, got {values!r}; e.g. {name}=[0, 2]") from None
    if not chosen:
        raise InvalidInputError(f"{name}: must name at least one, got none; leave it out for the default")
    if chosen[0] < 0 or (count is not None and chosen[-1] >= count):
        inside = f"lie in 0..{count - 1}" if count is not None else "not be negative"
        raise InvalidInputError(
            f"{name}: must {inside}, got {chosen[0]}..{chosen[-1]}; indices count from the model's first {name[:-1]}"
        )
    return chosen
