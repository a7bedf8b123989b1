"""Pretrain the base model of the variable chain: a small Qwen3 from scratch that can still improve much.

The model learns from demonstrations with mistakes, as in a natural corpus: each sum is stated wrong at a rate of its
own. So it knows the form of a response and how to look variables up, and is uncertain about sums. A model trained on
correct demonstrations and stopped early was right as often, but certain of its mistakes: it did not explore, and
reinforcement learning did not improve it in 60 steps at any learning rate.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random
from string import ascii_lowercase, digits
from typing import Annotated, Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl.chain_model.measure import measure
from rl.config import at_least, between, broken_rule, check_fields, in_unit_interval
from rl.errors import ConfigError
from rl.folders import new_folder
from rl.tasks.chain import Chain, correct_sum, demonstration

Progress = Callable[[int, float], None]
"""Called with the number of updates done and the loss in nats per token."""

_SEE_RECIPE = "see Recipe for the default"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the pre-training; the defaults made the model in the package."""

    steps: Annotated[int, at_least(1, _SEE_RECIPE)] = 1200
    """Optimizer updates."""

    seed: int = 0
    """Seed of the weights and of the demonstrations."""

    # The model.

    width: Annotated[int, at_least(1, _SEE_RECIPE)] = 128
    """Size of the hidden states; the MLP is twice as wide."""

    layers: Annotated[int, at_least(1, _SEE_RECIPE)] = 4
    """Layers of the transformer."""

    heads: Annotated[int, at_least(1, _SEE_RECIPE)] = 4
    """Attention heads of each layer; each has an even number of dimensions."""

    # The optimizer.

    batch_size: Annotated[int, at_least(1, _SEE_RECIPE)] = 48
    """Demonstrations in an update."""

    learning_rate: Annotated[float, at_least(0, _SEE_RECIPE)] = 3e-3
    """Highest learning rate, after the warm-up; a cosine then lowers it to a tenth."""

    warmup_steps: Annotated[int, at_least(0, _SEE_RECIPE)] = 50
    """Updates of linear warm-up."""

    weight_decay: Annotated[float, at_least(0, _SEE_RECIPE)] = 0.01
    """Weight decay of AdamW."""

    # The demonstrations.

    num_variables: Annotated[int, between(2, 26, _SEE_RECIPE)] = 6
    """Most assignments of a demonstration; problems grow from two assignments to this number."""

    growth: Annotated[float, in_unit_interval(_SEE_RECIPE)] = 0.4
    """Fraction of the steps after which problems have reached their full size."""

    easy_hops: Annotated[int, at_least(1, _SEE_RECIPE)] = 3
    """Most references on the needed chain of an easy demonstration."""

    easy_addend: Annotated[int, between(1, 9, _SEE_RECIPE)] = 3
    """Greatest addend of an easy demonstration."""

    hard_hops: Annotated[int, at_least(1, _SEE_RECIPE)] = 5
    """Most references of a hard demonstration, whose addends go up to 9."""

    hard_share: Annotated[float, in_unit_interval(_SEE_RECIPE)] = 0.1
    """Fraction of the demonstrations that are hard."""

    detour_share: Annotated[float, in_unit_interval(_SEE_RECIPE)] = 0.25
    """Fraction of the demonstrations that first resolve a variable that is not needed."""

    least_mistakes: Annotated[float, in_unit_interval(_SEE_RECIPE)] = 0.1
    """Lowest probability of a mistake. Each of the hundred sums of two digits has its own probability of being stated
    wrong, drawn once, and always the same wrong digit."""

    most_mistakes: Annotated[float, in_unit_interval(_SEE_RECIPE)] = 0.6
    """Highest probability of a mistake. Above 0.5 the model's likeliest answer is wrong too, and only reinforcement
    learning can correct it."""

    evaluate: Annotated[int, at_least(1, _SEE_RECIPE)] = 1000
    """Problems of the measurement in ``recipe.json``."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.most_mistakes < self.least_mistakes:
            rule = f"be at least least_mistakes={self.least_mistakes}"
            raise broken_rule("most_mistakes", rule, self.most_mistakes, _SEE_RECIPE)
        # Rotary position embeddings rotate pairs of dimensions.
        if self.width % (2 * self.heads) != 0:
            rule = f"divide the width {self.width} into an even number of dimensions"
            raise broken_rule("heads", rule, self.heads, _SEE_RECIPE)


def pretrain(out: str | Path, recipe: Recipe | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Pretrain a small model on the variable chain and write it to a folder, with ``recipe.json`` beside it.

    The loss is the cross-entropy of the response, its end token included; a prompt is random and cannot be predicted.
    The same recipe gives the same weights on the same machine with the same number of threads.

    Args:
        out: a folder that does not exist yet, or is empty; it is written atomically.
        recipe: see :class:`Recipe`.
        progress: called after every update with the number of updates done and the loss in nats per token.

    Returns:
        The content of ``recipe.json``: settings, versions, seconds, the final loss (mean of the last 20 updates), and
        the result of :func:`measure` on the default task.

    Raises:
        ConfigError: the folder cannot be written, or a setting is out of range.

    Cost: about 0.4 s an update on one busy core by the default recipe, five minutes in all.
    """
    recipe = recipe or Recipe()
    folder = _free_folder(out)
    started = time.monotonic()

    # The weights are a function of the seed; the caller's generator keeps its state.
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the caller's CUDA generators.
        torch.default_generator.manual_seed(recipe.seed)
        model = build_model(recipe)
    losses = train_model(model, recipe, progress)
    tokenizer = chain_tokenizer()
    seconds = time.monotonic() - started

    last_losses = losses[-20:]
    report = {
        "recipe": asdict(recipe),
        "task": asdict(Chain()),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "final_loss": sum(last_losses) / len(last_losses),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "measured": measure(model, tokenizer, Chain(), num_problems=recipe.evaluate),
    }
    with new_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "recipe.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


