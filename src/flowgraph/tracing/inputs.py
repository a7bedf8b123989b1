"""What a trace is made of, before the model runs: prompt and response as ids, and their regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgraph.attention.modules import base_model
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.encoding import EncodedText, encode
from flowgraph.text.regions import Regex, Regions, find_regions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str], None]


def regions_of_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | list[dict[str, Any]] | None,
    response: str | Sequence[int] | None,
    question: Any,
    answer: Any,
    reasoning: Any,
    max_new_tokens: int,
    say: Progress,
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
        response = generate_response(model, tokenizer, prompt, max_new_tokens, say)
    encoded = encode(tokenizer, prompt, _checked_response(model, response))
    return encoded, find_regions(encoded, question=question, answer=answer)


def check_prompt(prompt: Any) -> None:
    """Refuse what is neither text nor chat messages, before anything is generated from it.

    Raises:
        RegionError: blank text.
        InvalidInputError: anything else that cannot be a prompt.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RegionError("prompt: must hold text, got only blanks; ask the question there")
        return
    if not isinstance(prompt, Sequence) or not all(
        isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in prompt
    ):
        raise InvalidInputError(
            "prompt: must be text or a list of chat messages, each a dict with 'role' and 'content', "
            f"got {prompt!r:.80}; pass one conversation, such as [{{'role': 'user', 'content': '...'}}]"
        )
    if not any(each.get("content") for each in prompt):
        raise RegionError(
            f"prompt: must hold text in the 'content' of a message, got {list(prompt)!r:.80}; ask the question there"
        )


def ends_with_response(prompt: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last chat message is the model's, so that none has to be generated."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


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
    if prompt_length is not None and not (_is_whole(prompt_length) and 0 < prompt_length < count):
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_row(region: Any) -> Any:
    """A mask of shape [1, T], as it stands beside input_ids of that shape, is a mask over T tokens."""
    return region[0] if isinstance(region, Tensor) and region.ndim == 2 and region.shape[0] == 1 else region


def generate_response(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    max_new_tokens: int,
    say: Progress,
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
    say(f"generating up to {max_new_tokens} tokens")
    with torch.no_grad():
        output = inner.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=_Counter(say, ids.shape[1])
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


def check_max_new_tokens(value: Any) -> None:
    """Refuse a limit of generated tokens that is no whole number from 1.

    Raises:
        InvalidInputError: it is none.
    """
    if not _is_whole(value) or value < 1:
        raise InvalidInputError(
            f"max_new_tokens: must be at least 1, a whole number, got {value!r}; 256 is the default"
        )


class _Counter:
    """A generation streamer that reports how many tokens there are."""

    def __init__(self, say: Progress, prompt_length: int) -> None:
        self.say, self.count = say, -prompt_length

    def put(self, value: Tensor) -> None:
        self.count += value.numel()
        if self.count > 0:
            self.say(f"generating: {self.count} tokens")

    def end(self) -> None:
        pass
