"""compare and Comparison: where the flow of two traces differs, and on which edges and routes it agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from flowgraph.display.fragment import bar, escaped, fragment, percent, table
from flowgraph.errors import InfeasibleFlowError, InvalidInputError
from flowgraph.files import PathLike, loadable, write_json
from flowgraph.flow.flow import NEGLIGIBLE_FLOW
from flowgraph.graph.flow_graph import REGIONS
from flowgraph.pages.comparison_page import write_comparison_html
from flowgraph.text.spans import selected_text
from flowgraph.tracing.flow_trace import FlowTrace

SCHEMA = "flowgraph-comparison/1"
_MAX_ANSWER = 24
"""Characters of an answer in a name."""
_NUM_SHOWN = 6
"""Largest gains and losses that a notebook shows."""
_CONTEXT = 16
"""Characters around a pair that a notebook shows."""
_MAX_NOTE = 400
"""Characters of a note, a name or a rule that a notebook shows."""

_SELECTORS = ("question_selector", "answer_selector")
_TRACE_SETTINGS = (
    "dtype",
    "tokenizer",
    "heads",
    "capacity",
    "edge_weight",
    "preset",
    "rows",
    "self_attention",
    "first_token",
)
_FLOW_SETTINGS = ("damping", "source")


@loadable
@dataclass(frozen=True)
class Unit:
    """A token, the tokens that spell the same characters, or a step: what is compared as one.

    Attributes:
        index: position among the units of its trace.
        start: its first token.
        stop: the token after its last.
        text: its characters.
        region: "question", "reasoning", "answer" or None; the one with most of its tokens.
    """

    index: int
    start: int
    stop: int
    text: str
    region: str | None


@loadable
@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    r"""Two traces of one text, or of two answers to one question.

    Units are tokens, groups of tokens or steps; pairs put them side by side, P of them.
    Make one with :func:`flowgraph.compare`.

    Attributes:
        first: the first trace, A.
        second: the second trace, B.
        names: a name for each, with the settings in which the two differ.
        by: "tokens", "characters" or "steps".
        rule: what made them comparable, in words.
        units: of the first and of the second trace.
        pairs: ``[P, 2]`` int64 in reading order: unit of the first, unit of the second, -1 where one is missing.
        throughput: ``[P, 2]`` float64, share of each flow that passes through; 0 where the unit is missing.
        total_variation: :math:`\frac12 \sum |p_1 - p_2|` with :math:`p = f / \sum f`, in [0, 1]: the share of the
            stops on a random route of one that would have to move to be distributed as in the other. Answers that
            differ are one unit each, and partners.
        rank_correlation: Spearman's, over the matched pairs, in [-1, 1]; None for fewer than three, or where all are
            equal.
        hub_overlap: common part of the ``num_hubs`` reasoning units with most throughput, in [0, 1]; None without any.
        num_hubs: the larger number of hubs that were compared, at most 10.
        edge_overlap: :math:`2 \sum \min(F_1, F_2) / (\sum F_1 + \sum F_2)` over edges whose ends are matched, in
            [0, 1]: the share of all hops that both flows make. 1 exactly when every edge carries the same.
        mean_hops: of a route between units, in each flow.
        routes: the widest routes of either, widest first.
        notes: what to know before interpreting a difference.
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
        """List the pairs whose throughput changes most from first to second, strongest first.

        Args:
            k: list at most this many; differences below 1e-12 are ignored.
            gains: the pairs that gain throughput; False for those that lose it.

        Raises:
            InvalidInputError: ``k`` is not a positive integer.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInputError(f"k: must be at least 1, got {k!r}; pass the number of pairs to list")
        change = self.difference if gains else -self.difference
        num_changed = int((change > NEGLIGIBLE_FLOW).sum())
        order = torch.argsort(change, descending=True, stable=True)
        return order[: min(k, num_changed)].tolist()

    def text(self, pair: int) -> str:
        """Return the characters of a pair: those of its unit in the first trace where there is one."""
        _, unit = self._trace_and_unit(pair)
        return unit.text

    def context(self, pair: int, width: int = 16) -> tuple[str, str, str]:
        """Return up to ``width`` characters before the pair's text, the text, and as many characters after it."""
        trace, unit = self._trace_and_unit(pair)
        # The characters before and after those of the unit; its tokens may share characters with others.
        spans = trace.spans[unit.start : unit.stop]
        before = trace.text[: int(spans[:, 0].min())]
        after = trace.text[int(spans[:, 1].max()) :]
        return before[-width:], unit.text, after[:width]

    def _trace_and_unit(self, pair: int) -> tuple[FlowTrace, Unit]:
        """Choose the side that a pair is quoted from: the first trace where it has a unit there."""
        i, j = self.pairs[pair].tolist()
        if i >= 0:
            return self.first, self.units[0][i]
        return self.second, self.units[1][j]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values, schema ``flowgraph-comparison/1``; see ``docs/compare.md``."""
        units = [self._unit_rows(0), self._unit_rows(1)]
        pairs = []
        for (i, j), difference in zip(self.pairs.tolist(), self.difference.tolist(), strict=True):
            pairs.append([i, j, difference])
        routes = []
        for route in self.routes:
            row = {"pairs": list(route.pairs), "first": route.first, "second": route.second, "shared": route.shared}
            routes.append(row)
        return {
            "schema": SCHEMA,
            "names": list(self.names),
            "by": self.by,
            "rule": self.rule,
            "notes": list(self.notes),
            "summary": {
                "num_units": [len(units[0]), len(units[1])],
                "matched": self.num_matched,
                "total_variation": self.total_variation,
                "rank_correlation": self.rank_correlation,
                "hub_overlap": self.hub_overlap,
                "num_hubs": self.num_hubs,
                "edge_overlap": self.edge_overlap,
                "mean_hops": list(self.mean_hops),
            },
            "units": units,
            "pairs": pairs,
            "routes": routes,
            "provenance": [dict(self.first.provenance), dict(self.second.provenance)],
        }

    def _unit_rows(self, side: int) -> list[dict[str, Any]]:
        """Return the units of one trace as JSON values, with the pair and the throughput of each."""
        trace = (self.first, self.second)[side]
        generated = trace.generated.tolist()
        throughput = self.throughput[:, side].tolist()
        pair_of = pair_of_unit(self.pairs[:, side], len(self.units[side])).tolist()
        rows = []
        for unit in self.units[side]:
            pair = pair_of[unit.index]
            row = asdict(unit)
            row["generated"] = generated[unit.start]
            row["pair"] = pair
            row["throughput"] = throughput[pair]
            rows.append(row)
        return rows

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically.

        Raises:
            OutputError: the path cannot be written.
        """
        write_json(path, self.to_dict())

    def to_html(self, path: PathLike) -> None:
        """Write one self-contained page (no network): both texts side by side, coloured by the difference.

        Raises:
            OutputError: the path cannot be written.
        """
        write_comparison_html(path, self.to_dict())

    def __repr__(self) -> str:
        kind = "groups" if self.by == "characters" else self.by
        first_units, second_units = self.units
        is_any_joined = any(unit.stop - unit.start > 1 for unit in (*first_units, *second_units))
        if self.by == "tokens" and is_any_joined:
            kind = "tokens, its answer as one"
        num_shared_routes = sum(route.shared for route in self.routes)
        lines = [f"Comparison by {self.by}: {self.rule}"]
        for letter, name, units, hops in zip("AB", self.names, self.units, self.mean_hops, strict=True):
            lines.append(f"  {letter} {name}: {len(units)} {kind}, mean route {hops:.2f} hops")
        lines += [
            f"  {self.num_matched} matched; total variation {self.total_variation:.3f}, "
            f"rank correlation {_or_undefined(self.rank_correlation, '.3f')}",
            f"  {self.edge_overlap:.1%} of all hops are shared, {_or_undefined(self.hub_overlap, '.0%')} of the hubs, "
            f"and {num_shared_routes} of the {len(self.routes)} widest routes",
            f"  more in B: {self._listed(gains=True)}",
            f"  less in B: {self._listed(gains=False)}",
        ]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Render the comparison for a notebook: both traces, how far they agree, and the largest differences."""
        kind = "groups" if self.by == "characters" else self.by
        lines = [f"<b>Comparison</b> by {self.by}: {escaped(self.rule, _MAX_NOTE)}"]
        for letter, name, units, hops in zip("AB", self.names, self.units, self.mean_hops, strict=True):
            lines.append(
                f"<b>{letter}</b> {escaped(name, _MAX_NOTE)}: {len(units):,} {kind}, mean route {hops:.2f} hops"
            )
        num_shared_routes = sum(route.shared for route in self.routes)
        lines.append(
            f"{self.num_matched:,} matched; shared: {percent(self.edge_overlap)} of all hops, "
            f"{_or_undefined(self.hub_overlap, '.0%')} of the hubs, {num_shared_routes} of the {len(self.routes)} "
            "widest routes"
        )
        lines.append(
            f"throughput: total variation {self.total_variation:.3f} (0 alike, 1 nothing in common), rank correlation "
            f"{_or_undefined(self.rank_correlation, '.3f')}"
        )
        lines += [f"note: {escaped(note, _MAX_NOTE)}" for note in self.notes]
        parts = [f"<div>{'<br>'.join(lines)}</div>", self._html_changes(gains=True), self._html_changes(gains=False)]
        return fragment(*parts)

    def _html_changes(self, gains: bool) -> str:
        """Tabulate the pairs whose throughput changes most, with the text around them."""
        title = "more flow in B" if gains else "less flow in B"
        pairs = self.largest(_NUM_SHOWN, gains=gains)
        if not pairs:
            return f"<div>{title}: nothing</div>"
        # Bars are relative to the largest change of either sign.
        largest = float(self.difference.abs().max())
        rows = []
        for pair in pairs:
            change = float(self.difference[pair])
            rows.append(
                [
                    self._html_text(pair),
                    self._html_share(pair, 0),
                    self._html_share(pair, 1),
                    f"{100 * change:+.1f}",
                    bar(abs(change) / largest, "flow" if gains else "less"),
                ]
            )
        return table([title, "A", "B", "B - A, points", ""], rows, left=[title, ""])

    def _html_text(self, pair: int) -> str:
        """Quote a pair in bold between the texts around it."""
        before, text, after = self.context(pair, _CONTEXT)
        shown = f"<b>{escaped(text)}</b>"
        # A step is long enough to be recognised alone.
        if self.by != "steps":
            shown = f"{escaped(before)}{shown}{escaped(after)}"
        return f'<bdi style="white-space:pre-wrap">{shown}</bdi>'

    def _html_share(self, pair: int, side: int) -> str:
        """Write the throughput of a pair on one side, or that the side has no such unit."""
        if int(self.pairs[pair, side]) < 0:
            return "none"
        return percent(float(self.throughput[pair, side]))

    def _listed(self, gains: bool) -> str:
        """Return the four pairs that change most, each with its difference, in one line."""
        changes = []
        for pair in self.largest(4, gains=gains):
            changes.append(f"{self._quoted(pair)} {float(self.difference[pair]):+.3f}")
        return ", ".join(changes) or "nothing"

    def _quoted(self, pair: int) -> str:
        """Quote a pair's text; text shorter than two characters with what stands before it."""
        before, text, _ = self.context(pair, 8)
        if len(text.strip()) < 2:
            return f"{before.lstrip()!r} then {text!r}"
        return repr(text[:40])


