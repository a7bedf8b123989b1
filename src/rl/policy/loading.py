"""Load models, tokenizers and adapters by name or folder; code in a folder is never executed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from flowgraph import MissingExtraError
from rl.errors import CheckpointError, ConfigError, PolicyError
from rl.policy.actor_critic import quiet_peft
from rl.policy.shipped_models import SHIPPED_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of dtypes; "auto" is that of the checkpoint."""

# What transformers and peft raise for a folder that is missing, incomplete or of another architecture.
_MODEL_FAILURES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)
ADAPTER_FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def load_policy(
    model: str, dtype: str, device: str | None, adapter: Path | None, *, quantize: str | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer to a device, with a trainable adapter if one is given.

    Args:
        model: name or folder, or the name of a shipped model, such as "chain".
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: as torch names it; None: the CPU.
        adapter: a PEFT folder; None: the base alone.
        quantize: "4bit" holds the linear layers of the base in 4 bits (QLoRA); None: in the dtype.

    Returns:
        The model, a PEFT model with an adapter, and its tokenizer.

    Raises:
        ConfigError: an unknown dtype or quantisation, or a device that this machine lacks.
        MissingExtraError: bitsandbytes is not installed, and ``quantize`` needs it.
        PolicyError: the model cannot be loaded.
        CheckpointError: the adapter cannot be loaded, or does not fit the model.
    """
    check_device(device)
    loaded: Any
    loaded, tokenizer = load_model(model, dtype, quantize=quantize, device=device)
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    # Quantised weights were loaded to their device.
    if device is not None and quantize is None:
        loaded.to(device)
    return loaded, tokenizer


def load_model(
    name: str, dtype: str = "auto", *, quantize: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by name or folder, or a shipped one.

    Args:
        name: name or folder, or one of :data:`rl.policy.shipped_models.SHIPPED_MODELS`.
        dtype: as for :func:`load_policy`; with ``quantize`` also that of the computation, bfloat16 for "auto".
        quantize: as for :func:`load_policy`.
        device: of quantised weights; None: the GPU of this process, or the CPU. Other weights are loaded to the CPU.

    Raises:
        ConfigError: an unknown dtype or quantisation.
        MissingExtraError: bitsandbytes is not installed, and ``quantize`` needs it.
        PolicyError: the model cannot be loaded.
    """
    check_quantize(quantize, name)
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype: must be one of {', '.join(_DTYPES)}, got {dtype!r}; 'auto' takes the checkpoint's own"
        )
    if name in SHIPPED_MODELS:
        model, tokenizer = load_base_model(name)
        if dtype != "auto":
            model = model.to(_DTYPES[dtype])
        return model, tokenizer
    try:
        # Without ``trust_remote_code=False`` transformers offers on a terminal to run code of the folder.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options = {} if quantize is None else _four_bits(dtype, device)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=_DTYPES[dtype], trust_remote_code=False, **options)
    except _MODEL_FAILURES as error:
        raise PolicyError(
            f"model: must be a folder or a name that transformers can load, got {name!r} ({first_line(error)}); check "
            f"the name, or use a shipped model ({', '.join(map(repr, SHIPPED_MODELS))})"
        ) from error
    return model, tokenizer


def load_chain_model(folder: str | Path = "chain") -> tuple[Any, Any]:
    """Load a base model of the chain task and its tokenizer, by default the shipped one.

    See :func:`load_base_model`, which loads those of the other tasks too.

    Example:
        >>> model, tokenizer = load_chain_model()
        >>> tokenizer.decode(tokenizer("a=7;a?")["input_ids"])
        'a=7;a?'
    """
    return load_base_model(folder)


def load_base_model(model: str | Path) -> tuple[Any, Any]:
    """Load the base model of one of the package's own tasks, and its tokenizer.

    Args:
        model: name of a shipped model (``"chain"``, ``"pathsearch"``, ``"program"`` or ``"wandering"``), or a folder
            that ``flowgraph-rl pretrain`` wrote.

    Returns:
        The model, in float32 and evaluation mode, and its tokenizer.

    Raises:
        PolicyError: the folder contains no model.

    Example:
        >>> model, tokenizer = load_base_model("wandering")
        >>> tokenizer.decode(tokenizer("A=B+3;")["input_ids"][1])
        '=B+3'
    """
    shipped = SHIPPED_MODELS.get(str(model))
    folder = Path(model) if shipped is None else shipped.folder
    if not (folder / "model.safetensors").is_file():
        raise PolicyError(
            f"folder: must hold a model that pretrain() wrote, got {str(folder)!r} without model.safetensors; "
            "install the package again, or run flowgraph-rl pretrain"
        )
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if shipped is not None:
        # Checkpoints, logs and pages record this name; the folder of the installation would be meaningless there.
        network.name_or_path = shipped.name
        network.config._name_or_path = shipped.name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return network.eval(), tokenizer


def check_quantize(quantize: str | None, model: str) -> None:
    """Check that a base can be quantised here, before anything is loaded.

    Raises:
        ConfigError: another value than "4bit", or a shipped model.
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantize is None:
        return
    if quantize != "4bit":
        raise ConfigError(
            f"quantize: must be '4bit' or left out, got {quantize!r}; leave it out for the base's own dtype"
        )
    if model in SHIPPED_MODELS:
        raise ConfigError(
            f"quantize: must come with a model of your own, got '4bit' for {model!r}, which has less than a million "
            "parameters; leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "quantize: '4bit' must have the package bitsandbytes, got an environment without it; pip install "
            "bitsandbytes, or leave quantize out"
        )


def quantization_of(model: Any) -> str | None:
    """Describe how the weights of a base are quantised, for the settings that a resumed run must share; None: not."""
    settings: Any = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = values.get("quant_method", "unknown")
    method = str(getattr(method, "value", method))
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        return f"{method} 4bit {values.get('bnb_4bit_quant_type', '')}".strip()
    return method


def _four_bits(dtype: str, device: str | None) -> dict[str, Any]:
    """Return the arguments that load a base in NF4, as QLoRA does (Dettmers et al., arXiv 2305.14314)."""
    if device is None:
        # The place that accelerate gives to this process.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    compute_dtype = torch.bfloat16 if dtype == "auto" else _DTYPES[dtype]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,  # type: ignore[arg-type]
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def check_device(device: str | None) -> None:
    """Check that torch can use a device, before anything is loaded.

    Raises:
        ConfigError: an unknown device, or one that this machine lacks.
    """
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device: must be one that torch can use here, got {device!r} ({first_line(error, 120)}); use 'cpu', or "
            "leave it out"
        ) from error


def _with_adapter(model: Any, adapter: Path) -> Any:
    """Wrap a model with a trainable adapter from a PEFT folder."""
    from peft import PeftModel

    try:
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except ADAPTER_FAILURES as error:
        raise CheckpointError(
            f"adapter: must be a PEFT folder that fits the model, got {adapter} ({first_line(error)}); give --model "
            "the base that it was trained on"
        ) from error


def first_line(error: Exception, length: int = 200) -> str:
    """Return the first line of an error's text, or its class, because some texts fill a page."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    return text.splitlines()[0][:length]
