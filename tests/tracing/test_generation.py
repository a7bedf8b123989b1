"""The response that is generated where none is given: the same greedy text whatever the model's settings and state."""

import copy
import io
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GenerationConfig

from flowgraph import FlowTrace, capture, load_trace, trace
from flowgraph.attention.modules import base_model
from flowgraph.commands.terminal import render_trace
from flowgraph.tracing.generation import end_tokens, generate_response
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny, tiny_model

LIMIT = 12

old_names = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")


def fresh() -> Any:
    return copy.deepcopy(tiny_model())


def greedy(model: nn.Module, limit: int = LIMIT) -> list[int]:
    """The most probable token each time, by one full forward pass per token and no generation code at all."""
    tokenizer = tiny()[1]
    # What the model is asked: the prompt as the trace encodes it.
    ids = trace(tiny_model(), tokenizer, PROMPT, RESPONSE)
    prompt = ids.token_ids[~ids.generated][None]
    inner = base_model(model).eval()
    made: list[int] = []
    while len(made) < limit:
        with torch.no_grad():
            logits = inner(torch.cat([prompt, torch.tensor([made], dtype=torch.int64)], dim=1)).logits
        made.append(int(logits[0, -1].argmax()))
        if made[-1] in end_tokens(inner, tokenizer):
            break
    return made


def generated(model: nn.Module, limit: int = LIMIT) -> list[int]:
    return generate_response(base_model(model), tiny()[1], PROMPT, limit, lambda line: None)


SETTINGS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.6, "top_k": 5},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4},
    {"num_beams": 2, "length_penalty": 3.0, "early_stopping": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"stop_strings": ["\n", "a", "e"]},
    {"suppress_tokens": list(range(100))},
    {"begin_suppress_tokens": list(range(150))},
    {"forced_eos_token_id": 7},
    {"min_new_tokens": 30},
    {"max_length": 5},
    {"max_time": 0.0},
    {"bad_words_ids": [[token] for token in range(200)]},
    {"sequence_bias": [[[token], 50.0] for token in range(5)]},
    {"guidance_scale": 2.0},
    {"encoder_repetition_penalty": 1.5},
    {"exponential_decay_length_penalty": (2, 5.0)},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings))
def test_no_setting_of_the_model_changes_the_text(settings: dict[str, Any]):
    """transformers#35372: generate() inherits from ``generation_config`` whatever a call leaves open."""
    model = fresh()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    before = copy.deepcopy(own.to_dict())
    assert generated(model) == greedy(tiny_model())
    assert model.generation_config is own
    assert own.to_dict() == before


def test_the_end_tokens_of_the_model_end_it():
    right = greedy(tiny_model())
    model = fresh()
    model.generation_config.eos_token_id = [359, right[3]]
    wanted = right[: right.index(right[3]) + 1]
    assert generated(model) == wanted
    made = trace(model, tiny()[1], PROMPT, max_new_tokens=LIMIT)
    assert made.token_ids[made.generated].tolist() == wanted
    assert made.provenance["truncated"] is False
    assert made.provenance["stop"] == f"end token {right[3]}"
    assert f"response: generated, ended by itself (end token {right[3]})" in repr(made)


