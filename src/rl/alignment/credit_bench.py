r"""Score credit rules against the true advantages of tokens, without training.

The truth comes from Monte Carlo (:mod:`rl.alignment.monte_carlo`): the advantage of a token is the difference that it
makes to the expected reward. Two estimates from separate rollouts, :math:`a` and :math:`a'`, give unbiased products:
:math:`E[a a']` is the true square, where :math:`E[a^2]` would add the noise.

Letters of the shapes: B responses to one problem, R response columns, n problems, P parameters of the policy adapter.
A *unit* is a token, or a step of several tokens; all tokens of a step share its advantage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from flowgraph import atomic_write
from rl.algorithm.advantages import spread
from rl.alignment.arms import named_arms, score_arms
from rl.alignment.gradients import policy_gradients
from rl.alignment.measured_policy import default_sampling, policy_on
from rl.alignment.monte_carlo import PrefixValues, Sampler, ValuesFile, judged_again, measured_problems
from rl.alignment.rank_auc import interval, mean_over_problems, resampled_sums
from rl.config import CreditConfig, PPOConfig
from rl.credit.weights import loss_weights
from rl.errors import ConfigError
from rl.policy.actor_critic import ActorCritic, model_name
from rl.records import Credit, Responses
from rl.rollouts.chat_templates import with_template_options
from rl.tasks.base import Task
from rl.tasks.registry import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with the problems that are done, and the problems to do."""

UNIFORM = "uniform"
_LEAST_ROLLOUTS = 4
_LEAST_PROBLEMS = 3
_DECIMALS = 9
_LEAST_UNITS = 3
"""Fewest units of a rank correlation: two units always correlate by 1 or -1."""


