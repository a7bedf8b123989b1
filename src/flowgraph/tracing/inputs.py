"""The input of a trace before the model runs: prompt and response as ids, and their regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowgraph.attention.capture import checked_ids
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.masks import as_tensor, read_mask
from flowgraph.text.chat import check_prompt, ends_with_response
from flowgraph.text.encoding import EncodedText, encode, encode_ids
from flowgraph.text.regions import Regions, locate_regions
from flowgraph.text.selectors import Regex, Selector, Tokens
from flowgraph.tracing.generation import Progress, end_tokens, generate_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextRequest:
    """A text to trace.

    Attributes:
        prompt: text, or chat messages.
        response: the model's response, as text or generated ids; None: the final assistant message, or generated.
        question: where flow enters, in any form that :func:`flowgraph.find_regions` takes; None: found.
        answer: where flow leaves; None: found.
        is_generated: whether the model generated the response ids in this run, so that it was cut off where no end
            token ends it.
        chat_template_kwargs: arguments of the chat template.
    """

    prompt: str | list[dict[str, Any]]
    response: str | Tensor | np.ndarray | Sequence[int] | None = None
    question: Any = None
    answer: Any = None
    is_generated: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None


def check_text_arguments(tokenizer: Any, prompt: Any, reasoning: Any, attention_mask: Any) -> None:
    """Refuse arguments of a trace of text that are missing, or that need ``input_ids``.

    Raises:
        InvalidInputError: no tokenizer, no prompt, a reasoning region or a mask of padding.
    """
    for name, value in (("tokenizer", tokenizer), ("prompt", prompt)):
        if value is None:
            raise InvalidInputError(
                f"{name}: must be given unless input_ids is, got None; pass trace(model, tokenizer, prompt, ...)"
            )
    if reasoning is not None:
        raise InvalidInputError(
            "reasoning: goes with input_ids only, got a value with text; it is found between question and answer"
        )
    if attention_mask is not None:
        raise InvalidInputError(
            "attention_mask: goes with input_ids only, got a value with text, which has no padding; leave it out"
        )


def check_no_template_arguments(chat_template_kwargs: Any) -> None:
    """Refuse arguments of a chat template beside ids, which no template renders.

    Raises:
        InvalidInputError: any argument.
    """
    if chat_template_kwargs:
        raise InvalidInputError(
            f"chat_template_kwargs: go with chat messages, got {chat_template_kwargs!r:.80} with input_ids; "
            "leave them out, or pass messages"
        )


def regions_of_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TextRequest,
    max_new_tokens: int,
    progress: Progress,
) -> tuple[EncodedText, Regions]:
    """Encode a prompt and its response, generated where it is None, and find the three regions.

    Args:
        model: the transformers model, without wrappers.
        tokenizer: its tokenizer.
        request: the text and what to trace in it.
        max_new_tokens: limit of a generated response.
        progress: called while a response is generated.

    Raises:
        InvalidInputError, RegionError, NoAnswerError: as :func:`flowgraph.trace`.
    """
    # Whatever can be checked without the response is checked before one is generated.
    if isinstance(request.answer, str):
        Regex(request.answer)
    check_prompt(request.prompt)

    response = request.response
    is_generated = request.is_generated
    if response is None and not ends_with_response(request.prompt):
        response = generate_response(
            model, tokenizer, request.prompt, max_new_tokens, progress, request.chat_template_kwargs
        )
        is_generated = True
    else:
        _check_response(model, response)

    # Both texts as tokens, with the origin of the response.
    encoded = encode(tokenizer, request.prompt, response, chat_template_kwargs=request.chat_template_kwargs)
    if is_generated:
        encoded = replace(encoded, origin={**encoded.origin, "response": "generated"})
    # A generated response that no end token ends was cut off.
    is_truncated = is_generated and int(encoded.input_ids[-1]) not in end_tokens(model, tokenizer)
    regions = locate_regions(encoded, request.question, request.answer, truncated=is_truncated)
    return encoded, regions


def _check_response(model: PreTrainedModel, response: Any) -> None:
    """Refuse ids that the model cannot have generated, for which a tokenizer's own error would be hard to read."""
    if response is None or isinstance(response, str):
        return
    ids = response.tolist() if hasattr(response, "tolist") else response
    if not isinstance(ids, Sequence) or isinstance(ids, bytes):
        raise InvalidInputError(
            f"response: must be text or a list of token ids, got {response!r:.80}; leave it out to have it generated"
        )
    # Larger ids have no embedding, and some tokenizers fail on them with an overflow.
    vocabulary_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    for index in ids:
        if isinstance(index, int | np.integer) and index >= vocabulary_size:
            raise InvalidInputError(
                f"response: ids must lie in 0..{vocabulary_size - 1}, the model's vocabulary, got {index}; "
                "pass what this model generated, or the text"
            )


