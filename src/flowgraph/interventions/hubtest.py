"""The hub test: mask the tokens that a score ranks highest, others at random, the lowest, and watch the answer."""

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
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.utils import scatter

from flowgraph.analysis.statistics import Interval, t_interval, wilson_interval
from flowgraph.attention.layers_and_heads import LayerRule
from flowgraph.errors import InfeasibleFlowError, InvalidInputError, RegionError
from flowgraph.interventions.knockout import Intervention, KnockoutResult, knockouts
from flowgraph.tracing.flow_trace import FlowTrace

Arm = Literal["top", "random", "matched", "bottom"]
Score = Literal["throughput", "potential", "attention", "position"]
_DRAWN = ("random", "matched")
_BINS = 10


@dataclass(frozen=True)
class HubRun:
    """One set of tokens masked in one trace.

    Attributes:
        trace: index of the trace.
        fraction: share of the region's tokens that was asked for.
        arm: how the tokens were chosen.
        seed: of the draw; None where nothing is drawn.
        tokens: what was masked.
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


@dataclass(frozen=True)
class HubRow:
    """One arm at one fraction, or the difference of two arms (``arm`` is then "top - random").

    Attributes:
        fraction, arm: which.
        change: mean change of the answer's log-probability, in nats.
        flip_rate: share of flips; a difference of shares in a row of two arms.
        change_interval, flip_interval: 95 %, over ``units``; None where there is but one unit, and for
            means of units that are all the same.
        units: ``"traces"``, or ``"seeds"`` when there is one trace: then only the draw varies.
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


@dataclass(frozen=True)
class HubTest:
    """What :func:`hub_test` found.

    Attributes:
        rows: one for each fraction and arm.
        differences: top minus each other arm, paired by trace (by seed when there is one trace).
        runs: every single measurement.
        num_traces, score, region: what was tested.
    """

    rows: tuple[HubRow, ...]
    differences: tuple[HubRow, ...]
    runs: tuple[HubRun, ...]
    num_traces: int
    score: str
    region: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"schema": "flowgraph-hub-test/1"}

    def __repr__(self) -> str:
        head = f"hub test of {self.score} on the {self.region} of {self.num_traces} trace(s), {len(self.runs)} runs"
        lines = [head, f"{'masked':>7}  {'arm':<14}{'change of log p':<30}{'flips':<26}over"]
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
    """Does the answer depend more on the tokens with a high score than on others? (arXiv 2606.10646)

    In each trace, a share of the region's tokens is masked as keys for all later positions (see
    :func:`flowgraph.knockout`), and the answer is measured under teacher forcing.

    Args:
        model: the causal LM of the traces.
        trace: one trace, or several.
        fractions: shares of the region's tokens that are masked.
        arms: ``"top"`` and ``"bottom"`` by score (ties: the earlier token first); ``"random"``: drawn from the whole
            region; ``"matched"``: drawn so that each tenth of the region has as many masked as under top. Drawn sets
            may share tokens with the top ones.
        seeds: one draw for each, in each trace.
        region: ``"reasoning"`` or ``"question"``.
        scores: ``"throughput"``, ``"potential"`` (h), ``"attention"`` (received: sum of the capacities of outgoing
            edges), ``"position"`` (the latest tokens), a vector over the trace's tokens, or one for each trace.
        layers: where the tokens are masked; default all attention layers.
        batch_size: interventions in one forward pass.
        progress: called with a line of text before each pass.

    Returns:
        Means, flip rates and 95 % intervals: Student's t for changes and for differences, Wilson for shares. With
        several traces over the traces, each trace's seeds averaged first. With one trace over the seeds, which says
        how much the draw matters and nothing about other texts.

    Raises:
        RegionError: an empty region, or one with too few tokens for the smallest fraction.
        InfeasibleFlowError: throughput or potential asked of a trace without flow.
        InvalidInputError: any other argument outside its range; see also :func:`flowgraph.knockout`.

    Cost: (2 + 2 seeds) x fractions / batch_size forward passes a trace.
    """
    traces = list(trace) if isinstance(trace, Iterable) else [trace]
    shares, drawn = _checked_options(traces, fractions, arms, seeds)
    ranked = [_ranked(one, region, _scores_of(scores, traces, number)) for number, one in enumerate(traces)]
    plans = [_plan(one, order, shares, arms, drawn) for one, order in zip(traces, ranked, strict=True)]
    runs: list[HubRun] = []
    for number, (one, plan) in enumerate(zip(traces, plans, strict=True)):

        def report(line: str, number: int = number) -> None:
            if progress is not None:
                progress(f"trace {number + 1} of {len(traces)}: {line}")

        masked = [Intervention(tokens=tokens, layers=layers) for *_, tokens in plan]
        results = knockouts(model, one, masked, batch_size=batch_size, progress=report)
        runs += [_run(number, *entry, result) for entry, result in zip(plan, results, strict=True)]
    rows, differences = _summary(runs, shares, arms, len(traces))
    name = scores if isinstance(scores, str) else "given scores"
    return HubTest(tuple(rows), tuple(differences), tuple(runs), len(traces), name, region)


