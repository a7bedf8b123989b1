"""Methods that read attention alone: the answer's rows, rollout, attention flow, and two indices of the RL literature.

``A[l, t, s]`` is the attention of position t to token s in layer l, mean over heads. The answer's rows are those of the
positions that produce its tokens, one before each.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.analysis.layered import attention_flow
from flowgraph.attention.attention_rows import AttentionRows
from flowgraph.attention.layers_and_heads import HeadSelector, resolve_layers
from flowgraph.attention.modules import attention_modules, base_model, num_layers
from flowgraph.capacities.capture import capture
from flowgraph.errors import CaptureError, InvalidInputError, TooLargeError
from flowgraph.evaluation.methods.edge_frame import edges_of_positions
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import evaluation_method
from flowgraph.evaluation.subject import Subject

MAX_FLOW_EDGES = 100_000_000
"""Edges of all max flows of ``attention_flow`` on one text: a minute or two on one core."""

FAI_NEAR = 10
FAI_FAR = 50
WAAD_WINDOW = 10

_GLOBAL_HEADS = HeadSelector("distance", "highest", 0.3)
_LOCAL_HEADS = HeadSelector("distance", "lowest", 0.3)


@evaluation_method("attention_late", gives=("tokens", "edges"))
def attention_late(subject: Subject) -> Explanation:
    """Attention of the answer's rows, mean over heads and the last third of the layers."""
    return _answer_attention(subject, "late")


@evaluation_method("attention_middle", gives=("tokens", "edges"))
def attention_middle(subject: Subject) -> Explanation:
    """Attention of the answer's rows, mean over heads and the middle third of the layers."""
    return _answer_attention(subject, "middle")


@evaluation_method("attention_all", gives=("tokens", "edges"))
def attention_all(subject: Subject) -> Explanation:
    """Attention of the answer's rows, mean over heads and all layers."""
    return _answer_attention(subject, "all")


@evaluation_method("rollout")
def rollout(subject: Subject) -> Float64[Tensor, " tokens"]:
    r"""Attention rollout over all layers, mean over the answer's rows (arXiv 2005.00928).

    .. math:: \operatorname{mean}_{u} (A_L \cdots A_1)[u, s], \quad A_l = (A[l] + I) / 2

    Equal to :func:`flowgraph.attention_rollout` at the answer's rows; computed row by row, without a matrix per layer.
    """
    traced = subject.trace("attention", layers="all", composition="rollout")
    return traced.scores / int(subject.answer.sum())


@evaluation_method("attention_flow")
def attention_flow_method(subject: Subject) -> Float64[Tensor, " tokens"]:
    """Max flow from each input to the answer's rows through all layers, mean over the rows (arXiv 2005.00928).

    One max flow for each token and answer row over layers * tokens ** 2 / 2 edges, so texts are limited to
    ``MAX_FLOW_EDGES`` edges in all: about 185 tokens for 30 layers and an answer of one token.

    Raises:
        TooLargeError: a longer text.
    """
    layers = _layer_rows(subject)
    rows = answer_rows(subject)
    # No token after the last of these rows can reach it.
    last_row = int(rows.nonzero().max())
    sources = torch.zeros_like(subject.answer)
    sources[: last_row + 1] = True

    # The residual connection adds an edge for each token and layer.
    num_residual_edges = layers.shape[0] * layers.shape[1]
    num_edges = int(layers.count_nonzero()) + num_residual_edges
    num_flows = int(rows.sum()) * int(sources.sum())
    work = num_flows * num_edges
    if work > MAX_FLOW_EDGES:
        raise TooLargeError(
            f"methods: 'attention_flow' must read at most {MAX_FLOW_EDGES:,} edges in all its max flows, got {work:,} "
            f"for {subject.num_tokens} tokens; use a shorter text, or 'rollout'"
        )

    # The mean over the answer's rows; later tokens score 0.
    found = attention_flow(layers, targets=rows, sources=sources, max_edges=MAX_FLOW_EDGES)
    scores = torch.zeros(subject.num_tokens, dtype=torch.float64)
    scores[sources] = found.mean(0)
    return scores


