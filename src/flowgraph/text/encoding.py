"""Encode a prompt and a response as token ids with the characters that each token covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.chat import Messages, RoleSpan, render_chat
from flowgraph.text.decoding import decode, special_ids, token_name
from flowgraph.text.spans import Offsets, align, close_gaps, inside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class EncodedText:
    """A prompt and a response as the model reads them, with the characters of every token.

    Attributes:
        input_ids: ``[T]`` int64, prompt tokens first.
        tokens: T readable strings: the characters that a token covers, else its name in the vocabulary
            (``<s>``). Tokens that share a character (an emoji split over byte tokens) each show all of it.
        spans: T half-open character ranges in ``text``, start and end never decreasing. A token that adds no
            character (a BOS) has an empty one. Tokens that share a character share its span. Characters that
            no token reports, such as a space trimmed from an offset, belong to the token after them.
        text: the prompt's text followed by the response's; a chat prompt as its template renders it.
        prompt_length: number of prompt tokens; the response starts at this token.
        response_start: the response's first character in ``text``.
        special: ``[T]`` bool; special tokens and everything a chat template wrote around the messages. They
            may route flow and are never a source.
        roles: the content of each chat message, in the order of ``text``; empty for a plain prompt.
    """

    input_ids: Int64[Tensor, " tokens"]
    tokens: tuple[str, ...]
    spans: tuple[Offsets, ...]
    text: str
    prompt_length: int
    response_start: int
    special: Bool[Tensor, " tokens"]
    roles: tuple[RoleSpan, ...] = ()

    def __post_init__(self) -> None:
        """Check that the fields describe one text."""
        lengths = [len(self.input_ids), len(self.tokens), len(self.spans), len(self.special)]
        num_tokens = lengths[0]
        if len(set(lengths)) > 1:
            raise InvalidInputError(
                f"EncodedText: input_ids, tokens, spans and special need one entry per token, got {lengths}; "
                "build it with encode()"
            )
        is_split = 0 < self.prompt_length < num_tokens and 0 <= self.response_start <= len(self.text)
        if not is_split:
            raise InvalidInputError(
                f"EncodedText: prompt_length must lie in 1..{num_tokens - 1} and response_start in "
                f"0..{len(self.text)}, got {self.prompt_length} and {self.response_start}; "
                "build it with encode()"
            )

    def __repr__(self) -> str:
        """Show sizes and both ends of the text, because the tensors would fill a screen."""
        sizes = f"{self.num_tokens} tokens, {self.prompt_length} of them prompt"
        return f"EncodedText({sizes}, text={shorten(self.text)!r})"

    @property
    def num_tokens(self) -> int:
        """T, prompt and response together."""
        return len(self.tokens)

    @property
    def prompt_text(self) -> str:
        """The text before the response."""
        return self.text[: self.response_start]

    @property
    def response_text(self) -> str:
        """The response without the special tokens (EOS, padding) that end it; the answer is searched here."""
        return self.text[self.response_start : self.response_end]

    @property
    def response_end(self) -> int:
        """The character where the response's special ending starts; ``len(text)`` without such an ending."""
        end = len(self.text)
        # From the last token backwards: special tokens move the end, blank ones between them are passed over.
        for index in range(self.num_tokens - 1, self.prompt_length - 1, -1):
            start, stop = self.spans[index]
            if bool(self.special[index]):
                end = start
            elif self.text[start:stop].strip():
                break
        return end


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    response: str | Tensor | np.ndarray | Sequence[int] | None = None,
) -> EncodedText:
    r"""Tokenise a prompt and a response, and find the characters that every token covers.

    - A plain prompt gets the tokenizer's own special tokens, but no second BOS where its text starts with one.
    - Chat messages are rendered by the tokenizer's chat template. A final assistant message in front of a given
      ``response`` is a prefill that the response continues.
    - A response given as text is tokenised jointly with the prompt, as the model would read the text. Where that
      changes the prompt's tokens, the response is tokenised on its own.
    - A response given as ids is used as it is, because a generated tokenisation need not be the canonical one.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.
        prompt: text, or chat messages (dicts with ``role`` and ``content``).
        response: text, a 1-D integer tensor or a list of generated ids without the prompt, or None where the
            last chat message, an assistant's, is the response.

    Returns:
        The encoded text.

    Raises:
        RegionError: the prompt or the response is empty or blank.
        InvalidInputError: malformed messages, no chat template, invalid ids, or ids that include the prompt.

    Cost: linear in the length of the text.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {word: index for index, word in enumerate(["[UNK]", "2", "plus", "3", "is", "5"])}
        >>> backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        >>> encoded = encode(tokenizer, "2 plus 3", " is 5")
        >>> encoded.tokens, encoded.prompt_length
        (('2', ' plus', ' 3', ' is', ' 5'), 3)
        >>> [encoded.text[start:end] for start, end in encoded.spans[3:]]
        [' is', ' 5']
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise InvalidInputError(
            f"tokenizer: must be a Hugging Face tokenizer, got {type(tokenizer).__name__}; "
            "load it with transformers.AutoTokenizer"
        )
    is_plain = isinstance(prompt, str)
    if is_plain:
        prompt_text = prompt
        roles = ()
    else:
        prompt_text, roles, response = render_chat(tokenizer, prompt, response)
    if not prompt_text.strip():
        raise RegionError(f"prompt: must hold visible text, got {prompt_text!r}; pass the question the model was asked")

    # A chat template writes its own special tokens; a plain text may already start with a BOS.
    bos = getattr(tokenizer, "bos_token", None)
    add_specials = is_plain and not (bos and prompt_text.startswith(bos))
    prompt_tokens = _tokenize(tokenizer, prompt_text, add_specials)
    if isinstance(response, str):
        response_text = response
        response_tokens = _tokenize_response(tokenizer, prompt_tokens, prompt_text, response, add_specials)
    else:
        response_tokens, response_text = _decode_response(tokenizer, prompt_tokens, response)

    # Join both parts; the spans of the response move behind the prompt.
    text = prompt_text + response_text
    response_start = len(prompt_text)
    prompt_spans = close_gaps(prompt_tokens.spans, text, 0)
    moved_spans = [(start + response_start, end + response_start) for start, end in response_tokens.spans]
    spans = prompt_spans + close_gaps(moved_spans, text, response_start)
    ids = prompt_tokens.ids + response_tokens.ids
    is_added = prompt_tokens.is_added + response_tokens.is_added

    special = _special(tokenizer, ids, spans, is_added, text)
    if not is_plain:
        # Everything that the template wrote around the contents counts as special.
        contents = [(role.start, role.end) for role in roles]
        special[: len(prompt_spans)] |= ~inside(prompt_spans, text, contents)
    tokens = []
    for index, (start, end) in zip(ids, spans, strict=True):
        tokens.append(text[start:end] or token_name(tokenizer, index))
    return EncodedText(
        input_ids=torch.tensor(ids, dtype=torch.long),
        tokens=tuple(tokens),
        spans=tuple(spans),
        text=text,
        prompt_length=len(prompt_tokens.ids),
        response_start=response_start,
        special=special,
        roles=roles,
    )


class _Tokens(NamedTuple):
    """Token ids of a text.

    Attributes:
        ids: the ids.
        spans: the range of characters of each, as the tokenizer reports it.
        is_added: whether the tokenizer added the token around the text.
    """

    ids: list[int]
    spans: list[Offsets]
    is_added: list[bool]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_specials: bool) -> _Tokens:
    """Tokenise a text, with offsets from a fast tokenizer and from decoding for a slow one."""
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(
        text,
        add_special_tokens=add_specials,
        return_offsets_mapping=is_fast,
        return_special_tokens_mask=is_fast,
        # No warning above the tokenizer's nominal maximum: the model's context is checked with the model.
        verbose=False,
    )
    ids = [int(index) for index in encoding["input_ids"]]
    if is_fast:
        spans = [(int(start), int(end)) for start, end in encoding["offset_mapping"]]
        is_added = [bool(flag) for flag in encoding["special_tokens_mask"]]
        return _Tokens(ids, spans, is_added)
    decoded, decoded_spans = decode(tokenizer, ids, [])
    return _Tokens(ids, align(decoded, decoded_spans, text), [False] * len(ids))


def _tokenize_response(
    tokenizer: PreTrainedTokenizerBase, prompt_tokens: _Tokens, prompt: str, response: str, add_specials: bool
) -> _Tokens:
    """Tokenise the response jointly with the prompt where the prompt's tokens stay the same, else on its own."""
    if not response.strip():
        raise RegionError(f"response: must hold visible text, got {response!r}; pass what the model generated")
    count = len(prompt_tokens.ids)
    joint = _tokenize(tokenizer, prompt + response, add_specials)
    # The spans must agree too: an unknown token that includes the response's first characters has the same id.
    keeps_ids = joint.ids[:count] == prompt_tokens.ids
    keeps_spans = joint.spans[:count] == prompt_tokens.spans
    if len(joint.ids) > count and keeps_ids and keeps_spans:
        shift = len(prompt)
        spans = [(start - shift, end - shift) for start, end in joint.spans[count:]]
        return _Tokens(joint.ids[count:], spans, joint.is_added[count:])
    return _tokenize(tokenizer, response, add_specials=False)


