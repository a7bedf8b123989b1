"""JsonlTask: problems of a file or a dataset, judged by an equality or by reward functions of the user."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
from rl.tasks.base import check_integer, check_problem
from rl.tasks.rewards import (
    RewardFunction,
    RewardParts,
    WeightedReward,
    function_name,
    load_function,
    weighted_rewards,
)
from rl.tasks.tables import is_table, json_values, read_table, source_name

EQUALITIES: Mapping[str, Callable[[str, str], bool]] = {
    "text": equal_text,
    "number": equal_number,
    "math": equal_math,
}

_DEFAULT_EVAL_EVERY = 10
_SHOWN_LINES = 5
_UTF8_MARK = b"\xef\xbb\xbf"


class Problem(NamedTuple):
    """One line of a file, or row of a table.

    Attributes:
        line: number of the line or row, from 1.
        prompt: plain text, or chat messages.
        answer: the reference answer; empty if the file has none.
        metadata: the other fields of the line.
    """

    line: int
    prompt: str | Messages
    answer: str
    metadata: dict[str, Any]


class JsonlTask:
    """The task of a file or a dataset of problems.

    Every line or row is one JSON object: a prompt (text, or chat messages with ``role`` and ``content``), an answer
    (text or number), and other fields, which become the sample's metadata. An invalid line is an error; no line is
    skipped. Training problems come in a new order in every pass, a function of the seed and the pass; eval problems in
    the order of the file.

    Args:
        path: a JSONL file, UTF-8; a ``.parquet`` file; a ``datasets.Dataset``, a folder that its ``save_to_disk``
            wrote, or ``"datasets:NAME@CONFIG:SPLIT"`` to load one by name.
        prompt: field of the prompt.
        answer: field of the reference answer; None for problems without one, which need ``reward``.
        reward: ``reward(samples, completions) -> list of numbers``, or its name: ``package.module:function`` or
            ``folder/file.py:function``; or a list of several, whose rewards are summed with their weights. A function
            gets all responses of a batch in one call, and may be a coroutine function. Of several functions one may
            return None for a response that it does not apply to. None compares the stated answer with the reference.
        reward_weights: a number for each of several functions; default 1 each.
        equality: how to compare: ``"text"`` (case and white space ignored), ``"number"`` (exact) or ``"math"``
            (math-verify).
        pattern: how responses state their answer; see :func:`rl.tasks.answers.find_answer`.
        eval_path: file or dataset of the eval split.
        eval_every: hold out every k-th line for eval instead; 0 holds out none. Default 10 without ``eval_path``.
        shuffle: whether training problems change their order.
        seed: of that order.

    Raises:
        TaskError: an unreadable file, invalid lines (with number and reason), a prompt that occurs in both splits, or
            options that break a rule.
        ConfigError: ``reward`` names no function.
        MissingExtraError: ``equality="math"`` without math-verify, Parquet without pyarrow, or a dataset without the
            library datasets.
    """

    def __init__(
        self,
        path: Any,
        prompt: str = "prompt",
        answer: str | None = "answer",
        reward: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        *,
        reward_weights: Sequence[float] | None = None,
        equality: str = "text",
        pattern: str | None = None,
        eval_path: Any = None,
        eval_every: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.name = source_name(path)
        self.equality = equality
        self.pattern = pattern
        self.shuffle = shuffle
        self.seed = seed
        self._rewards = _weighted(reward, reward_weights)
        _check_options(bool(self._rewards), equality, answer, eval_path, eval_every, seed)
        check_pattern(pattern)

        # With a reward function any answer is valid; otherwise each must suit the equality.
        answer_equality = None if self._rewards else equality
        problems = _read(path, prompt, answer, answer_equality)
        if eval_path is not None:
            held_out = _read(eval_path, prompt, answer, answer_equality)
            self._problems = {"train": problems, "eval": held_out}
        else:
            self._problems = _split(problems, _DEFAULT_EVAL_EVERY if eval_every is None else eval_every)
        self._check_splits()

        # Identifies the problems in repr; built from plain tuples, so that it depends on the values alone.
        contents = {split: [tuple(problem) for problem in part] for split, part in self._problems.items()}
        self._digest = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
        # The cache belongs to the task, so that it is freed with it.
        self._order = lru_cache(maxsize=4)(self._shuffled_order)

    def __repr__(self) -> str:
        """Name everything that decides the problems and their rewards, the lines of the file included."""
        judge = self.equality
        if len(self._rewards) == 1:
            judge = self._rewards[0].name
        elif self._rewards:
            judge = " + ".join(f"{reward.weight:g} {reward.name}" for reward in self._rewards)
        return (
            f"JsonlTask({self.name!r}, by {judge}, pattern={self.pattern!r}, shuffle={self.shuffle}, "
            f"seed={self.seed}, {self.size} problems {self._digest})"
        )

    @property
    def size(self) -> int:
        """Return the number of training problems."""
        return len(self._problems["train"])

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split; after the last one the next pass begins.

        Raises:
            TaskError: an unknown or empty split, or a negative number.
        """
        check_problem(split, index)
        problems = self._problems[split]
        if not problems:
            raise TaskError(
                f"split: must hold problems, got none for {split!r} in {self.name}; "
                "give eval_path, or a smaller eval_every"
            )
        pass_number, position = divmod(index, len(problems))
        if split == "train" and self.shuffle:
            position = self._order(pass_number)[position]
        problem = problems[position]
        return Sample(index, problem.prompt, problem.answer, problem.metadata)

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the last stated answer."""
        return find_answer(completion, self.pattern)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return the reward of the user's functions, or 1 if the stated answer equals the reference, else 0.

        A function that compares responses sees this one alone; see :meth:`batch_rewards`.

        Raises:
            RewardError: a function raised, or did not return a finite number.
        """
        if self._rewards:
            return float(weighted_rewards(self._rewards, [sample], [completion]).totals[0])
        span = find_answer(completion, self.pattern, opening=sample.opening)
        if span is None:
            return 0.0
        start, end = span
        are_equal = EQUALITIES[self.equality]
        return float(are_equal(sample.answer, completion[start:end]))

    def batch_rewards(self, samples: Sequence[Sample], completions: Sequence[str]) -> RewardParts | list[Any]:
        """Return the reward of every response; each of the user's functions gets all of them in one call.

        Returns:
            The rewards of the functions and their sums; without functions one number for each response.

        Raises:
            RewardError: a function raised, or did not return a finite number for every response.
        """
        # A subclass that replaces the reward of one response means every response.
        is_replaced = type(self).reward is not JsonlTask.reward
        if is_replaced or not self._rewards:
            return [self.reward(sample, text) for sample, text in zip(samples, completions, strict=True)]
        return weighted_rewards(self._rewards, samples, completions)

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return None: the decisive tokens of a file's problems are not known."""
        return None

    def _shuffled_order(self, pass_number: int) -> list[int]:
        """Return the order of the training problems in one pass."""
        order = list(range(self.size))
        random.Random(f"{self.seed}/{pass_number}").shuffle(order)
        return order

    def _check_splits(self) -> None:
        """Require training problems, and no prompt in both splits."""
        if not self._problems["train"]:
            raise TaskError(
                f"path: must leave problems to train on, got none in {self.name}; add lines, or hold out fewer"
            )
        # JSON text makes chat messages hashable. Of equal prompts the first line is reported.
        train_lines: dict[str, int] = {}
        for problem in self._problems["train"]:
            train_lines.setdefault(json.dumps(problem.prompt), problem.line)
        for problem in self._problems["eval"]:
            twin = train_lines.get(json.dumps(problem.prompt))
            if twin is not None:
                raise TaskError(
                    f"eval: must hold problems that training never sees, got line {problem.line}, whose prompt is that "
                    f"of training line {twin}; remove one of the two, or put them into one split by eval_path"
                )


