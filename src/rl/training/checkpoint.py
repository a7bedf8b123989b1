"""Checkpoints: everything a run is, in files that plain PEFT reads, written whole or not at all.

::

    checkpoint-000050/              after 50 steps; checkpoint-000050-003: and 3 updates of the next
        policy/                     a PEFT adapter; PeftModel.from_pretrained(base, ".../policy") loads it
        value/                      the critic's adapter, and value_head.safetensors
        optimizer.safetensors
        random.safetensors          global generators, for reward functions that draw from them
        rollout-0.safetensors       only inside a step: the rollout buffer of each process
        state.json                  position, settings, and size and hash of every file above

A folder appears under its name when it is complete, and is loaded only if its list of files holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph import OutputError
from rl.config import differences
from rl.errors import CheckpointError
from rl.policy.actor_critic import VALUE, ActorCritic
from rl.training.random_state import python_random, random_tensors, restore_random

if TYPE_CHECKING:
    from torch.optim import Optimizer

FORMAT = "flowgraph-rl-checkpoint"
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{6,})(?:-(\d{3,}))?")


@dataclass
class Position:
    """How far a run has come, and the little that it carries from step to step.

    Attributes:
        step: finished steps.
        updates: optimiser updates made within the step that is under way.
        kl_weight: beta, where it adapts.
        averages: what was logged so far within the step that is under way.
    """

    step: int = 0
    updates: int = 0
    kl_weight: float = 0.0
    averages: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"checkpoint-{self.step:06d}" + (f"-{self.updates:03d}" if self.updates else "")


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first; unfinished ones have other names."""
    found = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    order = sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)
    return [path for _, path in order]


def write_checkpoint(
    folder: Path,
    position: Position,
    policy: ActorCritic,
    optimizer: Optimizer,
    run: Mapping[str, Any],
    *,
    keep: int,
    accelerator: Any,
    write_buffer: Any = None,
) -> Path:
    """Write a checkpoint beside its final name, then move it there; the oldest beyond ``keep`` go afterwards.

    Args:
        folder: of the run.
        position: see :class:`Position`.
        policy: not wrapped.
        optimizer: over the policy's trained weights.
        run: settings that a later run must share; JSON.
        keep: how many checkpoints stay.
        accelerator: of the run; its first process writes.
        write_buffer: called with a path in every process, for the rollout buffer.

    Raises:
        OutputError: the disk is full or the folder cannot be written; checkpoints from before are untouched.
    """
    target = folder / position.name
    temporary = folder / f".writing-{position.name}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if write_buffer is not None:
            write_buffer(temporary / f"rollout-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_all(temporary, position, policy, optimizer, run)
            _replace(temporary, target)
            for old in find_checkpoints(folder)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"output: checkpoint {target.name} must fit into {folder}, got: {error.strerror or error}; make room there "
            "and resume: the checkpoints from before are whole"
        ) from error
    accelerator.wait_for_everyone()
    return target


