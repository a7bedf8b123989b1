"""Run the scripts of the gallery with the demo model; write their pictures and docs/gallery/results.json.

    python -m benchmarks.gallery                    all of them
    python -m benchmarks.gallery steps max_flow     some of them

A script runs in an empty folder and saves a figure of its own name, which becomes docs/images/gallery/NAME.svg. What it
prints and the processor time that it took go to results.json, for its page. The model is loaded once, before all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

from benchmarks.common import machine
from flowgraph import atomic_write, demo

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "gallery"
IMAGES = ROOT / "docs" / "images" / "gallery"
RESULTS = FOLDER / "results.json"


@dataclass(frozen=True)
class Run:
    """What one script gave.

    Attributes:
        picture: the figure as SVG.
        output: what it printed.
        seconds: processor time, without loading the demo model.
    """

    picture: bytes
    output: str
    seconds: float


def scripts() -> list[Path]:
    """List the scripts of the gallery by name."""
    return sorted(FOLDER.glob("*.py"))


def run(script: Path) -> Run:
    """Run a script in an empty folder.

    Raises:
        FileNotFoundError: the script saved no figure of its own name.
    """
    # The script's own lines carry its name, as in a file of their own.
    code = compile(script.read_text(encoding="utf-8"), script.name, "exec")
    printed = io.StringIO()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, before)
        stack.enter_context(contextlib.redirect_stdout(printed))
        # Text stays text in the SVG: the file is smaller, and the browser chooses the font.
        stack.enter_context(matplotlib.rc_context({"svg.fonttype": "none"}))
        begun = time.process_time()
        exec(code, {"__name__": "__main__"})
        seconds = time.process_time() - begun
        plt.close("all")
        picture = Path(f"{script.stem}.svg").read_bytes()
    return Run(picture, printed.getvalue(), seconds)


def main() -> None:
    """Run the scripts that are asked for; keep the results of the others."""
    parser = argparse.ArgumentParser(description="Run scripts of the gallery and write their pictures.")
    parser.add_argument("names", nargs="*", help="of the scripts in docs/gallery; default: all")
    names = parser.parse_args().names
    known = {path.stem: path for path in scripts()}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"names: must be of {', '.join(known)}, got {', '.join(unknown)}; leave them out for all")

    # One model for all scripts. Loading it is no part of what an entry shows, so it is not timed.
    loaded = demo.load_demo_model(print)
    demo.load_demo_model = lambda *_: loaded
    entries: dict[str, Any] = {}
    if RESULTS.is_file():
        entries = json.loads(RESULTS.read_text(encoding="utf-8"))["entries"]
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in names or known:
        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(known[name])
        torch.set_num_threads(threads)
        (IMAGES / f"{name}.svg").write_bytes(result.picture)
        entries[name] = {"seconds": round(result.seconds, 1), "output": result.output}
        # After each script, so that a run that is stopped loses nothing. Entries whose script is gone are left out.
        kept = {name: entries[name] for name in known if name in entries}
        with atomic_write(RESULTS) as temporary:
            content = json.dumps({"machine": machine(), "entries": kept}, indent=1, ensure_ascii=False)
            temporary.write_text(content + "\n", encoding="utf-8")
        print(f"{name}: {result.seconds:.1f} s, {len(result.picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
