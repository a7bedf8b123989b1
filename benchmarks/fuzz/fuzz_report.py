"""The report of a fuzz run: counts and failures, printed and written as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import machine, print_table
from benchmarks.fuzz.fuzz_graphs import described, draw


@dataclass
class Tally:
    """One check over many graphs.

    Attributes:
        made: number of times it was made.
        vacuous: number of times its bound was 1 or more, so that it could not fail (a max flow at capacities of 1e-300
            beside 1e300).
        closest: largest residual / bound among the others; 0 where the residual must be 0 and was.
        graph: number of the graph where that was.
    """

    made: int = 0
    vacuous: int = 0
    closest: float = 0.0
    graph: int | None = None

    def add(self, residual: float, bound: float, number: int) -> None:
        """Count one check of one graph."""
        self.made += 1
        if bound >= 1:
            self.vacuous += 1
        elif bound > 0 and residual / bound > self.closest:
            self.closest = residual / bound
            self.graph = number

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally of the same check."""
        self.made += other.made
        self.vacuous += other.vacuous
        if other.closest > self.closest:
            self.closest = other.closest
            self.graph = other.graph


@dataclass(frozen=True)
class Failure:
    """One check that did not hold, or an error that should not have been raised.

    Attributes:
        number: of the graph.
        way: how it was solved.
        check: name of the check, or of the exception.
        residual: how far the check is from holding.
        bound: largest residual that rounding can explain.
        detail: the numbers behind it.
    """

    number: int
    way: str
    check: str
    residual: float
    bound: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.way}: {self.check}: {self.residual:.3g} > {self.bound:.3g} {self.detail}".rstrip()


@dataclass
class Report:
    """The findings of a run, summed over its groups.

    Attributes:
        graphs: number of graphs checked.
        flows: number of flows certified.
        checks: one tally per check.
        kinds: number of graphs of each kind.
        failures: in the order of the graphs.
        seconds: wall time.
    """

    graphs: int = 0
    flows: int = 0
    checks: dict[str, Tally] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, residual: float, bound: float, number: int, way: str, detail: str = "") -> None:
        """Count one check, and report it where it does not hold."""
        self.checks.setdefault(name, Tally()).add(residual, bound, number)
        if not residual <= bound:
            self.failures.append(Failure(number, way, name, residual, bound, detail))

    def error(self, number: int, way: str, error: Exception) -> None:
        """Add an error as a failure."""
        name = f"raised {type(error).__name__}"
        self.failures.append(Failure(number, way, name, float("inf"), 0.0, str(error)))

    def merge(self, other: Report) -> None:
        """Add the findings of another group."""
        self.graphs += other.graphs
        self.flows += other.flows
        self.kinds.update(other.kinds)
        self.failures += other.failures
        for name, tally in other.checks.items():
            self.checks.setdefault(name, Tally()).merge(tally)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table: one row per check; an error has a row of its own."""
        failed = Counter(failure.check for failure in self.failures)
        tallies = dict(self.checks)
        for name in failed:
            tallies.setdefault(name, Tally())

        rows = []
        for name, tally in tallies.items():
            row = {
                "check": name,
                "made": tally.made,
                "failed": failed[name],
                "vacuous": tally.vacuous,
                "closest": tally.closest,
                "graph": tally.graph,
            }
            rows.append(row)
        return rows


def show(report: Report, seed: int, graphs: int, shown: int = 20) -> None:
    """Print the table, and each failing graph with the command that repeats it."""
    print_table(report.rows())
    rate = report.graphs / max(report.seconds, 1e-9)
    num_checks = sum(tally.made for tally in report.checks.values())
    print(
        f"\n{report.graphs:,} graphs, {report.flows:,} flows certified, {num_checks:,} checks, "
        f"{len(report.failures):,} failures; {report.seconds:.0f} s, {rate:.0f} graphs/s"
    )

    by_graph: dict[int, list[Failure]] = {}
    for failure in report.failures:
        by_graph.setdefault(failure.number, []).append(failure)
    for number, failures in list(by_graph.items())[:shown]:
        print(f"\n{described(seed, draw(seed, number))}")
        for failure in failures:
            print(f"  FAILED {failure}")
        print(f"  again: python -m benchmarks.fuzz.fuzz_certificates --graphs {graphs} --seed {seed} --only {number}")
    if len(by_graph) > shown:
        print(f"\n... and {len(by_graph) - shown} more graphs: {sorted(by_graph)[:200]}")


def write(report: Report, seed: int, notes: str, path: Path) -> None:
    """Write the result as JSON, in the form of the other benchmarks."""
    # An infinite residual is written as text, which JSON can hold.
    failures = [{**vars(failure), "residual": str(failure.residual)} for failure in report.failures[:1000]]
    result = {
        "benchmark": "fuzz_certificates",
        "notes": notes,
        "machine": machine(),
        "seed": seed,
        "graphs": report.graphs,
        "kinds": dict(sorted(report.kinds.items())),
        "flows_certified": report.flows,
        "seconds": round(report.seconds, 1),
        "graphs_per_second": round(report.graphs / max(report.seconds, 1e-9), 1),
        "failures": failures,
        "num_failures": len(report.failures),
        "rows": report.rows(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
