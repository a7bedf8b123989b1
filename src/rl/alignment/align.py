"""Compare credit rules by gradient alignment, without training.

The estimate of the true policy gradient is the sum of the uniform gradients of many batches. A credit rule helps where
its gradient on one batch lies closer to that estimate than the uniform gradient does.

Letters of the shapes: n batches, A arms, P parameters of the policy adapter, B sequences, R response columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from flowgraph import MemoryLimitError
from rl.alignment.arms import arm_name, named_arms, parse_arm, score_arms, selected_tokens
from rl.alignment.gradients import decompose_weights, inner_products, policy_gradients, token_factors
from rl.alignment.measured_policy import default_sampling, policy_on
from rl.alignment.multipliers import (
    UNIFORM,
    Alignment,
    ArmAlignment,
    Products,
    compare,
    cosines,
    jackknife,
    multipliers,
    projected_cosines,
    signal_shares,
)
from rl.config import CreditConfig, PPOConfig
from rl.errors import ConfigError
from rl.policy.actor_critic import ActorCritic, model_name
from rl.records import Responses
from rl.rollouts.chat_templates import with_template_options
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.seeds import generator
from rl.tasks.base import Task
from rl.tasks.registry import make_task
from rl.training.experience import build_experience

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with the stage, the batches that are done, and the batches to do."""

