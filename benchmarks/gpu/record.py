"""What a section finds: rows, checks, and the parts that failed or were left out, as one JSON file."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.context import Context, DeviceLostError
from benchmarks.gpu.timing import release
from flowgraph import atomic_write

SCHEMA = "flowgraph-gpu/1"
"""Version of the files' layout."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Check:
    """One statement that must hold.

    Attributes:
        name: what is stated.
        holds: whether it does.
        value: the figure that was found, where there is one.
        bound: what it must not exceed.
    """

    name: str
    holds: bool
    value: float | None = None
    bound: float | None = None


@dataclass
class Record:
    """The result of one section, written to its file whenever a part of it ends.

    Attributes:
        name, title: of the section.
        path: its file.
        context: of the run.
        limit: seconds that the section may take.
        status: ``"running"``, then ``"complete"`` (every part ran), ``"incomplete"`` (a part failed or was left out),
            ``"failed"`` (an exception outside of its parts), ``"timed out"`` or ``"skipped"`` (never begun).
        seconds: time it took.
        message: why it failed, timed out or was skipped.
        notes: facts that hold for the whole section, such as definitions and sizes.
        checks, rows: what was found.
        failures: parts that raised, with message and traceback.
        skipped: parts that were left out, with the reason.
    """

    name: str
    title: str
    path: Path
    context: Context
    limit: float
    status: str = "running"
    seconds: float = 0.0
    message: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def failed_checks(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [check.name for check in self.checks if not check.holds]

    @property
    def passed(self) -> bool:
        """Whether every part ran and every check held."""
        return self.status == "complete" and not self.failed_checks

    def row(self, **columns: Any) -> None:
        """Add a row of figures."""
        self.rows.append(columns)

    def check(self, name: str, value: float, bound: float) -> None:
        """Add a check that a figure does not exceed its bound; NaN never passes."""
        self._add(Check(name, bool(value <= bound), float(value), float(bound)))

    def require(self, name: str, holds: bool) -> None:
        """Add a check that is true or false."""
        self._add(Check(name, bool(holds)))

    def skip(self, part: str, reason: str) -> None:
        """Note a part that was left out."""
        self.skipped.append({"part": part, "reason": reason})
        self.context.say(f"{self.name}: {part} left out: {reason}")

    def attempt(self, part: str, run: Callable[[], Result], *, needs: float = 0.0) -> Result | None:
        """Run one part of the section; what it raises is recorded and does not end the section.

        Args:
            part: its name.
            run: what it does.
            needs: seconds below which it is not begun.

        Returns:
            What ``run`` returns; None if it was left out or failed.

        Raises:
            DeviceLostError: the device no longer answers, so nothing else can be measured by this process.
        """
        left = self.context.left()
        if left < needs or left <= 0:
            self.skip(part, f"needs about {needs:.0f} s, and {max(left, 0.0):.1f} s of the section's time are left")
            return None
        # One part must never take the others with it, whatever it raises.
        try:
            return run()
        except Exception as error:  # noqa: BLE001
            message = describe(error)
            self.failures.append({"part": part, "message": message, "traceback": traceback.format_exc()})
            self.context.say(f"{self.name}: {part} failed: {message}")
        finally:
            self.save()
        # The exception and its frames are gone here, so the tensors that they held can be freed.
        self._recover(part)
        return None

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "section": self.name,
            "title": self.title,
            "device": str(self.context.device),
            "toy": self.context.toy,
            "seed": self.context.seed,
            "status": self.status,
            "passed": self.passed,
            "seconds": self.seconds,
            "limit_seconds": self.limit,
            "message": self.message,
            "notes": self.notes,
            "checks": [asdict(check) for check in self.checks],
            "rows": self.rows,
            "failures": self.failures,
            "skipped": self.skipped,
        }

    def summary(self) -> dict[str, Any]:
        """The lines of the summary file that speak of this section."""
        return {
            "status": self.status,
            "passed": self.passed,
            "seconds": self.seconds,
            "limit_seconds": self.limit,
            "message": self.message,
            "num_checks": len(self.checks),
            "failed_checks": self.failed_checks,
            "failures": [failure["part"] + ": " + failure["message"] for failure in self.failures],
            "skipped": self.skipped,
            "file": self.path.name,
        }

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        if not check.holds:
            figures = "" if check.value is None else f" ({check.value:.3g}, bound {check.bound:.3g})"
            self.context.say(f"{self.name}: does not hold: {check.name}{figures}")

    def _recover(self, part: str) -> None:
        try:
            release(self.context.device)
        except RuntimeError as error:
            raise DeviceLostError(f"after {part}: {describe(error)}") from error
        if not self.context.device_answers():
            raise DeviceLostError(f"after {part}: the device no longer answers")


def describe(error: BaseException) -> str:
    """Type and first lines of an exception, as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as strict JSON, whole or not at all; numbers that are not finite become None."""
    text = json.dumps(plain(values), indent=1, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The same values in the types that JSON has."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
