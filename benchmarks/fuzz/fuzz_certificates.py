"""A certificate for every flow on small graphs of every kind, solved in every way; each failure can be had again alone.

    python -m benchmarks.fuzz.fuzz_certificates --graphs 100000
    python -m benchmarks.fuzz.fuzz_certificates --graphs 100000 --seed 0 --only 4711

Graphs are drawn in groups of 200 that are solved in one call each. What is done with graph number k:

- solved by the four backends of ``solve`` and by ``solve_rows`` and streamed rows over the same capacities;
- every flow of ``solve`` certified at level "exact", and all of them compared, number by number;
- every 4th graph solved alone as well, compared with what its batch said, and, up to 12 tokens, certified at level
  "rational": every number against exact fractions;
- every 8th graph: V by igraph against an interval that contains it for certain, and against networkx.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch_geometric.data import Batch

from benchmarks.common import RESULTS
from benchmarks.fuzz.fuzz_graphs import EPS, GROUP, Case, Options, described, draw
from benchmarks.fuzz.fuzz_report import Report, show, write
from flowgraph.certificate.certify import Certificate, certify, certify_each
from flowgraph.certificate.flow_arrays import NEGLIGIBLE_FLOW
from flowgraph.errors import NumericalRangeError
from flowgraph.flow.solve import solve
from flowgraph.flow.solve_rows import solve_rows
from flowgraph.maxflow.max_flow import max_flow, max_flow_bracket
from flowgraph.maxflow.verification import TOLERANCE, MaxFlow
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.row_sources import MatrixRows
from flowgraph.propagation.row_sweeps import StreamSweeps

BACKENDS = ("reference", "scatter", "dense", "numba")
ROWS = ("rows dense", "rows numba", "rows streamed")
ALONE_EVERY, RATIONAL_TOKENS, MAX_FLOW_EVERY, NUM_THROUGH = 4, 12, 8, 4


@dataclass(frozen=True, eq=False)
class Numbers:
    """What one way of solving says about one graph."""

    h: NDArray
    g: NDArray
    exponent: NDArray
    source: NDArray
    throughput: NDArray

    def difference(self, other: Numbers) -> tuple[float, str]:
        """Largest relative difference of any number, and of which; influence counts where flow passes."""
        units = self.exponent - other.exponent
        flows = np.maximum(self.throughput, other.throughput) >= NEGLIGIBLE_FLOW
        apart = {
            "h": _apart(np.ldexp(self.h, units), other.h),
            "g": _apart(np.ldexp(self.g, -units)[flows], other.g[flows]),
            "source": _apart(self.source, other.source, NEGLIGIBLE_FLOW),
            "throughput": _apart(self.throughput, other.throughput, NEGLIGIBLE_FLOW),
        }
        name = max(apart, key=lambda key: np.inf if np.isnan(apart[key]) else apart[key])
        return apart[name], name


def _apart(one: NDArray, other: NDArray, floor: float = 0.0) -> float:
    scale = np.maximum(np.maximum(np.abs(one), np.abs(other)), floor)
    gap = np.abs(one - other)
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(gap == 0, 0.0, gap / np.where(scale > 0, scale, 1.0)), initial=0.0))


def fuzz_group(seed: int, numbers: Sequence[int], only: int | None = None) -> Report:
    """Solve one group in one call per way, and check each graph of it, or only one."""
    report, options = Report(), Options.of(seed, numbers[0] // GROUP)
    cases = [draw(seed, number) for number in numbers]
    checked = [k for k, case in enumerate(cases) if only in (None, case.number)]
    report.graphs = len(checked)
    report.kinds.update(cases[k].kind for k in checked)
    solved: dict[str, list[Numbers]] = {}
    for backend in BACKENDS:
        try:
            flow = solve(
                Batch.from_data_list([*(case.graph for case in cases)]), backend=backend, **_own(options, cases)
            )
        except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
            report.error(cases[checked[0]].number, f"{backend}, a batch of {len(cases)}", error)
            continue
        solved[backend] = _split(flow, cases)
        _certify_all(report, flow, cases, checked, backend)
    for way in ROWS:
        try:
            solved[way] = _over_rows(way, options, cases)
        except Exception as error:  # noqa: BLE001
            report.error(cases[checked[0]].number, f"{way}, a batch of {len(cases)}", error)
    for k in checked:
        _compare(report, cases[k], {way: parts[k] for way, parts in solved.items()})
        if cases[k].number % ALONE_EVERY == 0 or only is not None:
            _alone(report, options, cases[k], {way: parts[k] for way, parts in solved.items()})
        if cases[k].valid and (cases[k].number % MAX_FLOW_EVERY == 0 or only is not None):
            _guarded(report, cases[k], "max flow", partial(_max_flows, report, options, cases[k]))
    return report


def _own(options: Options, cases: Sequence[Case]) -> dict[str, Any]:
    """Options of ``solve`` for some graphs in one call."""

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([vars(case)[name] for case in cases]))

    return {
        "source": joined("source") if options.source == "vector" else options.source,
        "demand": joined("demand") if options.own_demand else None,
        "absorption": options.absorption,
        "damping": options.damping,
    }


def _split(flow: Any, cases: Sequence[Case]) -> list[Numbers]:
    ends = np.cumsum([case.tokens for case in cases])[:-1]
    parts = [np.split(getattr(flow, name).numpy(), ends) for name in Numbers.__annotations__]
    return [Numbers(*part) for part in zip(*parts, strict=True)]


def _over_rows(way: str, options: Options, cases: Sequence[Case]) -> list[Numbers]:
    """The same graphs as padded matrices of capacities."""
    size = max(case.tokens for case in cases)

    def padded(vectors: Iterable[NDArray]) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(vector, (0, size - vector.size)) for vector in vectors]))

    matrix = torch.zeros(len(cases), size, size, dtype=options.dtype)
    for k, case in enumerate(cases):
        matrix[k, case.pairs[1], case.pairs[0]] = torch.from_numpy(case.capacity)
    # One token is question and answer at once, which rows refuse; there its demand is given, and no answer.
    alone = torch.tensor([not case.valid for case in cases])[:, None]
    question, answer = padded(case.question for case in cases), padded(case.answer for case in cases)
    demand = padded(case.demand for case in cases) if options.own_demand else answer.double()
    absorption = options.absorption or ("pass_through" if options.own_demand else "absorb")
    source: Any = padded(case.source for case in cases) if options.source == "vector" else options.source
    if way == "rows streamed":
        leaves = (~(answer & (absorption == "absorb"))).double() * options.damping
        flow: Any = conserve(StreamSweeps(leaves), MatrixRows(matrix), demand=demand, question=question, source=source)
        throughput = flow.g * flow.h
    else:
        kind: Any = way.removeprefix("rows ")
        flow = solve_rows(
            matrix, question=question, answer=answer & ~alone, preset=None, backend=kind, source=source,
            demand=demand, absorption=absorption, damping=options.damping,  # type: ignore[arg-type]
        )  # fmt: skip
        throughput = flow.throughput
    vectors = [x.numpy() for x in (flow.h, flow.g, flow.exponent, flow.source, throughput)]
    return [Numbers(*(x[k, : case.tokens] for x in vectors)) for k, case in enumerate(cases)]


def _certify_all(report: Report, flow: Any, cases: Sequence[Case], checked: Sequence[int], way: str) -> None:
    """Certify the graphs of a batch as they were solved there."""
    settings: dict[str, Any] = {"level": "exact", "num_through": NUM_THROUGH}
    try:
        certificates: list[Certificate | None] = [*certify_each(flow, **settings)]
    except Exception:  # noqa: BLE001  on which graph, the loop finds out
        certificates = [None] * len(cases)
    for k in checked:
        certificate = certificates[k]
        if certificate is None:
            one = partial(certify, _part(flow, cases, k), **settings)
            certificate = _guarded(report, cases[k], f"{way}, certify", one)
        if certificate is not None:
            _count(report, cases[k], certificate, way)


def _part(flow: Any, cases: Sequence[Case], k: int) -> Any:
    """The flow on one graph of a batch."""
    first = sum(case.tokens for case in cases[:k])
    nodes = slice(first, first + cases[k].tokens)
    names = (*Numbers.__annotations__, "demand", "absorbing")
    return replace(flow, graph=cases[k].graph, **{name: getattr(flow, name)[nodes] for name in names})


def _guarded(report: Report, case: Case, way: str, run: Callable[[], Any]) -> Any:
    """What it returns; an error of any kind is a failure of this graph."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        report.error(case.number, way, error)
        return None