def _write_all(
    temporary: Path, position: Position, policy: ActorCritic, optimizer: Optimizer, run: Mapping[str, Any]
) -> None:
    save_adapter(policy, policy.policy_name, temporary / "policy")
    if policy.value_head is not None:
        save_adapter(policy, VALUE, temporary / "value")
        _save(temporary / "value" / "value_head.safetensors", dict(policy.value_head.state_dict()))
    _save(temporary / "optimizer.safetensors", _optimizer_tensors(optimizer, policy))
    _save(temporary / "random.safetensors", random_tensors())
    files = {
        str(path.relative_to(temporary)): _fingerprint(path) for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    state = {
        "format": FORMAT, "version": VERSION, "position": asdict(position), "run": dict(run), "files": files,
        "python_random": python_random(),
    }  # fmt: skip
    path = temporary / "state.json"
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    for written in temporary.rglob("*"):
        _sync(written)


def _replace(temporary: Path, target: Path) -> None:
    """Move the new folder to its name; one of that name is from before a resume and is the same."""
    if target.exists():
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(target)
    _sync(target.parent)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that all of its files are there, whole.

    Raises:
        CheckpointError: not a checkpoint, incomplete, or of another version.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        kind, version, files = state["format"], state["version"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: must be a complete folder of this package, got {path} ({error!r}); resume from another"
        ) from error
    if kind != FORMAT or version != VERSION:
        raise CheckpointError(
            f"checkpoint: must have format {FORMAT} version {VERSION}, got {kind} version {version} in {path}; use the "
            "version of flowgraph-llm that wrote it"
        )
    for name, fingerprint in files.items():
        if not (path / name).is_file() or _fingerprint(path / name) != fingerprint:
            raise CheckpointError(
                f"checkpoint: its files must be as they were written, got a changed or missing {name} in {path}; "
                "resume from another checkpoint"
            )
    return state


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None where there are no checkpoints.

    Raises:
        CheckpointError: there are some, and none of them can be used: starting anew would overwrite the run.
    """
    failure: CheckpointError | None = None
    for path in find_checkpoints(folder):
        try:
            return path, read_state(path)
        except CheckpointError as error:
            failure = failure or error
    if failure is not None:
        raise CheckpointError(
            f"resume: {folder} must hold a checkpoint that is whole, got none, the newest for this reason: {failure}"
        ) from failure
    return None


def check_run(state: Mapping[str, Any], run: Mapping[str, Any], free: set[str]) -> None:
    """Refuse to go on under other settings than those of the checkpoint.

    Raises:
        CheckpointError: the message lists every difference.
    """
    found = [line for line in differences(state["run"], run) if line.split(":")[0] not in free]
    if found:
        raise CheckpointError(
            "resume: the settings must be those of the checkpoint, got these differences: "
            + "; ".join(found)
            + "; set them back, or allow them with allow_changes=True (--allow-changes)"
        )


def load_checkpoint(path: Path, state: Mapping[str, Any], policy: ActorCritic, optimizer: Optimizer) -> Position:
    """Bring policy, critic, optimiser and global generators to the state of a checkpoint.

    Raises:
        CheckpointError: the adapters or the optimiser's state do not fit this model.
    """
    load_adapter(policy, policy.policy_name, path / "policy")
    if policy.value_head is not None:
        load_adapter(policy, VALUE, path / "value")
        policy.value_head.load_state_dict(_load(path / "value" / "value_head.safetensors"))
    _restore_optimizer(_load(path / "optimizer.safetensors"), optimizer, policy)
    restore_random(_load(path / "random.safetensors"), state["python_random"])
    return Position(**state["position"])


def save_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    """One adapter as a PEFT folder."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(policy.peft, adapter_name=name, save_embedding_layers=False)
    _save(folder / "adapter_model.safetensors", state)
    config = policy.peft.peft_config[name]
    before = config.inference_mode
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = before


def load_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    """Weights of one adapter from a PEFT folder.

    Raises:
        CheckpointError: missing, or of other layers or another rank.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        state = _load(folder / "adapter_model.safetensors")
    except OSError as error:
        raise CheckpointError(
            f"adapter: must be a PEFT folder, got {folder} ({error}); give the folder that holds "
            "adapter_model.safetensors"
        ) from error
    expected = get_peft_model_state_dict(policy.peft, adapter_name=name, save_embedding_layers=False)
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != got:
        differing = sorted(shapes.items() ^ got.items())[0]
        raise CheckpointError(
            f"adapter: must fit the model's LoRA layers, got {folder}, which differs first at {differing[0]}; "
            "use the base model, rank and targets that it was trained with"
        )
    set_peft_model_state_dict(policy.peft, state, adapter_name=name)


def reference_mark(policy: ActorCritic) -> str:
    """What the reference is: the base, or an adapter by the hash of its weights; a resumed run must keep it."""
    if policy.reference_name is None:
        return "base"
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(policy.peft, adapter_name=policy.reference_name, save_embedding_layers=False)
    found = hashlib.sha256()
    for key in sorted(state):
        found.update(key.encode() + state[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"adapter {found.hexdigest()[:16]}"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    content = save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, {"format": "pt"})
    path.write_bytes(content)  # its own save_file makes private files, and an error of its own of a full disk


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(policy: ActorCritic) -> dict[str, torch.nn.Parameter]:
    return policy.policy_parameters() | policy.value_parameters()


def _optimizer_tensors(optimizer: Any, policy: ActorCritic) -> dict[str, Tensor]:
    """State of every weight by the weight's name, so that the order of groups does not matter."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in _named(policy).items()
        for key, value in state.get(parameter, {}).items()
    }


def _restore_optimizer(tensors: Mapping[str, Tensor], optimizer: Any, policy: ActorCritic) -> None:
    state = getattr(optimizer, "optimizer", optimizer).state
    parameters = _named(policy)
    names = {key.split("/", 1)[1] for key in tensors}
    if tensors and names != parameters.keys():
        raise CheckpointError(
            f"resume: the optimiser must have stepped on the weights that are trained now, got another state of "
            f"{sorted(names ^ parameters.keys())[0]}; keep the advantage estimator and the adapter of the run"
        )
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        state[parameter][kind] = value.clone() if kind == "step" else value.to(parameter.device, copy=True)
