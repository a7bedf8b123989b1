"""Token credit for other trainers, as functions of tensors alone: the part of an adapter that knows no engine.

Written for verl 0.9, whose batches hold prompts padded on the left beside responses padded on the right, and tested on
fabricated tensors of that form; it was **not run inside verl**, which pins other versions of its dependencies. A
registered estimator of verl does not receive the batch, so the place for credit is a subclass of its trainer::

    def _compute_advantage(self, batch, *args, **kwargs):
        batch = super()._compute_advantage(batch, *args, **kwargs)
        tensors = batch.batch
        responses = read_responses(tensors, prompts, tokenizer, find_answer=find_answer, groups=groups)
        scores = TokenScores(logprobs=tensors["old_log_probs"], entropy=tensors["entropys"])
        credit = token_credit(responses, scores, config, rows=rows)
        mask = tensors["response_mask"]
        tensors["advantages"] = scale_advantages(tensors["advantages"], mask, credit, config)
        return batch

Rules that read attention need ``rows``: a worker that has the model makes them with a
:class:`flowgraph.AttentionRecorder` around its log-probability pass (and sends on ``credit.weights``, as small as the
advantages). Rules without, such as ``entropy``, run where the advantages are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowgraph import AttentionRows, encode
from rl.algorithm.tensor_checks import require_alike, require_run
from rl.config import CreditConfig
from rl.credit.registry import CreditRule, find_rule
from rl.credit.scoring import credit_tokens
from rl.credit.weights import loss_weights
from rl.errors import ConfigError, CreditError
from rl.policy.sampling import Generated
from rl.records import CharSpan, Credit, Messages, Responses, Sample, TokenScores
from rl.rollouts.rollout import judge

FindAnswer = Callable[[str], CharSpan | None]
"""A completion -> the characters that state its answer, or None."""

_KEYS = ("prompts", "responses", "attention_mask", "response_mask")


def read_responses(
    batch: Mapping[str, Tensor],
    prompts: Sequence[str | Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    find_answer: FindAnswer,
    groups: Int64[Tensor, " batch"],
    rewards: Float[Tensor, " batch"] | None = None,
    end_ids: Sequence[int] | None = None,
) -> Responses:
    """The batch of another engine as this package's record, with question and answer found among its tokens.

    Args:
        batch: ``prompts`` ``[B, P]`` and ``responses`` ``[B, R]`` (ids), ``attention_mask`` ``[B, P + R]``,
            ``response_mask`` ``[B, R]``; numbers or bools.
        prompts: text or chat messages of each sequence, as they were before tokenisation.
        tokenizer: of the model.
        find_answer: where a completion states its answer; for example :func:`rl.tasks.answers.find_answer`.
        groups: ``[B]``, responses of one prompt share a number.
        rewards: ``[B]``, for rules that look at them; None: 0.
        end_ids: ids that end a response; None: the tokenizer's.

    Raises:
        ConfigError: other shapes, prompts that are not those of the ids, an empty response, or one that holds tokens
            which the policy did not choose (tools, environments).
        RewardError: ``find_answer`` raised.

    Cost: every response is decoded once.
    """
    ids, mask, response_mask = _checked(batch, len(prompts))
    width = batch["prompts"].shape[1]
    samples = [Sample(int(group), prompt, "") for group, prompt in zip(groups.tolist(), prompts, strict=True)]
    ends: list[Any] = [tokenizer.eos_token_id] if end_ids is None else list(end_ids)
    _check_prompts(samples, ids[:, :width], mask[:, :width], tokenizer, ends[0])
    last = ids[:, width:].gather(1, response_mask.sum(1, keepdim=True) - 1).squeeze(1)
    truncated = ~torch.isin(last, torch.tensor(ends, dtype=ids.dtype))
    generated = Generated(ids, mask, width, response_mask, truncated)
    responses = judge(_Regions(find_answer), tokenizer, samples, generated)
    rewards = torch.zeros(len(ids)) if rewards is None else rewards.detach().float().cpu()
    return replace(responses, rewards=rewards)


def usable_rule(credit: CreditConfig) -> CreditRule:
    """The rule of these settings, if an engine that owns its losses and its model can serve it.

    Raises:
        CreditError: no such rule, or one that needs a backward pass or a task's own knowledge.
        ConfigError: credit is to enter elsewhere than at the advantages.
    """
    rule = find_rule(credit.rule)
    if credit.entry != "advantage":
        raise ConfigError(
            f"credit.entry: must be 'advantage' in another trainer, which keeps its rewards to itself, got "
            f"{credit.entry!r}; use entry='advantage', or rl.PPOTrainer"
        )
    if rule.gradient or rule.needs_oracle:
        need = "a backward pass of its own" if rule.gradient else "a task that knows its decisive tokens"
        raise CreditError(
            f"credit: must be a rule that another trainer can serve, got {rule.name!r}, which needs {need}; use "
            "another rule, or rl.PPOTrainer"
        )
    return rule


def token_credit(
    responses: Responses,
    scores: TokenScores,
    credit: CreditConfig,
    *,
    rows: Mapping[str, AttentionRows] | None = None,
    random: Sequence[torch.Generator] = (),
) -> Credit:
    """Run a credit rule and shape its scores.

    Args:
        responses: see :func:`read_responses`; all tensors on one device.
        scores: log-probabilities and entropies of the policy that wrote them, 0 on padding.
        credit: rule, shape and scope.
        rows: attention by the names that ``usable_rule(credit).needs`` lists.
        random: a generator for each response, for rules that draw.

    Raises:
        ConfigError, CreditError: as :func:`usable_rule`; a rule that lacks its attention or returns no scores.
    """
    usable_rule(credit)
    require_alike(logprobs=scores.logprobs, entropy=scores.entropy)
    if scores.entropy.shape != responses.response_mask.shape:
        raise ConfigError(
            f"scores: must have shape {tuple(responses.response_mask.shape)} like response_mask, got "
            f"{tuple(scores.entropy.shape)}; leave the prompt's columns out"
        )
    return credit_tokens(responses, scores, credit, rows=rows, random=random)


def scale_advantages(
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    credit: Credit,
    config: CreditConfig,
) -> Float[Tensor, "batch response"]:
    r"""Each token's advantage times its weight, :math:`A_t w_t`; to be called after whitening.

    Args:
        advantages: ``[B]`` or ``[B, R]``.
        mask: ``[B, R]``, response tokens.
        credit: of :func:`token_credit`.
        config: its ``sign`` says on which advantages the weights act, its ``mean_one`` whether those of the
            tokens that competed average 1.

    Raises:
        ConfigError: another shape.

    Example:
        >>> every = torch.ones(1, 3, dtype=torch.bool)
        >>> credit = Credit(torch.ones(1, 3), every, torch.tensor([[1.5, 1.0, 1.0]]))
        >>> scale_advantages(torch.tensor([-2.0]), every, credit, CreditConfig()).tolist()
        [[-3.0, -2.0, -2.0]]
    """
    shape = credit.weights.shape
    if advantages.shape == shape[:1]:
        advantages = advantages[:, None].expand(shape)
    return advantages * loss_weights(credit, advantages, mask.to(advantages.device).bool(), config)


@dataclass
class _Regions:
    """A task without problems or verdicts of its own, those being the engine's: it only knows where answers stand."""

    finder: FindAnswer
    name: str = "regions"
    size: int | None = None

    def find_answer(self, completion: str) -> CharSpan | None:
        return self.finder(completion)

    def sample(self, split: str, index: int) -> Sample:
        return Sample(index, "", "")

    def reward(self, sample: Sample, completion: str) -> float:
        return 0.0

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        return None


