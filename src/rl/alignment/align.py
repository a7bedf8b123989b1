"""Gradient alignment: does a credit rule point the policy gradient where many more rollouts would point it?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowgraph import MemoryLimitError
from rl.alignment.arms import arm_name, named_arms, parse_arm, score_arms, selected_tokens
from rl.alignment.gradients import decompose_weights, inner_products, policy_gradients, token_factors
from rl.alignment.multipliers import (
    UNIFORM,
    Alignment,
    ArmAlignment,
    Products,
    compare,
    cosines,
    jackknife,
    multipliers,
    signal_shares,
)
from rl.config import CreditConfig, PPOConfig
from rl.errors import ConfigError
from rl.policy.actor_critic import ActorCritic, model_name
from rl.records import Responses
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.tasks.base import Task
from rl.tasks.registry import make_task
from rl.training.experience import build_experience

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with the stage, the batches that are done, and the batches to do."""

_LEAST_BATCHES = 3
"""One to leave out for the interval, one to look at, one to be the truth."""


def align(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task,
    *,
    arms: Sequence[str | CreditConfig],
    config: PPOConfig | None = None,
    num_batches: int = 200,
    baselines: Sequence[str] = (UNIFORM,),
    seed: int = 0,
    memory_limit: float | None = None,
    progress: Progress | None = None,
) -> Alignment:
    r"""Compare credit settings by the gradients they make of the same rollouts.

    :math:`g_b = \sum_t w_t A_t \nabla \log \pi(y_t)` over the tokens of batch b, with respect to the policy's adapter
    and at ratio 1; :math:`u_b` is the same with :math:`w = 1`. An arm's cosine is the mean of
    :math:`\cos(g_b, \sum_{c \ne b} u_c)`, its sample multiplier :math:`(\cos / \cos_{uniform})^2`. KL and entropy
    terms of the *loss* are the same for all arms and left out; a KL in the reward acts through A.

    Args:
        model: a causal LM (a fresh adapter is measured), or a PEFT model whose active adapter is; left as it
            came.
        tokenizer: of the model.
        task: a task, the name of one, or a JSONL file.
        arms: settings, or texts for :func:`rl.alignment.arms.parse_arm`. Uniform is always there, and first.
        config: how batches are sampled, with ``advantage="group"`` (default) or ``"rloo"``. Its ``credit`` and
            ``seed`` are not used.
        num_batches: batches of ``num_prompts * group_size`` responses; take at least 200.
        baselines: arms that every other arm is compared with, by name.
        seed: of rollouts, adapter and rules that draw.
        memory_limit: in bytes; None: half of what is free.
        progress: called with stage, batches done and batches in all.

    Raises:
        ConfigError: settings that exclude each other, or fewer than three batches in which any response has an
            advantage.
        CreditError, TaskError, RewardError, PolicyError: as in training.
        MemoryLimitError: the gradients would not fit.
        DivergedError: a gradient is not finite.

    Cost: for each batch one rollout, three forward passes, and a backward pass for uniform, for the selected tokens
    of each arm, and for each arm whose weights are no function of its selection alone. ``4 * num_batches * P`` bytes
    for P adapter weights.
    """
    config = _checked(config or PPOConfig(advantage="group"), num_batches, seed)
    chosen = _arms(arms, config)
    baselines = _check_baselines(baselines, chosen)
    name = model_name(model)
    with _borrowed(model, config) as policy:
        parameters = sum(weight.numel() for weight in policy.policy_parameters().values())
        _require_memory(parameters, num_batches, len(chosen), memory_limit)
        work = _Work(policy, tokenizer, make_task(task), chosen, config, progress or (lambda stage, done, total: None))
        gradients = torch.empty(num_batches, parameters)
        batches = work.collect(gradients)
        if len(batches) < _LEAST_BATCHES:
            raise ConfigError(
                f"num_batches: must give at least {_LEAST_BATCHES} batches in which any response has an advantage, got "
                f"{len(batches)} of {num_batches}; take more batches, a larger group_size or another task"
            )
        products = work.measure(batches, gradients[: len(batches)])
        return _report(work, batches, products, baselines, name)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch with signal: its responses, what each token's log-probability is multiplied with, and each arm's view."""

    responses: Responses
    base: Float[Tensor, "batch response"]
    weights: list[Float[Tensor, "batch response"]]
    selected: list[Bool[Tensor, "batch response"]]
    scored: list[Bool[Tensor, "batch response"]]
    loss_mask: Bool[Tensor, "batch response"]


@dataclass
class _Work:
    """The two passes over the batches: the uniform gradients first, since every arm is measured against all of them."""

    policy: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    task: Task
    arms: dict[str, CreditConfig]
    config: PPOConfig
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    tokens: int = 0
    no_signal: int = 0

    def collect(self, gradients: Float[Tensor, "batches parameters"]) -> list[_Batch]:
        """Sample, score and weigh; fill ``gradients`` with the uniform gradients of the batches that are returned."""
        config, started = self.config, time.perf_counter()
        encoder = PromptEncoder(
            self.tokenizer, self.policy.causal_lm, config.max_prompt_tokens, config.max_response_tokens
        )
        batches: list[_Batch] = []
        for number in range(len(gradients)):
            batch = self._view(self._sample(encoder, number), number)
            if bool(batch.base.any()):
                gradients[len(batches)] = policy_gradients(self.policy, batch.responses, [batch.base], config)[0]
                batches.append(batch)
            else:
                self.no_signal += 1
            self.progress("rollouts", number + 1, len(gradients))
        self.seconds["rollouts"] = time.perf_counter() - started
        return batches

    def _sample(self, encoder: PromptEncoder, number: int) -> Responses:
        config = self.config
        first = number * config.num_prompts
        samples = draw_samples(self.task, "train", range(first, first + config.num_prompts))
        generated = sample_responses(
            self.policy.causal_lm, encoder, samples, group_size=config.group_size,
            max_response_tokens=config.max_response_tokens, temperature=config.temperature, seed=config.seed,
            step=number,
        )  # fmt: skip
        each = [sample for sample in samples for _ in range(config.group_size)]
        responses = judge(self.task, self.tokenizer, each, generated)
        self.rewards += responses.rewards.tolist()
        self.tokens += int(responses.response_mask.sum())
        return responses

    def _view(self, responses: Responses, number: int) -> _Batch:
        """The batch as every arm sees it."""
        scores, credits = score_arms(self.policy, responses, list(self.arms.values()), self.config, step=number)
        views = [
            build_experience(
                responses, scores, credit, replace(self.config, credit=arm), kl_weight=self.config.kl_weight
            )
            for arm, credit in zip(self.arms.values(), credits, strict=True)
        ]
        return _Batch(
            responses=responses,
            base=token_factors(views[0], self.config),
            weights=[view.policy_weights for view in views],
            selected=[selected_tokens(c, arm) for arm, c in zip(self.arms.values(), credits, strict=True)],
            scored=[credit.scored for credit in credits],
            loss_mask=views[0].loss_mask,
        )

    def measure(self, batches: list[_Batch], uniform: Float[Tensor, "batches parameters"]) -> list[Products]:
        """Products of the weighted gradient of every arm, then of its selected tokens, then of its other tokens."""
        started, n = time.perf_counter(), len(batches)
        dots = torch.zeros(3 * len(self.arms), n, n, dtype=torch.float64)
        norms = torch.zeros(3 * len(self.arms), n, dtype=torch.float64)
        for number, batch in enumerate(batches):
            atoms, parts = decompose_weights(batch.base, batch.weights, batch.selected)
            gradients = torch.empty(len(atoms), uniform.shape[1])
            gradients[0] = uniform[number]
            if len(atoms) > 1:
                gradients[1:] = policy_gradients(self.policy, batch.responses, atoms[1:], self.config)
            with_uniform, gram = inner_products(gradients, uniform), inner_products(gradients, gradients)
            dots[:, number] = parts @ with_uniform
            norms[:, number] = ((parts @ gram) * parts).sum(1).clamp_min(0).sqrt()
            self.progress("gradients", number + 1, n)
        self.seconds["gradients"] = time.perf_counter() - started
        return [Products(*pair) for pair in zip(dots, norms, strict=True)]


@contextmanager
def _borrowed(model: nn.Module, config: PPOConfig) -> Iterator[ActorCritic]:
    """The model as a policy; afterwards without the adapters that were added, and as trainable as before."""
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    policy = ActorCritic(model, config.lora, critic=False, seed=config.seed)
    try:
        yield policy
    finally:
        if policy.reference_name is None:
            policy.peft.unload()
        else:
            policy.peft.delete_adapter(policy.reference_name)
        for name, weight in model.named_parameters():
            weight.requires_grad_(flags[name])
        for name, module in model.named_modules():
            module.training = training[name]


def _checked(config: PPOConfig, num_batches: int, seed: int) -> PPOConfig:
    """The settings of the rollouts, without credit of their own."""
    if config.has_critic:
        raise ConfigError(
            f"config.advantage: must be 'group' or 'rloo', got {config.advantage!r}; a critic that was not trained yet "
            "says nothing, so measure with PPOConfig(advantage='group')"
        )
    if num_batches < _LEAST_BATCHES:
        raise ConfigError(f"num_batches: must be at least {_LEAST_BATCHES}, got {num_batches}; take 200")
    return replace(config, credit=CreditConfig(rule=UNIFORM), seed=seed)


def _arms(arms: Sequence[str | CreditConfig], config: PPOConfig) -> dict[str, CreditConfig]:
    """All arms by name, uniform first; each is checked against the settings as training would."""
    if isinstance(arms, str):
        raise ConfigError(f"arms: must be a list of arms, got the text {arms!r}; pass split_arms({arms!r})")
    uniform, named = CreditConfig(rule=UNIFORM), named_arms(arms)
    for credit in named.values():
        replace(config, credit=credit)
    return {UNIFORM: uniform, **named}


def _check_baselines(baselines: Sequence[str], arms: Mapping[str, CreditConfig]) -> list[str]:
    """Their names as the arms have them; said before the long run, not after it."""
    if isinstance(baselines, str):
        raise ConfigError(f"baselines: must be a list of arms, got the text {baselines!r}; pass [{baselines!r}]")
    names = [arm_name(parse_arm(text)) for text in dict.fromkeys(baselines)]
    for name in names:
        if name not in arms:
            raise ConfigError(f"baselines: must be arms, got {name!r}; there are {', '.join(arms)}, so add it to arms")
    return names


def _require_memory(parameters: int, num_batches: int, num_arms: int, limit: float | None) -> None:
    """Room for the uniform gradients of all batches and for those of every arm in one."""
    import psutil

    free = psutil.virtual_memory().available / 2 if limit is None else limit
    needed = 4 * parameters * (num_batches + 4 * num_arms + 1)
    if needed > free:
        raise MemoryLimitError(
            f"num_batches: gradients of {num_batches} batches and {num_arms} arms by {parameters} weights must "
            f"fit into {free / 2**30:.2f} GiB, got about {needed / 2**30:.2f} GiB; lower lora.rank, take fewer "
            "lora.targets, batches or arms, or raise memory_limit"
        )


def _report(
    work: _Work, batches: Sequence[_Batch], products: Sequence[Products], baselines: Sequence[str], model: str
) -> Alignment:
    names, number = list(work.arms), len(work.arms)
    cosine = [cosines(kind, products[0]) for kind in products]
    ratio = [multipliers(kind, cosine[0]) for kind in cosine]
    found = []
    for index, (name, credit) in enumerate(work.arms.items()):
        token_share, recall, chance = _coverage(batches, index)
        singled_out = token_share > 0
        part, rest = number + index, 2 * number + index
        found.append(
            ArmAlignment(
                name=name,
                credit=credit,
                cosine=jackknife(cosine[index]),
                multiplier=jackknife(ratio[index]),
                signal_share=jackknife(signal_shares(products[part], products[0])) if singled_out else None,
                token_share=token_share,
                only_selected=jackknife(ratio[part]) if singled_out else None,
                only_rest=jackknife(ratio[rest]) if singled_out else None,
                recall=recall if singled_out else None,
                recall_chance=chance if singled_out else None,
            )
        )
    return Alignment(
        arms=tuple(found),
        differences=compare(dict(zip(names, ratio[:number], strict=True)), baselines),
        num_batches=len(batches),
        no_signal=work.no_signal,
        num_parameters=sum(weight.numel() for weight in work.policy.policy_parameters().values()),
        reward=sum(work.rewards) / len(work.rewards),
        response_tokens=work.tokens / len(work.rewards),
        seconds=work.seconds,
        model=model,
        task=repr(work.task),
        settings=work.config.to_dict(),
        seed=work.config.seed,
    )


def _coverage(batches: Sequence[_Batch], index: int) -> tuple[float, float | None, float | None]:
    """Share of tokens that an arm selects; recall of the decisive ones in its scope, and what chance would recall."""
    tokens = chosen_tokens = hits = by_chance = decisive = 0.0
    for batch in batches:
        chosen, scored = batch.selected[index], batch.scored[index]
        tokens += float(batch.loss_mask.sum())
        chosen_tokens += float((chosen & batch.loss_mask).sum())
        if batch.responses.oracle is None:
            continue
        wanted = batch.responses.oracle & scored
        decisive += float(wanted.sum())
        hits += float((wanted & chosen).sum())
        by_chance += float((wanted.sum(1) * chosen.sum(1) / scored.sum(1).clamp_min(1)).sum())
    if not decisive:
        return chosen_tokens / tokens, None, None
    return chosen_tokens / tokens, hits / decisive, by_chance / decisive
