"""Controls that read nothing of the model: chance, position, length and shared text.

An explanation that does not beat the best of them on a task has shown nothing there. Each also gives edges: those of
tokens take the score of the token they come from, unless the docstring says otherwise.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph.evaluation.methods.edge_frame import edges_to_sources
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import evaluation_method
from flowgraph.evaluation.subject import Subject
from flowgraph.steps.step_flow import Step, split_steps

_BOTH = ("tokens", "edges")


@evaluation_method("random", trivial=True, gives=_BOTH)
def random(subject: Subject) -> Explanation:
    """Uniform random scores, the same for every run: seeded by the item's name."""
    generator = generator_of(subject, "random")
    tokens = torch.rand(subject.num_tokens, generator=generator, dtype=torch.float64)
    edges = torch.rand(subject.num_tokens, subject.num_tokens, generator=generator, dtype=torch.float64)
    return Explanation(tokens, edges.tril(-1))


@evaluation_method("recency", trivial=True, gives=_BOTH)
def recency(subject: Subject) -> Explanation:
    """Later tokens score higher: (s + 1) / N. Edges: 1 / (t - s), the nearer the higher."""
    position = torch.arange(subject.num_tokens, dtype=torch.float64)
    distance = position[:, None] - position
    edges = (1 / distance.clamp_min(1)).tril(-1)
    return Explanation((position + 1) / subject.num_tokens, edges)


@evaluation_method("position", trivial=True, gives=_BOTH)
def position(subject: Subject) -> Explanation:
    """Earlier tokens score higher: (N - s) / N."""
    place = torch.arange(subject.num_tokens, dtype=torch.float64)
    return _of_tokens((subject.num_tokens - place) / subject.num_tokens)


@evaluation_method("length", trivial=True, gives=_BOTH)
def length(subject: Subject) -> Explanation:
    """Longer tokens score higher: number of characters, blanks at the ends left out."""
    return _of_tokens(torch.tensor([float(len(text)) for text in texts_of(subject)], dtype=torch.float64))


@evaluation_method("digits", trivial=True, gives=_BOTH)
def digits(subject: Subject) -> Explanation:
    """Tokens with a digit score 1, others 0."""
    has_digit = [any(character.isdigit() for character in text) for text in texts_of(subject)]
    return _of_tokens(torch.tensor(has_digit, dtype=torch.float64))


@evaluation_method("shared_tokens", trivial=True, gives=_BOTH)
def shared_tokens(subject: Subject) -> Explanation:
    """Tokens whose text occurs in the answer score 1, others 0. Edges: 1 between tokens of the same text."""
    texts = texts_of(subject)
    in_answer = {texts[place] for place in subject.positions(subject.answer)}
    in_answer.discard("")
    tokens = torch.tensor([text in in_answer for text in texts], dtype=torch.float64)
    edges = same_text(texts).tril(-1)
    return Explanation(tokens, edges)


@evaluation_method("previous_step", trivial=True, gives=_BOTH)
def previous_step(subject: Subject) -> Explanation:
    """Tokens of the step before the answer's score 1, others 0. Edges: 1 from each step to the next.

    Steps are those of :func:`flowgraph.split_steps` (numbered steps, lines or sentences).
    """
    step_of_token = torch.zeros(subject.num_tokens, dtype=torch.int64)
    for step in steps_of(subject):
        step_of_token[step.start : step.stop] = step.index

    first_answer = subject.positions(subject.answer)[0]
    step_of_answer = step_of_token[first_answer]
    is_in_step_before = step_of_token == step_of_answer - 1
    # Rows are readers: the step of the reader follows that of the token it reads.
    is_next_step = step_of_token[:, None] == step_of_token + 1
    edges = is_next_step.double().tril(-1)
    return Explanation(is_in_step_before.double(), edges)


def generator_of(subject: Subject, purpose: str) -> torch.Generator:
    """Make a random generator from the item's name, so that runs repeat and items differ."""
    digest = hashlib.sha256(f"{purpose}\n{subject.item.id}".encode()).digest()
    seed = int.from_bytes(digest[:6], "big")
    return torch.Generator().manual_seed(seed)


def texts_of(subject: Subject) -> list[str]:
    """Return the text of each token in lower case, blanks at the ends left out."""
    return [token.strip().lower() for token in subject.base.tokens]


def same_text(texts: list[str]) -> Float64[Tensor, "tokens tokens"]:
    """Mark the pairs of tokens with the same visible text; blank tokens are in no pair."""
    # Texts are compared by number, all pairs at once.
    number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    number = torch.tensor([number_of[text] for text in texts])
    is_visible = torch.tensor([text != "" for text in texts])
    is_equal = number[:, None] == number
    are_visible = is_visible[:, None] & is_visible
    return (is_equal & are_visible).double()


def steps_of(subject: Subject) -> tuple[Step, ...]:
    """Split the text of a subject into steps, the question too."""
    base = subject.base
    return split_steps(
        base.tokens,
        base.spans,
        base.text,
        question=base.question,
        reasoning=base.reasoning,
        answer=base.answer,
        split_question=True,
    )


def _of_tokens(scores: Float64[Tensor, " tokens"]) -> Explanation:
    return Explanation(scores, edges_to_sources(scores))
