"""Perturbation tasks: their values are those of the model on the perturbed text, measured once each."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from flowgraph import EvaluationItem, Explanation, InvalidInputError, Subject, knockout
from flowgraph.evaluation.catalogue import find_task
from flowgraph.evaluation.tasks.perturbation import PerturbationTruth, PerturbedAnswers, deletion, insertion
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny_model
from tests.fixtures.tokenizers import byte_level


@cache
def subject() -> Subject:
    return Subject(tiny_model(2048), byte_level(), EvaluationItem("one", chat(PROMPT), RESPONSE))


class Additive(PerturbedAnswers):
    """Answers whose probability is the sum of the weights of the tokens that are kept: the truth is known."""

    def __init__(self, weights: np.ndarray) -> None:
        self.candidates = list(range(len(weights)))
        self.perturbation = "mask"
        self.weights = weights

    def ends(self) -> tuple[float, float]:
        return float(self.weights.sum()), 0.0

    def values(self, kept: np.ndarray) -> np.ndarray:
        return kept @ self.weights


WEIGHTS = np.array([0.001, 0.3, 0.02, 0.001, 0.001, 0.2, 0.001, 0.001, 0.1, 0.001, 0.001, 0.05])


def figures_of(kind: str, scores: np.ndarray) -> dict[str, float]:
    truth = PerturbationTruth(kind, Additive(WEIGHTS))
    assert truth.unusable is None
    return dict(truth.score(Explanation(tokens=torch.tensor(scores))))


def test_the_perfect_explanation_is_best_the_reversed_one_worst_and_random_ones_between():
    rng = np.random.default_rng(0)
    names = {
        "deletion": "rise_deletion",
        "insertion": "rise_insertion",
        "comprehensiveness": "comprehensiveness",
        "sufficiency": "sufficiency",
    }
    for kind, name in names.items():
        sign = 1 if find_task(kind).metrics[0].higher_is_better else -1
        perfect = sign * figures_of(kind, WEIGHTS)[name]
        reversed_order = sign * figures_of(kind, -WEIGHTS)[name]
        others = [sign * figures_of(kind, rng.random(12))[name] for _ in range(60)]
        assert perfect >= max(others) > min(others) >= reversed_order
        assert perfect > np.mean(others) > reversed_order
    # A random order loses in proportion to the tokens: 10, 8, 7, ... 0 of twelve are kept after each of ten groups.
    areas = [figures_of("deletion", rng.random(12))["rise_deletion"] for _ in range(300)]
    expected = (12 / 2 + sum([10, 8, 7, 6, 5, 4, 3, 2, 1])) / 12 / 10
    assert np.mean(areas) == pytest.approx(expected, abs=0.03)


def test_the_right_magnitudes_are_rewarded_by_mas():
    right = figures_of("deletion", WEIGHTS)
    flat = figures_of("deletion", WEIGHTS.argsort().argsort() / 1e3 + 1)
    assert flat["rise_deletion"] == pytest.approx(right["rise_deletion"])
    assert flat["mas_deletion"] > right["mas_deletion"] + 0.1
    assert right["mas_deletion"] == pytest.approx(right["rise_deletion"], abs=1e-6)


def test_comprehensiveness_and_sufficiency_worked_by_hand():
    share = WEIGHTS / WEIGHTS.sum()
    # 1, 5, 10, 20 and 50 % of 12 tokens are 1, 1, 2, 3 and 6 tokens.
    best = np.sort(share)[::-1].cumsum()
    expected = np.mean([best[0], best[0], best[1], best[2], best[5]])
    assert figures_of("comprehensiveness", WEIGHTS)["comprehensiveness"] == pytest.approx(expected)
    assert figures_of("sufficiency", WEIGHTS)["sufficiency"] == pytest.approx(1 - expected)


def test_masked_values_are_those_of_knock_outs():
    answers = PerturbedAnswers(subject())
    rng = np.random.default_rng(1)
    kept = rng.random((7, len(answers.candidates))) < 0.5
    values = answers.values(kept)
    for mask, value in zip(kept, values, strict=True):
        tokens = np.asarray(answers.candidates)[~mask].tolist()
        alone = knockout(subject().model, subject().base, tokens=tokens)
        assert value == pytest.approx(float(alone.after.mean().exp()), rel=1e-4)


def test_removed_values_are_those_of_the_shorter_text():
    answers = PerturbedAnswers(subject(), "remove")
    kept = np.ones((2, len(answers.candidates)), dtype=bool)
    kept[1, ::3] = False
    full, shorter = answers.values(kept)
    assert full == pytest.approx(PerturbedAnswers(subject()).values(kept[:1])[0], rel=1e-4)

    removed = set(np.asarray(answers.candidates)[::3].tolist())
    places = [place for place in range(subject().num_tokens) if place not in removed]
    ids = subject().token_ids[places]
    with torch.no_grad():
        logprobs = subject().model(ids[None]).logits[0].double().log_softmax(-1)
    answer = [index for index, place in enumerate(places) if bool(subject().answer[place])]
    expected = np.mean([float(logprobs[index - 1, ids[index]]) for index in answer])
    assert shorter == pytest.approx(math.exp(expected), rel=1e-4)
    assert shorter != pytest.approx(PerturbedAnswers(subject()).values(kept[1:])[0], rel=1e-3)


def test_each_set_of_tokens_is_measured_once_and_shared_between_tasks():
    fresh = Subject(subject().model, subject().tokenizer, subject().item)
    truth = deletion(fresh)
    assert truth.answers.num_measured == 2
    scores = Explanation(tokens=torch.arange(fresh.num_tokens, dtype=torch.float64))
    first = truth.score(scores)
    assert truth.answers.num_measured == 2 + 9
    assert truth.score(scores) == first
    assert truth.answers.num_measured == 2 + 9
    other = insertion(fresh)
    assert other.answers is truth.answers
    other.score(scores)
    assert truth.answers.num_measured == 2 + 9 + 9


def test_values_do_not_depend_on_what_was_measured_before():
    rng = np.random.default_rng(2)
    first = PerturbedAnswers(subject())
    orders = [rng.permutation(len(first.candidates)) for _ in range(3)]
    masks = [np.array([order < size for size in (90, 40, 7)]) for order in orders]
    forwards = [first.values(mask) for mask in masks]
    second = PerturbedAnswers(subject())
    backwards = [second.values(mask) for mask in masks[::-1]][::-1]
    assert all(np.array_equal(one, other) for one, other in zip(forwards, backwards, strict=True))


def test_candidates_are_question_and_reasoning():
    assert PerturbedAnswers(subject()).candidates == subject().positions(subject().question | subject().reasoning)


def test_items_that_decide_nothing_say_why():
    nothing = PerturbationTruth("deletion", Additive(np.zeros(12)))
    assert "all effects are 0 or below" in (nothing.unusable or "")
    harmful = PerturbationTruth("deletion", Additive(np.array([*[-0.01] * 11, 0.0])))
    assert "all effects are 0 or below" in (harmful.unusable or "")
    short = PerturbationTruth("insertion", Additive(WEIGHTS[:4]))
    assert "4 tokens of question and reasoning, fewer than the 10" in (short.unusable or "")
    assert short.to_dict()["full"] is None


def test_removal_is_an_option_of_the_same_tasks():
    task = find_task("deletion:remove")
    assert task.name == "deletion_remove"
    truth = task.function(subject())
    assert truth.answers.perturbation == "remove"
    assert truth.to_dict()["perturbation"] == "remove"
    assert set(truth.score(Explanation(tokens=torch.rand(subject().num_tokens)))) == {"rise_deletion", "mas_deletion"}
    assert find_task("deletion:mask") == find_task("deletion")
    with pytest.raises(InvalidInputError, match="must name the perturbation 'mask' or 'remove' after 'deletion'"):
        find_task("deletion:blank")


@pytest.mark.unchecked
def test_another_perturbation_is_refused():
    with pytest.raises(InvalidInputError, match="perturbation: must be 'mask' or 'remove', got 'blank'"):
        PerturbedAnswers(subject(), "blank")
