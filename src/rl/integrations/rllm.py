"""Add token credit to rLLM: advantages for each token that its trainer takes as they are.

Written for rLLM 0.3.0 (commit 9beb6e0f). With ``rllm.algorithm.use_precomputed_advantage: true`` the trainer uses
``step.advantage`` of every step, a list with one value for each response token. It replaces a list of another length by
zeros and logs a warning; the functions here raise before. A grouping hook
(``AgentTrainer(..., traj_grouping_hook=...)``) is the first place where a group is complete, so advantages of the
group and weights are computed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rl.errors import ConfigError
from rl.integrations.engine_credit import EngineCredit, EngineSequence, require_engine

SUPPORTED = ("0.3",)
"""Versions of rLLM whose trainer was read."""
_INSTALL = "install rLLM 0.3 from its repository"


def flow_rllm_grouping(
    engine_credit: EngineCredit,
    algorithm_config: Any,
    grouping: Callable[..., list[Any]] | None = None,
) -> Callable[..., list[Any]]:
    """Return a grouping hook that also sets the advantages of all tokens.

    rLLM logs no ``reward/*`` figures of groups whose advantages are given, and calls the hook for validation too, where
    the advantages are not used.

    Args:
        engine_credit: computes the weights.
        algorithm_config: rLLM's ``AlgorithmConfig``; its estimator computes the advantages of a group.
        grouping: the hook that builds the groups; None: rLLM's own.

    Raises:
        MissingExtraError: rLLM is not installed, or in another version.
        ConfigError: ``use_precomputed_advantage`` is off, with which rLLM would overwrite the advantages.

    Cost: one forward pass of the model for each batch.
    """
    require_engine("rllm", SUPPORTED, _INSTALL)
    _check_algorithm(algorithm_config)

    def group_with_credit(episodes: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Group the episodes, and give every step its advantages."""
        groups = _own_grouping(grouping)(episodes, *args, **kwargs)
        precompute_advantages(groups, engine_credit, algorithm_config)
        return groups

    return group_with_credit


def precompute_advantages(
    groups: Sequence[Any],
    engine_credit: EngineCredit,
    algorithm_config: Any,
    *,
    estimators: Callable[[Any], Callable[..., Any]] | None = None,
) -> None:
    """Set ``step.advantage`` of every step to the advantages of its tokens times their weights.

    A group whose steps have advantages already (distillation) keeps them as the factor; the others get those of rLLM's
    estimator.

    Args:
        groups: rLLM's trajectory groups; each trajectory has one step.
        engine_credit: computes the weights.
        algorithm_config: rLLM's ``AlgorithmConfig``.
        estimators: finds an estimator by its name; None: rLLM's registry.

    Raises:
        ConfigError: ``use_precomputed_advantage`` is off, a trajectory with several steps or without reward, or
            advantages of another length than the response.
    """
    _check_algorithm(algorithm_config)
    find = _own_estimators() if estimators is None else estimators
    steps = [step for group in groups for step in _steps_of(group)]
    rewards = [_reward(trajectory) for group in groups for trajectory in group.trajectories]
    factors = _factors(groups, algorithm_config, find)

    # rLLM keeps Python floats, which are float64.
    sequences = []
    advantages = []
    for step, factor, reward in zip(steps, factors, rewards, strict=True):
        sequences.append(EngineSequence(step.prompt_ids, step.response_ids, reward=reward))
        advantages.append(_token_advantages(step, factor))
    # Nothing is set before everything is computed, so an error leaves the groups as they were.
    for step, scaled in zip(steps, engine_credit.scale(sequences, advantages), strict=True):
        step.advantage = scaled.tolist()


def _factors(groups: Sequence[Any], algorithm_config: Any, find: Callable[[Any], Callable[..., Any]]) -> list[Any]:
    """Return the advantage of every step before the weights: a list that it has already, or a number of its group."""
    given = {}
    estimated: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        own = [step.advantage for step in _steps_of(group)]
        if any(value is not None for value in own):
            given[number] = own
        else:
            estimated.setdefault(group.group_role, []).append(number)

    # As in rLLM, the groups of a role are estimated together.
    for role, numbers in estimated.items():
        estimator = find(algorithm_config.estimator_map.get(role, algorithm_config.estimator))
        chosen = [groups[number] for number in numbers]
        rewards = [np.array([_reward(trajectory) for trajectory in group.trajectories]) for group in chosen]
        by_group, _ = estimator(rewards=rewards, algorithm_config=algorithm_config, traj_groups=chosen)
        for number, values in zip(numbers, by_group, strict=True):
            given[number] = [float(value) for value in values]

    factors = []
    for number in range(len(groups)):
        factors.extend(given[number])
    return factors


def _token_advantages(step: Any, factor: Any) -> torch.Tensor:
    """Return one float64 for each response token."""
    size = len(step.response_ids)
    if isinstance(factor, float):
        return torch.full((size,), factor, dtype=torch.float64)
    if isinstance(factor, list) and len(factor) == size:
        return torch.tensor(factor, dtype=torch.float64)
    got = f"{len(factor)} values" if isinstance(factor, list) else type(factor).__name__
    raise ConfigError(
        f"step.advantage: must be a float or a list of {size} floats, one for each response token, got {got}; rLLM "
        "would replace it by zeros or stop, so correct the workflow that set it"
    )


def _steps_of(group: Any) -> list[Any]:
    """Return the only step of each trajectory."""
    steps = []
    for trajectory in group.trajectories:
        if len(trajectory.steps) != 1:
            raise ConfigError(
                f"groups: must hold trajectories of one step, got {len(trajectory.steps)} steps in group "
                f"{group.group_id!r}; several turns are not supported, so train on single turns"
            )
        steps.append(trajectory.steps[0])
    return steps


def _reward(trajectory: Any) -> float:
    """Return the reward of a trajectory; rLLM takes that of its last step where there is none."""
    reward = trajectory.reward
    if reward is None:
        reward = trajectory.steps[-1].reward
    return float(reward)


def _check_algorithm(algorithm_config: Any) -> None:
    """Check that rLLM will use the advantages."""
    if not algorithm_config.use_precomputed_advantage:
        raise ConfigError(
            "use_precomputed_advantage: must be true, because rLLM overwrites the advantages otherwise, got "
            f"{algorithm_config.use_precomputed_advantage!r}; set rllm.algorithm.use_precomputed_advantage: true"
        )


def _own_grouping(grouping: Callable[..., list[Any]] | None) -> Callable[..., list[Any]]:
    """Return the hook that builds groups."""
    if grouping is not None:
        return grouping
    from rllm.trainer.algorithms.transform import (  # pyright: ignore[reportMissingImports]
        _default_traj_grouping_hook,
    )

    return _default_traj_grouping_hook


def _own_estimators() -> Callable[[Any], Callable[..., Any]]:
    """Return the function of rLLM that finds an estimator."""
    from rllm.trainer.algorithms.advantage import get_rllm_adv_estimator  # pyright: ignore[reportMissingImports]

    return get_rllm_adv_estimator
