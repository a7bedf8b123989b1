"""Credit rules that read attention directly: the baselines that flow has to beat.

Every rule here is *literal*: row t is what token t reads once it stands there, column s is the token that is read.
So do the papers that the rules come from, and what is scored is mostly the column, whose token is the same under
either convention. (Emission, which gives token t the row of position t - 1, is a matter of the flow rules; the
option ``rows`` is accepted here and changes nothing.) Readers are response tokens; only their rows are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, HeadSelector
from rl.credit.registry import AttentionNeed, CreditInput, credit_rule, options_of, recorded
from rl.credit.scope import before_answer
from rl.errors import CreditError

BLOCK = 128
"""Attention rows read at once."""
_LOCAL = AttentionNeed(layers="middle", heads=HeadSelector("distance", "lowest", 0.3))
_GLOBAL = AttentionNeed(layers="middle", heads=HeadSelector("distance", "highest", 0.3))
_LEAST_WEIGHT = 1e-8
"""Stands for attention of 0 where its logarithm is taken."""
_LEAST_SPREAD = 1e-4
"""Logarithms that spread less differ by rounding, which must not be blown up to a z-score."""
_CONSTANT = 1e-10
"""A variance below this share of the mean square is rounding: it correlates with nothing."""


@credit_rule("max_attention", needs={"attention": AttentionNeed()})
def max_attention(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""The most attention that any later token of the response pays to the token.

    .. math:: \max_{t > s} A[t, s]

    A baseline of arXiv 2606.10646, which names it; that the maximum runs over all later response tokens (not only
    the answer's) and over the mean of heads is our reading. Self-attention is left out.

    Cost: one read of the response rows.
    """
    options_of(batch)
    start_of_response = batch.responses.prompt_length
    best = torch.zeros(batch.scored.shape, device=recorded(batch, "attention").device)
    for start, rows in _response_blocks(batch, "attention"):
        earlier = rows.tril(start - start_of_response - 1)
        best[:, : rows.shape[2]] = torch.maximum(best[:, : rows.shape[2]], earlier.amax(1))
    return best.to(batch.scored.device)