_MIN_BATCHES = 3
"""The jackknife leaves one batch out; of the others, one is compared with the sum of the rest."""


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
    r"""Compare credit settings by their policy gradients on shared rollouts.

    :math:`g_b = \sum_t w_t A_t \nabla \log \pi(y_t)` over the tokens of batch b, with respect to the policy's adapter
    and at ratio 1; :math:`u_b` is the same with :math:`w = 1`. An arm's cosine is the mean of
    :math:`\cos(g_b, \sum_{c \ne b} u_c)`, its sample multiplier :math:`(\cos / \cos_{uniform})^2`. KL and entropy
    terms of the *loss* are the same for all arms and left out; a KL in the reward acts through A.

    Args:
        model: a causal LM (a fresh adapter is measured), or a PEFT model (its active adapter is measured). The model
            is returned to its state afterwards: adapters, trainable weights, training mode.
        tokenizer: tokenizer of the model.
        task: a task, the name of one, or a JSONL file.
        arms: settings, or texts for :func:`rl.alignment.arms.parse_arm`. Uniform is always measured, and first.
        config: how batches are sampled, with ``advantage="group"`` (default) or ``"rloo"``. Its ``credit`` and
            ``seed`` are ignored.
        num_batches: batches of ``num_prompts * group_size`` responses; take at least 200.
        baselines: names of the arms that every other arm is compared with.
        seed: seed of rollouts, adapter and rules that draw random numbers.
        memory_limit: in bytes; None: half of the free memory.
        progress: called with stage, batches done and batches in all.

    Returns:
        Cosines, multipliers and their differences, with jackknife intervals.

    Raises:
        ConfigError: settings that exclude each other, or fewer than three batches in which any response has an
            advantage.
        CreditError, TaskError, RewardError, PolicyError: as in training.
        MemoryLimitError: the gradients would not fit.
        DivergedError: a gradient is not finite.

    Cost: for each batch one rollout, three forward passes, and a backward pass for uniform, for the decisive tokens,
    for the selected tokens of each arm, and for each arm whose weights are not a function of its selection alone.
    ``8 * num_batches * P`` bytes of memory.

    Example:
        >>> import rl
        >>> model, tokenizer = rl.load_chain_model()
        >>> config = rl.PPOConfig(advantage="group", num_prompts=8, group_size=4, max_response_tokens=40)
        >>> result = rl.align(model, tokenizer, "chain", arms=["entropy"], config=config, num_batches=4)
        >>> [arm.name for arm in result.arms]
        ['uniform', 'entropy']
    """
    # Every setting is checked before the long run.
    if config is None:
        config = default_sampling(model)
    config = _rollout_settings(config, num_batches, seed)
    named = _arms_with_uniform(arms, config)
    baseline_names = _check_baselines(baselines, named)
    # The name is read first: an adapter changes it.
    name = model_name(model)

    with policy_on(model, config) as policy:
        num_parameters = sum(weight.numel() for weight in policy.policy_parameters().values())
        _require_memory(num_parameters, num_batches, len(named), memory_limit)
        run = _AlignmentRun(
            policy=policy,
            tokenizer=with_template_options(tokenizer, config.chat_template_kwargs),
            task=make_task(task),
            arms=named,
            config=config,
            progress=_ignore_progress if progress is None else progress,
        )

        # Pass 1: rollouts, and u_b and v_b of every batch with signal. Pass 2 compares every arm with all of them.
        uniform_gradients = torch.empty(num_batches, num_parameters, dtype=torch.float32)
        probes = torch.empty(num_batches, num_parameters, dtype=torch.float32)
        batches = run.collect(uniform_gradients, probes)
        if len(batches) < _MIN_BATCHES:
            raise ConfigError(
                f"num_batches: must give at least {_MIN_BATCHES} batches in which any response has an advantage, got "
                f"{len(batches)} of {num_batches}; take more batches, a larger group_size or another task"
            )
        measured = run.measure(batches, uniform_gradients[: len(batches)], probes[: len(batches)])
        return _report(run, batches, measured, baseline_names, name)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch in which some response has an advantage, with the credit of every arm.

    Attributes:
        responses: the responses with their rewards.
        base: ``[B, R]`` float32, factor of each token's log-probability in the uniform gradient.
        weights: ``[B, R]`` float32 for each arm, w.
        selected: ``[B, R]`` bool for each arm, the tokens that it selects.
        scored: ``[B, R]`` bool for each arm, the tokens in its scope.
        loss_mask: ``[B, R]`` bool, tokens that enter the loss.
    """

    responses: Responses
    base: Float[Tensor, "batch response"]
    weights: list[Float[Tensor, "batch response"]]
    selected: list[Bool[Tensor, "batch response"]]
    scored: list[Bool[Tensor, "batch response"]]
    loss_mask: Bool[Tensor, "batch response"]


@dataclass
class _AlignmentRun:
    """The two passes over the batches: uniform gradients of all batches first, then the arms.

    Attributes:
        policy: the policy whose adapter is differentiated.
        tokenizer: tokenizer of the model.
        task: source of problems and rewards.
        arms: credit settings by name, uniform first.
        config: settings of the rollouts.
        progress: called with stage, batches done and batches in all.
        seconds: wall time of each stage.
        rewards: reward of every response.
        num_tokens: response tokens of all batches.
        no_signal: batches without an advantage.
    """

    policy: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    task: Task
    arms: dict[str, CreditConfig]
    config: PPOConfig
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    num_tokens: int = 0
    no_signal: int = 0

    def collect(
        self, gradients: Float[Tensor, "batches parameters"], probes: Float[Tensor, "batches parameters"]
    ) -> list[_Batch]:
        """Sample and score every batch; write u_b and v_b of the returned batches into the first rows.

        Args:
            gradients: filled with the uniform gradients.
            probes: filled with the score functions of the decisive tokens, summed with random signs.
        """
        started = time.perf_counter()
        config = self.config
        encoder = PromptEncoder(
            self.tokenizer,
            self.policy.causal_lm,
            config.max_prompt_tokens,
            config.max_response_tokens,
            config.stop_strings,
        )
        batches: list[_Batch] = []
        for number in range(len(gradients)):
            responses = self._sample(encoder, number)
            batch = self._score(responses, number)
            # A batch without any advantage has the gradient 0 and no direction, so it is counted and left out.
            if bool(batch.base.any()):
                fields = [batch.base, _signed_decisive(batch, config.seed, number)]
                uniform_gradient, probe = policy_gradients(self.policy, responses, fields, config)
                row = len(batches)
                gradients[row] = uniform_gradient
                probes[row] = probe
                batches.append(batch)
            else:
                self.no_signal += 1
            self.progress("rollouts", number + 1, len(gradients))
        self.seconds["rollouts"] = time.perf_counter() - started
        return batches

    def _sample(self, encoder: PromptEncoder, number: int) -> Responses:
        """Sample the responses of one batch from problems that no other batch contains, and judge them."""
        config = self.config
        first = number * config.num_prompts
        problems = range(first, first + config.num_prompts)
        samples = draw_samples(self.task, "train", problems)
        generated = sample_responses(
            self.policy.causal_lm,
            encoder,
            samples,
            group_size=config.group_size,
            max_response_tokens=config.max_response_tokens,
            temperature=config.temperature,
            seed=config.seed,
            step=number,
        )
        # The responses of a problem follow one another.
        repeated = [sample for sample in samples for _ in range(config.group_size)]
        responses = judge(self.task, self.tokenizer, repeated, generated)
        self.rewards += responses.rewards.tolist()
        self.num_tokens += int(responses.response_mask.sum())
        return responses

    def _score(self, responses: Responses, number: int) -> _Batch:
        """Compute advantages and the credit of every arm, as training with this arm would."""
        settings = list(self.arms.values())
        kl_weight = self.config.kl_weight
        scores, credits = score_arms(self.policy, responses, settings, self.config, step=number)

        # Each arm has its own experience: where credit moves the rewards, its advantages differ, too.
        experiences = []
        selected = []
        for arm, credit in zip(settings, credits, strict=True):
            own_config = replace(self.config, credit=arm)
            experience = build_experience(responses, scores, credit, own_config, kl_weight=kl_weight)
            experiences.append(experience)
            selected.append(selected_tokens(credit, arm))

        uniform = experiences[0]
        return _Batch(
            responses=responses,
            base=token_factors(uniform, self.config),
            weights=[experience.policy_weights for experience in experiences],
            selected=selected,
            scored=[credit.scored for credit in credits],
            loss_mask=uniform.loss_mask,
        )

    def measure(
        self,
        batches: list[_Batch],
        uniform: Float[Tensor, "batches parameters"],
        probes: Float[Tensor, "batches parameters"],
    ) -> _Measured:
        """Compute the inner products of three gradients of every arm with the uniform gradients of all batches.

        Args:
            batches: the n batches.
            uniform: ``[n, P]``, their uniform gradients.
            probes: ``[n, P]``, their probes.
        """
        started = time.perf_counter()
        num_batches = len(batches)
        num_gradients = 3 * len(self.arms)
        dots = torch.zeros(num_gradients, num_batches, num_batches, dtype=torch.float64)
        norms = torch.zeros(num_gradients, num_batches, dtype=torch.float64)
        along_probes = torch.zeros(len(self.arms), num_batches, num_batches, dtype=torch.float64)
        for number, batch in enumerate(batches):
            # Gradients of the few fields that make up all 3 A gradients; the first is u_b, which is known.
            fields, coefficients = decompose_weights(batch.base, batch.weights, batch.selected)
            gradients = torch.empty(len(fields), uniform.shape[1], dtype=torch.float32)
            gradients[0] = uniform[number]
            if len(fields) > 1:
                gradients[1:] = policy_gradients(self.policy, batch.responses, fields[1:], self.config)

            # With g = C f for coefficients C and field gradients f: <g, u> = C <f, u> and |g|^2 = diag(C <f, f> C^T).
            with_uniform = inner_products(gradients, uniform)
            gram = inner_products(gradients, gradients)
            dots[:, number] = coefficients @ with_uniform
            squared_norms = ((coefficients @ gram) * coefficients).sum(1)
            # Rounding can put the squared norm of a gradient of almost 0 below 0.
            norms[:, number] = squared_norms.clamp_min(0).sqrt()

            # Only the weighted gradients, which come first, are measured along the probes.
            of_weighted = coefficients[: len(self.arms)]
            with_probes = inner_products(gradients, probes)
            along_probes[:, number] = of_weighted @ with_probes
            self.progress("gradients", number + 1, num_batches)
        self.seconds["gradients"] = time.perf_counter() - started
        products = [Products(dot, norm) for dot, norm in zip(dots, norms, strict=True)]
        return _Measured(products, along_probes)


class _Measured(NamedTuple):
    """The inner products of all arms.

    Attributes:
        products: 3 A records: of the weighted gradients of all arms, then of their selected tokens, then of the others.
        along_probes: ``[A, n, n]`` float64, of the weighted gradients with the probes of all batches.
    """

    products: list[Products]
    along_probes: Float64[Tensor, "arms batches batches"]


def _signed_decisive(batch: _Batch, seed: int, number: int) -> Float[Tensor, "batch response"]:
    """Return a random sign on every decisive token of the loss, and 0 elsewhere; 0 everywhere without an oracle."""
    oracle = batch.responses.oracle
    if oracle is None:
        return torch.zeros_like(batch.base)
    # Random signs make the square of the sum a sum of squares on average.
    random = generator(seed, "probe", number)
    coins = torch.randint(2, oracle.shape, generator=random)
    signs = coins * 2.0 - 1.0
    return torch.where(oracle & batch.loss_mask, signs, 0.0)


def _ignore_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress, for callers that gave no callback."""


