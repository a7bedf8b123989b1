"""Streams are reproducible and apart, and no scorer of reasoning-gym can be exploited through a task."""

import json
import random
import sys
import warnings

import numpy as np
import pytest

from flowgraph import MissingExtraError
from rl import Sample, Task, TaskError
from rl.tasks import procedural
from rl.tasks.procedural import Procedural

SMALL = {"min_numbers": 3, "max_numbers": 3, "max_value": 9, "min_target": 1, "max_target": 30}


@pytest.fixture(scope="module")
def countdown() -> Procedural:
    return Procedural("countdown", min_numbers=4, max_numbers=4)


def stated(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def problem(sample: Sample) -> tuple:
    return tuple(sorted(sample.metadata["problem"]["numbers"])), sample.metadata["problem"]["target"]


def test_it_is_a_task(countdown: Procedural):
    assert isinstance(countdown, Task)
    assert countdown.size is None
    sample = countdown.sample("train", 5)
    assert sample.index == 5
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    assert sample.metadata["split"] == "train"
    assert countdown.oracle(sample, "x") is None
    text = f"6 * 4 <answer> {sample.answer} </answer>"
    assert text[slice(*(countdown.find_answer(text) or (0, 0)))] == sample.answer
    assert countdown.reward(sample, text) == 1.0


def test_problems_are_a_function_of_split_number_and_seed():
    def some(seed: int) -> list[Sample]:
        task = Procedural("chain_sum", seed=seed)
        return [task.sample(split, index) for split in ("train", "eval") for index in (200, 0, 1, 64)]

    random.seed(1)
    first = some(0)
    random.seed(2)
    assert some(0) == first
    others = some(1)
    assert all(one.prompt != other.prompt for one, other in zip(first, others, strict=True))


def test_a_problem_of_one_split_is_never_met_in_the_other():
    """With 3 small numbers, different seeds alone give many problems twice."""
    import reasoning_gym

    raw = [reasoning_gym.create_dataset("countdown", seed=seed, size=150, **SMALL) for seed in (10_000, 20_000)]
    seen = [{(tuple(sorted(e["metadata"]["numbers"])), e["metadata"]["target"]) for e in part} for part in raw]
    assert len(seen[0] & seen[1]) > 5
    train = {
        problem(Procedural("countdown", seed=seed, **SMALL).sample("train", k)) for seed in (0, 1) for k in range(60)
    }
    held = {
        problem(Procedural("countdown", seed=seed, **SMALL).sample("eval", k)) for seed in (0, 1) for k in range(30)
    }
    assert not train & held
    assert len(train) > 60
    assert len(held) > 20


def test_prompts_ask_for_the_format_that_counts():
    for form, text in (("tag", "<answer>1</answer>"), ("boxed", r"\boxed{1}"), ("hash", "#### 1")):
        task = Procedural("gcd", answer_format=form)
        prompt = task.sample("train", 0).prompt
        assert isinstance(prompt, str)
        assert text[:4] in prompt
        assert task.find_answer(text) is not None
        assert (
            sum(Procedural("gcd", answer_format=f).find_answer(text) is not None for f in ("tag", "boxed", "hash")) == 1
        )
    chat = Procedural("gcd", chat=True).sample("train", 0).prompt
    assert chat == [{"role": "user", "content": Procedural("gcd").sample("train", 0).prompt.strip()}]


def test_a_longer_text_that_contains_the_answer_earns_nothing():
    task = Procedural("caesar_cipher")
    generous = Procedural("caesar_cipher", partial_credit=True)
    sample = task.sample("train", 0)
    longer = f"{sample.answer} or not"
    raw = task._scorer.score_answer(longer, {"answer": sample.answer})
    assert 0.2 < raw < 1  # what the library pays
    assert task.reward(sample, stated(longer)) == 0.0
    assert generous.reward(sample, stated(longer)) == pytest.approx(raw)
    for unstated in (sample.answer, f"The answer is {sample.answer}.", f"<answer>{sample.answer}"):
        assert generous.reward(sample, unstated) == 0.0
    assert generous.reward(sample, stated(sample.answer + " x" * 200)) == 0.0  # beyond the length
    assert task.reward(sample, stated(sample.answer) + stated("other")) == 0.0


def test_countdown_uses_every_number_once_and_executes_nothing(countdown: Procedural):
    sample = countdown.sample("train", 3)
    numbers, target = sample.metadata["problem"]["numbers"], sample.metadata["problem"]["target"]
    right = sample.answer
    a, b = numbers[:2]
    for wrong in (
        str(target),
        f"{right} + {a} - {a}",
        f"{right} + {numbers[0]} - {b}",
        f"{right} + 0",
        f"{right} + 0e1",
        f"{right} = {target}",
        f"{right}**1",
        f"({right}) // 1",
        f"{right} #",
        "__import__('os').getpid()",
        f"{right} if 1 else 1",
        "9**9**9**9",
        "",
    ):
        assert countdown.reward(sample, stated(wrong)) == 0.0, wrong
    assert countdown.reward(sample, stated(f"( {right} )")) == 1.0


def test_countdown_is_exact_where_the_library_is_not():
    """1e-5 of a target of 999 is a whole 0.01, and decimals use two of the numbers."""
    task = Procedural("countdown", partial_credit=True)
    sample = task.sample("train", 0)
    for numbers, target, answer in (([3, 999, 1000], 999, "999 + 3/1000"), ([12, 5, 2], 25, "12.5*2")):
        entry = {"question": "", "answer": answer, "metadata": {"numbers": numbers, "target": target}}
        assert task._scorer.score_answer(answer, entry) == 1.0
        task._entry = lambda split, index, entry=entry: entry
        assert task.reward(Sample(0, task._prompt(entry), "", sample.metadata), stated(answer)) == 0.0


@pytest.mark.parametrize(
    ("dataset", "answer"),
    [
        ("puzzle24", "6*4*1*1"),
        ("game_of_life_halting", "who knows"),
        ("coin_flip", "0"),
        ("intermediate_integration", "copy"),
        ("gsm_symbolic", "several"),
    ],
)
def test_scorers_with_a_gap_are_guarded(dataset: str, answer: str):
    task = Procedural(dataset)
    gaps = 0
    for index in range(6):
        sample = task.sample("train", index)
        entry = task._entry("train", index)
        if answer == "copy":
            text = f"Integral({entry['metadata']['integrand']}, x)"
        elif answer == "several":
            text = f"{sample.answer} or {int(sample.answer) + 1}"
        else:
            text = answer
        gaps += task._scorer.score_answer(text, entry) == 1.0
        assert task.reward(sample, stated(text)) == 0.0
        assert task.reward(sample, stated(sample.answer)) == 1.0
    assert gaps > 0


@pytest.mark.parametrize(
    "dataset",
    ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration", "intermediate_integration",
     "polynomial_multiplication", "countdown", "puzzle24"],
)  # fmt: skip
def test_answers_are_never_executed(dataset: str, tmp_path):
    marker = tmp_path / "executed"
    task = Procedural(dataset, partial_credit=True)
    sample = task.sample("train", 0)
    hostile = f"__import__('os').mkdir('{marker}')"
    task._scorer.score_answer(hostile, task._entry("train", 0))
    assert marker.exists()  # the library runs it
    marker.rmdir()
    for text in (
        hostile,
        f"[{hostile}]",
        f"x + {hostile}",
        "9**9**9**9",
        "((9**99)**99)**99",
        f"'{sample.answer}'*9999999",
    ):
        assert task.reward(sample, stated(text)) == 0.0
    assert not marker.exists()
    assert task.reward(sample, stated(sample.answer)) == 1.0


