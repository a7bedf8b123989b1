import json
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from flowgraph import MemoryLimitError, MissingExtraError, OutputError, holm
from rl import ActorCritic, ConfigError, CreditConfig, CreditError, DivergedError, LoraConfig, PPOConfig, align
from rl.alignment.arms import arm_name, named_arms, parse_arm, score_arms, split_arms
from rl.alignment.gradients import decompose_weights, inner_products, policy_gradients
from rl.alignment.multipliers import (
    SCHEMA,
    Estimate,
    Products,
    compare,
    cosines,
    jackknife,
    multipliers,
    projected_cosines,
    signal_shares,
)
from rl.alignment.plot import plot_alignment
from rl.credit.scope import after_answer
from rl.credit.scoring import score_rollout
from rl.rollouts.rollout import PromptEncoder, judge, sample_responses
from rl.training.experience import build_experience
from tests.fixtures.policies import Digits, UnmarkedDigits, alphabet, tiny_policy
from tests.reference import rl_align as slow

ARMS = [
    "random", "flow", "flow:soft", "flow:strength=3", "oracle:only_top:share=0.3", "entropy:bottom_q",
    "entropy:sign=asymmetric,mean_one=true",
]  # fmt: skip
SETTINGS = PPOConfig(
    advantage="group", num_prompts=3, group_size=4, max_response_tokens=12, micro_batch_size=5, temperature=0.9,
    kl_coefficient=0.0, lora=LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "v_proj"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return align(tiny_policy(), alphabet(), Digits(), arms=ARMS, config=SETTINGS, num_batches=4, seed=3)


class Unsolvable(Digits):
    def reward(self, sample, completion):
        return 0.0


def separate_gradients(arms: list[CreditConfig], num_batches: int, seed: int) -> list[list[list[float]]]:
    """By arm and batch: the training path for each arm by itself, and a backward pass for each gradient."""
    config = PPOConfig.from_dict({**SETTINGS.to_dict(), "seed": seed})
    policy = ActorCritic(tiny_policy(), config.lora, critic=False, seed=seed)
    task, tokenizer = Digits(), alphabet()
    encoder = PromptEncoder(tokenizer, policy.causal_lm, config.max_prompt_tokens, config.max_response_tokens)
    found: list[list[list[float]]] = [[] for _ in arms]
    for step in range(num_batches):
        samples = [task.sample("train", 3 * step + k) for k in range(3)]
        generated = sample_responses(
            policy.causal_lm, encoder, samples, group_size=4, max_response_tokens=12, temperature=0.9, seed=seed,
            step=step,
        )  # fmt: skip
        responses = judge(task, tokenizer, [sample for sample in samples for _ in range(4)], generated)
        for index, arm in enumerate(arms):
            scored = score_rollout(
                policy, responses, arm, temperature=0.9, micro_batch_size=12, seed=seed, step=step, reference=False
            )
            own = PPOConfig.from_dict({**config.to_dict(), "credit": arm.__dict__})
            view = build_experience(responses, scored.scores, scored.credit, own, kl_weight=0.0)
            gradient = slow.loss_gradient(
                policy, responses, view.advantages, view.policy_weights, view.loss_mask, config.temperature
            )
            found[index].append(gradient.tolist())
    return found


def test_every_arm_equals_gradients_computed_one_by_one(measured):
    arms = [arm.credit for arm in measured.arms]
    uniform, *others = separate_gradients(arms, 4, seed=3)
    assert measured.num_batches == 4
    for arm, gradients in zip(measured.arms[1:], others, strict=True):
        value, corrected, error = slow.jackknife(slow.multiplier, gradients, uniform)
        cosine, *_ = slow.jackknife(slow.mean_cosine, gradients, uniform)
        assert arm.cosine.value == pytest.approx(cosine, abs=2e-5), arm.name
        scale = max(abs(value), error)
        assert arm.multiplier.value == pytest.approx(value, abs=1e-3 * scale), arm.name
        assert arm.multiplier.corrected == pytest.approx(corrected, abs=1e-2 * scale), arm.name
        assert arm.multiplier.error == pytest.approx(error, rel=1e-2), arm.name


def test_uniform_is_exactly_one(measured):
    uniform = measured.arms[0]
    assert uniform.name == "uniform"
    assert uniform.multiplier == Estimate(1.0, 1.0, 0.0, 1.0, 1.0)
    assert uniform.token_share == 0
    assert uniform.only_selected is uniform.signal_share is uniform.recall is None


def test_constant_weights_have_multiplier_one():
    constant = ["uniform", "random:strength=1", "random:share=1,strength=3"]
    found = align(tiny_policy(), alphabet(), UnmarkedDigits(), arms=constant, config=SETTINGS, num_batches=3)
    for arm in found.arms:
        assert tuple(arm.multiplier) == pytest.approx((1, 1, 0, 1, 1), abs=1e-9), arm.name
    assert [pair.p_value for pair in found.differences] == [1.0, 1.0]
    everything = found.arms[2]
    assert everything.token_share == 1
    assert tuple(everything.signal_share or ()) == pytest.approx((1, 1, 0, 1, 1), abs=1e-9)
    assert (everything.only_rest or everything.cosine).value == 0


def test_tokens_after_the_answer_keep_weight_1():
    """The alignment uses the weights of the training: a soft arm changes nothing behind the answer."""
    policy = ActorCritic(tiny_policy(), SETTINGS.lora, critic=False)
    task, tokenizer = Digits(), alphabet()
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 100, 12)
    samples = [task.sample("train", k) for k in range(3)]
    generated = sample_responses(
        policy.causal_lm, encoder, samples, group_size=2, max_response_tokens=12, temperature=0.9, seed=3, step=0
    )
    responses = judge(task, tokenizer, [sample for sample in samples for _ in range(2)], generated)
    after = after_answer(responses)
    assert after.any()
    arms = [parse_arm(text) for text in ("flow:soft", "entropy:soft,mean_one=true", "random:only_top,scope=response")]
    _, credits = score_arms(policy, responses, arms, SETTINGS, step=0)
    for credit in credits:
        assert (credit.weights[after] == 1).all()
        assert (credit.weights != 1).any()