def regions_of_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Any,
    *,
    question: Any,
    answer: Any,
    reasoning: Any,
    prompt_length: Any,
    attention_mask: Any = None,
) -> tuple[EncodedText, Regions]:
    """Read ids and masks as an encoded text with regions; the arguments are those of :func:`flowgraph.trace`.

    Padding is removed, so that the model reads the tokens alone, as it read them when it generated the response.

    Args:
        model: the transformers model, without wrappers; its configuration may name the padding token.
        tokenizer: decodes the ids; without one, tokens are shown as ``<id>``.
        input_ids: one sequence, ``[T]`` or ``[1, T]``.
        question: mask or indices, over the ids as given.
        answer: mask or indices.
        reasoning: mask or indices; None: generated tokens before the answer.
        prompt_length: number of prompt tokens, padding included; None: up to the last question token.
        attention_mask: 1 on tokens and 0 on padding, for all ids or for the prompt; None: no padding.

    Raises:
        InvalidInputError, RegionError: as :func:`flowgraph.trace`.
    """
    ids = _one_sequence(input_ids)
    num_ids = ids.numel()
    is_integral = isinstance(prompt_length, int | np.integer) and not isinstance(prompt_length, bool)
    if prompt_length is not None and (not is_integral or not 0 < prompt_length < num_ids):
        raise InvalidInputError(
            f"prompt_length: must lie in 1..{num_ids - 1}, got {prompt_length}; it counts the prompt's tokens"
        )

    # Regions over the ids as given, each as a mask of all of them.
    _check_regions(question, answer, reasoning)
    given = {"question": question, "answer": answer, "reasoning": reasoning}
    masks = {name: _region(region, num_ids, name) for name, region in given.items() if region is not None}

    # The model reads the tokens without their padding.
    if attention_mask is None:
        _refuse_padding(model, tokenizer, ids)
        is_token = torch.ones(num_ids, dtype=torch.bool)
    else:
        is_token = _token_mask(attention_mask, num_ids, prompt_length)
    for name, mask in masks.items():
        on_padding = mask & ~is_token
        if bool(on_padding.any()):
            raise RegionError(
                f"{name}: must hold tokens, got padding at {int(on_padding.nonzero()[0])} by attention_mask; "
                "leave the padding out of it"
            )
    ids = ids[is_token]
    masks = {name: mask[is_token] for name, mask in masks.items()}
    num_tokens = ids.numel()

    # Without a prompt length, the prompt ends with the last question token.
    generated = None
    if prompt_length is not None:
        num_prompt_tokens = int(is_token[: int(prompt_length)].sum())
        if not 0 < num_prompt_tokens < num_tokens:
            raise InvalidInputError(
                f"prompt_length: must leave tokens of prompt and response, got {prompt_length}, which leaves "
                f"{num_prompt_tokens} of {num_tokens} without padding; it counts the prompt's ids, padding included"
            )
        generated = torch.arange(num_tokens) >= num_prompt_tokens
    regions = Regions.from_masks(
        masks["question"],
        masks["answer"],
        reasoning=masks.get("reasoning"),
        generated=generated,
        num_tokens=num_tokens,
    )
    num_prompt_tokens = int((~regions.generated).sum())
    encoded = encode_ids(tokenizer, ids.long(), num_prompt_tokens)
    if num_tokens < num_ids:
        encoded = replace(encoded, origin={**encoded.origin, "padding_removed": num_ids - num_tokens})
    return encoded, regions


