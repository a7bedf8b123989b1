"""Matched controls keep the scores of every bin, and draw every permutation of a bin alike."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.methods.matched import BIN, length_bins, permuted_within, position_bins
from tests.fixtures.subjects import explained, subject


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject(response="Step 1: 3 + 4 = 7.\nStep 2: check 7 - 4 = 3.\nSo the answer is 7.")


def values_by_bin(values: Tensor, bins: Tensor) -> dict[int, list[float]]:
    return {number: sorted(values[bins == number].tolist()) for number in bins.unique().tolist()}


@pytest.mark.parametrize(("prefix", "bins_of"), [("matched", position_bins), ("matched_length", length_bins)])
def test_scores_stay_in_their_bin(shared: fg.Subject, prefix: str, bins_of: object):
    reference = explained("vtrace_share", shared)
    control = explained(f"{prefix}:vtrace_share", shared)
    bins = bins_of(shared)
    assert values_by_bin(control.tokens, bins) == values_by_bin(reference.tokens, bins)
    assert not torch.equal(control.tokens, reference.tokens)
    for target in (5, 20, shared.num_tokens - 1):
        assert values_by_bin(control.edges[target, :target], bins[:target]) == values_by_bin(
            reference.edges[target, :target], bins[:target]
        )
    assert not bool(control.edges.triu().any())


def test_bins_are_neighbours_of_one_region(shared: fg.Subject):
    bins = position_bins(shared)
    masks = torch.stack([shared.question, shared.reasoning, shared.answer])
    region = torch.cat([(~masks.any(0))[None], masks]).long().argmax(0)
    for number in bins.unique().tolist():
        members = (bins == number).nonzero().flatten()
        assert len(region[members].unique()) == 1
        assert len(members) < 2 * BIN
        of_region = (region == region[members[0]]).nonzero().flatten().tolist()
        places = [of_region.index(member) for member in members.tolist()]
        assert places == list(range(places[0], places[0] + len(places)))


def test_lengths_of_a_bin_are_alike(shared: fg.Subject):
    lengths = torch.tensor([len(token.strip()) for token in shared.base.tokens])
    bins = length_bins(shared)
    for number in bins.unique().tolist():
        here = lengths[bins == number]
        assert max(here) <= 1 or max(here) - min(here) <= 1 or min(here) > 6


def test_a_control_is_repeatable_and_differs_between_items():
    one = explained("matched:position", subject("a")).tokens
    assert torch.equal(one, explained("matched:position", subject("a")).tokens)
    assert not torch.equal(one, explained("matched:position", subject("b")).tokens)


def test_all_permutations_of_a_bin_are_equally_likely():
    bins = torch.tensor([3, 1, 3, 1, 3])
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(permuted_within(bins, generator).tolist()) for _ in range(12_000))
    # Two members of one bin, three of the other: 2! 3! = 12 permutations, 1,000 draws of each.
    assert len(drawn) == 12
    assert max(drawn.values()) < 1150
    assert min(drawn.values()) > 850
    for order in drawn:
        assert bins[list(order)].tolist() == bins.tolist()


def test_a_control_of_a_control_and_of_any_name():
    case = subject()
    for name in ("matched:sharp:cage", "matched_length:matched:digits", "matched:text_only:f"):
        method = find_method(name)
        assert method.trivial
        assert explained(name, case).tokens.shape == (case.num_tokens,)
    assert find_method("matched:gradient_x_input").gradient
    assert find_method("matched:rollout").gives == ("tokens",)


@pytest.mark.parametrize("name", ["matched", "matched:", "matched:nothing"])
def test_a_control_needs_a_method(name: str):
    with pytest.raises(fg.InvalidInputError, match="methods: 'matched' must be followed by the name of a method, got"):
        find_method(name)
