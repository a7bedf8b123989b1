"""Imports run one way between folders, the root is the API, and flowgraph never needs rl."""

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
    "Evaluation",
    "EvaluationItem",
    "EvaluationMethod",
    "EvaluationProgress",
    "EvaluationTask",
    "Explanation",
    "Metric",
    "Subject",
    "Truth",
    "evaluate",
    "evaluation_method",
    "evaluation_methods",
    "evaluation_task",
    "evaluation_tasks",
    "PlantedScore",
    "PlantedTruth",
    "planted_check",
    "planted_items",
    "planted_model",
    "planted_table",
    "planted_truth",
    "randomized_copy",
    "AttentionRecorder",
    "AttentionRows",
    "Backbone",
    "Baseline",
    "Baselines",
    "step_relevance",
    "capacity_names",
    "capacity",
    "StepRelevance",
    "RelevanceRows",
    "CapacityInput",
    "Capacity",
    "CaptureError",
    "Certificate",
    "Check",
    "ClusterError",
    "Comparison",
    "ComposedScores",
    "Composition",
    "Contraction",
    "CorpusProgress",
    "CorpusRay",
    "CorpusSummary",
    "CostEstimate",
    "CostStage",
    "Edge",
    "EdgeParts",
    "EdgeRules",
    "EncodedText",
    "CorpusFields",
    "FinalPart",
    "Flow",
    "FlowGraph",
    "FlowTrace",
    "FlowgraphError",
    "GapReport",
    "GraphError",
    "RelevanceEdge",
    "RelevanceTrace",
    "SignedFlow",
    "SignedGraph",
    "Specificity",
    "HeadSelector",
    "HubTest",
    "InfeasibleFlowError",
    "Intervention",
    "InvalidInputError",
    "KnockoutResult",
    "Machine",
    "MaxFlow",
    "MemoryLimitError",
    "MissingExtraError",
    "ModelShape",
    "NoAnswerError",
    "NumericalRangeError",
    "OutputError",
    "RegionError",
    "Regions",
    "Route",
    "RowFlow",
    "RowSource",
    "Sensitivity",
    "StatedAnswer",
    "Step",
    "StepFlow",
    "TokenRole",
    "TooLargeError",
    "TraceFileError",
    "Variation",
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
    "compose",
    "composed_scores",
    "composition",
    "composition_names",
    "context_length",
    "contract",
    "decompose",
    "dominators",
    "encode",
    "estimate_cost",
    "final_part",
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
    "load_relevance",
    "load_trace",
    "relevance_flow",
    "max_flow",
    "max_flow_bracket",
    "max_flow_through",
    "max_flow_without",
    "plot_comparison",
    "plot_evaluation",
    "plot_potentials",
    "plot_steps",
    "plot_throughput",
    "prune",
    "read_edges",
    "read_gexf",
    "read_graphml",
    "read_json",
    "render_page",
    "response_opening",
    "save_figure",
    "selectors",
    "solve",
    "specificity",
    "solve_rows",
    "split_steps",
    "stated_answers",
    "to_igraph",
    "to_networkx",
    "to_pyg",
    "trace",
    "trace_corpus",
    "widest_routes",
    "write_edges",
    "write_gexf",
    "write_graphml",
    "write_tokens",
}


def imports_of(path: Path) -> set[str]:
    """List every flowgraph module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


# Stages in the order in which data flows. A stage imports only stages above it; folders of one stage do not
# import each other. See docs/architecture.md.
STAGES = [
    {"errors", "masks", "memory", "files", "demo", "display"},
    {"propagation", "text"},
    {"attention"},
    {"capacities"},
    {"graph"},
    {"flow", "cost"},
    {"maxflow", "steps"},
    {"certificate", "analysis"},
    {"pages"},
    {"tracing"},
    {"comparison", "interventions", "exchange", "corpus"},
    {"evaluation"},
    {"plots", "commands"},
    {"cli"},
]
ROOT_API = {"selectors"}
"""Modules at the root that only re-export names, as the root itself does."""


def folder_of(module: str) -> str:
    """Fold a module to its folder, or to itself where it lies at the root."""
    return module.split(".")[1]


def folder_imports() -> dict[str, dict[str, set[str]]]:
    """Map each folder to the folders it imports, with the importing modules."""
    graph: dict[str, dict[str, set[str]]] = {}
    for name, path in MODULES.items():
        if name == "flowgraph" or folder_of(name) in ROOT_API:
            continue
        targets = graph.setdefault(folder_of(name), {})
        for module in imports_of(path) & MODULES.keys() - {"flowgraph"}:
            if folder_of(module) != folder_of(name):
                targets.setdefault(folder_of(module), set()).add(name)
    return graph


def test_modules_import_without_a_cycle():
    graph = {name: {m for m in imports_of(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    for name in graph:
        if name.startswith("flowgraph.commands."):
            graph[name] -= {"flowgraph"}  # the command line uses the public API, like any user
    assert not any("flowgraph" in below for below in graph.values()), "a module imports the root"
    list(TopologicalSorter(graph).static_order())  # raises CycleError on a cycle


def test_every_folder_has_a_stage():
    assert set(folder_imports()) == set().union(*STAGES)


def test_folders_import_only_earlier_stages():
    stage_of = {folder: number for number, stage in enumerate(STAGES) for folder in stage}
    # Within the two stages whose folders build on each other, the order is fixed as well.
    inner = {("masks", "errors"), ("memory", "errors"), ("files", "errors"), ("demo", "errors"), ("demo", "files")}
    inner |= {("comparison", "interventions"), ("plots", "commands"), ("commands", "plots")}
    climbs = {
        (folder, target): sorted(names)
        for folder, targets in folder_imports().items()
        for target, names in targets.items()
        if stage_of[target] >= stage_of[folder] and (folder, target) not in inner
    }
    assert climbs == {}


def test_flowgraph_needs_neither_rl_nor_training_packages():
    forbidden = {"rl", "peft", "accelerate", "trl", "verl"}
    for name, path in MODULES.items():
        assert not {m.split(".")[0] for m in imports_of(path)} & forbidden, name


def test_the_root_is_the_api():
    assert set(dir(flowgraph)) == PUBLIC
    for name in PUBLIC - {"selectors"}:
        assert callable(getattr(flowgraph, name)), name


def test_no_public_name_hides_a_module():
    """With lazy loading a function and a module of one name would depend on who was imported first."""
    assert not ({name.split(".")[1] for name in MODULES if "." in name} & PUBLIC) - {"selectors"}


def test_importing_the_package_or_the_command_line_loads_nothing_heavy():
    code = "import sys, flowgraph, flowgraph.cli, rl; print(*({'torch', 'transformers', 'igraph'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
