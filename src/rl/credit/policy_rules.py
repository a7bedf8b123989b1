"""Credit rules that need no attention: the controls, and rules that use the policy's own statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl.credit.registry import POSITION_MATCHED, CreditInput, credit_rule
from rl.errors import CreditError


@credit_rule("uniform", weighs=True)
def uniform(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score every token 1: plain PPO, the baseline of every comparison."""
    return batch.responses.response_mask.float()


@credit_rule("random")
def random(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Draw uniform random scores: the control that shows the effect of any selection of tokens.

    Each response draws once for each of its tokens, from its own generator. Padding and the size of micro-batches
    change nothing.

    Raises:
        CreditError: the number of generators is not that of the responses.
    """
    mask = batch.responses.response_mask.cpu()
    scores = torch.zeros(mask.shape, dtype=torch.float32)
    for row, is_token, generator in zip(scores, mask, generators_of(batch), strict=True):
        num_tokens = int(is_token.sum())
        row[is_token] = torch.rand(num_tokens, generator=generator, dtype=torch.float32)
    return scores.to(batch.scored.device)


@credit_rule("oracle", needs_oracle=True)
def oracle(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score the tokens that the task marks as decisive 1, the others 0: the ceiling for every other rule.

    Raises:
        CreditError: the task does not mark decisive tokens.
    """
    if batch.responses.oracle is None:
        raise CreditError(
            "oracle: must be known to the task, got responses without; use a task with an oracle, such as chain, "
            "wandering, pathsearch or program, or another rule"
        )
    return batch.responses.oracle.float()


@credit_rule("entropy")
def entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score a token by the entropy of the distribution that it was drawn from, in nats.

    With ``shape="only_top", share=0.2`` it is the selection of arXiv 2506.01939.
    """
    # Rounding can put the entropy of a certain token just below 0.
    return batch.scores.entropy.clamp_min(0.0)


@credit_rule("gradient", gradient=True)
def gradient(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score a token by the norm of the policy gradient at its input embedding.

    Raises:
        CreditError: ``batch.gradient`` is missing.

    Cost: one extra forward and backward pass.
    """
    if batch.gradient is None:
        raise CreditError(
            "gradient: must be a function that gives the gradient norms, got none; register the rule with "
            "gradient=True, or pass CreditInput(gradient=...)"
        )
    return batch.gradient()


@credit_rule(POSITION_MATCHED)
def position_matched(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Permute the weights of another rule among the responses at equal position: the control for position.

    At each response column, the weights (and scores) of the tokens that compete there are permuted at random among the
    responses of this process. What remains of the rule is how much it gives to each position on average.

    Options: ``of``, the rule (``"flow_sharp"``); all other options are its own, and so are shape, fallback and cost.

    Raises:
        CreditError: ``of`` names no other rule.
    """
    # The permutation needs all responses, so it follows when the batch is weighed; this function is not called.
    raise CreditError(
        "credit: 'position_matched' must be weighed with its batch, got a call of its function; use credit_tokens"
    )


def generators_of(batch: CreditInput) -> Sequence[torch.Generator]:
    """Return the random generators, one for each response.

    Raises:
        CreditError: their number is not that of the responses.
    """
    if len(batch.random) != batch.responses.num_sequences:
        raise CreditError(
            f"random: must be one generator for each of {batch.responses.num_sequences} responses, got "
            f"{len(batch.random)}; pass CreditInput(random=[torch.Generator(), ...])"
        )
    return batch.random
