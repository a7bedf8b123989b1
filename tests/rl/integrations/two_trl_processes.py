"""What each process of ``test_trl_processes`` runs: TRL with and without credit, on weights that both share.

accelerate 1.15 shards only where it finds an accelerator, so :func:`shard_on_cpu` tells it that there is one. All that
follows (its plugins, ``fully_shard``, DeepSpeed's engine, optimizers, checkpoints) is the original code, on the CPU
over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 1_000,
        # No weight stays gathered, however small.
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""DeepSpeed's settings of the run."""

FSDP2 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
"""What ``accelerate launch`` would set from a configuration of FSDP2."""


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
"""What ``accelerate launch`` would set for DeepSpeed, and its choice of the CPU."""


def shard_on_cpu(kind: str) -> None:
    """Let accelerate take the processes of the CPU for those of accelerators, for which alone it shards weights."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if kind == "zero3":
        # DeepSpeed itself has a backend for the CPU.
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)  # type: ignore
        return
    original = PartialState.__init__

    def made(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = made  # type: ignore[method-assign]


def sharded_model() -> Any:
    """Return a model whose attention modules and output projections are units, so that each is released."""
    from torch.distributed.fsdp import fully_shard

    from tests.fixtures.policies import tiny_policy

    model = tiny_policy("qwen3")
    for layer in model.model.layers:
        fully_shard(layer.self_attn.o_proj)
        fully_shard(layer.self_attn)
        fully_shard(layer)
    fully_shard(model)
    return model


def one_capture(model: Any, capacity: str) -> Any:
    """Return the rows of two texts."""
    import torch

    import flowgraph

    ids = torch.arange(24).reshape(2, 12) % 20 + 3
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return flowgraph.capture(model, ids, mask, capacity=capacity).dense()


def captured_in_parts(folder: Path, rank: int) -> None:
    """Write the rows of some capacities by a model whose weights the processes share."""
    import torch

    rows = {name: one_capture(sharded_model(), name) for name in CAPACITIES}
    torch.save(rows, folder / f"rows-{rank}.pt")


CAPACITIES = ("attention", "value_norm", "sharp", "centred", "vtrace")
"""Capacities without a backward pass of the model."""


def main(folder: Path, kind: str) -> None:
    """Run every scenario and write what the test reads."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from flowgraph import FlowgraphError
    from rl.config import CreditConfig
    from tests.rl.integrations import test_trl as one
    from tests.rl.integrations.test_trl_processes import STRONG

    if kind == "zero3":
        import deepspeed.ops  # pyright: ignore[reportMissingImports]

        # An optional kernel, which DeepSpeed would compile for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    rank = int(os.environ["RANK"])
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "activation_checkpointing": True, "use_cpu": kind != "zero3",
        "log_level": "error",
    }  # fmt: skip
    if kind == "zero3":
        settings["deepspeed"] = ZERO3

    def make(name: str, credit: CreditConfig | None = None, **options: Any) -> Any:
        return one.make(folder / name, credit, **settings | options)

    def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Gather every weight."""
        weights = dict(model.named_parameters())
        if kind == "fsdp2":
            # Between two passes, FSDP2 keeps the weights of its outermost unit gathered.
            whole = {name: getattr(weight, "full_tensor", weight.detach)() for name, weight in weights.items()}
            return {name: weight.detach().clone() for name, weight in whole.items()}
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return {name: weight.detach().clone() for name, weight in weights.items()}

    def run(trainer: Any, name: str, **options: Any) -> None:
        """Train, and write losses and weights."""
        trainer.train(**options)
        weights = full_weights(trainer.model)
        if rank == 0:
            save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / f"{name}.safetensors")
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            (folder / f"{name}.json").write_text(json.dumps(losses), encoding="utf-8")
        for weight in trainer.model.parameters():
            assert hasattr(weight, "full_tensor" if kind == "fsdp2" else "ds_id"), "a weight is not shared"

    def run_recorded(trainer: Any, name: str) -> list[dict[str, Any]]:
        """Train, and write the credit of each rollout with what it was computed from."""
        kept: list[dict[str, Any]] = []
        original = trainer._token_credit

        def recorded(inputs: list[dict[str, Any]], output: dict[str, Any]) -> Any:
            credit = original(inputs, output)
            plain = {key: value.clone() for key, value in output.items() if isinstance(value, torch.Tensor)}
            kept.append(
                {"inputs": inputs, "output": plain, "credit": vars(credit), "rewards": trainer._rewards.clone(),
                 "step": trainer.state.global_step, "weights": full_weights(trainer.model)}
            )  # fmt: skip
            return credit

        trainer._token_credit = recorded
        run(trainer, name)
        del trainer._token_credit
        torch.save(kept, folder / f"{name}-{rank}.pt")
        return kept

    # Weights of 1 are stock TRL.
    run(make("stock"), "stock")
    run(make("even", CreditConfig(rule="flow", strength=1.0)), "even")

    # Credit where all weights are trained, with adapters, and after a resume.
    run_recorded(make("full", STRONG, peft=False, max_steps=1), "full")
    trainer = make("lora", STRONG, save_strategy="steps", save_steps=1)
    kept = run_recorded(trainer, "lora")
    run(make("lora", STRONG), "resumed", resume_from_checkpoint=str(folder / "lora" / "checkpoint-1"))

    # One process has no sequence left, so it only helps to gather the weights of the other's passes.
    output = dict(kept[0]["output"])
    if rank == 1:
        output["completion_mask"] = torch.zeros_like(output["completion_mask"])
    credit = trainer._token_credit(kept[0]["inputs"], output)
    assert bool((credit.weights == 1).all()) == (rank == 1)

    messages: dict[str, str] = {}

    def refused(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except FlowgraphError as error:
            messages[name] = str(error)

    def failing(text: str) -> Any:
        raise ValueError("no digit")

    refused("rule", lambda: make("no", CreditConfig(rule=("flow", "entropy")[rank])))
    refused("option", lambda: make("no", CreditConfig(rule="flow_sharp", options={"power": 2.0 + rank})))
    refused("unknown", lambda: make("no", CreditConfig(rule=("flow", "none")[rank])))
    refused("length", lambda: make("no", STRONG, max_completion_length=10 + rank))
    refused("sequences", lambda: trainer._generate_and_score_completions(kept[0]["inputs"][: 4 - 2 * rank]))
    if rank == 1:
        trainer.find_answer = failing
    refused("answer", lambda: trainer._token_credit(kept[0]["inputs"], kept[0]["output"]))
    if kind == "fsdp2":
        captured_in_parts(folder, rank)
        refused("gradient", lambda: one_capture(sharded_model(), "gradient"))
    (folder / f"messages-{rank}.json").write_text(json.dumps(messages), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.update({"fsdp2": FSDP2, "zero3": DEEPSPEED}[sys.argv[2]])
    shard_on_cpu(sys.argv[2])
    main(Path(sys.argv[1]), sys.argv[2])
