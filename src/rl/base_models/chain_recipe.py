"""The recipe of the variable chain.

The model learns from demonstrations with mistakes, as in a natural corpus: each sum is stated wrong at a rate of its
own. So it knows the form of a response and how to look variables up, and is uncertain about sums. A model trained on
correct demonstrations and stopped early was right as often, but certain of its mistakes: it did not explore, and
reinforcement learning did not improve it in 60 steps at any learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from string import ascii_lowercase, digits
from typing import Annotated, Any, ClassVar

from rl.base_models.measure import measure
from rl.base_models.recipe import SEE_RECIPE, Recipe
from rl.base_models.vocabulary import Vocabulary
from rl.config import at_least, between, broken_rule, in_unit_interval
from rl.tasks.chain import Chain, correct_sum, demonstration, first_error
from rl.tasks.registry import make_task

# The pairs make a variable that is defined another token than one that is referred to. With single characters alone,
# lookups were learned so slowly that after 2000 updates they still were three in ten of the first errors.
_SINGLE_CHARACTERS = [*ascii_lowercase, *digits, *"=+;?,#"]
_DEFINITIONS = [f"={character}" for character in ascii_lowercase + digits]
_ADDENDS = [f"+{digit}" for digit in digits]

_DEMONSTRATION_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""

_FULL_SIZE_PROBABILITY = 2 / 3


@dataclass(frozen=True, kw_only=True)
class ChainRecipe(Recipe):
    """The settings of the pre-training on chains; the defaults made the model in the package."""

    task_name: ClassVar[str] = "chain"
    vocabulary: ClassVar[Vocabulary] = Vocabulary(
        words=(*_SINGLE_CHARACTERS, *_DEFINITIONS, *_ADDENDS), pattern=r"=[a-z0-9]|\+[0-9]|."
    )

    num_variables: Annotated[int, between(2, 26, SEE_RECIPE)] = 6
    """Most assignments of a demonstration; problems grow from two assignments to this number."""

    growth: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.4
    """Fraction of the steps after which problems have reached their full size."""

    easy_hops: Annotated[int, at_least(1, SEE_RECIPE)] = 3
    """Most references on the needed chain of an easy demonstration."""

    easy_addend: Annotated[int, between(1, 9, SEE_RECIPE)] = 3
    """Greatest addend of an easy demonstration."""

    hard_hops: Annotated[int, at_least(1, SEE_RECIPE)] = 5
    """Most references of a hard demonstration, whose addends go up to 9."""

    hard_share: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.1
    """Fraction of the demonstrations that are hard."""

    detour_share: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.25
    """Fraction of the demonstrations that first resolve a variable that is not needed."""

    least_mistakes: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.1
    """Lowest probability of a mistake. Each of the hundred sums of two digits has its own probability of being stated
    wrong, drawn once, and always the same wrong digit."""

    most_mistakes: Annotated[float, in_unit_interval(SEE_RECIPE)] = 0.6
    """Highest probability of a mistake. Above 0.5 the model's likeliest answer is wrong too, and only reinforcement
    learning can correct it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_mistakes < self.least_mistakes:
            rule = f"be at least least_mistakes={self.least_mistakes}"
            raise broken_rule("most_mistakes", rule, self.most_mistakes, SEE_RECIPE)

    def demonstrations(self, step: int) -> list[tuple[str, str]]:
        """Draw prompts and responses of one update, all with the same number of assignments."""
        random = Random(f"pretrain/{self.seed}/{step}")

        # Problems grow linearly to their full size. A third of the updates repeats smaller problems, which are cheap
        # and keep the model from forgetting them.
        reached = min(1.0, step / max(1.0, self.growth * self.steps))
        largest = 2 + int((self.num_variables - 2) * reached)
        size = largest
        if random.random() >= _FULL_SIZE_PROBABILITY:
            size = random.randint(2, largest)

        add = mistaken_sums(self, random)
        rows = []
        for _ in range(self.batch_size):
            is_hard = random.random() < self.hard_share
            most_hops = self.hard_hops if is_hard else self.easy_hops
            task = Chain(
                num_variables=size,
                hops=(1, min(most_hops, size - 1)),
                max_addend=9 if is_hard else self.easy_addend,
                seed=_DEMONSTRATION_STREAM + self.seed,
            )
            sample = task.sample("train", random.getrandbits(62))
            detours = int(random.random() < self.detour_share)
            rows.append((str(sample.prompt), demonstration(sample, random, detours, add)))
        return rows

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Measure the model on the default task, by number of hops."""
        return measure(
            model, tokenizer, make_task("chain"), num_problems=self.evaluate, group_by="hops", first_error=first_error
        )

    def task_settings(self) -> dict[str, Any]:
        """Return the options of the default task."""
        return asdict(Chain())


def mistaken_sums(recipe: ChainRecipe, random: Random) -> Callable[[int, int], int]:
    """Return an addition with mistakes: each sum is wrong at its own rate, always by the same amount.

    Args:
        recipe: range of the rates, and seed of the table of rates and amounts.
        random: draws whether a sum is wrong.
    """
    table_random = Random(f"pretrain/{recipe.seed}/mistakes")
    mistakes = {}
    for pair in product(range(10), repeat=2):
        rate = table_random.uniform(recipe.least_mistakes, recipe.most_mistakes)
        amount = table_random.choice((-2, -1, 1, 2))
        mistakes[pair] = (rate, amount)

    def add(value: int, addend: int) -> int:
        rate, amount = mistakes[value, addend]
        if random.random() < rate:
            return correct_sum(value, addend + amount)
        return correct_sum(value, addend)

    return add
