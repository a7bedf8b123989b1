"""Checkpoints: the complete state of a run, in files that plain PEFT reads, written atomically.

::

    checkpoint-000050/              after 50 steps; checkpoint-000050-003: and 3 updates of the next
        policy/                     a PEFT adapter; PeftModel.from_pretrained(base, ".../policy") loads it
        value/                      the critic's adapter, and value_head.safetensors
        optimizer.safetensors
        random.safetensors          global generators, for reward functions that draw from them
        rollout-0.safetensors       only inside a step: the rollout buffer of each process
        state.json                  position, settings, and size and hash of every file above
    best/                           the same files, after the step with the best evaluation

A folder gets its final name when it is complete, and is loaded only if the size and hash of every file match.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
BEST = "best"
"""Name of the checkpoint with the best evaluation; a run never resumes from it."""
_NAME = re.compile(r"checkpoint-(\d{6,})(?:-(\d{3,}))?")
_STATE_FILE = "state.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_VALUE_HEAD_FILE = "value_head.safetensors"


@dataclass
class Position:
    """The progress of a run, and the values that it carries from step to step.

    Attributes:
        step: finished steps.
        updates: optimiser updates made within the step in progress.
        kl_weight: beta, where it adapts.
        averages: metrics so far within the step in progress.
        rewards: those that a learning-rate schedule may react to: of each evaluation, or of each step without any.
        best_reward: of the best evaluation; None before the first.
        best_step: finished steps at the best evaluation.
        evaluations_since_best: evaluations after it.
    """

    step: int = 0
    updates: int = 0
    kl_weight: float = 0.0
    averages: dict[str, Any] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    best_reward: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        if self.updates:
            return f"checkpoint-{self.step:06d}-{self.updates:03d}"
        return f"checkpoint-{self.step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest first; unfinished ones have other names."""
    # Sorted by numbers: as texts, 1000000 comes before 999999.
    positions: dict[Path, tuple[int, int]] = {}
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            step, updates = match.groups(default="0")
            positions[path] = (int(step), int(updates))
    return sorted(positions, key=lambda path: positions[path], reverse=True)


