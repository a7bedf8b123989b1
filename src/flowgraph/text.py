"""From a tokenizer, a prompt and a response to token ids with the characters that each token covers."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Offsets = tuple[int, int]

REPLACEMENT = "\ufffd"  # what every decoder writes for bytes that are no complete character (yet)
CONTEXT = 8  # prompt tokens decoded in front of the response, so that its first space is not taken for padding
PENDING = 16  # tokens that may wait for one character to become complete; bounds the decoding window
ANCHOR = 4  # characters that have to agree before a difference between decoded and given text is over
RESYNC = 64  # longest such difference, in characters


class RoleSpan(NamedTuple):
    """Where the content of one chat message lies in the text; several spans where a template splits it."""

    role: str
    start: int
    end: int
    message: int


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
        text = self.text if len(self.text) <= 60 else f"{self.text[:28]}...{self.text[-28:]}"
        return f"EncodedText({self.num_tokens} tokens, {self.prompt_length} of them prompt, text={text!r})"

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
    is_chat = not isinstance(prompt, str)
    prompt_text, roles, response = _read_prompt(tokenizer, prompt, response)
    if not prompt_text.strip():
        raise RegionError(f"prompt: must hold visible text, got {prompt_text!r}; pass the question the model was asked")
    bos = getattr(tokenizer, "bos_token", None)
    own_specials = not is_chat and not (bos and prompt_text.startswith(bos))
    head = _tokenize(tokenizer, prompt_text, own_specials)
    if isinstance(response, str):
        response_text = response
        tail = _tokenize_response(tokenizer, head, prompt_text, response, own_specials)
    else:
        tail, response_text = _decode_response(tokenizer, head, response)

    shift, text = len(prompt_text), prompt_text + response_text
    ids, added = head.ids + tail.ids, head.added + tail.added
    prompt_spans = _close_gaps(head.spans, text, 0)
    spans = prompt_spans + _close_gaps([(s + shift, e + shift) for s, e in tail.spans], text, shift)
    special = _special(tokenizer, ids, spans, added, text)
    if is_chat:
        contents = [(role.start, role.end) for role in roles]
        special[: len(prompt_spans)] |= ~_inside(prompt_spans, text, contents)
    return EncodedText(
        input_ids=torch.tensor(ids, dtype=torch.long),
        tokens=tuple(text[s:e] or _name(tokenizer, index) for index, (s, e) in zip(ids, spans, strict=True)),
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
        return _Tokens(ids, _align(*_decode(tokenizer, ids, []), text), [False] * len(ids))
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
    if repeated and set(head.ids) & _special_ids(tokenizer):
        raise InvalidInputError(
            f"response: ids must not repeat the prompt, got its {len(head.ids)} ids in front; "
            f"pass generated[0, {len(head.ids)}:]"
        )
    text, spans = _decode(tokenizer, values, head.ids[-CONTEXT:])
    return _Tokens(values, spans, [False] * len(values)), text


def _read_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: Any
) -> tuple[str, tuple[RoleSpan, ...], Any]:
    """The prompt's text, where its messages lie, and the response, which the messages may end with."""
    if isinstance(prompt, str):
        return prompt, (), response
    messages, response = _split_messages(prompt, response)
    return *_render(tokenizer, messages), response


def _split_messages(prompt: Messages, response: Any) -> tuple[list[dict[str, Any]], Any]:
    """Check chat messages; without a response, take the final assistant message for it."""
    is_list = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
    if not is_list or not all(isinstance(message.get("role"), str) for message in prompt):
        raise InvalidInputError(
            "prompt: must be text or a list of chat messages, each a dict with 'role' and 'content', "
            f"got {prompt!r:.80}; pass one conversation, such as [{{'role': 'user', 'content': '...'}}]"
        )
    messages = [dict(message) for message in prompt]
    if response is None and messages and messages[-1]["role"] == "assistant":
        final = messages.pop()
        beside = sorted(key for key in final.keys() - {"role", "content", "name"} if final[key])
        if beside:
            raise InvalidInputError(
                f"prompt: the final assistant message must hold the whole response in 'content', got "
                f"{beside} beside it; pass response= with the text as the model generated it"
            )
        response = "".join(part for _, part in _contents(final))
    if not messages:
        raise RegionError("prompt: must hold a message before the response, got none; pass the user's message too")
    return messages, response


