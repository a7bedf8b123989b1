"""Sampling: exactly from the softmax, and the same in any batch."""

from __future__ import annotations

import math

import pytest
import torch

from rl import PolicyError
from rl.policy.sampling import Ending, GumbelNoise, generate
from rl.seeds import derive
from tests.fixtures.policies import FAMILIES, alphabet, tiny_policy

PROMPTS = [[3, 30, 39, 5], [8, 12], [31, 4, 6, 7, 9, 33]]
ENDING = Ending((1,), 0)


def sampled(family: str, chosen: list[int], **options):
    noise = [derive(0, "sampling", index) for index in chosen]
    model = tiny_policy(family)
    return generate(model, [PROMPTS[i] for i in chosen], noise, ending=ENDING, max_new_tokens=8, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_its_neighbours(family: str):
    together = sampled(family, [0, 1, 2])
    for index in range(3):
        alone = sampled(family, [index])
        length = int(alone.response_mask.sum())
        start = together.prompt_length
        assert together.input_ids[index, start : start + length].tolist() == alone.input_ids[
            0, alone.prompt_length : alone.prompt_length + length
        ].tolist()  # fmt: skip
        assert int(together.response_mask[index].sum()) == length
        assert bool(together.truncated[index]) == bool(alone.truncated[0])


def test_samples_follow_the_softmax_at_the_temperature():
    """Pearson's chi-square over the first token of 4,000 responses; 45 outcomes, the rare ones pooled."""
    model, prompt, temperature, count = tiny_policy(seed=3), PROMPTS[0], 1.7, 4000
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double()
    noise = [derive(5, "sampling", index) for index in range(count)]
    out = generate(model, [prompt] * count, noise, ending=ENDING, max_new_tokens=1, temperature=temperature)
    seen = torch.bincount(out.input_ids[:, -1], minlength=len(expected)).double()
    # a first token that ends the response is kept as such; padding cannot be told from it, so both are one outcome
    rare = expected * count < 8
    observed = torch.cat([seen[~rare], seen[rare].sum()[None]])
    wanted = count * torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert freedom >= 8
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_masks_end_with_the_end_token_and_truncation_is_seen():
    noise = [derive(0, "sampling", index) for index in range(60)]
    out = generate(tiny_policy(), [PROMPTS[0]] * 60, noise, ending=ENDING, max_new_tokens=12, temperature=3.0)
    response = out.input_ids[:, out.prompt_length :]
    for row, mask, truncated in zip(response, out.response_mask, out.truncated, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (row[length:] == ENDING.pad_id).all()
        assert bool(truncated) == (1 not in row[:length].tolist())
        assert 1 not in row[: length - 1].tolist()
    assert out.truncated.any()
    assert not out.truncated.all()


def test_the_models_own_generation_settings_do_not_reshape_the_samples():
    model, plain = tiny_policy(), sampled("llama", [0, 1])
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.top_k = 1
    noise = [derive(0, "sampling", index) for index in (0, 1)]
    out = generate(model, PROMPTS[:2], noise, ending=ENDING, max_new_tokens=8)
    assert torch.equal(out.input_ids, plain.input_ids)
    assert model.generation_config.repetition_penalty == 3.0


def test_greedy_decoding_takes_the_likeliest_token():
    model = tiny_policy()
    out = generate(model, [PROMPTS[0]], None, ending=ENDING, max_new_tokens=3)
    with torch.no_grad():
        logits = model(out.input_ids).logits[0]
    for place in range(out.prompt_length, out.prompt_length + int(out.response_mask.sum())):
        assert int(logits[place - 1].argmax()) == int(out.input_ids[0, place])


def test_endings_come_from_model_and_tokenizer():
    model, tokenizer = tiny_policy(), alphabet()
    assert Ending.of(model, tokenizer) == Ending((1,), 0)
    model.generation_config.eos_token_id = [7, 1]
    assert Ending.of(model, tokenizer).end_ids == (7, 1)
    tokenizer.pad_token = None
    assert Ending.of(model, tokenizer).pad_id == 7
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(
        PolicyError, match=r"tokenizer: must have an end-of-sequence token, got .* set tokenizer.eos_tok"
    ):
        Ending.of(model, tokenizer)


def test_padding_that_the_model_does_not_know_is_an_end_token():
    tokenizer = alphabet()
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    model = tiny_policy()
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert Ending.of(model, tokenizer) == Ending((1,), 1)
    assert Ending.of(model, alphabet()) == Ending((1,), 0)


# The noise --------------------------------------------------------------------------------------------------


def mix(state: int) -> int:
    """The output function of SplitMix64 on Python's integers."""
    state &= 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return state ^ (state >> 31)


GAMMA = 0x9E3779B97F4A7C15


def test_the_mixing_function_is_that_of_splitmix64():
    """The published outputs for seed 1234567."""
    outputs = [mix(1234567 + GAMMA * count) for count in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("size", [45, 64, 700])
def test_the_noise_is_the_hash_of_seed_position_and_token(size: int):
    seeds = [0, 1, 2**63 - 1, 2**64 - 1, 987654321987654321]
    found = torch.zeros(len(seeds), size)
    GumbelNoise(seeds, 1.0, 0).add_noise(found, 5)
    for row, seed in enumerate(seeds):
        key = mix(seed + GAMMA * 5)
        for token in range(size):
            u = (mix(key + GAMMA * token) & (2**63 - 1)) / 2**63
            assert float(found[row, token]) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("size", [45, 1000, 40_001])
def test_the_noise_of_a_sequence_is_the_same_to_the_bit_in_any_batch(size: int):
    seeds = [derive(0, "sampling", index) for index in range(70)]
    together = torch.zeros(len(seeds), size)
    GumbelNoise(seeds, 1.0, 0).add_noise(together, 3)
    for chosen in ([0], [69], [5, 68, 3], list(range(1, 70))):
        part = torch.zeros(len(chosen), size)
        GumbelNoise([seeds[index] for index in chosen], 1.0, 0).add_noise(part, 3)
        assert torch.equal(part, together[chosen])


def test_the_noise_is_gumbels_and_differs_by_sequence_and_position():
    """Mean, variance and tail of a standard Gumbel, and no correlation between streams, within five errors."""
    size = 200_000
    noise = GumbelNoise([7, 8], 1.0, 0)
    streams = []
    for position in (0, 1):
        part = torch.zeros(2, size)
        noise.add_noise(part, position)
        streams += list(part.double())
    for stream in streams:
        assert float(stream.mean()) == pytest.approx(0.5772157, abs=5 * 1.2825 / size**0.5)
        assert float(stream.var()) == pytest.approx(math.pi**2 / 6, abs=5 * 3.45 / size**0.5)
        assert float((stream > 5).double().mean()) == pytest.approx(0.0067153, abs=5 * 0.0817 / size**0.5)
    correlations = torch.corrcoef(torch.stack(streams))
    assert float((correlations - torch.eye(4)).abs().max()) < 5 / size**0.5


def test_the_position_counts_from_the_end_of_the_prompt():
    """Left padding is part of the prompt's columns, so the first response token is position 0 in every batch."""
    noise = GumbelNoise([3], 1.0, 6)
    first = noise(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 45))
    expected = torch.zeros(1, 45)
    noise.add_noise(expected, 0)
    assert torch.equal(first, expected)
    assert not torch.equal(noise(torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 45)), first)


# The mode of the model --------------------------------------------------------------------------------------


def test_a_model_in_training_mode_samples_without_dropout_and_keeps_its_mode():
    plain = generate(tiny_policy("gpt2"), PROMPTS, [0, 1, 2], ending=ENDING, max_new_tokens=8)
    model = tiny_policy("gpt2")
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modes = [module.training for module in model.modules()]
    out = generate(model, PROMPTS, [0, 1, 2], ending=ENDING, max_new_tokens=8)
    assert torch.equal(out.input_ids, plain.input_ids)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        generate(model, [[10**6]], [0], ending=ENDING, max_new_tokens=1)
    assert [module.training for module in model.modules()] == modes, "restored after an error too"
