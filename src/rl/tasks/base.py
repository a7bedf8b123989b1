"""The Task protocol: problems by number, a reward for a response, and the characters that state its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rl.errors import TaskError
from rl.records import CharSpan, Sample

SPLITS = ("train", "eval")
"""Problems to learn from, and fresh ones that no training run uses."""


@runtime_checkable
class Task(Protocol):
    """A stream of problems with verifiable answers.

    Every method is a function of its arguments: the same split and number give the same problem, on every machine and
    after every resume. ``repr`` identifies a task: a run is resumed only with a task of the same ``repr``.

    Attributes:
        name: of the task, for logs and pages.
    """

    name: str

    @property
    def size(self) -> int | None:
        """Return the number of training problems; None for an endless stream."""
        ...

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split; a finite task starts again from its first."""
        ...

    def find_answer(self, completion: str) -> CharSpan | None:
        """Return the characters that state the answer, or None if no answer is stated.

        The answer stands in the final part of the response (:func:`flowgraph.final_part`): one inside the thinking
        counts as none.
        """
        ...

    def reward(self, sample: Sample, completion: str) -> float:
        """Return the reward of a response, a finite number; usually 1 for a right answer and 0 for a wrong one.

        ``sample.opening`` is what the prompt wrote of the response: thinking that it opens must be closed before an
        answer counts. It may be a coroutine function; the coroutines of a batch are awaited together.
        """
        ...

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return the characters known to be decisive; None for tasks without this knowledge."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task that judges all responses of a batch in one call, for rewards that compare responses to one problem.

    Where a task has ``batch_rewards``, training and evaluation call it in place of ``reward``. A batch holds all
    responses to each of its problems, next to each other.
    """

    def batch_rewards(self, samples: Sequence[Sample], completions: Sequence[str]) -> Any:
        """Return the reward of every response: a list, array or tensor of finite numbers, or a coroutine of it.

        :class:`rl.tasks.rewards.RewardParts` is valid too; the mean of each part is logged.
        """
        ...


@runtime_checkable
class DetourTask(Task, Protocol):
    """A task that knows which work of a response is not used: detours, dead ends, sub-results that nothing reads.

    Detours take the same skill as the decisive steps, and the answer does not depend on them. A credit rule that ranks
    decisive tokens above detours follows the dependencies of the response; one that ranks them alike finds the skill.
    """

    def detours(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return the characters of unused work, none of which ``oracle`` returns; None where it is not known."""
        ...


def check_problem(split: object, index: object) -> None:
    """Check the arguments of ``Task.sample``.

    Raises:
        TaskError: an unknown split, or a number that is not an integer of at least 0.
    """
    if split not in SPLITS:
        choices = ", ".join(map(repr, SPLITS))
        raise TaskError(f"split: must be one of {choices}, got {split!r}; choose one of them")
    check_integer("index", index, "problems are numbered from 0", least=0)


def check_integer(name: str, value: Any, remedy: str, *, least: int | None = None, most: int | None = None) -> None:
    """Check that an option is an integer in a range; a bool is not an integer.

    Args:
        name: of the option.
        value: given by the user.
        remedy: last part of the message.
        least: smallest value; None: no bound.
        most: greatest value, given only together with ``least``; None: no bound.

    Raises:
        TaskError: the value is not an integer, or lies outside the range.
    """
    bounds = ""
    if least is not None:
        bounds = f" of at least {least}" if most is None else f" from {least} to {most}"
    is_valid = type(value) is int
    if is_valid and least is not None:
        is_valid = value >= least
    if is_valid and most is not None:
        is_valid = value <= most
    if not is_valid:
        raise TaskError(f"{name}: must be an integer{bounds}, got {value!r}; {remedy}")
