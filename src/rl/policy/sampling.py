"""Sample responses; the noise is a function of the sequence's seed, the token and the position, not of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl.errors import PolicyError
from rl.policy.sampled_logprobs import SampledLogprobs
from rl.policy.stop_strings import StopStringCriterion, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Generated:
    """Padded prompts and responses of one batch, in the columns of :class:`rl.records.Responses`.

    Attributes:
        input_ids: ``[B, P + R]`` int64, token ids of prompt and response.
        attention_mask: ``[B, P + R]`` bool, False on the padding of both sides.
        prompt_length: P, padding included, in tokens.
        response_mask: ``[B, R]`` bool, the tokens that the model chose, an end token included.
        truncated: ``[B]`` bool, the response reached the token limit before an end token or a stop string.
        end_ids: ids of the tokens that end a response; None: the tokenizer's end token alone.
        logprobs: ``[B, R]`` float32, log-probability in nats with which each token was drawn, 0 on padding; None where
            nothing was drawn.
    """

    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    prompt_length: int
    response_mask: Bool[Tensor, "batch response"]
    truncated: Bool[Tensor, " batch"]
    end_ids: tuple[int, ...] | None = None
    logprobs: Float[Tensor, "batch response"] | None = None


@dataclass(frozen=True)
class Ending:
    """The token ids and texts that end a response, and the id that pads it.

    Attributes:
        end_ids: ids of end tokens.
        pad_id: id of padding.
        stops: texts that end a response too; None: there are none.
    """

    end_ids: tuple[int, ...]
    pad_id: int
    stops: StopStrings | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> Ending:
        """Collect the end tokens of the model and of the tokenizer.

        A tokenizer without padding, or with a padding token that the model has no embedding for, pads with an end
        token; the masks, not the id, tell padding apart.

        Raises:
            PolicyError: neither names an end token.
        """
        # A model names one id, a list of them, or none; chat models often have more than their tokenizer.
        settings = getattr(model, "generation_config", None)
        of_model = getattr(settings, "eos_token_id", None)
        end_ids = [of_model] if isinstance(of_model, int) else list(of_model or [])
        of_tokenizer: Any = tokenizer.eos_token_id
        if of_tokenizer is not None and of_tokenizer not in end_ids:
            end_ids.append(of_tokenizer)
        if not end_ids:
            raise PolicyError(
                f"tokenizer: must have an end-of-sequence token, got {type(tokenizer).__name__} without one and a "
                "model that names none; set tokenizer.eos_token"
            )

        pad_id: Any = tokenizer.pad_token_id
        if pad_id is None or pad_id >= vocabulary_size(model):
            pad_id = end_ids[0]
        stops = StopStrings(tuple(stop_strings), tokenizer) if stop_strings else None
        return cls(tuple(end_ids), pad_id, stops)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of ids that the model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[return-value]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None,
    *,
    ending: Ending,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Generated:
    r"""Sample one response to each prompt, exactly from ``softmax(logits / temperature)``.

    Gumbel's trick: with independent standard Gumbel noise ``G``, ``argmax(logits / temperature + G)`` is a sample of
    the softmax. The noise of a token is a hash of the sequence's seed, the position and the token's id (see
    :class:`GumbelNoise`), so a response does not depend on the other sequences, on the batch size, or on the number of
    processes. The model generates in evaluation mode; the mode of every module is restored.

    Args:
        model: a causal LM; its adapters stay as they are.
        prompts: token ids.
        seeds: a seed for each prompt, in 64 bits; None: greedy decoding.
        ending: which ids end a response.
        max_new_tokens: token limit of a response.
        temperature: positive; ignored in greedy decoding.

    Returns:
        Prompts padded on the left and responses padded on the right, on the CPU.

    Cost: that of the model's own ``generate``, and for each token one hash and two logarithms of each vocabulary entry,
    on the model's device.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    input_ids, attention_mask = _left_padded(prompts, ending.pad_id)
    prompt_length = input_ids.shape[1]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=ending.pad_id,
        eos_token_id=list(ending.end_ids),
    )

    # The recorder reads the scores before the noise is added.
    processors = LogitsProcessorList()
    criteria = StoppingCriteriaList()
    recorder: SampledLogprobs | None = None
    stopping: StopStringCriterion | None = None
    if seeds is not None:
        recorder = SampledLogprobs(temperature)
        noise = GumbelNoise(seeds, temperature, prompt_length)
        processors.append(recorder)  # type: ignore[arg-type]
        processors.append(noise)  # type: ignore[arg-type]
    if ending.stops is not None:
        stopping = StopStringCriterion(ending.stops, prompt_length)
        criteria.append(stopping)  # type: ignore[arg-type]

    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), _generation_settings(model, settings):
        output = model.generate(  # type: ignore[operator]
            input_ids.to(device),
            attention_mask=attention_mask.to(device).long(),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=criteria,
        )

    # A response ends with its first end token or stop string; what follows it is padding.
    response = output[:, prompt_length:].cpu()
    response_mask, truncated = _until_end(response, ending.end_ids)
    if stopping is not None:
        is_stopped = stopping.within(response_mask)
        truncated &= ~is_stopped
    logprobs = None
    if recorder is not None:
        logprobs = recorder.result(output).masked_fill(~response_mask, 0.0)
    response = response.masked_fill(~response_mask, ending.pad_id)
    return Generated(
        input_ids=torch.cat([input_ids, response], 1),
        attention_mask=torch.cat([attention_mask, response_mask], 1),
        prompt_length=prompt_length,
        response_mask=response_mask,
        truncated=truncated,
        end_ids=ending.end_ids,
        logprobs=logprobs,
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context; the mode of every module is restored.

    PEFT leaves the dropout of a trainable adapter on, so the mode is set and restored module by module.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class GumbelNoise:
    r"""A logits processor that adds Gumbel noise, so that the greedy choice is a sample of the softmax.

    The noise of vocabulary entry v at position t of a sequence with seed s is a function of (s, t, v) alone:
    :math:`h = \mathrm{mix}(\mathrm{mix}(s + \gamma t) + \gamma v)` in 64 bits, :math:`u = h / 2^{63}` of its low 63
    bits, :math:`G = -\log(-\log(1 - u))`. ``mix`` is the output function of SplitMix64 and
    :math:`\gamma = \lfloor 2^{64} / \phi \rfloor`. The integers are the same on every device; the logarithms are
    float32.

    Args:
        seeds: a seed for each sequence, in 64 bits.
        temperature: positive.
        prompt_length: tokens before the first response token; position 0 follows them.

    Cost: about 20 elementwise operations on ``[B, vocabulary]``; no generator and no copy between devices.

    Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; random
    numbers from counters, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, prompt_length: int) -> None:
        self.seeds = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64)
        self.temperature = temperature
        self.prompt_length = prompt_length
        self._counters: Tensor | None = None

    def __call__(self, input_ids: Int64[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"]) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        noisy = scores.float() / self.temperature
        self.add_noise(noisy, position)
        return noisy

    def add_noise(self, scores: Float[Tensor, "batch vocabulary"], position: int) -> None:
        """Add the noise of a position to float32 scores, in place."""
        # gamma v of all vocabulary entries, kept between positions.
        size = scores.shape[-1]
        if self._counters is None or self._counters.shape != (size,) or self._counters.device != scores.device:
            self._counters = _counters(size, scores.device)
            self.seeds = self.seeds.to(scores.device)

        # One key for each sequence at this position: mix(s + gamma t).
        offset = _signed(_GAMMA * position)
        keys = _mixed(self.seeds + offset)[:, None]

        # On the CPU small blocks stay in the cache. Each row of a block is padded to whole vectors, because the
        # vectorised logarithm and that of the last few numbers differ in the last bit.
        num_rows = len(scores)
        rows_per_block = num_rows
        if scores.device.type == "cpu":
            rows_per_block = max(1, _BLOCK // len(self._counters))
        for start in range(0, num_rows, rows_per_block):
            block = slice(start, start + rows_per_block)
            # G = -log E with E = -log(1 - u), so adding G subtracts log E.
            exponential = _exponential(keys[block] + self._counters)
            scores[block] -= exponential.log_()[:, :size]


# SplitMix64: the increment, and the two multipliers of its output function.
_GAMMA = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB

_LANE = 64
"""Entries that a row of noise is padded to a multiple of: more than any CPU's vector of float32 holds twice."""

_BLOCK = 32_768
"""Entries of a block on the CPU: torch computes so many in one thread."""


def _signed(value: int) -> int:
    """Reduce an integer to 64 bits and return it as torch stores it, with a sign."""
    value &= 2**64 - 1
    if value >= 2**63:
        return value - 2**64
    return value


def _counters(size: int, device: torch.device) -> Int64[Tensor, " padded"]:
    """Return gamma v for every vocabulary entry v, and for the padding of a row; products wrap at 64 bits."""
    num_lanes = math.ceil(size / _LANE)
    entries = torch.arange(num_lanes * _LANE, dtype=torch.int64, device=device)
    return entries * _signed(_GAMMA)


def _mixed(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Apply the output function of SplitMix64 to a tensor, which is overwritten."""
    # Each round: x ^= x >> shift, then x *= multiplier; the last round has no product.
    for shift, multiplier in ((30, _FIRST_MULTIPLIER), (27, _SECOND_MULTIPLIER), (31, None)):
        # torch shifts the sign in from the left; the mask makes it the logical shift of unsigned integers.
        shifted = state >> shift
        shifted &= 2 ** (64 - shift) - 1
        state ^= shifted
        if multiplier is not None:
            state *= _signed(multiplier)
    return state


def _exponential(state: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Turn counters into standard exponential draws -log(1 - u), positive and finite; the counters are overwritten.

    The smallest draws have the largest noise and decide which entry is chosen, so u keeps the precision of float32
    down to 2^-63.
    """
    # u: the low 63 bits over 2^63.
    bits = _mixed(state)
    bits &= 2**63 - 1
    negative_u = bits.to(torch.float32).mul_(-(2.0**-63))
    # Neither 0 nor infinity: 1 - u is at least the distance of the float32 before 1.
    negative_u.clamp_(-1 + 2.0**-24, -(2.0**-63))
    return negative_u.log1p_().neg_()


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int64[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Pad prompts on the left to one length, and return their ids and their mask."""
    num_prompts = len(prompts)
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((num_prompts, longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[row, start:] = torch.as_tensor(list(prompt), dtype=torch.int64)
        attention_mask[row, start:] = True
    return input_ids, attention_mask


@contextmanager
def _generation_settings(model: Any, settings: Any) -> Iterator[None]:
    """Replace the model's own generation settings inside the context.

    A repetition penalty or top-k among them would sample from another distribution than the one whose
    log-probabilities are trained.
    """
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _until_end(
    response: Int64[Tensor, "batch response"], end_ids: Sequence[int]
) -> tuple[Bool[Tensor, "batch response"], Bool[Tensor, " batch"]]:
    """Mark the tokens up to and including the first end token, and the responses without one."""
    is_end = torch.isin(response, torch.tensor(list(end_ids), dtype=response.dtype))
    num_ends_up_to = is_end.long().cumsum(1)
    num_ends_before = num_ends_up_to - is_end.long()
    is_token = num_ends_before == 0
    has_no_end = ~is_end.any(1)
    return is_token, has_no_end
