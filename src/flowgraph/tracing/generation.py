"""Generate a response where none was given, by fixed rules that no default of the model changes.

The rules: greedy, the most probable token each time; no sampling, no beams, no penalty on repetitions or lengths, no
suppressed or forced token, no stop string; in evaluation mode, so that dropout is off; with the model as ``capture``
reads it (its active adapters, its devices). Generation ends after an end token of the model (those of its
``generation_config``, else the tokenizer's), after ``max_new_tokens`` tokens, or where the context is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph.attention.capture import evaluating, input_device
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
    """Generate a response by the rules of this module.

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

    ids = prompt_ids[None]
    ids = ids.to(input_device(model, ids.device))
    progress(f"generating up to {max_new_tokens} tokens")
    config = _greedy(model, tokenizer, max_new_tokens)
    with torch.no_grad(), evaluating(model), _no_defaults(model, config):
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_TokenCounter(progress, ids.shape[1]),
        )
    # generate() returns the prompt followed by the response.
    response = output[0, ids.shape[1] :]
    return [int(token) for token in response]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """List the ids after which a response ends: those of the model, or the tokenizer's where the model has none."""
    # The model's own setting comes first, because generation stops at it.
    ends = None
    if model.generation_config is not None:
        ends = model.generation_config.eos_token_id
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []

    # One id, a list or a tensor.
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return [ends] if isinstance(ends, int) else [int(end) for end in ends]


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Configure greedy generation with the end tokens of the model."""
    from transformers import GenerationConfig

    # generate() warns where no padding token is set.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=padding,
    )


@contextmanager
def _no_defaults(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation settings, from which generate() fills whatever a call leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


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
