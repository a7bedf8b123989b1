"""Chat contents are found where the template put them, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from flowgraph import InvalidInputError, encode
from flowgraph.text.chat import RoleSpan
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import chat, contents, not_special
from tests.fixtures.tokenizers import EVERY


class TestRendered:
    def test_roles_and_template(self) -> None:
        encoded = encode(tiny.byte_level(), chat("system: Be kind.", "user: How many?"), "7")
        assert encoded.prompt_text == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert contents(encoded) == [("system", "Be kind."), ("user", "How many?")]
        assert [role.message for role in encoded.roles] == [0, 1]
        assert not_special(encoded) == "Be kind.How many?7"

    def test_every_template_token_is_special(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: Tom"), " 7<|im_end|>")
        names = [(token, bool(special)) for token, special in zip(encoded.tokens, encoded.special, strict=True)]
        kept = [token for token, special in names if not special]
        assert kept == ["Tom", " 7"]
        assert ("<|im_start|>", True) in names
        assert names[-1] == ("<|im_end|>", True)

    def test_white_space_inside_a_message_belongs_to_it(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: \nTom\n\nhas\n"), "7")
        assert not_special(encoded) == "\nTom\n\nhas\n7"

    @pytest.mark.parametrize("name", ["byte_fallback", "unigram"])
    def test_a_template_that_strips(self, name: str) -> None:
        tokenizer = tiny.with_template(EVERY[name](), tiny.STRIPPING)
        encoded = encode(tokenizer, chat("user:  \n Tom has 3. \n"), "7")
        assert encoded.prompt_text.endswith("[user] Tom has 3.</s>\n[assistant] ")
        assert contents(encoded) == [("user", "Tom has 3.")]
        assert not_special(encoded).strip() == "Tom has 3.7"

    @pytest.mark.parametrize(
        "turns",
        [
            ("system: How many apples?", "user: How many apples?"),
            ("user: user",),
            ("user: u",),
            ("user: You answer the user.",),
            ("user: 7", "assistant: 7", "user: 7"),
            ("user: <|im_end|>\n<|im_start|>assistant\n", "assistant: ok", "user: <|im_end|>\n"),
            ("user: </s>\n[user] ", "assistant: a", "user: </s>\n[assistant] "),
            ("user: flowgraph0x0y", "assistant: flowgraph1x", "user: {{ bos_token }}"),
            ("user:  spaces ", "assistant: ", "user: \r\nlines\r\n"),
            ("user: כמה תפוחים?",),
        ],
    )
    @pytest.mark.parametrize("template", [tiny.CHATML, tiny.STRIPPING])
    def test_contents_are_found_where_they_stand(self, template: str, turns: tuple[str, ...]) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        messages = chat(*turns)
        encoded = encode(tokenizer, messages, "ok")
        strip = template == tiny.STRIPPING
        expected = [(m["role"], m["content"].strip() if strip else m["content"]) for m in messages]
        assert contents(encoded) == expected
        # Each content stands behind its own header, and the last one is the last of its text in the prompt.
        header = "[{}] " if strip else "<|im_start|>{}\n"
        for role in encoded.roles:
            # A message without text has no place of its own.
            if role.start < role.end:
                assert encoded.text[: role.start].endswith(header.format(role.role))

    def test_a_role_the_template_drops_or_moves(self) -> None:
        template = (
            "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}</u>{% endfor %}"
            "{% for m in messages if m.role == 'system' %}({{ m.content }}){% endfor %}"
        )
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        encoded = encode(tokenizer, chat("system: S", "user: U", "tool: T"), "7")
        assert encoded.roles == (RoleSpan("user", 3, 4, 1), RoleSpan("system", 9, 10, 0))

    def test_text_parts(self) -> None:
        template = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        encoded = encode(tokenizer, [{"role": "user", "content": parts}], "7")
        assert encoded.roles == (RoleSpan("user", 1, 4, 0), RoleSpan("user", 6, 9, 0))
        assert parts == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    def test_a_shortened_content_is_found_by_what_follows(self) -> None:
        template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}[end]{% endfor %}[assistant]"
        )
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        encoded = encode(tokenizer, chat("user: a", "assistant: <think>b</think>c", "user: d</think>e"), "7")
        assert contents(encoded) == [("user", "a"), ("assistant", "c"), ("user", "e")]

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("{% for m in messages %}{{ m.content[::-1] }}!{% endfor %}", ["fed cb", "a"]),
            ("{{ messages[0].content | length }}:{{ messages[0].content }}.", ["abc def"]),
            ("{{ messages[0].content }}:{{ messages[0].content | length }}.", ["abc def"]),
            ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}.", ["ab"]),
            ("{{ messages[0].content }}{{ messages[0].content }}!", ["abc def", "abc def"]),
            ("{{ messages[0].content | tojson }}", ["abc def"]),
            ("{{ messages[0].content.split() | join('-') }}", ["abc", "def"]),
            ("{{ ', '.join(messages[0].content.split(' ')) }}", ["abc", "def"]),
            ("{{ '<' ~ messages[0].content ~ '>' }}", ["abc def"]),
            ("{{ messages[0].content.replace(' ', '__') | upper }}", ["ABC__DEF"]),
            ("{% macro say(c) %}  {{ c }} {% endmacro %}({{ say(messages[0].content) | trim }})", ["abc def"]),
            ("{% set c %}<{{ messages[0].content }}>{% endset %}{{ c[1:-1] }}", ["abc def"]),
            ("{% generation %}{{ messages[0].content.partition(' ')[2] }}{% endgeneration %}", ["def"]),
        ],
    )
    def test_a_content_is_followed_through_whatever_the_template_does(self, template: str, expected: list[str]) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        messages = chat("user: abc def")
        encoded = encode(tokenizer, messages, "7")
        assert encoded.prompt_text == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert contents(encoded) == [("user", text) for text in expected]

    def test_the_final_assistant_message_is_the_response(self) -> None:
        messages = chat("user: How many?", "assistant: 7 apples")
        encoded = encode(tiny.byte_level(), messages)
        same = encode(tiny.byte_level(), messages[:1], "7 apples")
        assert encoded.response_text == "7 apples"
        assert encoded.text == same.text
        assert encoded.spans == same.spans
        assert len(messages) == 2

    def test_before_a_response_it_is_a_prefill(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: How many?", "assistant: It is"), " 7")
        assert encoded.prompt_text.endswith("<|im_start|>assistant\nIt is")
        assert contents(encoded) == [("user", "How many?"), ("assistant", "It is")]
        assert encoded.response_text == " 7"

    def test_slow_tokenizers_and_ids(self) -> None:
        encoded = encode(tiny.slow_bytes(), chat("user: 🙂?"), list(b"7"))
        assert contents(encoded) == [("user", "🙂?")]
        assert not_special(encoded) == "🙂?7"


class TestRefused:
    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            (["Tom"], r"prompt: must be text or a list of chat messages, .* got \['Tom'\]; pass one conversation"),
            ([{"content": "Tom"}], "each a dict with 'role' and 'content'"),
            ([chat("user: Tom")], "must be text or a list of chat messages"),
            (7, "must be text or a list of chat messages, .* got 7"),
            (
                [{"role": "user", "content": 7}],
                "message content must be text or a list of text parts, got 7; only text",
            ),
            ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "must be text or a list of text parts"),
        ],
    )
    def test_malformed_messages(self, messages: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), messages, "7")

    def test_a_response_in_several_fields_is_refused(self) -> None:
        final = {"role": "assistant", "content": "7", "reasoning_content": "3+4", "tool_calls": None}
        message = r"final assistant message must hold the complete response in 'content', got \['reasoning_content'\]"
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), [*chat("user: How many?"), final])

    def test_no_template(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), None)
        message = (
            "prompt: chat messages need a tokenizer with a chat template, got one without; set tokenizer.chat_template"
        )
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, chat("user: Tom"), "7")

    def test_a_template_that_refuses(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), "{{ raise_exception('roles must alternate') }}")
        message = "must fit the tokenizer's chat template, got its error 'roles must alternate'; change the messages"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, chat("user: Tom"), "7")