# Tokens -------------------------------------------------------------------------------------------------

# Single characters, and pairs that begin with "=" or "+".
_TOKEN_PATTERN = r"=[a-z0-9]|\+[0-9]|."
_SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
_SINGLE_CHARACTERS = [*ascii_lowercase, *digits, *"=+;?,#"]
_DEFINITIONS = [f"={character}" for character in ascii_lowercase + digits]
_ADDENDS = [f"+{digit}" for digit in digits]
_TOKENS = [*_SPECIAL_TOKENS, *_SINGLE_CHARACTERS, *_DEFINITIONS, *_ADDENDS]
_VOCABULARY = {token: number for number, token in enumerate(_TOKENS)}
_CONTEXT = 256
_NO_TARGET = -100


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: single characters, and pairs that begin with ``=`` or ``+``; decoding is exact.

    The pairs make a variable that is defined another token than one that is referred to. With single characters alone,
    lookups were learned so slowly that after 2000 updates they still were three in ten of the first errors.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN_PATTERN), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(rows: list[tuple[str, str]]) -> tuple[Int64[Tensor, "batch tokens"], Int64[Tensor, "batch tokens"]]:
    """Encode prompts and responses for training.

    Args:
        rows: pairs of prompt and response.

    Returns:
        Token ids ``[B, T]``, padded on the right, and targets ``[B, T]``: the token at each position of the response
        and its end, -100 elsewhere.
    """
    prompts = [_token_ids(prompt) for prompt, _ in rows]
    sequences = [
        prompt_ids + _token_ids(response) + [_VOCABULARY["<eos>"]]
        for prompt_ids, (_, response) in zip(prompts, rows, strict=True)
    ]
    shape = (len(rows), max(len(sequence) for sequence in sequences))
    input_ids = torch.full(shape, _VOCABULARY["<pad>"])
    targets = torch.full(shape, _NO_TARGET)
    for row, (prompt_ids, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        start = len(prompt_ids)
        end = len(sequence)
        input_ids[row, :end] = torch.tensor(sequence)
        targets[row, start:end] = input_ids[row, start:end]
    return input_ids, targets


def _token_ids(text: str) -> list[int]:
    """Encode a text of the chain task; faster than the tokenizer, and tested to agree with it."""
    return [_VOCABULARY[token] for token in re.findall(_TOKEN_PATTERN, text)]


# Demonstrations -----------------------------------------------------------------------------------------

_DEMONSTRATION_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""

_FULL_SIZE_PROBABILITY = 2 / 3


def demonstrations(recipe: Recipe, step: int) -> list[tuple[str, str]]:
    """Draw prompts and responses of one update, all with the same number of assignments.

    Args:
        recipe: the settings.
        step: number of the update, from 0.
    """
    random = Random(f"pretrain/{recipe.seed}/{step}")

    # Problems grow linearly to their full size. A third of the updates repeats smaller problems, which are cheap and
    # keep the model from forgetting them.
    reached = min(1.0, step / max(1.0, recipe.growth * recipe.steps))
    largest = 2 + int((recipe.num_variables - 2) * reached)
    size = largest
    if random.random() >= _FULL_SIZE_PROBABILITY:
        size = random.randint(2, largest)

    add = mistaken_sums(recipe, random)
    rows = []
    for _ in range(recipe.batch_size):
        is_hard = random.random() < recipe.hard_share
        most_hops = recipe.hard_hops if is_hard else recipe.easy_hops
        task = Chain(
            num_variables=size,
            hops=(1, min(most_hops, size - 1)),
            max_addend=9 if is_hard else recipe.easy_addend,
            seed=_DEMONSTRATION_STREAM + recipe.seed,
        )
        sample = task.sample("train", random.getrandbits(62))
        detours = int(random.random() < recipe.detour_share)
        rows.append((str(sample.prompt), demonstration(sample, random, detours, add)))
    return rows


def mistaken_sums(recipe: Recipe, random: Random) -> Callable[[int, int], int]:
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


# Training -----------------------------------------------------------------------------------------------


def build_model(recipe: Recipe) -> Qwen3ForCausalLM:
    """Build an untrained model.

    Embeddings have standard deviation 0.5, other matrices one over the square root of their inputs; with the usual
    0.02, lookups were learned far too slowly.
    """
    config = Qwen3Config(
        vocab_size=len(_VOCABULARY),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=_VOCABULARY["<pad>"],
        eos_token_id=_VOCABULARY["<eos>"],
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        deviation = 0.5 if "embed_tokens" in name else weight.shape[1] ** -0.5
        torch.nn.init.normal_(weight, std=deviation)
    return model


def train_model(model: Qwen3ForCausalLM, recipe: Recipe, progress: Progress | None = None) -> list[float]:
    """Train a model on demonstrations in place, and return the loss of every update in nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    losses = []
    model.train()
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(recipe, step)
        input_ids, targets = encode(demonstrations(recipe, step))
        # Padding is on the right, where causal attention hides it from every token that counts: no mask is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits
        # The logits of a position predict the next token.
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    model.eval()
    return losses


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Compute the learning rate: linear warm-up times a cosine from 1 to 0.1."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))
    warmup = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    return recipe.learning_rate * cosine * warmup


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
