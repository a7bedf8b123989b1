"""Names of methods and presets."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import flowgraph as fg
from flowgraph.capacities import registry as capacities
from flowgraph.evaluation import registry as methods
from flowgraph.evaluation.catalogue import expand_methods, find_method
from flowgraph.evaluation.methods.names import method_presets
from flowgraph.flow import composition_registry as compositions
from tests.fixtures.other_device import other_device
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import tiny

# On a random model, 32 points are often too few.
pytestmark = pytest.mark.filterwarnings("ignore:integrated_gradients")


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject()


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch):
    """Forget after the test what it registers."""
    monkeypatch.setattr(capacities, "_CAPACITIES", dict(capacities._CAPACITIES))
    monkeypatch.setattr(compositions, "_COMPOSITIONS", dict(compositions._COMPOSITIONS))
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


def test_every_method_of_every_preset_explains_an_item(shared: fg.Subject):
    names = expand_methods([f"preset:{name}" for name in method_presets()])
    for name in names:
        method = find_method(name)
        assert method.name == name
        explanation = method.explain(shared)
        given = {part for part in ("tokens", "edges") if getattr(explanation, part) is not None}
        assert given == set(method.gives), name
        assert explanation.tokens is not None, name
        assert explanation.tokens.dtype == torch.float64, name
        assert method.summary, name
    assert len(names) == len(set(names)) > 40


def test_the_default_dtype_changes_no_score(shared: fg.Subject):
    names = [name for name in expand_methods(["preset:all"]) if name != "attention_flow"]
    right = {name: explained(name, shared) for name in names}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = {name: explained(name, subject()) for name in names}
    finally:
        torch.set_default_dtype(before)
    for name, wanted in right.items():
        torch.testing.assert_close(found[name].tokens, wanted.tokens, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(found[name].edges, wanted.edges, rtol=1e-5, atol=1e-6, msg=name)


def test_methods_run_where_the_model_is(shared: fg.Subject):
    names = ["sharp:cage", "relevance:chain", "gradient", "attention_late", "rollout", "fai", "gradient_x_input"]
    names += ["text_only", "matched:vtrace_share", "random"]
    right = {name: explained(name, shared) for name in names}
    with other_device() as there:
        case = subject(model=copy.deepcopy(tiny()[0]).to(there))
        for name in names:
            found = explained(name, case)
            torch.testing.assert_close(found.tokens, right[name].tokens, rtol=1e-4, atol=1e-6, msg=name)


def test_presets_hold_what_they_say():
    presets = method_presets()
    assert all(find_method(name).trivial for name in presets["trivial"])
    assert not any(find_method(name).gradient for name in presets["forward"])
    assert all(find_method(name).gradient for name in presets["gradient"])
    assert 10 <= len(presets["standard"]) <= 16
    assert set().union(*presets.values()) == set(presets["all"])
    assert {"random", "position", "text_only"} <= set(presets["standard"])


def test_presets_are_expanded_in_place_and_methods_listed_once():
    expanded = expand_methods(["digits", "preset:trivial", "sharp", "digits"])
    assert expanded[0] == "digits"
    assert expanded[-1] == "sharp"
    assert expanded.count("digits") == 1
    assert set(expanded) == {*method_presets()["trivial"], "sharp"}
    assert expand_methods([]) == []


def test_a_preset_leaves_out_methods_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    assert "occlusion" not in expand_methods(["preset:all"])
    assert "integrated_gradients" not in expand_methods(["preset:gradient"])
    assert expand_methods(["occlusion"]) == ["occlusion"]


@pytest.mark.parametrize("name", ["preset:nothing", "preset:", "preset:Trivial"])
def test_an_unknown_preset_is_refused(name: str):
    message = "methods: a preset must be one of trivial, standard, forward, gradient, all, got"
    with pytest.raises(fg.InvalidInputError, match=message):
        expand_methods([name])


def test_a_preset_is_no_method():
    message = "methods: a preset must stand in a list of methods, got 'preset:trivial' as one method; use a name out"
    with pytest.raises(fg.InvalidInputError, match=message):
        find_method("preset:trivial")


@pytest.mark.parametrize("name", ["nothing", "", "Sharp", ":sharp", "cage", "vtrace-share"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str):
    message = "methods: must be of attention_all, .*, a capacity .*vtrace_share.* or preset:NAME, got"
    with pytest.raises(fg.InvalidInputError, match=message):
        find_method(name)


@pytest.mark.usefixtures("own_names")
def test_capacities_and_compositions_of_users_are_methods(shared: fg.Subject):
    @fg.capacity("nearness: of a test")
    def nearness(batch):
        """Weigh near tokens more."""
        position = torch.arange(batch.input_ids.shape[1])
        weights = 0.5 ** (position[:, None] - position).float()
        return weights.tril(-1).expand(len(batch.input_ids), -1, -1)

    @fg.composition("half: of h of a test")
    def half(graph):
        """Score tokens by half of the potential."""
        return fg.solve(graph).potentials[0] / 2

    @fg.capacity("difference of a test", signed=True, normalization="none")
    def difference(batch):
        """Weigh odd tokens against even ones."""
        ids = batch.input_ids.float()
        return (ids[:, None] - ids[:, :, None]).tril(-1)

    h = explained("nearness: of a test:h", shared)
    composed = explained("nearness: of a test:half: of h of a test", shared)
    torch.testing.assert_close(composed.tokens, h.tokens / 2)
    assert "nearness: of a test" in method_presets()["forward"]
    signed = explained("difference of a test", shared)
    ids = shared.token_ids.double()
    wanted = (ids[None] - ids[:, None]).tril(-1).sum(0)
    torch.testing.assert_close(signed.tokens, wanted)


@pytest.mark.usefixtures("own_names")
def test_a_registered_name_comes_first(shared: fg.Subject):
    @fg.evaluation_method("sharp:of a test", trivial=True)
    def of_a_test(subject):
        """Score every token 1."""
        return torch.ones(subject.num_tokens, dtype=torch.float64)

    assert explained("sharp:of a test", shared).tokens.unique().tolist() == [1.0]
