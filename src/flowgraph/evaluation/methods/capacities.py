r"""Methods by the name of a capacity and of a composition, made when they are asked for.

| name | score of a token | edges |
|---|---|---|
| ``CAPACITY`` | the score that ranks tokens best: throughput f, or potential h where rows leak | edge flow |
| ``CAPACITY:f`` | throughput :math:`f = g h` | edge flow :math:`F(s, t) = g[s] N[t, s] h[t]`, which sums to f |
| ``CAPACITY:h`` | potential h | terms of h: :math:`N[t, s] h[t]`, which sum to h |
| ``CAPACITY:COMPOSITION`` | :func:`flowgraph.compose` | the composition's edge flow, where it solves for one |
| ``relevance`` | throughput of one backward pass | N |
| ``relevance:chain`` | throughput, after emission hops through generated tokens | N |
| ``relevance:absorbed`` | what stays at the token's embedding | N |
| ``gradient`` | sum over readers of N | N, signed |

A capacity with the option ``target`` takes ``:margin`` or ``:logprob`` as a further part of the name. All other
compositions and scores of one capacity share its capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flowgraph.capacities.capture import capture
from flowgraph.capacities.registry import Capacity, capacity_names, find_capacity
from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.methods.edge_frame import edges_of_graph, edges_of_positions
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import EvaluationMethod
from flowgraph.evaluation.subject import Subject
from flowgraph.flow.composition_registry import find_composition
from flowgraph.flow.compositions import composed_scores, composition_names
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.tracing.flow_trace import FlowTrace

TARGETS = ("margin", "logprob")
"""What a backward pass starts from: the margin over the best other token, or the log-probability."""

CHAIN_HOPS = 6
"""Most emission hops of ``relevance:chain``."""

_FLOW_SCORES = ("f", "h")
_EDGE_COMPOSITIONS = ("flowtracer", "cage", "vtrace")
"""Compositions whose flow runs from the question to the answer, so that its edges are an explanation."""
_RELEVANCE_PARTS = ("absorbed", "chain")

Parts = tuple[Literal["tokens", "edges"], ...]
_BOTH: Parts = ("tokens", "edges")


@dataclass(frozen=True)
class _Request:
    """A name taken apart.

    Attributes:
        name: the name as it was given.
        capacity: the capacity.
        parts: the parts of the name after the capacity, without the target.
        target: what a backward pass starts from; None: as the capacity has it.
    """

    name: str
    capacity: Capacity
    parts: tuple[str, ...]
    target: str | None


def capacity_method(name: str) -> EvaluationMethod | None:
    """Make the method of a name that begins with a capacity; None where it does not.

    Raises:
        InvalidInputError: a part of the name that does not go with the capacity.
    """
    head = _longest_prefix(name, capacity_names())
    if head is None:
        return None

    # The parts after the capacity: a target, which may be anywhere among them, and a score.
    chosen = find_capacity(head)
    rest = parts_of(name.removeprefix(head))
    targets = [part for part in rest if part in TARGETS]
    others = tuple(part for part in rest if part not in TARGETS)
    if targets and "target" not in chosen.defaults:
        raise InvalidInputError(
            f"methods: {targets[0]!r} must follow a capacity with a target, got {name!r}; leave it out"
        )
    if len(targets) > 1:
        raise InvalidInputError(f"methods: must name one target, got {name!r}; keep 'margin' or 'logprob'")
    request = _Request(
        name=name,
        capacity=chosen,
        parts=others,
        target=targets[0] if targets else None,
    )
    if chosen.name == "relevance":
        return _relevance_method(request)
    if chosen.signed:
        return _signed_method(request)
    return _flow_method(request)


def composed_explanation(graph: FlowGraph, flow: Flow, generated: Bool[Tensor, " tokens"], score: str) -> Explanation:
    """Score tokens and edges of a solved graph by ``"f"``, ``"h"`` or a composition.

    Args:
        graph: the edges.
        flow: the conserved flow on it.
        generated: ``[tokens]`` bool, the tokens that the model produced.
        score: ``"f"``, ``"h"`` or the name of a composition.
    """
    if score == "f":
        return Explanation(flow.throughput, edges_of_graph(graph, flow.edge_flow))
    if score == "h":
        # N[t, s] h[t], which sum over the readers t to h[s].
        potential, _ = flow.potentials
        _, target = graph.edge_index
        terms = flow.weight * potential[target]
        return Explanation(potential, edges_of_graph(graph, terms))

    # A composition has edges only where its own flow runs from the question to the answer.
    composed = composed_scores(graph, score, generated=generated)
    edges = None
    if score in _EDGE_COMPOSITIONS and composed.flow is not None:
        edges = edges_of_graph(composed.flow.graph, composed.flow.edge_flow)
    return Explanation(composed.scores.detach(), edges)


def parts_of(text: str) -> list[str]:
    """Take apart what follows the first part of a name: ``":cage:margin"`` to two parts, ``""`` to none.

    A composition whose name holds a colon is one part.
    """
    if not text:
        return []
    after = text.removeprefix(":")
    composition = _longest_prefix(after, composition_names())
    if composition is None:
        return after.split(":")
    return [composition, *parts_of(after.removeprefix(composition))]


def _longest_prefix(name: str, known: Sequence[str]) -> str | None:
    """Return the longest known name that a name is, or that it begins with before a colon."""
    fitting = [candidate for candidate in known if name == candidate or name.startswith(candidate + ":")]
    return max(fitting, key=len, default=None)


def parts_given(score: str) -> Parts:
    """Return the parts of an explanation that a score gives: ``"f"``, ``"h"`` or a composition."""
    return _BOTH if score in (*_FLOW_SCORES, *_EDGE_COMPOSITIONS) else ("tokens",)


def checked_score(name: str, head: str, parts: Sequence[str], allowed: Sequence[str]) -> str | None:
    """Return the one score that a name asks for; None where it names none.

    Args:
        name: the complete name.
        head: its first part.
        parts: its other parts.
        allowed: the scores that go with the first part.

    Raises:
        InvalidInputError: a part that is not allowed, or more than one.
    """
    for part in parts:
        if part not in allowed:
            raise InvalidInputError(
                f"methods: {head!r} must be followed by one of {', '.join(allowed)}, got {name!r}; leave {part!r} out"
            )
    if len(parts) > 1:
        raise InvalidInputError(f"methods: must name one score, got {name!r}; keep one of {', '.join(parts)}")
    return parts[0] if parts else None


def scores_of_flow() -> list[str]:
    """List the scores that a graph of non-negative edges offers: f, h and all compositions."""
    return [*_FLOW_SCORES, *composition_names()]


# Non-negative capacities -------------------------------------------------------------------------------------


def _flow_method(request: _Request) -> EvaluationMethod:
    score = checked_score(request.name, request.capacity.name, request.parts, scores_of_flow())
    summary = request.capacity.summary
    if score is not None:
        summary = f"{_summary_of_score(score)} Edges: {summary}"

    def explain(subject: Subject) -> Explanation:
        return _explain_flow(subject, request, score)

    return EvaluationMethod(
        name=request.name,
        function=explain,
        summary=summary,
        gradient=request.capacity.gradient,
        gives=_BOTH if score is None else parts_given(score),
    )


def _explain_flow(subject: Subject, request: _Request, score: str | None) -> Explanation:
    options: dict[str, Any] = {}
    if request.target is not None:
        options["capacity_options"] = {"target": request.target}
    # A composition of layers reads them before they are joined into a graph.
    if score is not None and score not in _FLOW_SCORES and find_composition(score).reads_layers:
        options["composition"] = score
    traced = subject.trace(request.capacity.name, **options)
    assert isinstance(traced, FlowTrace)

    # Layers give no edges. All other scores are made from the flow that the methods of this capacity share.
    if "composition" in options:
        return Explanation(traced.scores)
    if score is None:
        edges = edges_of_graph(traced.graph, traced.flow.edge_flow)
        return Explanation(traced.scores, edges)
    return composed_explanation(traced.graph, traced.flow, traced.generated, score)


def _summary_of_score(score: str) -> str:
    if score == "f":
        return "Throughput of the conserved flow."
    if score == "h":
        return "Potential: influence that reaches the answer."
    return find_composition(score).summary.removesuffix(".") + "."


# Signed capacities -------------------------------------------------------------------------------------------


def _relevance_method(request: _Request) -> EvaluationMethod:
    for part in request.parts:
        if part not in _RELEVANCE_PARTS:
            raise InvalidInputError(
                f"methods: 'relevance' must be followed by absorbed, chain, margin or logprob, got {request.name!r}; "
                "it is conserved by itself, so no composition applies"
            )
    hops = CHAIN_HOPS if "chain" in request.parts else 0
    target = request.target or request.capacity.defaults["target"]
    is_absorbed = "absorbed" in request.parts

    # Methods of one target and number of hops share the capture.
    def explain(subject: Subject) -> Explanation:
        rows = subject.once(f"relevance {target} {hops}", lambda: _relevance_rows(subject, target, hops))
        scores = rows.absorbed[0] if is_absorbed else _relevance_reaching_tokens(rows)
        edges = edges_of_positions(rows.dense()[0], subject.base.generated)
        return Explanation(scores.double().cpu(), edges)

    quantity = "absorbed by the token's embedding" if is_absorbed else "that reaches the token"
    passes = "with emission hops" if hops else "of one backward pass"
    return EvaluationMethod(
        name=request.name,
        function=explain,
        summary=f"Conserved relevance {quantity}, {passes}, signed.",
        gradient=True,
        gives=_BOTH,
    )


def _relevance_rows(subject: Subject, target: str, hops: int) -> RelevanceRows:
    return capture(
        subject.model,
        subject.token_ids,
        capacity="relevance",
        answer=subject.answer,
        generated=subject.base.generated,
        target=target,
        hops=hops,
    )


def _relevance_reaching_tokens(rows: RelevanceRows) -> Float64[Tensor, " tokens"]:
    """Return the throughput in the units of the target, as a relevance trace has it in shares of the demand.

    Shares change their sign where the model prefers another answer; these numbers do not.
    """
    # The demand belongs to the position before an answer token, and is drawn as entering at the token.
    scores = rows.throughput[0].double()
    demand_at_token = torch.zeros_like(scores)
    demand_at_token[1:] = rows.demand[0, :-1].double()
    return scores + demand_at_token


def _signed_method(request: _Request) -> EvaluationMethod:
    signed_compositions = [name for name in composition_names() if find_composition(name).signed]
    score = checked_score(request.name, request.capacity.name, request.parts, signed_compositions)
    # Interventions are measured in log-probability, and so is what the gradient predicts of them.
    target = request.target
    if target is None and "target" in request.capacity.defaults:
        target = "logprob"

    def explain(subject: Subject) -> Explanation:
        return _explain_signed(subject, request.capacity, target, score)

    return EvaluationMethod(
        name=request.name,
        function=explain,
        summary=request.capacity.summary,
        gradient=request.capacity.gradient,
        gives=_BOTH if score is None else ("tokens",),
    )


def _explain_signed(subject: Subject, capacity: Capacity, target: str | None, score: str | None) -> Explanation:
    options: dict[str, Any] = {}
    if "answer" in capacity.defaults:
        options["answer"] = subject.answer
    if target is not None:
        options["target"] = target
    rows = subject.once(
        f"rows {capacity.name} {target}",
        lambda: capture(subject.model, subject.token_ids, capacity=capacity.name, **options),
    )
    if score is not None:
        composed = composed_scores(
            rows,
            score,
            question=subject.question,
            answer=subject.answer,
            reasoning=subject.reasoning,
            generated=subject.base.generated,
        )
        return Explanation(composed.scores.detach().cpu())
    # What changes if all edges out of a token are cut a little: the sum over its readers.
    matrix = rows.dense()[0].double().cpu().tril(-1)
    return Explanation(matrix.sum(0), edges_of_positions(matrix, subject.base.generated))


def registered_capacity_methods(is_wanted: Callable[[Capacity], bool]) -> list[str]:
    """List the names of the methods of all capacities that a condition holds for, with their own best score."""
    return [name for name in capacity_names() if is_wanted(find_capacity(name))]
