"""What the command line asks for, checked before any work."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


class OptionError(ValueError):
    """An option that cannot be followed: which one, the rule, the value got, the remedy."""


class Named(Protocol):
    """Whatever has the name of a section."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """A run, as it was asked for.

    Attributes:
        out: folder of the results; it exists and can be written.
        toy: whether sizes are those of a test.
        sections: names of the sections to run, in their own order.
        device: where the work is done; it has been used once.
        budget: seconds in all.
        seed: of every random number.
        continued: identifier of the run that this process goes on with; None: a new run.
    """

    out: Path
    toy: bool
    sections: tuple[str, ...]
    device: torch.device
    budget: float
    seed: int
    continued: str | None = None


def read_options(given: argparse.Namespace, sections: Sequence[Named]) -> Options:
    """Check every option of the command line.

    Raises:
        OptionError: an unknown section, a budget that is no positive number, a device that cannot be used, full sizes
            on a CPU, or a folder that cannot be written.
    """
    names = _section_names(given.sections, [section.name for section in sections])
    if not (math.isfinite(given.budget) and given.budget > 0):
        raise OptionError(
            f"--budget: must be a positive number of seconds, got {given.budget:g}; 480 is the default, --toy needs "
            "about 60"
        )
    device = usable_device(given.device or ("cpu" if given.toy else "cuda"))
    if device.type == "cpu" and not given.toy:
        raise OptionError(
            f"--device: must be a GPU for the full sizes, got {str(device)!r}, which would take hours; pass --toy for "
            "sizes that a CPU can do"
        )
    out = _writable_folder(Path(given.out))
    return Options(out, given.toy, names, device, given.budget, given.seed, given.continued)


def usable_device(name: str) -> torch.device:
    """The device of this name, after one tensor was made on it.

    Raises:
        OptionError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OptionError(
            f"--device: must be one that torch can use here, got {name!r} ({lines[0][:120]}); run on a machine with "
            "that device, or pass --toy, which runs on the CPU"
        ) from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _section_names(given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if given is None:
        return tuple(known)
    asked = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        got = repr(unknown[0]) if unknown else "none"
        raise OptionError(
            f"--sections: must name sections of this benchmark, got {got}; there are {', '.join(known)}, separated by "
            "commas"
        )
    return tuple(name for name in known if name in asked)


def _writable_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(
            f"--out: must be a folder that can be written, got {str(folder)!r} ({reason}); choose another place"
        ) from error
    return folder