def _rollout_settings(config: PPOConfig, num_batches: int, seed: int) -> PPOConfig:
    """Return the settings of the rollouts, with uniform credit and the seed of the comparison."""
    if config.has_critic:
        raise ConfigError(
            f"config.advantage: must be 'group' or 'rloo', got {config.advantage!r}; the values of an untrained critic "
            "carry no information, so measure with PPOConfig(advantage='group')"
        )
    if num_batches < _MIN_BATCHES:
        raise ConfigError(f"num_batches: must be at least {_MIN_BATCHES}, got {num_batches}; take 200")
    return replace(config, credit=CreditConfig(rule=UNIFORM), sampling_correction=None, seed=seed)


def _arms_with_uniform(arms: Sequence[str | CreditConfig], config: PPOConfig) -> dict[str, CreditConfig]:
    """Return all arms by name, uniform first, each checked against the rollout settings as in training."""
    if isinstance(arms, str):
        raise ConfigError(f"arms: must be a list of arms, got the text {arms!r}; pass split_arms({arms!r})")
    named = named_arms(arms)
    for credit in named.values():
        # The constructor checks the combination of settings.
        replace(config, credit=credit)
    return {UNIFORM: CreditConfig(rule=UNIFORM), **named}


def _check_baselines(baselines: Sequence[str], arms: Mapping[str, CreditConfig]) -> list[str]:
    """Return the baselines under the names of the arms, each once."""
    if isinstance(baselines, str):
        raise ConfigError(f"baselines: must be a list of arms, got the text {baselines!r}; pass [{baselines!r}]")
    names = [arm_name(parse_arm(text)) for text in dict.fromkeys(baselines)]
    for name in names:
        if name not in arms:
            raise ConfigError(f"baselines: must be arms, got {name!r}; there are {', '.join(arms)}, so add it to arms")
    return names


