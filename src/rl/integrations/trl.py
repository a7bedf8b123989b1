"""Add token credit to TRL's GRPO trainer: its rollouts, rewards and losses, with credit weights on its advantages.

Letters of the shapes: B sequences of one process, P prompt columns, R response columns.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, FlowgraphError, MissingExtraError
from rl.config import CreditConfig
from rl.credit.ratings import Ratings, rate_tokens, weigh_tokens
from rl.credit.weights import effective_token_ratio, gini
from rl.errors import ConfigError
from rl.integrations.processes import check_parallelism, fail_together, require_same, settings_of
from rl.integrations.tensors import (
    FindAnswer,
    attention_recorders,
    read_responses,
    scale_advantages,
    usable_rule,
)
from rl.policy.sampling import evaluating
from rl.records import Credit, Responses, TokenScores, join_records, to_device
from rl.seeds import generator
from rl.tasks.answers import find_answer as find_stated_answer

if TYPE_CHECKING:
    from trl import GRPOTrainer as _GRPOTrainer
else:
    _GRPOTrainer = object

MIN_TRL_VERSION = "1.16"
"""The oldest supported TRL. The overridden methods are not part of its public interface."""


class TokenCredit(_GRPOTrainer):
    """The methods that :func:`flow_grpo_trainer` adds to TRL's trainer.

    Args:
        *args: arguments of the trainer.
        credit: name or settings of a credit rule; ``entry`` must be ``"advantage"``.
        find_answer: finds the answer in a completion; weights are 1 where none is found, or one inside the thinking.
        **kwargs: arguments of the trainer.

    Attributes:
        credit: the credit settings.
        credit_rule: their rule.
        find_answer: finds the answer in a completion.

    Raises:
        ConfigError: an entry point other than the advantages; tools, environments or images; FSDP1; split sequences or
            heads; processes that disagree.
        CreditError: an unknown rule, or one that needs a backward pass or a task that knows its decisive tokens.
    """

    def __init__(
        self,
        *args: Any,
        credit: str | CreditConfig = "flow",
        find_answer: FindAnswer = find_stated_answer,
        **kwargs: Any,
    ) -> None:
        self.credit = CreditConfig(rule=credit) if isinstance(credit, str) else credit
        # Compared before anything is refused, so that no process ends alone.
        require_same(settings_of(self.credit))
        self.credit_rule = usable_rule(self.credit)
        self.find_answer = find_answer
        self._rewards: Tensor = torch.empty(0, dtype=torch.float32)
        super().__init__(*args, **kwargs)
        _check_supported(self)
        require_same(_settings_of(self))

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute TRL's rewards, and keep the weighted sums of this process for rules that read rewards."""
        rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        # TRL gathers the rewards of all processes: rows are sequences, columns reward functions.
        first = self.accelerator.process_index * len(inputs)
        own = rewards[first : first + len(inputs)]
        weighted = own * self.reward_weights.to(rewards.device)
        # NaN marks a reward function that does not apply to a sequence.
        self._rewards = weighted.nansum(1)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Make TRL's batch, with advantages of shape ``[B, R]``: each one times the credit weight of its token.

        A batch of an evaluation keeps its advantages, so that its loss is comparable to TRL's.
        """
        is_training = self._policy.training
        if is_training:
            # TRL gathers the rewards of all processes, which would wait for ever, or join rows of different groups.
            require_same({"inputs (number of sequences)": len(inputs)})
        output = super()._generate_and_score_completions(inputs)
        if not is_training:
            return output

        started = time.perf_counter()
        credit = self._token_credit(inputs, output)
        mask = output["completion_mask"].bool()
        progress = self.state.global_step / max(1, self.state.max_steps)
        output["advantages"] = scale_advantages(
            output["advantages"], mask, credit, self.credit, progress=min(1.0, progress)
        )
        self._log_credit(credit, mask, time.perf_counter() - started)
        return output

    def _log_credit(self, credit: Credit, mask: Bool[Tensor, "batch response"], seconds: float) -> None:
        """Add figures of the weights and the time to TRL's metrics; no tokens give those of equal weights."""
        weights = credit.weights[mask]
        mean = 1.0
        raised_share = 0.0
        if weights.numel() > 0:
            mean = float(weights.mean())
            raised_share = float((weights > 1).float().sum() / weights.numel())
        metrics = self._metrics["train"]
        metrics["credit/weight_mean"].append(mean)
        metrics["credit/raised_share"].append(raised_share)
        metrics["credit/seconds"].append(seconds)

        # The unevenness within each response that has tokens.
        of_responses = [row[chosen] for row, chosen in zip(credit.weights, mask, strict=True) if bool(chosen.any())]
        count = max(1, len(of_responses))
        metrics["credit/weight_gini"].append(sum(map(gini, of_responses)) / count)
        effective = [effective_token_ratio(of_response) for of_response in of_responses]
        metrics["credit/effective_token_ratio"].append(sum(effective) / count if effective else 1.0)
        if credit.unanchored is not None:
            of_kept = credit.unanchored[mask.any(1)]
            metrics["credit/unanchored_share"].append(float(of_kept.float().mean()))

    def _token_credit(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> Credit:
        """Compute the credit of every sequence; weights are 1 where TRL masked it (``mask_truncated_completions``)."""
        mask = output["completion_mask"].bool()
        is_kept = mask.any(1)
        kept = is_kept.nonzero().flatten().tolist()
        credit = Credit(
            scores=torch.zeros(mask.shape, dtype=torch.float32),
            scored=torch.zeros(mask.shape, dtype=torch.bool),
            weights=torch.ones(mask.shape, dtype=torch.float32),
        )
        credit = to_device(credit, mask.device)

        # A process that failed still takes part in the passes of the others, and all of them raise afterwards.
        parts, error = self._rated(inputs, output, is_kept.tolist())
        fail_together(error)
        found = self._weighed(parts, mask.device)
        if found is not None:
            credit.scores[kept] = found.scores
            credit.scored[kept] = found.scored
            credit.weights[kept] = found.weights
            if found.unanchored is not None:
                unanchored = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
                unanchored[kept] = found.unanchored
                credit = replace(credit, unanchored=unanchored)
        return credit

    def _rated(
        self, inputs: list[dict[str, Any]], output: dict[str, Any], is_kept: list[bool]
    ) -> tuple[list[Ratings], FlowgraphError | None]:
        """Rate the kept sequences in passes of a device's batch; the error is the first one of this process.

        Every process makes the same number of passes, because the weights of a sharded model are gathered in each.
        """
        parts: list[Ratings] = []
        error: FlowgraphError | None = None
        size = self.args.per_device_train_batch_size
        for start in range(0, len(is_kept), size):
            rows = list(range(start, min(start + size, len(is_kept))))
            kept = [row for row in rows if is_kept[row]]
            responses = None
            if kept and error is None:
                try:
                    responses = self._responses_of_rows(inputs, output, kept)
                except FlowgraphError as found:
                    error = found
            if responses is None:
                self._pass_in_step(output, rows[:1])
                continue

            scores, attention = self._recorded_pass(responses)
            numbers = [self._number(inputs, row) for row in kept]
            random = [generator(self.args.seed, "credit", self.state.global_step, number) for number in numbers]
            try:
                parts.append(rate_tokens(responses, scores, self.credit, rows=attention, random=random))
            except FlowgraphError as found:
                error = found
        return parts, error

    def _weighed(self, parts: list[Ratings], device: torch.device) -> Credit | None:
        """Weigh the ratings of this process, compared with those of all processes; None where it has none."""

        def mean_over_batch(ties: Float[Tensor, " chosen"]) -> float:
            """Add sums and counts over all processes."""
            own = torch.stack([ties.sum(), torch.tensor(ties.numel(), dtype=ties.dtype, device=device)])
            reduced: Any = self.accelerator.reduce(own, reduction="sum")
            total, count = reduced.tolist()
            return total / count if count else 0.0

        if parts:
            random = generator(
                self.args.seed, "credit positions", self.state.global_step, self.accelerator.process_index
            )
            return weigh_tokens(join_records(parts), self.credit, mean_over_batch=mean_over_batch, random=random)
        # The other processes wait for the sum of this one.
        if self.credit.fallback > 0:
            mean_over_batch(torch.zeros(0, device=device, dtype=torch.float32))
        return None

    def _number(self, inputs: list[dict[str, Any]], row: int) -> int:
        """Return the number of a sequence over all processes: it tells groups apart and seeds the rules that draw."""
        return self.accelerator.process_index * len(inputs) + row

    def _responses_of_rows(self, inputs: list[dict[str, Any]], output: dict[str, Any], rows: list[int]) -> Responses:
        """Read some sequences of TRL's rollout; no exchange with other processes."""
        group_size: Any = self.num_generations
        groups = [self._number(inputs, row) // group_size for row in rows]
        responses = read_responses(
            _select_tensors(output, rows),
            [inputs[row]["prompt"] for row in rows],
            self._tokenizer,
            find_answer=self.find_answer,
            groups=torch.tensor(groups),
            rewards=self._rewards[rows],
            end_ids=self.eos_token_ids,
        )
        return to_device(responses, output["completion_ids"].device)

    def _recorded_pass(self, responses: Responses) -> tuple[TokenScores, dict[str, AttentionRows]]:
        """Make one forward pass without gradient, and record in it the attention that the rule reads.

        Attention comes from the queries and keys of this process's own sequences, in the pass that gathers a sharded
        layer anyway; no weight is read outside it.
        """
        ids = responses.input_ids
        mask = responses.attention_mask
        with torch.no_grad(), evaluating(self._policy), ExitStack() as stack:
            recorders = attention_recorders(self._policy, self.credit)
            for recorder in recorders.values():
                stack.enter_context(recorder)
            scores = self._token_scores(responses)
            attention = {name: recorder.rows(mask, ids) for name, recorder in recorders.items()}
        return scores, attention

    def _pass_in_step(self, output: dict[str, Any], rows: list[int]) -> None:
        """Make a pass that this process does not need, with the others, whose sharded weights it helps to gather."""
        if self.accelerator.num_processes == 1:
            return
        tensors = _select_tensors(output, rows)
        ids = torch.cat([tensors["prompts"], tensors["responses"]], 1)
        with torch.no_grad(), evaluating(self._policy):
            self._get_per_token_logps_and_entropies(
                self._policy, ids, tensors["attention_mask"], tensors["responses"].shape[1], compute_entropy=True
            )

    @property
    def _policy(self) -> Any:
        """Return the model without distributed wrappers."""
        return self.model

    def _token_scores(self, responses: Responses) -> TokenScores:
        """Compute log-probabilities and entropies as TRL does in its loss, at its temperature."""
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            self._policy,
            responses.input_ids,
            responses.attention_mask.long(),
            responses.response_length,
            compute_entropy=True,
        )
        mask = responses.response_mask
        return TokenScores(logprobs=_zero_outside(logprobs, mask), entropy=_zero_outside(entropy, mask))


def flow_grpo_trainer(base: type | None = None) -> type[TokenCredit]:
    """Return TRL's ``GRPOTrainer`` with token credit; :class:`TokenCredit` describes the two added arguments.

    Weights act on TRL's advantages. Its rewards, losses (all loss types), vLLM rollouts and metrics stay as they are;
    with weights of 1 a run is bit-identical to TRL's, also where processes share the weights of the model by FSDP2 or
    DeepSpeed ZeRO. Tools and environments, images, FSDP1, and parallelism that splits sequences or heads are not
    supported and refused. vLLM and Liger kernels were not tried.

    The attention is read by the process that holds the sequences, in one pass that gathers sharded layers as every pass
    does. Processes with different credit settings, lengths or numbers of sequences are refused, in all of them.

    Args:
        base: a subclass of ``trl.GRPOTrainer``; None: TRL's own class.

    Raises:
        MissingExtraError: TRL is not installed, or too old.
        ConfigError: ``base`` is not a subclass of GRPOTrainer.

    Cost: one more forward pass for each rollout, because TRL skips the old-policy pass where it can.

    Example:
        trainer = flow_grpo_trainer()(
            model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts, processing_class=tokenizer,
            peft_config=lora, credit=CreditConfig.recommended(),
        )
    """
    grpo = _grpo_trainer()
    if base is None:
        base = grpo
    if not (isinstance(base, type) and issubclass(base, grpo)):
        raise ConfigError(f"base: must be a subclass of trl.GRPOTrainer, got {base!r}; leave it out for TRL's own")
    return _with_credit(base)


@cache
def _with_credit(base: type) -> type[TokenCredit]:
    """Create the class once for each base, so that equal calls give the same class."""
    return type(f"Flow{base.__name__}", (TokenCredit, base), {"__doc__": TokenCredit.__doc__})


def _grpo_trainer() -> type:
    """Return TRL's trainer class, if a supported TRL is installed."""
    from packaging.version import Version

    try:
        import trl
    except ImportError as error:
        raise MissingExtraError(
            "trl: must be installed for this trainer, got no such package; pip install trl"
        ) from error
    if Version(trl.__version__) < Version(MIN_TRL_VERSION):
        raise MissingExtraError(f"trl: must be {MIN_TRL_VERSION} or newer, got {trl.__version__}; pip install -U trl")
    return trl.GRPOTrainer


_AGREED = (
    "per_device_train_batch_size",
    "steps_per_generation",
    "gradient_accumulation_steps",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "max_steps",
    "num_train_epochs",
    "seed",
)
"""Settings of TRL on which the number of passes, the groups of responses or the random draws depend."""


def _settings_of(trainer: Any) -> dict[str, Any]:
    """Return what must be the same in all processes, by name."""
    settings = settings_of(trainer.credit)
    settings["find_answer"] = trainer.find_answer
    for name in _AGREED:
        settings[f"args.{name}"] = getattr(trainer.args, name)
    is_sized = hasattr(trainer.train_dataset, "__len__")
    settings["train_dataset (number of prompts)"] = len(trainer.train_dataset) if is_sized else None
    return settings


def _check_supported(trainer: Any) -> None:
    """Refuse settings under which credit would fall on wrong tokens, or which were not tried."""
    if trainer.tools:
        raise _unsupported("tools", "no tools or environments, whose tokens the policy did not choose")
    if trainer._is_vlm:
        raise _unsupported("processing_class", "a tokenizer: the positions of images are unknown to credit")
    check_parallelism(trainer.accelerator, trainer.model)


def _unsupported(name: str, rule: str) -> ConfigError:
    """Return the error of a setting that credit does not support."""
    return ConfigError(f"{name}: must be {rule}, got some; use trl.GRPOTrainer without credit, or rl.PPOTrainer")


def _select_tensors(output: dict[str, Any], rows: list[int]) -> dict[str, Tensor]:
    """Return some sequences of TRL's rollout under the names of :func:`rl.integrations.tensors.read_responses`."""
    completion_mask = output["completion_mask"]
    attention_mask = torch.cat([output["prompt_mask"], completion_mask], 1)
    # The policy did not choose the tokens that the tool mask excludes.
    response_mask = completion_mask
    if "tool_mask" in output:
        response_mask = completion_mask * output["tool_mask"]
    return {
        "prompts": output["prompt_ids"][rows],
        "responses": output["completion_ids"][rows],
        "attention_mask": attention_mask[rows],
        "response_mask": response_mask[rows],
    }


def _zero_outside(values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Tensor:
    """Set padding to 0: its values are arbitrary."""
    return values.float().masked_fill(~mask, 0.0)
