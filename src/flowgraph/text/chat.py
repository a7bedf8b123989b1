"""Check prompts, render chat messages with a tokenizer's template, and locate each message's content."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.files import loadable
from flowgraph.text.spans import Offsets, check_unicode, shorten
from flowgraph.text.template_origins import TEMPLATE_ERRORS, content_spans, unread_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


@loadable
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
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: Any, options: Mapping[str, Any] | None = None
) -> tuple[str, tuple[RoleSpan, ...], Any]:
    """Render chat messages as transformers does, and locate the content of each.

    Args:
        tokenizer: a tokenizer with a chat template.
        prompt: the messages. Without a response, the final message must be the assistant's and is the response.
        response: the response in any form, or None.
        options: further arguments of the template, checked by :func:`checked_template_options`.

    Returns:
        The prompt's text, the content of its messages in the order of the text, and the response. A message that the
        template does not write has no content; one without text has an empty range.

    Raises:
        RegionError: no message is left before the response.
        InvalidInputError: malformed messages, no chat template, or one that refuses the messages.
    """
    # A last message of the assistant is the response; beside a given response it is the beginning of it.
    options = options or {}
    messages, response = _split_messages(prompt, response)
    is_continued = messages[-1]["role"] == "assistant"
    text = apply_template(tokenizer, messages, options, is_continued=is_continued)
    spans = content_spans(tokenizer, messages, text, options, is_continued=is_continued)
    if spans is None:
        raise InvalidInputError(
            "prompt: the chat template must write the same text each time, so that contents can be located, got "
            f"another one on a second run than {shorten(text)!r}; pass the rendered prompt as a string"
        )
    return text, _role_spans(messages, spans), response


def _role_spans(messages: Sequence[Mapping[str, Any]], spans: Sequence[tuple[int, Offsets]]) -> tuple[RoleSpan, ...]:
    """Name the role of each content; a message without text gets an empty range behind the one before it."""
    roles = [RoleSpan(messages[number]["role"], start, end, number) for number, (start, end) in spans]
    for number, message in enumerate(messages):
        text = "".join(_contents(message))
        if text:
            continue

        # The range lies at the end of the last earlier message, or at the start of the text.
        earlier = [place for place, role in enumerate(roles) if role.message < number]
        place = 0
        end = 0
        if earlier:
            place = earlier[-1] + 1
            end = roles[place - 1].end
        roles.insert(place, RoleSpan(message["role"], end, end, number))
    return tuple(roles)


def _split_messages(prompt: Messages, response: Any) -> tuple[list[dict[str, Any]], Any]:
    """Separate the messages of the prompt from the response that may end them."""
    _check_messages(prompt)
    messages = [dict(message) for message in prompt]
    for number, message in enumerate(messages):
        for text in _contents(message):
            check_unicode(text, "prompt", f"the content of message {number}")
    if response is None and messages and messages[-1]["role"] == "assistant":
        final = messages.pop()
        # Tool calls and the like are rendered by the template, so the text in 'content' is not the full response.
        other_fields = sorted(key for key in final.keys() - {"role", "content", "name"} if final[key])
        if other_fields:
            raise InvalidInputError(
                f"prompt: the final assistant message must hold the complete response in 'content', got "
                f"{other_fields} beside it; pass response= with the text as the model generated it"
            )
        response = "".join(_contents(final))
    if not messages:
        raise RegionError("prompt: must hold a message before the response, got none; pass the user's message too")
    return messages, response


def _contents(message: Mapping[str, Any]) -> list[str]:
    """List the texts of a message."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    parts: Sequence[Any] = content if isinstance(content, Sequence) else [None]
    if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        return [part["text"] for part in parts]
    raise InvalidInputError(
        f"prompt: message content must be text or a list of text parts, got {content!r:.80}; only text can be traced"
    )


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    *,
    is_continued: bool,
) -> str:
    """Render the prompt with transformers, so that the assistant's response, or the rest of it, can follow.

    Args:
        tokenizer: the tokenizer.
        messages: the messages before the response.
        options: further arguments of the template.
        is_continued: whether the response continues the last message, an assistant's.

    Raises:
        InvalidInputError: no chat template, or one that refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "prompt: chat messages need a tokenizer with a chat template, got one without; "
            "set tokenizer.chat_template, or pass the prompt as a string"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            **options,
        )
    except TEMPLATE_ERRORS as error:
        raise InvalidInputError(
            f"prompt: the messages must fit the tokenizer's chat template, got its error {str(error)!r}; "
            "change the messages, or pass the rendered prompt as a string"
        ) from error
    return str(rendered)


def checked_template_options(tokenizer: PreTrainedTokenizerBase | None, options: Any) -> dict[str, Any]:
    """Read ``chat_template_kwargs`` as plain JSON values; tools given as functions become their schemas.

    Args:
        tokenizer: its template must read the options; None: not checked.
        options: arguments of the template by name, or None.

    Returns:
        The options, ready for ``apply_chat_template`` and for the record.

    Raises:
        InvalidInputError: no mapping, an option that flowgraph sets itself, or a value that JSON cannot hold.

    Warns:
        UserWarning: an option that the template never reads.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidInputError(
            f"chat_template_kwargs: must be a dict of template arguments, got {options!r:.80}; "
            "pass for example {'enable_thinking': False}"
        )
    own = sorted(_OWN_OPTIONS & options.keys())
    if own:
        raise InvalidInputError(
            f"chat_template_kwargs: must hold arguments of the template alone, got {own[0]!r}, which flowgraph sets; "
            "leave it out"
        )
    # Through JSON and back: tools given as functions become schemas, and the options can be written to a file.
    try:
        written = json.dumps(dict(options), default=_tool_schema, allow_nan=False, ensure_ascii=False)
        plain = json.loads(written)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"chat_template_kwargs: must hold plain JSON values and documented functions, got another ({error}); "
            "pass tools as JSON schemas"
        ) from error
    check_unicode(json.dumps(plain, ensure_ascii=False), "chat_template_kwargs", "a value")
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        _warn_unread(tokenizer, plain)
    return plain


_OWN_OPTIONS = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""Arguments of ``apply_chat_template`` that follow from the prompt, or change more than the text."""


def _tool_schema(value: Any) -> Any:
    """Convert a function to the JSON schema that transformers makes of it."""
    if not callable(value):
        raise TypeError(f"{type(value).__name__} is no JSON value")
    from transformers.utils import get_json_schema

    return get_json_schema(value)


def _warn_unread(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Warn of options that have no effect, which are often spelling errors."""
    try:
        unread = unread_options(tokenizer, options)
    except TEMPLATE_ERRORS as error:
        raise InvalidInputError(
            f"chat_template_kwargs: must choose a valid template of the tokenizer, got {str(error)!r}; "
            "check chat_template and tools"
        ) from error
    if unread:
        warnings.warn(
            f"chat_template_kwargs: the chat template reads no {', '.join(map(repr, unread))}, so it has no effect; "
            "check the name",
            UserWarning,
            stacklevel=4,
        )
