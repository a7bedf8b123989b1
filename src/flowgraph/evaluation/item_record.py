"""The record of one item: its truth, and what every method scored on it, as plain JSON values.

Schema ``flowgraph-evaluation-item/1``::

    schema, task, split, id
    digest        of the item, so that a changed item is noticed
    error         {kind, message, expected} where the item could not be read, else null; expected: a library's error
    unusable      why the item decides nothing, else null
    model_right   whether the model answers rightly; null where the item states no expected answer
    tokens        text of every token; regions: its region or null
    answer        text of the answer
    truth         what the truth gave
    scores        {method: {metric: number, or null where it is undefined}}
    token_scores  {method: a number a token, 4 significant digits}, for the page
    skipped       {method: {kind, message, expected, where}}: why a method gave no score
    seconds       {truth, methods: {method: seconds}}
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowgraph.attention.modules import base_model
from flowgraph.errors import CaptureError, FlowgraphError, InvalidInputError
from flowgraph.evaluation.records import EvaluationItem, Explanation, Truth
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask
from flowgraph.evaluation.scoring import score_of
from flowgraph.evaluation.subject import Subject
from flowgraph.interventions.answer_logprobs import answer_logprobs
from flowgraph.tracing.payload import token_regions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "flowgraph-evaluation-item/1"
_TRANSIENT = ("MissingExtraError", "MemoryLimitError")
"""Errors that another environment may not have: a later run tries again."""
_FRAMES = 3
"""Places of the code that the record of an unexpected error keeps."""


@dataclass(frozen=True)
class ItemPlace:
    """An item with its task, its split, and a digest of its content.

    Attributes:
        task: the task.
        split: ``"dev"`` or ``"test"``.
        item: the item.
        digest: of its text and data.
    """

    task: EvaluationTask
    split: str
    item: EvaluationItem
    digest: str

    @classmethod
    def of(cls, task: EvaluationTask, split: str, item: EvaluationItem) -> ItemPlace:
        """Compute the digest of an item."""
        values = [item.id, item.prompt, item.response, item.answer, item.question, dict(item.data)]
        text = json.dumps(_comparable(values), sort_keys=True)
        return cls(task, split, item, hashlib.sha256(text.encode()).hexdigest()[:16])


def missing_methods(record: Mapping[str, Any] | None, methods: Sequence[EvaluationMethod]) -> list[EvaluationMethod]:
    """List the methods that have neither a score nor a lasting reason for none in a record."""
    # An item that failed or decides nothing has no scores at all; only a transient failure is tried again.
    if record is None:
        return list(methods)
    error = record["error"]
    if error is not None:
        return [] if _is_lasting(error) else list(methods)
    if record["unusable"] is not None:
        return []

    missing = []
    for method in methods:
        reason = record["skipped"].get(method.name)
        has_reason = reason is not None and _is_lasting(reason)
        if method.name not in record["scores"] and not has_reason:
            missing.append(method)
    return missing


def _is_lasting(reason: Mapping[str, Any]) -> bool:
    """Return whether an error would come again: not where the code or the environment may change."""
    return reason["expected"] and reason["kind"] not in _TRANSIENT


def compute_record(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    place: ItemPlace,
    methods: Sequence[EvaluationMethod],
    earlier: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Compute the truth of an item, and the scores of some methods.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        place: the item, its task and its split.
        methods: those that an earlier record lacks.
        earlier: the earlier record; its results are kept.
        seed: of everything random.

    Returns:
        The record, as the module's docstring describes it.

    Raises:
        CaptureError: the model cannot be traced at all.
    """
    # The text and the truth. A fault of the task is recorded with the item, so that the others still run.
    record = _empty_record(place)
    began = time.perf_counter()
    try:
        subject = Subject(model, tokenizer, place.item)
        record |= _text_of(subject)
        record["model_right"] = answers_rightly(subject)
        with seeded(seed, place.task.name, place.item.id, "truth"):
            truth = _truth_of(place.task, subject, earlier)
    except CaptureError:
        # The fault lies in the model, not in the item: every other item would fail in the same way.
        raise
    except Exception as error:  # noqa: BLE001 - a registered task is foreign code; the record names what it raised
        record["error"] = _reason(error)
        return record
    record["seconds"]["truth"] = time.perf_counter() - began
    record["truth"] = plain_values(truth.to_dict(), f"task {place.task.name!r}")
    record["unusable"] = truth.unusable or _without_effect(record["truth"])
    if record["unusable"] is not None:
        return record

    # What an earlier run computed stays; a transient reason is tried again.
    if earlier is not None and earlier["error"] is None:
        for part in ("scores", "token_scores", "skipped"):
            record[part] |= earlier[part]
        record["seconds"]["methods"] |= earlier["seconds"]["methods"]
    for method in methods:
        record["skipped"].pop(method.name, None)
        _add_method(record, place, subject, truth, method, seed)

    # The order of methods in a record does not depend on the run that added them.
    for part in ("scores", "token_scores", "skipped"):
        record[part] = dict(sorted(record[part].items()))
    return record


def _empty_record(place: ItemPlace) -> dict[str, Any]:
    """Return a record without results."""
    return {
        "schema": SCHEMA,
        "task": place.task.name,
        "split": place.split,
        "id": place.item.id,
        "digest": place.digest,
        "error": None,
        "unusable": None,
        "model_right": None,
        "tokens": [],
        "regions": [],
        "answer": "",
        "truth": {},
        "scores": {},
        "token_scores": {},
        "skipped": {},
        "seconds": {"truth": 0.0, "methods": {}},
    }


