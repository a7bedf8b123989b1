"""Register and find capacities: what an edge weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flowgraph.errors import InvalidInputError

Normalization = Literal["attention", "renormalize", "leak", "none"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class CapacityInput:
    """What a capacity is computed from.

    Attributes:
        model: the transformers model, inside any wrappers, in evaluation mode.
        wrapped: the model as it was given.
        input_ids: ``[batch, tokens]``, on the device of the model's embeddings.
        attention_mask: ``[batch, tokens]`` int64, 1 on tokens and 0 on padding.
        arguments: further arguments of the forward pass (positions under left padding).
        options: the options of this call, defaults filled in.
    """

    model: PreTrainedModel
    wrapped: nn.Module
    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Int64[Tensor, "batch tokens"]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def readable(self) -> Bool[Tensor, "batch tokens"]:
        """False on padding."""
        return self.attention_mask.bool()


CapacityFunction = Callable[[CapacityInput], Any]


@dataclass(frozen=True)
class Capacity:
    """A registered capacity.

    Attributes:
        name: the name by which a call chooses it.
        function: computes the rows of a batch: an object with ``block(start, stop)``, such as
            :class:`flowgraph.AttentionRows`, or one matrix ``[batch, tokens, tokens]``, rows are readers.
        summary: one line.
        defaults: its options with their defaults; other options are refused.
        signed: True where edges may be negative.
        gradient: True where a backward pass of the model is needed.
        normalization: how rows become capacities, see :class:`flowgraph.EdgeRules`.
        score: the score that ranks tokens best: ``"throughput"`` or ``"potential"``.
    """

    name: str
    function: CapacityFunction
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    signed: bool = False
    gradient: bool = False
    normalization: Normalization = "renormalize"
    score: str = "throughput"


_CAPACITIES: dict[str, Capacity] = {}


def capacity(
    name: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    signed: bool = False,
    gradient: bool = False,
    normalization: Normalization = "renormalize",
    score: str = "throughput",
) -> Callable[[CapacityFunction], CapacityFunction]:
    """Register a capacity under a name; the first line of the function's docstring describes it.

    Args:
        name: the name by which a call chooses it, as in ``capture(..., capacity=name)``.
        defaults: its options; a call may set these and no others.
        signed: edges may be negative.
        gradient: a backward pass of the model is needed.
        normalization: how rows become capacities: ``"renormalize"``, ``"leak"``, ``"attention"`` or ``"none"``.
        score: ``"throughput"`` or ``"potential"``, the score that ranks tokens best.

    Raises:
        InvalidInputError: the name is taken, or the function has no docstring.

    Example:
        >>> import flowgraph as fg
        >>> @fg.capacity("recency", defaults={"decay": 0.5})
        ... def recency(batch):
        ...     "Weigh each earlier token by its distance."
        ...     position = torch.arange(batch.input_ids.shape[1])
        ...     distance = (position[:, None] - position[None]).float()
        ...     weights = batch.options["decay"] ** distance
        ...     return weights.tril(-1).expand(len(batch.input_ids), -1, -1)
        >>> "recency" in fg.capacity_names()
        True
    """

    def register(function: CapacityFunction) -> CapacityFunction:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        if not summary:
            raise InvalidInputError(
                f"capacity: needs a docstring whose first line describes it, got none on {function.__name__}; add one"
            )
        # A module may be loaded twice and register its own name again; two modules may not share one.
        known = _CAPACITIES.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise InvalidInputError(
                f"name: must be a new name, got {name!r}, which {known.function.__module__} registered; choose another"
            )
        _CAPACITIES[name] = Capacity(
            name, function, summary, dict(defaults or {}), signed, gradient, normalization, score
        )
        return function

    return register


def find_capacity(name: str) -> Capacity:
    """Return a registered capacity.

    Raises:
        InvalidInputError: no capacity of this name.
    """
    if name not in _CAPACITIES:
        raise InvalidInputError(
            f"capacity: must be one of {', '.join(sorted(_CAPACITIES))}, got {name!r}; register your own with "
            "flowgraph.capacity"
        )
    return _CAPACITIES[name]


def capacity_names() -> list[str]:
    """List the names of all registered capacities."""
    return sorted(_CAPACITIES)
