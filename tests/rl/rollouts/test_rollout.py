"""Text and token positions meet in one place: regions, verdicts and known tokens stand where the text says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl import JsonlTask, PolicyError, Responses, RewardError, Sample, TaskError
from rl.policy.sampling import Generated
from rl.rollouts.rollout import PromptEncoder, draw_samples, join, judge, sample_responses
from rl.tasks.answers import find_answer
from tests.fixtures.policies import FAMILIES, Digits, alphabet, tiny_policy
from tests.fixtures.tiny import chat, tiny
from tests.fixtures.tokenizers import CHATML, STRIPPING, byte_level, unigram, with_template

TOKENIZER = alphabet()
EOS = 1


def written(prompts: list[str], texts: list[str], *, ended: bool = True, extra: int = 0) -> Generated:
    """What a policy would have made of these prompts, had it answered so, with more padding on both sides."""
    asked = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    said = [TOKENIZER(text)["input_ids"] + [EOS] * ended for text in texts]
    P, R = max(map(len, asked)) + extra, max(map(len, said)) + extra
    ids = torch.zeros(len(prompts), P + R, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(asked, said, strict=True)):
        ids[row, P - len(prompt) : P + len(response)] = torch.tensor(prompt + response)
        mask[row, P - len(prompt) : P + len(response)] = True
    return Generated(ids, mask, P, mask[:, P:], torch.full((len(prompts),), not ended))


def judged(task: Digits, texts: list[str], **options) -> Responses:
    samples = [task.sample("train", index) for index in range(len(texts))]
    return judge(task, TOKENIZER, samples, written([str(sample.prompt) for sample in samples], texts, **options))


def chosen(responses: Responses, mask: Tensor) -> list[str]:
    """The text of the tokens in a mask over all columns, for each sequence."""
    return [
        "".join(TOKENIZER.convert_ids_to_tokens(ids[row].tolist()))
        for ids, row in zip(responses.input_ids, mask, strict=True)
    ]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("ended", [True, False])
def test_regions_rewards_and_known_tokens_under_left_padding(extra: int, ended: bool):
    responses = judged(Digits(), ["a=1,b2", "=", "c5c8"], ended=ended, extra=extra)
    assert responses.completions == ("a=1,b2", "=", "c5c8")
    assert responses.rewards.tolist() == [1.0, 0.0, 1.0]
    assert chosen(responses, responses.question) == ["a=1;b=2;a?", "b=7;b?", "c=4;d=c+1;e=9;d?"]
    assert chosen(responses, responses.answer) == ["2", "", "8"]
    assert responses.answer_in_response.nonzero().tolist() == [[0, 5], [2, 3]]
    assert responses.oracle is not None
    assert responses.oracle.nonzero().tolist() == [[0, 0], [0, 4], [2, 0], [2, 2]]
    assert responses.groups.tolist() == [0, 1, 2]
    assert responses.truncated.tolist() == [not ended] * 3
    assert not (responses.question & responses.generated).any()


def test_empty_responses_have_no_answer_and_are_judged():
    responses = judged(Digits(), ["", "4", ""])
    assert responses.completions == ("", "4", "")
    assert responses.rewards.tolist() == [0.0, 1.0, 0.0]
    assert responses.answer.any(1).tolist() == [False, True, False]


class Task(Digits):
    """Answers, known tokens and verdicts of one's choice; a method that is given an exception raises it."""

    def __init__(self, **choices) -> None:
        super().__init__()
        object.__setattr__(self, "choices", choices)

    def _choice(self, name, default):
        value = self.choices.get(name, default)
        if isinstance(value, Exception):
            raise value
        return value

    def find_answer(self, completion):
        return self._choice("find_answer", None)

    def oracle(self, sample, completion):
        return self._choice("oracle", None)

    def reward(self, sample, completion):
        return self._choice("reward", 0.0)


class Wandering(Task):
    """A task that knows unused work too."""

    def detours(self, sample, completion):
        return self._choice("detours", None)


def test_a_task_that_knows_nothing_gives_no_oracle():
    assert judged(Task(), ["a=1"]).oracle is None
    assert judged(Task(), ["a=1"]).detours is None
    assert judged(Wandering(), ["a=1"]).detours is None
    known = judged(Task(oracle=[]), ["a=1"]).oracle
    assert known is not None
    assert not known.any()


@pytest.mark.parametrize(("span", "expected"), [((0, 1), "a"), ((1, 3), "=1"), ((0, 3), "a=1"), ([2, 3], "1")])
def test_spans_become_tokens(span, expected: str):
    responses = judged(Task(find_answer=span, oracle=[span]), ["a=1"])
    assert chosen(responses, responses.answer) == [expected]
    assert responses.oracle is not None
    assert int(responses.oracle.sum()) == len(expected)


