"""Load, call and check reward functions of the user.

A reward function is ``reward(samples, completions) -> list of numbers``: the problems and the responses to them, in the
same order, and one finite number for each. Any other result stops the run with an error that names the response;
otherwise it would reach the policy as NaN, as rewards of the wrong responses, or as a silent zero.
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

_SHOWN_CHARACTERS = 80
_SHOWN_SAMPLES = 4
_LARGEST_REWARD = torch.finfo(torch.float32).max


# Calling ------------------------------------------------------------------------------------------------


def checked_rewards(
    function: RewardFunction, samples: Sequence[Sample], completions: Sequence[str], *, name: str
) -> Float[Tensor, " batch"]:
    """Call a reward function and check what it returns.

    Args:
        function: ``reward(samples, completions)``; gets lists of its own and returns a list, tuple, array or tensor
            of B numbers. True and False count as 1 and 0.
        samples: the B problems; responses to one problem repeat it.
        completions: the B responses, without special tokens.
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
    if len(samples) != len(completions):
        raise RewardError(
            f"completions: must be one for each of the {len(samples)} samples, got {len(completions)}; "
            "repeat the sample of each response"
        )
    try:
        returned = function(list(samples), list(completions))
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: must return numbers for {_described_batch(samples)}, got {type(error).__name__}: "
            f"{_shortened(str(error))}; it is called as reward(samples, completions), and the cause is shown above"
        ) from error

    rewards = []
    values = _as_list(returned, len(samples), name)
    for index, (value, sample, completion) in enumerate(zip(values, samples, completions, strict=True)):
        response = f"response {index} (sample {sample.index}: {_shortened(completion)!r})"
        rewards.append(_as_number(value, response, name))
    return torch.tensor(rewards, dtype=torch.float32)


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function for messages, or the class of a callable object."""
    return getattr(function, "__name__", None) or type(function).__name__


def _as_list(returned: Any, expected: int, name: str) -> list[Any]:
    """Return the values of a list, tuple, array or tensor of the expected length."""
    values = returned
    if inspect.iscoroutine(returned):
        # An open coroutine makes Python warn later that it was never awaited.
        returned.close()
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
    except Exception as error:
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
    except Exception as error:
        raise _import_error(path, error) from error


def _import_error(path: str, error: Exception) -> ConfigError:
    """Build the error of code that raises while it is imported."""
    return ConfigError(
        f"reward: must name code that can be imported, got {path!r}, which raised {type(error).__name__}: "
        f"{_shortened(str(error))}; the cause is shown above"
    )
