"""The old-policy pass: log-probabilities, values, reference, and the token credit that rides on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flowgraph import AttentionRecorder, AttentionRows
from rl.config import CreditConfig
from rl.credit.registry import AttentionNeed, CreditInput, CreditRule, find_rule, score_tokens
from rl.credit.scope import tokens_in_scope
from rl.credit.weights import shape_weights
from rl.policy.actor_critic import ActorCritic, ModelInput, TokenOutput
from rl.records import Credit, Responses, TokenScores, join_records, to_device
from rl.seeds import generator


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores and credit of a rollout, with what the credit cost.

    Attributes:
        scores: of every response token.
        credit: of every response token.
        credit_seconds: what only the credit needs: recording attention, reading it, the rule, the shape.
        output: the pass itself with its autograd graph, on the policy's device, where it was kept.
    """

    scores: TokenScores
    credit: Credit
    credit_seconds: float
    output: TokenOutput | None = None


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
) -> Scored:
    """Score every response under the policy that wrote it; no forward pass is made for the credit's sake.

    Rules that read attention hear it while the log-probabilities are computed; only rules that are registered with
    ``gradient=True`` cost a pass of their own.

    Args:
        policy: not wrapped.
        responses: on the CPU; results come back there.
        credit: rule, shape, scope and what attention is read.
        temperature: of the rollout.
        micro_batch_size: sequences at a time.
        seed: of rules that draw.
        step: as part of that seed.
        reference: whether log-probabilities under the reference are wanted.
        keep_graph: where one micro-batch holds all responses, keep what a backward pass needs, so that an update with
            these very weights can do without a forward pass of its own.

    Raises:
        CreditError: the rule returned something that is no score.
    """
    rule = find_rule(credit.rule)
    generators = credit_generators(responses, seed, step)
    parts: list[tuple[TokenScores, Credit]] = []
    credit_seconds, output = 0.0, None
    keep_graph = keep_graph and responses.num_sequences <= micro_batch_size
    for start in range(0, responses.num_sequences, micro_batch_size):
        part = responses.select(range(start, min(start + micro_batch_size, responses.num_sequences)))
        inputs = ModelInput.of(part, policy.device)
        tokens = inputs.input_ids[:, part.prompt_length :]
        with torch.set_grad_enabled(keep_graph):
            output, final_values, recorders = _forward(policy, inputs, tokens, rule, credit, temperature)
        ref_logprobs = policy.reference_pass(inputs, tokens, temperature) if reference else None
        scores = _token_scores(part, output, final_values, ref_logprobs)
        begun = time.perf_counter()
        streams = generators[start : start + micro_batch_size]
        rows = {name: recorder.rows(inputs.attention_mask, inputs.input_ids) for name, recorder in recorders.items()}
        found = policy_credit(policy, part, scores, rows, credit, streams, temperature=temperature)
        parts.append((scores, found))
        credit_seconds += time.perf_counter() - begun + sum(recorder.seconds for recorder in recorders.values())
    scores = join_records([scores for scores, _ in parts])
    return Scored(scores, join_records([c for _, c in parts]), credit_seconds, output if keep_graph else None)


def _forward(
    policy: ActorCritic,
    inputs: ModelInput,
    tokens: Int64[Tensor, "batch response"],
    rule: CreditRule,
    credit: CreditConfig,
    temperature: float,
) -> tuple[TokenOutput, Float[Tensor, " batch"] | None, dict[str, AttentionRecorder]]:
    """The policy's pass with its listeners, and the critic's, whose value after the last token stands apart."""
    with ExitStack() as stack:
        recorders = {name: stack.enter_context(recorder_for(policy, need, credit)) for name, need in rule.needs.items()}
        logprobs, entropy = policy.policy_pass(inputs, tokens, temperature)
    values = policy.value_pass(inputs, tokens.shape[1])
    if values is None:
        return TokenOutput(logprobs, entropy, None), None, recorders
    return TokenOutput(logprobs, entropy, values[:, :-1]), values[:, -1], recorders


