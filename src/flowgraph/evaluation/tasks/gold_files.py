"""Gold step graphs from files of the user: PARC (premises), PrOntoQA (proofs), ProcessBench (the first wrong step)."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowgraph.errors import InvalidInputError, first_line
from flowgraph.evaluation.records import EvaluationItem
from flowgraph.evaluation.registry import EvaluationTask
from flowgraph.evaluation.subject import Subject
from flowgraph.evaluation.tasks.texts import chat, check_items
from flowgraph.evaluation.tasks.truths import AUROC, AVERAGE_PRECISION, PRECISION, GoldPairs, GoldUnits
from flowgraph.evaluation.tasks.units import Units, tokens_of_passages

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_SEPARATOR = "\n\n"
"""Between the steps of PARC and ProcessBench."""


@dataclass(frozen=True)
class FileFormat:
    """One format of files.

    Attributes:
        item_of: makes an item of an entry; None where the entry has no gold.
        truth_of: computes the truth of an item.
        reads: which part of an explanation is scored.
        summary: one line.
        shows: what a high score shows.
        cannot_show: what it does not show.
        source: the publication, and where its files are.
    """

    item_of: Callable[[Mapping[str, Any], str], EvaluationItem | None]
    truth_of: Callable[[Subject], GoldPairs | GoldUnits]
    reads: Literal["tokens", "edges"]
    summary: str
    shows: str
    cannot_show: str
    source: str


def file_task(name: str, path: str) -> EvaluationTask:
    """Make the task of a file.

    Args:
        name: of :data:`FORMATS`.
        path: of the file.

    Returns:
        A task whose name holds the file's own name and a digest of its content. The entries at even places (0, 2, ...)
        are the split ``test``, the others ``dev``; fewer items than asked for where the file has fewer.

    Raises:
        InvalidInputError: no such file, no JSON, or an entry that is not of the format.
    """
    file_format = FORMATS[name]
    content = _content(name, path)
    entries = _entries(name, path, content)

    # Every entry is checked now, not in the middle of a run.
    items: list[EvaluationItem | None] = []
    for number, (label, values) in enumerate(entries):
        entry = _Entry(values, f"{name}: entry {label} of {path}")
        items.append(file_format.item_of(entry, f"{name}-{number}"))

    # The digest tells files of one name apart, and a file from its later version.
    digest = hashlib.sha256(content).hexdigest()[:6]
    stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(path).stem)[:40]
    return EvaluationTask(
        name=f"{name}_{stem}_{digest}",
        items=partial(_chosen, items),
        function=file_format.truth_of,
        metrics=(AUROC, AVERAGE_PRECISION, PRECISION),
        reads=file_format.reads,
        causal=False,
        summary=file_format.summary,
        shows=file_format.shows,
        cannot_show=file_format.cannot_show,
        licence=f"that of the file; {file_format.source}",
    )


def _chosen(items: Sequence[EvaluationItem | None], split: str, number: int, seed: int) -> list[EvaluationItem]:
    """Draw items of a split; all of them where there are fewer than asked for."""
    check_items(split, number)
    # The same entries belong to a split for every seed and number.
    of_split = items[::2] if split == "test" else items[1::2]
    found = [item for item in of_split if item is not None]
    random.Random(seed).shuffle(found)
    return found[:number]


# Reading ----------------------------------------------------------------------------------------------------------


def _content(name: str, path: str) -> bytes:
    """Read a file."""
    if not path:
        raise InvalidInputError(f"tasks: must name a file after {name + ':'!r}, got nothing; write {name}:PATH")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"tasks: {name} must be a file that can be read, got {path!r} ({error.strerror}); write {name}:PATH"
        ) from None


def _entries(name: str, path: str, content: bytes) -> list[tuple[str, Any]]:
    """Parse a JSON list, a JSON object of entries, or JSON lines, with a label of each entry for messages."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"tasks: {name} must be UTF-8 text, got byte {error.start} of {path!r} that is not; convert the file"
        ) from None
    # A file of several lines is no single JSON value: then each line is one.
    try:
        parsed = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        parsed = _lines(name, path, text)
    if isinstance(parsed, dict) and not _is_entry(parsed):
        found = list(parsed.items())
    elif isinstance(parsed, dict):
        found = [("0", parsed)]
    elif isinstance(parsed, list):
        found = [(str(number), entry) for number, entry in enumerate(parsed)]
    else:
        raise InvalidInputError(
            f"tasks: {name} must hold a list of entries, got {type(parsed).__name__} in {path!r}; see the format in "
            "docs/evaluation-tasks.md"
        )
    if not found:
        raise InvalidInputError(f"tasks: {name} must hold at least one entry, got none in {path!r}; pass another file")
    return found


def _is_entry(parsed: Mapping[str, Any]) -> bool:
    """Return whether an object is one entry, not a table of entries."""
    return not all(isinstance(value, dict) for value in parsed.values())


