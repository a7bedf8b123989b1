"""The presets of a trace: which capacity and which edge rules answer a kind of question."""

from __future__ import annotations

from typing import NamedTuple

from flowgraph.errors import InvalidInputError


class TracePreset(NamedTuple):
    """A named choice of capacity and edge rules.

    Attributes:
        capacity: what an edge weighs, where the caller names no capacity.
        edge_rules: name of the edge rules; see :meth:`flowgraph.EdgeRules.preset`.
    """

    capacity: str
    edge_rules: str


TRACE_PRESETS = {
    "default": TracePreset("attention", "default"),
    "paper": TracePreset("attention", "paper"),
    "evidence": TracePreset("relevance", "default"),
    "steps": TracePreset("vtrace_share", "default"),
}
"""The presets by name: the two of the published method, and one for each question that docs/faithfulness.md decides."""


def find_preset(name: str) -> TracePreset:
    """Return a preset by name.

    Raises:
        InvalidInputError: there is none of this name.

    Example:
        >>> find_preset("evidence").capacity
        'relevance'
    """
    if not isinstance(name, str) or name not in TRACE_PRESETS:
        allowed = ", ".join(map(repr, TRACE_PRESETS))
        raise InvalidInputError(
            f"preset: must be one of {allowed}, got {name!r}; single choices have arguments of their own, such as "
            "capacity= and rows="
        )
    return TRACE_PRESETS[name]


def chosen_capacity(capacity: str | None, preset: str) -> str:
    """Return the capacity that is named, or else that of the preset.

    Raises:
        InvalidInputError: no such preset.
    """
    found = find_preset(preset)
    if capacity is None:
        return found.capacity
    return capacity
