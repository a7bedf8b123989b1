"""Exceptions, named for what happened and not for where.

Every message has four parts: the argument, the rule, the value got, the remedy. An error that the caller's input
causes is also a ``ValueError``, so a plain ``except ValueError`` catches it.
"""


class FlowgraphError(Exception):
    """Base class of every exception that flowgraph raises itself."""


class InvalidInputError(FlowgraphError, ValueError):
    """An argument breaks a stated rule."""


class RegionError(InvalidInputError):
    """Question, reasoning or answer is empty, overlaps another region or lies outside the text."""


class NoAnswerError(RegionError):
    """No answer was found in the response."""


class GraphError(InvalidInputError):
    """A graph breaks a rule of ``FlowGraph``: order, range, causality, masks."""


class NumericalRangeError(FlowgraphError, ArithmeticError):
    """A number exceeds the range or the accuracy of float64, so no correct result exists."""


class InfeasibleFlowError(FlowgraphError, ValueError):
    """No question token reaches the answer, and the request needs a flow."""


class CaptureError(FlowgraphError, ValueError):
    """The attention of this model cannot be captured correctly."""


class MemoryLimitError(FlowgraphError, MemoryError):
    """The estimated memory of a request exceeds what is available."""


class TooLargeError(InvalidInputError):
    """An exact computation on a graph above its stated size limit."""


class MissingExtraError(FlowgraphError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""


class TraceFileError(FlowgraphError, ValueError):
    """A trace file is truncated, foreign, or written by a newer version."""


class OutputError(FlowgraphError, OSError):
    """An output path cannot be written."""


class ClusterError(FlowgraphError, RuntimeError):
    """The workers of a cluster could not be started, or did not finish their work."""


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of an error's text, or its class where it has none; some texts fill a page.

    Args:
        error: of another library, to be named in a message.
        length: most characters.

    Example:
        >>> first_line(RuntimeError("no kernel\\nin a list of fifty lines")), first_line(NotImplementedError())
        ('no kernel', 'NotImplementedError')
    """
    text = str(error).strip()
    if not text:
        return type(error).__name__
    return text.splitlines()[0].strip()[:length]
