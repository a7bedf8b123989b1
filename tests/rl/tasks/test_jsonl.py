"""Every line becomes a problem or an error, and the order is a function of the seed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flowgraph import MissingExtraError
from rl import ConfigError, JsonlTask, RewardError, Task, TaskError
from rl.tasks import answers
from rl.tasks.rewards import RewardParts


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def problems(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"What is {k} + 1?", "answer": k + 1, "level": k % 3} for k in range(start, start + count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", *problems(25))


def test_it_is_a_task(path: Path):
    task = JsonlTask(path)
    assert isinstance(task, Task)
    assert task.size == 23
    sample = JsonlTask(path, shuffle=False).sample("train", 3)
    assert (sample.index, sample.prompt, sample.answer) == (3, "What is 3 + 1?", "4")
    assert sample.metadata == {"level": 0}
    assert task.oracle(sample, "") is None


def test_every_line_is_in_one_split(path: Path):
    task = JsonlTask(path, shuffle=False, eval_every=10)
    train = [task.sample("train", k).prompt for k in range(task.size)]
    held = [task.sample("eval", k).prompt for k in range(2)]
    assert held == ["What is 9 + 1?", "What is 19 + 1?"]
    assert sorted(train + held) == sorted(line["prompt"] for line in problems(25))
    assert task.sample("eval", 2).prompt == held[0]
    assert JsonlTask(path, eval_every=0).size == 25


def test_the_order_changes_with_pass_and_seed_alone(path: Path):
    def orders(seed: int) -> list[list]:
        task = JsonlTask(path, seed=seed)
        return [[task.sample("train", p * 23 + k).prompt for k in range(23)] for p in range(3)]

    first = orders(0)
    assert first == orders(0)
    assert len({tuple(order) for order in first + orders(1)}) == 6
    assert all(sorted(order) == sorted(first[0]) for order in first)
    backwards = JsonlTask(path)
    assert [backwards.sample("train", k).prompt for k in reversed(range(69))] == [p for o in first for p in o][::-1]
    plain = JsonlTask(path, shuffle=False)
    assert [plain.sample("train", k).prompt for k in range(23)] == [
        plain.sample("train", k + 23).prompt for k in range(23)
    ]


def test_an_eval_file(path: Path, tmp_path: Path):
    task = JsonlTask(path, eval_path=write(tmp_path / "eval.jsonl", *problems(2, 100)))
    assert task.size == 25
    assert [task.sample("eval", k).prompt for k in range(3)] == [f"What is {k} + 1?" for k in (100, 101, 100)]


def test_no_prompt_is_in_both_splits(path: Path, tmp_path: Path):
    leaking = write(tmp_path / "eval.jsonl", *problems(1, 100), *problems(1, 7))
    message = r"eval: must hold problems that training never sees, got line 2, whose prompt is that of training line 8"
    with pytest.raises(TaskError, match=message):
        JsonlTask(path, eval_path=leaking)


@pytest.mark.parametrize(
    ("equality", "reference", "right", "wrong"),
    [
        ("text", "New York", "new  york", "new york city"),
        ("number", "2,000", "2000.0", "2001"),
        ("number", 0.5, "1/2", "1/2 or 1/3"),
        ("math", "(x+1)^2", "x^2 + 2x + 1", "x^2"),
    ],
)
def test_rewards_by_equality(tmp_path: Path, equality: str, reference: object, right: str, wrong: str):
    task = JsonlTask(write(tmp_path / "a.jsonl", {"prompt": "?", "answer": reference}), equality=equality)
    sample = task.sample("train", 0)
    assert task.reward(sample, f"<answer>{wrong}</answer> no: <answer>{right}</answer>") == 1.0
    assert task.reward(sample, f"<answer>{right}</answer> no: <answer>{wrong}</answer>") == 0.0
    assert task.reward(sample, right) == 0.0
    span = task.find_answer(f"<answer>{right}</answer>")
    assert span == (8, 8 + len(right))


def test_a_pattern_of_the_users_own(path: Path):
    task = JsonlTask(path, pattern=r"Answer: (\S+)", equality="number", shuffle=False)
    assert task.reward(task.sample("train", 1), "Answer: 3\nAnswer: 2") == 1.0
    assert task.reward(task.sample("train", 1), "<answer>2</answer>") == 0.0


def test_reward_functions(path: Path, tmp_path: Path):
    def brevity(samples, completions):
        return [sample.metadata["level"] - len(text) / 10 for sample, text in zip(samples, completions, strict=True)]

    task = JsonlTask(path, reward=brevity, shuffle=False)
    assert task.reward(task.sample("train", 2), "12345") == 1.5
    file = tmp_path / "score.py"
    file.write_text("def score(samples, completions):\n    return [float('nan')]\n")
    with pytest.raises(RewardError, match=r"reward 'score': must return a finite number for response 0 \(sample 2"):
        JsonlTask(path, reward=f"{file}:score").reward(task.sample("train", 2), "x")
    with pytest.raises(ConfigError, match=r"reward: must have the form"):
        JsonlTask(path, reward="score")
    bare = JsonlTask(write(tmp_path / "bare.jsonl", {"prompt": "Write."}), answer=None, reward=brevity)
    assert bare.sample("train", 0).answer == ""


def test_fields_chat_and_byte_order_marks(tmp_path: Path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?\u2028"}]
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"question": chat, "gold": "4"}, ensure_ascii=False).encode() + b"\r")
    sample = JsonlTask(path, prompt="question", answer="gold").sample("train", 0)
    assert sample.prompt == chat
    assert sample.answer == "4"


GOOD = '{"prompt": "a", "answer": "b"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ('{"prompt": "a"', r"no JSON \(Expecting ',' delimiter at column 15\)"),
        ("[1]", "a list instead of an object"),
        ('{"prompt": "a", "anwser": "b"}', r"no field 'answer' \(there are 'prompt', 'anwser'\)"),
        ("{}", r"no field 'prompt' \(there are none\)"),
        ('{"prompt": "", "answer": "b"}', "'prompt' is neither text nor a list of messages"),
        ('{"prompt": [], "answer": "b"}', "'prompt' is neither text nor a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', "'prompt' is neither text nor a list of messages"),
        ('{"prompt": "a", "answer": null}', "'answer' is neither text nor a number"),
        ('{"prompt": "a", "answer": true}', "'answer' is neither text nor a number"),
        ('{"prompt": "a", "answer": " "}', "'answer' is empty"),
        ('{"prompt": "a", "answer": 1e999}', "'answer' is beyond the range of numbers"),
        ('{"prompt": "a", "answer": NaN}', "NaN, which JSON does not have"),
        ('{"prompt": "a", "answer": "1", "answer": "2"}', "a field occurs twice"),
        ('{"prompt": "a", "answer": "' + "b" * 257 + '"}', "'answer' has 257 characters, and a stated answer has"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_bad_lines_are_told_by_number(tmp_path: Path, line: str, reason: str):
    path = write(tmp_path / "bad.jsonl", GOOD, line, GOOD)
    message = rf"path: must hold one problem per line, got 1 bad of 3 lines in .*bad.jsonl: line 2: {reason}.*; correct"
    with pytest.raises(TaskError, match=message):
        JsonlTask(path)


def test_many_bad_lines_and_bad_bytes(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n' + b"x\n" * 8)
    with pytest.raises(TaskError, match=r"got 9 bad of 9 lines in .*: line 1: no UTF-8 at byte 12; .*; and 4 more"):
        JsonlTask(path)


def test_references_fit_their_equality(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "2 apples"})
    with pytest.raises(TaskError, match="line 1: 'answer' is not a number: '2 apples'"):
        JsonlTask(path, equality="number")
    assert JsonlTask(path, equality="number", reward=lambda s, c: [1.0]).size == 1


@pytest.mark.unchecked
def test_bad_requests(path: Path, tmp_path: Path):
    for options, message in (
        ({"equality": "fuzzy"}, r"equality: must be one of text, number, math, got 'fuzzy'"),
        ({"answer": None}, r"answer: must name a field where no reward function judges, got None; give"),
        ({"eval_every": 1}, r"eval_every: must be 0 or at least 2, got 1; 10"),
        ({"eval_every": 5, "eval_path": path}, r"eval_every: must be left out beside eval_path, got 5"),
        ({"reward": 3}, r"reward: must be a function or its place, got 3"),
        ({"pattern": "("}, r"pattern: must be 'boxed'"),
        ({"seed": 0.5}, r"seed: must be an integer, got 0.5"),
    ):
        with pytest.raises(TaskError, match=message):
            JsonlTask(path, **options)
    with pytest.raises(TaskError, match=r"path: must name a file that can be read, got .*none.jsonl' \(No such file"):
        JsonlTask(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match=r"path: must leave problems to train on, got none"):
        JsonlTask(write(tmp_path / "empty.jsonl"))
    with pytest.raises(TaskError, match=r"split: must be one of 'train', 'eval', got 'test'"):
        JsonlTask(path).sample("test", 0)
    with pytest.raises(TaskError, match=r"index: must be an integer of at least 0, got -1"):
        JsonlTask(path).sample("train", -1)
    with pytest.raises(TaskError, match=r"split: must hold problems, got none for 'eval' in .*; give eval_path"):
        JsonlTask(path, eval_every=0).sample("eval", 0)


def test_a_missing_package_is_told_at_once(path: Path, monkeypatch: pytest.MonkeyPatch):
    answers._math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"equality: 'math' needs the package math-verify"):
        JsonlTask(path, equality="math")
    assert JsonlTask(path, equality="math", reward=lambda s, c: [1.0]).size == 23


def test_thinking_that_the_prompt_opens_must_be_closed(path: Path):
    task = JsonlTask(path, shuffle=False)
    sample = task.sample("train", 0)
    right = f"<answer>{sample.answer}</answer>"
    assert task.reward(sample, right) == 1.0
    told = replace(sample, opening="<think>\n")
    assert task.reward(told, right) == 0.0
    assert task.reward(told, f"So.</think>{right}") == 1.0
    assert task.reward(sample, f"<think>{right}") == 0.0


# Several reward functions ----------------------------------------------------------------------------------


def rank(samples, completions):
    """1 for the longest response to each problem (trl#3896, trl#4707)."""
    groups: dict[int, int] = {}
    for sample, text in zip(samples, completions, strict=True):
        groups[sample.index] = max(groups.get(sample.index, 0), len(text))
    return [len(text) == groups[sample.index] for sample, text in zip(samples, completions, strict=True)]


def first_level(samples, completions):
    return [None if sample.metadata["level"] else 1.0 for sample in samples]


async def late(samples, completions):
    return [4.0 for _ in samples]


def test_functions_get_the_batch_in_one_call_and_are_summed_with_weights(path: Path):
    task = JsonlTask(path, reward=[rank, first_level, late], reward_weights=[1, -0.5, 0.25], shuffle=False)
    samples = [task.sample("train", index) for index in (0, 0, 1, 1)]
    found = task.batch_rewards(samples, ["a", "aa", "bbb", "b"])
    assert isinstance(found, RewardParts)
    assert found.totals.tolist() == [0.5, 1.5, 2.0, 1.0]
    assert task.reward(samples[2], "b") == 2.0
    assert JsonlTask(path, reward=[rank, rank]).batch_rewards(samples, ["a"] * 4).names == ("rank", "rank_2")
    assert "by 1 rank + -0.5 first_level + 0.25 late" in repr(task)


def test_a_subclass_that_replaces_the_reward_of_one_response_means_all(path: Path):
    class Half(JsonlTask):
        def reward(self, sample, completion):
            return 0.5

    samples = [Half(path).sample("train", 0)] * 2
    assert Half(path, reward=rank).batch_rewards(samples, ["a", "aa"]) == [0.5, 0.5]


@pytest.mark.unchecked
def test_rewards_and_weights_that_do_not_fit(path: Path):
    for options, message in (
        ({"reward": []}, r"reward: must name at least one function, got an empty list; leave"),
        ({"reward": [rank, 3]}, r"reward: must be a function or its place, got 3; 'rewards.py:score'"),
        ({"reward_weights": [1]}, r"reward_weights: must be left out without reward, got \[1\]; give both"),
        (
            {"reward": [rank, late], "reward_weights": [1]},
            r"reward_weights: must be 2 finite .* got \[1\]; leave",
        ),
        ({"reward": rank, "reward_weights": [float("nan")]}, r"reward_weights: must be 1 finite numbers"),
        ({"reward": rank, "reward_weights": [True]}, r"reward_weights: must be 1 finite numbers"),
        ({"reward": rank, "reward_weights": 2}, r"reward_weights: must be 1 finite numbers"),
    ):
        with pytest.raises(TaskError, match=message):
            JsonlTask(path, **options)
