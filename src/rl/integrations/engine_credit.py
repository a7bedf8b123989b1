"""Compute credit weights for the batches of other engines, which hold sequences in many layouts of padding.

Every adapter of an engine reads its batch as a list of :class:`EngineSequence`, without padding, and gives
:meth:`EngineCredit.scale` the advantages of each response. Only the adapter knows where the engine keeps them.

Letters of the shapes: B sequences, R tokens of the longest response, T columns of an engine's batch.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from flowgraph import MissingExtraError, context_length
from rl.algorithm.losses import token_logprobs
from rl.algorithm.tensor_checks import described
from rl.config import CreditConfig
from rl.credit.ratings import Ratings, rate_tokens, weigh_tokens
from rl.errors import ConfigError
from rl.integrations.tensors import (
    FindAnswer,
    attention_recorders,
    read_responses,
    scale_advantages,
    usable_rule,
)
from rl.policy.actor_critic import ModelInput
from rl.policy.loading import check_device, load_model
from rl.policy.sampling import evaluating
from rl.records import Credit, Messages, Responses, TokenScores, join_records, to_device
from rl.seeds import generator
from rl.tasks.answers import find_answer as find_stated_answer


@dataclass(frozen=True, eq=False)
class EngineSequence:
    """A prompt and its response as an engine holds them, without padding.

    Attributes:
        prompt_ids: ids of the prompt, at least one.
        response_ids: ids of the response, with its end token.
        trained: for each response token whether the engine trains on it; None: all. A response that is not trained at
            all keeps its advantages.
        reward: of the response, for rules that read rewards.
        prompt: text or chat messages that the prompt was made of; None: the decoded ids.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    trained: Sequence[bool] | None = None
    reward: float = 0.0
    prompt: str | Messages | None = None


