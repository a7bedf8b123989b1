"""Record the log-probabilities with which ``generate`` drew its tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class SampledLogprobs:
    """A logits processor that records the log-probability of every drawn token and changes nothing.

    It comes before the processors that add noise. The pass that scores a rollout computes the same quantity for
    complete sequences; in 16 bits, or from merged weights, the two differ.

    Args:
        temperature: tau, positive.

    Cost: one log-softmax of vocabulary size for each token.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._logprobs: Float[Tensor, "batch vocabulary"] | None = None
        self._columns: list[Float[Tensor, " batch"]] = []

    def __call__(
        self, input_ids: Int64[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        self._record(input_ids[:, -1])
        self._logprobs = torch.log_softmax(scores.float() / self._temperature, -1)
        return scores

    def result(self, output: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "batch response"]:
        """Return the log-probabilities of all drawn tokens in nats, ``[B, R]`` float32 on the CPU.

        Args:
            output: of ``generate``, prompts included.
        """
        self._record(output[:, -1])
        return torch.stack(self._columns, 1).cpu()

    def _record(self, tokens: Int64[Tensor, " batch"]) -> None:
        """Record the tokens that were drawn from the distribution of the step before."""
        # At the first call the last token is one of the prompt, which was not drawn.
        if self._logprobs is not None:
            drawn = self._logprobs.gather(-1, tokens[:, None]).squeeze(1)
            self._columns.append(drawn)
            self._logprobs = None
