"""Gradients at the embeddings and occlusion, by autograd and loops alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logprob(model: Any, ids: Tensor, answer: list[int], wanted: Tensor) -> float:
    """Sum of the log-probabilities of the tokens ``wanted`` at the places ``answer``, after the tokens ``ids``."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    total = 0.0
    for place in answer:
        total += float(logits[place - 1].log_softmax(-1)[wanted[place]])
    return total


def gradients(model: Any, ids: Tensor, answer: list[int], target: str) -> tuple[Tensor, Tensor]:
    """Return embeddings and the gradient there, ``[T, width]``, of the summed log-probability or margin."""
    embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0]
    total = logits.new_zeros(())
    for place in answer:
        row = logits[place - 1]
        own = row[ids[place]]
        if target == "logprob":
            total = total + row.log_softmax(-1)[ids[place]]
        else:
            others = torch.cat([row[: ids[place]], row[ids[place] + 1 :]])
            total = total + own - others.max()
    (gradient,) = torch.autograd.grad(total, embedded)
    return embedded.detach()[0].double(), gradient[0].double()


def occlusion(model: Any, ids: Tensor, answer: list[int], reference: int) -> list[float]:
    """Fall of the answer's log-probability for each token that is replaced alone."""
    before = logprob(model, ids, answer, ids)
    falls = []
    for place in range(len(ids)):
        changed = ids.clone()
        changed[place] = reference
        falls.append(before - logprob(model, changed, answer, ids))
    return falls
