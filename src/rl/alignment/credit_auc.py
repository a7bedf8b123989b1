r"""Test whether a credit rule follows the dependencies of a response, without gradients and without training.

A task marks the tokens that its answer depends on (``oracle``) and work of the same kind that the answer does not
depend on (``detours``). A rule that follows dependencies ranks the first above the second; a rule that only finds the
skill ranks them alike. Both are measured within each response, so that neither length nor reward plays a part.

Letters of the shapes: B responses of the run, R response columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from flowgraph import atomic_write
from rl.alignment.arms import named_arms, score_arms
from rl.alignment.graph_sweep import graphs_of
from rl.alignment.measured_policy import default_sampling, policy_on
from rl.alignment.rank_auc import mean_over_problems, within_auc
from rl.config import CreditConfig, PPOConfig
from rl.credit.scope import answer_openers, before_answer, end_tokens
from rl.credit.weights import effective_token_ratio, gini
from rl.errors import ConfigError, TaskError
from rl.policy.actor_critic import ActorCritic, model_name
from rl.records import Credit, Responses
from rl.rollouts.chat_templates import with_template_options
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.tasks.base import Task
from rl.tasks.registry import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with the problems that are done, and the problems to do."""

_UNANCHORED = 0.5
"""A response is unanchored if its tie is below this share of the mean: the fallback that is recommended."""


@dataclass(frozen=True)
class RuleAuc:
    """How one credit setting ranks the tokens of a response; None where a figure is not defined.

    Attributes:
        rule: the setting as a short text.
        auc: mean AUC of decisive tokens against detours, over the responses that have both before a stated answer.
        low: lower end of its 95 % interval, by bootstrap over problems.
        high: upper end.
        n: responses in this mean.
        auc_others: mean AUC of decisive tokens against all other tokens that compete, detours included.
        low_others: lower end of its interval.
        high_others: upper end.
        n_others: responses in that mean.
        end_weight: mean weight of the end token.
        opener_weight: mean weight of the token in front of the answer.
        unanchored_failures: share of the responses with reward 0 or less whose answer is tied to nothing: without an
            answer, or with a tie (:class:`rl.Credit`) below half of the mean over the run. None for rules without ties.
        gini: Gini coefficient of the weights of the competing tokens of a response, mean over responses; 0 is even.
        effective_tokens: :math:`(\\sum w)^2 / (n \\sum w^2)` of those weights, mean over responses; 1 is even.
    """

    rule: str
    auc: float | None
    low: float | None
    high: float | None
    n: int
    auc_others: float | None
    low_others: float | None
    high_others: float | None
    n_others: int
    end_weight: float | None
    opener_weight: float | None
    unanchored_failures: float | None
    gini: float | None
    effective_tokens: float | None


@dataclass(frozen=True)
class BestGraph:
    """The graph with the highest AUC against detours among those of a sweep.

    Attributes:
        rule: the setting as a short text.
        chosen_auc: its mean AUC on the problems of even place, on which it was chosen: the largest of many, too high.
        auc: its mean AUC on the problems of odd place, which had no part in the choice.
        low: lower end of the 95 % interval of ``auc``.
        high: upper end.
        n: responses in ``auc``.
        num_graphs: graphs that were compared.
    """

    rule: str
    chosen_auc: float
    auc: float | None
    low: float | None
    high: float | None
    n: int
    num_graphs: int