def test_detours_become_tokens_where_the_task_knows_them():
    class Letters(Digits):
        """Unused work: every "c"; nothing is known of a response without a letter."""

        def detours(self, sample, completion):
            places = [(place, place + 1) for place, character in enumerate(completion) if character == "c"]
            return places if any(map(str.isalpha, completion)) else None

    responses = judged(Letters(), ["a=1,c2", "1c8c", "=", "b"], extra=2)
    assert responses.detours is not None
    assert responses.detours.nonzero().tolist() == [[0, 4], [1, 1], [1, 3]]
    assert responses.detours.shape == responses.response_mask.shape
    assert judged(Letters(), ["=", "12"]).detours is None
    assert judged(Digits(), ["c"]).detours is None
    part = responses.select([1, 2]).detours
    assert part is not None
    assert part.nonzero().tolist() == [[0, 1], [0, 3]]


def test_a_span_without_a_character_is_no_answer():
    assert not judged(Task(find_answer=(1, 1)), ["a=1"]).answer.any()
    empty = judged(Task(oracle=[(1, 1)]), ["a=1"]).oracle
    assert empty is not None
    assert not empty.any()


@pytest.mark.parametrize(
    "span", [(0, 4), (-1, 2), (2, 1), (0.0, 1), (True, 2), (0,), (0, 1, 2), "a", 3, ("0", "1"), False, ()]
)
@pytest.mark.parametrize("method", ["find_answer", "oracle", "detours"])
def test_spans_that_are_none_of_the_text_are_refused(method: str, span):
    task = Wandering(**{method: span if method == "find_answer" else [span]})
    message = rf"task: {method} must return spans .* within the completion of 3 characters, got .*sample 0 and 'a=1'"
    with pytest.raises(RewardError, match=message):
        judged(task, ["a=1"])


@pytest.mark.parametrize("method", ["oracle", "detours"])
def test_known_tokens_must_be_a_list(method: str):
    for value, kind in ((3, "int"), ("ab", "str"), ({(0, 1)}, "set")):
        with pytest.raises(
            RewardError, match=f"task: {method} must return a list of spans or None, got {kind} for sample 0"
        ):
            judged(Wandering(**{method: value}), ["a=1"])


