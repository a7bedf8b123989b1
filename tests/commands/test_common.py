"""Options that the commands share: lists of numbers, layers and heads."""

from pathlib import Path

import pytest
import typer

from flowgraph import OutputError
from flowgraph.commands.common import check_outputs, head_choice, layer_choice, numbers


def test_lists_of_numbers_and_ranges():
    assert numbers("tokens", "5,7-9") == [5, 7, 8, 9]
    assert numbers("tokens", " 3 , 1-1") == [3, 1]


@pytest.mark.parametrize("text", ["", "5,", "x", "9-5", "-3", "3-", "1.5", "9" * 8, "²"])
def test_what_is_not_a_list_of_numbers(text: str):
    with pytest.raises(typer.BadParameter, match=r"^--tokens must be numbers and ranges like 5,7-9, got '"):
        numbers("tokens", text)


def test_layers_and_heads_are_names_or_lists():
    assert layer_choice("3,5,7-9") == [3, 5, 7, 8, 9]
    for text in ("middle", "upper", "all", "10-19", "10-", "7"):
        assert layer_choice(text) == text
    assert head_choice("0,3") == [0, 3]
    assert head_choice("5") == [5]
    assert head_choice("global") == "global"


def test_outputs_are_checked_and_differ(tmp_path: Path):
    check_outputs(None, tmp_path / "a", None, tmp_path / "b")
    with pytest.raises(typer.BadParameter, match="must each name a file of its own"):
        check_outputs(tmp_path / "a", None, tmp_path / "a")
    with pytest.raises(OutputError, match="its folder must exist"):
        check_outputs(tmp_path / "missing" / "a")
