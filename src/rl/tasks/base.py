"""What a task is: problems by number, a verdict on a response, and where in the text its answer stands."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from rl.records import CharSpan, Sample

SPLITS = ("train", "eval")
"""Problems to learn from, and fresh ones that no training run ever sees."""


@runtime_checkable
class Task(Protocol):
    """A stream of problems with verifiable answers.

    Everything is a function of its arguments: the same split and number give the same problem, on every machine and
    after every resume. ``repr`` tells tasks apart: a run is resumed only with one of the same text.
    """

    name: str

    @property
    def size(self) -> int | None:
        """Number of training problems; None where there is no end to them."""
        ...

    def sample(self, split: str, index: int) -> Sample:
        """Problem number ``index`` of a split; a finite task starts again from its first."""
        ...

    def find_answer(self, completion: str) -> CharSpan | None:
        """The characters that state the answer, or None where there is none."""
        ...

    def reward(self, sample: Sample, completion: str) -> float:
        """The verdict, a finite number; usually 1 for right and 0 for wrong."""
        ...

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """The characters known to be decisive, of tasks that know; None otherwise."""
        ...
