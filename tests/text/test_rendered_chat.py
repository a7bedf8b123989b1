"""Prompts that a template has rendered already: their messages are found, and the template is not applied again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from flowgraph import encode, find_regions
from flowgraph.text.rendered_chat import recognise_rendered
from flowgraph.text.template_origins import content_spans
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import chat, contents, text_of

CONVERSATIONS = [
    chat("user: How many?"),
    chat("system: Be brief.", "user: How many?"),
    chat("user: How many?", "assistant: Seven.", "user: Why?"),
    chat("system: Be brief.", "user: How many?", "assistant: Seven.", "user: Why?\n\nSay it."),
    chat("user: How many?", "assistant: It is"),
]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    is_continued = messages[-1]["role"] == "assistant"
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            **options,
        )
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [tiny.CHATML, tiny.STRIPPING])
def test_a_rendered_prompt_is_the_chat_it_was_made_from(template: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = tiny.with_template(tiny.byte_level(), template)
    as_text = encode(tokenizer, rendered(tokenizer, messages), " Because.")
    as_chat = encode(tokenizer, messages, " Because.")
    assert contents(as_text) == contents(as_chat)
    assert as_text.text == as_chat.text
    assert as_text.input_ids.tolist() == as_chat.input_ids.tolist()
    assert as_text.special.tolist() == as_chat.special.tolist()
    assert as_text.origin["prompt"] == "rendered chat"
    assert as_text.origin["rendered_exactly"]
    regions = find_regions(as_text, answer="Because")
    last_question = [message["content"] for message in messages if message["role"] == "user"][-1]
    assert "".join(text_of(as_text, regions.question).split()) == "".join(last_question.split())
    assert regions.question_selector == "auto: Role(role='user')"


def test_a_tokenizer_that_opens_texts_opens_a_rendered_prompt_once() -> None:
    tokenizer = tiny.byte_fallback()
    text = rendered(tokenizer, chat("user: Tom has 3."))
    assert text.startswith("<s>")
    encoded = encode(tokenizer, text, " 7")
    assert encoded.input_ids.tolist() == encode(tokenizer, chat("user: Tom has 3."), " 7").input_ids.tolist()
    assert encoded.tokens.count("<s>") == 1
    # Without its opening token, the tokenizer adds it.
    assert encode(tokenizer, text.removeprefix("<s>"), " 7").tokens[0] == "<s>"


def test_another_system_prompt_is_no_part_of_the_question() -> None:
    text = "<|im_start|>system\nToday: Monday<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    template = (
        "<|im_start|>system\nToday: Friday<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    encoded = encode(tiny.with_template(tiny.byte_level(), template), text, "7")
    assert contents(encoded) == [("user", "How many?")]
    assert not encoded.origin["rendered_exactly"]


@pytest.mark.parametrize(
    "text",
    ["How many?", "user\nHow many?", "Tom <b>has</b> 3 [INST] apples", "{{ messages[0].content }}", "7"],
)
@pytest.mark.parametrize("template", [tiny.CHATML, tiny.STRIPPING, "{{ messages[-1].content }}", None])
def test_other_texts_are_texts(template: str | None, text: str) -> None:
    tokenizer = tiny.with_template(tiny.byte_level(), template)
    assert recognise_rendered(tokenizer, text) is None
    assert encode(tokenizer, text, "7").origin["prompt"] == "text"


def test_a_prompt_without_the_header_of_the_response_warns() -> None:
    tokenizer = tiny.byte_level()
    text = str(tokenizer.apply_chat_template(chat("user: How many?"), tokenize=False))
    with pytest.warns(UserWarning, match=r"^prompt: a rendered chat must end with the generation prompt, got one that"):
        encoded = encode(tokenizer, text, "7")
    assert contents(encoded) == [("user", "How many?")]


def test_a_rendered_prompt_as_a_message_warns_and_as_text_does_not() -> None:
    tokenizer = tiny.byte_level()
    text = rendered(tokenizer, chat("user: How many?"))
    with pytest.warns(
        UserWarning, match=r"^prompt: message 0 must hold its own text, got a rendered chat, .*; pass the"
    ):
        encode(tokenizer, [{"role": "user", "content": text}], "7")


def test_special_tokens_that_name_roles_warn_where_no_message_was_found() -> None:
    text = "<|im_start|>human\nHow many?<|im_end|>"
    tokenizer = tiny.with_template(tiny.byte_level(), None)
    with pytest.warns(
        UserWarning, match=r"^prompt: a rendered chat must follow the tokenizer's chat template .*; pass"
    ):
        encode(tokenizer, text, "7")


def published_templates() -> list[Path]:
    """Templates of published models, as the package trl ships them for its own tests."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    templates = sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))
    # Templates of images take other contents.
    return [path for path in templates if not path.stem.startswith(("idefics3", "llava_next", "smolvlm"))]


@pytest.mark.parametrize("path", published_templates(), ids=lambda path: path.stem)
def test_published_templates_are_followed_exactly(path: Path) -> None:
    tokenizer = tiny.with_template(tiny.byte_level(), path.read_text(encoding="utf-8"))
    tokenizer.bos_token = "<|im_start|>"
    thought = "assistant: <think>\nhm\n</think>\n\nSeven."
    for turns in (("user: How many?",), ("user: How many?", thought, "user: Why?"), ("user: How?", "assistant: It is")):
        messages = chat(*turns)
        text = rendered(tokenizer, messages)
        spans = content_spans(tokenizer, messages, text, {}, is_continued=messages[-1]["role"] == "assistant")
        assert spans is not None
        questions = [text[start:end] for number, (start, end) in spans if messages[number]["role"] == "user"]
        assert questions == [message["content"] for message in messages if message["role"] == "user"]

        # The same text as a string.
        recognised = recognise_rendered(tokenizer, text)
        assert recognised is not None
        assert recognised.is_exact
        assert [text[r.start : r.end].strip() for r in recognised.roles if r.role == "user"] == questions
