"""Texts for the models of :mod:`flowgraph.evaluation.planted_models`, their exact truth, and a check of methods.

What decides the answer is known by construction and proven by intervention: masking a gold token or edge makes the
model answer ``<s>`` (the answer loses 8 nats), and masking any other one changes the answer's log-probability by less
than 1e-6 nats, the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import fmean
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from flowgraph.errors import FlowgraphError, InvalidInputError
from flowgraph.evaluation.catalogue import evaluation_methods, find_method
from flowgraph.evaluation.metrics import auroc, average_precision
from flowgraph.evaluation.planted_models import (
    FIRST,
    KEYS,
    LEAVES,
    LETTERS,
    LINKS,
    SO,
    VALUES,
    PlantedKind,
    planted_model,
)
from flowgraph.evaluation.records import EvaluationItem, Explanation
from flowgraph.evaluation.registry import EvaluationMethod, ItemSource, Metric
from flowgraph.evaluation.subject import Subject
from flowgraph.text.selectors import Regex

PLANTED_KINDS: tuple[PlantedKind, ...] = get_args(PlantedKind)

PLANTED_METRICS = (
    Metric("average_precision", "mean precision over the tokens that decide the answer, going down the scores"),
    Metric("auroc", "a token that decides the answer has a higher score than one that does not", chance=0.5),
    Metric("recovered", "share of the deciding tokens that are above all others"),
    Metric("edge_average_precision", "the same for edges"),
    Metric("edge_auroc", "the same for edges", chance=0.5),
)
"""The figures of :class:`PlantedTruth`, the primary one first."""


@dataclass(frozen=True)
class PlantedTruth:
    """Which tokens and edges decide the answer of one text.

    Attributes:
        kind: the mechanism.
        prompt_length: number of tokens of the prompt.
        candidates: positions that are ranked: those before the last token that is read from, which none reads.
        gold: those of them that decide the answer.
        edges: (reader, token that is read) pairs that decide it, as rows and columns of the model's attention.
    """

    kind: PlantedKind
    prompt_length: int
    candidates: tuple[int, ...]
    gold: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def unusable(self) -> str | None:
        """None: every planted text decides."""
        return None

    @property
    def last_reader(self) -> int:
        """The position whose row the answer is predicted from: the last before the answer."""
        return max(reader for reader, _ in self.edges)

    def score(self, explanation: Explanation) -> dict[str, float]:
        """Compare an explanation with the truth; see :data:`PLANTED_METRICS`.

        Returns:
            Each figure in [0, 1], 1 is best; NaN for a part that the explanation does not have. Equal scores never
            count as the right order, except half in ``auroc``. Edges are NaN where generated tokens are read: the row
            of a position then is that of the next token under emission rows, and an explanation does not say which.
        """
        figures = {metric.name: math.nan for metric in PLANTED_METRICS}
        if explanation.tokens is not None:
            of_all_tokens = explanation.tokens.detach().cpu().double()
            scores = of_all_tokens[list(self.candidates)]
            is_gold = torch.tensor([position in self.gold for position in self.candidates])
            figures["average_precision"] = average_precision(scores, is_gold)
            figures["auroc"] = auroc(scores, is_gold)
            # A gold token counts as recovered only if no other token scores as high.
            best_other = scores[~is_gold].max()
            is_recovered = scores[is_gold] > best_other
            figures["recovered"] = float(is_recovered.double().mean())

        # Edges are compared only where the answer's own row is that of the last prompt token.
        if explanation.edges is not None and self.last_reader == self.prompt_length - 1:
            cells = self.cells()
            strengths = self._strengths(explanation.edges)
            edge_scores = torch.stack([strengths[cell] for cell in cells])
            is_gold_edge = torch.tensor([cell in self.edges for cell in cells])
            figures["edge_average_precision"] = average_precision(edge_scores, is_gold_edge)
            figures["edge_auroc"] = auroc(edge_scores, is_gold_edge)
        return figures

    def cells(self) -> list[tuple[int, int]]:
        """List all edges that can reach the answer: every (reader, earlier token) up to the last reader."""
        return [(reader, read) for reader in range(1, self.last_reader + 1) for read in range(reader)]

    def _strengths(self, edges: Float[Tensor, "tokens tokens"]) -> Float[Tensor, "tokens tokens"]:
        """Join the two names of the answer's row: that of the last prompt token, and that of the token it generates.

        Under emission rows the row of the last prompt token belongs to the answer's token, and a method may give its
        edges under either; the larger value counts.
        """
        strengths = edges.detach().cpu().double().clone()
        row = self.last_reader
        of_reader = strengths[row, :row]
        of_answer = strengths[row + 1, :row]
        strengths[row, :row] = torch.maximum(of_reader, of_answer)
        return strengths

    def to_dict(self) -> dict[str, Any]:
        """Return the truth as plain JSON values."""
        return {
            "kind": self.kind,
            "prompt_length": self.prompt_length,
            "units": [[position] for position in self.candidates],
            "gold": [position in self.gold for position in self.candidates],
            "edges": [list(edge) for edge in self.edges],
        }


@dataclass(frozen=True)
class PlantedScore:
    """One method on one kind of planted texts.

    Attributes:
        kind: the mechanism.
        method: its name.
        num_items: texts that it explained.
        figures: mean of each of :data:`PLANTED_METRICS`; NaN for a part that the method does not give.
        error: why it explained none; None where it ran.
    """

    kind: PlantedKind
    method: str
    num_items: int
    figures: Mapping[str, float]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an undefined figure is None."""
        figures: dict[str, float | None] = {}
        for name, value in self.figures.items():
            figures[name] = None if math.isnan(value) else value
        return {
            "kind": self.kind,
            "method": self.method,
            "num_items": self.num_items,
            "figures": figures,
            "error": self.error,
        }


