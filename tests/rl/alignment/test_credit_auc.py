"""The AUC instrument: ranks against counting, the two groups of tokens, intervals, sweeps and refusals."""

import json
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgraph import context_length
from rl import ConfigError, PPOConfig, TaskError, credit_auc, credit_rule, load_base_model, make_task
from rl.alignment.arms import parse_arm
from rl.alignment.auc_plot import plot_auc
from rl.alignment.graph_sweep import graphs_of
from rl.alignment.measured_policy import default_sampling
from rl.alignment.rank_auc import interval, mean_over_problems, resampled_sums, within_auc
from rl.credit import registry
from tests.fixtures.policies import Digits, alphabet, tiny_policy

SETTINGS = PPOConfig(advantage="group", num_prompts=3, group_size=4, max_response_tokens=16, micro_batch_size=7)


@dataclass(frozen=True)
class DetourDigits(Digits):
    """Letters a to c are decisive, x to z are detours."""

    def detours(self, sample, completion):
        return [(place, place + 1) for place, character in enumerate(completion) if character in "xyz"]


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def measured(rules, task=None, **options):
    return credit_auc(
        tiny_policy(), alphabet(), task or DetourDigits(), rules=rules, config=SETTINGS, num_problems=12, **options
    )  # fmt: skip


rows = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("pn-")), min_size=1, max_size=9)


@given(rows)
def test_auc_counts_the_pairs(tokens):
    scores = torch.tensor([[float(score) for score, _ in tokens]])
    positive = torch.tensor([[kind == "p" for _, kind in tokens]])
    negative = torch.tensor([[kind == "n" for _, kind in tokens]])
    pairs = [
        (high > low) + (high == low) / 2
        for (high, one), (low, other) in product(tokens, tokens)
        if one == "p" and other == "n"
    ]
    found = float(within_auc(scores, positive, negative)[0])
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else found != found


def test_interval_is_over_problems_not_over_responses():
    """Copies of a response add nothing: ten equal responses to each problem have the interval of one."""
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(40)
    once = mean_over_problems(values, groups, seed=1, resamples=2000)
    copied = mean_over_problems(values.repeat(10), groups.repeat(10), seed=1, resamples=2000)
    assert copied.n == 400
    assert copied[:3] == pytest.approx(once[:3])
    # The bootstrap of a mean: close to the normal interval.
    half = 1.96 * float(values.std(correction=0)) / 40**0.5
    assert once.low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert once.high == pytest.approx(float(values.mean()) + half, abs=0.02)


def test_interval_needs_two_problems_and_a_mean_needs_a_value():
    values = torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert mean_over_problems(values, torch.tensor([3, 3]), seed=0, resamples=10)[1:] == (None, None, 2)
    nothing = torch.full((2,), torch.nan, dtype=torch.float64)
    assert mean_over_problems(nothing, torch.tensor([0, 1]), seed=0, resamples=10) == (None, None, None, 0)
    assert interval(nothing) is None


def test_resampled_sums_have_the_mean_of_the_sums():
    contributions = torch.arange(12, dtype=torch.float64).view(2, 6)
    sums = resampled_sums(contributions, seed=0, resamples=4000)
    assert sums.shape == (4000, 2)
    assert sums.mean(0).tolist() == pytest.approx(contributions.sum(1).tolist(), rel=0.02)


def test_oracle_is_perfect_its_inverse_is_worst_and_uniform_knows_nothing(clean_registry):
    @credit_rule("inverse_oracle", needs_oracle=True)
    def inverse_oracle(batch):
        """Score detours only."""
        return batch.responses.detours.float()

    found = measured(["oracle", "inverse_oracle", "uniform", "flow", "entropy"])
    oracle, inverse, uniform, flow, entropy = found.rules
    assert (oracle.auc, oracle.low, oracle.high) == (1.0, 1.0, 1.0)
    assert (inverse.auc, uniform.auc, uniform.auc_others) == (0.0, 0.5, 0.5)
    assert inverse.auc_others < 0.5
    assert oracle.auc_others == 1.0
    assert oracle.n == inverse.n == flow.n > 3
    assert flow.n_others >= flow.n
    assert flow.unanchored_failures is not None
    assert 0 <= flow.unanchored_failures <= 1
    assert entropy.unanchored_failures is None
    assert uniform.gini == pytest.approx(0)
    assert uniform.effective_tokens == pytest.approx(1)
    assert flow.gini > 0
    assert found.num_responses == 48
    assert found.num_unanswered < 48


