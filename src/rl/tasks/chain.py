"""The variable chain: a small multi-hop task whose decisive tokens are known.

A problem is a shuffled list of assignments and one question, ``f=c+2;a=7;d=b+1;c=a+1;b=4;f?``. Sums are modulo 10.
A response traces the queried variable back to a literal, resolves the variables on the way forward, and repeats the
last value behind a ``#``: ``fca=7,c=8,f=0#0``. It may do the same for other variables before (``db=4,d=5,``): these
are *detours*, and their tokens do not influence the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from flowgraph import final_part
from rl.errors import TaskError
from rl.records import CharSpan, Sample
from rl.tasks.base import check_integer, check_problem

# A line of a response: a trace of one or more letters, "=" and a digit, between commas.
_LINE = re.compile(r"(?:^|(?<=,))([a-z]+)=([0-9])(?=,|\Z)")
_ANSWER = re.compile(r"#([0-9])\Z")
_WELL_FORMED = re.compile(r"(?:[a-z]+=[0-9],)*[a-z]+=[0-9]#[0-9]")

_REFERENCE_PROBABILITY = 2 / 3
"""A distractor refers to an earlier variable with this probability, and is a literal otherwise."""


class Assignment(NamedTuple):
    """The right side of an assignment.

    Attributes:
        reference: the variable that it refers to; None for a literal.
        digit: the literal, or the addend of a reference.
    """

    reference: str | None
    digit: int


Assignments = dict[str, Assignment]
"""Variable -> its assignment, in the order of the prompt."""


@dataclass(frozen=True)
class Chain:
    """The task of variable chains; a problem is a function of the options, the split and the number.

    The queried variable is the end of a chain of ``hops`` references that begins with a literal. The other variables
    are distractors: literals, or references to any other variable, including those of the needed chain.

    Args:
        num_variables: assignments of a problem, 2 to 26.
        hops: smallest and greatest number of references on the needed chain; drawn uniformly.
            A list, as YAML has it, is stored as a tuple.
        max_addend: addends are uniform from 1 to this number, at most 9.
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
    hops: tuple[int, int] | list[int] = (3, 5)
    max_addend: int = 3
    seed: int = 0
    name: str = "chain"

    def __post_init__(self) -> None:
        # YAML and JSON have lists in place of tuples.
        if isinstance(self.hops, list):
            object.__setattr__(self, "hops", tuple(self.hops))
        check_integer("num_variables", self.num_variables, "6 is the default", least=2, most=26)
        check_integer("max_addend", self.max_addend, "3 is the default", least=1, most=9)
        check_integer("seed", self.seed, "0 is the default")
        if self.name != "chain":
            raise TaskError(f"name: must be 'chain', got {self.name!r}; leave it out")

        greatest = self.num_variables - 1
        is_pair = (
            isinstance(self.hops, tuple) and len(self.hops) == 2 and all(type(number) is int for number in self.hops)
        )
        if not is_pair or not 1 <= self.hops[0] <= self.hops[1] <= greatest:
            raise TaskError(
                f"hops: must be two integers 1 <= least <= greatest <= {greatest} (num_variables - 1), "
                f"got {self.hops!r}; use hops=({min(2, greatest)}, {min(4, greatest)})"
            )

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split.

        Each problem has its own generator, seeded with a text that contains the split, so "train" and "eval" are
        different streams. Both may draw the same problem, but the space is so large that the first 100 000 problems
        of each have none in common.

        Raises:
            TaskError: an unknown split, or a number that is not an integer of at least 0.
        """
        check_problem(split, index)
        random = Random(f"chain/{self.seed}/{split}/{index}")
        num_hops = random.randint(*self.hops)

        # The first ``num_hops + 1`` names are the needed chain: each refers to the one before it. The rest distract.
        names = random.sample(ascii_lowercase, self.num_variables)
        assignments: Assignments = {}
        for position, variable in enumerate(names):
            reference = None
            if 0 < position <= num_hops:
                reference = names[position - 1]
            elif position > num_hops and random.random() < _REFERENCE_PROBABILITY:
                reference = random.choice(names[:position])
            if reference is None:
                digit = random.randint(0, 9)
            else:
                digit = random.randint(1, self.max_addend)
            assignments[variable] = Assignment(reference, digit)

        order = list(assignments)
        random.shuffle(order)
        lines = [f"{variable}={_right_side(assignments[variable])}" for variable in order]
        queried = names[num_hops]
        values = resolve(assignments)
        return Sample(
            index=index,
            prompt=";".join([*lines, f"{queried}?"]),
            answer=str(values[queried]),
            metadata={"hops": num_hops, "needed": names[: num_hops + 1], "values": values},
        )

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the digit behind a ``#`` at the end of the completion; with more text behind it there is no answer."""
        return _stated_digit(completion)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1.0 for the right answer, else 0.0; the steps before it do not count."""
        span = _stated_digit(completion, sample.opening)
        if span is None:
            return 0.0
        start, end = span
        return float(completion[start:end] == sample.answer)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the variables and values of the needed chain, each a span of one character.

        A line is one or more letters, ``=`` and a digit, between commas, before the first ``#``. A letter is decisive
        if the queried variable depends on that variable (itself included), in a trace as in front of ``=``; a digit is
        decisive if the letter in front of its ``=`` is, right or wrong, stated once or again. Not decisive are the
        separators ``=``, ``,`` and ``#``, variables and values of detours, text outside such lines, and the answer
        behind the ``#``, which repeats the last value.
        """
        return _marked_characters(sample, completion, is_needed=True)

    def detours(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the variables and values of a response that :meth:`oracle` leaves out, each a span of one character.

        A letter of a line is part of a detour if the queried variable does not depend on that variable; a digit is if
        the letter in front of its ``=`` is.
        """
        return _marked_characters(sample, completion, is_needed=False)


# Problems as data ---------------------------------------------------------------------------------------


def _marked_characters(sample: Sample, completion: str, *, is_needed: bool) -> list[CharSpan]:
    """Return the variables and values of a response that belong to the needed chain, or those that do not."""
    needed = set(sample.metadata["needed"])
    spans: list[CharSpan] = []
    for line in _LINE.finditer(completion.split("#", 1)[0]):
        for position in range(*line.span(1)):
            if (completion[position] in needed) == is_needed:
                spans.append((position, position + 1))
        variable = line[1][-1]
        if (variable in needed) == is_needed:
            spans.append(line.span(2))
    return spans


def _stated_digit(completion: str, opening: str = "") -> CharSpan | None:
    """Find the digit that states the answer; the end of thinking that is not closed states none.

    Args:
        completion: the response.
        opening: what the prompt wrote of the response; see :func:`flowgraph.final_part`.
    """
    match = _ANSWER.search(completion)
    if match is None or not final_part(completion, opening=opening).holds(*match.span()):
        return None
    return match.span(1)


def read_prompt(prompt: str) -> Assignments:
    """Return the assignments of a prompt, in its order.

    Example:
        >>> read_prompt("f=c+2;c=7;f?")["f"]
        Assignment(reference='c', digit=2)
    """
    assignments: Assignments = {}
    for line in prompt.split(";")[:-1]:
        variable, right_side = line.split("=")
        reference, _, digit = right_side.rpartition("+")
        assignments[variable] = Assignment(reference or None, int(digit))
    return assignments


def resolve(assignments: Assignments) -> dict[str, int]:
    """Compute the value of every variable; a variable that is referred to must come first."""
    values: dict[str, int] = {}
    for variable, (reference, digit) in assignments.items():
        if reference is None:
            values[variable] = digit
        else:
            values[variable] = correct_sum(values[reference], digit)
    return values


def correct_sum(value: int, addend: int) -> int:
    """Add two digits modulo 10."""
    return (value + addend) % 10


def _right_side(assignment: Assignment) -> str:
    """Write the right side of an assignment."""
    if assignment.reference is None:
        return str(assignment.digit)
    return f"{assignment.reference}+{assignment.digit}"


# Responses ----------------------------------------------------------------------------------------------


def demonstration(
    sample: Sample, random: Random, detours: int = 0, add: Callable[[int, int], int] = correct_sum
) -> str:
    """Write a response that traces and resolves the queried variable, after detours.

    Args:
        sample: a problem of :class:`Chain`.
        random: draws the detours.
        detours: number of other variables that are traced and resolved before the queried one.
        add: computes sums; later lines and the answer continue from a wrong sum.
    """
    assignments = read_prompt(str(sample.prompt))
    queried = sample.metadata["needed"][-1]
    others = [variable for variable in assignments if variable != queried]
    targets = [*random.sample(others, min(detours, len(others))), queried]

    lines = []
    value = 0
    for target in targets:
        # Back along the references to a literal ...
        trace = target
        reference = assignments[target].reference
        while reference is not None:
            trace += reference
            reference = assignments[reference].reference
        value = assignments[trace[-1]].digit
        lines.append(f"{trace}={value}")
        # ... and forward again, one sum a line.
        for variable in reversed(trace[:-1]):
            value = add(value, assignments[variable].digit)
            lines.append(f"{variable}={value}")
    return ",".join(lines) + f"#{value}"


def first_error(sample: Sample, completion: str) -> str | None:
    """Return the kind of the first error in a response; None for a response without an error.

    Each line is compared with what the response stated before, so one error is not counted again in later lines:

    - ``"format"``: the response is not lines and an answer from end to end;
    - ``"lookup"``: a trace that departs from the references of the problem, or a literal with another digit;
    - ``"order"``: a trace that stops before a literal, or a line that is not the next one on the way back;
    - ``"sum"``: a digit that is not the one before plus the addend, misread or miscalculated;
    - ``"end"``: a chain that is unfinished or is not the queried one, or an answer that is not its digit.
    """
    if not _WELL_FORMED.fullmatch(completion):
        return "format"
    assignments = read_prompt(str(sample.prompt))
    text, answer = completion.split("#")

    # Variables of the current trace that are not resolved yet; the next line must state the last of them.
    pending = ""
    variable = ""
    value = 0
    for line in text.split(","):
        letters = line[:-2]
        digit = int(line[-1])
        if pending:
            error = _step_error(assignments, letters, value, digit, expected=pending[-1])
            pending = pending[:-1]
        else:
            error = _trace_error(assignments, letters, digit)
            pending = letters[:-1]
        if error:
            return error
        variable = letters[-1]
        value = digit

    is_finished = not pending and variable == sample.metadata["needed"][-1]
    if not is_finished or value != int(answer):
        return "end"
    return None


def _trace_error(assignments: Assignments, letters: str, digit: int) -> str | None:
    """Check a trace: every letter refers to the next, and the last is a literal with this digit."""
    if letters[0] not in assignments:
        return "lookup"
    for variable, next_variable in pairwise(letters):
        if assignments[variable].reference != next_variable:
            return "lookup"
    last = assignments[letters[-1]]
    if last.reference is not None:
        return "order"
    if digit != last.digit:
        return "lookup"
    return None


def _step_error(assignments: Assignments, letters: str, value: int, digit: int, expected: str) -> str | None:
    """Check a step back: it states the expected variable, and the value before plus its addend."""
    if letters != expected:
        return "order"
    if digit != correct_sum(value, assignments[expected].digit):
        return "sum"
    return None