def _checked(
    batch: Mapping[str, Tensor], count: int
) -> tuple[Int64[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"], Bool[Tensor, "batch response"]]:
    """Ids and both masks on the CPU."""
    missing = [key for key in _KEYS if key not in batch]
    if missing:
        raise ConfigError(
            f"batch: must hold {', '.join(_KEYS)}, got none of the name {missing[0]!r}; pass the tensors of the rollout"
        )
    prompts, responses, mask, response_mask = (batch[key].detach().cpu() for key in _KEYS)
    shapes = {"prompts": (count, prompts.shape[-1]), "responses": (count, responses.shape[-1])}
    shapes["attention_mask"] = (count, prompts.shape[-1] + responses.shape[-1])
    shapes["response_mask"] = shapes["responses"]
    for key, shape in shapes.items():
        if tuple(batch[key].shape) != shape:
            raise ConfigError(
                f"{key}: must have shape {shape}, got {tuple(batch[key].shape)}; pass tensors of {count} sequences, "
                "prompts padded on the left and responses on the right"
            )
    mask, response_mask, width = mask.bool(), response_mask.bool(), prompts.shape[1]
    if bool((mask[:, 1:width] < mask[:, : width - 1]).any()):
        raise ConfigError(
            "attention_mask: must have the padding of prompts on the left, got some after a token; pad there"
        )
    if not torch.equal(mask[:, width:], response_mask):
        raise ConfigError(
            "response_mask: must be the attention mask of the response, got one that leaves some of its tokens out; "
            "responses with tokens of tools or environments are not supported, so train on single turns"
        )
    require_run(response_mask)
    if not bool(response_mask.any(1).all()):
        row = int((~response_mask.any(1)).nonzero()[0])
        raise ConfigError(
            f"response_mask: must hold a token of every response, got none of response {row}; leave it out"
        )
    return torch.cat([prompts, responses], 1).long(), mask, response_mask


def _check_prompts(
    samples: Sequence[Sample],
    ids: Int64[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
) -> None:
    """The engine read each prompt as we do; credit would fall on other tokens otherwise."""
    known: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        name = repr(sample.prompt)
        if name not in known:
            encoded = encode(tokenizer, sample.prompt, [end_id])
            known[name] = encoded.input_ids[: encoded.prompt_length].tolist()
        theirs = ids[row][mask[row]].tolist()
        if theirs != known[name]:
            raise ConfigError(
                f"prompts: must be what the ids of sequence {row} say, got {len(theirs)} ids where "
                f"{type(tokenizer).__name__} makes {len(known[name])} of {name[:60]}; where the engine passes options "
                "to the chat template or truncates, render the prompts to text beforehand and give both that text"
            )
