"""``TraceOptions``: the choices shared by ``trace`` and ``trace_corpus``, documented and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.capacities.capture import capture
from flowgraph.capacities.registry import find_capacity
from flowgraph.errors import InvalidInputError
from flowgraph.flow.compositions import Composition, find_composition
from flowgraph.flow.solve import Absorption, SourceRule, Vector, check_options
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.propagation.interface import Backend
from flowgraph.tracing.presets import find_preset

_CHOICES_OF_THE_FLOW = (
    "layers",
    "heads",
    "edge_weight",
    "rows",
    "self_attention",
    "first_token",
    "source",
    "demand",
    "absorption",
    "damping",
    "composition",
    "composition_options",
)


@dataclass(frozen=True, eq=False)
class TraceOptions:
    """The choices of a trace: how attention is read, becomes a graph, and how the flow on it is solved.

    Attributes:
        capacity: what an edge weighs: ``"attention"``, or another one of :func:`flowgraph.capacity_names`, such as
            ``"vtrace_share"``, ``"sharp"`` or the signed ``"relevance"``.
        capacity_options: further options of the capacity by name, as :func:`flowgraph.capture` takes them: ``power``
            and ``place`` of ``"sharpened"``; ``target``, ``contrast`` and ``hops`` of ``"relevance"``.
        layers: ``"middle"`` (the middle third), ``"upper"`` (from one third up), ``"all"``, ``"10-19"``, ``"10-"`` or
            indices. None: as the capacity has it, ``"middle"`` for attention.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a
            :class:`flowgraph.HeadSelector`, for attention. None: ``"mean"``.
        edge_weight: ``"attention"``, or ``"value_norm"``: attention times the norm of the value vector that it reads.
        preset: ``"default"``; ``"paper"`` for the choices of arXiv 2606.10646; ``"evidence"`` (which evidence did the
            answer use: ``capacity="relevance"``) or ``"steps"`` (which step matters: ``capacity="vtrace_share"``).
            It fixes the next three, which override it one by one where they are given; see
            :class:`flowgraph.EdgeRules`. Its capacity is resolved by :func:`chosen_capacity` before.
        rows: which attention row holds the incoming edges of a token: ``"emission"`` (of a generated token, the row
            of the position that generated it), ``"emission_all"`` (the same for every token) or ``"literal"`` (its
            own row).
        self_attention: ``"drop"``, or ``"renormalize"`` the rest of the row.
        first_token: ``"exclude"`` or ``"keep"`` the edges from the first token, an attention sink. Without its edges,
            nothing enters at it, also where the question holds it.
        source: where the unit of flow enters: ``"uniform"`` over the question tokens, ``"potential"`` (in proportion
            to h), or a non-negative vector ``[T]``; see :func:`flowgraph.solve`.
        demand: b, a non-negative vector ``[T]`` of weights of the edges to the virtual sink; default: 1 on answer
            tokens. It belongs to one text, so ``trace_corpus`` does not offer it.
        absorption: ``"absorb"`` (no edge leaves an answer token) or ``"pass_through"``; the default depends on
            ``demand``.
        damping: factor per hop, in (0, 1].
        max_edges: ``"all"``, a number (the edges with most flow), or ``"auto"``: all up to a length, then a number
            per token; see :meth:`flowgraph.FlowGraph.from_rows`.
        backend: of the solver; see :func:`flowgraph.solve`.
        max_new_tokens: limit of the response that is generated when none is given.
        composition: how edges become the scores of the tokens: one of :func:`flowgraph.composition_names`, such as
            ``"cage"``. None: as the capacity has it, the throughput or the potential.
        composition_options: options of the composition by name; see :func:`flowgraph.compose`.
    """

    capacity: str = "attention"
    capacity_options: Mapping[str, Any] | None = None
    layers: LayerRule | None = None
    heads: str | Sequence[int] | HeadSelector | None = None
    edge_weight: str = "attention"
    preset: str = "default"
    rows: str | None = None
    self_attention: str | None = None
    first_token: str | None = None
    source: SourceRule | Vector = "uniform"
    demand: Vector | None = None
    absorption: Absorption | None = None
    damping: float = 1.0
    max_edges: int | str = "auto"
    backend: Backend = "auto"
    max_new_tokens: int = 256
    composition: str | None = None
    composition_options: Mapping[str, Any] | None = None

    @cached_property
    def rules(self) -> EdgeRules:
        """The preset with the rules that override it.

        Raises:
            InvalidInputError: an unknown preset or rule.
        """
        return EdgeRules.preset(
            find_preset(self.preset).edge_rules,
            rows=self.rows,
            self_attention=self.self_attention,
            first_token=self.first_token,
            normalization=find_capacity(self.capacity).normalization,
        )

    @property
    def chosen_layers(self) -> LayerRule:
        """The layers that are read: those given, or those of the capacity."""
        if self.layers is not None:
            return self.layers
        return find_capacity(self.capacity).defaults.get("layers", "all")

    @cached_property
    def chosen_composition(self) -> tuple[Composition, dict[str, Any]] | None:
        """The composition with all of its options, checked; None where the capacity decides what ranks tokens.

        Raises:
            InvalidInputError: no such composition or option, or a value outside its range.
        """
        if self.composition is None:
            if self.composition_options:
                raise InvalidInputError(
                    f"composition_options: must come with a composition, got {self.composition_options!r:.80} alone; "
                    "name one, e.g. composition='hops'"
                )
            return None
        chosen = find_composition(self.composition)
        return chosen, chosen.complete(self.composition_options or {})

    def capture(
        self,
        model: nn.Module,
        input_ids: Int64[Tensor, "batch tokens"],
        attention_mask: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> AttentionRows:
        """Capture the rows of a batch with these choices; ``answer`` is for capacities that explain certain tokens."""
        # Options of the capacity come last, so that they replace the layers and heads of the trace.
        choices: dict[str, Any] = {"layers": self.layers, "heads": self.heads, **(self.capacity_options or {})}
        if "answer" in find_capacity(self.capacity).defaults:
            choices["answer"] = answer
        if self.edge_weight != "attention":
            choices["edge_weight"] = self.edge_weight
        return capture(model, input_ids, attention_mask, capacity=self.capacity, **choices)

    @property
    def is_signed(self) -> bool:
        """Whether the edges may be negative, so that a trace is a :class:`flowgraph.RelevanceTrace`."""
        return find_capacity(self.capacity).signed

    def check(self, model: nn.Module) -> None:
        """Refuse every invalid choice that can be found without a forward pass; the length of a text is not needed.

        Raises:
            InvalidInputError: a choice outside its stated range, or outside the model.
            CaptureError: the architecture cannot be captured correctly.
        """
        # The rules and the composition are checked when they are built.
        _ = self.rules
        _ = self.chosen_composition
        check_options(self.backend, self.source, self.absorption, self.damping)
        # Any number of tokens will do: only the option itself is checked.
        edges_kept(self.max_edges, 2)
        self._check_capacity_options()
        if self.is_signed:
            self._refuse_what_is_not_conserved()
            return
        # The recorder checks layers, heads and edge_weight against the model when it is built.
        AttentionRecorder(model, layers=self.chosen_layers, heads=self.heads or "mean", edge_weight=self.edge_weight)

    def _check_capacity_options(self) -> None:
        """Refuse options that the capacity does not have, or that have an argument of their own."""
        known = set(find_capacity(self.capacity).defaults) - {"layers", "heads", "edge_weight", "answer", "generated"}
        if self.is_signed:
            # A trace decides itself how it holds its rows.
            known -= {"keep_tape", "streamed"}
            known.add("contrast")
        for name, value in (self.capacity_options or {}).items():
            if name not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise InvalidInputError(
                    f"capacity_options: must be options of capacity={self.capacity!r} ({listed}), got "
                    f"{name}={value!r:.60}; layers and heads are arguments of their own"
                )

    def _refuse_what_is_not_conserved(self) -> None:
        """Refuse signed capacities other than relevance, and choices that it does not have: nothing is solved."""
        if self.capacity != "relevance":
            raise InvalidInputError(
                f"capacity: must be 'relevance' or have edges that are not negative, got {self.capacity!r}, which is "
                "signed and not conserved; use capture(..., capacity=...) and compose"
            )
        if find_preset(self.preset).edge_rules != "default":
            raise InvalidInputError(
                f"preset: does not apply to capacity={self.capacity!r}, got {self.preset!r}; relevance has no edge "
                "rules, so leave it out"
            )
        # A value other than the default was chosen by the caller, who expects an effect.
        defaults = TraceOptions()
        for name in _CHOICES_OF_THE_FLOW:
            value = getattr(self, name)
            if value is not getattr(defaults, name) and value != getattr(defaults, name):
                raise InvalidInputError(
                    f"{name}: does not apply to capacity={self.capacity!r}, got {value!r:.60}; relevance is conserved "
                    "by itself, so leave it out"
                )