def _checked_options(traces: Sequence[Any], fractions: Any, arms: Any, seeds: Any) -> tuple[list[float], list[int]]:
    """Fractions and seeds as plain numbers."""
    if not traces or not all(isinstance(trace, FlowTrace) for trace in traces):
        raise InvalidInputError(
            f"trace: must be a FlowTrace or several, got {[type(trace).__name__ for trace in traces]}; "
            "load_trace reads one from a file"
        )
    try:
        shares = [float(fraction) for fraction in fractions]
    except (TypeError, ValueError):
        shares = []
    if not shares or not all(0 < fraction < 1 for fraction in shares) or len(set(shares)) < len(shares):
        raise InvalidInputError(
            f"fractions: must lie in (0, 1), each once, got {shares or fractions!r}; e.g. [0.05, 0.1, 0.2]"
        )
    known = get_args(Arm)
    if (
        not isinstance(arms, list | tuple)
        or not arms
        or not all(arm in known for arm in arms)
        or len(set(arms)) < len(arms)
    ):
        raise InvalidInputError(
            f"arms: must be some of {', '.join(map(repr, known))}, each once, got {arms!r}; default: all"
        )
    try:
        drawn = [index(seed) for seed in seeds]
    except TypeError:
        drawn = [-1]
    if (set(arms) & set(_DRAWN) and not drawn) or len(set(drawn)) < len(drawn) or any(seed < 0 for seed in drawn):
        raise InvalidInputError(f"seeds: must be non-negative whole numbers, each once, got {seeds!r}; e.g. range(10)")
    return shares, drawn


def _scores_of(scores: Any, traces: list[FlowTrace], number: int) -> Float[Tensor, " tokens"]:
    trace = traces[number]
    if isinstance(scores, str):
        return _named_scores(scores, trace)
    vector = scores if isinstance(scores, Tensor) and len(traces) == 1 else None
    if isinstance(scores, Sequence) and len(scores) == len(traces):
        try:
            vector = torch.as_tensor(scores[number])
        except (TypeError, ValueError, RuntimeError):
            vector = None
    fits = vector is not None and vector.shape == (trace.num_tokens,) and not vector.is_complex()
    if vector is None or not fits or not bool(torch.isfinite(vector.double()).all()):
        raise InvalidInputError(
            f"scores: must be one finite number for each of the {trace.num_tokens} tokens of trace {number}, got "
            f"{'none' if vector is None else tuple(vector.shape)}; pass a list with one vector for each trace"
        )
    return vector.double().cpu()


def _named_scores(name: str, trace: FlowTrace) -> Float[Tensor, " tokens"]:
    if name not in get_args(Score):
        allowed = ", ".join(map(repr, get_args(Score)))
        raise InvalidInputError(f"scores: must be {allowed} or vectors, got {name!r}; 'throughput' is the default")
    if name == "position":
        return torch.arange(trace.num_tokens, dtype=torch.float64)
    if name == "attention":
        read = trace.graph.capacity.double()
        return scatter(read, trace.graph.edge_index[0], dim_size=trace.num_tokens, reduce="sum").cpu()
    if not trace.feasible:
        raise InfeasibleFlowError(
            f"trace: must have a flow to be ranked by {name}, got one whose question does not reach the answer; "
            "use scores='attention'"
        )
    return (trace.throughput if name == "throughput" else trace.potential).double().cpu()


def _ranked(trace: FlowTrace, region: str, scores: Float[Tensor, " tokens"]) -> list[int]:
    """The region's tokens that can be masked, highest score first."""
    if region not in ("reasoning", "question"):
        raise InvalidInputError(
            f"region: must be 'reasoning' or 'question', got {region!r}; 'reasoning' is the default"
        )
    tokens = (trace.reasoning if region == "reasoning" else trace.question).cpu().nonzero().flatten()
    if tokens.numel() == 0:
        raise RegionError(
            f"{region}: must hold tokens to mask, got none; trace an answer with steps before it, or test "
            "region='question'"
        )
    last = int(trace.answer.cpu().nonzero().max())
    if int(tokens.min()) >= last - 1:  # the row of its own position, which a masked token keeps, emits the next
        raise RegionError(
            f"{region}: must hold tokens that the answer can read, got none before token {last - 1}, which emits the "
            "last of the answer; mask what stands before it"
        )
    return tokens[torch.argsort(scores[tokens], descending=True, stable=True)].tolist()


