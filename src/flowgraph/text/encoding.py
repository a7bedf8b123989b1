"""Encode a prompt and a response as token ids with the characters that each token covers."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.files import loadable
from flowgraph.text.chat import Messages, RoleSpan, checked_template_options, ends_with_response, render_chat
from flowgraph.text.decoding import decode, special_ids, token_name
from flowgraph.text.rendered_chat import RenderedChat, looks_rendered, recognise_rendered
from flowgraph.text.seam import Seam, check_seam
from flowgraph.text.spans import Offsets, align, check_unicode, close_gaps, inside, join_marks, shorten
from flowgraph.text.template_origins import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@loadable
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
        origin: how the text was made, as plain JSON values: the form of prompt and response, the template and its
            arguments, the special tokens that the tokenizer added, and the warnings.
    """

    input_ids: Int64[Tensor, " tokens"]
    tokens: tuple[str, ...]
    spans: tuple[Offsets, ...]
    text: str
    prompt_length: int
    response_start: int
    special: Bool[Tensor, " tokens"]
    roles: tuple[RoleSpan, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

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
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    warn: bool = True,
) -> EncodedText:
    r"""Tokenise a prompt and a response, and find the characters that every token covers.

    - A plain prompt gets the tokenizer's own special tokens, but none that its text already starts with.
    - Chat messages are rendered by the tokenizer's chat template, exactly as transformers renders them. A final
      assistant message in front of a given ``response`` is a prefill that the response continues.
    - A prompt that the template has rendered before is recognised, and its messages are found in it.
    - A response given as text is tokenised jointly with the prompt, as the model would read the text. Where that
      changes the prompt's tokens, the response is tokenised on its own.
    - A response given as ids is used as it is, because a generated tokenisation need not be the canonical one.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.
        prompt: text, or chat messages (dicts with ``role`` and ``content``).
        response: text, a 1-D integer tensor or a list of generated ids without the prompt, or None where the
            last chat message, an assistant's, is the response.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``, ``tools`` or
            ``reasoning_effort``.
        warn: also raise the warnings that ``origin`` holds.

    Returns:
        The encoded text.

    Raises:
        RegionError: the prompt or the response is empty or blank.
        InvalidInputError: malformed messages, no chat template, invalid ids, half of a surrogate pair, or a response
            that repeats the prompt or what the template wrote at its end.

    Warns:
        UserWarning: text that seems to stand twice where prompt and response meet, or a rendered chat that was not
            recognised. The warnings are also in ``origin``.

    Cost: linear in the length of the text, and a few runs of the chat template.

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
    # The prompt as text, and the texts of messages in it.
    read = _read_prompt(tokenizer, prompt, response, chat_template_kwargs)
    response = read.response
    if not read.text.strip():
        raise RegionError(f"prompt: must hold visible text, got {read.text!r}; pass the question the model was asked")

    # Ids of the prompt, then ids and text of the response.
    frame = _frame(tokenizer)
    prompt_tokens = _tokenize_prompt(tokenizer, read.text, read.form, frame)
    if isinstance(response, str):
        check_unicode(response, "response")
        response_text = response
        response_tokens, is_joint = _tokenize_response(tokenizer, prompt_tokens, read, response, frame)
    else:
        response_tokens, response_text = _decode_response(tokenizer, prompt_tokens, response)
        is_joint = False

    # What looks wrong without being invalid is warned of, and recorded with the text.
    found = read.warnings + _seam_warnings(tokenizer, read, prompt_tokens, response_tokens, response_text, frame)
    if warn:
        for message in found:
            warnings.warn(message, UserWarning, stacklevel=2)

    # How the text came about, for the provenance of a trace.
    origin = _describe_prompt(tokenizer, read, prompt_tokens)
    origin["response"] = "text" if isinstance(response, str) else "ids"
    if ends_with_response(prompt) and read.is_response_in_chat:
        origin["response"] = "last chat message"
    if isinstance(response, str):
        origin["response_tokenized"] = "with the prompt" if is_joint else "on its own"
    origin["warnings"] = found
    return _join(tokenizer, read, prompt_tokens, response_tokens, response_text, origin)


def encode_ids(
    tokenizer: PreTrainedTokenizerBase | None, input_ids: Int[Tensor, " tokens"], prompt_length: int
) -> EncodedText:
    """Decode prompt and response given as ids, with the decoder that reads generated ids.

    Args:
        tokenizer: decodes the ids; without one, tokens are shown as ``<id>``.
        input_ids: ``[T]``, prompt tokens first.
        prompt_length: number of prompt tokens.

    Returns:
        The encoded text. Ids of special tokens are special; a chat template around contents is not recognised.

    Warns:
        UserWarning: the special tokens that open a text stand twice.

    Cost: two short decodings for each id.
    """
    ids: list[int] = input_ids.tolist()
    origin: dict[str, Any] = {"prompt": "ids", "response": "ids", "warnings": []}
    if tokenizer is None:
        names = [f"<{index}>" for index in ids]
        return _named_tokens(input_ids, names, prompt_length, origin)

    message = _doubled_opening(_frame(tokenizer).opening, ids, "input_ids", tokenizer)
    if message:
        warnings.warn(message, UserWarning, stacklevel=2)
        origin["warnings"] = [message]

    # The prompt's ids are the context in which those of the response are decoded.
    prompt_ids = ids[:prompt_length]
    response_ids = ids[prompt_length:]
    prompt_text, prompt_spans = decode(tokenizer, prompt_ids, [])
    response_text, response_spans = decode(tokenizer, response_ids, prompt_ids)
    prompt_tokens = _Tokens(prompt_ids, prompt_spans, [False] * len(prompt_ids))
    response_tokens = _Tokens(response_ids, response_spans, [False] * len(response_ids))
    return _join(tokenizer, _Read(prompt_text, "ids"), prompt_tokens, response_tokens, response_text, origin)


def _named_tokens(
    input_ids: Tensor, names: Sequence[str], prompt_length: int, origin: Mapping[str, Any]
) -> EncodedText:
    """Make a text of token names, for ids without a tokenizer."""
    # Names follow each other without a gap, so each token covers its own name.
    spans = []
    end = 0
    for name in names:
        spans.append((end, end + len(name)))
        end += len(name)
    return EncodedText(
        input_ids=input_ids.long(),
        tokens=tuple(names),
        spans=tuple(spans),
        text="".join(names),
        prompt_length=prompt_length,
        response_start=spans[prompt_length - 1][1],
        special=torch.zeros(len(names), dtype=torch.bool),
        origin=origin,
    )


Form = Literal["text", "chat", "rendered chat", "ids"]


@dataclass(frozen=True)
class _Read:
    """A prompt that was read, in any form.

    Attributes:
        text: the text as the model reads it, without special tokens that the tokenizer adds.
        form: what the prompt was given as.
        roles: the contents of chat messages.
        response: the response, in any form.
        options: arguments of the chat template.
        prefill: the text of the assistant's message that the response continues.
        is_response_in_chat: whether the response was the last chat message.
        is_exact: whether the template renders the messages to this text.
        warnings: what was noticed.
    """

    text: str
    form: Form
    roles: tuple[RoleSpan, ...] = ()
    response: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    is_response_in_chat: bool = False
    is_exact: bool = True
    warnings: list[str] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template rendered the prompt."""
        return self.form in ("chat", "rendered chat")