class EngineCredit:
    """Weigh the tokens of an engine's sequences by one forward pass of a model in the process that holds them.

    The model reads complete sequences, and the credit rule reads the attention of that pass. Pass the policy where the
    process has it as a Hugging Face model. Elsewhere a frozen copy of the base takes its place: attention, entropies
    and log-probabilities are then those of the base, not those of the policy.

    Args:
        credit: name or settings of a credit rule; ``entry`` must be ``"advantage"``.
        model: a causal LM; or a name, a folder or a shipped model, loaded when it is first used.
        tokenizer: of the model; None with a name or a folder.
        find_answer: finds the answer in a completion; weights are 1 where none is found.
        device: of a model that is loaded by name; None: the CPU.
        micro_batch_size: sequences of one forward pass.
        temperature: of the rollout, positive; rules that read entropies need it.
        seed: of rules that draw random numbers.

    Raises:
        ConfigError: a setting outside its range, or a loaded model without its tokenizer.
        CreditError: an unknown rule, or one that needs a backward pass or a task that knows its decisive tokens.

    Cost: one forward pass without gradient for each batch, and the memory of the model.

    Example:
        credit = EngineCredit(CreditConfig.recommended(), "Qwen/Qwen3-0.6B", device="cuda")
        advantages = credit.scale(sequences, advantages)
    """

    def __init__(
        self,
        credit: str | CreditConfig,
        model: Any,
        tokenizer: Any = None,
        *,
        find_answer: FindAnswer = find_stated_answer,
        device: str | None = None,
        micro_batch_size: int = 8,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.credit = CreditConfig(rule=credit) if isinstance(credit, str) else credit
        usable_rule(self.credit)
        if micro_batch_size < 1:
            raise ConfigError(
                f"micro_batch_size: must be at least 1, got {micro_batch_size!r}; 8 sequences are the default"
            )
        if not 0 < temperature < math.inf:
            raise ConfigError(
                f"temperature: must be positive and finite, got {temperature!r}; pass that of the rollout"
            )
        if not isinstance(model, str) and tokenizer is None:
            raise ConfigError(
                f"tokenizer: must be given with a loaded model, got none for {type(model).__name__}; pass the one that "
                "encoded the prompts, or the model's name"
            )
        self.find_answer = find_answer
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._micro_batch_size = micro_batch_size
        self._temperature = temperature
        self._seed = seed
        self._num_batches = 0

    def weigh(self, sequences: Sequence[EngineSequence]) -> Credit:
        """Compute the credit of complete responses; a fallback compares those of this call with each other.

        Args:
            sequences: the batch of this process.

        Returns:
            Scores, scope and weights ``[B, R]`` on the CPU; each response starts in column 0. Weights are 1 on padding
            and in responses that are not trained.

        Raises:
            ConfigError: ids outside the vocabulary, a sequence beyond the context, another number of flags than tokens,
                a response that is trained in part (tools, environments), or a prompt whose text gives other ids.
            PolicyError: the model cannot be loaded.
            RewardError: ``find_answer`` raised.
        """
        model, tokenizer = self._loaded()
        kept = check_sequences(sequences, known_ids(model, tokenizer), context_length(model))
        self._num_batches += 1

        # Sequences that are not trained are left out of the pass and of the batch's means.
        num_columns = max((len(sequence.response_ids) for sequence in sequences), default=0)
        shape = (len(sequences), num_columns)
        credit = Credit(
            scores=torch.zeros(shape, dtype=torch.float32),
            scored=torch.zeros(shape, dtype=torch.bool),
            weights=torch.ones(shape, dtype=torch.float32),
        )
        if not kept:
            return credit
        found = self._credit_of([sequences[row] for row in kept], model, tokenizer)
        width = found.weights.shape[1]
        credit.scores[kept, :width] = found.scores
        credit.scored[kept, :width] = found.scored
        credit.weights[kept, :width] = found.weights
        return credit

    def scale(
        self,
        sequences: Sequence[EngineSequence],
        advantages: Sequence[Tensor],
        *,
        progress: float | None = None,
    ) -> list[Tensor]:
        r"""Multiply the advantages of each response by the weights of its tokens, :math:`A_t w_t`.

        Args:
            sequences: the batch of this process.
            advantages: one tensor for each response, an entry for each of its tokens; after the engine's whitening.
            progress: share of the run that is done, in [0, 1]; None where the engine does not tell it.

        Returns:
            Tensors of the same lengths, dtypes and devices. With weights of 1 they are equal to the last bit.

        Raises:
            ConfigError: another number of advantages than of tokens; ``anneal`` without a progress; and all errors of
                :meth:`weigh`.
        """
        _check_advantages(sequences, advantages)
        if self.credit.anneal > 0 and progress is None:
            raise ConfigError(
                f"credit.anneal: must be 0 where the engine does not tell its progress, got {self.credit.anneal:g}; "
                "leave it out, or pass progress"
            )
        credit = self.weigh(sequences)

        scaled = []
        for row, (sequence, own) in enumerate(zip(sequences, advantages, strict=True)):
            size = len(sequence.response_ids)
            if not _is_trained(sequence):
                scaled.append(own)
                continue
            part = Credit(
                scores=credit.scores[row : row + 1, :size],
                scored=credit.scored[row : row + 1, :size],
                weights=credit.weights[row : row + 1, :size],
            )
            every = torch.ones(1, size, dtype=torch.bool)
            scaled.append(scale_advantages(own[None], every, part, self.credit, progress=progress or 0.0)[0])
        return scaled

    def _loaded(self) -> tuple[Any, Any]:
        """Return model and tokenizer; a name is loaded once."""
        if isinstance(self._model, str):
            # The device is that of the process which scores; the object may be made in another one.
            check_device(self._device)
            model, tokenizer = load_model(self._model)
            if self._device is not None:
                # The stubs of transformers describe another signature.
                moved: Any = model
                moved.to(self._device)
            self._model = model.eval().requires_grad_(False)
            self._tokenizer = self._tokenizer or tokenizer
        return self._model, self._tokenizer

    def _credit_of(self, sequences: Sequence[EngineSequence], model: Any, tokenizer: Any) -> Credit:
        """Compute the credit of trained responses: one pass for each micro-batch, then weights of all together."""
        responses = read_responses(
            pad_sequences(sequences, padding_id(tokenizer)),
            [prompt_of(sequence, tokenizer) for sequence in sequences],
            tokenizer,
            find_answer=self.find_answer,
            groups=number_groups(sequences),
            rewards=torch.tensor([float(sequence.reward) for sequence in sequences], dtype=torch.float32),
            end_ids=ending_ids(model, tokenizer),
        )
        # A generator belongs to the batch and the place in it, whatever the size of the micro-batches.
        random = []
        for row in range(len(sequences)):
            random.append(generator(self._seed, "credit", self._num_batches, row))
        parts = []
        for start in range(0, len(sequences), self._micro_batch_size):
            rows = range(start, min(start + self._micro_batch_size, len(sequences)))
            parts.append(self._rate(responses.select(rows), model, random[start : rows.stop]))
        positions = generator(self._seed, "credit positions", self._num_batches)
        return weigh_tokens(join_records(parts), self.credit, random=positions)

    def _rate(self, responses: Responses, model: Any, random: Sequence[torch.Generator]) -> Ratings:
        """Rate the tokens of a micro-batch with the settings of this object."""
        return rate_responses(responses, model, self.credit, random, temperature=self._temperature)


def rate_responses(
    responses: Responses, model: Any, credit: CreditConfig, random: Sequence[torch.Generator], *, temperature: float
) -> Ratings:
    """Rate the tokens of a micro-batch by a forward pass whose attention is recorded.

    Args:
        responses: B responses, on any device.
        model: a causal LM, PEFT-wrapped or not.
        credit: see :func:`rl.integrations.tensors.usable_rule`.
        random: a generator for each response, for rules that draw.
        temperature: of the rollout.

    Returns:
        Scores and scope ``[B, R]`` on the CPU.

    Raises:
        ConfigError, CreditError: as :func:`rl.integrations.tensors.attention_recorders` and
            :func:`rl.credit.ratings.rate_tokens`.

    Cost: one forward pass without gradient.
    """
    device = next(model.parameters()).device
    on_device = to_device(responses, device)
    inputs = ModelInput.of(responses, device)
    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        recorders = attention_recorders(model, credit)
        for recorder in recorders.values():
            stack.enter_context(recorder)
        scores = _token_scores(model, inputs, on_device, temperature)
        rows = {name: recorder.rows(inputs.attention_mask, inputs.input_ids) for name, recorder in recorders.items()}
    rated = rate_tokens(on_device, scores, credit, rows=rows, random=random)
    return to_device(rated, torch.device("cpu"))


def split_sequences(
    input_ids: Tensor,
    attention_mask: Tensor,
    response_lengths: Sequence[int],
    *,
    trained: Tensor | None = None,
    rewards: Sequence[float] | None = None,
) -> list[EngineSequence]:
    """Split padded sequences into prompts and responses, wherever their padding is.

    Args:
        input_ids: ``[B, T]`` ids.
        attention_mask: ``[B, T]``, 1 on tokens; the tokens of each sequence are one run of columns.
        response_lengths: B numbers of tokens, the last ones of each sequence.
        trained: ``[B, T]``, 1 on the tokens that are trained; None: every token of a response.
        rewards: B rewards; None: 0.

    Returns:
        B sequences, without padding.

    Raises:
        ConfigError: other shapes, a gap in a sequence, or a response that leaves no token for its prompt.
    """
    num_sequences = len(response_lengths)
    shape = (num_sequences, *input_ids.shape[1:2])
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "trained": trained}
    for name, value in named.items():
        if value is not None and tuple(value.shape) != shape:
            raise ConfigError(
                f"{name}: must have shape {shape} for {num_sequences} response lengths, got {described(value)}; "
                "pass all tensors of one batch"
            )
    if rewards is not None and len(rewards) != num_sequences:
        raise ConfigError(
            f"rewards: must be one for each of {num_sequences} sequences, got {len(rewards)}; pass those of one batch"
        )

    sequences = []
    for row, length in enumerate(response_lengths):
        columns = attention_mask[row].bool().nonzero().flatten()
        num_tokens = len(columns)
        if num_tokens > 0 and int(columns[-1] - columns[0]) + 1 != num_tokens:
            raise ConfigError(
                f"attention_mask: must be 1 on one run of tokens, got a gap in sequence {row}; pad on either side"
            )
        if not 0 <= length < num_tokens:
            raise ConfigError(
                f"response_lengths: must leave a token of the prompt, got {length} of {num_tokens} tokens in sequence "
                f"{row}; pass the number of response tokens"
            )
        ids = input_ids[row, columns].tolist()
        first = num_tokens - int(length)
        flags = None
        if trained is not None:
            flags = trained[row, columns].bool().tolist()[first:]
        reward = 0.0 if rewards is None else float(rewards[row])
        sequences.append(EngineSequence(ids[:first], ids[first:], trained=flags, reward=reward))
    return sequences


