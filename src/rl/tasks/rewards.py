"""Load, call and check reward functions of the user.

A reward function is ``reward(samples, completions) -> list of numbers``: the problems and the responses to them, in the
same order, and one finite number for each. It gets all responses of a batch in one call, so that it can compare those
to one problem. It may be a coroutine function. Several functions have weights, and one of them returns None where it
does not apply. Any other result stops the run with an error that names the response; otherwise it would reach the
policy as NaN, as rewards of the wrong responses, or as a silent zero.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rl.errors import ConfigError, RewardError, describe_cause
from rl.records import Sample

RewardFunction = Callable[[list[Sample], list[str]], Any]
"""Samples and completions -> one number, or None, for each; or an awaitable of that."""

_SHOWN_CHARACTERS = 80
_SHOWN_SAMPLES = 4
_LARGEST_REWARD = torch.finfo(torch.float32).max


# Calling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedReward:
    """One of the reward functions of a task.

    Attributes:
        name: for messages.
        function: see :data:`RewardFunction`.
        weight: factor of its rewards in the sum.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class RewardParts:
    """Rewards of a batch, with the rewards of each function before its weight.

    Attributes:
        totals: ``[B]`` float32, what the policy learns from.
        parts: ``[B, K]`` float32, of each of the K functions; NaN where it does not apply.
        names: of the functions.
    """

    totals: Float[Tensor, " batch"]
    parts: Float[Tensor, "batch functions"]
    names: tuple[str, ...]


class _Failure(NamedTuple):
    """An exception in place of a result.

    Attributes:
        error: as it was raised.
    """

    error: BaseException


def checked_rewards(
    function: RewardFunction, samples: Sequence[Sample], completions: Sequence[str], *, name: str
) -> Float[Tensor, " batch"]:
    """Call a reward function once for all responses, and check what it returns.

    Args:
        function: ``reward(samples, completions)``; gets lists of its own and returns a list, tuple, array or tensor
            of B numbers, or a coroutine of them, which is awaited. True and False count as 1 and 0.
        samples: the B problems; responses to one problem repeat it.
        completions: the B responses, without the end token.
        name: of the function, for messages.

    Returns:
        ``[B]`` float32, finite.

    Raises:
        RewardError: the function raised (its exception is the cause), or returned another number of values, None,
            a value that is not a number, or one that is not finite in float32.

    Cost: that of the function.

    Example:
        >>> samples = [Sample(0, "Say yes.", "yes"), Sample(1, "Say no.", "no")]
        >>> def exact(samples, completions):
        ...     return [sample.answer == text for sample, text in zip(samples, completions)]
        >>> checked_rewards(exact, samples, ["yes", "yes"], name="exact")
        tensor([1., 0.])
    """
    return weighted_rewards([WeightedReward(name, function)], samples, completions).totals


def weighted_rewards(
    rewards: Sequence[WeightedReward], samples: Sequence[Sample], completions: Sequence[str]
) -> RewardParts:
    """Call every reward function once for all responses, and sum their rewards with their weights.

    ``R_i = sum_k w_k r_ki`` over the functions k that apply to response i. Coroutines are awaited together, so slow
    judges of several functions run at the same time; inside a running event loop (a notebook) they run in a thread.

    Args:
        rewards: the functions with their weights.
        samples: the B problems; responses to one problem repeat it.
        completions: the B responses, without the end token.

    Returns:
        The sums, finite in float32, and the reward of each function.

    Raises:
        RewardError: as :func:`checked_rewards`, or no function applies to a response.

    Cost: that of the functions.

    Example:
        >>> def exact(samples, completions):
        ...     return [sample.answer == text for sample, text in zip(samples, completions)]
        >>> def brief(samples, completions):
        ...     return [None if sample.index else 1 / len(text) for sample, text in zip(samples, completions)]
        >>> samples = [Sample(0, "Say yes.", "yes"), Sample(1, "Say no.", "no")]
        >>> both = [WeightedReward("exact", exact), WeightedReward("brief", brief, 0.5)]
        >>> weighted_rewards(both, samples, ["ye", "no"]).totals
        tensor([0.2500, 1.0000])
    """
    if len(samples) != len(completions):
        raise RewardError(
            f"completions: must be one for each of the {len(samples)} samples, got {len(completions)}; "
            "repeat the sample of each response"
        )

    # Ordinary functions have run after this line; coroutines have not begun.
    results = [_call(reward.function, list(samples), list(completions)) for reward in rewards]
    results = settled(results)
    totals = [0.0] * len(samples)
    num_applied = [0] * len(samples)
    parts = torch.full((len(samples), len(rewards)), math.nan)
    for column, (reward, result) in enumerate(zip(rewards, results, strict=True)):
        if isinstance(result, _Failure):
            raise _raised(reward.name, result.error, samples) from result.error
        values = settled(_as_list(result, len(samples), reward.name))
        for index, value in enumerate(values):
            if isinstance(value, _Failure):
                raise _raised(reward.name, value.error, samples) from value.error
            # With a single function None cannot mean that another one judges.
            if value is None and len(rewards) > 1:
                continue
            response = _described_response(index, samples[index], completions[index])
            number = _as_number(value, response, reward.name)
            parts[index, column] = number
            totals[index] += reward.weight * number
            num_applied[index] += 1

    _check_applied(rewards, num_applied, samples, completions)
    names = ", ".join(reward.name for reward in rewards)
    for index, total in enumerate(totals):
        # Finite rewards may have a sum beyond float32.
        _as_number(total, _described_response(index, samples[index], completions[index]), names)
    return RewardParts(torch.tensor(totals, dtype=torch.float32), parts, tuple(reward.name for reward in rewards))


