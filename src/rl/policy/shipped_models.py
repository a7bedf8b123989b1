"""The base models that come with the package, one for each task of its own, and the settings that suit them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class ShippedModel:
    """A base model of the package.

    Attributes:
        name: of the model, and of the task that it was pretrained on.
        max_response_tokens: responses of this task end before, except rambling ones.
        learning_rate: default for its few weights, which take larger steps than those of a language model.
    """

    name: str
    max_response_tokens: int
    learning_rate: float = 1e-3

    @property
    def folder(self) -> Path:
        """Return the folder of its weights, tokenizer and ``recipe.json``."""
        return _ASSETS / self.name

    @property
    def settings(self) -> dict[str, float]:
        """Return its defaults for a run, by name of the setting in ``PPOConfig``."""
        return {"max_response_tokens": self.max_response_tokens, "learning_rate": self.learning_rate}


SHIPPED_MODELS = {
    model.name: model
    for model in (
        ShippedModel("chain", max_response_tokens=48),
        ShippedModel("pathsearch", max_response_tokens=64),
        ShippedModel("program", max_response_tokens=48),
        ShippedModel("wandering", max_response_tokens=128),
    )
}
"""The shipped models by name."""


def default_model(task: str) -> str:
    """Return the name of the shipped model for a task: its own one, or that of the chain task.

    Example:
        >>> default_model("wandering"), default_model("countdown")
        ('wandering', 'chain')
    """
    if task in SHIPPED_MODELS:
        return task
    return "chain"
