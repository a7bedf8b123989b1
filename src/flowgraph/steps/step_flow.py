"""Steps: reasoning split into lines, sentences or numbered steps, and the same flow between them, exactly."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flowgraph.files import PathLike, write_text
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.masks import MaskLike
from flowgraph.steps.contraction import Contraction, contract
from flowgraph.steps.splitting import (
    REGIONS,
    By,
    Places,
    Region,
    name_of,
    region_of_tokens,
    runs_of,
    starts_by_rule,
    starts_of_token_spans,
)

_SHOWN = 40


@dataclass(frozen=True)
class Step:
    """A run of tokens that is one node of the contracted graph.

    Attributes:
        index: position among the steps.
        start, stop: its tokens, ``[start, stop)``.
        text: what it says, blanks included.
        region: where it lies; None for context such as a chat template.
    """

    index: int
    start: int
    stop: int
    text: str
    region: Region | None


@dataclass(frozen=True, eq=False, repr=False)
class StepFlow(Contraction):
    """A :class:`Contraction` whose nodes are the steps of a text.

    Attributes:
        steps: S of them, every token in exactly one.
        by: the rule that split the text; ``"auto: ..."`` names the one it settled on.
    """

    steps: tuple[Step, ...]
    by: str

    def table(self) -> list[dict[str, Any]]:
        """One row a step: index, start, stop, region, text, throughput, source, absorbed, inflow, outflow, within."""
        return [
            {**{name: getattr(step, name) for name in ("index", "start", "stop", "region", "text")}, **row}
            for step, row in zip(self.steps, super().table(), strict=True)
        ]

    def to_dict(self, *, max_edges: int | None = None) -> dict[str, Any]:
        """Plain JSON values, as in :mod:`flowgraph.tracing.payload`; with ``max_edges``, the strongest flows only."""
        edges = [list(row.values()) for row in self.flow_table(max_edges)]
        names = ("index", "start", "stop", "region", "text", "throughput", "source", "absorbed", "within")
        return {
            "by": self.by,
            "nodes": [{name: row[name] for name in names} for row in self.table()],
            "edges": edges,
            "edges_left_out": self.edge_flow.numel() - len(edges),
        }

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically.

        Raises:
            OutputError: the path cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), ensure_ascii=True, allow_nan=False, indent=1) + "\n")

    def to_csv(self, path: PathLike, *, flows: bool = False) -> None:
        """Write :meth:`table`, or with ``flows`` :meth:`flow_table`, as a CSV file, atomically; text stays as it is.

        Raises:
            OutputError: the path cannot be written.
        """
        rows, names = (self.flow_table(), ["source", "target", "flow"]) if flows else (self.table(), None)
        lines = io.StringIO()
        writer = csv.DictWriter(lines, names or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, lines.getvalue())

    def __repr__(self) -> str:
        head = f"StepFlow of {self.num_steps} steps by {self.by}, {self.edge_flow.numel()} flows between them"
        throughput = self.throughput.tolist()
        lines = [
            f"  {step.index:>3} {step.region or 'context':<9} {throughput[step.index]:.3f} {_one_line(step.text)!r}"
            for step in self.steps[:_SHOWN]
        ]
        more = [f"  ... and {self.num_steps - _SHOWN} more"] if self.num_steps > _SHOWN else []
        return "\n".join([head, *lines, *more])


def step_flow(
    flow: Flow,
    *,
    tokens: Sequence[str],
    spans: Int64[Tensor, "tokens 2"],
    text: str,
    by: By = "auto",
    split_question: bool = False,
) -> StepFlow:
    """The flow between the steps of a text: :func:`split_steps`, then :func:`contract`.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch, or what :func:`split_steps` refuses.
    """
    require_single_feasible(flow)
    graph = flow.graph
    steps, name = _split(
        tokens, spans, text, graph.question_mask, graph.reasoning_mask, graph.answer_mask, by, split_question
    )
    sizes = torch.tensor([step.stop - step.start for step in steps])
    contracted = contract(flow, torch.repeat_interleave(torch.arange(len(steps)), sizes))
    return StepFlow(**vars(contracted), steps=steps, by=name)


def split_steps(
    tokens: Sequence[str],
    spans: Int64[Tensor, "tokens 2"],
    text: str,
    *,
    question: MaskLike,
    reasoning: MaskLike,
    answer: MaskLike,
    by: By = "auto",
    split_question: bool = False,
) -> tuple[Step, ...]:
    r"""Split the tokens of a text into steps: the reasoning by a rule, everything else by region.

    Every token is in exactly one step and a step lies in one region. Each run of question, of answer and of context
    is one step; blank tokens outside the regions join the step before them. A step starts at the first token whose
    visible text starts where the rule says or later: no token is cut.

    Args:
        tokens: text of each token.
        spans: half-open character span of each token in ``text``.
        text: the whole text; "" for the tokens one after another.
        question: mask, indices or slice of the question's tokens.
        reasoning: the same for the reasoning.
        answer: the same for the answer.
        by: ``"lines"``, ``"sentences"``, ``"numbered"`` (``1.``, ``2)``, ``Step 3:``), or ``"auto"``: numbered if
            there are at least two numbers, else lines if at least three, else sentences. A regular expression: a step
            starts where it matches (at group 1 if it has one); blank separators such as ``\n\n`` work as they are. A
            function: given the text of the reasoning it returns the character spans of its steps; what lies between
            two belongs to the one before. Token spans ``[(start, stop), ...]``: these steps, as they are.
        split_question: split the question by the same rule (under ``"auto"`` settled for itself).

    Raises:
        InvalidInputError: an unknown rule, a pattern that matches nothing or does not compile, spans that overlap, lie
            outside or mix two regions.
        RegionError: regions that overlap or lie outside.

    Cost: one pass over text and tokens.

    Example:
        >>> tokens = ["2+3", "?", " Add", ".", " So", " it", " is", " ", "5"]
        >>> steps = split_steps(
        ...     tokens, torch.zeros(9, 2).long(), "", question=[0, 1], reasoning=slice(2, 8), answer=[8]
        ... )
        >>> [(step.region, step.text) for step in steps]
        [('question', '2+3?'), ('reasoning', ' Add.'), ('reasoning', ' So it is '), ('answer', '5')]
    """
    return _split(tokens, spans, text, question, reasoning, answer, by, split_question)[0]


def _split(
    tokens: Sequence[str],
    spans: Tensor,
    text: str,
    question: MaskLike,
    reasoning: MaskLike,
    answer: MaskLike,
    by: By,
    split_question: bool,
) -> tuple[tuple[Step, ...], str]:
    """The steps, and the name of the rule that was used."""
    places = Places.of(tokens, spans, text)
    label = region_of_tokens(places, question, reasoning, answer)
    runs = runs_of(label)
    if not isinstance(by, str | re.Pattern) and not callable(by):
        starts, name = starts_of_token_spans(by, label, runs), "token spans"
    else:
        starts, name = [low for low, _ in runs], name_of(by)
        for region in ("question", "reasoning") if split_question else ("reasoning",):
            passages = [run for run in runs if label[run[0]] == REGIONS.index(region)]
            found, used = starts_by_rule(by, places, passages, region)
            starts += found
            name = used if region == "reasoning" else name
    edges = [*sorted(set(starts)), len(tokens)]
    steps = []
    for index, (low, high) in enumerate(pairwise(edges)):
        inside = int(label[low:high].max())
        steps.append(Step(index, low, high, places.text_of(low, high), REGIONS[inside] if inside >= 0 else None))
    return tuple(steps), name


def _one_line(text: str) -> str:
    """A step's text for one line of a summary."""
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:67] + "..."