def _require_memory(num_parameters: int, num_batches: int, num_arms: int, limit: float | None) -> None:
    """Reject a run whose gradients exceed the memory limit."""
    import psutil

    if limit is None:
        limit = psutil.virtual_memory().available / 2
    # float32: the uniform gradients and probes of all batches, and at most four gradients of each arm in one batch.
    num_gradients = 2 * num_batches + 4 * num_arms + 2
    needed = 4 * num_parameters * num_gradients
    if needed > limit:
        raise MemoryLimitError(
            f"num_batches: gradients of {num_batches} batches and {num_arms} arms by {num_parameters} weights must "
            f"fit into {limit / 2**30:.2f} GiB, got about {needed / 2**30:.2f} GiB; lower lora.rank, take fewer "
            "lora.targets, batches or arms, or raise memory_limit"
        )


def _report(
    run: _AlignmentRun, batches: Sequence[_Batch], measured: _Measured, baselines: Sequence[str], model: str
) -> Alignment:
    """Turn inner products into cosines, multipliers and differences with intervals."""
    # Uniform is the first arm, so its products and cosines come first, too.
    num_arms = len(run.arms)
    products = measured.products
    uniform = products[0]
    cosine = [cosines(kind, uniform) for kind in products]
    ratio = [multipliers(kind, cosine[0]) for kind in cosine]

    # Without decisive tokens, or with too few for every replicate, the probes are 0 and the ratio is not defined.
    decisive = [projected_cosines(along, measured.along_probes[0]) for along in measured.along_probes]
    if bool((decisive[0] == 0).any()):
        decisive = []

    # The three blocks of products: weighted gradients, selected tokens, other tokens.
    of_weighted = range(num_arms)
    of_selected = range(num_arms, 2 * num_arms)
    of_others = range(2 * num_arms, 3 * num_arms)
    arms = []
    for index, (name, credit) in enumerate(run.arms.items()):
        coverage = _coverage(batches, index)
        decisive_multiplier = None
        if decisive:
            decisive_ratio = multipliers(decisive[index], decisive[0])
            decisive_multiplier = jackknife(decisive_ratio)
        arm = ArmAlignment(
            name=name,
            credit=credit,
            cosine=jackknife(cosine[of_weighted[index]]),
            multiplier=jackknife(ratio[of_weighted[index]]),
            decisive_multiplier=decisive_multiplier,
            signal_share=None,
            token_share=coverage.token_share,
            only_selected=None,
            only_rest=None,
            recall=None,
            recall_chance=None,
        )
        # The other figures describe a selection, so an arm that selects no token has none of them.
        if coverage.token_share > 0:
            shares = signal_shares(products[of_selected[index]], uniform)
            arm = replace(
                arm,
                signal_share=jackknife(shares),
                only_selected=jackknife(ratio[of_selected[index]]),
                only_rest=jackknife(ratio[of_others[index]]),
                recall=coverage.recall,
                recall_chance=coverage.recall_chance,
            )
        arms.append(arm)

    multiplier_of = {name: ratio[index] for index, name in enumerate(run.arms)}
    num_responses = len(run.rewards)
    return Alignment(
        arms=tuple(arms),
        differences=compare(multiplier_of, baselines),
        num_batches=len(batches),
        no_signal=run.no_signal,
        num_parameters=sum(weight.numel() for weight in run.policy.policy_parameters().values()),
        reward=sum(run.rewards) / num_responses,
        response_tokens=run.num_tokens / num_responses,
        seconds=run.seconds,
        model=model,
        task=repr(run.task),
        settings=run.config.to_dict(),
        seed=run.config.seed,
    )


