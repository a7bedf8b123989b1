"""The rows that predict chosen tokens, their logits, and the number that a backward pass starts from.

Row t of a causal LM predicts token t + 1, so what belongs to token k is computed at row k - 1.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["margin", "logprob"]


def predicting_rows(tokens: Bool[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Int64[Tensor, " kept"]:
    """Return the positions whose logits predict one of the tokens, in any sequence of the batch."""
    if bool((tokens & ~mask).any()):
        raise InvalidInputError(
            "answer, generated: must mark tokens of the text, got a token of padding; leave padding out"
        )
    # A token is predicted by the row before it, which must be a token of the text.
    previous_is_text = torch.zeros_like(mask)
    previous_is_text[:, 1:] = mask[:, :-1]
    if bool((tokens & ~previous_is_text).any()):
        raise InvalidInputError(
            "answer, generated: must be predicted by an earlier token, got the first token of the text; leave it out"
        )
    # One pass computes the same rows for all sequences: those that any of them needs.
    return shift_left(tokens.float()).any(0).nonzero().flatten()


def shift_left(values: Tensor) -> Tensor:
    """Move what belongs to token k to the row k - 1 that predicts it."""
    shifted = torch.zeros_like(values)
    shifted[:, :-1] = values[:, 1:]
    return shifted


def forward_logits(
    model: PreTrainedModel, inputs: dict[str, Any], rows: Int64[Tensor, " kept"]
) -> tuple[Tensor, Tensor]:
    """Run the pass; return the logits in float32 and the rows they belong to."""
    arguments = dict(inputs)
    # Logits of other rows would cost a product with the whole vocabulary each.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = rows
    logits = model(**arguments, use_cache=False).logits.float()
    # A model that ignores logits_to_keep returns every row.
    if logits.shape[1] != rows.numel():
        rows = torch.arange(logits.shape[1], device=rows.device)
    return logits, rows


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Pick, for each kept row, what belongs to the token it predicts."""
    return shift_left(values)[:, rows]


def objective_of(
    logits: Float[Tensor, "batch kept vocabulary"],
    rows: Int64[Tensor, " kept"],
    ids: Int64[Tensor, "batch tokens"],
    answer: Bool[Tensor, "batch tokens"],
    target: Target | Int64[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Sum the target over the answer tokens of all sequences."""
    predicted = at_rows(ids, rows)[..., None]
    chosen = logits.gather(-1, predicted)
    if isinstance(target, Tensor):
        contrast = logits.gather(-1, at_rows(target, rows)[..., None])
        value = chosen - contrast
    elif target == "margin":
        runner_up = logits.scatter(-1, predicted, -torch.inf).amax(-1, keepdim=True)
        value = chosen - runner_up
    else:
        value = chosen - logits.logsumexp(-1, keepdim=True)
    # Excluded rows may hold infinities of padding: select, do not multiply.
    return torch.where(at_rows(answer, rows), value.squeeze(-1), 0.0).sum()
