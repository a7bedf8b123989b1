"""Problems of reasoning-gym: generated without end, seeded, verified, and made hard to exploit.

Three of its habits do not suit training. Scorers pay for longer texts that contain the answer, read the first number
of many, or accept what is nearly right; so only the extracted, bounded answer reaches a scorer, and full marks alone
count. Some execute the answer as code; so those get it only past a whitelist or an exact evaluation of our own. And
neighbouring seeds give the same problems; so every block of problems has a seed of its own.
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from functools import lru_cache
from typing import Any

from flowgraph import MissingExtraError
from rl.errors import TaskError
from rl.records import CharSpan, Messages, Sample
from rl.tasks.answers import (
    FORMATS,
    MAX_ANSWER,
    equal_number,
    evaluate_arithmetic,
    find_answer,
    is_costly,
    parse_number,
)
from rl.tasks.base import SPLITS

BLOCK = 64
"""Problems that one generator of reasoning-gym makes."""

EVAL_SHARE = 4
"""One problem in this many belongs to the eval split."""

_ATTEMPTS = 200
_FULL_MARKS = 1 - 1e-9
_INSTRUCTIONS = {
    "tag": "Think step by step. Then state your final answer once, as <answer>...</answer>.",
    "boxed": r"Think step by step. Then state your final answer once, as \boxed{...}.",
    "hash": "Think step by step. Then state your final answer once, on a line of its own that starts with ####.",
}
# What makes two problems the same where the same numbers come in another order or wording.
_IDENTITY = {"countdown": ("numbers", "target"), "puzzle24": ("numbers",)}
# Scorers of these run eval on the answer; without parentheses, dots and lower case nothing can be called or repeated.
_LITERALS = {
    "string_insertion": re.compile(r"[A-Z'\",\[\]\s]+"),
    "n_queens": re.compile(r"[Q_'\",\[\]\s]+"),
    "spiral_matrix": re.compile(r"[0-9,\[\]\s-]+"),
    "binary_matrix": re.compile(r"[0-9,\[\]\s-]+"),
}
# And of these the parser of sympy, which runs eval too.
_SYMBOLIC = ("simple_integration", "intermediate_integration", "polynomial_multiplication")
_FORMULA = re.compile(r"(?:[0-9A-Za-z+\-*/() \n]|(?<=[0-9])\.(?=[0-9]))+")
_FUNCTIONS = {"exp", "log", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi"}
_MOST_CALLS = 8


class Procedural:
    """A dataset of reasoning-gym as a task.

    A problem belongs to the train or to the eval split by a hash of its content (1/4 is eval), so no problem of one
    is ever met in the other, whatever the seeds and however few problems there are. Random states of Python and
    NumPy are left as they were: some datasets draw from them or seed them.

    Args:
        dataset: its name in reasoning-gym, for example ``"countdown"``.
        seed: of the stream of problems.
        answer_format: how the prompt asks for the answer, and the only form that counts: ``"tag"``, ``"boxed"`` or
            ``"hash"``.
        chat: prompts are chat messages rather than plain text.
        partial_credit: pay what the dataset's scorer says between 0 and 1, rather than 0 below full marks.
        max_answer: characters that an answer may have.
        **options: the dataset's own, for example ``min_numbers=3``.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        TaskError: an unknown dataset, or options that it refuses.

    Source: reasoning-gym, https://github.com/open-thought/reasoning-gym, arXiv 2505.24760.

    Example:
        >>> task = Procedural("chain_sum", min_terms=2, max_terms=2, max_digits=1)
        >>> sample = task.sample("train", 0)
        >>> task.reward(sample, f"Adding up: <answer>{sample.answer}</answer>")
        1.0
    """

    def __init__(
        self,
        dataset: str,
        *,
        seed: int = 0,
        answer_format: str = "tag",
        chat: bool = False,
        partial_credit: bool = False,
        max_answer: int = MAX_ANSWER,
        **options: Any,
    ) -> None:
        self.name = f"reasoning_gym:{dataset}"
        self.dataset = dataset
        self.seed = seed
        self.answer_format = answer_format
        self.chat = chat
        self.partial_credit = partial_credit
        self.max_answer = max_answer
        self.options = dict(options)
        self._check()
        self._scorer = self._generator(0)
        self._block = lru_cache(maxsize=16)(self._make_block)
        self._entry = lru_cache(maxsize=4096)(self._find_entry)

    def __repr__(self) -> str:
        """Everything that decides what is asked and how it is judged."""
        names = ("seed", "answer_format", "chat", "partial_credit", "max_answer")
        settings = {name: getattr(self, name) for name in names} | self.options
        return f"Procedural({self.dataset!r}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    @property
    def size(self) -> None:
        """There is no end to the problems."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Problem number ``index`` of a split.

        Raises:
            TaskError: an unknown split, a negative number, a reference answer beyond ``max_answer``, or a dataset
                with too few different problems.

        Cost: 1.3 problems of reasoning-gym for train and 4 for eval, on average (countdown: 12 ms each).
        """
        if split not in SPLITS:
            raise TaskError(f"split: must be one of {', '.join(map(repr, SPLITS))}, got {split!r}; choose one of them")
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise TaskError(f"index: must be a whole number of at least 0, got {index!r}; problems count from 0")
        entry = self._entry(split, index)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        if len(answer) > self.max_answer:
            raise TaskError(
                f"max_answer: must hold the answers of {self.dataset!r}, got {self.max_answer} for one of "
                f"{len(answer)} characters; set max_answer={2 * len(answer)}"
            )
        return Sample(index, self._prompt(entry), answer, self._metadata(split, entry))

    def find_answer(self, completion: str) -> CharSpan | None:
        """The last answer stated in the format that the prompt asks for."""
        return find_answer(completion, self.answer_format, max_length=self.max_answer)

    def reward(self, sample: Sample, completion: str) -> float:
        """1 for full marks of the dataset's scorer on the stated answer, else 0 (or its marks, with partial credit).

        Raises:
            TaskError: the sample is none of this task.
        """
        span = self.find_answer(completion)
        split = sample.metadata.get("split")
        entry = self._entry(split, sample.index) if split in SPLITS else None
        if entry is None or self._prompt(entry) != sample.prompt:
            raise TaskError(
                f"sample: must come from this task and these options, got sample {sample.index} of split {split!r} "
                f"with another prompt; use the samples of this {self.dataset!r}"
            )
        if span is None:
            return 0.0
        answer = completion[slice(*span)]
        if not _is_safe(self.dataset, answer, entry):
            return 0.0
        marks = self._marks(answer, entry)
        if marks >= _FULL_MARKS:
            return 1.0
        return marks if self.partial_credit and marks > 0 else 0.0

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """reasoning-gym knows no decisive tokens."""
        return None

    def _check(self) -> None:
        gym = _registry()
        choices = (("dataset", self.dataset, sorted(gym)), ("answer_format", self.answer_format, FORMATS))
        for name, value, known in choices:
            if value not in known:
                raise TaskError(f"{name}: must be one of {', '.join(known)}, got {value!r}; choose one of them")
        if type(self.seed) is not int:
            raise TaskError(f"seed: must be a whole number, got {self.seed!r}; 0 is the default")
        if type(self.max_answer) is not int or self.max_answer < 1:
            raise TaskError(f"max_answer: must be at least 1, got {self.max_answer!r}; {MAX_ANSWER} is the default")
        settings = [item.name for item in fields(gym[self.dataset][1]) if item.name not in ("seed", "size")]
        for name in self.options:
            if name not in settings:
                raise TaskError(
                    f"{name}: must be an option of {self.dataset!r}, got an unknown name; "
                    f"there are {', '.join(settings)}"
                )

    def _generator(self, seed: int) -> Any:
        try:
            with _contained(seed):
                settings = _registry()[self.dataset][1](seed=seed, size=BLOCK, **self.options)
                if hasattr(settings, "validate"):
                    settings.validate()
                return _registry()[self.dataset][0](settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise TaskError(
                f"options: must suit the dataset {self.dataset!r}, got {self.options!r}, which it refuses: {error}; "
                "see its page in the gallery of reasoning-gym"
            ) from error

    def _make_block(self, split: str, block: int, attempt: int) -> tuple[Any, int]:
        """A generator of 64 problems and its seed, independent of all others."""
        place = f"{self.dataset}/{self.seed}/{split}/{block}/{attempt}"
        seed = _hashed(place) % (2**32 - BLOCK)  # NumPy, which some datasets seed, takes 32 bits
        return self._generator(seed), seed

    def _find_entry(self, split: str, index: int) -> Mapping[str, Any]:
        """The first problem of this place that belongs to the split."""
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            generator, seed = self._block(split, index // BLOCK, attempt)
            try:
                with _contained(seed + index % BLOCK):
                    entry = generator[index % BLOCK]
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                failure = error  # narrow options let a generator fail for some seeds
                continue
            answer = entry["answer"]  # None where any of several solutions counts
            if split == self._split_of(entry) and (answer is None or _is_safe(self.dataset, str(answer), entry)):
                return entry
        raise TaskError(
            f"options: must leave {self.dataset!r} different problems for both splits, got {self.options!r}, "
            f"which gave none for {split!r} in {_ATTEMPTS} attempts; widen its ranges"
        ) from failure

    def _split_of(self, entry: Mapping[str, Any]) -> str:
        parts = [entry["metadata"][name] for name in _IDENTITY.get(self.dataset, ())] or [entry["question"]]
        content = [sorted(part) if isinstance(part, list) else part for part in parts]
        return "eval" if _hashed(f"{self.dataset}/{content}") % EVAL_SHARE == 0 else "train"

    def _prompt(self, entry: Mapping[str, Any]) -> str | Messages:
        text = f"{entry['question'].strip()}\n\n{_INSTRUCTIONS[self.answer_format]}\n"
        return [{"role": "user", "content": text.strip()}] if self.chat else text

    def _metadata(self, split: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"dataset": self.dataset, "split": split, "problem": _plain(entry["metadata"])}

    def _marks(self, answer: str, entry: Mapping[str, Any]) -> float:
        try:
            with _contained(0):
                return float(self._scorer.score_answer(answer, entry))
        except Exception:  # noqa: BLE001  (scorers parse without care: an answer that breaks one is not right)
            return 0.0


def dataset_names() -> list[str]:
    """Datasets of the installed reasoning-gym.

    Raises:
        MissingExtraError: it is not installed.
    """
    return sorted(_registry())


def _is_safe(dataset: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a scorer may see this answer; see the comments at the tables for what it would do with others.

    Countdown counts the given numbers as they stand in the text and accepts a result within 1e-5 of the target, so
    ``1e2`` would be a number of its own and ``12.5`` would use 12 and 5; puzzle24 never looks at the given numbers;
    gsm_symbolic reads the first number of many and drops its sign; game_of_life_halting takes any text for True;
    coin_flip gives full marks to a 0 that begins like the answer; an integral answers itself, unevaluated.
    """
    if dataset in ("countdown", "puzzle24"):
        target = entry["metadata"]["target"] if dataset == "countdown" else 24
        used = sorted(int(number) for number in re.findall("[0-9]+", answer))
        return evaluate_arithmetic(answer) == target and used == sorted(entry["metadata"]["numbers"])
    if dataset == "gsm_symbolic":
        return equal_number(answer, str(entry["answer"]))
    if dataset == "game_of_life_halting":
        return answer == str(entry["answer"])
    if dataset == "coin_flip":
        number, right = parse_number(answer), Fraction(entry["answer"])
        return number is not None and abs(number - right) <= right / 1000
    if dataset in _LITERALS:
        return _LITERALS[dataset].fullmatch(answer) is not None
    if dataset in _SYMBOLIC:
        known = {"C", *re.findall(r"\b[A-Za-z]\b", f"{entry['metadata'].get('variable', '')} {entry['answer']}")}
        words = re.findall("[A-Za-z]+", answer)
        calls = sum(word in _FUNCTIONS for word in words)
        letters = _FORMULA.fullmatch(answer) is not None and known | _FUNCTIONS >= set(words)
        return letters and calls <= _MOST_CALLS and not is_costly(answer)
    return True


def _registry() -> Mapping[str, tuple[Callable[..., Any], type]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym  # noqa: F401  (registers its datasets)
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtraError(
            "task: problems of reasoning-gym need the package reasoning-gym, got an environment without it; "
            "pip install 'flowgraph-llm[tasks]', or use the task 'chain'"
        ) from error
    return DATASETS


@contextmanager
def _contained(seed: int) -> Iterator[None]:
    """Keep warnings and global random states of reasoning-gym to itself."""
    import numpy as np

    ours, of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(of_numpy)


def _hashed(text: str) -> int:
    """A number that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _plain(value: Any) -> Any:
    """As JSON has it: keys are texts, sequences and sets are lists, and what it does not know is its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if value is None or isinstance(value, str | int | float):
        return value
    return value.tolist() if hasattr(value, "tolist") else str(value)
