"""Make short problems with a reasoned solution, in six families; dev and test share neither wording nor names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.records import EvaluationItem

LICENCE = "MIT, written for this library"
SPLITS = ("dev", "test")
_TRIES = 40
"""Draws of a family that may repeat an earlier problem before the family counts as exhausted."""


@dataclass(frozen=True)
class Words:
    """The names and things of one split.

    Attributes:
        women: names of women.
        men: names of men.
        things: plural nouns that can be counted.
        capitals: countries and their capitals.
    """

    women: tuple[str, ...]
    men: tuple[str, ...]
    things: tuple[str, ...]
    capitals: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return self.women + self.men


@dataclass(frozen=True)
class Problem:
    """A question with its solution.

    Attributes:
        family: its kind.
        question: the text of the question.
        lines: the reasoning, one step each, without the answer's own line.
        answer: the right answer as text.
    """

    family: str
    question: str
    lines: tuple[str, ...]
    answer: str


WORDS = {
    "dev": Words(
        women=("Anna", "Clara", "Emma", "Grace", "Julia", "Mia"),
        men=("Ben", "David", "Frank", "Henry", "Leo", "Tom"),
        things=("apples", "books", "cards", "coins", "cups", "pens", "shells", "stamps"),
        capitals=(
            ("France", "Paris"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Japan", "Tokyo"),
            ("Greece", "Athens"),
            ("Russia", "Moscow"),
            ("Norway", "Oslo"),
            ("Cuba", "Havana"),
        ),
    ),
    "test": Words(
        women=("Alice", "Diana", "Helen", "Kate", "Nora", "Ruth"),
        men=("Carl", "Eric", "Jack", "Louis", "Paul", "Simon"),
        things=("balls", "bricks", "eggs", "keys", "lamps", "plates", "roses", "tickets"),
        capitals=(
            ("England", "London"),
            ("Germany", "Berlin"),
            ("China", "Beijing"),
            ("Egypt", "Cairo"),
            ("Austria", "Vienna"),
            ("Ireland", "Dublin"),
            ("Poland", "Warsaw"),
            ("Portugal", "Lisbon"),
        ),
    ),
}


def _arithmetic(rng: random.Random, words: Words, split: str) -> Problem:
    """Make an addition followed by a subtraction."""
    first, second = rng.sample(words.names, 2)
    thing = rng.choice(words.things)
    start = rng.randint(11, 30)
    more = rng.randint(3, 19)
    less = rng.randint(2, 9)
    # The smaller amount is below the first one, so that no intermediate result is negative.
    if split == "dev":
        total = start + more
        result = total - less
        question = (
            f"{first} has {start} {thing}. {first} buys {more} more and then gives {less} to {second}. "
            f"How many {thing} does {first} have now?"
        )
        lines = (
            f"At first {first} has {start} {thing}.",
            f"{first} buys {more} more.",
            f"Together that is {start} + {more} = {total}.",
            f"{second} gets {less} of them.",
            f"What is left is {total} - {less} = {result}.",
            f"So {first} keeps {result} {thing}.",
        )
    else:
        total = start - less
        result = total + more
        question = (
            f"A box holds {start} {thing}. In the morning {first} takes out {less}. In the evening {second} puts in "
            f"{more}. How many {thing} are in the box at night?"
        )
        lines = (
            f"We count the {thing} in the box.",
            f"The day starts with {start}.",
            f"After the morning there are {start} - {less} = {total}.",
            f"{second} puts in {more}.",
            f"After the evening there are {total} + {more} = {result}.",
            "Nothing else changes.",
        )
    return Problem("arithmetic", question, lines, str(result))


def _ordering(rng: random.Random, words: Words, split: str) -> Problem:
    """Make an order of four people from three comparisons in random sequence."""
    people = rng.sample(words.names, 4)
    relation = "taller" if split == "dev" else "older"
    superlative = "tallest" if split == "dev" else "oldest"
    opposite = "shortest" if split == "dev" else "youngest"
    # The facts are shuffled, so that the first or last name is not the answer.
    facts = [f"{high} is {relation} than {low}." for high, low in pairwise(people)]
    rng.shuffle(facts)
    asks_first = rng.random() < 0.5
    asked = superlative if asks_first else opposite
    answer = people[0] if asks_first else people[-1]
    question = f"{' '.join(facts)} Who is the {asked} of the four?"
    if split == "dev":
        question = f"{' '.join(facts)} Which person is the {asked}?"
    order = [f"{high} comes before {low}." for high, low in pairwise(people)]
    lines = (
        f"We sort the four people from the {superlative} down.",
        *order,
        f"The order is {', '.join(people)}.",
        f"The {asked} is {answer}.",
    )
    return Problem("ordering", question, lines, answer)


def _lookup(rng: random.Random, words: Words, split: str) -> Problem:
    """Make a table of four entries of which one is asked for."""
    people = rng.sample(words.names, 4)
    # Distinct numbers of two digits: the answer stands once in the table.
    numbers = rng.sample(range(11, 99), 4)
    asked = rng.randrange(4)
    answer = str(numbers[asked])
    if split == "dev":
        entries = ", ".join(f"{name} {number}" for name, number in zip(people, numbers, strict=True))
        question = f"Rooms: {entries}. Which room does {people[asked]} have?"
        checked = [f"Room {number} belongs to {name}." for name, number in zip(people, numbers, strict=True)]
        opening = f"We look for {people[asked]} in the list of rooms."
        closing = f"The entry of {people[asked]} says {answer}."
    else:
        entries = "; ".join(f"seat {number}: {name}" for name, number in zip(people, numbers, strict=True))
        question = f"The plan of the hall shows {entries}. On which seat does {people[asked]} sit?"
        checked = [f"{name} sits on {number}." for name, number in zip(people, numbers, strict=True)]
        opening = f"The person asked for is {people[asked]}."
        closing = f"So {people[asked]} is on {answer}."
    rng.shuffle(checked)
    return Problem("lookup", question, (opening, *checked, closing), answer)


# What the first person is to the third, from what the first is to the second, and the second to the third.
_KINSHIP = {
    ("mother", "mother"): "grandmother",
    ("mother", "father"): "grandmother",
    ("father", "mother"): "grandfather",
    ("father", "father"): "grandfather",
    ("sister", "mother"): "aunt",
    ("sister", "father"): "aunt",
    ("brother", "mother"): "uncle",
    ("brother", "father"): "uncle",
}


def _kinship(rng: random.Random, words: Words, split: str) -> Problem:
    """Make a relation of two links, with one that does not matter."""
    links = rng.choice(sorted(_KINSHIP))
    answer = _KINSHIP[links]
    article = "an" if answer[0] in "au" else "a"
    # Names fit the relations: a mother has the name of a woman.
    women = rng.sample(words.women, 3)
    men = rng.sample(words.men, 3)
    first = women.pop() if links[0] in ("mother", "sister") else men.pop()
    second = women.pop() if links[1] == "mother" else men.pop()
    third, other = rng.sample(women + men, 2)
    if split == "dev":
        facts = [
            f"{first} is the {links[0]} of {second}.",
            f"{second} is the {links[1]} of {third}.",
            f"{other} is a friend of {third}.",
        ]
        rng.shuffle(facts)
        question = f"{' '.join(facts)} What is {first} to {third}?"
        opening = f"We follow the links from {first} to {third}."
        aside = f"{other} is only a friend."
    else:
        facts = [
            f"{second} has a {links[0]}, {first}.",
            f"{third} has a {links[1]}, {second}.",
            f"{other} lives next door to {third}.",
        ]
        rng.shuffle(facts)
        question = f"{' '.join(facts)} How is {first} related to {third}?"
        opening = f"The family of {third} is needed here."
        aside = f"The neighbour {other} does not count."
    lines = (
        opening,
        f"{third} is a child of {second}.",
        aside,
        f"The {links[0]} of {second} is {first}.",
        f"The {links[0]} of a {links[1]} is {article} {answer}.",
        f"{first} is therefore the {answer} of {third}.",
    )
    return Problem("kinship", question, lines, answer)


def _conversion(rng: random.Random, words: Words, split: str) -> Problem:
    """Make a length or a time in a smaller unit, less a part of it."""
    name = rng.choice(words.names)
    large = rng.randint(2, 6)
    if split == "dev":
        thing = rng.choice(["rope", "board", "ribbon"])
        unit = "meters"
        small = "centimeters"
        factor = 100
        part = 10 * rng.randint(2, 9)
        question = (
            f"A {thing} is {large} {unit} long. {name} cuts off {part} {small}. How many {small} of the {thing} are "
            "left?"
        )
        action = f"{name} cuts off {part} {small}."
    else:
        thing = rng.choice(["concert", "train ride", "match"])
        unit = "hours"
        small = "minutes"
        factor = 60
        part = 5 * rng.randint(2, 9)
        question = (
            f"A {thing} takes {large} {unit}. {name} leaves {part} {small} before the end. For how many {small} does "
            f"{name} stay?"
        )
        action = f"The last {part} {small} are missed."
    total = large * factor
    lines = (
        f"The {thing} is given in {unit}, the rest in {small}.",
        f"One of the {unit} has {factor} {small}.",
        f"So {large} {unit} are {total} {small}.",
        action,
        f"We take {part} from {total}.",
        f"That gives {total - part} {small}.",
    )
    return Problem("conversion", question, lines, str(total - part))


def _fact(rng: random.Random, words: Words, split: str) -> Problem:
    """Make a question about a capital, with a second country that does not matter."""
    name, friend = rng.sample(words.names, 2)
    (country, capital), (other, other_capital) = rng.sample(words.capitals, 2)
    if split == "dev":
        question = (
            f"{name} travels to {country} and {friend} travels to {other}. {name} wants to see the capital. Which "
            f"city does {name} visit?"
        )
        opening = f"{name} is the one who is asked about."
    else:
        question = (
            f"{friend} was born in {other}. {name} was born in {country}, in its capital. In which city was {name} "
            "born?"
        )
        opening = f"The question is about {name}, not about {friend}."
    lines = (
        opening,
        f"{friend} belongs to {other}.",
        f"The capital there would be {other_capital}.",
        f"{name} belongs to {country}.",
        f"The capital of {country} is {capital}.",
        f"That is the city of {name}.",
    )
    return Problem("fact", question, lines, capital)


FAMILIES: dict[str, Callable[[random.Random, Words, str], Problem]] = {
    "arithmetic": _arithmetic,
    "ordering": _ordering,
    "lookup": _lookup,
    "kinship": _kinship,
    "conversion": _conversion,
    "fact": _fact,
}


def check_items(split: str, number: int) -> None:
    """Check a split and a number of items.

    Raises:
        InvalidInputError: another split, or fewer than one item.
    """
    if split not in SPLITS:
        raise InvalidInputError(f"split: must be 'dev' or 'test', got {split!r}; choose on dev, report test")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise InvalidInputError(f"number: must be a positive integer, got {number!r}; 60 items are a good start")


def problems(split: str, number: int, seed: int, families: Sequence[str] = tuple(FAMILIES)) -> list[Problem]:
    """Make distinct problems, one family after another.

    Args:
        split: ``"dev"`` or ``"test"``.
        number: how many; a longer list begins with the shorter one.
        seed: of the random choices; the same arguments give the same problems.
        families: which of :data:`FAMILIES`.

    Raises:
        InvalidInputError: another split, fewer than one problem, or more than the families have.
    """
    check_items(split, number)
    found = list(islice(_distinct(split, seed, families), number))
    if len(found) < number:
        raise InvalidInputError(
            f"number: must be at most {len(found)}, the distinct problems of these families, got {number}; ask for "
            "fewer items"
        )
    return found


def _distinct(split: str, seed: int, families: Sequence[str]) -> Iterator[Problem]:
    """Yield distinct problems from each family in turn, until every family is exhausted."""
    # A generator of its own for each family, so that the problems of one do not depend on the others.
    random_of = {family: random.Random(f"{family} {split} {seed}") for family in families}
    is_open = dict.fromkeys(families, True)
    seen: set[str] = set()
    for family in cycle(families):
        if not any(is_open.values()):
            return
        if not is_open[family]:
            continue
        # A draw may repeat an earlier problem; a family that only repeats itself is exhausted.
        for _ in range(_TRIES):
            problem = FAMILIES[family](random_of[family], WORDS[split], split)
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem
                break
        else:
            is_open[family] = False


def chat(question: str) -> list[dict[str, str]]:
    """Return a question as the only message of a chat."""
    return [{"role": "user", "content": question}]


def reasoned_items(split: str, number: int, seed: int) -> list[EvaluationItem]:
    """Make items whose response is a reasoned solution in lines, with the answer in a line of its own."""
    items = []
    for index, problem in enumerate(problems(split, number, seed)):
        lines = [*problem.lines, f"Answer: {problem.answer}"]
        item = EvaluationItem(
            id=f"{problem.family}-{split}-{seed}-{index}",
            prompt=chat(problem.question),
            response="\n".join(lines),
            answer=problem.answer,
            data={"family": problem.family, "expected": problem.answer, "response": "reasoned"},
        )
        items.append(item)
    return items


def short_items(split: str, number: int, seed: int) -> list[EvaluationItem]:
    """Make items whose response is the answer alone."""
    items = []
    for index, problem in enumerate(problems(split, number, seed)):
        item = EvaluationItem(
            id=f"{problem.family}-{split}-{seed}-{index}",
            prompt=chat(problem.question),
            response=f"Answer: {problem.answer}",
            answer=problem.answer,
            data={"family": problem.family, "expected": problem.answer, "response": "short"},
        )
        items.append(item)
    return items


def own_items(split: str, number: int, seed: int) -> list[EvaluationItem]:
    """Make items that the model answers itself, greedily; its answer is found in what it writes."""
    items = []
    for index, problem in enumerate(problems(split, number, seed)):
        item = EvaluationItem(
            id=f"{problem.family}-{split}-{seed}-{index}",
            prompt=chat(f"{problem.question} Answer in one short sentence."),
            data={"family": problem.family, "expected": problem.answer, "response": "own"},
        )
        items.append(item)
    return items