def compare(first: FlowTrace, second: FlowTrace, *, by: str = "auto") -> Comparison:
    """Compare two traces of one text (two models, two layer ranges), or two answers to one question.

    Args:
        first: the trace that differences are counted from, A.
        second: the trace that they lead to, B: a positive difference is more flow in B.
        by: "tokens", "characters" (the finest groups of tokens that both texts share, for two tokenizers), "steps",
            or "auto": tokens, or characters where the same text was cut into other tokens. Of answers that differ, all
            tokens are compared as one.

    Returns:
        A :class:`Comparison`. Groups and steps are compared by the share of the flow that visits them, exactly
        (:func:`flowgraph.contract`).

    Raises:
        InvalidInputError: the two cannot be aligned; the message names the difference.
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

    # Both traces as flows between units, and the pairs of units.
    aligned = align(first, second, by)
    first_groups, second_groups = aligned.groups
    units = (
        _units(first, first_groups),
        _units(second, second_groups),
    )
    flows = (
        flow_of_groups(first.flow, first_groups),
        flow_of_groups(second.flow, second_groups),
    )
    pairs = torch.tensor(aligned.pairs, dtype=torch.int64)
    is_matched = (pairs >= 0).all(1)

    # What each measure reads: throughput per pair, the pair of each unit, the units that may be hubs.
    throughput_of_side = []
    pair_of = []
    is_reasoning = []
    for side in (0, 1):
        throughput_of_side.append(on_pairs(flows[side].throughput, pairs[:, side]))
        pair_of.append(pair_of_unit(pairs[:, side], len(units[side])))
        is_reasoning.append(torch.tensor([unit.region == "reasoning" for unit in units[side]]))
    throughput = torch.stack(throughput_of_side, dim=1)

    # Agreement on edges and on hubs; each measure gets the pairs, so that the same partners count in both.
    shared_hops, mean_hops = edge_overlap(flows, pair_of, pairs)
    shared_hubs, num_hubs = hub_overlap(flows, is_reasoning, pair_of)
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
        rank_correlation=rank_correlation(throughput[is_matched]),
        hub_overlap=shared_hubs,
        num_hubs=num_hubs,
        edge_overlap=shared_hops,
        mean_hops=mean_hops,
        routes=_with_text(route_pairs(flows, pair_of, pairs), units, aligned.pairs),
        notes=_notes(first, second, aligned),
    )


def _with_text(
    routes: Sequence[RoutePair], units: Sequence[Sequence[Unit]], pairs: Sequence[Sequence[int]]
) -> tuple[RoutePair, ...]:
    """Add the text of the units to routes: that of the first trace where it has the unit."""
    named = []
    for route in routes:
        texts = []
        for pair in route.pairs:
            i, j = pairs[pair]
            if i >= 0:
                texts.append(units[0][i].text)
            else:
                texts.append(units[1][j].text)
        named.append(replace(route, text=tuple(texts)))
    return tuple(named)


def _units(trace: FlowTrace, groups: Sequence[Group]) -> tuple[Unit, ...]:
    """Describe each group of tokens: its characters, and the region with most of its tokens."""
    masks = {name: trace.graph[f"{name}_mask"].tolist() for name in REGIONS}
    spans = trace.spans.tolist()
    units = []
    for index, (start, stop) in enumerate(groups):
        if stop - start == 1:
            text = trace.tokens[start]
        else:
            # Tokens may share a character, which joining their texts would repeat.
            first_character = min(low for low, _ in spans[start:stop])
            last_character = max(high for _, high in spans[start:stop])
            text = trace.text[first_character:last_character]
            if not text:
                text = "".join(trace.tokens[start:stop])

        # The region with most tokens of the group; None where no token lies in a region.
        counts = {name: sum(mask[start:stop]) for name, mask in masks.items()}
        # Of equal counts, max returns the first region in reading order.
        largest = max(REGIONS, key=counts.__getitem__)
        region = largest if counts[largest] > 0 else None
        units.append(Unit(index, start, stop, text, region))
    return tuple(units)


def _names(first: FlowTrace, second: FlowTrace) -> tuple[str, str]:
    """Name each trace by its model and layers, then by the settings and the answer in which the two differ."""
    first_settings = _settings(first)
    second_settings = _settings(second)
    differing = []
    for name in (*_TRACE_SETTINGS, *_FLOW_SETTINGS):
        if first_settings.get(name) != second_settings.get(name):
            differing.append(name)

    # The answers only where they differ: two models on one text have one answer.
    first_answer = _answer(first)
    second_answer = _answer(second)
    show_answer = first_answer != second_answer
    first_name = _name(first_settings, differing, first_answer if show_answer else None)
    second_name = _name(second_settings, differing, second_answer if show_answer else None)
    return first_name, second_name


def _settings(trace: FlowTrace) -> dict[str, Any]:
    """Return a trace's provenance with the options of its flow."""
    settings = dict(trace.provenance)
    settings["damping"] = trace.flow.damping
    settings["source"] = trace.flow.source_rule
    return settings


