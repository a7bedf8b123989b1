"""Compare a training step with the same step of TRL's GRPO, and measure what each credit rule adds to it.

    python -m benchmarks.speed.rl_trl [--quick] [--steps N] [--threads N] [--models small chain]

Both train the same LoRA adapter on the same model: the same number of prompts and responses, temperature 1, responses
of exactly the same length (the end token can never be drawn), one update a step, KL and critic off, dropout off,
float32, no gradient checkpointing, the same trivial reward. Where one update follows a rollout, as here, neither makes
a forward pass for the old policy alone. Sampling, padding and the computation of log-probabilities differ, as each
package has them. Each way is built once and makes its steps in turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import print_table, save
from rl.config import CreditConfig, LoraConfig, PPOConfig
from rl.credit.registry import rule_names
from rl.integrations.trl import flow_grpo_trainer
from rl.policy.loading import load_chain_model
from rl.records import CharSpan, Sample
from rl.training.trainer import PPOTrainer

Rows = list[dict[str, Any]]
Step = Callable[[], dict[str, float]]
RANK = 16
LEARNING_RATE = 1e-5
HIDDEN = ("seconds_quartiles", "credit_percent_quartiles", "tokens", "steps")
WARM_UP = 2
"""Steps of each way that are not timed."""


@dataclass(frozen=True)
class Size:
    """The sizes of model and batch, the same for both packages."""

    prompts: int = 8
    group: int = 4
    prompt_tokens: int = 64
    response_tokens: int = 128
    layers: int = 4
    width: int = 256
    vocabulary: int = 2048


@dataclass
class Letters:
    """Prompts of one length; the first characters of a response decide its reward, so that rewards differ."""

    prompts: list[str]
    name: str = "letters"

    @property
    def size(self) -> int:
        return len(self.prompts)

    def sample(self, split: str, index: int) -> Sample:
        return Sample(index, self.prompts[index % len(self.prompts)], "")

    def reward(self, sample: Sample, completion: str) -> float:
        return (sum(map(ord, completion[:8])) % 97) / 97

    def find_answer(self, completion: str) -> CharSpan | None:
        """Return the last tenth of the response, so that every rule that needs an answer has one."""
        start = max(len(completion) - max(len(completion) // 10, 1), 0)
        return (start, len(completion)) if completion[start:].strip() else None

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan] | None:
        """Return the first quarter: the cost of a rule does not depend on the place of the span."""
        return [(0, max(len(completion) // 4, 1))]


def small(size: Size) -> tuple[Any, PreTrainedTokenizerFast, Letters]:
    """Build a random Llama and a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>"])}
    words |= {f"w{index}": index for index in range(len(words), size.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 32,
            num_key_value_heads=size.width // 64,
            max_position_embeddings=2 * (size.prompt_tokens + size.response_tokens),
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    draw = torch.randint(3, size.vocabulary, (64, size.prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompts = [" ".join(f"w{number}" for number in row) for row in draw.tolist()]
    return model.eval(), tokenizer, Letters(prompts)


def chain(size: Size) -> tuple[Any, PreTrainedTokenizerFast, Letters]:
    """Load the base model that comes with the package: 0.6 million parameters, one token a character."""
    model, tokenizer = load_chain_model()
    draw = torch.randint(0, 10, (64, size.prompt_tokens // 4), generator=torch.Generator().manual_seed(0))
    prompts = ["".join(f"{'abcdefghij'[number]}={number};" for number in row) for row in draw.tolist()]
    return model, tokenizer, Letters(prompts)


MODELS = {"small": small, "chain": chain}


def never_end(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Move the end token outside the model's vocabulary: no response ends early, and the logits stay as they are."""
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def ours(size: Size, name: str, credit: str) -> Step:
    """Return a function that makes one step of this package and measures its wall time, logging included."""
    model, tokenizer, task = MODELS[name](size)
    never_end(model, tokenizer)
    config = PPOConfig(
        steps=1,
        num_prompts=size.prompts,
        group_size=size.group,
        max_prompt_tokens=size.prompt_tokens,
        max_response_tokens=size.response_tokens,
        advantage="group",
        learning_rate=LEARNING_RATE,
        save_every=0,
        micro_batch_size=size.prompts * size.group,
        credit=CreditConfig(rule=credit),
        lora=LoraConfig(rank=RANK, alpha=2.0 * RANK),
    )
    trainer = PPOTrainer(model, tokenizer, task=task, config=config, progress=False)

    def step() -> dict[str, float]:
        trainer.config = replace(config, steps=trainer.position.step + 1)
        began = time.perf_counter()
        row = trainer.train()[-1]
        seconds = time.perf_counter() - began
        parts = {part: row[f"{part}_seconds"] for part in ("generation", "update")}
        tokens = row["response_tokens"] * size.prompts * size.group
        return {"seconds": seconds, "tokens": tokens, "credit": row["credit_overhead_percent"], **parts}

    return step


def trl(size: Size, name: str, credit: str | None = None) -> Step:
    """Return a function that makes one step of TRL; the setup of each call to ``train`` is not counted."""
    import datasets
    from peft import LoraConfig as PeftLora
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, task = MODELS[name](size)
    never_end(model, tokenizer)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size.prompts * size.group,
        num_generations=size.group,
        max_completion_length=size.response_tokens,
        max_steps=1,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
    )

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [task.reward(task.sample("train", 0), text) for text in completions]

    class Watch(TrainerCallback):
        """Records time and metrics of the step, before the end of the run clears them."""

        began = seconds = length = added = 0.0

        def on_step_begin(self, *arguments: Any, **columns: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *arguments: Any, **columns: Any) -> None:
            self.seconds = time.perf_counter() - self.began
            metrics = trainer._metrics["train"]
            self.length = metrics["completions/mean_length"][-1]
            self.added = metrics["credit/seconds"][-1] if credit else 0.0

    watch = Watch()
    arguments: dict[str, Any] = {
        "model": model,
        "reward_funcs": reward,
        "args": settings,
        "processing_class": tokenizer,
        "callbacks": [watch],
        "train_dataset": datasets.Dataset.from_dict({"prompt": task.prompts}),
        "peft_config": PeftLora(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    }
    if credit is None:
        trainer: Any = GRPOTrainer(**arguments)
    else:
        trainer = flow_grpo_trainer()(**arguments, credit=credit, find_answer=task.find_answer)

    trainer.remove_callback(PrinterCallback)

    def step() -> dict[str, float]:
        trainer.train()
        tokens = watch.length * size.prompts * size.group
        return {"seconds": watch.seconds, "tokens": tokens, "credit": 100 * watch.added / (watch.seconds - watch.added)}

    return step


def turns(ways: dict[str, Step], steps: int) -> dict[str, list[dict[str, float]]]:
    """Make steps of every way in turns; leave out the first ones of each."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(WARM_UP + steps):
        for name, step in ways.items():
            found = step()
            if number >= WARM_UP:
                seen[name].append(found)
    return seen


def quartiles(values: list[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return 3 * values
    return statistics.quantiles(values, n=4, method="inclusive")


def table(model: str, seen: dict[str, list[dict[str, float]]], baseline: str) -> Rows:
    """Make a row for each way; ``ratio`` is the median of paired ratios to the baseline, turn by turn."""
    rows = []
    for name, steps in seen.items():
        low, median, high = quartiles([step["seconds"] for step in steps])
        credit = quartiles([step["credit"] for step in steps])
        pairs = [step["seconds"] / other["seconds"] for step, other in zip(steps, seen[baseline], strict=True)]
        rows.append(
            {
                "model": model,
                "way": name,
                "seconds": median,
                "seconds_quartiles": [round(low, 4), round(high, 4)],
                "tokens_per_second": steps[0]["tokens"] / median,
                "ratio": statistics.median(pairs),
                "credit_percent": credit[1],
                "credit_percent_quartiles": [round(credit[0], 2), round(credit[2], 2)],
                "tokens": steps[0]["tokens"],
                "steps": len(steps),
            }
        )
    return rows


def compare(model: str, size: Size, steps: int) -> Rows:
    """Both packages without credit and with it."""
    ways = {
        "TRL GRPO": trl(size, model),
        "ours, uniform": ours(size, model, "uniform"),
        "ours, flow": ours(size, model, "flow"),
        "TRL GRPO + flow": trl(size, model, "flow"),
    }
    return table(model, turns(ways, steps), "TRL GRPO")


def rules(model: str, size: Size, steps: int) -> Rows:
    """What every registered rule adds to a step of ours; ``ratio`` is to the uniform rule, paired by turn."""
    names = ["uniform", *(name for name in rule_names() if name != "uniform")]
    return table(model, turns({name: ours(size, model, name) for name in names}, steps), "uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a small size and two steps; writes no result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Both libraries warn of deprecated names in each other, between the lines of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    size = Size()
    steps = arguments.steps
    if arguments.quick:
        size = Size(prompts=2, group=2, prompt_tokens=16, response_tokens=16)
        steps = 2

    rows: Rows = []
    for model in arguments.models:
        model_size = size
        sections = {compare: steps}
        if model == "chain":
            # The context of the shipped model is short; it alone is small enough to time every rule.
            model_size = replace(size, response_tokens=min(size.response_tokens, 96))
            sections[rules] = max(2, steps // 2)
        for section, num_steps in sections.items():
            print(f"{model}, {section.__name__}: {section.__doc__}", flush=True)
            found = [{"section": section.__name__, **row} for row in section(model, model_size, num_steps)]
            print_table([{key: value for key, value in row.items() if key not in HIDDEN} for row in found])
            rows += found
    if not arguments.quick:
        versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "peft", "accelerate", "datasets"))
        save("rl_trl", rows, f"{(__doc__ or '').strip()}\n\n{versions}; {asdict(size)}", hide=HIDDEN)


if __name__ == "__main__":
    main()
