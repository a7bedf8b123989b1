"""Planted models: the answer is right, gold decides it by intervention, and nothing else changes it at all."""

from __future__ import annotations

import math
from functools import cache
from statistics import fmean

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.planted import (
    PLANTED_KINDS,
    PLANTED_METRICS,
    PlantedTruth,
    planted_check,
    planted_items,
    planted_table,
    planted_truth,
)
from flowgraph.evaluation.planted_models import FIRST, PlantedKind, planted_model
from flowgraph.evaluation.registry import EvaluationMethod

NUM_ITEMS = 3
ROUNDING = 1e-6
"""Nats: what float32 leaves of a change of exactly 0."""
every_kind = pytest.mark.parametrize("kind", PLANTED_KINDS)


@cache
def subjects_of(kind: PlantedKind) -> list[fg.Subject]:
    """Traces are cached on the subjects, so every test reads the same ones."""
    model, tokenizer = planted_model(kind)
    return [fg.Subject(model, tokenizer, item) for item in planted_items(kind, "test", NUM_ITEMS)]


@every_kind
def test_the_model_gives_the_answer_of_every_text(kind: PlantedKind):
    model, tokenizer = planted_model(kind)
    for item in planted_items(kind, "test", 20):
        prompt = tokenizer(str(item.prompt)).input_ids
        response = tokenizer(item.response).input_ids
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
        best, second = logits[-1].topk(2).values
        assert float(best - second) == pytest.approx(8, abs=1e-4)


@every_kind
def test_masking_a_gold_token_changes_the_answer_and_no_other_token_does(kind: PlantedKind):
    first_answer = planted_model(kind)[1].convert_tokens_to_ids(FIRST)
    for subject in subjects_of(kind):
        truth = planted_truth(subject.item)
        masked = [fg.Intervention(tokens=[position]) for position in truth.candidates]
        for position, result in zip(truth.candidates, subject.knockouts(masked), strict=True):
            if position in truth.gold:
                assert result.change == pytest.approx(-8, abs=1e-4)
                assert result.greedy_after.tolist() == [first_answer]
            else:
                assert result.change == pytest.approx(0, abs=ROUNDING)
                assert not result.flips
        # All others at once are no reason to answer differently, as long as the first token is there to be read.
        others = [position for position in truth.candidates[1:] if position not in truth.gold]
        assert subject.knockouts([fg.Intervention(tokens=others)])[0].change == pytest.approx(0, abs=1e-5)


@every_kind
def test_masking_a_gold_edge_changes_the_answer_and_no_other_edge_does(kind: PlantedKind):
    for subject in subjects_of(kind)[:2]:
        truth = planted_truth(subject.item)
        # Under emission rows the row of a position is that of the next token, where the model generated that one.
        cells = [cell for cell in truth.cells() if cell[0] > 1]
        masked = []
        for reader, read in cells:
            generates = reader >= truth.prompt_length - 1
            masked.append(fg.Intervention(edges=[(read, reader + 1 if generates else reader)]))
        for cell, result in zip(cells, subject.knockouts(masked, batch_size=32), strict=True):
            if cell in truth.edges:
                assert result.change == pytest.approx(-8, abs=1e-4)
            else:
                assert result.change == pytest.approx(0, abs=ROUNDING)


@every_kind
def test_attention_of_a_match_is_one_in_float32(kind: PlantedKind):
    model, _ = planted_model(kind)
    model.set_attn_implementation("eager")
    for subject in subjects_of(kind):
        ids = subject.token_ids[None]
        with torch.no_grad():
            attentions = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        strongest = torch.stack([layer[0] for layer in attentions]).amax((0, 1))
        for reader, read in planted_truth(subject.item).edges:
            assert float(strongest[reader, read]) == 1


@every_kind
def test_texts_are_reproducible_and_gold_moves(kind: PlantedKind):
    one = planted_items(kind, "test", 40)
    assert [item.prompt for item in one[:5]] == [item.prompt for item in planted_items(kind, "test", 5)]
    prompts = {str(item.prompt) for item in one}
    assert prompts.isdisjoint(str(item.prompt) for item in planted_items(kind, "dev", 40))
    assert prompts.isdisjoint(str(item.prompt) for item in planted_items(kind, "test", 40, seed=1))
    assert len({item.id for item in one}) == 40
    places = [item.data["gold"][0] / len(item.data["candidates"]) for item in one]
    assert min(places) < 0.25
    assert max(places) > 0.5
    for item in one:
        assert item.data["gold"][-1] < len(item.data["candidates"])
        assert 0 not in item.data["gold"]