@pytest.mark.parametrize("method", ["find_answer", "oracle", "detours", "reward"])
def test_a_task_that_raises_is_named_with_the_problem(method: str):
    with pytest.raises(RewardError, match=r"KeyError: 'lost'") as raised:
        judged(Wandering(**{method: KeyError("lost")}), ["a=1"])
    assert isinstance(raised.value.__cause__, KeyError)
    assert "sample" in str(raised.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("value", [None, "1", float("inf"), float("nan"), [1.0], 1j])
def test_a_verdict_that_is_no_number_is_refused(value):
    with pytest.raises(RewardError, match="must return a"):
        judged(Task(reward=value), ["a=1"])


def test_chat_prompts_enter_with_their_template_and_the_question_is_the_users():
    model, tokenizer = tiny()

    class Apples(Digits):
        def sample(self, split, index):
            return Sample(index, chat() if index else chat("How many?"), "7")

        def find_answer(self, completion):
            place = completion.find("7")
            return None if place < 0 else (place, place + 1)

        def reward(self, sample, completion):
            return float("7" in completion)

        def oracle(self, sample, completion):
            return None

    encoder = PromptEncoder(tokenizer, model, 128, 16)
    samples = [Apples().sample("train", index) for index in (0, 1)]
    prompts = [encoder.ids(sample) for sample in samples]
    assert "<|im_start|>assistant" in tokenizer.decode(prompts[0])
    said = [tokenizer(text)["input_ids"] + [encoder.ending.end_ids[0]] for text in ("It is 7.", "none")]
    P, R = max(map(len, prompts)), max(map(len, said))
    ids = torch.full((2, P + R), encoder.ending.pad_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in (0, 1):
        where = slice(P - len(prompts[row]), P + len(said[row]))
        ids[row, where], mask[row, where] = torch.tensor(prompts[row] + said[row]), True
    responses = judge(Apples(), tokenizer, samples, Generated(ids, mask, P, mask[:, P:], torch.zeros(2).bool()))
    assert responses.completions == ("It is 7.", "none")
    assert responses.rewards.tolist() == [1.0, 0.0]
    assert "How many?" in tokenizer.decode(ids[0][responses.question[0]])
    assert "im_start" not in tokenizer.decode(ids[0][responses.question[0]])
    assert "7" in tokenizer.decode(ids[0][responses.answer[0]])
    assert not responses.answer[1].any()
    assert not (responses.question & ~responses.attention_mask).any()


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "unigram", "stripping"])
def test_every_kind_of_tokenizer_gives_the_same_prompt_with_and_without_a_response(kind: str):
    tokenizer = {
        "bytes": byte_level, "trimmed": lambda: byte_level(trim_offsets=True),
        "unigram": unigram, "stripping": lambda: with_template(unigram(), STRIPPING),
    }[kind]()  # fmt: skip
    model, _ = tiny()
    prompt = chat() if tokenizer.chat_template else "Tom has 3 apples."
    encoder = PromptEncoder(tokenizer, model, 200, 16)
    ids = encoder.ids(Sample(0, prompt, "7"))
    if isinstance(prompt, list):
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        expected = tokenizer(prompt)["input_ids"]
    assert ids == list(expected)[: len(ids)]
    assert len(ids) >= len(expected) - 1  # an end token behind a prompt is left out


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_the_batch_changes_no_response(family: str):
    model = tiny_policy(family)
    encoder = PromptEncoder(TOKENIZER, model, 100, 12)
    samples = [Digits().sample("train", index) for index in range(3)]
    settings = {"group_size": 2, "max_response_tokens": 12, "temperature": 1.0, "seed": 0, "step": 4}
    whole = sample_responses(model, encoder, samples, **settings)
    cut = sample_responses(model, encoder, samples, **settings, batch_size=2)
    for name in ("input_ids", "attention_mask", "response_mask", "truncated"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert whole.input_ids[0].tolist() != whole.input_ids[1].tolist(), (
        "the responses to one problem have noise of their own"
    )
    other = sample_responses(model, encoder, samples, **(settings | {"step": 5}))
    assert not torch.equal(whole.input_ids, other.input_ids)


def test_join_pads_prompts_on_the_left_and_responses_on_the_right():
    one, other = written(["a=1"], ["12"]), written(["b=7;b?"], ["3"])
    joined = join([one, other], pad_id=0)
    assert (joined.prompt_length, joined.response_mask.shape) == (6, (2, 3))
    assert torch.equal(joined.input_ids, written(["a=1", "b=7;b?"], ["12", "3"]).input_ids)
    assert torch.equal(joined.attention_mask, written(["a=1", "b=7;b?"], ["12", "3"]).attention_mask)
    assert joined.response_mask.tolist() == [[True, True, True], [True, True, False]]
    filled = join([one, replace(other, truncated=torch.tensor([True]))], pad_id=5)
    assert (filled.input_ids[~filled.attention_mask] == 5).all()
    assert filled.truncated.tolist() == [False, True]
    assert join([one], pad_id=0) is one


def test_prompts_that_leave_no_room_are_refused():
    model = tiny_policy(context=20)
    with pytest.raises(
        PolicyError, match=r"max_response_tokens: must leave room for a prompt, got 20 with a context of 20"
    ):
        PromptEncoder(TOKENIZER, model, 8, 20)
    encoder = PromptEncoder(TOKENIZER, model, 8, 14)
    assert len(encoder.ids(Sample(3, "b=7;b?", "7"))) == 6
    with pytest.raises(
        PolicyError, match=r"prompt: sample 3 must have at most 6 tokens \(the model's context of 20 minus"
    ):
        encoder.ids(Sample(3, "b=7;bb?", "7"))


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer, model = alphabet(), tiny_policy()
    tokenizer.add_tokens(["<think>"])
    encoder = PromptEncoder(tokenizer, model, 64, 16)
    known = Sample(0, "a=1;a?", "1")
    assert encoder.ids(known) == alphabet()("a=1;a?")["input_ids"]
    with pytest.raises(PolicyError, match=r"tokenizer: must be that of the model, got id 45 in sample 3, .* 45 embed"):
        encoder.ids(Sample(3, "a=1;<think>a?", "1"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda index: Sample(0, "a?", "1"),
            "must return a Sample with the number asked for, got number 0 for",
        ),
        (lambda index: "a?", "must return a Sample with the number asked for, got a str for number 0 of 'train'"),
        (
            lambda index: {}[index],
            "must have a problem for every number, got KeyError: 0 for number 0 of 'train'",
        ),
    ],
)
def test_a_task_that_gives_another_problem_is_named(made, message: str):
    class Wrong(Digits):
        def sample(self, split: str, index: int):
            return made(index)

    with pytest.raises(TaskError, match=message):
        draw_samples(Wrong(), "train", range(2))
    assert [sample.index for sample in draw_samples(Digits(), "train", range(3, 6))] == [3, 4, 5]


