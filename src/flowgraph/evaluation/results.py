"""``Evaluation``: the outcome of a run as records of items, summaries of tasks, and rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgraph.corpus.tables import write_table
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.evaluation_folder import SCHEMA
from flowgraph.evaluation.tables import COLUMNS, Row, TaskSummary
from flowgraph.files import PathLike, write_json


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of :func:`flowgraph.evaluate`.

    Attributes:
        settings: model, tokenizer, versions and seed, as plain JSON values.
        methods: the methods that were compared, by name.
        summaries: one for each task and split: counts of items, and notes on what the table shows.
        rows: the table; see :meth:`table`.
        items: the record of every item, as plain JSON values; see ``flowgraph.evaluation.item_record``.
        out: the folder of the run; None where nothing was written.
    """

    settings: Mapping[str, Any]
    methods: tuple[str, ...]
    summaries: tuple[TaskSummary, ...]
    rows: tuple[Row, ...]
    items: tuple[Mapping[str, Any], ...]
    out: Path | None = None

    def table(
        self, task: str | None = None, *, metric: str | None = None, split: str | None = None, items: str = "all"
    ) -> list[Row]:
        """Return the rows of the table, best method first.

        Args:
            task: of one task; None: of all.
            metric: of one metric; None: of all; ``"primary"``: of the primary one.
            split: of one split; None: of all.
            items: ``"all"``, or ``"right"``: over the items that the model answers rightly (no rows where it answers
                none wrongly).

        Returns:
            Dictionaries with the names of ``flowgraph.evaluation.tables.COLUMNS``.

        Raises:
            InvalidInputError: a task that was not run, or a metric that it does not have.
        """
        tasks = list(dict.fromkeys(summary.task for summary in self.summaries))
        if task is not None and task not in tasks:
            raise InvalidInputError(
                f"task: must be one that was run, of {', '.join(tasks)}, got {task!r}; see Evaluation.summaries"
            )
        # From the widest choice to the narrowest.
        rows = [row for row in self.rows if row["items"] == items]
        if task is not None:
            rows = [row for row in rows if row["task"] == task]
        if split is not None:
            rows = [row for row in rows if row["split"] == split]
        if metric is None:
            return rows
        if metric == "primary":
            return [row for row in rows if row["primary"]]
        metrics = sorted({row["metric"] for row in rows})
        if rows and metric not in metrics:
            raise InvalidInputError(
                f"metric: must be 'primary' or of {', '.join(metrics)}, got {metric!r}; see Evaluation.rows"
            )
        return [row for row in rows if row["metric"] == metric]

    def to_dict(self) -> dict[str, Any]:
        """Return settings, summaries and rows as plain JSON values, without the records of the items."""
        return {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "methods": list(self.methods),
            "tasks": [summary.to_dict() for summary in self.summaries],
            "rows": [dict(row) for row in self.rows],
        }

    @property
    def unexpected(self) -> dict[str, int]:
        """Errors that are not the library's own, by text, with their number: faults of a method or a task."""
        found: dict[str, int] = {}
        for summary in self.summaries:
            for error, number in summary.unexpected.items():
                found[error] = found.get(error, 0) + number
        return found

    def write_tables(self, folder: PathLike) -> None:
        """Write ``table.json`` and ``table.csv`` into a folder, each atomically.

        Raises:
            OutputError: the folder cannot be written.
        """
        write_json(Path(folder) / "table.json", self.to_dict())
        write_table(Path(folder), "table", "csv", COLUMNS, [list(self.rows)])

    def __repr__(self) -> str:
        """Name tasks, methods and number of items."""
        tasks: Sequence[str] = [f"{summary.task} ({summary.split})" for summary in self.summaries]
        return (
            f"Evaluation({', '.join(tasks)}: {len(self.methods)} methods over {len(self.items)} items; "
            ".table() lists the results)"
        )