# Texts ---------------------------------------------------------------------------------------------------------------


def planted_items(kind: PlantedKind, split: str, number: int, seed: int = 0) -> list[EvaluationItem]:
    """Make texts whose answer one mechanism decides; each word is one token.

    Args:
        kind: see :func:`planted_model`.
        split: texts of two splits differ.
        number: how many.
        seed: the same arguments give the same texts.

    Returns:
        Items whose ``data`` holds the attributes of :class:`PlantedTruth`. Positions of gold tokens vary over the
        whole prompt.

    Raises:
        InvalidInputError: another kind, or a negative number.

    Example:
        >>> item = planted_items("copy", "test", 1)[0]
        >>> words = item.prompt.split()
        >>> words[item.data["gold"][0]].startswith(words[-1][0])
        True
    """
    if kind not in PLANTED_KINDS:
        raise InvalidInputError(f"kind: must be one of {', '.join(PLANTED_KINDS)}, got {kind!r}; choose one")
    if number < 0:
        raise InvalidInputError(f"number: must not be negative, got {number}; pass how many texts to make")
    items = []
    for index in range(number):
        # A generator for each text, so that a longer list begins with the shorter one.
        random = Random(f"{kind} {split} {seed} {index}")
        words, response, gold, edges = _WRITERS[kind](random)
        num_words = len(words) + len(response)
        data = {
            "kind": kind,
            "prompt_length": len(words),
            # All but the answer and the token before it.
            "candidates": list(range(num_words - 2)),
            "gold": sorted(gold),
            "edges": [list(edge) for edge in sorted(edges)],
        }
        items.append(
            EvaluationItem(
                id=f"{kind}-{split}-{seed}-{index}",
                prompt=" ".join(words),
                # The space keeps the words apart where prompt and response meet.
                response=f" {' '.join(response)}",
                answer=Regex(r"\S+$"),
                data=data,
            )
        )
    return items


_Written = tuple[list[str], list[str], list[int], list[tuple[int, int]]]
"""Words of the prompt and of the response, gold positions, gold edges (reader, read)."""


def _write_copy(random: Random) -> _Written:
    """Write pairs, and ask for the value of one key."""
    num_pairs = random.randint(6, 9)
    keys = random.sample(KEYS, num_pairs)
    values = [random.choice(VALUES) for _ in keys]
    asked = random.randrange(num_pairs)

    # The first token comes before the pairs, so pair number n is word n + 1.
    pairs = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    words = [FIRST, *pairs, f"{keys[asked]}?"]
    position = 1 + asked
    last = len(words) - 1
    return words, [values[asked]], [position], [(last, position)]


def _write_induction(random: Random) -> _Written:
    """Write different letters, and repeat one of them that has a letter before it and two after it."""
    num_letters = random.randint(8, 12)
    letters = random.sample(LETTERS, num_letters)
    repeated = random.randrange(1, num_letters - 2)
    words = [FIRST, *letters, letters[repeated]]

    # The token after the repeated one reads it, and the repetition reads the token after.
    position = 1 + repeated
    after = position + 1
    last = len(words) - 1
    return words, [words[after]], [position, after], [(after, position), (last, after)]


def _write_two_hop(random: Random) -> _Written:
    """Write leaves and links, each chain's leaf before its link, and ask for the value at the end of one chain."""
    num_chains = random.randint(3, 4)
    num_loose = random.randint(1, 2)
    links = random.sample(LINKS, num_chains + num_loose)
    leaves = random.sample(LEAVES, num_chains + 2 * num_loose)

    # Two numbers for each chain, in random order: its leaf takes the smaller one.
    places = random.sample(range(100), 2 * num_chains)
    placed: list[tuple[int, str]] = []
    chains = []
    for number in range(num_chains):
        early, late = sorted(places[2 * number : 2 * number + 2])
        leaf_word = f"{leaves[number]}={random.choice(VALUES)}"
        link_word = f"{links[number]}>{leaves[number]}"
        placed += [(early, leaf_word), (late, link_word)]
        chains.append((leaf_word, link_word))
    # Leaves that no link names, and links to leaves that are not there.
    for number in range(num_loose):
        first_leaf = num_chains + 2 * number
        named, unnamed = leaves[first_leaf : first_leaf + 2]
        placed.append((random.randrange(100), f"{links[num_chains + number]}>{named}"))
        placed.append((random.randrange(100), f"{unnamed}={random.choice(VALUES)}"))

    # One chain is asked for: the query reads its link, and the link reads its leaf.
    leaf_word, link_word = random.choice(chains)
    placed_words = [word for _, word in sorted(placed)]
    words = [FIRST, *placed_words, f"{link_word[0]}?"]
    leaf = words.index(leaf_word)
    link = words.index(link_word)
    last = len(words) - 1
    return words, [leaf_word[-1]], [leaf, link], [(link, leaf), (last, link)]


