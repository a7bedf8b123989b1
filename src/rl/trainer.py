"""The PPO loop: collect, learn, finish; everything else is a room of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowgraph import InvalidInputError, OutputError
from rl.advantages import whiten
from rl.checkpoint import Position, check_run, find_checkpoints, load_checkpoint, newest_state, write_checkpoint
from rl.config import CreditConfig, PPOConfig
from rl.credit.registry import find_rule
from rl.errors import CheckpointError, ConfigError
from rl.experience import build_experience, zero_variance_share
from rl.policy import ActorCritic
from rl.records import Experience
from rl.rollout import PromptEncoder, judge, sample_responses
from rl.rolloutfile import load_rollout, save_rollout, token_texts
from rl.schedules import adapted_kl_weight, learning_rate_factor
from rl.scoring import score_rollout
from rl.tasks import make_task
from rl.tasks.base import Task
from rl.tracking import Display, MetricsFile, check_trackers, read_metrics
from rl.update import Averages, Updater, minibatch_order

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FREE = {"config.save_every", "config.save_every_updates", "config.keep_checkpoints", "config.report_every"}
"""Settings that change what is written, never what is learned."""


class PPOTrainer:
    """Train LoRA adapters of a causal LM on a task with verifiable rewards.

    Args:
        model: a Hugging Face causal LM, or a PEFT model whose LoRA adapter is trained on. Its layers are wrapped.
        tokenizer: of the model.
        task: a :class:`rl.tasks.Task`, the name of one, or a JSONL file.
        credit: a credit rule's name or settings; overrides ``config.credit``.
        config: see :class:`PPOConfig`.
        output: folder for metrics, checkpoints and rollouts; None: nothing is written.
        resume: go on from the newest whole checkpoint in ``output``, to the bit on the CPU; start where there is none.
        allow_changes: resume although settings differ from those of the checkpoint.
        trackers: any of ``"tensorboard"``, ``"wandb"``, ``"trackio"``.
        progress: whether a progress line is shown.
        accelerator: an ``accelerate.Accelerator`` of your own.

    Raises:
        ConfigError: settings that exclude each other, or do not divide among the processes.
        TaskError, CreditError, PolicyError: no such task or rule; a model that cannot be trained as asked.
        CheckpointError: ``output`` holds a run that is neither resumed nor compatible.

    Example:
        >>> from rl import PPOConfig, PPOTrainer, load_chain_model
        >>> model, tokenizer = load_chain_model()
        >>> settings = PPOConfig(steps=1, num_prompts=2, group_size=2, advantage="group", max_response_tokens=24)
        >>> history = PPOTrainer(model, tokenizer, task="chain", credit="flow", config=settings, progress=False).train()
        >>> sorted(history[0])[:3]
        ['answer_share', 'clip_share', 'credit_overhead_percent']
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: str | Task,
        credit: str | CreditConfig | None = None,
        config: PPOConfig | None = None,
        output: str | Path | None = None,
        resume: bool = False,
        allow_changes: bool = False,
        trackers: Sequence[str] = (),
        progress: bool = True,
        accelerator: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.config = config = _with_credit(config or PPOConfig(), credit)
        self.rule = find_rule(config.credit.rule)
        self.task, self.tokenizer = make_task(task), tokenizer
        self.output = None if output is None else Path(output)
        trackers = check_trackers(trackers)
        if accelerator is None:
            accelerator = Accelerator(log_with=trackers or None, project_dir=self.output)  # type: ignore[arg-type]
        self.accelerator = accelerator
        if config.num_prompts % accelerator.num_processes:
            raise ConfigError(
                f"num_prompts: must be a multiple of the {accelerator.num_processes} processes, got "
                f"{config.num_prompts}; problems are shared out whole"
            )
        self.model_name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        self.policy = ActorCritic(model, config.lora, critic=config.has_critic, seed=config.seed)
        self.encoder = PromptEncoder(
            tokenizer, self.policy.causal_lm, config.max_prompt_tokens, config.max_response_tokens
        )
        self.policy.to(accelerator.device)
        self.optimizer = _optimizer(self.policy, config)
        wrapped, self.optimizer = accelerator.prepare(self.policy, self.optimizer)
        self.updater = Updater(wrapped, self.policy, self.optimizer, accelerator, config)
        self.position = Position(kl_weight=config.kl_weight)
        self.history: list[dict[str, Any]] = []
        self._buffer: Experience | None = None
        self._ratios: Tensor = torch.empty(0)
        if self.output is not None:
            self._open(resume, allow_changes)
        self._trackers = bool(trackers)
        if trackers:
            accelerator.init_trackers("flowgraph-rl", config=_flat(config.to_dict()))
        main = accelerator.is_main_process
        self._display = Display(config.steps, self.position.step, enabled=progress and main)
        write = self.output is not None and main
        self._metrics = (
            MetricsFile(self.output / "metrics.jsonl", self.position.step) if write and self.output else None
        )

    def train(self) -> list[dict[str, Any]]:
        """Run to the last step.

        Returns:
            One row of metrics for each step, those from before a resume included.

        Raises:
            RewardError, CreditError: the task or the rule failed; checkpoints from before stay.
            DivergedError: a gradient is not finite.
            OutputError: the disk is full.
        """
        with self._display:
            while self.position.step < self.config.steps:
                if self._buffer is None:
                    self._buffer = self.collect()
                self.learn(self._buffer)
                self._finish(self._buffer)
                self._buffer = None
        if self.config.save_every == 0 or self.position.step % self.config.save_every:
            self.save()
        if self._trackers:
            self.accelerator.end_training()
        return self.history

    def collect(self) -> Experience:
        """Let the policy answer the next problems, and turn its answers into what an update learns from."""
        config, step = self.config, self.position.step
        share = config.num_prompts // self.accelerator.num_processes
        first = step * config.num_prompts + self.accelerator.process_index * share
        clock = _Clock()
        samples = [self.task.sample("train", number) for number in range(first, first + share)]
        with self.policy.merged() if config.merge_for_generation else nullcontext():
            generated = sample_responses(
                self.policy.causal_lm, self.encoder, samples, group_size=config.group_size,
                max_response_tokens=config.max_response_tokens, temperature=config.temperature, seed=config.seed,
                step=step,
            )  # fmt: skip
        clock.stop("generation_seconds")
        each = [sample for sample in samples for _ in range(config.group_size)]
        responses = judge(self.task, self.tokenizer, each, generated)
        clock.stop("judging_seconds")
        scored = score_rollout(
            self.policy, responses, config.credit, temperature=config.temperature,
            micro_batch_size=config.micro_batch_size, seed=config.seed, step=step, reference=self._wants_reference,
        )  # fmt: skip
        experience = build_experience(
            responses, scored.scores, scored.credit, config, kl_weight=self.position.kl_weight, whitening=self._whiten
        )
        clock.stop("scoring_seconds")
        clock.seconds["credit_seconds"] = scored.credit_seconds
        self.position.averages = {"clock": clock.seconds}
        self._ratios = torch.ones_like(experience.advantages)
        return experience

    def learn(self, experience: Experience) -> None:
        """All optimiser updates of a step, from the one that is due on."""
        config, position = self.config, self.position
        factor = learning_rate_factor(config, position.step)
        for group, base in zip(self.optimizer.param_groups, _learning_rates(config), strict=False):
            group["lr"] = base * factor
        averages = Averages(**position.averages.get("updates", {}))
        clock = _Clock(position.averages.get("clock"))
        share = experience.responses.num_sequences
        first = self.accelerator.process_index * share
        updates = [rows for epoch in range(config.epochs) for rows in minibatch_order(config, position.step, epoch)]
        for number, rows in enumerate(updates):
            if number < position.updates:  # made before the run was stopped
                continue
            mine = [row - first for row in rows.tolist() if first <= row < first + share]
            self.updater.update(experience, mine, kl_weight=position.kl_weight, averages=averages, ratios=self._ratios)
            clock.stop("update_seconds")
            position.updates = number + 1
            position.averages = {"clock": clock.seconds, "updates": {"sums": averages.sums, "counts": averages.counts}}
            due = config.save_every_updates
            if due and position.updates % due == 0 and position.updates < len(updates):
                self.save()
                clock.restart()

    def save(self) -> Path | None:
        """Write a checkpoint of this very moment; None without an output folder."""
        if self.output is None:
            return None
        buffer = self._buffer if self.position.updates else None
        position = self.position
        if buffer is not None:  # every process has logged its own sequences; the checkpoint has room for one record
            logged, _ = self._gathered(Averages(**position.averages["updates"]), 0)
            position = replace(position, averages={**position.averages, "updates": asdict(logged)})

        def write_buffer(path: Path) -> None:
            assert buffer is not None
            save_rollout(path, buffer, self._tokens(buffer), {}, ratio=self._ratios)

        return write_checkpoint(
            self.output, position, self.policy, self.optimizer, self._run(), keep=self.config.keep_checkpoints,
            accelerator=self.accelerator, write_buffer=None if buffer is None else write_buffer,
        )  # fmt: skip

    def _finish(self, experience: Experience) -> None:
        """Log the step, adapt beta, move on, and write what is due."""
        config, position = self.config, self.position
        row = self._row(experience)
        if config.kl_target is not None and row.get("kl_reference") is not None:
            position.kl_weight = adapted_kl_weight(
                position.kl_weight, row["kl_reference"], config.kl_target, config.num_prompts * config.group_size
            )
        position.step, position.updates, position.averages = position.step + 1, 0, {}
        self.history.append(row)
        if self._metrics is not None:
            self._metrics.write(row)
        if self._trackers:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=position.step)
        self._display.show(row)
        if self._metrics is not None and config.report_every and position.step % config.report_every == 0:
            self._write_rollout(experience)
        if config.save_every and position.step % config.save_every == 0:
            self._buffer = None
            self.save()

    def _row(self, experience: Experience) -> dict[str, Any]:
        """What is logged of a step, over all processes."""
        averages = Averages(**self.position.averages.get("updates", {}))
        seconds = self.position.averages["clock"]
        responses, scores, credit = experience.responses, experience.scores, experience.credit
        mask, count = responses.response_mask, responses.num_sequences
        tokens, scored = int(mask.sum()), int(credit.scored.sum())
        averages.add("reward", responses.rewards.sum(), count)
        averages.add("response_tokens", tokens, count)
        averages.add("truncated_share", responses.truncated.sum(), count)
        averages.add("answer_share", responses.answer.any(1).sum(), count)
        averages.add("zero_variance_share", zero_variance_share(responses), 1)
        averages.add("entropy_old", scores.entropy.sum(), tokens)
        averages.add("weight_mean", experience.policy_weights.masked_fill(~mask, 0.0).sum(), tokens)
        averages.add("raised_share", (credit.scored & (credit.weights > 1)).sum(), scored)
        averages.add("advantage", (experience.advantages * mask).sum(), tokens)
        if scores.ref_logprobs is not None:
            averages.add("kl_reference", (scores.logprobs - scores.ref_logprobs).sum(), count)
        if scores.values is not None:
            averages.add("value", scores.values.sum(), tokens)
        averages, total_tokens = self._gathered(averages, tokens)
        whole = sum(value for name, value in seconds.items() if name != "credit_seconds")
        return {
            "step": self.position.step + 1,
            **averages.means(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "kl_weight": self.position.kl_weight,
            "seconds": whole,
            **seconds,
            "tokens_per_second": total_tokens / whole,
            "credit_overhead_percent": 100 * seconds["credit_seconds"] / (whole - seconds["credit_seconds"]),
        }

    def _gathered(self, averages: Averages, tokens: int) -> tuple[Averages, int]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return averages, tokens
        from accelerate.utils import gather_object

        total, count = Averages(), 0
        for sums, counts, number in gather_object([(averages.sums, averages.counts, tokens)]):
            count += number
            for name in sums:
                total.add(name, sums[name], counts[name])
        return total, count

    def _whiten(self, advantages: Float[Tensor, "batch response"], mask: Tensor) -> Float[Tensor, "batch response"]:
        """Whitened over the batch of all processes."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return whiten(advantages, mask)
        count, width = advantages.shape
        gathered = [
            accelerator.gather(accelerator.pad_across_processes(tensor.to(accelerator.device), dim=1)).cpu()
            for tensor in (advantages, mask.long())
        ]
        first = accelerator.process_index * count
        return whiten(gathered[0], gathered[1].bool())[first : first + count, :width]

    @property
    def _wants_reference(self) -> bool:
        return self.config.kl_weight > 0

    def _tokens(self, experience: Experience) -> list[list[str]]:
        responses = experience.responses
        return token_texts(self.tokenizer, responses.input_ids[:, responses.prompt_length :])

    def _write_rollout(self, experience: Experience) -> None:
        """A file for ``flowgraph-rl report``: the first problems of the step."""
        assert self.output is not None
        shown = list(range(min(8 * self.config.group_size, experience.responses.num_sequences)))
        part = experience.select(shown)
        folder = self.output / "rollouts"
        folder.mkdir(exist_ok=True)
        info = {"step": self.position.step, "model": self.model_name, "task": self.task.name, **self._run()["config"]}
        save_rollout(
            folder / f"step-{self.position.step:06d}.safetensors", part, self._tokens(part), info,
            ratio=self._ratios[shown],
        )  # fmt: skip

    def _run(self) -> dict[str, Any]:
        """What a resumed run must share."""
        config = self.config.to_dict()
        if self.config.lr_schedule == "constant":
            config.pop("steps")  # a longer run has the same beginning
        return {
            "config": config,
            "task": repr(self.task),
            "model": self.model_name,
            "processes": self.accelerator.num_processes,
        }

    def _open(self, resume: bool, allow_changes: bool) -> None:
        """Take a new folder, or go on where the newest whole checkpoint of the folder stands."""
        assert self.output is not None
        if self.output.exists() and not self.output.is_dir():
            raise InvalidInputError(f"output: must be a folder, got the file {self.output}; choose another place")
        if find_checkpoints(self.output) and not resume:
            raise CheckpointError(
                f"output: must be a new folder, got {self.output}, which holds checkpoints; pass resume=True "
                "(--resume) to go on with that run, or choose another folder"
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"output: must be a folder that can be made, got {self.output}: {error.strerror}; choose another place"
            ) from error
        found = newest_state(self.output) if resume else None
        if found is None:
            return
        path, state = found
        if not allow_changes:
            check_run(state, self._run(), _FREE)
        self.position = load_checkpoint(path, state, self.policy, self.optimizer)
        if not self.accelerator.is_main_process:
            self.position.averages.pop("updates", None)  # the first process goes on with the sums of all
        if self.position.updates:
            rollout = load_rollout(path / f"rollout-{self.accelerator.process_index}.safetensors")
            self._buffer = experience = rollout.experience
            self._ratios = torch.ones_like(experience.advantages) if rollout.ratio is None else rollout.ratio
        metrics = self.output / "metrics.jsonl"
        if metrics.exists():
            self.history = [row for row in read_metrics(metrics) if row["step"] <= self.position.step]


class _Clock:
    """Seconds by purpose, from one stop to the next."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._since = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def restart(self) -> None:
        self._since = time.perf_counter()


def _with_credit(config: PPOConfig, credit: str | CreditConfig | None) -> PPOConfig:
    if credit is None:
        return config
    return replace(config, credit=replace(config.credit, rule=credit) if isinstance(credit, str) else credit)


def _learning_rates(config: PPOConfig) -> tuple[float, float]:
    value = config.value_learning_rate
    return config.learning_rate, config.learning_rate if value is None else value


def _optimizer(policy: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": list(parameters.values()), "lr": rate}
        for parameters, rate in zip(
            (policy.policy_parameters(), policy.value_parameters()), _learning_rates(config), strict=True
        )
        if parameters
    ]
    return torch.optim.Adam(groups, eps=1e-5)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as flat names and plain values, which is what trackers take."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
