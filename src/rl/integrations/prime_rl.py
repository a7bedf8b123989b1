"""Add token credit to prime-rl: an algorithm whose advantages are multiplied by credit weights.

Written for prime-rl 0.8.0 (commit 559b4477). An ``Algorithm`` runs in the orchestrator, where ``score_group`` gives the
traces of a group their advantages; ``assign_advantages(trace, values)`` takes one value for each sampled token, in the
order of the nodes. No configuration names an algorithm of a user, so the class replaces an entry of
``ALGORITHM_CLASSES`` before the orchestrator starts. The orchestrator holds no model: that of
:class:`rl.integrations.engine_credit.EngineCredit` is a frozen copy of the base in its process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rl.errors import ConfigError
from rl.integrations.engine_credit import EngineCredit, EngineSequence, require_base, require_engine

if TYPE_CHECKING:
    from prime_rl.orchestrator.algo import Algorithm as _Algorithm  # pyright: ignore[reportMissingImports]
else:
    _Algorithm = object

SUPPORTED = ("0.8",)
"""Versions of prime-rl whose algorithms were read."""
_INSTALL = "install prime-rl 0.8 from its repository"


class PrimeCredit(_Algorithm):
    """The method that :func:`flow_prime_algorithm` adds to an algorithm of prime-rl.

    Attributes:
        engine_credit: computes the weights.
    """

    engine_credit: EngineCredit

    async def score_group(self, episodes: list[Any]) -> None:
        """Assign the advantages of the algorithm, then the same times the weights; a fallback compares the group."""
        from prime_rl.orchestrator.algo.base import iter_trainable_traces  # pyright: ignore[reportMissingImports]
        from prime_rl.orchestrator.algo.routing import assign_advantages  # pyright: ignore[reportMissingImports]

        await super().score_group(episodes)
        traces = [trace for _, trace in iter_trainable_traces(episodes)]
        sequences = [_sequence_of(trace) for trace in traces]
        # prime-rl keeps Python floats, which are float64.
        advantages = [torch.tensor(_advantages_of(trace), dtype=torch.float64) for trace in traces]
        for trace, scaled in zip(traces, self.engine_credit.scale(sequences, advantages), strict=True):
            assign_advantages(trace, scaled.tolist())


def flow_prime_algorithm(engine_credit: EngineCredit, base: type | None = None) -> type[PrimeCredit]:
    """Return an algorithm of prime-rl with token credit.

    Args:
        engine_credit: computes the weights.
        base: an algorithm that assigns advantages in ``score_group``; None: ``GRPOAlgorithm``.

    Raises:
        MissingExtraError: prime-rl is not installed, or in another version.
        ConfigError: ``base`` is no algorithm of prime-rl. When it runs: a trace with more than one turn, or one without
            advantages.

    Cost: one forward pass of the model for each group; the event loop of the orchestrator waits for it.

    Example:
        ALGORITHM_CLASSES["grpo"] = flow_prime_algorithm(EngineCredit("flow", "path/to/base"))
    """
    require_engine("prime-rl", SUPPORTED, _INSTALL)
    from prime_rl.orchestrator.algo import Algorithm, GRPOAlgorithm  # pyright: ignore[reportMissingImports]

    chosen = GRPOAlgorithm if base is None else base
    require_base(chosen, Algorithm, "prime_rl.orchestrator.algo.Algorithm")
    return type(f"Flow{chosen.__name__}", (PrimeCredit, chosen), {"engine_credit": engine_credit})


def _sequence_of(trace: Any) -> EngineSequence:
    """Read a trace of one turn: tokens in front of the sampled ones are the prompt, tokens behind them are left out."""
    ids: list[int] = []
    sampled: list[bool] = []
    previous: int | None = None
    for number, node in enumerate(trace.nodes):
        if node.parent != previous:
            raise _unsupported(trace, "branches")
        previous = number
        if len(node.mask) != len(node.token_ids):
            raise ConfigError(
                f"mask: must have one flag for each of {len(node.token_ids)} tokens in node {number} of trace "
                f"{trace.id!r}, got {len(node.mask)}; use the trace of the environment server"
            )
        ids.extend(node.token_ids)
        sampled.extend(bool(flag) for flag in node.mask)

    first = sampled.index(True)
    stop = len(sampled) - sampled[::-1].index(True)
    if not all(sampled[first:stop]):
        raise _unsupported(trace, "several turns")
    return EngineSequence(prompt_ids=ids[:first], response_ids=ids[first:stop], reward=float(trace.reward))


def _advantages_of(trace: Any) -> list[float]:
    """Return the advantages of the sampled tokens of a trace, in their order."""
    values: list[float] = []
    for number, node in enumerate(trace.nodes):
        if not any(node.mask):
            continue
        if node.advantages is None:
            raise ConfigError(
                f"base: must assign advantages in score_group, got none in node {number} of trace {trace.id!r}; use "
                "an algorithm such as GRPOAlgorithm"
            )
        values.extend(node.advantages)
    return values


def _unsupported(trace: Any, found: str) -> ConfigError:
    """Return the error of a trace with tokens between the sampled ones."""
    return ConfigError(
        f"episodes: must hold traces of one turn, got {found} in trace {trace.id!r}; tokens of tools and environments "
        "are not supported, so train on single turns"
    )
