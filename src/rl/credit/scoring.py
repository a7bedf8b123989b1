"""The old-policy pass: log-probabilities, values, reference, and token credit from the same pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowgraph import AttentionRecorder, AttentionRows
from rl.config import CreditConfig
from rl.credit.policy_passes import PolicyPasses
from rl.credit.ratings import MeanOverBatch, Ratings, check_credit, local_mean, rate_tokens, weigh_tokens
from rl.credit.registry import AttentionNeed, CreditRule, Needs, applied, find_rule
from rl.policy.actor_critic import ActorCritic, ModelInput, TokenOutput
from rl.records import Credit, Responses, TokenScores, join_records, to_device
from rl.seeds import generator

Recorders = dict[str, AttentionRecorder]
"""The recorders of one rule, by the names of its needs."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores and credit of a rollout, with the time that the credit took.

    Attributes:
        scores: of every response token.
        credits: of every response token, one record for each of the credit settings.
        credit_seconds: time for the credit alone: recording attention, reading it, the rule, the shape.
        output: the pass itself with its autograd graph, on the policy's device, where it was kept.
    """

    scores: TokenScores
    credits: tuple[Credit, ...]
    credit_seconds: float
    output: TokenOutput | None = None

    @property
    def credit(self) -> Credit:
        """The credit of the only settings."""
        (credit,) = self.credits
        return credit


def score_rollout(
    policy: ActorCritic,
    responses: Responses,
    credit: CreditConfig,
    *,
    temperature: float,
    micro_batch_size: int,
    seed: int,
    step: int,
    reference: bool,
    keep_graph: bool = False,
    mean_over_batch: MeanOverBatch = local_mean,
) -> Scored:
    """Score every response under the policy that wrote it, and credit its tokens under one setting.

    Arguments, errors and cost as :func:`score_with_settings`.
    """
    return score_with_settings(
        policy,
        responses,
        [credit],
        temperature=temperature,
        micro_batch_size=micro_batch_size,
        seed=seed,
        step=step,
        reference=reference,
        keep_graph=keep_graph,
        mean_over_batch=mean_over_batch,
    )


def score_with_settings(
    policy: ActorCritic,
    responses: Responses,
    settings: Sequence[CreditConfig],
    *,
    temperature: float,
    micro_batch_size: int,
    seed: int,
    step: int,
    reference: bool,
    keep_graph: bool = False,
    mean_over_batch: MeanOverBatch = local_mean,
) -> Scored:
    """Score every response under the policy that wrote it, and credit its tokens under each of the settings.

    All settings share one forward pass: attention is recorded while the log-probabilities are computed. Only rules that
    are registered with ``gradient=True`` add a pass of their own.

    Args:
        policy: not wrapped.
        responses: on the CPU; the results are on the CPU too.
        settings: rule, shape, scope, and the attention that is read.
        temperature: of the rollout.
        micro_batch_size: sequences at a time.
        seed: of rules that draw.
        step: part of that seed.
        reference: whether to compute log-probabilities under the reference.
        keep_graph: keep the autograd graph of the pass if one micro-batch holds all responses, so that an update with
            the same weights needs no forward pass of its own.
        mean_over_batch: the mean of some numbers over the responses of all processes, for the fallback.

    Raises:
        CreditError: an unknown rule or option, or a rule that returned an invalid score.

    Cost: one forward pass of the policy, one of the critic and one of the reference, where there are any.
    """
    # Every setting is checked before the first is read.
    for setting in settings:
        check_credit(setting)
    rules: list[CreditRule] = []
    needs: list[Needs] = []
    generators: list[list[torch.Generator]] = []
    for setting in settings:
        inner = applied(setting)
        rule = find_rule(inner.rule)
        rules.append(rule)
        needs.append(rule.needs_for(inner.options))
        # Settings do not share generators: each draws as it would in a training of its own.
        generators.append(credit_generators(responses, seed, step))

    # The graph of the pass serves an update only where one micro-batch holds all responses.
    keep_graph = keep_graph and responses.num_sequences <= micro_batch_size
    output: TokenOutput | None = None
    score_parts: list[TokenScores] = []
    rating_parts: list[list[Ratings]] = [[] for _ in settings]
    credit_seconds = 0.0

    for start in range(0, responses.num_sequences, micro_batch_size):
        stop = min(start + micro_batch_size, responses.num_sequences)
        part = responses.select(range(start, stop))
        inputs = ModelInput.of(part, policy.device)
        tokens = inputs.input_ids[:, part.prompt_length :]

        # The policy's pass, with the recorders of every rule attached, then the critic and the reference.
        with torch.set_grad_enabled(keep_graph):
            with ExitStack() as stack:
                recorders: list[Recorders] = []
                for of_rule, setting in zip(needs, settings, strict=True):
                    attached: Recorders = {}
                    for name, need in of_rule.items():
                        attached[name] = stack.enter_context(recorder_for(policy, need, setting))
                    recorders.append(attached)
                logprobs, entropy = policy.policy_pass(inputs, tokens, temperature)
            output, final_values = _with_values(policy, inputs, logprobs, entropy)
        ref_logprobs = policy.reference_pass(inputs, tokens, temperature) if reference else None
        scores = _token_scores(part, output, final_values, ref_logprobs)
        score_parts.append(scores)

        # The ratings of every setting, from what its recorders hold.
        for index, setting in enumerate(settings):
            if rules[index].whole_batch:
                continue
            begun = time.perf_counter()
            rows: dict[str, AttentionRows] = {}
            for name, recorder in recorders[index].items():
                rows[name] = recorder.rows(inputs.attention_mask, inputs.input_ids)
            own_generators = generators[index][start:stop]
            ratings = policy_ratings(policy, part, scores, rows, setting, own_generators, temperature=temperature)
            rating_parts[index].append(ratings)
            recording_seconds = sum(recorder.seconds for recorder in recorders[index].values())
            credit_seconds += time.perf_counter() - begun + recording_seconds

    # The credit of the batch: the fallback compares its responses, and some rules read all of them.
    begun = time.perf_counter()
    all_scores = join_records(score_parts)
    credits = []
    for rule, parts, setting, own_generators in zip(rules, rating_parts, settings, generators, strict=True):
        if rule.whole_batch:
            found = policy_ratings(
                policy,
                responses,
                all_scores,
                {},
                setting,
                own_generators,
                temperature=temperature,
                micro_batch_size=micro_batch_size,
            )
            parts = [found]
        # A generator of the batch: the number of its first problem differs between processes.
        random = generator(seed, "credit positions", step, int(responses.groups[0]))
        ratings = join_records(parts)
        credits.append(weigh_tokens(ratings, setting, mean_over_batch=mean_over_batch, random=random))
    credit_seconds += time.perf_counter() - begun

    return Scored(
        scores=all_scores,
        credits=tuple(credits),
        credit_seconds=credit_seconds,
        output=output if keep_graph else None,
    )


def _with_values(
    policy: ActorCritic,
    inputs: ModelInput,
    logprobs: Float[Tensor, "batch response"],
    entropy: Float[Tensor, "batch response"],
) -> tuple[TokenOutput, Float[Tensor, " batch"] | None]:
    """Add the critic's pass to the policy's, and separate its value after the last token."""
    values = policy.value_pass(inputs, logprobs.shape[1])
    if values is None:
        return TokenOutput(logprobs, entropy, None), None
    return TokenOutput(logprobs, entropy, values[:, :-1]), values[:, -1]


def _token_scores(
    responses: Responses,
    output: TokenOutput,
    final_values: Float[Tensor, " batch"] | None,
    ref_logprobs: Float[Tensor, "batch response"] | None,
) -> TokenScores:
    """Collect the output of all passes in the record of a rollout: on the CPU, detached, 0 on padding."""
    mask = responses.response_mask.to(output.logprobs.device)

    def on_cpu(tensor: Tensor) -> Tensor:
        return tensor.detach().float().masked_fill(~mask, 0.0).cpu()

    return TokenScores(
        logprobs=on_cpu(output.logprobs),
        entropy=on_cpu(output.entropy),
        ref_logprobs=None if ref_logprobs is None else on_cpu(ref_logprobs),
        values=None if output.values is None else on_cpu(output.values),
        final_values=None if final_values is None else final_values.detach().float().cpu(),
    )


def recorder_for(policy: ActorCritic, need: AttentionNeed, credit: CreditConfig) -> AttentionRecorder:
    """Make a recorder of the attention that a rule needs; the credit settings name what the rule leaves open."""
    return need.recorder(policy.causal_lm, layers=credit.layers, heads=credit.heads)


def policy_ratings(
    policy: ActorCritic,
    responses: Responses,
    scores: TokenScores,
    rows: Mapping[str, AttentionRows],
    credit: CreditConfig,
    random: Sequence[torch.Generator],
    *,
    temperature: float,
    micro_batch_size: int | None = None,
) -> Ratings:
    """Rate tokens on the policy's device, with the policy's own passes available; the result is on the CPU.

    ``micro_batch_size`` is that of the rule's own passes; None: all responses at a time.
    """
    on_device = to_device(responses, policy.device)

    # Called by rules that read gradients only, so no other rule pays for the pass.
    def gradient() -> Float[Tensor, "batch response"]:
        return embedding_gradient(policy, on_device, temperature)

    own_micro_batch_size = micro_batch_size or responses.num_sequences
    found = rate_tokens(
        on_device,
        to_device(scores, policy.device),
        credit,
        rows=rows,
        random=random,
        gradient=gradient,
        passes=PolicyPasses(policy, on_device, temperature, own_micro_batch_size),
    )
    return to_device(found, torch.device("cpu"))


def credit_generators(responses: Responses, seed: int, step: int) -> list[torch.Generator]:
    """Make one generator for each response, by problem and number within it.

    The draws of a rule are therefore the same for every size of micro-batches.
    """
    num_seen: dict[int, int] = {}
    generators = []
    for group in responses.groups.tolist():
        number = num_seen.get(group, 0)
        generators.append(generator(seed, "credit", step, group, number))
        num_seen[group] = number + 1
    return generators


def embedding_gradient(
    policy: ActorCritic, responses: Responses, temperature: float
) -> Float[Tensor, "batch response"]:
    """Compute the norm of the gradient of a response's log-likelihood at the input embedding of each of its tokens.

    The policy gradient of a response is this gradient times its advantage. The advantage is the same for all of its
    tokens and so changes no ranking among them.

    Args:
        policy: not wrapped.
        responses: on any device.
        temperature: of the rollout.

    Returns:
        ``[B, R]`` float32, 0 on padding.

    Cost: one forward and one backward pass.
    """
    inputs = ModelInput.of(responses, policy.device)
    tokens = inputs.input_ids[:, responses.prompt_length :]
    is_padding = ~responses.response_mask
    # The responses of a batch do not interact, so one backward pass of their sum gives the gradient of each.
    with torch.enable_grad():
        embeddings = policy.embeddings(inputs).requires_grad_(True)
        logprobs = policy.logprobs_of_embeddings(embeddings, inputs, tokens, temperature)
        total = logprobs.masked_fill(is_padding, 0.0).sum()
        (gradient,) = torch.autograd.grad(total, embeddings)
    norms = gradient.float().norm(dim=-1)
    in_response = norms[:, responses.prompt_length :]
    return in_response.masked_fill(is_padding, 0.0)
