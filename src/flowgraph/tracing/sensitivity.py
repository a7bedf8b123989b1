"""``Sensitivity``: how far the ranking of a trace's tokens depends on choices that no theory determines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from flowgraph.analysis.statistics import spearman
from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import LayerRule, resolve_heads, resolve_layers
from flowgraph.attention.modules import attention_modules, base_model, num_layers
from flowgraph.capacities.registry import find_capacity
from flowgraph.errors import CaptureError, InvalidInputError
from flowgraph.files import PathLike, write_json
from flowgraph.flow.compositions import LayerRows, find_composition, run_composition
from flowgraph.flow.solve import solve
from flowgraph.graph.edge_rules import EdgeRules, RowRule
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.tracing.baselines import counted_tokens
from flowgraph.tracing.generation import Progress, is_integer
from flowgraph.tracing.recapture import capture_again, recorded_capture
from flowgraph.tracing.traced import Traced

SCHEMA = "flowgraph-sensitivity/1"
HEADS = ("mean", "max", "global", "local", "receiver")
ROWS = ("emission", "emission_all", "literal")
POWERS = (1.0, 2.0, 4.0, 8.0)
CAPACITIES = ("attention", "value_norm", "sharp", "sharp_max", "centred", "vtrace", "vtrace_share")


@dataclass(frozen=True)
class Variation:
    """The ranking after one choice was changed, compared with the ranking of the trace.

    Attributes:
        choice: what was changed: ``"layers"``, ``"heads"``, ``"rows"``, ``"power"`` or ``"capacity"``.
        value: what it was changed to.
        spearman: rank correlation of both scores, in [-1, 1]; None where it is not defined.
        overlap: common share of the tokens with the highest scores, in [0, 1]; None where there are no scores.
        reason: why there is no figure; empty otherwise.
    """

    choice: str
    value: str
    spearman: float | None
    overlap: float | None
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """How far the ranking of a trace's tokens depends on the choice of layers, heads, rows, power and capacity.

    Attributes:
        settings: the choices of the trace itself.
        region: the tokens that are ranked: ``"reasoning"``, ``"question"`` or ``"all"``, all tokens before the answer.
        num_tokens: how many these are.
        num_top: number of tokens with the highest scores that are compared.
        variations: one for each other choice.
    """

    settings: Mapping[str, str]
    region: str
    num_tokens: int
    num_top: int
    variations: tuple[Variation, ...]

    def table(self) -> list[dict[str, Any]]:
        """List the variations as rows of a table, in the order in which they were run."""
        return [asdict(variation) for variation in self.variations]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, schema ``flowgraph-sensitivity/1``."""
        return {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "region": self.region,
            "num_tokens": self.num_tokens,
            "num_top": self.num_top,
            "variations": self.table(),
        }

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [
            f"sensitivity of {self.num_tokens} tokens ({self.region}) to the choices of a trace with {settings}",
            f"{'choice':<10}{'value':<16}{'Spearman':>9}  {f'top {self.num_top}':>7}",
        ]
        for variation in self.variations:
            figures = f"{_shown(variation.spearman, '.2f'):>9}  {_shown(variation.overlap, '.0%'):>7}"
            reason = f"  {variation.reason}" if variation.reason else ""
            lines.append(f"{variation.choice:<10}{variation.value:<16}{figures}{reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Change:
    """One variation before it is run.

    Attributes:
        choice: what is changed.
        value: what it is changed to, as text.
        capacity: another capacity; None: that of the trace.
        options: changed options of the capture.
        rows: another rule of rows; None: that of the trace.
    """

    choice: str
    value: str
    capacity: str | None
    options: Mapping[str, Any]
    rows: str | None = None


def sensitivity_of(
    trace: Traced,
    model: nn.Module,
    *,
    region: str | None = None,
    layers: Sequence[LayerRule] | None = None,
    heads: Sequence[Any] | None = None,
    rows: Sequence[str] | None = None,
    powers: Sequence[float] | None = None,
    capacities: Sequence[str] | None = None,
    top: int = 10,
    progress: Progress | None = None,
) -> Sensitivity:
    """Change one choice of a trace at a time, score its tokens again, and compare the rankings.

    Args:
        trace: the trace.
        model: its model.
        region: see :meth:`FlowTrace.sensitivity`, also for the arguments below.
        layers: choices of layers.
        heads: choices of heads.
        rows: rules of rows.
        powers: powers of the capacity ``"sharpened"``.
        capacities: other capacities.
        top: number of tokens with the highest scores.
        progress: called with a line of text before each variation.

    Raises:
        InvalidInputError: a choice outside its range, or a trace without a record of its capture.
    """
    if not is_integer(top) or top < 1:
        raise InvalidInputError(f"top: must be a positive integer, got {top!r}; 10 is the default")
    counted, region = counted_tokens(trace, region)
    num_tokens = int(counted.sum())
    # Of few tokens, the best ten would be nearly all of them.
    num_top = max(1, min(top, num_tokens // 2))
    capacity, _ = recorded_capture(trace)
    changes = list(_changes(trace, model, capacity, layers, heads, rows, powers, capacities))

    # Rows of one capture serve all rules of rows.
    captured: dict[str, AttentionRows] = {}
    base = trace.scores[counted]
    variations = []
    for number, change in enumerate(changes, 1):
        if progress is not None:
            progress(f"{number} of {len(changes)}: {change.choice} = {change.value}")
        # Rows are captured once for all variations with the same capacity and options.
        key = repr((change.capacity, sorted(change.options.items(), key=str)))
        try:
            if key not in captured:
                captured = {key: capture_again(trace, model, capacity=change.capacity, options=change.options)}
        except CaptureError as error:
            variations.append(Variation(change.choice, change.value, None, None, str(error)))
            continue
        scores = _scores(trace, captured[key], change)
        compared_scores = None if scores is None else scores[counted]
        variations.append(_compared(change, base, compared_scores, num_top))
    return Sensitivity(_settings(trace), region, num_tokens, num_top, tuple(variations))


def _changes(
    trace: Traced,
    model: nn.Module,
    capacity: str,
    layers: Sequence[LayerRule] | None,
    heads: Sequence[Any] | None,
    rows: Sequence[str] | None,
    powers: Sequence[float] | None,
    capacities: Sequence[str] | None,
) -> Iterator[_Change]:
    """List all variations, after checking each choice; those that the trace itself made are left out."""
    inner = base_model(model)
    total_layers = num_layers(inner, attention_modules(inner))
    known = find_capacity(capacity).defaults
    own_layers = list(trace.provenance.get("layers") or [])
    third = max(1, total_layers // 3)
    default_layers = (f"0-{third - 1}", "middle", "upper", f"{total_layers - third}-", "all")

    # Layers and heads, where the capacity reads them.
    layer_rules: Sequence[Any] = ()
    if _applies("layers", layers, known, capacity):
        layer_rules = _listed("layers", layers, default_layers)
    for layer_rule in layer_rules:
        if resolve_layers(layer_rule, total_layers) != own_layers:
            yield _Change("layers", str(layer_rule), None, {"layers": layer_rule})
    head_choices: Sequence[Any] = ()
    if _applies("heads", heads, known, capacity):
        head_choices = _listed("heads", heads, HEADS)
    for choice in head_choices:
        resolve_heads(choice, None)
        if str(choice) != trace.provenance.get("heads"):
            yield _Change("heads", str(choice), None, {"heads": choice})

    # Rows, power and capacity apply to every trace.
    for rule in _listed("rows", rows, ROWS):
        if rule not in get_args(RowRule):
            raise InvalidInputError(
                f"rows: must be among {', '.join(get_args(RowRule))}, got {rule!r}; see flowgraph.EdgeRules"
            )
        if rule != trace.provenance.get("rows"):
            yield _Change("rows", rule, None, {}, rule)
    for power in _listed("powers", powers, POWERS):
        _check_power(power)
        # The layers of the trace, so that the power is the only change beside the sharpening itself.
        options: dict[str, Any] = {"power": float(power)}
        if own_layers:
            options["layers"] = own_layers
        yield _Change("power", f"{power:g}", "sharpened", options)
    for name in _listed("capacities", capacities, CAPACITIES):
        if find_capacity(name).signed:
            raise InvalidInputError(
                f"capacities: must not be signed, got {name!r}; its edges make no flow, so leave it out"
            )
        if name != capacity:
            yield _Change("capacity", name, name, {})


def _listed(name: str, given: Any, default: Sequence[Any]) -> Sequence[Any]:
    """Return the choices of one kind: those given, or the default ones."""
    if given is None:
        return default
    if isinstance(given, str) or not isinstance(given, (Sequence, range)):
        raise InvalidInputError(f"{name}: must be a list of choices, got {given!r:.60}; e.g. {name}=[{given!r:.40}]")
    return given


def _applies(name: str, given: Any, known: Mapping[str, Any], capacity: str) -> bool:
    """Tell whether the capacity has an option; naming choices of one that it does not have is an error."""
    if given and name not in known:
        raise InvalidInputError(
            f"{name}: does not apply to capacity={capacity!r}, got {given!r:.60}; leave it out, or trace with another "
            "capacity"
        )
    return name in known


def _check_power(power: Any) -> None:
    is_number = isinstance(power, (int, float)) and not isinstance(power, bool)
    if not is_number or not 1 <= power <= 64:
        raise InvalidInputError(f"powers: must lie in [1, 64], got {power!r}; 2 and 4 are usual")


def _scores(trace: Traced, captured: AttentionRows, change: _Change) -> Float64[Tensor, " tokens"] | None:
    """Score all tokens as the trace did, from other rows; None where no question token reaches the answer."""
    # The graph with the rules of the trace, except for the rows that the variation changes.
    provenance = trace.provenance
    rules = EdgeRules.preset(
        "default",
        rows=change.rows or provenance["rows"],
        self_attention=provenance["self_attention"],
        first_token=provenance["first_token"],
        normalization=captured.normalization,
    )
    rows = captured.sequence(0)
    graph = FlowGraph.from_rows(
        rows,
        question=trace.question,
        answer=trace.answer,
        reasoning=trace.reasoning,
        generated=trace.generated,
        rules=rules,
    ).to("cpu")

    # The flow with the options of the trace's own.
    flow = trace.flow
    is_default_demand = bool((flow.demand == trace.answer.double()).all())
    solved = solve(
        graph,
        source=flow.source if flow.source_rule == "vector" else flow.source_rule,  # type: ignore[arg-type]
        demand=None if is_default_demand else flow.demand,
        absorption=flow.absorption,  # type: ignore[arg-type]
        damping=flow.damping,
    )
    if not bool(solved.feasible):
        return None

    # The score of the trace: its composition, or what its capacity ranks best by.
    composition = provenance.get("composition")
    if isinstance(composition, Mapping):
        chosen = find_composition(composition["name"])
        layer_rows = LayerRows.of(rows, graph, trace.generated) if chosen.reads_layers else None
        options = chosen.complete(composition["options"])
        return run_composition(chosen, graph, options, generated=trace.generated, layer_rows=layer_rows).scores
    score = provenance.get("score")
    if change.capacity is not None:
        score = find_capacity(change.capacity).score
    return solved.potentials[0] if score == "potential" else solved.throughput


def _compared(
    change: _Change, base: Float64[Tensor, " counted"], scores: Float64[Tensor, " counted"] | None, num_top: int
) -> Variation:
    """Compare two scores of the same tokens."""
    if scores is None:
        return Variation(change.choice, change.value, None, None, "no question token reaches the answer")
    correlation = spearman(base.numpy(), scores.numpy())
    reason = ""
    if math.isnan(correlation):
        reason = "all scores are equal"

    # The share of the best tokens that both rankings have.
    common = set(_best(base, num_top)) & set(_best(scores, num_top))
    return Variation(
        choice=change.choice,
        value=change.value,
        spearman=None if reason else correlation,
        overlap=len(common) / num_top,
        reason=reason,
    )


def _best(scores: Float64[Tensor, " counted"], count: int) -> list[int]:
    """List the tokens with the highest scores; of equal ones, the earlier."""
    return torch.argsort(scores, descending=True, stable=True)[:count].tolist()


def _settings(trace: Traced) -> dict[str, str]:
    """Describe the choices of the trace in words."""
    names = ("capacity", "layers", "heads", "rows")
    settings = {name: str(trace.provenance[name]) for name in names if name in trace.provenance}
    composition = trace.provenance.get("composition")
    if isinstance(composition, Mapping):
        settings["composition"] = str(composition["name"])
    return settings


def _shown(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)
