"""The PPO loop: collect a rollout, learn from it, log it, save; the parts are modules of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgraph import FlowgraphError, InvalidInputError, OutputError
from rl.algorithm.schedules import adapted_kl_weight, check_schedule, depends_on_length, learning_rate_factor
from rl.config import CreditConfig, PPOConfig, flat_settings
from rl.credit.ratings import check_credit
from rl.credit.scoring import score_rollout
from rl.errors import CheckpointError
from rl.evaluation.evaluate import Evaluation, evaluate
from rl.policy.actor_critic import ActorCritic, TokenOutput, model_name
from rl.policy.loading import quantization_of
from rl.records import Experience, Responses
from rl.rollouts.chat_templates import with_template_options
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.rollouts.rollout_file import load_rollout, save_rollout, token_texts
from rl.tasks.base import Task
from rl.tasks.registry import make_task
from rl.training.advice import FIRST_STEPS, learning_warning
from rl.training.checkpoint import (
    BEST,
    Position,
    check_run,
    find_checkpoints,
    load_checkpoint,
    newest_state,
    reference_mark,
    write_checkpoint,
)
from rl.training.distributed import (
    check_accelerator,
    check_base,
    gathered,
    make_accelerator,
    mean_together,
    of_main_process,
    whiten_together,
)
from rl.training.experience import build_experience
from rl.training.interruption import StopRequest
from rl.training.metrics import Averages, Clock, step_averages, step_row
from rl.training.random_state import python_random, random_tensors, restore_random
from rl.training.tracking import Display, MetricsFile, check_trackers, read_metrics, set_aside
from rl.training.update import Updater, learning_rates, make_optimizer, minibatch_order

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FREE = {
    "config.save_every",
    "config.save_every_updates",
    "config.keep_checkpoints",
    "config.report_every",
    "config.patience",
}
"""Settings that a resumed run may change: they decide what is written and when to stop, not what is learned."""
_REPORTED_PROBLEMS = 8
"""Problems of a step that the rollout file for a report holds."""


class PPOTrainer:
    """The PPO training of LoRA adapters of a causal LM on a task with verifiable rewards.

    Args:
        model: a Hugging Face causal LM, or a PEFT model whose LoRA adapter is trained on. Its layers are wrapped.
        tokenizer: of the model.
        task: a :class:`rl.tasks.Task`, the name of one, or a JSONL file.
        credit: a credit rule's name or settings; overrides ``config.credit``.
        config: see :class:`PPOConfig`.
        output: folder for metrics, checkpoints and rollouts; None: nothing is written.
        resume: continue from the newest complete checkpoint in ``output``, bit-identical on the CPU; where there is
            none, say so and start, with the metrics of the earlier run set aside.
        allow_changes: resume although settings differ from those of the checkpoint.
        trackers: any of ``"tensorboard"``, ``"wandb"``, ``"trackio"``.
        progress: whether a progress line is shown.
        accelerator: an ``accelerate.Accelerator`` of your own.

    Attributes:
        config: of the run, with its credit settings.
        task: the problems and their rewards.
        tokenizer: of the model.
        output: folder of the run, or None.
        accelerator: of the run.
        model_name: name of the base model.
        policy: policy and critic on the frozen base.
        encoder: of the prompts.
        optimizer: over the trained weights.
        updater: makes the optimiser steps.
        position: progress of the run.
        history: rows of metrics so far.

    Raises:
        ConfigError: settings that exclude each other, or do not divide among the processes.
        TaskError, CreditError, PolicyError: no such task or rule; a model that cannot be trained this way.
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
        # Everything that can be checked without the model is checked first.
        config = _with_credit(config or PPOConfig(), credit)
        check_credit(config.credit)
        check_schedule(config)
        self.config = config
        self.task = make_task(task)
        self.tokenizer = with_template_options(tokenizer, config.chat_template_kwargs)
        self.output = None if output is None else Path(output)
        trackers = check_trackers(trackers)
        if accelerator is None:
            accelerator = make_accelerator(self.output, trackers)
        check_accelerator(accelerator, config.num_prompts)
        check_base(model)
        self.accelerator = accelerator

        # Policy, critic and optimiser.
        self.model_name = model_name(model)
        self.policy = ActorCritic(
            model,
            config.lora,
            critic=config.has_critic,
            seed=config.seed,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.encoder = PromptEncoder(
            self.tokenizer,
            self.policy.causal_lm,
            config.max_prompt_tokens,
            config.max_response_tokens,
            config.stop_strings,
        )
        self.policy.to(accelerator.device)
        # Rollouts and scoring do not pass through the wrapper that applies autocast.
        self.policy.autocast = accelerator.autocast
        self.optimizer = make_optimizer(self.policy, config)
        wrapped, self.optimizer = accelerator.prepare(self.policy, self.optimizer)
        self.updater = Updater(wrapped, self.policy, self.optimizer, accelerator, config)

        # The state of the run: a new one, or that of a checkpoint.
        self.position = Position(kl_weight=config.kl_weight)
        self.history: list[dict[str, Any]] = []
        self._buffer: Experience | None = None
        self._ratios: Tensor = torch.empty(0, dtype=torch.float32)
        self._scored: tuple[Responses, TokenOutput] | None = None
        self._reference = reference_mark(self.policy)
        if self.output is not None:
            self._open(self.output, resume, allow_changes)

        # Logging; only the first process shows and writes.
        self._trackers = bool(trackers)
        if trackers:
            accelerator.init_trackers("flowgraph-rl", config=flat_settings(config.to_dict()))
        is_main = accelerator.is_main_process
        self._display = Display(config.steps, self.position.step, enabled=progress and is_main)
        self._metrics: MetricsFile | None = None
        if self.output is not None and is_main:
            self._metrics = self._open_metrics(self.output, resume=resume, allow_changes=allow_changes)

    def train(self) -> list[dict[str, Any]]:
        """Run to the last step.

        With an output folder, Ctrl-C, SIGTERM and SIGHUP end the run after the running step, with a checkpoint: the
        signal then has its usual effect (``KeyboardInterrupt``, or the end of the process). A second one more than 2
        seconds later acts at once.

        Returns:
            One row of metrics for each step, those from before a resume included.

        Raises:
            RewardError, CreditError: the task or the rule failed; with one process the finished steps are saved.
            DivergedError: a gradient is not finite.
            OutputError: the disk is full.
            PolicyError: prompts of a finite task are too long; raised before the first step.
        """
        self._check_prompts()
        stop = StopRequest(enabled=self.output is not None, notify=self._display.notice_signal)
        with self._display, stop:
            # All processes ask at the same place, so all stop after the same step.
            while self.position.step < self.config.steps and not self.is_out_of_patience:
                if stop.agreed(self.accelerator):
                    break
                self.step()
            self._announce_early_stop()

            # The last step is saved, for any reason of the end.
            if not self._step_is_saved:
                self.save()
            if stop.received:
                self._display.message(f"stopped after step {self.position.step} with a complete {self.position.name}")
        if self._trackers:
            self.accelerator.end_training()
        # The signal has its usual effect now that everything is written.
        stop.deliver()
        return self.history

    def step(self) -> dict[str, Any]:
        """Collect, learn, log, and write the files that are due: for loops of your own.

        Returns:
            The step's row of metrics.
        """
        # A run that resumes inside a step has its rollout already.
        if self._buffer is None:
            self._buffer = self._collect_or_save()
        experience = self._buffer
        self.learn(experience)
        self._finish(experience)
        self._buffer = None
        return self.history[-1]

    def collect(self) -> Experience:
        """Make the first half of a step: respond to the next problems, score the responses, compute advantages.

        Returns:
            The experience of this process, detached, on the CPU.
        """
        config = self.config
        step = self.position.step
        clock = Clock()

        # Problems are numbered over all steps and processes; this process takes a contiguous range of them.
        share = config.num_prompts // self.accelerator.num_processes
        first = step * config.num_prompts + self.accelerator.process_index * share
        samples = draw_samples(self.task, "train", range(first, first + share))

        # Responses, and their rewards. The responses of a problem follow one another.
        with self._generation_weights(), self.policy.autocast():
            generated = sample_responses(
                self.policy.causal_lm,
                self.encoder,
                samples,
                group_size=config.group_size,
                max_response_tokens=config.max_response_tokens,
                temperature=config.temperature,
                seed=config.seed,
                step=step,
                batch_size=config.generation_batch_size,
            )
        clock.stop("generation_seconds")
        sample_of_response = [sample for sample in samples for _ in range(config.group_size)]
        responses = judge(self.task, self.tokenizer, sample_of_response, generated)
        clock.stop("judging_seconds")

        # Log-probabilities, values and credit under the policy that wrote the responses; then the advantages.
        scored = score_rollout(
            self.policy,
            responses,
            config.credit,
            temperature=config.temperature,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            step=step,
            reference=config.kl_weight > 0,
            keep_graph=self._learns_in_one_pass,
            mean_over_batch=partial(mean_together, accelerator=self.accelerator),
        )
        experience = build_experience(
            responses,
            scored.scores,
            scored.credit,
            config,
            kl_weight=self.position.kl_weight,
            whitening=partial(whiten_together, accelerator=self.accelerator),
            progress=step / config.steps,
        )
        clock.stop("scoring_seconds")
        clock.seconds["credit_seconds"] = scored.credit_seconds

        # What the second half of the step reads: the seconds so far, the ratios, and the graph of the pass.
        self.position.averages = {"clock": clock.seconds}
        self._ratios = torch.ones_like(experience.advantages)
        self._scored = None
        if scored.output is not None:
            self._scored = (experience.responses, scored.output)
        return experience

    def learn(self, experience: Experience) -> None:
        """Make the second half of a step: its optimiser updates that are not made yet.

        Args:
            experience: of :meth:`collect`.
        """
        # The schedule sets the learning rates for the complete step.
        config = self.config
        position = self.position
        factor = learning_rate_factor(config, position.step, position.rewards)
        for group, base_rate in zip(self.optimizer.param_groups, learning_rates(config), strict=False):
            group["lr"] = base_rate * factor

        # Metrics continue from those of the updates before a resume.
        averages = Averages(**position.averages.get("updates", {}))
        clock = Clock(position.averages.get("clock"))

        # Sequences are numbered over all processes; this one has ``share`` of them from ``first`` on.
        share = experience.responses.num_sequences
        first = self.accelerator.process_index * share
        minibatches: list[Tensor] = []
        for epoch in range(config.epochs):
            minibatches.extend(minibatch_order(config, position.step, epoch))

        for number, sequences in enumerate(minibatches):
            # These updates were made before the run was stopped.
            if number < position.updates:
                continue
            own_rows = []
            for index in sequences.tolist():
                if first <= index < first + share:
                    own_rows.append(index - first)
            self.updater.update(
                experience,
                sorted(own_rows),
                kl_weight=position.kl_weight,
                averages=averages,
                ratios=self._ratios,
                output=self._take_output(experience.responses),
            )
            clock.stop("update_seconds")
            position.updates = number + 1
            position.averages = {"clock": clock.seconds, "updates": asdict(averages)}

            # After the last update of a step the step itself is saved, where it is due.
            interval = config.save_every_updates
            is_due = interval is not None and position.updates % interval == 0
            if is_due and position.updates < len(minibatches):
                self.save()
                clock.restart()

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last ``patience`` evaluations brought no new best reward."""
        patience = self.config.patience
        return patience is not None and self.position.evaluations_since_best >= patience

    def evaluate(self) -> Evaluation:
        """Measure the present policy on the held-out problems that the settings name.

        The global random generators, from which reward functions may draw, are as before afterwards.

        Returns:
            The evaluation of the first process, in every process.

        Cost: every process responds to all of the problems.
        """
        config = self.config
        tensors = random_tensors()
        python_state = python_random()
        with self._generation_weights(), self.policy.autocast():
            found = evaluate(
                self.policy.causal_lm,
                self.tokenizer,
                self.task,
                num_problems=config.evaluation_problems,
                samples=config.evaluation_samples,
                temperature=config.evaluation_temperature,
                max_prompt_tokens=config.max_prompt_tokens,
                max_response_tokens=config.max_response_tokens,
                batch_size=config.generation_batch_size or config.num_prompts * config.group_size,
                seed=config.seed,
                stop_strings=config.stop_strings,
            )
        restore_random(tensors, python_state)
        return of_main_process(found, self.accelerator)

    def save(self, *, name: str | None = None) -> Path | None:
        """Write a checkpoint of the present state; None without an output folder.

        Args:
            name: of its folder; None: that of the position.

        Raises:
            OutputError: the disk is full.
        """
        if self.output is None:
            return None

        # Inside a step the rollout belongs to the state, and so do the metrics of its updates.
        position = self.position
        write_buffer = None
        if self._buffer is not None and position.updates:
            write_buffer = partial(self._write_buffer, self._buffer)
            # Every process has metrics of its own sequences, and the checkpoint holds one record: their sum.
            total = gathered(Averages(**position.averages["updates"]), self.accelerator)
            position = replace(position, averages={**position.averages, "updates": asdict(total)})

        return write_checkpoint(
            self.output,
            position,
            self.policy,
            self.optimizer,
            self._run(),
            keep=self.config.keep_checkpoints,
            accelerator=self.accelerator,
            write_buffer=write_buffer,
            name=name,
        )

    @property
    def _step_is_saved(self) -> bool:
        """Whether the last finished step has a checkpoint because ``save_every`` divides it."""
        return self.config.save_every != 0 and self.position.step % self.config.save_every == 0

    def _collect_or_save(self) -> Experience:
        """Collect; where that fails, save the finished steps first, because a reward may fail late in a long run."""
        try:
            return self.collect()
        except (FlowgraphError, torch.OutOfMemoryError):
            # Nothing has changed since the last step. Other processes would not take part in the checkpoint.
            is_alone = self.accelerator.num_processes == 1
            if is_alone and self.position.step > 0 and not self._step_is_saved:
                self.save()
            raise

    def _check_prompts(self) -> None:
        """Check the prompts of all remaining problems of a finite task; those of others are checked when drawn."""
        config = self.config
        if config.evaluate_every:
            held_out = draw_samples(self.task, "eval", range(config.evaluation_problems))
            self.encoder.check(held_out)
        if self.task.size is None:
            return
        # A finite task repeats its problems after one round.
        first = self.position.step * config.num_prompts
        end_of_run = config.steps * config.num_prompts
        end_of_round = first + self.task.size
        remaining = range(first, min(end_of_run, end_of_round))
        self.encoder.check(draw_samples(self.task, "train", remaining))

    def _finish(self, experience: Experience) -> None:
        """Log the step, adapt beta, advance the position, and write the files that are due."""
        # The row of the log, under the beta that the step was made with.
        config = self.config
        position = self.position
        updates = Averages(**position.averages.get("updates", {}))
        own_averages = step_averages(updates, experience, config, kl_weight=position.kl_weight)
        averages = gathered(own_averages, self.accelerator)
        row = step_row(
            position.step + 1,
            averages,
            position.averages["clock"],
            learning_rate=self.optimizer.param_groups[0]["lr"],
            kl_weight=position.kl_weight,
        )

        # From here on the position is that of the next step. The KL is a mean over all processes, so all adapt alike.
        kl = row.get("kl_reference")
        if config.kl_target is not None and kl is not None:
            num_responses = config.num_prompts * config.group_size
            position.kl_weight = adapted_kl_weight(position.kl_weight, kl, config.kl_target, num_responses)
        position.step += 1
        position.updates = 0
        position.averages = {}
        if config.evaluate_every == 0:
            position.rewards.append(row["reward"])
        elif position.step % config.evaluate_every == 0:
            row |= self._evaluated()

        # The log: the metrics file, the trackers, the display.
        self.history.append(row)
        is_main = self.accelerator.is_main_process
        if self._metrics is not None:
            self._metrics.write(row)
        if self._trackers:
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=position.step)
        self._display.show(row)
        if position.step == min(FIRST_STEPS, config.steps):
            warning = learning_warning(self.history, config)
            if warning is not None and is_main:
                self._display.warn(warning)

        # The files that are due. The checkpoint comes last, so that it covers a step whose other files are complete.
        report_is_due = config.report_every and position.step % config.report_every == 0
        if report_is_due and self.output is not None and is_main:
            self._write_rollout(self.output, experience)
        if config.save_every and position.step % config.save_every == 0:
            self.save()

    def _evaluated(self) -> dict[str, Any]:
        """Evaluate the policy, keep it where it is the best so far, and return the figures for the log."""
        position = self.position
        clock = Clock()
        found = self.evaluate()
        clock.stop("evaluation_seconds")

        # A schedule that reacts to rewards, and the patience, read the evaluations.
        position.rewards.append(found.reward)
        is_best = position.best_reward is None or found.reward > position.best_reward
        if is_best:
            position.best_reward = found.reward
            position.best_step = position.step
            position.evaluations_since_best = 0
            self.save(name=BEST)
        else:
            position.evaluations_since_best += 1
        return {
            "eval_reward": found.reward,
            "eval_low": found.low,
            "eval_high": found.high,
            "eval_answer_share": found.answer_share,
            "eval_truncated_share": found.truncated_share,
            "eval_response_tokens": found.response_tokens,
            "eval_best_reward": position.best_reward,
            "eval_best_step": position.best_step,
            **clock.seconds,
        }

    def _announce_early_stop(self) -> None:
        """Show why a run ended before its last step."""
        position = self.position
        if self.is_out_of_patience and position.step < self.config.steps:
            self._display.message(
                f"stopped after step {position.step}: {position.evaluations_since_best} evaluations in a row without "
                f"a reward above {position.best_reward:.3f}, that of step {position.best_step}"
            )

    def _generation_weights(self) -> AbstractContextManager[None]:
        """Merge the adapter into the base for generation, where that keeps the policy the same."""
        if self._merges:
            return self.policy.merged()
        return nullcontext()

    @property
    def _merges(self) -> bool:
        """Whether the adapter is merged for generation.

        Under autocast a merged weight would be rounded to 16 bits, which loses most of the update.
        """
        return self.config.merge_for_generation and self.accelerator.mixed_precision == "no"

    @property
    def _learns_in_one_pass(self) -> bool:
        """Whether the forward pass that scores a rollout serves its only update too.

        Not with several processes: their wrapper exchanges gradients only of passes that went through it.
        """
        num_updates = self.config.epochs * self.config.num_minibatches
        return num_updates == 1 and self.accelerator.num_processes == 1

    def _take_output(self, responses: Responses) -> TokenOutput | None:
        """Return the pass that scored these responses and release it; None without a pass, or with one of others."""
        scored = self._scored
        self._scored = None
        if scored is None:
            return None
        scored_responses, output = scored
        return output if scored_responses is responses else None

    def _tokens(self, experience: Experience) -> list[list[str]]:
        """Read the text of every response token."""
        responses = experience.responses
        return token_texts(self.tokenizer, responses.input_ids[:, responses.prompt_length :])

    def _write_buffer(self, experience: Experience, path: Path) -> None:
        """Write the rollout buffer of this process into a checkpoint."""
        save_rollout(path, experience, self._tokens(experience), {}, ratio=self._ratios)

    def _write_rollout(self, output: Path, experience: Experience) -> None:
        """Write the first problems of the step to a file for ``flowgraph-rl report``."""
        most_shown = _REPORTED_PROBLEMS * self.config.group_size
        num_shown = min(most_shown, experience.responses.num_sequences)
        shown = list(range(num_shown))
        part = experience.select(shown)

        step = self.position.step
        info = {
            "step": step,
            "model": self.model_name,
            "task": self.task.name,
            **self._run()["config"],
        }
        folder = output / "rollouts"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.safetensors"
        save_rollout(path, part, self._tokens(part), info, ratio=self._ratios[shown])

    def _run(self) -> dict[str, Any]:
        """Collect the settings that a resumed run must share."""
        config = self.config.to_dict()
        # Under a rate that does not depend on the number of steps, a longer run has the same beginning.
        if not depends_on_length(self.config):
            config.pop("steps")
        # The address of an object in the text of a task differs from run to run.
        task = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.task))
        run = {
            "config": config,
            "task": task,
            "model": self.model_name,
            "reference": self._reference,
            "processes": self.accelerator.num_processes,
        }
        quantization = quantization_of(self.policy.causal_lm)
        if quantization is not None:
            run["quantization"] = quantization
        return run

    def _open(self, output: Path, resume: bool, allow_changes: bool) -> None:
        """Make a new folder, or continue from the newest complete checkpoint of an existing one."""
        # A folder that holds checkpoints is continued on request, and never overwritten.
        if output.exists() and not output.is_dir():
            raise InvalidInputError(f"output: must be a folder, got the file {output}; choose another place")
        if find_checkpoints(output) and not resume:
            raise CheckpointError(
                f"output: must be a new folder, got {output}, which holds checkpoints; pass resume=True "
                "(--resume) to go on with that run, or choose another folder"
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"output: must be a folder that can be made, got {output}: {error.strerror}; choose another place"
            ) from error

        # Without a checkpoint the run starts at its first step.
        found = newest_state(output) if resume else None
        if found is None:
            return
        path, state = found
        if not allow_changes:
            check_run(state, self._run(), _FREE)
        self.position = load_checkpoint(path, state, self.policy, self.optimizer)
        # The checkpoint holds the sum of the metrics of all processes, so only one process may continue it.
        if not self.accelerator.is_main_process:
            self.position.averages.pop("updates", None)
        if self.position.updates:
            self._restore_buffer(path)
        metrics = output / "metrics.jsonl"
        if metrics.exists():
            self.history = [row for row in read_metrics(metrics) if row["step"] <= self.position.step]

    def _open_metrics(self, output: Path, *, resume: bool, allow_changes: bool) -> MetricsFile:
        """Open the metrics file; rows that this run does not make again as they were are set aside."""
        # A resume under the same settings makes the rows again as they were, so nothing would be lost.
        path = output / "metrics.jsonl"
        is_new = not find_checkpoints(output)
        copy = None
        if is_new or allow_changes:
            copy = set_aside(path, self.position.step)

        kept = "" if copy is None else f"; the rows of the earlier run are kept in {copy}"
        if is_new and resume:
            self._display.warn(f"resume: no checkpoint in {output}, so the run starts at its first step{kept}")
        elif copy is not None:
            self._display.warn(f"output: {output} holds metrics of other steps{kept}")
        return MetricsFile(path, self.position.step)

    def _restore_buffer(self, checkpoint: Path) -> None:
        """Load the rollout buffer of this process, and check that it has the size of a step."""
        rollout = load_rollout(checkpoint / f"rollout-{self.accelerator.process_index}.safetensors")
        experience = rollout.experience
        num_responses = experience.responses.num_sequences
        share = self.config.num_prompts * self.config.group_size // self.accelerator.num_processes
        if num_responses != share:
            raise CheckpointError(
                f"resume: num_prompts * group_size must stay inside a step, got {share} responses a process where "
                f"{checkpoint.name} holds {num_responses}; change them after a complete step"
            )
        self._buffer = experience
        self._ratios = torch.ones_like(experience.advantages) if rollout.ratio is None else rollout.ratio


def _with_credit(config: PPOConfig, credit: str | CreditConfig | None) -> PPOConfig:
    """Replace the credit settings, or only their rule where a name is given."""
    if credit is None:
        return config
    if isinstance(credit, str):
        credit = replace(config.credit, rule=credit)
    return replace(config, credit=credit)
