"""Certify every flow on small graphs of every kind, solved in every way; each failure can be repeated alone.

    python -m benchmarks.fuzz.fuzz_certificates --graphs 100000
    python -m benchmarks.fuzz.fuzz_certificates --graphs 100000 --seed 0 --only 4711

Graphs are drawn in groups of 200 that are solved in one call each. Graph number k is

- solved by the four backends of ``solve`` and by ``solve_rows`` and streamed rows over the same capacities;
- every flow of ``solve`` certified at level "exact", and all of them compared, number by number;
- every 4th graph solved alone as well, compared with its batch, and, up to 12 tokens, certified at level "rational":
  every number against exact fractions;
- every 8th graph: V by igraph against an interval that is proved to contain it, and against networkx.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from flowgraph import (
    Certificate,
    Flow,
    certify,
    certify_each,
    max_flow,
    max_flow_bracket,
    solve,
    solve_rows,
)
from flowgraph.certificate.flow_arrays import NEGLIGIBLE_FLOW
from flowgraph.maxflow.verification import relative_tolerance
from flowgraph.propagation.conservation import conserve
from flowgraph.propagation.row_sources import MatrixRows
from flowgraph.propagation.row_sweeps import StreamSweeps

BACKENDS = ("reference", "scatter", "dense", "numba")
ROWS = ("rows dense", "rows numba", "rows streamed")
ALONE_EVERY = 4
"""Every so many graphs, one is solved alone as well."""
RATIONAL_TOKENS = 12
"""Largest graph that is certified in fractions."""
MAX_FLOW_EVERY = 8
"""Every so many graphs, the max flow of one is computed in three ways."""
NUM_THROUGH = 4
"""Tokens of a certificate for which M[v] is computed."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """The flow on one graph, from one way of solving; vectors over its tokens, as in :class:`flowgraph.Flow`."""

    h: NDArray
    g: NDArray
    exponent: NDArray
    source: NDArray
    throughput: NDArray

    def difference(self, other: Numbers) -> tuple[float, str]:
        """Compute the largest relative difference of any number, and name it; influence counts where flow passes."""
        # h and g in the scale of the other solution.
        scale_change = self.exponent - other.exponent
        h = np.ldexp(self.h, scale_change)
        g = np.ldexp(self.g, -scale_change)
        carries_flow = np.maximum(self.throughput, other.throughput) >= NEGLIGIBLE_FLOW

        differences = {
            "h": _largest_difference(h, other.h),
            "g": _largest_difference(g[carries_flow], other.g[carries_flow]),
            "source": _largest_difference(self.source, other.source, NEGLIGIBLE_FLOW),
            "throughput": _largest_difference(self.throughput, other.throughput, NEGLIGIBLE_FLOW),
        }

        # NaN is the worst difference.
        names = list(differences)
        worst = int(np.argmax(np.nan_to_num(list(differences.values()), nan=np.inf)))
        return differences[names[worst]], names[worst]


def _largest_difference(one: NDArray, other: NDArray, floor: float = 0.0) -> float:
    """Compute the largest difference relative to the larger number and at least ``floor``."""
    scale = np.maximum(np.maximum(np.abs(one), np.abs(other)), floor)
    difference = np.abs(one - other)
    with np.errstate(invalid="ignore"):
        relative = difference / np.where(scale > 0, scale, 1.0)
    return float(np.max(np.where(difference == 0, 0.0, relative), initial=0.0))


def fuzz_group(seed: int, numbers: Sequence[int], only: int | None = None) -> Report:
    """Solve one group in one call per way, and check each graph of it, or one graph alone."""
    report = Report()
    options = Options.of(seed, numbers[0] // GROUP)
    cases = [draw(seed, number) for number in numbers]
    checked = [k for k, case in enumerate(cases) if only in (None, case.number)]
    report.graphs = len(checked)
    report.kinds.update(cases[k].kind for k in checked)

    # Solve the group in every way. An error of any kind is a finding, reported on the first graph that is checked.
    solved: dict[str, list[Numbers]] = {}
    first_number = cases[checked[0]].number
    for backend in BACKENDS:
        try:
            flow = _solve_batch(cases, options, backend)
        except Exception as error:  # noqa: BLE001
            report.error(first_number, f"{backend}, a batch of {len(cases)}", error)
            continue
        solved[backend] = _split(flow, cases)
        _certify_all(report, flow, cases, checked, backend)
    for way in ROWS:
        try:
            solved[way] = _solve_over_rows(way, options, cases)
        except Exception as error:  # noqa: BLE001
            report.error(first_number, f"{way}, a batch of {len(cases)}", error)

    # Check each graph: all ways agree, alone as in the batch, and the max flow.
    for k in checked:
        case = cases[k]
        by_way = {way: parts[k] for way, parts in solved.items()}
        _compare(report, case, by_way)
        is_selected = only is not None
        if is_selected or case.number % ALONE_EVERY == 0:
            _check_alone(report, options, case, by_way)
        if case.valid and (is_selected or case.number % MAX_FLOW_EVERY == 0):
            _guarded(report, case, "max flow", partial(_max_flows, report, options, case))
    return report


def _solve_batch(cases: Sequence[Case], options: Options, backend: str) -> Flow:
    batch = Batch.from_data_list([case.graph for case in cases])
    return solve(batch, backend=backend, **_solve_options(options, cases))  # type: ignore[arg-type]


def _solve_options(options: Options, cases: Sequence[Case]) -> dict[str, Any]:
    """Build the options of ``solve`` for some graphs in one call."""
    source: Any = options.source
    if options.source == "vector":
        source = torch.from_numpy(np.concatenate([case.source for case in cases]))
    demand = None
    if options.own_demand:
        demand = torch.from_numpy(np.concatenate([case.demand for case in cases]))
    return {"source": source, "demand": demand, "absorption": options.absorption, "damping": options.damping}


def _split(flow: Flow, cases: Sequence[Case]) -> list[Numbers]:
    """Split the flow over a batch into its graphs."""
    ends = np.cumsum([case.tokens for case in cases])
    parts = []
    for case, end in zip(cases, ends, strict=True):
        nodes = slice(end - case.tokens, end)
        parts.append(
            Numbers(
                h=flow.h[nodes].numpy(),
                g=flow.g[nodes].numpy(),
                exponent=flow.exponent[nodes].numpy(),
                source=flow.source[nodes].numpy(),
                throughput=flow.throughput[nodes].numpy(),
            )
        )
    return parts


def _solve_over_rows(way: str, options: Options, cases: Sequence[Case]) -> list[Numbers]:
    """Solve the same graphs as padded matrices of capacities."""
    size = max(case.tokens for case in cases)
    matrix = torch.zeros(len(cases), size, size, dtype=options.dtype)
    for k, case in enumerate(cases):
        source_token, target_token = case.pairs
        matrix[k, target_token, source_token] = torch.from_numpy(case.capacity)

    question = _padded([case.question for case in cases], size)
    answer = _padded([case.answer for case in cases], size)
    source: Any = options.source
    if options.source == "vector":
        source = _padded([case.source for case in cases], size)
    if options.own_demand:
        demand = _padded([case.demand for case in cases], size)
        absorption = options.absorption or "pass_through"
    else:
        demand = answer.double()
        absorption = options.absorption or "absorb"

    if way == "rows streamed":
        absorbing = answer & (absorption == "absorb")
        propagation_factor = (~absorbing).double() * options.damping
        flow: Any = conserve(
            StreamSweeps(propagation_factor), MatrixRows(matrix), demand=demand, question=question, source=source
        )
        throughput = flow.g * flow.h
    else:
        # A single token is question and answer at once, which rows refuse: its demand is given, and no answer.
        is_valid = torch.tensor([case.valid for case in cases])[:, None]
        backend: Any = way.removeprefix("rows ")
        flow = solve_rows(
            matrix,
            question=question,
            answer=answer & is_valid,
            preset=None,
            backend=backend,
            source=source,
            demand=demand,
            absorption=absorption,  # type: ignore[arg-type]
            damping=options.damping,
        )
        throughput = flow.throughput

    parts = []
    for k, case in enumerate(cases):
        tokens = slice(case.tokens)
        parts.append(
            Numbers(
                h=flow.h[k, tokens].numpy(),
                g=flow.g[k, tokens].numpy(),
                exponent=flow.exponent[k, tokens].numpy(),
                source=flow.source[k, tokens].numpy(),
                throughput=throughput[k, tokens].numpy(),
            )
        )
    return parts


def _padded(vectors: Sequence[NDArray], size: int) -> Tensor:
    """Stack vectors of different lengths, padded with zeros on the right."""
    rows = [np.pad(vector, (0, size - vector.size)) for vector in vectors]
    return torch.from_numpy(np.stack(rows))


def _certify_all(report: Report, flow: Flow, cases: Sequence[Case], checked: Sequence[int], way: str) -> None:
    """Certify the graphs of a batch as they were solved there."""
    settings: dict[str, Any] = {"level": "exact", "num_through": NUM_THROUGH}
    certificates: list[Certificate | None] = [None] * len(cases)
    try:
        certificates = list(certify_each(flow, **settings))
    except Exception:  # noqa: BLE001
        # One graph at a time, to find out on which graph it fails.
        for k in checked:
            certify_one = partial(certify, _part(flow, cases, k), **settings)
            certificates[k] = _guarded(report, cases[k], f"{way}, certify", certify_one)
    for k in checked:
        certificate = certificates[k]
        if certificate is not None:
            _count(report, cases[k], certificate, way)


def _part(flow: Flow, cases: Sequence[Case], k: int) -> Flow:
    """Extract the flow on one graph of a batch."""
    first = sum(case.tokens for case in cases[:k])
    nodes = slice(first, first + cases[k].tokens)
    return replace(
        flow,
        graph=cases[k].graph,
        h=flow.h[nodes],
        g=flow.g[nodes],
        exponent=flow.exponent[nodes],
        throughput=flow.throughput[nodes],
        source=flow.source[nodes],
        demand=flow.demand[nodes],
        absorbing=flow.absorbing[nodes],
    )


def _guarded(report: Report, case: Case, way: str, run: Callable[[], Any]) -> Any:
    """Call a function; an error of any kind is a failure of this graph, and the result is None."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        report.error(case.number, way, error)
        return None


