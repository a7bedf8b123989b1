"""The rooms stay in order: imports run one way, the root is the API, and flowgraph never needs rl."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import flowgraph

ROOT = Path(flowgraph.__file__).parent
MODULES = {
    ".".join(("flowgraph", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

PUBLIC = {
    "AttentionRecorder",
    "AttentionRows",
    "Backbone",
    "CaptureError",
    "Certificate",
    "Check",
    "Comparison",
    "Contraction",
    "CorpusProgress",
    "CorpusSummary",
    "EdgeRules",
    "EncodedText",
    "CorpusFields",
    "Flow",
    "FlowGraph",
    "FlowTrace",
    "FlowgraphError",
    "GapReport",
    "GraphError",
    "HeadSelector",
    "HubTest",
    "InfeasibleFlowError",
    "Intervention",
    "InvalidInputError",
    "KnockoutResult",
    "MaxFlow",
    "MemoryLimitError",
    "MissingExtraError",
    "NoAnswerError",
    "NumericalRangeError",
    "OutputError",
    "RegionError",
    "Regions",
    "Route",
    "RowFlow",
    "Step",
    "StepFlow",
    "TokenRole",
    "TooLargeError",
    "TraceFileError",
    "atomic_write",
    "attention_cell",
    "attention_cut",
    "attention_flow",
    "attention_rollout",
    "backbone",
    "capture",
    "certify",
    "certify_each",
    "checkpoints",
    "compare",
    "contract",
    "decompose",
    "dominators",
    "encode",
    "find_question",
    "find_regions",
    "from_igraph",
    "from_networkx",
    "from_pyg",
    "gap_report",
    "gap_table",
    "hub_test",
    "hubs",
    "knockout",
    "knockouts",
    "layered_graph",
    "load_trace",
    "max_flow",
    "max_flow_bracket",
    "max_flow_through",
    "max_flow_without",
    "plot_comparison",
    "plot_potentials",
    "plot_steps",
    "plot_throughput",
    "prune",
    "read_edges",
    "read_gexf",
    "read_graphml",
    "read_json",
    "render_page",
    "save_figure",
    "solve",
    "solve_rows",
    "split_steps",
    "to_igraph",
    "to_networkx",
    "to_pyg",
    "trace",
    "trace_file",
    "widest_routes",
    "write_edges",
    "write_gexf",
    "write_graphml",
    "write_tokens",
}


def imports_of(path: Path) -> set[str]:
    """Every flowgraph module a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_form_a_ladder():
    graph = {name: {m for m in imports_of(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    for name in graph:
        if name.startswith("flowgraph.commands."):
            graph[name] -= {"flowgraph"}  # the command line uses the public API, like any user
    assert not any("flowgraph" in below for below in graph.values()), "a room imports the root"
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError on a cycle
    for climb in (["graph", "flow", "flowtrace"], ["spans", "chat", "text", "selectors", "regions", "tracing"]):
        floors = [order.index(f"flowgraph.{name}") for name in climb]
        assert floors == sorted(floors), climb


def test_flowgraph_needs_neither_rl_nor_training_packages():
    forbidden = {"rl", "peft", "accelerate", "trl", "verl"}
    for name, path in MODULES.items():
        assert not {m.split(".")[0] for m in imports_of(path)} & forbidden, name


def test_the_root_is_the_api():
    assert set(dir(flowgraph)) == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(flowgraph, name)), name


def test_no_public_name_hides_a_module():
    """With lazy loading a function and a module of one name would depend on who was imported first."""
    assert not {name.split(".")[1] for name in MODULES if "." in name} & PUBLIC


def test_importing_the_package_or_the_command_line_loads_nothing_heavy():
    code = "import sys, flowgraph, flowgraph.cli, rl; print(*({'torch', 'transformers', 'igraph'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
