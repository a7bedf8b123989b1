"""Pretrain the base model of a task: a small Qwen3 or Llama from scratch that can still improve much."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from rl.base_models.chain_recipe import ChainRecipe
from rl.base_models.path_search_recipe import PathSearchRecipe
from rl.base_models.program_recipe import ProgramRecipe
from rl.base_models.recipe import Cycle, Recipe
from rl.base_models.vocabulary import CONTEXT, NO_TARGET
from rl.base_models.wandering_recipe import WanderingRecipe
from rl.errors import ConfigError
from rl.folders import new_folder

RECIPES: dict[str, type[Recipe]] = {
    kind.task_name: kind for kind in (ChainRecipe, PathSearchRecipe, ProgramRecipe, WanderingRecipe)
}
"""The recipes by name of the task."""

Progress = Callable[[int, float], None]
"""Called with the number of updates done and the loss in nats per token."""


def find_recipe(task: str) -> type[Recipe]:
    """Return the class of a task's recipe.

    Raises:
        ConfigError: the task has no demonstrations to learn from.

    Example:
        >>> find_recipe("wandering")(steps=100).batch_size
        48
    """
    if task not in RECIPES:
        raise ConfigError(
            f"task: must be one of {', '.join(RECIPES)}, got {task!r}; other tasks have no demonstrations, so bring a "
            "model"
        )
    return RECIPES[task]


def pretrain(out: str | Path, recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Pretrain a small model on a task and write it to a folder, with ``recipe.json`` beside it.

    The loss is the cross-entropy of the response, its end token included; a prompt is random and cannot be predicted.
    The same recipe gives the same weights on the same machine with the same number of threads.

    Args:
        out: a folder that does not exist yet, or is empty; it is written atomically.
        recipe: of the task; see :func:`find_recipe`.
        progress: called after every update with the number of updates done and the loss in nats per token.

    Returns:
        The content of ``recipe.json``: settings, versions, seconds, the final loss (mean of the last 20 updates), and
        the result of :meth:`rl.base_models.recipe.Recipe.measure`.

    Raises:
        ConfigError: the folder cannot be written.

    Cost: 0.1 to 0.4 s an update on one busy core by the default recipes, five to ten minutes in all.
    """
    folder = _free_folder(out)
    started = time.monotonic()

    # The weights are a function of the seed; the caller's generator keeps its state.
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the caller's CUDA generators.
        torch.default_generator.manual_seed(recipe.seed)
        model = build_model(recipe)
    losses = train_model(model, recipe, progress)
    tokenizer = recipe.vocabulary.tokenizer()
    seconds = time.monotonic() - started

    last_losses = losses[-20:]
    report = {
        "recipe": asdict(recipe),
        "task": recipe.task_settings(),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "final_loss": sum(last_losses) / len(last_losses),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "measured": recipe.measure(model, tokenizer),
    }
    with new_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "recipe.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def measurements(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the measurements of a report by name: of the task, or of each of its levels."""
    measured = report["measured"]
    if "sampled" in measured:
        return {report["task"]["name"]: measured}
    return {f"level {level}": values for level, values in measured.items()}


# Training -----------------------------------------------------------------------------------------------


def build_model(recipe: Recipe) -> PreTrainedModel:
    """Build an untrained model: a Qwen3, or a Llama where queries and keys are not normalised.

    Embeddings have standard deviation 0.5, other matrices one over the square root of their inputs; with the usual
    0.02, lookups were learned far too slowly.
    """
    vocabulary = recipe.vocabulary
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary.ids),
        "hidden_size": recipe.width,
        "intermediate_size": round(recipe.mlp_ratio * recipe.width),
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": recipe.width // recipe.heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": vocabulary.pad_id,
        "eos_token_id": vocabulary.end_id,
        "bos_token_id": None,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if recipe.qk_norm else LlamaForCausalLM(LlamaConfig(**sizes))
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        deviation = 0.5 if "embed_tokens" in name else weight.shape[1] ** -0.5
        torch.nn.init.normal_(weight, std=deviation)
    return model


def train_model(model: PreTrainedModel, recipe: Recipe, progress: Progress | None = None) -> list[float]:
    """Train a model on demonstrations in place, and return the loss of every update in nats per token."""
    losses: list[float] = []
    model.train()
    for cycle in recipe.cycles:
        _train_cycle(model, recipe, cycle, losses, progress)
    model.eval()
    return losses


def _train_cycle(
    model: PreTrainedModel, recipe: Recipe, cycle: Cycle, losses: list[float], progress: Progress | None
) -> None:
    """Train a model for one cycle, and append the loss of every update; their number is that of the next update."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cycle.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    for step in range(cycle.steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(cycle, recipe.warmup_steps, step)
        input_ids, targets = recipe.vocabulary.encode(recipe.demonstrations(len(losses)))
        # Padding is on the right, where causal attention hides it from every token that counts: no mask is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits
        # The logits of a position predict the next token.
        loss = _weighted_loss(logits[:, :-1], targets[:, 1:], recipe.vocabulary.ids["#"], cycle.answer_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(len(losses), losses[-1])


def _weighted_loss(
    logits: Float[Tensor, "batch tokens vocabulary"],
    targets: Int64[Tensor, "batch tokens"],
    answer_id: int,
    answer_weight: float,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the targets, in nats per token, with more weight on those from ``#`` on."""
    if answer_weight == 1:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    is_answer = (targets == answer_id).cumsum(1) > 0
    # Positions that are no target have loss 0, and must have weight 0.
    weights = torch.where(is_answer, answer_weight, 1.0) * (targets != NO_TARGET)
    return (weights.flatten() * losses).sum() / weights.sum()


def _learning_rate(cycle: Cycle, warmup_steps: int, step: int) -> float:
    """Compute the learning rate: linear warm-up times a cosine from 1 to 0.1."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / cycle.steps))
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return cycle.learning_rate * cosine * warmup


# Output -------------------------------------------------------------------------------------------------


def _free_folder(out: str | Path) -> Path:
    """Return the absolute path of a folder that can be written, before any work is done."""
    folder = Path(out).absolute()
    is_taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if is_taken:
        raise ConfigError(
            f"out: must be a folder that does not exist yet, or is empty, got {str(out)!r}, which holds something; "
            "choose another name, or remove it first"
        )
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        raise ConfigError(
            f"out: must lie in a folder that exists and can be written, got {str(out)!r}; make {folder.parent} first"
        )
    return folder


def _versions() -> dict[str, str]:
    """Return the versions that the weights depend on."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
