"""Chat messages as the text of their template, and where in it each message's content lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.spans import Offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


class RoleSpan(NamedTuple):
    """Where the content of one chat message lies in the text; several spans where a template splits it."""

    role: str
    start: int
    end: int
    message: int


def render_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: Any
) -> tuple[str, tuple[RoleSpan, ...], Any]:
    """The prompt's text, where its messages lie, and the response, which the messages may end with.

    Raises:
        RegionError: no message is left before the response.
        InvalidInputError: malformed messages, no chat template, or one that does not keep the messages' text.
    """
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
