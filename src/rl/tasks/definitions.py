"""Definitions of variables, shared by the tasks that compute them: right-hand sides, values, and mistakes."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

ADDENDS = (3, 4, 5, 6, 7)
"""What a derived variable adds to its parent. Half of the sums of a digit and an addend are at least 10."""


class Definition(NamedTuple):
    """The right side of a definition.

    Attributes:
        reference: the parent; None for the root of a tree.
        digit: the root's value, or the addend of a derived variable.
    """

    reference: str | None
    digit: int

    @property
    def text(self) -> str:
        """Return the right side as a prompt and a response write it."""
        if self.reference is None:
            return f"={self.digit}"
        return f"={self.reference}+{self.digit}"


Definitions = dict[str, Definition]
"""Variable -> its definition, in the order of the prompt."""


class Mistakes(NamedTuple):
    """Probabilities of the mistakes that demonstrations contain, detours included.

    Attributes:
        right_side: a right-hand side is replaced by another parent or addend, and the work goes on from it.
        root: a root is stated as another digit.
        carry: a sum of at least 10 is stated one too high.
        other_sum: a smaller sum is stated as another digit.
    """

    right_side: float
    root: float
    carry: float
    other_sum: float


NO_MISTAKES = Mistakes(0.0, 0.0, 0.0, 0.0)
"""Every step is right."""

USUAL_MISTAKES = Mistakes(right_side=0.05, root=0.05, carry=0.55, other_sum=0.05)
"""The mistakes of the demonstrations that the base models learned from."""


def read_definitions(prompt: str) -> Definitions:
    """Return the definitions of a prompt, in its order.

    Example:
        >>> read_definitions("A=B+3;B=7;?Af0d0:")["A"]
        Definition(reference='B', digit=3)
    """
    definitions: Definitions = {}
    for line in prompt.split(";")[:-1]:
        variable, right_side = line.split("=")
        reference, _, digit = right_side.rpartition("+")
        definitions[variable] = Definition(reference or None, int(digit))
    return definitions


def lineage(variable: str, definitions: Definitions) -> list[str]:
    """Return a variable, its parent, and so on to the root of its tree."""
    names = [variable]
    reference = definitions[variable].reference
    while reference is not None:
        names.append(reference)
        reference = definitions[reference].reference
    return names


def value_of(variable: str, definitions: Definitions) -> int:
    """Compute the value of a variable: the numbers from it to its root, modulo 10."""
    return sum(definitions[name].digit for name in lineage(variable, definitions)) % 10


def stated_root(digit: int, random: Random, mistakes: Mistakes) -> int:
    """State the value of a root, with mistakes."""
    if random.random() < mistakes.root:
        return _other_digit(digit, random)
    return digit


def stated_sum(value: int, addend: int, random: Random, mistakes: Mistakes) -> int:
    """Add modulo 10, with mistakes."""
    total = value + addend
    is_carry = total >= 10
    rate = mistakes.carry if is_carry else mistakes.other_sum
    if random.random() >= rate:
        return total % 10
    if is_carry:
        return (total + 1) % 10
    return _other_digit(total % 10, random)


def wrong_right_side(right: Definition, parents: list[str], random: Random) -> Definition:
    """Draw another right-hand side than the right one.

    Args:
        right: the right one.
        parents: variables that it may refer to, at least one.
        random: draws one of all others with equal probability.
    """
    choices = [Definition(parent, addend) for parent in parents for addend in ADDENDS]
    return random.choice([choice for choice in choices if choice != right])


def _other_digit(digit: int, random: Random) -> int:
    """Draw one of the nine other digits."""
    return (digit + random.randint(1, 9)) % 10
