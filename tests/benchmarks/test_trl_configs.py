"""The launch files for TRL are read by accelerate and by TRL; nothing is launched, and no vLLM is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

REASON = "TRL is an optional package: pip install trl"
pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON)

from benchmarks.configs.trl import train  # noqa: E402  (it imports TRL)

CONFIGS = Path(train.__file__).parent
DOCUMENTED = (CONFIGS.parents[2] / "docs" / "train.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", DistributedType.FSDP), ("zero3", DistributedType.DEEPSPEED)])
def test_accelerate_reads_the_launch_files(name: str, kind: DistributedType):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
        # accelerate turns every setting into a variable of the environment, and knows each of these.
        assert set(config.fsdp_config) <= set(launch_options())
    else:
        assert config.deepspeed_config["zero_stage"] == 3
        known = {"deepspeed_multinode_launcher", *launch_options()}
        assert set(config.deepspeed_config) <= known


def launch_options() -> list[str]:
    """Return the options of ``accelerate launch``."""
    from accelerate.commands.launch import launch_command_parser

    return [action.dest for action in launch_command_parser()._actions]


@pytest.mark.parametrize(("name", "mode"), [("grpo", None), ("vllm_colocate", "colocate"), ("vllm_server", "server")])
def test_trl_reads_the_arguments(name: str, mode: str | None):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--use_peft", "true"]
    run, args, model = train.parsed(words)
    assert run == train.RunArguments(problems="problems.jsonl", credit="recommended")
    assert model.model_name_or_path == "Qwen/Qwen3-0.6B"
    assert model.use_peft
    assert args.use_vllm == (mode is not None)
    assert mode is None or args.vllm_mode == mode
    # Groups of responses fit into the sequences that one process makes at once.
    assert args.generation_batch_size is not None
    assert args.num_generations is not None
    assert args.generation_batch_size % args.num_generations == 0
    assert args.activation_checkpointing
    # The same training with each way to generate.
    assert (args.max_steps, args.learning_rate, args.num_generations) == (200, 1e-5, 8)


@pytest.mark.parametrize("name", ["fsdp2.yaml", "zero3.yaml", "grpo.yaml", "vllm_colocate.yaml", "vllm_server.yaml"])
def test_the_page_names_every_file(name: str):
    assert f"benchmarks/configs/trl/{name}" in DOCUMENTED
