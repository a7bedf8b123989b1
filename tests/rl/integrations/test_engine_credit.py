"""Credit of an engine's sequences: the same as our own trainer's, in every layout of padding."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model

from flowgraph import MissingExtraError
from rl.config import CreditConfig, LoraConfig
from rl.credit.scoring import score_rollout
from rl.errors import ConfigError, CreditError
from rl.integrations import engine_credit as module
from rl.integrations.engine_credit import (
    EngineCredit,
    EngineSequence,
    pad_sequences,
    require_base,
    require_engine,
    split_sequences,
)
from rl.integrations.tensors import read_responses
from rl.policy.actor_critic import ActorCritic
from tests.fixtures.engines import (
    COMPLETIONS,
    DIGITS,
    END,
    PROMPTS,
    TOKENIZER,
    engine_credit,
    sequences,
    uniform_credit,
)
from tests.fixtures.policies import alphabet, tiny_policy

SOFT = CreditConfig(rule="reach_sharp", shape="soft", floor=0.5, ceiling=2.0, fallback=0.5)


@pytest.mark.parametrize("rule", ["flow", "flow_sharp", "entropy", "max_attention", "position_matched"])
def test_weights_are_those_of_our_own_trainer(rule):
    credit = CreditConfig(rule=rule, shape="soft")
    given = sequences()
    found = engine_credit(credit, micro_batch_size=2).weigh(given)

    responses = read_responses(
        pad_sequences(given, 0), PROMPTS, TOKENIZER, find_answer=DIGITS.find_answer, groups=torch.tensor([0, 0, 1, 1])
    )
    policy = ActorCritic(tiny_policy(), LoraConfig(), critic=False)
    scored = score_rollout(
        policy, responses, credit, temperature=1.0, micro_batch_size=1, seed=0, step=0, reference=False
    )
    assert torch.equal(found.scored, scored.credit.scored)
    if rule == "position_matched":  # it draws from another generator, and only moves weights within a column
        ours = torch.sort(found.weights, 0).values
        torch.testing.assert_close(ours, torch.sort(scored.credit.weights, 0).values, rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(found.weights, scored.credit.weights, rtol=1e-4, atol=1e-5)
    assert (found.weights != 1).any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_changes_neither_positions_nor_padding(family: str):
    """Learned positions of a left-padded batch count from its first token, under PEFT's wrapper too."""
    given = sequences()
    adapted = get_peft_model(
        tiny_policy(family), peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    )
    credit = CreditConfig(rule="entropy", shape="soft")
    plain = EngineCredit(credit, tiny_policy(family), TOKENIZER, find_answer=DIGITS.find_answer).weigh(given)
    found = EngineCredit(credit, adapted, TOKENIZER, find_answer=DIGITS.find_answer).weigh(given)
    torch.testing.assert_close(found.weights, plain.weights, rtol=1e-5, atol=1e-6)
    for row, sequence in enumerate(given):
        alone = EngineCredit(credit, adapted, TOKENIZER, find_answer=DIGITS.find_answer).weigh([sequence])
        length = len(sequence.response_ids)
        torch.testing.assert_close(found.weights[row, :length], alone.weights[0, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right", "both", "verl"])
def test_every_layout_of_padding_gives_the_same_sequences(padding):
    given = sequences()
    longest_prompt = max(len(sequence.prompt_ids) for sequence in given)
    width = 2 * max(len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in given)
    ids = torch.zeros(len(given), width, dtype=torch.int64)
    mask = torch.zeros(len(given), width, dtype=torch.int64)
    for row, sequence in enumerate(given):
        tokens = [*sequence.prompt_ids, *sequence.response_ids]
        first = {"left": width - len(tokens), "right": 0, "both": 3, "verl": longest_prompt - len(sequence.prompt_ids)}
        columns = slice(first[padding], first[padding] + len(tokens))
        ids[row, columns] = torch.tensor(tokens)
        mask[row, columns] = 1
    lengths = [len(sequence.response_ids) for sequence in given]
    found = split_sequences(ids, mask, lengths, trained=mask, rewards=[0.0, 1.0, 2.0, 3.0])
    for row, (one, other) in enumerate(zip(found, given, strict=True)):
        assert (one.prompt_ids, one.response_ids) == (other.prompt_ids, other.response_ids)
        assert one.trained == [True] * lengths[row]
        assert one.reward == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"normalize": "mean"}, {"normalize": "sum_of_squares"}, {"sign": "asymmetric"}]
)
def test_weights_of_one_change_no_bit(dtype, settings):
    credit = uniform_credit(**settings)
    advantages = []
    for row, text in enumerate(COMPLETIONS):
        random = torch.Generator().manual_seed(row)
        advantages.append(torch.randn(len(text) + 1, generator=random, dtype=torch.float64).to(dtype))
    advantages[0][0] = -0.0
    for one, other in zip(credit.scale(sequences(), advantages), advantages, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_advantages_are_multiplied_by_the_weights():
    credit = engine_credit(SOFT)
    weights = credit.weigh(sequences()).weights
    advantages = [torch.full((len(text) + 1,), -2.0) for text in COMPLETIONS]
    scaled = credit.scale(sequences(), advantages)
    for row, part in enumerate(scaled):
        assert part.tolist() == (-2 * weights[row, : len(part)]).tolist()
    assert any((part != -2).any() for part in scaled)


def test_responses_that_are_not_trained_are_left_out_of_the_batch():
    """Neither their advantages nor the weights of the others depend on them."""
    credit = engine_credit(SOFT)
    given = sequences()
    masked = EngineSequence([10**6], [10**6] * 4, trained=[False] * 4)
    empty = EngineSequence(given[0].prompt_ids, [])
    mixed = [given[0], masked, given[1], empty, *given[2:]]
    found = credit.weigh(mixed)
    assert torch.equal(found.weights[[0, 2, 4, 5]], credit.weigh(given).weights)
    assert (found.weights[[1, 3]] == 1).all()
    assert not found.scored[[1, 3]].any()
    advantages = [torch.full((len(sequence.response_ids),), 3.0) for sequence in mixed]
    assert credit.scale(mixed, advantages)[1] is advantages[1]
    assert credit.weigh([]).weights.shape == (0, 0)
    assert credit.weigh([masked]).weights.tolist() == [[1.0] * 4]


def test_a_named_model_is_loaded_once_and_frozen():
    credit = EngineCredit(SOFT, "program")
    model, tokenizer = credit._loaded()
    assert credit._loaded()[0] is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert len(tokenizer) > 10


def test_the_mode_of_a_policy_is_restored():
    model = tiny_policy().train()
    EngineCredit(SOFT, model, TOKENIZER, find_answer=DIGITS.find_answer).weigh(sequences())
    assert model.training


def replaced(row: int, **changes: Any) -> list[EngineSequence]:
    given = sequences()
    fields = {name: getattr(given[row], name) for name in ("prompt_ids", "response_ids", "trained")}
    given[row] = EngineSequence(**{**fields, **changes})
    return given


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            replaced(1, response_ids=[5, 999]),
            r"ids: must be integers in the vocabulary of 45 tokens, got 999 in seq.* 1",
        ),
        (replaced(0, prompt_ids=[-100, 5]), r"ids: must be integers in the vocabulary of 45 tokens, got -100 in .* 0"),
        (replaced(2, prompt_ids=[]), r"prompt_ids: must hold a token, got none in sequence 2; pass the ids that"),
        (replaced(0, trained=[True]), r"trained: must be one flag for each of 8 response tokens, got 1 in sequence 0"),
        (
            replaced(1, trained=[True, False, True]),
            r"trained: must be True on all tokens.*got 2 of 3 in sequence 1;.*on",
        ),
        (replaced(0, prompt="x=1;x?"), r"prompts: must be the text of the ids of sequence 0, got"),
    ],
)
def test_wrong_sequences_are_refused(given, text):
    with pytest.raises(ConfigError, match=text):
        engine_credit(SOFT).weigh(given)


