"""Subjects read chats with and without a chat template."""

from flowgraph import EvaluationItem, Subject
from flowgraph.evaluation.catalogue import find_task
from tests.fixtures.tiny import chat, tiny_model
from tests.fixtures.tokenizers import byte_level, with_template

QUESTION = "Tom has 3 apples. He buys 4 more."


def test_a_tokenizer_without_chat_template_reads_the_contents():
    item = EvaluationItem("one", chat(QUESTION), "He has 7.\nAnswer: 7", answer="7")
    plain = Subject(tiny_model(2048), with_template(byte_level(), None), item)
    assert plain.base.text == f"{QUESTION}\nHe has 7.\nAnswer: 7"
    # The first token is a sink of attention and counts to no region.
    assert plain.base.text_of(plain.question).strip() == QUESTION.removeprefix("Tom ")
    templated = Subject(tiny_model(2048), byte_level(), item)
    assert "<|im_start|>user" in templated.base.text


def test_tasks_run_without_a_chat_template():
    for name in ("detour", "question_knockout_short"):
        task = find_task(name)
        subject = Subject(tiny_model(2048), with_template(byte_level(), None), task.items("dev", 1, 0)[0])
        assert task.function(subject).unusable is None
