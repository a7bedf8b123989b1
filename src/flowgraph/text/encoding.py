"""From a tokenizer, a prompt and a response to token ids with the characters that each token covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """A prompt and a response as the model reads them, with the characters behind every token.

    Attributes:
        input_ids: ``[T]`` int64, prompt tokens first.
        tokens: T readable strings: the characters that a token covers, else its name in the vocabulary
            (``<s>``). Tokens that share a character (an emoji split over byte tokens) each show it whole.
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
        if len(set(lengths)) > 1:
            raise InvalidInputError(
                f"EncodedText: input_ids, tokens, spans and special need one entry per token, got {lengths}; "
                "build it with encode()"
            )
        if not 0 < self.prompt_length < lengths[0] or not 0 <= self.response_start <= len(self.text):
            raise InvalidInputError(
                f"EncodedText: prompt_length must lie in 1..{lengths[0] - 1} and response_start in "
                f"0..{len(self.text)}, got {self.prompt_length} and {self.response_start}; "
                "build it with encode()"
            )

    def __repr__(self) -> str:
        """Sizes and both ends of the text; the tensors would fill a screen."""
        return (
            f"EncodedText({self.num_tokens} tokens, {self.prompt_length} of them prompt, text={shorten(self.text)!r})"
        )

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
        """The response without the special tokens (EOS, padding) that end it; answers are looked for here."""
        return self.text[self.response_start : self.response_end]

    @property
    def response_end(self) -> int:
        """Where the response's special ending starts in ``text``; ``len(text)`` where it has none."""
        end = len(self.text)
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
    response: str | Tensor | Sequence[int] | None = None,
) -> EncodedText:
    r"""Tokenise a prompt and a response and say which characters every token covers.

    A plain prompt gets the tokenizer's own special tokens (no second BOS where the text already starts with
    one). Chat messages are rendered by the tokenizer's chat template; a final assistant message in front of a
    given ``response`` is a prefill that the response continues. A response given as text is tokenised jointly
    with the prompt where that leaves the prompt's tokens as they are, which is the text as the model would
    read it, else on its own. A response given as ids is used as it is, because a generated tokenisation need
    not be the canonical one.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.
        prompt: text, or chat messages (dicts with ``role`` and ``content``).
        response: text, a 1-D integer tensor or a list of generated ids without the prompt, or None where the
            last chat message, an assistant's, is the response.

    Returns:
        The encoded text. Cost is linear in its length.

    Raises:
        RegionError: the prompt or the response is empty or blank.
        InvalidInputError: malformed messages, no chat template, ids that are no ids or hold the prompt too.

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
        prompt_text, roles = prompt, ()
    else:
        prompt_text, roles, response = render_chat(tokenizer, prompt, response)
    if not prompt_text.strip():
        raise RegionError(f"prompt: must hold visible text, got {prompt_text!r}; pass the question the model was asked")
    bos = getattr(tokenizer, "bos_token", None)
    own_specials = is_plain and not (bos and prompt_text.startswith(bos))
    head = _tokenize(tokenizer, prompt_text, own_specials)
    if isinstance(response, str):
        response_text = response
        tail = _tokenize_response(tokenizer, head, prompt_text, response, own_specials)
    else:
        tail, response_text = _decode_response(tokenizer, head, response)

    shift, text = len(prompt_text), prompt_text + response_text
    ids, added = head.ids + tail.ids, head.added + tail.added
    prompt_spans = close_gaps(head.spans, text, 0)
    spans = prompt_spans + close_gaps([(s + shift, e + shift) for s, e in tail.spans], text, shift)
    special = _special(tokenizer, ids, spans, added, text)
    if not is_plain:
        contents = [(role.start, role.end) for role in roles]
        special[: len(prompt_spans)] |= ~inside(prompt_spans, text, contents)
    return EncodedText(
        input_ids=torch.tensor(ids, dtype=torch.long),
        tokens=tuple(text[s:e] or token_name(tokenizer, index) for index, (s, e) in zip(ids, spans, strict=True)),
        spans=tuple(spans),
        text=text,
        prompt_length=len(head.ids),
        response_start=shift,
        special=special,
        roles=roles,
    )


class _Tokens(NamedTuple):
    """Ids with their raw character ranges, and which of them the tokenizer put around the text by itself."""

    ids: list[int]
    spans: list[Offsets]
    added: list[bool]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, own_specials: bool) -> _Tokens:
    """Token ids of a text, with offsets from the tokenizer where it has them and from decoding elsewhere."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: a text above the tokenizer's nominal maximum is the model's concern, not a warning here.
    wanted: dict[str, Any] = {"return_offsets_mapping": fast, "return_special_tokens_mask": fast}
    encoding = tokenizer(text, add_special_tokens=own_specials, verbose=False, **wanted)
    ids = [int(index) for index in encoding["input_ids"]]
    if not fast:
        return _Tokens(ids, align(*decode(tokenizer, ids, []), text), [False] * len(ids))
    added = [bool(flag) for flag in encoding["special_tokens_mask"]]
    return _Tokens(ids, [(int(start), int(end)) for start, end in encoding["offset_mapping"]], added)


def _tokenize_response(
    tokenizer: PreTrainedTokenizerBase, head: _Tokens, prompt: str, response: str, own_specials: bool
) -> _Tokens:
    """The response's tokens in the joint text where the prompt's tokens survive there, else on its own."""
    if not response.strip():
        raise RegionError(f"response: must hold visible text, got {response!r}; pass what the model generated")
    size = len(head.ids)
    joint = _tokenize(tokenizer, prompt + response, own_specials)
    # Equal spans too: an unknown-token that swallows the response's first characters has the same id.
    if len(joint.ids) > size and joint.ids[:size] == head.ids and joint.spans[:size] == head.spans:
        spans = [(start - len(prompt), end - len(prompt)) for start, end in joint.spans[size:]]
        return _Tokens(joint.ids[size:], spans, joint.added[size:])
    return _tokenize(tokenizer, response, own_specials=False)


def _decode_response(tokenizer: PreTrainedTokenizerBase, head: _Tokens, response: Any) -> tuple[_Tokens, str]:
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
    values: list[Any] = response.tolist() if hasattr(response, "tolist") else list(response)
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 0]
    if wrong:
        raise InvalidInputError(
            f"response: ids must be non-negative integers, got {wrong[0]!r}; "
            "pass the response's ids without padding marks, or its text"
        )
    if not values:
        raise RegionError("response: must hold at least one token, got 0 ids; pass the ids the model generated")
    # A model does not generate the special tokens that open its own prompt: these ids are prompt + response.
    repeated = len(values) > len(head.ids) and values[: len(head.ids)] == head.ids
    if repeated and set(head.ids) & special_ids(tokenizer):
        raise InvalidInputError(
            f"response: ids must not repeat the prompt, got its {len(head.ids)} ids in front; "
            f"pass generated[0, {len(head.ids)}:]"
        )
    text, spans = decode(tokenizer, values, head.ids)
    return _Tokens(values, spans, [False] * len(values)), text


def _special(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[Offsets], added: list[bool], text: str
) -> Bool[Tensor, " tokens"]:
    """Special ids, but for an unknown-token that stands for characters of the text: those are content."""
    known = special_ids(tokenizer)
    unknown, name = getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "unk_token", None)
    flags = [
        extra or (index in known and not (index == unknown and text[s:e].strip() not in ("", name)))
        for index, (s, e), extra in zip(ids, spans, added, strict=True)
    ]
    return torch.tensor(flags, dtype=torch.bool)


def shorten(text: str) -> str:
    """Both ends of a long text, for messages."""
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
