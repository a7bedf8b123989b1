"""Programs: a task in which every line is worked out, and the answer depends on some of them.

A problem is a straight-line program of eight lines, each a digit or an earlier variable plus an addend, and a variable
that is asked for: ``A=7;C=A+4;B=3;D=C+5;...?D:``. Sums are modulo 10. A response works out every line in order,
``A=7;C=A+4=1;B=3;D=C+5=6;``, and ends in the variable and its value, ``#D=6``. Lines on which that variable does not
depend are *detours*: they take the same skill, and nothing reads their results.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from flowgraph import final_part
from rl.errors import TaskError
from rl.records import CharSpan, Sample
from rl.tasks.base import check_integer, check_problem
from rl.tasks.definitions import (
    ADDENDS,
    NO_MISTAKES,
    Definition,
    Definitions,
    Mistakes,
    lineage,
    read_definitions,
    stated_root,
    stated_sum,
    value_of,
    wrong_right_side,
)

NAMES = "ABCDEFGH"
"""The eight variables of every problem."""

_DEPTHS = (2, 3)
"""Sums between the queried variable and its root."""

_ROOT_PROBABILITY = 0.25
"""A line other than the first is a digit with this probability."""

_LINE = re.compile(r"([A-H])(=[A-H]\+[3-7])?(=[0-9])")
_ANSWER = re.compile(r"#([A-H])=([0-9])\Z")


@dataclass(frozen=True)
class Program:
    """The task of programs; a problem is a function of the seed, the split and the number.

    Args:
        seed: of the stream of problems.

    Raises:
        TaskError: an option has another type.

    Example:
        >>> task = Program(seed=1)
        >>> sample = task.sample("train", 0)
        >>> sample.prompt, sample.answer
        ('D=1;A=D+7;G=D+5;C=5;B=A+6;E=B+4;H=4;F=B+4;?E:', '8')
        >>> response = demonstration(sample, Random(0))
        >>> response
        'D=1;A=D+7=8;G=D+5=6;C=5;B=A+6=4;E=B+4=8;H=4;F=B+4=8;#E=8'
        >>> [response[start:end] for start, end in task.oracle(sample, response)]
        ['=1', '=D+7', '=8', '=A+6', '=4', '=B+4', '=8']
        >>> [response[start:end] for start, end in task.detours(sample, response)]
        ['=D+5', '=6', '=5', '=4', '=B+4', '=8']
    """

    seed: int = 0
    name: str = "program"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, "0 is the default")
        if self.name != "program":
            raise TaskError(f"name: must be 'program', got {self.name!r}; leave it out")

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split.

        Raises:
            TaskError: an unknown split, or a number that is not an integer of at least 0.
        """
        check_problem(split, index)
        random = Random(f"program/{self.seed}/{split}/{index}")

        # Programs without a variable at one of the depths are drawn again.
        definitions: Definitions = {}
        queries: list[str] = []
        while not queries:
            definitions = _random_program(random)
            queries = [name for name in definitions if len(lineage(name, definitions)) - 1 in _DEPTHS]
        queried = random.choice(queries)
        lines = [f"{name}{definition.text};" for name, definition in definitions.items()]
        return Sample(
            index=index,
            prompt="".join(lines) + f"?{queried}:",
            answer=str(value_of(queried, definitions)),
            metadata={"needed": lineage(queried, definitions)[::-1]},
        )

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the digit of ``#NAME=DIGIT`` at the end of the completion; with more text behind it there is none."""
        match = _stated_answer(completion)
        if match is None:
            return None
        return match.span(2)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1.0 if the completion ends in the queried variable and its value, else 0.0; no line counts."""
        match = _stated_answer(completion, sample.opening)
        if match is None:
            return 0.0
        is_queried = match[1] == sample.metadata["needed"][-1]
        return float(is_queried and match[2] == sample.answer)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the right-hand sides and the values that are stated of the variables that the answer depends on.

        A line is a variable, its right-hand side where it has one, and its value, before the first ``#``; each span
        begins at ``=``. It is marked by its variable, whether it is right or wrong.
        """
        return _marked(sample, completion, is_needed=True)

    def detours(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the right-hand sides and the values that are stated of the other variables."""
        return _marked(sample, completion, is_needed=False)


# Problems as data ---------------------------------------------------------------------------------------


def _random_program(random: Random) -> Definitions:
    """Draw eight lines; the first is a digit, and each other one a digit or a sum on an earlier line."""
    definitions: Definitions = {}
    for name in random.sample(NAMES, len(NAMES)):
        if not definitions or random.random() < _ROOT_PROBABILITY:
            definitions[name] = Definition(None, random.randint(0, 9))
        else:
            definitions[name] = Definition(random.choice(list(definitions)), random.choice(ADDENDS))
    return definitions


def _stated_answer(completion: str, opening: str = "") -> re.Match[str] | None:
    """Find the ending that states the answer; the end of thinking that is not closed states none.

    Args:
        completion: the response.
        opening: what the prompt wrote of the response; see :func:`flowgraph.final_part`.
    """
    match = _ANSWER.search(completion)
    if match is None or not final_part(completion, opening=opening).holds(*match.span()):
        return None
    return match


def _marked(sample: Sample, completion: str, *, is_needed: bool) -> list[CharSpan]:
    """Return what is stated of the variables that are needed, or of those that are not."""
    needed = set(sample.metadata["needed"])
    spans: list[CharSpan] = []
    for line in _LINE.finditer(completion.split("#", 1)[0]):
        if (line[1] in needed) != is_needed:
            continue
        if line[2] is not None:
            spans.append(line.span(2))
        spans.append(line.span(3))
    return spans


# Responses ----------------------------------------------------------------------------------------------


def demonstration(sample: Sample, random: Random, mistakes: Mistakes = NO_MISTAKES) -> str:
    """Write a response that works out every line in order, without its end token.

    Args:
        sample: a problem of :class:`Program`.
        random: draws mistakes.
        mistakes: probabilities of mistakes; later lines and the answer continue from what was stated.
    """
    definitions = read_definitions(str(sample.prompt))
    values: dict[str, int] = {}
    lines: list[str] = []
    for name, definition in definitions.items():
        if definition.reference is None:
            values[name] = stated_root(definition.digit, random, mistakes)
            lines.append(f"{name}={values[name]};")
            continue
        stated = definition
        if random.random() < mistakes.right_side:
            # Only earlier lines have a value.
            stated = wrong_right_side(definition, list(values), random)
        values[name] = stated_sum(values[str(stated.reference)], stated.digit, random, mistakes)
        lines.append(f"{name}{stated.text}={values[name]};")
    queried = sample.metadata["needed"][-1]
    return "".join(lines) + f"#{queried}={values[queried]}"
