"""A multi-hop variable chain: a small task of our own whose decisive tokens are known.

A problem is a shuffled list of assignments and one question, ``f=c+2;a=7;d=b+1;c=a+1;b=4;f?``. Sums are modulo 10.
The response traces the variable asked for back to a literal, resolves the variables on the way from there on, and
states the last one again behind a ``#``: ``fca=7,c=8,f=0#0``. It may do the same for other variables before
(``db=4,d=5,``): these are *detours*, and the tokens in them do not matter for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_lowercase
from typing import Any

from rl.errors import TaskError
from rl.records import CharSpan, Sample
from rl.tasks.base import SPLITS

_LINE = re.compile(r"(?:^|(?<=,))([a-z]+)=([0-9])(?=,|\Z)")
_ANSWER = re.compile(r"#([0-9])\Z")
_WELL_FORMED = re.compile(r"(?:[a-z]+=[0-9],)*[a-z]+=[0-9]#[0-9]")
_BRANCH = 2 / 3
"""A distractor refers to an earlier variable with this probability, and is a literal otherwise."""

Assignments = dict[str, tuple[str | None, int]]
"""Variable -> the variable that it refers to (None: a literal) and the digit of its assignment."""


@dataclass(frozen=True)
class Chain:
    """Problems of the variable chain; each a function of the options, the split and the number alone.

    The variable asked for is the end of a chain of ``hops`` references that begins with a literal. The other variables
    are distractors: literals, or references to any other variable, those on the needed chain included.

    Args:
        num_variables: assignments of a problem, 2 to 26.
        hops: least and greatest number of references on the needed chain; drawn uniformly.
        max_addend: the digits added are uniform in 1 to this, at most 9.
        seed: of the stream of problems.

    Raises:
        TaskError: an option has another type or lies outside its range.

    Example:
        >>> task = Chain(num_variables=5, hops=(2, 2), max_addend=9, seed=1)
        >>> sample = task.sample("train", 0)
        >>> sample.prompt, sample.answer
        ('s=f+9;x=9;v=f+2;o=s+3;f=5;o?', '7')
        >>> demonstration(sample, Random(0), detours=1)
        'f=5,osf=5,s=4,o=7#7'
        >>> task.oracle(sample, "x=9,osf=5,s=4,o=7#7")
        [(4, 5), (5, 6), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17)]
    """

    num_variables: int = 6
    hops: tuple[int, int] = (3, 5)
    max_addend: int = 3
    seed: int = 0
    name: str = "chain"

    def __post_init__(self) -> None:
        if isinstance(self.hops, list):  # as YAML and JSON give it
            object.__setattr__(self, "hops", tuple(self.hops))
        _whole("num_variables", self.num_variables, 2, 26, "6 is the default")
        _whole("max_addend", self.max_addend, 1, 9, "3 is the default")
        _whole("seed", self.seed, None, None, "0 is the default")
        if self.name != "chain":
            raise TaskError(f"name: must be 'chain', got {self.name!r}; leave it out")
        most = self.num_variables - 1
        whole = isinstance(self.hops, tuple) and len(self.hops) == 2 and all(type(hop) is int for hop in self.hops)
        if not whole or not 1 <= self.hops[0] <= self.hops[1] <= most:
            raise TaskError(
                f"hops: must be two whole numbers 1 <= least <= greatest <= {most} (num_variables - 1), "
                f"got {self.hops!r}; use hops=({min(2, most)}, {min(4, most)})"
            )

    @property
    def size(self) -> None:
        """None: the stream has no end."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Problem number ``index`` of a split.

        Each problem has a generator of its own, seeded with text that holds the split, so "train" and "eval" are
        different streams. Nothing forbids that both draw the same problem; the space is so large that the first
        100 000 problems of each have none in common.

        Raises:
            TaskError: an unknown split, or a number that is no whole number of at least 0.
        """
        if split not in SPLITS:
            raise TaskError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}; choose one of them")
        _whole("index", index, 0, None, "problems are numbered from 0")
        random = Random(f"chain/{self.seed}/{split}/{index}")
        hops = random.randint(*self.hops)
        names = random.sample(ascii_lowercase, self.num_variables)
        assignments: Assignments = {}
        for position, variable in enumerate(names):
            earlier = names[position - 1] if 0 < position <= hops else None
            if position > hops and random.random() < _BRANCH:
                earlier = random.choice(names[:position])
            digit = random.randint(0, 9) if earlier is None else random.randint(1, self.max_addend)
            assignments[variable] = (earlier, digit)
        order = list(assignments)
        random.shuffle(order)
        asked = names[hops]
        lines = [f"{v}={_right_side(*assignments[v])}" for v in order]
        values = resolve(assignments)
        return Sample(
            index=index,
            prompt=";".join([*lines, f"{asked}?"]),
            answer=str(values[asked]),
            metadata={"hops": hops, "needed": names[: hops + 1], "values": values},
        )

    def find_answer(self, completion: str) -> CharSpan | None:
        """The digit of a ``#`` and one digit that end the completion; anything behind them spoils it."""
        found = _ANSWER.search(completion)
        return found.span(1) if found else None

    def reward(self, sample: Sample, completion: str) -> float:
        """1.0 where the stated answer is the reference, else 0.0; how it was reached does not count."""
        span = self.find_answer(completion)
        return float(span is not None and completion[slice(*span)] == sample.answer)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """The variables and values of the needed chain, each a span of one character.

        A line is one or more letters, ``=`` and a digit, between commas, before the first ``#``. A letter is decisive
        where the variable asked for depends on that variable (itself included), in a trace as in front of ``=``; a
        digit is decisive where the letter in front of its ``=`` is, right or wrong, stated once or again. Not decisive
        are the separators ``=``, ``,`` and ``#``, variables and values of detours, anything that is not part of such
        a line, and the answer behind the ``#``, which merely repeats the last value.
        """
        needed = set(sample.metadata["needed"])
        spans: list[CharSpan] = []
        for line in _LINE.finditer(completion.split("#", 1)[0]):
            spans += [(place, place + 1) for place in range(*line.span(1)) if completion[place] in needed]
            if line[1][-1] in needed:
                spans.append(line.span(2))
        return spans


