"""The PPO loop: collect, learn, finish; everything else is a room of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph import InvalidInputError, OutputError
from rl.algorithm.schedules import adapted_kl_weight, learning_rate_factor
from rl.config import CreditConfig, PPOConfig, flat_settings
from rl.credit.registry import find_rule
from rl.credit.scoring import score_rollout
from rl.errors import CheckpointError
from rl.policy.actor_critic import ActorCritic, TokenOutput, model_name
from rl.records import Experience, Responses
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.rollouts.rollout_file import load_rollout, save_rollout, token_texts
from rl.tasks.base import Task
from rl.tasks.registry import make_task
from rl.training.checkpoint import (
    Position,
    check_run,
    find_checkpoints,
    load_checkpoint,
    newest_state,
    reference_mark,
    write_checkpoint,
)
from rl.training.distributed import check_accelerator, gathered, make_accelerator, whiten_together
from rl.training.experience import build_experience
from rl.training.metrics import Averages, Clock, step_averages, step_row
from rl.training.tracking import Display, MetricsFile, check_trackers, read_metrics
from rl.training.update import Updater, learning_rates, make_optimizer, minibatch_order

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
        >>> sorted(set(history[0]) & {"reward", "kl_reference", "credit_overhead_percent"})
        ['credit_overhead_percent', 'reward']
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
        self.config = config = _with_credit(config or PPOConfig(), credit)
        find_rule(config.credit.rule)  # a wrong name ends here, before anything is loaded
        self.task, self.tokenizer = make_task(task), tokenizer
        self.output = None if output is None else Path(output)
        trackers = check_trackers(trackers)
        if accelerator is None:
            accelerator = make_accelerator(self.output, trackers)
        check_accelerator(accelerator, config.num_prompts)
        self.accelerator = accelerator
        self.model_name = model_name(model)
        self.policy = ActorCritic(model, config.lora, critic=config.has_critic, seed=config.seed)
        self.encoder = PromptEncoder(
            tokenizer, self.policy.causal_lm, config.max_prompt_tokens, config.max_response_tokens
        )
        self.policy.to(accelerator.device)
        self.policy.autocast = accelerator.autocast  # rollouts and scoring do not pass through the wrapper
        self.optimizer = make_optimizer(self.policy, config)
        wrapped, self.optimizer = accelerator.prepare(self.policy, self.optimizer)
        self.updater = Updater(wrapped, self.policy, self.optimizer, accelerator, config)
        self.position = Position(kl_weight=config.kl_weight)
        self.history: list[dict[str, Any]] = []
        self._buffer: Experience | None = None
        self._ratios: Tensor = torch.empty(0)
        self._scored: tuple[Responses, TokenOutput] | None = None
        self._reference = reference_mark(self.policy)
        if self.output is not None:
            self._open(resume, allow_changes)
        self._trackers = bool(trackers)
        if trackers:
            accelerator.init_trackers("flowgraph-rl", config=flat_settings(config.to_dict()))
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
            PolicyError: prompts of a finite task are too long; told before the first step.
        """
        self._check_prompts()
        with self._display:
            while self.position.step < self.config.steps:
                self.step()
        if self.config.save_every == 0 or self.position.step % self.config.save_every:
            self.save()
        if self._trackers:
            self.accelerator.end_training()
        return self.history

    def step(self) -> dict[str, Any]:
        """Collect, learn, log, and write what is due: for loops of your own.

        Returns:
            The step's row of metrics.
        """
        buffer = self._buffer = self.collect() if self._buffer is None else self._buffer
        self.learn(buffer)
        self._finish(buffer)
        self._buffer = None
        return self.history[-1]

    def collect(self) -> Experience:
        """The first half of a step: let the policy answer the next problems, and say what is to be learned from it."""
        config, step = self.config, self.position.step
        share = config.num_prompts // self.accelerator.num_processes
        first = step * config.num_prompts + self.accelerator.process_index * share
        clock = Clock()
        samples = draw_samples(self.task, "train", range(first, first + share))
        with self.policy.merged() if self._merges else nullcontext(), self.policy.autocast():
            generated = sample_responses(
                self.policy.causal_lm, self.encoder, samples, group_size=config.group_size,
                max_response_tokens=config.max_response_tokens, temperature=config.temperature, seed=config.seed,
                step=step, batch_size=config.generation_batch_size,
            )  # fmt: skip
        clock.stop("generation_seconds")
        each = [sample for sample in samples for _ in range(config.group_size)]
        responses = judge(self.task, self.tokenizer, each, generated)
        clock.stop("judging_seconds")
        scored = score_rollout(
            self.policy, responses, config.credit, temperature=config.temperature,
            micro_batch_size=config.micro_batch_size, seed=config.seed, step=step, reference=self._wants_reference,
            keep_graph=self._learns_in_one_pass,
        )  # fmt: skip
        experience = build_experience(
            responses,
            scored.scores,
            scored.credit,
            config,
            kl_weight=self.position.kl_weight,
            whitening=partial(whiten_together, accelerator=self.accelerator),
        )
        clock.stop("scoring_seconds")
        clock.seconds["credit_seconds"] = scored.credit_seconds
        self.position.averages = {"clock": clock.seconds}
        self._ratios = torch.ones_like(experience.advantages)
        self._scored = None if scored.output is None else (experience.responses, scored.output)
        return experience

    def learn(self, experience: Experience) -> None:
        """The second half of a step: its optimiser updates, from the one that is due on."""
        config, position = self.config, self.position
        factor = learning_rate_factor(config, position.step)
        for group, base in zip(self.optimizer.param_groups, learning_rates(config), strict=False):
            group["lr"] = base * factor
        averages = Averages(**position.averages.get("updates", {}))
        clock = Clock(position.averages.get("clock"))
        share = experience.responses.num_sequences
        first = self.accelerator.process_index * share
        updates = [rows for epoch in range(config.epochs) for rows in minibatch_order(config, position.step, epoch)]
        for number, rows in enumerate(updates):
            if number < position.updates:  # made before the run was stopped
                continue
            mine = sorted(row - first for row in rows.tolist() if first <= row < first + share)
            self.updater.update(
                experience, mine, kl_weight=position.kl_weight, averages=averages, ratios=self._ratios,
                output=self._output_of(experience.responses),
            )  # fmt: skip
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
            logged = gathered(Averages(**position.averages["updates"]), self.accelerator)
            position = replace(position, averages={**position.averages, "updates": asdict(logged)})

        def write_buffer(path: Path) -> None:
            assert buffer is not None
            save_rollout(path, buffer, self._tokens(buffer), {}, ratio=self._ratios)

        return write_checkpoint(
            self.output, position, self.policy, self.optimizer, self._run(), keep=self.config.keep_checkpoints,
            accelerator=self.accelerator, write_buffer=None if buffer is None else write_buffer,
        )  # fmt: skip

    def _check_prompts(self) -> None:
        """Look at all problems that are still to come; an endless task shows its own in its time."""
        if self.task.size is not None:
            first, last = (step * self.config.num_prompts for step in (self.position.step, self.config.steps))
            self.encoder.check(draw_samples(self.task, "train", range(first, min(last, first + self.task.size))))

    def _finish(self, experience: Experience) -> None:
        """Log the step, adapt beta, move on, and write what is due."""
        config, position = self.config, self.position
        updates = Averages(**position.averages.get("updates", {}))
        row = step_row(
            position.step + 1, gathered(step_averages(updates, experience), self.accelerator),
            position.averages["clock"], learning_rate=self.optimizer.param_groups[0]["lr"],
            kl_weight=position.kl_weight,
        )  # fmt: skip
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
            self.save()

    @property
    def _merges(self) -> bool:
        """Under autocast a merged weight would be rounded to 16 bits, and most of the update with it."""
        return self.config.merge_for_generation and self.accelerator.mixed_precision == "no"

    @property
    def _learns_in_one_pass(self) -> bool:
        """Where one update follows a rollout, the forward pass that scores it serves the update too.

        Not with several processes: their wrapper exchanges gradients only of passes that went through it.
        """
        return self.config.epochs * self.config.num_minibatches == 1 and self.accelerator.num_processes == 1

    def _output_of(self, responses: Responses) -> TokenOutput | None:
        """The pass that scored these responses, once; None where there is none or it was made of others."""
        scored, self._scored = self._scored, None
        return scored[1] if scored is not None and scored[0] is responses else None

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
            "task": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.task)),  # where an object lies says nothing of it
            "model": self.model_name,
            "reference": self._reference,
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
            share = self.config.num_prompts * self.config.group_size // self.accelerator.num_processes
            if experience.responses.num_sequences != share:
                raise CheckpointError(
                    f"resume: num_prompts * group_size must stay inside a step, got {share} responses a process where "
                    f"{path.name} holds {experience.responses.num_sequences}; change them after a whole step"
                )
            self._ratios = torch.ones_like(experience.advantages) if rollout.ratio is None else rollout.ratio
        metrics = self.output / "metrics.jsonl"
        if metrics.exists():
            self.history = [row for row in read_metrics(metrics) if row["step"] <= self.position.step]


def _with_credit(config: PPOConfig, credit: str | CreditConfig | None) -> PPOConfig:
    if credit is None:
        return config
    return replace(config, credit=replace(config.credit, rule=credit) if isinstance(credit, str) else credit)
