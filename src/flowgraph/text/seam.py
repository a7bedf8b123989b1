"""Notice text that stands twice where a prompt and its response meet."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from flowgraph.errors import InvalidInputError
from flowgraph.text.rendered_chat import MARKER, special_texts
from flowgraph.text.spans import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REACH = 2000
"""Characters on each side of the seam that are compared."""
_SHORTEST_PROMPT = 12
"""Visible characters of a prompt whose repetition is noticed; shorter ones recur by chance."""
_SHORTEST_WORD = 4
# The tags that open a part of a response.
_PART = re.compile(r"<(think|thinking|reasoning|thought|reflection|scratchpad|answer)>", re.IGNORECASE)


class Seam(NamedTuple):
    """Where a prompt and its response meet.

    Attributes:
        prompt: the text of the prompt, as the model reads it.
        response: the text of the response.
        header_start: where the text behind the last message of another role starts, which a template wrote for the
            response; 0 for a plain prompt.
        prefill: the start of the response that the prompt holds; empty where it holds none.
        is_chat: whether a template rendered the prompt.
        is_text: whether the response was given as text, which the model need not have generated like this.
    """

    prompt: str
    response: str
    header_start: int
    prefill: str
    is_chat: bool
    is_text: bool


def check_seam(tokenizer: PreTrainedTokenizerBase, seam: Seam) -> list[str]:
    """Find text that stands both at the end of the prompt and at the start of the response.

    Ids may really have been generated like this, so that most findings on ids are warnings.

    Args:
        tokenizer: it defines the special tokens.
        seam: the texts.

    Returns:
        Warnings.

    Raises:
        InvalidInputError: a response that repeats what a template or a special token has written.

    Cost: linear in the texts.
    """
    # Repetitions with a cause of their own have their own messages.
    special = special_texts(tokenizer)
    repeated = _repeated_prompt(seam, special)
    if repeated:
        return [repeated]
    opened = _opened_again(tokenizer, seam)
    if opened:
        return [opened]

    overlap = _overlap(seam.prompt[seam.header_start :], seam.response)
    if not overlap.strip():
        return []
    message = (
        f"response: must not repeat the end of the prompt, got {shorten(overlap)!r} again; "
        f"pass only what follows it, {shorten(seam.response[len(overlap) :].lstrip())!r}"
    )

    # A repeated mark of the template is an error in a text; ids may hold what the model generated.
    has_token = any(token in overlap for token in special)
    has_mark = has_token or (seam.is_chat and MARKER.search(overlap)) or _PART.search(overlap)
    if has_mark and seam.is_text:
        raise InvalidInputError(message)

    # Words may be repeated by chance; a repeated prefill may not.
    num_repeated = len(_visible(overlap))
    num_prefilled = len(_visible(seam.prefill))
    is_prefill = seam.prefill.strip() and num_repeated >= max(_SHORTEST_WORD, num_prefilled)

    # The name of a role on a line of its own, as decoding without special tokens leaves it.
    after = seam.response[len(overlap) :]
    is_header = seam.is_chat and num_repeated >= _SHORTEST_WORD and re.match(r"[ \t]*\r?\n", after)
    if has_mark or is_prefill or is_header:
        return [message]
    return []


def _repeated_prompt(seam: Seam, special: list[str]) -> str | None:
    """Describe a response that starts with the complete prompt; refuse the repetition of a template."""
    prompt = _without(seam.prompt, special)
    response = _without(seam.response, special)
    # A response that is the prompt and nothing else is an echo: there would be nothing to pass instead.
    if len(prompt) < _SHORTEST_PROMPT or response == prompt or not response.startswith(prompt):
        return None
    message = (
        f"response: must not repeat the prompt, got it in front, {shorten(seam.response)!r}; pass only what the model "
        "generated, such as generated[0, prompt_length:]"
    )
    if seam.is_chat:
        raise InvalidInputError(message)
    return message


def _opened_again(tokenizer: PreTrainedTokenizerBase, seam: Seam) -> str | None:
    """Describe a response that opens a text, or a part that the prompt has already opened."""
    bos = getattr(tokenizer, "bos_token", None)
    start = seam.response.lstrip()
    opening = None
    # Ids may hold any special token; they are compared with a tokenizer's own ids elsewhere.
    if seam.is_text and bos and bos != getattr(tokenizer, "eos_token", None) and start.startswith(bos):
        opening = bos
    part = _PART.match(start)
    if part is not None and _is_open(seam.prompt[seam.header_start :][-_REACH:], part[1]):
        opening = part[0]
    if opening is None:
        return None
    message = (
        f"response: must not open what the prompt has opened, got {opening!r} again in {shorten(seam.response)!r}; "
        f"pass only what follows it, {shorten(start.removeprefix(opening).lstrip())!r}"
    )
    if seam.is_text:
        raise InvalidInputError(message)
    return message


def _is_open(text: str, name: str) -> bool:
    """Return whether the last tag of this name in a text opens a part, and stands in the text for the response."""
    tags = re.findall(rf"<(/?){re.escape(name)}>", text, re.IGNORECASE)
    return bool(tags) and tags[-1] == ""


def _overlap(prompt: str, response: str) -> str:
    """Return the longest start of the response that ends the prompt; blanks are not compared."""
    tail = _visible(prompt[-_REACH:])
    head = _visible(response[:_REACH])
    length = 0
    start = tail.find(head[0]) if head else -1
    while start >= 0:
        if head.startswith(tail[start:]):
            length = len(tail) - start
            break
        start = tail.find(head[0], start + 1)

    # Back to the response as it was given: as many visible characters, with the blanks between them.
    num_seen = 0
    for place, character in enumerate(response):
        if num_seen == length:
            return response[:place]
        num_seen += not character.isspace()
    return response if num_seen == length else ""


def _without(text: str, special: list[str]) -> str:
    """Remove blanks and special tokens."""
    for token in special:
        text = text.replace(token, "")
    return _visible(text)


def _visible(text: str) -> str:
    """Remove blanks."""
    return "".join(text.split())