def _count(report: Report, case: Case, certificate: Certificate, way: str) -> None:
    if not case.valid:
        refused = [check.name for check in certificate.failed] == ["graph"] == [c.name for c in certificate.checks]
        report.add("one token refused", float(not refused), 0, case.number, way, str(certificate) * (not refused))
        return
    report.flows += 1
    for check in certificate.checks:
        report.add(check.name, check.residual, check.bound, case.number, way, check.detail)


def _compare(report: Report, case: Case, solved: dict[str, Numbers], name: str = "ways agree") -> None:
    """Every way against the first, the plain loops over edges."""
    ways = list(solved)
    for way in ways[1:]:
        apart, number = solved[way].difference(solved[ways[0]])
        report.add(name, apart, case.bound, case.number, f"{way} against {ways[0]}", number)


def _alone(report: Report, options: Options, case: Case, together: dict[str, Numbers]) -> None:
    """The graph without its batch: the same numbers, and these against fractions."""
    for backend in BACKENDS:
        way = f"{backend}, alone"
        flow = _guarded(report, case, way, partial(solve, case.graph, backend=backend, **_own(options, [case])))
        if flow is None:
            continue
        if backend in together:
            both = {"its batch": together[backend], way: _split(flow, [case])[0]}
            _compare(report, case, both, "alone as in a batch")
        if case.valid and case.tokens <= RATIONAL_TOKENS:
            one = partial(certify, flow, level="rational", num_through=NUM_THROUGH)
            certificate = _guarded(report, case, f"{way}, certify", one)
            if certificate is not None:
                _count(report, case, certificate, way)


