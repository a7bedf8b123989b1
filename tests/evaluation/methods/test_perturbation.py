"""Integrated gradients sum to what they explain, and occlusion is what a loop over tokens finds."""

from __future__ import annotations

import sys

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.methods import perturbation
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import tiny
from tests.reference import input_gradients as reference

pytest.importorskip("captum")


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject(response="Step 1: 3 + 4 = 7. So the answer is 7 apples.", answer="7 apples")


def test_integrated_gradients_are_complete(shared: fg.Subject):
    model = tiny()[0]
    places = shared.positions(shared.answer)
    ids = shared.token_ids
    absent = torch.full_like(ids, perturbation.reference_token(shared))
    change = reference.logprob(model, ids, places, ids) - reference.logprob(model, absent, places, ids)
    scores = explained("integrated_gradients:400", shared).tokens
    assert float(scores.sum()) == pytest.approx(change, rel=0.02)
    assert not bool(scores[places[-1] :].any())


def test_an_integral_of_too_few_points_warns(shared: fg.Subject):
    message = r"integrated_gradients: should sum to the change .*, got .* with 1 points; take more, as in .*:4"
    with pytest.warns(UserWarning, match=message):
        explained("integrated_gradients:1", shared)


@pytest.mark.parametrize("steps", ["0", "-3", "4097", "many", "1.5", "9" * 5000])
def test_a_number_of_points_out_of_range_is_refused(steps: str):
    message = "methods: 'integrated_gradients' must be followed by a number of points in 1..4096, got"
    with pytest.raises(fg.InvalidInputError, match=message):
        find_method(f"integrated_gradients:{steps}")


def test_occlusion_is_what_a_loop_finds(shared: fg.Subject):
    places = shared.positions(shared.answer)
    absent = perturbation.reference_token(shared)
    wanted = reference.occlusion(tiny()[0], shared.token_ids, places, absent)
    found = explained("occlusion", shared).tokens.tolist()
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.filterwarnings("ignore:integrated_gradients")
def test_the_number_of_copies_changes_no_score(shared: fg.Subject, monkeypatch: pytest.MonkeyPatch):
    wanted = {name: explained(name, shared).tokens for name in ("occlusion", "integrated_gradients")}
    monkeypatch.setattr(perturbation, "_TOKENS_AT_ONCE", 1)
    for name, scores in wanted.items():
        torch.testing.assert_close(explained(name, shared).tokens, scores, rtol=1e-3, atol=1e-4)


def test_the_reference_token_is_one_that_the_tokenizer_has(shared: fg.Subject):
    assert perturbation.reference_token(shared) == shared.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["integrated_gradients", "occlusion"])
def test_without_captum_the_extra_is_named(shared: fg.Subject, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    message = rf"methods: '{name}' needs captum, got an environment without it; run pip install 'flowgraph-llm\[eval"
    with pytest.raises(fg.MissingExtraError, match=message):
        explained(name, shared)
