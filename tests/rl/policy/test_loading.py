"""Models, adapters and devices from the command line: loaded as asked for, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl import CheckpointError, ConfigError, PolicyError
from rl.policy.loading import load_model, load_policy
from tests.fixtures.policies import alphabet, tiny_policy


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
