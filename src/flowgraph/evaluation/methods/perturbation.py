"""Integrated gradients and occlusion, by captum (https://captum.ai, BSD-3).

Both compare the text with one whose tokens are replaced by a reference token: the tokenizer's padding token, else its
unknown, end or first token, else id 0. The target is the sum of the log-probabilities of the answer's own tokens, also
where the texts before them are changed. Tokens from the last answer token on have no part in it and score 0.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from flowgraph.attention.capture import evaluating, input_device
from flowgraph.attention.modules import base_model
from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.evaluation.methods.attention import answer_rows
from flowgraph.evaluation.methods.gradients import input_gradient
from flowgraph.evaluation.registry import EvaluationMethod, evaluation_method
from flowgraph.evaluation.subject import Subject

STEPS = 32
"""Points of the Gauss-Legendre rule between the reference text and the text."""

MAX_STEPS = 4096
"""Most points that can be asked for."""

LARGEST_ERROR = 0.1
"""Largest difference between the sum of the scores and what they explain, relative to it, without a warning."""

_TOKENS_AT_ONCE = 2048
"""Tokens of all copies of the text in one forward pass."""

TokenScores = Float64[Tensor, " tokens"]
AnswerScore = Callable[[Int64[Tensor, "copies tokens"]], Float[Tensor, " copies"]]


@evaluation_method("integrated_gradients", gradient=True, requires="captum")
def integrated_gradients(subject: Subject) -> TokenScores:
    r"""Integrated gradients of the token embeddings, from a text of reference tokens (arXiv 1703.01365).

    .. math:: \langle x_s - x'_s, \int_0^1 \nabla_{x_s} L(x' + a (x - x')) \, da \rangle

    The scores sum to L(text) - L(reference) up to the error of the rule. ``integrated_gradients:STEPS`` takes another
    number of points than 32.

    Raises:
        MissingExtraError: captum is not installed.
        CaptureError: a model without gradients.

    Warns:
        UserWarning: the sum differs from L(text) - L(reference) by more than a tenth.

    Cost: 32 forward and backward passes.
    """
    return integrated_gradients_of(subject, STEPS)


def integrated_gradients_method(name: str) -> EvaluationMethod | None:
    """Make the method of a name ``integrated_gradients:STEPS``; None for other names.

    Raises:
        InvalidInputError: a number of points outside 1..4096.
    """
    head, _, text = name.partition(":")
    if head != "integrated_gradients" or not text:
        return None
    # Long texts are not read as numbers: a name may hold any number of digits.
    steps = 0
    is_number = text.isascii() and text.isdecimal()
    if is_number and len(text) <= len(str(MAX_STEPS)):
        steps = int(text)
    if not 1 <= steps <= MAX_STEPS:
        raise InvalidInputError(
            f"methods: 'integrated_gradients' must be followed by a number of points in 1..{MAX_STEPS}, got "
            f"{text[:40]!r}; {STEPS} is the default"
        )

    def explain(subject: Subject) -> TokenScores:
        return integrated_gradients_of(subject, steps)

    return EvaluationMethod(
        name=name,
        function=explain,
        summary=f"Integrated gradients of the token embeddings with {steps} points.",
        gradient=True,
        requires="captum",
    )


def integrated_gradients_of(subject: Subject, steps: int) -> TokenScores:
    """Integrate with a number of points; see :func:`integrated_gradients`."""
    _require_captum("integrated_gradients")
    from captum.attr import LayerIntegratedGradients

    # One pass of our own names the module that breaks the gradient; captum would fail inside of torch.
    input_gradient(subject, "logprob")
    model = base_model(subject.model)
    # Tensors made under inference_mode take no part in a backward pass, so all of them are made inside.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), _default_float32():
        ids = _ids_before_answer_ends(subject).clone()
        reference = torch.full_like(ids, reference_token(subject))
        score = answer_score(subject)
        integrated = LayerIntegratedGradients(score, model.get_input_embeddings())
        attribution = integrated.attribute(
            ids,
            baselines=reference,
            n_steps=steps,
            method="gausslegendre",
            internal_batch_size=_copies_at_once(ids),
        )
        with torch.no_grad():
            change = float(score(ids)) - float(score(reference))
    assert isinstance(attribution, Tensor)
    scores = attribution[0].detach().double().sum(-1).cpu()

    # The sum shows whether the rule had points enough for the integral.
    found = float(scores.sum())
    if abs(found - change) > LARGEST_ERROR * abs(change):
        warnings.warn(
            f"integrated_gradients: should sum to the change of the answer's log-probability, {change:.3g}, got "
            f"{found:.3g} with {steps} points; take more, as in integrated_gradients:{min(4 * steps, MAX_STEPS)}",
            stacklevel=2,
        )
    return _padded(scores, subject)


@evaluation_method("occlusion", requires="captum")
def occlusion(subject: Subject) -> TokenScores:
    """Fall of the answer's log-probability when one token is replaced by a reference token.

    .. math:: L(x) - L(x with x_s = reference)

    Raises:
        MissingExtraError: captum is not installed.

    Cost: one forward pass for each token, several copies at once.
    """
    _require_captum("occlusion")
    from captum.attr import FeatureAblation

    model = base_model(subject.model)
    ids = _ids_before_answer_ends(subject)
    with torch.no_grad(), evaluating(model), _default_float32():
        ablation = FeatureAblation(answer_score(subject))
        attribution = ablation.attribute(
            ids,
            baselines=reference_token(subject),
            perturbations_per_eval=_copies_at_once(ids),
        )
    assert isinstance(attribution, Tensor)
    scores = attribution[0].detach().double().cpu()
    return _padded(scores, subject)


def answer_score(subject: Subject) -> AnswerScore:
    """Return the function from copies of the text before the answer's end to the log-probability of the answer.

    The answer's tokens are those of the text itself, also where the copies hold other tokens.
    """
    # The rows that predict the answer, one before each of its tokens.
    model = base_model(subject.model)
    positions = answer_rows(subject).nonzero().flatten()
    answer_ids = subject.token_ids[positions + 1]
    first = int(positions[0])

    def score(ids: Int64[Tensor, "copies tokens"]) -> Float[Tensor, " copies"]:
        # Logits before the answer are not used, and with a large vocabulary they take most of the memory.
        num_copies, num_tokens = ids.shape
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = num_tokens - first
        logits = model(input_ids=ids, **options).logits

        # Architectures that ignore the option return all rows.
        kept_from = num_tokens - logits.shape[1]
        rows = (positions - kept_from).to(logits.device)
        logprobs = logits[:, rows].float().log_softmax(-1)
        wanted = answer_ids.to(logits.device)[None, :, None].expand(num_copies, -1, 1)
        of_answer = logprobs.gather(-1, wanted).squeeze(-1)
        return of_answer.sum(-1)

    return score


def reference_token(subject: Subject) -> int:
    """Return the id that takes the place of a token: padding, unknown, end, first, or 0."""
    tokenizer = subject.tokenizer
    for name in ("pad_token_id", "unk_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def _ids_before_answer_ends(subject: Subject) -> Int64[Tensor, "1 tokens"]:
    """Return the tokens before the last answer token: no later one changes the answer's probability."""
    last_row = int(answer_rows(subject).nonzero().max())
    ids = subject.token_ids[None, : last_row + 1]
    return ids.to(input_device(base_model(subject.model), ids.device))


def _copies_at_once(ids: Int64[Tensor, "1 tokens"]) -> int:
    return max(1, _TOKENS_AT_ONCE // ids.shape[1])


def _padded(scores: Float64[Tensor, " scored"], subject: Subject) -> TokenScores:
    """Give all later tokens a score of 0."""
    complete = torch.zeros(subject.num_tokens, dtype=torch.float64)
    complete[: scores.numel()] = scores
    return complete


@contextmanager
def _default_float32() -> Iterator[None]:
    """Make captum's weights in float32; it makes them in the default dtype, which may be a coarser one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _require_captum(name: str) -> None:
    if importlib.util.find_spec("captum") is None:
        raise MissingExtraError(
            f"methods: {name!r} needs captum, got an environment without it; run pip install "
            "'flowgraph-llm[evaluation]', or leave the method out"
        )
