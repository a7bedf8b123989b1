"""Credit rules from the flow of :mod:`flowgraph`: what passes through a token on its way from question to answer.

The option ``rows`` names the convention: ``"emission"`` (default) gives a generated token the row of the position that
emitted it, ``"literal"`` its own. The score of a response column always belongs to the token that stands there, under
either convention, like its log-probability and its entropy. Responses without an answer, or whose answer no question
token reaches, score 0 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, EdgeRules, RowFlow, solve_rows
from rl.credit.policy_rules import generators_of
from rl.credit.registry import AttentionNeed, CreditInput, credit_rule, options_of, recorded

_NEEDS = {"attention": AttentionNeed()}


@credit_rule("flow", needs=_NEEDS)
def flow(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Throughput: the share of the flow from question to answer that passes through the token.

    .. math:: f_t = g_t \cdot h_t \in [0, 1]

    arXiv 2606.10646; its own rows are ``"literal"``. See :func:`flowgraph.solve_rows`.

    Options: ``rows`` (``"emission"``).

    Raises:
        InvalidInputError: a convention outside its set.

    Cost: two reads of the rows.
    """
    return _in_response(batch, _solved(batch, recorded(batch, "attention")).throughput)


@credit_rule("flow_entropy", needs=_NEEDS)
def flow_entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Throughput times entropy: tokens that were a real decision *and* carry information to the answer.

    .. math:: f_t \cdot H_t

    Both factors belong to the token at t: its throughput, and the entropy of the distribution it was drawn from.
    Options and cost as :func:`flow`.
    """
    return flow(batch) * _entropy(batch)


@credit_rule("reach", needs=_NEEDS)
def reach(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Backward potential: the total influence of the token that reaches the answer, wherever it came from.

    .. math:: h_s = b_s + \sum_{t > s} C[t, s] \cdot h_t

    1 on answer tokens, 0 after the answer. Options and cost as :func:`flow`.
    """
    solved = _solved(batch, recorded(batch, "attention"))
    return _in_response(batch, solved.h * torch.exp2(solved.exponent.double()))


@credit_rule("reach_entropy", needs=_NEEDS)
def reach_entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Backward potential times entropy.

    .. math:: h_t \cdot H_t

    Options and cost as :func:`flow`.
    """
    return reach(batch) * _entropy(batch)


@credit_rule("shuffled_flow", needs=_NEEDS)
def shuffled_flow(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Throughput of a graph with shuffled weights: the control that shows whether structure matters.

    The weights of every row are permuted among the tokens that it may read: how much a token reads in all, and how
    unevenly, stays, and what it reads is chance. Options as :func:`flow`.

    Raises:
        CreditError: not one generator for each response.
        InvalidInputError: a convention outside its set.
        MemoryLimitError: the dense rows would not fit.

    Cost: ``4 * batch * tokens ** 2`` bytes; each row is sorted once.
    """
    rows, generators = recorded(batch, "attention"), generators_of(batch)
    matrix, own_rows = rows.dense(), _keeps_own_row(batch).to(rows.device)
    for weights, real, own, random in zip(matrix, rows.attention_mask, own_rows, generators, strict=True):
        at = real.nonzero().flatten()
        weights[at[:, None], at] = _shuffled(weights[at[:, None], at], own[at], random)
    return _in_response(batch, _solved(batch, _ShuffledRows(matrix, rows.attention_mask)).throughput)


@dataclass(frozen=True)
class _ShuffledRows:
    """Whole matrices that still know their padding, so that the first token of each sequence is found."""

    matrix: Float[Tensor, "batch tokens tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]

    @property
    def batch_size(self) -> int:
        return self.matrix.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        return self.matrix[:, start:stop, :stop]


def _keeps_own_row(batch: CreditInput) -> Bool[Tensor, "batch tokens"]:
    """Tokens that take their own row: all of them in literal rows, those of the prompt in emission rows."""
    generated = batch.responses.generated
    return torch.ones_like(generated) if _rules(batch).rows == "literal" else ~generated


def _shuffled(
    weights: Float[Tensor, "tokens tokens"], own_row: Bool[Tensor, " tokens"], random: torch.Generator
) -> Float[Tensor, "tokens tokens"]:
    """The rows of one sequence, each permuted among the tokens it may read.

    Two weights are no edges and stay in place: that of the first token, which the flow leaves out, and
    self-attention in the row that a token keeps for itself.
    """
    tokens, device = weights.shape[0], weights.device
    column = torch.arange(tokens, device=device)
    movable = (column <= column[:, None]) & (column > 0)
    movable &= ~(own_row[:, None] & (column == column[:, None]))
    chance = torch.rand(tokens, tokens, generator=random).to(device)
    drawn = torch.argsort(torch.where(movable, chance, 2.0 + column), stable=True)
    places = torch.argsort((~movable).long(), stable=True)
    return torch.empty_like(weights).scatter_(1, places, weights.gather(1, drawn))


def _solved(batch: CreditInput, rows: AttentionRows | _ShuffledRows) -> RowFlow:
    responses = batch.responses
    return solve_rows(
        rows, question=responses.question, answer=responses.answer, generated=responses.generated, rules=_rules(batch)
    )


def _rules(batch: CreditInput) -> EdgeRules:
    options_of(batch)
    convention: Any = batch.options.get("rows", "emission")
    return EdgeRules(rows=convention)


def _in_response(batch: CreditInput, values: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch response"]:
    return values[:, batch.responses.prompt_length :].float().to(batch.scored.device)


def _entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    return batch.scores.entropy.to(batch.scored.device).clamp_min(0.0)
