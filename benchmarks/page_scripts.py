"""Write the script of each page as one file, so that a linter sees every name that is declared and used.

python -m benchmarks.page_scripts FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import rl
from flowgraph.pages.page import asset, join_scripts
from flowgraph.pages.trace_page import SCRIPTS

PAGES = {
    "trace": [asset(f"scripts/{name}.js") for name in SCRIPTS],
    "comparison": [asset("comparison.js")],
    "corpus": [asset("corpus.js")],
    "evaluation": [asset("evaluation.js")],
    "credit": [(Path(str(rl.__file__)).parent / "reports" / "credit_report.js").read_text(encoding="utf-8")],
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, scripts in PAGES.items():
        (folder / f"{name}.js").write_text(join_scripts(scripts), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
