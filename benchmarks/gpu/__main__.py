"""Measure the project on one GPU within a fixed time.

    python -m benchmarks.gpu --out DIR [--toy] [--sections a,b,...] [--device cuda] [--budget 480]

Writes one JSON file per section and ``summary.json`` into DIR. A section that fails, or for which no time is left, is
recorded with its reason and the next one goes on. ``--toy`` runs every section at toy sizes on a CPU, in about a
minute. Nothing is downloaded.

Exit codes: 0 every section ran and every check held, 1 something failed, was skipped or did not hold, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # cuBLAS refuses deterministic mode without a fixed workspace. This is the size that PyTorch gives it on Hopper.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment variables that must be set before torch and transformers are imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line names; returns the exit code."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from benchmarks.gpu.options import OptionError, read_options
    from benchmarks.gpu.run import run_sections
    from benchmarks.gpu.sections import SECTIONS

    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(SECTIONS)
    try:
        options = read_options(parser.parse_args(given), SECTIONS)
    except OptionError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    return run_sections(options, SECTIONS)


def _parser(sections: Sequence[object]) -> argparse.ArgumentParser:
    names = ", ".join(getattr(section, "name", "") for section in sections)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results; made if it is missing")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU unless --device names another")
    parser.add_argument("--sections", metavar="a,b", help=f"which to run, separated by commas, of {names}; default all")
    parser.add_argument("--device", help="a torch device; default cuda, or cpu with --toy")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="time in all; default 480")
    parser.add_argument("--seed", type=int, default=0, help="of every random number; default 0")
    parser.add_argument("--continue", dest="continued", metavar="RUN", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
