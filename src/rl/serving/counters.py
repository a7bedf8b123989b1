"""Counters and gauges of the service in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

_PREFIX = "flowgraph_credit_"


class Counters:
    """Figures of one process by name and label."""

    def __init__(self) -> None:
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[str, float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def declare(self, name: str, text: str) -> None:
        """Declare a counter.

        Args:
            name: without the prefix; a counter ends in ``_total`` or in a unit.
            text: one line that describes it.
        """
        self._help[name] = (text, "counter")
        self._values[name] = {}

    def declare_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Declare a figure that is read when the metrics are."""
        self._help[name] = (text, "gauge")
        self._gauges[name] = value

    def add(self, name: str, value: float = 1, *, label: str = "") -> None:
        """Add to a declared counter.

        Args:
            name: as it was declared.
            value: what is added.
            label: such as ``status="200"``; its values are the service's own, so that there are few.
        """
        of_name = self._values[name]
        of_name[label] = of_name.get(label, 0) + value

    def text(self) -> str:
        """Return all figures, one a line.

        Example:
            >>> counters = Counters()
            >>> counters.declare("batches_total", "Forward passes.")
            >>> counters.add("batches_total", 2)
            >>> print(counters.text(), end="")
            # HELP flowgraph_credit_batches_total Forward passes.
            # TYPE flowgraph_credit_batches_total counter
            flowgraph_credit_batches_total 2
        """
        lines = []
        for name, (text, kind) in self._help.items():
            lines.append(f"# HELP {_PREFIX}{name} {text}")
            lines.append(f"# TYPE {_PREFIX}{name} {kind}")
            if kind == "gauge":
                values = {"": self._gauges[name]()}
            else:
                values = self._values[name] or {"": 0}
            for label, value in values.items():
                labels = f"{{{label}}}" if label else ""
                lines.append(f"{_PREFIX}{name}{labels} {value:.17g}")
        return "\n".join(lines) + "\n"
