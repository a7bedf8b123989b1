"""The layers and the heads that are read: names, ranges, indices, and selection of heads by a statistic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.masks import Indices

LayerRule = str | int | range | Sequence[int] | Indices


@dataclass(frozen=True)
class HeadSelector:
    """The heads of each layer with the highest or lowest value of a statistic, which are then averaged.

    The heads are selected for each sequence of a batch separately.

    Attributes:
        statistic: ``"distance"``: mean attention distance ``mean over t of sum over s of A[t, s] * (t - s)``
            (arXiv 2510.13554); ``"kurtosis"``: excess kurtosis over tokens of the attention that each receives
            from later tokens, without the first token (arXiv 2506.19143 uses it to find receiver heads).
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
        """Select heads by their scores.

        Returns:
            Indices of the heads kept, ascending. Of two heads with the same score, the lower index comes first.
        """
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
    """Check a choice of heads against the model, and replace names of selectors by the selectors.

    Args:
        heads: ``"mean"``, ``"max"``, the name of a selector, one index, indices, or a selector.
        num_heads: query heads of a layer, or None where layers differ (the forward pass checks then).

    Returns:
        ``"mean"``, ``"max"``, ascending indices, or a selector.

    Raises:
        InvalidInputError: an unknown name or an index outside.
    """
    if isinstance(heads, HeadSelector):
        return heads
    if not isinstance(heads, str):
        return _indices(heads, num_heads, "heads")
    if heads in NAMED_HEADS:
        return NAMED_HEADS[heads]
    if heads in ("mean", "max"):
        return heads
    names = ", ".join(repr(name) for name in ("mean", "max", *NAMED_HEADS))
    raise InvalidInputError(f"heads: must be {names}, indices or a HeadSelector, got {heads!r}; 'mean' is the default")


def per_query_head(
    values: Shaped[Tensor, "batch key_heads *rest"], num_heads: int
) -> Shaped[Tensor, "batch heads *rest"]:
    """Repeat the values of each key head for the query heads that share it (grouped-query attention).

    Args:
        values: ``[batch, key_heads, ...]``.
        num_heads: query heads, a multiple of ``key_heads``; consecutive query heads share a key head.

    Returns:
        ``[batch, heads, ...]``.
    """
    return values.repeat_interleave(num_heads // values.shape[1], 1)


def resolve_layers(layers: LayerRule, num_layers: int) -> list[int]:
    """Convert a choice of layers to indices.

    Args:
        layers: ``"middle"`` (the middle third), ``"upper"`` (from one third of the layers up to the last), ``"all"``,
            ``"FIRST-LAST"`` (both included), ``"FIRST-"`` (up to the last layer), or indices.
        num_layers: layers of the model.

    Returns:
        Layer indices, ascending.

    Raises:
        InvalidInputError: an unknown name, an empty choice or an index outside.

    Example:
        >>> resolve_layers("middle", 30)[:3], resolve_layers("2-4", 30)
        ([10, 11, 12], [2, 3, 4])
        >>> resolve_layers("upper", 6), resolve_layers("4-", 6)
        ([2, 3, 4, 5], [4, 5])
    """
    if not isinstance(layers, str):
        return _indices(layers, num_layers, "layers")
    if layers == "all":
        return list(range(num_layers))
    # A third, rounded down; the middle third holds at least one layer.
    third = num_layers // 3
    if layers == "middle":
        return list(range(third, max(third + 1, num_layers - third)))
    if layers == "upper":
        return list(range(third, num_layers))
    return _layer_range(layers, num_layers)


def _layer_range(text: str, num_layers: int) -> list[int]:
    """Read "10-19", "10-" (up to the last layer) or one number as layer indices."""
    first_text, dash, last_text = text.replace(" ", "").partition("-")
    has_open_end = dash == "-" and last_text == ""
    if not first_text.isdecimal() or not (last_text.isdecimal() or last_text == ""):
        raise InvalidInputError(
            f"layers: must be 'middle', 'upper', 'all', 'FIRST-LAST', 'FIRST-' or indices, got {text!r}; "
            "e.g. layers='10-19'"
        )
    first = int(first_text)
    if has_open_end:
        # A first layer outside the model is reported as such, not as an empty range.
        return _indices(range(first, max(first + 1, num_layers)), num_layers, "layers")
    last = first if last_text == "" else int(last_text)
    if first > last:
        raise InvalidInputError(f"layers: FIRST must not exceed LAST, got {text!r}; write '{last}-{first}'")
    return _indices(range(first, last + 1), num_layers, "layers")


def _indices(values: int | Iterable[SupportsIndex], count: int | None, name: str) -> list[int]:
    """Check indices of layers or heads and sort them; without a count, no index is too large."""
    listed = values if isinstance(values, Iterable) else (values,)
    try:
        # operator.index takes any integer type, and no float.
        chosen = sorted({index(value) for value in listed})
    except TypeError:
        raise InvalidInputError(f"{name}: indices must be integers, got {values!r}; e.g. {name}=[0, 2]") from None
    if not chosen:
        raise InvalidInputError(f"{name}: must name at least one, got none; leave it out for the default")
    is_too_large = count is not None and chosen[-1] >= count
    if chosen[0] < 0 or is_too_large:
        rule = "not be negative" if count is None else f"lie in 0..{count - 1}"
        raise InvalidInputError(
            f"{name}: must {rule}, got {chosen[0]}..{chosen[-1]}; indices count from the model's first {name[:-1]}"
        )
    return chosen
