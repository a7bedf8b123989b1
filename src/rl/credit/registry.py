"""The registry of token-credit rules: one interface for the rules that ship with this package and for those of users.

A rule reads a rollout and gives every response token a score, higher where the token matters more. A rule does not
decide how a score acts on the training: a *shape* (``rl.credit.weights``) turns scores into weights, and the *entry
point* (advantage, reward or potential) decides where they act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgraph import AttentionRecorder, AttentionRows, FlowgraphError, HeadSelector
from rl.config import CreditConfig, Sign
from rl.credit.policy_passes import PolicyPasses
from rl.errors import CreditError, describe_cause
from rl.records import Responses, TokenScores


@dataclass(frozen=True)
class AttentionNeed:
    """Attention that a rule reads: recorded during the pass that scores the old policy, at no extra forward pass.

    Attributes:
        layers: as in :func:`flowgraph.capture`; None takes the layers of the credit settings.
        heads: as in :func:`flowgraph.capture`; None takes the heads of the credit settings.
        power: p, for the rows of ``capture(..., capacity="sharpened")``, whose heads are joined by ``place``; None for
            plain attention.
        place: of the power, as in :func:`flowgraph.capture`.
    """

    layers: str | int | Sequence[int] | None = None
    heads: str | Sequence[int] | HeadSelector | None = None
    power: float | None = None
    place: Literal["pre", "post", "max"] = "pre"

    def recorder(self, model: Any, *, layers: str, heads: str) -> AttentionRecorder:
        """Make a recorder of this attention.

        Args:
            model: the causal LM whose pass is recorded.
            layers: layers where the need leaves them open.
            heads: heads where the need leaves them open.
        """
        chosen_layers = layers if self.layers is None else self.layers
        if self.power is not None:
            return AttentionRecorder(model, layers=chosen_layers, power=self.power, place=self.place)
        chosen_heads = heads if self.heads is None else self.heads
        return AttentionRecorder(model, layers=chosen_layers, heads=chosen_heads)


Needs = Mapping[str, AttentionNeed]
"""Attention to record, by the names under which a rule reads it."""


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
        passes: further passes of the policy over these responses. Only for rules registered with ``own_pass``.
        options: the rule's own settings, from ``CreditConfig.options``.
    """

    responses: Responses
    scores: TokenScores
    scored: Bool[Tensor, "batch response"]
    rows: Mapping[str, AttentionRows] = field(default_factory=dict)
    random: Sequence[torch.Generator] = ()
    gradient: Callable[[], Float[Tensor, "batch response"]] | None = None
    passes: PolicyPasses | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TiedScores:
    """The scores of a rule that also measures how strongly each answer is tied to the tokens before it.

    Attributes:
        scores: ``[B, R]``, as a rule without ties returns them.
        tie: ``[B]``, mean unnormalised reach of the tokens before the answer, at least 0; 0 without an answer.
    """

    scores: Float[Tensor, "batch response"]
    tie: Float[Tensor, " batch"]


CreditFunction = Callable[[CreditInput], Float[Tensor, "batch response"] | TiedScores]
_Function = TypeVar("_Function", bound=CreditFunction)


@dataclass(frozen=True)
class CreditRule:
    """A registered rule.

    Attributes:
        name: the name that users write.
        function: :class:`CreditInput` -> scores ``[B, R]``, float, finite, not negative, or :class:`TiedScores`.
        needs: attention to record with the default options, by name.
        gradient: whether the rule calls ``gradient``.
        needs_oracle: whether the rule needs a task that marks its decisive tokens.
        weighs: whether its scores are weights already, so that no shape applies: equal scores would otherwise be ranked
            by position.
        summary: the first line of the function's docstring.
        needs_of: options -> attention to record, where it depends on the options.
        ties: whether the rule returns :class:`TiedScores`, which ``CreditConfig.fallback`` needs.
        sign: the advantages that its weights act on where ``CreditConfig.sign`` is ``"rule"``.
        own_pass: what the rule runs beside the pass that scores the old policy, such as ``"a backward pass"``; "" for
            nothing.
        whole_batch: whether the rule reads all responses of the process at once, not in micro-batches.
    """

    name: str
    function: CreditFunction
    needs: Needs
    gradient: bool
    needs_oracle: bool
    weighs: bool
    summary: str
    needs_of: Callable[[Mapping[str, Any]], Needs] | None = None
    ties: bool = False
    sign: Sign = "all"
    own_pass: str = ""
    whole_batch: bool = False

    def needs_for(self, options: Mapping[str, Any]) -> Needs:
        """Return the attention to record with these options of the rule.

        Raises:
            CreditError: an option that the rule does not have, or outside its range.
        """
        if self.needs_of is None:
            return self.needs
        return self.needs_of(options)


_RULES: dict[str, CreditRule] = {}


