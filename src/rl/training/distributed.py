"""What the processes of a run must agree on; with one process every function here is the plain computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from rl.algorithm.advantages import whiten
from rl.credit.ratings import local_mean
from rl.errors import ConfigError
from rl.training.metrics import Averages


def make_accelerator(output: Path | None, trackers: Sequence[str] = (), device: str | None = None) -> Any:
    """Make the accelerator of a run, on the device that it finds or on the CPU.

    Args:
        output: folder of the run, for trackers.
        trackers: names of accelerate's trackers.
        device: ``"cpu"``; None takes the device that accelerate finds.

    Raises:
        ConfigError: another device, which the launcher chooses.
    """
    from accelerate import Accelerator

    if device not in (None, "cpu"):
        raise ConfigError(
            f"device: must be 'cpu' or left out for training, got {device!r}; accelerate takes the GPU it finds, so "
            "choose one with CUDA_VISIBLE_DEVICES or `accelerate launch --gpu_ids`"
        )
    log_with: Any = list(trackers) or None
    return Accelerator(cpu=device == "cpu", log_with=log_with, project_dir=output)


def check_accelerator(accelerator: Any, num_prompts: int) -> None:
    """Reject settings of a launch that the training loop does not support; each would give a wrong gradient silently.

    Args:
        accelerator: of the run.
        num_prompts: problems of a step, over all processes.

    Raises:
        ConfigError: problems that do not divide among the processes, a sharded base, gradient accumulation, or
            scaled gradients.
    """
    if num_prompts % accelerator.num_processes:
        raise ConfigError(
            f"num_prompts: must be a multiple of the {accelerator.num_processes} processes, got "
            f"{num_prompts}; every process takes the same number of problems"
        )
    kind = accelerator.distributed_type.name
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise _sharded_base("accelerator", kind)
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


def check_base(model: Any) -> None:
    """Refuse a model whose weights several processes share already.

    Args:
        model: as the trainer got it.

    Raises:
        ConfigError: weights of FSDP2 or tensor parallelism, or of DeepSpeed ZeRO-3.
    """
    for weight in model.parameters():
        if hasattr(weight, "ds_id"):
            raise _sharded_base("model", "weights of DeepSpeed ZeRO-3")
        if hasattr(weight, "full_tensor"):
            raise _sharded_base("model", "weights of the type DTensor (FSDP2 or tensor parallelism)")


def _sharded_base(name: str, found: str) -> ConfigError:
    """Return the error of a base that is sharded, which names the trainer that can use it."""
    return ConfigError(
        f"{name}: must give each process the entire base, got {found}, which shards it; generation and scoring need "
        "all of it, so train with TRL under FSDP2 or ZeRO-3 (rl.integrations.trl.flow_grpo_trainer), or launch with "
        "DDP (--multi_gpu), and a smaller or quantised base"
    )


def gathered(averages: Averages, accelerator: Any) -> Averages:
    """Join the averages of all processes."""
    if accelerator.num_processes == 1:
        return averages
    from accelerate.utils import gather_object

    total = Averages()
    for of_process in gather_object([averages]):
        total.join(of_process)
    return total


def of_main_process(value: Any, accelerator: Any) -> Any:
    """Return the first process's value in every process, so that all decide alike."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    (shared,) = broadcast_object_list([value])
    return shared


def mean_together(values: Float[Tensor, " chosen"], accelerator: Any) -> float:
    """Compute the mean of numbers of all processes; 0 where there are none.

    Args:
        values: of this process; any number of them.
        accelerator: of the run.
    """
    if accelerator.num_processes == 1:
        return local_mean(values)
    from accelerate.utils import gather_object

    # Processes have different numbers of values, so their sums and counts are added, not their means.
    of_this_process = (float(values.double().sum()), values.numel())
    of_all = gather_object([of_this_process])
    total = sum(part for part, _ in of_all)
    count = sum(number for _, number in of_all)
    if count == 0:
        return 0.0
    return total / count


def whiten_together(
    advantages: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"], accelerator: Any
) -> Float[Tensor, "batch response"]:
    """Whiten this process's advantages over the batch of all processes.

    Args:
        advantages: ``[B, R]`` of this process.
        mask: ``[B, R]``, tokens that count.
        accelerator: of the run.

    Returns:
        ``[B, R]`` of this process.
    """
    if accelerator.num_processes == 1:
        return whiten(advantages, mask)

    # Mean and variance are those of the complete batch, so every process computes them from all advantages.
    def gather(tensor: Tensor) -> Tensor:
        # Processes have responses of different lengths; gathering needs equal shapes.
        padded = accelerator.pad_across_processes(tensor.to(accelerator.device), dim=1)
        return accelerator.gather(padded).cpu()

    all_advantages = gather(advantages)
    all_masks = gather(mask.long()).bool()
    whitened = whiten(all_advantages, all_masks)

    # Every process has the same number of responses, in the order of the processes.
    count, width = advantages.shape
    first = accelerator.process_index * count
    return whitened[first : first + count, :width]