def with_dropout(model: Any) -> nn.Module:
    config = peft.LoraConfig(
        r=8,
        lora_alpha=64,
        lora_dropout=0.5,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@old_names
def test_dropout_is_off_and_the_mode_is_restored():
    """peft#3753: a model with adapters is in training mode after it is made."""
    model = with_dropout(fresh())
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    texts = []
    for seed in range(3):
        torch.manual_seed(seed)
        texts.append(generated(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert texts == [texts[0]] * 3
    assert texts[0] == greedy(model)
    assert texts[0] != greedy(tiny_model())


@old_names
def test_the_mode_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch):
    model = fresh().train()
    own = model.generation_config
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        generated(model)
    assert model.training
    assert model.generation_config is own


@pytest.mark.parametrize(
    "offload", [accelerate.cpu_offload, lambda model: accelerate.dispatch_model(model, {"": "cpu"})]
)
def test_offloaded_weights(offload: Any):
    """transformers#35451: embeddings on the meta device have no place for the ids."""
    right = greedy(tiny_model())
    model = offload(fresh())
    assert generated(model) == right
    with pytest.warns(UserWarning, match="cut off"):
        made = trace(model, tiny()[1], PROMPT, max_new_tokens=LIMIT)
    assert made.token_ids[made.generated].tolist() == right
    assert torch.equal(capture(model, made.token_ids).dense(), capture(tiny_model(), made.token_ids).dense())


# Whether the response ended ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut() -> FlowTrace:
    with pytest.warns(UserWarning, match="cut off at .* raise max_new_tokens"):
        return trace(*tiny(), chat(), max_new_tokens=8)


def test_a_response_cut_at_the_limit_says_so(cut: FlowTrace, tmp_path: Path):
    facts = {name: cut.provenance[name] for name in ("response", "truncated", "stop")}
    assert facts == {"response": "generated", "truncated": True, "stop": "max_new_tokens=8"}
    assert "  response: generated, cut off by max_new_tokens=8 before it ended" in repr(cut).splitlines()
    cut.save(tmp_path / "cut.safetensors")
    assert load_trace(tmp_path / "cut.safetensors").provenance == cut.provenance
    cut.to_html(tmp_path / "cut.html")
    assert "The response was cut off by max_new_tokens=8 before it ended" in (tmp_path / "cut.html").read_text()


def test_the_terminal_says_so(cut: FlowTrace):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_trace(cut))
    assert "response: generated, cut off by max_new_tokens=8 before it ended" in console.export_text()


def test_a_response_cut_by_the_context_says_so():
    model = fresh()
    model.config.max_position_embeddings = 50
    with pytest.warns(UserWarning, match="cut off at"):
        made = trace(model, tiny()[1], PROMPT, max_new_tokens=50)
    assert made.num_tokens == 50
    assert made.provenance["stop"] == "context of 50 tokens"


def test_a_given_response_is_named_and_nothing_is_guessed():
    for given in (RESPONSE, tiny()[1](RESPONSE).input_ids):
        made = trace(*tiny(), chat(), given)
        facts = {name: made.provenance[name] for name in ("response", "truncated", "stop")}
        assert facts == {"response": "given", "truncated": None, "stop": None}
        assert "  response: given" in repr(made).splitlines()


def test_settings_without_end_tokens():
    model, tokenizer = fresh(), tiny()[1]
    model.generation_config = GenerationConfig(eos_token_id=None)
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=torch.tensor([3, 4]))
    assert end_tokens(model, tokenizer) == [3, 4]
    model.generation_config = None
    assert end_tokens(model, None) == []


# Which weights ran ------------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Any]:
    made = trace(model, tiny()[1], PROMPT, RESPONSE)
    return {name: made.provenance[name] for name in ("weights", "adapters", "quantization")}


@old_names
def test_an_adapter_is_told_from_its_base_and_from_other_weights():
    base = weights_of(tiny_model())
    assert base["adapters"] == {}
    assert base["quantization"] is None
    model = with_dropout(fresh())
    adapted = weights_of(model)
    adapter = adapted["adapters"]["default"]
    assert (adapter["type"], adapter["r"], adapter["lora_alpha"]) == ("LORA", 8, 64)
    assert adapter["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert not adapter["merged"]
    assert weights_of(model) == adapted

    # Other weights of the same shape.
    layer: Any = next(module for module in model.modules() if hasattr(module, "lora_B"))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] += 1
    assert weights_of(model)["adapters"]["default"]["digest"] != adapter["digest"]

    # Switched off, the base ran; merged, the base weights are others.
    with model.disable_adapter():
        assert weights_of(model)["adapters"] == {}
    merged = weights_of(model.merge_and_unload())
    assert merged["adapters"] == {}
    assert merged["weights"] != base["weights"]


@old_names
def test_only_the_active_adapter_counts():
    model: Any = with_dropout(fresh())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    assert list(weights_of(model)["adapters"]) == ["default"]
    model.set_adapter("other")
    [(name, adapter)] = weights_of(model)["adapters"].items()
    assert (name, adapter["r"], adapter["target_modules"]) == ("other", 2, ["k_proj"])


def test_fine_tuned_weights_have_another_digest():
    model = fresh()
    base = weights_of(model)
    assert base == weights_of(tiny_model())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert weights_of(model)["weights"] != base["weights"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", 4)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ("bitsandbytes", 4)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ("bitsandbytes", 8)),
        ({"quant_method": "fp8"}, ("fp8", None)),
    ],
)
def test_a_quantised_model_names_method_and_bits(settings: dict[str, Any], wanted: tuple[str, int | None]):
    model = fresh()
    model.config.quantization_config = settings
    recorded = weights_of(model)["quantization"]
    assert (recorded["method"], recorded["bits"]) == wanted
    assert recorded["settings"] == settings


def test_offloaded_weights_have_no_digest():
    assert weights_of(accelerate.cpu_offload(fresh()))["weights"] is None