def credit_rule(
    name: str,
    *,
    needs: Needs | Callable[[Mapping[str, Any]], Needs] | None = None,
    gradient: bool = False,
    needs_oracle: bool = False,
    weighs: bool = False,
    ties: bool = False,
    sign: Sign = "all",
    own_pass: str = "",
    whole_batch: bool = False,
) -> Callable[[_Function], _Function]:
    """Register a function as a credit rule.

    Args:
        name: the name that users write.
        needs: attention to record, by the names under which the rule reads it; or a function of the rule's options that
            returns it.
        gradient: whether the rule calls ``CreditInput.gradient``.
        needs_oracle: whether the rule needs a task that marks its decisive tokens.
        weighs: whether its scores are weights already, so that no shape applies.
        ties: whether it returns :class:`TiedScores`.
        sign: the advantages that its weights act on, by its paper; see :class:`rl.CreditConfig`.
        own_pass: what it runs with ``CreditInput.passes``, such as ``"a backward pass"``.
        whole_batch: whether it reads all responses at once; it then has no attention.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Raises:
        CreditError: the name is taken by another function.

    Example:
        >>> @credit_rule("recency")
        ... def recency(batch):
        ...     '''Later tokens score higher.'''
        ...     return batch.responses.response_mask.float().cumsum(1)
        >>> find_rule("recency").summary
        'Later tokens score higher.'
    """

    def register(function: _Function) -> _Function:
        known = _RULES.get(name)
        # A module that is loaded twice (a notebook cell, a test run) registers its own function again.
        if known is not None and _place(known.function) != _place(function):
            raise CreditError(f"name: must be new, got {name!r}, which is registered already; choose another name")

        needs_of = needs if callable(needs) else None
        default_needs = needs({}) if callable(needs) else (needs or {})
        docstring_lines = (function.__doc__ or "").strip().splitlines()
        _RULES[name] = CreditRule(
            name=name,
            function=function,
            needs=dict(default_needs),
            gradient=gradient,
            needs_oracle=needs_oracle,
            weighs=weighs,
            summary=docstring_lines[0] if docstring_lines else "",
            needs_of=needs_of,
            ties=ties,
            sign=sign,
            own_pass=own_pass or ("a backward pass" if gradient else ""),
            whole_batch=whole_batch,
        )
        return function

    return register


def _place(function: CreditFunction) -> tuple[str, str]:
    """Name the module and the place in it where a function is defined."""
    return function.__module__, function.__qualname__


def find_rule(name: str) -> CreditRule:
    """Find the rule of this name.

    Raises:
        CreditError: no rule has this name; the message lists the registered rules.
    """
    if name not in _RULES:
        raise CreditError(
            f"credit: must name a registered rule, got {name!r}; there are {', '.join(sorted(_RULES))}, and "
            "rl.credit_rule registers your own"
        )
    return _RULES[name]


POSITION_MATCHED = "position_matched"
"""The control that permutes the weights of another rule, which its option ``of`` names."""
_PERMUTED_BY_DEFAULT = "flow_sharp"


def applied(credit: CreditConfig) -> CreditConfig:
    """Return the settings of the rule that scores the tokens: those given, or those of the rule that is permuted.

    Raises:
        CreditError: the control ``"position_matched"`` names no registered rule, or itself.
    """
    if credit.rule != POSITION_MATCHED:
        return credit
    options = dict(credit.options)
    name = options.pop("of", _PERMUTED_BY_DEFAULT)
    if not isinstance(name, str) or name == POSITION_MATCHED or name not in _RULES:
        others = [known for known in sorted(_RULES) if known != POSITION_MATCHED]
        raise CreditError(
            f"options: of must name the rule whose weights are permuted, got {name!r}; there are {', '.join(others)}"
        )
    return replace(credit, rule=name, options=options)


def rule_names() -> list[str]:
    """List the names of all registered rules, sorted."""
    return sorted(_RULES)


def score_tokens(rule: CreditRule, batch: CreditInput) -> Float[Tensor, "batch response"]:
    """Run a rule and check its scores; 0 outside ``scored``.

    Arguments and errors as :func:`score_with_tie`.

    Returns:
        ``[B, R]`` float32, detached, finite and at least 0.
    """
    scores, _ = score_with_tie(rule, batch)
    return scores


def score_with_tie(
    rule: CreditRule, batch: CreditInput
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, " batch"] | None]:
    """Run a rule and check what it returns.

    Args:
        rule: see :func:`find_rule`.
        batch: its input.

    Returns:
        The scores, ``[B, R]`` float32, detached, finite and at least 0, 0 outside ``scored``; and the tie of each
        answer, ``[B]`` float32, where the rule measures it.

    Raises:
        CreditError: the rule raised; another shape, NaN, infinite or negative scores; a missing oracle.
    """
    if rule.needs_oracle and batch.responses.oracle is None:
        raise CreditError(
            f"credit: rule {rule.name!r} needs a task that knows its decisive tokens, got one that does not; "
            "use a task with an oracle, such as chain, wandering, pathsearch or program, or another rule"
        )

    # An error of the package names its argument already.
    try:
        found = rule.function(batch)
    except FlowgraphError:
        raise
    except (Exception, SystemExit) as error:
        # A rule is user code and may raise anything; the message names the rule.
        raise CreditError(
            f"credit: rule {rule.name!r} must serve every rollout, got {describe_cause(error)}; correct the rule"
        ) from error

    tie = None
    scores: Any = found
    if isinstance(found, TiedScores):
        scores = found.scores
        tie = found.tie.detach().float().to(batch.scored.device)

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
    return scores, tie


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


def passes_of(batch: CreditInput) -> PolicyPasses:
    """Return the passes of the policy that a rule may run.

    Raises:
        CreditError: there are none.
    """
    if batch.passes is None:
        raise CreditError(
            "passes: must be given to a rule that runs passes of the policy, got none; use rl.PPOTrainer, or pass "
            "CreditInput(passes=...)"
        )
    return batch.passes


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