# What methods find -----------------------------------------------------------------------------------


def capacity(name: str, composition: str | None = None, **options: object) -> EvaluationMethod:
    """Explain by the scores of a trace."""

    def explain(subject: fg.Subject) -> torch.Tensor:
        if composition is None:
            return subject.trace(name, **options).scores
        return subject.trace(name, composition=composition, **options).scores

    return EvaluationMethod(f"{name} {composition or ''}".strip(), explain, "scores of a trace")


def position(sign: int) -> EvaluationMethod:
    return EvaluationMethod(
        "recency" if sign > 0 else "first tokens",
        lambda subject: sign * torch.arange(subject.num_tokens, dtype=torch.float64),
        "position",
        trivial=True,
    )


def mean_of(kind: PlantedKind, method: EvaluationMethod, figure: str = "recovered") -> float:
    values = [planted_truth(subject.item).score(method.explain(subject))[figure] for subject in subjects_of(kind)]
    return fmean(values)


@pytest.mark.parametrize("name", ["relevance", "vtrace", "vtrace_share", "gradient_positive", "value_norm"])
def test_capacities_that_read_values_find_every_lookup_by_content(name: str):
    for figure in ("recovered", "auroc", "average_precision"):
        assert mean_of("copy", capacity(name), figure) == 1
        assert mean_of("two_hop", capacity(name), figure) == 1


@pytest.mark.parametrize("name", ["vtrace", "vtrace_share"])
def test_one_hop_misses_what_is_read_through_another_token(name: str):
    assert mean_of("copy", capacity(name, "one_hop")) == 1
    assert mean_of("two_hop", capacity(name, "one_hop")) == 0.5
    assert mean_of("two_hop", capacity(name, "hops")) == 1


def test_rows_of_the_next_token_lose_what_a_generated_token_carries():
    # The hidden state of the generated token holds the value, and its row belongs to the token after it.
    kind: PlantedKind = "generated_hop"
    assert mean_of(kind, capacity("relevance")) == 1
    assert mean_of(kind, capacity("gradient_positive")) == 0.5
    assert mean_of(kind, capacity("value_norm")) == 0.5
    for subject in subjects_of(kind):
        pair, recall = planted_truth(subject.item).gold
        scores = subject.trace("gradient_positive").scores
        assert float(scores[pair]) == pytest.approx(0, abs=1e-6)
        assert float(scores[recall]) == pytest.approx(1, abs=1e-5)


def test_gradient_times_input_is_zero_for_a_token_read_through_a_norm_alone():
    # A LayerNorm undoes any scaling of its input, so the derivative along the input is 0, though the token decides.
    model, _ = planted_model("copy")
    for subject in subjects_of("copy"):
        (gold,) = planted_truth(subject.item).gold
        ids = subject.token_ids[None]
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[0, -2]
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[ids[0, -1]], embedded)
        product = float((gradient * embedded.detach())[0, gold].sum())
        norms = gradient[0].norm(dim=-1)
        assert product == pytest.approx(0, abs=1e-6)
        assert float(norms[gold]) > 0.05
        assert int(norms[: len(norms) - 2].argmax()) == gold


