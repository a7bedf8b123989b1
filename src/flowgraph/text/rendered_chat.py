"""Recognise a prompt that a chat template has already rendered, and find the messages in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flowgraph.errors import InvalidInputError
from flowgraph.text.chat import RoleSpan, apply_template
from flowgraph.text.decoding import special_ids
from flowgraph.text.template_origins import TEMPLATE_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents that occur in no template, in the order of a conversation.
_PROBES = {
    "system": "flowgraphprobesystem",
    "user": "flowgraphprobequestion",
    "assistant": "flowgraphprobereply",
    "again": "flowgraphprobefollowup",
}
# Text that marks a place in a template: <|user|>, <start_of_turn>, [INST], ◁think▷.
MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]|◁[^◁▷\s]{1,20}▷")
_ROLE_WORD = r"(?:system|developer|user|human|assistant|model|tool)"


@dataclass(frozen=True)
class RenderedChat:
    """A rendered prompt.

    Attributes:
        roles: the content of each message.
        is_exact: whether the template renders these messages to this very text.
        has_generation_prompt: whether the text ends where the assistant's response starts.
    """

    roles: tuple[RoleSpan, ...]
    is_exact: bool
    has_generation_prompt: bool


@dataclass(frozen=True)
class _Layout:
    """The text that a template writes around contents, learned from a conversation of known contents.

    Attributes:
        openings: text in front of the first content, by the role of the first message.
        separators: text between the contents of two messages, by their roles.
        generation: text behind the last user message, up to the response.
        ending: the same without a generation prompt; empty where the template always writes one.
    """

    openings: Mapping[str, str]
    separators: Mapping[tuple[str, str], str]
    generation: str
    ending: str


def recognise_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> RenderedChat | None:
    """Find the messages of a prompt that the tokenizer's template rendered; None for any other text.

    The template renders a conversation of known contents, which shows what it writes around them. The text is divided
    at these pieces, and the messages found are rendered again. Where the result differs, for example in a date or an
    option of the template, the division still holds if it follows marks such as ``<|im_start|>``.

    Args:
        tokenizer: its template is compared with the text.
        text: a prompt.

    Cost: up to four runs of the template, and a few searches in the text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    layout = _learn_layout(tokenizer)
    if layout is None:
        return None

    # A template may write an empty block of reasoning in some responses and not in others, so that the text in front
    # of a response is known in part. An exact division is right; of others, the one with most messages.
    found: list[tuple[bool, int, list[RoleSpan], str]] = []
    for header in _response_headers(layout):
        separators = {**layout.separators, ("user", "assistant"): header}
        divided = _divide(tokenizer, replace(layout, separators=separators), text)
        if divided is None:
            continue
        roles, ending = divided
        is_exact = _renders_to(tokenizer, roles, text, ending)
        found.append((is_exact, len(roles), roles, ending))
    if not found:
        return None
    is_exact, _, roles, ending = max(found, key=lambda division: division[:2])
    if not is_exact and not _has_marks(tokenizer, layout):
        return None

    # An assistant's message without words is a part of the generation prompt.
    last = roles[-1]
    if last.role == "assistant" and not MARKER.sub("", text[last.start : last.end]).strip():
        roles = roles[:-1]
    return RenderedChat(tuple(roles), is_exact, has_generation_prompt=ending != "ending")


def _response_headers(layout: _Layout) -> list[str]:
    """List what may stand between a user's message and a response: the text learned, and two starts of it."""
    learned = layout.separators["user", "assistant"]
    headers = [learned]
    for shorter in (_common_start(learned, layout.generation), re.split(r"<\|?think", learned, maxsplit=1)[0]):
        if shorter not in headers and MARKER.search(shorter):
            headers.append(shorter)
    return headers


def looks_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether special tokens of the tokenizer name roles in a text, as rendered templates have them."""
    for token in special_texts(tokenizer):
        if token not in text:
            continue
        names_role = re.search(_ROLE_WORD, token, re.IGNORECASE)
        if names_role or re.search(rf"{re.escape(token)}\s*{_ROLE_WORD}\b", text):
            return True
    return False


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the texts of the tokenizer's special tokens, longest first, without the unknown token."""
    texts = set()
    for index in special_ids(tokenizer):
        token = str(tokenizer.convert_ids_to_tokens(index))
        if token.strip() and token != getattr(tokenizer, "unk_token", None):
            texts.add(token)
    return sorted(texts, key=len, reverse=True)


