"""Gradient x input and the gradient's norm, at the input of the first block.

The target L is the sum of the log-probabilities of the answer's tokens, as measured by interventions; with
``:margin`` after the name, the sum of their margins over the best other token. ``x_0[s]`` is the input of the first
block at token s: its embedding, scaled and with a learned position where the model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.attention.capture import evaluating, forward_arguments, input_device
from flowgraph.attention.modules import base_model
from flowgraph.capacities.gradient import InputGradient, capture_input_gradient
from flowgraph.capacities.predictions import Target
from flowgraph.evaluation.registry import evaluation_method
from flowgraph.evaluation.subject import Subject

TokenScores = Float64[Tensor, " tokens"]
TargetedFunction = Callable[[Subject, Target], TokenScores]


@evaluation_method("gradient_x_input", gradient=True)
def gradient_x_input(subject: Subject) -> TokenScores:
    r"""Gradient times input at the first block, signed: :math:`\langle x_0[s], dL/dx_0[s] \rangle`."""
    return input_product(subject, "logprob")


@evaluation_method("gradient_norm", gradient=True)
def gradient_norm(subject: Subject) -> TokenScores:
    r"""Euclidean norm of the gradient at the first block's input: :math:`\lVert dL/dx_0[s] \rVert`."""
    return input_norm(subject, "logprob")


@evaluation_method("gradient_x_input:margin", gradient=True)
def gradient_x_input_margin(subject: Subject) -> TokenScores:
    """Gradient times input at the first block, signed; the target is the margin over the best other token."""
    return input_product(subject, "margin")


@evaluation_method("gradient_norm:margin", gradient=True)
def gradient_norm_margin(subject: Subject) -> TokenScores:
    """Norm of the gradient at the first block's input; the target is the margin over the best other token."""
    return input_norm(subject, "margin")


def input_product(subject: Subject, target: Target) -> TokenScores:
    """Return gradient x input of each token; see :func:`gradient_x_input`."""
    found = input_gradient(subject, target)
    return (found.x0[0].double() * found.gradient[0].double()).sum(-1).cpu()


def input_norm(subject: Subject, target: Target) -> TokenScores:
    """Return the norm of each token's gradient; see :func:`gradient_norm`."""
    return input_gradient(subject, target).gradient[0].double().norm(dim=-1).cpu()


def input_gradient(subject: Subject, target: Target) -> InputGradient:
    """Compute the gradient at the input of the first block, once for each target.

    Raises:
        CaptureError: a module without a gradient, by its name.
    """
    return subject.once(f"gradient at the input {target}", lambda: _captured(subject, target))


def _captured(subject: Subject, target: Target) -> InputGradient:
    model = base_model(subject.model)
    ids = subject.token_ids[None]
    ids = ids.to(input_device(model, ids.device))
    mask = torch.ones_like(ids)
    # The logits of the answer's rows are read, so their number is chosen by the pass itself.
    arguments = forward_arguments(model, mask)
    arguments.pop("logits_to_keep", None)
    inputs = {"input_ids": ids, "attention_mask": mask, **arguments}
    with evaluating(model):
        return capture_input_gradient(
            model, inputs, answer=subject.answer[None].to(ids.device), target=cast(Target, target)
        )
