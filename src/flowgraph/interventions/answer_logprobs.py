"""Log-probabilities of a trace's answer under a model, and a check that the model can read the trace."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.attention.modules import attention_modules, context_length, num_layers, text_config
from flowgraph.errors import InvalidInputError, NumericalRangeError
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_fits(model: PreTrainedModel, trace: FlowTrace) -> None:
    """Check that a model can read a trace's text; warn where it has another name than the traced one.

    Args:
        model: the transformers model, without wrappers.
        trace: the trace.

    Raises:
        InvalidInputError: token ids outside the vocabulary, more tokens than the context, layers that the model has
            not, or an answer that begins at token 0, which no position generates.
        CaptureError: a model without attention modules.
    """
    config = text_config(model)
    vocabulary = f"have the trace's tokens in its vocabulary of {config.vocab_size}"
    lowest = int(trace.token_ids.min())
    highest = int(trace.token_ids.max())
    if highest >= config.vocab_size:
        raise _misfit(model, vocabulary, f"id {highest}")
    if lowest < 0:
        raise _misfit(model, vocabulary, f"id {lowest}")

    # Not every architecture states a context.
    context = context_length(model)
    if context is not None and context < trace.num_tokens:
        raise _misfit(model, f"have room for the trace in its context of {context}", str(trace.num_tokens))

    # The layers matter only to the edges, but other layers mean another model.
    deepest = max(_traced_layers(trace), default=0)
    layers = num_layers(model, attention_modules(model))
    if deepest >= layers:
        raise _misfit(model, f"have the trace's layers ({deepest})", str(layers))

    if bool(trace.answer[0]):
        raise InvalidInputError(
            "trace: its answer must have something before it, got an answer at token 0; no position generates the "
            "first token"
        )

    # Another model of the same vocabulary can read the trace: this is allowed, with a warning.
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    traced_name = trace.provenance.get("model")
    if traced_name is not None and traced_name != name:
        warnings.warn(
            f"model: the trace was made of {traced_name!r}, got {name!r}; the figures are of the latter", stacklevel=3
        )


def _misfit(model: PreTrainedModel, rule: str, got: str) -> InvalidInputError:
    """Return the error for a model that cannot read the trace."""
    return InvalidInputError(
        f"model: must {rule}, got {got} with {type(model).__name__}; load the model that the trace was made of"
    )


def _traced_layers(trace: FlowTrace) -> list[int]:
    """Return the layers that a trace names; none where another tool wrote something else there."""
    layers = trace.provenance.get("layers")
    if not isinstance(layers, list | tuple):
        return []
    return [layer for layer in layers if isinstance(layer, int)]


def answer_logprobs(
    model: PreTrainedModel,
    trace: FlowTrace,
    answer: Int64[Tensor, " answer"],
    batch: int,
) -> Float64[Tensor, "batch answer vocabulary"]:
    """Compute the next-token distributions at the positions that generate the answer, for copies of one text.

    Args:
        model: the transformers model; it is in evaluation mode during the pass.
        trace: its tokens are read under teacher forcing.
        answer: ``[A]``, positions of the answer's tokens, at least 1.
        batch: number of copies B; an intervention may cut each of them differently.

    Returns:
        ``[B, A, V]``, log-probabilities in nats, on the CPU.

    Raises:
        NumericalRangeError: logits with NaN, or a token of the answer with an infinite log-probability.

    Cost: one forward pass; memory of the logits from the first of these positions on.
    """
    device = next(model.get_input_embeddings().parameters()).device
    # Parameters that are offloaded are on no device; inputs then start on the CPU.
    if device.type == "meta":
        device = torch.device("cpu")
    token_ids = trace.token_ids.to(device)[None].expand(batch, -1)

    # The token at position k is generated at k - 1: compute logits only from the first of these on.
    generating = answer - 1
    num_logits = trace.num_tokens - int(generating.min())
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = num_logits

    # Not model.train(): modules may be in different modes, and each gets its own back.
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            output = model(input_ids=token_ids, use_cache=False, **options)
    finally:
        for module in training_modules:
            module.training = True
    logits = output.logits[:, -num_logits:]

    # Row k - 1 of the logits holds the distribution of token k.
    rows = (generating - generating.min()).to(logits.device)
    logprobs = logits[:, rows].double().cpu().log_softmax(-1)
    answer_ids = trace.token_ids.cpu()[answer]
    of_answer = logprobs.gather(2, answer_ids[None, :, None].expand(batch, -1, 1))
    if bool(logprobs.isnan().any()) or not bool(torch.isfinite(of_answer).all()):
        raise NumericalRangeError(
            f"model: its logits must give every token of the answer a finite log-probability, got NaN or infinity "
            f"from {type(model).__name__}; load it in float32 or bfloat16"
        )
    return logprobs