def _count(report: Report, case: Case, certificate: Certificate, way: str) -> None:
    """Add the checks of one certificate; the certificate of an invalid graph must fail its one check."""
    if not case.valid:
        made = [check.name for check in certificate.checks]
        failed = [check.name for check in certificate.failed]
        is_refused = failed == made == ["graph"]
        detail = "" if is_refused else str(certificate)
        report.add("one token refused", float(not is_refused), 0, case.number, way, detail)
        return
    report.flows += 1
    for check in certificate.checks:
        report.add(check.name, check.residual, check.bound, case.number, way, check.detail)


def _compare(report: Report, case: Case, by_way: dict[str, Numbers], name: str = "ways agree") -> None:
    """Compare every way with the first one; among all ways, the first is the plain loops over edges."""
    first, *others = by_way
    for way in others:
        difference, number = by_way[way].difference(by_way[first])
        report.add(name, difference, case.bound, case.number, f"{way} against {first}", number)


def _check_alone(report: Report, options: Options, case: Case, in_batch: dict[str, Numbers]) -> None:
    """Solve the graph without its batch: compare with its batch, and certify against fractions."""
    for backend in BACKENDS:
        way = f"{backend}, alone"
        solve_alone = partial(solve, case.graph, backend=backend, **_solve_options(options, [case]))
        flow = _guarded(report, case, way, solve_alone)
        if flow is None:
            continue
        if backend in in_batch:
            both = {"its batch": in_batch[backend], way: _split(flow, [case])[0]}
            _compare(report, case, both, "alone as in a batch")
        if case.valid and case.tokens <= RATIONAL_TOKENS:
            certify_alone = partial(certify, flow, level="rational", num_through=NUM_THROUGH)
            certificate = _guarded(report, case, f"{way}, certify", certify_alone)
            if certificate is not None:
                _count(report, case, certificate, way)