class Tagged(Digits):
    """Problems of one chat message, answered in tags and judged as a file of problems is."""

    def sample(self, split, index):
        return Sample(index, chat("How many?"), "7")

    def find_answer(self, completion):
        # The finder sees the completion alone, and not what the prompt opened.
        return find_answer(completion)

    def reward(self, sample, completion):
        span = find_answer(completion, opening=sample.opening)
        return float(span is not None and completion[slice(*span)] == sample.answer)

    def oracle(self, sample, completion):
        return None


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_an_answer_inside_the_thinking_is_neither_found_nor_paid(opening: str):
    tokenizer = with_template(byte_level(), CHATML.replace("assistant\n", "assistant\n" + opening))
    texts = ["<answer>7</answer>", "So 7.</think><answer>7</answer>", "<think><answer>7</answer>"]
    task = Tagged()
    samples = [task.sample("train", index) for index in range(len(texts))]
    prompt = tokenizer.apply_chat_template(chat("How many?"), add_generation_prompt=True, return_dict=False)
    said = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    width = max(map(len, said))
    ids = torch.tensor([prompt + one + [0] * (width - len(one)) for one in said])
    mask = torch.tensor([[1] * (len(prompt) + len(one)) + [0] * (width - len(one)) for one in said]).bool()
    generated = Generated(ids, mask, len(prompt), mask[:, len(prompt) :], torch.zeros(3).bool())

    responses = judge(task, tokenizer, samples, generated)
    expected = [not opening, True, False]
    assert responses.answer.any(1).tolist() == expected
    assert responses.rewards.tolist() == [float(paid) for paid in expected]
    assert responses.samples == tuple(samples)


# Whole batches ---------------------------------------------------------------------------------------------


class Ranked(Digits):
    """Shorter is better within a group (trl#3896): a function of one response alone could not tell."""

    def batch_rewards(self, samples, completions):
        lengths: dict[int, list[int]] = {}
        for sample, text in zip(samples, completions, strict=True):
            lengths.setdefault(sample.index, []).append(len(text))
        return [
            float(sum(other > len(text) for other in lengths[sample.index]))
            for sample, text in zip(samples, completions, strict=True)
        ]

    def reward(self, sample, completion):
        raise AssertionError("judged alone")


def test_a_task_gets_all_responses_of_a_batch_in_one_call():
    task = Ranked()
    samples = [task.sample("train", index) for index in (0, 0, 0, 1, 1)]
    generated = written([str(sample.prompt) for sample in samples], ["a=1", "a", "a=", "b=1", "b=11"])
    assert judge(task, TOKENIZER, samples, generated).rewards.tolist() == [0, 2, 1, 1, 0]


def test_rewards_of_single_responses_may_be_coroutines():
    class Late(Digits):
        async def reward(self, sample, completion):
            return Digits.reward(self, sample, completion)

    assert judged(Late(), ["a=1,b2", "="]).rewards.tolist() == [1.0, 0.0]


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["find_answer", "oracle", "detours"])
def test_other_methods_that_are_coroutines_are_named(method: str):
    async def late(self, *arguments):
        return None

    task = type("Late", (Digits,), {method: late})()
    with pytest.raises(RewardError, match=r"got the coroutine '.*late' for sample 0; define it without async"):
        judged(task, ["a=1"])


def test_a_task_that_raises_is_told_with_its_line():
    line = Task._choice.__code__.co_firstlineno + 3
    with pytest.raises(RewardError, match=rf"at {__file__}, line {line}, in _choice; correct the task"):
        judged(Task(oracle=KeyError("lost")), ["a=1"])


# Special tokens at the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern", "completion", "answer"),
    [
        ("<answer>3</answer>", None, "<answer>3</answer>", "3"),
        ("<answer>3</answer> done", None, "<answer>3</answer> done", "3"),
        ("<answer>3</answer>\n", None, "<answer>3</answer>\n", "3"),
        ("<answer>3</answer><turn>", None, "<answer>3</answer><turn>", "3"),
        ("<answer>3</answer><end>", None, "<answer>3</answer>", "3"),
        ("it is <yes>", "(<yes>)", "it is <yes>", "<yes>"),
    ],
)
def test_only_end_tokens_are_cut_off(tmp_path, text: str, pattern: str | None, completion: str, answer: str):
    """Closing tags that are special tokens are what the policy wrote (trl#2897, trl#3026)."""
    tokenizer = copy.deepcopy(byte_level())
    tags = ["<answer>", "</answer>", "<yes>", "<turn>", "<end>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    end_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>"))
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"prompt": "What is 1+2?", "answer": answer}))
    task = JsonlTask(path, pattern=pattern, eval_every=0)
    sample = task.sample("train", 0)
    prompt = tokenizer(sample.prompt).input_ids
    response = tokenizer(text).input_ids
    if not text.endswith("<end>"):
        response.append(tokenizer.eos_token_id)
    ids = torch.tensor([prompt + response])
    ones = torch.ones_like(ids, dtype=torch.bool)
    generated = Generated(ids, ones, len(prompt), ones[:, len(prompt) :], torch.tensor([False]), end_ids)
    responses = judge(task, tokenizer, [sample], generated)
    assert responses.completions == (completion,)
    assert responses.rewards.tolist() == [1.0]
    assert tokenizer.decode(ids[0][responses.answer[0]]) == answer