def _text_of(subject: Subject) -> dict[str, Any]:
    """Return what the page shows of a text."""
    return {
        "tokens": list(subject.base.tokens),
        "regions": token_regions(subject.base.graph),
        "answer": subject.base.text_of(subject.answer),
    }


def _truth_of(task: EvaluationTask, subject: Subject, earlier: Mapping[str, Any] | None) -> Truth:
    """Restore the truth of an earlier run, or compute it."""
    is_stored = earlier is not None and earlier["error"] is None and bool(earlier["truth"])
    if task.restore is not None and is_stored and earlier is not None:
        return task.restore(subject, earlier["truth"])
    return task.function(subject)


def _without_effect(truth: Mapping[str, Any]) -> str | None:
    """Return why a truth decides nothing, where it lists effects and all of them are 0."""
    effects = truth.get("effects")
    if isinstance(effects, list) and effects and not any(effects):
        return "all effects are 0"
    return None


def _add_method(
    record: dict[str, Any],
    place: ItemPlace,
    subject: Subject,
    truth: Truth,
    method: EvaluationMethod,
    seed: int,
) -> None:
    """Run one method and add its scores to a record, or the reason why there are none."""
    began = time.perf_counter()
    try:
        with seeded(seed, place.task.name, place.item.id, method.name):
            explanation, values = score_of(truth, method, subject)
        record["scores"][method.name] = _checked_metrics(values, place.task)
        record["token_scores"][method.name] = _token_scores(explanation)
    except Exception as error:  # noqa: BLE001 - a registered method is foreign code; the record names what it raised
        record["skipped"][method.name] = _reason(error)
    record["seconds"]["methods"][method.name] = time.perf_counter() - began


def _reason(error: Exception) -> dict[str, Any]:
    """Describe an error; one that is not the library's own with the places where it came from."""
    kind = type(error).__name__
    message = " ".join(str(error).split()) or kind
    where: list[str] = []
    is_expected = isinstance(error, FlowgraphError)
    # Only the message of the library names the argument; any other error needs its type and its place.
    if not is_expected:
        message = f"{kind}: {message}"
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        where = [f"{frame.name}: {frame.line}" for frame in frames]
    return {"kind": kind, "message": message, "expected": is_expected, "where": where}


def _checked_metrics(values: Mapping[str, float], task: EvaluationTask) -> dict[str, float | None]:
    """Return the value of every metric of a task; None where it is undefined.

    Raises:
        InvalidInputError: the truth left one out.
    """
    checked: dict[str, float | None] = {}
    for metric in task.metrics:
        if metric.name not in values:
            raise InvalidInputError(
                f"task: {task.name!r} must return all of its metrics, got none for {metric.name!r}; return NaN where "
                "it is undefined"
            )
        value = float(values[metric.name])
        checked[metric.name] = value if math.isfinite(value) else None
    return checked


def _token_scores(explanation: Explanation) -> list[float]:
    """Return a score a token for the page; of edges alone, what all later tokens read of it."""
    # An explanation without scores of tokens has edges.
    scores = explanation.tokens
    if scores is None:
        assert explanation.edges is not None
        scores = explanation.edges.sum(0)
    return [float(f"{value:.4g}") for value in scores.double().tolist()]


def answers_rightly(subject: Subject) -> bool | None:
    """Tell whether the model answers an item rightly; None where the item has no ``data["expected"]``.

    A generated response: its answer contains the expected text as a whole word or number. A given response: besides,
    the model predicts every token of the answer, given all before it.

    Cost: one forward pass for a given response.
    """
    expected = subject.item.data.get("expected")
    if expected is None:
        return None
    if not contains_answer(subject.base.text_of(subject.answer), str(expected)):
        return False
    if subject.item.response is None:
        return True
    # A given answer is the model's own where each of its tokens is the most probable one.
    answer = subject.answer.nonzero().flatten()
    logprobs = answer_logprobs(base_model(subject.model), subject.base, answer, 1)
    predicted = logprobs[0].argmax(-1)
    return bool((predicted == subject.token_ids.cpu()[answer]).all())


def contains_answer(text: str, expected: str) -> bool:
    """Tell whether a text contains an answer as a whole word or number, in any case of letters.

    Example:
        >>> contains_answer("It is 7.", "7"), contains_answer("17 or 7.5", "7")
        (True, False)
    """
    # Blanks count alike. A digit with a point or comma before or after it belongs to a longer number.
    wanted = re.escape(" ".join(expected.split()))
    searched = " ".join(text.split())
    pattern = rf"(?<![\w])(?<!\d[.,]){wanted}(?!\w)(?![.,]\d)"
    return re.search(pattern, searched, re.IGNORECASE) is not None


@contextmanager
def seeded(seed: int, *names: str) -> Iterator[None]:
    """Seed the global generators by a seed and names, and restore them afterwards.

    A method that draws from a global generator then gives the same scores in any order of items and methods.
    """
    # The names are joined by a character that none of them contains, so different names give different texts.
    text = "\0".join([str(seed), *names])
    digest = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(digest[:4], "big")

    # torch restores its own state; that of Python and numpy is kept here.
    state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def plain_values(value: Any, owner: str) -> Any:
    """Write nested values as JSON has them: arrays as lists, numbers that are not finite as None.

    Raises:
        InvalidInputError: something that JSON does not have.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain_values(value.tolist(), owner)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_values(item, owner) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_values(item, owner) for item in value]
    raise InvalidInputError(
        f"truth: must be plain JSON values, got {type(value).__name__} from {owner}; convert it in to_dict()"
    )


def _comparable(value: Any) -> Any:
    """Write nested values so that equal items give equal text in every process."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # Selectors: their class and their fields.
    fields = getattr(value, "__dict__", {})
    return [type(value).__name__, {name: _comparable(item) for name, item in fields.items()}]
