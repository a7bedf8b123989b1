"""The input of a trace before the model runs: prompt and response as ids, and their regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowgraph.attention.capture import checked_ids
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.chat import check_prompt, ends_with_response
from flowgraph.text.encoding import EncodedText, encode
from flowgraph.text.regions import Regions, locate_regions
from flowgraph.text.selectors import Regex
from flowgraph.tracing.generation import Progress, generate_response, is_integer

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
    """

    prompt: str | list[dict[str, Any]]
    response: str | Tensor | np.ndarray | Sequence[int] | None = None
    question: Any = None
    answer: Any = None
    is_generated: bool = False


def check_text_arguments(tokenizer: Any, prompt: Any, reasoning: Any) -> None:
    """Refuse arguments of a trace of text that are missing, or that need ``input_ids``.

    Raises:
        InvalidInputError: no tokenizer, no prompt, or a reasoning region.
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
        response = generate_response(model, tokenizer, request.prompt, max_new_tokens, progress)
        is_generated = True
    else:
        _check_response(model, response)
    encoded = encode(tokenizer, request.prompt, response)
    # A generated response that no end token ends was cut off.
    is_truncated = is_generated and not bool(encoded.special[-1])
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
        if isinstance(index, int) and index >= vocabulary_size:
            raise InvalidInputError(
                f"response: ids must lie in 0..{vocabulary_size - 1}, the model's vocabulary, got {index}; "
                "pass what this model generated, or the text"
            )


def regions_of_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Any,
    *,
    question: Any,
    answer: Any,
    reasoning: Any,
    prompt_length: int | None,
) -> tuple[EncodedText, Regions]:
    """Read ids and masks as an encoded text with regions; the arguments are those of :func:`flowgraph.trace`.

    Args:
        tokenizer: decodes each token on its own; without one, tokens are shown as ``<id>``.
        input_ids: one sequence, ``[T]`` or ``[1, T]``.
        question: mask or indices.
        answer: mask or indices.
        reasoning: mask or indices; None: generated tokens before the answer.
        prompt_length: number of prompt tokens; None: up to the last question token.

    Raises:
        InvalidInputError, RegionError: as :func:`flowgraph.trace`.
    """
    ids = _one_sequence(input_ids)
    num_tokens = ids.numel()

    # Regions: masks beside input_ids of shape [1, T] may have that shape too.
    question = _without_batch(question)
    answer = _without_batch(answer)
    reasoning = _without_batch(reasoning)
    _check_regions(question, answer, reasoning)
    # Without a prompt length, the prompt ends with the last question token.
    generated = None
    if prompt_length is not None:
        if not is_integer(prompt_length) or not 0 < prompt_length < num_tokens:
            raise InvalidInputError(
                f"prompt_length: must lie in 1..{num_tokens - 1}, got {prompt_length}; it counts the prompt's tokens"
            )
        generated = torch.arange(num_tokens) >= prompt_length
    regions = Regions.from_masks(question, answer, reasoning=reasoning, generated=generated, num_tokens=num_tokens)

    # Text: the tokens one after another, each decoded on its own.
    pieces = _decode_each(tokenizer, ids)
    spans = []
    end = 0
    for piece in pieces:
        spans.append((end, end + len(piece)))
        end += len(piece)
    num_prompt_tokens = int((~regions.generated).sum())
    # The response starts at the character where the last prompt token ends.
    last_prompt_token = max(num_prompt_tokens - 1, 0)
    encoded = EncodedText(
        input_ids=ids.long(),
        tokens=tuple(pieces),
        spans=tuple(spans),
        text="".join(pieces),
        prompt_length=num_prompt_tokens,
        response_start=spans[last_prompt_token][1],
        special=torch.zeros(num_tokens, dtype=torch.bool),
    )
    return encoded, regions


def _one_sequence(input_ids: Any) -> Tensor:
    """Read ``input_ids`` as one sequence ``[T]`` of at least two ids."""
    try:
        # Text and lists of unequal lengths fail here.
        batch = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"input_ids: must be a tensor or list of token ids, got {input_ids!r:.80}; pass one sequence of them"
        ) from error
    batch = checked_ids(batch)
    if batch.shape[0] != 1 or batch.shape[1] < 2:
        raise InvalidInputError(
            f"input_ids: must be one sequence of at least 2 token ids, got shape {tuple(batch.shape)}; "
            "trace the sequences of a batch one by one"
        )
    return batch[0]


def _without_batch(region: Any) -> Any:
    """Remove the dimension of a batch of one from a mask."""
    if isinstance(region, Tensor) and region.ndim == 2 and region.shape[0] == 1:
        return region[0]
    return region


def _check_regions(question: Any, answer: Any, reasoning: Any) -> None:
    """Refuse regions that are missing or given as text, which cannot be searched in ids."""
    for name, region in (("question", question), ("answer", answer)):
        if region is None:
            raise InvalidInputError(f"{name}: must be a mask or indices with input_ids, got None; a regex needs text")
    for name, region in (("question", question), ("answer", answer), ("reasoning", reasoning)):
        if isinstance(region, str):
            raise RegionError(
                f"{name}: must be a mask or indices with input_ids, got {region!r:.80}; text needs a prompt"
            )


def _decode_each(tokenizer: PreTrainedTokenizerBase | None, ids: Tensor) -> list[str]:
    """Decode every token on its own; show ids where there is no tokenizer."""
    if tokenizer is None:
        return [f"<{index}>" for index in ids.tolist()]
    return [str(tokenizer.decode([index])) for index in ids.tolist()]