@credit_rule("correlation", needs={"attention": AttentionNeed()})
def correlation(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Whether the tokens that read this one are those that the answer reads.

    .. math:: \max(0, \operatorname{corr}_{t > s}(A[t, s], a_t)), \quad a_t = \operatorname{mean}_{u \in answer} A[u, t]

    Pearson's correlation over the reasoning tokens t after s. arXiv 2606.10646 lists a correlation baseline; which
    two quantities it correlates is not known to us, so this definition is ours: it is the centred and normalised form
    of the flow over exactly two hops. 0 where fewer than three tokens follow, where nothing varies, on the answer and
    after it, and without an answer.

    Cost: two reads of the response rows.
    """
    options_of(batch)
    device = recorded(batch, "attention").device
    reasoning = before_answer(batch.responses).to(device)
    answer = batch.responses.answer_in_response.to(device).double()
    read = torch.zeros(batch.scored.shape, dtype=torch.float64, device=device)
    origin = batch.responses.prompt_length
    for start, rows in _response_blocks(batch, "attention"):
        readers = answer[:, None, start - origin : rows.shape[2]]
        read[:, : rows.shape[2]] += (readers @ rows.double()).squeeze(1)
    read /= answer.sum(1, keepdim=True).clamp_min(1)
    sums = torch.zeros(6, *read.shape, dtype=torch.float64, device=device)
    for start, rows in _response_blocks(batch, "attention"):
        width, shift = rows.shape[2], start - origin
        weights = rows.double().tril(shift - 1)
        later = torch.ones(width - shift, width, dtype=torch.float64, device=device).tril(shift - 1)
        reader, y = reasoning[:, shift:width].double(), read[:, shift:width]
        paired = torch.stack([reader, reader * y], 1) @ weights
        alone = torch.stack([reader, reader * y, reader * y.square()], 1) @ later
        squares = reader[:, None] @ weights.square()
        sums[:, :, :width] += torch.cat([alone, paired, squares], 1).transpose(0, 1)
    return (_pearson(sums) * reasoning).to(batch.scored.device)


@credit_rule("fai", needs={"global": _GLOBAL})
def fai(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Future attention influence: what tokens 10 to 50 places later pay to the token, in far-reaching heads.

    .. math:: FAI_s = \operatorname{mean}_{t \in [s + near,\, s + far]} A_{glob}[t, s]

    arXiv 2510.13554: the 30 % of heads with the longest mean span; its anchors are the top 40 %
    (``share=0.4``). Readers end with the response; 0 where none is left. Ours: heads are chosen in every layer of
    the middle third, for each sequence, where the paper takes five layers there.

    Options: ``near`` (10), ``far`` (50).

    Raises:
        CreditError: an option outside its range.

    Cost: one read of the response rows, and one of all rows to choose heads.
    """
    return _future_influence(batch, **options_of(batch, near=10, far=50))


@credit_rule("waad", needs={"local": _LOCAL})
def waad(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""How much the reach of local attention changes after the token: where a new chunk begins.

    .. math:: |W_t - W_{t+1}|, \quad W_t = \sum_s A_{loc}[t, s] \min(t - s, window)

    Windowed average attention distance, arXiv 2510.13554: the 30 % of heads with the shortest mean span; its preplan
    tokens are the top 40 % (``share=0.4``). The last token of a response has no successor and scores 0. Layers as in
    :func:`fai`.

    Options: ``window`` (10).

    Raises:
        CreditError: an option outside its range.

    Cost: as :func:`fai`.
    """
    return _reach_change(batch, **options_of(batch, window=10))


@credit_rule("coupled", needs={"local": _LOCAL, "global": _GLOBAL})
def coupled(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Preplan and anchor tokens, an anchor sharing with the preplan token that led to it.

    The top ``share`` of scored tokens by :func:`waad` are preplan tokens, by :func:`fai` anchors; each scores 1. An
    anchor that is no preplan token hands the part ``back`` of its 1 to the nearest preplan token at most ``window``
    tokens before it, if there is one; that is also the window of :func:`waad`.

    arXiv 2510.13554 credits preplan tokens, anchors and their coupling in time, on advantages that are not negative
    (``sign="non_negative"``). The two sets are the paper's; who shares, with whom and how much is our reading of the
    coupling.

    Options: ``share`` (0.4), ``back`` (0.5), ``window`` (10), ``near`` (10), ``far`` (50).

    Raises:
        CreditError: an option outside its range.

    Cost: :func:`fai` and :func:`waad`.
    """
    options = options_of(batch, share=0.4, back=0.5, window=10, near=10, far=50)
    preplan = _top(_reach_change(batch, options["window"]), batch.scored, options["share"])
    anchor = _top(_future_influence(batch, options["near"], options["far"]), batch.scored, options["share"])
    column = torch.arange(batch.scored.shape[1], device=batch.scored.device).expand(batch.scored.shape)
    leader = torch.where(preplan, column, -1).cummax(1).values
    gives = anchor & ~preplan & (leader >= 0) & (column - leader <= options["window"])
    handed = gives.float() * options["back"]
    return ((preplan | anchor).float() - handed).scatter_add(1, leader.clamp_min(0), handed)


@credit_rule("atpo", needs={"layers": AttentionNeed(layers="all", heads="mean")})
def atpo(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""How much the answer reads the token in the last layer, on a scale from 0.5 to 1.

    .. math:: \max(floor, \sigma(z_s)), \quad z = \text{z-score of} \log \operatorname{mean}_{u \in answer} A_L[u, s]

    The mean runs over heads too; the z-score over the reasoning tokens of the response, those before its last answer
    token. The steps (logarithm, z-score, sigmoid, floor) are those reported for ATPO; which tokens the z-score is taken
    over, and that the floor cuts and does not compress, are our reading. 0 on the answer, after it, and without one.

    Options: ``floor`` (0.5).

    Raises:
        CreditError: an option outside its range.

    Cost: the answer's rows of one layer, sequence by sequence. The queries and keys of all layers are held during the
    pass, because a recorder knows the last layer only by its number.
    """
    floor = options_of(batch, floor=0.5)["floor"]
    reasoning = before_answer(batch.responses).to(batch.scored.device)
    rows = recorded(batch, "layers")
    scores = torch.zeros(batch.scored.shape, device=batch.scored.device)
    for item in reasoning.any(1).nonzero().flatten().tolist():
        mine = reasoning[item]
        weights = _answer_reading(rows, item, batch.responses.answer[item]).to(scores.device)
        log = weights[batch.responses.prompt_length :][mine].clamp_min(_LEAST_WEIGHT).log()
        z = (log - log.mean()) / log.std(correction=0).clamp_min(_LEAST_SPREAD)
        scores[item, mine] = z.sigmoid().clamp_min(floor).float()
    return scores


def _response_blocks(batch: CreditInput, name: str) -> Iterator[tuple[int, Float[Tensor, "batch block read"]]]:
    """Rows of response tokens in order, as (first row, its block), over the response columns up to the block's end."""
    rows, origin = recorded(batch, name), batch.responses.prompt_length
    for start in range(origin, rows.num_tokens, BLOCK):
        yield start, rows.block(start, min(start + BLOCK, rows.num_tokens))[:, :, origin:]


def _pearson(sums: Float[Tensor, "6 batch response"]) -> Float[Tensor, "batch response"]:
    """Non-negative part of the correlation, from the sums of 1, y, y², x, xy, x²."""
    count, y, yy, x, xy, xx = sums
    spread_x, spread_y = count * xx - x.square(), count * yy - y.square()
    varies = (spread_x > _CONSTANT * count * xx) & (spread_y > _CONSTANT * count * yy) & (count > 2)
    scale = torch.where(varies, (spread_x * spread_y).clamp_min(torch.finfo(xx.dtype).tiny).sqrt(), 1.0)
    return torch.where(varies, (count * xy - x * y) / scale, 0.0).clamp(0, 1)


def _future_influence(batch: CreditInput, near: int, far: int) -> Float[Tensor, "batch response"]:
    """FAI; see :func:`fai`."""
    if far < near:
        raise CreditError(f"options: far must be at least near ({near}), got {far}; 10 and 50 are the defaults")
    device, origin = recorded(batch, "global").device, batch.responses.prompt_length
    readers = batch.responses.response_mask.to(device).float()
    received, count = torch.zeros(2, *readers.shape, device=device)
    for start, rows in _response_blocks(batch, "global"):
        width, shift = rows.shape[2], start - origin
        gap = torch.arange(shift, width, device=device)[:, None] - torch.arange(width, device=device)
        inside = ((gap >= near) & (gap <= far)).float()
        received[:, :width] += (rows * inside).sum(1)
        count[:, :width] += readers[:, shift:width] @ inside
    return (received / count.clamp_min(1)).to(batch.scored.device)


def _reach_change(batch: CreditInput, window: int) -> Float[Tensor, "batch response"]:
    """Absolute difference of WAAD between a token and the next; see :func:`waad`."""
    rows, origin = recorded(batch, "local"), batch.responses.prompt_length
    distance = torch.zeros(batch.scored.shape, device=rows.device)
    for start in range(origin, rows.num_tokens, BLOCK):  # all columns: the prompt is read too
        stop = min(start + BLOCK, rows.num_tokens)
        gap = torch.arange(start, stop, device=rows.device)[:, None] - torch.arange(stop, device=rows.device)
        spans = gap.clamp(0, window).float()
        distance[:, start - origin : stop - origin] = (rows.block(start, stop) * spans).sum(-1)
    change = torch.zeros_like(distance)
    change[:, :-1] = (distance[:, 1:] - distance[:, :-1]).abs()
    mask = batch.responses.response_mask
    followed = torch.zeros_like(mask)
    followed[:, :-1] = mask[:, :-1] & mask[:, 1:]
    return change.to(batch.scored.device) * followed.to(batch.scored.device)


def _top(
    scores: Float[Tensor, "batch response"], among: Bool[Tensor, "batch response"], share: float
) -> Bool[Tensor, "batch response"]:
    """The top share of each response's tokens, rounded up, that score at all; ties go to the earlier token."""
    order = torch.argsort(torch.where(among, scores, -1.0), dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    places = torch.empty_like(order).scatter_(1, order, place)
    count = (share * among.sum(1, keepdim=True).double() - 1e-9).ceil()  # 0.1 of 30 tokens are 3
    return (places < count) & among & (scores > 0)


def _answer_reading(rows: AttentionRows, item: int, answer: Bool[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Mean of the answer's rows in the last recorded layer of one sequence, over all columns; 0 on padding."""
    whole = rows.sequence(item)
    last = replace(whole, layers=whole.layers[-1:])
    reads = answer.to(rows.device)[whole.positions].double()
    places = reads.nonzero().flatten().tolist()
    received = torch.zeros(last.num_tokens, dtype=torch.float64, device=rows.device)
    for start in range(places[0], places[-1] + 1, BLOCK):
        stop = min(start + BLOCK, places[-1] + 1)
        received[:stop] += reads[start:stop] @ last.block(start, stop)[0].double()
    columns = torch.zeros(rows.num_tokens, dtype=torch.float64, device=rows.device)
    columns[whole.positions] = received / len(places)
    return columns
