"""Register and find the tasks and methods of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.records import EvaluationItem, Explanation, Truth
from flowgraph.evaluation.subject import Subject

Split = Literal["dev", "test"]
ItemSource = Callable[[str, int, int], Sequence[EvaluationItem]]
"""``(split, number of items, seed)`` to items: the same arguments give the same items."""
TaskFunction = Callable[[Subject], Truth]
Restore = Callable[[Subject, Mapping[str, Any]], Truth]
"""``(subject, values)`` to the truth whose ``to_dict()`` gave the values."""
MethodFunction = Callable[[Subject], Tensor | Explanation]


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: how tables call it.
        summary: one line: what is computed.
        higher_is_better: the direction.
        chance: the value expected of a random ranking; None: measured by the method ``random``.
    """

    name: str
    summary: str
    higher_is_better: bool = True
    chance: float | None = None


@dataclass(frozen=True)
class EvaluationTask:
    """A registered task.

    Attributes:
        name: how it is asked for.
        items: makes the items of a split.
        function: computes the truth of one item under the model.
        metrics: its figures, the primary one first.
        reads: ``"tokens"`` or ``"edges"``: which part of an explanation it scores.
        causal: True where the truth is an intervention on the model, so that position-matched controls apply.
        restore: builds a truth from its stored values, so that a method that is added later needs no new interventions;
            None: the truth is computed again.
        summary: one line, the first of the function's docstring.
        shows: what a high score shows.
        cannot_show: what it does not show.
        licence: of the items.
        paired: True where the method runs on a second subject too, and the truth compares both explanations; see
            :class:`flowgraph.evaluation.records.PairedTruth`.
        compares: False where scores that are not right can have the best value (a sanity check, a description), so
            that a comparison with controls would mislead; the table then has none.
    """

    name: str
    items: ItemSource
    function: TaskFunction
    metrics: tuple[Metric, ...]
    reads: Literal["tokens", "edges"]
    causal: bool
    restore: Restore | None = field(default=None, kw_only=True)
    summary: str
    shows: str
    cannot_show: str
    licence: str
    paired: bool = False
    compares: bool = True


@dataclass(frozen=True)
class EvaluationMethod:
    """A registered method.

    Attributes:
        name: how it is asked for.
        function: explains one subject: scores ``[tokens]`` or an :class:`Explanation`.
        summary: one line, the first of the function's docstring.
        gradient: True where it needs a backward pass.
        trivial: True for controls that read nothing of the model: random, position, length, text.
        gives: the parts of an explanation that it gives, of ``"tokens"`` and ``"edges"``.
        requires: the package that it needs beyond the library; None: none.
    """

    name: str
    function: MethodFunction
    summary: str
    gradient: bool = False
    trivial: bool = False
    gives: tuple[Literal["tokens", "edges"], ...] = ("tokens",)
    requires: str | None = None

    def explain(self, subject: Subject) -> Explanation:
        """Run the method and check what it returns.

        Raises:
            InvalidInputError: scores of another shape, or NaN or infinite ones.
        """
        result = self.function(subject)
        explanation = result if isinstance(result, Explanation) else Explanation(tokens=result)
        for part, shape in (("tokens", (subject.num_tokens,)), ("edges", (subject.num_tokens,) * 2)):
            values = getattr(explanation, part)
            if values is not None and tuple(values.shape) != shape:
                raise InvalidInputError(
                    f"method: {self.name!r} must return {part} of shape {shape}, got {tuple(values.shape)}; score "
                    "every token of prompt and response"
                )
        return explanation


_TASKS: dict[str, EvaluationTask] = {}
_METHODS: dict[str, EvaluationMethod] = {}


