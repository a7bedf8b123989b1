"""Token credit inside TRL's GRPO trainer: its rollouts, rewards and losses, our weights on its advantages."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRecorder, MissingExtraError
from rl.config import CreditConfig
from rl.credit.registry import AttentionNeed
from rl.errors import ConfigError
from rl.integrations.tensors import FindAnswer, read_responses, scale_advantages, token_credit, usable_rule
from rl.policy.sampling import evaluating
from rl.records import Credit, Responses, TokenScores, join_records, to_device
from rl.seeds import generator
from rl.tasks.answers import find_answer as stated_answer

if TYPE_CHECKING:
    from trl import GRPOTrainer as _GRPOTrainer
else:
    _GRPOTrainer = object

OLDEST = "1.16"
"""The oldest TRL this was written against; the methods that are overridden are not part of its public interface."""


class TokenCredit(_GRPOTrainer):
    """What :func:`flow_grpo_trainer` puts in front of TRL's trainer.

    Args:
        *args: as the trainer's.
        credit: a credit rule's name or settings; ``entry`` must be ``"advantage"``.
        find_answer: where a completion states its answer; credit without an answer is 1.
        **kwargs: as the trainer's.

    Raises:
        ConfigError: an entry point other than the advantages; tools, environments, images or sharded weights.
        CreditError: no such rule, or one that needs a backward pass or a task's own knowledge.
    """

    def __init__(
        self,
        *args: Any,
        credit: str | CreditConfig = "flow",
        find_answer: FindAnswer = stated_answer,
        **kwargs: Any,
    ) -> None:
        self.credit = CreditConfig(rule=credit) if isinstance(credit, str) else credit
        self.credit_rule, self.find_answer = usable_rule(self.credit), find_answer
        self._verdicts: Tensor = torch.empty(0)
        super().__init__(*args, **kwargs)
        _refuse(self)

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards, remembered for rules that look at them: of this process, weighted and summed."""
        rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        first = self.accelerator.process_index * len(inputs)
        mine = rewards[first : first + len(inputs)] * self.reward_weights.to(rewards.device)
        self._verdicts = mine.nansum(1)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with advantages of shape ``[B, R]``, each times the credit of its token.

        An evaluation's batch stays as it is: its loss is a figure to compare, and teaches nothing.
        """
        output = super()._generate_and_score_completions(inputs)
        if not self._policy.training:
            return output
        began = time.perf_counter()
        credit = self._token_credit(inputs, output)
        mask = output["completion_mask"].bool()
        output["advantages"] = scale_advantages(output["advantages"], mask, credit, self.credit)
        metrics = self._metrics["train"]
        metrics["credit/weight_mean"].append(float(credit.weights[mask].mean()) if bool(mask.any()) else 1.0)
        metrics["credit/raised_share"].append(float((credit.weights[mask] > 1).float().sum() / mask.sum().clamp(min=1)))
        metrics["credit/seconds"].append(time.perf_counter() - began)
        return output

    def _token_credit(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> Credit:
        """Credit of every sequence; 1 throughout for those that TRL masked (``mask_truncated_completions``)."""
        mask = output["completion_mask"].bool()
        kept = mask.any(1).nonzero().flatten().tolist()
        size = self.args.per_device_train_batch_size
        parts = [self._part(inputs, output, kept[start : start + size]) for start in range(0, len(kept), size)]
        credit = Credit(torch.zeros(mask.shape), torch.zeros(mask.shape, dtype=torch.bool), torch.ones(mask.shape))
        credit = to_device(credit, mask.device)
        if parts:
            found = join_records(parts)
            credit.scores[kept], credit.scored[kept], credit.weights[kept] = found.scores, found.scored, found.weights
        return credit

    def _part(self, inputs: list[dict[str, Any]], output: dict[str, Any], rows: list[int]) -> Credit:
        """Credit of some sequences: one forward pass without gradient, heard by the recorders of the rule."""
        first = self.accelerator.process_index * len(inputs)
        numbers = [first + row for row in rows]
        responses = read_responses(
            _tensors(output, rows), [inputs[row]["prompt"] for row in rows], self._tokenizer,
            find_answer=self.find_answer, groups=torch.tensor([number // self.num_generations for number in numbers]),
            rewards=self._verdicts[rows], end_ids=self.eos_token_ids,
        )  # fmt: skip
        responses = to_device(responses, output["completion_ids"].device)
        seed, step = self.args.seed, self.state.global_step
        random = [generator(seed, "credit", step, number) for number in numbers]
        ids, mask = responses.input_ids, responses.attention_mask
        with torch.no_grad(), evaluating(self._policy), ExitStack() as stack:
            heard = {name: stack.enter_context(self._recorder(need)) for name, need in self.credit_rule.needs.items()}
            scores = self._token_scores(responses)
            attention = {name: recorder.rows(mask, ids) for name, recorder in heard.items()}
        return token_credit(responses, scores, self.credit, rows=attention, random=random)

    @property
    def _policy(self) -> Any:
        """The model without distributed wrappers."""
        return self.model

    def _recorder(self, need: AttentionNeed) -> AttentionRecorder:
        credit = self.credit
        return AttentionRecorder(
            self._policy,
            layers=credit.layers if need.layers is None else need.layers,
            heads=credit.heads if need.heads is None else need.heads,
        )

    def _token_scores(self, responses: Responses) -> TokenScores:
        """Log-probabilities and entropies as TRL computes them in its loss, at its temperature."""
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            self._policy, responses.input_ids, responses.attention_mask.long(), responses.response_length,
            compute_entropy=True,
        )  # fmt: skip
        return TokenScores(
            logprobs=_masked(logprobs, responses.response_mask), entropy=_masked(entropy, responses.response_mask)
        )


def flow_grpo_trainer(base: type | None = None) -> type[TokenCredit]:
    """TRL's ``GRPOTrainer`` with token credit; see :class:`TokenCredit` for the two arguments it adds.

    Weights act on what TRL made of the rewards, so its advantages, losses (all loss types), vLLM rollouts and metrics
    stay what they are; with weights of 1 a run is TRL's to the last bit. It costs one forward pass more for each
    rollout, because TRL skips the old-policy pass where it can. Not supported, and refused: tools and environments,
    images, DeepSpeed and FSDP. vLLM and Liger kernels were not tried.

    Args:
        base: a subclass of ``trl.GRPOTrainer`` of your own; None: TRL's.

    Raises:
        MissingExtraError: TRL is not installed, or too old.
        ConfigError: ``base`` is no GRPO trainer.

    Example:
        trainer = flow_grpo_trainer()(
            model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts, processing_class=tokenizer,
            peft_config=lora, credit=CreditConfig(rule="flow", strength=1.5),
        )
    """
    grpo = _grpo()
    base = grpo if base is None else base
    if not (isinstance(base, type) and issubclass(base, grpo)):
        raise ConfigError(f"base: must be a subclass of trl.GRPOTrainer, got {base!r}; leave it out for TRL's own")
    return _with_credit(base)


@cache
def _with_credit(base: type) -> type[TokenCredit]:
    return type(f"Flow{base.__name__}", (TokenCredit, base), {"__doc__": TokenCredit.__doc__})


def _grpo() -> type:
    from packaging.version import Version

    try:
        import trl
    except ImportError as error:
        raise MissingExtraError(
            "trl: must be installed for this trainer, got no such package; pip install trl"
        ) from error
    if Version(trl.__version__) < Version(OLDEST):
        raise MissingExtraError(f"trl: must be {OLDEST} or newer, got {trl.__version__}; pip install -U trl")
    return trl.GRPOTrainer


def _refuse(trainer: Any) -> None:
    """What would put credit on wrong tokens, or was never tried."""
    reasons = {
        "tools": (bool(trainer.tools), "no tools or environments, whose tokens the policy did not choose"),
        "processing_class": (trainer._is_vlm, "a tokenizer: credit does not know where images stand"),
        "args": (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
            "a launch without DeepSpeed and FSDP: attention is read off the model's own layers",
        ),
    }
    for name, (wrong, rule) in reasons.items():
        if wrong:
            raise ConfigError(f"{name}: must be {rule}, got some; use trl.GRPOTrainer without credit, or rl.PPOTrainer")


def _tensors(output: dict[str, Any], rows: list[int]) -> dict[str, Tensor]:
    """The rollout under the names that :func:`rl.integrations.tensors.read_responses` knows."""
    mask = output["completion_mask"]
    chosen = mask * output["tool_mask"] if "tool_mask" in output else mask
    return {
        "prompts": output["prompt_ids"][rows],
        "responses": output["completion_ids"][rows],
        "attention_mask": torch.cat([output["prompt_mask"], mask], 1)[rows],
        "response_mask": chosen[rows],
    }


def _masked(values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> Tensor:
    return values.float().masked_fill(~mask, 0.0)
