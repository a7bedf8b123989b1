"""The recipe of path search: demonstrations walk at random, with wrong steps, and repeat what they walked.

The path behind the ``#`` repeats the walk that found the goal, wrong steps included, so the model learns to copy it
from the response and not to look it up in the problem.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any, ClassVar

from rl.base_models.measure import measure
from rl.base_models.recipe import SEE_RECIPE, Recipe
from rl.base_models.vocabulary import Vocabulary
from rl.config import at_least, in_unit_interval, positive
from rl.tasks.path_search import NAMES, USUAL_WRONG_STEPS, PathSearch, demonstration
from rl.tasks.registry import make_task

_DEMONSTRATION_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""


@dataclass(frozen=True, kw_only=True)
class PathSearchRecipe(Recipe):
    """The settings of the pre-training on path search; the defaults made the model in the package."""

    task_name: ClassVar[str] = "pathsearch"
    # A child in the problem is another token than a node of a walk: then a step is one lookup.
    vocabulary: ClassVar[Vocabulary] = Vocabulary(
        words=(*NAMES, *(f">{name}" for name in NAMES), ";", ",", "?", ":", "#"), pattern=r">[A-H]|."
    )

    steps: Annotated[int, at_least(1, SEE_RECIPE)] = 2000
    width: Annotated[int, at_least(1, SEE_RECIPE)] = 64
    mlp_ratio: Annotated[float, positive(SEE_RECIPE)] = 2.5
    layers: Annotated[int, at_least(1, SEE_RECIPE)] = 3
    learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 4e-3

    wrong_steps: Annotated[float, in_unit_interval(SEE_RECIPE)] = USUAL_WRONG_STEPS
    """Probability that a step of a walk leads to a node that is no child."""

    def demonstrations(self, step: int) -> list[tuple[str, str]]:
        """Draw prompts and responses of one update."""
        random = Random(f"pretrain/{self.task_name}/{self.seed}/{step}")
        task = PathSearch(seed=_DEMONSTRATION_STREAM + self.seed)
        rows = []
        for _ in range(self.batch_size):
            sample = task.sample("train", random.getrandbits(62))
            rows.append((str(sample.prompt), demonstration(sample, random, self.wrong_steps)))
        return rows

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Measure the model on the default task."""
        return measure(
            model, tokenizer, make_task("pathsearch"), num_problems=self.evaluate, num_samples=2, max_new_tokens=64
        )

    def task_settings(self) -> dict[str, Any]:
        """Return the options of the default task."""
        return asdict(PathSearch())
