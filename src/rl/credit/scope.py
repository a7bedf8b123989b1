"""Which tokens of a response compete for credit."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from rl.algorithm.advantages import last_tokens
from rl.config import Scope
from rl.records import Responses


def tokens_in_scope(responses: Responses, scope: Scope) -> Bool[Tensor, "batch response"]:
    """Select the tokens that a credit rule may judge; all other tokens keep weight 1.

    ``"reasoning"`` covers the response up to its answer, without the answer, whose throughput is large by construction.
    ``"response"`` covers the same tokens and the answer.

    Neither scope covers the tokens after the answer, such as a closing tag and the end token. They cannot influence an
    answer that precedes them, so their score of 0 is no evidence, and the floor of the soft shape on every end token
    would teach a wrong length. In a response without an answer, both scopes cover every token that the policy chose.

    Args:
        responses: B responses of R columns.
        scope: ``"reasoning"`` or ``"response"``.

    Returns:
        ``[B, R]`` bool, False on padding.
    """
    in_scope = responses.response_mask & ~after_answer(responses)
    if scope == "reasoning":
        in_scope = in_scope & ~responses.answer_in_response
    return in_scope


def before_answer(responses: Responses) -> Bool[Tensor, "batch response"]:
    """Select the response tokens that an answer token follows, the answer left out; none without an answer."""
    answer = responses.answer_in_response
    return responses.response_mask & _is_followed_by(answer) & ~answer


def after_answer(responses: Responses) -> Bool[Tensor, "batch response"]:
    """Select the response tokens after the last answer token; none without an answer."""
    answer = responses.answer_in_response
    has_answer = answer.any(1, keepdim=True)
    return responses.response_mask & has_answer & ~_is_followed_by(answer)


def end_tokens(responses: Responses) -> Bool[Tensor, "batch response"]:
    """Select the end token of each response: its last token, none where the response was truncated."""
    ends = last_tokens(responses.response_mask)
    return ends & ~responses.truncated[:, None]


def answer_openers(responses: Responses) -> Bool[Tensor, "batch response"]:
    """Select the token before the first answer token of each response; none where the response begins with it."""
    answer = responses.answer_in_response
    num_answer_tokens = answer.long().cumsum(1)
    is_first = answer & (num_answer_tokens == 1)
    # Shifted by one column to the left: the opener is the token before.
    opener = torch.zeros_like(answer)
    opener[:, :-1] = is_first[:, 1:]
    return opener & responses.response_mask


def _is_followed_by(tokens: Bool[Tensor, "batch response"]) -> Bool[Tensor, "batch response"]:
    """Mark every column that holds one of the given tokens, or has one after it."""
    # A cumulative sum from the right.
    num_from_here = tokens.long().flip(1).cumsum(1).flip(1)
    return num_from_here > 0
