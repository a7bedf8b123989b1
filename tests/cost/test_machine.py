"""Machines: the peaks of the data sheets, files of the user's own, and figures that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flowgraph as fg
from flowgraph.cost.machine import MACHINES, find_machine

PEAK = {"bfloat16": 100, "float16": 100, "float32": 50, "float64": 25}


def written(tmp_path: Path, entries: object) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_the_peaks_are_those_of_the_data_sheets():
    assert MACHINES["h100"].peak["bfloat16"] == 989e12
    assert MACHINES["h100"].bandwidth == 3.35e12
    assert MACHINES["h200"].peak == MACHINES["h100"].peak
    assert MACHINES["h200"].bandwidth == 4.8e12
    assert all("data sheet" in MACHINES[name].source for name in ("h100", "h200"))


def test_a_file_is_a_machine_and_to_dict_writes_one(tmp_path: Path):
    machine = find_machine(written(tmp_path, {"peak": PEAK, "bandwidth": 10}))
    assert machine == fg.Machine("mine", PEAK, 10.0)
    assert find_machine(written(tmp_path, MACHINES["h200"].to_dict())) == MACHINES["h200"]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bandwidth": 10}, r"machine: must have the field peak, got none in .*FLOP/s by dtype"),
        ({"peak": PEAK, "bandwidth": 0}, r"bandwidth: must be a positive finite number, got 0.0; give bytes/s"),
        ({"peak": PEAK, "bandwidth": "fast"}, r"bandwidth: must be a positive finite number, got 'fast'; give"),
        ({"peak": {"float32": 1}, "bandwidth": 1}, r"peak: must have FLOP/s for bfloat16, .*got \{'float32': 1.0\}; n"),
        ({"peak": PEAK | {"float64": -1}, "bandwidth": 1}, r"peak: float64: must be a positive .*got -1.0; give"),
        ({"peak": PEAK, "bandwidth": 1, "compute_efficiency": 1.5}, r"compute_efficiency: must lie in \(0, 1\], got"),
        ({"peak": PEAK, "bandwidth": 1, "speed": 3}, r"machine: its fields must be among .*got 'speed' in .*remove"),
        ({"peak": PEAK, "bandwidth": 1, "compiled_sweeps": 1}, r"compiled_sweeps: must be true or false, got 1.0; tr"),
        ([], r"machine: must be a file with one JSON object, got list in"),
    ],
)
def test_figures_that_give_no_time_are_refused(tmp_path: Path, entries: object, message: str):
    with pytest.raises(fg.InvalidInputError, match=message):
        find_machine(written(tmp_path, entries))


def test_an_unknown_machine_is_refused():
    with pytest.raises(fg.InvalidInputError, match=r"machine: must be h100, h200, cpu or a JSON file, got 'a100', "):
        find_machine("a100")
