"""The pre-training recipe on a tiny scale, and the base model that comes with the package."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from rl import ConfigError, PolicyError, load_base_model, load_chain_model, make_task
from rl.base_models.chain_recipe import ChainRecipe, mistaken_sums
from rl.base_models.measure import measure, respond
from rl.base_models.path_search_recipe import PathSearchRecipe
from rl.base_models.pretrain import _weighted_loss, build_model, find_recipe, measurements, pretrain, train_model
from rl.base_models.program_recipe import ProgramRecipe
from rl.base_models.vocabulary import Vocabulary
from rl.base_models.wandering_recipe import WanderingRecipe
from rl.policy.shipped_models import SHIPPED_MODELS
from rl.tasks.chain import Chain, demonstration, first_error, read_prompt
from rl.tasks.wandering import LEVELS

SMALL = {"steps": 3, "width": 16, "layers": 1, "heads": 2, "batch_size": 4, "evaluate": 2}
TINY = ChainRecipe(num_variables=3, **SMALL)
CHAIN_MODEL = SHIPPED_MODELS["chain"].folder


@pytest.fixture(scope="module")
def base():
    return load_chain_model()


def test_the_tokenizer_gives_the_same_text_again():
    tokenizer = ChainRecipe.vocabulary.tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz0123456789=+;?,#"
    assert len(tokenizer) == 3 + len(text) + 36 + 10
    for line in (text, text[::-1], "f=c+2;a=7;f?a=7,c=8,f=0#0", "a", "", "a==+b+=", "=", "+"):
        ids = tokenizer(line)["input_ids"]
        assert tokenizer.decode(ids) == line
    pieces = [tokenizer.decode(index) for index in tokenizer("f=c+2;a=7;f?a=7#7")["input_ids"]]
    assert pieces == ["f", "=c", "+2", ";", "a", "=7", ";", "f", "?", "a", "=7", "#", "7"]
    assert tokenizer(text)["input_ids"] == ChainRecipe.vocabulary.encode([(text, "")])[0][0, :-1].tolist()
    assert tokenizer("a b\nc\u00e9")["input_ids"].count(tokenizer.unk_token_id) == 3
    padded = tokenizer(["a=1;a?", "a?"], padding=True)
    assert padded["attention_mask"][1] == [0] * 3 + [1] * 2


def test_targets_are_the_response_and_its_end():
    input_ids, targets = ChainRecipe.vocabulary.encode([("a=7;a?", "a=7#7"), ("b=1;c=2;b?", "b=1#1")])
    tokenizer = ChainRecipe.vocabulary.tokenizer()
    assert tokenizer.decode(input_ids[0]) == "a=7;a?a=7#7<eos>" + "<pad>" * 3
    for row, prompt in enumerate((5, 8)):
        assert (targets[row] != -100).nonzero().flatten().tolist() == list(range(prompt, prompt + 5))
        assert torch.equal(targets[row, prompt : prompt + 5], input_ids[row, prompt : prompt + 5])


def test_without_mistakes_demonstrations_grow_and_are_never_wrong():
    recipe = ChainRecipe(steps=100, batch_size=40, hard_share=0.3, least_mistakes=0.0, most_mistakes=0.0)
    first, last = recipe.demonstrations(0), [row for step in range(90, 100) for row in recipe.demonstrations(step)]
    assert {prompt.count("=") for prompt, _ in first} == {2}
    assert max(prompt.count("=") for prompt, _ in last) == recipe.num_variables
    large = [max(digit for earlier, digit in read_prompt(prompt).values() if earlier) > recipe.easy_addend
             for prompt, _ in last]  # fmt: skip
    assert 0.2 < sum(large) / len(large) < 0.4
    assert recipe.demonstrations(7) == recipe.demonstrations(7) != recipe.demonstrations(8)
    assert replace(recipe, seed=1).demonstrations(7) != recipe.demonstrations(7)
    for prompt, response in last:
        assignments, stated = read_prompt(prompt), {}
        for line in response.split("#")[0].split(","):
            earlier, digit = assignments[line[-3]]
            stated[line[-3]] = (digit + (stated[earlier] if earlier else 0)) % 10
            assert line.endswith(f"{line[-3]}={stated[line[-3]]}")
        assert prompt.endswith(f";{line[0]}?")
        assert response.endswith(f"#{stated[line[0]]}")


def test_each_sum_is_wrong_at_its_own_rate_always_by_the_same_digit():
    recipe = ChainRecipe(least_mistakes=0.1, most_mistakes=0.6)
    add, wrong = mistaken_sums(recipe, Random(0)), {}
    for pair in ((3, 4), (7, 8), (0, 1)):
        found = Counter(add(*pair) for _ in range(2000))
        right = found.pop(sum(pair) % 10)
        assert len(found) == 1
        wrong[pair] = 1 - right / 2000
        assert 0.07 < wrong[pair] < 0.63
    assert max(wrong.values()) - min(wrong.values()) > 0.05, "rates differ between sums"
    always = mistaken_sums(replace(recipe, least_mistakes=1.0, most_mistakes=1.0), Random(0))
    sample = Chain(num_variables=3, hops=(2, 2)).sample("train", 0)
    response = demonstration(sample, Random(0), 0, always)
    values = re.findall(r"=([0-9])", response)
    assert values[-1] == response[-1], "the answer goes on from the mistake"
    assert first_error(sample, response) == "sum"


def test_a_recipe_gives_the_same_weights_again_and_reports(tmp_path: Path):
    state, seen = torch.get_rng_state(), []
    report = pretrain(tmp_path / "one", TINY, progress=lambda step, loss: seen.append((step, loss)))
    pretrain(tmp_path / "two", TINY)
    assert torch.equal(torch.get_rng_state(), state)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "recipe.json"}
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert [step for step, _ in seen] == [1, 2, 3]
    assert report["final_loss"] == pytest.approx(sum(loss for _, loss in seen) / 3)
    assert json.loads((tmp_path / "one/recipe.json").read_text()) == json.loads(json.dumps(report))
    pretrain(tmp_path / "three", replace(TINY, seed=1))
    assert (tmp_path / "one/model.safetensors").read_bytes() != (tmp_path / "three/model.safetensors").read_bytes()
    model, tokenizer = load_chain_model(tmp_path / "one")
    assert sum(weight.numel() for weight in model.parameters()) == report["num_parameters"]
    assert not model.training
    assert tokenizer.decode(tokenizer("f=c+2;f?")["input_ids"]) == "f=c+2;f?"


@pytest.mark.parametrize("kind", [PathSearchRecipe, ProgramRecipe, WanderingRecipe])
def test_every_recipe_gives_the_same_weights_again(tmp_path: Path, kind: type):
    recipe = kind(**SMALL)
    if kind is WanderingRecipe:
        recipe = replace(recipe, second_steps=2, third_steps=1)
    assert recipe.demonstrations(1) == recipe.demonstrations(1) != recipe.demonstrations(2)
    assert replace(recipe, seed=recipe.seed + 1).demonstrations(1) != recipe.demonstrations(1)
    report = pretrain(tmp_path / "one", recipe)
    pretrain(tmp_path / "two", recipe)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert report["task"]["name"] == recipe.task_name
    for measured in measurements(report).values():
        assert measured["num_problems"] == 2
        assert 0 <= measured["mean_over_samples"] <= 1
    _, tokenizer = load_base_model(tmp_path / "one")
    prompt, response = recipe.demonstrations(0)[0]
    assert tokenizer(prompt + response)["input_ids"] == recipe.vocabulary.token_ids(prompt + response)


def test_a_batch_has_one_level_and_short_levels_come_first():
    recipe = WanderingRecipe(batch_size=6)
    for step in range(0, recipe.steps, 500):
        assert len({prompt[-5:] for prompt, _ in recipe.demonstrations(step)}) == 1
    short = LEVELS.index("0:0")
    filler = LEVELS.index("4:0")
    long = LEVELS.index("0:5")
    second = recipe.steps
    third = recipe.steps + recipe.second_steps
    # The exponent falls linearly in the first cycle; afterwards the longest levels are drawn more often than others.
    for step, exponent, factor, filler_factor in (
        (0, 1.6, 1, 1),
        (900, 1.2, 1, 1),
        (second, 0.4, 2, 1),
        (third - 1, 0.4, 2, 1),
        (third, 0, 4, 2),
    ):
        weights = recipe.level_weights(step)
        assert weights[long] / weights[short] == pytest.approx(factor * (22 / 72) ** exponent)
        assert weights[filler] / weights[short] == pytest.approx(filler_factor * (22 / 46) ** exponent)


def test_updates_are_numbered_through_all_cycles():
    recipe = replace(WanderingRecipe(**SMALL), second_steps=2, third_steps=1)
    seen = []
    losses = train_model(build_model(recipe), recipe, lambda step, loss: seen.append(step))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(losses) == 6
    assert [cycle.answer_weight for cycle in recipe.cycles] == [3, 4, 8]


def test_the_answer_may_weigh_more_in_the_loss():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    targets = torch.tensor([[-100, 3, 6, 1, 2], [-100, -100, 4, 6, -100]])
    losses = -logits.log_softmax(-1)
    plain = [losses[0, 1, 3], losses[1, 2, 4]]
    answer = [losses[0, 2, 6], losses[0, 3, 1], losses[0, 4, 2], losses[1, 3, 6]]
    for weight in (1.0, 8.0):
        expected = (sum(plain) + weight * sum(answer)) / (2 + 4 * weight)
        torch.testing.assert_close(_weighted_loss(logits, targets, 6, weight), expected)


def test_a_task_without_demonstrations_has_no_recipe():
    with pytest.raises(
        ConfigError, match=r"task: must be one of chain, pathsearch, program, wandering, got 'countdown'; other"
    ):
        find_recipe("countdown")


def test_training_lowers_the_loss():
    losses = []
    recipe = replace(TINY, steps=60, batch_size=16, warmup_steps=5, num_variables=2, width=32, most_mistakes=0.1)
    train_model(build_model(recipe), recipe, lambda step, loss: losses.append(loss))
    assert losses[0] > 3
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_a_recipe_chooses_norms_of_queries_and_keys():
    with_norms = build_model(ChainRecipe(layers=1))
    without = build_model(WanderingRecipe(layers=1))
    assert type(with_norms).__name__ == "Qwen3ForCausalLM"
    assert type(without).__name__ == "LlamaForCausalLM"
    assert any("q_norm" in name for name, _ in with_norms.named_parameters())
    assert not any("q_norm" in name for name, _ in without.named_parameters())


def test_the_start_has_the_stated_spread():
    torch.manual_seed(0)
    model = build_model(ChainRecipe(layers=1))
    spread = {name: float(weight.detach().std()) for name, weight in model.named_parameters() if weight.dim() == 2}
    assert spread["model.embed_tokens.weight"] == pytest.approx(0.5, rel=0.05)
    assert spread["model.layers.0.mlp.down_proj.weight"] == pytest.approx(256**-0.5, rel=0.05)
    assert spread["lm_head.weight"] == pytest.approx(128**-0.5, rel=0.05)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Vocabulary, "tokenizer", lambda self: type("Broken", (), {"save_pretrained": fail})())
    monkeypatch.setattr(ChainRecipe, "measure", lambda *_, **__: {})
    with pytest.raises(OSError, match="no space left"):
        pretrain(tmp_path / "out", TINY)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_are_refused_before_any_work(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(ConfigError, match=r"out: must be a folder that does not exist yet, or is empty, got"):
            pretrain(tmp_path / name, TINY)
    for name in ("none/model", "file/model"):
        with pytest.raises(ConfigError, match=r"out: must lie in a folder that exists and can be written, got"):
            pretrain(tmp_path / name, TINY)
    assert (tmp_path / "full/kept").read_text() == "x"
    with pytest.raises(PolicyError, match=r"folder: must hold a model that pretrain\(\) wrote, got"):
        load_chain_model(tmp_path / "full")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, r"steps: must be at least 1, got 0; see Recipe"),
        ({"batch_size": 2.5}, r"batch_size: must be int, got 2\.5"),
        ({"warmup_steps": -1}, r"warmup_steps: must be at least 0, got -1"),
        ({"hard_share": 1.5}, r"hard_share: must lie in \[0, 1\], got 1\.5"),
        ({"learning_rate": math.nan}, r"learning_rate: must be finite, got nan"),
        ({"num_variables": 27}, r"num_variables: must be from 2 to 26, got 27"),
        ({"easy_addend": 0}, r"easy_addend: must be from 1 to 9, got 0"),
        ({"seed": "x"}, r"seed: must be int, got 'x'"),
        ({"most_mistakes": 0.05}, r"most_mistakes: must be at least least_mistakes=0\.1, got 0\.05; see Recipe"),
        ({"heads": 3}, r"heads: must divide the width 128 into an even number of dimensions, got 3"),
    ],
)
def test_bad_settings(setting: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ChainRecipe(**setting)


# The models of the package ------------------------------------------------------------------------------

MOST_BYTES = {"chain": 4 * 2**20, "pathsearch": 2**20, "program": 2**20, "wandering": 2**20}


@pytest.mark.parametrize("name", sorted(SHIPPED_MODELS))
def test_the_shipped_model_is_small_and_described(name: str):
    folder = SHIPPED_MODELS[name].folder
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) <= MOST_BYTES[name]
    report = json.loads((folder / "recipe.json").read_text())
    kind = find_recipe(name)
    assert kind(**report["recipe"]) == kind()
    assert report["task"] == json.loads(json.dumps(kind().task_settings()))
    model, tokenizer = load_base_model(name)
    assert sum(weight.numel() for weight in model.parameters()) == report["num_parameters"]
    assert model.name_or_path == model.config.name_or_path == name
    for prompt, response in kind(batch_size=8).demonstrations(2000):
        for text in (prompt, response):
            ids = tokenizer(text)["input_ids"]
            assert ids == kind.vocabulary.token_ids(text)
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["pathsearch", "program", "wandering"])
def test_the_shipped_model_starts_with_much_to_learn(name: str):
    """The rewards at temperature 1 that are written down, and a small sample of them drawn again."""
    report = json.loads((SHIPPED_MODELS[name].folder / "recipe.json").read_text())
    starts = {label: measured["mean_over_samples"] for label, measured in measurements(report).items()}
    assert list(starts) == ([f"level {level}" for level in LEVELS] if name == "wandering" else [name])
    assert all(0.15 < start < 0.4 for start in starts.values())
    found = measure(*load_base_model(name), make_task(name), num_problems=150, num_samples=1, max_new_tokens=64)
    start = next(iter(starts.values()))
    assert found["mean_over_samples"] == pytest.approx(start, abs=0.13)  # 3 standard errors of 150 problems
    assert found["without_answer"] < 0.1
    assert found["decisive_share"] > 0.1


def test_the_shipped_model_can_write_and_has_much_to_learn(base):
    report = json.loads((CHAIN_MODEL / "recipe.json").read_text())["measured"]
    found = measure(*base, Chain(), num_problems=150, num_samples=2, seed=1, group_by="hops", first_error=first_error)
    assert abs(found["mean_over_samples"] - report["mean_over_samples"]) < 0.13  # 3 standard errors of 150 problems
    assert 0.1 < found["mean_over_samples"] < 0.5
    assert found["ill_formed"] < 0.1
    groups = found["sampled"]
    assert sum(part["n"] for hops, part in groups.items() if hops != "all") == groups["all"]["n"] == 150
    assert all(part["interval"][0] <= part["share"] <= part["interval"][1] for part in groups.values())
    wrong = sum(found["wrong_by_first_error"].values())
    assert wrong == pytest.approx(1 - found["mean_over_samples"])
    assert found["pass_at"][1] == pytest.approx(groups["all"]["share"])
    assert found["pass_at"][1] < found["pass_at"][2]


def test_responses_are_reproducible_and_a_cut_one_is_ill_formed(base):
    samples = [Chain().sample("eval", index) for index in range(4)]
    state = torch.get_rng_state()
    greedy = respond(*base, samples, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert greedy == [respond(*base, [sample], temperature=0)[0] for sample in samples]  # padding changes nothing
    cut = respond(*base, samples, temperature=0, max_new_tokens=3)
    assert all(text.endswith("<unk>") and first_error(sample, text) == "format"
               for sample, text in zip(samples, cut, strict=True))  # fmt: skip