def _weighted(reward: Any, weights: Any) -> list[WeightedReward]:
    """Load the reward functions and pair them with their weights; none for a task that compares answers."""
    if reward is None:
        if weights is not None:
            raise TaskError(f"reward_weights: must be left out without reward, got {weights!r}; give both")
        return []
    given = list(reward) if isinstance(reward, list | tuple) else [reward]
    if not given:
        raise TaskError("reward: must name at least one function, got an empty list; leave it out to compare answers")
    functions = [load_function(item) if isinstance(item, str) else item for item in given]
    for function in functions:
        if not callable(function):
            raise TaskError(
                f"reward: must be a function or its place, got {function!r}; 'rewards.py:score' is an example"
            )

    if weights is None:
        weights = [1.0] * len(functions)
    # bool is a subclass of int, and is not a weight.
    is_list = isinstance(weights, list | tuple) and len(weights) == len(functions)
    is_valid = is_list and all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
    if not is_valid:
        raise TaskError(
            f"reward_weights: must be {len(functions)} finite numbers, one for each reward function, got {weights!r}; "
            "leave them out for 1 each"
        )
    rewards: list[WeightedReward] = []
    for function, weight in zip(functions, weights, strict=True):
        # Figures are logged by name, and two functions may have the same.
        name = function_name(function)
        if any(reward.name == name for reward in rewards):
            name = f"{name}_{len(rewards) + 1}"
        rewards.append(WeightedReward(name, function, float(weight)))
    return rewards