def _max_flows(report: Report, options: Options, case: Case) -> None:
    """V three times: igraph, integers that round nothing, networkx."""
    flow = solve(case.graph, **_own(options, [case]))
    if bool(((flow.source > 0) & (flow.demand > 0)).any()) or not bool(flow.feasible):
        return
    best, (low, high) = max_flow(flow), max_flow_bracket(flow)
    total = float(flow.weight.sum())
    outside = max(low - best.cut_capacity, best.cut_capacity - best.error - high, 0.0)
    detail = f"V in [{low!r}, {high!r}] and {best!r}"
    report.add("V inside the bracket", outside / total, 4 * EPS, case.number, "igraph", detail)
    report.add(
        "bracket width", (high - low) / total, case.capacity.size * 2.0**-49, case.number, "max_flow_bracket", detail
    )
    peer = _guarded(report, case, "networkx", partial(_by_networkx, flow, case))
    if peer is None:
        return
    apart = abs(peer.cut_capacity - best.cut_capacity) / total
    report.add("V by networkx", apart, TOLERANCE, case.number, "networkx", f"{peer!r} and {best!r}")


def _by_networkx(flow: Any, case: Case) -> MaxFlow | None:
    """None where it says that its floats failed the re-check, as they may at capacities far apart."""
    try:
        return max_flow(flow, backend="networkx")
    except NumericalRangeError:
        if case.weights != "wide":
            raise
        return None


def fuzz(
    graphs: int,
    seed: int = 0,
    *,
    workers: int = 1,
    only: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Draw, solve and check; the same report for the same seed, whatever the number of workers.

    Args:
        graphs: how many.
        seed: of all that is drawn.
        workers: processes; 1 is this one.
        only: check this graph alone, solved in the group that it belongs to and by itself.
        progress: told what has been found so far after every group.
    """
    refuse(graphs, seed, workers, only)
    started, report = time.perf_counter(), Report()
    groups = [range(first, min(first + GROUP, graphs)) for first in range(0, graphs, GROUP)]
    if only is not None:
        groups = [groups[only // GROUP]]
    for part in _parts(seed, groups, workers, only):
        report.merge(part)
        report.seconds = time.perf_counter() - started
        progress(report)
    return report


def refuse(graphs: int, seed: int, workers: int, only: int | None) -> None:
    """Say which number makes no run."""
    for name, value, least in (("graphs", graphs, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
    if only is not None and not 0 <= only < graphs:
        raise ValueError(f"only: must lie in 0..{graphs - 1}, got {only}; graphs are numbered from 0")


def _parts(seed: int, groups: list[range], workers: int, only: int | None) -> Iterator[Report]:
    run = partial(fuzz_group, seed, only=only)
    if workers == 1 or len(groups) == 1:
        yield from map(run, groups)
        return
    # Threads of torch and numba do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(run, groups)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, required=True, help="how many graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one graph of that run; nothing is written")
    parser.add_argument("--json", type=Path, default=RESULTS / "fuzz_certificates.json", metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        refuse(chosen.graphs, chosen.seed, chosen.workers, chosen.only)
    except ValueError as error:
        parser.error(str(error))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("graphs", total=chosen.graphs if chosen.only is None else 1)

        def progress(report: Report) -> None:
            found = f"graphs, {len(report.failures)} failures" if report.failures else "graphs"
            bar.update(task, completed=report.graphs, description=found)

        report = fuzz(chosen.graphs, chosen.seed, workers=chosen.workers, only=chosen.only, progress=progress)
    if chosen.only is None:
        write(report, chosen.seed, str(__doc__), chosen.json)
    elif not report.failures:
        print(described(chosen.seed, draw(chosen.seed, chosen.only)))
    show(report, chosen.seed, chosen.graphs)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