def checked_values(
    values: Sequence[Any], samples: Sequence[Sample], completions: Sequence[str], *, name: str
) -> Float[Tensor, " batch"]:
    """Check one reward for each response, from calls that judged them one by one; awaitables are awaited together.

    Args:
        values: the B rewards, or awaitables of them.
        samples: the B problems.
        completions: the B responses.
        name: of the judge, for messages.

    Raises:
        RewardError: as :func:`checked_rewards`.
    """
    judge = WeightedReward(name, lambda samples, completions: list(values))
    return weighted_rewards([judge], samples, completions).totals


def batch_rewards(
    function: RewardFunction, samples: Sequence[Sample], completions: Sequence[str], *, name: str
) -> RewardParts:
    """Let a task judge a batch in one call, and check what it returns, as :func:`checked_rewards` does.

    Args:
        function: ``batch_rewards`` of the task; it may return :class:`RewardParts` too, which are checked already.
        samples: the B problems.
        completions: the B responses.
        name: of the task, for messages.

    Raises:
        RewardError: as :func:`checked_rewards`.
    """
    (result,) = settled([_call(function, list(samples), list(completions))])
    if isinstance(result, _Failure):
        raise _raised(name, result.error, samples) from result.error
    if isinstance(result, RewardParts):
        return result
    return weighted_rewards([WeightedReward(name, lambda samples, completions: result)], samples, completions)


def settled(values: Sequence[Any]) -> list[Any]:
    """Await the awaitables among the values, all of them together; an exception becomes a failure in its place."""
    places = [index for index, value in enumerate(values) if inspect.isawaitable(value)]
    settled_values = list(values)
    if not places:
        return settled_values

    async def wait_for_all() -> list[Any]:
        return list(await asyncio.gather(*(_outcome(values[index]) for index in places)))

    outcomes: Sequence[Any]
    try:
        outcomes = _run(wait_for_all())
    except asyncio.CancelledError as error:
        # Ctrl-C arrives as KeyboardInterrupt, so here the awaited code cancelled itself.
        outcomes = [_Failure(error)] * len(places)
    for index, outcome in zip(places, outcomes, strict=True):
        settled_values[index] = outcome
    return settled_values


def _run(coroutine: Any) -> Any:
    """Run a coroutine to its end, in this thread or, where a notebook runs an event loop in it, in another."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    """Await one result; user code may raise anything, and SystemExit would end the run without a word."""
    try:
        return await awaitable
    except (Exception, SystemExit) as error:  # noqa: BLE001  (user code may raise anything; the caller raises again)
        return _Failure(error)


def _call(function: RewardFunction, samples: list[Sample], completions: list[str]) -> Any:
    """Call a reward function, which may raise anything; an exception becomes a failure in place of the result."""
    try:
        return function(samples, completions)
    except RewardError:
        # A task that calls reward functions of its own has written the message.
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001  (user code may raise anything; the caller raises again)
        return _Failure(error)


def _raised(name: str, error: BaseException, samples: Sequence[Sample]) -> RewardError:
    """Build the error of a reward function that raised."""
    return RewardError(
        f"reward {name!r}: must return numbers for {_described_batch(samples)}, got {describe_cause(error)}; "
        "correct it: it is called as reward(samples, completions)"
    )


def _check_applied(
    rewards: Sequence[WeightedReward],
    num_applied: Sequence[int],
    samples: Sequence[Sample],
    completions: Sequence[str],
) -> None:
    """Require that at least one function applies to every response."""
    for index, count in enumerate(num_applied):
        if count == 0:
            names = ", ".join(repr(reward.name) for reward in rewards)
            response = _described_response(index, samples[index], completions[index])
            raise RewardError(
                f"reward: at least one function must apply to {response}, got None from all of {names}; "
                "return 0.0 from one of them where nothing is earned"
            )


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function for messages, or the class of a callable object."""
    return getattr(function, "__name__", None) or type(function).__name__


