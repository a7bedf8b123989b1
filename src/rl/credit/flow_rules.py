"""Credit rules from the flow of :mod:`flowgraph`: what passes through a token on its way from question to answer.

The option ``rows`` names the convention: ``"emission"`` (default) gives a generated token the row of the position that
emitted it, ``"literal"`` its own. Under either convention the score of a response column belongs to the token at that
column, like its log-probability and its entropy. Responses without an answer, or whose answer no question token
reaches, score 0 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, EdgeRules, RowFlow, solve_rows
from rl.credit.policy_rules import generators_of
from rl.credit.registry import AttentionNeed, CreditInput, TiedScores, credit_rule, options_of, recorded
from rl.credit.scope import before_answer

_NEEDS = {"attention": AttentionNeed()}


@credit_rule("flow", needs=_NEEDS, ties=True)
def flow(batch: CreditInput) -> TiedScores:
    r"""Score a token by its throughput: the share of the flow from question to answer that passes through it.

    .. math:: f_t = g_t \cdot h_t \in [0, 1]

    arXiv 2606.10646; its own rows are ``"literal"``. See :func:`flowgraph.solve_rows`.

    Options: ``rows`` (``"emission"``).

    Raises:
        InvalidInputError: an unknown convention.

    Cost: two reads of the rows.
    """
    solved = _solved(batch, recorded(batch, "attention"))
    return throughput_scores(batch, solved)


@credit_rule("flow_entropy", needs=_NEEDS, ties=True)
def flow_entropy(batch: CreditInput) -> TiedScores:
    r"""Score a token by throughput times entropy: it informs the answer *and* was a decision of the policy.

    .. math:: f_t \cdot H_t

    Both factors belong to the token at t: its throughput, and the entropy of the distribution it was drawn from.
    Options and cost as :func:`flow`.
    """
    found = flow(batch)
    return TiedScores(found.scores * _entropy(batch), found.tie)


@credit_rule("reach", needs=_NEEDS, ties=True)
def reach(batch: CreditInput) -> TiedScores:
    r"""Score a token by its backward potential: its total influence on the answer, whatever its own source.

    .. math:: h_s = b_s + \sum_{t > s} C[t, s] \cdot h_t

    1 on answer tokens, 0 after the answer. Options and cost as :func:`flow`.
    """
    solved = _solved(batch, recorded(batch, "attention"))
    return reach_scores(batch, solved)


@credit_rule("reach_entropy", needs=_NEEDS, ties=True)
def reach_entropy(batch: CreditInput) -> TiedScores:
    r"""Score a token by backward potential times entropy.

    .. math:: h_t \cdot H_t

    Options and cost as :func:`flow`.
    """
    found = reach(batch)
    return TiedScores(found.scores * _entropy(batch), found.tie)


@credit_rule("shuffled_flow", needs=_NEEDS, ties=True)
def shuffled_flow(batch: CreditInput) -> TiedScores:
    """Score a token by throughput in a graph with shuffled weights: the control for the structure of the graph.

    The weights of every row are permuted among the tokens that it may read. The sum of a row and its unevenness stay;
    which token has which weight is random. Options as :func:`flow`.

    Raises:
        CreditError: the number of generators is not that of the responses.
        InvalidInputError: an unknown convention.
        MemoryLimitError: the dense rows would not fit.

    Cost: ``4 * batch * tokens ** 2`` bytes; each row is sorted once.
    """
    shuffled = shuffled_rows(batch, recorded(batch, "attention"))
    return throughput_scores(batch, _solved(batch, shuffled))


def throughput_scores(batch: CreditInput, solved: RowFlow) -> TiedScores:
    """Return the throughput of response tokens, with the tie of each answer."""
    return TiedScores(_in_response(batch, solved.throughput), _tie(batch, solved))


def reach_scores(batch: CreditInput, solved: RowFlow) -> TiedScores:
    """Return the backward potential of response tokens, with the tie of each answer."""
    return TiedScores(_in_response(batch, _potential(solved)), _tie(batch, solved))


def _potential(solved: RowFlow) -> Float[Tensor, "batch tokens"]:
    """Return h without its scale: the solver stores h divided by ``2 ** exponent``, so that it cannot underflow."""
    scale = torch.exp2(solved.exponent.double())
    return solved.h * scale


def _tie(batch: CreditInput, solved: RowFlow) -> Float[Tensor, " batch"]:
    """Compute the mean of h over the response tokens before the answer; 0 where there are none."""
    before = before_answer(batch.responses).to(solved.h.device)
    potential = _potential(solved)[:, batch.responses.prompt_length :]
    total = torch.where(before, potential, 0.0).sum(1)
    num_before = before.sum(1).clamp_min(1)
    return (total / num_before).float()


def shuffled_rows(batch: CreditInput, rows: AttentionRows) -> _ShuffledRows:
    """Permute the weights of every row among the tokens that it may read; see :func:`shuffled_flow`."""
    generators = generators_of(batch)
    matrix = rows.dense()
    own_rows = _keeps_own_row(batch).to(rows.device)
    for weights, is_real, own_row, random in zip(matrix, rows.attention_mask, own_rows, generators, strict=True):
        # Padding is cut out first, so that the draws of a response do not depend on its batch.
        positions = is_real.nonzero().flatten()
        cells = (positions[:, None], positions)
        real_weights = weights[cells]
        weights[cells] = _shuffled(real_weights, own_row[positions], random)
    return _ShuffledRows(matrix, rows.attention_mask)


@dataclass(frozen=True)
class _ShuffledRows:
    """Dense matrices with their padding mask, by which the first token of each sequence is found.

    Attributes:
        matrix: ``[B, T, T]``, row t holds the weights that token t reads.
        attention_mask: ``[B, T]``, False on padding.
    """

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
    """Mark the tokens that take their own row: all in literal rows, those of the prompt in emission rows."""
    generated = batch.responses.generated
    if batch.options.get("rows", "emission") == "literal":
        return torch.ones_like(generated)
    return ~generated


def _shuffled(
    weights: Float[Tensor, "tokens tokens"], own_row: Bool[Tensor, " tokens"], random: torch.Generator
) -> Float[Tensor, "tokens tokens"]:
    """Permute each row of one sequence among the tokens that it may read.

    Two kinds of weights are no edges of the flow and stay in place: that of the first token, which the flow leaves
    out, and self-attention in the row that a token keeps for itself.
    """
    # The weights that move: what a token reads before itself or at itself, less the two fixed kinds.
    num_tokens = weights.shape[0]
    device = weights.device
    column = torch.arange(num_tokens, device=device)
    row = column[:, None]
    is_causal = column <= row
    is_own_attention = own_row[:, None] & (column == row)
    movable = is_causal & (column > 0) & ~is_own_attention

    # Sorting puts the movable columns first in random order, then the fixed ones in their own order.
    # Random keys are below 1, keys of fixed columns are 2 or more.
    random_keys = torch.rand(num_tokens, num_tokens, generator=random, dtype=torch.float32).to(device)
    keys = torch.where(movable, random_keys, 2.0 + column)
    drawn = torch.argsort(keys, stable=True)

    # The places that they go to: the movable columns in order, then the fixed ones.
    is_fixed = (~movable).long()
    places = torch.argsort(is_fixed, stable=True)
    permuted = weights.gather(1, drawn)
    return torch.empty_like(weights).scatter_(1, places, permuted)


def _solved(batch: CreditInput, rows: AttentionRows | _ShuffledRows) -> RowFlow:
    """Solve the flow from the question to the answer of each response; the flow rules have no option of their own."""
    options_of(batch)
    return solve_response_flow(batch, rows, EdgeRules(rows=convention_of(batch)))


def solve_response_flow(
    batch: CreditInput,
    rows: AttentionRows | _ShuffledRows,
    rules: EdgeRules,
    *,
    answer: Bool[Tensor, "batch tokens"] | None = None,
) -> RowFlow:
    """Solve the flow of each response on given rows.

    Args:
        batch: whose question and generated tokens are used.
        rows: attention of the batch.
        rules: how rows become edges.
        answer: the sink; None: the answer of each response.
    """
    responses = batch.responses
    return solve_rows(
        rows,
        question=responses.question,
        answer=responses.answer if answer is None else answer,
        generated=responses.generated,
        rules=rules,
    )


def convention_of(batch: CreditInput) -> Any:
    """Read the convention of the rows; :class:`flowgraph.EdgeRules` checks it."""
    return batch.options.get("rows", "emission")


def _in_response(batch: CreditInput, values: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch response"]:
    """Cut the response columns out of values of all tokens."""
    return values[:, batch.responses.prompt_length :].float().to(batch.scored.device)


def _entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Read the entropies; rounding can put that of a certain token just below 0."""
    return batch.scores.entropy.to(batch.scored.device).clamp_min(0.0)
