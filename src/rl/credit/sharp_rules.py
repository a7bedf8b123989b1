r"""Credit rules on sharpened attention, and their controls.

The mean over heads dilutes a lookup that one or a few heads make, at every hop again. The rules here read attention to
a power instead: by default the fourth power of the maximum over heads and over all layers above the first. A is
attention, h runs over heads and l over the chosen layers:

.. math:: S[t, s] = \max_{l, h} A_{l h}[t, s]^p

with ``heads="max"``; with ``heads="mean"`` it is the mean over layers and heads of :math:`A^p` (``place="pre"``), or
the mean over layers of the p-th power of the mean over heads (``place="post"``). The rows of S then become edges like
those of attention: emission rows, no edges out of the first token, and ``normalization``.

All rules here have these options:

- ``power``: p, from 1 to 8 (4);
- ``heads``: ``"max"`` or ``"mean"`` (``"max"``);
- ``layers``: as in :func:`flowgraph.capture` (``"1-"``, all layers above the first); ``CreditConfig.layers`` and
  ``CreditConfig.heads`` have no effect;
- ``place``: of the power under ``heads="mean"``: ``"pre"`` or ``"post"`` (``"pre"``); a maximum is the same with both;
- ``normalization``: ``"renormalize"`` (each row sums to 1) or ``"leak"`` (a row keeps its own sum, and all are divided
  by the largest among the rows up to the answer; a row that reads nothing sharply passes on little).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, EdgeRules
from rl.credit.flow_rules import (
    convention_of,
    reach_scores,
    shuffled_rows,
    solve_response_flow,
    throughput_scores,
)
from rl.credit.policy_rules import generators_of
from rl.credit.registry import AttentionNeed, CreditInput, Needs, TiedScores, credit_rule, recorded
from rl.credit.scope import before_answer
from rl.errors import CreditError

_NAME = "sharp"
"""Name under which the sharpened rows are recorded."""
_GREATEST_POWER = 8
_CHOICES = {"heads": ("max", "mean"), "place": ("pre", "post"), "normalization": ("renormalize", "leak")}
"""The values of the options that are names; the first is the default."""
_BLOCK = 128
"""Number of rows that are read at once."""


@dataclass(frozen=True)
class SharpOptions:
    """The options of the rules on sharpened attention; the module describes them."""

    power: float = 4.0
    heads: Literal["max", "mean"] = "max"
    layers: Any = "1-"
    place: Literal["pre", "post"] = "pre"
    normalization: Literal["renormalize", "leak"] = "renormalize"

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> SharpOptions:
        """Read the options of a rule.

        Raises:
            CreditError: an unknown option, or a value outside its range.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            # The convention of the rows is a setting of the run, not an option of these rules.
            if name == "rows":
                continue
            if name not in known:
                raise CreditError(f"options: must be options of this rule, got {name!r}; there are {', '.join(known)}")

        values = {item.name: options.get(item.name, item.default) for item in fields(cls)}
        _check_options(values)
        return cls(**values)

    def need(self) -> AttentionNeed:
        """Return the attention to record."""
        place = "max" if self.heads == "max" else self.place
        layers = tuple(self.layers) if isinstance(self.layers, list) else self.layers
        return AttentionNeed(layers=layers, power=float(self.power), place=place)

    def edge_rules(self, convention: Any) -> EdgeRules:
        """Return how the recorded rows become edges."""
        return EdgeRules(rows=convention, normalization=self.normalization)


def _check_options(values: Mapping[str, Any]) -> None:
    """Check the values of the options; the recorder checks the layers against the model."""
    # bool is a subclass of int, and is not a number here.
    power = values["power"]
    is_number = isinstance(power, (int, float)) and not isinstance(power, bool)
    if not is_number or not 1 <= power <= _GREATEST_POWER:
        raise CreditError(
            f"options: power must be a number from 1 to {_GREATEST_POWER}, got {power!r}; 4 is the default"
        )
    for name, allowed in _CHOICES.items():
        default, other = allowed
        if values[name] not in allowed:
            raise CreditError(
                f"options: {name} must be {default!r} or {other!r}, got {values[name]!r}; {default!r} is the default"
            )
    layers = values["layers"]
    if isinstance(layers, bool) or not isinstance(layers, (str, int, list, tuple)):
        raise CreditError(f"options: layers must be text or numbers of layers, got {layers!r}; '1-' is the default")


