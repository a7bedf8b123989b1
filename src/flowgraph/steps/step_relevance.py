r"""Conserved relevance between steps: the signed token graph with the tokens of each step joined.

Single tokens pass on little once the chain of emission arcs is in, so relevance is read between lines, sentences or
words. Joining tokens is exact: the relevance that step B takes from an earlier step A is

.. math::
    F(A, B) = \sum_{t \in B, s \in A} N[t, s] + \sum_{k} e[k]

where e[k] is the relevance that the generated token k in B passed on to row k - 1 in A. The answer's demand enters at
the row before each answer token and is drawn as an arc of the answer token, as if it had been emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable

if TYPE_CHECKING:
    from flowgraph.capacities.relevance import RelevanceRows
    from flowgraph.steps.step_flow import Step

_NUM_SHOWN = 8
_MAX_TEXT = 70
"""Characters of a step that are printed."""


@loadable
@dataclass(frozen=True, eq=False)
class StepRelevance:
    """Signed relevance between the steps of a text, as shares of the answer's demand.

    Attributes:
        steps: S of them, every token in exactly one.
        flow: ``[S, S]``, entry [target, source]: what the target step takes from an earlier step; negative values argue
            against the answer. The diagonal is 0.
        within: ``[S]``, relevance on edges inside a step.
        demand: ``[S]``, share that enters at the step: 1 in all, at the answer.
        absorbed: ``[S]``, share that stays at the embeddings of the step's tokens.
        bias: ``[S]``, share that stays in biases at the step's tokens.
        total: the demand in the units of the target (logits, or nats).
        residual: of the conservation law, see :class:`flowgraph.RelevanceRows`.
    """

    steps: tuple[Step, ...]
    flow: Float64[Tensor, "steps steps"]
    within: Float64[Tensor, " steps"]
    demand: Float64[Tensor, " steps"]
    absorbed: Float64[Tensor, " steps"]
    bias: Float64[Tensor, " steps"]
    total: float
    residual: float

    @property
    def throughput(self) -> Float64[Tensor, " steps"]:
        """Share that reaches each step: demand + what later steps take from it = what it takes + absorbed + bias."""
        return self.demand + self.flow.sum(0)

    def contributions(self, step: int, k: int = _NUM_SHOWN) -> list[tuple[int, float]]:
        """Return the steps that a step takes most from, by absolute share, as (step, share).

        Raises:
            InvalidInputError: no such step.
        """
        if not 0 <= step < len(self.steps):
            raise InvalidInputError(
                f"step: must lie in 0..{len(self.steps) - 1}, got {step}; StepRelevance.steps lists them"
            )
        shares = self.flow[step]
        order = torch.argsort(shares.abs(), descending=True, stable=True)[:k]
        return [(int(index), float(shares[index])) for index in order if float(shares[index]) != 0]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per step: index, region, text, throughput, absorbed, bias, demand."""
        return [
            {
                "index": step.index,
                "region": step.region,
                "text": step.text,
                "throughput": float(self.throughput[step.index]),
                "absorbed": float(self.absorbed[step.index]),
                "bias": float(self.bias[step.index]),
                "demand": float(self.demand[step.index]),
            }
            for step in self.steps
        ]

    def chain(self, *, depth: int = 4, smallest: float = 0.03) -> list[tuple[int, int, float]]:
        """List what the answer took from which step, what that step took, and so on.

        Args:
            depth: levels below the answer.
            smallest: contributions below this absolute share are left out.

        Returns:
            (level, step, share) in the order in which a tree is printed; level 0 is the answer. The contributions of a
            step are listed once, where it first appears.
        """
        rows: list[tuple[int, int, float]] = []
        expanded: set[int] = set()

        def visit(step: int, share: float, level: int) -> None:
            rows.append((level, step, share))
            if level == depth or step in expanded:
                return
            expanded.add(step)
            for source, contribution in self.contributions(step):
                if abs(contribution) >= smallest:
                    visit(source, contribution, level + 1)

        answer = int(self.demand.abs().argmax())
        visit(answer, float(self.demand[answer]), 0)
        return rows

    def __repr__(self) -> str:
        """Show the chain of contributions from the answer down."""
        lines = [f"StepRelevance of {len(self.steps)} steps, demand {self.total:.3g}, residual {self.residual:.1e}"]
        for level, step, share in self.chain():
            lines.append(f"{'    ' * level}  {share:+5.0%} {self.steps[step].text.strip()[:_MAX_TEXT]!r}")
        return "\n".join(lines)


def step_relevance(rows: RelevanceRows, steps: Sequence[Step], item: int = 0) -> StepRelevance:
    """Join the tokens of each step in the relevance of one sequence.

    Args:
        rows: from ``capture(..., capacity="relevance")``.
        steps: steps that cover the tokens of the sequence without padding, as :func:`flowgraph.split_steps` and
            ``trace.steps().steps`` give them.
        item: the sequence.

    Raises:
        InvalidInputError: steps of another text, or an answer whose demand is 0.

    Cost: one read of the T x T matrix.
    """
    kept = rows.attention_mask[item].nonzero().flatten()
    num_tokens = kept.numel()
    covered = [token for step in steps for token in range(step.start, step.stop)]
    if covered != list(range(num_tokens)):
        raise InvalidInputError(
            f"steps: must cover the {num_tokens} tokens of the sequence once each, in order, got {len(covered)}; "
            "split the text that was captured"
        )
    sizes = torch.tensor([step.stop - step.start for step in steps])
    step_of_token = torch.repeat_interleave(torch.arange(len(steps)), sizes)

    # Edges of the token graph: reads, and the arcs k -> k - 1 of emitted tokens and of the answer.
    matrix = rows.matrix[item][kept][:, kept].double().cpu()
    emitted = rows.emitted[item][kept].double().cpu()
    demand = rows.demand[item][kept].double().cpu()
    arc = emitted.clone()
    arc[1:] += demand[:-1]
    position = torch.arange(1, num_tokens)
    matrix[position, position - 1] += arc[1:]

    # Join: a sum over the tokens of each pair of steps, in units of the demand.
    total = rows.total_demand(item)
    member = torch.nn.functional.one_hot(step_of_token, len(steps)).double()
    joined = member.T @ matrix @ member / total
    answer_demand = torch.zeros(num_tokens, dtype=torch.float64)
    answer_demand[1:] = demand[:-1]
    return StepRelevance(
        steps=tuple(steps),
        flow=joined - torch.diag(joined.diagonal()),
        within=joined.diagonal().clone(),
        demand=member.T @ answer_demand / total,
        absorbed=member.T @ rows.absorbed[item][kept].double().cpu() / total,
        bias=member.T @ rows.bias[item][kept].double().cpu() / total,
        total=total,
        residual=rows.residual,
    )
