"""Sensitivity of a trace's ranking: each variation equals a trace made with that choice."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowgraph
from flowgraph import FlowTrace, InvalidInputError, Sensitivity, Variation, capture, compose, load_trace, trace
from flowgraph.analysis.statistics import spearman
from tests.fixtures.models import build, sequences
from tests.fixtures.tiny import RESPONSE, chat, tiny, tiny_model


def traced(**options: Any) -> FlowTrace:
    return trace(*tiny(), chat(), RESPONSE, **options)


@cache
def example() -> tuple[FlowTrace, Sensitivity, tuple[str, ...]]:
    lines: list[str] = []
    found = traced()
    return found, found.sensitivity(tiny_model(), progress=lines.append), tuple(lines)


def expected(found: FlowTrace, scores: Tensor, top: int) -> tuple[float, float]:
    """Spearman and overlap of the best tokens of the reasoning, by plain sets."""
    one = found.scores[found.reasoning]
    other = scores[found.reasoning]
    best = [set(sorted(range(len(x)), key=lambda i: -float(x[i]))[:top]) for x in (one, other)]
    return spearman(one.numpy(), other.numpy()), len(best[0] & best[1]) / top


def test_it_has_every_kind_of_choice_and_reports_progress():
    found, result, lines = example()
    values = {(variation.choice, variation.value) for variation in result.variations}
    assert {choice for choice, _ in values} == {"layers", "heads", "rows", "power", "capacity"}
    # The choices of the trace itself are not listed.
    assert not values & {("layers", "middle"), ("heads", "mean"), ("rows", "emission"), ("capacity", "attention")}
    assert {value for choice, value in values if choice == "layers"} == {"0-0", "upper", "2-", "all"}
    assert len(lines) == len(result.variations)
    assert lines[0].startswith(f"1 of {len(lines)}: layers = 0-0")
    assert result.region == "reasoning"
    assert result.num_tokens == int(found.reasoning.sum())
    # Half of 13 tokens.
    assert result.num_top == 6
    for variation in result.variations:
        assert variation.reason == ""
        assert variation.spearman is not None
        assert -1 <= variation.spearman <= 1
        assert variation.overlap is not None
        assert 0 <= variation.overlap <= 1


@pytest.mark.parametrize(
    ("choice", "value", "options"),
    [
        ("layers", "all", {"layers": "all"}),
        ("layers", "2-", {"layers": "2-"}),
        ("heads", "max", {"heads": "max"}),
        ("heads", "receiver", {"heads": "receiver"}),
        ("rows", "literal", {"rows": "literal"}),
        ("capacity", "vtrace_share", {"capacity": "vtrace_share"}),
        ("capacity", "sharp_max", {"capacity": "sharp_max"}),
    ],
)
def test_a_variation_is_the_trace_with_that_choice(choice: str, value: str, options: dict):
    found, result, _ = example()
    (variation,) = [v for v in result.variations if (v.choice, v.value) == (choice, value)]
    correlation, overlap = expected(found, traced(**options).scores, result.num_top)
    assert variation.spearman == pytest.approx(correlation, abs=1e-9)
    assert variation.overlap == overlap


def test_a_power_is_the_sharpened_capacity():
    found, result, _ = example()
    rows = capture(tiny_model(), found.token_ids, capacity="sharpened", power=4, layers=found.provenance["layers"])
    masks = {"question": found.question, "answer": found.answer, "reasoning": found.reasoning}
    graph = flowgraph.FlowGraph.from_rows(rows.sequence(), **masks, generated=found.generated)
    correlation, overlap = expected(found, flowgraph.solve(graph).potentials[0], result.num_top)
    (variation,) = [v for v in result.variations if (v.choice, v.value) == ("power", "4")]
    assert (variation.spearman, variation.overlap) == (pytest.approx(correlation), overlap)


def test_table_json_and_repr(tmp_path: Path):
    _, result, _ = example()
    lines = repr(result).splitlines()
    assert len(lines) == len(result.variations) + 2
    assert lines[1].split() == ["choice", "value", "Spearman", "top", "6"]
    assert "capacity attention" in lines[0]
    table = result.table()
    assert [row["value"] for row in table] == [variation.value for variation in result.variations]
    result.to_json(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert written["schema"] == "flowgraph-sensitivity/1"
    assert written["variations"] == table
    with pytest.raises(AttributeError):
        result.region = "all"  # type: ignore[misc]


def test_chosen_choices_a_composition_and_a_loaded_trace(tmp_path: Path):
    found = traced(composition="cage", capacity="sharp")
    found.save(tmp_path / "t.safetensors")
    only = {"layers": ["all"], "rows": [], "powers": [], "capacities": ["vtrace"]}
    result = load_trace(tmp_path / "t.safetensors").sensitivity(tiny_model(), region="all", top=5, **only)  # type: ignore[arg-type]
    assert [(v.choice, v.value) for v in result.variations] == [("layers", "all"), ("capacity", "vtrace")]
    assert result.settings["composition"] == "cage"
    other = traced(capacity="vtrace", composition="cage")
    counted = torch.arange(found.num_tokens) < int(found.answer.nonzero().min())
    wanted = spearman(
        found.scores[counted].numpy(), compose(other.graph, "cage", generated=other.generated)[counted].numpy()
    )
    assert result.variations[1].spearman == pytest.approx(wanted)
    assert result.num_top == 5


def test_a_capacity_that_the_model_does_not_support_says_why():
    model = build("bloom")
    text = sequences()[0]
    found = trace(model, input_ids=text, question=[1, 2, 3], answer=[22, 23])
    result = found.sensitivity(model, layers=[], heads=[], rows=[], powers=[], capacities=["sharp"])
    (variation,) = result.variations
    assert isinstance(variation, Variation)
    assert variation.spearman is None
    assert variation.overlap is None
    assert "AttentionInterface" in variation.reason
    assert "AttentionInterface" in repr(result)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region": "answer"}, "region: must be one of reasoning, question, all, got 'answer'"),
        ({"top": 0}, "top: must be a positive integer, got 0"),
        ({"top": 2.5}, "top: must be a positive integer, got 2.5"),
        ({"layers": "all"}, "layers: must be a list of choices, got 'all'; e.g. layers="),
        ({"layers": ["9-"]}, r"layers: must lie in 0\.\.2, got 9\.\.9"),
        ({"heads": ["most"]}, "heads: must be 'mean', .*, got 'most'"),
        ({"rows": ["first"]}, "rows: must be among emission, emission_all, literal, got 'first'"),
        ({"powers": [0]}, r"powers: must lie in \[1, 64\], got 0"),
        ({"powers": [float("nan")]}, r"powers: must lie in \[1, 64\], got nan"),
        ({"capacities": ["sharpest"]}, "capacity: must be one of .*, got 'sharpest'"),
        ({"capacities": ["relevance"]}, "capacities: must not be signed, got 'relevance'"),
    ],
)
def test_bad_choices(options: dict, message: str):
    lines: list[str] = []
    with pytest.raises(InvalidInputError, match=message):
        example()[0].sensitivity(tiny_model(), progress=lines.append, **options)
    # Every choice is checked before the first pass.
    assert lines == []


def test_regions_and_options_that_do_not_fit():
    short = trace(tiny_model(), input_ids=sequences()[0], question=[1, 2], answer=[3, 4])
    with pytest.raises(InvalidInputError, match="region: must hold at least 3 tokens to rank, got 2 in 'question'"):
        short.sensitivity(tiny_model(), region="question")
    sharp = traced(capacity="sharp")
    with pytest.raises(InvalidInputError, match="heads: does not apply to capacity='sharp', got"):
        sharp.sensitivity(tiny_model(), heads=["max"])
    result = sharp.sensitivity(tiny_model(), layers=[], powers=[], capacities=[])
    assert {variation.choice for variation in result.variations} == {"rows"}