Entry = tuple[float, str, int | None, tuple[int, ...]]


def _plan(
    trace: FlowTrace, order: list[int], fractions: list[float], arms: Sequence[str], seeds: list[int]
) -> list[Entry]:
    """Fraction, arm, seed and tokens of every run on one trace."""
    ids = np.asarray(trace.token_ids.tolist(), dtype="<i8")
    text = zlib.crc32(ids.tobytes())  # draws follow the text, not its place in the list
    plan: list[Entry] = []
    for fraction in fractions:
        count = math.floor(fraction * len(order) + 0.5)
        if not 0 < count < len(order):
            raise RegionError(
                f"fractions: must mask at least one token and leave one, got {fraction:g} of {len(order)}; "
                "use a longer answer or another fraction"
            )
        for arm in arms:
            for seed in seeds if arm in _DRAWN else [None]:
                if arm == "top":
                    tokens = order[:count]
                elif arm == "bottom":
                    tokens = order[-count:]
                else:
                    generator = np.random.default_rng([seed or 0, text, count, _DRAWN.index(arm)])
                    tokens = _drawn(sorted(order), order[:count], arm, generator)
                plan.append((fraction, arm, seed, tuple(sorted(tokens))))
    return plan


def _drawn(tokens: list[int], top: list[int], arm: str, generator: np.random.Generator) -> list[int]:
    """As many tokens as there are in top, from anywhere or from the same tenths of the region."""
    if arm == "random":
        return generator.choice(tokens, len(top), replace=False).tolist()
    chosen: list[int] = []
    for tenth in np.array_split(np.asarray(tokens), _BINS):
        wanted = np.isin(tenth, top).sum()
        chosen += generator.choice(tenth, wanted, replace=False).tolist() if wanted else []
    return chosen


def _run(
    trace: int, fraction: float, arm: str, seed: int | None, tokens: tuple[int, ...], result: KnockoutResult
) -> HubRun:
    change = result.change
    per_token, kl = change / result.answer.numel(), float(result.kl.mean())
    return HubRun(trace, fraction, arm, seed, tokens, change, per_token, result.flips, kl)


def _summary(
    runs: list[HubRun], fractions: list[float], arms: Sequence[str], num_traces: int
) -> tuple[list[HubRow], list[HubRow]]:
    rows, differences = [], []
    for fraction in fractions:
        values = {arm: _units([r for r in runs if (r.fraction, r.arm) == (fraction, arm)], num_traces) for arm in arms}
        for arm, units in values.items():
            over = "traces" if num_traces > 1 or arm not in _DRAWN else "seeds"
            changes, flips = zip(*units, strict=True)
            rate, count = fmean(flips), len(units)
            row = HubRow(
                fraction, arm, fmean(changes), t_interval(changes), rate, wilson_interval(rate, count), over, count
            )
            rows.append(row)
            if arm == "top" or "top" not in arms:
                continue
            first = values["top"] * (count if num_traces == 1 else 1)  # one value against each draw
            changes, flips = ([a[k] - b[k] for a, b in zip(first, units, strict=True)] for k in (0, 1))
            name, rate = f"top - {arm}", fmean(flips)
            spread = t_interval(flips)
            within = None if spread is None else (max(-1.0, spread[0]), min(1.0, spread[1]))
            row = HubRow(fraction, name, fmean(changes), t_interval(changes), rate, within, over, count)
            differences.append(row)
    return rows, differences


def _units(runs: list[HubRun], num_traces: int) -> list[tuple[float, float]]:
    """(change, flips) of each independent unit: traces with their seeds averaged, or the seeds of the only trace."""
    groups = [[run for run in runs if run.trace == number] for number in range(num_traces)]
    if num_traces == 1:
        groups = [[run] for run in runs]
    return [(fmean(run.change for run in group), fmean(run.flips for run in group)) for group in groups]


def _brackets(interval: Interval, style: str) -> str:
    return "" if interval is None else f"[{interval[0]:{style}}, {interval[1]:{style}}]"
