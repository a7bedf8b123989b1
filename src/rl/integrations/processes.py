"""Compare what the processes of a launch were given, and end all of them where one has failed.

A process that ends alone, or that makes another number of forward passes than the others, leaves these waiting in their
next exchange, until the launcher or a timeout ends them. The functions here are exchanges themselves: every process
calls them at the same place. Without a process group each is a plain local check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch.distributed as dist

from flowgraph import FlowgraphError
from rl.config import CreditConfig
from rl.errors import ConfigError, CreditError

_PLAIN = (str, int, float, bool, type(None))
"""Types whose text is the same in every process; other objects may print their address."""


def require_same(settings: Mapping[str, Any]) -> None:
    """Refuse settings that differ between processes, in every process alike.

    Args:
        settings: values by name; every process passes the same names.

    Raises:
        ConfigError: two processes have different values; the message names both.

    Cost: one exchange of a few hundred bytes.
    """
    of_this = {name: described_setting(value) for name, value in settings.items()}
    of_first, *of_others = _of_all_processes(of_this)
    for name, expected in of_first.items():
        for process, of_other in enumerate(of_others, start=1):
            if of_other[name] != expected:
                raise ConfigError(
                    f"{name}: must be the same in all processes, got {expected} in process 0 and {of_other[name]} in "
                    f"process {process}; start every process with the same script, settings and data"
                )


def fail_together(error: FlowgraphError | None) -> None:
    """Raise in every process if one of them has failed.

    Args:
        error: what this process failed with; None: it did not.

    Raises:
        FlowgraphError: ``error`` itself in the processes that have one.
        CreditError: the first other error, in the processes without one.

    Cost: one exchange of a few hundred bytes.
    """
    texts = _of_all_processes(None if error is None else str(error))
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text is not None:
            raise CreditError(
                f"process {process}: must give credit to its sequences, got an error: {text}; correct it there, the "
                "other processes ended with it"
            )


def check_parallelism(accelerator: Any, model: Any) -> None:
    """Refuse a launch in which a process does not see every token and every head of its sequences.

    Args:
        accelerator: of the trainer.
        model: of the trainer, whose layers transformers may have split itself.

    Raises:
        ConfigError: FSDP1, or tensor, context or sequence parallelism.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ConfigError(
            "fsdp_version: must be 2, got 1, whose wrapper hides the layers that attention is read from; set "
            "fsdp_version: 2 in the configuration of accelerate, or fsdp_config={'version': 2} in GRPOConfig"
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, None) for name in ("tp_size", "cp_size", "sp_size")}
    # transformers and DeepSpeed split heads without accelerate's settings.
    if sizes["tp_size"] in (None, 1):
        sizes["tp_size"] = getattr(model, "tp_size", None)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        sizes["autotp_size"] = deepspeed.deepspeed_config.get("tensor_parallel", {}).get("autotp_size")
    for name, size in sizes.items():
        if size is not None and size > 1:
            raise ConfigError(
                f"{name}: must be 1, so that each process has every head and token of its sequences, got {size}; shard "
                "the weights with FSDP2 or DeepSpeed ZeRO instead"
            )


def settings_of(credit: CreditConfig) -> dict[str, Any]:
    """Return the credit settings by the names under which messages speak of them."""
    return {f"credit.{field.name}": getattr(credit, field.name) for field in fields(credit)}


def described_setting(value: Any) -> str:
    """Write a setting as text that is the same in every process for equal settings.

    Functions are named by module and name. Of other objects only the type is named, since their text may hold an
    address.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = [f"{name!r}: {described_setting(value[name])}" for name in sorted(value, key=repr)]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(described_setting, value)) + "]"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", type(value).__module__)
    return f"{module}.{name}"


def _of_all_processes(value: Any) -> list[Any]:
    """Return the values of all processes, in their order; only that of this process without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
