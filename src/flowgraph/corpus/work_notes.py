"""What a worker works on, in a file that outlives the worker: a line that ends its worker again and again is found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flowgraph.files import read_json, write_text

LOADING = "the loading of the model"


class WorkNotes:
    """The notes on one task of a worker, as one small file.

    A worker notes each piece of work and its lines before it begins. A worker that takes a task over finds what the
    last one was at when it died, and counts a death to each of these lines.

    Args:
        path: the file; its folder exists while the run goes on.
        retries: number of deaths after which a line is still tried.

    Attributes:
        deaths: number of deaths by line.
        work: the piece of work that each of these lines died in last.
    """

    def __init__(self, path: Path, retries: int) -> None:
        self._path = path
        self._retries = retries
        self.deaths: dict[int, int] = {}
        self.work: dict[int, str] = {}
        found = read_json(path) or {}
        for number, deaths, work in found.get("deaths", []):
            self.deaths[number] = deaths
            self.work[number] = work
        # What was under way when the file was last written did not end.
        for number in found.get("lines", []):
            self.deaths[number] = self.deaths.get(number, 0) + 1
            self.work[number] = found["work"]

    def begin(self, work: str, lines: Iterable[int]) -> None:
        """Note a piece of work and the numbers of its lines before it begins.

        Raises:
            OutputError: the run has ended, or the folder cannot be written.
        """
        self._write(work, list(lines))

    def end(self) -> None:
        """Note that nothing is under way.

        Raises:
            OutputError: the run has ended, or the folder cannot be written.
        """
        if self.deaths:
            self._write("", [])
        else:
            self._path.unlink(missing_ok=True)

    def given_up(self, number: int) -> str | None:
        """Return why a line is not tried again; None where it is."""
        deaths = self.deaths.get(number, 0)
        if deaths <= self._retries:
            return None
        work = self.work[number]
        together = [other for other in self.deaths if self.work[other] == work and self.deaths[other] == deaths]
        beside = ""
        if len(together) > 1:
            beside = f" of the lines {', '.join(map(str, sorted(together)))}"
        return (
            f"line: must be traced without the death of its worker, got {deaths} deaths in {work}{beside}; give each "
            "worker more memory (fewer workers, a smaller batch_tokens), or leave the line out"
        )

    def _write(self, work: str, lines: list[int]) -> None:
        """Write the file."""
        deaths = [[number, count, self.work[number]] for number, count in sorted(self.deaths.items())]
        write_text(self._path, json.dumps({"work": work, "lines": lines, "deaths": deaths}))