def write_checkpoint(
    folder: Path,
    position: Position,
    policy: ActorCritic,
    optimizer: Optimizer,
    run: Mapping[str, Any],
    *,
    keep: int,
    accelerator: Any,
    write_buffer: Callable[[Path], None] | None = None,
    name: str | None = None,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and delete the oldest beyond ``keep``.

    Args:
        folder: of the run.
        position: see :class:`Position`.
        policy: not wrapped.
        optimizer: over the policy's trained weights.
        run: settings that a later run must share; JSON.
        keep: how many checkpoints stay.
        accelerator: of the run; its first process writes.
        write_buffer: called with a path in every process, for the rollout buffer.
        name: of the folder; None: that of the position.

    Returns:
        The folder of the checkpoint.

    Raises:
        OutputError: the disk is full or the folder cannot be written; earlier checkpoints are unchanged.
    """
    target = folder / (name or position.name)
    temporary = folder / f".writing-{target.name}"
    try:
        # The first process makes the folder before any process writes its buffer there, and the buffers are complete
        # before their hashes are taken.
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if write_buffer is not None:
            write_buffer(temporary / f"rollout-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_files(temporary, position, policy, optimizer, run)
            _replace(temporary, target)
            for old in find_checkpoints(folder)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"output: checkpoint {target.name} must fit into {folder}, got: {error.strerror or error}; make room there "
            "and resume: the earlier checkpoints are complete"
        ) from error
    accelerator.wait_for_everyone()
    return target


def _write_files(
    folder: Path, position: Position, policy: ActorCritic, optimizer: Optimizer, run: Mapping[str, Any]
) -> None:
    """Write all files but the rollout buffers; the state, which lists them, comes last."""
    save_adapter(policy, policy.policy_name, folder / "policy")
    if policy.value_head is not None:
        save_adapter(policy, VALUE, folder / "value")
        _save_tensors(folder / "value" / _VALUE_HEAD_FILE, dict(policy.value_head.state_dict()))
    _save_tensors(folder / "optimizer.safetensors", _optimizer_tensors(optimizer, policy))
    _save_tensors(folder / "random.safetensors", random_tensors())

    # Size and hash of every file, buffers included, by which a reader finds damage.
    fingerprints = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fingerprints[str(path.relative_to(folder))] = _fingerprint(path)
    state = {
        "format": FORMAT,
        "version": VERSION,
        "position": asdict(position),
        "run": dict(run),
        "files": fingerprints,
        "python_random": python_random(),
    }
    (folder / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    # The content must be on the disk before the folder gets its final name.
    for path in folder.rglob("*"):
        _sync(path)


def _replace(temporary: Path, target: Path) -> None:
    """Rename the new folder; an older one of that name was written before a resume and has the same content."""
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
    """Read the state of a checkpoint, after checking the size and hash of all of its files.

    Args:
        path: folder of the checkpoint.

    Raises:
        CheckpointError: not a checkpoint, incomplete, or of another version.
    """
    # The state file is written last, so a folder with one is complete unless it was changed afterwards.
    try:
        state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
        kind = state["format"]
        version = state["version"]
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: must be a complete folder of this package, got {path} ({error!r}); resume from another"
        ) from error
    if kind != FORMAT or version != VERSION:
        raise CheckpointError(
            f"checkpoint: must have format {FORMAT} version {VERSION}, got {kind} version {version} in {path}; use the "
            "version of flowgraph-llm that wrote it"
        )

    # Size and hash find a file that was cut off or changed.
    for name, fingerprint in files.items():
        file = path / name
        if not file.is_file() or _fingerprint(file) != fingerprint:
            raise CheckpointError(
                f"checkpoint: its files must be as they were written, got a changed or missing {name} in {path}; "
                "resume from another checkpoint"
            )
    return state


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest complete checkpoint and its state; None where there are no checkpoints.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged: a new start would overwrite the run.
    """
    # A damaged checkpoint is passed over for an older one; the message is about the newest.
    first_error: CheckpointError | None = None
    for path in find_checkpoints(folder):
        try:
            return path, read_state(path)
        except CheckpointError as error:
            first_error = first_error or error
    if first_error is not None:
        raise CheckpointError(
            f"resume: {folder} must hold a complete checkpoint, got damaged ones, the newest for this reason: "
            f"{first_error}; restore its files, or choose another folder"
        ) from first_error
    return None


def check_run(state: Mapping[str, Any], run: Mapping[str, Any], free: set[str]) -> None:
    """Check that a run continues under the settings of the checkpoint.

    Args:
        state: of the checkpoint.
        run: settings of the run that resumes.
        free: names of settings that may differ.

    Raises:
        CheckpointError: the message lists every difference.
    """
    # Each line begins with the name of its setting.
    found = []
    for line in differences(state["run"], run):
        name = line.split(":")[0]
        if name not in free:
            found.append(line)
    if found:
        raise CheckpointError(
            "resume: the settings must be those of the checkpoint, got these differences: "
            + "; ".join(found)
            + "; set them back, or allow them with allow_changes=True (--allow-changes)"
        )


def load_checkpoint(path: Path, state: Mapping[str, Any], policy: ActorCritic, optimizer: Optimizer) -> Position:
    """Restore policy, critic, optimiser and global generators from a checkpoint.

    Args:
        path: folder of the checkpoint.
        state: of :func:`read_state`.
        policy: not wrapped; changed in place.
        optimizer: changed in place.

    Returns:
        The position of the run.

    Raises:
        CheckpointError: the adapters or the optimiser's state do not fit this model.
    """
    # The adapters come first: their check gives the clearest message for another model.
    load_adapter(policy, policy.policy_name, path / "policy")
    if policy.value_head is not None:
        load_adapter(policy, VALUE, path / "value")
        value_head = _load_tensors(path / "value" / _VALUE_HEAD_FILE)
        policy.value_head.load_state_dict(value_head)

    optimizer_tensors = _load_tensors(path / "optimizer.safetensors")
    _restore_optimizer(optimizer_tensors, optimizer, policy)
    generator_tensors = _load_tensors(path / "random.safetensors")
    restore_random(generator_tensors, state["python_random"])
    return Position(**state["position"])


def save_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    """Write one adapter as a PEFT folder.

    Args:
        policy: not wrapped.
        name: of the adapter.
        folder: made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder / _ADAPTER_FILE, _adapter_tensors(policy, name))

    # PEFT's loader expects an adapter that is not trained; the adapter in memory stays as it is.
    config = policy.peft.peft_config[name]
    before = config.inference_mode
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = before


def load_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    """Load the weights of one adapter from a PEFT folder.

    Args:
        policy: not wrapped; changed in place.
        name: of the adapter.
        folder: with ``adapter_model.safetensors``.

    Raises:
        CheckpointError: missing, or of other layers or another rank.
    """
    from peft import set_peft_model_state_dict

    try:
        tensors = _load_tensors(folder / _ADAPTER_FILE)
    except OSError as error:
        raise CheckpointError(
            f"adapter: must be a PEFT folder, got {folder} ({error}); give the folder that holds {_ADAPTER_FILE}"
        ) from error

    # The same layers, and the same rank in each.
    expected_shapes = {key: tuple(value.shape) for key, value in _adapter_tensors(policy, name).items()}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if shapes != expected_shapes:
        different = expected_shapes.items() ^ shapes.items()
        first_name, _ = sorted(different)[0]
        raise CheckpointError(
            f"adapter: must fit the model's LoRA layers, got {folder}, which differs first at {first_name}; "
            "use the base model, rank and targets that it was trained with"
        )
    if name == VALUE:
        with torch.no_grad():
            for key, parameter in _value_tensors(policy).items():
                parameter.copy_(tensors[key])
        return
    set_peft_model_state_dict(policy.peft, tensors, adapter_name=name)


def reference_mark(policy: ActorCritic) -> str:
    """Name the reference: the base, or an adapter by the hash of its weights; a resumed run must keep it."""
    if policy.reference_name is None:
        return "base"
    # Bytes of any dtype: numpy has no bfloat16.
    tensors = _adapter_tensors(policy, policy.reference_name)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        weights = tensors[key].detach().cpu().contiguous()
        content = weights.view(torch.uint8).numpy().tobytes()
        digest.update(key.encode() + content)
    return f"adapter {digest.hexdigest()[:16]}"


def _adapter_tensors(policy: ActorCritic, name: str) -> dict[str, Tensor]:
    """Read the weights of one adapter under PEFT's names."""
    from peft import get_peft_model_state_dict

    if name == VALUE:
        return _value_tensors(policy)
    return get_peft_model_state_dict(policy.peft, adapter_name=name, save_embedding_layers=False)


def _value_tensors(policy: ActorCritic) -> dict[str, Tensor]:
    """Read the weights of the critic's adapter under PEFT's names, which leave the adapter's name out.

    PEFT itself rejects an adapter without the trainable tokens that another adapter of the model has. The critic's is
    plain LoRA, ``....lora_A.value.weight``.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.value_parameters().items():
        layer, is_adapter, weight = name.removeprefix("peft.").rpartition(f".{VALUE}.")
        if is_adapter:
            tensors[f"{layer}.{weight}"] = parameter
    return tensors


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    The library's own save_file makes files that only the user can read, and raises an error of its own type on a full
    disk.
    """
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(copies, {"format": "pt"}))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def _fingerprint(path: Path) -> list[Any]:
    """Compute the size and the hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return [path.stat().st_size, digest.hexdigest()]


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _trained_parameters(policy: ActorCritic) -> dict[str, torch.nn.Parameter]:
    """Collect the trained weights of policy and critic, by name."""
    return policy.policy_parameters() | policy.value_parameters()


def _optimizer_state(optimizer: Any) -> dict[torch.nn.Parameter, dict[str, Any]]:
    """Find the state of an optimiser inside accelerate's wrapper, by weight."""
    return getattr(optimizer, "optimizer", optimizer).state


def _optimizer_tensors(optimizer: Any, policy: ActorCritic) -> dict[str, Tensor]:
    """Read the state of every weight by the weight's name, so that the order of groups does not matter."""
    state = _optimizer_state(optimizer)
    tensors = {}
    for name, parameter in _trained_parameters(policy).items():
        for key, value in state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def _restore_optimizer(tensors: Mapping[str, Tensor], optimizer: Any, policy: ActorCritic) -> None:
    """Restore the state of every weight; no weight has a state before the first update."""
    # The keys are those of _optimizer_tensors: kind of the state, a slash, name of the weight.
    state = _optimizer_state(optimizer)
    parameters = _trained_parameters(policy)
    names = {key.split("/", 1)[1] for key in tensors}
    if tensors and names != parameters.keys():
        first_name = sorted(names ^ parameters.keys())[0]
        raise CheckpointError(
            f"resume: the optimiser must have stepped on the weights that are trained now, got another state of "
            f"{first_name}; keep the advantage estimator and the adapter of the run"
        )
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        if kind == "step":
            # Adam keeps its counter on the CPU.
            state[parameter][kind] = value.clone()
        else:
            state[parameter][kind] = value.to(parameter.device, copy=True)
