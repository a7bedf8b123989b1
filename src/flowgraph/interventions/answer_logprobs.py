"""Read a trace's answer with a model: whether the two fit, and what the model says at the answer's positions."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.errors import InvalidInputError, NumericalRangeError
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_fits(model: PreTrainedModel, trace: FlowTrace) -> None:
    """The trace's text can be read by this model; a model of another name is allowed, and said.

    Raises:
        InvalidInputError: ids outside the vocabulary, more tokens than the context, other layers, nothing to emit.
    """
    config = model.config.get_text_config(decoder=True)
    low, high = int(trace.token_ids.min()), int(trace.token_ids.max())
    layers = trace.provenance.get("layers")  # anything at all in a file that another tool wrote
    traced = [layer for layer in layers if isinstance(layer, int)] if isinstance(layers, list | tuple) else []
    deepest = max(traced, default=0)
    limit = getattr(config, "max_position_embeddings", None)
    for problem, rule, got in (
        (high >= config.vocab_size, f"have the trace's tokens in its vocabulary of {config.vocab_size}", f"id {high}"),
        (low < 0, f"have the trace's tokens in its vocabulary of {config.vocab_size}", f"id {low}"),
        (limit and limit < trace.num_tokens, f"have room for the trace in its context of {limit}", trace.num_tokens),
        (deepest >= config.num_hidden_layers, f"have the trace's layers ({deepest})", config.num_hidden_layers),
    ):
        if problem:
            raise InvalidInputError(
                f"model: must {rule}, got {got} with {type(model).__name__}; load the model that the trace was made of"
            )
    if bool(trace.answer[0]):
        raise InvalidInputError(
            "trace: its answer must have something before it, got an answer at token 0; nothing emits the first token"
        )
    name, made = str(getattr(model.config, "_name_or_path", "") or type(model).__name__), trace.provenance.get("model")
    if made is not None and made != name:
        warnings.warn(
            f"model: the trace was made of {made!r}, got {name!r}; the figures are of the latter", stacklevel=3
        )


def answer_logprobs(
    model: PreTrainedModel, trace: FlowTrace, answer: Int64[Tensor, " answer"], batch: int
) -> Float64[Tensor, "batch answer vocabulary"]:
    """Log-probabilities at the positions that emit the answer's tokens, for ``batch`` copies of the text."""
    device = next(model.get_input_embeddings().parameters()).device
    ids = trace.token_ids.to("cpu" if device.type == "meta" else device)[None].expand(batch, -1)
    emitting = answer - 1
    tail = trace.num_tokens - int(emitting.min())
    few = {"logits_to_keep": tail} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **few).logits[:, -tail:]
    finally:
        for module in training:
            module.training = True
    logprobs = logits[:, (emitting - emitting.min()).to(logits.device)].double().cpu().log_softmax(-1)
    said = trace.token_ids.cpu()[answer][None, :, None].expand(batch, -1, 1)
    if bool(logprobs.isnan().any()) or not bool(torch.isfinite(logprobs.gather(2, said)).all()):
        raise NumericalRangeError(
            f"model: its logits must give every token of the answer a finite log-probability, got NaN or infinity "
            f"from {type(model).__name__}; load it in float32 or bfloat16"
        )
    return logprobs
