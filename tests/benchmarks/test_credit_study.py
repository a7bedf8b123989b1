"""The study harness: the log, the choice of rates, the families of tests, and a run."""

import json
import math
import statistics

import pytest
from benchmarks.study import credit_study, paired_runs
from benchmarks.study.credit_study import Job, Level, best_rates, chosen, credit_of, one_run, report, run_key
from benchmarks.study.paired_runs import add_holm, finished, paired_test, run_all, sign_flip_p

from rl import ConfigError, CreditConfig, PPOConfig

LEVEL = "program"


def finished_run(arm, rate, seed, rewards, **more):
    return {
        "key": run_key(LEVEL, arm, rate, seed), "level": LEVEL, "arm": arm, "learning_rate": rate, "seed": seed,
        "reward": rewards, "credit_overhead_percent": 1.0, "seconds": 1.0, **more,
    }  # fmt: skip


def test_an_interrupted_log_keeps_its_complete_lines_and_goes_on(tmp_path):
    log = tmp_path / "runs.jsonl"
    log.write_text('{"key": "a", "reward": [1.0], "seconds": 0}\n{"key": "b", "rew')
    assert list(finished(log)) == ["a"]
    started = []

    class Inline:
        """An executor in this process."""

        def __init__(self, workers, mp_context):
            self.workers = workers

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def submit(self, function, job):
            started.append(job)
            return function(job)

    def one(job):
        return type("Done", (), {"result": lambda self: {"key": job, "reward": [0.5], "seconds": 0.0}})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired_runs, "ProcessPoolExecutor", Inline)
        patch.setattr(paired_runs, "as_completed", lambda futures: futures)
        run_all(["a", "b", "c"], one_run=one, key_of=str, log=log, workers=1)
    assert started == ["b", "c"]
    assert list(finished(log)) == ["a", "b", "c"]


def test_sign_flip_test_is_exact_for_few_pairs_and_close_for_many():
    assert sign_flip_p([1.0, 1.0, 1.0]) == 0.25
    assert sign_flip_p([1.0, -1.0]) == 1.0
    # 20 pairs of one sign: 2 of 2^20 patterns are as extreme; drawn patterns count the observed one.
    assert 0 < sign_flip_p([1.0] * 20) < 1e-4


def test_paired_test_uses_the_seeds_that_both_have():
    test = paired_test({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5, 3: 0.0})
    assert test is not None
    assert test["n"] == 2
    assert test["difference"] == pytest.approx(0.15)
    # t quantile with one degree of freedom.
    assert test["half_width"] == pytest.approx(12.7062 * statistics.stdev([0.1, 0.2]) / math.sqrt(2), rel=1e-4)
    assert paired_test({0: 1.0}, {0: 0.0}) is None
    tests = [{"p": 0.01}, {"p": 0.04}]
    add_holm(tests)
    assert [test["p_holm"] for test in tests] == [0.02, 0.04]


def test_each_arm_takes_its_best_rate_and_a_failed_rate_is_none():
    runs = {}
    for seed in credit_study.GRID_SEEDS:
        for rate, reward in zip(credit_study.LEARNING_RATES, (0.2, 0.4, 0.9), strict=True):
            run = finished_run("uniform", rate, seed, [reward])
            if reward == 0.9 and seed == credit_study.GRID_SEEDS[0]:
                run = {"key": run["key"], "error": "the policy diverged", "seconds": 1.0}
            runs[run["key"]] = run
    assert best_rates(runs, [LEVEL], ["uniform", "oracle"]) == {(LEVEL, "uniform"): credit_study.LEARNING_RATES[1]}


def test_report_names_the_family_and_every_difference(tmp_path):
    rate = credit_study.LEARNING_RATES[0]
    gains = {"uniform": 0.0, "max_attention": 0.1, "recommended": 0.3}
    with (tmp_path / "credit_study.jsonl").open("w") as log:
        for arm, gain in gains.items():
            for other in credit_study.LEARNING_RATES:
                for seed in credit_study.GRID_SEEDS:
                    rewards = [0.2 if other == rate else 0.1] * 2
                    log.write(json.dumps(finished_run(arm, other, seed, rewards)) + "\n")
            for seed in range(3):
                run = finished_run(arm, rate, seed, [0.2 + gain + 0.01 * seed] * 2, accuracy=0.5 + gain)
                log.write(json.dumps(run) + "\n")
    report(tmp_path, [LEVEL], list(gains), num_seeds=3, steps=2)
    content = json.loads((tmp_path / "credit_study.json").read_text())
    named = [test for test in content["tests"] if test["family"] == "named"]
    assert [(test["arm"], test["against"]) for test in named] == [
        ("recommended", "uniform"),
        ("recommended", "max_attention"),
    ]
    assert named[0]["difference"] == pytest.approx(0.3)
    assert named[0]["p"] == 0.25
    assert named[0]["p_holm"] == 0.5
    exploratory = {(t["arm"], t["against"], t["metric"]) for t in content["tests"] if t["family"] == "exploratory"}
    assert ("recommended", "uniform", "accuracy") in exploratory
    assert ("recommended", "uniform", "area") not in exploratory
    assert content["variants"] == len(gains) * len(credit_study.LEARNING_RATES)


def test_a_run_reports_both_metrics_under_the_key_of_its_job(monkeypatch):
    monkeypatch.setitem(credit_study.LEVELS, "chain", Level("chain", {}, max_response_tokens=40))
    monkeypatch.setattr(credit_study, "HELD_OUT", 8)
    job = Job("chain", "uniform", 1e-3, 5, steps=1, evaluates=True)
    run = one_run(job)
    assert run["key"] == "chain | uniform | 0.001 | 5"
    assert len(run["reward"]) == 1
    assert 0 <= run["accuracy"] <= 1


def test_levels_give_their_graph_to_rules_on_the_sharpened_graph_only():
    level = Level("pathsearch", {}, graph={"layers": "0-0"})
    assert credit_of(level, "flow_sharp wide")["options"] == {"layers": "0-0"}
    assert "options" not in credit_of(level, "max_attention")
    assert credit_of(level, "reach_pre")["options"]["place"] == "pre"
    assert "options" not in credit_study.ARMS["flow_sharp wide"]


def test_a_wrong_name_or_another_length_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--arms: must be of .*uniform.*, got 'unifrom'; separate names with commas"):
        chosen("unifrom", list(credit_study.ARMS), "arms")
    log = tmp_path / "credit_study.jsonl"
    log.write_text(json.dumps(finished_run("uniform", 1e-3, 0, [0.1, 0.2])) + "\n")
    with pytest.raises(ConfigError, match=r"--steps: must be that of the runs in .*, got 5 and a run of 2; give --out"):
        credit_study.check_log(log, 5)


def test_every_arm_is_valid_at_every_level_and_recommended_is_the_recommended_one():
    credit_study.check_arms(list(credit_study.ARMS), list(credit_study.LEVELS))
    assert CreditConfig(**credit_study.ARMS["recommended"]) == CreditConfig.recommended()


def test_settings_are_those_of_the_study():
    config = PPOConfig.from_dict(credit_study.SETTINGS)
    assert (config.num_prompts, config.group_size, config.steps, config.num_minibatches) == (4, 4, 100, 2)
    assert (config.adam_beta1, config.adam_beta2, config.kl_weight, config.lora.rank) == (0.9, 0.99, 0.0, 8)
