"""Names of methods: those that are registered, those that are made from parts, and presets.

Parts: ``CAPACITY[:SCORE]`` (:mod:`flowgraph.evaluation.methods.capacities`), ``text_only:SCORE``,
``integrated_gradients:STEPS``, and ``matched:METHOD`` or ``matched_length:METHOD`` of any of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from flowgraph.capacities.registry import Capacity
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.methods.capacities import capacity_method, registered_capacity_methods
from flowgraph.evaluation.methods.matched import PREFIXES, matched_method
from flowgraph.evaluation.methods.perturbation import integrated_gradients_method
from flowgraph.evaluation.methods.text_only import text_only_method
from flowgraph.evaluation.registry import EvaluationMethod, registered_methods

_TRIVIAL = ("random", "recency", "position", "length", "digits", "shared_tokens", "previous_step", "text_only")

_STANDARD = (
    "vtrace_share",
    "sharp",
    "sharp_max:cage",
    "attention",
    "relevance",
    "gradient_x_input",
    "gradient_norm",
    "attention_late",
    "attention_middle",
    "rollout",
    "random",
    "recency",
    "position",
    "text_only",
)

_FORWARD = (
    "attention",
    "attention:h",
    "attention:cage",
    "attention:vtrace",
    "attention:hops",
    "sharp",
    "sharp:cage",
    "sharp:one_hop",
    "sharp_max",
    "sharp_max:cage",
    "vtrace",
    "vtrace_share",
    "vtrace_share:f",
    "vtrace_share:cage",
    "vtrace_share:one_hop",
    "centred",
    "value_norm",
    "attention_late",
    "attention_middle",
    "attention_all",
    "rollout",
    "fai",
    "waad",
)

_GRADIENT = (
    "relevance",
    "relevance:absorbed",
    "relevance:chain",
    "gradient",
    "gradient_positive",
    "gradient_x_input",
    "gradient_norm",
    "integrated_gradients",
)

_CONTROLS = ("matched:vtrace_share", "matched:relevance", "matched_length:vtrace_share")

_WITHOUT_PRESET = ("inseq",)
"""Methods that run only where they are asked for by name."""


def find_evaluation_method(name: str) -> EvaluationMethod | None:
    """Return the method of a name, registered or made from its parts; None for another name.

    Raises:
        InvalidInputError: a name whose first part is known and whose others do not go with it; a preset.
    """
    # Registered names come first: a user may register a name that holds a colon.
    registered = registered_methods()
    if name in registered:
        return registered[name]
    head, _, rest = name.partition(":")
    if head == "preset":
        raise InvalidInputError(
            f"methods: a preset must stand in a list of methods, got {name!r} as one method; use a name out of it: "
            f"{', '.join(method_presets().get(rest, ())) or 'preset:' + ', preset:'.join(method_presets())}"
        )
    if head in PREFIXES:
        reference = find_evaluation_method(rest) if rest else None
        if reference is None:
            raise InvalidInputError(
                f"methods: {head!r} must be followed by the name of a method, got {name!r}; as in {head}:vtrace_share"
            )
        return matched_method(name, reference)
    return text_only_method(name) or integrated_gradients_method(name) or capacity_method(name)


def method_presets() -> dict[str, tuple[str, ...]]:
    """Return the methods of each preset.

    ``trivial``: all controls; ``standard``: a dozen and the main controls; ``forward``: one forward pass, no gradient;
    ``gradient``: a backward pass; ``all``: every registered method, every capacity, and the above. A method whose
    package is not installed is in no preset; asked for by its own name, it raises an error with the install command.
    """
    gradient = _installed(_GRADIENT)
    own_scores = registered_capacity_methods(lambda capacity: True)
    registered = _installed([name for name in registered_methods() if name not in _WITHOUT_PRESET])
    everything = (*_STANDARD, *_FORWARD, *gradient, *own_scores, *registered, *_TRIVIAL, *_CONTROLS)
    return {
        "trivial": _TRIVIAL,
        "standard": _STANDARD,
        "forward": (*_FORWARD, *_new_capacities(_FORWARD)),
        "gradient": gradient,
        "all": tuple(dict.fromkeys(everything)),
    }


def expand_methods(names: Sequence[str]) -> list[str]:
    """Replace every ``preset:NAME`` by its methods; each method is listed once, at its first place.

    Args:
        names: names of methods and presets.

    Returns:
        Names of methods. They are not looked up here: see :func:`flowgraph.evaluation.catalogue.find_method`.

    Raises:
        InvalidInputError: no preset of this name.

    Example:
        >>> expand_methods(["vtrace_share", "preset:trivial"])[:3]
        ['vtrace_share', 'random', 'recency']
    """
    presets = method_presets()
    expanded: list[str] = []
    for name in names:
        if not name.startswith("preset:"):
            expanded.append(name)
            continue
        preset = name.removeprefix("preset:")
        if preset not in presets:
            raise InvalidInputError(
                f"methods: a preset must be one of {', '.join(presets)}, got {name!r}; 'preset:standard' is usual"
            )
        expanded.extend(presets[preset])
    return list(dict.fromkeys(expanded))


def _new_capacities(listed: Sequence[str]) -> tuple[str, ...]:
    """List the capacities of one forward pass that users registered and a preset does not name yet."""

    def is_forward(capacity: Capacity) -> bool:
        return not capacity.gradient and not capacity.signed

    return tuple(name for name in registered_capacity_methods(is_forward) if name not in listed)


def _installed(names: Sequence[str]) -> tuple[str, ...]:
    """Leave out the registered methods whose package is not installed."""
    registered = registered_methods()
    kept = []
    for name in names:
        package = registered[name].requires if name in registered else None
        if package is None or importlib.util.find_spec(package) is not None:
            kept.append(name)
    return tuple(kept)
