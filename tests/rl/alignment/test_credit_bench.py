"""The token-credit benchmark: values against exact enumeration, figures against slow twins, resumption, refusals."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats

from flowgraph import OutputError
from rl import ConfigError, LoraConfig, PPOConfig, credit_bench, credit_rule
from rl.alignment.arms import named_arms, score_arms
from rl.alignment.credit_bench import (
    _advantages,
    _cosine_of,
    _gradient_products,
    _spearman,
    _top,
    _unit_of_token,
    concordance,
)
from rl.alignment.measured_policy import policy_on
from rl.alignment.monte_carlo import STEP_END, PrefixValues, Sampler, ValuesFile, _complete, judged_again
from rl.credit import registry
from rl.policy.sampling import Ending
from rl.rollouts.rollout import PromptEncoder
from tests.fixtures.policies import Digits, alphabet, tiny_policy

SETTINGS = PPOConfig(
    advantage="group", num_prompts=2, group_size=2, max_response_tokens=6, micro_batch_size=16,
    lora=LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "v_proj"]),
)  # fmt: skip


@dataclass(frozen=True)
class FirstDigit(Digits):
    """Digits with a detour mask, so that every rule runs."""

    def detours(self, sample, completion):
        return []


def sampler(num_rollouts=8, step_end=None, **settings):
    config = replace(SETTINGS, **settings)
    return Sampler(tiny_policy(), alphabet(), FirstDigit(), config, num_rollouts, step_end, 512)


def benched(rules, path=None, **options):
    defaults = {"num_problems": 3, "num_rollouts": 4, "resamples": 50}
    return credit_bench(
        tiny_policy(), alphabet(), FirstDigit(), rules=rules, config=SETTINGS, path=path, **{**defaults, **options}
    )  # fmt: skip


# Values -------------------------------------------------------------------------------------------------


def exact_value(model, tokenizer, task, prompt, response, limit):
    """Expected reward from a prefix, by enumeration of every continuation up to the limit."""
    sample = task.sample("train", 0)
    end = tokenizer.eos_token_id
    if response and (response[-1] == end or len(response) == limit):
        text = tokenizer.decode([token for token in response if token != end])
        return task.reward(sample, text)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt + response])).logits[0, -1].double().softmax(0)
    total = 0.0
    for token, probability in enumerate(probabilities.tolist()):
        total += probability * exact_value(model, tokenizer, task, prompt, [*response, token], limit)
    return total


def test_values_are_those_of_exact_enumeration():
    source = sampler(num_rollouts=300, max_response_tokens=2)
    encoder = PromptEncoder(source.tokenizer, source.model, 100, 2)
    prompt = encoder.ids(source.task.sample("train", 0))
    for measured in source.measure(0):
        assert measured.prefixes == list(range(len(measured.ids) + 1))
        for place, length in enumerate(measured.prefixes):
            truth = exact_value(source.model, source.tokenizer, source.task, prompt, measured.ids[:length], 2)
            found = (measured.first_half[place] + measured.second_half[place]) / 2
            assert found == pytest.approx(truth, abs=0.1)
            if length == 0:
                assert measured.start_value == pytest.approx(truth, abs=0.1)
        # The value of the whole response is its reward, so the advantages sum to it less the value of the prompt.
        first, second = _advantages(measured)
        assert measured.first_half[-1] == measured.second_half[-1] == measured.reward
        assert float(first.sum()) == pytest.approx(measured.reward - measured.first_half[0])
        assert float(second.sum()) == pytest.approx(measured.reward - measured.second_half[0])


def test_values_do_not_depend_on_the_batch_size():
    one = sampler(num_rollouts=4)
    assert one.measure(1) == replace(one, batch_size=7).measure(1)


def test_a_continuation_ends_at_an_end_token_a_stop_string_or_the_limit():
    ending = Ending((1,), 0)
    assert _complete([5, 6], [7, 1, 9], ending, 10) == ([5, 6, 7, 1], False)
    assert _complete([5, 6], [7, 8, 1], ending, 4) == ([5, 6, 7, 8], True)
    tokenizer = alphabet()
    stops = Ending.of(tiny_policy(), tokenizer, ["ab"])
    ids: Any = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    a, b, c = ids
    # The stop string begins in the prefix and is completed by the continuation.
    assert _complete([c, a], [b, c], stops, 10) == ([c, a, b], False)
    assert _complete([a, b], [c], stops, 10)[0] == [a, b, c]


def test_steps_share_an_advantage():
    source = sampler(step_end=r"[a-m]")
    measured = source.measure(0)[0]
    text = source.tokenizer.decode(measured.ids)
    assert measured.prefixes[0] == 0
    assert measured.prefixes[-1] == len(measured.ids)
    for start in measured.prefixes[1:-1]:
        assert text[start - 1] in "abcdefghijklm"
    units = _unit_of_token(measured.prefixes)
    assert len(units) == len(measured.ids)
    assert int(units.max()) + 1 == len(measured.prefixes) - 1
    assert STEP_END


# Figures ------------------------------------------------------------------------------------------------


def test_rank_figures_against_scipy_and_counting():
    random = torch.Generator().manual_seed(0)
    score = torch.randint(4, (30,), generator=random).double()
    truth = torch.randint(5, (30,), generator=random).double()
    assert _spearman(score, truth) == pytest.approx(stats.spearmanr(score.numpy(), truth.numpy()).statistic)
    pairs = [(i, j) for i in range(30) for j in range(30) if truth[i] > truth[j]]
    right = sum((score[i] > score[j]) + (score[i] == score[j]) / 2 for i, j in pairs)
    assert concordance(score, truth) == pytest.approx(float(right) / len(pairs))
    assert _spearman(torch.ones(4).double(), truth[:4]) == 0.0
    assert math.isnan(_spearman(truth[:4], torch.ones(4).double()))
    assert math.isnan(concordance(score, torch.ones(30).double()))
    assert _top(torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0]).double(), 0.4).tolist() == [1, 2]


def test_cosine_without_noise_is_that_of_the_concatenated_gradients():
    random = torch.Generator().manual_seed(1)
    own = torch.randn(5, 7, generator=random, dtype=torch.float64)
    true = torch.randn(5, 7, generator=random, dtype=torch.float64)
    sums = torch.stack([(own * true).sum(), own.square().sum(), true.square().sum()])[None]
    expected = torch.cosine_similarity(own.flatten(), true.flatten(), dim=0)
    assert float(_cosine_of(sums)) == pytest.approx(float(expected))
    sums[0, 2] = -1.0
    assert math.isnan(float(_cosine_of(sums)))


def test_split_halves_remove_the_noise_of_the_truth():
    """The squared advantage of noisy halves is too large; their product is right on average."""
    random = torch.Generator().manual_seed(2)
    truth = torch.tensor([1.0, 0.0, -0.5, 0.25]).double()
    noise = torch.randn(2, 20_000, 4, generator=random, dtype=torch.float64)
    first, second = truth + noise[0], truth + noise[1]
    assert float((first * second).sum(1).mean()) == pytest.approx(float(truth.square().sum()), abs=0.05)
    assert float(((first + second) / 2).square().sum(1).mean()) > float(truth.square().sum()) + 1.5


def test_gradients_are_sums_of_weighted_score_functions():
    """<g, t> and |g|^2 from one token at a time."""
    source = sampler(num_rollouts=8)
    arms = named_arms(["uniform", "oracle:soft"])
    with policy_on(tiny_policy(), SETTINGS) as policy:
        policy_sampler = replace(source, model=policy.causal_lm)
        measured = policy_sampler.measure(0)
        responses = judged_again(policy_sampler, measured)
        assert responses.rewards.tolist() == [one.reward for one in measured]
        _, credits = score_arms(policy, responses, list(arms.values()), SETTINGS, step=0)
        halves = [_advantages(one) for one in measured]
        products, square = _gradient_products(policy, responses, measured, halves, credits, arms, SETTINGS)

        own = [torch.zeros(()), torch.zeros(())]
        true = [torch.zeros(()), torch.zeros(())]
        parameters = list(policy.policy_parameters().values())
        for row, one in enumerate(measured):
            ids = torch.tensor([responses.input_ids[row][responses.attention_mask[row]].tolist()])
            for place in range(len(one.ids)):
                position = ids.shape[1] - len(one.ids) + place
                logits = policy.causal_lm(input_ids=ids[:, :position]).logits[0, -1]
                score = torch.autograd.grad(logits.log_softmax(0)[one.ids[place]], parameters)
                flat = torch.cat([part.flatten() for part in score])
                for index, credit in enumerate(credits):
                    own[index] = own[index] + flat * credit.weights[row, place] * (one.reward - one.start_value)
                for half in (0, 1):
                    true[half] = true[half] + flat * float(halves[row][half][place])
    for index in (0, 1):
        inner = float(own[index] @ (true[0] + true[1]) / 2)
        assert float(products[index, 0]) == pytest.approx(inner, rel=1e-3, abs=1e-6)
        assert float(products[index, 1]) == pytest.approx(float(own[index].square().sum()), rel=1e-3)
    assert square == pytest.approx(float(true[0] @ true[1]), rel=1e-3, abs=1e-6)


def test_a_rule_that_knows_the_advantages_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    path = tmp_path / "values.jsonl"
    benched(["uniform"], path=path, num_rollouts=12)
    known = {}
    for line in path.read_text().splitlines()[1:]:
        for one in json.loads(line)["responses"]:
            mean = [(a + b) / 2 for a, b in zip(one["first_half"], one["second_half"], strict=True)]
            known[one["problem"], one["number"]] = [round(abs(after - before), 9) for before, after in pairwise(mean)]

    @credit_rule("truth")
    def truth(batch):
        """Score a token by its measured advantage."""
        scores = torch.zeros(batch.scored.shape)
        for row in range(len(scores)):
            values = known[int(batch.responses.groups[row]), row]
            scores[row, : len(values)] = torch.tensor(values)
        return scores

    found = benched(["truth:soft:floor=0,ceiling=1000", "random:soft"], path=path, num_rollouts=12)
    uniform, best, random = found.rules
    assert best.rank.value == pytest.approx(1.0)
    assert best.auc.value == pytest.approx(1.0)
    assert (uniform.rank.value, uniform.auc.value) == (0.0, 0.5)
    assert random.rank.value < 1
    assert best.top_share.value is None or best.top_share.value > best.top_units
    assert uniform.cosine_gain.value in (0.0, None)


# The run ------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_and_other_settings_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "values.jsonl"
    whole = benched(["flow:soft"], path=path)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_text("".join(lines[:2]) + lines[2][:20])
    started = []
    measure = Sampler.measure

    def counted(self, problem):
        started.append(problem)
        return measure(self, problem)

    monkeypatch.setattr(Sampler, "measure", counted)
    assert benched(["flow:soft"], path=path) == whole
    assert started == [1, 2]
    assert path.read_text() == "".join(lines)
    with pytest.raises(ConfigError, match=r"out: must hold values of the same settings, got .* with num_rollouts 4"):
        benched(["flow:soft"], path=path, num_rollouts=6)
    path.write_text("other\n")
    with pytest.raises(ConfigError, match=r"out: must hold values of a credit benchmark, got .*; choose another"):
        benched(["flow:soft"], path=path)
    with pytest.raises(OutputError, match="out: must hold a file that can be written"):
        ValuesFile(tmp_path, {})
    assert ValuesFile(None, {}).get(0) is None


def test_too_few_rollouts_or_problems_for_an_interval_are_refused():
    with pytest.raises(ConfigError, match=r"num_rollouts: must be an even number of at least 4, .*, got 2; take 16"):
        benched(["flow"], num_rollouts=2)
    with pytest.raises(ConfigError, match="num_rollouts: must be an even number"):
        benched(["flow"], num_rollouts=5)
    with pytest.raises(ConfigError, match="num_problems: must be at least 3 for an interval over problems, got 2"):
        benched(["flow"], num_problems=2)
    with pytest.raises(ConfigError, match=r"share: must lie in \(0, 1\], got 0; 0.4 is the paper's"):
        benched(["flow"], share=0)
    with pytest.raises(ConfigError, match="rules: must be a list of rules, got the text 'flow'"):
        benched("flow")


def test_result_as_table_and_json(tmp_path):
    found = benched(["flow:soft", "max_attention"])
    found.to_json(tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [row["rule"] for row in content["rules"]] == ["uniform", "flow:soft", "max_attention"]
    assert {"rank", "rank_low", "rank_high", "auc", "top_share", "top_units", "cosine_gain_low"} <= set(
        content["rules"][0]
    )
    assert content["reliable"] == found.is_reliable
    assert content["num_responses"] == 6
    assert isinstance(found.rules[0].top_units, float)
    assert "CreditBench(uniform 0.00" in repr(found)
    assert PrefixValues(0, 0, [1], False, 1.0, [0, 1], [0.5, 1.0], [0.5, 1.0], 0.5).reward == 1.0