def _max_flows(report: Report, options: Options, case: Case) -> None:
    """Compute V in three ways: igraph, integers without rounding, networkx."""
    flow = solve(case.graph, **_solve_options(options, [case]))
    has_shared_terminal = bool(((flow.source > 0) & (flow.demand > 0)).any())
    if has_shared_terminal or not bool(flow.feasible):
        return
    # igraph: V in [cut - error, cut] must meet the interval of the integers, and that interval must be narrow.
    best = max_flow(flow)
    low, high = max_flow_bracket(flow)
    outside = max(low - best.cut_capacity, best.cut_capacity - best.error - high, 0.0)
    detail = f"V in [{low!r}, {high!r}] and {best!r}"
    V = best.cut_capacity
    report.add("V inside the bracket", outside / V, 4 * EPS, case.number, "igraph", detail)
    # One unit of 2**-50 of the sum per edge; the sum is at most twice the cut per edge, the cut at most V per edge.
    width_bound = 2 * case.capacity.size**3 * 2.0**-49
    report.add("bracket width", (high - low) / V, width_bound, case.number, "max_flow_bracket", detail)

    peer = _guarded(report, case, "networkx", partial(max_flow, flow, backend="networkx"))
    if peer is not None:
        difference = abs(peer.cut_capacity - V) / V
        bound = relative_tolerance(case.capacity.size)
        report.add("V by networkx", difference, bound, case.number, "networkx", f"{peer!r} and {best!r}")


