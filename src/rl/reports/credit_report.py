"""The token-credit report: one HTML page that shows the credit of every token of a rollout.

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
from rl.records import Credit, Experience, Responses
from rl.rollouts.rollout_file import PathLike, Tokens, load_rollout

PAGE_SCHEMA = "flowgraph-credit-report/1"
_BINS = 30
"""Bars of the histogram of weights."""
_FULL_COLOUR = 0.99
"""Quantile of the sizes that gets the full colour, so that one outlier does not make all others pale."""


@dataclass(frozen=True, eq=False)
class _Quantity:
    """One number per token, and how the page colours it.

    Attributes:
        name: in the menu of the page.
        note: what it means.
        scale: "signed" about the centre, "ratio" (logarithmic about 1), or "root", "linear" and "falling" from 0.
        values: ``[B, R]``, the numbers.
        mask: ``[B, R]``, the tokens that have this number.
        centre: value without colour.
    """

    name: str
    note: str
    scale: str
    values: Float[Tensor, "batch response"]
    mask: Bool[Tensor, "batch response"]
    centre: float = 0.0

    def described(self) -> dict[str, Any]:
        """Return name, note, scale, ``bound`` (full colour from here on) and ``exceeded`` (below, above)."""
        values = self.values[self.mask].double()
        values = values[torch.isfinite(values)]
        if self.scale == "ratio":
            values = values.clamp(min=1e-6).log()

        # The bound is a quantile of the distances from the centre.
        bound = 0.0
        below = False
        above = False
        if values.numel():
            deviations = values - self.centre
            sizes = deviations.abs()
            rank = math.ceil(_FULL_COLOUR * sizes.numel())
            bound = float(sizes.kthvalue(rank).values)
            below = bool((deviations < -bound).any())
            above = bool((deviations > bound).any())
        return {
            "name": self.name,
            "note": self.note,
            "scale": self.scale,
            "centre": self.centre,
            "bound": _short(bound),
            "exceeded": [below, above],
        }


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
    others: Mapping[str, Credit] | None = None,
) -> dict[str, Any]:
    """Collect all that the page shows, as plain JSON values in the schema ``flowgraph-credit-report/1``.

    Args:
        experience: the rollout.
        tokens: B lists of R readable token strings; see :func:`token_texts`.
        ratio: ``[B, R]`` new over old probability of each token, where an update has measured it.
        title: heading of the page.
        subtitle: line below it, such as model, task and step.
        settings: how the rollout was made; nested mappings are flattened.
        groups: numbers of the prompt groups to show, all of them by default; the summary is of those shown.
        right_at: a response counts as right from this reward on.
        others: credit of the same tokens under other settings, by name; their weights are further numbers of the page.

    Returns:
        Summary, scales and per group its responses, the best rewarded first. Numbers have four digits and are None
        where they are not finite; padding at the end of a response is counted, not listed.

    Raises:
        InvalidInputError: tokens or ratio of another shape, or an unknown group.
    """
    shape = tuple(experience.responses.response_mask.shape)
    num_responses, num_columns = shape
    lengths = sorted({len(row) for row in tokens})
    if num_responses == 0 or len(tokens) != num_responses or lengths != [num_columns]:
        raise InvalidInputError(
            f"tokens: must be {num_responses} lists of {num_columns} strings for at least one response, "
            f"got {len(tokens)} lists of {lengths}; pass token_texts(tokenizer, input_ids[:, prompt_length:])"
        )
    if ratio is not None and tuple(ratio.shape) != shape:
        raise InvalidInputError(f"ratio: must have shape {shape}, got {tuple(ratio.shape)}; give one per token")

    # Everything that follows is about the groups that are shown.
    numbers = experience.responses.groups.tolist()
    others = others or {}
    if groups is not None:
        unknown = [number for number in groups if number not in numbers]
        if unknown or not groups:
            raise InvalidInputError(
                f"groups: must name groups of this rollout, got {list(groups)!r}; there are {sorted(set(numbers))}"
            )
        rows = [row for row, number in enumerate(numbers) if number in groups]
        experience = experience.select(rows)
        tokens = [tokens[row] for row in rows]
        if ratio is not None:
            ratio = ratio[rows]
        others = {name: credit.select(rows) for name, credit in others.items()}

    # The numbers of the rollout itself, then the weights of the other settings.
    quantities = list(_quantities(experience, ratio))
    for name, credit in others.items():
        note = "what this rule would give; 1 changes nothing"
        quantities.append(_Quantity(f"weight by {name}", note, "signed", credit.weights, credit.scored, 1.0))
    shown = [_response(experience, tokens, quantities, row, right_at) for row in range(len(tokens))]
    return {
        "schema": PAGE_SCHEMA,
        "title": title,
        "subtitle": subtitle,
        "settings": [[name, _as_text(value)] for name, value in flattened(settings or {}).items()],
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
        **options: of :func:`report_payload`: ratio, title, subtitle, settings, groups, right_at, others.

    Raises:
        InvalidInputError: as there.
        OutputError: the path cannot be written.

    Cost: about 80 bytes per token and quantity shown, 10 at most and one for each of ``others``.
    """
    payload = report_payload(experience, tokens, **options)
    # Half of a surrogate pair, which a token can decode to, has no UTF-8 form.
    page = render_report(payload).encode("utf-8", "replace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def report_file(source: PathLike, out: PathLike, *, others: Mapping[str, Credit] | None = None) -> Path:
    """Make the page of a rollout file.

    Args:
        source: the rollout file.
        out: of the page.
        others: as in :func:`report_payload`.

    Raises:
        CheckpointError: not a rollout file.
        OutputError: the page cannot be written.
    """
    rollout = load_rollout(source)
    info = dict(rollout.info)
    title = f"Token credit, step {info.pop('step', '?')}"
    # What the heading names is not repeated among the settings.
    named = []
    for name in ("model", "task"):
        if name in info:
            named.append(str(info.pop(name)))
    return write_report(
        out,
        rollout.experience,
        rollout.tokens,
        ratio=rollout.ratio,
        title=title,
        subtitle=", ".join(named),
        settings=info,
        others=others,
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
    """Read a file beside this module."""
    return (files(str(__package__)) / name).read_text(encoding="utf-8")


def _three_digits(value: float | None) -> str:
    """Format a number with three digits, or a dash if it is missing."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.3g}"


def _quantities(experience: Experience, ratio: Tensor | None) -> Iterator[_Quantity]:
    """Yield the numbers that this rollout has for its tokens, in the order of the menu."""
    scores = experience.scores
    credit = experience.credit
    weights = experience.policy_weights
    advantages = experience.advantages
    response_mask = experience.responses.response_mask

    # From the score of the credit rule to what enters the policy loss.
    yield _Quantity("weight", "1 changes nothing", "signed", credit.weights, credit.scored, 1.0)
    yield _Quantity("score", "what the rule gave (flow: throughput)", "root", credit.scores, credit.scored)
    yield _Quantity("advantage", "before the weight", "signed", advantages, response_mask)
    product = "advantage \N{MULTIPLICATION SIGN} weight"
    yield _Quantity(product, "what enters the policy loss", "signed", advantages * weights, response_mask)
    if not torch.equal(weights[response_mask], credit.weights[response_mask]):
        yield _Quantity("loss weight", "weight of the policy loss itself", "signed", weights, response_mask, 1.0)
    if ratio is not None:
        yield _Quantity("ratio", "new over old probability", "ratio", ratio, response_mask)

    # What the policy, the reference and the critic computed for the token.
    drawn_from = "of the distribution it was drawn from, in nats"
    yield _Quantity("entropy", drawn_from, "linear", scores.entropy, response_mask)
    yield _Quantity("log-probability", "under the policy that wrote it", "falling", scores.logprobs, response_mask)
    if scores.ref_logprobs is not None:
        kl = scores.logprobs - scores.ref_logprobs
        note = "log-probability minus the reference's (k1)"
        yield _Quantity("KL to the reference", note, "signed", kl, response_mask)
    if scores.values is not None:
        yield _Quantity("value", "the critic's, before the token", "signed", scores.values, response_mask)
    if experience.returns is not None:
        yield _Quantity("return", "the critic's target", "signed", experience.returns, response_mask)


def _response(
    experience: Experience, tokens: Tokens, quantities: Sequence[_Quantity], row: int, right_at: float
) -> dict[str, Any]:
    """Return one response with its tokens, their flags and their numbers, without the padding at its end."""
    responses = experience.responses
    response_mask = responses.response_mask[row]
    length = 0
    if bool(response_mask.any()):
        length = int(response_mask.nonzero().max()) + 1

    # One list of numbers for each quantity; a token without the quantity has None.
    numbers = []
    for quantity in quantities:
        values = quantity.values[row, :length].tolist()
        mask = quantity.mask[row, :length].tolist()
        of_tokens = []
        for value, has_value in zip(values, mask, strict=True):
            of_tokens.append(_short(value) if has_value else None)
        numbers.append(of_tokens)

    reward = float(responses.rewards[row])
    return {
        "row": row,
        "reward": _short(reward),
        "right": reward >= right_at,
        "truncated": bool(responses.truncated[row]),
        "in_loss": bool(experience.loss_mask[row].any()),
        "padding": response_mask.numel() - length,
        "tokens": list(tokens[row][:length]),
        "flags": _flags(experience, row)[:length],
        "numbers": numbers,
    }


def _flags(experience: Experience, row: int) -> list[int]:
    """Return the masks of each token as bits: chosen, scored, answer, in the loss, decisive, detour."""
    # The place of a mask in this list is its bit, which the page reads. A task may mark neither of the last two.
    responses = experience.responses
    masks = [
        responses.response_mask,
        experience.credit.scored,
        responses.answer_in_response,
        experience.loss_mask,
        responses.oracle,
        responses.detours,
    ]
    flags = torch.zeros_like(responses.response_mask[row], dtype=torch.int64)
    for bit, mask in enumerate(masks):
        if mask is not None:
            flags += mask[row].long() << bit
    return flags.tolist()


def _groups(responses: Responses, shown: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every prompt with its responses, the best rewarded first."""
    # Groups in the order of the rollout. A stable sort keeps that order among equal rewards, too.
    numbers = responses.groups.tolist()
    rewards: list[float] = responses.rewards.tolist()
    for number in dict.fromkeys(numbers):
        rows = [row for row, group in enumerate(numbers) if group == number]
        best_first = sorted(rows, key=lambda row: -rewards[row])
        lowest = rewards[best_first[-1]]
        highest = rewards[best_first[0]]
        sample = responses.samples[rows[0]]
        yield {
            "group": number,
            "problem": sample.index,
            "prompt": _messages(sample.prompt),
            "answer": sample.answer,
            "same_reward": lowest == highest,
            "responses": [shown[row] for row in best_first],
        }


def _messages(prompt: Any) -> list[Any]:
    """Return a prompt as pairs of role and text; a plain text has one pair with an empty role."""
    if isinstance(prompt, str):
        return [["", prompt]]
    messages = []
    for message in prompt:
        if isinstance(message, Mapping):
            messages.append([str(message.get("role", "")), str(message.get("content", ""))])
        else:
            messages.append(message)
    return messages


def _summary(experience: Experience, right_at: float) -> dict[str, Any]:
    """Compute the figures at the top of the page."""
    responses = experience.responses
    scored = experience.credit.scored
    weights = experience.credit.weights.double()
    rewards = responses.rewards.double()

    # A group without variance of the reward has no advantage, hence no gradient.
    groups = [rewards[responses.groups == number] for number in responses.groups.unique()]
    num_constant = sum(bool((group == group[0]).all()) for group in groups)

    # A token is selected if its weight is above the mean of its response. The tolerance is for float32 weights that
    # are all equal: their mean may be a rounding below them.
    num_scored = scored.sum(1, keepdim=True).clamp(min=1)
    mean_weight = (weights * scored).sum(1, keepdim=True) / num_scored
    tolerance = 1e-6 * mean_weight.abs()
    selected = (weights > mean_weight + tolerance) & scored

    is_right = (rewards >= right_at).double()
    is_truncated = responses.truncated.double()
    return {
        "num_groups": len(groups),
        "num_responses": responses.num_sequences,
        "num_tokens": int(responses.response_mask.sum()),
        "num_scored": int(scored.sum()),
        "reward": _short(float(rewards.mean())),
        "right": _short(float(is_right.mean())),
        "truncated": _short(float(is_truncated.mean())),
        "without_variance": _short(num_constant / len(groups)),
        "weight": _mean(weights, scored),
        "loss_weight": _mean(experience.policy_weights.double(), experience.loss_mask),
        "selected": _mean(selected.double(), scored),
        "histogram": _histogram(weights[scored]),
    }


def _mean(values: Tensor, mask: Tensor) -> float | None:
    """Average the values in a mask; None for an empty mask."""
    if not bool(mask.any()):
        return None
    return _short(float(values[mask].mean()))


def _histogram(weights: Float[Tensor, " tokens"]) -> dict[str, Any]:
    """Count the finite weights in bins of equal width, over a range that contains 0 and 1."""
    weights = weights[torch.isfinite(weights)]
    values: list[float] = weights.tolist()
    low = min([0.0, *values])
    high = max([1.0, *values])
    # Without weights, all counts stay 0.
    counts = torch.zeros(_BINS, dtype=torch.float32)
    if weights.numel():
        counts = torch.histc(weights, _BINS, low, high)
    return {
        "low": _short(low),
        "high": _short(high),
        "counts": [int(count) for count in counts],
    }


def _short(value: float) -> float | None:
    """Round to four significant digits, without a point if the result is an integer; None if it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    if short.is_integer():
        return int(short)
    return short


def _as_text(value: Any) -> str:
    """Write a setting as text."""
    if value is None:
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
