"""Two traces side by side: where the flow differs, on which edges and routes it agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.comparison.agreement import (
    RoutePair,
    edge_overlap,
    flow_of_groups,
    hub_overlap,
    on_pairs,
    pair_of_unit,
    rank_correlation,
    route_pairs,
    total_variation,
)
from flowgraph.comparison.alignment import SAME_TOKENS, Alignment, Group, align, question_text
from flowgraph.errors import InfeasibleFlowError, InvalidInputError
from flowgraph.files import PathLike, write_json
from flowgraph.flow.flow import NEGLIGIBLE_FLOW
from flowgraph.graph.flow_graph import REGIONS
from flowgraph.pages.comparison_page import write_comparison_html
from flowgraph.tracing.flow_trace import FlowTrace

SCHEMA = "flowgraph-comparison/1"
_NAMED_FIRST = ("model", "layers")
_SETTINGS = ("model", "dtype", "tokenizer", "layers", "heads", "edge_weight", "preset", "rows", "self_attention",
             "first_token", "question_selector", "answer_selector")  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What is compared as one: a token, the tokens that spell the same characters, or a step.

    Attributes:
        index: position among the units of its trace.
        start, stop: its tokens, ``[start, stop)``.
        text: what they say.
        region: "question", "reasoning", "answer" or None; the one with most of its tokens.
    """

    index: int
    start: int
    stop: int
    text: str
    region: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    r"""Two traces of one text, or of two answers to one question.

    Units are tokens, groups of tokens or steps; pairs put them side by side, P of them.

    Attributes:
        first, second: the traces.
        names: what to call them; they say where the two differ.
        by: "tokens", "characters" or "steps".
        rule: what made them comparable, in words.
        units: of the first and of the second trace.
        pairs: ``[P, 2]`` int64 in reading order: unit of the first, unit of the second, -1 where there is none.
        throughput: ``[P, 2]`` float64, share of each flow that passes through; 0 where there is no unit.
        total_variation: :math:`\frac12 \sum |p_1 - p_2|` with :math:`p = f / \sum f`, in [0, 1]: how much of what a
            random stop on a random route of one would have to move to look like the other.
        rank_correlation: Spearman's, over the matched pairs; None for fewer than two, or when all are equal.
        hub_overlap: shared part of the ``num_hubs`` reasoning units with most throughput, in [0, 1]; None without any.
        num_hubs: the larger number of hubs that were compared, at most 10.
        edge_overlap: :math:`2 \sum \min(F_1, F_2) / (\sum F_1 + \sum F_2)` over edges whose ends are matched, in
            [0, 1]: the share of all hops that both flows make. 1 exactly when every edge carries the same.
        mean_hops: of a route between units, in each flow.
        routes: the widest routes of either, widest first.
        notes: what to know before reading a meaning into a difference.

    Make one with :func:`flowgraph.compare`.
    """

    first: FlowTrace
    second: FlowTrace
    names: tuple[str, str]
    by: str
    rule: str
    units: tuple[tuple[Unit, ...], tuple[Unit, ...]]
    pairs: Int64[Tensor, "pairs 2"]
    throughput: Float64[Tensor, "pairs 2"]
    total_variation: float
    rank_correlation: float | None
    hub_overlap: float | None
    num_hubs: int
    edge_overlap: float
    mean_hops: tuple[float, float]
    routes: tuple[RoutePair, ...]
    notes: tuple[str, ...]

    @property
    def difference(self) -> Float64[Tensor, " pairs"]:
        """Throughput in the second minus throughput in the first, per pair, in [-1, 1]."""
        return self.throughput[:, 1] - self.throughput[:, 0]

    @property
    def num_matched(self) -> int:
        """Number of pairs with a unit on both sides."""
        return int((self.pairs >= 0).all(1).sum())

    def largest(self, k: int = 10, *, gains: bool = True) -> list[int]:
        """The pairs that gain (or lose) most throughput from first to second, strongest first."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInputError(f"k: must be at least 1, got {k!r}; ask for the number of pairs you want to see")
        change = self.difference if gains else -self.difference
        order = torch.argsort(change, descending=True, stable=True)[: min(k, int((change > NEGLIGIBLE_FLOW).sum()))]
        return order.tolist()

    def text(self, pair: int) -> str:
        """What the pair says, in the first trace where it is there."""
        i, j = self.pairs[pair].tolist()
        return self.units[0][i].text if i >= 0 else self.units[1][j].text

    def context(self, pair: int, width: int = 16) -> tuple[str, str, str]:
        """The characters before the pair's text, the text, and the characters after it."""
        i, j = self.pairs[pair].tolist()
        trace, unit = (self.first, self.units[0][i]) if i >= 0 else (self.second, self.units[1][j])
        before, after = "".join(trace.tokens[: unit.start][-width:]), "".join(trace.tokens[unit.stop :][:width])
        return before[-width:], unit.text, after[:width]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values, schema ``flowgraph-comparison/1``; see ``docs/compare.md``."""
        values = self.throughput.T.tolist()
        sides = self.pairs.T.tolist()
        units = []
        for side, trace in enumerate((self.first, self.second)):
            pair_of = {unit: pair for pair, unit in enumerate(sides[side]) if unit >= 0}
            generated = trace.generated.tolist()
            units.append([
                {**asdict(unit), "generated": generated[unit.start], "pair": pair_of[unit.index],
                 "throughput": values[side][pair_of[unit.index]]}
                for unit in self.units[side]
            ])  # fmt: skip
        numbers = ("total_variation", "rank_correlation", "hub_overlap", "num_hubs", "edge_overlap", "mean_hops")
        return {
            "schema": SCHEMA,
            "names": list(self.names),
            "by": self.by,
            "rule": self.rule,
            "notes": list(self.notes),
            "summary": {
                "num_units": [len(side) for side in units],
                "matched": self.num_matched,
                **{name: getattr(self, name) for name in numbers[:-1]},
                "mean_hops": list(self.mean_hops),
            },
            "units": units,
            "pairs": [[i, j, d] for (i, j), d in zip(self.pairs.tolist(), self.difference.tolist(), strict=True)],
            "routes": [
                {"pairs": list(r.pairs), "first": r.first, "second": r.second, "shared": r.shared} for r in self.routes
            ],
            "provenance": [dict(self.first.provenance), dict(self.second.provenance)],
        }

    def _named(self, pair: int) -> str:
        before, text, _ = self.context(pair, 8)
        return f"{before.lstrip()!r} then {text!r}" if len(text.strip()) < 2 else repr(text[:40])

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically."""
        write_json(path, self.to_dict())

    def to_html(self, path: PathLike) -> None:
        """Write one self-contained page (no network): both texts side by side, coloured by the difference."""
        write_comparison_html(path, self.to_dict())

    def __repr__(self) -> str:
        first, second = (f"{len(side)} {'groups' if self.by == 'characters' else self.by}" for side in self.units)
        lines = [
            f"Comparison by {self.by}: {self.rule}",
            f"  A {self.names[0]}: {first}, mean route {self.mean_hops[0]:.2f} hops",
            f"  B {self.names[1]}: {second}, mean route {self.mean_hops[1]:.2f} hops",
            f"  {self.num_matched} matched; total variation {self.total_variation:.3f}, "
            f"rank correlation {_or_none(self.rank_correlation)}",
            f"  {self.edge_overlap:.1%} of all hops are shared, {_or_none(self.hub_overlap, '.0%')} of the hubs, and "
            f"{sum(route.shared for route in self.routes)} of the {len(self.routes)} widest routes",
        ]
        for title, gains in (("more in B", True), ("less in B", False)):
            named = [
                f"{self._named(pair)} {float(self.difference[pair]):+.3f}" for pair in self.largest(4, gains=gains)
            ]
            lines.append(f"  {title}: {', '.join(named) or 'nothing'}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare(first: FlowTrace, second: FlowTrace, *, by: str = "auto") -> Comparison:
    """Compare two traces of one text (two models, two layer ranges), or two answers to one question.

    Args:
        first: the trace that differences are counted from, A.
        second: the trace that they lead to, B: a positive difference is more flow in B.
        by: "tokens", "characters" (the finest groups of tokens that both texts share, for two tokenizers), "steps",
            or "auto": tokens, or characters where the same text was cut into other tokens.

    Returns:
        A :class:`Comparison`. Groups and steps are compared by the share of the flow that visits them, exactly
        (:func:`flowgraph.contract`).

    Raises:
        InvalidInputError: the two cannot be aligned; the message says what differs.
        InfeasibleFlowError: in one of them no question token reaches the answer.

    Cost: ten widest routes of each, and the alignment; see :func:`flowgraph.comparison.alignment.align`.
    """
    for name, trace in (("first", first), ("second", second)):
        if not isinstance(trace, FlowTrace):
            raise InvalidInputError(
                f"{name}: must be a FlowTrace, got {type(trace).__name__}; flowgraph.load_trace reads a file"
            )
        if not trace.feasible:
            raise InfeasibleFlowError(
                f"{name}: must have a flow, got a trace in which no question token reaches the answer; "
                "check its regions and its pruning"
            )
    aligned = align(first, second, by)
    flows = flow_of_groups(first.flow, aligned.groups[0]), flow_of_groups(second.flow, aligned.groups[1])
    pairs = torch.tensor(aligned.pairs, dtype=torch.int64)
    units = _units(first, aligned.groups[0]), _units(second, aligned.groups[1])
    throughput = torch.stack([on_pairs(flow.throughput, pairs[:, side]) for side, flow in enumerate(flows)], 1)
    pair_of = [pair_of_unit(pairs[:, side], len(units[side])) for side in (0, 1)]
    thinking = [torch.tensor([unit.region == "reasoning" for unit in side]) for side in units]
    overlap, hops = edge_overlap(flows, pair_of, pairs)
    hub_share, num_hubs = hub_overlap(flows, thinking, pair_of)
    return Comparison(
        first=first,
        second=second,
        names=_names(first, second),
        by=aligned.by,
        rule=aligned.rule,
        units=units,
        pairs=pairs,
        throughput=throughput,
        total_variation=total_variation(throughput),
        rank_correlation=rank_correlation(throughput[(pairs >= 0).all(1)]),
        hub_overlap=hub_share,
        num_hubs=num_hubs,
        edge_overlap=overlap,
        mean_hops=hops,
        routes=route_pairs(flows, pair_of, pairs),
        notes=_notes(first, second, aligned),
    )


def _units(trace: FlowTrace, groups: Sequence[Group]) -> tuple[Unit, ...]:
    masks = [trace.graph[f"{name}_mask"].tolist() for name in REGIONS]
    spans, units = trace.spans.tolist(), []
    for index, (start, stop) in enumerate(groups):
        text = trace.tokens[start]
        if stop - start > 1:  # the characters, as tokens that share one would repeat it
            inside = trace.text[min(s for s, _ in spans[start:stop]) : max(e for _, e in spans[start:stop])]
            text = inside or "".join(trace.tokens[start:stop])
        counts = [sum(mask[start:stop]) for mask in masks]
        region = REGIONS[counts.index(max(counts))] if max(counts) else None
        units.append(Unit(index, start, stop, text, region))
    return tuple(units)


def _names(first: FlowTrace, second: FlowTrace) -> tuple[str, str]:
    """Model and layers, then whatever else tells the two apart: a setting, or the answer."""
    facts = [dict(trace.provenance) | {"damping": trace.flow.damping, "source": trace.flow.source_rule}
             for trace in (first, second)]  # fmt: skip
    rest = [name for name in (*_SETTINGS, "damping", "source") if name not in (*_NAMED_FIRST, "answer_selector",
            "question_selector") and facts[0].get(name) != facts[1].get(name)]  # fmt: skip
    answers = [_answer(trace) for trace in (first, second)]
    names = []
    for fact, answer in zip(facts, answers, strict=True):
        parts = [str(fact.get("model") or "a model")]
        if fact.get("layers"):
            parts.append(f"layers {_ranges(fact['layers'])}")
        parts += [f"{name} {fact.get(name)}" for name in rest]
        if answers[0] != answers[1]:
            parts.append(f"answer {answer!r}")
        names.append(", ".join(parts))
    return names[0], names[1]


def _answer(trace: FlowTrace) -> str:
    text = "".join(trace.tokens[t] for t in trace.answer.nonzero().flatten().tolist()).strip()
    return text if len(text) <= 24 else f"{text[:23]}…"


def _ranges(layers: Any) -> str:
    """[3, 4, 5, 9] as 3-5, 9."""
    try:
        numbers = sorted(int(layer) for layer in layers)
    except (TypeError, ValueError):
        return str(layers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in runs)


def _notes(first: FlowTrace, second: FlowTrace, aligned: Alignment) -> tuple[str, ...]:
    notes = []
    if aligned.rule == SAME_TOKENS and first.tokens != second.tokens:
        at = next(t for t, (a, b) in enumerate(zip(first.tokens, second.tokens, strict=True)) if a != b)
        notes.append(
            f"the token ids are equal but read differently (token {at}: {first.tokens[at]!r} and "
            f"{second.tokens[at]!r}); were they made by two tokenizers?"
        )
    if question_text(first) != question_text(second) or int(first.question.sum()) != int(second.question.sum()):
        counts = int(first.question.sum()), int(second.question.sum())
        notes.append(f"flow enters at other tokens: the question has {counts[0]} in A and {counts[1]} in B")
    versions = [trace.provenance.get("versions") for trace in (first, second)]
    made = [found.get("flowgraph-llm") if isinstance(found, Mapping) else None for found in versions]
    if made[0] != made[1]:
        notes.append(
            f"made by two versions of flowgraph-llm, {made[0]} and {made[1]}: part of a difference may be theirs"
        )
    for name, trace in (("A", first), ("B", second)):
        if float(trace.graph.kept_flow) < 1:
            notes.append(
                f"{name} was pruned to {float(trace.graph.kept_flow):.1%} of its flow; no throughput in it is off by "
                f"more than {float(trace.graph.throughput_error):.1g}"
            )
    settings = [name for name in _SETTINGS if name not in _NAMED_FIRST and
                first.provenance.get(name) != second.provenance.get(name)]  # fmt: skip
    notes += [
        f"{name} differs: {first.provenance.get(name)} in A, {second.provenance.get(name)} in B" for name in settings
    ]
    return tuple(notes)


def _or_none(value: float | None, form: str = ".3f") -> str:
    return "not defined" if value is None else format(value, form)