def _contents(message: Mapping[str, Any]) -> Iterable[tuple[int | None, str]]:
    """The texts in a message: its content, or with their places the texts of its parts."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [(None, content)]
    parts: Sequence[Any] = content if isinstance(content, Sequence) else [None]
    if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        return [(place, part["text"]) for place, part in enumerate(parts)]
    raise InvalidInputError(
        f"prompt: message content must be text or a list of text parts, got {content!r:.80}; only text can be traced"
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, tuple[RoleSpan, ...]]:
    """Apply the chat template and find every message's content in what it wrote.

    Searching for the content itself would find it in a system prompt, a role name or an earlier message that
    says the same. So the template is applied twice, the second time with a marker for every content: what
    stands between the markers is the template's own text, which fixes where the contents lie.
    """
    slots = [(index, place, text) for index, message in enumerate(messages) for place, text in _contents(message)]
    salt = 0
    while any(f"flowgraph{salt}x" in text for _, _, text in slots):
        salt += 1
    marked = [dict(message) for message in messages]
    for number, (index, place, _) in enumerate(slots):
        marker = f"flowgraph{salt}x{number}y"
        if place is None:
            marked[index]["content"] = marker
        else:
            parts = marked[index]["content"]
            marked[index]["content"] = [*parts[:place], {**parts[place], "text": marker}, *parts[place + 1 :]]
    text = _apply_template(tokenizer, messages)
    pieces = re.split(rf"flowgraph{salt}x(\d+)y", _apply_template(tokenizer, marked))
    found = [slots[int(number)] for number in pieces[1::2]]
    spans = _locate(text, pieces[::2], [content for _, _, content in found])
    if spans is None:
        raise InvalidInputError(
            "prompt: the chat template must keep each message's text in one piece, got one that rewrites it "
            "by what it says; pass the rendered prompt as a string, with question= a Regex or a Span"
        )
    roles = [RoleSpan(messages[slot[0]]["role"], *span, slot[0]) for slot, span in zip(found, spans, strict=True)]
    return text, tuple(roles)


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The rendered prompt, open at its end for the assistant to speak or to go on speaking."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "prompt: chat messages need a tokenizer with a chat template, got one without; "
            "set tokenizer.chat_template, or pass the prompt as a string"
        )
    prefilled = messages[-1]["role"] == "assistant"
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"prompt: the messages must fit the tokenizer's chat template, got its error {str(error)!r}; "
            "change the messages, or pass the rendered prompt as a string"
        ) from error
    return str(rendered)


def _locate(text: str, between: Sequence[str], contents: Sequence[str]) -> list[Offsets] | None:
    """Place contents in ``text`` = between[0] + content + between[1] + ..., None where that cannot be."""
    if not text.startswith(between[0]):
        return None
    spans, cursor = [], len(between[0])
    for number, (content, after) in enumerate(zip(contents, between[1:], strict=True), 1):
        last = number == len(contents)
        for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
            end = cursor + len(kept)
            if text.startswith(kept + after, cursor) and (not last or end + len(after) == len(text)):
                break
        else:  # The template changed the content (dropped old reasoning, say): up to its own next words.
            end = len(text) - len(after) if last else text.find(after, cursor)
            if not after or end < cursor or not text.startswith(after, end):
                return None
        spans.append((cursor, end))
        cursor = end + len(after)
    return spans


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], context: list[int]) -> tuple[str, list[Offsets]]:
    """Text of ``ids`` behind ``context`` and each id's characters in it, by a window as inference servers do.

    A token ends where the decoded window ends without a replacement character. Until then its characters are
    incomplete, and all tokens that bring a part of a character share it. Two short decodes a token.
    """
    known = _vocabulary_size(tokenizer)
    everything = context + ids
    pieces: list[str] = []
    spans: list[Offsets] = []
    length = start = 0
    read, before, stable = len(context), "", 0
    head = _text(tokenizer, context, known)
    for index in range(len(context), len(everything)):
        now = _text(tokenizer, everything[start : index + 1], known)[len(head) :]
        partial = now.endswith(REPLACEMENT)
        if before and not partial and now.startswith(before):
            # What looked incomplete was meant, or no character at all: it belongs to the tokens so far.
            stable = len(before)
            spans[-1] = (spans[-1][0], length + stable)
        reached = len(now.rstrip(REPLACEMENT)) if partial else len(now)
        complete = (now and not partial) or index - read + 1 >= PENDING or index + 1 == len(everything)
        spans.append((length + stable, length + max(stable, len(now) if complete else reached + partial)))
        before, stable = now, max(stable, reached)
        if complete:
            pieces.append(now)
            length += len(now)
            start, read, before, stable = read, index + 1, "", 0
            head = _text(tokenizer, everything[start:read], known)
    return "".join(pieces), spans


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], known: int) -> str:
    """Decoded text with its special tokens; ids beyond the vocabulary (a padded embedding) write nothing."""
    written = [index for index in ids if index < known]
    return str(tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    """Tokens added to the vocabulary, by id; a backend that does not list them says so with a method."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return added if isinstance(added, Mapping) else {}


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer), *(index + 1 for index in _added_tokens(tokenizer)), 0)