def test_recall_of_known_tokens(measured):
    by_name = {arm.name: arm for arm in measured.arms}
    wise, bottom = by_name["oracle:only_top:share=0.3"], by_name["entropy:bottom_q"]
    assert wise.recall is not None
    assert wise.recall_chance is not None
    assert wise.recall > 2 * wise.recall_chance
    assert wise.recall_chance == pytest.approx(0.3, abs=0.1)
    assert bottom.recall_chance == pytest.approx(0.4, abs=0.1)


def test_the_same_seed_gives_the_same_figures_and_micro_batches_change_nothing(measured):
    config = PPOConfig.from_dict({**SETTINGS.to_dict(), "micro_batch_size": 12})
    again = align(tiny_policy(), alphabet(), Digits(), arms=ARMS, config=config, num_batches=4, seed=3)
    for one, other in zip(measured.arms, again.arms, strict=True):
        assert one.token_share == other.token_share
        assert one.cosine.value == pytest.approx(other.cosine.value, abs=2e-5)


def test_the_model_is_restored_afterwards():
    model = tiny_policy().train()
    names = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for _ in range(2):
        align(model, alphabet(), Digits(), arms=["random"], config=SETTINGS, num_batches=3)
    assert names == {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert model.training


def test_a_trained_adapter_is_measured_as_it_is():
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(0)
    settings = PeftConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_policy(), settings)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    found = [align(model, alphabet(), Digits(), arms=["random"], config=SETTINGS, num_batches=3) for _ in range(2)]
    assert names == [name for name, _ in model.named_parameters()]
    assert found[0].arms == found[1].arms
    assert found[0].num_parameters == sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)


def test_batches_without_signal_are_counted_and_left_out():
    class Sometimes(Digits):
        def reward(self, sample, completion):
            return super().reward(sample, completion) if sample.index < 9 else 0.0

    found = align(tiny_policy(), alphabet(), Sometimes(), arms=["random"], config=SETTINGS, num_batches=5)
    assert (found.num_batches, found.no_signal) == (3, 2)
    with pytest.raises(ConfigError, match=r"num_batches: must give at least 3 batches .* got 0 of 3; take more"):
        align(tiny_policy(), alphabet(), Unsolvable(), arms=["random"], config=SETTINGS, num_batches=3)