def _read_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any, options: Any) -> _Read:
    """Render chat messages, or recognise the messages of a rendered prompt, or take a text as it is."""
    if not isinstance(prompt, str):
        checked = checked_template_options(tokenizer, options)
        text, roles, given = render_chat(tokenizer, prompt, response, checked)
        check_unicode(text, "prompt", "the rendered chat")
        return _Read(
            text,
            "chat",
            roles,
            given,
            options=checked,
            prefill=_prefill(roles, text),
            is_response_in_chat=response is None,
            warnings=_rendered_contents(tokenizer, roles, text),
        )

    # A text: the options of a template do not apply to it.
    check_unicode(prompt, "prompt")
    if options:
        raise InvalidInputError(
            f"chat_template_kwargs: go with chat messages, got {sorted(options)!s:.80} with a text; "
            "pass messages, or render the text with them"
        )

    # The template may have rendered it already; then its messages are known too.
    rendered = recognise_rendered(tokenizer, prompt)
    if rendered is not None:
        return _Read(
            prompt,
            "rendered chat",
            rendered.roles,
            response,
            prefill=_prefill(rendered.roles, prompt),
            is_exact=rendered.is_exact,
            warnings=_missing_generation_prompt(rendered),
        )

    # Special tokens that name roles, in another layout than the template's: a plain text, with a warning.
    found = []
    if looks_rendered(tokenizer, prompt):
        found.append(
            "prompt: a rendered chat must follow the tokenizer's chat template to be read as one, got special tokens "
            f"that name roles in {shorten(prompt)!r}; pass messages, or question= with a Regex or Span, because all "
            "of it counts as question"
        )
    return _Read(prompt, "text", response=response, warnings=found)


