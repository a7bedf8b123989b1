"""``Baselines``: how far the ranking of a trace's tokens agrees with rankings that need no flow.

A ranking that a trivial one reproduces says little about the model, so none should be shown without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn
from torch_geometric.data import Data

from flowgraph.analysis.statistics import spearman
from flowgraph.capacities.gradient import capture_input_gradient
from flowgraph.errors import CaptureError, InvalidInputError
from flowgraph.files import PathLike, write_json
from flowgraph.flow.compositions import compose

SCHEMA = "flowgraph-baselines/1"
NUM_TOP = 10
"""Tokens with the highest scores that are compared."""
_MIN_TOKENS = 3
"""A rank correlation of fewer tokens is not defined."""
_REGIONS = ("reasoning", "question", "all")
_SEED = 0


@runtime_checkable
class Ranked(Protocol):
    """What a comparison with baselines reads of a trace of either kind."""

    @property
    def tokens(self) -> tuple[str, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def token_ids(self) -> Int64[Tensor, " tokens"]: ...

    @property
    def question(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def reasoning(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def answer(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def scores(self) -> Float64[Tensor, " tokens"]: ...

    @property
    def score_name(self) -> str: ...

    @property
    def graph(self) -> Data: ...


@dataclass(frozen=True, eq=False)
class Baseline:
    """A ranking that needs no flow, compared with that of a trace.

    Attributes:
        name: ``"gradient x input"``, ``"one hop"``, ``"recency"``, ``"digits"`` or ``"random"``.
        description: what it scores.
        scores: ``[T]`` float64; None where it was not computed.
        spearman: rank correlation with the scores of the trace, in [-1, 1]; None where it is not defined.
        overlap: common share of the tokens with the highest scores, in [0, 1]; None where there are no scores.
        reason: why there is no figure; empty otherwise.
    """

    name: str
    description: str
    scores: Float64[Tensor, " tokens"] | None
    spearman: float | None
    overlap: float | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Baselines:
    """The ranking of a trace's tokens beside rankings that need no flow.

    Attributes:
        score: what ranks the tokens of the trace.
        region: the tokens that are ranked: ``"reasoning"``, ``"question"`` or ``"all"``, all tokens before the answer.
        num_tokens: how many these are.
        num_top: number of tokens with the highest scores that are compared.
        baselines: the rankings.
    """

    score: str
    region: str
    num_tokens: int
    num_top: int
    baselines: tuple[Baseline, ...]

    def table(self) -> list[dict[str, Any]]:
        """List the baselines as rows of a table."""
        rows = []
        for each in self.baselines:
            rows.append(
                {
                    "baseline": each.name,
                    "description": each.description,
                    "spearman": each.spearman,
                    "overlap": each.overlap,
                    "reason": each.reason,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, schema ``flowgraph-baselines/1``."""
        return {
            "schema": SCHEMA,
            "score": self.score,
            "region": self.region,
            "num_tokens": self.num_tokens,
            "num_top": self.num_top,
            "baselines": self.table(),
        }

    def to_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        lines = [
            f"{self.score} of {self.num_tokens} tokens ({self.region}) beside rankings without a flow",
            f"{'baseline':<18}{'Spearman':>9}  {f'top {self.num_top}':>7}",
        ]
        for each in self.baselines:
            correlation = "-" if each.spearman is None else f"{each.spearman:.2f}"
            overlap = "-" if each.overlap is None else f"{each.overlap:.0%}"
            lines.append(f"{each.name:<18}{correlation:>9}  {overlap:>7}  {each.reason}".rstrip())
        return "\n".join(lines)