def _decode_response(tokenizer: PreTrainedTokenizerBase, prompt_tokens: _Tokens, response: Any) -> tuple[_Tokens, str]:
    """Check generated ids and decode them, in the prompt's context, into text and spans."""
    if response is None:
        raise RegionError(
            "response: must be given, or the last chat message must be an assistant's, got None; "
            "pass the text or the ids the model generated"
        )
    if isinstance(response, Tensor) and (response.ndim != 1 or response.is_floating_point()):
        raise InvalidInputError(
            f"response: ids must be a 1-D integer tensor, got {response.dtype} of shape "
            f"{tuple(response.shape)}; pass generated[0, prompt_length:]"
        )
    ids: list[Any] = response.tolist() if hasattr(response, "tolist") else list(response)
    invalid = [index for index in ids if isinstance(index, bool) or not isinstance(index, int) or index < 0]
    if invalid:
        raise InvalidInputError(
            f"response: ids must be non-negative integers, got {invalid[0]!r}; "
            "pass the response's ids without padding marks, or its text"
        )
    if not ids:
        raise RegionError("response: must hold at least one token, got 0 ids; pass the ids the model generated")

    # A model does not generate the special tokens that open its own prompt: such ids are prompt and response.
    prompt_ids = prompt_tokens.ids
    repeats_prompt = len(ids) > len(prompt_ids) and ids[: len(prompt_ids)] == prompt_ids
    if repeats_prompt and set(prompt_ids) & special_ids(tokenizer):
        raise InvalidInputError(
            f"response: ids must not repeat the prompt, got its {len(prompt_ids)} ids in front; "
            f"pass generated[0, {len(prompt_ids)}:]"
        )
    text, spans = decode(tokenizer, ids, prompt_ids)
    return _Tokens(ids, spans, [False] * len(ids)), text


def _special(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[Offsets], is_added: list[bool], text: str
) -> Bool[Tensor, " tokens"]:
    """Mark special tokens, except unknown tokens that cover characters of the text: those are content."""
    special = special_ids(tokenizer)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown_token = getattr(tokenizer, "unk_token", None)
    flags = []
    for index, (start, end), added in zip(ids, spans, is_added, strict=True):
        covered = text[start:end].strip()
        is_content = index == unknown_id and covered not in ("", unknown_token)
        flags.append(added or (index in special and not is_content))
    return torch.tensor(flags, dtype=torch.bool)


def shorten(text: str) -> str:
    """Return both ends of a long text, for messages."""
    if len(text) <= 60:
        return text
    return f"{text[:28]}...{text[-28:]}"
