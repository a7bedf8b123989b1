r"""Conserved relevance between steps: the signed token graph with the tokens of each step joined.

Single tokens pass on little once the chain of emission arcs is in, so relevance is read between lines, sentences or
words. Joining tokens is exact: the relevance that step B takes from an earlier step A is

.. math::
    F(A, B) = \sum_{t \in B, s \in A} F(s \to t)

with F(s -> t) the edges of a :class:`flowgraph.SignedFlow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.display.fragment import bar, fragment, one_line
from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable

if TYPE_CHECKING:
    from flowgraph.flow.signed_flow import SignedFlow
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
        pruned_in: ``[S]``, share that the step's tokens take over edges that the token graph leaves out; 0 in a full
            graph.
        pruned_out: ``[S]``, share that other tokens take from the step's tokens over such edges.
        total: the demand in the units of the target (logits, or nats).
        residual: of the conservation law, see :class:`flowgraph.RelevanceRows`.
    """

    steps: tuple[Step, ...]
    flow: Float64[Tensor, "steps steps"]
    within: Float64[Tensor, " steps"]
    demand: Float64[Tensor, " steps"]
    absorbed: Float64[Tensor, " steps"]
    bias: Float64[Tensor, " steps"]
    pruned_in: Float64[Tensor, " steps"]
    pruned_out: Float64[Tensor, " steps"]
    total: float
    residual: float

    @property
    def throughput(self) -> Float64[Tensor, " steps"]:
        """Share that reaches each step: its demand and what later steps take from it."""
        return self.demand + self.flow.sum(0) + self.pruned_out

    def contributions(self, step: int, k: int = _NUM_SHOWN) -> list[tuple[int, float]]:
        """Return the steps that a step takes most from, by absolute share, as (step, share).

        Raises:
            InvalidInputError: no such step.
        """
        if not 0 <= step < len(self.steps):
            raise InvalidInputError(
                f"step: must lie in 0..{len(self.steps) - 1}, got {step}; StepRelevance.steps lists them"
            )
        # A stable sort keeps steps of equal share in reading order.
        shares = self.flow[step]
        order = torch.argsort(shares.abs(), descending=True, stable=True)[:k]
        found = []
        for index in order:
            share = float(shares[index])
            if share != 0:
                found.append((int(index), share))
        return found

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

        # A step is expanded once, so that steps which take from each other do not recur without end.
        def visit(step: int, share: float, level: int) -> None:
            rows.append((level, step, share))
            if level == depth or step in expanded:
                return
            expanded.add(step)
            for source, contribution in self.contributions(step):
                if abs(contribution) >= smallest:
                    visit(source, contribution, level + 1)

        # The chain starts at the step that holds most of the demand.
        answer = int(self.demand.abs().argmax())
        visit(answer, float(self.demand[answer]), 0)
        return rows

    def __repr__(self) -> str:
        """Show the chain of contributions from the answer down."""
        lines = [f"StepRelevance of {len(self.steps)} steps, demand {self.total:.3g}, residual {self.residual:.1e}"]
        for level, step, share in self.chain():
            lines.append(f"{'    ' * level}  {share:+5.0%} {self.steps[step].text.strip()[:_MAX_TEXT]!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Render the chain of contributions from the answer down as an indented list for a notebook."""
        lines = []
        for level, step, share in self.chain():
            name = one_line(self.steps[step].text, _MAX_TEXT)
            size = bar(abs(share), "less" if share < 0 else "flow")
            lines.append(f'<div style="margin-left:{2 * level}em">{100 * share:+.0f} % {name} {size}</div>')
        title = (
            f"<b>StepRelevance</b> of {len(self.steps)} steps, demand {self.total:.3g}, residual {self.residual:.1e}"
        )
        note = "share of the demand that the step above takes from each step; purple: it argues against the answer"
        return fragment(f"<div>{title}</div>", *lines, f'<div style="font-size:85%">{note}</div>')


def step_relevance(flow: SignedFlow, steps: Sequence[Step]) -> StepRelevance:
    """Join the tokens of each step in the relevance of one sequence.

    Args:
        flow: from :func:`flowgraph.relevance_flow`.
        steps: steps that cover its tokens once each, as :func:`flowgraph.split_steps` and ``trace.steps().steps`` give
            them.

    Raises:
        InvalidInputError: steps of another text.

    Cost: one read of the edges.
    """
    num_tokens = flow.demand.numel()
    covered: list[int] = []
    for step in steps:
        covered += range(step.start, step.stop)
    if covered != list(range(num_tokens)):
        raise InvalidInputError(
            f"steps: must cover the {num_tokens} tokens of the sequence once each, in order, got {len(covered)}; "
            "split the text that was captured"
        )

    # Quantities per token are summed over the tokens of each step.
    sizes = torch.tensor([step.stop - step.start for step in steps])
    step_of_token = torch.repeat_interleave(torch.arange(len(steps)), sizes)

    def joined(per_token: Float64[Tensor, " tokens"]) -> Float64[Tensor, " steps"]:
        return torch.zeros(len(steps), dtype=torch.float64).index_add_(0, step_of_token, per_token)

    # F(A, B): the sum over the edges between two steps; those inside a step are its diagonal.
    source, target = flow.graph.edge_index
    between = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    between.index_put_((step_of_token[target], step_of_token[source]), flow.edge_flow, accumulate=True)
    within = between.diagonal().clone()
    return StepRelevance(
        steps=tuple(steps),
        flow=between - torch.diag(within),
        within=within,
        demand=joined(flow.demand),
        absorbed=joined(flow.absorbed),
        bias=joined(flow.bias),
        pruned_in=joined(flow.pruned_in),
        pruned_out=joined(flow.pruned_out),
        total=flow.total,
        residual=flow.residual,
    )
