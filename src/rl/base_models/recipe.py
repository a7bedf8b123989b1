"""Recipe: the settings that all base models share, and what the recipe of a task adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from rl.base_models.vocabulary import Vocabulary
from rl.config import at_least, broken_rule, check_fields, in_unit_interval, positive

SEE_RECIPE = "see Recipe for the default"
"""Remedy of the messages about settings."""


class Cycle(NamedTuple):
    """A part of the training with an optimizer and a schedule of its own.

    Attributes:
        steps: optimizer updates.
        learning_rate: highest, after the warm-up.
        answer_weight: weight of the loss from the ``#`` on, relative to the tokens before.
    """

    steps: int
    learning_rate: float
    answer_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a pre-training. A subclass for a task has defaults that made the model in the package.

    Class attributes:
        task_name: name of the task, and of the model.
        vocabulary: the tokens of the task.
    """

    task_name: ClassVar[str]
    vocabulary: ClassVar[Vocabulary]

    steps: Annotated[int, at_least(1, SEE_RECIPE)] = 1200
    """Optimizer updates."""

    seed: int = 0
    """Seed of the weights and of the demonstrations."""

    # The model.

    width: Annotated[int, at_least(1, SEE_RECIPE)] = 128
    """Size of the hidden states."""

    mlp_ratio: Annotated[float, positive(SEE_RECIPE)] = 2.0
    """Width of the MLP in widths of the hidden states."""

    layers: Annotated[int, at_least(1, SEE_RECIPE)] = 4
    """Layers of the transformer."""

    heads: Annotated[int, at_least(1, SEE_RECIPE)] = 4
    """Attention heads of each layer; each has an even number of dimensions."""

    qk_norm: bool = True
    """Whether queries and keys are normalised: a Qwen3, else a Llama."""

    # The optimizer.

    batch_size: Annotated[int, at_least(1, SEE_RECIPE)] = 48
    """Demonstrations in an update."""

    learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 3e-3
    """Highest learning rate, after the warm-up; a cosine then lowers it to a tenth."""

    warmup_steps: Annotated[int, at_least(0, SEE_RECIPE)] = 50
    """Updates of linear warm-up."""

    weight_decay: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.01
    """Weight decay of AdamW."""

    evaluate: Annotated[int, at_least(1, SEE_RECIPE)] = 1000
    """Problems of each measurement in ``recipe.json``."""

    def __post_init__(self) -> None:
        check_fields(self)
        # Rotary position embeddings rotate pairs of dimensions.
        if self.width % (2 * self.heads) != 0:
            rule = f"divide the width {self.width} into an even number of dimensions"
            raise broken_rule("heads", rule, self.heads, SEE_RECIPE)

    @property
    def cycles(self) -> list[Cycle]:
        """Return the cycles of the training, in order; by default one."""
        return [Cycle(self.steps, self.learning_rate)]

    def demonstrations(self, step: int) -> list[tuple[str, str]]:
        """Draw prompts and responses of one update, a function of the recipe and the number of the update, from 0.

        Updates are numbered through all cycles.
        """
        raise NotImplementedError

    def measure(self, model: Any, tokenizer: Any) -> Mapping[str, Any]:
        """Measure how well a model solves fresh problems, as JSON values."""
        raise NotImplementedError

    def task_settings(self) -> Mapping[str, Any]:
        """Return the options of the measured task, as JSON values."""
        raise NotImplementedError
