r"""The statistics of gradient alignment: from inner products of gradients to sample multipliers with intervals.

n batches. :math:`u_b` is the plain policy gradient of batch b, :math:`g_b` that of an arm on the same responses. All
that is reported is a function of the inner products :math:`\langle g_b, u_c \rangle` and the norms :math:`|g_b|`, so
each estimate can be computed again without any one batch.
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

from flowgraph import atomic_write
from rl.config import CreditConfig
from rl.evaluation.significance import Z_95, holm

SCHEMA = "flowgraph-rl.alignment/1"
UNIFORM = "uniform"

_SAME = 1e-6
"""Differences between multipliers below this are rounding of float32 gradients, not findings."""


class Estimate(NamedTuple):
    """A figure with its jackknife interval.

    Attributes:
        value: on all batches.
        corrected: the same without the bias of first order in 1 / n.
        error: standard error.
        low, high: 95 % interval, ``corrected`` plus or minus 1.96 errors.
    """

    value: float
    corrected: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmAlignment:
    """What one credit setting does to the policy gradient.

    Attributes:
        name: of the arm.
        credit: its settings.
        cosine: with the mean uniform gradient of the other batches, mean over batches.
        multiplier: sample multiplier ``(cosine / cosine of uniform) ** 2``, negative where the cosines differ in sign.
        signal_share: part of the true gradient's signal that the selected tokens carry; None where none are selected.
        token_share: part of the tokens that are selected: the signal share to expect from tokens drawn by chance.
        only_selected: multiplier of the uniform gradient of the selected tokens alone.
        only_rest: multiplier of the uniform gradient of all other tokens.
        recall: part of the decisive tokens in scope that is selected; None where the task knows none.
        recall_chance: the recall to expect when as many tokens of each response are drawn by chance.
    """

    name: str
    credit: CreditConfig
    cosine: Estimate
    multiplier: Estimate
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
        arm, baseline: names.
        difference: with its interval.
        p_value: two-sided, normal.
        p_holm: the same after Holm's correction for all comparisons of the experiment.
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
        num_batches: batches that taught something.
        no_signal: batches that were left out because no response had an advantage.
        num_parameters: length of the gradients.
        reward: mean over all responses.
        response_tokens: mean length of a response.
        seconds: by stage.
        model, task: what was measured.
        settings: of the rollouts.
        seed: of rollouts, adapter and rules that draw.
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
        """Whether the cosine of uniform lies above 0 with its whole interval: multipliers are ratios to it."""
        return self.arms[0].cosine.low > 0

    def table(self) -> list[dict[str, Any]]:
        """A flat row for each arm; estimates are the corrected ones, None where there is nothing to say."""
        rows = []
        for arm in self.arms:
            row: dict[str, Any] = {"arm": arm.name, "cosine": arm.cosine.corrected}
            row |= {"multiplier": arm.multiplier.corrected, "low": arm.multiplier.low, "high": arm.multiplier.high}
            for name in ("signal_share", "only_selected", "only_rest"):
                estimate = getattr(arm, name)
                row[name] = None if estimate is None else estimate.corrected
            row |= {"token_share": arm.token_share, "recall": arm.recall, "recall_chance": arm.recall_chance}
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain JSON values; NaN and infinity become None."""
        return _plain({"schema": SCHEMA, "reliable": self.is_reliable, **asdict(self)})

    def to_json(self, path: str | PathLike[str] | None = None) -> str | None:
        """Write :meth:`to_dict` to a JSON file, atomically.

        Args:
            path: the file. Without it the text is returned, with a warning; removed in the next release.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is None:
            message = "path: must be given, got none; call to_json(path) to write a file, to_dict() for the values"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return text
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return None

    def __repr__(self) -> str:
        found = ", ".join(f"{arm.name} {arm.multiplier.corrected:.2f}" for arm in self.arms)
        return f"Alignment({found}; {self.num_batches} batches)"


class Products(NamedTuple):
    r"""Inner products of one kind of gradient with the uniform gradients of all batches.

    Attributes:
        dots: ``[n, n]``, entry (b, c) is :math:`\langle g_b, u_c \rangle`.
        norms: ``[n]``, :math:`|g_b|`.
    """

    dots: Float64[Tensor, "batches batches"]
    norms: Float64[Tensor, " batches"]


def cosines(arm: Products, uniform: Products) -> Float64[Tensor, " replicates"]:
    r"""Mean cosine with the leave-one-out mean, on all batches and without each of them.

    :math:`\frac1n \sum_b \cos(g_b, \sum_{c \ne b} u_c)` first, then n values with batch d left out of both sums. A
    gradient of exactly 0 has cosine 0: it teaches nothing.

    Args:
        arm: of the arm's gradients.
        uniform: of the uniform gradients.

    Returns:
        ``[1 + n]``.

    Cost: three products of matrices of n rows.
    """
    keep = _replicates(len(arm.norms))
    gram = uniform.dots
    squares = ((keep @ gram) * keep).sum(1, keepdim=True) - 2 * keep @ gram + gram.diagonal()
    lengths = squares.clamp_min(0).sqrt() * arm.norms
    along = keep @ arm.dots.T - arm.dots.diagonal()
    each = torch.where(lengths > 0, along / torch.where(lengths > 0, lengths, 1.0), 0.0)
    return (each * keep).sum(1) / keep.sum(1)


def multipliers(
    arm: Float64[Tensor, " replicates"], uniform: Float64[Tensor, " replicates"]
) -> Float64[Tensor, " replicates"]:
    r"""Sample multiplier :math:`r\,|r|` with :math:`r = \cos / \cos_{uniform}`: the square, with the sign kept.

    The squared cosine of a noisy gradient with the true one grows in proportion to the number of samples while noise
    dominates, so 1.1 is as good as 10 % more rollouts.
    """
    ratio = arm / uniform
    return ratio * ratio.abs()


def signal_shares(part: Products, uniform: Products) -> Float64[Tensor, " replicates"]:
    r"""Part of the true gradient's signal: :math:`\sum_b \langle s_b, T_b \rangle / \sum_b \langle u_b, T_b \rangle`.

    :math:`T_b = \sum_{c \ne b} u_c`, so no batch is its own witness. On all batches, then without each of them.
    """

    def along(products: Products) -> Tensor:
        return ((keep @ products.dots.T - products.dots.diagonal()) * keep).sum(1)

    keep = _replicates(len(part.norms))
    return along(part) / along(uniform)


def jackknife(replicates: Float64[Tensor, " replicates"]) -> Estimate:
    r"""Estimate from its value on all n batches and its n values :math:`\theta_{(d)}` without one of them.

    Corrected :math:`n \theta - (n - 1) \bar\theta_{(\cdot)}`; error
    :math:`\sqrt{\frac{n - 1}{n} \sum_d (\theta_{(d)} - \bar\theta_{(\cdot)})^2}`.

    Args:
        replicates: ``[1 + n]``.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.

    Example:
        >>> jackknife(torch.tensor([2.0, 2.5, 2.0, 1.5], dtype=torch.float64)).error.__round__(4)  # mean of 1, 2, 3
        0.5774
    """
    value, deleted = float(replicates[0]), replicates[1:]
    n = len(deleted)
    mean = deleted.mean()
    corrected = n * value - (n - 1) * float(mean)
    error = math.sqrt((n - 1) / n * float((deleted - mean).square().sum()))
    return Estimate(value, corrected, error, corrected - Z_95 * error, corrected + Z_95 * error)


def two_sided(difference: Estimate) -> float:
    """Normal p-value of a difference; 1 where it is no more than rounding."""
    if abs(difference.value) <= _SAME:
        return 1.0
    return math.erfc(abs(difference.corrected) / difference.error / math.sqrt(2)) if difference.error > 0 else 0.0


def compare(multiplier: dict[str, Float64[Tensor, " replicates"]], baselines: Sequence[str]) -> tuple[Difference, ...]:
    """Every arm against every baseline, corrected together.

    Args:
        multiplier: replicates by arm.
        baselines: names of arms.
    """
    pairs = [
        (arm, base)
        for place, base in enumerate(baselines)
        for arm in multiplier
        if arm != base and arm not in baselines[:place]  # two baselines are one comparison, not two
    ]
    found = [jackknife(multiplier[arm] - multiplier[base]) for arm, base in pairs]
    p_values = [two_sided(difference) for difference in found]
    return tuple(
        Difference(*pair, difference, p, adjusted)
        for pair, difference, p, adjusted in zip(pairs, found, p_values, holm(p_values), strict=True)
    )


def _replicates(n: int) -> Float64[Tensor, "replicates batches"]:
    """Which batches each replicate sees: all of them, then all but one."""
    return torch.cat([torch.ones(1, n, dtype=torch.float64), 1 - torch.eye(n, dtype=torch.float64)])


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
