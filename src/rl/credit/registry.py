"""The registry of token-credit rules: one interface for the rules that ship with this package and for those of users.

A rule reads a rollout and gives every response token a score, higher where the token matters more. A rule does not
decide how a score acts on the training: a *shape* (``rl.credit.weights``) turns scores into weights, and the *entry
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
from rl.errors import CreditError, describe_cause
from rl.records import Responses, TokenScores


@dataclass(frozen=True)
class AttentionNeed:
    """Attention that a rule reads: recorded during the pass that scores the old policy, at no extra forward pass.

    Attributes:
        layers: as in :func:`flowgraph.capture`; None takes the layers of the credit settings.
        heads: as in :func:`flowgraph.capture`; None takes the heads of the credit settings.
    """

    layers: str | Sequence[int] | None = None
    heads: str | Sequence[int] | HeadSelector | None = None


@dataclass(frozen=True, eq=False)
class CreditInput:
    """The input of a rule: part of a rollout (one micro-batch of B responses), on the policy's device.

    Attributes:
        responses: tokens, masks, regions, rewards; see :class:`rl.records.Responses`.
        scores: log-probabilities and entropies of the policy that wrote the responses.
        scored: ``[B, R]`` bool, the tokens that compete for credit; scores elsewhere are ignored.
        rows: attention by the names under which the rule registered its needs (``needs=``).
        random: a generator for each response, on the CPU; its draws are the same after a resume and for every size of
            micro-batches.
        gradient: a function that computes the norm of the policy gradient at the input embedding of every response
            token, ``[B, R]``; one extra forward and backward pass. Only for rules registered with ``gradient=True``.
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
        name: the name that users write.
        function: :class:`CreditInput` -> scores ``[B, R]``, float, finite, not negative.
        needs: attention to record, by name.
        gradient: whether the rule calls ``gradient``.
        needs_oracle: whether the rule needs a task that marks its decisive tokens.
        weighs: whether its scores are weights already, so that no shape applies: equal scores would otherwise be ranked
            by position.
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

    Args:
        name: the name that users write.
        needs: attention to record, by the names under which the rule reads it.
        gradient: whether the rule calls ``CreditInput.gradient``.
        needs_oracle: whether the rule needs a task that marks its decisive tokens.
        weighs: whether its scores are weights already, so that no shape applies.

    Returns:
        A decorator that registers the function and returns it unchanged.

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

        docstring_lines = (function.__doc__ or "").strip().splitlines()
        _RULES[name] = CreditRule(
            name=name,
            function=function,
            needs=dict(needs or {}),
            gradient=gradient,
            needs_oracle=needs_oracle,
            weighs=weighs,
            summary=docstring_lines[0] if docstring_lines else "",
        )
        return function

    return register


def _place(function: CreditFunction) -> tuple[str, str]:
    """Name the module and the place in it where a function is defined."""
    return function.__module__, function.__qualname__


def find_rule(name: str) -> CreditRule:
    """Find the rule of this name.

    Raises:
        CreditError: there is none; the message lists the registered rules.
    """
    if name not in _RULES:
        raise CreditError(
            f"credit: must name a registered rule, got {name!r}; there are {', '.join(sorted(_RULES))}, and "
            "rl.credit_rule registers your own"
        )
    return _RULES[name]


def rule_names() -> list[str]:
    """List the names of all registered rules, sorted."""
    return sorted(_RULES)


def score_tokens(rule: CreditRule, batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Run a rule and check its scores; 0 outside ``scored``.

    Args:
        rule: see :func:`find_rule`.
        batch: its input.

    Returns:
        ``[B, R]`` float32, detached, finite and at least 0.

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
    except (Exception, SystemExit) as error:
        # A rule is user code and may raise anything; the message names the rule.
        raise CreditError(
            f"credit: rule {rule.name!r} must serve every rollout, got {describe_cause(error)}; correct the rule"
        ) from error

    shape = tuple(batch.scored.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise CreditError(
            f"credit: rule {rule.name!r} must return a tensor of shape {shape} (responses, tokens), got {got}; "
            "score every response token, 0 where the rule gives no score"
        )

    # Scores outside the scope are ignored, so they may be invalid.
    scores = scores.detach().float().to(batch.scored.device)
    scores = torch.where(batch.scored, scores, 0.0)
    invalid = ~torch.isfinite(scores) | (scores < 0)
    if bool(invalid.any()):
        row, column = invalid.nonzero()[0].tolist()
        raise CreditError(
            f"credit: rule {rule.name!r} must return finite scores of at least 0, got {float(scores[row, column])} for "
            f"token {column} of response {row}; map them to a non-negative range (exp, abs, clamp)"
        )
    return scores


def recorded(batch: CreditInput, name: str) -> AttentionRows:
    """Find the attention that a rule registered under this name.

    Raises:
        CreditError: it was not recorded, or for other tokens.
    """
    if name not in batch.rows:
        raise CreditError(
            f"rows: must hold the attention {name!r} that this rule reads, got {sorted(batch.rows)}; record what "
            "find_rule(...).needs lists and pass it under the same names"
        )
    rows = batch.rows[name]
    shape = tuple(batch.responses.input_ids.shape)
    if (rows.batch_size, rows.num_tokens) != shape:
        raise CreditError(
            f"rows: {name!r} must be the attention of {shape[0]} x {shape[1]} tokens, got {rows.batch_size} x "
            f"{rows.num_tokens}; record the pass over these very responses"
        )
    return rows


def options_of(batch: CreditInput, **defaults: Any) -> dict[str, Any]:
    """Read a rule's settings: its defaults, replaced by the options of the batch.

    An option whose default is an int must be an integer of at least 1; all others must be numbers in [0, 1].

    Args:
        batch: the rule's input.
        **defaults: every option of the rule with its default.

    Raises:
        CreditError: an unknown option, or a value outside its range.
    """
    for name, value in batch.options.items():
        # The convention of the rows is a setting of the run; the flow rules read it themselves.
        if name == "rows":
            continue
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise CreditError(f"options: must be options of this rule, got {name!r}; there are {known}")
        _check_option(name, value, defaults[name])
    return {name: batch.options.get(name, default) for name, default in defaults.items()}


def _check_option(name: str, value: Any, default: int | float) -> None:
    """Check the type and the range of one option, which follow from its default."""
    # bool is a subclass of int, and is not a number here.
    if isinstance(default, int):
        rule = "a whole number of at least 1"
        is_valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    else:
        rule = "a number in [0, 1]"
        is_valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if not is_valid:
        raise CreditError(f"options: {name} must be {rule}, got {value!r}; {default} is the default")