def _prefill(roles: Sequence[RoleSpan], text: str) -> str:
    """Return what the last message holds of the response, where it is the assistant's and ends the prompt."""
    if roles and roles[-1].role == "assistant" and not text[roles[-1].end :].strip():
        return text[roles[-1].start : roles[-1].end]
    return ""


def _rendered_contents(tokenizer: PreTrainedTokenizerBase, roles: Sequence[RoleSpan], text: str) -> list[str]:
    """Notice a message whose content is a rendered prompt: the template would stand around another template."""
    for role in roles:
        if role.role != "user":
            continue
        content = text[role.start : role.end]
        rendered = recognise_rendered(tokenizer, content)
        if rendered is None or not rendered.is_exact:
            continue
        if any(inner.role == "user" for inner in rendered.roles):
            return [
                f"prompt: message {role.message} must hold its own text, got a rendered chat, {shorten(content)!r}; "
                "pass the rendered chat as a string instead of messages"
            ]
    return []


def _missing_generation_prompt(rendered: RenderedChat) -> list[str]:
    """Notice a rendered prompt that ends with a message instead of the header of the response."""
    if rendered.has_generation_prompt:
        return []
    return [
        "prompt: a rendered chat must end with the generation prompt, got one that ends after a message; "
        "render it with add_generation_prompt=True"
    ]


def _describe_prompt(tokenizer: PreTrainedTokenizerBase, read: _Read, tokens: _Tokens) -> dict[str, Any]:
    """Describe how the prompt was made, as plain JSON values."""
    described: dict[str, Any] = {"prompt": read.form}
    # A digest identifies the template; its text would be too long for a record.
    if read.form == "chat":
        template = template_of(tokenizer, read.options)
        described["chat_template"] = f"sha256:{hashlib.sha256(template.encode()).hexdigest()[:16]}"
        described["chat_template_kwargs"] = dict(read.options)
    if read.form == "rendered chat":
        described["rendered_exactly"] = read.is_exact

    names = []
    for index, is_added in zip(tokens.ids, tokens.is_added, strict=True):
        if is_added:
            names.append(token_name(tokenizer, index))
    described["added_tokens"] = names
    return described


def _seam_warnings(
    tokenizer: PreTrainedTokenizerBase,
    read: _Read,
    prompt: _Tokens,
    response: _Tokens,
    response_text: str,
    frame: _Frame,
) -> list[str]:
    """Notice text or special tokens that stand twice at the start of the prompt or where the response begins."""
    opening = frame.opening
    found = []
    doubled = _doubled_opening(opening, prompt.ids, "prompt", tokenizer)
    if doubled:
        found.append(doubled)
    # Ids that a tokenizer made of the response as of a complete text: its opening tokens, then the text.
    if opening and not isinstance(read.response, str) and response.ids[: len(opening)] == opening:
        rest = str(tokenizer.decode(response.ids[len(opening) :], skip_special_tokens=True))
        if rest.strip() and _tokenize(tokenizer, rest, add_specials=True).ids == response.ids:
            names = "".join(token_name(tokenizer, index) for index in opening)
            found.append(
                f"response: must not start with the tokens that open a text, got {names!r} in front; "
                "tokenize it with add_special_tokens=False"
            )

    # Everything behind the last content of another role was written for the response.
    header_start = 0
    if read.is_chat:
        others = [role.end for role in read.roles if role.role != "assistant"]
        header_start = max(others, default=0)
    seam = Seam(
        prompt=read.text,
        response=response_text,
        header_start=header_start,
        prefill=read.prefill,
        is_chat=read.is_chat,
        is_text=isinstance(read.response, str),
    )
    return found + check_seam(tokenizer, seam)


