"""What a trace is made of, before the model runs: prompt and response as ids, and their regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgraph.attention.modules import base_model
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.encoding import EncodedText, encode
from flowgraph.text.regions import Regex, Regions, find_regions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from flowgraph.text.chat import check_prompt, ends_with_response
from flowgraph.tracing.generation import Progress, generate_response, is_integer


def regions_of_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | list[dict[str, Any]] | None,
    response: str | Sequence[int] | None,
    question: Any,
    answer: Any,
    reasoning: Any,
    max_new_tokens: int,
    progress: Progress,
) -> tuple[EncodedText, Regions]:
    """Encode a prompt and its response, generated where it is None, and find the three regions.

    Raises:
        InvalidInputError, RegionError, NoAnswerError: as :func:`flowgraph.trace`.
    """
    if tokenizer is None or prompt is None:
        missing = "tokenizer" if tokenizer is None else "prompt"
        raise InvalidInputError(
            f"{missing}: must be given unless input_ids is, got None; pass trace(model, tokenizer, prompt, ...)"
        )
    if reasoning is not None:
        raise InvalidInputError(
            "reasoning: goes with input_ids only, got a value with text; it is found between question and answer"
        )
    if isinstance(answer, str):
        Regex(answer)
    check_prompt(prompt)
    if response is None and not ends_with_response(prompt):
        response = generate_response(model, tokenizer, prompt, max_new_tokens, progress)
    encoded = encode(tokenizer, prompt, _checked_response(model, response))
    return encoded, find_regions(encoded, question=question, answer=answer)


def _checked_response(model: nn.Module, response: Any) -> Any:
    """Text, None, or ids that the model can have generated: a tokenizer fails in its own words on others."""
    if response is None or isinstance(response, str):
        return response
    ids = response.tolist() if hasattr(response, "tolist") else response
    if not isinstance(ids, Sequence) or isinstance(ids, bytes):
        raise InvalidInputError(
            f"response: must be text or a list of token ids, got {response!r:.80}; leave it out to have it generated"
        )
    size = base_model(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    wrong = next((index for index in ids if isinstance(index, int) and index >= size), None)
    if wrong is not None:
        raise InvalidInputError(
            f"response: ids must lie in 0..{size - 1}, the model's vocabulary, got {wrong}; "
            "pass what this model generated, or the text"
        )
    return response


def regions_of_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Tensor,
    prompt: Any,
    response: Any,
    question: Any,
    answer: Any,
    reasoning: Any,
    prompt_length: int | None,
) -> tuple[EncodedText, Regions]:
    """Ids with masks as an encoded text; the arguments as those of :func:`flowgraph.trace`.

    Raises:
        InvalidInputError, RegionError: as :func:`flowgraph.trace`.
    """
    if prompt is not None or response is not None:
        raise InvalidInputError("input_ids: replaces prompt and response, got both; pass one or the other")
    try:
        input_ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"input_ids: must be a tensor or list of token ids, got {input_ids!r:.80}; pass one sequence of them"
        ) from error
    if input_ids.ndim == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    is_whole = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
    if input_ids.ndim != 1 or not is_whole or input_ids.numel() < 2:
        raise InvalidInputError(
            f"input_ids: must be one sequence of at least 2 token ids, got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}; trace the sequences of a batch one by one"
        )
    question, answer, reasoning = (_one_row(region) for region in (question, answer, reasoning))
    for name, region in (("question", question), ("answer", answer)):
        if region is None:
            raise InvalidInputError(f"{name}: must be a mask or indices with input_ids, got None; a regex needs text")
    for name, region in (("question", question), ("answer", answer), ("reasoning", reasoning)):
        if isinstance(region, str):
            raise RegionError(
                f"{name}: must be a mask or indices with input_ids, got {region!r:.80}; text needs a prompt"
            )
    count = input_ids.numel()
    if prompt_length is not None and not (is_integer(prompt_length) and 0 < prompt_length < count):
        raise InvalidInputError(
            f"prompt_length: must lie in 1..{count - 1}, got {prompt_length}; it counts the prompt's tokens"
        )
    generated = None if prompt_length is None else torch.arange(count) >= prompt_length
    regions = Regions.from_masks(question, answer, reasoning=reasoning, generated=generated, num_tokens=count)
    pieces = [tokenizer.decode([token]) if tokenizer else f"<{token}>" for token in input_ids.tolist()]
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    encoded = EncodedText(
        input_ids=input_ids.long(),
        tokens=tuple(str(piece) for piece in pieces),
        spans=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        text="".join(str(piece) for piece in pieces),
        prompt_length=int((~regions.generated).sum()),
        response_start=ends[max(int((~regions.generated).sum()) - 1, 0)],
        special=torch.zeros(count, dtype=torch.bool),
    )
    return encoded, regions


def _one_row(region: Any) -> Any:
    """A mask of shape [1, T], as it stands beside input_ids of that shape, is a mask over T tokens."""
    return region[0] if isinstance(region, Tensor) and region.ndim == 2 and region.shape[0] == 1 else region