class Figure(NamedTuple):
    """A figure with its 95 % bootstrap interval over problems; None where it is not defined.

    Attributes:
        value: on all problems.
        low: lower end.
        high: upper end.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RuleScore:
    r"""How far the scores and weights of one credit setting agree with the true advantages.

    Attributes:
        rule: the setting as a short text.
        rank: mean over responses of Spearman's correlation of score and \|advantage\|.
        rank_corrected: the same without the attenuation by noise, divided by the square root of the reliability of
            \|advantage\|; None where the two halves do not agree at all.
        auc: mean over responses of the share of pairs of units that the score orders as \|advantage\| does; .5 by
            chance.
        top_share: share of the squared advantage that lies in the top ``share`` of the units, without noise.
        top_units: share of the units in these tops: what units drawn at random would have.
        cosine: cosine of the weighted policy gradient with the gradient of the true advantages, without their noise.
        cosine_gain: ``cosine`` minus that of uniform weights, on the same problems.
    """

    rule: str
    rank: Figure
    rank_corrected: float | None
    auc: Figure
    top_share: Figure
    top_units: float
    cosine: Figure
    cosine_gain: Figure


@dataclass(frozen=True)
class CreditBench:
    r"""Result of :func:`credit_bench`.

    Attributes:
        rules: a row for each setting, uniform first.
        reliability: rank correlation of \|advantage\| between two estimates of ``num_rollouts`` rollouts each, from
            that of the halves by Spearman and Brown's formula; None where the halves do not correlate.
        signal: share of the squared estimated advantage that is no noise, with its interval.
        num_rollouts: K, rollouts from each prefix.
        num_problems: n.
        num_responses: responses to them.
        num_units: units with an estimated advantage.
        per: ``"token"`` or ``"step"``.
        share: share of the units in ``top_share``.
        reward: mean reward of the responses.
        model: name of the model.
        task: the task as text.
        seed: seed of rollouts, bootstrap, adapter and rules that draw random numbers.
    """

    rules: tuple[RuleScore, ...]
    reliability: float | None
    signal: Figure
    num_rollouts: int
    num_problems: int
    num_responses: int
    num_units: int
    per: str
    share: float
    reward: float
    model: str
    task: str
    seed: int

    @property
    def is_reliable(self) -> bool:
        """Return whether the advantages can be told from the noise of the rollouts: the interval is above 0."""
        return self.signal.low is not None and self.signal.low > 0

    def table(self) -> list[dict[str, Any]]:
        """Return a flat row for each setting; ``NAME_low`` and ``NAME_high`` are the ends of an interval."""
        rows = []
        for rule in self.rules:
            row: dict[str, Any] = {}
            for item in fields(rule):
                value = getattr(rule, item.name)
                if isinstance(value, Figure):
                    row |= {item.name: value.value, f"{item.name}_low": value.low, f"{item.name}_high": value.high}
                else:
                    row[item.name] = value
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the rows and the figures of the run as plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rules"}
        values["signal"] = self.signal._asdict()
        return {
            "schema": "flowgraph-rl.credit-bench/1",
            "reliable": self.is_reliable,
            **values,
            "rules": self.table(),
        }

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        shown = []
        for row in self.rules:
            rank = "-" if row.rank.value is None else f"{row.rank.value:.2f}"
            shown.append(f"{row.rule} {rank}")
        found = ", ".join(shown)
        return f"CreditBench({found}; {self.num_responses} responses, {self.num_rollouts} rollouts a {self.per})"


def credit_bench(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task,
    *,
    rules: Sequence[str | CreditConfig],
    config: PPOConfig | None = None,
    num_problems: int = 32,
    num_rollouts: int = 16,
    step_end: str | None = None,
    share: float = 0.4,
    batch_size: int = 256,
    path: str | PathLike[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> CreditBench:
    r"""Score credit rules against Monte Carlo advantages.

    With halves a and a' of the estimated advantages, weights w of a rule, and the reward R of a response:

    .. math::
        top = \frac{\sum_{i \in top} a_i a'_i}{\sum_i a_i a'_i}, \qquad
        \cos = \frac{\sum_p \langle g_p, (t_p + t'_p) / 2 \rangle}
                    {\sqrt{\sum_p |g_p|^2 \sum_p \langle t_p, t'_p \rangle}}

    over problems p, where :math:`g_p = \sum w_t (R - V(0)) \nabla \log \pi(y_t)` and
    :math:`t_p = \sum a_t \nabla \log \pi(y_t)`. Both gradients have the same expectation for :math:`w = 1`.
    V(0) in g comes from rollouts that no advantage uses.

    Args:
        model: a causal LM, or a PEFT model whose active adapter is measured. It is returned as it was.
        tokenizer: tokenizer of the model.
        task: a task, the name of one, or a JSONL file.
        rules: settings, or texts such as ``"flow_sharp:soft"``; uniform is always measured, and first.
        config: how responses are sampled; ``group_size`` responses to each problem. Its ``credit`` and ``seed`` are
            ignored.
        num_problems: n, problems of the split ``"train"``.
        num_rollouts: K, rollouts from each prefix, even.
        step_end: a regular expression of the text that ends a step: one advantage for each step; None: for each token.
        share: share of the units of ``top_share``.
        batch_size: rollouts at a time.
        path: a file that keeps the values of each problem; a stopped run continues from it.
        resamples: bootstrap samples of problems.
        seed: seed of rollouts, bootstrap, adapter and rules that draw random numbers.
        progress: called with problems done and problems in all.

    Raises:
        ConfigError: too few problems or rollouts for an interval, or a file of other settings.
        CreditError, TaskError, RewardError, PolicyError, DivergedError: as in training.
        OutputError: the file cannot be written.

    Cost: ``n * group_size * T * K`` rollouts of up to T tokens for T units in a response; then one forward pass for
    each problem and a backward pass for each rule.
    """
    # Every setting is checked before the long run.
    if isinstance(rules, str):
        raise ConfigError(f"rules: must be a list of rules, got the text {rules!r}; pass [{rules!r}]")
    _check_numbers(num_problems, num_rollouts, share)
    if config is None:
        config = default_sampling(model, group_size=2)
    config = replace(config, credit=CreditConfig(rule=UNIFORM), sampling_correction=None, seed=seed)
    arms = {UNIFORM: CreditConfig(rule=UNIFORM), **named_arms(rules)}
    problems = make_task(task)
    name = model_name(model)

    # One problem after another: its rollouts, then the figures of every rule on its responses.
    with policy_on(model, config) as policy:
        sampler = Sampler(
            model=policy.causal_lm,
            tokenizer=with_template_options(tokenizer, config.chat_template_kwargs),
            task=problems,
            config=config,
            num_rollouts=num_rollouts,
            step_end=step_end,
            batch_size=batch_size,
        )
        settings = {
            "model": name,
            "task": repr(problems),
            "num_rollouts": num_rollouts,
            "step_end": step_end,
            "config": config.to_dict(),
        }
        values = ValuesFile(None if path is None else Path(path), settings)
        parts = []
        for measured in measured_problems(sampler, num_problems, values, progress):
            parts.append(_problem_figures(policy, sampler, measured, arms, share))

    # The means over problems, with their intervals.
    run = _RunFacts(
        model=name,
        task=repr(problems),
        num_rollouts=num_rollouts,
        per="token" if step_end is None else "step",
        share=share,
        seed=seed,
    )
    return _result(parts, list(arms), run=run, resamples=resamples)


# The figures of a problem -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ProblemFigures:
    """What one problem adds to every figure.

    Attributes:
        problem: its number.
        rewards: of its responses.
        num_units: units with an advantage.
        reliability: for each response, rank correlation of the two halves of \\|advantage\\|; NaN where not defined.
        squares: sum of a a' over the units, and sum of the squared mean of both.
        rank: ``[A, B]``, rank correlation of each setting and response.
        auc: ``[A, B]``, concordance.
        in_top: ``[A, 2]``, sum of a a' over the top units, and their number.
        competing: sum of a a' over the competing units, and their number.
        products: ``[A, 2]``, inner product with the mean true gradient, and own squared norm.
        true_square: inner product of the two true gradients.
    """

    problem: int
    rewards: list[float]
    num_units: int
    reliability: Float64[Tensor, " batch"]
    squares: Float64[Tensor, " 2"]
    rank: Float64[Tensor, "arms batch"]
    auc: Float64[Tensor, "arms batch"]
    in_top: Float64[Tensor, "arms 2"]
    competing: Float64[Tensor, " 2"]
    products: Float64[Tensor, "arms 2"]
    true_square: float


def _problem_figures(
    policy: ActorCritic,
    sampler: Sampler,
    measured: Sequence[PrefixValues],
    arms: Mapping[str, CreditConfig],
    share: float,
) -> _ProblemFigures:
    """Score every setting on the responses to one problem."""
    config = sampler.config
    # Credit as training would give it, from the ids that the values belong to.
    responses = judged_again(sampler, measured)
    _, credits = score_arms(policy, responses, list(arms.values()), config, step=measured[0].problem)
    halves = [_advantages(one) for one in measured]

    num_arms = len(arms)
    num_responses = len(measured)
    rank = torch.full((num_arms, num_responses), torch.nan, dtype=torch.float64)
    auc = torch.full((num_arms, num_responses), torch.nan, dtype=torch.float64)
    in_top = torch.zeros(num_arms, 2, dtype=torch.float64)
    competing = torch.zeros(2, dtype=torch.float64)
    reliability = torch.full((num_responses,), torch.nan, dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    for row, (one, (first, second)) in enumerate(zip(measured, halves, strict=True)):
        # Ranks within each response. Units in which no token competes have no score.
        num_units = len(first)
        unit_of_token = _unit_of_token(one.prefixes)
        is_scored = credits[0].scored[row, : len(one.ids)]
        competes = torch.zeros(num_units, dtype=torch.bool).index_fill(0, unit_of_token[is_scored], True)

        # The product of separate estimates has no noise on average; the square of their mean has.
        product = first * second
        mean = (first + second) / 2
        squares += torch.stack([product.sum(), mean.square().sum()])
        competing_product = product[competes]
        competing += torch.stack([competing_product.sum(), competes.double().sum()])

        # The truth that the rules are compared with, and how far its halves agree.
        size = _size(mean)[competes]
        first_size = _size(first)[competes]
        second_size = _size(second)[competes]
        reliability[row] = _spearman(first_size, second_size)

        # Each rule against the same truth.
        for index, credit in enumerate(credits):
            score = _unit_scores(credit, row, unit_of_token, num_units)[competes]
            rank[index, row] = _spearman(score, size)
            auc[index, row] = concordance(score, size)
            top = _top(score, share)
            num_top = torch.tensor(float(len(top)), dtype=torch.float64)
            in_top[index] += torch.stack([competing_product[top].sum(), num_top])

    # The weights act on the gradient, so they are measured there.
    products, true_square = _gradient_products(policy, responses, measured, halves, credits, arms, config)
    return _ProblemFigures(
        problem=measured[0].problem,
        rewards=[one.reward for one in measured],
        num_units=sum(len(first) for first, _ in halves),
        reliability=reliability,
        squares=squares,
        rank=rank,
        auc=auc,
        in_top=in_top,
        competing=competing,
        products=products,
        true_square=true_square,
    )


def _advantages(one: PrefixValues) -> tuple[Float64[Tensor, " units"], Float64[Tensor, " units"]]:
    """Return both estimates of the advantage of every unit: the value after it minus the value before it."""
    first = torch.tensor(one.first_half, dtype=torch.float64)
    second = torch.tensor(one.second_half, dtype=torch.float64)
    return first.diff(), second.diff()


def _size(advantages: Float64[Tensor, " units"]) -> Float64[Tensor, " units"]:
    """Return the absolute advantages; equal ones stay equal, although 2/6 - 1/6 is not quite 3/6 - 2/6 in floats."""
    return advantages.abs().round(decimals=_DECIMALS)


def _unit_of_token(prefixes: Sequence[int]) -> Int64[Tensor, " tokens"]:
    """Return the number of the unit that each token is in."""
    # Two neighbouring prefixes differ by the tokens of one unit.
    lengths = torch.tensor(list(prefixes), dtype=torch.int64).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _unit_scores(
    credit: Credit, row: int, unit_of_token: Int64[Tensor, " tokens"], num_units: int
) -> Float64[Tensor, " units"]:
    """Average the scores of the competing tokens of each unit; 0 where none competes."""
    num_tokens = len(unit_of_token)
    is_scored = credit.scored[row, :num_tokens]
    scores = credit.scores[row, :num_tokens].double()[is_scored]
    units = unit_of_token[is_scored]
    total = torch.zeros(num_units, dtype=torch.float64).index_add_(0, units, scores)
    count = torch.zeros(num_units, dtype=torch.float64).index_add_(0, units, torch.ones_like(scores))
    return total / count.clamp_min(1)


def _spearman(one: Float64[Tensor, " units"], other: Float64[Tensor, " units"]) -> float:
    """Compute Spearman's rank correlation; 0 where all scores are equal, NaN where the truth is, or units are few."""
    if len(one) < _LEAST_UNITS or bool((other == other[0]).all()):
        return math.nan
    # A rule that gives all units one score orders none of them.
    if bool((one == one[0]).all()):
        return 0.0
    ranks = torch.stack([_ranks(one), _ranks(other)])
    correlation = torch.corrcoef(ranks)
    return float(correlation[0, 1])


def _ranks(values: Float64[Tensor, " units"]) -> Float64[Tensor, " units"]:
    """Return ranks; equal values share their mean rank."""
    # The mean of the numbers of values below, and at or below, each value is its mean rank minus 1/2. The shift changes
    # no correlation.
    ascending = values.sort().values
    num_below = torch.searchsorted(ascending, values, right=False)
    num_up_to = torch.searchsorted(ascending, values, right=True)
    return (num_below + num_up_to).double() / 2


def concordance(score: Float64[Tensor, " units"], truth: Float64[Tensor, " units"]) -> float:
    """Compute the share of the pairs of different truth that the score orders alike; equal scores count half.

    For a truth of two values this is the AUC.

    Returns:
        The share; NaN where all truths are equal.

    Cost: the square of the number of units.

    Example:
        >>> score = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
        >>> round(concordance(score, torch.tensor([0.9, 0.1, 0.1], dtype=torch.float64)), 3)
        1.0
    """
    greater = truth[:, None] > truth
    num_pairs = int(greater.sum())
    if num_pairs == 0:
        return math.nan
    is_ordered_alike = (score[:, None] > score).double()
    is_tied = (score[:, None] == score).double()
    agreement = is_ordered_alike + is_tied / 2
    return float(agreement[greater].sum() / num_pairs)


def _top(score: Float64[Tensor, " units"], share: float) -> Int64[Tensor, " top"]:
    """Return the units of highest score, ``ceil(share * n)`` of them; a tie goes to the earlier unit."""
    # The product of two floats can lie above an integer that it should equal, so it is lowered before rounding up.
    size = math.ceil(share * len(score) * (1 - 1e-12))
    order = torch.argsort(score, descending=True, stable=True)
    return order[:size]


def _gradient_products(
    policy: ActorCritic,
    responses: Responses,
    measured: Sequence[PrefixValues],
    halves: Sequence[tuple[Tensor, Tensor]],
    credits: Sequence[Credit],
    arms: Mapping[str, CreditConfig],
    config: PPOConfig,
) -> tuple[Float64[Tensor, "arms 2"], float]:
    """Return <g, t> and |g|^2 of each setting, and <t, t'> of the two true gradients."""
    # The factors of g of each setting: w_t (R - V(0)).
    mask = responses.response_mask
    outcome = [one.reward - one.start_value for one in measured]
    advantages = spread(torch.tensor(outcome, dtype=torch.float32), mask)
    factors = []
    for credit, arm in zip(credits, arms.values(), strict=True):
        weights = loss_weights(credit, advantages, mask, arm)
        factors.append(advantages * weights)

    # The factors of t and t': the advantages of both halves, each on all tokens of its unit.
    for half in (0, 1):
        true = torch.zeros(mask.shape, dtype=torch.float32)
        for row, one in enumerate(measured):
            unit_of_token = _unit_of_token(one.prefixes)
            true[row, : len(one.ids)] = halves[row][half][unit_of_token].float()
        factors.append(true)

    # All gradients come from one forward pass.
    gradients = policy_gradients(policy, responses, factors, config).double()
    own = gradients[:-2]
    first = gradients[-2]
    second = gradients[-1]
    with_true = own @ (first + second) / 2
    own_squares = own.square().sum(1)
    true_square = float(first @ second)
    return torch.stack([with_true, own_squares], 1), true_square


# The result ---------------------------------------------------------------------------------------------


class _RunFacts(NamedTuple):
    """Facts of the run that the result repeats; see :class:`CreditBench`."""

    model: str
    task: str
    num_rollouts: int
    per: str
    share: float
    seed: int


def _result(parts: Sequence[_ProblemFigures], names: Sequence[str], *, run: _RunFacts, resamples: int) -> CreditBench:
    """Average the figures over problems, with bootstrap intervals from the same resamples for all settings."""
    # The signal: sum of a a' over the sum of squared means.
    reliability = _reliability(parts)
    squares = torch.stack([part.squares for part in parts], 1)
    signal = _ratio_figure(squares, seed=run.seed, resamples=resamples)

    cosines = [_cosines(parts, index, seed=run.seed, resamples=resamples) for index in range(len(names))]
    uniform_value, uniform_resampled = cosines[0]
    rows = []
    for index, name in enumerate(names):
        # Noise in the truth lowers its correlation with anything by the root of its reliability.
        rank = _mean_of_responses(parts, "rank", index, run.seed, resamples)
        corrected = None
        if rank.value is not None and reliability is not None:
            corrected = rank.value / math.sqrt(reliability)

        # The share of a a' that lies in the top, and the share of the units that lies there.
        in_top = [torch.stack([part.in_top[index, 0], part.competing[0]]) for part in parts]
        top_share = _ratio_figure(torch.stack(in_top, 1), seed=run.seed, resamples=resamples)
        num_top = sum(float(part.in_top[index, 1]) for part in parts)
        num_competing = sum(float(part.competing[1]) for part in parts)

        # The gain over uniform is a difference on the same resamples.
        value, resampled = cosines[index]
        gain = value - uniform_value
        resampled_gain = resampled - uniform_resampled
        rows.append(
            RuleScore(
                rule=name,
                rank=rank,
                rank_corrected=corrected,
                auc=_mean_of_responses(parts, "auc", index, run.seed, resamples),
                top_share=top_share,
                top_units=num_top / max(num_competing, 1.0),
                cosine=_figure(value, resampled),
                cosine_gain=_figure(gain, resampled_gain),
            )
        )

    rewards: list[float] = []
    for part in parts:
        rewards += part.rewards
    return CreditBench(
        rules=tuple(rows),
        reliability=reliability,
        signal=signal,
        num_rollouts=run.num_rollouts,
        num_problems=len(parts),
        num_responses=len(rewards),
        num_units=sum(part.num_units for part in parts),
        per=run.per,
        share=run.share,
        reward=sum(rewards) / len(rewards),
        model=run.model,
        task=run.task,
        seed=run.seed,
    )


def _reliability(parts: Sequence[_ProblemFigures]) -> float | None:
    r"""Compute the reliability of \|advantage\| from the correlation r of the halves: 2 r / (1 + r).

    Source: Spearman and Brown, British Journal of Psychology 3, 1910.
    """
    found = torch.cat([part.reliability for part in parts])
    known = found[~found.isnan()]
    if len(known) == 0:
        return None
    halves = float(known.mean())
    if halves <= 0:
        return None
    return 2 * halves / (1 + halves)


def _mean_of_responses(parts: Sequence[_ProblemFigures], name: str, index: int, seed: int, resamples: int) -> Figure:
    """Average the figure ``"rank"`` or ``"auc"`` of each response."""
    values = []
    problems = []
    for part in parts:
        of_arms = part.rank if name == "rank" else part.auc
        values.append(of_arms[index])
        problems += [part.problem] * len(part.rewards)
    groups = torch.tensor(problems, dtype=torch.int64)
    mean = mean_over_problems(torch.cat(values), groups, seed=seed, resamples=resamples)
    return Figure(mean.value, mean.low, mean.high)


def _cosines(
    parts: Sequence[_ProblemFigures], index: int, *, seed: int, resamples: int
) -> tuple[Float64[Tensor, " 1"], Float64[Tensor, " resamples"]]:
    """Compute the cosine of one setting on all problems, and on every resample of problems."""
    # Three sums of each problem: <g, t>, |g|^2 and <t, t'>.
    of_problems = []
    for part in parts:
        inner, own_square = part.products[index].tolist()
        of_problem = torch.tensor([inner, own_square, part.true_square], dtype=torch.float64)
        of_problems.append(of_problem)
    sums = torch.stack(of_problems, 1)
    drawn = resampled_sums(sums, seed=seed, resamples=resamples)
    return _cosine_of(sums.sum(1)[None]), _cosine_of(drawn)


def _cosine_of(sums: Float64[Tensor, "samples 3"]) -> Float64[Tensor, " samples"]:
    """Compute the cosine from its three sums; NaN where the two true gradients do not agree, or a gradient is 0."""
    inner, own, true = sums.unbind(1)
    is_defined = (own > 0) & (true > 0)
    length = torch.where(is_defined, own * true, torch.nan).sqrt()
    return inner / length


def _ratio_figure(contributions: Float64[Tensor, "2 problems"], *, seed: int, resamples: int) -> Figure:
    """Divide two sums over problems; a resample of problems changes numerator and denominator together."""
    on_all_problems = contributions.sum(1)[None]
    drawn = resampled_sums(contributions, seed=seed, resamples=resamples)
    return _figure(_ratio(on_all_problems), _ratio(drawn))


def _ratio(sums: Float64[Tensor, "samples 2"]) -> Float64[Tensor, " samples"]:
    """Divide the first sum by the second; NaN where the second is not positive."""
    numerator, denominator = sums.unbind(1)
    return numerator / torch.where(denominator > 0, denominator, torch.nan)


def _figure(value: Float64[Tensor, " 1"], resampled: Float64[Tensor, " resamples"]) -> Figure:
    """Return a figure with the interval of its resamples; None where it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        return Figure(None, None, None)
    ends = interval(resampled)
    if ends is None:
        return Figure(number, None, None)
    return Figure(number, *ends)


def _check_numbers(num_problems: int, num_rollouts: int, share: float) -> None:
    """Reject numbers from which no interval can be computed."""
    if type(num_rollouts) is not int or num_rollouts < _LEAST_ROLLOUTS or num_rollouts % 2 != 0:
        raise ConfigError(
            f"num_rollouts: must be an even number of at least {_LEAST_ROLLOUTS}, because one half of the rollouts "
            f"measures the noise of the other, got {num_rollouts!r}; take 16"
        )
    if type(num_problems) is not int or num_problems < _LEAST_PROBLEMS:
        raise ConfigError(
            f"num_problems: must be at least {_LEAST_PROBLEMS} for an interval over problems, got {num_problems!r}; "
            "take 32"
        )
    if not 0 < share <= 1:
        raise ConfigError(f"share: must lie in (0, 1], got {share!r}; 0.4 is the paper's")
