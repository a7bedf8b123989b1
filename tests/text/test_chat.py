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


# A message without text gets no line break (Qwen 2.5), the system prompt decides on the thoughts (SmolLM3), and an
# assistant's message is taken apart at its thoughts (Qwen 3).
WITHOUT_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
)
BY_CONTENT = (
    "{% set s = messages[0].content %}{{ 'off' if '/no_think' in s else 'on' }}: {{ s.replace('/no_think', '') }}"
    "{% for m in messages[1:] %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)
TAKEN_APART = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content }}"
    "\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% if not (loop.last and m.role == 'assistant') %}[end]{% endif %}{% endfor %}"
)


class TestTemplatesThatReadContents:
    """What a template writes may depend on a content; transformers alone decides."""

    def test_a_message_without_text(self) -> None:
        call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
        messages = [
            *chat("user: Weather?"),
            {"role": "assistant", "content": "", "tool_calls": call},
            *chat("tool: 18 C"),
        ]
        encoded = encode(tiny.with_template(tiny.byte_level(), WITHOUT_TEXT), messages, "18.")
        assert "<|im_start|>assistant<call>weather</call><|im_end|>" in encoded.prompt_text
        assert contents(encoded) == [("user", "Weather?"), ("assistant", ""), ("tool", "18 C")]
        assert not_special(encoded) == "Weather?18 C18."

    def test_a_word_in_the_system_prompt(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), BY_CONTENT)
        encoded = encode(tokenizer, chat("system: Be brief. /no_think", "user: Off?"), "7")
        assert encoded.prompt_text == "off: Be brief. [user]Off?[assistant]"
        assert contents(encoded) == [("system", "Be brief. "), ("user", "Off?")]

    def test_a_prefill_that_closes_its_thoughts(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), TAKEN_APART)
        prefill = "<think>\nI know.\n</think>\n\nIn Paris"
        encoded = encode(tokenizer, chat("user: Weather?", f"assistant: {prefill}"), " 18 C.")
        assert encoded.prompt_text == f"[user]Weather?[end][assistant]{prefill}"
        assert contents(encoded) == [("user", "Weather?"), ("assistant", "I know."), ("assistant", "In Paris")]


class TestTemplateArguments:
    THINKING = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}"
    )

    def test_they_reach_the_template_and_the_record(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), self.THINKING)
        messages = chat("user: How many?")
        plain = encode(tokenizer, messages, "7")
        off = encode(tokenizer, messages, "7", chat_template_kwargs={"enable_thinking": False})
        assert off.prompt_text == plain.prompt_text + "<think></think>"
        assert contents(off) == [("user", "How many?")]
        assert off.origin["chat_template_kwargs"] == {"enable_thinking": False}
        assert off.origin["chat_template"].startswith("sha256:")

    def test_another_template_by_its_name_or_its_text(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), None)
        tokenizer.chat_template = {"default": tiny.CHATML, "short": "[{{ messages[0].content }}]"}  # type: ignore[assignment]
        named = encode(tokenizer, chat("user: a"), "7", chat_template_kwargs={"chat_template": "short"})
        given = encode(
            tokenizer, chat("user: a"), "7", chat_template_kwargs={"chat_template": "{{ messages[0].content }}"}
        )
        assert (named.prompt_text, given.prompt_text) == ("[a]", "a")
        assert contents(named) == contents(given) == [("user", "a")]

    def test_functions_become_their_schemas(self) -> None:
        def add(a: int) -> int:
            """Add one.

            Args:
                a: a number.
            """
            return a + 1

        tokenizer = tiny.with_template(tiny.byte_level(), self.THINKING)
        messages = chat("user: How many?")
        encoded = encode(tokenizer, messages, "7", chat_template_kwargs={"tools": [add]})
        assert encoded.prompt_text == tokenizer.apply_chat_template(
            messages, tools=[add], tokenize=False, add_generation_prompt=True
        )
        assert encoded.origin["chat_template_kwargs"]["tools"][0]["function"]["name"] == "add"

    def test_an_unread_argument_warns(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), self.THINKING)
        message = r"^chat_template_kwargs: the chat template reads no 'enable_thinkng', so it has no effect; check the"
        with pytest.warns(UserWarning, match=message):
            encode(tokenizer, chat("user: How many?"), "7", chat_template_kwargs={"enable_thinkng": False})

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            (chat("user: a"), ["x"], r"chat_template_kwargs: must be a dict of template arguments, got \['x'\]; pass"),
            (chat("user: a"), {1: 2}, r"chat_template_kwargs: must be a dict of template arguments, got \{1: 2\}"),
            (chat("user: a"), {"tokenize": True}, r"must hold arguments of the template alone, got 'tokenize', which"),
            (chat("user: a"), {"tools": [object()]}, r"must hold plain JSON values and documented functions, got anot"),
            (
                chat("user: a"),
                {"tools": "\ud83d"},
                r"chat_template_kwargs: a value must be complete Unicode characters",
            ),
            ("a", {"enable_thinking": True}, r"chat_template_kwargs: go with chat messages, got \['enable_thinking'\]"),
        ],
    )
    def test_what_are_no_arguments(self, prompt: Any, options: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), prompt, "7", chat_template_kwargs=options)


class TestRefused:
    def test_a_template_that_never_writes_the_same(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), "{{ range(99999) | random }}{{ messages[0].content }}")
        with pytest.raises(
            InvalidInputError, match=r"^prompt: the chat template must write the same text each time, .*"
        ):
            encode(tokenizer, chat("user: Tom"), "7")

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

    def test_a_template_that_fails_in_its_own_way(self) -> None:
        message = r"must fit the tokenizer's chat template, got its error .*; change the messages"
        for template in ("{{ 1 // 0 }}", "{{ range(10**9) }}", "{{ messages[0].content / 2 }}"):
            with pytest.raises(InvalidInputError, match=message):
                encode(tiny.with_template(tiny.byte_level(), template), chat("user: Tom"), "7")

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