def _one_sequence(input_ids: Any) -> Tensor:
    """Read ``input_ids`` as one sequence ``[T]`` of at least two ids."""
    batch = checked_ids(as_tensor(input_ids, "input_ids", "pass one sequence of token ids"))
    if batch.shape[0] != 1 or batch.shape[1] < 2:
        raise InvalidInputError(
            f"input_ids: must be one sequence of at least 2 token ids, got shape {tuple(batch.shape)}; "
            "trace the sequences of a batch one by one"
        )
    return batch[0].cpu()


def _region(region: Any, num_ids: int, name: str) -> Tensor:
    """Read a region as a mask; a batch of one sequence loses its dimension."""
    if isinstance(region, Tokens):
        region = region.which
    if not isinstance(region, slice):
        region = as_tensor(region, name, "pass a mask or indices", error=RegionError)
        if region.ndim == 2 and region.shape[0] == 1:
            region = region[0]
    return read_mask(region, num_ids, name)


def _token_mask(attention_mask: Any, num_ids: int, prompt_length: Any) -> Tensor:
    """Read ``attention_mask`` as a mask of the ids that are no padding."""
    mask = as_tensor(attention_mask, "attention_mask", "pass the tokenizer's attention_mask")
    if mask.ndim == 2 and mask.shape[0] == 1:
        mask = mask[0]
    # The tokenizer's mask covers the prompt; what was generated behind it is no padding.
    covers_prompt = prompt_length is not None and mask.shape == (prompt_length,)
    if mask.shape != (num_ids,) and not covers_prompt:
        raise InvalidInputError(
            f"attention_mask: must have one entry for each of {num_ids} ids, or for each id of the prompt, got shape "
            f"{tuple(mask.shape)}; pass the row of the mask that belongs to this row of input_ids, and prompt_length="
        )

    # A third value, such as a weight, would be read as a token or as padding.
    is_token = mask.cpu() == 1
    if not bool((is_token | (mask.cpu() == 0)).all()):
        raise InvalidInputError(
            f"attention_mask: must hold 1 on tokens and 0 on padding, got {mask.unique().tolist()!s:.80}; "
            "pass the tokenizer's attention_mask"
        )

    # Tokens that the model generated follow the prompt, and are no padding.
    generated = torch.ones(num_ids - is_token.numel(), dtype=torch.bool)
    is_token = torch.cat([is_token, generated])
    if int(is_token.sum()) < 2:
        raise InvalidInputError(
            f"attention_mask: must leave at least 2 tokens, got {int(is_token.sum())}; check that 1 marks tokens"
        )
    return is_token


def _refuse_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ids: Tensor) -> None:
    """Refuse ids that start with padding: the model would read it as text, and count positions from it."""
    # The tokenizer names the padding token, else the model does.
    padding = None
    opening = None
    for named in (tokenizer, model.config, getattr(model, "generation_config", None)):
        padding = padding if padding is not None else getattr(named, "pad_token_id", None)
        opening = opening if opening is not None else getattr(named, "bos_token_id", None)
    if padding is None:
        return
    is_other = (ids != padding).nonzero().flatten()
    num_leading = int(is_other[0]) if is_other.numel() else ids.numel()
    # A tokenizer may open every text with the token that also pads.
    num_opening = 1 if opening == padding else 0
    if num_leading > num_opening:
        raise InvalidInputError(
            f"input_ids: must not start with padding unless attention_mask= marks it, got {num_leading} times the "
            f"padding token {padding}; pass attention_mask=, or the ids without padding"
        )


def _check_regions(question: Any, answer: Any, reasoning: Any) -> None:
    """Refuse regions that are missing or given as text, which cannot be searched in ids."""
    for name, region in (("question", question), ("answer", answer)):
        if region is None:
            raise InvalidInputError(f"{name}: must be a mask or indices with input_ids, got None; a regex needs text")

    # A pattern or a text cannot be searched in ids.
    for name, region in (("question", question), ("answer", answer), ("reasoning", reasoning)):
        is_text_selector = isinstance(region, Selector) and not isinstance(region, Tokens | Tensor)
        if isinstance(region, str) or is_text_selector:
            raise RegionError(
                f"{name}: must be a mask or indices with input_ids, got {region!r:.80}; text needs a prompt"
            )
