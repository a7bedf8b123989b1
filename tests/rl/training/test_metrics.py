"""The figures of a step's weights: how uneven they are, and where they fall."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rl import CreditConfig, LoraConfig, PPOConfig, PPOTrainer
from rl.credit.weights import effective_token_ratio, gini
from rl.training.metrics import Averages, step_averages
from tests.fixtures.policies import Digits, alphabet, tiny_policy


@pytest.mark.parametrize("weights", [[1.0, 1, 1], [0.5, 2.0, 1.0, 0.25], [0.0, 0, 3], [5.0]])
def test_unevenness_is_its_definition(weights: list[float]):
    count = len(weights)
    pairs = sum(abs(a - b) for a, b in itertools.product(weights, weights))
    assert gini(torch.tensor(weights)) == pytest.approx(pairs / (2 * count * sum(weights)))
    squares = sum(w * w for w in weights)
    assert effective_token_ratio(torch.tensor(weights)) == pytest.approx(sum(weights) ** 2 / (count * squares))


def test_no_weights_are_even():
    for weights in (torch.zeros(0), torch.zeros(3)):
        assert gini(weights) == 0.0
        assert effective_token_ratio(weights) == 1.0


def test_a_step_logs_what_its_weights_do():
    config = PPOConfig(
        steps=1, num_prompts=3, group_size=2, max_response_tokens=10, advantage="group", lora=LoraConfig(rank=2),
        credit=CreditConfig(rule="reach", shape="soft", fallback=0.9),
    )  # fmt: skip
    run = PPOTrainer(tiny_policy(), alphabet(), task=Digits(), config=config, progress=False)
    experience = run.collect()
    responses = experience.responses
    # Weights that say where they stand: the column of each token.
    column = torch.arange(responses.response_length).float().expand(responses.response_mask.shape) + 1
    experience = replace(experience, policy_weights=column)
    means = step_averages(Averages(), experience, config, kl_weight=0.0).means()

    ends = [int(mask.sum()) for mask, cut in zip(responses.response_mask, responses.truncated, strict=True) if not cut]
    if ends:
        assert means["weight_end"] == pytest.approx(sum(ends) / len(ends))
    firsts = [row.nonzero()[0].item() for row in responses.answer_in_response if row.any()]
    openers = [first for first in firsts if first > 0]
    assert openers
    assert means["weight_answer_opener"] == pytest.approx(sum(openers) / len(openers))

    of_responses = [row[mask] for row, mask in zip(column, responses.response_mask, strict=True)]
    unevenness = [gini(weights) for weights in of_responses]
    effective = [effective_token_ratio(weights) for weights in of_responses]
    assert means["weight_gini"] == pytest.approx(sum(unevenness) / len(unevenness))
    assert means["effective_token_ratio"] == pytest.approx(sum(effective) / len(effective))
    assert experience.credit.unanchored is not None
    assert means["unanchored_share"] == pytest.approx(float(experience.credit.unanchored.float().mean()))
    assert 0 < means["unanchored_share"] < 1
