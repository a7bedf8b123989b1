"""Add token credit to SkyRL's trainer: its advantages times the credit weights of their tokens.

Written for ``skyrl.train.trainer.RayPPOTrainer`` of SkyRL 0.3.0; commit a9564572 has the same method. An estimator that
is registered with ``AdvantageEstimatorRegistry`` receives rewards, mask and prompt numbers but no tokens, so credit
enters in a subclass, after any estimator. SkyRL pads a sequence on the left of its prompt, and its tensors ``[B, R]``
are aligned on the right: response tokens are the last ones of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rl.errors import ConfigError
from rl.integrations.engine_credit import EngineCredit, require_base, require_engine, split_sequences

if TYPE_CHECKING:
    from skyrl.train.trainer import RayPPOTrainer as _RayPPOTrainer  # pyright: ignore[reportMissingImports]
else:
    _RayPPOTrainer = object

SUPPORTED = ("0.3",)
"""Versions of SkyRL whose trainer was read."""
_INSTALL = "pip install 'skyrl[skyrl-train]==0.3.0'"


class SkyRLCredit(_RayPPOTrainer):
    """The method that :func:`flow_skyrl_trainer` adds to SkyRL's trainer.

    Attributes:
        engine_credit: computes the weights.
    """

    engine_credit: EngineCredit

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """Compute SkyRL's advantages and multiply them by the weights; returns and metrics stay as they are.

        Raises:
            ConfigError: step-wise trajectories, or advantages that are whitened afterwards.
        """
        if self.cfg.generator.step_wise_trajectories:
            raise _unsupported("generator.step_wise_trajectories", "its responses have more than one turn")
        if self.cfg.trainer.algorithm.advantage_batch_normalize:
            raise _unsupported("trainer.algorithm.advantage_batch_normalize", "it would whiten the weights too")
        data = super().compute_advantages_and_returns(data)

        # The loss mask of the response, in the columns of the sequence.
        response_mask = data["response_mask"].bool()
        loss_mask = data["loss_mask"]
        trained = torch.zeros_like(data["sequences"])
        trained[:, -loss_mask.shape[1] :] = loss_mask.to(trained.dtype)
        lengths = response_mask.sum(1).tolist()
        sequences = split_sequences(data["sequences"], data["attention_mask"], lengths, trained=trained)

        # Advantages of the last tokens of each row, which are the response.
        advantages = data["advantages"].clone()
        num_columns = advantages.shape[1]
        parts = [advantages[row, num_columns - length :] for row, length in enumerate(lengths)]
        _check_alignment(response_mask, lengths)
        # Without a data loader SkyRL does not know the number of its steps.
        progress = None
        if self.total_training_steps:
            progress = min(1.0, self.global_step / self.total_training_steps)
        for row, scaled in enumerate(self.engine_credit.scale(sequences, parts, progress=progress)):
            advantages[row, num_columns - lengths[row] :] = scaled
        data["advantages"] = advantages
        return data


def flow_skyrl_trainer(engine_credit: EngineCredit, base: type | None = None) -> type[SkyRLCredit]:
    """Return a trainer of SkyRL with token credit, for ``get_trainer`` of an experiment.

    Args:
        engine_credit: computes the weights.
        base: a subclass of ``skyrl.train.trainer.RayPPOTrainer``; None: that class.

    Raises:
        MissingExtraError: SkyRL is not installed, or in another version.
        ConfigError: ``base`` is no trainer of SkyRL.

    Cost: one forward pass of the model in the driver process for each step.
    """
    require_engine("skyrl", SUPPORTED, _INSTALL)
    from skyrl.train.trainer import RayPPOTrainer  # pyright: ignore[reportMissingImports]

    chosen = RayPPOTrainer if base is None else base
    require_base(chosen, RayPPOTrainer, "skyrl.train.trainer.RayPPOTrainer")
    return type(f"Flow{chosen.__name__}", (SkyRLCredit, chosen), {"engine_credit": engine_credit})


def _check_alignment(response_mask: torch.Tensor, lengths: list[int]) -> None:
    """Check that responses are the last tokens of their rows."""
    num_columns = response_mask.shape[1]
    for row, length in enumerate(lengths):
        if not bool(response_mask[row, num_columns - length :].all()):
            raise ConfigError(
                f"response_mask: must be 1 on the last {length} columns of sequence {row}, got another alignment; use "
                "the batch of SkyRL's own convert_to_training_input"
            )


def _unsupported(name: str, reason: str) -> ConfigError:
    """Return the error of a setting of SkyRL that credit does not support."""
    return ConfigError(f"{name}: must be false with token credit, because {reason}, got true; turn it off")
