"""What the page of an evaluation shows of its items, as compact JSON values.

Scores of a text travel as a string with one character for each token: the root of its share of the largest score, in
63 steps from -31 to 31. Where the truth is about units of tokens, the scores of tokens in no unit are left out (0).
Texts that several items share are stored once. Items beyond a size are left out and counted.

Schema::

    model, methods, facts
    summaries  {method: what it is, in a line}
    tasks   [{task, split, ..., rows, other_rows, items, left_out}]: the fields of a TaskSummary, the rows of the
            primary metric over all items, the other rows, and the items
    item    {id, text, right, note, truth, units, pairs, plain, methods: {name: levels}, values: {name: value}}: the
            values are those of the primary metric
    truth   levels of a token, or null where the truth is not about units of tokens
    units   [[text, effect]], largest effect first and none of 0; pairs: [[reader, read, effect]]
    texts   [{tokens, regions}]: one letter of Q, R, A and "." for each token
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowgraph.display.signs import without_roles
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.results import Evaluation

MAX_BYTES = 4_500_000
"""Largest size of all items and texts as JSON."""
LEVELS = "!#$%()*+,-./0123456789:;=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcde"
"""One character for each step; the middle one is 0."""
_STEPS = len(LEVELS) // 2
_SHOWN_UNITS = 16
"""Units, or pairs of units, that are listed in full."""
_SHOWN_TEXT = 80
"""Characters of a unit that are shown."""
_LETTERS = {"question": "Q", "reasoning": "R", "answer": "A", None: "."}


def page_payload(evaluation: Evaluation, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return what the page of an evaluation shows.

    Args:
        evaluation: the outcome of a run.
        max_bytes: limit of the items' part; tasks share it equally, and leave out their last items.
    """
    # A text that several tasks read is stored once.
    texts: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    bytes_per_task = max_bytes / max(len(evaluation.summaries), 1)
    tasks = []
    for summary in evaluation.summaries:
        key = (summary.task, summary.split)
        own_items = [item for item in evaluation.items if (item["task"], item["split"]) == key]

        # The main table holds the primary metric over all items.
        main_rows = []
        other_rows = []
        for row in evaluation.rows:
            if (row["task"], row["split"]) != key:
                continue
            is_main = row["primary"] and row["items"] == "all"
            if is_main:
                main_rows.append(row)
            else:
                other_rows.append(row)

        # The menu of an item lists the best method of the task first.
        methods = [row["method"] for row in main_rows]
        items, left_out = _items(own_items, methods, summary.metric, texts, numbers, bytes_per_task)
        tasks.append(
            {
                **summary.to_dict(),
                "rows": main_rows,
                "other_rows": other_rows,
                "items": items,
                "left_out": left_out,
            }
        )
    return {
        "model": str(evaluation.settings.get("model", "a model")),
        "methods": list(evaluation.methods),
        "summaries": _summaries(evaluation.methods),
        "facts": dict(evaluation.settings),
        "levels": LEVELS,
        "tasks": tasks,
        "texts": texts,
    }


def _summaries(methods: Sequence[str]) -> dict[str, str]:
    """Return a line on each method that is still registered."""
    found = {}
    for name in methods:
        try:
            found[name] = without_roles(find_method(name).summary)
        except InvalidInputError:
            # A method of a script that is not loaded now.
            continue
    return found


def levels_of(scores: Sequence[float | None]) -> str:
    """Write scores as one character each: the sign, and the root of the share of the largest absolute score.

    Example:
        >>> levels_of([0.0, 1.0, -0.25])
        'Ee3'
    """
    known = [score or 0.0 for score in scores]
    largest = max(map(abs, known), default=0.0)
    if largest == 0:
        return LEVELS[_STEPS] * len(known)
    levels = ""
    for score in known:
        # The root makes small scores visible beside a large one.
        size = math.sqrt(abs(score) / largest)
        step = round(math.copysign(size, score) * _STEPS)
        levels += LEVELS[_STEPS + step]
    return levels


def _items(
    records: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    metric: str,
    texts: list[dict[str, Any]],
    numbers: dict[str, int],
    max_bytes: float,
) -> tuple[list[dict[str, Any]], int]:
    """Return the items of one task that fit, adding their texts to those known, and the number left out."""
    items: list[dict[str, Any]] = []
    used = 0
    for place, record in enumerate(records):
        item = _item(record, methods, metric)
        text = _text(record)
        # A text that the page holds already takes no more space.
        key = json.dumps(text)
        is_new = key not in numbers
        used += len(json.dumps(item))
        if is_new:
            used += len(key)
        if used > max_bytes:
            return items, len(records) - place
        if is_new:
            numbers[key] = len(texts)
            texts.append(text)
        items.append({**item, "text": numbers[key]})
    return items, 0


