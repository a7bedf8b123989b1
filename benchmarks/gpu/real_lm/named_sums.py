"""A task for instruction models: six small sums on named quantities, of which one is asked for.

The model is told to work out all six and to give one. The other five are unused work of the same kind, so the task
marks decisive tokens and detours in text that any instruction model writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from flowgraph import final_part
from rl.errors import TaskError
from rl.records import CharSpan, Sample
from rl.tasks.base import check_integer, check_problem

NAMES = ("apples", "pears", "plums", "figs", "nuts", "eggs", "cups", "pens", "books", "coins")
NUM_SUMS = 6
_ANSWER = re.compile(r"answer\s*(?:is|:)?\s*\**\s*(-?\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class _Sums:
    """Six sums and the name asked for.

    Attributes:
        numbers: of each sum, by its name.
        asked: one of the names.
    """

    numbers: dict[str, list[int]]
    asked: str

    @property
    def values(self) -> dict[str, int]:
        """Return the results by name."""
        return {name: sum(numbers) for name, numbers in self.numbers.items()}

    @property
    def text(self) -> str:
        """Return the message of the user."""
        lines = [f"{name} = {' + '.join(map(str, numbers))}" for name, numbers in self.numbers.items()]
        return (
            "\n".join(lines) + "\nWork out all of them, one on each line, in this order. Then write 'Answer:' and the "
            f"number of {self.asked}."
        )

    @property
    def solution(self) -> str:
        """Return a right response."""
        lines = [
            f"{name} = {' + '.join(map(str, numbers))} = {self.values[name]}" for name, numbers in self.numbers.items()
        ]
        return "\n".join(lines) + f"\nAnswer: {self.values[self.asked]}"


@dataclass(frozen=True)
class NamedSums:
    """Six sums of two or three numbers, each with a name; the reward is 1 for the value of the name asked for.

    Args:
        terms: numbers of each sum, 2 or 3.
        largest: of the numbers.
        seed: of the stream of problems.

    Raises:
        TaskError: an option outside its range.

    Example:
        >>> task = NamedSums()
        >>> sample = task.sample("train", 0)
        >>> task.reward(sample, f"Answer: {sample.answer}")
        1.0
    """

    terms: int = 2
    largest: int = 30
    seed: int = 0
    name: str = "named_sums"

    def __post_init__(self) -> None:
        check_integer("terms", self.terms, "2 is the default", least=2, most=3)
        check_integer("largest", self.largest, "30 is the default", least=2)
        check_integer("seed", self.seed, "0 is the default")
        if self.name != "named_sums":
            raise TaskError(f"name: must be 'named_sums', got {self.name!r}; leave it out")

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split, as one message of the user.

        Raises:
            TaskError: an unknown split, or a number that is not an integer of at least 0.
        """
        check_problem(split, index)
        random = Random(f"named sums/{self.terms}/{self.largest}/{self.seed}/{split}/{index}")
        # A worked example shows the form, so that small models follow it too.
        example = self._sums(random)
        sums = self._sums(random)
        return Sample(
            index=index,
            prompt=[
                {"role": "user", "content": example.text},
                {"role": "assistant", "content": example.solution},
                {"role": "user", "content": sums.text},
            ],
            answer=str(sums.values[sums.asked]),
            metadata={"asked": sums.asked, "names": list(sums.values)},
        )

    def _sums(self, random: Random) -> _Sums:
        """Draw six sums and the name that is asked for."""
        numbers = {}
        for name in random.sample(NAMES, NUM_SUMS):
            numbers[name] = [random.randint(1, self.largest) for _ in range(self.terms)]
        return _Sums(numbers, random.choice(list(numbers)))

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the last number that follows the word "answer", in the final part of the response."""
        return _stated_answer(completion, "")

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1.0 if the stated answer is the value asked for, else 0.0."""
        span = _stated_answer(completion, sample.opening)
        return float(span is not None and completion[slice(*span)] == sample.answer)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the result of the sum asked for, where it is worked out before the answer."""
        asked = sample.metadata["asked"]
        return [span for name, span in _results(sample, completion) if name == asked]

    def detours(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the results of the five other sums."""
        asked = sample.metadata["asked"]
        return [span for name, span in _results(sample, completion) if name != asked]


def _stated_answer(completion: str, opening: str) -> CharSpan | None:
    """Find the number of the last stated answer in the final part."""
    part = final_part(completion, opening=opening)
    found = None
    for match in _ANSWER.finditer(completion):
        if part.holds(*match.span(1)):
            found = match.span(1)
    return found


def _results(sample: Sample, completion: str) -> list[tuple[str, CharSpan]]:
    """Find the results that are stated before the answer: the last number of each line that begins with a name."""
    answer = _ANSWER.search(completion)
    end = len(completion) if answer is None else answer.start()
    results = []
    for line in re.finditer(r"[^\n]+", completion[:end]):
        words = re.search(r"[A-Za-z]+", line[0])
        if words is None or words[0].lower() not in sample.metadata["names"]:
            continue
        # A line without a number behind the name, or without a result, states nothing.
        numbers = list(_NUMBER.finditer(line[0], words.end()))
        if numbers:
            start, stop = numbers[-1].span()
            results.append((words[0].lower(), (line.start() + start, line.start() + stop)))
    return results
