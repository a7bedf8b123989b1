"""The task ``detour``: evidence through a chain of thought beside a detour, each time in other words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.records import EvaluationItem
from flowgraph.evaluation.registry import evaluation_task
from flowgraph.evaluation.subject import Subject
from flowgraph.evaluation.tasks.texts import LICENCE, WORDS, chat, check_items
from flowgraph.evaluation.tasks.truths import AUROC, AVERAGE_PRECISION, PRECISION, GoldUnits
from flowgraph.evaluation.tasks.units import tokens_at

_TRIES = 100
"""Draws of an item that may repeat an earlier one."""


@dataclass(frozen=True)
class Named:
    """One thing under three descriptions that share no word.

    Attributes:
        name: in the question, or in the answer.
        fact: in the facts of the prompt.
        reasoning: in the reasoning.
    """

    name: str
    fact: str
    reasoning: str


_ROLES = {
    "dev": (
        Named("nurse", "looks after patients on a ward", "The hospital worker"),
        Named("pilot", "flies planes for an airline", "The person from the cockpit"),
        Named("baker", "makes bread before sunrise", "The owner of the oven"),
        Named("farmer", "grows wheat and keeps cows", "The one from the fields"),
        Named("teacher", "explains sums to children", "The one from the classroom"),
        Named("sailor", "crosses the ocean on ships", "The member of the crew"),
    ),
    "test": (
        Named("judge", "decides cases in court", "The one with the gavel"),
        Named("dentist", "repairs teeth all day", "The expert for cavities"),
        Named("barber", "cuts hair in town", "The owner of the scissors"),
        Named("tailor", "sews suits to measure", "The one with the needle"),
        Named("chef", "cooks for the guests of a restaurant", "The ruler of the kitchen"),
        Named("painter", "fills canvas with colour", "The one with the brushes"),
    ),
}
_PLACES = {
    "dev": (
        Named("library", "where books are lent", "the building full of novels"),
        Named("station", "where trains stop", "the hall with the platforms"),
        Named("bank", "where money is kept", "the house with the vault"),
        Named("church", "where people pray", "the building with the bell tower"),
        Named("zoo", "where wild animals live", "the park with the cages"),
    ),
    "test": (
        Named("museum", "where old statues stand", "the house of exhibits"),
        Named("school", "where lessons are given", "the building with the blackboards"),
        Named("pharmacy", "where medicine is sold", "the shop with the pills"),
        Named("garage", "where cars are repaired", "the hall that smells of oil"),
        Named("airport", "where planes land", "the building beside the runway"),
    ),
}
_SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Write a number from 0 to 99 in words.

    Example:
        >>> in_words(42)
        'forty-two'
    """
    if number < len(_SMALL):
        return _SMALL[number]
    tens = _TENS[number // 10]
    return tens if number % 10 == 0 else f"{tens}-{_SMALL[number % 10]}"


@dataclass(frozen=True)
class _Chain:
    """One of the two chains of an item.

    Attributes:
        facts: sentences of the prompt.
        reasoning: its line of the response.
        answer: what it leads to.
    """

    facts: tuple[str, str]
    reasoning: str
    answer: str


def _counting(rng: random.Random, split: str, names: Sequence[str], roles: Sequence[Named]) -> tuple[str, list[_Chain]]:
    """Make two sums: digits in the facts, words in the reasoning, digits in the answer, which no line holds."""
    thing = rng.choice(WORDS[split].things)
    # The same tens in both sums, so that the digits of the answer do not single out a chain.
    totals = rng.sample(range(21, 29), 2)
    chains = []
    for name, role, total in zip(names, roles, totals, strict=True):
        # Both summands lie below the totals, so that no fact holds the answer.
        more = rng.randint(total - 19, 9)
        start = total - more
        chains.append(
            _Chain(
                facts=(f"{name} {role.fact}.", f"{name} has {start} {thing} and finds {more} more."),
                reasoning=f"{role.reasoning} goes from {in_words(start)} up by {in_words(more)} to {in_words(total)}.",
                answer=str(total),
            )
        )
    return f"How many {thing} does the {roles[0].name} end up with?", chains


def _placing(rng: random.Random, split: str, names: Sequence[str], roles: Sequence[Named]) -> tuple[str, list[_Chain]]:
    """Make two places, which facts, reasoning and answer describe in different words."""
    thing = rng.choice(["bag", "coat", "hat"] if split == "dev" else ["phone", "scarf", "umbrella"])
    # Both people own the same kind of thing, so only the role in the question tells them apart.
    places = rng.sample(_PLACES[split], 2)
    chains = [
        _Chain(
            facts=(f"{name} {role.fact}.", f"{name} left a {thing} {place.fact}."),
            reasoning=f"{role.reasoning} has to go back to {place.reasoning}.",
            answer=place.name,
        )
        for name, role, place in zip(names, roles, places, strict=True)
    ]
    return f"In which place is the {thing} of the {roles[0].name}?", chains


_FAMILIES: dict[str, Callable[[random.Random, str, Sequence[str], Sequence[Named]], tuple[str, list[_Chain]]]] = {
    "counting": _counting,
    "placing": _placing,
}


def detour_items(split: str, number: int, seed: int) -> list[EvaluationItem]:
    """Make items with two chains of the same form, of which the question asks for one.

    Facts, question, reasoning and answer name people, places and numbers in different words, so the evidence cannot be
    found by matching strings. Which chain comes first is drawn anew for each part of the text.

    Args:
        split: ``"dev"`` or ``"test"``: their roles, places, names and things differ.
        number: of items.
        seed: of the random choices.

    Raises:
        InvalidInputError: another split, or fewer than one item.
    """
    check_items(split, number)
    rng = random.Random(f"detour {split} {seed}")
    items: list[EvaluationItem] = []
    seen: set[str] = set()
    for index in range(number):
        # The families alternate, so that the first items hold both.
        family = "counting" if index % 2 == 0 else "placing"
        for _ in range(_TRIES):
            item = _detour_item(rng, split, family, f"detour-{split}-{seed}-{index}")
            text = str(item.prompt)
            if text not in seen:
                seen.add(text)
                items.append(item)
                break
        else:
            raise InvalidInputError(
                f"number: must be at most {len(items)} for this seed, got {number}: items repeat; ask for fewer"
            )
    return items


def _detour_item(rng: random.Random, split: str, family: str, name: str) -> EvaluationItem:
    """Make one item."""
    names = rng.sample(WORDS[split].names, 2)
    roles = rng.sample(_ROLES[split], 2)
    question, chains = _FAMILIES[family](rng, split, names, roles)

    # Each part of the text draws its own order of the two chains: (sentence, belongs to the evidence).
    parts: list[list[tuple[str, bool]]] = []
    for sentences in (
        [chain.facts[0] for chain in chains],
        [chain.facts[1] for chain in chains],
        [chain.reasoning for chain in chains],
    ):
        part = list(zip(sentences, (True, False), strict=True))
        rng.shuffle(part)
        parts.append(part)
    # The labels: the sentences of the first chain are evidence, those of the second a detour.
    evidence = []
    detour_sentences = []
    for part in parts:
        for sentence, is_evidence in part:
            if is_evidence:
                evidence.append(sentence)
            else:
                detour_sentences.append(sentence)

    # The question comes last in the prompt, and asks for the first chain.
    roles_part, facts_part, reasoning_part = parts
    facts = [sentence for sentence, _ in [*roles_part, *facts_part]]
    reasoning = [sentence for sentence, _ in reasoning_part]
    answer = chains[0].answer
    return EvaluationItem(
        id=name,
        prompt=chat(" ".join([*facts, question])),
        response="\n".join([*reasoning, f"Answer: {answer}"]),
        answer=answer,
        data={
            "family": family,
            "expected": answer,
            "evidence": evidence,
            "detour": detour_sentences,
        },
    )


def tokens_of_sentence(subject: Subject, sentence: str) -> list[int]:
    """List the tokens of a sentence that hold a letter or a digit.

    Raises:
        InvalidInputError: the text does not hold the sentence exactly once.
    """
    text = subject.base.text
    begin = text.find(sentence)
    if begin < 0 or text.find(sentence, begin + 1) >= 0:
        raise InvalidInputError(
            f"data: each sentence must stand in the text once, got {text.count(sentence)} times {sentence!r}; correct "
            "the item"
        )
    return tokens_at(subject, begin, begin + len(sentence), words_only=True)


@evaluation_task(
    "detour",
    items=detour_items,
    metrics=(PRECISION, AUROC, AVERAGE_PRECISION),
    shows="the scores separate the sentences that the answer follows from, from sentences of the same form that it "
    "does not follow from; half of the scored tokens are evidence",
    cannot_show="whether the model used the evidence: the labels follow from the text, not from the model; read the "
    "items that the model answers rightly",
    licence=LICENCE,
)
def detour(subject: Subject) -> GoldUnits:
    """Separate the tokens of the evidence from those of a detour that has the same form."""
    data = subject.item.data
    units: list[list[int]] = []
    gold: list[bool] = []
    for kind, is_evidence in (("evidence", True), ("detour", False)):
        for sentence in data.get(kind, ()):
            tokens = tokens_of_sentence(subject, sentence)
            units += [[position] for position in tokens]
            gold += [is_evidence] * len(tokens)

    # In the order of the text, so that the choice among equal scores does not favour the evidence.
    positions = [unit[0] for unit in units]
    order = np.argsort(positions, kind="stable")
    return GoldUnits(
        units=[units[place] for place in order],
        gold=np.array(gold, dtype=bool)[order],
        kind="evidence of a generated text",
    )
