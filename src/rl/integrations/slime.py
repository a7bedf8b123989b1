"""Add token credit to slime: a function for ``--custom-advantage-function-path``.

Written for slime 0.3.1 (commit 624b824a), whose ``compute_advantages_and_returns(args, rollout_data)`` calls the
function instead of its own estimator, in the last pipeline stage of every rank. ``rollout_data`` holds lists with one
tensor for each sequence, without padding: ``tokens`` (prompt and response), ``response_lengths``, ``loss_masks`` and
``rewards``. The ranks hold a Megatron model, so the model of :class:`rl.integrations.engine_credit.EngineCredit` is a
frozen copy of the base on the same rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from rl.errors import ConfigError
from rl.integrations.engine_credit import EngineCredit, EngineSequence, require_engine

SUPPORTED = ("0.3",)
"""Versions of slime whose function was read."""
_INSTALL = "install slime from its repository (the package of this name on PyPI is another one)"
_KEYS = ("tokens", "response_lengths", "loss_masks", "rewards")


def flow_slime_advantages(
    engine_credit: EngineCredit, compute: Callable[[Any, dict[str, Any]], None] | None = None
) -> Callable[[Any, dict[str, Any]], None]:
    """Return a function that computes slime's own advantages and multiplies them by the weights.

    A fallback (``CreditConfig.fallback``) compares the responses of one rank.

    Args:
        engine_credit: computes the weights.
        compute: sets ``rollout_data["advantages"]`` and ``["returns"]``; None: slime's function, with the estimator
            that ``--advantage-estimator`` names.

    Returns:
        A function of slime's arguments and rollout data, which it changes in place; returns stay as they are.

    Raises:
        MissingExtraError: slime is not installed, or in another version.
        ConfigError: when it is called: advantages that slime whitens afterwards, a batch without its tokens, or
            responses that several ranks share (context parallelism).

    Cost: one forward pass of the model on every rank for each rollout.
    """
    if compute is None:
        require_engine("slime", SUPPORTED, _INSTALL)

    def flow_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
        """Set slime's advantages, times the weights, and its returns."""
        if args.normalize_advantages:
            raise ConfigError(
                "normalize_advantages: must be off with token credit, because slime whitens after this function and "
                "would whiten the weights too, got True; leave --normalize-advantages out"
            )
        _check_batch(rollout_data)
        _own_advantages(compute)(_plain_arguments(args), rollout_data)

        sequences = []
        for row, tokens in enumerate(rollout_data["tokens"]):
            ids = tokens.tolist()
            first = len(ids) - int(rollout_data["response_lengths"][row])
            sequence = EngineSequence(
                prompt_ids=ids[:first],
                response_ids=ids[first:],
                trained=rollout_data["loss_masks"][row].bool().tolist(),
                reward=float(rollout_data["rewards"][row]),
            )
            sequences.append(sequence)
        rollout_data["advantages"] = engine_credit.scale(sequences, rollout_data["advantages"])

    return flow_advantages


def _own_advantages(compute: Callable[[Any, dict[str, Any]], None] | None) -> Callable[[Any, dict[str, Any]], None]:
    """Return the function that computes plain advantages."""
    if compute is not None:
        return compute
    from slime.backends.megatron_utils.loss import (  # pyright: ignore[reportMissingImports]
        compute_advantages_and_returns,
    )

    return compute_advantages_and_returns


def _plain_arguments(args: Any) -> Any:
    """Return slime's arguments for its plain advantages."""
    plain = copy.copy(args)
    # Without this function, and without the penalty of distillation, which slime adds after it.
    plain.custom_advantage_function_path = None
    plain.use_opd = False
    return plain


def _check_batch(rollout_data: dict[str, Any]) -> None:
    """Check that a batch holds an entry of each kind for every sequence."""
    for key in _KEYS:
        if rollout_data.get(key) is None:
            raise ConfigError(
                f"rollout_data: must hold {', '.join(_KEYS)}, got no {key!r}; use the rollout data that slime passes"
            )
    num_sequences = len(rollout_data["tokens"])
    for key in _KEYS:
        if len(rollout_data[key]) != num_sequences:
            raise ConfigError(
                f"rollout_data: {key} must have one entry for each of {num_sequences} sequences, got "
                f"{len(rollout_data[key])}; pass those of one rank"
            )
    for row, length in enumerate(rollout_data["response_lengths"]):
        num_tokens = len(rollout_data["tokens"][row])
        if not 0 <= int(length) < num_tokens:
            raise ConfigError(
                f"rollout_data: response_lengths must leave a token of the prompt, got {int(length)} of {num_tokens} "
                f"tokens in sequence {row}; pass the number of response tokens"
            )