def _name(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """A token that covers no character, by its name in the vocabulary."""
    name = tokenizer.convert_ids_to_tokens(index) if index < _vocabulary_size(tokenizer) else None
    return str(name or f"<id {index}>")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens: the named ones, and the added ones that are marked so (chat headers)."""
    marked = {index for index, token in _added_tokens(tokenizer).items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _special(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[Offsets], added: list[bool], text: str
) -> Bool[Tensor, " tokens"]:
    """Special ids, but for an unknown-token that stands for characters of the text: those are content."""
    special_ids = _special_ids(tokenizer)
    unknown, name = getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "unk_token", None)
    flags = [
        extra or (index in special_ids and not (index == unknown and text[s:e].strip() not in ("", name)))
        for index, (s, e), extra in zip(ids, spans, added, strict=True)
    ]
    return torch.tensor(flags, dtype=torch.bool)


def _inside(spans: Sequence[Offsets], text: str, contents: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Tokens within a content, or with a visible character in one."""
    visible = covers(spans, text, contents)
    within = [any(low <= s < e <= high for low, high in contents) for s, e in spans]
    return visible | torch.tensor(within, dtype=torch.bool)


def covers(spans: Sequence[Offsets], text: str, selected: Sequence[Offsets]) -> Bool[Tensor, " tokens"]:
    """Which tokens have at least one visible (not whitespace) character in one of the selected ranges.

    Example:
        >>> covers([(0, 3), (3, 5), (5, 8)], "one  two", [(2, 5)]).tolist()
        [True, False, False]
    """
    seen = [0, *accumulate(not character.isspace() for character in text)]
    hit = torch.zeros(len(spans), dtype=torch.bool)
    for low, high in selected:
        hit |= torch.tensor([seen[min(e, high)] > seen[max(s, low)] for s, e in spans], dtype=torch.bool)
    return hit


def _close_gaps(spans: Sequence[Offsets], text: str, start: int) -> list[Offsets]:
    """Give whitespace that no token reports to the token after it, and empty spans a place in the order."""
    closed: list[Offsets] = []
    reached = start
    for low, high in spans:
        low, high = max(low, start), max(high, start)
        if low >= high and low < reached:  # A special token that the tokenizer added reports (0, 0).
            low = high = reached
        elif reached < low and not text[reached:low].strip():
            low = reached
        closed.append((low, high))
        reached = max(reached, high)
    return closed


def _align(decoded: str, spans: Sequence[Offsets], text: str) -> list[Offsets]:
    """Carry spans in a decoded text over to the text that was tokenised.

    Only visible characters are compared, without regard to case and compatibility forms, because tokenizers
    normalise both. Where the two still differ (an unknown-token; a BOS that only the decoded text has), every
    decoded character of the difference stands for all of it.
    """
    if decoded == text:
        return list(spans)
    source, places = _visible(decoded)
    target, origin = _visible(text)
    reach: list[Offsets] = []
    here = there = 0
    while here < len(source):
        skipped, passed = 1, 1
        if source[here] != target[there : there + 1]:
            window = RESYNC + ANCHOR
            skipped, passed = _difference(source[here : here + window], target[there : there + window])
        reach += [(there, there + passed)] * skipped
        here, there = here + skipped, there + passed
    origin.append(len(text))
    carried: list[Offsets] = []
    high = 0
    for start, end in spans:
        first, last = bisect_left(places, start), bisect_left(places, end)
        if first == last and 0 < first < len(reach) and reach[first - 1] == reach[first]:
            first -= 1  # Only a space, but between two characters of one difference.
        parts = reach[first:last]
        low, high = (parts[0][0], parts[-1][1]) if parts else (high, high)
        carried.append((origin[low], origin[high - 1] + 1) if low < high else (origin[low], origin[low]))
    return carried


def _visible(text: str) -> tuple[str, list[int]]:
    """The characters of a text that survive any tokenizer's normalisation, and where each comes from."""
    kept = [
        (part, place)
        for place, character in enumerate(text)
        for part in unicodedata.normalize("NFKD", character).casefold()
        if not part.isspace()
    ]
    return "".join(part for part, _ in kept), [place for _, place in kept]


def _difference(source: str, target: str) -> Offsets:
    """How many characters of either text to pass, at least one, until both agree again."""
    for total in range(1, 2 * RESYNC + 1):
        for skipped in range(max(0, total - min(RESYNC, len(target))), min(total, RESYNC, len(source)) + 1):
            if source[skipped : skipped + ANCHOR] == target[total - skipped : total - skipped + ANCHOR]:
                return skipped, total - skipped
    raise InvalidInputError(
        f"tokenizer: what it decodes must agree with the text it read, got {source[:20]!r} for "
        f"{target[:20]!r}; pass input_ids, with question and answer as token masks"
    )
