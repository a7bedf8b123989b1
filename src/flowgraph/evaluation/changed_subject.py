"""The same text under a changed condition: another model, another question or another answer."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor, nn

from flowgraph.evaluation.subject import Subject
from flowgraph.tracing.trace import trace


def changed_subject(
    subject: Subject,
    *,
    model: nn.Module | None = None,
    question: Bool[Tensor, " tokens"] | None = None,
    answer: Bool[Tensor, " tokens"] | None = None,
) -> Subject:
    """Return a subject with the same tokens under another model, or with another question or answer.

    Args:
        subject: the subject; it stays as it is.
        model: the other model; None: the same.
        question: mask of the other question; None: the same.
        answer: mask of the other answer, in generated text; None: the same. The reasoning is what lies before it.

    Raises:
        RegionError: regions that overlap or lie outside of where they may be.

    Cost: one forward pass.
    """
    other = copy(subject)
    other.model = subject.model if model is None else model
    other_question = subject.question if question is None else question
    other_answer = subject.answer if answer is None else answer
    # None: the generated tokens before the other answer.
    reasoning = subject.reasoning & ~other_question if answer is None else None
    base = trace(
        other.model,
        subject.tokenizer,
        input_ids=subject.token_ids[None],
        prompt_length=subject.prompt_length,
        question=other_question,
        answer=other_answer,
        reasoning=reasoning,
        max_edges="all",
    )
    # The text is the one that was read, not the decoded tokens.
    other.base = replace(base, tokens=subject.base.tokens, text=subject.base.text, spans=subject.base.spans)
    # Nothing that was computed under the old condition stays.
    other._traces = {}
    other._computed = {}
    return other
