"""Passes of the policy that some credit rules run beside the pass that scores the old policy.

Letters of the shapes: B responses, P prompt columns, R response columns, D hidden size. All results are float32,
detached, on the policy's device, and 0 on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import EdgeRules, capture, composed_scores
from rl.policy.actor_critic import ActorCritic, ModelInput
from rl.records import Responses


class PolicyPasses:
    """The passes of the policy over some responses, in micro-batches.

    Args:
        policy: not wrapped.
        responses: on the policy's device.
        temperature: of the rollout.
        micro_batch_size: sequences in a pass.
    """

    def __init__(self, policy: ActorCritic, responses: Responses, temperature: float, micro_batch_size: int) -> None:
        self._policy = policy
        self._responses = responses
        self._temperature = temperature
        self._micro_batch_size = micro_batch_size

    def answer_saliency(self) -> Float[Tensor, "batch response"]:
        r"""Compute gradient times activation of the answer's log-likelihood L at each response token's embedding x.

        :math:`|\langle \partial L / \partial x_t, x_t \rangle|` with :math:`L = \sum_{u \in answer} \log p_u`;
        0 without an answer.

        Cost: one forward and one backward pass.
        """

        def saliency(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            tokens = inputs.input_ids[:, part.prompt_length :]
            # dL/dx. Each x_t belongs to one response, so the gradient of the sum over responses is that of its own L.
            with torch.enable_grad():
                embeddings = self._policy.embeddings(inputs).requires_grad_(True)
                logprobs = self._policy.logprobs_of_embeddings(embeddings, inputs, tokens, self._temperature)
                likelihood = torch.where(part.answer_in_response, logprobs, 0.0).sum()
                (gradient,) = torch.autograd.grad(likelihood, embeddings)
            return _times_activation(gradient, embeddings, part)

        return self._over_parts(saliency)

    def outcome_sensitivity(
        self, chosen: Bool[Tensor, "batch response"], random: Sequence[torch.Generator], noise: float
    ) -> Float[Tensor, "batch response"]:
        r"""Compute gradient times activation of the answer distribution's divergence under noise.

        :math:`|\langle \partial KL(p(x) \| p(x')) / \partial x'_t, x_t \rangle|`, with p the softmax of the mean
        logits of the answer tokens, and x' the embeddings with Gaussian noise of standard deviation ``noise`` on the
        chosen tokens. 0 without an answer.

        Args:
            chosen: ``[B, R]``, tokens that get noise.
            random: a generator for each response, on the CPU.
            noise: standard deviation, in units of the embeddings.

        Cost: two forward passes and one backward pass.
        """

        def saliency(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            length = part.response_length
            embeddings = self._policy.embeddings(inputs)
            hidden_size = embeddings.shape[-1]

            # x': the embeddings, with noise on the chosen tokens.
            disturbed = embeddings.clone()
            for row in range(part.num_sequences):
                # Noise is drawn for real tokens only, so that padding changes no draw.
                columns = part.prompt_length + chosen[first + row].nonzero().flatten()
                own_generator = random[first + row]
                draw = torch.randn(len(columns), hidden_size, generator=own_generator, dtype=torch.float32)
                disturbed[row, columns] += noise * draw.to(embeddings)

            # p(x), which is the constant side of the divergence.
            with torch.no_grad():
                clean = self._policy.logits_of_embeddings(embeddings, inputs, length)
                target = _mean_over_answer(clean, part).softmax(-1)

            # The gradient of KL(p(x) || p(x')) in x'. It is that of the cross-entropy, because the entropy of the
            # target has no gradient.
            with torch.enable_grad():
                disturbed.requires_grad_(True)
                logits = self._policy.logits_of_embeddings(disturbed, inputs, length)
                logprobs = _mean_over_answer(logits, part).log_softmax(-1)
                cross_entropy = -(target * logprobs).sum(-1)
                has_answer = part.answer_in_response.any(1)
                divergence = torch.where(has_answer, cross_entropy, 0.0).sum()
                (gradient,) = torch.autograd.grad(divergence, disturbed)
            return _times_activation(gradient, embeddings, part)

        return self._over_parts(saliency)

    def hidden_states(self) -> Float[Tensor, "batch response hidden"]:
        """Compute the last hidden state from which each response token was drawn.

        Cost: one forward pass; ``4 * B * R * D`` bytes.
        """

        def states(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            with torch.no_grad():
                hidden = self._policy.hidden_states(inputs, part.response_length).float()
            return hidden * part.response_mask[..., None]

        return self._over_parts(states)

    def received_relevance(self, *, target: Literal["margin", "logprob"], hops: int) -> Float[Tensor, "batch response"]:
        r"""Compute the conserved relevance of the answer that later readers pass to each response token.

        :math:`\operatorname{sign}(D) \sum_{t > s} N[t, s]`, with N of :class:`flowgraph.RelevanceRows` and D the total
        demand. Where the model prefers another answer, D is negative, and the sign makes the score that of the case
        against the answer. 0 without an answer.

        Args:
            target: what is explained, see :func:`flowgraph.capture`.
            hops: emission hops; each is one more backward pass.

        Cost: about three forward passes, and a matrix of ``4 * (P + R)^2`` bytes for each sequence.
        """

        def received(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            mask = part.response_mask
            scores = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            answered = part.answer_in_response.any(1).nonzero().flatten()
            if answered.numel() == 0:
                return scores

            # Only responses with an answer are captured: the others have no demand.
            options: dict[str, Any] = {}
            if hops:
                options = {"generated": part.generated[answered], "hops": hops}
            with self._policy.autocast():
                rows = capture(
                    self._policy.causal_lm,
                    inputs.input_ids[answered],
                    inputs.attention_mask[answered],
                    capacity="relevance",
                    answer=part.answer[answered],
                    target=target,
                    **options,
                )

            # sign(D) times the column sums of N, which run over the readers t > s.
            demand = rows.demand.sum(1, keepdim=True)
            passed = rows.matrix.sum(1)[:, part.prompt_length :]
            scores[answered] = (demand.sign() * passed).float()
            return scores * mask

        return self._over_parts(received)

    def vtrace(self, convention: Any, *, damping: float) -> Float[Tensor, "batch response"]:
        """Compute the score of VTRACE for each response token: see ``capture(capacity="vtrace")`` and ``compose``.

        Args:
            convention: of the rows, ``"emission"`` or ``"literal"``.
            damping: factor per hop.

        Cost: about 1.4 forward passes, and two solves for each response.
        """

        def scores(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            mask = part.response_mask
            found = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            with self._policy.autocast():
                rows = capture(self._policy.causal_lm, inputs.input_ids, inputs.attention_mask, capacity="vtrace")

            # The composition takes one sequence at a time, without padding.
            rules = EdgeRules(rows=convention, normalization="leak")
            answered = part.answer_in_response.any(1).nonzero().flatten()
            for item in answered.tolist():
                real = part.attention_mask[item]
                composed = composed_scores(
                    rows.sequence(item),
                    "vtrace",
                    question=part.question[item][real],
                    answer=part.answer[item][real],
                    generated=part.generated[item][real],
                    rules=rules,
                    damping=damping,
                )
                # Without padding, the response is the end of the sequence.
                length = int(mask[item].sum())
                found[item, :length] = composed.scores[-length:].float()
            return found

        return self._over_parts(scores)

    def influence(self, advantages: Float[Tensor, " batch"]) -> Float[Tensor, "batch response"]:
        r"""Compute how far each token's policy gradient points along the mean policy gradient of the batch.

        :math:`z_t = \langle g_t, \bar g \rangle`, with :math:`g_t = \nabla_\theta \log p_t` over the policy's trained
        weights and :math:`\bar g = \frac{1}{n} \sum_i A_i \sum_{t} g_{i t}` over the n response tokens of the batch.
        Exact: :math:`\bar g` by a backward pass, and all :math:`z_t` by one forward-mode derivative along it. The mean
        holds the token's own gradient.

        Args:
            advantages: A, of each response.

        Cost: one forward and backward pass, and about two forward passes.
        """
        parameters = self._policy.policy_parameters()
        num_tokens = max(1, int(self._responses.response_mask.sum()))

        # \bar g, the gradient of the mean of A log p over the tokens, summed over the micro-batches.
        direction = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for first, part in self._parts():
            inputs = ModelInput.of(part, self._policy.device)
            tokens = inputs.input_ids[:, part.prompt_length :]
            of_part = advantages[first : first + part.num_sequences, None]
            with torch.enable_grad():
                logprobs, _ = self._policy.policy_pass(inputs, tokens, self._temperature)
                weighted = torch.where(part.response_mask, logprobs * of_part, 0.0)
                objective = weighted.sum() / num_tokens
                gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    direction[name] += gradient

        # z_t = <g_t, \bar g> for all t: the derivative of log p_t along \bar g.
        def along(part: Responses, inputs: ModelInput, first: int) -> Tensor:
            tokens = inputs.input_ids[:, part.prompt_length :]
            derivative = self._policy.logprob_derivative(inputs, tokens, self._temperature, direction)
            return torch.where(part.response_mask, derivative, 0.0)

        return self._over_parts(along)

    def _parts(self) -> Iterator[tuple[int, Responses]]:
        """Yield the micro-batches, each with the number of its first response."""
        for first in range(0, self._responses.num_sequences, self._micro_batch_size):
            last = min(first + self._micro_batch_size, self._responses.num_sequences)
            yield first, self._responses.select(range(first, last))

    def _over_parts(self, function: Callable[[Responses, ModelInput, int], Tensor]) -> Tensor:
        """Run a function of micro-batch, model input and number of the first response, and join the results."""
        found = []
        for first, part in self._parts():
            result = function(part, ModelInput.of(part, self._policy.device), first)
            found.append(result.detach().float())
        return torch.cat(found)


def _times_activation(
    gradient: Float[Tensor, "batch tokens hidden"], embeddings: Float[Tensor, "batch tokens hidden"], part: Responses
) -> Float[Tensor, "batch response"]:
    """Compute the absolute inner product of gradient and embedding at each response token."""
    product = (gradient.float() * embeddings.detach().float()).sum(-1).abs()
    return torch.where(part.response_mask, product[:, part.prompt_length :], 0.0)


def _mean_over_answer(
    logits: Float[Tensor, "batch response vocabulary"], part: Responses
) -> Float[Tensor, "batch vocabulary"]:
    """Average the logits of the answer tokens of each response; 0 for a response without an answer."""
    answer = part.answer_in_response[..., None]
    # Logits of padding may hold anything: select, do not multiply.
    total = torch.where(answer, logits.float(), 0.0).sum(1)
    return total / answer.sum(1).clamp_min(1)
