"""Register and find compositions: how the edges of a graph become one score per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.flow.flow import Flow


@dataclass(frozen=True, eq=False)
class ComposedScores:
    """The scores of a composition, and what shows that they were solved exactly.

    Attributes:
        scores: ``[N]`` float64, one per token; their meaning and unit are those of the composition.
        residual: largest relative difference between the two sides of the equation that was solved; None where no
            equation was solved.
        flow: the flow whose potential or throughput the scores are, for :func:`flowgraph.certify`; None without one.
        name: the composition.
        options: its options, defaults filled in.
    """

    scores: Float64[Tensor, " nodes"]
    residual: float | None = None
    flow: Flow | None = None
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        residual = "no equation solved" if self.residual is None else f"residual {self.residual:.1e}"
        return f"ComposedScores({self.name!r}, {self.scores.numel()} tokens, {residual})"


CompositionFunction = Callable[..., Tensor | ComposedScores]
OptionCheck = Callable[[str, Any], None]


@dataclass(frozen=True)
class Composition:
    """A registered composition.

    Attributes:
        name: the name by which a call chooses it.
        function: ``(graph, **options)`` to scores ``[N]`` or :class:`ComposedScores`.
        summary: one line.
        defaults: its options with their defaults; other options are refused.
        checks: for some options, a function ``(name, value)`` that raises on a value outside the option's range. They
            run before a model does.
        signed: True where negative weights are allowed: the graph may be a :class:`flowgraph.SignedGraph`.
        reads_layers: True where the function also takes ``layer_rows``: the rows of each layer, or None for a graph.
    """

    name: str
    function: CompositionFunction
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, OptionCheck] = field(default_factory=dict)
    signed: bool = False
    reads_layers: bool = False

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with defaults filled in, after checking each.

        Raises:
            InvalidInputError: an option that this composition does not have, or a value outside its range.
        """
        for name, value in options.items():
            if name not in self.defaults:
                known = ", ".join(sorted(self.defaults)) or "none"
                raise InvalidInputError(
                    f"{name}: does not apply to composition {self.name!r}, got {value!r:.60}; its options are {known}"
                )

        # Defaults are checked like the values of a caller.
        complete = {**self.defaults, **options}
        for name, check in self.checks.items():
            check(name, complete[name])
        return {name: _as_plain_number(value) for name, value in complete.items()}


def _as_plain_number(value: Any) -> Any:
    """Return numbers of numpy as Python's, which JSON can hold; anything else unchanged."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return value


_COMPOSITIONS: dict[str, Composition] = {}


def composition(
    name: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    checks: Mapping[str, OptionCheck] | None = None,
    signed: bool = False,
    reads_layers: bool = False,
) -> Callable[[CompositionFunction], CompositionFunction]:
    """Register a composition under a name; the first line of the function's docstring describes it.

    Args:
        name: the name by which a call chooses it, as in ``compose(graph, name)``.
        defaults: its options; a call may set these and no others.
        checks: for some options, a function ``(name, value)`` that raises :class:`flowgraph.InvalidInputError`.
        signed: negative weights are allowed: the function also takes a :class:`flowgraph.SignedGraph`, whose weights
            are ``graph.weight``, in place of a FlowGraph with ``graph.capacity``.
        reads_layers: the function also takes ``layer_rows``, the rows of each layer where the capacities were captured.

    Raises:
        InvalidInputError: the name is taken, or the function has no docstring.

    Example:
        >>> import torch
        >>> import flowgraph as fg
        >>> @fg.composition("throughput after damping", defaults={"damping": 0.5})
        ... def damped(graph, *, damping):
        ...     "Score tokens by a damped throughput."
        ...     return fg.solve(graph, damping=damping).throughput
        >>> weights = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0]])
        >>> graph = fg.FlowGraph.from_dense(weights, question=[0], answer=[2])
        >>> [round(x, 3) for x in fg.compose(graph, "throughput after damping").tolist()]
        [1.0, 0.333, 1.0]
    """

    def register(function: CompositionFunction) -> CompositionFunction:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        function_name = getattr(function, "__name__", repr(function))
        if not summary:
            raise InvalidInputError(
                f"composition: needs a docstring whose first line describes it, got none on {function_name}; add one"
            )
        # A module may be loaded twice and register its own name again; two modules may not share one.
        known = _COMPOSITIONS.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise InvalidInputError(
                f"name: must be a new name, got {name!r}, which {known.function.__module__} registered; choose another"
            )
        _COMPOSITIONS[name] = Composition(
            name=name,
            function=function,
            summary=summary,
            defaults=dict(defaults or {}),
            checks=dict(checks or {}),
            signed=signed,
            reads_layers=reads_layers,
        )
        return function

    return register


def find_composition(name: str) -> Composition:
    """Return a registered composition.

    Raises:
        InvalidInputError: no composition of this name.
    """
    found = _COMPOSITIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidInputError(
            f"composition: must be one of {', '.join(sorted(_COMPOSITIONS))}, got {name!r}; register your own with "
            "flowgraph.composition"
        )
    return found


def registered_names() -> list[str]:
    """List the names of all registered compositions."""
    return sorted(_COMPOSITIONS)
