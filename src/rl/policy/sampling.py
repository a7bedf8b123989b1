"""Sampling responses: each sequence has a noise stream of its own, so what it says depends on nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Generated:
    """Padded prompts and responses of one batch; see :class:`rl.records.Responses` for the columns."""

    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    prompt_length: int
    response_mask: Bool[Tensor, "batch response"]
    truncated: Bool[Tensor, " batch"]


@dataclass(frozen=True)
class Ending:
    """Ids with which a response ends, and the id that fills what is left.

    Raises:
        PolicyError: nothing can end a response.
    """

    end_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Ending:
        """The model's own end tokens and the tokenizer's.

        A tokenizer without padding, or with one that was added to it and never to the model, is padded with an end
        token: the masks say what is padding, not the id.
        """
        settings = getattr(model, "generation_config", None)
        own = getattr(settings, "eos_token_id", None)
        ids = [own] if isinstance(own, int) else list(own or [])
        end: Any = tokenizer.eos_token_id
        if end is not None and end not in ids:
            ids.append(end)
        if not ids:
            raise PolicyError(
                f"tokenizer: must have an end-of-sequence token, got {type(tokenizer).__name__} without one and a "
                "model that names none; set tokenizer.eos_token"
            )
        pad: Any = tokenizer.pad_token_id
        return cls(tuple(ids), ids[0] if pad is None or pad >= vocabulary_size(model) else pad)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of ids that the model has an embedding for."""
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

    Gumbel's trick: the greatest of ``logits / temperature + G`` with independent standard Gumbel noise ``G`` is a
    sample of the softmax. The noise of a sequence comes from its own generator, so a response does not depend on the
    others in its batch, on the batch's size, or on the number of processes.

    Args:
        model: a causal LM; its adapters stay as they are.
        prompts: token ids.
        noise: a generator for each prompt; None: greedy decoding.
        ending: which ids end a response.
        max_new_tokens: responses are cut off there.
        temperature: positive.

    Cost: the model's own ``generate``, one draw of vocabulary size for each token.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), ending.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt), dtype=torch.int64)
        mask[row, width - len(prompt) :] = True
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=ending.pad_id,
        eos_token_id=list(ending.end_ids),
    )  # fmt: skip
    processors = [] if noise is None else [_GumbelNoise(noise, temperature)]
    with torch.no_grad(), _own_settings(model, settings):
        output = model.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=mask.to(device).long(), generation_config=settings,
            logits_processor=_processor_list(processors),
        )  # fmt: skip
    response = output[:, width:].cpu()
    response_mask, truncated = _until_end(response, ending.end_ids)
    response = response.masked_fill(~response_mask, ending.pad_id)
    return Generated(
        torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1), width, response_mask, truncated
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout (PEFT leaves that of a trainable adapter on) and no gradient checkpointing; modes come back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _GumbelNoise:
    """A logits processor; the greedy choice after it is a sample."""

    def __init__(self, noise: Sequence[torch.Generator], temperature: float) -> None:
        self.noise, self.temperature = list(noise), temperature

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "batch vocabulary"]) -> Tensor:
        draws = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(draws, self.noise, strict=True):
            row.exponential_(generator=generator)
        # minus the logarithm of an exponential draw is a standard Gumbel one
        gumbel = -draws.clamp_(min=torch.finfo(torch.float32).tiny).log()
        return scores.float() / self.temperature + gumbel.to(scores.device)


def _processor_list(processors: list[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


@contextmanager
def _own_settings(model: Any, settings: Any) -> Iterator[None]:
    """Hide the model's own generation settings: a repetition penalty or top-k there would make the samples those of
    another distribution than the one whose log-probabilities are trained on."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _until_end(
    response: Int64[Tensor, "batch response"], end_ids: Sequence[int]
) -> tuple[Bool[Tensor, "batch response"], Bool[Tensor, " batch"]]:
    """Tokens up to the first end token, that one included; and which responses have none."""
    ends = torch.isin(response, torch.tensor(list(end_ids), dtype=response.dtype))
    before = ends.long().cumsum(1) - ends.long()
    return before == 0, ~ends.any(1)
