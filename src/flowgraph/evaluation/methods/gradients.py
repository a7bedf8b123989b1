"""Gradient x input and the gradient's norm, at the input of the first block.

The target L is the sum of the log-probabilities of the answer's tokens, as measured by interventions; with
``:margin`` after the name, the sum of their margins over the best other token. ``x_0[s]`` is the input of the first
block at token s: its embedding, scaled and with a learned position where the model has them.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from flowgraph.capacities.gradient import InputGradient, capture_input_gradient
from flowgraph.capacities.predictions import Target
from flowgraph.evaluation.registry import evaluation_method
from flowgraph.evaluation.subject import Subject

TokenScores = Float64[Tensor, " tokens"]


@evaluation_method("gradient_x_input", gradient=True)
def gradient_x_input(subject: Subject) -> TokenScores:
    r"""Gradient times input at the first block, signed: :math:`\langle x_0[s], dL/dx_0[s] \rangle`."""
    return input_gradient(subject, "logprob").product


@evaluation_method("gradient_norm", gradient=True)
def gradient_norm(subject: Subject) -> TokenScores:
    r"""Euclidean norm of the gradient at the first block's input: :math:`\lVert dL/dx_0[s] \rVert`."""
    return input_gradient(subject, "logprob").norm


@evaluation_method("gradient_x_input:margin", gradient=True)
def gradient_x_input_margin(subject: Subject) -> TokenScores:
    """Gradient times input at the first block, signed; the target is the margin over the best other token."""
    return input_gradient(subject, "margin").product


@evaluation_method("gradient_norm:margin", gradient=True)
def gradient_norm_margin(subject: Subject) -> TokenScores:
    """Norm of the gradient at the first block's input; the target is the margin over the best other token."""
    return input_gradient(subject, "margin").norm


def input_gradient(subject: Subject, target: Target) -> InputGradient:
    """Compute the gradient at the input of the first block, once for each target.

    Raises:
        CaptureError: a module without a gradient, by its name.
    """
    return subject.once(
        f"gradient at the input {target}",
        lambda: capture_input_gradient(subject.model, subject.token_ids, subject.answer, target),
    )
