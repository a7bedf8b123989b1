"""StepFlow: the exact flow between the lines, sentences or numbered steps of a text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from flowgraph.display.fragment import REGION_STYLES, bar, escaped, folded, fragment, one_line, percent, table
from flowgraph.files import PathLike, loadable, write_text
from flowgraph.flow.flow import Flow, require_single_feasible
from flowgraph.masks import MaskLike
from flowgraph.steps.contraction import Contraction, contract
from flowgraph.steps.splitting import (
    REGIONS,
    By,
    Region,
    TokenText,
    region_of_tokens,
    runs_of,
    starts_by_rule,
    starts_of_token_spans,
)

_MAX_LISTED = 40
"""Steps in the summary of a StepFlow."""
_MAX_LINE = 70
"""Characters of a step in the summary."""
_MAX_CELL = 120
_MAX_END = 48
"""Characters of a step in the tables of a notebook, and at an end of a flow."""
_NUM_FLOWS = 8
"""Flows that a notebook lists."""


@loadable
@dataclass(frozen=True)
class Step:
    """A run of tokens that is one node of the contracted graph.

    Attributes:
        index: position among the steps.
        start: its first token.
        stop: the token after its last.
        text: its characters, blanks included.
        region: the region of its tokens; None for context such as a chat template.
    """

    index: int
    start: int
    stop: int
    text: str
    region: Region | None


@loadable
@dataclass(frozen=True, eq=False, repr=False)
class StepFlow(Contraction):
    """A :class:`Contraction` whose nodes are the steps of a text.

    Attributes:
        steps: S of them, every token in exactly one.
        by: the rule that split the text; ``"auto: ..."`` names the one that was chosen.
    """

    steps: tuple[Step, ...]
    by: str

    def table(self) -> list[dict[str, Any]]:
        """Return one row per step.

        The columns are index, start, stop, region, text, throughput, source, absorbed, inflow, outflow and within.
        """
        rows = []
        for step, flow_row in zip(self.steps, super().table(), strict=True):
            step_row = {
                "index": step.index,
                "start": step.start,
                "stop": step.stop,
                "region": step.region,
                "text": step.text,
            }
            rows.append(step_row | flow_row)
        return rows

    def to_dict(self, *, max_edges: int | None = None) -> dict[str, Any]:
        """Return the flow between steps as plain JSON values, as in :mod:`flowgraph.tracing.payload`.

        Args:
            max_edges: list only this many of the strongest flows; default: all.
        """
        nodes = self.table()
        for row in nodes:
            # Both follow from the edges.
            del row["inflow"]
            del row["outflow"]
        edges = []
        for row in self.flow_table(max_edges):
            edges.append([row["source"], row["target"], row["flow"]])
        return {
            "by": self.by,
            "nodes": nodes,
            "edges": edges,
            "edges_left_out": self.edge_flow.numel() - len(edges),
        }

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically.

        Raises:
            OutputError: the path cannot be written.
        """
        # Escaped text (ensure_ascii) survives lone surrogates, which UTF-8 cannot hold.
        content = json.dumps(self.to_dict(), ensure_ascii=True, allow_nan=False, indent=1)
        write_text(path, content + "\n")

    def to_csv(self, path: PathLike, *, flows: bool = False) -> None:
        """Write a table as a CSV file, atomically; text stays as it is.

        Args:
            path: where to write.
            flows: write :meth:`flow_table`; default: :meth:`table`.

        Raises:
            OutputError: the path cannot be written.
        """
        if flows:
            rows = self.flow_table()
            names = ["source", "target", "flow"]
        else:
            rows = self.table()
            names = list(rows[0])
        content = io.StringIO()
        writer = csv.DictWriter(content, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, content.getvalue())

    def __repr__(self) -> str:
        lines = [f"StepFlow of {self.num_steps} steps by {self.by}, {self.edge_flow.numel()} flows between them"]
        throughput = self.throughput.tolist()
        for step in self.steps[:_MAX_LISTED]:
            region = step.region or "context"
            lines.append(f"  {step.index:>3} {region:<9} {throughput[step.index]:.3f} {_one_line(step.text)!r}")
        if self.num_steps > _MAX_LISTED:
            lines.append(f"  ... and {self.num_steps - _MAX_LISTED} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Render the steps for a notebook, each with its throughput as a bar, and the strongest flows between them."""
        throughput = self.throughput.tolist()
        rows = []
        for step in self.steps[:_MAX_LISTED]:
            region = step.region or "context"
            marked = f'<span style="{REGION_STYLES[region]}">{region}</span>'
            share = throughput[step.index]
            rows.append([str(step.index), marked, percent(share), bar(share), one_line(step.text, _MAX_CELL)])
        parts = [
            f"<div><b>StepFlow</b>: {self.num_steps} steps by {escaped(self.by)}, "
            f"{self.edge_flow.numel():,} flows between them</div>",
            table(["step", "region", "throughput", "", "text"], rows, left=["region", "", "text"]),
        ]
        if self.num_steps > _MAX_LISTED:
            parts.append(f"<div>… and {self.num_steps - _MAX_LISTED:,} more steps</div>")

        # Throughput says where flow passes, the strongest flows say between which steps.
        flows = []
        for row in self.flow_table(_NUM_FLOWS):
            source = self.steps[row["source"]]
            target = self.steps[row["target"]]
            ends = [f"{step.index} {one_line(step.text, _MAX_END)}" for step in (source, target)]
            flows.append([percent(row["flow"]), *ends])
        if flows:
            title = f"strongest {len(flows)} flows between steps"
            parts.append(folded(title, table(["flow", "from", "to"], flows, left=["from", "to"])))
        note = "throughput: share of the flow from question to answer that visits the step"
        parts.append(f'<div style="font-size:85%">{note}</div>')
        return fragment(*parts)


def step_flow(
    flow: Flow,
    *,
    tokens: Sequence[str],
    spans: Int64[Tensor, "tokens 2"],
    text: str,
    by: By = "auto",
    split_question: bool = False,
) -> StepFlow:
    """Compute the flow between the steps of a text: :func:`split_steps`, then :func:`contract`.

    Args:
        flow: a feasible flow on one graph, which holds the regions.
        tokens: see :func:`split_steps`.
        spans: see :func:`split_steps`.
        text: see :func:`split_steps`.
        by: see :func:`split_steps`.
        split_question: see :func:`split_steps`.

    Raises:
        InfeasibleFlowError: there is no flow.
        InvalidInputError: a batch; see also :func:`split_steps`.

    Cost: one pass over text and tokens, one sort of the edges between steps.
    """
    require_single_feasible(flow)
    graph = flow.graph
    token_text = TokenText.of(tokens, spans, text)
    regions = region_of_tokens(token_text, graph.question_mask, graph.reasoning_mask, graph.answer_mask)
    steps, name = _split(token_text, regions, by, split_question)

    # The steps cover the tokens in order.
    sizes = torch.tensor([step.stop - step.start for step in steps])
    step_of_token = torch.repeat_interleave(torch.arange(len(steps)), sizes)
    contracted = contract(flow, step_of_token)
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
    visible text starts at the rule's position or later: no token is cut.

    Args:
        tokens: text of each of the T tokens.
        spans: ``[T, 2]``, half-open character span of each token in ``text``.
        text: the complete text; "" for the tokens one after another.
        question: mask, indices or slice of the question's tokens.
        reasoning: the same for the reasoning.
        answer: the same for the answer.
        by: ``"lines"``, ``"sentences"``, ``"numbered"`` (``1.``, ``2)``, ``Step 3:``), ``"words"``, or ``"auto"``:
            numbered if there are at least two numbers, else lines if at least three, else sentences. A regular
            expression: a step starts where it matches (at group 1 if it has one); blank separators such as ``\n\n``
            work as they are. A function from the text of the reasoning to the character spans of its steps; characters
            between two spans belong to the step before. Token spans ``[(start, stop), ...]``: these steps, as they are.
        split_question: split the question by the same rule (under ``"auto"`` by a choice of its own).

    Returns:
        The steps, in order.

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
    token_text = TokenText.of(tokens, spans, text)
    regions = region_of_tokens(token_text, question, reasoning, answer)
    steps, _ = _split(token_text, regions, by, split_question)
    return steps


