"""Make the reference: an index of each package by stage, and a page for each public name.

The names come from the packages' stubs (``__init__.pyi``), the texts from the docstrings. Each page shows the entries
of the gallery that use the name, and lists the tutorials and the other pages whose text or examples use it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from api_names import public_names, summary_of
from error_messages import messages_of, table_of
from gallery_entries import FOLDER as GALLERY
from gallery_entries import cards, entry_names
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from script_names import names_used

TUTORIALS = GALLERY.parent / "tutorials"

ALIASES = {"flowgraph": ("fg", "flowgraph"), "rl": ("rl",)}
"""The names under which examples import a package."""

FOLDER_TITLES = {
    "tracing": "Trace a text",
    "capacities": "Capacities: what an edge weighs",
    "attention": "Attention of a model",
    "graph": "Graphs",
    "flow": "Flows and compositions",
    "analysis": "What a flow says",
    "maxflow": "Exact max flow",
    "certificate": "Certificates",
    "text": "Texts, regions and answers",
    "selectors": "Texts, regions and answers",
    "steps": "Lines, sentences and steps",
    "comparison": "Compare traces",
    "interventions": "Interventions",
    "cost": "Cost estimates",
    "evaluation": "Evaluation of explanations",
    "corpus": "Corpora",
    "exchange": "Other libraries and file formats",
    "plots": "Figures and pages",
    "pages": "Figures and pages",
    "propagation": "Solvers",
    "files": "Files",
    "errors": "Exceptions",
    "training": "Training",
    "config": "Settings",
    "credit": "Token credit",
    "alignment": "Compare credit rules",
    "tasks": "Tasks",
    "policy": "Policies",
    "records": "Records",
    "algorithm": "Losses and advantages",
    "reports": "Reports",
    "integrations": "Other trainers",
}
MODULE_PAGES = {
    "flowgraph": {
        "Selectors": "flowgraph.text.selectors",
        "Checks of a certificate": "flowgraph.certificate.checks",
        "Data of a page of relevance": "flowgraph.tracing.relevance_payload",
        "Gradient capacities": "flowgraph.capacities.gradient",
        "Options of a trace": "flowgraph.tracing.trace_options",
    },
    "rl": {
        "Rules that use the flow": "rl.credit.flow_rules",
        "Rules that read attention": "rl.credit.attention_rules",
        "Rules that use the policy, and controls": "rl.credit.policy_rules",
        "Schedules": "rl.algorithm.schedules",
        "Answers": "rl.tasks.answers",
        "Credit in TRL": "rl.integrations.trl",
        "Credit in any trainer": "rl.integrations.tensors",
    },
}
"""Modules that have a page of their own, because users read them though their names are not public."""

_FENCE = re.compile(r"^```(?:python|py|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages of the reference to the site."""
    pages = {
        file.src_uri: Path(file.abs_src_path).read_text(encoding="utf-8")
        for file in files.documentation_pages()
        if file.abs_src_path is not None and file.src_uri.endswith(".md")
    }
    for package in ALIASES:
        for name, place in public_names(package).items():
            content = _page_of(package, name, place, pages)
            files.append(File.generated(config, f"api/{package}/{name}.md", content=content))
        for title, module in MODULE_PAGES[package].items():
            content = (
                f"---\ntitle: {title}\n---\n\n# {title}\n\n::: {module}\n    options: {{show_root_heading: false}}\n"
            )
            files.append(File.generated(config, f"api/{package}/modules/{module}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the index of a package where its page has a comment for it."""
    for package in ALIASES:
        placeholder = f"<!-- names of {package} -->"
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, _index_of(package))
    return markdown


def _page_of(package: str, name: str, place: str, pages: dict[str, str]) -> str:
    """Return the Markdown of one page."""
    heading = f"{package}.{name}"
    lines = [
        "---",
        f"title: {heading}",
        f"description: {json.dumps(summary_of(place))}",
        "---",
        "",
        f"::: {place}",
        "    options:",
        f"      heading: {heading}",
        "      heading_level: 1",
    ]
    messages = messages_of(package).get(name, [])
    if messages:
        lines += [
            "",
            "## Messages",
            "",
            "Each message names the argument, the rule, the value that it got and a remedy.",
        ]
        lines += ["", *table_of(messages)]
    entries = [entry for entry in entry_names() if (package, name) in names_used(GALLERY / f"{entry}.py")]
    if entries:
        lines += ["", "## In the gallery", "", *cards(entries, "../../", with_points=False)]
    users = [*_tutorials_using(package, name), *_pages_using(package, name, pages)]
    if users:
        lines += ["", "## Used in", ""]
        lines += [f"- [{title}](../../{uri})" for uri, title in users]
    index = "reference.md" if package == "flowgraph" else f"reference-{package}.md"
    lines += ["", f"[All names of {package}](../../{index})", ""]
    return "\n".join(lines)


def _tutorials_using(package: str, name: str) -> list[tuple[str, str]]:
    """List the tutorials whose script uses a name, also through an object, with their titles."""
    users = []
    for script in sorted(TUTORIALS.glob("*.py")):
        if (package, name) in names_used(script):
            heading = re.search(r"^# # (.+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
            users.append((f"tutorials/{script.stem}.ipynb", f"Tutorial: {heading[1] if heading else script.stem}"))
    return users


def _pages_using(package: str, name: str, pages: dict[str, str]) -> list[tuple[str, str]]:
    """List the pages whose examples use a name, or whose text names it, with their titles."""
    prefixes = "|".join(ALIASES[package])
    in_code = re.compile(rf"\b(?:{prefixes})\.{name}\b|^from {package}\b.*\bimport\b.*\b{name}\b", re.MULTILINE)
    in_text = re.compile(rf"`(?:(?:{prefixes})\.)?{name}(?:\(.*?\))?`")
    users = []
    for uri, text in pages.items():
        examples = "\n".join(_FENCE.findall(text))
        is_distinct = len(name) > 4
        if in_code.search(examples) or (is_distinct and in_text.search(text)):
            heading = re.search(r"^# (.+)$", text, re.MULTILINE)
            users.append((uri, heading[1] if heading else uri))
    return users


def _index_of(package: str) -> str:
    """Return the Markdown of the index: a table for each stage."""
    sections: dict[str, list[str]] = {}
    for name, place in public_names(package).items():
        folder = place.split(".")[1]
        title = FOLDER_TITLES.get(folder, folder.replace("_", " ").capitalize())
        # A bar would end the cell of a table.
        summary = summary_of(place).replace("|", r"\|")
        row = f"| [`{name}`](api/{package}/{name}.md) | {summary} |"
        sections.setdefault(title, []).append(row)

    order = list(dict.fromkeys(FOLDER_TITLES.values()))
    lines = []
    for title in sorted(sections, key=lambda title: order.index(title) if title in order else len(order)):
        rows = sorted(sections[title], key=str.lower)
        lines += ["", f"## {title}", "", "| name | what it is |", "|---|---|", *rows]
    lines += ["", "## Modules", ""]
    lines += [f"- [{title}](api/{package}/modules/{module}.md)" for title, module in MODULE_PAGES[package].items()]
    return "\n".join(lines) + "\n"
