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

from rl import ConfigError, PolicyError, load_chain_model
from rl.chain_model import pretrain as module
from rl.chain_model.measure import measure, respond
from rl.chain_model.pretrain import (
    Recipe,
    build_model,
    chain_tokenizer,
    demonstrations,
    encode,
    mistaken_sums,
    pretrain,
    train_model,
)
from rl.policy.loading import CHAIN_MODEL
from rl.tasks.chain import Chain, demonstration, first_error, read_prompt

TINY = Recipe(steps=3, width=16, layers=1, heads=2, batch_size=4, num_variables=3, evaluate=2)


@pytest.fixture(scope="module")
def base():
    return load_chain_model()


def test_the_tokenizer_gives_the_same_text_again():
    tokenizer = chain_tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz0123456789=+;?,#"
    assert len(tokenizer) == 3 + len(text) + 36 + 10
    for line in (text, text[::-1], "f=c+2;a=7;f?a=7,c=8,f=0#0", "a", "", "a==+b+=", "=", "+"):
        ids = tokenizer(line)["input_ids"]
        assert tokenizer.decode(ids) == line
    pieces = [tokenizer.decode(index) for index in tokenizer("f=c+2;a=7;f?a=7#7")["input_ids"]]
    assert pieces == ["f", "=c", "+2", ";", "a", "=7", ";", "f", "?", "a", "=7", "#", "7"]
    assert tokenizer(text)["input_ids"] == encode([(text, "")])[0][0, :-1].tolist()
    assert tokenizer("a b\nc\u00e9")["input_ids"].count(tokenizer.unk_token_id) == 3
    padded = tokenizer(["a=1;a?", "a?"], padding=True)
    assert padded["attention_mask"][1] == [0] * 3 + [1] * 2


def test_targets_are_the_response_and_its_end():
    input_ids, targets = encode([("a=7;a?", "a=7#7"), ("b=1;c=2;b?", "b=1#1")])
    tokenizer = chain_tokenizer()
    assert tokenizer.decode(input_ids[0]) == "a=7;a?a=7#7<eos>" + "<pad>" * 3
    for row, prompt in enumerate((5, 8)):
        assert (targets[row] != -100).nonzero().flatten().tolist() == list(range(prompt, prompt + 5))
        assert torch.equal(targets[row, prompt : prompt + 5], input_ids[row, prompt : prompt + 5])


def test_without_mistakes_demonstrations_grow_and_are_never_wrong():
    recipe = Recipe(steps=100, batch_size=40, hard_share=0.3, least_mistakes=0.0, most_mistakes=0.0)
    first, last = demonstrations(recipe, 0), [row for step in range(90, 100) for row in demonstrations(recipe, step)]
    assert {prompt.count("=") for prompt, _ in first} == {2}
    assert max(prompt.count("=") for prompt, _ in last) == recipe.num_variables
    large = [max(digit for earlier, digit in read_prompt(prompt).values() if earlier) > recipe.easy_addend
             for prompt, _ in last]  # fmt: skip
    assert 0.2 < sum(large) / len(large) < 0.4
    assert demonstrations(recipe, 7) == demonstrations(recipe, 7) != demonstrations(recipe, 8)
    assert demonstrations(replace(recipe, seed=1), 7) != demonstrations(recipe, 7)
    for prompt, response in last:
        assignments, stated = read_prompt(prompt), {}
        for line in response.split("#")[0].split(","):
            earlier, digit = assignments[line[-3]]
            stated[line[-3]] = (digit + (stated[earlier] if earlier else 0)) % 10
            assert line.endswith(f"{line[-3]}={stated[line[-3]]}")
        assert prompt.endswith(f";{line[0]}?")
        assert response.endswith(f"#{stated[line[0]]}")


def test_each_sum_is_wrong_at_its_own_rate_always_by_the_same_digit():
    recipe = Recipe(least_mistakes=0.1, most_mistakes=0.6)
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


def test_training_lowers_the_loss():
    losses = []
    recipe = replace(TINY, steps=60, batch_size=16, warmup_steps=5, num_variables=2, width=32, most_mistakes=0.1)
    train_model(build_model(recipe), recipe, lambda step, loss: losses.append(loss))
    assert losses[0] > 3
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_the_start_has_the_stated_spread():
    torch.manual_seed(0)
    model = build_model(Recipe(layers=1))
    spread = {name: float(weight.detach().std()) for name, weight in model.named_parameters() if weight.dim() == 2}
    assert spread["model.embed_tokens.weight"] == pytest.approx(0.5, rel=0.05)
    assert spread["model.layers.0.mlp.down_proj.weight"] == pytest.approx(256**-0.5, rel=0.05)
    assert spread["lm_head.weight"] == pytest.approx(128**-0.5, rel=0.05)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(module, "chain_tokenizer", lambda: type("Broken", (), {"save_pretrained": fail})())
    monkeypatch.setattr(module, "measure", lambda *_, **__: {})
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
        Recipe(**setting)


def test_the_shipped_model_is_small_and_described():
    sizes = {path.name: path.stat().st_size for path in CHAIN_MODEL.iterdir()}
    assert sizes["model.safetensors"] <= 4 * 2**20
    report = json.loads((CHAIN_MODEL / "recipe.json").read_text())
    assert Recipe(**report["recipe"]) == Recipe()
    assert Chain(**report["task"]) == Chain()


def test_the_shipped_model_can_write_and_has_much_to_learn(base):
    report = json.loads((CHAIN_MODEL / "recipe.json").read_text())["measured"]
    found = measure(*base, Chain(), num_problems=150, num_samples=2, seed=1)
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