def evaluation_task(
    name: str,
    *,
    items: ItemSource,
    metrics: Sequence[Metric],
    reads: Literal["tokens", "edges"] = "tokens",
    causal: bool = False,
    restore: Restore | None = None,
    shows: str = "",
    cannot_show: str = "",
    licence: str = "",
    paired: bool = False,
    compares: bool = True,
) -> Callable[[TaskFunction], TaskFunction]:
    """Register a task: a source of items, and a function that computes the truth of one of them.

    Args:
        name: how it is asked for.
        items: ``(split, number, seed)`` to items.
        metrics: its figures, the primary one first.
        reads: which part of an explanation it scores.
        causal: the truth is an intervention on the model.
        restore: builds a truth from what its ``to_dict()`` gave.
        shows: what a high score shows.
        cannot_show: what it does not show.
        licence: of the items.
        paired: the truth compares the explanations of two subjects.
        compares: False: the table compares no method with a control, because one that is not right can be the best.

    Raises:
        InvalidInputError: the name is taken, no metric, or a function without a docstring.
    """

    def register(function: TaskFunction) -> TaskFunction:
        summary = _summary_of(function, "task")
        _refuse_taken(_TASKS.get(name), function, name)
        if not metrics:
            raise InvalidInputError(f"metrics: must hold at least one metric, got none for task {name!r}; name one")
        _TASKS[name] = EvaluationTask(
            name=name,
            items=items,
            function=function,
            metrics=tuple(metrics),
            reads=reads,
            causal=causal,
            restore=restore,
            summary=summary,
            shows=shows,
            cannot_show=cannot_show,
            licence=licence,
            paired=paired,
            compares=compares,
        )
        return function

    return register


def evaluation_method(
    name: str,
    *,
    gradient: bool = False,
    trivial: bool = False,
    gives: Sequence[Literal["tokens", "edges"]] = ("tokens",),
    requires: str | None = None,
) -> Callable[[MethodFunction], MethodFunction]:
    """Register a method: a function that scores the tokens of a subject.

    Args:
        name: how it is asked for.
        gradient: it needs a backward pass.
        trivial: a control that reads nothing of the model.
        gives: the parts of an explanation that it gives.
        requires: a package that it needs beyond the library.

    Raises:
        InvalidInputError: the name is taken, or a function without a docstring.

    Example:
        >>> import flowgraph as fg
        >>> @fg.evaluation_method("first tokens", trivial=True)
        ... def first_tokens(subject):
        ...     "Score early tokens higher."
        ...     return -torch.arange(subject.num_tokens, dtype=torch.float64)
        >>> "first tokens" in fg.evaluation_methods()
        True
    """

    def register(function: MethodFunction) -> MethodFunction:
        summary = _summary_of(function, "method")
        _refuse_taken(_METHODS.get(name), function, name)
        _METHODS[name] = EvaluationMethod(
            name=name,
            function=function,
            summary=summary,
            gradient=gradient,
            trivial=trivial,
            gives=tuple(gives),
            requires=requires,
        )
        return function

    return register


def registered_tasks() -> dict[str, EvaluationTask]:
    """Return the registered tasks by name."""
    return dict(_TASKS)


def registered_methods() -> dict[str, EvaluationMethod]:
    """Return the registered methods by name."""
    return dict(_METHODS)


def _summary_of(function: Callable[..., object], kind: str) -> str:
    """Return the first line of a docstring, which every registered function must have."""
    summary = (function.__doc__ or "").strip().split("\n")[0]
    if not summary:
        function_name = getattr(function, "__name__", repr(function))
        raise InvalidInputError(
            f"{kind}: needs a docstring whose first line describes it, got none on {function_name}; add one"
        )
    return summary


def _refuse_taken(known: EvaluationTask | EvaluationMethod | None, function: Callable[..., object], name: str) -> None:
    """Check that no other module registered a name; a module that is loaded again replaces its own."""
    if known is not None and known.function.__module__ != function.__module__:
        raise InvalidInputError(
            f"name: must be a new name, got {name!r}, which {known.function.__module__} registered; choose another"
        )
