"""Reward functions of the user: found by name, called with plain lists, and never believed without a look.

A reward function is ``reward(samples, completions) -> list of numbers``: the problems and the responses to them, in the
same order, and one finite number for each. Whatever else comes back would reach the policy as NaN, as a shifted
batch or as a silent zero, so it stops the run with the response it belongs to.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl.errors import ConfigError, RewardError
from rl.records import Sample

RewardFunction = Callable[[list[Sample], list[str]], Sequence[float]]

_SHOWN = 80
"""Characters of a response that a message shows."""


def checked_rewards(
    function: RewardFunction, samples: Sequence[Sample], completions: Sequence[str], *, name: str
) -> Float[Tensor, " batch"]:
    """Call a reward function and check what it returns.

    Args:
        function: ``reward(samples, completions)``; gets lists of its own and returns a list, tuple, array or tensor
            of B numbers. True and False count as 1 and 0.
        samples: the B problems; responses to one problem repeat it.
        completions: the B responses, without special tokens.
        name: what messages call the function.

    Returns:
        ``[B]`` float32, finite.

    Raises:
        RewardError: the function raised (its exception is the cause), or returned another number of values, None,
            something that is no number, or one that is not finite in float32.

    Cost: that of the function.

    Example:
        >>> samples = [Sample(0, "Say yes.", "yes"), Sample(1, "Say no.", "no")]
        >>> def exact(samples, completions):
        ...     return [sample.answer == text for sample, text in zip(samples, completions)]
        >>> checked_rewards(exact, samples, ["yes", "yes"], name="exact")
        tensor([1., 0.])
    """
    if len(samples) != len(completions):
        raise RewardError(
            f"completions: must be one for each of the {len(samples)} samples, got {len(completions)}; "
            "repeat the sample of each response"
        )
    try:
        returned = function(list(samples), list(completions))
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: must return numbers for {_batch(samples)}, got {type(error).__name__}: "
            f"{_shortened(str(error))}; it is called as reward(samples, completions), and the cause is shown above"
        ) from error
    values = _as_list(returned, len(samples), name)
    rewards = [_number(value, k, samples, completions, name) for k, value in enumerate(values)]
    return torch.tensor(rewards, dtype=torch.float32)


def load_function(path: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``folder/file.py:function`` names.

    The module or file is imported, so its code runs: name only what you trust. A module is found as Python finds it
    (the working folder is not added to its path); a file is executed again at every call, and on its own, so that it
    cannot import its neighbours by name.

    Raises:
        ConfigError: the text has another form, nothing is there, its code raises, or it has no such function.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    place, colon, function_name = path.rpartition(":") if isinstance(path, str) else ("", "", "")
    if not (place and colon and function_name.isidentifier()):
        raise ConfigError(
            f"reward: must have the form 'package.module:function' or 'folder/file.py:function', got {path!r}; "
            "name the function after a colon"
        )
    module = _from_file(place, path) if place.endswith(".py") else _from_module(place, path)
    function = getattr(module, function_name, None)
    if not callable(function):
        got = "no such name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(
            f"reward: must name a function of {place}, got {function_name!r}, which is {got}; "
            f"define it as 'def {function_name}(samples, completions)'"
        )
    return function


def function_name(function: Callable[..., Any]) -> str:
    """What messages call a function."""
    return getattr(function, "__name__", None) or type(function).__name__


def _from_file(place: str, path: str) -> Any:
    file = Path(place).expanduser()
    if not file.is_file():
        raise ConfigError(f"reward: must name a file that exists, got {path!r} with no file {place}; check the path")
    # A name of its own: a user's file called torch.py must not take the place of the package.
    name = f"_reward_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward: must name a file of Python code, got {path!r}; check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for the module of a class
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(path, error) from error
    return module


def _from_module(place: str, path: str) -> Any:
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
    except Exception as error:
        raise _failed(path, error) from error


def _failed(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"reward: must name code that can be imported, got {path!r}, which raised {type(error).__name__}: "
        f"{_shortened(str(error))}; the cause is shown above"
    )


def _as_list(returned: Any, expected: int, name: str) -> list[Any]:
    values = returned
    if inspect.iscoroutine(returned):
        returned.close()  # otherwise Python warns, later and elsewhere, that nobody awaited it
    elif hasattr(returned, "tolist"):
        values = returned.tolist()
    if not isinstance(values, list | tuple):
        got = "None" if returned is None else f"a {type(returned).__name__}"
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


def _number(value: Any, k: int, samples: Sequence[Sample], completions: Sequence[str], name: str) -> float:
    if getattr(value, "ndim", None) == 0:  # scalars of torch and numpy
        value = value.item()
    where = f"for response {k} (sample {samples[k].index}: {_shortened(completions[k])!r})"
    if not isinstance(value, numbers.Real):
        got = "None" if value is None else f"{_shortened(repr(value))} ({type(value).__name__})"
        raise RewardError(
            f"reward {name!r}: must return a number {where}, got {got}; return a float, 0.0 where nothing is earned"
        )
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float
        number = float("inf")
    if not abs(number) <= torch.finfo(torch.float32).max:  # NaN fails every comparison
        raise RewardError(
            f"reward {name!r}: must return a finite number {where}, got {_shortened(str(value))}; "
            "guard divisions and logarithms, and bound the reward"
        )
    return number


def _batch(samples: Sequence[Sample]) -> str:
    """Which problems a batch holds."""
    indices = sorted({sample.index for sample in samples})
    shown = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    return f"a batch of {len(samples)} responses (samples {shown})" if indices else "an empty batch"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