class _Coverage(NamedTuple):
    """How many tokens an arm selects, and how many of the decisive ones.

    Attributes:
        token_share: share of the loss tokens that are selected.
        recall: share of the decisive tokens in scope that are selected; None without decisive tokens.
        recall_chance: expected recall of as many tokens drawn at random; None without decisive tokens.
    """

    token_share: float
    recall: float | None
    recall_chance: float | None


def _coverage(batches: Sequence[_Batch], index: int) -> _Coverage:
    """Measure the selection of one arm over all batches."""
    # Sums over all batches: a mean of shares would count short responses more.
    num_tokens = 0.0
    num_selected = 0.0
    num_decisive = 0.0
    num_found = 0.0
    num_expected = 0.0
    for batch in batches:
        selected = batch.selected[index]
        scored = batch.scored[index]
        num_tokens += float(batch.loss_mask.sum())
        num_selected += float((selected & batch.loss_mask).sum())
        if batch.responses.oracle is None:
            continue

        decisive = batch.responses.oracle & scored
        num_decisive += float(decisive.sum())
        num_found += float((decisive & selected).sum())
        # Drawing k of the n scored tokens of a response finds each decisive token with probability k / n.
        num_scored = scored.sum(1).clamp_min(1)
        expected = decisive.sum(1) * selected.sum(1) / num_scored
        num_expected += float(expected.sum())

    token_share = num_selected / num_tokens
    if num_decisive == 0:
        return _Coverage(token_share, None, None)
    return _Coverage(token_share, num_found / num_decisive, num_expected / num_decisive)
