r"""``text_only``: the same compositions over a graph that is made from the text alone, without any model.

The weight of an earlier token s for a token t is

.. math:: w[t, s] = m(s, t) + [x_s = x_t] + e^{-(t - s) / \tau}, \qquad C[t, s] = w[t, s] / \sum_{s' < t} w[t, s']

- :math:`m(s, t)`: length of the longest common suffix of the texts that end before s and before t, at most
  ``MAX_SUFFIX`` tokens: how well s continues an earlier copy of the text before t, as an induction head reads it;
- :math:`[x_s = x_t]`: both are the same token;
- :math:`e^{-(t - s) / \tau}`: nearness, ``NEARNESS`` tokens.

A method that reads the model and scores no better than this one has found repetitions and neighbours. Tokens are
compared by id.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.evaluation.methods.capacities import (
    checked_score,
    composed_explanation,
    parts_given,
    parts_of,
    scores_of_flow,
)
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import EvaluationMethod, evaluation_method
from flowgraph.evaluation.subject import Subject
from flowgraph.flow.composition_registry import find_composition
from flowgraph.flow.solve import solve
from flowgraph.graph.flow_graph import FlowGraph

MAX_SUFFIX = 8
"""Longest common suffix that is counted, in tokens."""

NEARNESS = 8.0
"""tau, in tokens: the weights of nearness sum to about this number."""


@evaluation_method("text_only", trivial=True, gives=("tokens", "edges"))
def text_only(subject: Subject) -> Explanation:
    """Potential h over suffix matches, equal tokens and nearness, from the text alone. Edges: terms of h."""
    return _explain(subject, "h")


def text_only_method(name: str) -> EvaluationMethod | None:
    """Make the method of a name ``text_only:SCORE``; None for other names.

    Raises:
        InvalidInputError: a part that is neither f, h nor a composition of edges.
    """
    head = "text_only"
    if not name.startswith(f"{head}:"):
        return None
    # Without layers, rollout repeats the one matrix; it is offered like any other.
    score = checked_score(name, head, parts_of(name.removeprefix(head)), scores_of_flow())
    assert score is not None
    kinds = {"f": "Throughput", "h": "Potential"}
    kind = kinds[score] if score in kinds else find_composition(score).summary.removesuffix(".")

    def explain(subject: Subject) -> Explanation:
        return _explain(subject, score)

    return EvaluationMethod(
        name=name,
        function=explain,
        summary=f"{kind}, over suffix matches, equal tokens and nearness of the text alone.",
        trivial=True,
        gives=parts_given(score),
    )


def text_weights(token_ids: Int64[Tensor, " tokens"]) -> Float64[Tensor, "tokens tokens"]:
    """Compute C of this module's docstring; the first row is empty, all others sum to 1.

    Cost: ``MAX_SUFFIX`` products of boolean T x T matrices.
    """
    num_tokens = token_ids.numel()
    ids = token_ids.cpu()
    is_same = ids[:, None] == ids

    # matched[t, s] after k steps: the k tokens before t equal the k tokens before s. m counts the steps that hold.
    suffix = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    matched = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    for k in range(1, min(MAX_SUFFIX, num_tokens - 1) + 1):
        ends_match = torch.zeros_like(matched)
        ends_match[k:, k:] = is_same[:-k, :-k]
        matched = matched & ends_match
        suffix += matched

    # The three parts of C, over earlier tokens.
    position = torch.arange(num_tokens, dtype=torch.float64)
    distance = position[:, None] - position
    nearness = torch.exp(-distance.clamp_min(0) / NEARNESS)
    weights = (suffix + is_same + nearness).tril(-1)

    # Every token but the first has an earlier one, whose nearness is positive.
    total = weights.sum(1, keepdim=True)
    smallest = torch.finfo(torch.float64).tiny
    return weights / total.clamp_min(smallest)


def _explain(subject: Subject, score: str) -> Explanation:
    graph = subject.once("graph of the text", lambda: _graph(subject))
    flow = subject.once("flow of the text", lambda: solve(graph))
    return composed_explanation(graph, flow, subject.base.generated, score)


def _graph(subject: Subject) -> FlowGraph:
    return FlowGraph.from_dense(
        text_weights(subject.token_ids),
        question=subject.question,
        answer=subject.answer,
        reasoning=subject.reasoning,
    )
