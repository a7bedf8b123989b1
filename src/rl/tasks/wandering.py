"""The wandering chain: a multi-hop task whose responses contain detours that take the same skill.

A problem defines six variables in two trees and asks for one of them, ``A=B+3;E=2;B=7;...?Af0d1:``. Sums are modulo
10. A response unrolls a variable to the root of its tree, states the root, and computes forward again: one *segment*.
The queried variable has one segment, and D variables of the other tree have one each, before or after it: these are
*detours*, on which the answer cannot depend. F filler words on average follow every separator. The response ends in
the queried variable and its value, ``#A=0``. A level is written ``F:D``.
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

NAMES = "ABCDEF"
"""The six variables of every problem."""

SEPARATORS = ";,~_"
"""A step ends in any of these."""

FILLERS = (" so", " now", " we", " then", " see", " that", " well", " okay", " thus", " next", " hmm", " right")
"""The filler words, each with the space in front of it."""

LEVELS = ("0:0", "0:1", "0:2", "0:5", "2:0", "4:0")
"""The levels that the shipped base model was taught, as filler words : detours."""

_FILLER_STEPS = (1, 3, 5, 8)
"""The next filler word is one of these numbers further in the list, which is a circle."""

_STEP = re.compile(r"([A-F])(=[A-F]\+[3-7]|=[0-9])")
_ANSWER = re.compile(r"#([A-F])=([0-9])\Z")


@dataclass(frozen=True)
class Wandering:
    """The task of wandering chains; a problem is a function of the options, the split and the number.

    The main tree is a chain of three or four variables, each the one before it plus an addend of 3 to 7; its last
    variable is queried. The other variables form the second tree: a root, and variables derived from a random earlier
    member.

    Args:
        level: ``"F:D"``, one of :data:`LEVELS`: mean filler words after a separator, and detours of a response. The
            prompt states both, so the policy knows them; the reward does not depend on them.
        seed: of the stream of problems.

    Raises:
        TaskError: an option has another type, or the base model was not taught the level.

    Example:
        >>> task = Wandering(level="0:1", seed=2)
        >>> sample = task.sample("train", 0)
        >>> sample.prompt, sample.answer
        ('F=D+3;A=C+3;E=B+7;C=F+5;B=8;D=9;?Af0d1:', '0')
        >>> response = demonstration(sample, Random(0))
        >>> response
        'A=C+3;C=F+5,F=D+3;D=9~F=2;C=7_A=0,E=B+7_B=8;E=5;#A=0'
        >>> [response[start:end] for start, end in task.detours(sample, response)]
        ['=B+7', '=8', '=5']
    """

    level: str = "0:0"
    seed: int = 0
    name: str = "wandering"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise TaskError(
                f"level: must be one of {', '.join(LEVELS)} (filler words : detours), which the base model was taught, "
                f"got {self.level!r}; choose one of them, as text"
            )
        check_integer("seed", self.seed, "0 is the default")
        if self.name != "wandering":
            raise TaskError(f"name: must be 'wandering', got {self.name!r}; leave it out")

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split; a level changes the last tokens of its prompt and nothing else.

        Raises:
            TaskError: an unknown split, or a number that is not an integer of at least 0.
        """
        check_problem(split, index)
        random = Random(f"wandering/{self.seed}/{split}/{index}")

        # The first names are the main tree, from its root to the queried variable.
        names = random.sample(NAMES, len(NAMES))
        num_needed = random.choice((3, 4))
        definitions: Definitions = {}
        for position, variable in enumerate(names):
            if position in (0, num_needed):
                definitions[variable] = Definition(None, random.randint(0, 9))
            elif position < num_needed:
                definitions[variable] = Definition(names[position - 1], random.choice(ADDENDS))
            else:
                parent = random.choice(names[num_needed:position])
                definitions[variable] = Definition(parent, random.choice(ADDENDS))

        order = list(names)
        random.shuffle(order)
        lines = [f"{variable}{definitions[variable].text};" for variable in order]
        queried = names[num_needed - 1]
        num_fillers, num_detours = read_level(self.level)
        return Sample(
            index=index,
            prompt="".join(lines) + f"?{queried}f{num_fillers}d{num_detours}:",
            answer=str(value_of(queried, definitions)),
            metadata={"level": self.level, "needed": names[:num_needed]},
        )

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the digit of ``#NAME=DIGIT`` at the end of the completion; with more text behind it there is none."""
        match = _stated_answer(completion)
        if match is None:
            return None
        return match.span(2)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1.0 if the completion ends in the queried variable and its value, else 0.0; no step counts."""
        match = _stated_answer(completion, sample.opening)
        if match is None:
            return 0.0
        is_queried = match[1] == sample.metadata["needed"][-1]
        return float(is_queried and match[2] == sample.answer)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the right-hand sides, roots and sums that are stated of variables of the main tree.

        A step is a variable and what is stated of it, such as ``A=B+3`` or ``A=0``, before the first ``#``; its span
        begins at ``=``. It is marked by its variable, whether it is right or wrong, stated once or again.
        """
        needed = set(sample.metadata["needed"])
        return [step.span(2) for step in _steps(completion) if step[1] in needed]

    def detours(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the right-hand sides, roots and sums that are stated of variables of the second tree."""
        needed = set(sample.metadata["needed"])
        return [step.span(2) for step in _steps(completion) if step[1] not in needed]


# Problems as data ---------------------------------------------------------------------------------------


def _steps(completion: str) -> list[re.Match[str]]:
    """Find the steps before the first ``#``: variable and statement are groups 1 and 2."""
    return list(_STEP.finditer(completion.split("#", 1)[0]))


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


def read_level(level: str) -> tuple[int, int]:
    """Return the filler words and the detours of a level.

    Example:
        >>> read_level("4:0")
        (4, 0)
    """
    num_fillers, _, num_detours = level.partition(":")
    return int(num_fillers), int(num_detours)


# Responses ----------------------------------------------------------------------------------------------


def demonstration(sample: Sample, random: Random, mistakes: Mistakes = NO_MISTAKES) -> str:
    """Write a response with the fillers and detours of the problem's level, without its end token.

    Args:
        sample: a problem of :class:`Wandering`.
        random: draws detours, separators, filler words and mistakes.
        mistakes: probabilities of mistakes; later steps and the answer continue from what was stated.
    """
    definitions = read_definitions(str(sample.prompt))
    needed = sample.metadata["needed"]
    queried = needed[-1]
    num_fillers, num_detours = read_level(sample.metadata["level"])

    # Detours resolve derived variables of the second tree, before or after the queried one.
    unneeded = [name for name in definitions if name not in needed and definitions[name].reference is not None]
    before: list[str] = []
    after: list[str] = []
    for _ in range(num_detours):
        side = random.choice((before, after))
        side.append(random.choice(unneeded))

    steps: list[str] = []
    answer = 0
    for position, variable in enumerate([*before, queried, *after]):
        segment, value = _segment(variable, definitions, random, mistakes)
        steps.extend(segment)
        if position == len(before):
            answer = value

    # Every step ends in a separator and a walk through the filler words.
    text = ""
    word = random.randrange(len(FILLERS))
    for step in steps:
        text += step + random.choice(SEPARATORS)
        for _ in range(random.randint(num_fillers // 2, num_fillers * 3 // 2)):
            text += FILLERS[word]
            word = (word + random.choice(_FILLER_STEPS)) % len(FILLERS)
    return f"{text}#{queried}={answer}"


def _segment(variable: str, definitions: Definitions, random: Random, mistakes: Mistakes) -> tuple[list[str], int]:
    """Write the steps of one variable: to the root, the root, and forward; return them and the value stated last."""
    # Back along the parents to a root.
    steps: list[str] = []
    unrolled = [variable]
    addends: list[int] = []
    while definitions[unrolled[-1]].reference is not None:
        stated = definitions[unrolled[-1]]
        if random.random() < mistakes.right_side:
            # The parent does not descend from a variable of this segment, so a segment always ends in a root.
            parents = [name for name in NAMES if not set(lineage(name, definitions)) & set(unrolled)]
            stated = wrong_right_side(stated, parents, random)
        steps.append(unrolled[-1] + stated.text)
        addends.append(stated.digit)
        unrolled.append(str(stated.reference))

    root = unrolled.pop()
    value = stated_root(definitions[root].digit, random, mistakes)
    steps.append(f"{root}={value}")

    # Forward again, one sum a step.
    for name, addend in zip(reversed(unrolled), reversed(addends), strict=True):
        value = stated_sum(value, addend, random, mistakes)
        steps.append(f"{name}={value}")
    return steps, value
