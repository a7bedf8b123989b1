"""hub_test: mask the tokens with the highest score, random ones and the lowest, and measure the answer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import index
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch_geometric.utils import scatter

from flowgraph.analysis.statistics import Interval, t_interval, wilson_interval
from flowgraph.attention.layers_and_heads import LayerRule
from flowgraph.errors import InfeasibleFlowError, InvalidInputError, RegionError
from flowgraph.files import loadable
from flowgraph.interventions.knockout import Intervention, KnockoutResult, knockouts
from flowgraph.tracing.flow_trace import FlowTrace

Arm = Literal["top", "random", "matched", "bottom"]
Score = Literal["throughput", "potential", "attention", "recency"]
_DRAWN_ARMS = ("random", "matched")
_NUM_BINS = 10
"""Parts of the region that the matched arm keeps apart."""


@loadable
@dataclass(frozen=True)
class HubRun:
    """The measurement of one set of masked tokens in one trace.

    Attributes:
        trace: index of the trace.
        fraction: the requested share of the region's tokens.
        arm: how the tokens were chosen.
        seed: of the draw; None where nothing is drawn.
        tokens: the masked tokens.
        change: change of the answer's summed log-probability, in nats.
        change_per_token: the same divided by the number of answer tokens.
        flips: see :attr:`KnockoutResult.flips`.
        kl: mean over the answer's positions of KL(before || after), in nats.
    """

    trace: int
    fraction: float
    arm: str
    seed: int | None
    tokens: tuple[int, ...]
    change: float
    change_per_token: float
    flips: bool
    kl: float


@loadable
@dataclass(frozen=True)
class HubRow:
    """The means of one arm at one fraction, or of the difference of two arms (``arm`` is then "top - random").

    Attributes:
        fraction: share of the region's tokens that is masked.
        arm: how the tokens are chosen.
        change: mean change of the answer's log-probability, in nats.
        change_interval: its 95 % interval over ``units``; None for one unit, and where all units are the same.
        flip_rate: share of flips; a difference of shares in a row of two arms.
        flip_interval: its 95 % interval over ``units``; None for one unit, and for a difference that is the same in
            all units.
        units: what is averaged: ``"traces"``, or ``"seeds"`` for one trace, where only the draw varies.
        count: number of units.
    """

    fraction: float
    arm: str
    change: float
    change_interval: Interval
    flip_rate: float
    flip_interval: Interval
    units: str
    count: int


@loadable
@dataclass(frozen=True)
class HubTest:
    """The result of :func:`hub_test`.

    Attributes:
        rows: one for each fraction and arm.
        differences: top minus each other arm, paired by trace (by seed for one trace).
        runs: every single measurement.
        num_traces: number of traces.
        score: name of the score that ranks the tokens.
        region: name of the region whose tokens are masked.
    """

    rows: tuple[HubRow, ...]
    differences: tuple[HubRow, ...]
    runs: tuple[HubRun, ...]
    num_traces: int
    score: str
    region: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, schema ``flowgraph-hub-test/1``."""
        return asdict(self) | {"schema": "flowgraph-hub-test/1"}

    def __repr__(self) -> str:
        lines = [
            f"hub test of {self.score} on the {self.region} of {self.num_traces} trace(s), {len(self.runs)} runs",
            f"{'masked':>7}  {'arm':<14}{'change of log p':<30}{'flips':<26}over",
        ]
        for row in (*self.rows, *self.differences):
            change = f"{row.change:+.3f} {_brackets(row.change_interval, '+.3f')}"
            flips = f"{row.flip_rate:.1%} {_brackets(row.flip_interval, '.1%')}"
            lines.append(f"{row.fraction:>7.0%}  {row.arm:<14}{change:<30}{flips:<26}{row.count} {row.units}")
        return "\n".join(lines)