def _name(settings: Mapping[str, Any], differing: Sequence[str], answer: str | None) -> str:
    """Join model, layers, the differing settings and the answer (None: the same in both) to a name."""
    parts = [str(settings.get("model") or "a model")]
    if settings.get("layers"):
        parts.append(f"layers {_ranges(settings['layers'])}")
    for name in differing:
        parts.append(f"{name} {settings.get(name)}")
    if answer is not None:
        parts.append(f"answer {answer!r}")
    return ", ".join(parts)


def _answer(trace: FlowTrace) -> str:
    """Return the text of the answer, shortened to fit a name."""
    text = selected_text(trace.text, trace.spans[trace.answer].tolist())
    if len(text) <= _MAX_ANSWER:
        return text
    return text[: _MAX_ANSWER - 1] + "…"


def _ranges(layers: Any) -> str:
    """Write [3, 4, 5, 9] as "3-5, 9"; a provenance of another tool as it is."""
    try:
        numbers = sorted(int(layer) for layer in layers)
    except (TypeError, ValueError):
        return str(layers)
    # Runs of consecutive numbers, each as [first, last].
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    written = []
    for low, high in runs:
        written.append(f"{low}-{high}" if low < high else str(low))
    return ", ".join(written)


def _notes(first: FlowTrace, second: FlowTrace, aligned: Alignment) -> tuple[str, ...]:
    """List what may explain a difference besides the flow: tokenizers, regions, versions, pruning, settings."""
    notes = []
    # One id may stand for different texts in different vocabularies.
    if aligned.rule == SAME_TOKENS and first.tokens != second.tokens:
        token_pairs = zip(first.tokens, second.tokens, strict=True)
        at = next(t for t, (one, other) in enumerate(token_pairs) if one != other)
        notes.append(
            f"the token ids are equal but read differently (token {at}: {first.tokens[at]!r} and "
            f"{second.tokens[at]!r}); were they made by two tokenizers?"
        )

    # What was joined.
    first_answer = _answer(first)
    second_answer = _answer(second)
    first_groups, second_groups = aligned.groups
    is_any_joined = any(stop - start > 1 for start, stop in (*first_groups, *second_groups))
    if aligned.by == "tokens" and is_any_joined:
        notes.append(
            f"the answers differ, {first_answer!r} in A and {second_answer!r} in B: the tokens of each are compared as "
            "one, because all flow ends there"
        )

    # The source of the flow.
    first_size = int(first.question.sum())
    second_size = int(second.question.sum())
    if question_text(first) != question_text(second) or first_size != second_size:
        notes.append(f"flow enters at other tokens: the question has {first_size} in A and {second_size} in B")

    # The code, and the approximation, behind the numbers.
    first_version = _package_version(first)
    second_version = _package_version(second)
    if first_version != second_version:
        notes.append(
            f"made by two versions of flowgraph-llm, {first_version} and {second_version}: part of a difference may "
            "be theirs"
        )

    for name, trace in (("A", first), ("B", second)):
        kept_flow = float(trace.graph.kept_flow)
        if kept_flow < 1:
            notes.append(
                f"{name} was pruned to {kept_flow:.1%} of its flow; no throughput in it is off by "
                f"more than {float(trace.graph.throughput_error):.1g}"
            )

    # Model and layers are in the names of both; the flow's own options are not part of the provenance.
    for name in (*_TRACE_SETTINGS, *_SELECTORS):
        in_first = first.provenance.get(name)
        in_second = second.provenance.get(name)
        if in_first != in_second:
            notes.append(f"{name} differs: {in_first} in A, {in_second} in B")
    return tuple(notes)


def _package_version(trace: FlowTrace) -> Any:
    """Return the version of this package that a trace's provenance names; None where it is missing."""
    versions = trace.provenance.get("versions")
    if isinstance(versions, Mapping):
        return versions.get("flowgraph-llm")
    return None


def _or_undefined(value: float | None, form: str) -> str:
    """Format a number that may be missing."""
    if value is None:
        return "not defined"
    return format(value, form)