vectors = st.lists(
    st.lists(st.floats(-3, 3, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=3, max_size=3), min_size=4,
    max_size=6,
).filter(lambda rows: abs(slow.mean_cosine(rows, rows)) > 0.05)  # fmt: skip


def products(one: list[list[float]], uniform: list[list[float]]) -> Products:
    own, other = torch.tensor(one, dtype=torch.float64), torch.tensor(uniform, dtype=torch.float64)
    return Products(own @ other.T, own.norm(dim=1))


@given(vectors, st.randoms(use_true_random=False))
def test_statistics_equal_their_definitions(uniform, random):
    arm = [[x + random.randint(-999, 999) / 1000 for x in row] for row in uniform]
    base = cosines(products(uniform, uniform), products(uniform, uniform))
    own = cosines(products(arm, uniform), products(uniform, uniform))
    for d in range(len(uniform)):
        a, u = arm[:d] + arm[d + 1 :], uniform[:d] + uniform[d + 1 :]
        assert float(own[1 + d]) == pytest.approx(slow.mean_cosine(a, u), abs=1e-6)
    got = jackknife(own)
    assert tuple(got)[:3] == pytest.approx(slow.jackknife(slow.mean_cosine, arm, uniform), abs=1e-5)
    assert got.high - got.low == pytest.approx(2 * 1.959964 * got.error)
    assert float(multipliers(own, base)[0]) == pytest.approx(slow.multiplier(arm, uniform), rel=1e-5, abs=1e-6)
    parts = signal_shares(products(arm, uniform), products(uniform, uniform))
    truth = sum(sum(column) for column in zip(*uniform, strict=True))
    if abs(truth) > 0.1 and torch.isfinite(parts).all():
        assert float(parts[0]) == pytest.approx(slow.signal_share(arm, uniform), rel=1e-5, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_its_definition(p_values):
    assert holm(p_values) == pytest.approx(slow.holm(p_values))


def test_holm_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_an_arm_that_drops_pure_noise_has_the_multiplier_of_theory():
    """k signal coordinates and m of noise: without the noise the cosine grows by a factor that is known."""
    torch.manual_seed(0)
    n, signal, noise = 400, 0.5, 30
    truth = torch.zeros(2 * noise, dtype=torch.float64)
    truth[0] = signal * noise**0.5
    uniform = truth + torch.randn(n, 2 * noise, dtype=torch.float64)
    arm = uniform.clone()
    arm[:, noise:] = 0  # half of the noise never touches the signal
    own = products(arm.tolist(), uniform.tolist())
    base = products(uniform.tolist(), uniform.tolist())
    ratio = multipliers(cosines(own, base), cosines(base, base))
    lengths = [float(truth[0]) ** 2 + dims for dims in (2 * noise, noise)]  # E |u|^2 and E |g|^2
    found = jackknife(ratio)
    assert found.corrected == pytest.approx(lengths[0] / lengths[1], rel=0.03)
    assert found.low < lengths[0] / lengths[1] < found.high
    (pair,) = compare({"uniform": torch.ones_like(ratio), "arm": ratio}, ["uniform"])
    assert pair.p_holm < 1e-6


def test_two_baselines_are_compared_once():
    replicates = {name: torch.rand(5, dtype=torch.float64) for name in "abc"}
    assert [(d.arm, d.baseline) for d in compare(replicates, ["a", "b"])] == [("b", "a"), ("c", "a"), ("c", "b")]


def test_weights_of_two_values_need_no_gradient_of_their_own():
    base = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    chosen = torch.tensor([[True, False, True, True]])
    doubled = torch.where(chosen, 2.0, 1.0)
    free = torch.tensor([[0.5, 0.7, 0.9, 1.0]])
    everything = torch.ones_like(chosen)
    atoms, parts = decompose_weights(base, [doubled, free, base * 0 + 3], [chosen, chosen, everything])
    assert len(atoms) == 3
    fields = torch.einsum("pa,abt->pbt", parts, torch.stack(atoms).double())
    wanted = [
        base * doubled, base * free, 3 * base, base * chosen, base * chosen, base,
        base * ~chosen, base * ~chosen, base * 0,
    ]  # fmt: skip
    assert torch.allclose(fields.float(), torch.stack(wanted))


def test_inner_products_are_summed_in_double():
    torch.manual_seed(0)
    one, other = torch.randn(2, 70_000), torch.randn(3, 70_000)
    assert torch.allclose(inner_products(one, other), one.double() @ other.double().T, rtol=1e-12)


def test_a_gradient_that_is_not_finite_is_refused():
    policy = ActorCritic(tiny_policy(), SETTINGS.lora, critic=False)
    task, tokenizer = Digits(), alphabet()
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 64, 8)
    sample = task.sample("train", 0)
    generated = sample_responses(
        policy.causal_lm, encoder, [sample], group_size=1, max_response_tokens=8, temperature=1.0, seed=0, step=0
    )
    responses = judge(task, tokenizer, [sample], generated)
    factors = torch.full(responses.response_mask.shape, float("inf"))
    with pytest.raises(DivergedError, match="policy gradient must be finite"):
        policy_gradients(policy, responses, [factors], SETTINGS)


def test_arms_as_text():
    credit = parse_arm("flow:top_q:share=0.2,strength=3")
    assert (credit.rule, credit.shape, credit.share, credit.strength) == ("flow", "top_q", 0.2, 3.0)
    assert parse_arm("uniform") == CreditConfig(rule="uniform")
    assert parse_arm("entropy:only_top").shape == "only_top"
    assert parse_arm("flow:layers=10-19,mean_one=true,options.window=4") == CreditConfig(
        layers="10-19", mean_one=True, options={"window": 4}
    )
    for text in ("flow", "flow:soft", "entropy:only_top:share=0.2", "flow:mean_one=true,layers=all,options.window=4"):
        assert arm_name(parse_arm(text)) == text
    assert parse_arm(arm_name(CreditConfig(mean_one=True, scope="response"))).mean_one is True
    assert split_arms("uniform, flow:share=0.2,strength=3,entropy:soft,") == [
        "uniform", "flow:share=0.2,strength=3", "entropy:soft",
    ]  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("flwo", CreditError, "credit: must name a registered rule, got 'flwo'"),
        ("flow:tpo_q", ConfigError, r"must be RULE:SHAPE:NAME=VALUE,NAME=VALUE, got 'tpo_q' in it; shapes are top_q"),
        ("flow:shrae=0.2", ConfigError, r"got 'shrae=0.2' in it; .* settings shape, entry, share"),
        ("flow:options.=1", ConfigError, r"got 'options.=1' in it"),
        ("flow:", ConfigError, r"got '' in it"),
        ("flow:share=2", ConfigError, r"share: must lie in \(0, 1\], got 2"),
        ("flow:share=many", ConfigError, "share: must be float, got 'many'"),
    ],
)
def test_arms_that_cannot_be_read(text, error, message):
    with pytest.raises(error, match=message):
        parse_arm(text)


