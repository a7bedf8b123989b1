"""Sizes of models: weights counted by hand and by transformers, and configurations that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flowgraph as fg
from flowgraph.cost.model_shape import MODEL_SHAPES, find_shape

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def written(tmp_path: Path, **changes: object) -> Path:
    """A config.json with some entries changed; None removes one."""
    entries = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "billions"),
    # Model cards: Qwen3-4B has 4.0 billion weights, 3.6 without embeddings; Llama 3.1 has 8.03 and 70.6.
    [("4b", 3.6), ("8b", 8.03), ("70b", 70.6)],
)
def test_named_shapes_have_the_weights_of_their_model_cards(name: str, billions: float):
    shape = MODEL_SHAPES[name]
    weights = shape.layers * shape.layer_weights
    if name != "4b":
        weights += 2 * shape.width * shape.vocabulary
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_weights_of_a_layer_are_those_of_transformers(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"}))
    model.config.save_pretrained(tmp_path)
    shape = find_shape(tmp_path)
    layer = model.model.layers[0]
    assert shape.layer_weights == sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    assert shape.adapter_rows == sum(sum(weight.shape) for weight in layer.parameters() if weight.ndim == 2)
    assert (shape.layers, shape.vocabulary, shape.context, shape.head_width) == (3, 100, 512, 16)


def test_a_configuration_of_gpt2_has_other_names(tmp_path: Path):
    path = tmp_path / "small.json"
    path.write_text(
        '{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 50,'
        ' "n_inner": null}',
        encoding="utf-8",
    )
    assert find_shape(path) == fg.ModelShape("small", 2, 64, 4, 4, 16, 256, 50, 128, 2)


def test_the_decoder_of_a_model_of_text_and_images_is_read(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "text_config": LLAMA}), encoding="utf-8")
    assert find_shape(path).layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, r"config: must have the field num_hidden_layers, got none .*pass the config"),
        ({"hidden_size": "64"}, r"config: hidden_size: must be a positive integer, got '64'; correct the file"),
        ({"vocab_size": 0}, r"config: vocab_size: must be a positive integer, got 0; correct"),
        ({"num_key_value_heads": 3}, r"heads: must be a multiple of key_heads, got 4 and 3; each"),
        ({"hidden_size": 66}, r"config: hidden_size must be a multiple of num_attention_heads .*got 66 and 4; correct"),
        ({"num_experts": 8}, r"config: must describe a dense model, got num_experts=8, .*ModelShape"),
        ({"kv_lora_rank": 512}, r"config: must have full keys and values, got kv_lora_rank=512.*ModelShape"),
        ({"sliding_window": 128}, r"config: every layer must attend .*got sliding_window=128; pass"),
        ({"layer_types": ["linear_attention"]}, r"config: every layer must attend .*got layer_types with linear_att"),
        ({"model_type": "mamba"}, r"config: model_type must be one of .*llama.*, got 'mamba'; pass a flowgraph"),
    ],
)
def test_a_configuration_that_the_counts_do_not_describe_is_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(fg.InvalidInputError, match=message):
        find_shape(written(tmp_path, **changes))


def test_a_window_that_is_switched_off_is_none(tmp_path: Path):
    assert find_shape(written(tmp_path, sliding_window=128, use_sliding_window=False)).layers == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must be a file with one JSON object, got list in"), ("{", "must be a readable file .*JSONDecodeError")],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(fg.InvalidInputError, match=message):
        find_shape(path)


def test_an_unknown_name_is_refused():
    with pytest.raises(fg.InvalidInputError, match=r"config: must be 4b, 8b, 70b, a folder .*got '9b', .*check"):
        find_shape("9b")
