"""Generate a response greedily where none was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph.attention.modules import context_length
from flowgraph.errors import InvalidInputError
from flowgraph.text.encoding import encode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[str], None]
"""Called with one line of text at each stage."""


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer; a bool does not count as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def generate_response(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    max_new_tokens: int,
    progress: Progress,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Generate a response greedily.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: its tokenizer.
        prompt: text or chat messages.
        max_new_tokens: limit of the response; the model's context limits it too.
        progress: called with the number of tokens after each.
        chat_template_kwargs: arguments of the chat template.

    Returns:
        The ids of the response, the end token included.

    Raises:
        InvalidInputError: ``max_new_tokens`` below 1, or a prompt that fills the context.
    """
    check_max_new_tokens(max_new_tokens)

    # The trace will encode the prompt with a response. One token stands for it here, so that both see the same ids.
    prompt_ids = encode(tokenizer, prompt, [0], chat_template_kwargs=chat_template_kwargs).input_ids[:-1]
    # Prompt and response must fit the context together.
    limit = context_length(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - prompt_ids.numel())
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"prompt: must leave space in the context of {limit} tokens, got {prompt_ids.numel()}; shorten it"
        )

    ids = prompt_ids[None].to(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]
    progress(f"generating up to {max_new_tokens} tokens")
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(model, tokenizer, max_new_tokens),
            streamer=_TokenCounter(progress, ids.shape[1]),
        )
    # generate() returns the prompt followed by the response.
    response = output[0, ids.shape[1] :]
    return [int(token) for token in response]


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Configure greedy generation with the model's end token, or the tokenizer's where the model has none."""
    from transformers import GenerationConfig

    end = None
    if model.generation_config is not None:
        end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    # generate() warns where no padding token is set.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=padding,
    )


def check_max_new_tokens(value: Any) -> None:
    """Refuse a limit of generated tokens that is not an integer from 1.

    Raises:
        InvalidInputError: any other value.
    """
    if not is_integer(value) or value < 1:
        raise InvalidInputError(f"max_new_tokens: must be at least 1, an integer, got {value!r}; 256 is the default")


class _TokenCounter:
    """A generation streamer that reports how many tokens were generated.

    Attributes:
        progress: called with each report.
        count: tokens generated; negative until the prompt, which is streamed first, has passed.
    """

    def __init__(self, progress: Progress, prompt_length: int) -> None:
        self.progress = progress
        self.count = -prompt_length

    def put(self, value: Tensor) -> None:
        """Count tokens."""
        self.count += value.numel()
        if self.count > 0:
            self.progress(f"generating: {self.count} tokens")

    def end(self) -> None:
        """Finish; the interface of streamers requires this method."""
