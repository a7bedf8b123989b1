"""What the processes of a run must agree on; with one process each of these is the plain thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from rl.algorithm.advantages import whiten
from rl.errors import ConfigError
from rl.training.metrics import Averages


def make_accelerator(output: Path | None, trackers: Sequence[str] = (), device: str | None = None) -> Any:
    """The accelerator of a run, on the device that it finds or on the CPU.

    Raises:
        ConfigError: another device, which the launcher chooses.
    """
    from accelerate import Accelerator

    if device not in (None, "cpu"):
        raise ConfigError(
            f"device: must be 'cpu' or left out for training, got {device!r}; accelerate takes the GPU it finds, so "
            "choose one with CUDA_VISIBLE_DEVICES or `accelerate launch --gpu_ids`"
        )
    return Accelerator(cpu=device == "cpu", log_with=list(trackers) or None, project_dir=output)  # type: ignore[arg-type]


def check_accelerator(accelerator: Any, num_prompts: int) -> None:
    """What a launch can set and this loop cannot follow; each would be a wrong gradient, not an error.

    Raises:
        ConfigError: problems that cannot be shared out whole, a base that is sharded, gradient accumulation, or
            scaled gradients.
    """
    if num_prompts % accelerator.num_processes:
        raise ConfigError(
            f"num_prompts: must be a multiple of the {accelerator.num_processes} processes, got "
            f"{num_prompts}; problems are shared out whole"
        )
    kind = accelerator.distributed_type.name
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"accelerator: must give each process the whole base, got {kind}, which shards it; generation and scoring "
            "need it whole, so launch with DDP (--multi_gpu), and a smaller or quantised base"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerator: must have gradient_accumulation_steps=1, got {accelerator.gradient_accumulation_steps}, by "
            "which gradients would be divided once more; use micro_batch_size and num_minibatches"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"accelerator: must have mixed_precision 'no' or 'bf16', got {accelerator.mixed_precision!r}, whose scaled "
            "gradients overflow before they settle; use bf16"
        )


def gathered(averages: Averages, accelerator: Any) -> Averages:
    """Sums over all processes."""
    if accelerator.num_processes == 1:
        return averages
    from accelerate.utils import gather_object

    total = Averages()
    for sums, counts in gather_object([(averages.sums, averages.counts)]):
        for name in sums:
            total.add(name, sums[name], counts[name])
    return total


def whiten_together(
    advantages: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], accelerator: Any
) -> Float[Tensor, "batch response"]:
    """This process's advantages, whitened over the batch of all processes."""
    if accelerator.num_processes == 1:
        return whiten(advantages, mask)
    count, width = advantages.shape
    everyone = [
        accelerator.gather(accelerator.pad_across_processes(tensor.to(accelerator.device), dim=1)).cpu()
        for tensor in (advantages, mask.long())
    ]
    first = accelerator.process_index * count
    return whiten(everyone[0], everyone[1].bool())[first : first + count, :width]