def _text(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens of an item with a letter for the region of each."""
    regions = "".join(_LETTERS.get(region, ".") for region in record["regions"])
    return {"tokens": record["tokens"], "regions": regions}


def _item(record: Mapping[str, Any], methods: Sequence[str], metric: str) -> dict[str, Any]:
    """Return what is shown of one item besides its text."""
    note = record["unusable"] or ""
    if record["error"] is not None:
        note = record["error"]["message"]
    # The menu shows the value of each method beside its name.
    values = {}
    for name in methods:
        value = record["scores"].get(name, {}).get(metric)
        if value is not None:
            values[name] = float(f"{value:.4g}")
    # The colours of each method that has scores of this item.
    levels = {}
    for name in methods:
        if name in record["token_scores"]:
            compared = _compared(record["token_scores"][name], record["truth"])
            levels[name] = levels_of(compared)
    return {
        "id": record["id"],
        "right": record["model_right"],
        "note": note,
        "methods": levels,
        "values": values,
        **_truth(record["truth"], record["tokens"]),
    }


def _compared(scores: Sequence[float | None], truth: Mapping[str, Any]) -> list[float | None]:
    """Set the scores of tokens in no unit of the truth to 0: the task does not read them.

    A token of the chat template that collects most of a score would otherwise leave all others without colour.
    """
    units = truth.get("units")
    if not isinstance(units, list) or not units:
        return list(scores)
    compared = {token for unit in units for token in unit}
    return [score if token in compared else 0.0 for token, score in enumerate(scores)]


def _truth(truth: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Return the truth as levels of tokens and a list of units, where it is about units; else as it is.

    A truth names its ``units`` as token positions, and has ``effects`` (numbers) or ``gold`` (labels): one for each
    unit, or one for each of its ``pairs`` of units, the reader first.
    """
    # Anything but units with a number each is shown as it is.
    units = truth.get("units")
    values = truth.get("effects", truth.get("gold"))
    if not isinstance(units, list) or not isinstance(values, list) or not tokens:
        return _plain_truth(truth)
    numbers = [float(value or 0) for value in values]
    labels = [_unit_text(unit, tokens) for unit in units]
    num_tokens = len(tokens)

    # A number for each pair of units: a unit is worth what others read of it.
    pairs = truth.get("pairs")
    if isinstance(pairs, list) and len(pairs) == len(numbers):
        worth = [0.0] * len(units)
        for (_, read), number in zip(pairs, numbers, strict=True):
            worth[read] += number
        listed_pairs = []
        for place in _largest(numbers):
            reader, read = pairs[place]
            listed_pairs.append([labels[reader], labels[read], _short(numbers[place])])
        levels = _unit_levels(units, worth, num_tokens)
        return {"truth": levels, "units": [], "pairs": listed_pairs, "plain": ""}

    # A number for each unit.
    if len(numbers) != len(units):
        return _plain_truth(truth)
    listed_units = [[labels[place], _short(numbers[place])] for place in _largest(numbers)]
    levels = _unit_levels(units, numbers, num_tokens)
    return {"truth": levels, "units": listed_units, "pairs": [], "plain": ""}


def _plain_truth(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Return a truth that is not about units as text."""
    return {"truth": None, "units": [], "pairs": [], "plain": _shortened(truth)}


def _largest(numbers: Sequence[float]) -> list[int]:
    """Return the places of the largest numbers in size, the largest first; those of 0 are left out."""
    places = [place for place, number in enumerate(numbers) if number]
    places.sort(key=lambda place: -abs(numbers[place]))
    return places[:_SHOWN_UNITS]


def _unit_levels(units: Sequence[Sequence[int]], worth: Sequence[float], num_tokens: int) -> str:
    """Write the worth of units as levels of their tokens."""
    scores = [0.0] * num_tokens
    for unit, value in zip(units, worth, strict=True):
        for token in unit:
            if 0 <= token < num_tokens:
                scores[token] = value
    return levels_of(scores)


def _unit_text(unit: Sequence[int], tokens: Sequence[str]) -> str:
    """Return the text of a unit, shortened."""
    known = [tokens[token] for token in unit if 0 <= token < len(tokens)]
    text = "".join(known).strip()
    if len(text) <= _SHOWN_TEXT:
        return text
    return f"{text[: _SHOWN_TEXT - 1]}…"


def _shortened(truth: Mapping[str, Any]) -> str:
    """Write a truth that is not about units as JSON, shortened."""
    if not truth:
        return ""
    text = json.dumps(truth, ensure_ascii=False)
    return text if len(text) <= 1000 else f"{text[:999]}…"


def _short(value: float) -> float:
    """Round to 4 significant digits."""
    return float(f"{value:.4g}")
