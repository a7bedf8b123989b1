"""Random models, built from configurations alone: small ones of five families, and one of Qwen3-4B's shape."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

SMALL_VOCABULARY = 99
WINDOW = 8
"""Tokens of a sliding window: much shorter than the texts, so that a wrong mask shows."""
LENGTHS = (24, 17)
"""Tokens of the two texts of a small batch."""
LARGE_DTYPE = torch.bfloat16

_SMALL: dict[str, Any] = {
    "vocab_size": SMALL_VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # sharp attention: nearly uniform rows would hide a wrong scale or mask
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 8}),
    "gemma3": (
        "gemma3_text",
        _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": _LAYER_TYPES},
    ),
    "gpt2": ("gpt2", {"n_positions": 64}),
    "mistral": ("mistral", _GROUPED | {"sliding_window": WINDOW}),
}
"""Model type and configuration of each small family; gemma3 and mistral have sliding windows."""


def small_model(family: str, device: torch.device, dtype: torch.dtype, seed: int, **changes: Any) -> Any:
    """A small model of a family in evaluation mode, the same weights on every device.

    Args:
        family: a name of :data:`FAMILIES`.
        device: where it is put.
        dtype: of its weights.
        seed: of its weights.
        changes: entries of the configuration that differ.
    """
    kind, entries = FAMILIES[family]
    config = AutoConfig.for_model(kind, **(_SMALL | entries | changes))
    model = random_model(config, torch.device("cpu"), dtype, seed)
    # Normalised queries and keys would attend almost uniformly with weights of 1.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.fill_(2.0)
    return model.to(device)


def small_batch(side: str, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Two texts padded on one side, as ``input_ids``, ``attention_mask`` and ``position_ids``."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        place = slice(length) if side == "right" else slice(-length, None)
        input_ids[row, place] = torch.randint(3, SMALL_VOCABULARY, (length,), generator=generator)
        attention_mask[row, place] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def qwen3_4b_config(num_layers: int = 36) -> PreTrainedConfig:
    """The shape of Qwen3-4B, or of its first layers."""
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def toy_config(num_layers: int = 6) -> PreTrainedConfig:
    """The same architecture at a size for tests."""
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A frozen model with random weights, drawn on the device itself, in evaluation mode.

    Cost: one pass over the weights on the device. No weight is ever on the CPU unless the device is.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its package."""
    return str(dtype).removeprefix("torch.")


def described(model: Any) -> str:
    """The shape of a model in one line."""
    shape = shape_of(model)
    return (
        f"{shape['model_type']} of {shape['num_hidden_layers']} layers, width {shape['hidden_size']}, "
        f"{shape['parameters'] / 1e6:,.1f} million weights in {shape['dtype']}"
    )


def shape_of(model: Any) -> dict[str, Any]:
    """Sizes of a model as JSON values."""
    config = model.config.get_text_config(decoder=True)
    names = (
        "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size",
    )  # fmt: skip
    sizes = {name: getattr(config, name, None) for name in names}
    parameters = sum(weight.numel() for weight in model.parameters())
    return {**sizes, "parameters": parameters, "dtype": dtype_name(model.dtype)}
