"""The recipe of programs: demonstrations work out every line, with the mistakes of the wandering chain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any, ClassVar

from rl.base_models.measure import measure
from rl.base_models.recipe import SEE_RECIPE, Recipe
from rl.base_models.vocabulary import Vocabulary
from rl.config import at_least, positive
from rl.tasks.definitions import ADDENDS, USUAL_MISTAKES
from rl.tasks.program import NAMES, Program, demonstration
from rl.tasks.registry import make_task

_ROOTS = [f"={digit}" for digit in range(10)]
_RIGHT_SIDES = [f"={name}+{addend}" for name in NAMES for addend in ADDENDS]

_DEMONSTRATION_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""


@dataclass(frozen=True, kw_only=True)
class ProgramRecipe(Recipe):
    """The settings of the pre-training on programs; the defaults made the model in the package."""

    task_name: ClassVar[str] = "program"
    vocabulary: ClassVar[Vocabulary] = Vocabulary(
        words=(*NAMES, *_ROOTS, *_RIGHT_SIDES, ";", "?", ":", "#"), pattern=r"=[A-H]\+[3-7]|=[0-9]|."
    )

    steps: Annotated[int, at_least(1, SEE_RECIPE)] = 1600
    width: Annotated[int, at_least(1, SEE_RECIPE)] = 64
    mlp_ratio: Annotated[float, positive(SEE_RECIPE)] = 2.5
    layers: Annotated[int, at_least(1, SEE_RECIPE)] = 3
    learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 4e-3

    def demonstrations(self, step: int) -> list[tuple[str, str]]:
        """Draw prompts and responses of one update."""
        random = Random(f"pretrain/{self.task_name}/{self.seed}/{step}")
        task = Program(seed=_DEMONSTRATION_STREAM + self.seed)
        rows = []
        for _ in range(self.batch_size):
            sample = task.sample("train", random.getrandbits(62))
            rows.append((str(sample.prompt), demonstration(sample, random, USUAL_MISTAKES)))
        return rows

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Measure the model on the default task."""
        return measure(
            model, tokenizer, make_task("program"), num_problems=self.evaluate, num_samples=2, max_new_tokens=64
        )

    def task_settings(self) -> dict[str, Any]:
        """Return the options of the default task."""
        return asdict(Program())