def test_an_answer_that_breaks_the_scorer_is_not_right():
    task = Procedural("prime_factorization")
    sample = task.sample("train", 0)
    with pytest.raises(ValueError, match="invalid literal"):
        task._scorer.score_answer("two", task._entry("train", 0))
    assert task.reward(sample, stated("two")) == 0.0


def test_the_library_warns_and_reseeds_in_private():
    task = Procedural("pool_matrix")
    np.random.seed(7)
    random.seed(7)
    expected = np.random.RandomState(7).rand(), random.Random(7).random()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = task.sample("train", 0)
        task.reward(sample, stated(r"2(3) \d"))
    assert (np.random.rand(), random.random()) == expected


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"reasoning-gym, got .*; pip install 'flowgraph-llm\[tasks\]', or use"):
        Procedural("countdown")


@pytest.mark.unchecked
def test_bad_requests(countdown: Procedural, monkeypatch: pytest.MonkeyPatch):
    for options, message in (
        ({"dataset": "count"}, r"dataset: must be one of ab, .*, got 'count'; choose"),
        ({"answer_format": "xml"}, r"answer_format: must be one of boxed, tag, hash, got 'xml'"),
        ({"numbers": 3}, r"numbers: must be an option of 'countdown', got an unknown name; there are min_numbers, "),
        ({"size": 3}, r"size: must be an option of 'countdown', got an unknown name"),
        ({"min_numbers": 1}, r"options: must suit the dataset 'countdown', got .*: min_numbers must be greater than 1"),
        ({"min_numbers": "a"}, r"options: must suit the dataset 'countdown', got"),
        ({"seed": None}, r"seed: must be an integer, got None"),
        ({"max_answer": 0}, r"max_answer: must be at least 1, got 0"),
    ):
        with pytest.raises(TaskError, match=message):
            Procedural(**{"dataset": "countdown", **options})
    with pytest.raises(TaskError, match=r"split: must be one of 'train', 'eval', got 'test'"):
        countdown.sample("test", 0)
    with pytest.raises(TaskError, match=r"index: must be an integer of at least 0, got -1"):
        countdown.sample("train", -1)
    with pytest.raises(TaskError, match=r"max_answer: must hold the answers of 'countdown', got 2 for one of"):
        Procedural("countdown", max_answer=2).sample("train", 0)
    for stranger in (Sample(0, "What?", "1"), Sample(0, "What?", "1", {"split": "train"})):
        with pytest.raises(TaskError, match=r"sample: must come from this task and these options, got sample 0 of"):
            countdown.reward(stranger, stated("1"))
    monkeypatch.setattr(procedural, "_ATTEMPTS", 10)
    narrow = Procedural("countdown", min_numbers=2, max_numbers=2, max_value=1, operators=("*",))
    with pytest.raises(TaskError, match=r"options: must leave 'countdown' different problems for both splits, got"):
        narrow.sample("train", 0)


def test_its_text_tells_tasks_apart():
    one, same, other = (Procedural("chain_sum", max_terms=terms) for terms in (3, 3, 4))
    assert repr(one) == repr(same) != repr(other)
    assert "seed=0" in repr(one)
    assert repr(one) != repr(Procedural("chain_sum", max_terms=3, seed=1))
