r"""How much a flow is about its question: the same graph with the unit entering elsewhere, and where reach enters.

On averaged attention, walks from any two tokens mix within a few hops. Then the throughput of the reasoning is set by
the answer alone: it is the potential h, for any place of entry of the unit. Three numbers tell how far that holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flowgraph.analysis.statistics import spearman
from flowgraph.files import loadable
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.flow.solve import solve
from flowgraph.masks import MaskLike, as_mask
from flowgraph.propagation.scaling import scaled

_SET_BY_ANSWER = 0.05
_QUESTION_SPECIFIC = 0.15


@loadable
@dataclass(frozen=True)
class Specificity:
    """How far the flow through the reasoning depends on where it enters.

    Attributes:
        total_variation: distance, in [0, 1], between the distributions of throughput over the reasoning when the unit
            enters at the question and when it enters at ``compared_with``; None without two places or reasoning.
        compared_with: ``"text before the question"``, ``"halves of the question"``, or ``""``.
        rank_correlation: Spearman's correlation of throughput and potential over the reasoning; None for fewer than
            three tokens, or without variation.
        entry: shares, in all 1, of the answer's reach that enters the prompt at the ``question``, ``before`` it and
            ``after`` it (the chat template).
    """

    total_variation: float | None
    compared_with: str
    rank_correlation: float | None
    entry: dict[str, float]

    @property
    def description(self) -> str:
        """The total variation in words; the limits .05 and .15 are conventions, not calibrated."""
        if self.total_variation is None:
            return "not defined"
        if self.total_variation < _SET_BY_ANSWER:
            return "set by the answer, not by the question: read it as h"
        if self.total_variation <= _QUESTION_SPECIFIC:
            return "partly set by the question"
        return "question-specific"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "total_variation": self.total_variation,
            "compared_with": self.compared_with,
            "rank_correlation": self.rank_correlation,
            "entry": dict(self.entry),
            "description": self.description,
        }

    def __str__(self) -> str:
        entry = ", ".join(f"{name} {share:.0%}" for name, share in self.entry.items())
        if self.total_variation is None:
            return f"reach enters at: {entry}"
        correlation = ""
        if self.rank_correlation is not None:
            correlation = f", Spearman(f, h) {self.rank_correlation:.2f}"
        return (
            f"{self.description} (total variation {self.total_variation:.3f} against {self.compared_with}"
            f"{correlation}); reach enters at: {entry}"
        )


def specificity(flow: Flow, *, generated: MaskLike) -> Specificity:
    r"""Measure how much the flow through the reasoning depends on where the unit enters.

    .. math::
        TV = \frac{1}{2} \sum_{t \in R} \left| \frac{f_Q[t]}{\sum_R f_Q} - \frac{f_S[t]}{\sum_R f_S} \right|, \qquad
        \mathrm{entry}[s] \propto \sum_{t \text{ generated}} N[t, s] \, h[t]

    with f_Q the throughput of a unit that enters at the question and f_S of one that enters at the text before it (the
    system message), or, where no such token reaches the answer, at the first and the second half of the question. It
    describes a trace and does not rate it: a short answer may depend on one place alone.

    Args:
        flow: feasible, on one graph.
        generated: mask, indices or slice of the tokens that the model produced.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch.

    Cost: two more solves and one read of the edges.

    Example:
        >>> from flowgraph import FlowGraph, solve
        >>> weights = torch.tensor([[0.0, 0, 0, 0], [0, 0.0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.3, 0.5, 0]])
        >>> flow = solve(FlowGraph.from_dense(weights, question=[0, 1], answer=[3]))
        >>> {name: round(share, 2) for name, share in specificity(flow, generated=[2, 3]).entry.items()}
        {'question': 1.0, 'before': 0.0, 'after': 0.0}
    """
    require_single_feasible(flow)
    graph = flow.graph
    device = flow.h.device
    num_tokens = flow.h.numel()
    is_generated = as_mask(generated, num_tokens, "generated", device)
    question = graph.question_mask

    # TV is not defined without two places of entry, without reasoning, or where none of it carries flow.
    variation = None
    compared_with = ""
    sources = _two_sources(flow, is_generated)
    if sources is not None and bool(graph.reasoning_mask.any()):
        first_source, second_source, compared_with = sources
        first_throughput = _reasoning_shares(flow, first_source)
        second_throughput = _reasoning_shares(flow, second_source)
        variation = _total_variation(first_throughput, second_throughput)
        if variation is None:
            compared_with = ""
    return Specificity(
        total_variation=variation,
        compared_with=compared_with,
        rank_correlation=_rank_correlation(flow),
        entry=_entry(flow, is_generated, question),
    )


def _two_sources(flow: Flow, generated: Bool[Tensor, " tokens"]) -> tuple[Tensor, Tensor, str] | None:
    """Choose two places of entry that both reach the answer: question and the text before it, or its two halves."""
    reaches = flow.h > 0
    question = flow.graph.question_mask & reaches
    position = torch.arange(reaches.numel(), device=reaches.device)
    places = question.nonzero().flatten()
    num_places = places.numel()
    if num_places == 0:
        return None

    # The first token is a sink of attention: it holds no text of its own.
    in_other_text = ~generated & ~flow.graph.question_mask
    is_between = (position > 0) & (position < places[0])
    before = reaches & in_other_text & is_between
    if bool(before.any()):
        return question, before, "text before the question"

    # Without such text, the halves of the question are compared.
    if num_places < 2:
        return None
    middle = places[num_places // 2]
    first_half = question & (position < middle)
    second_half = question & (position >= middle)
    return first_half, second_half, "halves of the question"


def _reasoning_shares(flow: Flow, source: Bool[Tensor, " tokens"]) -> Float64[Tensor, " reasoning"]:
    """Solve again with the unit entering at ``source``; return the throughput of the reasoning tokens."""
    again = solve(
        flow.graph,
        source=source.double(),
        demand=flow.demand,
        absorption=flow.absorption,  # type: ignore[arg-type]
        damping=flow.damping,
    )
    return again.throughput[flow.graph.reasoning_mask]


def _total_variation(first: Tensor, second: Tensor) -> float | None:
    """Compare two distributions; None where one has no mass."""
    first_total = first.sum()
    second_total = second.sum()
    if float(first_total) <= 0 or float(second_total) <= 0:
        return None
    differences = first / first_total - second / second_total
    return float(differences.abs().sum()) / 2


def _rank_correlation(flow: Flow) -> float | None:
    """Correlate the ranks of f and h over the reasoning; None where that is not defined."""
    reasoning = flow.graph.reasoning_mask
    throughput = flow.throughput[reasoning].cpu().numpy()
    potential = flow.log2_potential[reasoning].cpu().numpy()
    correlation = spearman(throughput, potential)
    if math.isnan(correlation):
        return None
    return correlation


def _entry(flow: Flow, generated: Bool[Tensor, " tokens"], question: Bool[Tensor, " tokens"]) -> dict[str, float]:
    """Compute the share of the answer's reach that enters the prompt at each place."""
    # N[t, s] h[t], summed over the edges from prompt token s into generated text, in the units of h[s].
    source, target = flow.graph.edge_index
    enters = generated[target] & ~generated[source]
    weight = flow.in_units(flow.weight)
    reach = torch.where(enters, weight * flow.h[target], 0.0)
    per_token = torch.zeros_like(flow.h).index_add_(0, source, reach)
    entering = per_token > 0
    if not bool(entering.any()):
        return {"question": 0.0, "before": 0.0, "after": 0.0}

    # The largest scale among them is 1, so that potentials far below the range of float64 keep their ratios.
    largest_exponent = flow.exponent[entering].max()
    per_token = scaled(per_token, flow.exponent - largest_exponent)

    # Every prompt token is in one of the three places.
    position = torch.arange(per_token.numel(), device=per_token.device)
    last_question = int(question.nonzero()[-1])
    places = {
        "question": question,
        "before": ~question & (position < last_question),
        "after": ~question & (position > last_question),
    }
    total = float(per_token.sum())
    shares = {}
    for name, mask in places.items():
        shares[name] = float(per_token[mask].sum()) / total
    return shares
