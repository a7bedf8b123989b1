"""Gold step graphs from files: tiny samples in each format, and what is said of files that are not in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowgraph import EvaluationItem, Explanation, InvalidInputError, Subject
from flowgraph.evaluation.catalogue import find_task
from tests.fixtures.tiny import tiny_model
from tests.fixtures.tokenizers import byte_level

PARC = {
    "question": "Tom has 3 apples. He buys 4 more. How many does he have?",
    "ground_truth_solution": "3 + 4 = 7",
    "ground_truth_answer": "7",
    "model_answer": "7",
    "steps": [
        "Step 1: Tom starts with 3 apples.",
        "Step 2: He buys 4 apples.",
        "Step 3: We add 3 and 4, so he has 7.",
    ],
    "is_correct": True,
    "premise_annotation": {
        "steps": [
            {"step_number": 0, "original_step": "...", "premises": [[0, "the problem"]]},
            {"step_number": 1, "original_step": "...", "premises": [[0, "Tom has 3 apples."]]},
            {"step_number": 2, "original_step": "...", "premises": [[0, "He buys 4 more."]]},
            {"step_number": 3, "original_step": "...", "premises": [[1, "3 apples"], [2, "4 apples"], [2, "again"]]},
        ]
    },
}
PRONTOQA = {
    "example1": {
        "in_context_example0": {"question": "x", "query": "y", "chain_of_thought": ["z"], "answer": "True"},
        "test_example": {
            "question": "Every dog is a mammal. Cats are small. Every mammal is an animal. Rex is a dog.",
            "query": "True or false: Rex is an animal.",
            "chain_of_thought": [
                "Rex is a dog.",
                "Every dog is a mammal.",
                "Rex is a mammal.",
                "Every mammal is an animal.",
                "Rex is an animal.",
            ],
            "answer": "True",
        },
    }
}
PROCESSBENCH = [
    {
        "id": "own-0",
        "generator": "none",
        "problem": "Tom has 3 apples and buys 4 more. How many has he?",
        "steps": ["Tom has 3 apples.", "He buys 4, and 3 + 4 = 8.", "The answer is 8."],
        "final_answer_correct": False,
        "label": 1,
    },
    {
        "id": "own-1",
        "generator": "none",
        "problem": "Another.",
        "steps": ["It is 2."],
        "final_answer_correct": True,
        "label": -1,
    },
]


def written(folder: Path, content: Any, name: str = "sample.json", *, lines: bool = False) -> Path:
    path = folder / name
    text = "\n".join(json.dumps(one) for one in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def subject_of(item: EvaluationItem) -> Subject:
    return Subject(tiny_model(2048), byte_level(), item)


def text_of(subject: Subject, unit: list[int]) -> str:
    spans = subject.base.spans
    return subject.base.text[int(spans[unit[0], 0]) : int(spans[unit[-1], 1])].strip()


def marked_edges(truth, num_tokens: int) -> Explanation:
    """The explanation that holds exactly the gold pairs."""
    edges = torch.zeros(num_tokens, num_tokens)
    for (reader, source), is_gold in zip(truth.pairs, truth.gold, strict=True):
        if is_gold:
            for row in truth.units[reader]:
                edges[row, truth.units[source]] = 1.0
    return Explanation(edges=edges)


def test_parc_gives_the_premises_of_each_step(tmp_path: Path):
    task = find_task(f"parc:{written(tmp_path, [PARC, PARC])}")
    assert task.reads == "edges"
    (item,) = task.items("test", 60, 0)
    subject = subject_of(item)
    assert subject.base.text_of(subject.answer) == item.data["expected"] == "7"
    truth = task.function(subject)
    assert truth.unusable is None
    assert [text_of(subject, unit) for unit in truth.units] == [PARC["question"], *PARC["steps"]]
    gold = {pair for pair, is_gold in zip(truth.pairs, truth.gold, strict=True) if is_gold}
    assert gold == {(1, 0), (2, 0), (3, 1), (3, 2)}
    assert set(truth.pairs) == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    figures = truth.score(marked_edges(truth, subject.num_tokens))
    assert set(figures) == {metric.name for metric in task.metrics}
    assert figures["auroc"] == 1


def test_parc_prefers_premises_labelled_by_people_and_takes_plain_numbers(tmp_path: Path):
    entry = json.loads(json.dumps(PARC))
    for step in entry["premise_annotation"]["steps"]:
        step["ground_truth_premises"] = [0]
    (item,) = find_task(f"parc:{written(tmp_path, [entry])}").items("test", 1, 0)
    assert item.data["premises"] == [[1, 0], [2, 0], [3, 0]]


def test_prontoqa_gives_quotations_and_the_two_premises_of_each_conclusion(tmp_path: Path):
    task = find_task(f"prontoqa:{written(tmp_path, PRONTOQA)}")
    (item,) = task.items("test", 5, 0)
    subject = subject_of(item)
    assert subject.base.text_of(subject.answer) == "True"
    truth = task.function(subject)
    texts = [text_of(subject, unit) for unit in truth.units]
    gold = {(texts[r], texts[s]) for (r, s), is_gold in zip(truth.pairs, truth.gold, strict=True) if is_gold}
    assert ("Rex is a mammal.", "Rex is a dog.") in gold
    assert ("Rex is a mammal.", "Every dog is a mammal.") in gold
    assert ("Rex is an animal.", "Rex is a mammal.") in gold
    assert ("Every mammal is an animal.", "Every mammal is an animal.") in gold
    assert int(truth.gold.sum()) == 3 + 2 * 2
    assert not any("Cats" in text for pair in gold for text in pair)
    assert truth.score(marked_edges(truth, subject.num_tokens))["auroc"] == 1


def test_processbench_gives_the_first_wrong_step_of_wrong_answers(tmp_path: Path):
    entries = [PROCESSBENCH[0], PROCESSBENCH[1], PROCESSBENCH[1]]
    task = find_task(f"processbench:{written(tmp_path, entries, 'own.jsonl', lines=True)}")
    assert task.reads == "tokens"
    (item,) = task.items("test", 9, 0)
    assert list(task.items("dev", 9, 0)) == []
    subject = subject_of(item)
    truth = task.function(subject)
    texts = [text_of(subject, unit) for unit in truth.units]
    assert texts == [*PROCESSBENCH[0]["steps"][:2], "The answer is"]
    assert truth.gold.tolist() == [False, True, False]
    tokens = torch.zeros(subject.num_tokens)
    tokens[truth.units[1]] = 1.0
    assert truth.score(Explanation(tokens=tokens)) == {"auroc": 1, "average_precision": 1, "precision_at_10": 1}
    # A long step is not preferred: scores are means.
    assert truth.score(Explanation(tokens=torch.ones(subject.num_tokens)))["auroc"] == 0.5


def test_items_are_drawn_by_seed_and_split_by_place(tmp_path: Path):
    entries = []
    for number in range(20):
        entries.append({**PARC, "question": f"Question {number}?"})
    task = find_task(f"parc:{written(tmp_path, entries)}")
    test = task.items("test", 60, 0)
    dev = task.items("dev", 60, 0)
    assert len(test) == len(dev) == 10
    questions = {item.data["question"] for item in (*test, *dev)}
    assert len(questions) == 20
    assert [item.id for item in task.items("test", 4, 0)] == [item.id for item in test[:4]]
    assert [item.id for item in task.items("test", 10, 1)] != [item.id for item in test]
    with pytest.raises(InvalidInputError, match="split: must be 'dev' or 'test'"):
        task.items("train", 1, 0)


def test_the_name_of_a_file_task_is_safe_and_follows_the_content(tmp_path: Path):
    first = find_task(f"parc:{written(tmp_path, [PARC], 'my file (1).json')}").name
    other = find_task(f"parc:{written(tmp_path, [PARC, PARC], 'my file (1).json')}").name
    assert first.startswith("parc_my_file_1_")
    assert first.isascii()
    assert first.replace("_", "").isalnum()
    assert first != other


def changed(entry: dict, **fields: object) -> dict:
    return {**entry, **fields}


ANNOTATION = PARC["premise_annotation"]["steps"]
BROKEN = {
    "parc": [
        ("tasks: parc must hold a list of entries, got int", 3),
        ("tasks: parc must hold at least one entry, got none", []),
        ("entry 0 of .*: must be an object, got str", ["x"]),
        ("entry 1 of .*: 'question' must be text, got None", [PARC, {"steps": ["a"]}]),
        ("'steps' must be a list of texts, none empty, got \\['a', ''\\]", [changed(PARC, steps=["a", ""])]),
        ("'premise_annotation' must be an object, got None", [changed(PARC, premise_annotation=None)]),
        ("premise_annotation: 'steps' must be a list of annotated steps", [changed(PARC, premise_annotation={})]),
        (
            "premise_annotation, step 0: 'step_number' must be from 0 to 3, the number of steps, got 4",
            [changed(PARC, premise_annotation={"steps": [{"step_number": 4, "premises": []}]})],
        ),
        (
            "step 0: 'premises' must be numbers, or pairs of number and text, got 'x'",
            [changed(PARC, premise_annotation={"steps": [{"step_number": 1, "premises": ["x"]}]})],
        ),
        (
            "step 0: 'premises' must be numbers from 0 to 3, got 9",
            [changed(PARC, premise_annotation={"steps": [{"step_number": 3, "premises": [[9, "x"]]}]})],
        ),
    ],
    "prontoqa": [
        ("'query' must be text, got None", {"example1": {"test_example": {"question": "A is b."}}}),
        ("'test_example' must be an object, got 'x'", {"example1": {"test_example": "x"}}),
        (
            "'chain_of_thought' must be sentences of the question, each conclusion after its two premises, got 'Rex",
            [changed(PRONTOQA["example1"]["test_example"], chain_of_thought=["Rex is an animal."])],
        ),
    ],
    "processbench": [
        ("'label' must be an integer, got None", [changed(PROCESSBENCH[0], label=None)]),
        ("'label' must be -1 or the place of a step, below 3, got 3", [changed(PROCESSBENCH[0], label=3)]),
        ("'final_answer_correct' must be true or false, got 1", [changed(PROCESSBENCH[0], final_answer_correct=1)]),
    ],
}


@pytest.mark.parametrize(
    ("name", "message", "content"),
    [(name, message, content) for name, cases in BROKEN.items() for message, content in cases],
)
def test_entries_that_are_not_of_the_format_are_refused(tmp_path: Path, name: str, message: str, content: object):
    with pytest.raises(InvalidInputError, match=message):
        find_task(f"{name}:{written(tmp_path, content)}")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"parc must be a file that can be read, got .*No such file"):
        find_task(f"parc:{tmp_path / 'missing.json'}")
    with pytest.raises(InvalidInputError, match="parc must be a file that can be read, got"):
        find_task(f"parc:{tmp_path}")
    with pytest.raises(InvalidInputError, match="must name a file after 'parc:', got nothing"):
        find_task("parc:")
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InvalidInputError, match=r"must be JSON or one JSON object a line, got line 2 of"):
        find_task(f"processbench:{path}")
    path.write_bytes(b"[\xff]")
    with pytest.raises(InvalidInputError, match="must be UTF-8 text, got byte 1 of"):
        find_task(f"processbench:{path}")
    with pytest.raises(InvalidInputError, match="tasks: must be of "):
        find_task("other:file.json")


def test_a_step_without_a_visible_token_is_in_no_pair(tmp_path: Path):
    entry = json.loads(json.dumps(PARC))
    (item,) = find_task(f"parc:{written(tmp_path, [entry])}").items("test", 1, 0)
    truth = find_task(f"parc:{written(tmp_path, [entry])}").function(subject_of(item))
    assert all(truth.units[reader] and truth.units[source] for reader, source in truth.pairs)
    assert np.isfinite(list(truth.score(marked_edges(truth, subject_of(item).num_tokens)).values())).all()
