"""Sample responses; each sequence has its own noise generator, so its response does not depend on its batch."""

from __future__ import annotations

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
    noise: Sequence[torch.Generator] | None,
    *,
    ending: Ending,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Generated:
    r"""Sample one response to each prompt, exactly from ``softmax(logits / temperature)``.

    Gumbel's trick: with independent standard Gumbel noise ``G``, ``argmax(logits / temperature + G)`` is a sample of
    the softmax. The noise of a sequence comes from its own generator, so a response does not depend on the other
    sequences, on the batch size, or on the number of processes.

    Args:
        model: a causal LM; its adapters stay as they are.
        prompts: token ids.
        noise: a generator for each prompt; None: greedy decoding.
        ending: which ids end a response.
        max_new_tokens: token limit of a response.
        temperature: positive; ignored in greedy decoding.

    Returns:
        Prompts padded on the left and responses padded on the right, on the CPU.

    Cost: that of the model's own ``generate``, and one draw of vocabulary size on the CPU for each token.
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
    processors = LogitsProcessorList()
    criteria = StoppingCriteriaList()
    recorder: SampledLogprobs | None = None
    stopping: StopStringCriterion | None = None
    if noise is not None:
        recorder = SampledLogprobs(temperature)
        processors.append(recorder)  # type: ignore[arg-type]
    if ending.stops is not None:
        stopping = StopStringCriterion(ending.stops, prompt_length)
        criteria.append(stopping)  # type: ignore[arg-type]
    if noise is not None:
        processors.append(_GumbelNoise(noise, temperature))  # type: ignore[arg-type]

    device = next(model.parameters()).device
    with torch.no_grad(), _generation_settings(model, settings):
        output = model.generate(  # type: ignore[operator]
            input_ids.to(device),
            attention_mask=attention_mask.to(device).long(),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=criteria,
        )

    response = output[:, prompt_length:].cpu()
    response_mask, truncated = _until_end(response, ending.end_ids)
    if stopping is not None:
        truncated &= ~stopping.within(response_mask)
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
    """Turn dropout and gradient checkpointing off inside the context; the mode of every module is restored.

    PEFT leaves the dropout of a trainable adapter on, so the mode is set and restored module by module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _GumbelNoise:
    """A logits processor that adds Gumbel noise, so that the greedy choice is a sample of the softmax."""

    def __init__(self, noise: Sequence[torch.Generator], temperature: float) -> None:
        self.noise = list(noise)
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "batch vocabulary"]) -> Tensor:
        # One row of exponential draws for each sequence, from its own generator.
        draws = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(draws, self.noise, strict=True):
            row.exponential_(generator=generator)
        # If X is exponential, -log X is standard Gumbel. The clamp keeps a draw of 0 finite.
        gumbel = -draws.clamp_(min=torch.finfo(torch.float32).tiny).log()
        return scores.float() / self.temperature + gumbel.to(scores.device)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int64[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Pad prompts on the left to one length, and return their ids and their mask."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt)
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
    num_ends_before = is_end.long().cumsum(1) - is_end.long()
    return num_ends_before == 0, ~is_end.any(1)