def hub_test(
    model: nn.Module,
    trace: FlowTrace | Sequence[FlowTrace],
    *,
    fractions: Sequence[float] = (0.05, 0.10, 0.20),
    arms: Sequence[str] = ("top", "random", "matched", "bottom"),
    seeds: Iterable[int] = range(10),
    region: str = "reasoning",
    scores: str | Tensor | Sequence[Tensor] = "throughput",
    layers: LayerRule = "all",
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> HubTest:
    """Test whether the answer depends more on the tokens with a high score than on others.

    In each trace, a share of the region's tokens is masked as keys for all later positions (see
    :func:`flowgraph.knockout`), and the answer is measured under teacher forcing.

    Args:
        model: the causal LM of the traces.
        trace: one trace, or several.
        fractions: shares of the region's tokens that are masked.
        arms: ``"top"`` and ``"bottom"`` by score (ties: the earlier token first); ``"random"``: drawn from the entire
            region; ``"matched"``: drawn so that each tenth of the region has as many masked as under top. Drawn sets
            may share tokens with the top ones.
        seeds: one draw for each, in each trace.
        region: ``"reasoning"`` or ``"question"``.
        scores: ``"throughput"``, ``"potential"`` (h), ``"attention"`` (received: sum of the capacities of outgoing
            edges), ``"recency"`` (later tokens first), a vector over the trace's tokens, or one for each trace.
        layers: where the tokens are masked; default all attention layers.
        batch_size: interventions in one forward pass.
        progress: called with a line of text before each pass.

    Returns:
        Means, flip rates and 95 % intervals: Student's t for changes and for differences, Wilson for shares. Intervals
        of several traces are over the traces, each trace's seeds averaged first. Those of one trace are over the
        seeds: they measure how much the draw matters, not how much texts vary.

    Raises:
        RegionError: an empty region, or one with too few tokens for the smallest fraction.
        InfeasibleFlowError: a trace without flow, ranked by throughput or potential.
        InvalidInputError: any other argument outside its range; see also :func:`flowgraph.knockout`.

    Cost: (2 + 2 seeds) x fractions / batch_size forward passes for each trace.

    Source: the causal check of arXiv 2606.10646; the matched arm is ours.
    """
    traces = list(trace) if isinstance(trace, Iterable) else [trace]
    checked_fractions, checked_seeds = _checked_options(traces, fractions, arms, seeds)

    # Plan all traces before the first pass, so that an invalid one is refused early.
    plans = []
    for number, one in enumerate(traces):
        ranked = _ranked(one, region, _scores_of(scores, traces, number))
        plans.append(_plan(one, ranked, checked_fractions, arms, checked_seeds))

    # Run the plans. Every trace gives one result per planned run.
    runs: list[HubRun] = []
    for number, (one, plan) in enumerate(zip(traces, plans, strict=True)):

        def report(line: str, number: int = number) -> None:
            if progress is not None:
                progress(f"trace {number + 1} of {len(traces)}: {line}")

        interventions = [Intervention(tokens=planned.tokens, layers=layers) for planned in plan]
        results = knockouts(model, one, interventions, batch_size=batch_size, progress=report)
        for planned, result in zip(plan, results, strict=True):
            runs.append(_run(number, planned, result))

    # Averages over traces, or over seeds where there is one trace.
    rows, differences = summarise(runs, checked_fractions, arms, len(traces))
    return HubTest(
        rows=tuple(rows),
        differences=tuple(differences),
        runs=tuple(runs),
        num_traces=len(traces),
        score=scores if isinstance(scores, str) else "given scores",
        region=region,
    )


def _checked_options(traces: Sequence[Any], fractions: Any, arms: Any, seeds: Any) -> tuple[list[float], list[int]]:
    """Check the options, and return fractions and seeds as plain numbers."""
    if not traces or not all(isinstance(trace, FlowTrace) for trace in traces):
        raise InvalidInputError(
            f"trace: must be a FlowTrace or several, got {[type(trace).__name__ for trace in traces]}; "
            "load_trace reads one from a file"
        )

    try:
        checked_fractions = [float(fraction) for fraction in fractions]
    except (TypeError, ValueError):
        checked_fractions = []
    are_inside = all(0 < fraction < 1 for fraction in checked_fractions)
    if not checked_fractions or not are_inside or _has_repeats(checked_fractions):
        raise InvalidInputError(
            f"fractions: must lie in (0, 1), each once, got {checked_fractions or fractions!r}; e.g. [0.05, 0.1, 0.2]"
        )

    # A text is iterable too, so only lists and tuples of arms are valid.
    known = get_args(Arm)
    is_list = isinstance(arms, list | tuple)
    if not is_list or not arms or not all(arm in known for arm in arms) or _has_repeats(arms):
        raise InvalidInputError(
            f"arms: must be some of {', '.join(map(repr, known))}, each once, got {arms!r}; default: all"
        )

    # Seeds matter only to the arms that draw, but an invalid seed is refused in any case.
    try:
        checked_seeds = [index(seed) for seed in seeds]
        are_integers = True
    except TypeError:
        checked_seeds = []
        are_integers = False
    needs_seeds = any(arm in _DRAWN_ARMS for arm in arms)
    are_missing = needs_seeds and not checked_seeds
    are_negative = any(seed < 0 for seed in checked_seeds)
    if not are_integers or are_missing or are_negative or _has_repeats(checked_seeds):
        raise InvalidInputError(f"seeds: must be non-negative integers, each once, got {seeds!r}; e.g. range(10)")
    return checked_fractions, checked_seeds


def _has_repeats(values: Sequence[Any]) -> bool:
    """Return whether a sequence holds a value twice."""
    return len(set(values)) < len(values)


def _scores_of(scores: Any, traces: list[FlowTrace], number: int) -> Float64[Tensor, " tokens"]:
    """Return the scores of the tokens of one trace, by name or from the vectors given."""
    trace = traces[number]
    if isinstance(scores, str):
        return _named_scores(scores, trace)

    # A list has one vector for each trace; a tensor belongs to a single trace.
    vector = None
    if isinstance(scores, Tensor):
        if len(traces) == 1:
            vector = scores
    elif isinstance(scores, Sequence) and len(scores) == len(traces):
        try:
            vector = torch.as_tensor(scores[number])
        except (TypeError, ValueError, RuntimeError):
            vector = None

    rule = f"scores: must be one finite number for each of the {trace.num_tokens} tokens of trace {number}"
    remedy = "pass a list with one vector for each trace"
    if vector is None:
        raise InvalidInputError(f"{rule}, got none; {remedy}")
    is_real_vector = vector.shape == (trace.num_tokens,) and not vector.is_complex()
    if not is_real_vector or not bool(torch.isfinite(vector.double()).all()):
        raise InvalidInputError(f"{rule}, got {tuple(vector.shape)}; {remedy}")
    return vector.double().cpu()


def _named_scores(name: str, trace: FlowTrace) -> Float64[Tensor, " tokens"]:
    """Compute the scores of a trace's tokens by name."""
    known = get_args(Score)
    if name not in known:
        allowed = ", ".join(map(repr, known))
        raise InvalidInputError(f"scores: must be {allowed} or vectors, got {name!r}; 'throughput' is the default")
    if name == "recency":
        return torch.arange(trace.num_tokens, dtype=torch.float64)
    if name == "attention":
        # The attention that a token receives is the capacity of its outgoing edges.
        source = trace.graph.edge_index[0]
        return scatter(trace.graph.capacity.double(), source, dim_size=trace.num_tokens, reduce="sum").cpu()
    if not trace.feasible:
        raise InfeasibleFlowError(
            f"trace: must have a flow to be ranked by {name}, got one whose question does not reach the answer; "
            "use scores='attention'"
        )
    if name == "throughput":
        return trace.throughput.double().cpu()
    return trace.potential.double().cpu()


def _ranked(trace: FlowTrace, region: str, scores: Float64[Tensor, " tokens"]) -> list[int]:
    """Return the region's tokens, highest score first; refuse a region that the answer cannot read."""
    if region == "reasoning":
        mask = trace.reasoning
    elif region == "question":
        mask = trace.question
    else:
        raise InvalidInputError(
            f"region: must be 'reasoning' or 'question', got {region!r}; 'reasoning' is the default"
        )
    tokens = mask.cpu().nonzero().flatten()
    if tokens.numel() == 0:
        raise RegionError(
            f"{region}: must hold tokens to mask, got none; trace an answer with steps before it, or test "
            "region='question'"
        )

    # The position before the last answer token generates it, and a masked token still reads itself: masking at or
    # after that position changes nothing.
    last_answer = int(trace.answer.cpu().nonzero().max())
    if int(tokens.min()) >= last_answer - 1:
        raise RegionError(
            f"{region}: must hold tokens that the answer can read, got none before token {last_answer - 1}, which "
            "emits the last of the answer; mask tokens before it"
        )
    # A stable sort keeps tokens of equal score in reading order.
    order = torch.argsort(scores[tokens], descending=True, stable=True)
    return tokens[order].tolist()


@dataclass(frozen=True)
class _PlannedRun:
    """The tokens that one run masks, and how they were chosen; the attributes are those of :class:`HubRun`."""

    fraction: float
    arm: str
    seed: int | None
    tokens: tuple[int, ...]


def _plan(
    trace: FlowTrace,
    ranked: list[int],
    fractions: list[float],
    arms: Sequence[str],
    seeds: list[int],
) -> list[_PlannedRun]:
    """Choose the masked tokens of every run on one trace, from the region's tokens, highest score first."""
    # Draws depend on the text, not on its position in the list of traces.
    token_ids = np.asarray(trace.token_ids.tolist(), dtype="<i8")
    text_seed = zlib.crc32(token_ids.tobytes())

    plan: list[_PlannedRun] = []
    for fraction in fractions:
        num_masked = math.floor(fraction * len(ranked) + 0.5)
        if not 0 < num_masked < len(ranked):
            raise RegionError(
                f"fractions: must mask at least one token and leave one, got {fraction:g} of {len(ranked)}; "
                "use a longer answer or another fraction"
            )

        # One run for each arm, or for each seed of an arm that draws.
        top = ranked[:num_masked]
        for arm in arms:
            if arm in _DRAWN_ARMS:
                for seed in seeds:
                    generator = np.random.default_rng([seed, text_seed, num_masked, _DRAWN_ARMS.index(arm)])
                    tokens = _drawn(sorted(ranked), top, arm, generator)
                    plan.append(_PlannedRun(fraction, arm, seed, tuple(sorted(tokens))))
            else:
                # The other arms are fixed: the highest scores, or the lowest.
                tokens = top if arm == "top" else ranked[-num_masked:]
                plan.append(_PlannedRun(fraction, arm, None, tuple(sorted(tokens))))
    return plan


def _drawn(tokens: list[int], top: list[int], arm: str, generator: np.random.Generator) -> list[int]:
    """Draw as many tokens as there are in top, from the entire region or from the same tenths of it."""
    if arm == "random":
        return generator.choice(tokens, len(top), replace=False).tolist()

    # As many from each tenth of the region, in reading order, as the top arm has there.
    drawn: list[int] = []
    tenths = np.array_split(np.asarray(tokens), _NUM_BINS)
    for tenth in tenths:
        num_top = int(np.isin(tenth, top).sum())
        if num_top > 0:
            from_tenth = generator.choice(tenth, num_top, replace=False)
            drawn += from_tenth.tolist()
    return drawn


def _run(trace: int, planned: _PlannedRun, result: KnockoutResult) -> HubRun:
    """Join one run's plan and result."""
    num_answer_tokens = result.answer.numel()
    change = result.change
    return HubRun(
        trace=trace,
        fraction=planned.fraction,
        arm=planned.arm,
        seed=planned.seed,
        tokens=planned.tokens,
        change=change,
        change_per_token=change / num_answer_tokens,
        flips=result.flips,
        kl=float(result.kl.mean()),
    )


@dataclass(frozen=True)
class _UnitValues:
    """The changes (in nats) and flip rates of the independent units of one arm at one fraction."""

    changes: list[float]
    flip_rates: list[float]


def summarise(
    runs: Sequence[HubRun],
    fractions: Sequence[float],
    arms: Sequence[str],
    num_traces: int,
) -> tuple[list[HubRow], list[HubRow]]:
    """Average runs over their independent units, per fraction and arm.

    Args:
        runs: all measurements.
        fractions: the fractions of the rows.
        arms: the arms of the rows.
        num_traces: with one trace the seeds are the units, else the traces.

    Returns:
        A row for each fraction and arm; and, where there is a top arm, the rows of top minus each other arm.
    """
    rows = []
    differences = []
    # Values per independent unit first, because an arm is compared with the top arm on the same units.
    for fraction in fractions:
        values: dict[str, _UnitValues] = {}
        for arm in arms:
            runs_of_arm = [run for run in runs if run.fraction == fraction and run.arm == arm]
            values[arm] = _values_of_units(runs_of_arm, num_traces)

        # Of one trace, only the arms that draw vary.
        for arm in arms:
            is_over_seeds = num_traces == 1 and arm in _DRAWN_ARMS
            units = "seeds" if is_over_seeds else "traces"
            rows.append(_row_of_arm(fraction, arm, values[arm], units))
            if arm != "top" and "top" in arms:
                differences.append(_row_of_difference(fraction, arm, values["top"], values[arm], units))
    return rows, differences


def _values_of_units(runs: Sequence[HubRun], num_traces: int) -> _UnitValues:
    """Average the runs of each independent unit: each trace over its seeds, or the seeds of the only trace."""
    # The units are traces, each averaged over its seeds; of a single trace, its runs.
    groups: list[list[HubRun]]
    if num_traces == 1:
        groups = [[run] for run in runs]
    else:
        groups = [[] for _ in range(num_traces)]
        for run in runs:
            groups[run.trace].append(run)

    values = _UnitValues(changes=[], flip_rates=[])
    for group in groups:
        values.changes.append(fmean(run.change for run in group))
        values.flip_rates.append(fmean(run.flips for run in group))
    return values


def _row_of_arm(fraction: float, arm: str, values: _UnitValues, units: str) -> HubRow:
    """Average one arm, with Student's interval of the change and Wilson's of the flip rate."""
    count = len(values.changes)
    flip_rate = fmean(values.flip_rates)
    return HubRow(
        fraction=fraction,
        arm=arm,
        change=fmean(values.changes),
        change_interval=t_interval(values.changes),
        flip_rate=flip_rate,
        flip_interval=wilson_interval(flip_rate, count),
        units=units,
        count=count,
    )


def _row_of_difference(fraction: float, arm: str, top: _UnitValues, other: _UnitValues, units: str) -> HubRow:
    """Average top minus another arm over paired units, with Student's intervals."""
    count = len(other.changes)
    top_changes = top.changes
    top_flip_rates = top.flip_rates
    if len(top_changes) == 1:
        # One trace: the same top value against each draw.
        top_changes = top_changes * count
        top_flip_rates = top_flip_rates * count

    # One difference for each unit.
    changes = [one - two for one, two in zip(top_changes, other.changes, strict=True)]
    flip_rates = [one - two for one, two in zip(top_flip_rates, other.flip_rates, strict=True)]

    # A difference of two shares lies in [-1, 1].
    flip_interval = t_interval(flip_rates)
    if flip_interval is not None:
        low, high = flip_interval
        flip_interval = (max(-1.0, low), min(1.0, high))
    return HubRow(
        fraction=fraction,
        arm=f"top - {arm}",
        change=fmean(changes),
        change_interval=t_interval(changes),
        flip_rate=fmean(flip_rates),
        flip_interval=flip_interval,
        units=units,
        count=count,
    )


def _brackets(interval: Interval, style: str) -> str:
    """Format an interval; a missing one is empty."""
    if interval is None:
        return ""
    low, high = interval
    return f"[{low:{style}}, {high:{style}}]"