def baselines_of(
    trace: Ranked, model: nn.Module | None = None, *, region: str | None = None, top: int = NUM_TOP
) -> Baselines:
    """Compare the ranking of a trace with baselines.

    Args:
        trace: its tokens, regions, edges and scores.
        model: the model of the trace, for gradient x input; None: without it.
        region: see :meth:`FlowTrace.baselines`, also for ``top``.
        top: number of tokens with the highest scores.

    Raises:
        InvalidInputError: a region or number outside its range, or a region of fewer than three tokens.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InvalidInputError(f"top: must be a positive integer, got {top!r}; {NUM_TOP} is the default")
    counted, region = counted_tokens(trace, region)
    num_tokens = int(counted.sum())
    # Of few tokens, the best ten would be nearly all of them.
    num_top = max(1, min(top, num_tokens // 2))

    base = trace.scores[counted]

    def compared(name: str, description: str, scores: Float64[Tensor, " tokens"]) -> Baseline:
        return _compared(name, description, scores, base, counted, num_top)

    # The answer's reads, the only part that no composition enters.
    one_hop = compared("one hop", "what the answer reads directly, on the same edges", _one_hop(trace))

    # Rankings by position and by text alone, and the overlap of a random ranking.
    position = torch.arange(trace.num_tokens, dtype=torch.float64)
    recency = compared("recency", "later tokens first", position)
    has_digit = []
    for token in trace.tokens:
        has_digit.append(any(character.isdigit() for character in token))
    digits = compared("digits", "tokens with a digit first", torch.tensor(has_digit, dtype=torch.float64))
    random_order = _random(trace.num_tokens, num_tokens, num_top)

    # Gradient times input; a model without a usable gradient gives the reason in its place.
    gradient = "derivative of the answer's log-probability by each embedding, times the embedding"
    if model is None:
        by_gradient = Baseline("gradient x input", gradient, None, None, None, "needs the model: one backward pass")
    else:
        try:
            scores = capture_input_gradient(model, trace.token_ids, trace.answer).product
            by_gradient = compared("gradient x input", gradient, scores)
        except CaptureError as error:
            by_gradient = Baseline("gradient x input", gradient, None, None, None, str(error))
    found = (by_gradient, one_hop, recency, digits, random_order)
    return Baselines(trace.score_name, region, num_tokens, num_top, found)


def can_rank(trace: Ranked) -> bool:
    """Tell whether a trace has scores and at least three tokens before its answer to rank."""
    return bool(trace.scores.any()) and int(trace.answer.nonzero().min()) >= _MIN_TOKENS


def counted_tokens(trace: Ranked, region: str | None) -> tuple[Bool[Tensor, " tokens"], str]:
    """Mark the tokens that are ranked, and name their region.

    Raises:
        InvalidInputError: no such region, or one of fewer than three tokens.
    """
    # "all" ends before the answer, whose tokens are what is explained.
    masks = {
        "reasoning": trace.reasoning,
        "question": trace.question,
        "all": torch.arange(trace.num_tokens) < int(trace.answer.nonzero().min()),
    }
    if region is None:
        region = "reasoning" if int(masks["reasoning"].sum()) >= _MIN_TOKENS else "all"
    if region not in masks:
        raise InvalidInputError(f"region: must be one of {', '.join(_REGIONS)}, got {region!r}; 'reasoning' is usual")
    count = int(masks[region].sum())
    if count < _MIN_TOKENS:
        raise InvalidInputError(
            f"region: must hold at least {_MIN_TOKENS} tokens to rank, got {count} in {region!r}; use region='all'"
        )
    return masks[region], region


def _one_hop(trace: Ranked) -> Float64[Tensor, " tokens"]:
    """Score each token by what the answer reads directly from it."""
    if "capacity" in trace.graph:
        return compose(trace.graph, "one_hop").detach()
    # Relevance keeps each position's own row, so an answer token was read by the position before it.
    reads = torch.zeros(trace.num_tokens, dtype=torch.float64)
    reads[:-1] = trace.answer[1:].double()
    return compose(trace.graph, "one_hop", demand=reads).detach()


def _random(num_all: int, num_tokens: int, num_top: int) -> Baseline:
    """Return a random order, with the figures to expect of random orders: correlation 0, overlap top / tokens."""
    generator = torch.Generator().manual_seed(_SEED)
    scores = torch.randperm(num_all, generator=generator).double()
    return Baseline("random", "expected of a random order", scores, 0.0, num_top / num_tokens)


def _compared(
    name: str,
    description: str,
    scores: Float64[Tensor, " tokens"],
    base: Float64[Tensor, " counted"],
    counted: Bool[Tensor, " tokens"],
    num_top: int,
) -> Baseline:
    """Compare the scores of a baseline with those of the trace, over the counted tokens."""
    of_counted = scores[counted]
    if not bool(torch.isfinite(of_counted).all() and torch.isfinite(base).all()):
        return Baseline(name, description, scores, None, None, "a score is beyond the range of float64")
    correlation = spearman(base.numpy(), of_counted.numpy())
    if math.isnan(correlation):
        return Baseline(name, description, scores, None, None, "all scores are equal")
    return Baseline(name, description, scores, correlation, _overlap(base, of_counted, num_top))


def _overlap(base: Float64[Tensor, " counted"], other: Float64[Tensor, " counted"], num_top: int) -> float:
    """Return the common share of the best tokens; ties at the border are counted in proportion."""
    return float((_membership(base, num_top) * _membership(other, num_top)).sum()) / num_top


def _membership(scores: Float64[Tensor, " counted"], num_top: int) -> Float64[Tensor, " counted"]:
    """Return the probability of each token to be among the best, where ties are broken at random."""
    border = scores.topk(num_top).values[-1]
    above = (scores > border).double()
    tied = (scores == border).double()
    return above + tied * (num_top - above.sum()) / tied.sum()


def shown_baselines(trace: Any, given: Baselines | None) -> Mapping[str, Any] | None:
    """Describe the baselines of a trace for a payload: those given, else those that need no model.

    Returns:
        None where fewer than three tokens stand before the answer, so that there is no ranking.

    Raises:
        InvalidInputError: baselines of other tokens.
    """
    if not can_rank(trace):
        return None
    if given is None:
        given = baselines_of(trace)
    for each in given.baselines:
        if each.scores is not None and each.scores.numel() != trace.num_tokens:
            raise InvalidInputError(
                f"baselines: must be of this trace, got those of {each.scores.numel()} tokens beside "
                f"{trace.num_tokens}; pass trace.baselines(model)"
            )
    return given.to_dict()