@pytest.mark.unchecked
def test_bad_input():
    model, tokenizer = tiny_policy(), alphabet()

    def refused(error, message, **changes):
        settings = {"arms": ["random"], "config": SETTINGS, "num_batches": 3, **changes}
        with pytest.raises(error, match=message):
            align(model, tokenizer, Digits(), **settings)

    refused(ConfigError, "config.advantage: must be 'group' or 'rloo', got 'gae'", config=PPOConfig())
    refused(ConfigError, "num_batches: must be at least 3, got 2", num_batches=2)
    refused(ConfigError, "arms: must be a list of arms, got the text 'flow'", arms="flow")
    refused(ConfigError, "arms: must be texts or CreditConfig, got int", arms=[3])
    refused(ConfigError, "arms: must differ, got 'flow' twice", arms=["flow", "flow:strength=1.5"])
    refused(ConfigError, "credit.entry: must be 'advantage' with advantage='group'", arms=["flow:entry=reward"])
    refused(ConfigError, "baselines: must be arms, got 'flow'; there are uniform, random", baselines=["flow"])
    refused(ConfigError, "baselines: must be a list of arms, got the text 'flow'", baselines="flow")
    refused(MemoryLimitError, "gradients of 3 batches and 2 arms .* got about .* lower lora.rank", memory_limit=1000)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert list(named_arms(["flow", CreditConfig(rule="random")])) == ["flow", "random"]


def test_json_and_table(measured):
    values = json.loads(json.dumps(measured.to_dict()))
    assert values["schema"] == SCHEMA
    assert [arm["name"] for arm in values["arms"]] == [arm.name for arm in measured.arms]
    assert values["arms"][1]["multiplier"]["corrected"] == measured.arms[1].multiplier.corrected
    assert values["settings"]["num_prompts"] == 3
    rows = measured.table()
    assert [row["arm"] for row in rows] == [arm.name for arm in measured.arms]
    assert rows[0]["multiplier"] == 1
    assert rows[0]["recall"] is None
    assert "uniform 1.00" in repr(measured)
    assert len(measured.differences) == len(ARMS)


def test_json_without_a_path_returns_the_text_and_warns(measured):
    with pytest.warns(DeprecationWarning, match=r"path: must be given, got None; call to_json\(path\)"):
        text = measured.to_json()
    assert json.loads(text) == measured.to_dict()