def _write_generated_hop(random: Random) -> _Written:
    """Write pairs, ask for the value of one key, and name the key again before the answer."""
    # The response begins with the recall of the key, which reads the pair; the word after it reads the recall.
    words, (value,), (position,), _ = _write_copy(random)
    key = words[-1][0]
    response = [f"{key}*", SO, value]
    recall = len(words)
    after = recall + 1
    return words, response, [position, recall], [(recall, position), (after, recall)]


_WRITERS: dict[PlantedKind, Callable[[Random], _Written]] = {
    "copy": _write_copy,
    "induction": _write_induction,
    "two_hop": _write_two_hop,
    "generated_hop": _write_generated_hop,
}


def planted_source(kind: PlantedKind) -> ItemSource:
    """Return the texts of a kind as a source of items for :func:`flowgraph.evaluation_task`."""
    return partial(planted_items, kind)


# Truth and check -----------------------------------------------------------------------------------------------------


def planted_truth(item: EvaluationItem) -> PlantedTruth:
    """Read the truth of an item of :func:`planted_items`.

    Raises:
        InvalidInputError: another item.
    """
    missing = [name for name in ("kind", "prompt_length", "candidates", "gold", "edges") if name not in item.data]
    if missing:
        raise InvalidInputError(
            f"item: must be made by planted_items, got {item.id!r} without {', '.join(missing)}; pass one of its items"
        )
    return PlantedTruth(
        kind=item.data["kind"],
        prompt_length=item.data["prompt_length"],
        candidates=tuple(item.data["candidates"]),
        gold=tuple(item.data["gold"]),
        edges=tuple((reader, read) for reader, read in item.data["edges"]),
    )


def planted_check(
    methods: Sequence[str | EvaluationMethod] | None = None,
    *,
    kinds: Sequence[PlantedKind] = PLANTED_KINDS,
    number: int = 8,
    seed: int = 0,
) -> list[PlantedScore]:
    """Measure which methods find the tokens and edges that decide the answers of planted models.

    A method that is right in principle scores 1 on ``copy``. One that reads a single hop misses the leaf of
    ``two_hop``. One that holds attention weights constant misses the first gold token of ``induction``, which acts on
    where a head reads and not on what it copies.

    Args:
        methods: names of registered methods, or methods; None: all registered ones.
        kinds: see :func:`planted_model`.
        number: texts of each kind.
        seed: of the texts.

    Returns:
        One score for each kind and method, in this order. A method that fails on a model has its message as ``error``.

    Raises:
        InvalidInputError: an unknown method or kind, or fewer than one text.

    Cost: a trace of a tiny model for each setting and text; half a second for each method and kind.
    """
    if number < 1:
        raise InvalidInputError(f"number: must be at least 1, got {number}; 8 is the default")
    names = evaluation_methods() if methods is None else methods
    chosen = [find_method(one) if isinstance(one, str) else one for one in names]
    scores = []
    for kind in kinds:
        model, tokenizer = planted_model(kind)
        subjects = [Subject(model, tokenizer, item) for item in planted_items(kind, "test", number, seed)]
        scores += [_score_of(kind, method, subjects) for method in chosen]
    return scores


def _score_of(kind: PlantedKind, method: EvaluationMethod, subjects: Sequence[Subject]) -> PlantedScore:
    """Average the figures of one method over the texts of one kind."""
    undefined = {metric.name: math.nan for metric in PLANTED_METRICS}
    of_items = []
    for subject in subjects:
        # A method that fails on one text has no mean over the texts of the kind.
        try:
            explanation = method.explain(subject)
        except FlowgraphError as error:
            return PlantedScore(kind, method.name, 0, undefined, str(error))
        truth = planted_truth(subject.item)
        of_items.append(truth.score(explanation))

    means = {}
    for name in undefined:
        means[name] = fmean(figures[name] for figures in of_items)
    return PlantedScore(kind, method.name, len(of_items), means)


def planted_table(scores: Sequence[PlantedScore]) -> str:
    """Write scores as a Markdown table, one row for each kind and method; an empty cell is undefined."""
    columns = [metric.name for metric in PLANTED_METRICS]
    header = ["kind", "method", *columns]
    rows: list[list[str]] = []
    for score in scores:
        values = []
        for name in columns:
            value = score.figures[name]
            values.append("" if math.isnan(value) else f"{value:.2f}")
        # A reason takes the place of the first figure, without its remedy, so that the row stays short.
        if score.error is not None:
            values[0] = score.error.split(";")[0]
        rows.append([score.kind, score.method, *values])

    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    rule = "|" + "---|" * len(header)
    return "\n".join([lines[0], rule, *lines[1:]])
