"""Compute token credit for other trainers with functions of tensors, independent of any engine.

The functions read batches that hold prompts padded on the left beside responses padded on the right. They are tested on
constructed tensors of that form. :mod:`rl.integrations.engine_credit` and the adapters of single engines build on them;
an engine without an adapter calls them itself::

    responses = read_responses(tensors, prompts, tokenizer, find_answer=find_answer, groups=groups)
    credit = token_credit(responses, scores, config, rows=rows)
    advantages = scale_advantages(advantages, response_mask, credit, config)

Rules that read attention need ``rows``: a worker that has the model records them with
:func:`attention_recorders` around its log-probability pass, and sends ``credit.weights``, which have the shape
of the advantages. Rules without attention, such as ``entropy``, run where the advantages are computed.

Letters of the shapes: B sequences, P prompt columns, R response columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowgraph import AttentionRecorder, AttentionRows, encode
from rl.algorithm.tensor_checks import require_alike, require_run
from rl.config import CreditConfig
from rl.credit.ratings import check_credit, credit_tokens
from rl.credit.registry import CreditRule, applied, find_rule
from rl.credit.weights import loss_weights
from rl.errors import ConfigError, CreditError
from rl.policy.sampling import Generated
from rl.records import CharSpan, Credit, Messages, Responses, Sample, TokenScores
from rl.rollouts.rollout import judge

FindAnswer = Callable[[str], CharSpan | None]
"""Maps a completion to the characters that state its answer, or to None."""

_BATCH_KEYS = ("prompts", "responses", "attention_mask", "response_mask")


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
    """Convert the batch of another engine to this package's record, and find question and answer among its tokens.

    Args:
        batch: ``prompts`` ``[B, P]`` and ``responses`` ``[B, R]`` (ids), ``attention_mask`` ``[B, P + R]``,
            ``response_mask`` ``[B, R]``; numbers or bools.
        prompts: text or chat messages of each sequence, before tokenisation.
        tokenizer: tokenizer of the model.
        find_answer: finds the answer in a completion; for example :func:`rl.tasks.answers.find_answer`. An answer
            inside the thinking counts as none, also where the prompt opens it.
        groups: ``[B]``, responses of one prompt share a number.
        rewards: ``[B]``, for rules that read them; None: 0.
        end_ids: ids that end a response; None: the tokenizer's.

    Returns:
        The batch on the CPU.

    Raises:
        ConfigError: other shapes, prompts that differ from those of the ids, an empty response, or one that holds
            tokens which the policy did not choose (tools, environments).
        RewardError: ``find_answer`` raised.

    Cost: every response is decoded once, and every distinct prompt is encoded once.
    """
    ids, mask, response_mask = _read_batch(batch, len(prompts))
    prompt_length = batch["prompts"].shape[1]
    ends: list[Any] = [tokenizer.eos_token_id]
    if end_ids is not None:
        ends = list(end_ids)

    # Credit falls on other tokens where the engine encoded a prompt in another way.
    samples = []
    for group, prompt in zip(groups.tolist(), prompts, strict=True):
        samples.append(Sample(index=int(group), prompt=prompt, answer=""))
    _check_prompts(samples, ids[:, :prompt_length], mask[:, :prompt_length], tokenizer, ends[0])

    # A response is truncated where its last token does not end it.
    last_column = response_mask.sum(1, keepdim=True) - 1
    last_token = ids[:, prompt_length:].gather(1, last_column).squeeze(1)
    truncated = ~torch.isin(last_token, torch.tensor(ends, dtype=ids.dtype))

    generated = Generated(ids, mask, prompt_length, response_mask, truncated, tuple(ends))
    responses = judge(_AnswerFinder(find_answer), tokenizer, samples, generated)
    if rewards is None:
        rewards = torch.zeros(len(ids), dtype=torch.float32)
    return replace(responses, rewards=rewards.detach().float().cpu())


def usable_rule(credit: CreditConfig) -> CreditRule:
    """Return the rule that scores the tokens under these settings, if it can run inside another trainer.

    Raises:
        CreditError: an unknown rule or option, or a rule that needs a backward pass or a task that knows its decisive
            tokens.
        ConfigError: credit enters elsewhere than at the advantages.
    """
    check_credit(credit)
    rule = find_rule(applied(credit).rule)
    if credit.entry != "advantage":
        raise ConfigError(
            f"credit.entry: must be 'advantage' in another trainer, whose token rewards are out of reach, got "
            f"{credit.entry!r}; use entry='advantage', or rl.PPOTrainer"
        )
    need = None
    if rule.own_pass:
        need = f"{rule.own_pass} of its own"
    elif rule.needs_oracle:
        need = "a task that knows its decisive tokens"
    if need is not None:
        raise CreditError(
            f"credit: must be a rule that another trainer can serve, got {rule.name!r}, which needs {need}; use "
            "another rule, or rl.PPOTrainer"
        )
    return rule


def attention_recorders(model: Any, credit: CreditConfig) -> dict[str, AttentionRecorder]:
    """Make the recorders of the attention that a rule reads; use each as a context of the log-probability pass.

    Args:
        model: a Hugging Face causal LM, PEFT-wrapped or not.
        credit: rule, its options, and the layers and heads that it leaves open.

    Returns:
        A recorder by the name of each need; empty for rules that read no attention. ``recorder.rows(attention_mask)``
        of each, under the same name, is the argument ``rows`` of :func:`token_credit`.

    Raises:
        ConfigError, CreditError: as :func:`usable_rule`.
        CaptureError: the architecture cannot be captured.

    Example:
        with ExitStack() as stack:
            recorders = attention_recorders(model, credit)
            for recorder in recorders.values():
                stack.enter_context(recorder)
            logprobs = ...  # the engine's own pass
        rows = {name: recorder.rows(attention_mask) for name, recorder in recorders.items()}
    """
    rule = usable_rule(credit)
    recorders = {}
    for name, need in rule.needs_for(applied(credit).options).items():
        recorders[name] = need.recorder(model, layers=credit.layers, heads=credit.heads)
    return recorders


def token_credit(
    responses: Responses,
    scores: TokenScores,
    credit: CreditConfig,
    *,
    rows: Mapping[str, AttentionRows] | None = None,
    random: Sequence[torch.Generator] = (),
) -> Credit:
    """Run a credit rule and shape its scores. With a fallback, pass the complete batch: its responses are compared.

    Args:
        responses: see :func:`read_responses`; all tensors on one device.
        scores: log-probabilities and entropies of the policy that wrote them, 0 on padding.
        credit: rule, shape and scope.
        rows: attention by the names of :func:`attention_recorders`.
        random: a generator for each response, for rules that draw random numbers.

    Returns:
        Scores, scope and weights ``[B, R]``.

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
    *,
    progress: float = 0.0,
) -> Float[Tensor, "batch response"]:
    r"""Multiply each token's advantage by its weight, :math:`A_t w_t`; call it after whitening.

    Args:
        advantages: ``[B]`` or ``[B, R]``.
        mask: ``[B, R]``, response tokens.
        credit: the result of :func:`token_credit`.
        config: ``sign`` chooses the advantages on which weights act, ``normalize`` normalises the weights of the tokens
            that competed, ``anneal`` moves them to 1 in the course of the run.
        progress: share of the run that is done, in [0, 1]; only ``anneal`` reads it.

    Returns:
        ``[B, R]``.

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
    return advantages * loss_weights(credit, advantages, mask.to(advantages.device).bool(), config, progress=progress)


@dataclass
class _AnswerFinder:
    """A task that only finds answers: problems and rewards come from the engine.

    Attributes:
        finder: maps a completion to the characters of its answer.
        name: name of the task.
        size: number of problems; None, as the task has none of its own.
    """

    finder: FindAnswer
    name: str = "regions"
    size: int | None = None

    def find_answer(self, completion: str) -> CharSpan | None:
        """Return the characters that state the answer."""
        return self.finder(completion)

    def sample(self, split: str, index: int) -> Sample:
        """Return an empty problem."""
        return Sample(index, "", "")

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 0: the engine has the rewards."""
        return 0.0

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return None: the decisive tokens are not known."""
        return None


def _read_batch(
    batch: Mapping[str, Tensor], num_sequences: int
) -> tuple[Int64[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"], Bool[Tensor, "batch response"]]:
    """Check the tensors of a batch; return ids and both masks on the CPU."""
    for key in _BATCH_KEYS:
        if key not in batch:
            raise ConfigError(
                f"batch: must hold {', '.join(_BATCH_KEYS)}, got none of the name {key!r}; "
                "pass the tensors of the rollout"
            )
    _check_shapes(batch, num_sequences)

    prompts = batch["prompts"].detach().cpu()
    responses = batch["responses"].detach().cpu()
    mask = batch["attention_mask"].detach().cpu().bool()
    response_mask = batch["response_mask"].detach().cpu().bool()
    prompt_length = prompts.shape[1]

    # Padding of prompts on the left: the mask never falls from 1 to 0.
    prompt_mask = mask[:, :prompt_length]
    if bool((prompt_mask[:, 1:] < prompt_mask[:, :-1]).any()):
        raise ConfigError(
            "attention_mask: must have the padding of prompts on the left, got some after a token; pad there"
        )
    if not torch.equal(mask[:, prompt_length:], response_mask):
        raise ConfigError(
            "response_mask: must be the attention mask of the response, got one that leaves some of its tokens out; "
            "responses with tokens of tools or environments are not supported, so train on single turns"
        )
    require_run(response_mask)
    has_token = response_mask.any(1)
    if not bool(has_token.all()):
        row = int((~has_token).nonzero()[0])
        raise ConfigError(
            f"response_mask: must hold a token of every response, got none of response {row}; leave it out"
        )
    return torch.cat([prompts, responses], 1).long(), mask, response_mask


def _check_shapes(batch: Mapping[str, Tensor], num_sequences: int) -> None:
    """Check that all tensors of a batch describe the same sequences and columns."""
    prompt_length = batch["prompts"].shape[-1]
    response_length = batch["responses"].shape[-1]
    expected = {
        "prompts": (num_sequences, prompt_length),
        "responses": (num_sequences, response_length),
        "attention_mask": (num_sequences, prompt_length + response_length),
        "response_mask": (num_sequences, response_length),
    }
    for key, shape in expected.items():
        if tuple(batch[key].shape) != shape:
            raise ConfigError(
                f"{key}: must have shape {shape}, got {tuple(batch[key].shape)}; pass tensors of {num_sequences} "
                "sequences, prompts padded on the left and responses on the right"
            )


def _check_prompts(
    samples: Sequence[Sample],
    ids: Int64[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
) -> None:
    """Check that the engine encoded every prompt as this package does."""
    # The responses of a group share a prompt, which is encoded once. Messages are not hashable, their text is.
    encoded_prompts: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        text = repr(sample.prompt)
        if text not in encoded_prompts:
            encoded = encode(tokenizer, sample.prompt, [end_id])
            encoded_prompts[text] = encoded.input_ids[: encoded.prompt_length].tolist()
        expected = encoded_prompts[text]
        found = ids[row][mask[row]].tolist()
        if found != expected:
            raise ConfigError(
                f"prompts: must be the text of the ids of sequence {row}, got {len(found)} ids where "
                f"{type(tokenizer).__name__} makes {len(expected)} of {text[:60]}; where the engine passes options "
                "to the chat template or truncates, render the prompts to text beforehand and give both that text"
            )