@dataclass(frozen=True)
class CreditAuc:
    """Result of :func:`credit_auc`.

    Attributes:
        rules: a row for each setting, in the given order.
        best: the best graph of a sweep; None without a sweep.
        num_problems: problems of the run.
        num_responses: responses of the run.
        num_unanswered: responses that state no answer; they have no part in an AUC.
        reward: mean reward.
        response_tokens: mean length of a response, in tokens.
        model: name of the model.
        task: the task as text.
        seed: seed of rollouts, of the bootstrap, and of rules that draw random numbers.
    """

    rules: tuple[RuleAuc, ...]
    best: BestGraph | None
    num_problems: int
    num_responses: int
    num_unanswered: int
    reward: float
    response_tokens: float
    model: str
    task: str
    seed: int

    def table(self) -> list[dict[str, Any]]:
        """Return a flat row for each setting, as plain JSON values."""
        return [asdict(rule) for rule in self.rules]

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write a list of rows to a JSON file, atomically: those of :meth:`table`, with the run beside each.

        Raises:
            OutputError: the file cannot be written.
        """
        # The figures of the run: every field but the rows and the best graph.
        run: dict[str, Any] = {}
        for item in fields(self):
            if item.name not in ("rules", "best"):
                run[item.name] = getattr(self, item.name)

        # Each row repeats the run, so that rows of several files can be joined.
        rows = []
        for row in self.table():
            if self.best is not None and row["rule"] == self.best.rule:
                row["best_graph"] = asdict(self.best)
            rows.append({**row, **run})
        text = json.dumps(rows, indent=2, allow_nan=False) + "\n"
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        found = ", ".join(f"{row.rule} {_shown(row.auc)}" for row in self.rules)
        return f"CreditAuc({found}; {self.num_responses} responses to {self.num_problems} problems)"


def credit_auc(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task,
    *,
    rules: Sequence[str | CreditConfig],
    config: PPOConfig | None = None,
    num_problems: int = 64,
    sweep: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> CreditAuc:
    r"""Test whether credit rules rank tokens that feed the answer above unused work of the same kind.

    For each response with a stated answer, decisive tokens i and detours j among the competing tokens:

    .. math:: AUC = P(s_i > s_j) + \tfrac12 P(s_i = s_j)

    and the mean over responses. The scores of a rule are compared, before its shape. Below .7 against detours, or at
    about .5 against all other tokens, a rule is no basis for credit on this task.

    Args:
        model: a causal LM, or a PEFT model whose active adapter wrote the responses. It is returned as it was.
        tokenizer: tokenizer of the model.
        task: a task that marks decisive tokens (``oracle``) and unused work (``detours``), the name of one, or a file.
        rules: settings, or texts such as ``"flow_sharp"`` or ``"flow:soft:layers=all"``.
        config: how responses are sampled: ``group_size`` to each problem, ``num_prompts`` problems at a time, lengths
            and temperature. Its ``credit`` and ``seed`` are ignored.
        num_problems: problems of the split ``"train"``.
        sweep: measure every rule on many graphs (:func:`rl.alignment.graph_sweep.graphs_of`) in place of its own, and
            name the best: chosen on the problems of even place, measured on the others.
        resamples: bootstrap samples of problems.
        seed: seed of rollouts, of the bootstrap, and of rules that draw random numbers.
        progress: called with problems done and problems in all.

    Returns:
        A row for each setting.

    Raises:
        TaskError: the task marks no decisive tokens, or no detours, or a sweep finds no response that has both.
        ConfigError: a number out of range.
        CreditError, RewardError, PolicyError: as in training.

    Cost: a rollout and one forward pass, and what the rules compute. 64 problems x 4 responses of the shipped models
    take seconds.

    Example:
        >>> import rl
        >>> model, tokenizer = rl.load_chain_model()
        >>> config = rl.PPOConfig(advantage="group", num_prompts=8, max_response_tokens=40)
        >>> found = rl.credit_auc(model, tokenizer, "chain", rules=["oracle"], config=config, num_problems=8)
        >>> found.rules[0].auc
        1.0
    """
    # Every setting is checked before the model runs.
    _check_counts(num_problems=num_problems, resamples=resamples)
    if isinstance(rules, str):
        raise ConfigError(f"rules: must be a list of rules, got the text {rules!r}; pass [{rules!r}]")
    if config is None:
        config = default_sampling(model)
    config = replace(config, credit=CreditConfig(rule="uniform"), seed=seed)
    settings = list(named_arms(rules).values())
    if not settings:
        raise ConfigError("rules: must name at least one rule, got none; pass ['flow']")
    if sweep:
        settings = [graph for setting in settings for graph in graphs_of(setting, model)]
    tested = named_arms(settings)
    problems = make_task(task)
    model_text = model_name(model)

    with policy_on(model, config) as policy:
        tokenizer = with_template_options(tokenizer, config.chat_template_kwargs)
        run = _Run(policy, tokenizer, problems, tested, config)
        run.collect(num_problems, progress)

    # Means over responses, with intervals over problems.
    rows = [_row(run, name, seed=seed, resamples=resamples) for name in tested]
    best = None
    if sweep:
        best = _best_graph(run, list(tested), seed=seed, resamples=resamples)
    is_answered = run.of_response("is_answered").bool()
    return CreditAuc(
        rules=tuple(rows),
        best=best,
        num_problems=num_problems,
        num_responses=len(run.groups),
        num_unanswered=int((~is_answered).sum()),
        reward=float(run.of_response("reward").mean()),
        response_tokens=float(run.of_response("length").mean()),
        model=model_text,
        task=repr(problems),
        seed=seed,
    )


class _Run:
    """Sample responses and keep a few figures of each response and setting.

    Attributes:
        groups: problem of each response, in order.
    """

    def __init__(
        self,
        policy: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        settings: Mapping[str, CreditConfig],
        config: PPOConfig,
    ) -> None:
        self.groups: list[int] = []
        self._policy = policy
        self._tokenizer = tokenizer
        self._task = task
        self._settings = settings
        self._config = config
        self._figures: dict[tuple[str, str], list[Tensor]] = {}

    def collect(self, num_problems: int, progress: Progress | None) -> None:
        """Sample and score the responses to the first problems of the split "train".

        Raises:
            TaskError: the task marks no decisive tokens, or no detours.
        """
        config = self._config
        encoder = PromptEncoder(
            self._tokenizer,
            self._policy.causal_lm,
            config.max_prompt_tokens,
            config.max_response_tokens,
            config.stop_strings,
        )
        # A batch is scored before the next one is sampled, so the memory does not grow with the run.
        for start in range(0, num_problems, config.num_prompts):
            stop = min(start + config.num_prompts, num_problems)
            samples = draw_samples(self._task, "train", range(start, stop))
            generated = sample_responses(
                self._policy.causal_lm,
                encoder,
                samples,
                group_size=config.group_size,
                max_response_tokens=config.max_response_tokens,
                temperature=config.temperature,
                seed=config.seed,
                step=start,
            )
            repeated = [sample for sample in samples for _ in range(config.group_size)]
            responses = judge(self._task, self._tokenizer, repeated, generated)
            _require_masks(self._task, responses)
            self._measure(responses, step=start)
            if progress is not None:
                progress(stop, num_problems)

    def of_response(self, figure: str, name: str = "") -> Float64[Tensor, " batch"]:
        """Return a figure of every response, of a setting where the figure depends on one."""
        return torch.cat(self._figures[name, figure])

    def has_figure(self, figure: str, name: str) -> bool:
        """Tell whether a setting has a figure."""
        return (name, figure) in self._figures

    def _measure(self, responses: Responses, step: int) -> None:
        """Compute the figures of one batch."""
        # Figures that depend on no setting.
        self.groups += responses.groups.tolist()
        self._add("", "is_answered", responses.answer.any(1))
        self._add("", "reward", responses.rewards)
        self._add("", "length", responses.response_mask.sum(1))
        ends = end_tokens(responses)
        openers = answer_openers(responses)
        # Without an answer, or with nothing before it, there is no tie.
        has_tie = before_answer(responses).any(1)

        # Of each setting a few numbers a response are kept, because its scores would fill the memory.
        settings = list(self._settings.values())
        _, credits = score_arms(self._policy, responses, settings, self._config, step=step)
        for name, credit in zip(self._settings, credits, strict=True):
            decisive, detours, others = _groups_of_tokens(responses, credit.scored)
            self._add(name, "auc", within_auc(credit.scores, decisive, detours))
            self._add(name, "auc_others", within_auc(credit.scores, decisive, others))
            self._add(name, "end_weight", _mean_over(credit.weights, ends))
            self._add(name, "opener_weight", _mean_over(credit.weights, openers))
            if credit.tie is not None:
                self._add(name, "tie", torch.where(has_tie, credit.tie, torch.nan))
            self._add(name, "gini", _of_competing(gini, credit))
            self._add(name, "effective_tokens", _of_competing(effective_token_ratio, credit))

    def _add(self, name: str, figure: str, values: Tensor) -> None:
        """Append a figure of the responses of a batch."""
        self._figures.setdefault((name, figure), []).append(values.double())


# Groups of tokens ---------------------------------------------------------------------------------------


def _require_masks(task: Task, responses: Responses) -> None:
    """Reject a task that does not mark both groups of tokens."""
    for hook, mask, what in (
        ("oracle", responses.oracle, "the characters that the answer depends on"),
        ("detours", responses.detours, "the characters of unused work"),
    ):
        if mask is None:
            raise TaskError(
                f"task: must mark {what}, got {task.name!r}, whose method {hook!r} is missing or returns None; define "
                f"{hook}(sample, completion), or use the task 'wandering'"
            )


def _groups_of_tokens(
    responses: Responses, scored: Bool[Tensor, "batch response"]
) -> tuple[Bool[Tensor, "batch response"], Bool[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
    """Return decisive tokens, detours and all tokens that are not decisive, where they compete for an answer."""
    assert responses.oracle is not None
    assert responses.detours is not None
    # A response without an answer has nothing that a token could feed.
    competes = scored & responses.answer.any(1, keepdim=True)
    decisive = competes & responses.oracle
    detours = competes & responses.detours & ~responses.oracle
    others = competes & ~responses.oracle
    return decisive, detours, others


# Figures of a response ----------------------------------------------------------------------------------


def _mean_over(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float64[Tensor, " batch"]:
    """Average over the marked tokens of each response; NaN where none is marked."""
    total = torch.where(mask, values, 0.0).sum(1).double()
    return total / mask.sum(1)


def _of_competing(figure: Callable[[Tensor], float], credit: Credit) -> Float64[Tensor, " batch"]:
    """Compute a figure of the weights that compete in each response; NaN without a positive weight."""
    found = []
    for weights, is_scored in zip(credit.weights, credit.scored, strict=True):
        competing = weights[is_scored]
        has_weight = bool((competing > 0).any())
        found.append(figure(competing) if has_weight else math.nan)
    return torch.tensor(found, dtype=torch.float64)


# The result ---------------------------------------------------------------------------------------------


def _row(run: _Run, name: str, *, seed: int, resamples: int) -> RuleAuc:
    """Average the figures of one setting over the responses."""
    groups = torch.tensor(run.groups, dtype=torch.int64)
    auc = run.of_response("auc", name)
    auc_others = run.of_response("auc_others", name)
    against_detours = mean_over_problems(auc, groups, seed=seed, resamples=resamples)
    against_others = mean_over_problems(auc_others, groups, seed=seed, resamples=resamples)
    return RuleAuc(
        rule=name,
        auc=against_detours.value,
        low=against_detours.low,
        high=against_detours.high,
        n=against_detours.n,
        auc_others=against_others.value,
        low_others=against_others.low,
        high_others=against_others.high,
        n_others=against_others.n,
        end_weight=_known_mean(run.of_response("end_weight", name)),
        opener_weight=_known_mean(run.of_response("opener_weight", name)),
        unanchored_failures=_unanchored_failures(run, name),
        gini=_known_mean(run.of_response("gini", name)),
        effective_tokens=_known_mean(run.of_response("effective_tokens", name)),
    )


def _unanchored_failures(run: _Run, name: str) -> float | None:
    """Compute the share of the failures whose answer is tied to nothing; None for rules that measure no tie."""
    if not run.has_figure("tie", name):
        return None
    is_failure = run.of_response("reward") <= 0
    if not bool(is_failure.any()):
        return None
    # The rule of the fallback, with the complete run as its batch.
    tie = run.of_response("tie", name)
    least_tie = _UNANCHORED * tie.nanmean()
    is_unanchored = tie.isnan() | (tie < least_tie)
    of_failures = is_unanchored[is_failure]
    return float(of_failures.double().mean())


def _best_graph(run: _Run, names: Sequence[str], *, seed: int, resamples: int) -> BestGraph:
    """Choose the setting with the highest AUC on one half of the problems, and measure it on the other half.

    Raises:
        TaskError: no response of the first half has both groups of tokens.
    """
    # The largest of many values is too high where it was chosen; the other half has no part in the choice.
    groups = torch.tensor(run.groups, dtype=torch.int64)
    is_choice = groups % 2 == 0
    best: str | None = None
    highest = -1.0
    for name in names:
        auc = _known_mean(run.of_response("auc", name)[is_choice])
        if auc is not None and auc > highest:
            best = name
            highest = auc
    if best is None:
        raise TaskError(
            "task: must give responses with decisive tokens and detours before a stated answer to compare graphs, got "
            f"none among {int(is_choice.sum())}; take more problems, or longer responses"
        )
    held_out = run.of_response("auc", best)[~is_choice]
    measured = mean_over_problems(held_out, groups[~is_choice], seed=seed, resamples=resamples)
    return BestGraph(
        rule=best,
        chosen_auc=highest,
        auc=measured.value,
        low=measured.low,
        high=measured.high,
        n=measured.n,
        num_graphs=len(names),
    )


def _known_mean(values: Float64[Tensor, " batch"]) -> float | None:
    """Average the values that are not NaN; None without any."""
    known = values[~values.isnan()]
    if len(known) == 0:
        return None
    return float(known.mean())


def _check_counts(**counts: int) -> None:
    """Check that every argument is an integer of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: must be an integer of at least 1, got {value!r}; see rl.credit_auc")


def _shown(value: float | None) -> str:
    """Format an AUC for a line of text."""
    return "-" if value is None else f"{value:.2f}"
