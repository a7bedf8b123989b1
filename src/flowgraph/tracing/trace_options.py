"""``TraceOptions``: the choices shared by ``trace`` and ``trace_corpus``, documented and checked once."""

from __future__ import annotations

from collections.abc import Sequence
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
from flowgraph.flow.solve import Absorption, SourceRule, Vector, check_options
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.propagation.interface import Backend


@dataclass(frozen=True, eq=False)
class TraceOptions:
    """The choices of a trace: how attention is read, becomes a graph, and how the flow on it is solved.

    Attributes:
        capacity: what an edge weighs: ``"attention"``, or another non-negative one of
            :func:`flowgraph.capacity_names`, such as ``"vtrace_share"`` or ``"sharp"``.
        layers: ``"middle"`` (the middle third), ``"upper"`` (from one third up), ``"all"``, ``"10-19"``, ``"10-"`` or
            indices. None: as the capacity has it, ``"middle"`` for attention.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a
            :class:`flowgraph.HeadSelector`, for attention. None: ``"mean"``.
        edge_weight: ``"attention"``, or ``"value_norm"``: attention times the norm of the value vector that it reads.
        preset: ``"default"``, or ``"paper"`` for the choices of arXiv 2606.10646. It fixes the next three, which
            override it one by one where they are given; see :class:`flowgraph.EdgeRules`.
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
    """

    capacity: str = "attention"
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

    @cached_property
    def rules(self) -> EdgeRules:
        """The preset with the rules that override it.

        Raises:
            InvalidInputError: an unknown preset or rule.
        """
        return EdgeRules.preset(
            self.preset,
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

    def capture(
        self, model: nn.Module, input_ids: Int64[Tensor, "batch tokens"], attention_mask: Tensor | None = None
    ) -> AttentionRows:
        """Capture the rows of a batch with these choices."""
        choices: dict[str, Any] = {"layers": self.layers, "heads": self.heads}
        if self.edge_weight != "attention":
            choices["edge_weight"] = self.edge_weight
        return capture(model, input_ids, attention_mask, capacity=self.capacity, **choices)

    def check(self, model: nn.Module) -> None:
        """Refuse every invalid choice that can be found without a forward pass; the length of a text is not needed.

        Raises:
            InvalidInputError: a choice outside its stated range, or outside the model.
            CaptureError: the architecture cannot be captured correctly.
        """
        # The rules are checked when they are built.
        _ = self.rules
        check_options(self.backend, self.source, self.absorption, self.damping)
        # Any number of tokens will do: only the option itself is checked.
        edges_kept(self.max_edges, 2)
        if find_capacity(self.capacity).signed:
            raise InvalidInputError(
                f"capacity: must have edges that are not negative, got {self.capacity!r}, which is signed; call "
                "trace.relevance(model) on a trace, or capture(..., capacity='relevance')"
            )
        # The recorder checks layers, heads and edge_weight against the model when it is built.
        AttentionRecorder(model, layers=self.chosen_layers, heads=self.heads or "mean", edge_weight=self.edge_weight)
