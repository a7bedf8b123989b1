"""Matched controls: the scores of a method, permuted among tokens of the same position or the same length.

``matched:METHOD`` keeps how METHOD spreads its scores over the text and forgets which token of a place has which score;
``matched_length:METHOD`` keeps how its scores depend on the length of a token. Where METHOD is no better than its own
control, its scores say where in the text, or how long, and nothing about the token. In tests of tokens chosen by a
method these are the position-matched and length-matched random tokens.

Tokens of different regions are never exchanged. The permutation is seeded by the item's name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.evaluation.methods.trivial import generator_of, texts_of
from flowgraph.evaluation.records import Explanation
from flowgraph.evaluation.registry import EvaluationMethod
from flowgraph.evaluation.subject import Subject

BIN = 8
"""Neighbouring tokens of a region among which scores are exchanged by ``matched``."""

LENGTH_EDGES = (1, 2, 4, 6)
"""Bins of lengths in characters for ``matched_length``: up to 1, 2, 4, 6, and longer."""

PREFIXES = ("matched", "matched_length")


def matched_method(name: str, reference: EvaluationMethod) -> EvaluationMethod:
    """Make the control of a reference method.

    Args:
        name: ``matched:METHOD`` or ``matched_length:METHOD``.
        reference: the method.
    """
    is_length = name.startswith("matched_length:")
    bins = length_bins if is_length else position_bins
    kind = "length" if is_length else "position"
    return EvaluationMethod(
        name=name,
        function=_permuting(name, reference, bins),
        summary=f"Scores of {reference.name}, permuted among tokens of the same {kind} (control).",
        gradient=reference.gradient,
        trivial=True,
        gives=reference.gives,
        requires=reference.requires,
    )


def position_bins(subject: Subject) -> Int64[Tensor, " tokens"]:
    """Number the bins of ``BIN`` neighbouring tokens, those of each region apart; the last of a region may be larger.

    The last bin takes what is left over, so that no bin has fewer than ``BIN`` tokens where the region has as many.
    """
    bins = torch.zeros(subject.num_tokens, dtype=torch.int64)
    num_bins = 0
    for members in _regions(subject):
        num_members = members.numel()
        num_own_bins = max(1, num_members // BIN)
        bin_of_member = torch.arange(num_members) // BIN
        bins[members] = num_bins + bin_of_member.clamp_max(num_own_bins - 1)
        num_bins += num_own_bins
    return bins


def length_bins(subject: Subject) -> Int64[Tensor, " tokens"]:
    """Number the bins of tokens of one region whose visible text has a similar length."""
    lengths = torch.tensor([len(text) for text in texts_of(subject)])
    length_bin = torch.bucketize(lengths, torch.tensor(LENGTH_EDGES))
    # Every region has numbers of its own, so that no bin crosses a border.
    bins = torch.zeros(subject.num_tokens, dtype=torch.int64)
    num_bins = len(LENGTH_EDGES) + 1
    for number, members in enumerate(_regions(subject)):
        first_bin = number * num_bins
        bins[members] = first_bin + length_bin[members]
    return bins


def permuted_within(bins: Int64[Tensor, " tokens"], generator: torch.Generator) -> Int64[Tensor, " tokens"]:
    """Draw a permutation that keeps every token in its bin, uniform among those.

    Returns:
        ``order``: token i is given what token ``order[i]`` had.
    """
    # Sorting a shuffled list by bin leaves each bin's members in random order.
    by_bin = torch.argsort(bins, stable=True)
    shuffled = torch.randperm(bins.numel(), generator=generator)
    shuffled_by_bin = torch.argsort(bins[shuffled], stable=True)
    members = shuffled[shuffled_by_bin]
    order = torch.empty_like(by_bin)
    order[by_bin] = members
    return order


def _permuting(
    name: str, reference: EvaluationMethod, bins: Callable[[Subject], Int64[Tensor, " tokens"]]
) -> Callable[[Subject], Explanation]:
    # Both controls of a method share its explanation, which may cost a pass of the model.
    def explain(subject: Subject) -> Explanation:
        explanation = subject.once(f"explanation of {reference.name}", lambda: reference.explain(subject))
        generator = generator_of(subject, name)
        bin_of_token = bins(subject)
        tokens = explanation.tokens
        if tokens is not None:
            tokens = tokens[permuted_within(bin_of_token, generator)]
        edges = explanation.edges
        if edges is not None:
            edges = _permuted_edges(edges.double(), bin_of_token, generator)
        return Explanation(tokens, edges)

    return explain


def _permuted_edges(
    edges: Float64[Tensor, "tokens tokens"], bins: Int64[Tensor, " tokens"], generator: torch.Generator
) -> Float64[Tensor, "tokens tokens"]:
    """Permute the scores of the edges into each token among sources of the same bin."""
    permuted = torch.zeros_like(edges)
    for target in range(1, edges.shape[0]):
        incoming = edges[target, :target]
        order = permuted_within(bins[:target], generator)
        permuted[target, :target] = incoming[order]
    return permuted


def _regions(subject: Subject) -> list[Int64[Tensor, " members"]]:
    """List the tokens of question, reasoning, answer and everything else, in order of position."""
    other = ~(subject.question | subject.reasoning | subject.answer)
    masks = (subject.question, subject.reasoning, subject.answer, other)
    members = [mask.nonzero().flatten().cpu() for mask in masks]
    return [tokens for tokens in members if tokens.numel()]
