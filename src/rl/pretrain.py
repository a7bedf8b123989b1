"""The base model of the variable chain: a small Qwen3 from scratch, left with much to learn on purpose.

It is taught by demonstrations that have mistakes in them, as a corpus from the world would: each sum is stated wrong at
a rate of its own. So it knows the form of a response and how to look things up, and is unsure of its sums. A model
taught by correct demonstrations alone and stopped early was as often right, but certain of its mistakes: it tried
nothing else, and reinforcement taught it nothing in 60 steps at any learning rate.
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
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rl.errors import ConfigError, PolicyError
from rl.folders import new_folder
from rl.measurement import measure
from rl.tasks.chain import Chain, correct_sum, demonstration

CHAIN_MODEL = Path(__file__).parent / "assets" / "chain"
"""The folder of the base model that comes with the package."""

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_PATTERN = r"=[a-z0-9]|\+[0-9]|."
_PAIRS = (*("=" + end for end in ascii_lowercase + digits), *("+" + digit for digit in digits))
_VOCABULARY = {token: number for number, token in enumerate((*_SPECIAL, *ascii_lowercase, *digits, *"=+;?,#", *_PAIRS))}
_STREAM = 1_000_003
"""Added to the seed of the problems, so that demonstrations and training runs draw from different streams."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of the pre-training; the defaults made the model in the package.

    Attributes:
        steps: optimiser updates.
        seed: of the weights and of the demonstrations.
        width: of the residual stream; the MLP is twice as wide.
        layers: of the transformer.
        heads: of each layer; must divide the width.
        batch_size: demonstrations per update.
        learning_rate: highest, after the warm-up.
        warmup_steps: of the learning rate, which then follows a cosine to a tenth.
        weight_decay: of AdamW.
        num_variables: most assignments of a demonstration; problems grow from two assignments to this many.
        growth: part of the steps after which problems have reached their full size.
        easy_hops: most references on the needed chain of an easy demonstration.
        easy_addend: greatest addend of an easy demonstration.
        hard_hops: the same for hard ones, whose addends go up to 9.
        hard_share: part of the demonstrations that are hard.
        detour_share: part of the demonstrations that resolve a variable first which nobody asked for.
        least_mistakes: each of the hundred sums of two digits is stated wrong with a probability of its own, drawn
            once between this
        most_mistakes: and this; always with the same wrong digit. Where it is above a half, the model's likeliest
            answer is wrong too, and only reinforcement can teach it better.
        evaluate: problems for the measurement in ``recipe.json``.
    """

    steps: int = 1200
    seed: int = 0
    width: int = 128
    layers: int = 4
    heads: int = 4
    batch_size: int = 48
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    num_variables: int = 6
    growth: float = 0.4
    easy_hops: int = 3
    easy_addend: int = 3
    hard_hops: int = 5
    hard_share: float = 0.1
    detour_share: float = 0.25
    least_mistakes: float = 0.1
    most_mistakes: float = 0.6
    evaluate: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "width", "layers", "heads", "batch_size", "easy_hops", "hard_hops", "evaluate"):
            _require(name, getattr(self, name), type(getattr(self, name)) is int and getattr(self, name) >= 1,
                     "be a whole number of at least 1")  # fmt: skip
        for name in ("warmup_steps",):
            _require(name, getattr(self, name), type(getattr(self, name)) is int and getattr(self, name) >= 0,
                     "be a whole number of at least 0")  # fmt: skip
        for name in ("growth", "hard_share", "detour_share", "least_mistakes", "most_mistakes"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "lie in [0, 1]")
        for name in ("learning_rate", "weight_decay"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "be finite and at least 0")
        _require("seed", self.seed, type(self.seed) is int, "be a whole number")
        _require("num_variables", self.num_variables, self.num_variables in range(2, 27), "be from 2 to 26")
        _require("easy_addend", self.easy_addend, self.easy_addend in range(1, 10), "be from 1 to 9")
        _require("most_mistakes", self.most_mistakes, self.most_mistakes >= self.least_mistakes,
                 f"be at least least_mistakes={self.least_mistakes}")  # fmt: skip
        _require("heads", self.heads, self.width % (2 * self.heads) == 0,
                 f"divide the width {self.width} into an even number of dimensions")  # fmt: skip


def pretrain(
    out: str | Path, recipe: Recipe | None = None, *, progress: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Teach a small model the variable chain and write it to a folder, with ``recipe.json`` beside it.

    Cross-entropy of the response alone, its end token included: a prompt is random and teaches nothing. The same
    recipe gives the same weights on the same machine with the same number of threads.

    Args:
        out: a folder that does not exist yet, or is empty; it appears only when all is written.
        recipe: see :class:`Recipe`.
        progress: called after every update with the number of updates done and the loss in nats per token.

    Returns:
        What is in ``recipe.json``: settings, versions, seconds, the final loss (mean of the last 20 updates), and
        what :func:`measure` found on the default task.

    Raises:
        ConfigError: the folder cannot be written, or a setting is out of range.

    Cost: about 0.4 s an update on one busy core by the default recipe, five minutes in all.
    """
    recipe = recipe or Recipe()
    folder = _free_folder(out)
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would reseed CUDA generators as well
        model = build_model(recipe)
    losses = _train(model, recipe, progress)
    tokenizer = chain_tokenizer()
    seconds = time.monotonic() - started
    report = {
        "recipe": asdict(recipe),
        "task": asdict(Chain()),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "final_loss": sum(losses[-20:]) / len(losses[-20:]),
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


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """Single characters, and pairs that begin with ``=`` or ``+``; decoding gives the same text again.

    The pairs make a variable that is defined another token than one that is referred to. With single characters alone,
    lookups were learned so slowly that after 2000 updates they still were three in ten of the first errors.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def load_chain_model(folder: str | Path = CHAIN_MODEL) -> tuple[Any, Any]:
    """The base model, in float32 and evaluation mode, and its tokenizer.

    Raises:
        PolicyError: the folder holds no model.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise PolicyError(
            f"folder: must hold a model that pretrain() wrote, got {str(folder)!r} without model.safetensors; "
            "install the package again, or run rl.pretrain.pretrain"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if folder == CHAIN_MODEL:  # where a package is installed has no place in checkpoints, logs and pages
        model.config._name_or_path = model.name_or_path = "chain"
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build_model(recipe: Recipe) -> Qwen3ForCausalLM:
    """An untrained model.

    With the usual 0.02, lookups were learned far too slowly: embeddings have standard deviation 0.5, other matrices
    one over the square root of their inputs.
    """
    config = Qwen3Config(
        vocab_size=len(_VOCABULARY), hidden_size=recipe.width, intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads, max_position_embeddings=256, tie_word_embeddings=False,
        pad_token_id=_VOCABULARY["<pad>"], eos_token_id=_VOCABULARY["<eos>"], bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model


def demonstrations(recipe: Recipe, step: int) -> list[tuple[str, str]]:
    """Prompts and responses of one update, all with the same number of assignments."""
    random = Random(f"pretrain/{recipe.seed}/{step}")
    reached = min(1.0, step / max(1.0, recipe.growth * recipe.steps))
    largest = 2 + int((recipe.num_variables - 2) * reached)
    # A third of the updates repeats smaller problems, which are cheap and keep the first lessons alive.
    size = largest if random.random() < 2 / 3 else random.randint(2, largest)
    rows = []
    for _ in range(recipe.batch_size):
        hard = random.random() < recipe.hard_share
        hops = min(recipe.hard_hops if hard else recipe.easy_hops, size - 1)
        task = Chain(num_variables=size, hops=(1, hops), max_addend=9 if hard else recipe.easy_addend,
                     seed=_STREAM + recipe.seed)  # fmt: skip
        sample = task.sample("train", random.getrandbits(62))
        detours = int(random.random() < recipe.detour_share)
        rows.append((str(sample.prompt), demonstration(sample, random, detours, mistaken_sums(recipe, random))))
    return rows


def mistaken_sums(recipe: Recipe, random: Random) -> Callable[[int, int], int]:
    """Addition as the corpus has it: each sum is wrong at a rate of its own, always by the same amount."""
    table = Random(f"pretrain/{recipe.seed}/mistakes")
    rates = {
        pair: (table.uniform(recipe.least_mistakes, recipe.most_mistakes), table.choice((-2, -1, 1, 2)))
        for pair in product(range(10), repeat=2)
    }

    def add(value: int, addend: int) -> int:
        rate, amount = rates[value, addend]
        return correct_sum(value, addend + amount * (random.random() < rate))

    return add


def encode(rows: list[tuple[str, str]]) -> tuple[Int64[Tensor, "batch tokens"], Int64[Tensor, "batch tokens"]]:
    """Tokens padded on the right, and targets: the token at each place of a response and its end, -100 elsewhere."""
    end = _VOCABULARY["<eos>"]
    prompts, responses = ([[_VOCABULARY[token] for token in re.findall(_PATTERN, text)] for text in side]
                          for side in zip(*rows, strict=True))  # fmt: skip
    tokens = [[*prompt, *response, end] for prompt, response in zip(prompts, responses, strict=True)]
    shape = (len(rows), max(map(len, tokens)))
    input_ids = torch.full(shape, _VOCABULARY["<pad>"])
    targets = torch.full(shape, -100)
    for row, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        targets[row, len(prompt) : len(ids)] = input_ids[row, len(prompt) : len(ids)]
    return input_ids, targets


def _train(model: Qwen3ForCausalLM, recipe: Recipe, progress: Callable[[int, float], None] | None) -> list[float]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    losses = []
    model.train()
    for step in range(recipe.steps):
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * fall * min(1.0, (step + 1) / (recipe.warmup_steps + 1))
        input_ids, targets = encode(demonstrations(recipe, step))
        # Padding stands on the right of causal attention, where no token that counts can see it: no mask needed.
        logits = model(input_ids=input_ids, use_cache=False).logits
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


def _free_folder(out: str | Path) -> Path:
    folder = Path(out).absolute()
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if taken:
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
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _require(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: must {rule}, got {value!r}; see Recipe for the default")
