"""Run a chat template on traced contents, to learn which characters of its output came from which message.

The template decides what it writes: transformers renders the prompt, from the messages as they are. The same template
then runs once more, in an environment with the same settings, on contents that equal the originals and keep the
origin of their characters. Both runs write the same text, so the origins of one hold for the other.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowgraph.text.spans import Offsets
from flowgraph.text.traced_text import TEMPLATE, TracedText, join, join_with, origins_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template raises for messages that it does not fit."""
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""What transformers appends to the message that the response continues, and cuts off again."""
_SEEN = "{{ {'messages': messages, 'tools': tools, 'documents': documents} | tojson }}{# content #}"
"""A template that writes what transformers hands to a template, after its conversions."""


class _TracingCodeGenerator(CodeGenerator):
    """Compile ``~`` so that it keeps origins; jinja's own function for it returns plain text."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja's name)
        """Write the call that joins the operands."""
        self.write("environment.concat(map(str, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class _GenerationBlock(Extension):
    """The tag ``{% generation %}`` of chat templates, which marks text for training and writes its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the block as its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TracingEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates, in which written text keeps its origins."""

    code_generator_class = _TracingCodeGenerator
    concat = staticmethod(join)  # type: ignore[assignment]

    def __init__(self) -> None:
        """Set what transformers documents for chat templates: whitespace control, two functions, one filter."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join_filter
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Call a function of the template; a plain text that joins parts keeps their origins."""
        is_join = isinstance(function, BuiltinMethodType) and function.__name__ == "join"
        if is_join and isinstance(function.__self__, str):
            return join_with(function.__self__, *args)
        return super().call(context, function, *args, **options)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write a value as JSON, without the HTML escapes of jinja's own filter; a text keeps its origins."""
    if not isinstance(value, TracedText):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # Each character is escaped by itself, and all signs of its escape get its origin.
    pieces = ['"']
    for character, origin in zip(value, value.origins, strict=True):
        escaped = json.dumps(character, ensure_ascii=ensure_ascii)[1:-1]
        pieces.append(TracedText(escaped, [origin] * len(escaped)))
    pieces.append('"')
    return join(pieces)


@jinja2.pass_environment
def _join_filter(
    environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """Join values as jinja's filter does, and keep origins."""
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return join_with(str(d), [str(value) for value in values])


def _raise_exception(message: str) -> None:
    """Refuse messages on behalf of a template."""
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """Write the current time."""
    return datetime.now().strftime(form)


class _Content(NamedTuple):
    """One text of a message.

    Attributes:
        message: index of the message.
        start: place of its first character among the characters of all messages.
    """

    message: int
    start: int


def content_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    rendered: str,
    options: Mapping[str, Any],
    *,
    is_continued: bool,
) -> list[tuple[int, Offsets]] | None:
    """Find the characters of a rendered prompt that messages brought.

    Args:
        tokenizer: the tokenizer that rendered the prompt.
        messages: the messages of the prompt.
        rendered: the prompt as transformers renders it.
        options: further arguments of the template.
        is_continued: whether the response continues the last message.

    Returns:
        Index of the message and its range, for each run of characters, in the order of the text. None where the
        template, run again, does not write the same text.

    Cost: two runs of the template, and a few operations for each character.
    """
    # A template that only prints its input shows the messages as the template itself would see them.
    try:
        conversation: Any = list(messages)
        seeing = {**options, "chat_template": _SEEN}
        shown = tokenizer.apply_chat_template(conversation, tokenize=False, **seeing)
        seen = json.loads(str(shown))
        origins = _rendered_origins(tokenizer, seen, rendered, options, is_continued)
    except TEMPLATE_ERRORS:
        return None
    if origins is None:
        return None

    # One run for each stretch of characters from one text; a text that is written twice makes two runs.
    contents = _contents_in_order(seen["messages"])
    starts = [content.start for content in contents]
    spans: list[tuple[int, Offsets]] = []
    last_content = None
    last_origin = TEMPLATE
    for place, origin in enumerate(origins):
        content = None
        if origin != TEMPLATE:
            content = contents[bisect_right(starts, origin) - 1]

        # A run goes on until its text ends, or starts again.
        is_start = content is not None and origin == content.start and origin != last_origin
        if content is not None and content == last_content and not is_start:
            message, (start, _) = spans[-1]
            spans[-1] = (message, (start, place + 1))
        elif content is not None:
            spans.append((content.message, (place, place + 1)))
        last_content = content
        last_origin = origin
    return spans


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template, which takes longer than to run it."""
    return _TracingEnvironment().from_string(source)


def _rendered_origins(
    tokenizer: PreTrainedTokenizerBase,
    seen: dict[str, Any],
    rendered: str,
    options: Mapping[str, Any],
    is_continued: bool,
) -> Sequence[int] | None:
    """Run the template on traced contents; None where it writes another text than ``rendered``."""
    template = _compiled(template_of(tokenizer, options))
    arguments = {**tokenizer.special_tokens_map, **_template_arguments(options)}
    arguments |= {"tools": seen["tools"], "documents": seen["documents"], "add_generation_prompt": not is_continued}

    # transformers marks the end of a message to be continued; versions differ in this, so both forms are tried.
    endings = (_CONTINUED, "") if is_continued else ("",)
    for ending in endings:
        traced = _traced_messages(seen["messages"], ending)
        text = template.render(messages=traced, **arguments)
        is_same = text.startswith(rendered) if is_continued else text == rendered
        if is_same:
            return origins_of(text)[: len(rendered)]
    return None


def _contents_in_order(messages: list[dict[str, Any]]) -> list[_Content]:
    """List the texts of all messages that are not empty."""
    contents = []
    start = 0
    for number, message in enumerate(messages):
        for text in _texts(message):
            if text:
                contents.append(_Content(number, start))
            start += len(text)
    return contents


def _texts(message: Mapping[str, Any]) -> list[str]:
    """List the texts of a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if _is_text_part(part)]


def _is_text_part(part: Any) -> bool:
    """Return whether a part of a content holds text."""
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _traced_messages(messages: list[dict[str, Any]], ending: str) -> list[dict[str, Any]]:
    """Copy messages with contents that keep their origin; ``ending`` follows the last text."""
    # The texts in order, each character with its place among all of them.
    texts: list[str] = []
    start = 0
    for message in messages:
        for text in _texts(message):
            texts.append(TracedText(text, range(start, start + len(text))))
            start += len(text)
    if texts:
        texts[-1] = texts[-1] + ending

    # The same messages with the traced texts in the places of the plain ones.
    remaining = iter(texts)
    traced = []
    for message in messages:
        copied = dict(message)
        if isinstance(message.get("content"), str):
            copied["content"] = next(remaining)
        elif isinstance(message.get("content"), list):
            copied["content"] = []
            for part in message["content"]:
                copied_part = part
                if _is_text_part(part):
                    copied_part = {**part, "text": next(remaining)}
                copied["content"].append(copied_part)
        traced.append(copied)
    return traced


def template_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return the source of the template that these options choose."""
    return str(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))


def _template_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """List the options that reach the template under their own name."""
    return {name: value for name, value in options.items() if name not in ("chat_template", "tools", "documents")}


def unread_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[str]:
    """List the options that the template never reads.

    Raises:
        jinja2.TemplateError, ValueError: no such template, or an invalid one.
    """
    environment = _TracingEnvironment()
    read = meta.find_undeclared_variables(environment.parse(template_of(tokenizer, options)))
    return sorted(name for name in _template_arguments(options) if name not in read)