def _split(token_text: TokenText, regions: np.ndarray, by: By, split_question: bool) -> tuple[tuple[Step, ...], str]:
    """Return the steps, and the name of the rule that was used; ``regions`` numbers the region of each token."""
    runs = runs_of(regions)
    is_rule = isinstance(by, str | re.Pattern) or callable(by)
    if is_rule:
        # Every run is a step; the rule adds the starts inside the reasoning, and inside the question on request.
        starts = [low for low, _ in runs]
        if split_question:
            question_starts, _ = starts_by_rule(by, token_text, _runs_in("question", runs, regions), "question")
            starts += question_starts
        reasoning_starts, name = starts_by_rule(by, token_text, _runs_in("reasoning", runs, regions), "reasoning")
        starts += reasoning_starts
    else:
        name = "token spans"
        starts = starts_of_token_spans(by, regions, runs)

    # Each step ends where the next one starts.
    num_tokens = regions.size
    borders = [*sorted(set(starts)), num_tokens]
    steps = []
    for index, (start, stop) in enumerate(pairwise(borders)):
        # A step has one region. Tokens of no region (-1) may be inside a span of the user's.
        number = int(regions[start:stop].max())
        region = REGIONS[number] if number >= 0 else None
        text = token_text.characters(start, stop)
        steps.append(Step(index, start, stop, text, region))
    return tuple(steps), name


def _runs_in(region: Region, runs: Sequence[tuple[int, int]], regions: np.ndarray) -> list[tuple[int, int]]:
    """Return the runs of tokens of one region."""
    number = REGIONS.index(region)
    return [(low, high) for low, high in runs if regions[low] == number]


def _one_line(text: str) -> str:
    """Shorten a step's text to one line of a summary."""
    line = " ".join(text.split())
    if len(line) <= _MAX_LINE:
        return line
    return line[: _MAX_LINE - 3] + "..."