def fuzz(
    graphs: int,
    seed: int = 0,
    *,
    workers: int = 1,
    only: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Draw, solve and check; the report of a seed is the same for any number of workers.

    Args:
        graphs: how many.
        seed: of all that is drawn.
        workers: processes; 1 is this one.
        only: check this graph alone, solved in the group that it belongs to and by itself.
        progress: called after every group with the report so far.

    Raises:
        ValueError: a number outside its range.
    """
    require_valid_run(graphs, seed, workers, only)
    started = time.perf_counter()
    report = Report()
    groups = [range(first, min(first + GROUP, graphs)) for first in range(0, graphs, GROUP)]
    if only is not None:
        groups = [groups[only // GROUP]]
    for part in _parts(seed, groups, workers, only):
        report.merge(part)
        report.seconds = time.perf_counter() - started
        progress(report)
    return report


def require_valid_run(graphs: int, seed: int, workers: int, only: int | None) -> None:
    """Refuse numbers outside their range."""
    for name, value, least in (("graphs", graphs, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}; pass a larger number")
    if only is not None and not 0 <= only < graphs:
        raise ValueError(f"only: must lie in 0..{graphs - 1}, got {only}; graphs are numbered from 0")


def _parts(seed: int, groups: list[range], workers: int, only: int | None) -> Iterator[Report]:
    """Yield the report of each group, in order."""
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
        require_valid_run(chosen.graphs, chosen.seed, chosen.workers, chosen.only)
    except ValueError as error:
        parser.error(str(error))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = 1 if chosen.only is not None else chosen.graphs
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("graphs", total=total)

        def progress(report: Report) -> None:
            description = "graphs"
            if report.failures:
                description = f"graphs, {len(report.failures)} failures"
            bar.update(task, completed=report.graphs, description=description)

        report = fuzz(chosen.graphs, chosen.seed, workers=chosen.workers, only=chosen.only, progress=progress)

    if chosen.only is None:
        write(report, chosen.seed, str(__doc__), chosen.json)
    elif not report.failures:
        print(described(chosen.seed, draw(chosen.seed, chosen.only)))
    show(report, chosen.seed, chosen.graphs)
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