def test_json_is_written_to_the_path(measured, tmp_path):
    path = tmp_path / "alignment.json"
    assert measured.to_json(path) is None
    assert json.loads(path.read_text()) == measured.to_dict()
    measured.to_json(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["alignment.json"]
    with pytest.raises(OutputError, match="path: its folder must exist"):
        measured.to_json(tmp_path / "missing" / "alignment.json")


def test_figures_that_are_not_finite_become_none_in_json(measured):
    endless = replace(measured, reward=float("nan"), seconds={"rollouts": float("inf")})
    values = endless.to_dict()
    assert values["reward"] is None
    assert values["seconds"] == {"rollouts": None}


def test_an_alignment_is_unreliable_where_the_interval_of_uniform_contains_0(measured):
    uniform = measured.arms[0]
    for low, reliable in ((0.01, True), (0.0, False), (-0.01, False)):
        changed = replace(uniform, cosine=uniform.cosine._replace(low=low))
        assert replace(measured, arms=(changed, *measured.arms[1:])).is_reliable is reliable


def test_the_picture(measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = plot_alignment(measured, tmp_path / "alignment.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"/Type3" not in plot_alignment(measured, tmp_path / "alignment.pdf").read_bytes()
    picture = plot_alignment(measured, tmp_path / "alignment.svg").read_text()
    assert picture.count("<svg") == 1
    with pytest.raises(OutputError, match="path: its folder must exist"):
        plot_alignment(measured, tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib.*flowgraph-llm\[plot\]"):
        plot_alignment(measured, tmp_path / "b.png")


def test_recomputed_layers_give_the_same_gradients_for_every_arm():
    config = replace(SETTINGS, gradient_checkpointing=True)
    arms = ["flow", "entropy:soft"]
    plain = align(tiny_policy(), alphabet(), Digits(), arms=arms, config=SETTINGS, num_batches=3, seed=3)
    saving = align(tiny_policy(), alphabet(), Digits(), arms=arms, config=config, num_batches=3, seed=3)
    assert plain.table() == saving.table()


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 12]}])
def test_adapters_that_train_modules_and_tokens_are_as_before_afterwards(settings: dict):
    model = get_peft_model(
        tiny_policy(), PeftLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    align(model, alphabet(), Digits(), arms=["flow"], config=SETTINGS, num_batches=3, seed=3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trainable


# Along the decisive tokens ------------------------------------------------------------------------------


def slow_projected(arm, uniform, left_out=None):
    """Mean cosine in probe coordinates, by loops over gradients, probes and batches."""
    kept = [b for b in range(len(arm)) if b != left_out]
    found = []
    for b in kept:
        probes = [c for c in kept if c != b]
        own = [float(arm[b, c]) for c in probes]
        true = [sum(float(uniform[d, c]) for d in kept if d not in (b, c)) for c in probes]
        length = sum(x * x for x in own) ** 0.5 * sum(y * y for y in true) ** 0.5
        found.append(sum(x * y for x, y in zip(own, true, strict=True)) / length if length else 0.0)
    return sum(found) / len(found)


def test_projected_cosines_against_loops():
    random = torch.Generator().manual_seed(5)
    arm, uniform = torch.randn(2, 6, 6, generator=random, dtype=torch.float64) + 0.5
    replicates = projected_cosines(arm, uniform)
    assert float(replicates[0]) == pytest.approx(slow_projected(arm, uniform))
    for d in range(6):
        assert float(replicates[1 + d]) == pytest.approx(slow_projected(arm, uniform, left_out=d))


def test_noise_that_moves_no_decisive_token_counts_in_the_raw_multiplier_only():
    """Twelve coordinates of noise beside three that decide: an arm that removes the noise gains nothing along these."""
    random = torch.Generator().manual_seed(6)
    n = 120
    signal = torch.cat([torch.ones(3), torch.zeros(12)]).double()
    uniform = signal + torch.randn(n, 15, generator=random, dtype=torch.float64) * 3
    quiet = uniform.clone()
    quiet[:, 3:] = 0
    probes = torch.randn(n, 15, generator=random, dtype=torch.float64)
    probes[:, 3:] = 0

    def ratio(one, other):
        return float(multipliers(one, other)[0])

    raw = [cosines(Products(g @ uniform.T, g.norm(dim=1)), Products(uniform @ uniform.T, uniform.norm(dim=1)))
           for g in (quiet, uniform)]  # fmt: skip
    along = [projected_cosines(g @ probes.T, uniform @ probes.T) for g in (quiet, uniform)]
    assert ratio(*raw) > 2
    assert ratio(*along) == pytest.approx(1.0)


def test_align_reports_the_multiplier_along_decisive_tokens(measured):
    assert measured.arms[0].decisive_multiplier.value == pytest.approx(1.0)
    assert all(arm.decisive_multiplier is not None for arm in measured.arms)
    assert measured.table()[1]["decisive_multiplier"] == measured.arms[1].decisive_multiplier.corrected

    class Unmarked(Digits):
        def oracle(self, sample, completion):
            return None

    without = align(tiny_policy(), alphabet(), Unmarked(), arms=["random"], config=SETTINGS, num_batches=3)
    assert [arm.decisive_multiplier for arm in without.arms] == [None, None]
