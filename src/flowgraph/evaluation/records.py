"""The records of an evaluation: an item, an explanation of it, and the truth that the explanation is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowgraph.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class EvaluationItem:
    """One text that every method explains.

    Attributes:
        id: unique within its task and split; names the item's file, so it holds letters, digits, ``-`` and ``_``.
        prompt: a string, or chat messages.
        response: the text that is read; None: what the model under test generates greedily.
        answer: the answer's place, as ``flowgraph.trace(answer=...)`` takes it; None: found in the response.
        question: the question's place, as ``flowgraph.trace(question=...)`` takes it; None: found in the prompt.
        data: what the task needs of the item, as plain JSON values: gold spans, values, the right answer.
    """

    id: str
    prompt: str | list[dict[str, Any]]
    response: str | None = None
    answer: Any = None
    question: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Explanation:
    """The scores of one text by a method. At least one of the two fields is given.

    Attributes:
        tokens: ``[tokens]``, importance of each token for the answer; higher is more, and negative values are allowed.
        edges: ``[tokens, tokens]``, row: the reader, column: the earlier token that is read; 0 where there is no edge.
    """

    tokens: Float[Tensor, " tokens"] | None = None
    edges: Float[Tensor, "tokens tokens"] | None = None

    def __post_init__(self) -> None:
        """Check that there is something, and that it is finite.

        Raises:
            InvalidInputError: neither tokens nor edges, or NaN or infinite scores.
        """
        given = [values for values in (self.tokens, self.edges) if values is not None]
        if not given:
            raise InvalidInputError("explanation: must hold tokens or edges, got neither; return scores of tokens")
        for values in given:
            if not bool(torch.isfinite(values).all()):
                raise InvalidInputError(
                    "explanation: its scores must be finite, got NaN or infinity; correct the method"
                )

    def of_units(self, units: Sequence[Sequence[int]]) -> Float[Tensor, " units"]:
        """Sum the scores of the tokens of each unit (a line, a step, a word).

        Args:
            units: token positions of each unit.

        Raises:
            InvalidInputError: the explanation has no token scores.
        """
        if self.tokens is None:
            raise InvalidInputError(
                "explanation: must hold token scores for this task, got edges only; return tokens= as well"
            )
        sums = []
        for unit in units:
            positions = torch.as_tensor(list(unit), dtype=torch.long)
            sums.append(self.tokens[positions].sum())
        if not sums:
            return self.tokens.new_zeros(0)
        return torch.stack(sums)

    def between_units(self, units: Sequence[Sequence[int]]) -> Float[Tensor, "units units"]:
        """Sum the scores of the edges between each pair of units; row: the unit that reads.

        Args:
            units: token positions of each unit.

        Raises:
            InvalidInputError: the explanation has no edge scores.
        """
        if self.edges is None:
            raise InvalidInputError(
                "explanation: must hold edge scores for this task, got token scores only; return edges= as well"
            )
        # With M[u, t] = 1 for the tokens t of unit u, the sums are M E M^T.
        num_tokens = self.edges.shape[0]
        membership = self.edges.new_zeros(len(units), num_tokens)
        for number, unit in enumerate(units):
            positions = torch.as_tensor(list(unit), dtype=torch.long)
            membership[number, positions] = 1
        return membership @ self.edges @ membership.T


@runtime_checkable
class Truth(Protocol):
    """What is known or was measured of one item; compares an explanation with it."""

    @property
    def unusable(self) -> str | None:
        """Why the item decides nothing (all effects are 0, fewer units than the metric needs); None if it decides."""
        ...

    def score(self, explanation: Explanation) -> Mapping[str, float]:
        """Return the value of every metric of the task; NaN where a metric is undefined for this item."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the truth as plain JSON values: the units as token positions, and the effect or gold of each."""
        ...


@runtime_checkable
class PairedTruth(Truth, Protocol):
    """A truth that compares two explanations by one method: of the item, and of the item under a changed condition.

    A task whose truths are of this kind is registered with ``paired=True``. The condition is another subject: the same
    text under a model with random weights, with another answer, or with another question. ``score`` needs both
    explanations and raises; :func:`flowgraph.evaluation.scoring.score_of` runs the method on both subjects.
    """

    @property
    def other_subject(self) -> Any:
        """The :class:`flowgraph.Subject` under the changed condition; None where the item is unusable."""
        ...

    def score_pair(self, explanation: Explanation, other: Explanation) -> Mapping[str, float]:
        """Return the value of every metric of the task; ``other`` explains :attr:`other_subject`."""
        ...
