"""Text that stands twice where prompt and response meet."""

from __future__ import annotations

from typing import Any

import pytest

from flowgraph import InvalidInputError, encode
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import chat

PROMPT = "Tom has 3 apples and buys 4. How many?"
# As templates of reasoning models do, the header of the response opens its thoughts.
THINKING = tiny.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# With thoughts turned off, the header holds an empty block of them.
EMPTY = tiny.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


def tokenizer_with(template: str) -> Any:
    return tiny.with_template(tiny.byte_level(), template)


@pytest.mark.parametrize(
    ("template", "repeated", "rest"),
    [
        (THINKING, "<think>\n", "Add.\n</think>\n\nSeven."),
        (THINKING, "<|im_start|>assistant\n<think>\n", "Add.\n</think>\n\nSeven."),
        (THINKING, "\n <think>", "Add.\n</think>\n\nSeven."),
        (EMPTY, "<think>\n\n</think>\n\n", "Seven."),
        (EMPTY, "<think></think>", "Seven."),
        (tiny.CHATML, "<|im_start|>assistant\n", "Seven."),
        (THINKING.replace("<think>", "[THINK]"), "[THINK]", "Add.[/THINK]Seven."),
        (THINKING.replace("<think>", "◁think▷"), "◁think▷", "Add.◁/think▷Seven."),
    ],
)
def test_what_the_template_wrote_may_not_stand_in_the_response_again(template: str, repeated: str, rest: str) -> None:
    tokenizer = tokenizer_with(template)
    with pytest.raises(InvalidInputError, match=r"^response: must not .*; pass only what follows it, '"):
        encode(tokenizer, chat("user: 3 + 4?"), repeated + rest)
    with pytest.raises(InvalidInputError, match=r"^response: must not .*; pass only what follows it, '"):
        encode(tokenizer, [*chat("user: 3 + 4?"), {"role": "assistant", "content": repeated + rest}])

    # The remedy of the message: one header, one block.
    encoded = encode(tokenizer, chat("user: 3 + 4?"), rest)
    assert encoded.text.count("<think>") == template.count("<think>")
    assert encoded.response_text == rest
    assert encoded.origin["warnings"] == []

    # Ids may have been generated like this.
    ids = tokenizer(repeated + rest, add_special_tokens=False)["input_ids"]
    with pytest.warns(UserWarning, match=r"^response: must not "):
        encoded = encode(tokenizer, chat("user: 3 + 4?"), ids)
    assert len(encoded.origin["warnings"]) == 1


def test_the_words_of_a_header_and_a_prefill_warn() -> None:
    tokenizer = tiny.byte_level()
    with pytest.warns(
        UserWarning, match=r"^response: must not repeat the end of the prompt, got 'assistant' again; pa"
    ):
        encode(tokenizer, chat("user: 3 + 4?"), "assistant\nSeven.")
    with pytest.warns(UserWarning, match=r"got 'The sum is' again; pass only what follows it, '7.'"):
        encode(tokenizer, chat("user: 3 + 4?", "assistant: The sum is"), "The sum is 7.")
    # The same words inside a sentence are no header.
    assert encode(tokenizer, chat("user: Who?"), "assistant professors").origin["warnings"] == []


def test_a_response_that_starts_with_the_prompt() -> None:
    tokenizer = tiny.byte_level()
    message = r"^response: must not repeat the prompt, got it in front, .*; pass only what the model generated"
    ids = tokenizer(PROMPT + " Seven.")["input_ids"]
    for response in (PROMPT + " Seven.", ids):
        with pytest.warns(UserWarning, match=message):
            encode(tokenizer, PROMPT, response)

    # A decoded chat, with and without its special tokens.
    messages = chat("user: " + PROMPT)
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + "Seven."
    for response in (whole, whole.replace("<|im_start|>", "").replace("<|im_end|>", "")):
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, messages, response)
    assert encode(tokenizer, messages, "Seven.").origin["warnings"] == []


def test_padding_in_front_of_a_repeated_prompt() -> None:
    tokenizer = tiny.with_template(tiny.byte_fallback(), None)
    tokenizer.pad_token = "</s>"
    ids = [2, 2, *tokenizer("Tom has 3")["input_ids"]]
    message = r"response: ids must not repeat the prompt, got its 5 ids in front; pass generated\[0, 5:\]"
    with pytest.raises(InvalidInputError, match=message):
        encode(tokenizer, "Tom has", ids)


def test_the_token_that_opens_a_text_in_front_of_the_response() -> None:
    tokenizer = tiny.byte_fallback()
    with pytest.raises(
        InvalidInputError, match=r"^response: must not open what the prompt has opened, got '<s>' again"
    ):
        encode(tokenizer, "Tom has", "<s> 3 apples")
    # Ids of a response that was tokenized as a text of its own.
    with pytest.warns(
        UserWarning, match=r"^response: must not start with the tokens that open a text, got '<s>' in fr"
    ):
        encode(tokenizer, "Tom has", tokenizer("apples. He buys")["input_ids"])
    assert encode(tokenizer, "Tom has", " 3 apples").tokens.count("<s>") == 1


def test_tags_of_the_question_are_no_tags_of_the_response() -> None:
    tokenizer = tokenizer_with(THINKING)
    encoded = encode(tokenizer, chat("user: What does <answer> mean?"), "Hm.</think><answer>A tag.</answer>")
    assert encoded.origin["warnings"] == []
    assert encode(tiny.byte_level(), "Close the tag: <b>", "<b>bold</b>").origin["warnings"] == []
