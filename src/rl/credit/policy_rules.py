"""Credit rules that need no attention: the controls, and what the policy itself says of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl.credit.registry import CreditInput, credit_rule
from rl.errors import CreditError


@credit_rule("uniform", weighs=True)
def uniform(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """The same for every token: plain PPO, the baseline of every comparison."""
    return batch.responses.response_mask.float()


@credit_rule("random")
def random(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Uniform random scores: the control that shows what any selection of tokens does.

    Each response draws once per token of its own, so padding and the size of micro-batches change nothing.

    Raises:
        CreditError: not one generator for each response.
    """
    mask = batch.responses.response_mask.cpu()
    scores = torch.zeros(mask.shape)
    for score, chosen, generator in zip(scores, mask, generators_of(batch), strict=True):
        score[chosen] = torch.rand(int(chosen.sum()), generator=generator)
    return scores.to(batch.scored.device)


@credit_rule("oracle", needs_oracle=True)
def oracle(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """1 on the tokens that the task knows to be decisive, 0 elsewhere: the ceiling for every other rule.

    Raises:
        CreditError: the task does not know.
    """
    if batch.responses.oracle is None:
        raise CreditError(
            "oracle: must be known to the task, got responses without; use the task 'chain', or another rule"
        )
    return batch.responses.oracle.float()


@credit_rule("entropy")
def entropy(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Entropy of the distribution that the token was drawn from, in nats.

    With ``shape="only_top", share=0.2`` it is the selection of arXiv 2506.01939.
    """
    return batch.scores.entropy.clamp_min(0.0)  # rounding can put a certain token just below 0


@credit_rule("gradient", gradient=True)
def gradient(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Norm of the policy gradient at the token's input embedding.

    Raises:
        CreditError: no gradient is at hand.

    Cost: one extra forward and backward pass.
    """
    if batch.gradient is None:
        raise CreditError(
            "gradient: must be a function that gives the gradient norms, got none; register the rule with "
            "gradient=True, or pass CreditInput(gradient=...)"
        )
    return batch.gradient()


def generators_of(batch: CreditInput) -> Sequence[torch.Generator]:
    """The generator of each response.

    Raises:
        CreditError: there is not one for each.
    """
    if len(batch.random) != batch.responses.num_sequences:
        raise CreditError(
            f"random: must be one generator for each of {batch.responses.num_sequences} responses, got "
            f"{len(batch.random)}; pass CreditInput(random=[torch.Generator(), ...])"
        )
    return batch.random
