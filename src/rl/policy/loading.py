"""Models, tokenizers and adapters by name or folder; nothing that lies in a folder is executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import CheckpointError, ConfigError, PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(name: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by name or folder, or the shipped one for "chain". No remote code is run.

    Raises:
        ConfigError: no such dtype.
        PolicyError: it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kinds = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ConfigError(f"dtype: must be one of {', '.join(kinds)}, got {dtype!r}; 'auto' takes the checkpoint's own")
    if name == "chain":
        model, tokenizer = load_chain_model()
        return (model if dtype == "auto" else model.to(kinds[dtype])), tokenizer
    failures = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
    try:
        # Left out, the second option would ask on a terminal whether the folder's own code may run.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kinds[dtype], trust_remote_code=False)
    except failures as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise PolicyError(
            f"model: must be a folder or a name that transformers can load, got {name!r} ({first}); check the name, or "
            "use 'chain'"
        ) from error
    return model, tokenizer


def load_policy(model: str, dtype: str, device: str | None, adapter: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer on a device, with a trainable adapter where one is given.

    Raises:
        ConfigError: no such dtype, or no such device here.
        PolicyError: the model cannot be loaded.
        CheckpointError: the adapter cannot, or does not fit.
    """
    check_device(device)
    network: Any
    network, tokenizer = load_model(model, dtype)
    if adapter is not None:
        network = _with_adapter(network, adapter)
    if device is not None:
        network.to(device)
    return network, tokenizer


def check_device(device: str | None) -> None:
    """Refuse a device that is none, or that this machine lacks, before anything is loaded."""
    import torch

    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0][:120]
        raise ConfigError(
            f"device: must be one that torch can use here, got {device!r} ({first}); use 'cpu', or leave it out"
        ) from error


def _with_adapter(network: Any, adapter: Path) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    from rl.policy.actor_critic import quiet_peft

    try:
        with quiet_peft():
            return PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"adapter: must be a PEFT folder that fits the model, got {adapter} ({first}); give --model the base that "
            "it was trained on"
        ) from error


CHAIN_MODEL = Path(__file__).parent.parent / "assets" / "chain"
"""The folder of the base model that comes with the package."""


def load_chain_model(folder: str | Path = CHAIN_MODEL) -> tuple[Any, Any]:
    """The base model, in float32 and evaluation mode, and its tokenizer.

    Raises:
        PolicyError: the folder holds no model.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise PolicyError(
            f"folder: must hold a model that pretrain() wrote, got {str(folder)!r} without model.safetensors; "
            "install the package again, or run rl.chain_model.pretrain.pretrain"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if folder == CHAIN_MODEL:  # where a package is installed has no place in checkpoints, logs and pages
        model.config._name_or_path = model.name_or_path = "chain"
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