def test_relevance_does_not_hold_what_decides_where_a_head_reads():
    # The copied token is found; the one before it acts through the key alone, and attention weights are constants.
    assert mean_of("induction", capacity("relevance")) == 0.5
    for subject in subjects_of("induction"):
        matched, copied = planted_truth(subject.item).gold
        scores = subject.trace("relevance").scores
        assert float(scores[copied]) == pytest.approx(1, abs=1e-5)
        assert float(scores[matched]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_positions_are_at_chance_for_a_lookup(sign: int):
    figures = []
    for item in planted_items("copy", "test", 300):
        truth = planted_truth(item)
        scores = sign * torch.arange(truth.last_reader + 2, dtype=torch.float64)
        figures.append(truth.score(fg.Explanation(tokens=scores)))
    # The first token is never gold, so chance lies a little off .5.
    assert fmean(figure["auroc"] for figure in figures) == pytest.approx(0.5, abs=0.1)
    assert fmean(figure["recovered"] for figure in figures) < 0.25


def test_constant_scores_recover_nothing():
    for kind in PLANTED_KINDS:
        truth = planted_truth(planted_items(kind, "test", 1)[0])
        figures = truth.score(fg.Explanation(tokens=torch.ones(truth.last_reader + 2)))
        assert figures["recovered"] == 0
        assert figures["auroc"] == 0.5
        assert math.isnan(figures["edge_auroc"])


def test_edges_are_found_under_either_name_of_the_answers_row():
    for kind in PLANTED_KINDS:
        item = planted_items(kind, "test", 1)[0]
        truth = planted_truth(item)
        if kind == "generated_hop":
            assert math.isnan(truth.score(fg.Explanation(edges=torch.ones(20, 20)))["edge_auroc"])
            continue
        size = truth.last_reader + 2
        for shift in (0, 1):
            edges = torch.zeros(size, size)
            for reader, read in truth.edges:
                is_last = reader == truth.last_reader
                edges[reader + shift if is_last else reader, read] = 1
            figures = truth.score(fg.Explanation(edges=edges))
            assert figures["edge_auroc"] == 1
            assert figures["edge_average_precision"] == 1
            assert math.isnan(figures["auroc"])


def test_the_truth_is_plain_values_and_satisfies_the_protocol():
    truth = planted_truth(planted_items("two_hop", "dev", 1)[0])
    assert isinstance(truth, fg.Truth)
    assert truth.unusable is None
    record = truth.to_dict()
    gold = [units[0] for units, is_gold in zip(record["units"], record["gold"], strict=True) if is_gold]
    assert tuple(gold) == truth.gold
    figures = truth.score(fg.Explanation(tokens=torch.arange(truth.last_reader + 2.0)))
    assert list(figures) == [metric.name for metric in PLANTED_METRICS]


def test_a_method_that_refuses_the_model_says_so_in_the_table():
    def refuse(subject: fg.Subject) -> torch.Tensor:
        raise fg.CaptureError("model: must have experts, got none; choose another model")

    scores = planted_check([EvaluationMethod("refusing", refuse, "refuses"), position(1)], kinds=["copy"], number=2)
    assert scores[0].error == "model: must have experts, got none; choose another model"
    assert scores[0].num_items == 0
    assert scores[0].to_dict() == {
        "kind": "copy",
        "method": "refusing",
        "num_items": 0,
        "figures": dict.fromkeys([metric.name for metric in PLANTED_METRICS]),
        "error": "model: must have experts, got none; choose another model",
    }
    assert scores[1].to_dict()["figures"]["auroc"] == scores[1].figures["auroc"]
    table = planted_table(scores)
    assert "| copy | refusing | model: must have experts, got none |" in table
    assert table.splitlines()[-1].startswith("| copy | recency | 0.")


@pytest.mark.unchecked
def test_bad_arguments_are_refused():
    with pytest.raises(
        fg.InvalidInputError, match="kind: must be one of copy, induction, two_hop, generated_hop, got 'three_hop'"
    ):
        planted_model("three_hop")  # type: ignore[arg-type]
    with pytest.raises(fg.InvalidInputError, match="kind: must be one of"):
        planted_items("three_hop", "test", 1)  # type: ignore[arg-type]
    with pytest.raises(fg.InvalidInputError, match="number: must not be negative, got -1"):
        planted_items("copy", "test", -1)
    with pytest.raises(fg.InvalidInputError, match="number: must be at least 1, got 0"):
        planted_check([], number=0)
    with pytest.raises(fg.InvalidInputError, match=r"methods: must be of .*, got 'no such'"):
        planted_check(["no such"])
    with pytest.raises(
        fg.InvalidInputError, match="item: must be made by planted_items, got 'x' without kind, prompt_length, cand"
    ):
        planted_truth(fg.EvaluationItem(id="x", prompt="a"))


def test_gold_of_a_truth_can_be_given_by_hand():
    truth = PlantedTruth("copy", prompt_length=4, candidates=(0, 1, 2), gold=(1,), edges=((3, 1),))
    assert truth.score(fg.Explanation(tokens=torch.tensor([0.0, 2, 1, 9, 9])))["recovered"] == 1
    assert truth.score(fg.Explanation(tokens=torch.tensor([0.0, 1, 1, 0, 0])))["recovered"] == 0