def _doubled_opening(
    opening: list[int], ids: list[int], argument: str, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Describe ids that start twice with the tokens that open a text, as tokenizing a rendered chat leaves them."""
    size = len(opening)
    if not size:
        # A template may write the opening token where the tokenizer adds none.
        bos_id = getattr(tokenizer, "bos_token_id", None)
        if bos_id is None or bos_id == getattr(tokenizer, "eos_token_id", None):
            return None
        opening = [bos_id]
        size = 1
    if ids[:size] != opening or ids[size : 2 * size] != opening:
        return None
    names = "".join(token_name(tokenizer, index) for index in opening)
    return (
        f"{argument}: must start once with the tokens that open a text, got {names!r} twice; "
        "tokenize rendered text with add_special_tokens=False"
    )


def _join(
    tokenizer: PreTrainedTokenizerBase,
    read: _Read,
    prompt_tokens: _Tokens,
    response_tokens: _Tokens,
    response_text: str,
    origin: Mapping[str, Any],
) -> EncodedText:
    """Join prompt and response to one text; the spans of the response move behind the prompt."""
    # Spans cover the text without gaps, so that every character belongs to a token.
    text = read.text + response_text
    response_start = len(read.text)
    prompt_spans = close_gaps(join_marks(prompt_tokens.spans, read.text), text, 0)
    response_spans = join_marks(response_tokens.spans, response_text)
    moved_spans = [(start + response_start, end + response_start) for start, end in response_spans]
    spans = prompt_spans + close_gaps(moved_spans, text, response_start)
    ids = prompt_tokens.ids + response_tokens.ids
    is_added = prompt_tokens.is_added + response_tokens.is_added

    special = _special(tokenizer, ids, spans, is_added, text)
    if read.is_chat:
        # Everything that the template wrote around the contents counts as special.
        contents = [(role.start, role.end) for role in read.roles]
        special[: len(prompt_spans)] |= ~inside(prompt_spans, text, contents)
    # A token without characters is shown by its name.
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
        roles=read.roles,
        origin=origin,
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


class _Frame(NamedTuple):
    """The special tokens that a tokenizer puts around a text.

    Attributes:
        opening: ids in front.
        closing: ids behind.
    """

    opening: list[int]
    closing: list[int]


def _frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """Find the special tokens that the tokenizer puts around a text, by a short one."""
    # The special tokens are what the two encodings of one letter differ by.
    complete = _tokenize(tokenizer, "a", add_specials=True).ids
    bare = _tokenize(tokenizer, "a", add_specials=False).ids
    if len(complete) == len(bare):
        return _Frame([], [])
    for start in range(len(complete) - len(bare) + 1):
        end = start + len(bare)
        if bare and complete[start:end] == bare:
            return _Frame(complete[:start], complete[end:])
    # A vocabulary without the letter: what is left opens the text.
    return _Frame(complete, [])


def _tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: str, form: Form, frame: _Frame) -> _Tokens:
    """Tokenise a prompt with the special tokens that the tokenizer puts around a text, none of them twice."""
    if form == "chat":
        return _tokenize(tokenizer, text, add_specials=False)
    complete = _tokenize(tokenizer, text, add_specials=True)
    opening, closing = frame
    if complete.ids[: len(opening)] != opening:
        return complete

    # A rendered prompt starts with its opening tokens, of which the tokenizer would add another copy.
    num_doubled = 0
    for size in range(1, len(opening) + 1):
        if complete.ids[len(opening) : len(opening) + size] == opening[-size:]:
            num_doubled = size
    stop = len(complete.ids)
    start_of_closing = stop - len(closing)
    if form == "rendered chat":
        # The response follows, so nothing closes the text.
        stop = start_of_closing

    # The opening tokens that the text repeats are left out.
    kept = [*range(len(opening) - num_doubled), *range(len(opening), stop)]
    return _Tokens(
        ids=[complete.ids[place] for place in kept],
        spans=[complete.spans[place] for place in kept],
        is_added=[place < len(opening) or place >= start_of_closing for place in kept],
    )


def _tokenize_response(
    tokenizer: PreTrainedTokenizerBase, prompt_tokens: _Tokens, read: _Read, response: str, frame: _Frame
) -> tuple[_Tokens, bool]:
    """Tokenise the response jointly with the prompt where the prompt's tokens stay the same, else on its own."""
    if not response.strip():
        raise RegionError(f"response: must hold visible text, got {response!r}; pass what the model generated")
    num_prompt_tokens = len(prompt_tokens.ids)
    joint = _tokenize_prompt(tokenizer, read.text + response, read.form, frame)
    # The spans must agree too: an unknown token that includes the response's first characters has the same id.
    keeps_ids = joint.ids[:num_prompt_tokens] == prompt_tokens.ids
    keeps_spans = joint.spans[:num_prompt_tokens] == prompt_tokens.spans
    is_longer = len(joint.ids) > num_prompt_tokens
    if is_longer and keeps_ids and keeps_spans:
        # Spans are counted from the start of the response.
        shift = len(read.text)
        spans = [(start - shift, end - shift) for start, end in joint.spans[num_prompt_tokens:]]
        tokens = _Tokens(joint.ids[num_prompt_tokens:], spans, joint.is_added[num_prompt_tokens:])
        return tokens, True
    return _tokenize(tokenizer, response, add_specials=False), False


def _decode_response(tokenizer: PreTrainedTokenizerBase, prompt_tokens: _Tokens, response: Any) -> tuple[_Tokens, str]:
    """Check generated ids and decode them, in the prompt's context, into text and spans."""
    ids = _response_ids(response)

    # A model does not generate the special tokens that open its own prompt: such ids are prompt and response.
    prompt_ids = prompt_tokens.ids
    padding = getattr(tokenizer, "pad_token_id", None)
    num_pads = next((place for place, index in enumerate(ids) if index != padding), 0)
    unpadded = ids[num_pads:]
    repeats_prompt = len(unpadded) > len(prompt_ids) and unpadded[: len(prompt_ids)] == prompt_ids
    if repeats_prompt and set(prompt_ids) & special_ids(tokenizer):
        size = num_pads + len(prompt_ids)
        raise InvalidInputError(
            f"response: ids must not repeat the prompt, got its {size} ids in front; pass generated[0, {size}:]"
        )
    text, spans = decode(tokenizer, ids, prompt_ids)
    return _Tokens(ids, spans, [False] * len(ids)), text


def _response_ids(response: Any) -> list[int]:
    """Read a response that is no text as a list of ids."""
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

    ids = []
    indices = response.tolist() if hasattr(response, "tolist") else list(response)
    for index in indices:
        try:
            # Booleans are integers in Python, and no ids.
            number = -1 if isinstance(index, bool | np.bool_) else operator.index(index)
        except TypeError:
            number = -1
        if number < 0:
            raise InvalidInputError(
                f"response: ids must be non-negative integers, got {index!r}; "
                "pass the response's ids without padding marks, or its text"
            )
        ids.append(number)
    if not ids:
        raise RegionError("response: must hold at least one token, got 0 ids; pass the ids the model generated")
    return ids


def _special(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[Offsets], is_added: list[bool], text: str
) -> Bool[Tensor, " tokens"]:
    """Mark special tokens, except unknown tokens that cover characters of the text: those are content."""
    special = special_ids(tokenizer)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown_token = getattr(tokenizer, "unk_token", None)
    # An unknown token that stands for itself in the text is special; one that covers other characters is content.
    flags = []
    for index, (start, end), added in zip(ids, spans, is_added, strict=True):
        covered = text[start:end].strip()
        is_content = index == unknown_id and covered not in ("", unknown_token)
        flags.append(added or (index in special and not is_content))
    return torch.tensor(flags, dtype=torch.bool)