def test_detours_against_the_flow_that_training_would_use():
    """The scores are those of the rule itself: one response, recomputed by hand."""
    task = DetourDigits()
    found = measured(["reach"], task=task, resamples=50)
    auc: Any = found.rules[0].auc
    assert 0 < auc < 1
    again = measured(["reach"], task=task, resamples=50)
    assert again == found


def test_the_sharpened_flow_finds_used_work_on_the_shipped_model():
    """The figures of docs/credit.md on a part of the problems: .82 and .66 on 64 problems."""
    model, tokenizer = load_base_model("wandering")
    task = make_task("wandering", level="0:5")
    found = credit_auc(model, tokenizer, task, rules=["flow_sharp", "flow"], num_problems=16)
    sharp, plain = found.rules
    assert sharp.low is not None
    assert plain.high is not None
    assert sharp.low > 0.7
    assert plain.high < sharp.low


def test_missing_masks_name_the_hook():
    class Nothing(DetourDigits):
        def oracle(self, sample, completion):
            return None

    with pytest.raises(TaskError, match=r"task: must mark the characters of unused work, got 'digits', whose method"):
        measured(["flow"], task=Digits())
    with pytest.raises(TaskError, match=r"'detours' is missing or returns None; define detours\(sample, completion\)"):
        measured(["flow"], task=Digits())
    with pytest.raises(TaskError, match=r"that the answer depends on, got 'digits', whose method 'oracle' is missing"):
        measured(["flow"], task=Nothing())


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"rules: must be a list of rules, got the text 'flow'; pass \['flow'\]"):
        measured("flow")
    with pytest.raises(ConfigError, match="rules: must name at least one rule, got none; pass"):
        measured([])
    with pytest.raises(ConfigError, match="resamples: must be an integer of at least 1, got 0"):
        measured(["flow"], resamples=0)
    with pytest.raises(ConfigError, match="rules: must read attention to be swept over graphs, got 'entropy'"):
        measured(["entropy"], sweep=True)


def test_sweep_chooses_on_one_half_and_reports_the_other():
    found = measured(["reach"], sweep=True, resamples=50)
    assert len(found.rules) == len(graphs_of(parse_arm("reach"), tiny_policy())) == found.best.num_graphs
    best: Any = found.best
    assert best.rule in {row.rule for row in found.rules}
    row: Any = next(row for row in found.rules if row.rule == best.rule)
    # The mean over all responses lies between those of the two halves.
    assert min(best.auc, best.chosen_auc) <= row.auc <= max(best.auc, best.chosen_auc)
    assert best.n < row.n


def test_sweep_of_a_sharpened_rule_goes_over_powers():
    graphs = graphs_of(parse_arm("reach_sharp:soft:fallback=0.5,options.normalization=leak"), tiny_policy())
    assert {graph.options["power"] for graph in graphs} == {1, 2, 4, 8}
    assert {graph.options["layers"] for graph in graphs} == {"all", "1-", "0-0", "1-1"}
    assert all(graph.options["normalization"] == "leak" and graph.fallback == 0.5 for graph in graphs)
    found = measured(["reach_sharp:soft:fallback=0.5"], sweep=True, resamples=10)
    assert found.best.rule.startswith("reach_sharp:soft:fallback=0.5,options.power=")


def test_json_is_a_list_of_rows_and_the_picture_is_drawn(tmp_path):
    found = measured(["oracle", "flow:soft"], resamples=20)
    found.to_json(tmp_path / "auc.json")
    rows = json.loads((tmp_path / "auc.json").read_text())
    assert [row["rule"] for row in rows] == ["oracle", "flow:soft"]
    assert {"rule", "auc", "low", "high", "n", "end_weight", "opener_weight", "unanchored_failures"} <= rows[0].keys()
    assert rows[1]["task"] == repr(DetourDigits())
    assert plot_auc(found, tmp_path / "auc.png").read_bytes().startswith(b"\x89PNG")
    assert "oracle 1.00" in repr(found)


def test_the_default_sampling_fits_a_short_context():
    model = tiny_policy()
    context = context_length(model)
    assert context is not None
    assert default_sampling(model).max_response_tokens == min(256, context // 2)
    model.config.max_position_embeddings = 100
    assert default_sampling(model, group_size=2).max_response_tokens == 50
    assert default_sampling(model, group_size=2).group_size == 2
