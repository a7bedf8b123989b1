r"""Gradient times input: the usual attribution of a language model's answer, as a baseline beside a ranking.

.. math::
    s[t] = \langle x_0[t], dL/dx_0[t] \rangle

with :math:`x_0` the input of the first block and L the target of the answer. It is the plain derivative, without the
linear rules of conserved relevance.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from flowgraph.attention.capture import check_fits, checked_ids, evaluating, forward_arguments
from flowgraph.attention.modules import base_model
from flowgraph.capacities.gradient import GradientWatch
from flowgraph.capacities.predictions import Target, forward_logits, objective_of, predicting_rows
from flowgraph.capacities.tape import Tape
from flowgraph.errors import CaptureError


def gradient_times_input(
    model: nn.Module,
    token_ids: Int[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
    target: Target = "logprob",
) -> Float64[Tensor, " tokens"]:
    """Compute gradient times input of every token of one text, signed.

    Args:
        model: a Hugging Face causal LM.
        token_ids: prompt and response.
        answer: mask of the tokens that are explained.
        target: ``"logprob"``, the log-probability of the answer's tokens, or ``"margin"`` over the best other token.

    Returns:
        One number per token, in the units of the target.

    Raises:
        CaptureError: a module that breaks the gradient, by its name.
        InvalidInputError: ids that do not fit the model, or an answer that nothing predicts.

    Cost: one forward and one backward pass, and their activations.
    """
    inner = base_model(model)
    if torch.is_inference_mode_enabled():
        # Tensors made under inference_mode cannot take part in a backward pass; their copies can.
        with torch.inference_mode(False):
            return gradient_times_input(model, token_ids.clone(), answer.clone(), target)
    device = next(inner.get_input_embeddings().parameters()).device
    ids = checked_ids(token_ids)
    # With offloaded weights, the offloading hooks move the inputs themselves.
    if device.type != "meta":
        ids = ids.to(device)
    mask = torch.ones_like(ids)
    check_fits(inner, ids, mask)
    explained = answer[None].to(ids.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **forward_arguments(inner, mask)}
    inputs.pop("logits_to_keep", None)

    # The watch starts the gradient at the first block and names a module that loses it.
    watch = GradientWatch(inner, Tape({}))
    with ExitStack() as stack:
        stack.enter_context(evaluating(inner))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch)
        logits, rows = forward_logits(inner, inputs, predicting_rows(explained, mask.bool()))
        watch.require_unbroken(logits)
        x0 = watch.x0
        assert x0 is not None  # require_unbroken refuses a pass without it
        objective = objective_of(logits, rows, ids, explained, target)
        try:
            (gradient,) = torch.autograd.grad(objective, x0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"model: every kernel must have a backward pass, got an error ({str(error).splitlines()[0]}); load the "
                "model unquantised or with another attn_implementation, or leave gradient x input out"
            ) from error
    return (x0.detach()[0].double() * gradient[0].double()).sum(-1).cpu()
