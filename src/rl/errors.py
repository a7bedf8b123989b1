"""Exceptions of training, named for outcomes. Every message states the argument, the rule, the value and a remedy."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

from flowgraph import FlowgraphError, InvalidInputError

_SHOWN_CHARACTERS = 2000
"""Longest text of one exception in a message; the middle of a longer one is left out."""
_SHOWN_CAUSES = 4
"""Exceptions of one chain or group that a message describes."""


class ConfigError(InvalidInputError):
    """A setting breaks a stated rule, or two settings exclude each other."""


class TaskError(InvalidInputError):
    """A task is unknown, or its file or options are invalid."""


class PolicyError(InvalidInputError):
    """A model or tokenizer cannot be trained with these settings (LoRA targets, context length, padding)."""


class RewardError(FlowgraphError, ValueError):
    """A reward function raised, or did not return a finite number for every response."""


class CreditError(FlowgraphError, ValueError):
    """A credit rule is unknown, or did not return a score for every token."""


class CheckpointError(FlowgraphError, ValueError):
    """A checkpoint is missing, incomplete, foreign, or belongs to another configuration."""


class DivergedError(FlowgraphError, ArithmeticError):
    """A gradient or a loss is no longer finite."""


class ServiceError(FlowgraphError, RuntimeError):
    """The credit service refuses a request (token, version, size, full queue), or cannot be reached.

    Attributes:
        status: HTTP status of the answer; 503 where there was none.
        retry_after: seconds after which the same request may succeed; None: it will not.
    """

    def __init__(self, message: str, *, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def named_error(name: str, message: str) -> FlowgraphError | None:
    """Make the exception of this package, or of flowgraph, that another process named; None for an unknown name.

    Args:
        name: of its class.
        message: its text.
    """
    waiting = [FlowgraphError]
    while waiting:
        kind = waiting.pop()
        # Classes of users may have other arguments.
        is_own = kind.__module__.partition(".")[0] in ("flowgraph", "rl")
        if is_own and kind.__name__ == name:
            return kind(message)
        waiting += kind.__subclasses__()
    return None


# Exceptions of user code --------------------------------------------------------------------------------


def describe_cause(error: BaseException, subject: str = "") -> str:
    """Describe an exception of user code: type, text, file and line, and the exceptions that caused it.

    The command line prints messages without a stack trace, so the message alone must lead to the line to correct. The
    line is the last one of the user's own code; where a library raised, its line follows.

    Args:
        error: as it was caught.
        subject: what the code was called for, such as ``"for number 3"``; written behind the text of the error.

    Returns:
        One text, such as ``ZeroDivisionError: division by zero, at rewards.py, line 3, in score``.
    """
    described = []
    current: BaseException | None = error
    while current is not None and len(described) < _SHOWN_CAUSES:
        described.append(_described(current, subject if current is error else ""))
        # ``raise ... from`` names the cause; an exception raised while another was handled has that one as context.
        following = current.__cause__
        if following is None and not current.__suppress_context__:
            following = current.__context__
        current = following
    return ", caused by ".join(described)


def _described(error: BaseException, subject: str = "") -> str:
    """Describe one exception, and the members of a group, without its causes."""
    text = type(error).__name__
    # A syntax error names its own place in its text.
    message = "\n".join([_text_of(error), *getattr(error, "__notes__", [])]).strip()
    if message:
        text += f": {_without_middle(message)}"
    if subject:
        text += f" {subject}"
    place = _place(error)
    if place:
        text += f", at {place}"
    if isinstance(error, BaseExceptionGroup):
        members = [_described(member) for member in error.exceptions[:_SHOWN_CAUSES]]
        text += f" ({'; '.join(members)})"
    return text


def _text_of(error: BaseException) -> str:
    """Return the text of an exception, whose class may be the user's own."""
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001  (the user's __str__ may raise anything; the error itself is told)
        return f"(its text raised {type(failure).__name__})"


def _place(error: BaseException) -> str:
    """Name the last line of the user's code that the exception passed, and the line of the library that raised it."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_own(frame.filename)]
    if not frames:
        return ""
    raised = frames[-1]
    users = [frame for frame in frames if not _is_library(frame.filename)]
    if not users or users[-1] is raised:
        return _described_frame(raised)
    return f"{_described_frame(users[-1])} (raised at {_described_frame(raised)})"


def _described_frame(frame: traceback.FrameSummary) -> str:
    """Write file, line and function of a frame."""
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"


def _is_own(filename: str) -> bool:
    """Tell whether a file belongs to this package."""
    return Path(filename).is_relative_to(Path(__file__).parent)


def _is_library(filename: str) -> bool:
    """Tell whether a file belongs to Python or to an installed package."""
    if filename.startswith("<frozen"):
        return True
    folders = [*sysconfig.get_paths().values(), *(path for path in sys.path if path.endswith("site-packages"))]
    return any(Path(filename).is_relative_to(folder) for folder in folders)


def _without_middle(text: str) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
