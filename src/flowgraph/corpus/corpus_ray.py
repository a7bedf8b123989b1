"""``CorpusRay``: where a corpus is traced on a Ray cluster, checked before Ray is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.tracing.generation import is_integer

LEAST_STORE = 75 * 2**20
"""Bytes of the smallest object store that Ray starts."""
LOCAL_STORE = 200 * 2**20
"""Bytes of the object store of a Ray that a run starts: only short rows pass through it."""
_OLDEST = (2, 60)
"""The oldest version that the tests have run with."""
_NEEDED = ("ray", "pyarrow", "pandas")
"""Ray, and what Ray Data imports."""
_INSTALL = "pip install 'flowgraph-llm[ray]'"
_MOST_WORKERS = 10_000
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
_LAST_PORT = 65_535


@dataclass(frozen=True)
class CorpusRay:
    """Where and how a corpus is traced on Ray.

    The folder of the results and the input file must have the same paths on every machine.

    Attributes:
        address: ``"HOST:PORT"`` of a cluster, or ``"auto"`` for the one that runs on this machine. None or ``"local"``:
            Ray is started here for the run; where the process is connected to Ray already, that Ray is used.
        workers: number of worker processes, each with a model; None: as many as processors (or GPUs) allow.
        threads: number of torch threads of a worker; None: as in this process. They decide the rounding.
        device: ``"cpu"`` or ``"cuda"`` (one GPU a worker, assigned by Ray); None: that of the model.
        object_store_memory: bytes of the object store of a Ray that is started here (default: 200 MiB); on a cluster,
            the most bytes of its store that the run uses (default: as Ray Data has it).
        retries: how often the work on a line is tried again after its worker died; then the line is reported.
        wait: seconds in which a cluster must answer.
        load: returns model and tokenizer in a worker; None: the model given is written to the folder of the run, and
            read by the workers.

    Raises:
        InvalidInputError: a value outside its range.
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    device: str | None = None
    object_store_memory: int | None = None
    retries: int = 3
    wait: float = 60.0
    load: Callable[[], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        """Refuse every value that Ray would refuse late, or not at all."""
        _check_address(self.address)
        _check_count("workers", self.workers, "leave it out to use every processor")
        _check_count("threads", self.threads, "leave it out to use as many as this process")
        if self.device not in (None, "cpu", "cuda"):
            raise InvalidInputError(
                f"device: must be 'cpu' or 'cuda' on Ray, which assigns the GPUs, got {self.device!r}; choose one"
            )
        store = self.object_store_memory
        if store is not None and (not is_integer(store) or store < LEAST_STORE):
            raise InvalidInputError(
                f"object_store_memory: must be a number of bytes from {LEAST_STORE} (75 MiB) on, got {store!r}; "
                f"{LOCAL_STORE} is the default"
            )
        if not is_integer(self.retries) or not 0 <= self.retries <= _MOST_WORKERS:
            raise InvalidInputError(f"retries: must be a number from 0 on, got {self.retries!r}; 3 is the default")
        is_duration = isinstance(self.wait, int | float) and not isinstance(self.wait, bool)
        if not is_duration or not 0 < self.wait < float("inf"):
            raise InvalidInputError(f"wait: must be a positive number of seconds, got {self.wait!r}; 60 is the default")

    @property
    def is_local(self) -> bool:
        """Whether no cluster is named."""
        return self.address in (None, "local")

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Host and port of the cluster; None where the address names neither."""
        match = _ADDRESS.fullmatch(self.address or "")
        if match is None:
            return None
        return match["host"].strip("[]"), int(match["port"])


def is_address(text: str) -> bool:
    """Return whether a text is an address that :class:`CorpusRay` takes."""
    try:
        _check_address(text)
    except InvalidInputError:
        return False
    return True


def _check_address(address: str | None) -> None:
    """Refuse an address of another form."""
    if address is None or address in ("local", "auto"):
        return
    if isinstance(address, str) and address.startswith("ray://"):
        raise InvalidInputError(
            f"ray: address must be that of the cluster itself, got {address!r} of the Ray Client, which Ray Data does "
            "not support for long runs; run the command on a machine of the cluster with 'auto', as by ray job submit"
        )
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or not 0 < int(match["port"]) <= _LAST_PORT:
        raise InvalidInputError(
            f"ray: address must be HOST:PORT, 'auto' or 'local', got {address!r:.80}; "
            "leave it out to start Ray on this machine"
        )


def _check_count(name: str, value: int | None, remedy: str) -> None:
    """Refuse a number of workers or threads that is not a positive integer."""
    if value is not None and (not is_integer(value) or not 1 <= value <= _MOST_WORKERS):
        raise InvalidInputError(f"{name}: must be a number from 1 to {_MOST_WORKERS}, got {value!r}; {remedy}")


def ray_choice(ray: CorpusRay | str | None) -> CorpusRay | None:
    """Read the argument ``ray`` and check that Ray is installed, before anything runs; None: one process.

    Raises:
        InvalidInputError: no such address.
        MissingExtraError: Ray Data is missing or too old.
    """
    if ray is None:
        return None
    choice = CorpusRay(address=ray) if isinstance(ray, str) else ray
    if not isinstance(choice, CorpusRay):
        raise InvalidInputError(
            f"ray: must be an address or a CorpusRay, got {ray!r:.80}; 'local' starts Ray on this machine"
        )
    check_ray_installed()
    return choice


def check_ray_installed() -> None:
    """Refuse an environment without Ray Data, without importing it.

    Raises:
        MissingExtraError: a package is missing, or Ray is too old.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        # A folder of this name, which Python would import.
        missing = missing or ["ray"]
        found = ""
    if missing:
        raise MissingExtraError(
            f"ray: needs Ray Data, got an environment without {' and '.join(missing)}; run {_INSTALL}, "
            "or leave ray out to run in one process"
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise MissingExtraError(
            f"ray: needs Ray {oldest} or newer, got {found}; run pip install --upgrade 'ray[data]>={oldest}', "
            "or leave ray out to run in one process"
        )


def device_of(choice: CorpusRay, model: nn.Module) -> str:
    """Return where the workers hold their model: ``"cpu"`` or ``"cuda"``.

    Raises:
        InvalidInputError: the model is on another kind of device, and none is chosen.
    """
    if choice.device is not None:
        return choice.device
    parameter = next(model.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(
            f"device: must be 'cpu' or 'cuda' on Ray, got a model on {kind!r}; move it, or pass CorpusRay(device='cpu')"
        )
    return kind
