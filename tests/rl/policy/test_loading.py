"""Models, adapters and devices from the command line: loaded as asked for, or refused with a reason."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rl.policy.loading
from flowgraph import MissingExtraError
from rl import ActorCritic, CheckpointError, ConfigError, LoraConfig, PolicyError, PPOConfig, PPOTrainer
from rl.commands.run_file import read_run
from rl.policy.actor_critic import ModelInput
from rl.policy.loading import load_model, load_policy, quantization_of
from tests.fixtures.policies import Digits, alphabet, tiny_policy
from tests.fixtures.rl_commands import SHORT, invoke


def test_models_load_from_a_folder_in_the_dtype_asked_for(tmp_path: Path):
    model = tiny_policy()
    model.save_pretrained(tmp_path)
    alphabet().save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded, tokenizer = load_model(str(tmp_path), dtype)
        assert loaded.dtype == expected
        assert tokenizer("a=1")["input_ids"] == alphabet()("a=1")["input_ids"]
    for name in (str(tmp_path), "chain"):
        with pytest.raises(
            ConfigError, match="dtype: must be one of auto, float32, bfloat16, float16, got 'int8'; 'auto'"
        ):
            load_model(name, "int8")


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json", "shape", "code", "nothing"])
def test_folders_that_hold_no_model_are_refused(tmp_path: Path, broken: str):
    tiny_policy().save_pretrained(tmp_path)
    alphabet().save_pretrained(tmp_path)
    name = tmp_path
    if broken == "nothing":
        name = tmp_path / "none"
    elif broken == "shape":
        other = tiny_policy()
        other.resize_token_embeddings(7)
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    elif broken == "code":
        text = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}'
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "own.py").write_text("raise SystemExit('its code was run')")
    else:
        (tmp_path / broken).write_bytes(b'{"a": ')
    with pytest.raises(
        PolicyError, match=r"model: must be a folder or a name that transformers can load, got .* \(.+\); check"
    ):
        load_model(str(name))


def test_an_adapter_that_is_none_and_a_device_that_is_not_there_are_refused(tmp_path: Path):
    tiny_policy().save_pretrained(tmp_path)
    alphabet().save_pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter: must be a PEFT folder that fits the model, got .*adapter"):
        load_policy(str(tmp_path), "auto", None, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="device: must be one that torch can use here, got 'gpu'"):
        load_policy(str(tmp_path), "auto", "gpu", None)


# A base in 4 bits -------------------------------------------------------------------------------------------


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        rl.policy.loading.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )


MISSING = (
    "quantize: '4bit' must have the package bitsandbytes, got an environment without it; pip install bitsandbytes, or "
    "leave quantize out"
)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_4_bits_without_bitsandbytes_are_refused_before_anything_is_loaded(tmp_path: Path):
    with pytest.raises(MissingExtraError, match=MISSING):
        load_policy(str(tmp_path / "none"), "auto", None, None, quantize="4bit")
    for command in (["train", "--output", tmp_path / "run"], ["eval", "-n", 1]):
        with pytest.raises(MissingExtraError, match=MISSING):
            raise invoke(*command, "--model", tmp_path, *SHORT, "--quantize", "4bit", code=1).exception  # type: ignore[misc]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("quantize", "model", "message"),
    [
        ("8bit", "none", "quantize: must be '4bit' or left out, got '8bit'; leave it out for"),
        ("4bit", "chain", "quantize: must come with a model of your own, got '4bit' for 'chain', which"),
        ("4bit", "wandering", "quantize: must come with a model of your own, got '4bit' for 'wandering', which"),
    ],
)
def test_other_quantisations_are_refused(quantize: str, model: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_policy(model, "auto", None, None, quantize=quantize)


@pytest.mark.parametrize(
    ("dtype", "device", "compute"),
    [("auto", None, torch.bfloat16), ("float32", "cpu", torch.float32)],
)
def test_4_bits_are_asked_of_transformers_as_qlora_has_them(
    dtype: str, device: str | None, compute: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a stand-in for the package and for the loader, which needs it."""
    tiny_policy().save_pretrained(tmp_path)
    alphabet().save_pretrained(tmp_path)
    spec = importlib.machinery.ModuleSpec("bitsandbytes", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        rl.policy.loading.importlib.util, "find_spec", lambda name: spec if name == "bitsandbytes" else find(name)
    )
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options)
        model = tiny_policy()
        model.config.quantization_config = options["quantization_config"]
        return model

    monkeypatch.setattr(rl.policy.loading, "BitsAndBytesConfig", lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setattr(rl.policy.loading.AutoModelForCausalLM, "from_pretrained", load)
    load_policy(str(tmp_path), dtype, device, None, quantize="4bit")
    settings = asked["quantization_config"]
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == (
        True, "nf4", True,
    )  # fmt: skip
    assert settings.bnb_4bit_compute_dtype == compute
    expected = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert asked["device_map"] == {"": expected}


def test_the_setting_comes_from_the_file_or_the_flag_and_is_written(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: base\nquantize: 4bit\n")
    run = read_run(path, {}, credit=None, settings=[], task_options=[])
    assert run.quantize == "4bit"
    path.write_text(run.to_yaml())
    assert read_run(path, {}, credit=None, settings=[], task_options=[]) == run
    assert read_run(None, {"quantize": "4bit"}, credit=None, settings=[], task_options=[]).quantize == "4bit"
    assert read_run(None, {"quantize": None}, credit=None, settings=[], task_options=[]).quantize is None


def test_a_run_resumes_on_a_base_of_the_same_quantisation_alone(tmp_path: Path):
    def trainer(quantized: bool, **options: Any) -> PPOTrainer:
        model = tiny_policy()
        if quantized:
            model.config.quantization_config = {
                "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
            }  # fmt: skip
        config = PPOConfig(steps=1, num_prompts=2, group_size=2, max_response_tokens=4, advantage="rloo")
        return PPOTrainer(
            model,
            alphabet(),
            task=Digits(),
            config=config,
            credit="uniform",
            output=tmp_path,
            progress=False,
            **options,
        )

    trainer(True).train()
    assert trainer(True, resume=True).position.step == 1
    with pytest.raises(CheckpointError, match=r"quantization: 'bitsandbytes 4bit nf4' -> '\(none\)'"):
        trainer(False, resume=True)
    assert quantization_of(tiny_policy()) is None


def test_4_bit_layers_keep_the_form_that_has_a_gradient():
    """bitsandbytes repacks the weights of a layer on some CPUs when it runs without gradients."""
    model = tiny_policy()
    layer: Any = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    ActorCritic(model, LoraConfig(rank=2, targets=["up_proj"]), critic=False)
    assert layer.support_avx512bf16_for_cpu is False
    packed = tiny_policy()
    layer = packed.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(PolicyError, match=r"model: its 4-bit weights must be as they were loaded, got .*q_proj packed"):
        ActorCritic(packed, LoraConfig(rank=2), critic=False)


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_4_bits_has_the_gradients_of_its_rounded_weights(tmp_path: Path):
    """Policy and critic, recomputed layers, after a pass without gradients: against plain layers of the same values."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=45, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    alphabet().save_pretrained(tmp_path)
    ids = torch.tensor([[3, 30, 39, 5, 8, 12, 31, 1]])

    def gradients(plain: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        model, _ = load_policy(str(tmp_path), "float32", "cpu", None, quantize="4bit")
        quantized = [name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
        assert len(quantized) == 14
        for name in quantized if plain else []:
            part = model.get_submodule(name)
            layer = nn.Linear(part.in_features, part.out_features, bias=False)
            weight = bitsandbytes.functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
            layer.weight.data = weight.float()
            model.set_submodule(name, layer)
        if plain:
            del model.config.quantization_config
        policy = ActorCritic(model, LoraConfig(rank=2), critic=True, gradient_checkpointing=True)
        random = torch.Generator().manual_seed(1)
        trained = policy.policy_parameters() | policy.value_parameters()
        for parameter in trained.values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=random))
        inputs = ModelInput(ids, torch.ones_like(ids), torch.arange(8)[None])
        with torch.no_grad():
            policy(inputs, ids[:, 4:], 1.0)
        logprobs, _, values = policy(inputs, ids[:, 4:], 1.0)
        assert values is not None
        (logprobs.sum() + values.sum()).backward()
        return logprobs.detach(), {name: parameter.grad for name, parameter in trained.items()}

    found, gradient = gradients(plain=False)
    expected, exact = gradients(plain=True)
    torch.testing.assert_close(found, expected)
    for name, value in exact.items():
        other = gradient[name]
        assert value is not None
        assert other is not None
        assert value.abs().max() > 0
        torch.testing.assert_close(other, value)
