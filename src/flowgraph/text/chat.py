"""Check prompts, render chat messages with a tokenizer's template, and locate each message's content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text.spans import Offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


class RoleSpan(NamedTuple):
    """The characters of one chat message's content; a message has several spans where a template splits it.

    Attributes:
        role: the role of the message.
        start: first character in the rendered text.
        end: the character after the last.
        message: index of the message.
    """

    role: str
    start: int
    end: int
    message: int


class _ContentSlot(NamedTuple):
    """One text of a chat message, which the template writes somewhere.

    Attributes:
        message: index of the message.
        part: index of the text among the parts of the message; None where the content is the text itself.
        text: the text.
    """

    message: int
    part: int | None
    text: str


def check_prompt(prompt: Any) -> None:
    """Refuse a value that is neither text nor chat messages with text, before a response is generated.

    Raises:
        RegionError: blank text, or messages without any text.
        InvalidInputError: anything else that cannot be a prompt.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RegionError("prompt: must hold text, got only blanks; ask the question there")
        return
    _check_messages(prompt)
    if not any(message.get("content") for message in prompt):
        raise RegionError(
            f"prompt: must hold text in the 'content' of a message, got {list(prompt)!r:.80}; ask the question there"
        )


def _check_messages(prompt: Any) -> None:
    """Refuse a value that is not a list of chat messages, each with a role."""
    is_list_of_messages = isinstance(prompt, Sequence) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in prompt
    )
    if not is_list_of_messages:
        raise InvalidInputError(
            "prompt: must be text or a list of chat messages, each a dict with 'role' and 'content', "
            f"got {prompt!r:.80}; pass one conversation, such as [{{'role': 'user', 'content': '...'}}]"
        )


def ends_with_response(prompt: str | Messages) -> bool:
    """Return whether the last chat message is the model's, so that no response has to be generated."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


def render_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: Any
) -> tuple[str, tuple[RoleSpan, ...], Any]:
    """Render chat messages and locate the content of each.

    Args:
        tokenizer: a tokenizer with a chat template.
        prompt: the messages. Without a response, the final message must be the assistant's and is the response.
        response: the response in any form, or None.

    Returns:
        The prompt's text, the content of its messages in the order of the text, and the response.

    Raises:
        RegionError: no message is left before the response.
        InvalidInputError: malformed messages, no chat template, or one that does not keep the messages' text.
    """
    messages, response = _split_messages(prompt, response)
    text, roles = _render(tokenizer, messages)
    return text, roles, response


def _split_messages(prompt: Messages, response: Any) -> tuple[list[dict[str, Any]], Any]:
    """Separate the messages of the prompt from the response that may end them."""
    _check_messages(prompt)
    messages = [dict(message) for message in prompt]
    if response is None and messages and messages[-1]["role"] == "assistant":
        final = messages.pop()
        # Tool calls and the like are rendered by the template, so the text in 'content' is not the full response.
        other_fields = sorted(key for key in final.keys() - {"role", "content", "name"} if final[key])
        if other_fields:
            raise InvalidInputError(
                f"prompt: the final assistant message must hold the complete response in 'content', got "
                f"{other_fields} beside it; pass response= with the text as the model generated it"
            )
        response = "".join(text for _, text in _contents(final))
    if not messages:
        raise RegionError("prompt: must hold a message before the response, got none; pass the user's message too")
    return messages, response


def _contents(message: Mapping[str, Any]) -> Iterable[tuple[int | None, str]]:
    """List the texts of a message, each with its index among the parts, None where the content is one text."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [(None, content)]
    parts: Sequence[Any] = content if isinstance(content, Sequence) else [None]
    if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        return [(index, part["text"]) for index, part in enumerate(parts)]
    raise InvalidInputError(
        f"prompt: message content must be text or a list of text parts, got {content!r:.80}; only text can be traced"
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, tuple[RoleSpan, ...]]:
    """Apply the chat template and find every message's content in the text that it renders.

    A search for the content itself could find it in a system prompt, a role name or an earlier message with the same
    text. So the template is applied twice, the second time with a marker in place of every content. The text between
    the markers is the template's own, which fixes where the contents lie.
    """
    slots = []
    for number, message in enumerate(messages):
        for part, content in _contents(message):
            slots.append(_ContentSlot(number, part, content))

    # The marker must not occur in any content.
    salt = 0
    while any(f"flowgraph{salt}x" in slot.text for slot in slots):
        salt += 1
    marked = _replace_contents(messages, slots, [f"flowgraph{salt}x{number}y" for number in range(len(slots))])

    # Even pieces are the template's text, odd pieces the numbers of the slots, which a template may reorder or omit.
    text = _apply_template(tokenizer, messages)
    pieces = re.split(rf"flowgraph{salt}x(\d+)y", _apply_template(tokenizer, marked))
    template_texts = pieces[::2]
    rendered_slots = [slots[int(number)] for number in pieces[1::2]]
    spans = _locate(text, template_texts, [slot.text for slot in rendered_slots])
    if spans is None:
        raise InvalidInputError(
            "prompt: the chat template must keep each message's text in one piece, got one that rewrites it "
            "depending on its content; pass the rendered prompt as a string, with question= a Regex or a Span"
        )
    roles = []
    for slot, (start, end) in zip(rendered_slots, spans, strict=True):
        roles.append(RoleSpan(messages[slot.message]["role"], start, end, slot.message))
    return text, tuple(roles)


def _replace_contents(
    messages: list[dict[str, Any]], slots: Sequence[_ContentSlot], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Copy messages with another text in each slot."""
    replaced = [dict(message) for message in messages]
    for slot, text in zip(slots, texts, strict=True):
        message = replaced[slot.message]
        if slot.part is None:
            message["content"] = text
        else:
            parts = list(message["content"])
            parts[slot.part] = {**parts[slot.part], "text": text}
            message["content"] = parts
    return replaced


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """Render the prompt so that the assistant's response, or the rest of it, can follow."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "prompt: chat messages need a tokenizer with a chat template, got one without; "
            "set tokenizer.chat_template, or pass the prompt as a string"
        )
    is_prefilled = messages[-1]["role"] == "assistant"
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not is_prefilled, continue_final_message=is_prefilled
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"prompt: the messages must fit the tokenizer's chat template, got its error {str(error)!r}; "
            "change the messages, or pass the rendered prompt as a string"
        ) from error
    return str(rendered)


def _locate(text: str, template_texts: Sequence[str], contents: Sequence[str]) -> list[Offsets] | None:
    """Place contents in ``text`` = template_texts[0] + content + template_texts[1] + ..., None where that fails."""
    if not text.startswith(template_texts[0]):
        return None
    spans = []
    cursor = len(template_texts[0])
    for number, (content, following) in enumerate(zip(contents, template_texts[1:], strict=True), 1):
        end = _content_end(text, cursor, content, following, is_last=number == len(contents))
        if end is None:
            return None
        spans.append((cursor, end))
        cursor = end + len(following)
    return spans


def _content_end(text: str, start: int, content: str, following: str, *, is_last: bool) -> int | None:
    """Find where a content that starts at ``start`` ends, given the template's text that follows it."""
    # Templates keep the content or strip blanks from its ends. The last content must end where the rest fits exactly.
    for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
        end = start + len(kept)
        reaches_end = end + len(following) == len(text)
        if text.startswith(kept + following, start) and (not is_last or reaches_end):
            return end

    # The template changed the content, for example dropped old reasoning: it extends to the template's next text.
    if is_last:
        end = len(text) - len(following)
    else:
        end = text.find(following, start)
    if not following or end < start or not text.startswith(following, end):
        return None
    return end
