"""Add token credit to verl's trainer: its advantages times the credit weights of their tokens.

Written for ``verl.trainer.ppo.v1.PPOTrainer`` of verl 0.9.1; 0.10 development (commit 1dda039b) has the same method. An
estimator that is registered with verl receives rewards and masks but no tokens, so credit enters in a subclass, after
the trainer has computed its advantages. The trainer runs in the driver process, which holds no model, so the model
of :class:`rl.integrations.engine_credit.EngineCredit` is a frozen copy of the base in that process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl.integrations.engine_credit import EngineCredit, EngineSequence, require_base, require_engine

if TYPE_CHECKING:
    from verl.trainer.ppo.v1 import PPOTrainer as _PPOTrainer  # pyright: ignore[reportMissingImports]
else:
    _PPOTrainer = object

SUPPORTED = ("0.9", "0.10")
"""Versions of verl whose trainer was read. The overridden method is not part of its public interface."""
_INSTALL = "pip install 'verl[verl-core]==0.9.1'"


class VerlCredit(_PPOTrainer):
    """The method that :func:`flow_verl_trainer` adds to verl's trainer.

    Attributes:
        engine_credit: computes the weights.
    """

    engine_credit: EngineCredit

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Compute verl's advantages, multiply them by the weights and write them back; returns stay as they are."""
        import transfer_queue as tq  # pyright: ignore[reportMissingImports]
        from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
        from torch.nested import as_nested_tensor

        # The mask is read before verl rejects tokens by their importance ratios: those are no tokens of a tool.
        before = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts", "responses", "response_mask"]
        )
        batch = super()._compute_advantage(batch, metrics=metrics)
        after = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["advantages"])

        columns = [before[name].unbind() for name in ("prompts", "responses", "response_mask")]
        sequences = []
        for prompt, response, mask in zip(*columns, strict=True):
            sequences.append(EngineSequence(prompt.tolist(), response.tolist(), trained=mask.bool().tolist()))
        progress = min(1.0, self.global_steps / max(1, self.total_training_steps))
        scaled = self.engine_credit.scale(sequences, after["advantages"].unbind(), progress=progress)

        # verl keeps responses without padding, as nested tensors.
        fields = TensorDict({"advantages": as_nested_tensor(scaled, layout=_jagged())}, batch_size=len(scaled))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def flow_verl_trainer(engine_credit: EngineCredit, base: type | None = None) -> type[VerlCredit]:
    """Return a trainer of verl with token credit, to be registered in the place of ``base``.

    verl chooses its replay buffer by the name of the mode, so a name of your own would change the sampling.

    Args:
        engine_credit: computes the weights.
        base: a subclass of ``verl.trainer.ppo.v1.PPOTrainer``; None: the synchronous one.

    Raises:
        MissingExtraError: verl is not installed, or in another version.
        ConfigError: ``base`` is no trainer of verl.

    Cost: one forward pass of the model in the driver process for each step.

    Example:
        TRAINER_REGISTRY["sync"] = flow_verl_trainer(EngineCredit("flow", "path/to/base"))
    """
    require_engine("verl", SUPPORTED, _INSTALL)
    from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync  # pyright: ignore[reportMissingImports]

    chosen = PPOTrainerSync if base is None else base
    require_base(chosen, PPOTrainer, "verl.trainer.ppo.v1.PPOTrainer")
    return type(f"Flow{chosen.__name__}", (VerlCredit, chosen), {"engine_credit": engine_credit})


def _jagged() -> Any:
    """Return the layout of nested tensors, which torch's stubs do not describe."""
    import torch

    return torch.jagged