def correct_sum(value: int, addend: int) -> int:
    """The sum of two digits modulo 10."""
    return (value + addend) % 10


def demonstration(
    sample: Sample, random: Random, detours: int = 0, add: Callable[[int, int], int] = correct_sum
) -> str:
    """A response: the variable asked for is traced and resolved, after others that it does not need.

    Args:
        sample: a problem of :class:`Chain`.
        random: draws the detours.
        detours: variables to trace and resolve before, each with all that it rests on; never the one asked for.
        add: how sums are done; a wrong one is gone on from, up to the answer.
    """
    assignments = read_prompt(str(sample.prompt))
    asked = sample.metadata["needed"][-1]
    others = [variable for variable in assignments if variable != asked]
    targets = [*random.sample(others, min(detours, len(others))), asked]
    lines = []
    for target in targets:
        trace = target
        while earlier := assignments[trace[-1]][0]:
            trace += earlier
        value = assignments[trace[-1]][1]
        lines.append(f"{trace}={value}")
        for variable in trace[-2::-1]:
            value = add(value, assignments[variable][1])
            lines.append(f"{variable}={value}")
    return ",".join(lines) + lines[-1].replace("=", "#")[-2:]


def first_error(sample: Sample, completion: str) -> str | None:
    """What first goes wrong in a response; None where nothing does.

    Each line is judged by what the response itself stated before, so one slip is not counted again further down:

    - ``"format"``: not lines and an answer from end to end;
    - ``"lookup"``: a trace that leaves the references of the problem, or a literal with another digit than its own;
    - ``"order"``: a trace that stops before a literal, or a line that is not the next one on the way back;
    - ``"sum"``: a digit that is not the one before plus the addend, be it misread or miscalculated;
    - ``"end"``: a chain that is left unfinished, or is not the one asked for, or an answer that is not its digit.
    """
    if not _WELL_FORMED.fullmatch(completion):
        return "format"
    assignments = read_prompt(str(sample.prompt))
    text, answer = completion.split("#")
    waiting = ""
    variable, value = "", 0
    for line in text.split(","):
        letters, before, value = line[:-2], value, int(line[-1])
        variable = letters[-1]
        error = _wrong_trace(assignments, letters, value) if not waiting else _wrong_step(
            assignments, letters, before, value, waiting[-1])  # fmt: skip
        if error:
            return error
        waiting = waiting[:-1] if waiting else letters[:-1]
    return "end" if waiting or variable != sample.metadata["needed"][-1] or value != int(answer) else None


def _wrong_trace(assignments: Assignments, letters: str, value: int) -> str | None:
    if letters[0] not in assignments:
        return "lookup"
    for variable, earlier in pairwise(letters):
        if assignments[variable][0] != earlier:
            return "lookup"
    earlier, digit = assignments[letters[-1]]
    return "order" if earlier else "lookup" if value != digit else None


def _wrong_step(assignments: Assignments, letters: str, before: int, value: int, expected: str) -> str | None:
    if letters != expected:
        return "order"
    return "sum" if value != correct_sum(before, assignments[expected][1]) else None


def read_prompt(prompt: str) -> Assignments:
    """The assignments of a prompt, in its order."""
    assignments: Assignments = {}
    for line in prompt.split(";")[:-1]:
        variable, right = line.split("=")
        earlier, _, digit = right.rpartition("+")
        assignments[variable] = (earlier or None, int(digit))
    return assignments


def resolve(assignments: Assignments) -> dict[str, int]:
    """The value of every variable; one that is referred to must come first."""
    values: dict[str, int] = {}
    for variable, (earlier, digit) in assignments.items():
        values[variable] = (digit + (values[earlier] if earlier else 0)) % 10
    return values


def _right_side(earlier: str | None, digit: int) -> str:
    return f"{earlier}+{digit}" if earlier else str(digit)


def _whole(name: str, value: Any, least: int | None, most: int | None, remedy: str) -> None:
    bounds = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    within = type(value) is int and (least is None or value >= least) and (most is None or value <= most)
    if not within:
        raise TaskError(f"{name}: must be a whole number{bounds}, got {value!r}; {remedy}")
