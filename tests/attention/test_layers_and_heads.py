"""Which layers and heads are read: choices, and messages for choices that do not exist."""

import numpy as np
import pytest
import torch

from flowgraph import HeadSelector, InvalidInputError
from flowgraph.attention.head_aggregation import head_statistic
from flowgraph.attention.layers_and_heads import resolve_heads, resolve_layers


@pytest.mark.parametrize(
    ("choice", "num_layers", "expected"),
    [
        ("middle", 30, range(10, 20)),
        ("middle", 28, range(9, 19)),
        ("middle", 4, [1, 2]),
        ("middle", 2, [0, 1]),
        ("middle", 1, [0]),
        ("all", 3, [0, 1, 2]),
        ("upper", 30, range(10, 30)),
        ("upper", 28, range(9, 28)),
        ("upper", 2, [0, 1]),
        ("upper", 1, [0]),
        ("20-", 30, range(20, 30)),
        (" 29 - ", 30, [29]),
        ("2-4", 30, [2, 3, 4]),
        (" 2 - 4 ", 30, [2, 3, 4]),
        ("7", 30, [7]),
        ([5, 3, 3], 30, [3, 5]),
        (range(2, 5), 30, [2, 3, 4]),
        (np.array([1, 2]), 30, [1, 2]),
        (torch.tensor([1, 2]), 30, [1, 2]),
        (6, 30, [6]),
    ],
)
def test_layers(choice, num_layers: int, expected):
    assert resolve_layers(choice, num_layers) == list(expected)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "lower",
            "layers: must be 'middle', 'upper', 'all', 'FIRST-LAST', 'FIRST-' or indices, got 'lower'; "
            "e.g. layers='10-19'",
        ),
        ("1-2-3", "layers: must be 'middle', 'upper', 'all'"),
        ("-3", "layers: must be 'middle', 'upper', 'all'"),
        ("-", "layers: must be 'middle', 'upper', 'all'"),
        ("", "layers: must be 'middle', 'upper', 'all'"),
        ("30-", "layers: must lie in 0..29, got 30..30; indices count from the model's first layer"),
        ("4-2", "layers: FIRST must not exceed LAST, got '4-2'; write '2-4'"),
        ("10-40", "layers: must lie in 0..29, got 10..40; indices count from the model's first layer"),
        ([30], "layers: must lie in 0..29, got 30..30"),
        ([-1], "layers: must lie in 0..29, got -1..-1"),
        ([], "layers: must name at least one, got none; leave it out for the default"),
        ([1.5], "layers: indices must be integers, got [1.5]; e.g. layers=[0, 2]"),
        (None, "layers: indices must be integers, got None"),
    ],
)
def test_layers_that_do_not_exist(choice, message: str):
    with pytest.raises(InvalidInputError) as error:
        resolve_layers(choice, 30)
    assert message in str(error.value)


def test_heads():
    selector = HeadSelector("kurtosis", "lowest", 0.5)
    assert resolve_heads(selector, 8) is selector
    assert resolve_heads("max", 8) == "max"
    assert resolve_heads("local", 8) == HeadSelector("distance", "lowest", 0.3)
    assert resolve_heads([3, 1], 8) == [1, 3]
    assert resolve_heads([30], None) == [30]  # layers differ: the pass itself will tell


@pytest.mark.parametrize(
    ("choice", "num_heads", "message"),
    [
        ("median", 8, "heads: must be 'mean', 'max', 'global', 'local', 'receiver', indices or a HeadSelector"),
        ([8], 8, "heads: must lie in 0..7, got 8..8; indices count from the model's first head"),
        ([-1], None, "heads: must not be negative, got -1..-1"),
        ((), 8, "heads: must name at least one"),
    ],
)
def test_heads_that_do_not_exist(choice, num_heads: int | None, message: str):
    with pytest.raises(InvalidInputError) as error:
        resolve_heads(choice, num_heads)
    assert message in str(error.value)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_selector_keeps_some_heads(share: float):
    with pytest.raises(InvalidInputError, match=r"share must lie in \(0, 1\]"):
        HeadSelector(share=share)


@pytest.mark.unchecked
def test_a_selector_knows_two_statistics():
    with pytest.raises(InvalidInputError, match="statistic must be 'distance' or 'kurtosis'"):
        HeadSelector("entropy")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="keep 'highest' or 'lowest'"):
        HeadSelector(keep="best")  # type: ignore[arg-type]


def test_a_selector_keeps_the_stated_share_and_breaks_ties_by_index():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert HeadSelector(share=0.4).choose(scores).tolist() == [1, 2]
    assert HeadSelector(keep="lowest", share=0.4).choose(scores).tolist() == [0, 3]
    assert HeadSelector(share=0.01).choose(scores).tolist() == [1]
    assert HeadSelector(share=1.0).choose(scores).tolist() == [0, 1, 2, 3, 4]


def test_distance_by_hand():
    """Head 0 looks at itself, head 1 one token back, head 2 at the first token."""
    weights = torch.zeros(1, 3, 4, 4)
    for t in range(4):
        weights[0, 0, t, t] = weights[0, 1, t, max(t - 1, 0)] = weights[0, 2, t, 0] = 1
    readable = torch.ones(1, 4, dtype=torch.bool)
    scores = head_statistic(iter([(0, weights[:, :, :2, :2]), (2, weights[:, :, 2:])]), "distance", readable, 3)
    torch.testing.assert_close(scores, torch.tensor([[0, 3 / 4, 6 / 4]], dtype=torch.float64))


def test_kurtosis_finds_the_head_whose_attention_gathers_in_one_token():
    """Of what later tokens give: head 0 all to token 2, head 1 to the token halfway, head 2 to the first."""
    tokens = 12
    weights = torch.zeros(1, 3, tokens, tokens)
    for t in range(tokens):
        weights[0, 0, t, min(t, 2)] = weights[0, 1, t, t // 2] = weights[0, 2, t, 0] = 1
    readable = torch.ones(1, tokens, dtype=torch.bool)
    scores = head_statistic(iter([(0, weights)]), "kurtosis", readable, 3)[0]
    received = torch.tensor([[0, 9.0] + [0] * 9, [2.0] * 5 + [0] * 6], dtype=torch.float64)  # tokens 1..11
    spread = received - received.mean(-1, keepdim=True)
    expected = spread.pow(4).mean(-1) / spread.square().mean(-1).square() - 3
    torch.testing.assert_close(scores[:2], expected)
    assert scores[0] > scores[1]
    assert scores[2] == -3  # the first token is a sink, not a hub: nothing is left to gather


@pytest.mark.parametrize("statistic", ["distance", "kurtosis"])
def test_statistics_of_a_text_ignore_its_padding(statistic: str):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 4, 9, 9, generator=generator).tril()
    weights /= weights.sum(-1, keepdim=True)
    alone = head_statistic(iter([(0, weights)]), statistic, torch.ones(1, 9, dtype=torch.bool), 4)
    for left in (0, 5):
        whole = torch.rand(1, 4, 14, 14, generator=generator).tril()
        whole[:, :, left : left + 9] = 0
        whole[:, :, left : left + 9, left : left + 9] = weights
        readable = torch.zeros(1, 14, dtype=torch.bool)
        readable[:, left : left + 9] = True
        torch.testing.assert_close(head_statistic(iter([(0, whole)]), statistic, readable, 4), alone)