def _sharp_needs(options: Mapping[str, Any]) -> Needs:
    """Return the attention that a rule on sharpened attention records."""
    return {_NAME: SharpOptions.read(options).need()}


@credit_rule("flow_sharp", needs=_sharp_needs, ties=True)
def flow_sharp(batch: CreditInput) -> TiedScores:
    r"""Score a token by its throughput on sharpened attention: lookups by single heads are not averaged away.

    .. math:: f_t = g_t \cdot h_t \in [0, 1]

    The flow of arXiv 2606.10646 on another graph. Options: see the module.

    Raises:
        CreditError: an option outside its range.
        InvalidInputError: an unknown convention, or layers outside the model.

    Cost: two reads of the rows, three with ``normalization="leak"``.
    """
    return throughput_scores(batch, _solved(batch, recorded(batch, _NAME)))


@credit_rule("reach_sharp", needs=_sharp_needs, ties=True)
def reach_sharp(batch: CreditInput) -> TiedScores:
    r"""Score a token by its total influence on the answer, on sharpened attention: the recommended rule.

    .. math:: h_s = b_s + \sum_{t > s} C[t, s] \cdot h_t

    Recommended with ``shape="soft"``, ``floor=0.5``, ``ceiling=2`` and ``fallback=0.5``. Options, errors and cost as
    :func:`flow_sharp`.
    """
    return reach_scores(batch, _solved(batch, recorded(batch, _NAME)))


@credit_rule("max_attention_sharp", needs=_sharp_needs, ties=True)
def max_attention_sharp(batch: CreditInput) -> TiedScores:
    r"""Score a token by the largest edge from it to any later token of the response, on the graph of flow_sharp.

    .. math:: \max_{t > s} C[t, s]

    The control for the flow itself: the same graph, without propagation to the answer. Self-attention counts where an
    emission row makes it the edge to the next token. Options and errors as :func:`flow_sharp`. The tie is that of
    :func:`reach_sharp`.

    Cost: one read of the response rows more than :func:`flow_sharp`.
    """
    # The flow is solved for the tie alone.
    rows = recorded(batch, _NAME)
    solved = _solved(batch, rows)
    tied = reach_scores(batch, solved)

    # The running maximum over the blocks of readers t.
    scores = torch.zeros(batch.scored.shape, device=rows.device, dtype=torch.float32)
    for edges in _response_edges(batch, rows):
        width = edges.shape[2]
        largest_in_block = edges.amax(1)
        scores[:, :width] = torch.maximum(scores[:, :width], largest_in_block)
    return TiedScores(scores.to(batch.scored.device), tied.tie)


@credit_rule("shuffled_flow_sharp", needs=_sharp_needs, ties=True)
def shuffled_flow_sharp(batch: CreditInput) -> TiedScores:
    """Score a token by its throughput in the graph of flow_sharp with shuffled rows: the control for the structure.

    The weights of every row are permuted among the tokens that it may read, as in :func:`shuffled_flow`. Options and
    errors as :func:`flow_sharp`.

    Raises:
        CreditError: the number of generators is not that of the responses.
        MemoryLimitError: the dense rows would not fit.

    Cost: ``4 * batch * tokens ** 2`` bytes; each row is sorted once.
    """
    shuffled = shuffled_rows(batch, recorded(batch, _NAME))
    return throughput_scores(batch, _solved(batch, shuffled))


