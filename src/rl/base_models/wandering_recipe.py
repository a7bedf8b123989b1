"""The recipe of the wandering chain: one model for all levels, and a level an update.

Demonstrations contain mistakes, detours included, so the model knows how a response is written and is uncertain about
sums of at least 10. Batches of one level need no padding to speak of. Short levels come first: lookups and sums are
learned there, and longer responses are learned from them in few updates.

The model has no norms of queries and keys (a Llama). With them (a Qwen3 of the same size, 4,200 updates) the answer of
level 0:5 was looked up rightly in 64 % of the responses, and no attention graph told used steps from unused ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any, ClassVar

from rl.base_models.measure import measure
from rl.base_models.recipe import SEE_RECIPE, Cycle, Recipe
from rl.base_models.vocabulary import Vocabulary
from rl.config import at_least, positive
from rl.tasks.definitions import ADDENDS, USUAL_MISTAKES
from rl.tasks.registry import make_task
from rl.tasks.wandering import FILLERS, LEVELS, NAMES, SEPARATORS, Wandering, demonstration

_ROOTS = [f"={digit}" for digit in range(10)]
_RIGHT_SIDES = [f"={name}+{addend}" for name in NAMES for addend in ADDENDS]
_LEVEL_TOKENS = ["f0", "f2", "f4", "d0", "d1", "d2", "d5"]

_MEAN_LENGTHS = {"0:0": 22, "0:1": 32, "0:2": 42, "0:5": 72, "2:0": 34, "4:0": 46}
"""Mean tokens of a demonstration of each level, its end token included (3,000 demonstrations each)."""

_ALIKE: dict[str, float] = {}
_SECOND_PREFERENCE = {"0:5": 2.0}
_THIRD_PREFERENCE = {"0:5": 4.0, "4:0": 2.0}
"""How many times as often a level is drawn in a cycle; the longest are learned last."""

_DEMONSTRATION_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""


@dataclass(frozen=True, kw_only=True)
class WanderingRecipe(Recipe):
    """The settings of the pre-training on wandering chains; the defaults made the model in the package.

    A level is drawn with a probability proportional to (mean tokens of its demonstrations)^-exponent.
    """

    task_name: ClassVar[str] = "wandering"
    vocabulary: ClassVar[Vocabulary] = Vocabulary(
        words=(*NAMES, *_ROOTS, *_RIGHT_SIDES, *SEPARATORS, "?", ":", "#", *_LEVEL_TOKENS, *FILLERS),
        pattern=r"=[A-F]\+[3-7]|=[0-9]|[fd][0-9]| [a-z]+|.",
    )

    seed: int = 2
    width: Annotated[int, at_least(1, SEE_RECIPE)] = 64
    mlp_ratio: Annotated[float, positive(SEE_RECIPE)] = 2.5
    layers: Annotated[int, at_least(1, SEE_RECIPE)] = 3
    qk_norm: bool = False
    evaluate: Annotated[int, at_least(1, SEE_RECIPE)] = 600

    # The first cycle: short levels first.

    steps: Annotated[int, at_least(1, SEE_RECIPE)] = 1800
    learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 4e-3

    answer_weight: Annotated[float, at_least(1, SEE_RECIPE)] = 3.0
    """Weight of the loss from the ``#`` on. The few tokens of an answer are a small part of the loss, and without more
    weight a third of the answers of level 0:5 did not repeat the value that had been computed."""

    first_exponent: Annotated[float, at_least(0, SEE_RECIPE)] = 1.6
    """Exponent at the start of the first cycle; it falls linearly to ``last_exponent``."""

    last_exponent: Annotated[float, at_least(0, SEE_RECIPE)] = 0.8
    """Exponent at the end of the first cycle."""

    # The second cycle: levels more alike.

    second_steps: Annotated[int, at_least(0, SEE_RECIPE)] = 1200
    second_learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 2.5e-3
    second_answer_weight: Annotated[float, at_least(1, SEE_RECIPE)] = 4.0
    second_exponent: Annotated[float, at_least(0, SEE_RECIPE)] = 0.4

    # The third cycle: long levels most.

    third_steps: Annotated[int, at_least(0, SEE_RECIPE)] = 1500
    third_learning_rate: Annotated[float, at_least(0, SEE_RECIPE)] = 2.5e-3
    third_answer_weight: Annotated[float, at_least(1, SEE_RECIPE)] = 8.0
    third_exponent: Annotated[float, at_least(0, SEE_RECIPE)] = 0.0

    @property
    def cycles(self) -> list[Cycle]:
        """Return the three cycles."""
        return [
            Cycle(self.steps, self.learning_rate, self.answer_weight),
            Cycle(self.second_steps, self.second_learning_rate, self.second_answer_weight),
            Cycle(self.third_steps, self.third_learning_rate, self.third_answer_weight),
        ]

    def level_weights(self, step: int) -> list[float]:
        """Return the relative probability of every level, in the order of :data:`rl.tasks.wandering.LEVELS`."""
        done = step / self.steps
        if done < 1:
            exponent = self.first_exponent + (self.last_exponent - self.first_exponent) * done
            preferred = _ALIKE
        elif step < self.steps + self.second_steps:
            exponent = self.second_exponent
            preferred = _SECOND_PREFERENCE
        else:
            exponent = self.third_exponent
            preferred = _THIRD_PREFERENCE
        return [_MEAN_LENGTHS[level] ** -exponent * preferred.get(level, 1.0) for level in LEVELS]

    def demonstrations(self, step: int) -> list[tuple[str, str]]:
        """Draw prompts and responses of one update, all of one level."""
        random = Random(f"pretrain/{self.task_name}/{self.seed}/{step}")
        (level,) = random.choices(LEVELS, self.level_weights(step))
        task = Wandering(level=level, seed=_DEMONSTRATION_STREAM + self.seed)
        rows = []
        for _ in range(self.batch_size):
            sample = task.sample("train", random.getrandbits(62))
            rows.append((str(sample.prompt), demonstration(sample, random, USUAL_MISTAKES)))
        return rows

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Measure the model on every level."""
        results = {}
        for level in LEVELS:
            results[level] = measure(
                model,
                tokenizer,
                make_task("wandering", level=level),
                num_problems=self.evaluate,
                num_samples=1,
                max_new_tokens=128,
            )
        return results

    def task_settings(self) -> dict[str, Any]:
        """Return the options of the default task, and the levels that were taught."""
        return {**asdict(Wandering()), "levels": list(LEVELS)}