def _check_options(
    has_function: bool, equality: str, answer: str | None, eval_path: object, eval_every: int | None, seed: int
) -> None:
    """Check the options of a task before its file is read."""
    if equality not in EQUALITIES:
        raise TaskError(f"equality: must be one of {', '.join(EQUALITIES)}, got {equality!r}; choose one of them")
    if equality == "math" and not has_function:
        # A missing package raises here, not at the first reward.
        equal_math("0", "0")
    if not has_function and answer is None:
        raise TaskError("answer: must name a field where no reward function judges, got None; give one of the two")
    if eval_path is not None and eval_every is not None:
        raise TaskError(
            f"eval_every: must be left out beside eval_path, got {eval_every!r}; every line of the eval file is used"
        )
    if eval_every is not None and (type(eval_every) is not int or eval_every < 0 or eval_every == 1):
        raise TaskError(f"eval_every: must be 0 or at least 2, got {eval_every!r}; 10 holds out every tenth line")
    check_integer("seed", seed, "0 is the default")


def _split(problems: list[Problem], eval_every: int) -> dict[str, list[Problem]]:
    """Hold out every k-th line for eval, or none for 0."""
    train = []
    held_out = []
    for number, problem in enumerate(problems, 1):
        is_held_out = eval_every > 0 and number % eval_every == 0
        if is_held_out:
            held_out.append(problem)
        else:
            train.append(problem)
    return {"train": train, "eval": held_out}


# Reading ------------------------------------------------------------------------------------------------


def _read(source: Any, prompt: str, answer: str | None, equality: str | None) -> list[Problem]:
    """Read all problems of a file or a dataset; one error lists the first invalid lines."""
    unit = "line"
    items: list[Any]
    if is_table(source):
        unit = "row"
        items = list(read_table(source))
    else:
        items = _lines(Path(source))

    problems = []
    failures = []
    for number, item in enumerate(items, 1):
        try:
            fields = _row_fields(item, prompt) if unit == "row" else _line_fields(item)
            problems.append(_problem(number, fields, prompt, answer, equality))
        except ValueError as error:
            failures.append(f"{unit} {number}: {error}")
    if failures:
        shown = "; ".join(failures[:_SHOWN_LINES])
        if len(failures) > _SHOWN_LINES:
            shown += f"; and {len(failures) - _SHOWN_LINES} more"
        raise TaskError(
            f"path: must hold one problem per {unit}, got {len(failures)} bad of {len(items)} {unit}s in "
            f"{source_name(source)}: {shown}; correct or remove them, as none is skipped"
        )
    return problems


def _lines(path: Path) -> list[bytes]:
    """Read the lines of a file."""
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise TaskError(
            f"path: must name a file that can be read, got {str(path)!r} ({error.strerror}); check the path"
        ) from error

    # Bytes are split at newlines only: in text, other separators inside a JSON string would end a line too.
    lines = content.removeprefix(_UTF8_MARK).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return lines


def _line_fields(line: bytes) -> dict[str, Any]:
    """Parse one line; the message of a ValueError is the reason that it is invalid."""
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_fields, parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        if not line.strip():
            raise ValueError("empty") from error
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__} instead of an object")
    return fields


def _row_fields(row: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Read one row of a table; the message of a ValueError is the reason that it is invalid."""
    fields = json_values(row)
    messages = fields.get(prompt)
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        # A table gives every message of a column the same keys, with None where a message lacks one.
        fields[prompt] = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return fields


def _problem(number: int, fields: dict[str, Any], prompt: str, answer: str | None, equality: str | None) -> Problem:
    """Build the problem of a line or row; the message of a ValueError is the reason that it is invalid."""
    for name in (prompt, answer):
        if name is not None and name not in fields:
            raise ValueError(f"no field {name!r} (there are {', '.join(map(repr, fields)) or 'none'})")

    # The fields that remain are the metadata.
    prompt_value = _as_prompt(fields.pop(prompt), prompt)
    answer_text = ""
    if answer is not None:
        answer_text = _as_answer(fields.pop(answer), answer, equality)
    return Problem(number, prompt_value, answer_text, fields)


def _as_prompt(value: Any, name: str) -> str | Messages:
    """Return a prompt that is a text or a list of chat messages."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise ValueError(f"{name!r} is neither text nor a list of messages with the texts 'role' and 'content'")


def _is_message(value: Any) -> bool:
    """Tell whether a JSON value is a chat message."""
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    return isinstance(value["role"], str) and isinstance(value["content"], str)


def _as_answer(value: Any, name: str, equality: str | None) -> str:
    """Return a reference answer as text that the equality can compare; None: a reward function judges."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name!r} is neither text nor a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name!r} is beyond the range of numbers")
    text = value.strip() if isinstance(value, str) else str(value)
    if equality is None:
        return text
    if not text:
        raise ValueError(f"{name!r} is empty")
    if len(text) > MAX_ANSWER:
        raise ValueError(f"{name!r} has {len(text)} characters, and a stated answer has at most {MAX_ANSWER}")
    if equality == "number" and parse_number(text) is None:
        raise ValueError(f"{name!r} is not a number: {text[:40]!r}")
    return text


def _unique_fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; by default the last of two equal names would silently win."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _reject_constant(name: str) -> NoReturn:
    """Reject NaN and infinities, which Python's parser accepts."""
    raise ValueError(f"{name}, which JSON does not have")
