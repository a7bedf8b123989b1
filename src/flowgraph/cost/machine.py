"""``Machine``: peak FLOP/s, memory bandwidth and assumed efficiencies, by name or from a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flowgraph.cost.json_records import positive_number, read_object, shown
from flowgraph.errors import InvalidInputError

PRECISIONS = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a weight in each precision that a model may have."""

_PEAKS = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Machine:
    """What a device can do at most, and the shares of it that are assumed.

    Attributes:
        name: for tables.
        peak: dtype -> FLOP/s without sparsity; ``bfloat16``, ``float16``, ``float32`` and ``float64``. float32 is the
            rate without TF32, which PyTorch does not use for matrix products by default.
        bandwidth: bytes/s of the memory.
        compute_efficiency: share of the peak that matrix products reach, in (0, 1].
        bandwidth_efficiency: share of the bandwidth that elementwise operations reach, in (0, 1].
        call_seconds: time that starting one operation takes at least.
        compiled_sweeps: whether dense sweeps run as compiled code (numba, on a CPU) or in PyTorch.
        source: where the peaks come from.

    Raises:
        InvalidInputError: a number that is not positive, a share above 1, or a missing dtype.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    compute_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.7
    call_seconds: float = 5e-6
    compiled_sweeps: bool = False
    source: str = field(default="the user's own figures", compare=False)

    def __post_init__(self) -> None:
        """Refuse figures that give no time."""
        if not isinstance(self.peak, Mapping) or set(self.peak) != set(_PEAKS):
            raise InvalidInputError(
                f"peak: must have FLOP/s for {', '.join(_PEAKS)}, got {shown(self.peak)}; name each once, and repeat "
                "the float32 rate for a precision that the device lacks"
            )
        for dtype in _PEAKS:
            positive_number(f"peak: {dtype}", self.peak[dtype], "give FLOP/s, such as 989e12")
        positive_number("bandwidth", self.bandwidth, "give bytes/s, such as 3.35e12")
        positive_number("call_seconds", self.call_seconds, "give seconds, such as 5e-6")
        for name in ("compute_efficiency", "bandwidth_efficiency"):
            share = positive_number(name, getattr(self, name), "give a share of the peak, such as 0.5")
            if share > 1:
                raise InvalidInputError(f"{name}: must lie in (0, 1], got {share:g}; no machine exceeds its peak")
        if not isinstance(self.compiled_sweeps, bool):
            raise InvalidInputError(
                f"compiled_sweeps: must be true or false, got {shown(self.compiled_sweeps)}; true is for a CPU with "
                "numba"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a file of them is a machine for ``--machine``."""
        return {**asdict(self), "peak": dict(self.peak)}


def _hopper(name: str, bandwidth: float, source: str) -> Machine:
    """Return a GPU of NVIDIA's Hopper generation; H100 SXM and H200 SXM differ in their memory."""
    peak = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 34e12}
    return Machine(name, peak, bandwidth, source=source)


MACHINES = {
    "h100": _hopper(
        "H100 SXM",
        3.35e12,
        "NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOP/s bfloat16 with sparsity, half of it without; "
        "67 TFLOP/s float32; 34 TFLOP/s float64 without tensor cores; 3.35 TB/s",
    ),
    "h200": _hopper(
        "H200 SXM",
        4.8e12,
        "NVIDIA H200 Tensor Core GPU data sheet, SXM: the rates of the H100 SXM; 4.8 TB/s",
    ),
    "cpu": Machine(
        "2 cores of a CPU",
        {"bfloat16": 208e9, "float16": 208e9, "float32": 208e9, "float64": 104e9},
        28.8e9,
        compute_efficiency=0.8,
        bandwidth_efficiency=0.5,
        call_seconds=1e-5,
        compiled_sweeps=True,
        source="AMD EPYC 9354 product page: 32 cores, 3.25 GHz, 460.8 GB/s a socket; two 256-bit multiply-adds a "
        "cycle and core; the two cores have their part of the bandwidth",
    ),
}
"""Machines by name. None of the efficiencies was measured on a GPU."""


def find_machine(machine: str | Path | Machine) -> Machine:
    """Return a machine.

    Args:
        machine: ``"h100"``, ``"h200"`` or ``"cpu"``, a JSON file with the fields of :class:`Machine`, or a machine.

    Raises:
        InvalidInputError: an unknown name, or a file without the fields.
    """
    if isinstance(machine, Machine):
        return machine
    if not isinstance(machine, (str, Path)):
        raise InvalidInputError(
            f"machine: must be a name, a path or a Machine, got {type(machine).__name__}; names are "
            f"{', '.join(MACHINES)}"
        )
    # Names come first, as for models.
    if str(machine).lower() in MACHINES:
        return MACHINES[str(machine).lower()]
    path = Path(machine)
    if not path.is_file():
        raise InvalidInputError(
            f"machine: must be {', '.join(MACHINES)} or a JSON file, got {str(machine)!r}, which is neither; check the "
            "name or the path"
        )
    return _machine_of_file(path)


def _machine_of_file(path: Path) -> Machine:
    """Read a machine from a JSON file with the fields of the record."""
    entries = read_object("machine", path, "write the fields of flowgraph.Machine")
    known = {entry.name for entry in fields(Machine)}
    unknown = sorted(set(entries) - known)
    if unknown:
        raise InvalidInputError(
            f"machine: its fields must be among {', '.join(sorted(known))}, got {shown(unknown[0])} in {str(path)!r}; "
            "remove it or correct its name"
        )
    missing = sorted({"peak", "bandwidth"} - set(entries))
    if missing:
        raise InvalidInputError(
            f"machine: must have the field {missing[0]}, got none in {str(path)!r}; peak is FLOP/s by dtype, bandwidth "
            "is bytes/s"
        )
    # JSON writes 989e12 and 989000000000000 alike.
    numbers = {name: _as_float(value) for name, value in entries.items()}
    if isinstance(entries["peak"], dict):
        numbers["peak"] = {dtype: _as_float(rate) for dtype, rate in entries["peak"].items()}
    return Machine(**{"name": path.stem, **numbers})


def _as_float(value: Any) -> Any:
    """Return an integer as a float, and anything else unchanged."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_integer else value
