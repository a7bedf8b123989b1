"""The generated texts: distinct, reproducible, right, and different on dev and test."""

import re

import pytest

from flowgraph import InvalidInputError
from flowgraph.evaluation.tasks.detour import _PLACES, _ROLES, detour_items, in_words
from flowgraph.evaluation.tasks.texts import FAMILIES, WORDS, own_items, problems, reasoned_items, short_items


@pytest.mark.parametrize("items", [reasoned_items, short_items, own_items, detour_items])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_items_are_distinct_reproducible_and_have_safe_ids(items, split: str):
    made = items(split, 80, 0)
    again = items(split, 80, 0)
    assert [item.prompt for item in made] == [item.prompt for item in again]
    assert [item.response for item in made] == [item.response for item in again]
    assert len({str(item.prompt) for item in made}) == 80
    assert len({item.id for item in made}) == 80
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", item.id) for item in made)
    assert all(item.data["expected"] for item in made)
    assert str([item.prompt for item in items(split, 80, 1)]) != str([item.prompt for item in made])


def test_a_longer_list_begins_with_the_shorter_one():
    assert problems("dev", 60, 3)[:20] == problems("dev", 20, 3)
    long = [item.prompt for item in detour_items("test", 40, 3)]
    assert long[:10] == [item.prompt for item in detour_items("test", 10, 3)]


def test_the_first_items_hold_every_family():
    assert [problem.family for problem in problems("dev", 6, 0)] == list(FAMILIES)


def test_splits_share_no_name_thing_place_or_role():
    dev = WORDS["dev"]
    test = WORDS["test"]
    assert not set(dev.names) & set(test.names)
    assert not set(dev.things) & set(test.things)
    assert not {word for pair in dev.capitals for word in pair} & {word for pair in test.capitals for word in pair}
    assert not {role.name for role in _ROLES["dev"]} & {role.name for role in _ROLES["test"]}
    assert not {place.name for place in _PLACES["dev"]} & {place.name for place in _PLACES["test"]}
    # The wording differs too: questions without their names and numbers.
    patterns = {}
    for split in ("dev", "test"):
        words = WORDS[split]
        fillers = "|".join([*words.names, *words.things, *(word for pair in words.capitals for word in pair)])
        questions = [problem.question for problem in problems(split, 60, 0)]
        patterns[split] = {re.sub(rf"{fillers}|\d+", "_", question) for question in questions}
    assert not patterns["dev"] & patterns["test"]


def test_the_reasoning_leads_to_the_answer():
    for split in ("dev", "test"):
        for problem in problems(split, 120, 0):
            assert problem.answer in problem.question + " ".join(problem.lines)
            for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", " ".join(problem.lines)):
                value = int(left) + int(right) if sign == "+" else int(left) - int(right)
                assert value == int(result)
            assert len(problem.lines) >= 6


def test_kinship_follows_the_two_links():
    found = set()
    for problem in problems("dev", 60, 0, ["kinship"]):
        links = {
            source: (relation, target)
            for source, relation, target in re.findall(r"(\w+) is the (\w+) of (\w+)", problem.question)
        }
        first, third = re.findall(r"What is (\w+) to (\w+)", problem.question)[0]
        relation, second = links[first]
        parent, last = links[second]
        assert last == third
        assert parent in ("mother", "father")
        expected = {"mother": "grandmother", "father": "grandfather", "sister": "aunt", "brother": "uncle"}[relation]
        assert problem.answer == expected
        found.add(expected)
        women = WORDS["dev"].women
        assert (first in women) == (relation in ("mother", "sister"))
        assert (second in women) == (parent == "mother")
    assert found == {"grandmother", "grandfather", "aunt", "uncle"}


def test_ordering_asks_for_one_end_of_the_order():
    for problem in problems("test", 20, 0, ["ordering"]):
        older = dict(re.findall(r"(\w+) is older than (\w+)", problem.question))
        oldest = (set(older) - set(older.values())).pop()
        youngest = (set(older.values()) - set(older)).pop()
        assert problem.answer == (oldest if "oldest" in problem.question else youngest)


def test_requests_that_cannot_be_met_are_refused():
    with pytest.raises(InvalidInputError, match="split: must be 'dev' or 'test', got 'train'"):
        problems("train", 3, 0)
    with pytest.raises(InvalidInputError, match="number: must be a positive integer, got 0"):
        detour_items("dev", 0, 0)
    with pytest.raises(InvalidInputError, match=r"number: must be at most \d+, the distinct problems"):
        problems("dev", 100_000, 0, ["fact"])


def test_numbers_in_words():
    assert [in_words(number) for number in (0, 13, 20, 21, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "twenty-one",
        "ninety-nine",
    ]


# The detour --------------------------------------------------------------------------------------------------------


def sentence_of(item, which: str, number: int) -> str:
    return item.data[which][number]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_no_sentence_of_a_detour_item_holds_the_answer_or_the_role_asked_for(split: str):
    for item in detour_items(split, 100, 0):
        answer = item.data["expected"]
        role = re.findall(r"the (\w+)(?: end up with)?\?", item.prompt[0]["content"])[0]
        for sentence in (*item.data["evidence"], *item.data["detour"]):
            words = re.findall(r"\w+", sentence.lower())
            assert answer not in words
            assert role not in words


@pytest.mark.parametrize("split", ["dev", "test"])
def test_evidence_and_detour_have_one_form_and_come_first_equally_often(split: str):
    items = detour_items(split, 200, 0)
    first = [0, 0, 0]
    for item in items:
        text = f"{item.prompt[0]['content']}{item.response}"
        assert len(item.data["evidence"]) == len(item.data["detour"]) == 3
        for number in range(3):
            evidence = sentence_of(item, "evidence", number)
            detour = sentence_of(item, "detour", number)
            assert text.count(evidence) == text.count(detour) == 1
            first[number] += text.index(evidence) < text.index(detour)
    assert all(70 < count < 130 for count in first)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_matching_words_and_nearness_do_not_find_the_evidence(split: str):
    """A control without a model: sentences that share words with answer or question, nearer ones first."""
    right = 0.0
    items = detour_items(split, 200, 0)
    for item in items:
        text = f"{item.prompt[0]['content']}{item.response}"
        question = item.prompt[0]["content"].split(". ")[-1]
        wanted = set(re.findall(r"\w+", question.lower())) | {item.data["expected"]}
        for number in range(3):
            scores = []
            for which in ("evidence", "detour"):
                sentence = sentence_of(item, which, number)
                shared = len(wanted & set(re.findall(r"\w+", sentence.lower())))
                scores.append(shared + text.index(sentence) / len(text) / 10)
            right += scores[0] > scores[1]
    assert right / (3 * len(items)) == pytest.approx(0.5, abs=0.06)


def test_the_sums_of_a_detour_item_are_right():
    numbers = {in_words(number): number for number in range(100)}
    for item in detour_items("dev", 40, 1)[::2]:
        for which in ("evidence", "detour"):
            start, more = map(int, re.findall(r"\d+", sentence_of(item, which, 1)))
            words = re.findall(r"from (\S+) up by (\S+) to (\S+)\.", sentence_of(item, which, 2))[0]
            assert [numbers[word] for word in words] == [start, more, start + more]
        assert item.data["expected"] == str(sum(map(int, re.findall(r"\d+", sentence_of(item, "evidence", 1)))))
