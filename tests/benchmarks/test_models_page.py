"""The page on models, the committed results and the family tests describe the same families."""

import re
from pathlib import Path

import pytest

from benchmarks import models_page
from flowgraph import capacity_names
from flowgraph.capacities.registry import find_capacity
from tests.attention.test_capture_families import FUSED, HANDS_OUT_WEIGHTS
from tests.capacities.test_relevance import CONSERVING, MIX_WITHOUT_ATTENTION, NO_INTERFACE, NO_RULE
from tests.fixtures.models import FAMILIES, SINKS, WINDOWED

DOCS = Path(__file__).parents[2] / "docs"
MEASURED = {row["family"]: row for row in models_page.results("family_capacities")["rows"]}


def test_the_page_is_made_from_the_results():
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.page(), "python -m benchmarks.models_page"


def test_both_results_hold_the_families_of_the_tests():
    captured = models_page.results("families")["rows"]
    assert [row["family"] for row in captured] == list(FAMILIES)
    assert list(MEASURED) == list(FAMILIES)
    for row in captured:
        name = row["family"]
        assert (row["path"] == "hands out weights") == (name in HANDS_OUT_WEIGHTS), name
        assert (row["path"] == "fused") == (name in FUSED), name
        assert ("sliding window" in row["with"]) == (name in WINDOWED), name
        assert ("learned sinks" in row["with"]) == (name in SINKS), name


def test_relevance_is_conserved_where_the_tests_say_so():
    conserving = sorted(name for name, row in MEASURED.items() if row["residual"] is not None)
    assert conserving == CONSERVING
    assert all(MEASURED[name]["residual"] < 5e-6 for name in conserving)
    reasons = {name: models_page.reason_of(row["relevance_refused"]) for name, row in MEASURED.items()}
    for names, reason in (
        (NO_INTERFACE, "refused: attention outside the interface"),
        (MIX_WITHOUT_ATTENTION, "refused: mixes tokens without attention"),
        (NO_RULE, "refused: a part without a rule"),
    ):
        assert {name for name, found in reasons.items() if found == reason} == names


def test_the_page_on_capacities_counts_the_same_families():
    text = (DOCS / "capacities.md").read_text(encoding="utf-8")
    found = re.search(r"On (\d+) of the (\d+) families", text)
    assert found is not None
    assert [int(count) for count in found.groups()] == [len(CONSERVING), len(FAMILIES)]
    largest = max(MEASURED[name]["residual"] for name in CONSERVING)
    assert f"the residual is at most {models_page.rounded_up(largest)};" in text


def test_the_capacities_of_the_page_are_those_of_the_package():
    built_in = {name for name in capacity_names() if find_capacity(name).function.__module__.startswith("flowgraph.")}
    assert {*models_page.CAPACITIES, "relevance"} == built_in


def test_a_refusal_without_a_short_form_is_an_error():
    with pytest.raises(KeyError, match="REASONS: must hold a part of every refusal, got 'model: other'"):
        models_page.reason_of("model: other")
