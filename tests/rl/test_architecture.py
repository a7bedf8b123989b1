"""rl uses only flowgraph's public names, its folders import one way, and its root is its API."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flowgraph
import rl

ROOT = Path(rl.__file__).parent
MODULES = {
    ".".join(("rl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "trl", "verl", "igraph", "reasoning_gym", "math_verify", "ray"}


def imports_of(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of every import in a file, inside functions and for types too; no name: the module itself."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return found


def modules_of(path: Path) -> set[str]:
    """The modules of rl that a file imports."""
    found = set()
    for module, name in imports_of(path):
        whole = f"{module}.{name}"
        found |= {whole if whole in MODULES else module} & MODULES.keys()
    return found


def stub_names() -> dict[str, str]:
    """Public name -> the module that the stub takes it from."""
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 1 for node in nodes)
    return {alias.asname or alias.name: f"rl.{node.module}" for node in nodes for alias in node.names}


# Stages in the order in which data flows. A stage imports only stages above it.
STAGES = [
    {"errors", "seeds", "records", "folders", "config"},
    {"tasks", "algorithm"},
    {"policy"},
    {"rollouts", "credit"},
    {"evaluation", "training", "reports"},
    {"integrations", "base_models", "alignment"},
    {"serving"},
    {"commands"},
    {"cli"},
]


def folder_imports() -> dict[str, dict[str, set[str]]]:
    """Map each folder to the folders it imports, with the importing modules."""
    graph: dict[str, dict[str, set[str]]] = {}
    for name, path in MODULES.items():
        if name == "rl":
            continue
        folder = name.split(".")[1]
        targets = graph.setdefault(folder, {})
        for module in modules_of(path) - {"rl"}:
            target = module.split(".")[1]
            if target != folder:
                targets.setdefault(target, set()).add(name)
    return graph


def test_modules_import_without_a_cycle():
    graph = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    assert not any("rl" in below for below in graph.values()), "a module imports the root"
    for name in list(graph):  # `from rl.credit import flow_rules` names the package and the module
        graph[name] -= {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
    list(TopologicalSorter(graph).static_order())  # raises CycleError on a cycle


def test_every_folder_has_a_stage():
    assert set(folder_imports()) == set().union(*STAGES)


def test_folders_import_only_earlier_stages():
    stage_of = {folder: number for number, stage in enumerate(STAGES) for folder in stage}
    # Modules of the first stage, and evaluation before training, build on each other in this order only.
    inner = {("seeds", "errors"), ("records", "errors"), ("folders", "errors"), ("config", "errors")}
    inner |= {("training", "evaluation")}
    climbs = {
        (folder, target): sorted(names)
        for folder, targets in folder_imports().items()
        for target, names in targets.items()
        if stage_of[target] >= stage_of[folder] and (folder, target) not in inner
    }
    assert climbs == {}


def test_only_public_names_of_flowgraph_are_used():
    public = set(dir(flowgraph)) | {"atomic_write", "holm"}
    used = set()
    for name, path in MODULES.items():
        for module, imported in imports_of(path):
            assert not module.startswith("flowgraph."), f"{name} looks into {module}"
            if module == "flowgraph":
                assert imported in public, f"{name} imports {imported} from flowgraph"
                used.add(imported)
    assert {"AttentionRecorder", "find_regions", "FlowgraphError"} <= used


def test_the_root_is_the_api():
    stub = stub_names()
    assert set(dir(rl)) == set(stub)
    assert len(stub) > 20
    for name, module in stub.items():
        value = getattr(rl, name)
        assert value is getattr(sys.modules[module], name), name
        assert callable(value), name
        assert value.__doc__, name


def test_no_public_name_hides_a_module():
    """With lazy loading a function and a module of one name would depend on who was imported first."""
    assert not {name.split(".")[1] for name in MODULES if "." in name} & set(stub_names())


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PPOTrainr"):
        _ = rl.PPOTrainr  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["rl", "rl.cli", "rl.errors", "rl.tasks", "rl.config", "rl.training.tracking"])
def test_importing_the_package_or_the_command_line_loads_nothing_heavy(module: str):
    code = f"import sys, {module}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""


def test_help_is_quick_for_it_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['flowgraph-rl', 'train', '--help']\n"
        "from rl.cli import main\n"
        "try: main()\n"
        f"except SystemExit as stop: print('code', stop.code, *({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "code 0"