def pad_sequences(sequences: Sequence[EngineSequence], pad_id: int) -> dict[str, Tensor]:
    """Pad prompts on the left and responses on the right, as :func:`rl.integrations.tensors.read_responses` reads them.

    Args:
        sequences: B sequences.
        pad_id: id of the padding.

    Returns:
        ``prompts`` ``[B, P]``, ``responses`` ``[B, R]``, ``attention_mask`` ``[B, P + R]``, ``response_mask``
        ``[B, R]``.
    """
    prompt_length = max(len(sequence.prompt_ids) for sequence in sequences)
    response_length = max(len(sequence.response_ids) for sequence in sequences)
    prompts = torch.full((len(sequences), prompt_length), pad_id, dtype=torch.int64)
    responses = torch.full((len(sequences), response_length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(sequences), prompt_length + response_length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        first = prompt_length - len(sequence.prompt_ids)
        size = len(sequence.response_ids)
        prompts[row, first:] = torch.as_tensor(list(sequence.prompt_ids), dtype=torch.int64)
        responses[row, :size] = torch.as_tensor(list(sequence.response_ids), dtype=torch.int64)
        mask[row, first : prompt_length + size] = True
    return {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": mask,
        "response_mask": mask[:, prompt_length:],
    }


def require_engine(package: str, supported: Sequence[str], install: str) -> str:
    """Require that an engine is installed in a version whose extension point an adapter was written for.

    Args:
        package: name of its distribution.
        supported: the first two numbers of these versions, such as ``"0.9"``.
        install: how to install it.

    Returns:
        The installed version.

    Raises:
        MissingExtraError: it is not installed, or in another version.
    """
    from packaging.version import InvalidVersion, Version

    wanted = " or ".join(supported)
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise MissingExtraError(
            f"{package}: must be installed for this adapter in version {wanted}, got no such package; {install}"
        ) from error
    try:
        release = Version(found).release
    except InvalidVersion:
        release = ()
    if ".".join(str(number) for number in release[:2]) not in supported:
        raise MissingExtraError(
            f"{package}: must be version {wanted} for this adapter, got {found}; {install}, or call EngineCredit.scale "
            "in an adapter of your own"
        )
    return found


def require_base(base: Any, root: type, name: str) -> None:
    """Require that the class to be extended is one of the engine's.

    Raises:
        ConfigError: it is not.
    """
    if not (inspect.isclass(base) and issubclass(base, root)):
        raise ConfigError(f"base: must be a subclass of {name}, got {base!r}; leave it out for the engine's own")


def _token_scores(model: Any, inputs: ModelInput, responses: Responses, temperature: float) -> TokenScores:
    """Compute log-probability and entropy of each response token by the pass that the recorders read."""
    arguments: dict[str, Any] = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    # PEFT's wrapper passes arguments on, and its own signature does not name them.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(inner.forward).parameters
    if "position_ids" in parameters:
        arguments["position_ids"] = inputs.position_ids
    size = responses.response_length
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = size + 1
    logits = model(**arguments, use_cache=False).logits[:, -size - 1 : -1]
    logprobs, entropy = token_logprobs(logits, inputs.input_ids[:, responses.prompt_length :], temperature)
    outside = ~responses.response_mask
    return TokenScores(
        logprobs=logprobs.float().masked_fill(outside, 0.0),
        entropy=entropy.float().masked_fill(outside, 0.0),
    )


def _is_trained(sequence: EngineSequence) -> bool:
    """Tell whether the engine trains on a response."""
    if sequence.trained is None:
        return len(sequence.response_ids) > 0
    return any(sequence.trained)


def check_sequences(sequences: Sequence[EngineSequence], vocabulary_size: int, context: int | None) -> list[int]:
    """Check ids, lengths and flags.

    Args:
        sequences: of a batch.
        vocabulary_size: number of valid ids.
        context: most tokens of a sequence; None: no limit.

    Returns:
        The numbers of the sequences that are trained.

    Raises:
        ConfigError: see :meth:`EngineCredit.weigh`.
    """
    kept = []
    for row, sequence in enumerate(sequences):
        size = len(sequence.response_ids)
        flags = sequence.trained
        if flags is not None and len(flags) != size:
            raise ConfigError(
                f"trained: must be one flag for each of {size} response tokens, got {len(flags)} in sequence {row}; "
                "pass the loss mask of the response"
            )
        if not _is_trained(sequence):
            continue
        if flags is not None and not all(flags):
            raise ConfigError(
                f"trained: must be True on all tokens of a response or on none, got {sum(map(bool, flags))} of {size} "
                f"in sequence {row}; responses with tokens of tools or environments are not supported, so train on "
                "single turns"
            )
        if len(sequence.prompt_ids) == 0:
            raise ConfigError(
                f"prompt_ids: must hold a token, got none in sequence {row}; pass the ids that the model read"
            )
        num_tokens = len(sequence.prompt_ids) + size
        if context is not None and num_tokens > context:
            raise ConfigError(
                f"sequences: must fit the model's context of {context} tokens, got {num_tokens} in sequence {row}; use "
                "the base of the policy"
            )
        for index in (*sequence.prompt_ids, *sequence.response_ids):
            if not 0 <= _integer(index) < vocabulary_size:
                raise ConfigError(
                    f"ids: must be integers in the vocabulary of {vocabulary_size} tokens, got {index} in sequence "
                    f"{row}; use the tokenizer and the base of the policy, and leave padding marks out"
                )
        kept.append(row)
    return kept


def _integer(value: Any) -> int:
    """Return an id as an integer, -1 for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


def _check_advantages(sequences: Sequence[EngineSequence], advantages: Sequence[Tensor]) -> None:
    """Check that there is an advantage for each response token."""
    if len(advantages) != len(sequences):
        raise ConfigError(
            f"advantages: must be one tensor for each of {len(sequences)} sequences, got {len(advantages)}; pass those "
            "of one batch"
        )
    for row, (sequence, own) in enumerate(zip(sequences, advantages, strict=True)):
        size = len(sequence.response_ids)
        if not isinstance(own, Tensor) or not own.is_floating_point() or tuple(own.shape) != (size,):
            raise ConfigError(
                f"advantages: must be {size} floats in sequence {row}, one for each response token, got "
                f"{described(own)}; pass complete responses without padding, not parts that several ranks share"
            )


def known_ids(model: Any, tokenizer: Any) -> int:
    """Return the number of ids that both the model and its tokenizer know."""
    return min(len(tokenizer), model.get_input_embeddings().weight.shape[0])


def padding_id(tokenizer: Any) -> int:
    """Return an id for padding, which no pass reads."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if index is not None:
            return int(index)
    return 0


def ending_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a response: that of the tokenizer, and those with which the model generates."""
    generation = getattr(model, "generation_config", None)
    own = getattr(generation, "eos_token_id", None)
    if own is None or isinstance(own, int):
        own = [own]
    found: list[int] = []
    for index in (tokenizer.eos_token_id, *own):
        if index is not None and index not in found:
            found.append(index)
    if not found:
        raise ConfigError(
            f"tokenizer: must have an end token, got none in {type(tokenizer).__name__} and in the model's generation "
            "settings; set tokenizer.eos_token"
        )
    return found


def prompt_of(sequence: EngineSequence, tokenizer: Any) -> str | Messages:
    """Return the prompt before its tokenisation; a rendered chat is recognised in the decoded text."""
    if sequence.prompt is not None:
        return sequence.prompt
    ids = [int(index) for index in sequence.prompt_ids]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def number_groups(sequences: Sequence[EngineSequence]) -> Tensor:
    """Number the groups: responses to equal prompts share a number."""
    numbers: dict[tuple[int, ...], int] = {}
    groups = []
    for sequence in sequences:
        prompt = tuple(int(index) for index in sequence.prompt_ids)
        groups.append(numbers.setdefault(prompt, len(numbers)))
    return torch.tensor(groups, dtype=torch.int64)