def test_a_sequence_beyond_the_context_is_refused():
    credit = EngineCredit(SOFT, tiny_policy(context=16), TOKENIZER, find_answer=DIGITS.find_answer)
    with pytest.raises(
        ConfigError, match=r"sequences: must fit the model's context of 16 tokens, got 18 in sequence 0"
    ):
        credit.weigh(sequences())


def test_an_end_token_of_the_generation_ends_a_response():
    """Chat models end a turn with another token than the tokenizer's; it is no part of the answer."""
    tokenizer = alphabet()
    semicolon = tokenizer(";")["input_ids"][0]
    completions = []

    def find(completion: str) -> None:
        completions.append(completion)

    model = tiny_policy()
    model.generation_config.eos_token_id = [END, semicolon]
    prompt = sequences()[0].prompt_ids
    EngineCredit(SOFT, model, tokenizer, find_answer=find).weigh(
        [EngineSequence(prompt, [5, semicolon]), EngineSequence(prompt, [5, END])]
    )
    assert completions == [tokenizer.decode([5])] * 2

    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(
        ConfigError, match=r"tokenizer: must have an end token, got none in .*; set tokenizer.eos_token"
    ):
        EngineCredit(SOFT, model, tokenizer, find_answer=find).weigh(sequences())


def test_wrong_advantages_are_refused():
    credit = engine_credit(SOFT)
    right = [torch.ones(len(text) + 1) for text in COMPLETIONS]
    with pytest.raises(ConfigError, match=r"advantages: must be one tensor for each of 4 sequences, got 3; pass those"):
        credit.scale(sequences(), right[:3])
    with pytest.raises(
        ConfigError, match=r"advantages: must be 8 floats in sequence 0.*got torch.float32 of shape \(7,"
    ):
        credit.scale(sequences(), [torch.ones(7), *right[1:]])
    with pytest.raises(
        ConfigError, match=r"advantages: must be 3 floats in sequence 1.*got torch.int64 of shape \(3,\)"
    ):
        credit.scale(sequences(), [right[0], torch.ones(3, dtype=torch.int64), *right[2:]])
    with pytest.raises(
        ConfigError, match=r"credit.anneal: must be 0 where the engine does not tell.*got 0.5; leave it"
    ):
        engine_credit(CreditConfig(anneal=0.5)).scale(sequences(), right)
    annealed = engine_credit(CreditConfig(anneal=0.5)).scale(sequences(), right, progress=1.0)
    assert all((part == 1).all() for part in annealed)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"micro_batch_size: must be at least 1, got 0; 8 sequences are the default"):
        engine_credit(SOFT, micro_batch_size=0)
    with pytest.raises(
        ConfigError, match=r"temperature: must be positive and finite, got 0.0; pass that of the rollout"
    ):
        engine_credit(SOFT, temperature=0.0)
    with pytest.raises(
        ConfigError, match=r"tokenizer: must be given with a loaded model, got none for Llama.*; pass the"
    ):
        EngineCredit(SOFT, tiny_policy())
    with pytest.raises(CreditError, match=r"got 'gradient', which needs a backward pass"):
        EngineCredit("gradient", "program")
    with pytest.raises(ConfigError, match=r"credit.entry: must be 'advantage' in another trainer"):
        EngineCredit(CreditConfig(entry="reward"), "program")
    with pytest.raises(ConfigError, match=r"device: must be one that torch can use here, got 'nowhere'"):
        EngineCredit(SOFT, "program", device="nowhere").weigh(sequences())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask: must have shape \(1, 3\) for 1 response lengths, got"),
        (
            {"attention_mask": torch.tensor([[1, 0, 1]])},
            r"attention_mask: must be 1 on one run of tokens, got a gap in s",
        ),
        (
            {"response_lengths": [3]},
            r"response_lengths: must leave a token of the prompt, got 3 of 3 tokens in seq.* 0;",
        ),
        ({"response_lengths": [-1]}, r"response_lengths: must leave a token of the prompt, got -1 of 3"),
        ({"response_lengths": [1, 1]}, r"input_ids: must have shape \(2, 3\) for 2 response lengths, got"),
        ({"trained": torch.ones(1, 1)}, r"trained: must have shape \(1, 3\)"),
        ({"rewards": [1.0, 2.0]}, r"rewards: must be one for each of 1 sequences, got 2; pass those of one batch"),
    ],
)
def test_wrong_padding_is_refused(changes, text):
    arguments = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "attention_mask": torch.ones(1, 3),
        "response_lengths": [1],
        **changes,
    }
    with pytest.raises(ConfigError, match=text):
        split_sequences(**arguments)


def test_an_engine_must_be_there_in_a_known_version(monkeypatch):
    def found(name: str) -> str:
        if name == "absent":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"old": "0.7.3", "dev": "0.10.0.dev0", "odd": "main"}[name]

    monkeypatch.setattr(module, "version", found)
    assert require_engine("dev", ("0.9", "0.10"), "pip install dev") == "0.10.0.dev0"
    with pytest.raises(
        MissingExtraError, match=r"absent: must be installed.*in version 0.9, got no such package; pip in"
    ):
        require_engine("absent", ("0.9",), "pip install absent")
    with pytest.raises(
        MissingExtraError, match=r"old: must be version 0.9 or 0.10 for this adapter, got 0.7.3; pip ins"
    ):
        require_engine("old", ("0.9", "0.10"), "pip install old")
    with pytest.raises(
        MissingExtraError, match=r"odd: must be version 0.9 for this adapter, got main; pip install odd"
    ):
        require_engine("odd", ("0.9",), "pip install odd")
    with pytest.raises(
        ConfigError, match=r"base: must be a subclass of engine.Trainer, got <class 'str'>; leave it out"
    ):
        require_base(str, int, "engine.Trainer")