@evaluation_method("fai")
def fai(subject: Subject) -> Float64[Tensor, " tokens"]:
    r"""Future attention influence: mean attention from 10 to 50 tokens later, in far-reaching heads (2510.13554).

    .. math:: FAI_s = \operatorname{mean}_{t \in [s + 10,\, s + 50]} A_{glob}[t, s]

    with the 30 % of heads of the longest mean span, middle third of the layers; 0 without a reader. The answer has no
    part in it. The credit rule ``fai`` of the package ``rl`` computes the same quantity for the tokens of a response.
    """
    attention = _rows_of_heads(subject, "fai", _GLOBAL_HEADS)
    distance = _distances(subject.num_tokens)
    in_range = (distance >= FAI_NEAR) & (distance <= FAI_FAR)
    received = (attention * in_range).sum(0)
    num_readers = in_range.sum(0).clamp_min(1)
    return received / num_readers


@evaluation_method("waad")
def waad(subject: Subject) -> Float64[Tensor, " tokens"]:
    r"""Change of the windowed attention distance after a token, in local heads: starts of chunks (arXiv 2510.13554).

    .. math:: |W_t - W_{t+1}|, \quad W_t = \sum_s A_{loc}[t, s] \min(t - s, 10)

    with the 30 % of heads of the shortest mean span, middle third of the layers; 0 at the last token. The answer has
    no part in it. The credit rule ``waad`` of the package ``rl`` computes the same for the tokens of a response.
    """
    attention = _rows_of_heads(subject, "waad", _LOCAL_HEADS)
    windowed = _distances(subject.num_tokens).clamp(0, WAAD_WINDOW)
    reach = (attention * windowed).sum(1)
    scores = torch.zeros_like(reach)
    scores[:-1] = (reach[1:] - reach[:-1]).abs()
    return scores


def answer_rows(subject: Subject) -> Bool[Tensor, " tokens"]:
    """Mark the positions that produce the answer's tokens, one before each.

    Raises:
        InvalidInputError: an answer at the first token, which no position produces.
    """
    if bool(subject.answer[0]):
        raise InvalidInputError(
            "answer: must have something before it, got an answer at token 0; no position generates the first token"
        )
    rows = torch.zeros_like(subject.answer)
    rows[:-1] = subject.answer[1:]
    return rows


def _answer_attention(subject: Subject, part: str) -> Explanation:
    """Average the chosen layers; tokens: mean of the answer's rows; edges: the row that produces each token."""
    chosen_layers = _layer_rows(subject)[_chosen(subject, part)]
    matrix = chosen_layers.double().mean(0)
    of_answer = matrix[answer_rows(subject)]
    edges = edges_of_positions(matrix, subject.base.generated)
    return Explanation(of_answer.mean(0), edges)


def _chosen(subject: Subject, part: str) -> list[int]:
    """Return the places of the layers of a part of the model among those with softmax attention.

    Raises:
        CaptureError: no layer of the part has softmax attention.
    """
    model = base_model(subject.model)
    modules = attention_modules(model)
    total = num_layers(model, modules)
    if part == "late":
        num_late = max(1, total // 3)
        wanted = list(range(total - num_late, total))
    else:
        wanted = resolve_layers(part, total)

    # Layers without softmax attention, such as recurrent ones, are not among the captured ones.
    captured = _all_layers(subject).layers
    places = [place for place, index in enumerate(captured) if index in wanted]
    if not places:
        raise CaptureError(
            f"layers: must have softmax attention, got layers {wanted} without any; {type(model).__name__} has it in "
            f"{sorted(modules)}, so use 'attention_all'"
        )
    return places


def _all_layers(subject: Subject) -> AttentionRows:
    return subject.once(
        "attention of all layers",
        lambda: capture(subject.model, subject.token_ids, capacity="attention", layers="all"),
    )


def _layer_rows(subject: Subject) -> Float[Tensor, "layers tokens tokens"]:
    """Compute the attention of every layer, which several methods read."""
    return subject.once("attention rows of all layers", lambda: _all_layers(subject).layer_rows().cpu())


def _rows_of_heads(subject: Subject, name: str, heads: HeadSelector) -> Float64[Tensor, "tokens tokens"]:
    rows = subject.once(
        f"attention of {name}",
        lambda: capture(subject.model, subject.token_ids, capacity="attention", layers="middle", heads=heads),
    )
    return rows.dense()[0].double().cpu()


def _distances(num_tokens: int) -> Float64[Tensor, "tokens tokens"]:
    """Return t - s, which is negative above the diagonal."""
    position = torch.arange(num_tokens, dtype=torch.float64)
    return position[:, None] - position
