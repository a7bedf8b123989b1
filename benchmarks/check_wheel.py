"""Check that an installed wheel is complete: all files, all public names, and one graph solved and rendered.

python benchmarks/check_wheel.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Check the wheel that is installed in the folder of the first argument."""
    folder = Path(sys.argv[1]).resolve()
    import torch

    import flowgraph as fg
    import rl

    # Both packages come from the folder, not from the source tree.
    for package in (fg, rl):
        assert package.__file__ is not None
        assert Path(package.__file__).is_relative_to(folder), f"{package.__name__} came from {package.__file__}"
        assert (Path(package.__file__).parent / "py.typed").is_file()

    # Every file of the source tree is in the wheel.
    source = Path(__file__).parent.parent / "src"
    absent = []
    for path in source.rglob("*"):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        relative = path.relative_to(source)
        if not (folder / relative).is_file():
            absent.append(str(relative))
    assert not absent, f"files that the wheel lacks: {absent}"

    # Every public name loads, and the templates of the page are found.
    missing = [name for name in dir(fg) if getattr(fg, name, None) is None]
    assert not missing, f"names that do not load: {missing}"
    weights = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
    flow = fg.solve(fg.FlowGraph.from_dense(weights, question=[0], answer=[3]))
    assert fg.certify(flow).ok
    from flowgraph.pages.trace_page import render_html
    from flowgraph.tracing.payload import trace_payload

    payload = trace_payload(
        flow,
        tokens="abcd",
        text="abcd",
        spans=torch.tensor([[k, k + 1] for k in range(4)]),
        generated=torch.arange(4) > 0,
        provenance={},
        keep=0.9,
        max_edges=10,
    )
    assert "<html" in render_html(payload)
    sys.stdout.write(f"wheel: {len(dir(fg))} public names load, a graph solves and renders\n")


if __name__ == "__main__":
    main()
