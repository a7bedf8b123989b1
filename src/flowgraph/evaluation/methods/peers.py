"""Methods of other packages, run as they are: FlashTrace and Inseq. Both are optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.attention.capture import evaluating
from flowgraph.attention.modules import base_model, text_config
from flowgraph.errors import CaptureError, InvalidInputError, MissingExtraError, first_line
from flowgraph.evaluation.registry import evaluation_method
from flowgraph.evaluation.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenScores = Float64[Tensor, " tokens"]


@evaluation_method("flashtrace", requires="flashtrace")
def flashtrace(subject: Subject) -> TokenScores:
    """FlashTrace 0.1.1 by its own package and default method, with eager attention (arXiv 2602.01914).

    The answer is its output span, the reasoning its reasoning span. A prompt token has the package's score, the sum
    over hops. The package gives the response no score, because its hops pass through it; a token of the response has
    the importance that the first hop finds in it. Version 0.1.1 computes attention anew from hidden states, without the
    normalisation of queries and keys, windows and soft-caps of some architectures; nothing of that is repaired here.

    Raises:
        MissingExtraError: the package is not installed.
        CaptureError: an architecture that it cannot read.
        InvalidInputError: a text that it tokenizes otherwise.
    """
    if importlib.util.find_spec("flashtrace") is None:
        raise MissingExtraError(
            "methods: 'flashtrace' needs the package of this name, got an environment without it; run pip install "
            "flashtrace==0.1.1, or leave the method out"
        )
    from flashtrace import FlashTrace  # pyright: ignore[reportMissingImports]

    prompt, response = _texts_as_tokenized_apart(subject, "flashtrace")
    model = base_model(subject.model)
    with _eager_attention(model), evaluating(model):
        try:
            result = FlashTrace(model, subject.tokenizer).trace(
                prompt=prompt,
                target=response,
                output_span=_span_in_response(subject, subject.answer),
                reasoning_span=_span_in_response(subject, subject.reasoning),
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise CaptureError(
                f"model: 'flashtrace' must be able to read it, got {type(error).__name__} from the package for "
                f"{type(model).__name__} ({first_line(error)}); leave the "
                "method out for this model"
            ) from error

    # Both vectors cover prompt and response, and the end token that the package adds.
    hops = result.metadata["ifr"]
    of_prompt = torch.as_tensor(hops["observation_projected"]["sum"])
    of_response = torch.as_tensor(hops["per_hop_projected"][0])
    covered = min(subject.num_tokens, of_response.numel())
    boundary = subject.prompt_length
    scores = torch.zeros(subject.num_tokens, dtype=torch.float64)
    scores[:boundary] = of_prompt[:boundary].double().cpu()
    scores[boundary:covered] = of_response[boundary:covered].double().cpu()
    return scores


@evaluation_method("inseq", gradient=True, requires="inseq")
def inseq(subject: Subject) -> TokenScores:
    """Saliency by Inseq: mean over the answer's tokens of the norm of the gradient at the embeddings (2302.13942).

    Tried with version 0.7.1 on a small model on the CPU. Its target is the probability of each answer token.

    Raises:
        MissingExtraError: the package is not installed.
        InvalidInputError: a tokenizer or model without a first token, or a text that it tokenizes otherwise.
    """
    if importlib.util.find_spec("inseq") is None:
        raise MissingExtraError(
            "methods: 'inseq' needs the package of this name, got an environment without it; run pip install inseq in "
            "an environment of its own, since it pins other versions, or leave the method out"
        )
    import inseq as inseq_package  # pyright: ignore[reportMissingImports]

    model = base_model(subject.model)
    named = (subject.tokenizer.bos_token_id, text_config(model).bos_token_id)
    if None in named:
        raise InvalidInputError(
            "tokenizer, model: 'inseq' must be given a first token, got none; set tokenizer.bos_token and "
            "model.config.bos_token_id, or leave the method out"
        )
    prompt, response = _texts_as_tokenized_apart(subject, "inseq")
    positions = subject.positions(subject.answer)
    with evaluating(model):
        wrapped = inseq_package.load_model(model, "saliency", tokenizer=subject.tokenizer)
        result = wrapped.attribute(
            input_texts=prompt,
            generated_texts=prompt + response,
            attr_pos_start=positions[0],
            attr_pos_end=positions[-1] + 1,
            skip_special_tokens=False,
            show_progress=False,
        )
    # [tokens before the answer's end, answer tokens, width]; NaN where a token comes after the position.
    found = result.sequence_attributions[0].target_attributions
    gradients = torch.nan_to_num(found.double().cpu())
    of_answer = gradients.norm(dim=-1).mean(1)
    scores = torch.zeros(subject.num_tokens, dtype=torch.float64)
    scores[: of_answer.numel()] = of_answer
    return scores


def _texts_as_tokenized_apart(subject: Subject, name: str) -> tuple[str, str]:
    """Return the texts of prompt and response, if the tokenizer gives the subject's tokens for them.

    An end token of the response is left out, because these packages add their own.

    Raises:
        InvalidInputError: other tokens.
    """
    base = subject.base
    tokenizer = subject.tokenizer
    ids = subject.token_ids.tolist()
    if ids and ids[-1] == tokenizer.eos_token_id and subject.prompt_length < len(ids):
        ids = ids[:-1]

    # The two texts, and their tokens when each is tokenized by itself.
    boundary = int(base.spans[subject.prompt_length, 0])
    end = int(base.spans[len(ids) - 1, 1])
    prompt = base.text[:boundary]
    response = base.text[boundary:end]
    apart: list[int] = []
    for text in (prompt, response):
        apart += tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    if apart != ids:
        raise InvalidInputError(
            f"methods: {name!r} reads text, so prompt and response must give the same tokens apart, got {len(apart)} "
            f"tokens instead of {len(ids)} or others; leave the method out for this tokenizer"
        )
    return prompt, response


def _span_in_response(subject: Subject, mask: Tensor) -> tuple[int, int] | None:
    """Return the first and last token of a region, counted from the start of the response; None where it is empty."""
    positions = subject.positions(mask)
    if not positions:
        return None
    return positions[0] - subject.prompt_length, positions[-1] - subject.prompt_length


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run with eager attention, and restore what was there.

    Raises:
        CaptureError: a model that cannot be switched.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before == "eager":
        yield
        return
    if not hasattr(model, "set_attn_implementation") or before is None:
        raise CaptureError(
            f"model: must be able to run with eager attention, got {type(model).__name__}; load it with "
            "attn_implementation='eager'"
        )
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
