"""Procedural: endless, seeded and verified problems of reasoning-gym, protected against exploits.

Three properties of reasoning-gym do not suit training:

- Its scorers reward longer texts that contain the answer, read the first number of many, or accept what is nearly
  right. Here a scorer gets only the extracted answer, of bounded length, and only full marks count.
- Some scorers execute the answer as code. Here they get it only if it passes a whitelist or an exact evaluation.
- Neighbouring seeds give the same problems. Here every block of problems has its own seed.
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
from rl.tasks.base import SPLITS, check_integer, check_problem

Entry = Mapping[str, Any]
"""A problem of reasoning-gym: ``question``, ``answer`` and ``metadata``."""

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

# The metadata that identifies a problem, where the same numbers occur in another order or wording.
_IDENTITY = {"countdown": ("numbers", "target"), "puzzle24": ("numbers",)}


class Procedural:
    """The task of a dataset of reasoning-gym.

    A problem belongs to the train or to the eval split by a hash of its content (1/4 is eval), so no problem occurs in
    both, for any seeds and however few problems there are. The random states of Python and NumPy are restored after
    each use, because some datasets draw from them or seed them.

    Args:
        dataset: its name in reasoning-gym, for example ``"countdown"``.
        seed: of the stream of problems.
        answer_format: how the prompt asks for the answer, and the only form that counts: ``"tag"``, ``"boxed"`` or
            ``"hash"``.
        chat: prompts are chat messages instead of plain text.
        partial_credit: reward the marks of the dataset's scorer between 0 and 1, instead of 0 below full marks.
        max_answer: longest answer, in characters.
        **options: the dataset's own, for example ``min_numbers=3``.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        TaskError: an unknown dataset, or options that it rejects.

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
        self._check_options()
        self._scorer = self._generator(0)
        # The caches belong to the task, so that they are freed with it.
        self._block = lru_cache(maxsize=16)(self._make_block)
        self._entry = lru_cache(maxsize=4096)(self._find_entry)

    def __repr__(self) -> str:
        """Name everything that decides the problems and their rewards."""
        settings = {
            "seed": self.seed,
            "answer_format": self.answer_format,
            "chat": self.chat,
            "partial_credit": self.partial_credit,
            "max_answer": self.max_answer,
            **self.options,
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"Procedural({self.dataset!r}, {arguments})"

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split.

        Raises:
            TaskError: an unknown split, a negative number, a reference answer longer than ``max_answer``, or a dataset
                with too few different problems.

        Cost: 1.3 problems of reasoning-gym for train and 4 for eval, on average (countdown: 12 ms each).
        """
        check_problem(split, index)
        entry = self._entry(split, index)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        if len(answer) > self.max_answer:
            raise TaskError(
                f"max_answer: must hold the answers of {self.dataset!r}, got {self.max_answer} for one of "
                f"{len(answer)} characters; set max_answer={2 * len(answer)}"
            )
        metadata = {"dataset": self.dataset, "split": split, "problem": _as_json(entry["metadata"])}
        return Sample(index, self._prompt(entry), answer, metadata)

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the last answer that is stated in the format that the prompt asks for."""
        return find_answer(completion, self.answer_format, max_length=self.max_answer)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1 for full marks of the dataset's scorer on the stated answer, else 0 (or its marks, see the class).

        Raises:
            TaskError: the sample does not come from this task.
        """
        # The sample is checked even if there is no answer, so that a wrong sample never passes as a wrong answer.
        entry = self._entry_of(sample)
        span = find_answer(completion, self.answer_format, max_length=self.max_answer, opening=sample.opening)
        if span is None:
            return 0.0
        start, end = span
        answer = completion[start:end]
        if not _is_safe(self.dataset, answer, entry):
            return 0.0
        marks = self._marks(answer, entry)
        if marks >= _FULL_MARKS:
            return 1.0
        if self.partial_credit and marks > 0:
            return marks
        return 0.0

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return None: the decisive tokens of reasoning-gym's problems are not known."""
        return None

    def _check_options(self) -> None:
        """Check the names of the dataset, the format and the dataset's options."""
        registry = _registry()
        choices = (("dataset", self.dataset, sorted(registry)), ("answer_format", self.answer_format, FORMATS))
        for name, value, known in choices:
            if value not in known:
                raise TaskError(f"{name}: must be one of {', '.join(known)}, got {value!r}; choose one of them")
        check_integer("seed", self.seed, "0 is the default")
        if type(self.max_answer) is not int or self.max_answer < 1:
            raise TaskError(f"max_answer: must be at least 1, got {self.max_answer!r}; {MAX_ANSWER} is the default")
        _, settings_class = registry[self.dataset]
        known = [item.name for item in fields(settings_class) if item.name not in ("seed", "size")]
        for name in self.options:
            if name not in known:
                raise TaskError(
                    f"{name}: must be an option of {self.dataset!r}, got an unknown name; there are {', '.join(known)}"
                )

    # Problems ---------------------------------------------------------------------------------------

    def _generator(self, seed: int) -> Any:
        """Make a generator of one block of problems, which is also the scorer of the dataset."""
        try:
            with _isolated(seed):
                dataset_class, settings_class = _registry()[self.dataset]
                settings = settings_class(seed=seed, size=BLOCK, **self.options)
                if hasattr(settings, "validate"):
                    settings.validate()
                return dataset_class(settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise TaskError(
                f"options: must suit the dataset {self.dataset!r}, got {self.options!r}, which it refuses: {error}; "
                "see its page in the gallery of reasoning-gym"
            ) from error

    def _make_block(self, split: str, block: int, attempt: int) -> tuple[Any, int]:
        """Make a generator of 64 problems and its seed, independent of all others."""
        place = f"{self.dataset}/{self.seed}/{split}/{block}/{attempt}"
        # Some datasets seed NumPy, which takes 32 bits.
        seed = _stable_hash(place) % (2**32 - BLOCK)
        return self._generator(seed), seed

    def _find_entry(self, split: str, index: int) -> Entry:
        """Return the first problem at this position, over several attempts, that belongs to the split."""
        block, position = divmod(index, BLOCK)
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            generator, seed = self._block(split, block, attempt)
            try:
                with _isolated(seed + position):
                    entry = generator[position]
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                # With narrow options a generator may fail for some seeds.
                failure = error
                continue
            if self._split_of(entry) != split:
                continue
            # A problem with several solutions has no answer; a reference that is unsafe could never be rewarded.
            answer = entry["answer"]
            if answer is None or _is_safe(self.dataset, str(answer), entry):
                return entry
        raise TaskError(
            f"options: must leave {self.dataset!r} different problems for both splits, got {self.options!r}, "
            f"which gave none for {split!r} in {_ATTEMPTS} attempts; widen its ranges"
        ) from failure

    def _split_of(self, entry: Entry) -> str:
        """Return the split of a problem, a hash of what identifies it."""
        parts = [entry["question"]]
        if self.dataset in _IDENTITY:
            parts = [entry["metadata"][name] for name in _IDENTITY[self.dataset]]
        content = [sorted(part) if isinstance(part, list) else part for part in parts]
        is_eval = _stable_hash(f"{self.dataset}/{content}") % EVAL_SHARE == 0
        return "eval" if is_eval else "train"

    def _prompt(self, entry: Entry) -> str | Messages:
        """Write the question and the instruction how to answer."""
        text = f"{entry['question'].strip()}\n\n{_INSTRUCTIONS[self.answer_format]}\n"
        if self.chat:
            return [{"role": "user", "content": text.strip()}]
        return text

    # Scoring ----------------------------------------------------------------------------------------

    def _entry_of(self, sample: Sample) -> Entry:
        """Return the problem of a sample; a sample of another task is an error."""
        split = sample.metadata.get("split")
        entry = self._entry(split, sample.index) if split in SPLITS else None
        if entry is None or self._prompt(entry) != sample.prompt:
            raise TaskError(
                f"sample: must come from this task and these options, got sample {sample.index} of split {split!r} "
                f"with another prompt; use the samples of this {self.dataset!r}"
            )
        return entry

    def _marks(self, answer: str, entry: Entry) -> float:
        """Return the marks of the dataset's scorer, 0 for an answer that makes it fail."""
        try:
            with _isolated(0):
                return float(self._scorer.score_answer(answer, entry))
        except Exception:  # noqa: BLE001  (scorers parse without checks; an answer that breaks one is not right)
            return 0.0


# Safety of answers --------------------------------------------------------------------------------------

# Scorers of these call eval on the answer; without parentheses, dots and lower case an answer cannot call or repeat.
_LITERALS = {
    "string_insertion": re.compile(r"[A-Z'\",\[\]\s]+"),
    "n_queens": re.compile(r"[Q_'\",\[\]\s]+"),
    "spiral_matrix": re.compile(r"[0-9,\[\]\s-]+"),
    "binary_matrix": re.compile(r"[0-9,\[\]\s-]+"),
}
# Scorers of these call the parser of sympy, which uses eval too.
_SYMBOLIC = ("simple_integration", "intermediate_integration", "polynomial_multiplication")
_FORMULA = re.compile(r"(?:[0-9A-Za-z+\-*/() \n]|(?<=[0-9])\.(?=[0-9]))+")
_FUNCTIONS = {"exp", "log", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi"}
_MAX_CALLS = 8


def _is_safe(dataset: str, answer: str, entry: Entry) -> bool:
    """Tell whether a scorer may see this answer: it cannot be executed or exploited."""
    if dataset == "countdown":
        return _uses_numbers_once(answer, entry, target=entry["metadata"]["target"])
    if dataset == "puzzle24":
        return _uses_numbers_once(answer, entry, target=24)
    if dataset == "gsm_symbolic":
        # Its scorer reads the first number of many and drops its sign.
        return equal_number(answer, str(entry["answer"]))
    if dataset == "game_of_life_halting":
        # Its scorer takes any text for True.
        return answer == str(entry["answer"])
    if dataset == "coin_flip":
        return _is_close_number(answer, entry)
    if dataset in _LITERALS:
        return _LITERALS[dataset].fullmatch(answer) is not None
    if dataset in _SYMBOLIC:
        return _is_short_formula(answer, entry)
    return True


def _uses_numbers_once(answer: str, entry: Entry, target: int) -> bool:
    """Tell whether an expression has exactly the target as its value and uses each given number once.

    The scorer of countdown counts the given numbers as they occur in the text and accepts a result within 1e-5 of the
    target, so ``1e2`` would be a number of its own and ``12.5`` would use 12 and 5; the scorer of puzzle24 ignores the
    given numbers.
    """
    used = sorted(int(number) for number in re.findall("[0-9]+", answer))
    return evaluate_arithmetic(answer) == target and used == sorted(entry["metadata"]["numbers"])


def _is_close_number(answer: str, entry: Entry) -> bool:
    """Tell whether a number is within 1/1000 of the answer; coin_flip gives full marks to a prefix of it, such as 0."""
    number = parse_number(answer)
    right = Fraction(entry["answer"])
    return number is not None and abs(number - right) <= right / 1000


def _is_short_formula(answer: str, entry: Entry) -> bool:
    """Tell whether a text is a formula in the problem's variables with few, known functions.

    Without this check an integral could be answered by itself, unevaluated.
    """
    variable = entry["metadata"].get("variable", "")
    variables = set(re.findall(r"\b[A-Za-z]\b", f"{variable} {entry['answer']}"))
    known_words = variables | _FUNCTIONS | {"C"}
    words = re.findall("[A-Za-z]+", answer)
    num_calls = sum(word in _FUNCTIONS for word in words)
    is_formula = _FORMULA.fullmatch(answer) is not None and known_words >= set(words)
    return is_formula and num_calls <= _MAX_CALLS and not is_costly(answer)


# reasoning-gym ------------------------------------------------------------------------------------------


def _registry() -> Mapping[str, tuple[Callable[..., Any], type]]:
    """Return the datasets of reasoning-gym by name, each as its class and the class of its settings."""
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
def _isolated(seed: int) -> Iterator[None]:
    """Seed Python's global generator inside the context, hide warnings, and restore all global random states."""
    import numpy as np

    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _stable_hash(text: str) -> int:
    """Hash a text to 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _as_json(value: Any) -> Any:
    """Convert metadata to JSON values: keys to text, sequences and sets to lists, unknown types to text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, set | frozenset):
        # Sets have no order of their own; a sorted list is reproducible.
        return sorted((_as_json(item) for item in value), key=str)
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
