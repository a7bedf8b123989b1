"""Problems from a file: one JSON object per line, judged by an equality or by a function of the user."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from rl.errors import TaskError
from rl.records import CharSpan, Messages, Sample
from rl.tasks.answers import (
    MAX_ANSWER,
    check_pattern,
    equal_math,
    equal_number,
    equal_text,
    find_answer,
    parse_number,
)
from rl.tasks.base import SPLITS
from rl.tasks.rewards import RewardFunction, checked_rewards, function_name, load_function

EQUALITIES: Mapping[str, Callable[[str, str], bool]] = {
    "text": equal_text,
    "number": equal_number,
    "math": equal_math,
}

_SHOWN_LINES = 5


class JsonlTask:
    """A file of problems as a task.

    Every line is one JSON object: a prompt (text, or chat messages with ``role`` and ``content``), an answer (text or
    number), and anything else, which becomes the sample's metadata. A line that is no such thing stops the reading:
    none is dropped. Training problems come in a new order in every pass, a function of the seed and the pass alone;
    eval problems in the order of the file.

    Args:
        path: the file, UTF-8.
        prompt: field of the prompt.
        answer: field of the reference answer; None for problems without one, which need ``reward``.
        reward: ``reward(samples, completions) -> list of numbers``, or where to find it: ``package.module:function``
            or ``folder/file.py:function``. None compares the stated answer with the reference.
        equality: how to compare: ``"text"`` (case and white space ignored), ``"number"`` (exact) or ``"math"``
            (math-verify).
        pattern: how responses state their answer; see :func:`rl.tasks.answers.find_answer`.
        eval_path: file of the eval split.
        eval_every: hold out every k-th line for eval instead; 0 holds out none. Default 10 without ``eval_path``.
        shuffle: whether training problems change their order.
        seed: of that order.

    Raises:
        TaskError: unreadable file, bad lines (by number, with what is wrong), a prompt that occurs in both splits, or
            options that break a rule.
        ConfigError: ``reward`` names nothing.
        MissingExtraError: ``equality="math"`` without math-verify.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: str = "prompt",
        answer: str | None = "answer",
        reward: RewardFunction | str | None = None,
        *,
        equality: str = "text",
        pattern: str | None = None,
        eval_path: str | Path | None = None,
        eval_every: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.name = str(path)
        self.equality = equality
        self.pattern = pattern
        self.shuffle = shuffle
        self.seed = seed
        self._function = load_function(reward) if isinstance(reward, str) else reward
        _check_options(self._function, equality, answer, eval_path, eval_every, seed)
        check_pattern(pattern)
        fields = (prompt, answer, equality if self._function is None else None)
        lines = _read(Path(path), *fields)
        if eval_path is not None:
            self._problems = {"train": lines, "eval": _read(Path(eval_path), *fields)}
        else:
            every = 10 if eval_every is None else eval_every
            held = [bool(every) and number % every == 0 for number in range(1, len(lines) + 1)]
            self._problems = {
                "train": [line for line, out in zip(lines, held, strict=True) if not out],
                "eval": [line for line, out in zip(lines, held, strict=True) if out],
            }
        self._check_splits()
        self._digest = hashlib.sha256(repr(self._problems).encode()).hexdigest()[:16]
        self._order = lru_cache(maxsize=4)(self._make_order)

    def __repr__(self) -> str:
        """Everything that decides what is asked and how it is judged, the lines of the file included."""
        judged = self.equality if self._function is None else function_name(self._function)
        return (
            f"JsonlTask({self.name!r}, by {judged}, pattern={self.pattern!r}, shuffle={self.shuffle}, "
            f"seed={self.seed}, {self.size} problems {self._digest})"
        )

    @property
    def size(self) -> int:
        """Number of training problems."""
        return len(self._problems["train"])

    def sample(self, split: str, index: int) -> Sample:
        """Problem number ``index`` of a split; after the last one the next pass begins.

        Raises:
            TaskError: an unknown or empty split, or a negative number.
        """
        if split not in SPLITS:
            raise TaskError(f"split: must be one of {', '.join(map(repr, SPLITS))}, got {split!r}; choose one of them")
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise TaskError(f"index: must be a whole number of at least 0, got {index!r}; problems count from 0")
        problems = self._problems[split]
        if not problems:
            raise TaskError(
                f"split: must hold problems, got none for {split!r} in {self.name}; "
                "give eval_path, or a smaller eval_every"
            )
        passed, position = divmod(index, len(problems))
        if split == "train" and self.shuffle:
            position = self._order(passed)[position]
        _, prompt, answer, metadata = problems[position]
        return Sample(index, prompt, answer, metadata)

    def find_answer(self, completion: str) -> CharSpan | None:
        """The last stated answer."""
        return find_answer(completion, self.pattern)

    def reward(self, sample: Sample, completion: str) -> float:
        """What the user's function says, or 1 where the stated answer equals the reference, else 0.

        Raises:
            RewardError: the function raised, or returned no finite number.
        """
        if self._function is not None:
            name = function_name(self._function)
            return float(checked_rewards(self._function, [sample], [completion], name=name)[0])
        span = self.find_answer(completion)
        if span is None:
            return 0.0
        return float(EQUALITIES[self.equality](sample.answer, completion[slice(*span)]))

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Files know no decisive tokens."""
        return None

    def _make_order(self, passed: int) -> list[int]:
        order = list(range(self.size))
        random.Random(f"{self.seed}/{passed}").shuffle(order)
        return order

    def _check_splits(self) -> None:
        if not self._problems["train"]:
            raise TaskError(
                f"path: must leave problems to train on, got none in {self.name}; add lines, or hold out fewer"
            )
        seen = {json.dumps(prompt): number for number, prompt, _, _ in reversed(self._problems["train"])}
        for number, prompt, _, _ in self._problems["eval"]:
            twin = seen.get(json.dumps(prompt))
            if twin is not None:
                raise TaskError(
                    f"eval: must hold problems that training never sees, got line {number}, whose prompt is that of "
                    f"training line {twin}; remove one of the two, or put them into one split by eval_path"
                )


Problem = tuple[int, str | Messages, str, dict[str, Any]]
"""Line number, prompt, answer, metadata."""


def _check_options(
    function: object, equality: str, answer: str | None, eval_path: object, eval_every: int | None, seed: int
) -> None:
    if function is not None and not callable(function):
        raise TaskError(f"reward: must be a function or its place, got {function!r}; 'rewards.py:score' is an example")
    if equality not in EQUALITIES:
        raise TaskError(f"equality: must be one of {', '.join(EQUALITIES)}, got {equality!r}; choose one of them")
    if equality == "math" and function is None:
        equal_math("0", "0")  # a missing package is told here, not at the first reward
    if function is None and answer is None:
        raise TaskError("answer: must name a field where no reward function judges, got None; give one of the two")
    if eval_path is not None and eval_every is not None:
        raise TaskError(
            f"eval_every: must be left out beside eval_path, got {eval_every!r}; the eval file is used whole"
        )
    if eval_every is not None and (type(eval_every) is not int or eval_every < 0 or eval_every == 1):
        raise TaskError(f"eval_every: must be 0 or at least 2, got {eval_every!r}; 10 holds out every tenth line")
    if type(seed) is not int:
        raise TaskError(f"seed: must be a whole number, got {seed!r}; 0 is the default")


def _read(path: Path, prompt: str, answer: str | None, equality: str | None) -> list[Problem]:
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise TaskError(
            f"path: must name a file that can be read, got {str(path)!r} ({error.strerror}); check the path"
        ) from error
    raw = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if raw[-1] == b"":
        raw.pop()
    problems, wrong = [], []
    for number, line in enumerate(raw, 1):
        try:
            problems.append(_parse(number, line, prompt, answer, equality))
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN_LINES} more" if len(wrong) > _SHOWN_LINES else ""
        raise TaskError(
            f"path: must hold one problem per line, got {len(wrong)} bad of {len(raw)} lines in {path}: "
            f"{'; '.join(wrong[:_SHOWN_LINES])}{more}; correct or remove them, as none is skipped"
        )
    return problems


def _parse(number: int, line: bytes, prompt: str, answer: str | None, equality: str | None) -> Problem:
    """One line; ValueError says what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError("empty" if not line.strip() else f"no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__} instead of an object")
    for name in (prompt, answer):
        if name is not None and name not in fields:
            raise ValueError(f"no field {name!r} (there are {', '.join(map(repr, fields)) or 'none'})")
    question = _as_prompt(fields.pop(prompt), prompt)
    return number, question, "" if answer is None else _as_answer(fields.pop(answer), answer, equality), fields


def _as_prompt(value: Any, name: str) -> str | Messages:
    if isinstance(value, str) and value.strip():
        return value
    messages = isinstance(value, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and all(isinstance(part, str) for part in turn.values())
        for turn in value
    )
    if not messages or not value:
        raise ValueError(f"{name!r} is neither text nor a list of messages with the texts 'role' and 'content'")
    return value


def _as_answer(value: Any, name: str, equality: str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name!r} is neither text nor a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name!r} is beyond the range of numbers")
    text = value.strip() if isinstance(value, str) else str(value)
    if equality is None:  # the user's function knows what an answer may be
        return text
    if not text:
        raise ValueError(f"{name!r} is empty")
    if len(text) > MAX_ANSWER:
        raise ValueError(f"{name!r} has {len(text)} characters, and a stated answer has at most {MAX_ANSWER}")
    if equality == "number" and parse_number(text) is None:
        raise ValueError(f"{name!r} is no number: {text[:40]!r}")
    return text


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON does not have")
