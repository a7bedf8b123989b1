"""Credit rules that read attention directly: the baselines for the flow rules.

Every rule here is *literal*: row t holds what token t reads, and column s is the token that is read. The papers that
the rules come from use the same convention. The emission convention, which gives token t the row of position t - 1,
belongs to the flow rules; the option ``rows`` is accepted here and changes nothing.

Only the rows of response tokens are computed. They are read in blocks of ``BLOCK`` rows, so no rule holds a matrix of
tokens x tokens.
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
from rl.credit.weights import top_share
from rl.errors import CreditError

BLOCK = 128
"""Number of attention rows that are read at once."""
_LOCAL = AttentionNeed(layers="middle", heads=HeadSelector("distance", "lowest", 0.3))
_GLOBAL = AttentionNeed(layers="middle", heads=HeadSelector("distance", "highest", 0.3))
_LEAST_WEIGHT = 1e-8
"""Replaces an attention of 0 before its logarithm is taken."""
_LEAST_SPREAD = 1e-4
"""Least standard deviation in a z-score: logarithms that differ less differ by rounding only."""
_CONSTANT = 1e-10
"""A variance below this share of the mean square is rounding, and the correlation is set to 0."""


@credit_rule("max_attention", needs={"attention": AttentionNeed()})
def max_attention(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by the most attention that any later token of the response pays to it.

    .. math:: \max_{t > s} A[t, s]

    arXiv 2606.10646 names this baseline. Our reading: the maximum runs over all later response tokens, not only over
    the answer, and over the mean of heads. Self-attention is left out.

    Cost: one read of the response rows.
    """
    options_of(batch)
    device = recorded(batch, "attention").device
    most_read = torch.zeros(batch.scored.shape, device=device, dtype=torch.float32)
    # The running maximum over the blocks of readers t; the triangle below the diagonal holds the pairs with t > s.
    for first, rows in _response_blocks(batch, "attention"):
        width = rows.shape[2]
        earlier = rows.tril(first - 1)
        largest_in_block = earlier.amax(1)
        most_read[:, :width] = torch.maximum(most_read[:, :width], largest_in_block)
    return most_read.to(batch.scored.device)