def _token_scores(
    responses: Responses,
    output: TokenOutput,
    final_values: Float[Tensor, " batch"] | None,
    ref_logprobs: Float[Tensor, "batch response"] | None,
) -> TokenScores:
    mask = responses.response_mask.to(output.logprobs.device)
    return TokenScores(
        logprobs=on_cpu(output.logprobs, mask),
        entropy=on_cpu(output.entropy, mask),
        ref_logprobs=None if ref_logprobs is None else on_cpu(ref_logprobs, mask),
        values=None if output.values is None else on_cpu(output.values, mask),
        final_values=None if final_values is None else final_values.detach().float().cpu(),
    )


def recorder_for(policy: ActorCritic, need: AttentionNeed, credit: CreditConfig) -> AttentionRecorder:
    """A recorder of what a rule needs, on what the credit settings name."""
    return AttentionRecorder(
        policy.causal_lm,
        layers=credit.layers if need.layers is None else need.layers,
        heads=credit.heads if need.heads is None else need.heads,
    )


def policy_credit(
    policy: ActorCritic,
    responses: Responses,
    scores: TokenScores,
    rows: Mapping[str, AttentionRows],
    credit: CreditConfig,
    random: Sequence[torch.Generator],
    *,
    temperature: float,
) -> Credit:
    """Credit on the policy's device, with its gradient at hand; the result on the CPU."""
    moved = to_device(responses, policy.device)

    def gradient() -> Float[Tensor, "batch response"]:
        return embedding_gradient(policy, moved, temperature)

    found = credit_tokens(moved, to_device(scores, policy.device), credit, rows=rows, random=random, gradient=gradient)
    return to_device(found, torch.device("cpu"))


def credit_tokens(
    responses: Responses,
    scores: TokenScores,
    credit: CreditConfig,
    *,
    rows: Mapping[str, AttentionRows] | None = None,
    random: Sequence[torch.Generator] = (),
    gradient: Callable[[], Float[Tensor, "batch response"]] | None = None,
) -> Credit:
    """Run a credit rule and shape its scores; no model is needed but for rules that look at gradients.

    Args:
        responses: all tensors on one device.
        scores: log-probabilities and entropies of the policy that wrote them, 0 on padding.
        credit: rule, shape and scope.
        rows: attention by the names that the rule's ``needs`` list.
        random: a generator for each response, for rules that draw.
        gradient: see :class:`rl.credit.registry.CreditInput`.

    Raises:
        CreditError: a rule that lacks its attention or returns no scores.
    """
    rule = find_rule(credit.rule)
    scored = tokens_in_scope(responses, credit.scope)
    batch = CreditInput(
        responses=responses,
        scores=scores,
        scored=scored,
        rows=rows or {},
        random=random,
        gradient=gradient if rule.gradient else None,
        options={**credit.options, "rows": credit.rows},
    )
    found = score_tokens(rule, batch)
    weights = shape_weights(found, scored, replace(credit, shape="raw") if rule.weighs else credit)
    return Credit(scores=found, scored=scored, weights=weights)


def credit_generators(responses: Responses, seed: int, step: int) -> list[torch.Generator]:
    """One for each response, by problem and number: a rule that draws does the same however the batch is cut."""
    seen: dict[int, int] = {}
    out = []
    for group in responses.groups.tolist():
        out.append(generator(seed, "credit", step, group, seen.get(group, 0)))
        seen[group] = seen.get(group, 0) + 1
    return out


def embedding_gradient(
    policy: ActorCritic, responses: Responses, temperature: float
) -> Float[Tensor, "batch response"]:
    """Norm of the gradient of a response's log-likelihood at the input embedding of each of its tokens.

    The policy gradient of a response is this gradient times its advantage, which is the same for all of its tokens
    and so changes no ranking among them.
    """
    inputs = ModelInput.of(responses, policy.device)
    tokens = inputs.input_ids[:, responses.prompt_length :]
    with torch.enable_grad():
        embeddings = policy.embeddings(inputs).requires_grad_(True)
        logprobs = policy.logprobs_of_embeddings(embeddings, inputs, tokens, temperature)
        total = logprobs.masked_fill(~responses.response_mask, 0.0).sum()
        (gradient,) = torch.autograd.grad(total, embeddings)
    norms = gradient.float().norm(dim=-1)[:, responses.prompt_length :]
    return norms.masked_fill(~responses.response_mask, 0.0)


def on_cpu(tensor: Tensor, mask: Tensor) -> Tensor:
    """Float32, 0 on padding, on the CPU, without a gradient."""
    return tensor.detach().float().masked_fill(~mask, 0.0).cpu()
