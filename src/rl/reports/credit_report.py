"""The token-credit report: one HTML page for a rollout, what each token was worth in right and in wrong answers.

The page is rendered by :func:`flowgraph.render_page`: it makes no request, opens from disk and treats token text as
data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import InvalidInputError, atomic_write, render_page
from rl.config import flattened
from rl.records import Experience, Responses
from rl.rollouts.rollout_file import PathLike, Tokens, load_rollout

PAGE_SCHEMA = "flowgraph-credit-report/1"
_BINS = 30


@dataclass(frozen=True, eq=False)
class _Quantity:
    """One number per token, and how the page colours it."""

    name: str
    note: str
    scale: str  # "signed" about a centre, "ratio" (logarithmic about 1), "root", "linear" or "falling" from 0
    values: Float[Tensor, "batch response"]
    where: Bool[Tensor, "batch response"]  # tokens that have this number
    centre: float = 0.0

    def described(self) -> dict[str, Any]:
        """Name, note and scale; full colour from the 99th percentile, so that one outlier does not pale the rest."""
        values = self.values[self.where].double()
        values = values[torch.isfinite(values)]
        if self.scale == "ratio":
            values = values.clamp(min=1e-6).log()
        sizes = (values - self.centre).abs()
        size = sizes.numel()
        bound = float(sizes.kthvalue(math.ceil(0.99 * size)).values) if size else 0.0
        exceeded = [bool((side > bound).any()) for side in (self.centre - values, values - self.centre)] if size else []
        rest = {"centre": self.centre, "bound": _short(bound), "exceeded": exceeded or [False, False]}
        return {"name": self.name, "note": self.note, "scale": self.scale, **rest}


def report_payload(
    experience: Experience,
    tokens: Tokens,
    *,
    ratio: Float[Tensor, "batch response"] | None = None,
    title: str = "Token credit",
    subtitle: str = "",
    settings: Mapping[str, Any] | None = None,
    groups: Sequence[int] | None = None,
    right_at: float = 1.0,
) -> dict[str, Any]:
    """All that the page shows, as plain JSON values in the schema ``flowgraph-credit-report/1``.

    Args:
        experience: the rollout.
        tokens: B lists of R readable token strings; see :func:`token_texts`.
        ratio: ``[B, R]`` new over old probability of each token, where an update has measured it.
        title: heading of the page.
        subtitle: line below it, such as model, task and step.
        settings: how the rollout was made; nested mappings are flattened.
        groups: numbers of the prompt groups to show, all of them by default; the summary is of those shown.
        right_at: a response counts as right from this reward on.

    Returns:
        Summary, scales and per group its responses, the best rewarded first. Numbers have four digits and are None
        where they are not finite; padding at the end of a response is counted, not listed.

    Raises:
        InvalidInputError: tokens or ratio of another shape, or an unknown group.
    """
    shape = tuple(experience.responses.response_mask.shape)
    lengths = sorted({len(row) for row in tokens})
    if shape[0] == 0 or len(tokens) != shape[0] or lengths != [shape[1]]:
        raise InvalidInputError(
            f"tokens: must be {shape[0]} lists of {shape[1]} strings for at least one response, got {len(tokens)} "
            f"lists of {lengths}; pass token_texts(tokenizer, input_ids[:, prompt_length:])"
        )
    if ratio is not None and tuple(ratio.shape) != shape:
        raise InvalidInputError(f"ratio: must have shape {shape}, got {tuple(ratio.shape)}; give one per token")
    numbers = experience.responses.groups.tolist()
    if groups is not None:
        unknown = [number for number in groups if number not in numbers]
        if unknown or not groups:
            raise InvalidInputError(
                f"groups: must name groups of this rollout, got {list(groups)!r}; there are {sorted(set(numbers))}"
            )
        rows = [row for row, number in enumerate(numbers) if number in groups]
        experience, tokens = experience.select(rows), [tokens[row] for row in rows]
        ratio = None if ratio is None else ratio[rows]
    quantities = list(_quantities(experience, ratio))
    shown = [_response(experience, tokens, quantities, row, right_at) for row in range(len(tokens))]
    return {
        "schema": PAGE_SCHEMA,
        "title": title,
        "subtitle": subtitle,
        "settings": [[name, _said(value)] for name, value in flattened(settings or {}).items()],
        "right_at": right_at,
        "quantities": [quantity.described() for quantity in quantities],
        "summary": _summary(experience, right_at),
        "groups": list(_groups(experience.responses, shown)),
    }


def write_report(path: PathLike, experience: Experience, tokens: Tokens, **options: Any) -> Path:
    """Write the report of a rollout as one HTML page, atomically.

    Args:
        path: of the page.
        experience: the rollout.
        tokens: B lists of R readable token strings; see :func:`token_texts`.
        **options: of :func:`report_payload`: ratio, title, subtitle, settings, groups, right_at.

    Raises:
        InvalidInputError: as there.
        OutputError: the path cannot be written.

    Cost: about 80 bytes per token and quantity shown, 10 at most.
    """
    page = render_report(report_payload(experience, tokens, **options)).encode("utf-8", "replace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def report_file(source: PathLike, out: PathLike) -> Path:
    """Make the page of a rollout file.

    Raises:
        CheckpointError: no rollout file.
        OutputError: the page cannot be written.
    """
    rollout = load_rollout(source)
    info = dict(rollout.info)
    title = f"Token credit, step {info.pop('step', '?')}"
    subtitle = ", ".join(str(info.pop(name)) for name in ("model", "task") if name in info)
    return write_report(
        out, rollout.experience, rollout.tokens, ratio=rollout.ratio, title=title, subtitle=subtitle, settings=info
    )


def render_report(payload: Mapping[str, Any]) -> str:
    """Render the page of a payload of :func:`report_payload`."""
    return render_page(
        _asset("credit_report.html.jinja"),
        styles=[_asset("credit_report.css")],
        scripts=[_asset("credit_report.js")],
        data_id="rollout",
        page_data={name: payload[name] for name in ("quantities", "groups", "right_at")},
        page=payload,
        number=_three_digits,
    )


def _asset(name: str) -> str:
    """Read a file that stands beside this module."""
    return (files(str(__package__)) / name).read_text(encoding="utf-8")


def _three_digits(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3g}"


def _quantities(experience: Experience, ratio: Tensor | None) -> Iterator[_Quantity]:
    scores, credit, chosen = experience.scores, experience.credit, experience.responses.response_mask
    scored, weights = credit.scored, experience.policy_weights
    yield _Quantity("weight", "1 changes nothing", "signed", credit.weights, scored, 1.0)
    yield _Quantity("score", "what the rule gave (flow: throughput)", "root", credit.scores, scored)
    yield _Quantity("advantage", "before the weight", "signed", experience.advantages, chosen)
    product, update = "advantage \N{MULTIPLICATION SIGN} weight", experience.advantages * weights
    yield _Quantity(product, "what enters the policy loss", "signed", update, chosen)
    if not torch.equal(weights[chosen], credit.weights[chosen]):
        yield _Quantity("loss weight", "weight of the policy loss itself", "signed", weights, chosen, 1.0)
    if ratio is not None:
        yield _Quantity("ratio", "new over old probability", "ratio", ratio, chosen)
    yield _Quantity("entropy", "of the distribution it was drawn from, in nats", "linear", scores.entropy, chosen)
    yield _Quantity("log-probability", "under the policy that wrote it", "falling", scores.logprobs, chosen)
    if scores.ref_logprobs is not None:
        kl = scores.logprobs - scores.ref_logprobs
        yield _Quantity("KL to the reference", "log-probability minus the reference's (k1)", "signed", kl, chosen)
    if scores.values is not None:
        yield _Quantity("value", "the critic's, before the token", "signed", scores.values, chosen)
    if experience.returns is not None:
        yield _Quantity("return", "the critic's target", "signed", experience.returns, chosen)


def _response(
    experience: Experience, tokens: Tokens, quantities: Sequence[_Quantity], row: int, right_at: float
) -> dict[str, Any]:
    responses, chosen = experience.responses, experience.responses.response_mask[row]
    length = int(chosen.nonzero().max()) + 1 if bool(chosen.any()) else 0
    masks = [chosen, experience.credit.scored[row], responses.answer_in_response[row], experience.loss_mask[row]]
    if responses.oracle is not None:
        masks.append(responses.oracle[row])
    flags = sum(mask[:length].long() << bit for bit, mask in enumerate(masks))
    reward = float(responses.rewards[row])
    return {
        "row": row,
        "reward": _short(reward),
        "right": reward >= right_at,
        "truncated": bool(responses.truncated[row]),
        "in_loss": bool(masks[3].any()),
        "padding": chosen.numel() - length,
        "tokens": list(tokens[row][:length]),
        "flags": torch.as_tensor(flags).tolist(),  # bits: chosen, scored, answer, in the loss, known to be decisive
        "numbers": [
            [_short(value) if has else None for value, has in zip(values, where, strict=True)]
            for values, where in ((q.values[row, :length].tolist(), q.where[row, :length].tolist()) for q in quantities)
        ],
    }


def _groups(responses: Responses, shown: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    numbers = responses.groups.tolist()
    for number in dict.fromkeys(numbers):
        rows = [row for row, group in enumerate(numbers) if group == number]
        sample, rewards = responses.samples[rows[0]], responses.rewards[rows]
        prompt = [["", sample.prompt]] if isinstance(sample.prompt, str) else sample.prompt
        yield {
            "group": number,
            "problem": sample.index,
            "prompt": [
                [str(part.get("role", "")), str(part.get("content", ""))] if isinstance(part, Mapping) else part
                for part in prompt
            ],
            "answer": sample.answer,
            "same_reward": bool((rewards == rewards[0]).all()),
            "responses": [shown[row] for row in sorted(rows, key=lambda row: -float(responses.rewards[row]))],
        }


def _summary(experience: Experience, right_at: float) -> dict[str, Any]:
    responses, scored = experience.responses, experience.credit.scored
    rewards, numbers = responses.rewards.double(), responses.groups
    groups = [rewards[numbers == number] for number in numbers.unique()]
    weights, in_loss = experience.credit.weights.double(), experience.loss_mask
    means = (weights * scored).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    raised = (weights > means + 1e-6 * means.abs()) & scored  # float32 weights that are all equal raise none
    return {
        "num_groups": len(groups),
        "num_responses": responses.num_sequences,
        "num_tokens": int(responses.response_mask.sum()),
        "num_scored": int(scored.sum()),
        "reward": _short(float(rewards.mean())),
        "right": _short(float((rewards >= right_at).double().mean())),
        "truncated": _short(float(responses.truncated.double().mean())),
        "without_variance": _short(sum(bool((group == group[0]).all()) for group in groups) / len(groups)),
        "weight": _mean(weights, scored),
        "loss_weight": _mean(experience.policy_weights.double(), in_loss),
        "selected": _mean(raised.double(), scored),
        "histogram": _histogram(weights[scored]),
    }


def _mean(values: Tensor, mask: Tensor) -> float | None:
    return _short(float(values[mask].mean())) if bool(mask.any()) else None


def _histogram(weights: Float[Tensor, " tokens"]) -> dict[str, Any]:
    weights = weights[torch.isfinite(weights)]
    low, high = min(0.0, *weights.tolist(), 0.0), max(1.0, *weights.tolist(), 1.0)
    counts = torch.histc(weights, _BINS, low, high) if weights.numel() else torch.zeros(_BINS)
    return {"low": _short(low), "high": _short(high), "counts": [int(count) for count in counts]}


def _short(value: float) -> float | None:
    """Four significant digits; None where there is no number to show. Whole numbers are shorter without a point."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def _said(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
