"""A recorder with a power gives the rows of ``capture(capacity="sharpened")``, in any pass and any family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import AttentionRecorder, InvalidInputError, capture
from tests.fixtures.models import family, padded, sequences

TEXT = sequences()[0]
PLACES = ("pre", "post", "max")


def recorded(name: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The rows of one plain forward pass under a recorder."""
    positions = {}
    if mask is not None and name != "bloom":
        positions = {"position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad(), AttentionRecorder(family(name), **options) as recorder:
        family(name)(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    return recorder.rows(mask, ids).dense()


def plain_rows(ids: Tensor, name: str, power: float, place: str, layers: slice) -> Tensor:
    """The formula on the weights that the eager model returns."""
    with torch.no_grad():
        attentions = family(name, "eager")(input_ids=ids, output_attentions=True, use_cache=False).attentions
    weights = torch.stack(attentions)[layers]
    if place == "pre":
        return weights.pow(power).mean((0, 2))
    if place == "post":
        return weights.mean(2).pow(power).mean(0)
    return weights.amax((0, 2)).pow(power)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_rows_are_the_formula_on_eager_weights(name: str, place: str):
    """bloom returns weights and no queries, so its heads are joined while the pass runs."""
    found = recorded(name, TEXT[None], power=3.0, place=place, layers="1-")
    torch.testing.assert_close(found, plain_rows(TEXT[None], name, 3.0, place, slice(1, None)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", PLACES)
def test_rows_are_those_of_the_capacity_with_padding(place: str, side: str):
    ids, mask = padded(side)
    expected = capture(family("llama"), ids, mask, capacity="sharpened", power=4, place=place, layers="all")
    assert expected.normalization == "leak"
    found = recorded("llama", ids, mask, power=4, place=place, layers="all")
    torch.testing.assert_close(found, expected.dense(), atol=0, rtol=0)


def test_a_power_of_one_before_the_mean_is_plain_attention():
    plain = recorded("llama", TEXT[None], layers="all")
    torch.testing.assert_close(recorded("llama", TEXT[None], layers="all", power=1), plain, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.5}, r"power: must lie in \[1, 64\], got 0.5; 1 changes nothing"),
        ({"power": True}, r"power: must lie in \[1, 64\], got True; 1 changes nothing"),
        ({"power": float("nan")}, r"power: must lie in \[1, 64\], got nan; 1 changes nothing"),
        ({"power": 2, "place": "last"}, r"place: must be 'pre', 'post' or 'max', got 'last'; 'pre' is the default"),
        (
            {"power": 2, "heads": "max"},
            r"heads: must be left out with a power, got 'max'; place='max' takes the maximum",
        ),
        ({"power": 2, "edge_weight": "value_norm"}, r"edge_weight: must be 'attention' with a power, got 'value_norm'"),
    ],
)
@pytest.mark.unchecked
def test_bad_requests(options: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        AttentionRecorder(family("llama"), **options)