def _as_list(returned: Any, expected: int, name: str) -> list[Any]:
    """Return the values of a list, tuple, array or tensor of the expected length."""
    values = returned
    if hasattr(returned, "tolist"):
        values = returned.tolist()
    if not isinstance(values, list | tuple):
        got = "None" if returned is None else f"a {type(returned).__name__}"
        if inspect.isgenerator(returned) or inspect.isasyncgen(returned):
            got += f" of {returned.__qualname__!r}"
        raise RewardError(
            f"reward {name!r}: must return a list of {expected} numbers, got {got}; "
            "end it with 'return [...]', one number for each response"
        )
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r}: must return {expected} numbers, one for each response, got {len(values)}; "
            "return 0.0 for a response that earns nothing, and leave none out"
        )
    return list(values)


def _as_number(value: Any, response: str, name: str) -> float:
    """Return one reward as a float that is finite in float32."""
    if getattr(value, "ndim", None) == 0:
        # A scalar tensor or array.
        value = value.item()
    if not isinstance(value, numbers.Real):
        got = "None" if value is None else f"{_shortened(repr(value))} ({type(value).__name__})"
        raise RewardError(
            f"reward {name!r}: must return a number for {response}, got {got}; return a float, 0.0 where nothing is "
            "earned"
        )
    try:
        number = float(value)
    except OverflowError:
        # An integer beyond the range of floats.
        number = float("inf")
    # The comparison is False for NaN too.
    is_finite = abs(number) <= _LARGEST_REWARD
    if not is_finite:
        raise RewardError(
            f"reward {name!r}: must return a finite number for {response}, got {_shortened(str(value))}; "
            "guard divisions and logarithms, and bound the reward"
        )
    return number


def _described_response(index: int, sample: Sample, completion: str) -> str:
    """Describe one response for a message."""
    return f"response {index} (sample {sample.index}: {_shortened(completion)!r})"


def _described_batch(samples: Sequence[Sample]) -> str:
    """Describe the problems of a batch for a message."""
    indices = sorted({sample.index for sample in samples})
    if not indices:
        return "an empty batch"
    shown = ", ".join(map(str, indices[:_SHOWN_SAMPLES]))
    if len(indices) > _SHOWN_SAMPLES:
        shown += ", ..."
    return f"a batch of {len(samples)} responses (samples {shown})"


def _shortened(text: str) -> str:
    """Cut a text for a message."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS - 3]}..."


# Loading ------------------------------------------------------------------------------------------------


def load_function(path: str) -> Callable[..., Any]:
    """Load the function that ``package.module:function`` or ``folder/file.py:function`` names.

    The module or file is imported, so its code runs: name only what you trust. A module is found as Python finds it;
    the working folder is not added to its path. A file is executed at every call, under a name of its own, so it
    cannot import its neighbours by name.

    Raises:
        ConfigError: the text has another form, the module or file is missing, its code raises, or it has no such
            function.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    place, name = "", ""
    if isinstance(path, str):
        place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(
            f"reward: must have the form 'package.module:function' or 'folder/file.py:function', got {path!r}; "
            "name the function after a colon"
        )
    if place.endswith(".py"):
        module = _module_from_file(place, path)
    else:
        module = _module_from_name(place, path)
    function = getattr(module, name, None)
    if not callable(function):
        got = "no such name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(
            f"reward: must name a function of {place}, got {name!r}, which is {got}; "
            f"define it as 'def {name}(samples, completions)'"
        )
    return function


def _module_from_file(place: str, path: str) -> Any:
    """Execute a file as a module; ``path`` is the user's text, for messages."""
    file = Path(place).expanduser()
    if not file.is_file():
        raise ConfigError(f"reward: must name a file that exists, got {path!r} with no file {place}; check the path")
    # A unique module name: a user's file called torch.py must not replace the package.
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    name = f"_reward_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward: must name a file of Python code, got {path!r}; check the path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look up the module of a class here.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_error(path, error) from error
    return module


def _module_from_name(place: str, path: str) -> Any:
    """Import a module by its dotted name; ``path`` is the user's text, for messages."""
    if not all(part.isidentifier() for part in place.split(".")):
        raise ConfigError(
            f"reward: must name a module before the colon, got {path!r}; "
            "write package.module:function, or folder/file.py:function for a file"
        )
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reward: must name a module that can be imported, got {path!r}, where {error.name!r} is missing; "
            "install it, or name the file as folder/file.py:function"
        ) from error
    except (Exception, SystemExit) as error:
        raise _import_error(path, error) from error


def _import_error(path: str, error: BaseException) -> ConfigError:
    """Build the error of code that raises while it is imported."""
    return ConfigError(
        f"reward: must name code that can be imported, got {path!r}, which raised {describe_cause(error)}; correct it"
    )