@credit_rule("wrong_sink", needs=_sharp_needs, ties=True)
def wrong_sink(batch: CreditInput) -> TiedScores:
    """Score a token by its flow_sharp to a wrong sink: one random token before the answer, in place of the answer.

    The control for the sink: the same graph, solver and question. The sink is drawn uniformly from the second half of
    the response tokens before the answer, so that most tokens can still reach it; from all response tokens where there
    is no answer. Its own throughput is 1 by construction, like that of an answer, so it gets the mean score of the
    other scored tokens, which the soft shape turns into the weight 1 that answers have. Tokens after it score 0. The
    tie is the mean reach to the wrong sink of the tokens before the answer.

    Options and errors as :func:`flow_sharp`; a number of generators other than that of the responses is an error too.

    Cost: as :func:`flow_sharp`.
    """
    # The sink takes the place of the answer in the solver. A response that is nothing but its answer has no token
    # before it, and so no wrong sink and no flow.
    sink = _wrong_sinks(batch)
    prompt = sink.new_zeros(sink.shape[0], batch.responses.prompt_length)
    answer = torch.cat([prompt, sink], 1)
    solved = _solved(batch, recorded(batch, _NAME), answer=answer)
    found = throughput_scores(batch, solved)

    # The throughput of the sink is 1 by construction, so the mean of the other scored tokens replaces it.
    others = batch.scored & ~sink
    total = torch.where(others, found.scores, 0.0).sum(1, keepdim=True)
    num_others = others.sum(1, keepdim=True).clamp_min(1)
    mean = total / num_others
    return TiedScores(torch.where(sink, mean, found.scores), found.tie)


def _wrong_sinks(batch: CreditInput) -> Bool[Tensor, "batch response"]:
    """Draw one token of the second half before the answer for each response; none where no token precedes it."""
    # A response without an answer draws among all of its tokens.
    before = before_answer(batch.responses)
    has_answer = batch.responses.answer_in_response.any(1, keepdim=True)
    candidates = torch.where(has_answer, before, batch.responses.response_mask)

    sink = torch.zeros_like(candidates)
    for row, is_candidate, random in zip(sink, candidates.cpu(), generators_of(batch), strict=True):
        columns = is_candidate.nonzero().flatten()
        half = len(columns) // 2
        second_half = columns[half:]
        if second_half.numel() > 0:
            place = int(torch.randint(second_half.numel(), (1,), generator=random))
            row[second_half[place]] = True
    return sink


def _solved(batch: CreditInput, rows: Any, answer: Bool[Tensor, "batch tokens"] | None = None) -> Any:
    """Solve the flow of each response on sharpened rows."""
    options = SharpOptions.read(batch.options)
    return solve_response_flow(batch, rows, options.edge_rules(convention_of(batch)), answer=answer)


def _response_edges(batch: CreditInput, rows: AttentionRows) -> Iterator[Float[Tensor, "batch block read"]]:
    """Yield the edges between response tokens as blocks of readers, up to a common factor under ``"leak"``.

    These are the edges that :class:`flowgraph.EdgeRules` makes: rows without the first token, renormalised or not, and
    under emission rows the row of the position before the reader.
    """
    options = SharpOptions.read(batch.options)
    rules = options.edge_rules(convention_of(batch))
    origin = batch.responses.prompt_length
    # The edges into token t are row t in literal rows, and row t - 1 in emission rows.
    shift = 0 if rules.rows == "literal" else 1
    mask = batch.responses.response_mask.to(rows.device)
    first_token = rows.attention_mask.long().argmax(-1)
    last_row = rows.num_tokens - shift
    for start in range(origin - shift, last_row, _BLOCK):
        stop = min(start + _BLOCK, last_row)
        weights = rows.block(start, stop)
        # No edge leaves the first token of a sequence.
        column = first_token.clamp_max(stop - 1)[:, None, None].expand(-1, stop - start, 1)
        weights = weights.scatter(2, column, 0.0)
        if options.normalization == "renormalize":
            smallest = torch.finfo(weights.dtype).tiny
            row_sums = weights.sum(-1, keepdim=True)
            weights = weights / row_sums.clamp_min(smallest)

        # Cells whose reader is a response token, and which read an earlier one.
        reader = torch.arange(start + shift, stop + shift, device=rows.device)
        read = torch.arange(stop, device=rows.device)
        is_earlier = read < reader[:, None]
        is_reader = mask[:, reader - origin]
        edges = torch.where(is_earlier & is_reader[:, :, None], weights, 0.0)
        yield edges[:, :, origin:]