def _lines(name: str, path: str, text: str) -> list[Any]:
    """Parse JSON lines."""
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = first_line(error)
            raise InvalidInputError(
                f"tasks: {name} must be JSON or one JSON object a line, got line {number} of {path!r}: {reason}; "
                "pass the file as it was published"
            ) from None
    return entries


class _Entry(dict[str, Any]):
    """An entry whose fields are checked as they are read."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise InvalidInputError(
                f"{where}: must be an object, got {type(values).__name__}; see the format in docs/evaluation-tasks.md"
            )
        super().__init__(values)
        self.where = where

    def text(self, field: str) -> str:
        """Return a field that is text with a visible character."""
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "text", value)
        return value.strip()

    def texts(self, field: str) -> list[str]:
        """Return a field that is a list of texts, none empty."""
        value = self.get(field)
        texts = value if isinstance(value, list) else []
        if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
            raise self.wrong(field, "a list of texts, none empty", value)
        return [one.strip() for one in texts]

    def integer(self, field: str) -> int:
        """Return a field that is an integer."""
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, "an integer", value)
        return value

    def entry(self, field: str) -> _Entry:
        """Return a field that is an object."""
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.wrong(field, "an object", value)
        return _Entry(value, f"{self.where}, {field}")

    def wrong(self, field: str, rule: str, value: Any) -> InvalidInputError:
        """Return the error of a field that breaks a rule."""
        return InvalidInputError(
            f"{self.where}: {field!r} must be {rule}, got {value!r:.80}; see the format in docs/evaluation-tasks.md"
        )


def _as_entry(entry: Mapping[str, Any]) -> _Entry:
    """Return an entry with checked fields."""
    return entry if isinstance(entry, _Entry) else _Entry(entry, "entry")


# PARC -------------------------------------------------------------------------------------------------------------


def _parc_item(entry: Mapping[str, Any], name: str) -> EvaluationItem | None:
    """Read question, steps and the premises of each step."""
    checked = _as_entry(entry)
    question = checked.text("question")
    steps = checked.texts("steps")
    annotation = checked.entry("premise_annotation")
    annotated = annotation.get("steps")
    if not isinstance(annotated, list):
        raise annotation.wrong("steps", "a list of annotated steps", annotated)

    # Node 0 is the question; node k is step k. A step may name itself or several statements of one step.
    premises: list[list[int]] = []
    for number, values in enumerate(annotated):
        step = _Entry(values, f"{annotation.where}, step {number}")
        reader = step.integer("step_number")
        if not 0 <= reader <= len(steps):
            raise step.wrong("step_number", f"from 0 to {len(steps)}, the number of steps", reader)
        for source in _premise_numbers(step):
            if not 0 <= source <= len(steps):
                raise step.wrong("premises", f"numbers from 0 to {len(steps)}", source)
            if source < reader and [reader, source] not in premises:
                premises.append([reader, source])
    data: dict[str, Any] = {"question": question, "steps": steps, "premises": premises}
    if isinstance(checked.get("ground_truth_answer"), str):
        data["expected"] = checked["ground_truth_answer"]
    return EvaluationItem(
        id=name,
        prompt=chat(question),
        response=_SEPARATOR.join(steps),
        answer=_stated(checked.get("model_answer"), steps[-1]),
        data=data,
    )


def _premise_numbers(step: _Entry) -> list[int]:
    """Return the numbers of the steps that a step follows from: of human labels where there are two kinds."""
    field = "ground_truth_premises" if "ground_truth_premises" in step else "premises"
    values = step.get(field)
    if not isinstance(values, list):
        raise step.wrong(field, "a list of premises", values)
    numbers = []
    for value in values:
        # Either a number, or a number with the words of the premise.
        number = value[0] if isinstance(value, list) and value else value
        if isinstance(number, bool) or not isinstance(number, int):
            raise step.wrong(field, "numbers, or pairs of number and text", value)
        numbers.append(number)
    return numbers


def _stated(answer: Any, last_step: str) -> str | None:
    """Return a stated answer that stands in the last step as it is; else None: it is searched there."""
    is_text = isinstance(answer, str) and bool(answer.strip())
    if is_text and re.search(rf"(?<![\w.,]){re.escape(answer.strip())}(?!\w)", last_step):
        return answer.strip()
    return None


def parc_truth(subject: Subject) -> GoldPairs:
    """Find the premises of each step among the question and all earlier steps."""
    data = subject.item.data
    units = tokens_of_passages(subject, [data["question"]], "prompt")
    units += tokens_of_passages(subject, data["steps"], "response")
    return _pairs(units, 1, data["premises"], "premises")


# PrOntoQA ---------------------------------------------------------------------------------------------------------


def _prontoqa_item(entry: Mapping[str, Any], name: str) -> EvaluationItem | None:
    """Read the theory, the statement to decide, and its proof by modus ponens."""
    example = _as_entry(entry)
    for field in ("test_example", "in_context_example0"):
        if field in example:
            example = example.entry(field)
            break
    theory = example.text("question")
    query = example.text("query")
    proof = example.texts("chain_of_thought")
    answer = example.text("answer")
    sentences = [match[0].strip() for match in _SENTENCE.finditer(theory)]

    # A line of the proof quotes the theory (its premise), or follows from the two lines before it.
    num_sentences = len(sentences)
    premises: list[list[int]] = []
    for number, line in enumerate(proof):
        reader = num_sentences + number
        if line in sentences:
            premises.append([reader, sentences.index(line)])
        elif number >= 2:
            premises.append([reader, reader - 1])
            premises.append([reader, reader - 2])
        else:
            raise example.wrong(
                "chain_of_thought", "sentences of the question, each conclusion after its two premises", line
            )
    return EvaluationItem(
        id=name,
        prompt=chat(f"{theory} {query}"),
        response="\n".join([*proof, f"Answer: {answer}"]),
        answer=answer,
        data={"sentences": sentences, "proof": proof, "premises": premises, "expected": answer},
    )


def prontoqa_truth(subject: Subject) -> GoldPairs:
    """Find the premises of each line of the proof among the theory and the lines before it."""
    data = subject.item.data
    theory = tokens_of_passages(subject, data["sentences"], "prompt")
    units = theory + tokens_of_passages(subject, data["proof"], "response")
    return _pairs(units, len(theory), data["premises"], "proof")


def _pairs(units: Units, first_reader: int, premises: Sequence[Sequence[int]], kind: str) -> GoldPairs:
    """Label every pair of a reader and an earlier unit; units without a visible token are in no pair."""
    gold_pairs = {(reader, source) for reader, source in premises}
    pairs = []
    is_gold = []
    for reader in range(first_reader, len(units)):
        for source in range(reader):
            if units[reader] and units[source]:
                pair = (reader, source)
                pairs.append(pair)
                is_gold.append(pair in gold_pairs)
    return GoldPairs(units, pairs, np.array(is_gold, dtype=bool), kind=kind)


# ProcessBench -----------------------------------------------------------------------------------------------------


def _processbench_item(entry: Mapping[str, Any], name: str) -> EvaluationItem | None:
    """Read the steps and the place of the first wrong one; None for a solution without a wrong answer."""
    checked = _as_entry(entry)
    problem = checked.text("problem")
    steps = checked.texts("steps")
    label = checked.integer("label")
    is_correct = checked.get("final_answer_correct")
    if not isinstance(is_correct, bool):
        raise checked.wrong("final_answer_correct", "true or false", is_correct)
    if not -1 <= label < len(steps):
        raise checked.wrong("label", f"-1 or the place of a step, below {len(steps)}", label)
    # Without a wrong step, or with a right answer despite it, there is nothing to find.
    if label < 0 or is_correct:
        return None
    return EvaluationItem(
        id=name,
        prompt=chat(problem),
        response=_SEPARATOR.join(steps),
        data={"steps": steps, "wrong": label},
    )


def processbench_truth(subject: Subject) -> GoldUnits:
    """Find the first wrong step of a solution with a wrong answer."""
    data = subject.item.data
    # What is written after the answer cannot have led to it.
    first_answer = min(subject.positions(subject.answer))
    steps = tokens_of_passages(subject, data["steps"], "response")
    units = []
    gold = []
    for number, step in enumerate(steps):
        before_answer = [position for position in step if position < first_answer]
        if before_answer:
            units.append(before_answer)
            gold.append(number == data["wrong"])
    return GoldUnits(units, np.array(gold, dtype=bool), kind="first wrong step")


FORMATS: dict[str, FileFormat] = {
    "parc": FileFormat(
        item_of=_parc_item,
        truth_of=parc_truth,
        reads="edges",
        summary="Find the premises of each step among the question and all earlier steps.",
        shows="steps read what they follow from more strongly than other steps",
        cannot_show="what the model used: premises are what a reader needs, and another model may have written the "
        "steps; most steps follow from the step before them, so compare with a control of distance",
        source="PARC, Mukherjee et al. 2025, arXiv 2502.02362",
    ),
    "prontoqa": FileFormat(
        item_of=_prontoqa_item,
        truth_of=prontoqa_truth,
        reads="edges",
        summary="Find the premises of each line of a proof among the theory and the lines before it.",
        shows="lines of a proof read the sentence that they quote, or the two lines that they follow from",
        cannot_show="more than matching strings can: lines quote the theory word for word, so compare with the control "
        "text_only",
        source="PrOntoQA, Saparov and He 2023, arXiv 2210.01240",
    ),
    "processbench": FileFormat(
        item_of=_processbench_item,
        truth_of=processbench_truth,
        reads="tokens",
        summary="Find the first wrong step of a solution whose answer is wrong.",
        shows="the wrong answer is traced to the step where the error was made, rather than to others",
        cannot_show="whether the model noticed the error; right steps after it carry its consequences and may matter "
        "more to the answer",
        source="ProcessBench, Zheng et al. 2024, arXiv 2412.06559",
    ),
}