def _learn_layout(tokenizer: PreTrainedTokenizerBase) -> _Layout | None:
    """Render conversations of known contents, and take apart what the template writes."""
    user = {"role": "user", "content": _PROBES["user"]}
    reply = {"role": "assistant", "content": _PROBES["assistant"]}
    again = {"role": "user", "content": _PROBES["again"]}
    system = {"role": "system", "content": _PROBES["system"]}
    # The texts around the contents: opening, then the separators between two roles, then the generation prompt.
    pieces = _pieces(_rendered(tokenizer, [user, reply, again]), ("user", "assistant", "again"))
    if pieces is None:
        return None
    opening, to_reply, to_user, generation = pieces
    openings = {"user": opening}
    separators = {("user", "assistant"): to_reply, ("assistant", "user"): to_user}

    # Some templates refuse a system message.
    with_system = _pieces(_rendered(tokenizer, [system, user]), ("system", "user"))
    if with_system is not None:
        openings["system"] = with_system[0]
        separators["system", "user"] = with_system[1]

    # The end of a conversation, where it differs from the generation prompt.
    ended = _pieces(_rendered(tokenizer, [user], is_ended=True), ("user",))
    ending = ended[1] if ended is not None else ""
    if ending == generation:
        ending = ""

    # A layout without visible marks would be found in any text.
    is_usable = all(mark.strip() for mark in (opening, to_reply, to_user, generation))
    if not is_usable:
        return None
    return _Layout(openings, separators, generation, ending)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], is_ended: bool = False) -> str | None:
    """Render messages; None where the template refuses them."""
    try:
        if is_ended:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        return apply_template(tokenizer, messages, {}, is_continued=messages[-1]["role"] == "assistant")
    except (InvalidInputError, *TEMPLATE_ERRORS):
        return None


def _pieces(rendered: str | None, names: Iterable[str]) -> list[str] | None:
    """Divide a rendered conversation at its known contents; None where one is missing or written twice."""
    if rendered is None:
        return None
    pieces = []
    rest = rendered
    for name in names:
        # A content that is written twice would leave two ways to divide the text.
        if rest.count(_PROBES[name]) != 1:
            return None
        before, _, rest = rest.partition(_PROBES[name])
        pieces.append(before)
    return [*pieces, rest]


def _divide(tokenizer: PreTrainedTokenizerBase, layout: _Layout, text: str) -> tuple[list[RoleSpan], str] | None:
    """Divide a text into the contents of messages, and name the kind of its end."""
    opened = _opening(tokenizer, layout, text)
    if opened is None:
        return None
    role, start = opened
    roles: list[RoleSpan] = []
    while True:
        # The nearest text that ends this content: a separator, or the end of the prompt.
        ends: list[tuple[int, int, str]] = []
        # Of two texts at one place the longer one counts, hence the negative length.
        for (before, after), separator in layout.separators.items():
            if before != role:
                continue
            place = text.find(separator, start)
            if place >= 0:
                ends.append((place, -len(separator), after))
        for kind, closing in (("generation", layout.generation), ("ending", layout.ending)):
            place = len(text) - len(closing)
            if role == "user" and closing and place >= start and text.endswith(closing):
                ends.append((place, -len(closing), kind))
        if not ends:
            break

        # The content ends there; the next one starts behind it, or the text ends.
        end, negative_length, following = min(ends)
        roles.append(RoleSpan(role, start, end, len(roles)))
        if following in ("generation", "ending"):
            return roles, following
        role = following
        start = end - negative_length
    # Only a message of the assistant may be open at the end: the response continues it.
    if role != "assistant" or not roles:
        return None
    roles.append(RoleSpan(role, start, len(text), len(roles)))
    return roles, "continued"


def _opening(tokenizer: PreTrainedTokenizerBase, layout: _Layout, text: str) -> tuple[str, int] | None:
    """Find the role of the first message and where its content starts."""
    # The longest opening first: one may be the beginning of another.
    bos = getattr(tokenizer, "bos_token", None) or ""
    longest_first = sorted(layout.openings.items(), key=lambda item: -len(item[1]))
    for role, opening in longest_first:
        # The opening token may have been left to the tokenizer.
        for written in (opening, opening.removeprefix(bos)):
            if written.strip() and text.startswith(written):
                return role, len(written)

    # Another system prompt or date: the first header of a user message, where it has a mark of its own.
    header = _common_ending(layout.openings["user"], layout.separators["assistant", "user"])
    if MARKER.search(header):
        place = text.find(header)
        if place >= 0:
            return "user", place + len(header)
    return None


def _common_start(one: str, other: str) -> str:
    """Return the longest text with which both texts start."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _common_ending(one: str, other: str) -> str:
    """Return the longest text with which both texts end."""
    return _common_start(one[::-1], other[::-1])[::-1]


def _renders_to(tokenizer: PreTrainedTokenizerBase, roles: Sequence[RoleSpan], text: str, ending: str) -> bool:
    """Return whether the template renders the messages found to this text, with or without its opening token."""
    messages = [{"role": role.role, "content": text[role.start : role.end]} for role in roles]
    if ending == "continued" and not messages[-1]["content"]:
        messages.pop()
    rendered = _rendered(tokenizer, messages, is_ended=ending == "ending")
    bos = getattr(tokenizer, "bos_token", None) or ""
    return rendered is not None and rendered.removeprefix(bos) == text.removeprefix(bos)


def _has_marks(tokenizer: PreTrainedTokenizerBase, layout: _Layout) -> bool:
    """Return whether the template marks the start of a user's message and of the response."""
    special = special_texts(tokenizer)
    for written in (layout.openings["user"], layout.generation):
        is_marked = MARKER.search(written) is not None or any(token in written for token in special)
        if not is_marked:
            return False
    return True
