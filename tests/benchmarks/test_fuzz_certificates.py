"""The long fuzz in small: a correct solver has no failures, and a failure is repeated by the number of its graph."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.fuzz import fuzz_certificates
from benchmarks.fuzz.fuzz_certificates import fuzz, main
from benchmarks.fuzz.fuzz_graphs import GROUP, KINDS, Case, Options, draw
from benchmarks.fuzz.fuzz_report import Report
from torch import Tensor

from flowgraph.propagation import reference

QUIET_SEED = 27
"""Both groups of this seed have no capacities of 1e-300 beside 1e300; the second is float32."""


def broken(edge_index: Tensor, weight: Tensor, propagation_factor: Tensor, inflow: Tensor) -> Tensor:
    """Run the influence sweep without the edges between tokens that are 19 apart."""
    skipped = (edge_index[1] - edge_index[0]) == 19
    return reference_influence(edge_index, torch.where(skipped, 0.0, weight), propagation_factor, inflow)


reference_influence = reference.influence


def test_a_short_run_finds_nothing():
    heard: list[int] = []
    report = fuzz(240, QUIET_SEED, progress=lambda so_far: heard.append(so_far.graphs))
    assert report.failures == []
    assert heard == [200, 240]
    assert report.graphs == 240
    assert set(report.kinds) == set(KINDS)
    assert {Options.of(QUIET_SEED, group).flavour for group in range(2)} == {"ordinary"}
    several = sum(draw(QUIET_SEED, number).valid for number in range(240))
    assert report.flows >= 4 * several
    wanted = {"out-mass", "influence", "max flow", "rational h", "V inside the bracket", "V by networkx", "ways agree"}
    assert wanted <= set(report.checks)
    for name, tally in report.checks.items():
        assert tally.made > 0, name
        assert 0 <= tally.closest < 1, name


@pytest.mark.parametrize(
    ("number", "check"),
    [
        (1676, "rational alpha"),  # alpha is beyond float64
        (8696, "influence"),  # off the flow, after a product at the end of the range
        (17760, "max flow"),  # through a token: a cut far below the other capacities
        (39996, "rational alpha"),  # an edge with a flow that float64 cannot resolve
        (74280, "rational V"),  # two cuts of nearly the same capacity
    ],
)
def test_capacities_from_1e_300_to_1e300_hold_every_statement(number: int, check: str):
    """Graphs that failed a check in the run of 100,000 graphs."""
    report = fuzz(100_000, seed=0, only=number)
    assert report.failures == []
    assert report.checks[check].made > 0


def test_a_wrong_solver_is_found_and_repeated_by_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(reference, "influence", broken)
    common = ["--graphs", str(GROUP // 2), "--seed", str(QUIET_SEED), "--workers", "1"]
    assert main([*common, "--json", str(tmp_path / "found.json")]) == 1
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "found.json").read_text())
    numbers = sorted({failure["number"] for failure in record["failures"]})
    assert 0 < len(numbers) < GROUP // 4
    assert {failure["check"] for failure in record["failures"]} >= {"influence", "ways agree"}
    number = numbers[0]
    assert f"again: python -m benchmarks.fuzz.fuzz_certificates --graphs {GROUP // 2} --seed {QUIET_SEED} " in printed
    assert f"--only {number}\n" in printed

    again = fuzz(GROUP // 2, QUIET_SEED, only=number)
    assert again.graphs == 1
    assert {failure.number for failure in again.failures} == {number}
    innocent = next(k for k in range(GROUP // 2) if k not in numbers)
    assert fuzz(GROUP // 2, QUIET_SEED, only=innocent).failures == []
    assert main([*common, "--only", str(number)]) == 1
    listed = capsys.readouterr().out
    edges = re.findall(r"^    (\d+) -> (\d+)  (\S+)$", listed, re.MULTILINE)
    case = draw(QUIET_SEED, number)
    assert [(int(s), int(t), float.fromhex(c)) for s, t, c in edges] == [
        (s, t, float(c)) for s, t, c in zip(*case.pairs.tolist(), case.capacity, strict=True)
    ]
    assert any(t - s == 19 for s, t in case.pairs.T)

    monkeypatch.undo()
    assert main([*common, "--only", str(number)]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_an_error_is_a_failure_of_its_graph(monkeypatch: pytest.MonkeyPatch):
    def breaking(report: Report, options: Options, case: Case) -> None:
        raise ArithmeticError(f"no max flow of {case.tokens} tokens today")

    monkeypatch.setattr(fuzz_certificates, "_max_flows", breaking)
    report = fuzz(64, QUIET_SEED)
    assert {failure.check for failure in report.failures} == {"raised ArithmeticError"}
    cases = [draw(QUIET_SEED, number) for number in range(0, 64, 8)]
    wanted = [(case.number, f"no max flow of {case.tokens} tokens today") for case in cases if case.valid]
    assert [(failure.number, failure.detail) for failure in report.failures] == wanted
    assert "raised ArithmeticError" in {row["check"] for row in report.rows()}


def test_the_same_seed_draws_the_same_and_another_does_not():
    one, other = fuzz(40, QUIET_SEED), fuzz(40, QUIET_SEED)
    assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    alike, different = draw(QUIET_SEED, 7), draw(QUIET_SEED + 1, 7)
    assert np.array_equal(draw(QUIET_SEED, 7).capacity, alike.capacity)
    assert not np.array_equal(alike.capacity, different.capacity)


def test_graphs_are_of_every_kind_and_in_range():
    cases = [draw(0, number) for number in range(1200)]
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.tokens for case in cases} == set(range(1, 25))
    assert {case.weights for case in cases} == {"attention", "ties", "free", "spread", "wide"}
    assert {case.graph.capacity.dtype for case in cases} == {torch.float32, torch.float64}
    assert all(case.graph.validate(raise_on_error=False) == case.valid for case in cases)
    sinks = [case for case in cases if case.kind == "sink" and case.weights == "attention" and case.tokens > 2]
    assert all(np.allclose(case.capacity[case.pairs[0] == 0], 1 - 1e-7, atol=1e-7) for case in sinks)
    capacities = np.concatenate([case.capacity for case in cases if case.weights == "wide"])
    assert capacities.min() < 1e-290
    assert capacities.max() > 1e290


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graphs", "0"], "graphs: must be at least 1, got 0"),
        (["--graphs", "5", "--workers", "0"], "workers: must be at least 1, got 0"),
        (["--graphs", "5", "--seed", "-1"], "seed: must be at least 0, got -1"),
        (["--graphs", "5", "--only", "5"], r"only: must lie in 0\.\.4, got 5"),
    ],
)
def test_numbers_that_make_no_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)
