"""The registry of token-credit rules: one interface, open to everyone.

A rule looks at a rollout and gives every response token a score, higher where the token matters more. What a score
does to the training is not the rule's business: a *shape* (``rl.credit.weights``) turns scores into weights, and the *entry
point* (advantage, reward or potential) decides where they act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRows, FlowgraphError, HeadSelector
from rl.errors import CreditError
from rl.records import Responses, TokenScores


@dataclass(frozen=True)
class AttentionNeed:
    """Attention that a rule reads: recorded during the pass that scores the old policy, at no extra forward pass.

    Attributes:
        layers: as in :func:`flowgraph.capture`; None takes the layers of the credit settings.
        heads: the same for heads.
    """

    layers: str | Sequence[int] | None = None
    heads: str | Sequence[int] | HeadSelector | None = None


@dataclass(frozen=True, eq=False)
class CreditInput:
    """All that a rule may look at: part of a rollout (one micro-batch), on the policy's device.

    Attributes:
        responses: tokens, masks, regions, rewards; see :class:`rl.records.Responses`.
        scores: log-probabilities and entropies of the policy that wrote the responses.
        scored: ``[B, R]`` bool, the tokens that compete for credit; scores elsewhere are ignored.
        rows: attention by the names under which the rule asked for it (``needs=``).
        random: a generator for each response, on the CPU; its draws are the same after a resume and however the
            batch is cut.
        gradient: call it for the norm of the policy-gradient at the input embedding of every response token,
            ``[B, R]``; one extra forward and backward pass. Only for rules registered with ``gradient=True``.
        options: the rule's own settings, from ``CreditConfig.options``.
    """

    responses: Responses
    scores: TokenScores
    scored: Bool[Tensor, "batch response"]
    rows: Mapping[str, AttentionRows] = field(default_factory=dict)
    random: Sequence[torch.Generator] = ()
    gradient: Callable[[], Float[Tensor, "batch response"]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


CreditFunction = Callable[[CreditInput], Float[Tensor, "batch response"]]


@dataclass(frozen=True)
class CreditRule:
    """A registered rule.

    Attributes:
        name: what users write.
        function: :class:`CreditInput` -> scores ``[B, R]``, float, finite, not negative.
        needs: attention to record, by name.
        gradient: whether the rule calls ``gradient``.
        needs_oracle: whether only tasks that know the decisive tokens can serve it.
        weighs: whether its scores are weights already, whatever the shape; equal scores would otherwise be ranked by
            position.
        summary: the first line of the function's docstring.
    """

    name: str
    function: CreditFunction
    needs: Mapping[str, AttentionNeed]
    gradient: bool
    needs_oracle: bool
    weighs: bool
    summary: str


_RULES: dict[str, CreditRule] = {}


def credit_rule(
    name: str,
    *,
    needs: Mapping[str, AttentionNeed] | None = None,
    gradient: bool = False,
    needs_oracle: bool = False,
    weighs: bool = False,
) -> Callable[[CreditFunction], CreditFunction]:
    """Register a function as a credit rule.

    Raises:
        CreditError: the name is taken by another function.

    Example:
        >>> @credit_rule("position")
        ... def position(batch):
        ...     '''Later tokens score higher.'''
        ...     return batch.responses.response_mask.float().cumsum(1)
        >>> find_rule("position").summary
        'Later tokens score higher.'
    """

    def register(function: CreditFunction) -> CreditFunction:
        known = _RULES.get(name)
        # A module that is loaded twice (a notebook cell, a test run) registers its own function again.
        if known is not None and _place(known.function) != _place(function):
            raise CreditError(f"name: must be new, got {name!r}, which is registered already; choose another name")
        lines = (function.__doc__ or "").strip().splitlines()
        summary = lines[0] if lines else ""
        _RULES[name] = CreditRule(name, function, dict(needs or {}), gradient, needs_oracle, weighs, summary)
        return function

    return register


def _place(function: CreditFunction) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def find_rule(name: str) -> CreditRule:
    """The rule of this name.

    Raises:
        CreditError: there is none; the message lists those that exist.
    """
    if name not in _RULES:
        raise CreditError(
            f"credit: must name a registered rule, got {name!r}; there are {', '.join(sorted(_RULES))}, and "
            "rl.credit_rule registers your own"
        )
    return _RULES[name]


def rule_names() -> list[str]:
    """Names of all registered rules."""
    return sorted(_RULES)


def score_tokens(rule: CreditRule, batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Run a rule and check what it returns; 0 outside ``scored``.

    Raises:
        CreditError: the rule raised; another shape, NaN, infinite or negative scores; a missing oracle.
    """
    if rule.needs_oracle and batch.responses.oracle is None:
        raise CreditError(
            f"credit: rule {rule.name!r} needs a task that knows its decisive tokens, got one that does not; "
            "use the task 'chain', or another rule"
        )
    try:
        scores = rule.function(batch)
    except FlowgraphError:
        raise
    except Exception as error:  # a rule is someone's code: say whose
        raise CreditError(
            f"credit: rule {rule.name!r} must serve every rollout, got {type(error).__name__}: {error}; mend the rule"
        ) from error
    shape = tuple(batch.scored.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise CreditError(
            f"credit: rule {rule.name!r} must return a tensor of shape {shape} (responses, tokens), got {got}; "
            "score every response token, 0 where there is nothing to say"
        )
    scores = torch.where(batch.scored, scores.detach().float().to(batch.scored.device), 0.0)
    wrong = ~torch.isfinite(scores) | (scores < 0)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise CreditError(
            f"credit: rule {rule.name!r} must return finite scores of at least 0, got {float(scores[row, column])} for "
            f"token {column} of response {row}; map them to a non-negative range (exp, abs, clamp)"
        )
    return scores


def recorded(batch: CreditInput, name: str) -> AttentionRows:
    """The attention that a rule asked for under this name.

    Raises:
        CreditError: it was not recorded, or for other tokens.
    """
    if name not in batch.rows:
        raise CreditError(
            f"rows: must hold the attention {name!r} that this rule reads, got {sorted(batch.rows)}; record what "
            "find_rule(...).needs lists and pass it under the same names"
        )
    rows, shape = batch.rows[name], tuple(batch.responses.input_ids.shape)
    if (rows.batch_size, rows.num_tokens) != shape:
        raise CreditError(
            f"rows: {name!r} must be the attention of {shape[0]} x {shape[1]} tokens, got {rows.batch_size} x "
            f"{rows.num_tokens}; record the pass over these very responses"
        )
    return rows


def options_of(batch: CreditInput, **defaults: Any) -> dict[str, Any]:
    """A rule's settings: its defaults, changed by the options of the batch.

    Raises:
        CreditError: an unknown option; no whole number of at least 1 where the default is whole, or no number in
            [0, 1] where it is a fraction.
    """
    for name, value in batch.options.items():
        if name == "rows":  # how the run reads rows; the flow rules look it up themselves
            continue
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise CreditError(f"options: must be options of this rule, got {name!r}; there are {known}")
        whole = isinstance(defaults[name], int)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not (value >= 1 if whole else 0 <= value <= 1):
            rule = "a whole number of at least 1" if whole else "a number in [0, 1]"
            raise CreditError(f"options: {name} must be {rule}, got {value!r}; {defaults[name]} is the default")
    return {name: batch.options.get(name, default) for name, default in defaults.items()}
