"""Regions given as masks, indices or slices are read as one bool mask over tokens."""

import pytest
import torch

from flowgraph import RegionError
from flowgraph.masks import as_mask, between, read_mask


@pytest.mark.parametrize(
    "region",
    [
        [1, 2],
        (2, 1, 1),
        torch.tensor([1, 2]),
        [False, True, True, False],
        torch.tensor([0, 1, 1, 0]).bool(),
        slice(1, 3),
    ],
)
def test_every_form_of_a_region(region):
    assert as_mask(region, 4, "question").tolist() == [False, True, True, False]
    assert read_mask(region, 4, "question").tolist() == [False, True, True, False]


def test_a_mask_is_copied():
    mask = torch.tensor([True, False])
    as_mask(mask, 2, "question")[0] = False
    assert mask.tolist() == [True, False]


@pytest.mark.unchecked
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_an_empty_region_selects_nothing(dtype: torch.dtype):
    assert read_mask(torch.empty(0, dtype=dtype), 3, "reasoning").tolist() == [False] * 3


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([[0]], r"question: must be one-dimensional, got shape \(1, 1\); pass one row per sequence"),
        ([True], r"question: a mask must have one entry per token \(3\), got 1;"),
        ([0.0, 1.0], r"question: must be a bool mask or integer indices, got torch.float32; convert"),
        ([0, 3], r"question: token indices must lie in 0..2, got 3; negative indices"),
        ([-1], r"question: token indices must lie in 0..2, got -1;"),
    ],
)
def test_invalid_regions(region, message: str):
    with pytest.raises(RegionError, match=message):
        as_mask(region, 3, "question")


def test_tokens_between_question_and_answer():
    question = torch.tensor([0, 1, 0, 0, 0, 0]).bool()
    answer = torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    assert between(question, answer).tolist() == [False, False, True, True, False, False]
    assert not between(question, torch.zeros(6).bool()).any()
    assert not between(torch.zeros(6).bool(), answer).any()
