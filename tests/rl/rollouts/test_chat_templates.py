"""Options of the chat template reach every place that renders a prompt (slime#609)."""

from __future__ import annotations

import copy

import pytest

from rl import ConfigError, PPOConfig, PPOTrainer, Sample, evaluate
from rl.rollouts.chat_templates import with_template_options
from rl.rollouts.rollout import PromptEncoder
from tests.fixtures.policies import Digits
from tests.fixtures.tiny import tiny
from tests.fixtures.tokenizers import byte_level, with_template

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}(brief)"
    "{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What is 1+2?"}]


def tokenizer():
    return with_template(byte_level(), TEMPLATE)


class Chat(Digits):
    def sample(self, split: str, index: int) -> Sample:
        return Sample(index, MESSAGES, "3")


def test_the_prompt_is_rendered_with_the_options():
    model, _ = tiny()
    plain = tokenizer()
    brief = with_template_options(plain, {"enable_thinking": False})
    for made, end in ((brief, "[assistant](brief)"), (plain, "[assistant]")):
        ids = PromptEncoder(made, model, 128, 16).ids(Sample(0, MESSAGES, "3"))
        assert made.decode(ids).endswith(end)
    assert with_template_options(plain, {}) is plain
    own = with_template_options(plain, {"chat_template": "{{ messages[0].content }}!"})
    assert own.decode(PromptEncoder(own, model, 128, 16).ids(Sample(0, MESSAGES, "3"))).endswith("1+2?!")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -2.5e-7,
        "",
        'say "%}" }} {# \\n\n\t\u00e9\U0001f34e',
        [1, [None, "a"]],
        {"a b": {"c": [True]}, "d": "e"},
    ],
)
@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}{% endif %}", "  "])
def test_a_value_reaches_the_template_as_transformers_would_pass_it(value: object, start: str):
    text = (
        start
        + "{{ option | tojson }}{% for message in messages %}{{ message.content }}{{ option is none }}{% endfor %}"
    )
    plain = with_template(byte_level(), text)
    made = with_template_options(plain, {"option": value})
    expected = plain.apply_chat_template(MESSAGES, tokenize=False, option=value)
    assert made.apply_chat_template(MESSAGES, tokenize=False) == expected
    assert plain.chat_template == text


def test_a_named_template_is_chosen():
    plain = tokenizer()
    plain.chat_template = {"default": TEMPLATE, "short": "{{ messages[0].content }}{{ enable_thinking }}"}
    options = {"chat_template": "short", "enable_thinking": False}
    made = with_template_options(plain, options)
    assert made.apply_chat_template(MESSAGES, tokenize=False) == plain.apply_chat_template(
        MESSAGES, tokenize=False, **options
    )
    both = with_template_options(plain, {"enable_thinking": False})
    rendered = both.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("[assistant](brief)")


def test_training_and_evaluation_read_the_options():
    options = {"enable_thinking": False}
    settings = PPOConfig(
        steps=1, num_prompts=1, group_size=2, max_response_tokens=4, advantage="group", chat_template_kwargs=options
    )
    model = copy.deepcopy(tiny()[0])
    run = PPOTrainer(model, tokenizer(), task=Chat(), config=settings, progress=False)
    responses = run.collect().responses
    assert "(brief)" in run.tokenizer.decode(responses.input_ids[0])
    found = evaluate(model, tokenizer(), Chat(), num_problems=1, max_response_tokens=4, chat_template_kwargs=options)
    assert found.num_problems == 1


def test_options_that_would_be_ignored_are_refused():
    plain = tokenizer()
    for options, message in (
        (
            {"enable_thinkng": False},
            r"must be options that the chat template reads, got 'enable_thinkng', which does not",
        ),
        (
            {"tokenize": True},
            r"must be options of the chat template, got 'tokenize', which rollouts set themselves; leave",
        ),
    ):
        with pytest.raises(ConfigError, match=f"chat_template_kwargs: {message}"):
            with_template_options(plain, options)
    with pytest.raises(
        ConfigError, match=r"must be left out for a tokenizer without a chat template, got \{'a': 1\}; set"
    ):
        with_template_options(with_template(byte_level(), None), {"a": 1})