@credit_rule("correlation", needs={"attention": AttentionNeed()})
def correlation(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by how well attention to it correlates with the answer's attention to the readers.

    .. math:: \max(0, \operatorname{corr}_{t > s}(A[t, s], a_t)), \quad a_t = \operatorname{mean}_{u \in answer} A[u, t]

    Pearson's correlation over the reasoning tokens t after s. arXiv 2606.10646 lists a correlation baseline without the
    two quantities, so this definition is ours: the centred and normalised form of the flow over exactly two hops.
    The score is 0 where fewer than three tokens follow, where a quantity does not vary, on the answer and after it, and
    without an answer.

    Cost: two reads of the response rows.
    """
    options_of(batch)
    device = recorded(batch, "attention").device
    reasoning = before_answer(batch.responses).to(device)
    answer = batch.responses.answer_in_response.to(device).double()

    # y: the answer's attention a_t to each response token, as a mean over the answer's tokens.
    read_by_answer = torch.zeros(batch.scored.shape, dtype=torch.float64, device=device)
    for first, rows in _response_blocks(batch, "attention"):
        width = rows.shape[2]
        answer_tokens = answer[:, None, first:width]
        read_by_answer[:, :width] += (answer_tokens @ rows.double()).squeeze(1)
    read_by_answer /= answer.sum(1, keepdim=True).clamp_min(1)

    # Sums over the reasoning tokens t after s of 1, y, y², x, xy and x², with x = A[t, s].
    # The triangle below diagonal ``first - 1`` of a block holds the pairs with t > s.
    sums = torch.zeros(6, *read_by_answer.shape, dtype=torch.float64, device=device)
    for first, rows in _response_blocks(batch, "attention"):
        width = rows.shape[2]
        num_rows = width - first
        x = rows.double().tril(first - 1)
        is_earlier = torch.ones(num_rows, width, dtype=torch.float64, device=device).tril(first - 1)
        reader = reasoning[:, first:width].double()
        y = read_by_answer[:, first:width]
        reader_y = reader * y
        reader_yy = reader * y.square()

        # Each product sums over the readers t of the block; a reader outside the reasoning has factor 0.
        sums_without_x = torch.stack([reader, reader_y, reader_yy], 1) @ is_earlier
        sums_with_x = torch.stack([reader, reader_y], 1) @ x
        sums_with_x_squared = reader[:, None] @ x.square()
        block_sums = torch.cat([sums_without_x, sums_with_x, sums_with_x_squared], 1)
        sums[:, :, :width] += block_sums.transpose(0, 1)

    return (_pearson(sums) * reasoning).to(batch.scored.device)


@credit_rule("fai", needs={"global": _GLOBAL})
def fai(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by its future attention influence: attention from 10 to 50 tokens later, in far-reaching heads.

    .. math:: FAI_s = \operatorname{mean}_{t \in [s + near,\, s + far]} A_{glob}[t, s]

    arXiv 2510.13554: the 30 % of heads with the longest mean span; its anchors are the top 40 % (``share=0.4``).
    Readers end with the response; the score is 0 where no reader is left. Our reading: heads are chosen in every layer
    of the middle third, for each sequence, where the paper takes five layers there.

    Options: ``near`` (10), ``far`` (50).

    Raises:
        CreditError: an option outside its range.

    Cost: one read of the response rows, and one of all rows to choose heads.
    """
    options = options_of(batch, near=10, far=50)
    return _future_influence(batch, options["near"], options["far"])


@credit_rule("waad", needs={"local": _LOCAL})
def waad(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by how much the reach of local attention changes after it, which marks the start of a chunk.

    .. math:: |W_t - W_{t+1}|, \quad W_t = \sum_s A_{loc}[t, s] \min(t - s, window)

    Windowed average attention distance, arXiv 2510.13554: the 30 % of heads with the shortest mean span; its preplan
    tokens are the top 40 % (``share=0.4``). The last token of a response has no successor and scores 0. Layers as in
    :func:`fai`.

    Options: ``window`` (10).

    Raises:
        CreditError: an option outside its range.

    Cost: as :func:`fai`.
    """
    options = options_of(batch, window=10)
    return _reach_change(batch, options["window"])


@credit_rule("coupled", needs={"local": _LOCAL, "global": _GLOBAL})
def coupled(batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Score preplan and anchor tokens 1, and move a part of an anchor's score to the preplan token before it.

    The top ``share`` of scored tokens by :func:`waad` are preplan tokens, by :func:`fai` anchors; each scores 1. An
    anchor that is not also a preplan token gives the part ``back`` of its score to the nearest preplan token at most
    ``window`` tokens before it, if there is one. ``window`` is also the window of :func:`waad`.

    arXiv 2510.13554 credits preplan tokens, anchors and their coupling in time, on advantages that are not negative
    (``sign="non_negative"``). The two sets are the paper's. Which tokens share a score, and how much, is our reading of
    the coupling.

    Options: ``share`` (0.4), ``back`` (0.5), ``window`` (10), ``near`` (10), ``far`` (50).

    Raises:
        CreditError: an option outside its range.
        ConfigError: a share of 0.

    Cost: :func:`fai` and :func:`waad`.
    """
    options = options_of(batch, share=0.4, back=0.5, window=10, near=10, far=50)
    preplan_scores = _reach_change(batch, options["window"])
    anchor_scores = _future_influence(batch, options["near"], options["far"])
    # A token with score 0 is in neither set, even if fewer tokens than the share have a positive score.
    top_preplan = top_share(preplan_scores, batch.scored, options["share"])
    preplan = top_preplan & (preplan_scores > 0)
    top_anchor = top_share(anchor_scores, batch.scored, options["share"])
    anchor = top_anchor & (anchor_scores > 0)

    # For each column, the column of the last preplan token up to it; -1 without one.
    num_columns = batch.scored.shape[1]
    column = torch.arange(num_columns, device=batch.scored.device).expand(batch.scored.shape)
    nearest_preplan = torch.where(preplan, column, -1).cummax(1).values
    has_preplan = nearest_preplan >= 0
    in_window = column - nearest_preplan <= options["window"]
    shares_score = anchor & ~preplan & has_preplan & in_window

    # Every sharing anchor loses the part ``back``, and its preplan token gains it: the sum of scores is kept.
    moved = shares_score.float() * options["back"]
    kept = (preplan | anchor).float() - moved
    return kept.scatter_add(1, nearest_preplan.clamp_min(0), moved)


@credit_rule("atpo", needs={"layers": AttentionNeed(layers="all", heads="mean")})
def atpo(batch: CreditInput) -> Float[Tensor, "batch response"]:
    r"""Score a token by how much the answer reads it in the last layer, on a scale from 0.5 to 1.

    .. math:: \max(floor, \sigma(z_s)), \quad z = \text{z-score of} \log \operatorname{mean}_{u \in answer} A_L[u, s]

    The mean runs over heads too; the z-score over the reasoning tokens of the response, those before its last answer
    token. The steps (logarithm, z-score, sigmoid, floor) are those reported for ATPO. Our reading: the tokens of the
    z-score, and a floor that clips instead of compressing. The score is 0 on the answer, after it, and without one.

    Options: ``floor`` (0.5).

    Raises:
        CreditError: an option outside its range.

    Cost: the answer's rows of one layer, sequence by sequence. The queries and keys of all layers are held during the
    pass, because the number of layers is not known when the need is registered.
    """
    options = options_of(batch, floor=0.5)
    rows = recorded(batch, "layers")
    reasoning = before_answer(batch.responses).to(batch.scored.device)
    has_reasoning = reasoning.any(1)

    scores = torch.zeros(batch.scored.shape, device=batch.scored.device, dtype=torch.float32)
    for item in has_reasoning.nonzero().flatten().tolist():
        # The answer's mean attention to each reasoning token.
        in_reasoning = reasoning[item]
        read_by_answer = _answer_reading(rows, item, batch.responses.answer[item]).to(scores.device)
        in_response = read_by_answer[batch.responses.prompt_length :]
        weights = in_response[in_reasoning]

        # Logarithm, z-score, sigmoid, floor.
        log_weights = weights.clamp_min(_LEAST_WEIGHT).log()
        mean = log_weights.mean()
        spread = log_weights.std(correction=0).clamp_min(_LEAST_SPREAD)
        z = (log_weights - mean) / spread
        scores[item, in_reasoning] = z.sigmoid().clamp_min(options["floor"]).float()
    return scores


def _response_blocks(batch: CreditInput, name: str) -> Iterator[tuple[int, Float[Tensor, "batch block read"]]]:
    """Yield the rows of response tokens in blocks, as (response column of the first row, the block).

    A block holds the response columns up to its last reader, so row i of it has width ``first + i + 1`` at most.
    """
    rows = recorded(batch, name)
    origin = batch.responses.prompt_length
    for start in range(origin, rows.num_tokens, BLOCK):
        stop = min(start + BLOCK, rows.num_tokens)
        yield start - origin, rows.block(start, stop)[:, :, origin:]


def _pearson(sums: Float[Tensor, "6 batch response"]) -> Float[Tensor, "batch response"]:
    """Compute the non-negative part of the correlation from the sums of 1, y, y², x, xy and x²."""
    count, sum_y, sum_yy, sum_x, sum_xy, sum_xx = sums
    # n² times the variances; below the share _CONSTANT of the mean square they are rounding.
    spread_x = count * sum_xx - sum_x.square()
    spread_y = count * sum_yy - sum_y.square()
    x_varies = spread_x > _CONSTANT * count * sum_xx
    y_varies = spread_y > _CONSTANT * count * sum_yy
    is_defined = x_varies & y_varies & (count > 2)

    # The factor n² cancels in covariance / scale. Where the correlation is undefined, the divisor is 1.
    covariance = count * sum_xy - sum_x * sum_y
    least = torch.finfo(sum_xx.dtype).tiny
    product = (spread_x * spread_y).clamp_min(least)
    scale = torch.where(is_defined, product.sqrt(), 1.0)
    return torch.where(is_defined, covariance / scale, 0.0).clamp(0, 1)


def _future_influence(batch: CreditInput, near: int, far: int) -> Float[Tensor, "batch response"]:
    """Compute FAI, the mean attention of the tokens ``near`` to ``far`` places later; see :func:`fai`."""
    if far < near:
        raise CreditError(f"options: far must be at least near ({near}), got {far}; 10 and 50 are the defaults")
    device = recorded(batch, "global").device
    is_reader = batch.responses.response_mask.to(device).float()

    # Sums over the readers t in [s + near, s + far]: of A[t, s], and of the readers themselves.
    received = torch.zeros(is_reader.shape, device=device, dtype=torch.float32)
    num_readers = torch.zeros(is_reader.shape, device=device, dtype=torch.float32)
    for first, rows in _response_blocks(batch, "global"):
        width = rows.shape[2]
        reader = torch.arange(first, width, device=device)
        read = torch.arange(width, device=device)
        distance = reader[:, None] - read
        is_far_enough = distance >= near
        is_near_enough = distance <= far
        in_range = (is_far_enough & is_near_enough).float()
        received[:, :width] += (rows * in_range).sum(1)
        num_readers[:, :width] += is_reader[:, first:width] @ in_range

    # The mean over the readers that exist; a token without one has received 0.
    return (received / num_readers.clamp_min(1)).to(batch.scored.device)


def _reach_change(batch: CreditInput, window: int) -> Float[Tensor, "batch response"]:
    """Compute the absolute difference of WAAD between a token and the next; see :func:`waad`."""
    rows = recorded(batch, "local")
    prompt_length = batch.responses.prompt_length

    # W_t of every response token. All columns count here, because a token's reach includes the prompt.
    reach = torch.zeros(batch.scored.shape, device=rows.device, dtype=torch.float32)
    for start in range(prompt_length, rows.num_tokens, BLOCK):
        stop = min(start + BLOCK, rows.num_tokens)
        reader = torch.arange(start, stop, device=rows.device)
        read = torch.arange(stop, device=rows.device)
        distance = reader[:, None] - read
        windowed_distance = distance.clamp(0, window).float()
        attention = rows.block(start, stop)
        columns = slice(start - prompt_length, stop - prompt_length)
        reach[:, columns] = (attention * windowed_distance).sum(-1)

    # |W_t - W_{t+1}|, defined only where t + 1 is a response token too.
    change = torch.zeros_like(reach)
    change[:, :-1] = (reach[:, 1:] - reach[:, :-1]).abs()
    response_mask = batch.responses.response_mask
    has_successor = torch.zeros_like(response_mask)
    has_successor[:, :-1] = response_mask[:, :-1] & response_mask[:, 1:]

    device = batch.scored.device
    return change.to(device) * has_successor.to(device)


def _answer_reading(rows: AttentionRows, item: int, answer: Bool[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Average the answer's rows of one sequence in the last recorded layer; 0 on padding."""
    sequence = rows.sequence(item)
    last_layer = replace(sequence, layers=sequence.layers[-1:])

    # The single sequence has no padding, so its positions are counted without.
    answer_mask = answer.to(rows.device)[sequence.positions].double()
    answer_places = answer_mask.nonzero().flatten().tolist()
    first = answer_places[0]
    last = answer_places[-1]

    # Sum the answer's rows, block by block: other rows of a block have factor 0.
    received = torch.zeros(last_layer.num_tokens, dtype=torch.float64, device=rows.device)
    for start in range(first, last + 1, BLOCK):
        stop = min(start + BLOCK, last + 1)
        attention = last_layer.block(start, stop)[0].double()
        received[:stop] += answer_mask[start:stop] @ attention

    # Write the mean back to the positions of the batch, where padding has 0.
    mean = torch.zeros(rows.num_tokens, dtype=torch.float64, device=rows.device)
    mean[sequence.positions] = received / len(answer_places)
    return mean
