"""Generate a response greedily where none was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgraph.attention.modules import base_model
from flowgraph.errors import InvalidInputError
from flowgraph.text.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Progress = Callable[[str], None]


def is_integer(value: Any) -> bool:
    """Tell an integer from a boolean and from everything else."""
    return isinstance(value, int) and not isinstance(value, bool)


def generate_response(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    max_new_tokens: int,
    progress: Progress,
) -> list[int]:
    """Greedy response ids, the end token included.

    Raises:
        InvalidInputError: ``max_new_tokens`` below 1, or a prompt that leaves no room in the context.
    """
    check_max_new_tokens(max_new_tokens)
    from transformers import GenerationConfig

    prompt_ids = encode(tokenizer, prompt, [0]).input_ids[:-1]  # exactly the ids that the trace will read
    inner = base_model(model)
    limit = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - prompt_ids.numel())
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"prompt: must leave room in the context of {limit} tokens, got {prompt_ids.numel()}; shorten it"
        )
    stop = inner.generation_config.eos_token_id if inner.generation_config else None
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    ids = prompt_ids[None].to(inner.get_input_embeddings().weight.device)  # type: ignore[operator]
    progress(f"generating up to {max_new_tokens} tokens")
    with torch.no_grad():
        output = inner.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Counter(progress, ids.shape[1]),
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


def check_max_new_tokens(value: Any) -> None:
    """Refuse a limit of generated tokens that is no whole number from 1.

    Raises:
        InvalidInputError: it is none.
    """
    if not is_integer(value) or value < 1:
        raise InvalidInputError(
            f"max_new_tokens: must be at least 1, a whole number, got {value!r}; 256 is the default"
        )


class _Counter:
    """A generation streamer that reports how many tokens there are."""

    def __init__(self, progress: Progress, prompt_length: int) -> None:
        self.progress, self.count = progress, -prompt_length

    def put(self, value: Tensor) -> None:
        self.count += value.numel()
        if self.count > 0:
            self.progress(f"generating: {self.count} tokens")

    def end(self) -> None:
        pass
