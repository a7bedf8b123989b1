r"""Compute sample multipliers with jackknife intervals from inner products of policy gradients.

Symbols: n batches; :math:`u_b` is the uniform policy gradient of batch b, :math:`g_b` that of an arm on the same
responses. Every reported figure is a function of the inner products :math:`\langle g_b, u_c \rangle` and the norms
:math:`|g_b|`. The jackknife can therefore leave out any batch without computing a gradient again.

A *replicate* is the value of a statistic on a subset of the batches. Tensors ``[1 + n]`` hold the replicate of all
batches first, then the n replicates with batch d left out.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from flowgraph import atomic_write, holm
from rl.config import CreditConfig
from rl.evaluation.significance import Z_95

SCHEMA = "flowgraph-rl.alignment/1"
UNIFORM = "uniform"

_ROUNDING = 1e-6
"""Differences between multipliers up to this size come from the rounding of float32 gradients."""


class Estimate(NamedTuple):
    """A figure with its jackknife interval.

    Attributes:
        value: the figure on all batches.
        corrected: the figure without its bias of first order in 1 / n.
        error: standard error.
        low: lower end of the 95 % interval, ``corrected - 1.96 * error``.
        high: upper end of the 95 % interval, ``corrected + 1.96 * error``.
    """

    value: float
    corrected: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmAlignment:
    """The effect of one credit setting on the policy gradient.

    Attributes:
        name: the arm as a short text.
        credit: its settings.
        cosine: cosine with the mean uniform gradient of the other batches, averaged over batches.
        multiplier: sample multiplier ``(cosine / cosine of uniform) ** 2``, negative where the cosines differ in sign.
        decisive_multiplier: the same ratio with signal and noise measured along the score functions of the decisive
            tokens alone, see :func:`projected_cosines`; None where the batches hold no, or too few, decisive tokens.
        signal_share: share of the true gradient's signal that the selected tokens carry; None without selected tokens.
        token_share: share of the tokens that are selected; tokens drawn at random have this signal share.
        only_selected: multiplier of the uniform gradient of the selected tokens alone; None without selected tokens.
        only_rest: multiplier of the uniform gradient of all other tokens; None without selected tokens.
        recall: share of the decisive tokens in scope that is selected; None where the task names no decisive tokens.
        recall_chance: expected recall when as many tokens of each response are drawn at random.
    """

    name: str
    credit: CreditConfig
    cosine: Estimate
    multiplier: Estimate
    decisive_multiplier: Estimate | None
    signal_share: Estimate | None
    token_share: float
    only_selected: Estimate | None
    only_rest: Estimate | None
    recall: float | None
    recall_chance: float | None


@dataclass(frozen=True)
class Difference:
    """Multiplier of an arm minus that of a baseline, on the same batches.

    Attributes:
        arm: name of the arm.
        baseline: name of the baseline.
        difference: the difference with its interval.
        p_value: two-sided p-value under a normal distribution.
        p_holm: the p-value after Holm's correction over all comparisons of the experiment.
    """

    arm: str
    baseline: str
    difference: Estimate
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class Alignment:
    """Result of :func:`rl.alignment.align.align`.

    Attributes:
        arms: one record for each arm, uniform first.
        differences: of every arm and every baseline.
        num_batches: batches that were measured.
        no_signal: batches that were left out because no response had an advantage.
        num_parameters: length P of the gradients.
        reward: mean over all responses.
        response_tokens: mean length of a response, in tokens.
        seconds: wall time of each stage.
        model: name of the model.
        task: the task as text.
        settings: settings of the rollouts, as JSON values.
        seed: seed of rollouts, adapter and rules that draw random numbers.
    """

    arms: tuple[ArmAlignment, ...]
    differences: tuple[Difference, ...]
    num_batches: int
    no_signal: int
    num_parameters: int
    reward: float
    response_tokens: float
    seconds: dict[str, float]
    model: str
    task: str
    settings: dict[str, Any]
    seed: int

    @property
    def is_reliable(self) -> bool:
        """Return whether the 95 % interval of uniform's cosine lies above 0.

        Multipliers are ratios to this cosine. They are not meaningful where it cannot be told from 0.
        """
        return self.arms[0].cosine.low > 0

    def table(self) -> list[dict[str, Any]]:
        """Return a flat row for each arm, with corrected estimates; None where a figure is not defined."""
        rows = []
        for arm in self.arms:
            row: dict[str, Any] = {
                "arm": arm.name,
                "cosine": arm.cosine.corrected,
                "multiplier": arm.multiplier.corrected,
                "low": arm.multiplier.low,
                "high": arm.multiplier.high,
                "decisive_multiplier": _corrected(arm.decisive_multiplier),
                "signal_share": _corrected(arm.signal_share),
                "only_selected": _corrected(arm.only_selected),
                "only_rest": _corrected(arm.only_rest),
                "token_share": arm.token_share,
                "recall": arm.recall,
                "recall_chance": arm.recall_chance,
            }
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain JSON values; NaN and infinity become None."""
        return _as_json({"schema": SCHEMA, "reliable": self.is_reliable, **asdict(self)})

    def to_json(self, path: str | PathLike[str] | None = None) -> str | None:
        """Write :meth:`to_dict` to a JSON file, atomically.

        Args:
            path: the file. None returns the text with a :class:`DeprecationWarning`; the next release removes this.

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is None:
            message = "path: must be given, got None; call to_json(path) to write a file, to_dict() for the values"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return text
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return None

    def __repr__(self) -> str:
        found = ", ".join(f"{arm.name} {arm.multiplier.corrected:.2f}" for arm in self.arms)
        return f"Alignment({found}; {self.num_batches} batches)"


class Products(NamedTuple):
    r"""The inner products of one kind of gradient with the uniform gradients of all batches.

    Attributes:
        dots: ``[n, n]`` float64, entry (b, c) is :math:`\langle g_b, u_c \rangle`.
        norms: ``[n]`` float64, :math:`|g_b|`.
    """

    dots: Float64[Tensor, "batches batches"]
    norms: Float64[Tensor, " batches"]


def cosines(arm: Products, uniform: Products) -> Float64[Tensor, " replicates"]:
    r"""Compute the mean cosine with the leave-one-out sum of the uniform gradients.

    :math:`\frac1n \sum_b \cos(g_b, T_b)` with :math:`T_b = \sum_{c \ne b} u_c`. A replicate without batch d leaves
    it out of both sums. A gradient of exactly 0 has cosine 0.

    Args:
        arm: products of the arm's gradients.
        uniform: products of the uniform gradients.

    Returns:
        ``[1 + n]``, the replicates.

    Cost: three products of matrices of n rows.
    """
    keep = _kept_batches(len(arm.norms))
    gram = uniform.dots

    # |T_b|^2 = |sum_c u_c|^2 - 2 <u_b, sum_c u_c> + |u_b|^2, for every replicate (row) and batch b (column).
    with_sum = keep @ gram
    squared_sum = (with_sum * keep).sum(1, keepdim=True)
    squared_norms = gram.diagonal()
    squared_rest = squared_sum - 2 * with_sum + squared_norms

    # cos(g_b, T_b) = <g_b, T_b> / (|g_b| |T_b|).
    inner = keep @ arm.dots.T - arm.dots.diagonal()
    lengths = squared_rest.clamp_min(0).sqrt() * arm.norms
    is_defined = lengths > 0
    divisor = torch.where(is_defined, lengths, 1.0)
    cosine = torch.where(is_defined, inner / divisor, 0.0)

    # The mean over the batches of each replicate.
    num_kept = keep.sum(1)
    return (cosine * keep).sum(1) / num_kept


def projected_cosines(
    arm: Float64[Tensor, "batches probes"], uniform: Float64[Tensor, "batches probes"]
) -> Float64[Tensor, " replicates"]:
    r"""Compute the mean cosine with the leave-one-out sum in the space of the decisive tokens' score functions.

    A gradient moves the log-probability of a decisive token t by :math:`\langle g, \nabla \log \pi(y_t) \rangle`;
    noise in other directions moves none of them. With the metric :math:`M = E[\nabla \log \pi(y_t) \nabla \log
    \pi(y_t)^T]` over these tokens, the cosine is :math:`g^T M T / \sqrt{g^T M g \cdot T^T M T}`. M is estimated by
    the probes :math:`v_c = \sum_t \epsilon_t \nabla \log \pi(y_t)` over the decisive tokens of batch c with random
    signs :math:`\epsilon`, because :math:`E[v v^T]` is a multiple of M. A batch meets the probes of other batches
    only: its own tokens would count themselves.

    Args:
        arm: ``[n, n]``, entry (b, c) is :math:`\langle g_b, v_c \rangle`.
        uniform: ``[n, n]``, entry (b, c) is :math:`\langle u_b, v_c \rangle`.

    Returns:
        ``[1 + n]``, the replicates; a replicate leaves a batch out as gradient and as probe.

    Cost: ``n ** 3`` multiplications.
    """
    # A batch meets the probes of other batches only, so the diagonals are left out.
    n = len(arm)
    off_diagonal = 1 - torch.eye(n, dtype=torch.float64)
    gradients = arm * off_diagonal
    true_gradients = uniform * off_diagonal
    # A replicate drops a batch everywhere: as gradient, in the estimate of the true one, and as probe.
    values = []
    for keep in _kept_batches(n):
        # T_b along probe c: the sum over the batches d of the replicate, without b and without c.
        true_sums = keep @ true_gradients
        along = true_sums[None] - true_gradients

        # g^T M T, and the square root of g^T M g times T^T M T, with M summed over the probes of the replicate.
        inner = (gradients * along) @ keep
        gradient_square = gradients.square() @ keep
        true_square = (along * off_diagonal).square() @ keep
        length = (gradient_square * true_square).sqrt()
        is_defined = length > 0
        divisor = torch.where(is_defined, length, 1.0)
        cosine = torch.where(is_defined, inner / divisor, 0.0)

        # The mean over the batches of the replicate.
        values.append((cosine * keep).sum() / keep.sum())
    return torch.stack(values)


def multipliers(
    arm: Float64[Tensor, " replicates"], uniform: Float64[Tensor, " replicates"]
) -> Float64[Tensor, " replicates"]:
    r"""Compute the sample multiplier :math:`r\,|r|` with :math:`r = \cos / \cos_{uniform}`: the square, with its sign.

    The squared cosine of a noisy gradient with the true one grows in proportion to the number of samples while noise
    dominates. A multiplier of 1.1 is therefore worth 10 % more rollouts.

    Args:
        arm: :func:`cosines` of the arm.
        uniform: :func:`cosines` of the uniform gradients.
    """
    ratio = arm / uniform
    return ratio * ratio.abs()


def signal_shares(part: Products, uniform: Products) -> Float64[Tensor, " replicates"]:
    r"""Compute the share of the true gradient's signal that a part of the tokens carries.

    :math:`\sum_b \langle s_b, T_b \rangle / \sum_b \langle u_b, T_b \rangle` with :math:`T_b = \sum_{c \ne b} u_c`:
    the estimate of the true gradient never contains the batch that it is compared with.

    Args:
        part: products of the gradients :math:`s_b` of the selected tokens.
        uniform: products of the uniform gradients.

    Returns:
        ``[1 + n]``, the replicates.
    """
    keep = _kept_batches(len(part.norms))
    return _signal(part, keep) / _signal(uniform, keep)


def jackknife(replicates: Float64[Tensor, " replicates"]) -> Estimate:
    r"""Estimate a statistic, its bias and its error from its replicates.

    With :math:`\theta` on all n batches and :math:`\theta_{(d)}` without batch d: the corrected value is
    :math:`n \theta - (n - 1) \bar\theta_{(\cdot)}`, and the error
    :math:`\sqrt{\frac{n - 1}{n} \sum_d (\theta_{(d)} - \bar\theta_{(\cdot)})^2}`.

    Args:
        replicates: ``[1 + n]``.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.

    Example:
        >>> jackknife(torch.tensor([2.0, 2.5, 2.0, 1.5], dtype=torch.float64)).error.__round__(4)  # mean of 1, 2, 3
        0.5774
    """
    value = float(replicates[0])
    left_out = replicates[1:]
    n = len(left_out)
    mean = left_out.mean()

    # The corrected value has no bias of first order in 1 / n; the interval is built around it.
    corrected = n * value - (n - 1) * float(mean)
    squares = float((left_out - mean).square().sum())
    error = math.sqrt((n - 1) / n * squares)
    return Estimate(
        value=value,
        corrected=corrected,
        error=error,
        low=corrected - Z_95 * error,
        high=corrected + Z_95 * error,
    )


def two_sided(difference: Estimate) -> float:
    """Compute the two-sided normal p-value of a difference; 1 where it is no larger than rounding."""
    if abs(difference.value) <= _ROUNDING:
        return 1.0
    if difference.error > 0:
        z = abs(difference.corrected) / difference.error
        return math.erfc(z / math.sqrt(2))
    return 0.0


def compare(multiplier: dict[str, Float64[Tensor, " replicates"]], baselines: Sequence[str]) -> tuple[Difference, ...]:
    """Compare every arm with every baseline, with one Holm correction over all comparisons.

    Args:
        multiplier: replicates ``[1 + n]`` of the multiplier, by arm.
        baselines: names of arms.
    """
    # Two baselines are compared with each other once: a baseline is not an arm for the baselines after it.
    pairs: list[tuple[str, str]] = []
    for place, baseline in enumerate(baselines):
        already_compared = {baseline, *baselines[:place]}
        for arm in multiplier:
            if arm not in already_compared:
                pairs.append((arm, baseline))

    # The replicates of both arms leave out the same batches, so their differences are paired.
    estimates = [jackknife(multiplier[arm] - multiplier[baseline]) for arm, baseline in pairs]
    p_values = [two_sided(estimate) for estimate in estimates]
    adjusted = holm(p_values)

    differences = []
    for (arm, baseline), estimate, p_value, p_holm in zip(pairs, estimates, p_values, adjusted, strict=True):
        differences.append(Difference(arm, baseline, estimate, p_value, p_holm))
    return tuple(differences)


def _kept_batches(n: int) -> Float64[Tensor, "replicates batches"]:
    """Return which batches each replicate contains: all of them, then all but one."""
    everything = torch.ones(1, n, dtype=torch.float64)
    all_but_one = 1 - torch.eye(n, dtype=torch.float64)
    return torch.cat([everything, all_but_one])


def _signal(products: Products, keep: Float64[Tensor, "replicates batches"]) -> Float64[Tensor, " replicates"]:
    r"""Compute :math:`\sum_b \langle g_b, T_b \rangle` over the batches of each replicate."""
    inner = keep @ products.dots.T - products.dots.diagonal()
    return (inner * keep).sum(1)


def _corrected(estimate: Estimate | None) -> float | None:
    """Return the corrected value of an estimate that may be missing."""
    if estimate is None:
        return None
    return estimate.corrected


def _as_json(value: Any) -> Any:
    """Convert nested records to JSON values; NaN and infinity, which JSON has no form for, become None."""
    if isinstance(value, Estimate):
        return _as_json(value._asdict())
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
